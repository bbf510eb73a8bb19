"""Guest memory: regions and their files, room, bytes that cross from region to region."""

from __future__ import annotations

import ctypes
import mmap
import os

import pytest

from pyvhost.driver.errors import GuestMemoryError
from pyvhost.driver.memory import PAGE, GuestMemory, Span


def test_a_size_alone_is_one_region_at_address_0_in_a_file_of_its_own() -> None:
    with GuestMemory(4 * PAGE) as memory:
        (region,) = memory.regions
        assert (region.guest_phys_addr, region.memory_size, region.mmap_offset) == (0, 4 * PAGE, 0)
        assert os.fstat(region.fd).st_size == 4 * PAGE
        memory.write(PAGE - 1, b"abc")
        assert os.pread(region.fd, 5, PAGE - 2) == b"\0abc\0"


def test_the_user_address_is_where_this_process_has_the_byte() -> None:
    with GuestMemory(2 * PAGE) as memory:
        memory.write(PAGE + 5, b"here")
        address = memory.user_address(PAGE + 5)
        with open("/proc/self/mem", "rb", buffering=0) as own:
            own.seek(address)
            assert own.read(4) == b"here"


def test_a_front_end_may_tell_any_user_address() -> None:
    with GuestMemory([Span(0x1000, PAGE, userspace_addr=0xDEAD0000)]) as memory:
        assert memory.regions[0].userspace_addr == 0xDEAD0000
        assert memory.user_address(0x1010) == 0xDEAD0010


def test_regions_may_share_a_file_and_begin_anywhere_in_it() -> None:
    spans = [
        Span(0x10000, PAGE, mmap_offset=0x234, file=1),
        Span(0x20000, PAGE, mmap_offset=3 * PAGE, file=1),
    ]
    with GuestMemory(spans) as memory:
        low, high = memory.regions
        assert low.fd == high.fd
        memory.write(0x10000, b"low")
        memory.write(0x20000, b"high")
        assert os.pread(low.fd, 3, 0x234) == b"low"
        assert os.pread(low.fd, 4, 3 * PAGE) == b"high"


def test_regions_are_in_order_of_guest_address_whatever_order_they_came_in() -> None:
    with GuestMemory([Span(0x30000, PAGE), Span(0x10000, PAGE), Span(0x20000, PAGE)]) as memory:
        assert [region.guest_phys_addr for region in memory.regions] == [0x10000, 0x20000, 0x30000]


@pytest.mark.parametrize(
    "span",
    [
        Span(0x1FFF, 2),
        Span(0, 0x1001),
        Span(0x1800, 1),
        Span(0, 0x10000),
        Span(0x5000, 0),
        Span((1 << 64) - 1, 2),
    ],
    ids=["tail", "head", "inside", "around", "empty", "past the end"],
)
def test_regions_that_overlap_or_make_no_sense_are_refused(span: Span) -> None:
    with GuestMemory([Span(0x1000, 0x1000)]) as memory:
        with pytest.raises(ValueError, match="region"):
            memory.add_region(span)
        assert len(memory.regions) == 1


def test_bytes_cross_from_a_region_into_its_neighbour() -> None:
    with GuestMemory([Span(0, PAGE), Span(PAGE, PAGE)]) as memory:
        memory.write(PAGE - 3, b"abcdef")
        low, high = memory.regions
        assert os.pread(low.fd, 3, PAGE - 3) == b"abc"
        assert os.pread(high.fd, 3, 0) == b"def"
        assert memory.read(PAGE - 3, 6) == b"abcdef"
        with pytest.raises(GuestMemoryError):
            memory.view(PAGE - 3, 6)


@pytest.mark.parametrize("address", [0, 0xFFF, 0x2000, 0x1FFE, 1 << 63])
def test_a_write_that_is_not_all_inside_touches_nothing(address: int) -> None:
    with GuestMemory([Span(0x1000, 0x1000), Span(0x4000, 0x1000)]) as memory:
        with pytest.raises(GuestMemoryError):
            memory.write(address, b"wild")
        with pytest.raises(GuestMemoryError):
            memory.read(address, 4)
        assert memory.read(0x1000, 0x1000) == memory.read(0x4000, 0x1000) == bytes(0x1000)


