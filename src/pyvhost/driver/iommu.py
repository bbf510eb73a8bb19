"""An IOMMU in front of a device: it uses addresses (IOVAs) that mean something only while they are mapped.

    iommu = Iommu(memory)
    driver = NetDriver(frontend, memory, iommu=iommu)

A driver maps each buffer before the device gets it and unmaps it afterwards, as Linux does with
`iommu.strict=1`; the device asks for what it does not know (a *miss*), and is answered from this page table
(virtio's F_ACCESS_PLATFORM, vhost's IOTLB). IOVAs are given out again at once, so that a device that goes on
with an old translation reads or writes the wrong memory, and is found out. Addresses and sizes are bytes;
`perm` is one of vhost's ACCESS_RO, ACCESS_WO, ACCESS_RW, from the device's point of view.

Promises: the device is told what is mapped with the permission that it asks for, and nothing else; `unmap`
returns when the device has forgotten. Never: starts a thread. Misses are answered in `service`, which the
driver's waits call, and anybody else may.
"""

from __future__ import annotations

from bisect import bisect_right, insort
from collections import deque
from collections.abc import Callable
from typing import NamedTuple, Protocol, runtime_checkable

from pyvhost.driver.errors import DriverError
from pyvhost.driver.memory import GuestMemory

FIRST = 0x4000_0000_0000
"""Where IOVAs begin when nobody says: far from any guest address, so that one is not taken for the other."""

_ALIGN = 16


class Miss(NamedTuple):
    """What a device does not know, and what it wants it for."""

    iova: int
    perm: int


class Translation(NamedTuple):
    """What a device is told: `size` bytes at `iova` are those at `uaddr`, with this permission."""

    iova: int
    size: int
    uaddr: int
    perm: int


class Mapping(NamedTuple):
    """A row of the page table: whole pages of IOVA from `start`, and the guest address of the first."""

    start: int
    size: int
    guest: int
    perm: int

    @property
    def end(self) -> int:
        """The first IOVA behind it."""
        return self.start + self.size


@runtime_checkable
class IotlbFrontEnd(Protocol):
    """What an IOMMU needs of a front end."""

    def iotlb_fileno(self) -> int:
        """A descriptor that is readable while a miss may wait to be taken."""
        ...

    def take_miss(self) -> Miss | None:
        """The oldest miss that the device reported, or None; does not wait."""
        ...

    def iotlb_update(self, iova: int, size: int, uaddr: int, perm: int) -> None:
        """Tell the device a translation; `uaddr` is a user address of the memory table."""
        ...

    def iotlb_invalidate(self, iova: int, size: int) -> None:
        """Have the device forget a range; when this returns it uses no byte of it any more."""
        ...


