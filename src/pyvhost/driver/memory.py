"""Guest memory as a hypervisor holds it: files, mapped, that make up a guest's physical addresses.

A `GuestMemory` is one region or several, with or without gaps between them, each in a memfd of its own or at
an offset in a shared one. It hands out room, reads and writes at guest addresses, and says what a memory
table must say of it. Addresses and sizes are bytes.

Memory that no other process is to see needs no file: `anonymous` is this process's own shared mapping.

Promises: a read or write that is not wholly inside guest memory touches nothing and raises GuestMemoryError;
one that crosses from a region into its neighbour works. Aligned accesses through `words` are single loads
and stores. Never: orders anything (see `barrier`), and never writes with `struct.pack_into`, which clears
the bytes first and so lets the other side see zeros that nobody wrote.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Literal, Self

from pyvhost.driver.errors import GuestMemoryError
from pyvhost.host import memfd

PAGE = mmap.PAGESIZE
MIB = 1 << 20
#: What is allocated is rounded up to this, or to its alignment if that is less.
_GRAIN = 16


@dataclass(frozen=True, slots=True)
class Span:
    """A wish for one region: where the guest sees it, and where it lies in which file.

    `file` groups regions: those with the same number share a memfd (`mmap_offset` is then their business);
    None is a memfd for this region alone. `userspace_addr` None is where this process has it mapped; a number
    is told to the back end as it is, and is true of nothing else.
    """

    guest_phys_addr: int
    memory_size: int
    mmap_offset: int = 0
    file: int | None = None
    userspace_addr: int | None = None


@dataclass(frozen=True, slots=True)
class Region:
    """One row of the memory table, as a front end sends it; `fd` is -1 where there is no file."""

    guest_phys_addr: int
    memory_size: int
    userspace_addr: int
    mmap_offset: int
    fd: int

    @property
    def end(self) -> int:
        """The first guest address behind it."""
        return self.guest_phys_addr + self.memory_size


class _Mapping:
    """A region as this process has it: its bytes, how many of them the file still backs, what is free."""

    __slots__ = ("backed", "bytes", "free", "map", "region")

    def __init__(self, region: Region, mapped: mmap.mmap, view: memoryview) -> None:
        self.region = region
        self.map = mapped
        self.bytes = view
        self.backed = region.memory_size
        self.free = [(region.guest_phys_addr, region.memory_size)]


class GuestMemory:
    """The memory of one guest.

    `layout` is a size in bytes, or the regions wanted, in any order; `anonymous` memory has no files, for a
    device in this process or in the kernel, and its regions share nothing. Raises ValueError for regions that
    overlap or are empty, OSError when the system gives no memory.
    """

    def __init__(self, layout: int | Iterable[Span] = 64 * MIB, *, anonymous: bool = False) -> None:
        spans = [Span(0, layout)] if isinstance(layout, int) else list(layout)
        self.anonymous = anonymous
        self._files: dict[int, int] = {}
        self._fds: set[int] = set()
        self._mappings: list[_Mapping] = []
        self._starts: list[int] = []
        self._taken: dict[int, int] = {}
        try:
            for span in spans:
                self.add_region(span)
        except BaseException:
            self.close()
            raise

    # --- regions -------------------------------------------------------------------------------------

    @property
    def regions(self) -> tuple[Region, ...]:
        """The memory table's rows, by guest address."""
        return tuple(mapping.region for mapping in self._mappings)

    def add_region(self, span: Span) -> Region:
        """Make one more region; the caller tells the back end."""
        start, size = span.guest_phys_addr, span.memory_size
        if size <= 0 or start < 0 or start + size > 1 << 64:
            raise ValueError(f"no region can have guest address {start:#x} and size {size:#x}")
        for other in self.regions:
            if start < other.end and other.guest_phys_addr < start + size:
                raise ValueError(f"a region at {start:#x} of {size:#x} bytes overlaps {other}")
        # mmap wants a page boundary; a region may begin behind it.
        lead = span.mmap_offset % PAGE
        if self.anonymous:
            if span.file is not None:
                raise ValueError(f"a region at {start:#x} can't share a file: this memory has none")
            fd = -1
            mapped = mmap.mmap(-1, lead + size)
        else:
            fd = self._file(span)
            end = span.mmap_offset + size
            if os.fstat(fd).st_size < end:
                os.ftruncate(fd, -(-end // PAGE) * PAGE)
            mapped = mmap.mmap(fd, lead + size, offset=span.mmap_offset - lead)
        here = ctypes.addressof(ctypes.c_char.from_buffer(mapped)) + lead
        told = here if span.userspace_addr is None else span.userspace_addr
        region = Region(start, size, told, span.mmap_offset, fd)
        at = bisect_right(self._starts, start)
        self._starts.insert(at, start)
        self._mappings.insert(at, _Mapping(region, mapped, memoryview(mapped)[lead : lead + size]))
        return region

    def remove_region(self, region: Region) -> None:
        """Forget a region. Its file stays open until `close`: a back end may still be sent it by mistake."""
        at = self.regions.index(region)
        del self._mappings[at]
        del self._starts[at]

    def shrink_file(self, region: Region, size: int) -> None:
        """Cut the region's file to `size` bytes behind the back end's back, as no front end should.

        This side refuses to touch what is gone; the other side gets SIGBUS when it does.
        """
        os.ftruncate(region.fd, size)
        for mapping in self._mappings:
            if mapping.region.fd == region.fd:
                left = size - mapping.region.mmap_offset
                mapping.backed = max(0, min(mapping.region.memory_size, left))

    def user_address(self, address: int) -> int:
        """What the memory table makes of a guest address: where the front end says that it has it."""
        mapping, offset = self._find(address, 1)
        return mapping.region.userspace_addr + offset

    def _file(self, span: Span) -> int:
        if span.file is not None and span.file in self._files:
            return self._files[span.file]
        # Not sealed: it grows with its regions, and `shrink_file` cuts it.
        fd = memfd.create("guest-memory", 0, seals=0)
        self._fds.add(fd)
        if span.file is not None:
            self._files[span.file] = fd
        return fd

    def _find(self, address: int, length: int) -> tuple[_Mapping, int]:
        """The mapping that holds all `length` bytes at `address`, and where in it they begin."""
        at = bisect_right(self._starts, address) - 1
        if at >= 0:
            mapping = self._mappings[at]
            offset = address - mapping.region.guest_phys_addr
            if offset + length <= mapping.backed:
                return mapping, offset
        raise GuestMemoryError(
            f"{length:#x} bytes at {address:#x} do not lie inside one region: {self.regions}"
        )

    # --- bytes ---------------------------------------------------------------------------------------

    def view(self, address: int, length: int) -> memoryview:
        """The bytes themselves, writable; they must lie inside one region."""
        if length < 0:
            raise GuestMemoryError(f"no view can have {length} bytes")
        mapping, offset = self._find(address, length)
        return mapping.bytes[offset : offset + length]

    def words(self, address: int, count: int, code: Literal["H", "I", "Q"]) -> memoryview:
        """`count` words in this machine's byte order: `code` is "H" (2 bytes), "I" (4) or "Q" (8).

        An item that is aligned is read and written by one instruction.
        """
        return self.view(address, count * {"H": 2, "I": 4, "Q": 8}[code]).cast(code)

    def read(self, address: int, length: int) -> bytes:
        """A copy of `length` bytes, from as many regions as they lie in."""
        return b"".join(bytes(part) for part in self._parts(address, length))

    def write(self, address: int, data: bytes | bytearray | memoryview) -> None:
        """Copy `data` to `address`, into as many regions as it takes."""
        source = memoryview(data).cast("B")
        done = 0
        for part in list(self._parts(address, len(source))):
            part[:] = source[done : done + len(part)]
            done += len(part)

    def _parts(self, address: int, length: int) -> Iterator[memoryview]:
        if length < 0:
            raise GuestMemoryError(f"{length} bytes at {address:#x}")
        while length:
            mapping, offset = self._find(address, 1)
            here = min(length, mapping.region.memory_size - offset)
            yield self.view(address, here)
            address += here
            length -= here

    # --- room ----------------------------------------------------------------------------------------

    def allocate(self, size: int, align: int = 16, region: int | None = None) -> int:
        """The guest address of `size` bytes that nobody else has, inside one region; first fit.

        `region` is an index into `regions`, None is any. Not cleared: what was there before is still there.
        """
        if size <= 0:
            raise GuestMemoryError(f"no room can have {size} bytes")
        mappings = self._mappings if region is None else [self._mappings[region]]
        grain = min(align, _GRAIN)
        for mapping in mappings:
            for at, (start, length) in enumerate(mapping.free):
                address = -(-start // align) * align
                if address + size <= start + length:
                    # Scraps too small for anybody would have to be passed by every search from now on.
                    whole = min(-(-size // grain) * grain, start + length - address)
                    self._cut(mapping, at, address, whole)
                    self._taken[address] = whole
                    return address
        raise GuestMemoryError(
            f"no {size:#x} free bytes left in {'guest memory' if region is None else region}"
        )

    def allocate_across(self, size: int, border: int = 0) -> int:
        """Like `allocate`, but half on each side of the `border`-th place where two regions touch."""
        if size < 2:
            raise GuestMemoryError(f"{size} bytes can not lie in two regions")
        pairs = zip(self._mappings, self._mappings[1:], strict=False)
        touching = [(low, high) for low, high in pairs if low.region.end == high.region.guest_phys_addr]
        if border >= len(touching):
            raise GuestMemoryError(f"there are {len(touching)} places where two regions touch")
        low, high = touching[border]
        before = size // 2
        address = high.region.guest_phys_addr - before
        self._check_free(low, address, before)
        self._check_free(high, high.region.guest_phys_addr, size - before)
        self._take(low, address, before)
        self._take(high, high.region.guest_phys_addr, size - before)
        self._taken[address] = size
        return address

    def free(self, address: int) -> None:
        """Give back what `allocate` or `allocate_across` gave."""
        size = self._taken.pop(address, None)
        if size is None:
            raise GuestMemoryError(f"nothing was allocated at {address:#x}")
        while size:
            at = bisect_right(self._starts, address) - 1
            if at < 0 or address >= self._mappings[at].region.end:
                return  # its region was removed meanwhile
            mapping = self._mappings[at]
            here = min(size, mapping.region.end - address)
            self._give(mapping, address, here)
            address += here
            size -= here

    @staticmethod
    def _check_free(mapping: _Mapping, address: int, size: int) -> None:
        if not any(s <= address and address + size <= s + n for s, n in mapping.free):
            raise GuestMemoryError(f"{size:#x} bytes at {address:#x} are not free")

    @staticmethod
    def _take(mapping: _Mapping, address: int, size: int) -> None:
        for at, (start, length) in enumerate(mapping.free):
            if start <= address and address + size <= start + length:
                GuestMemory._cut(mapping, at, address, size)
                return
        raise GuestMemoryError(f"{size:#x} bytes at {address:#x} are not free")

    @staticmethod
    def _cut(mapping: _Mapping, at: int, address: int, size: int) -> None:
        """Takes a part of the free piece number `at`."""
        start, length = mapping.free[at]
        rest = [(start, address - start), (address + size, start + length - address - size)]
        mapping.free[at : at + 1] = [piece for piece in rest if piece[1]]

    @staticmethod
    def _give(mapping: _Mapping, address: int, size: int) -> None:
        at = bisect_right(mapping.free, (address, 0))
        start, end = address, address + size
        first, last = at, at
        if at and sum(mapping.free[at - 1]) == start:
            first = at - 1
            start = mapping.free[first][0]
        if at < len(mapping.free) and mapping.free[at][0] == end:
            last = at + 1
            end = sum(mapping.free[at])
        mapping.free[first:last] = [(start, end - start)]

    # --- the end -------------------------------------------------------------------------------------

    def close(self) -> None:
        """Close the files and unmap. A view that someone still holds keeps its region mapped until it
        goes.
        """
        for mapping in self._mappings:
            mapping.bytes.release()
            try:
                mapping.map.close()
            except BufferError:
                pass
        self._mappings = []
        self._starts = []
        for fd in self._fds:
            os.close(fd)
        self._fds = set()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
