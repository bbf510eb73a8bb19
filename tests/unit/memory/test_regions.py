"""Memory tables: what can't be is refused before it is mapped, a descriptor is closed once, nothing stays behind."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
from collections.abc import Callable, Iterator

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from in_process import mapped_files, open_fds
from pyvhost.host import memfd
from pyvhost.memory.mapped import Guard
from pyvhost.memory.regions import NO_GUEST, Mapping, MemoryRegion, MemoryTable
from requirements import need

PAGE = mmap.PAGESIZE
TOP = 1 << 64
HUGE = 2 << 20


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    """What a test opens and maps is closed and unmapped when it ends."""
    fds, maps = open_fds(), mapped_files()
    yield
    assert open_fds() == fds
    assert mapped_files() == maps


def file_of(size: int) -> int:
    """A file of this size in which each page begins with its number."""
    fd = memfd.create("test", size)
    for page in range(size // PAGE):
        os.pwrite(fd, page.to_bytes(8, "little"), page * PAGE)
    return fd


def region(
    guest: int = 0, size: int = PAGE, user: int = 0x10000, offset: int = 0, fd: int = -1
) -> MemoryRegion:
    return MemoryRegion(guest, size, user, offset, fd)


def number_at(address: int) -> int:
    return ctypes.c_uint64.from_address(address).value


# One region


@pytest.mark.parametrize("offset", [0, PAGE, 3 * PAGE + 16, 5 * PAGE - 1])
def test_a_region_starts_where_it_says(offset: int) -> None:
    size = 2 * PAGE
    table = MemoryTable([Mapping.make(region(size=size, offset=offset, fd=file_of(8 * PAGE)))])
    here = table.host_of_user(0x10000, size)
    if offset % PAGE == 0:
        assert number_at(here) == offset // PAGE
    else:
        at = -offset % PAGE
        assert number_at(here + at) == offset // PAGE + 1
    table.close()


@pytest.mark.parametrize(
    ("bad", "code"),
    [
        (region(size=0), errno.EINVAL),
        (region(size=9 * PAGE), errno.EINVAL),
        (region(offset=8 * PAGE), errno.EINVAL),
        (region(offset=8 * PAGE - 1, size=2), errno.EINVAL),
        (region(offset=TOP - PAGE, size=PAGE), errno.EINVAL),
        (region(offset=TOP - 1, size=2), errno.EFAULT),
        (region(guest=TOP - PAGE + 1), errno.EFAULT),
        (region(user=TOP - 1, size=2), errno.EFAULT),
        (region(size=TOP - 1, guest=1, user=1), errno.EINVAL),
        (region(size=TOP, guest=1), errno.EFAULT),
    ],
    ids=str,
)
def test_what_can_not_be_is_refused_and_its_descriptor_closed(bad: MemoryRegion, code: int) -> None:
    fd = file_of(8 * PAGE)
    with pytest.raises(OSError, match=r"region 0x") as caught:
        Mapping.make(
            MemoryRegion(bad.guest_phys_addr, bad.memory_size, bad.userspace_addr, bad.mmap_offset, fd)
        )
    assert caught.value.errno == code
    with pytest.raises(OSError, match="Bad file"):
        os.fstat(fd)


def read_only() -> int:
    writable = file_of(PAGE)
    try:
        return os.open(f"/proc/self/fd/{writable}", os.O_RDONLY)
    finally:
        os.close(writable)


def pipe() -> int:
    ours, theirs = os.pipe()
    os.close(theirs)
    return ours


def eventfd() -> int:
    return os.eventfd(0)


def folder() -> int:
    return os.open("/proc", os.O_RDONLY)


@pytest.mark.parametrize("make", [read_only, pipe, eventfd, folder])
def test_what_is_no_memory_file_is_refused_and_closed(make: Callable[[], int]) -> None:
    with pytest.raises(OSError, match="region"):
        Mapping.make(region(fd=make()))


def test_a_mapping_that_can_not_be_guarded_is_unmapped() -> None:
    def full(address: int, length: int) -> int:
        raise OSError(errno.ENOSPC, "all mappings are guarded already")

    guard = Guard(full, lambda slot: None, lambda slot: False)
    with pytest.raises(OSError, match="guarded"):
        Mapping.make(region(fd=file_of(PAGE)), guard)


def test_a_guard_is_told_of_whole_pages_and_before_they_are_unmapped() -> None:
    said: list[tuple[str, int, int]] = []

    def protect(address: int, length: int) -> int:
        said.append(("protect", address, length))
        return 7

    def release(slot: int) -> None:
        assert mapped_files() == before + 1
        said.append(("release", slot, 0))

    before = mapped_files()
    guard = Guard(protect, release, lambda slot: slot == 7)
    mapping = Mapping.make(region(size=PAGE, offset=PAGE + 8, fd=file_of(4 * PAGE)), guard)
    assert said == [("protect", mapping.host - 8, 2 * PAGE)]
    assert mapping.lost
    table = MemoryTable([mapping])
    assert table.lost
    table.close()
    assert said[1:] == [("release", 7, 0)]
    assert not table.lost


def test_huge_pages_are_mapped_by_their_own_size() -> None:
    """Half of a huge page, from its middle: mmap would refuse both numbers. The pages are never touched."""
    try:
        fd = os.memfd_create("huge", os.MFD_HUGETLB | os.MFD_CLOEXEC)
        os.ftruncate(fd, 2 * HUGE)
    except OSError:
        need(False, "a kernel with hugetlbfs")
        raise
    said: list[tuple[int, int]] = []

    def protect(address: int, length: int) -> int:
        said.append((address, length))
        return 0

    guard = Guard(protect, lambda slot: None, lambda slot: False)
    mapping = Mapping.make(region(size=HUGE // 2, offset=HUGE + HUGE // 4, fd=fd), guard)
    ((base, length),) = said
    assert length == HUGE
    assert base % HUGE == 0
    assert mapping.host == base + HUGE // 4
    MemoryTable([mapping]).close()


def test_own_memory_needs_no_file_and_is_left_alone() -> None:
    memory = mmap.mmap(-1, PAGE)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    table = MemoryTable([Mapping.make(region(user=address))])
    assert table.host_of_user(address + 8, 8) == address + 8
    table.close()
    memory[0] = 1
    with pytest.raises(OSError, match="size is 0"):
        Mapping.make(region(size=0))


# Tables


def test_a_mapping_lives_as_long_as_a_table_has_it() -> None:
    before = mapped_files()
    kept, gone = (Mapping.make(region(guest=i * PAGE, user=i * PAGE, fd=file_of(PAGE))) for i in (0, 1))
    first = MemoryTable([kept, gone])
    second = MemoryTable([kept])
    assert mapped_files() == before + 2
    first.close()
    assert mapped_files() == before + 1
    assert number_at(second.host_of_user(0, 8)) == 0
    second.close()
    second.close()
    assert mapped_files() == before


def test_kernels_read_regions_in_the_order_of_guest_addresses() -> None:
    wanted = [(TOP - PAGE, PAGE, 0x3000), (0, PAGE, 0x1000), (1 << 63, PAGE, 0x2000)]
    table = MemoryTable([Mapping(region(guest, size, user), user) for guest, size, user in wanted])
    assert table.block.dtype == np.int64
    assert table.block.flags.c_contiguous
    rows = [tuple(int(number) % TOP for number in row) for row in table.block]
    assert rows == [(guest, size, user, guest, 3) for guest, size, user in sorted(wanted)]
    assert len(table) == 3


def test_an_empty_table_has_no_memory() -> None:
    table = MemoryTable()
    assert table.block.shape == (0, 5)
    with pytest.raises(OSError, match="none of the 0 regions"):
        table.host_of_user(0, 1)


@pytest.mark.parametrize(
    ("one", "two"),
    [
        (region(0, 2 * PAGE, 0), region(PAGE, PAGE, 1 << 20)),
        (region(0, PAGE, 0), region(PAGE - 1, PAGE, 1 << 20)),
        (region(0, PAGE, 0), region(0, PAGE, 1 << 20)),
        (region(0, PAGE, PAGE), region(1 << 20, PAGE, 2 * PAGE - 1)),
        (region(TOP - PAGE, PAGE, 0), region(TOP - 1, 1, 1 << 20)),
        (region(5 * PAGE, PAGE, 0), region(0, 10 * PAGE, 1 << 20)),
    ],
    ids=str,
)
def test_overlap_is_refused_in_either_view(one: MemoryRegion, two: MemoryRegion) -> None:
    for regions in ((one, two), (two, one)):
        made = [Mapping(each, 0x1000) for each in regions]
        with pytest.raises(OSError, match="overlaps") as caught:
            MemoryTable(made)
        assert caught.value.errno == errno.EINVAL
        assert [mapping.tables for mapping in made] == [0, 0]


def test_neighbours_do_not_overlap() -> None:
    MemoryTable([Mapping(region(0, PAGE, PAGE), 0), Mapping(region(PAGE, PAGE, 0), 0)])


@pytest.mark.parametrize(
    ("address", "length", "inside"),
    [
        (0x10000, PAGE, True),
        (0x10000 + PAGE - 1, 1, True),
        (0x10000 + PAGE, 1, False),
        (0x10000, PAGE + 1, False),
        (0x10001, PAGE, False),
        (0xFFFF, 1, False),
        (0x10000, TOP, False),
        (TOP - 1, 2, False),
        (0x20000 - 8, 16, False),
        (0, 1, False),
        (-1, 1, False),
    ],
)
def test_ring_parts_lie_inside_one_region(address: int, length: int, inside: bool) -> None:
    # The second begins where the first ends, but a part of a ring has to be in one piece.
    table = MemoryTable(
        [Mapping(region(0, PAGE, 0x10000), 0x7000), Mapping(region(PAGE, PAGE, 0x20000), 0x8000)]
    )
    if inside:
        assert table.host_of_user(address, length) == 0x7000 + address - 0x10000
    else:
        with pytest.raises(OSError, match="regions of the memory table") as caught:
            table.host_of_user(address, length)
        assert caught.value.errno == errno.EFAULT


numbers = st.integers(0, 300)


@given(st.lists(st.tuples(numbers, st.integers(1, 60)), max_size=6), numbers, st.integers(1, 80))
def test_lookups_agree_with_a_search_of_every_byte(
    spans: list[tuple[int, int]], address: int, length: int
) -> None:
    taken: dict[int, int] = {}
    mappings = []
    for place, (start, size) in enumerate(spans):
        if any(byte in taken for byte in range(start, start + size)):
            continue
        taken |= dict.fromkeys(range(start, start + size), place)
        mappings.append(Mapping(region(start, size, start), 1000 * (place + 1)))
    table = MemoryTable(mappings)
    holders = {taken.get(byte) for byte in range(address, address + length)}
    if len(holders) == 1 and None not in holders:
        (number,) = holders
        assert number is not None
        assert table.host_of_user(address, length) == 1000 * (number + 1) + address - spans[number][0]
    else:
        with pytest.raises(OSError, match="memory table"):
            table.host_of_user(address, length)


# This process's own memory


def usable(address: int, length: int) -> list[tuple[int, int]]:
    """There are two pieces: 100 to 200 and 250 to 300."""
    pieces = [(max(address, low), min(address + length, high)) for low, high in ((100, 200), (250, 300))]
    return [(first, last - first) for first, last in pieces if first < last]


def own(*spans: tuple[int, int, int]) -> MemoryTable:
    """Regions of this process's memory: guest address, bytes, address."""
    return MemoryTable([Mapping(region(guest, size, at), at) for guest, size, at in spans], usable)


