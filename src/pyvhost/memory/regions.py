"""Guest memory: the memory table's regions, mapped into this process, and the two ways to look an address up.

A region has three addresses: the guest's (`guest_phys_addr`, what descriptors hold), the front end's
(`userspace_addr`, what SET_VRING_ADDR holds) and the one it has here (`host`).

Promises: a region that would wrap or lie outside its file is refused before it is mapped, one that overlaps
another with the table; a table is never changed, only replaced, so that who holds it sees one state; a mapping
goes when the last table that has it is closed.
Never: reads or writes guest memory.
"""

from __future__ import annotations

import bisect
import errno
import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Final

import numpy as np
import numpy.typing as npt

from pyvhost.abi.vhost import ACCESS_RW
from pyvhost.memory.mapped import Guard, Mapped

_TOP: Final = 1 << 64

#: The guest address of memory that has none: no dirty log reaches it.
NO_GUEST: Final = 1 << 63

#: A row of a table for kernels: address, bytes, host address, guest physical address, ACCESS_*.
Row = tuple[int, int, int, int, int]


def rows_block(rows: Iterable[Row]) -> npt.NDArray[np.int64]:
    """Rows as kernels read them (`blocks.REGION_*`)."""
    return np.array(list(rows), dtype=np.uint64).astype(np.int64).reshape(-1, 5)


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


@dataclass
class Mapping:
    """A region that is mapped (or lies here anyway), and how many tables have it."""

    region: MemoryRegion
    host: int
    mapped: Mapped | None = None
    tables: int = field(default=0)
    #: Which file it is, by device and inode; None: it lies here anyway.
    file: tuple[int, int] | None = None

    @classmethod
    def make(cls, region: MemoryRegion, guard: Guard | None = None) -> Mapping:
        """Maps a region and closes its descriptor, whatever comes of it. OSError: why it can't be."""
        if region.fd < 0:
            region.check()
            return cls(region, region.userspace_addr)
        try:
            region.check()
            mapped = Mapped.of(region.fd, region.mmap_offset, region.memory_size, str(region), guard)
            return cls(region, mapped.address, mapped, file=file_of(region.fd))
        finally:
            # One that is not open has been found out by then.
            with suppress(OSError):
                os.close(region.fd)

    @property
    def lost(self) -> bool:
        """Whether its file was made smaller, so that zeros have taken its place."""
        return self.mapped is not None and self.mapped.lost

    def drop(self) -> None:
        """One table less has it; unmapped with the last."""
        self.tables -= 1
        if self.tables <= 0 and self.mapped is not None:
            self.mapped.close()


def file_of(fd: int) -> tuple[int, int]:
    """Which file a descriptor is of: its device and inode."""
    status = os.fstat(fd)
    return status.st_dev, status.st_ino


#: Which parts of a range of this process's own memory can be read and written: address and bytes of each.
Usable = Callable[[int, int], Sequence[tuple[int, int]]]


class MemoryTable:
    """Some regions at one time. OSError EINVAL: two of them overlap, in the guest's or the front end's view.

    `usable`: the regions are this process's own memory, and this says what there is of it. As on Linux they may
    overlap then: the one that begins first counts.
    """

    def __init__(self, mappings: Sequence[Mapping] = (), usable: Usable | None = None) -> None:
        self.mappings = sorted(mappings, key=lambda m: m.region.guest_phys_addr)
        self._by_user = sorted(mappings, key=lambda m: m.region.userspace_addr)
        self._user_starts = [m.region.userspace_addr for m in self._by_user]
        self._usable = usable
        if usable is None:
            self._refuse_overlaps()
        for mapping in self.mappings:
            mapping.tables += 1
        #: What kernels read (`blocks.REGION_*`): guest address, size, host address, the same for the dirty log, and
        #: what may be done there.
        self.block = rows_block(self._rows())

    def _refuse_overlaps(self) -> None:
        for name, ordered in (("guest_phys_addr", self.mappings), ("userspace_addr", self._by_user)):
            for one, two in itertools.pairwise(ordered):
                end = getattr(one.region, name) + one.region.memory_size
                if end > getattr(two.region, name):
                    raise OSError(
                        errno.EINVAL,
                        f"{two.region} overlaps {one.region}: {name} {getattr(two.region, name):#x} < {end:#x}",
                    )

    def _rows(self) -> Iterator[Row]:
        end = 0
        for mapping in self.mappings:
            region = mapping.region
            first = max(end, region.guest_phys_addr)
            last = region.guest_phys_addr + region.memory_size
            if first >= last:
                continue
            end = last
            host = mapping.host + first - region.guest_phys_addr
            for start, size in self._usable(host, last - first) if self._usable else [(host, last - first)]:
                guest = first + start - host
                yield guest, size, start, guest, ACCESS_RW

    def __len__(self) -> int:
        return len(self.mappings)

    @property
    def lost(self) -> bool:
        """Whether any of its regions has lost its file."""
        return any(mapping.lost for mapping in self.mappings)

    def host_of_user(self, address: int, length: int) -> int:
        """Where `length` bytes at a front end's address lie here. OSError EFAULT: not inside one region."""
        if self._usable is not None:
            # The front end's address is this process's own, in the table or not.
            if list(self._usable(address, length)) == [(address, length)]:
                return address
            raise OSError(errno.EFAULT, f"{address:#x}+{length:#x} is not memory of this process")
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

    def pieces_of_user(self, address: int, length: int) -> Iterator[tuple[int, int, int, int]]:
        """A front end's range: offset in it, bytes, host address and guest address of each piece.

        OSError EFAULT: not all of it is in the memory table; this process's own need not be in it, and what is not
        has `NO_GUEST` for its guest address.
        """
        if self._usable is not None:
            for start, size in self._usable(address, length):
                yield from self._own_pieces(address, start, size)
            return
        end = address + length
        done = address
        at = max(bisect.bisect_right(self._user_starts, address) - 1, 0)
        found = []
        for mapping in self._by_user[at:]:
            first = mapping.region.userspace_addr
            if first > done or done == end:
                break
            run = min(end, first + mapping.region.memory_size) - done
            if run > 0:
                inside = done - first
                found.append(
                    (done - address, run, mapping.host + inside, mapping.region.guest_phys_addr + inside)
                )
                done += run
        if done < end:
            raise OSError(errno.EFAULT, f"{address:#x}+{length:#x}: {done:#x} is not in the memory table")
        yield from found

    def _own_pieces(self, base: int, start: int, size: int) -> Iterator[tuple[int, int, int, int]]:
        end = start + size
        for mapping in self._by_user:
            first = max(start, mapping.region.userspace_addr)
            last = min(end, mapping.region.userspace_addr + mapping.region.memory_size)
            if first < last:
                if start < first:
                    yield start - base, first - start, start, NO_GUEST
                guest = mapping.region.guest_phys_addr + first - mapping.region.userspace_addr
                yield first - base, last - first, first, guest
                start = last
        if start < end:
            yield start - base, end - start, start, NO_GUEST

    def close(self) -> None:
        """Gives up its mappings; once, and when nothing uses its block any more."""
        for mapping in self.mappings:
            mapping.drop()
        self.mappings = []
