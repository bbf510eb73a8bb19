"""The driver's IOMMU: what it maps, what it answers, what it leaves unanswered."""

from __future__ import annotations

import itertools
import os
from collections import deque
from collections.abc import Iterator

import pytest

from pyvhost.abi.vhost import ACCESS_RO, ACCESS_RW, ACCESS_WO
from pyvhost.driver.errors import DriverError
from pyvhost.driver.iommu import FIRST, Iommu, Miss
from pyvhost.driver.memory import GuestMemory, Span
from pyvhost.host import eventfd

A = 0x7000_0000_0000
B = 0x7100_0000_0000


class Device:
    """A front end whose device the test plays: what it is told, and what it misses."""

    def __init__(self) -> None:
        self.fd = eventfd.create()
        self.misses: deque[Miss] = deque()
        self.told: list[tuple[int, int, int, int]] = []
        self.forgotten: list[tuple[int, int]] = []

    def miss(self, iova: int, perm: int) -> None:
        self.misses.append(Miss(iova, perm))
        eventfd.signal(self.fd)

    def iotlb_fileno(self) -> int:
        return self.fd

    def take_miss(self) -> Miss | None:
        eventfd.drain(self.fd)
        return self.misses.popleft() if self.misses else None

    def iotlb_update(self, iova: int, size: int, uaddr: int, perm: int) -> None:
        self.told.append((iova, size, uaddr, perm))

    def iotlb_invalidate(self, iova: int, size: int) -> None:
        self.forgotten.append((iova, size))


@pytest.fixture
def device() -> Iterator[Device]:
    device = Device()
    yield device
    os.close(device.fd)


@pytest.fixture
def memory() -> Iterator[GuestMemory]:
    # Neighbours for the guest, and far apart for the front end.
    with GuestMemory(
        [Span(0, 0x10000, userspace_addr=A), Span(0x10000, 0x10000, userspace_addr=B)]
    ) as memory:
        yield memory


def stand_before(device: Device, iommu: Iommu) -> Iommu:
    iommu.frontend = device
    return iommu


def test_a_miss_is_answered_with_the_pages_mapped(memory: GuestMemory, device: Device) -> None:
    iommu = stand_before(device, Iommu(memory))
    iova = iommu.map(0x1FF0, 0x20, ACCESS_RO)
    assert iova == FIRST + 0xFF0
    assert device.told == [], "nothing is told that nobody asked"
    device.miss(iova + 0x10, ACCESS_RO)
    assert iommu.service() == 1
    assert device.told == [(FIRST, 0x2000, A + 0x1000, ACCESS_RO)]
    assert iommu.service() == 0
    assert list(iommu.misses) == [Miss(iova + 0x10, ACCESS_RO)]
    assert iommu.faults == []


def test_page_by_page(memory: GuestMemory, device: Device) -> None:
    iommu = stand_before(device, Iommu(memory, by_page=True))
    iova = iommu.map(0x1FF0, 0x20, ACCESS_WO)
    device.miss(iova, ACCESS_WO)
    device.miss(iova + 0x10, ACCESS_WO)
    iommu.service()
    assert device.told == [
        (FIRST, 0x1000, A + 0x1000, ACCESS_WO),
        (FIRST + 0x1000, 0x1000, A + 0x2000, ACCESS_WO),
    ]


def test_byte_by_byte(memory: GuestMemory, device: Device) -> None:
    iommu = stand_before(device, Iommu(memory, page=1))
    iova = iommu.map(0x123, 7, ACCESS_RO)
    device.miss(iova + 6, ACCESS_RO)
    device.miss(iova + 7, ACCESS_RO)
    device.miss(iova - 1, ACCESS_RO)
    iommu.service()
    assert device.told == [(iova, 7, A + 0x123, ACCESS_RO)]
    assert iommu.faults == [Miss(iova + 7, ACCESS_RO), Miss(iova - 1, ACCESS_RO)]


def test_a_mapping_over_two_regions_is_told_in_two_pieces(memory: GuestMemory, device: Device) -> None:
    iommu = stand_before(device, Iommu(memory))
    iova = iommu.map(0xFFFE, 4, ACCESS_RW)
    device.miss(iova, ACCESS_RO)
    device.miss(iova + 2, ACCESS_RW)
    iommu.service()
    assert device.told == [
        (FIRST, 0x1000, A + 0xF000, ACCESS_RW),
        (FIRST + 0x1000, 0x1000, B, ACCESS_RW),
    ]


def test_a_page_that_begins_before_its_region_is_cut(device: Device) -> None:
    with GuestMemory([Span(0x1800, 0x900, userspace_addr=A)]) as memory:
        iommu = stand_before(device, Iommu(memory))
        iova = iommu.map(0x1900, 0x10, ACCESS_RO)
        device.miss(iova, ACCESS_RO)
        iommu.service()
        assert device.told == [(FIRST + 0x800, 0x800, A, ACCESS_RO)]