def test_own_regions_may_overlap_and_the_one_that_begins_first_counts() -> None:
    table = own((20, 100, 150), (0, 50, 100), (10, 20, 260))
    assert [tuple(row) for row in table.block] == [
        (0, 50, 100, 0, 3),
        # From 180 on, of which there is a part; then 250 to 270.
        (50, 20, 180, 50, 3),
    ]


def test_of_own_regions_there_is_what_is_mapped() -> None:
    table = own((1000, 400, 50))
    assert [tuple(row) for row in table.block] == [(1050, 100, 100, 1050, 3), (1200, 50, 250, 1200, 3)]
    assert len(own((0, 50, 0)).block) == 0


def test_own_addresses_of_rings_need_no_region() -> None:
    table = own()
    assert table.host_of_user(100, 100) == 100
    for address, length in ((99, 2), (100, 101), (200, 1), (190, 70)):
        with pytest.raises(OSError, match="memory of this process") as caught:
            table.host_of_user(address, length)
        assert caught.value.errno == errno.EFAULT


def test_own_memory_outside_the_table_has_no_guest_address() -> None:
    table = own((7000, 20, 120), (8000, 100, 260))
    assert list(table.pieces_of_user(90, 200)) == [
        (10, 20, 100, NO_GUEST),
        (30, 20, 120, 7000),
        (50, 60, 140, NO_GUEST),
        (160, 10, 250, NO_GUEST),
        (170, 30, 260, 8000),
    ]


def test_a_range_of_the_front_ends_may_cross_regions() -> None:
    table = MemoryTable(
        [Mapping(region(0, PAGE, 0x10000), 0x7000), Mapping(region(9 * PAGE, PAGE, 0x11000), 0x3000)]
    )
    assert list(table.pieces_of_user(0x10FFF, 2)) == [(0, 1, 0x7FFF, PAGE - 1), (1, 1, 0x3000, 9 * PAGE)]
    for address, length in ((0xFFFF, 2), (0x11FFF, 2), (0x20000, 1), (0, 1)):
        with pytest.raises(OSError, match="not in the memory table"):
            list(table.pieces_of_user(address, length))