class Iommu:
    """A page table over `memory`, and who answers from it.

    `page` is its granule, in bytes, a power of two; 1 maps exactly what is asked for. `by_page` answers a
    miss with the page that holds it, not the whole mapping. Not `strict`, what was mapped once stays so, and
    is found again: a device then learns all there is to learn, as behind Linux's iommu=pt. `prefill` tells
    the device where used rings are before they start, without being asked: Linux's vhost needs that. `decide`
    is asked before a miss is answered: False leaves it in `held`, for `answer` or for ever.
    """

    def __init__(
        self,
        memory: GuestMemory,
        *,
        page: int = 4096,
        by_page: bool = False,
        strict: bool = True,
        first: int = FIRST,
        prefill: bool = True,
        decide: Callable[[Miss], bool] | None = None,
    ) -> None:
        if page < 1 or page & (page - 1) or first % max(page, _ALIGN):
            raise ValueError(f"pages of {page} bytes from {first:#x} make no page table")
        self.memory = memory
        self.page = page
        self.by_page = by_page
        self.strict = strict
        self.prefill = prefill
        self.decide = decide
        self.frontend: IotlbFrontEnd | None = None
        #: The latest misses, in the order in which they came, and how many there were in all.
        self.misses: deque[Miss] = deque(maxlen=4096)
        self.missed = 0
        #: Those that nothing mapped answers: the device asked for what it was not given.
        self.faults: list[Miss] = []
        #: Those that `decide` would not have answered.
        self.held: list[Miss] = []
        self._next = first
        self._free: dict[tuple[int, int], list[int]] = {}
        self._kept: dict[tuple[int, int, int], int] = {}
        self._starts: list[int] = []
        self._table: dict[int, Mapping] = {}

    # --- the page table --------------------------------------------------------------------------------

    def map(self, address: int, length: int, perm: int) -> int:
        """The IOVA of `length` bytes at a guest address. The device is told nothing until it asks."""
        if length <= 0 or not 0 < perm <= 3:
            raise DriverError(f"{length} bytes at {address:#x} can't be mapped with permission {perm}")
        if (address, length, perm) in self._kept:
            return self._kept[address, length, perm]
        lead = address % self.page
        size = -(-(lead + length) // self.page) * self.page
        # However small a page is, what was aligned stays so: rings must.
        offset = (address - lead) % _ALIGN
        free = self._free.get((size, offset))
        if free:
            start = free.pop()
        else:
            start = self._next + offset
            # With a gap, so that a device that runs over a mapping's end meets nothing.
            step = max(self.page, _ALIGN)
            self._next += -(-(offset + size) // step) * step + step
        self._table[start] = Mapping(start, size, address - lead, perm)
        insort(self._starts, start)
        if not self.strict:
            self._kept[address, length, perm] = start + lead
        return start + lead

    def unmap(self, iova: int) -> None:
        """Take back what `map` gave, and have the device forget it."""
        mapping = self.lookup(iova)
        if mapping is None:
            raise DriverError(f"nothing is mapped at {iova:#x}")
        if not self.strict:
            return
        del self._table[mapping.start]
        del self._starts[bisect_right(self._starts, mapping.start) - 1]
        self.held = [miss for miss in self.held if not mapping.start <= miss.iova < mapping.end]
        if self.frontend is not None:
            self.frontend.iotlb_invalidate(mapping.start, mapping.size)
        self._free.setdefault((mapping.size, mapping.start % _ALIGN), []).append(mapping.start)

    def lookup(self, iova: int) -> Mapping | None:
        """The mapping that holds an IOVA."""
        at = bisect_right(self._starts, iova) - 1
        if at < 0:
            return None
        mapping = self._table[self._starts[at]]
        return mapping if iova < mapping.end else None

    def translate(self, miss: Miss) -> Translation | None:
        """What answers a miss, or None: nothing is mapped there, or not with that permission."""
        mapping = self.lookup(miss.iova)
        if mapping is None or miss.perm & ~mapping.perm:
            return None
        start, end = mapping.start, mapping.end
        if self.by_page:
            start = miss.iova - miss.iova % self.page
            end = start + self.page
        # A mapping may lie in two regions, or begin on a page before its region does.
        guest = mapping.guest + miss.iova - mapping.start
        for region in self.memory.regions:
            if region.guest_phys_addr <= guest < region.end:
                start = max(start, miss.iova - (guest - region.guest_phys_addr))
                end = min(end, miss.iova + (region.end - guest))
                uaddr = self.memory.user_address(guest) - (miss.iova - start)
                return Translation(start, end - start, uaddr, mapping.perm)
        return None

    # --- the device's questions ------------------------------------------------------------------------

    def fileno(self) -> int:
        """A descriptor that is readable while `service` has something to do, or -1."""
        return -1 if self.frontend is None else self.frontend.iotlb_fileno()

    def service(self) -> int:
        """Take the misses that wait, and answer them; returns how many there were."""
        if self.frontend is None:
            return 0
        count = 0
        while (miss := self.frontend.take_miss()) is not None:
            count += 1
            self.missed += 1
            self.misses.append(miss)
            if self.decide is not None and not self.decide(miss):
                self.held.append(miss)
            elif not self.answer(miss):
                self.faults.append(miss)
        return count

    def answer(self, miss: Miss) -> bool:
        """Tell the device what answers a miss, asked or not; False when nothing does."""
        if self.frontend is None:
            raise DriverError("the IOMMU stands before no device: nobody to answer")
        found = self.translate(miss)
        if found is None:
            return False
        if miss in self.held:
            self.held.remove(miss)
        self.frontend.iotlb_update(*found)
        return True
