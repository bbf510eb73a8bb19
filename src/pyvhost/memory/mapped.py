"""A part of a file, mapped for reading and writing, with whatever pages it is made of.

Promises: what is not in the file is refused before it is mapped; unmapped once. Never: closes the descriptor.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_libc.mremap.restype = ctypes.c_void_p
_libc.mremap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t, ctypes.c_int, ctypes.c_void_p]
_MAP_FAILED: Final = ctypes.c_void_p(-1).value
_MAP_NORESERVE: Final = 0x4000
_PROT_NONE: Final = 0
_MREMAP_MAYMOVE_AND_FIXED: Final = 3


@dataclass(frozen=True)
class Guard:
    """Who is told of mappings whose file may shrink: `protect(address, length)` gives a slot."""

    protect: Callable[[int, int], int]
    release: Callable[[int], None]
    lost: Callable[[int], bool]


class Mapped:
    """`length` bytes mapped at `base`; `address` is where what was asked for begins."""

    def __init__(self, base: int, length: int, lead: int, guard: Guard | None) -> None:
        self.address = base + lead
        self._base = base
        self._length = length
        self._guard = guard
        try:
            self._slot = guard.protect(base, length) if guard else -1
        except BaseException:
            _libc.munmap(base, length)
            raise

    @classmethod
    def of(cls, fd: int, offset: int, size: int, what: str, guard: Guard | None = None) -> Mapped:
        """`size` bytes of a file from `offset` on. OSError: why not; `what` is in its words."""
        status = os.fstat(fd)
        end = offset + size
        if end > status.st_size:
            raise OSError(
                errno.EINVAL, f"{what}: bytes {offset:#x} to {end:#x} of a file of {status.st_size:#x}"
            )
        # On hugetlbfs the block size is the page size, and offset and length go by it.
        block = status.st_blksize
        huge = block > mmap.PAGESIZE and block & (block - 1) == 0 and status.st_size % block == 0
        page = block if huge else mmap.PAGESIZE
        lead = offset % page
        length = -(-(lead + size) // page) * page
        flags = mmap.MAP_SHARED | _MAP_NORESERVE
        base = _libc.mmap(None, length, mmap.PROT_READ | mmap.PROT_WRITE, flags, fd, offset - lead)
        if base == _MAP_FAILED:
            code = ctypes.get_errno()
            raise OSError(code, f"{what}: mmap: {os.strerror(code)}")
        return cls(base, length, lead, guard)

    @classmethod
    def stitched(cls, ranges: list[tuple[int, int]], guard: Guard | None = None) -> Mapped:
        """Ranges of shared mappings (address, bytes) that meet at page boundaries, once more, in a row.

        OSError EINVAL: they meet elsewhere, or are no shared memory.
        """
        page = mmap.PAGESIZE
        lead = ranges[0][0] % page
        at = lead
        for number, (address, size) in enumerate(ranges):
            if address % page != at % page or (number < len(ranges) - 1 and (address + size) % page):
                raise OSError(errno.EINVAL, f"{address:#x}+{size:#x} does not begin or end with a page")
            at += size
        length = -(-at // page) * page
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
        base = _libc.mmap(None, length, _PROT_NONE, flags, -1, 0)
        if base == _MAP_FAILED:
            raise OSError(ctypes.get_errno(), "no room for a ring's pages in a row")
        to = base
        for address, size in ranges:
            first = address - address % page
            part = -(-(address + size - first) // page) * page
            # An old size of 0 leaves a shared mapping where it is and gives a second one.
            if _libc.mremap(first, 0, part, _MREMAP_MAYMOVE_AND_FIXED, to) == _MAP_FAILED:
                code = ctypes.get_errno()
                _libc.munmap(base, length)
                raise OSError(code, f"{address:#x}+{size:#x} can't be mapped again: {os.strerror(code)}")
            to += part
        return cls(base, length, lead, guard)

    @property
    def lost(self) -> bool:
        """Whether its file was made smaller, so that zeros have taken its place."""
        return self._guard is not None and self._guard.lost(self._slot)

    def close(self) -> None:
        """Unmaps it."""
        if self._length:
            if self._guard is not None:
                self._guard.release(self._slot)
            _libc.munmap(self._base, self._length)
            self._length = 0
