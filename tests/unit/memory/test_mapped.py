"""Parts of files that are mapped, and mappings that are seen once more in a row; the dirty log's memory."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
from collections.abc import Iterator

import pytest

from in_process import mapped_files, open_fds
from pyvhost.host import memfd
from pyvhost.memory.dirty_log import BYTES_A_BYTE, DirtyLog
from pyvhost.memory.mapped import Guard, Mapped

PAGE = mmap.PAGESIZE


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    fds, maps = open_fds(), mapped_files()
    yield
    assert open_fds() == fds
    assert mapped_files() == maps


@pytest.fixture
def fd() -> Iterator[int]:
    """Eight pages, each filled with its number."""
    made = memfd.create("test", 8 * PAGE)
    for page in range(8):
        os.pwrite(made, bytes([page]) * PAGE, page * PAGE)
    yield made
    os.close(made)


def at(address: int, length: int) -> bytes:
    return ctypes.string_at(address, length)


def test_a_part_begins_where_it_was_asked_for_and_is_the_files(fd: int) -> None:
    mapped = Mapped.of(fd, 2 * PAGE - 1, PAGE + 2, "it")
    assert at(mapped.address, PAGE + 2) == b"\1" + b"\2" * PAGE + b"\3"
    ctypes.memset(mapped.address, 0x77, 1)
    assert os.pread(fd, 2, 2 * PAGE - 2) == b"\1\x77"
    os.pwrite(fd, b"\x55", 2 * PAGE)
    assert at(mapped.address + 1, 1) == b"\x55"
    mapped.close()
    mapped.close()
    os.fstat(fd)


@pytest.mark.parametrize(
    ("offset", "size"), [(0, 8 * PAGE + 1), (8 * PAGE, 1), (1, 8 * PAGE), (1 << 62, PAGE)]
)
def test_what_is_not_in_the_file_is_refused(fd: int, offset: int, size: int) -> None:
    with pytest.raises(OSError, match="it: bytes 0x") as caught:
        Mapped.of(fd, offset, size, "it")
    assert caught.value.errno == errno.EINVAL


def test_pages_apart_are_seen_in_a_row(fd: int) -> None:
    whole = Mapped.of(fd, 0, 8 * PAGE, "it")
    base = whole.address
    parts = [(base + 6 * PAGE - 10, 10), (base + 2 * PAGE, 2 * PAGE), (base, 5)]
    row = Mapped.stitched(parts)
    assert at(row.address, 2 * PAGE + 15) == b"\5" * 10 + b"\2" * PAGE + b"\3" * PAGE + b"\0" * 5
    # Both views are the same memory, whoever writes, and the file's.
    ctypes.memset(row.address + 9, 0xAA, 2)
    assert at(base + 6 * PAGE - 1, 1) == at(base + 2 * PAGE, 1) == b"\xaa"
    os.pwrite(fd, b"\xbb", 4)
    assert at(row.address + 2 * PAGE + 14, 1) == b"\xbb"
    # It outlives what it was made of.
    whole.close()
    assert at(row.address + 10 + PAGE, PAGE) == b"\3" * PAGE
    row.close()


def test_a_page_may_be_there_more_than_once(fd: int) -> None:
    whole = Mapped.of(fd, 0, 8 * PAGE, "it")
    row = Mapped.stitched([(whole.address + PAGE, PAGE)] * 3)
    ctypes.memset(row.address, 0x99, 1)
    assert at(row.address + 2 * PAGE, 1) == b"\x99"
    row.close()
    whole.close()


@pytest.mark.parametrize(
    "parts",
    [
        [(0, PAGE - 1), (PAGE, PAGE)],
        [(0, PAGE), (PAGE + 8, 8)],
        [(8, PAGE), (PAGE, PAGE)],
        [(0, PAGE), (2 * PAGE, 100), (3 * PAGE, PAGE)],
    ],
    ids=str,
)
def test_what_meets_elsewhere_than_at_pages_is_refused(fd: int, parts: list[tuple[int, int]]) -> None:
    whole = Mapped.of(fd, 0, 8 * PAGE, "it")
    with pytest.raises(OSError, match="begin or end with a page") as caught:
        Mapped.stitched([(whole.address + offset, size) for offset, size in parts])
    assert caught.value.errno == errno.EINVAL
    whole.close()


def test_private_memory_can_not_be_seen_twice(fd: int) -> None:
    whole = Mapped.of(fd, 0, PAGE, "it")
    private = mmap.mmap(-1, PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    holder = ctypes.c_char.from_buffer(private)
    with pytest.raises(OSError, match="mapped again"):
        Mapped.stitched([(whole.address, PAGE), (ctypes.addressof(holder), PAGE)])
    whole.close()


def test_a_guard_that_is_full_leaves_nothing_mapped(fd: int) -> None:
    def full(address: int, length: int) -> int:
        raise OSError(errno.ENOSPC, "full")

    guard = Guard(full, lambda slot: None, lambda slot: False)
    whole = Mapped.of(fd, 0, PAGE, "it")
    with pytest.raises(OSError, match="full"):
        Mapped.stitched([(whole.address, PAGE)], guard)
    whole.close()


# The dirty log


def test_a_log_by_file_is_mapped_where_it_says_and_its_descriptor_closed(fd: int) -> None:
    handed = os.dup(fd)
    log = DirtyLog.mapped(handed, PAGE + 100, 300)
    with pytest.raises(OSError, match="Bad file"):
        os.fstat(handed)
    assert (log.size, at(log.address, 300)) == (300, b"\1" * 300)
    assert log.covers(300 * BYTES_A_BYTE - 1)
    assert not log.covers(300 * BYTES_A_BYTE)
    log.close()
    log.close()


@pytest.mark.parametrize(
    ("offset", "size"), [(0, 0), (0, -1), (0, 8 * PAGE + 1), (8 * PAGE, 1), ((1 << 64) - 1, 1)]
)
def test_a_log_that_is_not_in_its_file_is_refused_and_closed(fd: int, offset: int, size: int) -> None:
    handed = os.dup(fd)
    with pytest.raises(OSError, match="dirty log") as caught:
        DirtyLog.mapped(handed, offset, size)
    assert caught.value.errno == errno.EINVAL
    with pytest.raises(OSError, match="Bad file"):
        os.fstat(handed)


@pytest.mark.parametrize(
    ("address", "top", "size"),
    [
        (0x1000, 1, 1),
        (0x1000, BYTES_A_BYTE, 1),
        (0x1000, BYTES_A_BYTE + 1, 2),
        (0x1000, 1 << 40, 0x1000),
        (0x1FFF, 1 << 40, 1),
        (0x2000, 1 << 40, 0),
        (0, 1 << 40, 0),
        (0x1000, 0, 0),
        ((1 << 64) - 1, 1 << 40, 0),
    ],
)
def test_a_log_by_pointer_is_as_much_as_there_is_from_there_on(address: int, top: int, size: int) -> None:
    def usable(start: int, length: int) -> list[tuple[int, int]]:
        assert 0 < length <= (1 << 64) - start
        first, last = max(start, 0x1000), min(start + length, 0x2000)
        return [(first, last - first)] if first < last else []

    log = DirtyLog.at(address, usable, top)
    assert (log.address, log.size) == (address, size)
