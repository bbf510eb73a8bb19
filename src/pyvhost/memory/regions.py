"""Guest memory: the memory table's regions, mapped into this process, and the two ways to look an address up.

A region has three addresses: the guest's (`guest_phys_addr`, what descriptors hold), the front end's
(`userspace_addr`, what SET_VRING_ADDR holds) and the one it has here (`host`).

Promises: a region that would wrap, overlap another, or lie outside its file is refused before it is mapped; a
table is never changed, only replaced, so that who holds it sees one state; a mapping goes when the last table
that has it is closed.
Never: reads or writes guest memory.
"""

from __future__ import annotations

import bisect
import ctypes
import errno
import itertools
import mmap
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Final

import numpy as np
import numpy.typing as npt

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_MAP_FAILED: Final = ctypes.c_void_p(-1).value
_MAP_NORESERVE: Final = 0x4000
_TOP: Final = 1 << 64


@dataclass(frozen=True)
class MemoryRegion:
    """A region as a front end describes it (struct vhost_memory_region, VhostUserMemoryRegion); sizes in bytes.

    `fd` -1: the addresses are this process's own. Otherwise the region starts `mmap_offset` bytes into the
    file, and whoever is handed the region owns the descriptor.
    """

    guest_phys_addr: int
    memory_size: int
    userspace_addr: int
    mmap_offset: int = 0
    fd: int = -1

    def __str__(self) -> str:
        return f"region {self.guest_phys_addr:#x}+{self.memory_size:#x}"

    @property
    def where(self) -> tuple[int, int, int]:
        """What tells it from others: guest address, size, the front end's address."""
        return self.guest_phys_addr, self.memory_size, self.userspace_addr

    def check(self) -> None:
        """OSError EINVAL or EFAULT: a size of 0, or an address range that wraps."""
        if self.memory_size <= 0:
            raise OSError(errno.EINVAL, f"{self}: its size is {self.memory_size}")
        for name in ("guest_phys_addr", "userspace_addr", "mmap_offset"):
            start = getattr(self, name)
            if start + self.memory_size > _TOP:
                raise OSError(errno.EFAULT, f"{self}: {name} {start:#x} + {self.memory_size:#x} wraps")


@dataclass(frozen=True)
class Guard:
    """Who is told of mappings whose file may shrink: `protect(address, length)` gives a slot."""

    protect: Callable[[int, int], int]
    release: Callable[[int], None]
    lost: Callable[[int], bool]


@dataclass
class Mapping:
    """A region that is mapped (or lies here anyway), and how many tables have it."""

    region: MemoryRegion
    host: int
    _base: int = 0
    _length: int = 0
    _slot: int = -1
    _guard: Guard | None = None
    tables: int = field(default=0)

    @classmethod
    def make(cls, region: MemoryRegion, guard: Guard | None = None) -> Mapping:
        """Maps a region and closes its descriptor, whatever comes of it. OSError: why it can't be."""
        if region.fd < 0:
            region.check()
            return cls(region, region.userspace_addr)
        try:
            region.check()
            status = os.fstat(region.fd)
            end = region.mmap_offset + region.memory_size
            if end > status.st_size:
                raise OSError(
                    errno.EINVAL,
                    f"{region}: bytes {region.mmap_offset:#x} to {end:#x} of a file of {status.st_size:#x}",
                )
            # On hugetlbfs the block size is the page size, and offset and length go by it.
            block = status.st_blksize
            huge = block > mmap.PAGESIZE and block & (block - 1) == 0 and status.st_size % block == 0
            page = block if huge else mmap.PAGESIZE
            lead = region.mmap_offset % page
            length = -(-(lead + region.memory_size) // page) * page
            flags = mmap.MAP_SHARED | _MAP_NORESERVE
            offset = region.mmap_offset - lead
            base = _libc.mmap(None, length, mmap.PROT_READ | mmap.PROT_WRITE, flags, region.fd, offset)
            if base == _MAP_FAILED:
                code = ctypes.get_errno()
                raise OSError(code, f"{region}: mmap: {os.strerror(code)}")
            try:
                slot = guard.protect(base, length) if guard else -1
            except BaseException:
                _libc.munmap(base, length)
                raise
            return cls(region, base + lead, base, length, slot, guard)
        finally:
            # One that is not open has been found out by then.
            with suppress(OSError):
                os.close(region.fd)

    @property
    def lost(self) -> bool:
        """Whether its file was made smaller, so that zeros have taken its place."""
        return self._guard is not None and self._guard.lost(self._slot)

    def drop(self) -> None:
        """One table less has it; unmapped with the last."""
        self.tables -= 1
        if self.tables <= 0 and self._length:
            if self._guard:
                self._guard.release(self._slot)
            _libc.munmap(self._base, self._length)
            self._length = 0


class MemoryTable:
    """Some regions at one time. OSError EINVAL: two of them overlap, in the guest's or the front end's view."""

    def __init__(self, mappings: Sequence[Mapping] = ()) -> None:
        self.mappings = sorted(mappings, key=lambda m: m.region.guest_phys_addr)
        self._by_user = sorted(mappings, key=lambda m: m.region.userspace_addr)
        for name, ordered in (("guest_phys_addr", self.mappings), ("userspace_addr", self._by_user)):
            for one, two in itertools.pairwise(ordered):
                end = getattr(one.region, name) + one.region.memory_size
                if end > getattr(two.region, name):
                    raise OSError(
                        errno.EINVAL,
                        f"{two.region} overlaps {one.region}: {name} {getattr(two.region, name):#x} < {end:#x}",
                    )
        self._user_starts = [m.region.userspace_addr for m in self._by_user]
        for mapping in self.mappings:
            mapping.tables += 1
        #: What kernels read: guest address, size, host address of each region, sorted.
        self.block: npt.NDArray[np.int64] = (
            np.array(
                [(m.region.guest_phys_addr, m.region.memory_size, m.host) for m in self.mappings],
                dtype=np.uint64,
            )
            .astype(np.int64)
            .reshape(-1, 3)
        )

    def __len__(self) -> int:
        return len(self.mappings)

    @property
    def lost(self) -> bool:
        """Whether any of its regions has lost its file."""
        return any(mapping.lost for mapping in self.mappings)

    def host_of_user(self, address: int, length: int) -> int:
        """Where `length` bytes at a front end's address lie here. OSError EFAULT: not inside one region."""
        at = bisect.bisect_right(self._user_starts, address) - 1
        if at >= 0:
            mapping = self._by_user[at]
            offset = address - mapping.region.userspace_addr
            if length <= mapping.region.memory_size and offset <= mapping.region.memory_size - length:
                return mapping.host + offset
        raise OSError(
            errno.EFAULT,
            f"{address:#x}+{length:#x} is in none of the {len(self)} regions of the memory table",
        )

    def close(self) -> None:
        """Gives up its mappings; once, and when nothing uses its block any more."""
        for mapping in self.mappings:
            mapping.drop()
        self.mappings = []