@pytest.mark.parametrize(
    ("given", "wanted", "answered"),
    [
        (ACCESS_RO, ACCESS_RO, True),
        (ACCESS_RO, ACCESS_WO, False),
        (ACCESS_WO, ACCESS_RO, False),
        (ACCESS_WO, ACCESS_RW, False),
        (ACCESS_RW, ACCESS_RO, True),
        (ACCESS_RW, ACCESS_RW, True),
    ],
)
def test_permission_is_not_given_for_the_asking(
    memory: GuestMemory, device: Device, given: int, wanted: int, answered: bool
) -> None:
    iommu = stand_before(device, Iommu(memory))
    miss = Miss(iommu.map(0, 1, given), wanted)
    device.miss(*miss)
    iommu.service()
    assert len(device.told) == answered
    assert iommu.faults == ([] if answered else [miss])


def test_unmapping_has_the_device_forget_before_the_address_is_used_again(
    memory: GuestMemory, device: Device
) -> None:
    iommu = stand_before(device, Iommu(memory))
    iova = iommu.map(0x1234, 0x10, ACCESS_RO)
    iommu.unmap(iova)
    assert device.forgotten == [(FIRST, 0x1000)]
    device.miss(iova, ACCESS_RO)
    iommu.service()
    assert device.told == []
    assert iommu.faults == [Miss(iova, ACCESS_RO)]
    assert iommu.map(0x5234, 0x10, ACCESS_RO) == iova, "at once, and for other memory"
    with pytest.raises(DriverError, match="nothing is mapped"):
        iommu.unmap(iova + 0x1000)


def test_answers_can_be_held_back(memory: GuestMemory, device: Device) -> None:
    held: set[int] = set()
    iommu = stand_before(device, Iommu(memory, decide=lambda miss: miss.iova not in held))
    first, second = iommu.map(0, 1, ACCESS_RO), iommu.map(0x1000, 1, ACCESS_RO)
    held.add(first)
    device.miss(first, ACCESS_RO)
    device.miss(second, ACCESS_RO)
    assert iommu.service() == 2
    assert [iova for iova, *_ in device.told] == [second]
    assert iommu.held == [Miss(first, ACCESS_RO)]
    assert iommu.answer(iommu.held[0])
    assert [iova for iova, *_ in device.told] == [second, first]
    assert iommu.held == []


def test_what_was_held_is_forgotten_with_its_mapping(memory: GuestMemory, device: Device) -> None:
    iommu = stand_before(device, Iommu(memory, decide=lambda miss: False))
    iova = iommu.map(0, 1, ACCESS_RO)
    device.miss(iova, ACCESS_RO)
    iommu.service()
    iommu.unmap(iova)
    assert iommu.held == []
    assert not iommu.answer(Miss(iova, ACCESS_RO))


def test_without_a_device_there_is_a_page_table_and_nobody_to_tell(memory: GuestMemory) -> None:
    iommu = Iommu(memory)
    iova = iommu.map(0, 1, ACCESS_RO)
    assert (iommu.fileno(), iommu.service()) == (-1, 0)
    with pytest.raises(DriverError, match="no device"):
        iommu.answer(Miss(iova, ACCESS_RO))
    iommu.unmap(iova)
    assert iommu.lookup(iova) is None


@pytest.mark.parametrize(("page", "first"), [(0, 0), (3000, 0), (4096, 0x100)])
def test_pages_that_make_no_table(memory: GuestMemory, page: int, first: int) -> None:
    with pytest.raises(ValueError, match="page table"):
        Iommu(memory, page=page, first=first)


@pytest.mark.parametrize(("length", "perm"), [(0, ACCESS_RO), (1, 0), (1, 4)])
def test_what_can_not_be_mapped(memory: GuestMemory, length: int, perm: int) -> None:
    with pytest.raises(DriverError, match="can't be mapped"):
        Iommu(memory).map(0, length, perm)


def test_small_pages_keep_what_is_aligned_aligned(memory: GuestMemory) -> None:
    iommu = Iommu(memory, page=1)
    for address in (0x101, 0x102, 0x104, 0x108, 0x110, 0x10F):
        iova = iommu.map(address, 3, ACCESS_RO)
        assert iova % 16 == address % 16
        iommu.unmap(iova)
        assert iommu.map(address, 3, ACCESS_RO) == iova
    starts = [iommu.map(0x101, 100, ACCESS_RO) for _ in range(4)]
    assert all(high - low >= 100 for low, high in itertools.pairwise(starts))


def test_what_is_not_strict_stays_mapped(memory: GuestMemory, device: Device) -> None:
    iommu = stand_before(device, Iommu(memory, strict=False))
    iova = iommu.map(0x1234, 10, ACCESS_RO)
    iommu.unmap(iova)
    assert device.forgotten == []
    assert iommu.map(0x1234, 10, ACCESS_RO) == iova
    assert iommu.map(0x1234, 10, ACCESS_WO) != iova, "another permission is another mapping"
    assert iommu.answer(Miss(iova, ACCESS_RO))