def test_words_are_in_the_machines_byte_order() -> None:
    with GuestMemory(PAGE) as memory:
        memory.words(8, 2, "H")[1] = 0x1234
        memory.words(16, 1, "I")[0] = 0x12345678
        memory.words(24, 1, "Q")[0] = 1 << 63
        assert memory.read(10, 2) == (0x1234).to_bytes(
            2, "little" if memory.read(10, 1) == b"\x34" else "big"
        )
        assert memory.words(16, 1, "I")[0] == 0x12345678
        assert memory.words(24, 1, "Q")[0] == 1 << 63


def test_room_is_aligned_and_nobody_elses() -> None:
    with GuestMemory(PAGE) as memory:
        taken: list[tuple[int, int]] = []
        for size, align in [(1, 1), (16, 16), (3, 2), (100, 64), (7, 1)]:
            address = memory.allocate(size, align)
            assert address % align == 0
            assert all(address + size <= start or end <= address for start, end in taken)
            taken.append((address, address + size))


def test_room_given_back_is_whole_again() -> None:
    with GuestMemory(PAGE) as memory:
        addresses = [memory.allocate(PAGE // 4) for _ in range(4)]
        with pytest.raises(GuestMemoryError, match="free"):
            memory.allocate(1)
        for at in (1, 3, 0, 2):
            memory.free(addresses[at])
        assert memory.allocate(PAGE) == 0
        with pytest.raises(GuestMemoryError, match="nothing was allocated"):
            memory.free(addresses[1])


def test_room_can_be_had_in_one_region_or_across_two() -> None:
    with GuestMemory([Span(0, PAGE), Span(PAGE, PAGE), Span(8 * PAGE, PAGE)]) as memory:
        assert memory.allocate(16, region=2) == 8 * PAGE
        across = memory.allocate_across(10)
        assert across == PAGE - 5
        memory.write(across, b"0123456789")
        with pytest.raises(GuestMemoryError, match="not free"):
            memory.allocate_across(2)
        with pytest.raises(GuestMemoryError, match="1 places"):
            memory.allocate_across(10, border=1)
        memory.free(across)
        assert memory.allocate(PAGE, region=0) == 0
        assert memory.allocate(PAGE, region=1) == PAGE


def test_a_region_can_come_and_go() -> None:
    with GuestMemory(PAGE) as memory:
        region = memory.add_region(Span(0x100000, PAGE))
        address = memory.allocate(8, region=1)
        memory.remove_region(region)
        assert len(memory.regions) == 1
        with pytest.raises(GuestMemoryError):
            memory.read(address, 1)
        memory.free(address)


def test_what_was_cut_from_the_file_is_not_touched_here() -> None:
    with GuestMemory([Span(0, 4 * PAGE), Span(0x100000, PAGE)]) as memory:
        memory.shrink_file(memory.regions[0], PAGE)
        assert os.fstat(memory.regions[0].fd).st_size == PAGE
        memory.write(PAGE - 1, b"x")
        with pytest.raises(GuestMemoryError):
            memory.write(PAGE, b"x")
        memory.write(0x100000, b"the other one lives")


def test_close_closes_the_files_and_the_mapping_goes_with_its_last_view() -> None:
    memory = GuestMemory(PAGE)
    fd = memory.regions[0].fd
    view = memory.view(0, 4)
    memory.close()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)
    view[:] = b"live"
    assert bytes(view) == b"live"
    memory.close()


def test_many_regions_of_odd_sizes_read_as_one() -> None:
    sizes = [mmap.PAGESIZE, 1, 17, 4095, 2]
    spans, start = [], 0x8000
    for size in sizes:
        spans.append(Span(start, size))
        start += size
    with GuestMemory(spans) as memory:
        data = bytes(range(256)) * (sum(sizes) // 256) + bytes(sum(sizes) % 256)
        memory.write(0x8000, data)
        assert memory.read(0x8000, len(data)) == data


def test_anonymous_memory_has_no_file() -> None:
    before = set(os.listdir("/proc/self/fd"))
    with GuestMemory([Span(0, PAGE), Span(PAGE, PAGE, mmap_offset=5)], anonymous=True) as memory:
        assert set(os.listdir("/proc/self/fd")) == before
        memory.write(PAGE - 2, b"abcd")
        assert memory.read(PAGE - 2, 4) == b"abcd"
        assert [region.fd for region in memory.regions] == [-1, -1]
        assert ctypes.string_at(memory.user_address(PAGE), 2) == b"cd"
        with pytest.raises(ValueError, match="can't share a file"):
            memory.add_region(Span(8 * PAGE, PAGE, file=0))
