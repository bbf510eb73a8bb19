"""What of this process's memory can be used: taken from the kernel's own list."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
from collections.abc import Iterator

import pytest

from pyvhost.host import maps, user_memory

PAGE = mmap.PAGESIZE
_libc = ctypes.CDLL(None, use_errno=True)
_libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]


@pytest.fixture(params=["this kernel's way", "an older kernel's"], autouse=True)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before 6.11 a range can't be asked for."""
    if request.param == "an older kernel's":

        def refuse(start: int, end: int) -> list[tuple[int, int]]:
            raise OSError(errno.ENOTTY, "no such ioctl")

        monkeypatch.setattr(maps, "_asked_for", refuse)


@pytest.fixture
def pages() -> Iterator[int]:
    """Eight pages of our own, between two that nobody can touch."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    base = _libc.mmap(None, 10 * PAGE, mmap.PROT_READ | mmap.PROT_WRITE, flags, -1, 0)
    for guard in (base, base + 9 * PAGE):
        assert _libc.mprotect(guard, PAGE, 0) == 0
    yield base + PAGE
    _libc.munmap(base, 10 * PAGE)


def protect(address: int, rights: int) -> None:
    assert _libc.mprotect(address, PAGE, rights) == 0


def test_what_is_there_is_usable(pages: int) -> None:
    assert maps.usable(pages, 8 * PAGE) == [(pages, 8 * PAGE)]
    assert maps.usable(pages + 5, 100) == [(pages + 5, 100)]


def test_what_lies_around_it_is_not(pages: int) -> None:
    assert maps.usable(pages - PAGE, 10 * PAGE) == [(pages, 8 * PAGE)]


def test_holes_and_what_may_not_be_written_are_left_out(pages: int) -> None:
    protect(pages + 2 * PAGE, mmap.PROT_READ)
    assert _libc.munmap(pages + 5 * PAGE, PAGE) == 0
    parts = [(pages, 2 * PAGE), (pages + 3 * PAGE, 2 * PAGE), (pages + 6 * PAGE, 2 * PAGE)]
    assert maps.usable(pages, 8 * PAGE) == parts


@pytest.mark.parametrize(
    ("address", "size"),
    [(0, PAGE), (0xFFFF888000000000, PAGE), ((1 << 64) - PAGE, PAGE), (PAGE, 0), (PAGE, -1)],
)
def test_what_nobody_has_is_not(address: int, size: int) -> None:
    assert maps.usable(address, size) == []


def test_user_space_ends() -> None:
    assert maps.access_ok(0, maps.USER_TOP)
    assert maps.access_ok(maps.USER_TOP, 0)
    assert not maps.access_ok(maps.USER_TOP - 1, 2)
    assert not maps.access_ok(0xFFFF888000000000, 1)
    assert not maps.access_ok(0, 1 << 64)


def test_bytes_come_and_go(pages: int) -> None:
    data = bytes(range(256)) * 64
    user_memory.write(pages + 7, data)
    assert user_memory.read(pages + 7, len(data)) == data
    assert user_memory.read(pages, 0) == b""


@pytest.mark.parametrize("size", [1, PAGE, PAGE + 1, 3 * PAGE])
def test_reading_over_the_end_is_a_fault(pages: int, size: int) -> None:
    with pytest.raises(OSError, match=r"\[Errno 14\]"):
        user_memory.read(pages + 8 * PAGE - size + 1, size)


def test_what_may_not_be_written_is_a_fault_and_stays(pages: int) -> None:
    user_memory.write(pages, b"before")
    protect(pages, mmap.PROT_READ)
    with pytest.raises(OSError, match=r"\[Errno 14\]"):
        user_memory.write(pages, b"after")
    assert user_memory.read(pages, 6) == b"before"


@pytest.mark.parametrize("address", [0, 1, 0xFFFF888000000000, (1 << 64) - 1])
def test_nowhere_is_a_fault(address: int) -> None:
    with pytest.raises(OSError, match=r"\[Errno 14\]"):
        user_memory.read(address, 8)
    with pytest.raises(OSError, match=r"\[Errno 14\]"):
        user_memory.write(address, bytes(8))


def test_a_forked_child_is_told_of_its_own(pages: int) -> None:
    assert maps.usable(pages, PAGE) == [(pages, PAGE)]
    child = os.fork()
    if child == 0:
        os._exit(
            int(_libc.munmap(pages, PAGE) != 0 or maps.usable(pages, 2 * PAGE) != [(pages + PAGE, PAGE)])
        )
    assert os.waitpid(child, 0)[1] == 0
    assert maps.usable(pages, PAGE) == [(pages, PAGE)]
