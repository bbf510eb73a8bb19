"""The front end's side of a dirty log: which pages are marked, and taking them while somebody marks more."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from pyvhost.driver.dirty_log import LOG_PAGE, DirtyLog, Snapshot, _clear_bit
from pyvhost.driver.memory import GuestMemory, Span

PAGES = 8 * 4096 * 3


@pytest.fixture
def log() -> Iterator[DirtyLog]:
    with DirtyLog(PAGES * LOG_PAGE) as log:
        yield log


def mark(log: DirtyLog, *pages: int) -> None:
    """As a back end would: in the file."""
    for page in pages:
        was = os.pread(log.fd, 1, log.offset + page // 8)[0]
        os.pwrite(log.fd, bytes([was | 1 << page % 8]), log.offset + page // 8)


def test_a_page_is_a_bit(log: DirtyLog) -> None:
    marked = {0, 7, 8, 31, 32, 12345, PAGES - 1}
    mark(log, *marked)
    assert log.pages() == marked
    assert log.pages() == marked, "looking takes nothing"
    assert log.take() == marked
    assert log.take() == log.pages() == set()
    assert os.pread(log.fd, log.size, 0) == bytes(log.size)


@pytest.mark.parametrize(
    ("end", "size"), [(1, 4096), (4096 * 8 * 4096, 4096), (4096 * 8 * 4096 + 1, 8192)], ids=hex
)
def test_its_size_is_what_the_last_address_needs(end: int, size: int) -> None:
    with DirtyLog(end) as log:
        assert log.size == size == os.fstat(log.fd).st_size


@pytest.mark.parametrize("end", [0, -1, (1 << 64) + 1])
def test_addresses_that_nobody_has(end: int) -> None:
    with pytest.raises(ValueError, match="can't be logged"):
        DirtyLog(end)


def test_it_covers_a_guests_memory_to_its_last_page() -> None:
    spans = [Span(0, LOG_PAGE), Span(1 << 32, 3 * LOG_PAGE)]
    with GuestMemory(spans) as memory, DirtyLog.covering(memory) as log:
        last = (1 << 32) // LOG_PAGE + 2
        mark(log, last)
        assert log.take() == {last}


@pytest.mark.parametrize("bit", range(32))
def test_one_bit_is_cleared_and_its_neighbours_stay(log: DirtyLog, bit: int) -> None:
    log.fill(0xFF)
    _clear_bit(log.address + 4, bit)
    word = int.from_bytes(os.pread(log.fd, 4, 4), "little")
    assert word == 0xFFFFFFFF & ~(1 << bit)
    assert os.pread(log.fd, 4, 0) == os.pread(log.fd, 4, 8) == b"\xff" * 4


def test_no_bit_is_lost_where_two_take_at_the_same_time(log: DirtyLog) -> None:
    """Two threads clear different bits of the same words: with a plain store one would undo the other's."""
    words = range(64)
    log.fill(0xFF)
    start = threading.Barrier(2)

    def clear(bits: range) -> None:
        start.wait()
        for word in words:
            for bit in bits:
                _clear_bit(log.address + 4 * word, bit)

    with ThreadPoolExecutor() as threads:
        for done in [threads.submit(clear, range(0, 32, 2)), threads.submit(clear, range(1, 31, 2))]:
            done.result()
    assert log.take() >= {32 * word + 31 for word in words}
    left = {page for page in log.pages() if page < 32 * 64}
    assert left == set()


def test_closing_twice_closes_once() -> None:
    log = DirtyLog(1)
    log.close()
    log.close()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(log.fd)


def test_a_snapshot_says_which_pages_changed() -> None:
    # A region that begins inside a page, and one that ends inside one.
    spans = [Span(0x800, 2 * LOG_PAGE), Span(0x10000, LOG_PAGE + 8)]
    with GuestMemory(spans) as memory:
        memory.write(0x800, bytes(range(256)))
        before = Snapshot(memory)
        assert before.changed() == set()
        memory.write(0xFFF, b"xy")
        memory.write(0x10000 + LOG_PAGE + 7, b"z")
        memory.write(0x27FF, b"\0")
        assert before.changed() == {0, 1, 0x11}
