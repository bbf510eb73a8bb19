"""The IOTLB: what Linux's vhost keeps, retires and finds, and the rows that kernels read of it."""

from __future__ import annotations

import errno

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyvhost.abi.vhost import ACCESS_RO, ACCESS_RW, ACCESS_WO
from pyvhost.memory.iotlb import ENTRIES, Iotlb, NoEntryError
from pyvhost.memory.regions import Mapping, MemoryRegion, MemoryTable

TOP = 1 << 64
PAGE = 4096


def table_of(*spans: tuple[int, int, int, int]) -> MemoryTable:
    """Regions: the front end's address, bytes, where it lies here, the guest's address."""
    return MemoryTable([Mapping(MemoryRegion(guest, size, user), host) for user, size, host, guest in spans])


#: Two that are neighbours for the front end, and apart here and for the guest.
APART = ((0x10000, 0x1000, 0x700000, 0x5000), (0x11000, 0x1000, 0x300000, 0x90000))


def rows(iotlb: Iotlb) -> list[tuple[int, ...]]:
    return [tuple(int(number) % TOP for number in row) for row in iotlb.block]


def test_an_entry_is_in_pieces_where_memory_is() -> None:
    iotlb = Iotlb(table_of(*APART))
    iotlb.update(1 << 40, 0x1800, 0x10400, ACCESS_RO)
    assert rows(iotlb) == [
        (1 << 40, 0xC00, 0x700400, 0x5400, ACCESS_RO),
        ((1 << 40) + 0xC00, 0xC00, 0x300000, 0x90000, ACCESS_RO),
    ]
    assert list(iotlb.ranges((1 << 40) + 0xBFF, 2, ACCESS_RO)) == [
        (0x700FFF, 1, 0x5FFF),
        (0x300000, 1, 0x90000),
    ]


@pytest.mark.parametrize(
    ("iova", "size", "uaddr", "perm"),
    [
        (0, 0, 0x10000, 3),
        (0, -1, 0x10000, 3),
        (TOP - 1, 2, 0x10000, 3),
        (0, 0x1000, TOP - 1, 3),
        (0, TOP, 0x10000, 3),
        (0, 0x1000, 0x10000, 4),
        (0, 0x1000, 0x10000, -1),
        (0, 0x2001, 0x10000, 3),
        (0, 1, 0xFFFF, 3),
        (0, 1, 0x12000, 3),
    ],
)
def test_what_can_not_be_is_refused_and_changes_nothing(iova: int, size: int, uaddr: int, perm: int) -> None:
    iotlb = Iotlb(table_of(*APART))
    iotlb.update(1 << 30, 0x10, 0x10000, 3)
    before = rows(iotlb)
    with pytest.raises(OSError, match="0x") as caught:
        iotlb.update(iova, size, uaddr, perm)
    assert caught.value.errno == errno.EFAULT
    assert rows(iotlb) == before
    assert len(iotlb) == 1


def test_the_oldest_of_2048_retires() -> None:
    iotlb = Iotlb(table_of((0, 1 << 20, 0, 0)))
    # The oldest is neither the first nor the last by address.
    order = [*range(2000, 2000 + ENTRIES // 2), *range(ENTRIES // 2)]
    for number in order:
        iotlb.update(number * PAGE, PAGE, 0, ACCESS_RW)
    assert len(iotlb) == ENTRIES == 2048
    for retired, number in zip(order[:20], range(5000, 5020), strict=True):
        list(iotlb.ranges(retired * PAGE, 1, ACCESS_RO))
        iotlb.update(number * PAGE, PAGE, 0, ACCESS_RW)
        assert len(iotlb) == ENTRIES
        with pytest.raises(NoEntryError):
            list(iotlb.ranges(retired * PAGE, 1, ACCESS_RO))
    # One that was invalidated makes room.
    iotlb.invalidate(5000 * PAGE, 1)
    iotlb.update(9000 * PAGE, PAGE, 0, ACCESS_RW)
    list(iotlb.ranges(order[20] * PAGE, 1, ACCESS_RO))


def test_of_entries_that_overlap_the_one_that_begins_first_counts() -> None:
    iotlb = Iotlb(table_of((0, 1 << 20, 0x1000000, 0)))
    iotlb.update(0x2000, 0x2000, 0x20000, ACCESS_RO)
    iotlb.update(0x1000, 0x2000, 0x10000, ACCESS_RW)
    iotlb.update(0x1000, 0x4000, 0x30000, ACCESS_WO)
    assert rows(iotlb) == [
        (0x1000, 0x2000, 0x1010000, 0x10000, ACCESS_RW),
        (0x3000, 0x2000, 0x1032000, 0x32000, ACCESS_WO),
    ]
    # Whole entries go, whatever part was named, and what they hid is back.
    iotlb.invalidate(0x4FFF, 1)
    assert rows(iotlb)[1] == (0x3000, 0x1000, 0x1021000, 0x21000, ACCESS_RO)
    iotlb.invalidate(0x1000, 1)
    assert rows(iotlb) == [(0x2000, 0x2000, 0x1020000, 0x20000, ACCESS_RO)]


def test_everything_can_be_invalidated_at_once() -> None:
    iotlb = Iotlb(table_of((0, 1 << 20, 0, 0)))
    for iova in (0, PAGE, TOP - PAGE):
        iotlb.update(iova, PAGE, 0, ACCESS_RW)
    iotlb.invalidate(0, TOP)
    assert len(iotlb) == 0
    assert rows(iotlb) == []


def test_permissions_and_misses_are_told_apart() -> None:
    iotlb = Iotlb(table_of((0, 1 << 20, 0, 0)))
    iotlb.update(0x1000, 0x1000, 0, ACCESS_RO)
    iotlb.update(0x2000, 0x1000, 0, 0)
    with pytest.raises(OSError, match="allows 1") as denied:
        list(iotlb.ranges(0x1000, 1, ACCESS_WO))
    assert denied.value.errno == errno.EFAULT
    with pytest.raises(OSError, match="allows 0"):
        list(iotlb.ranges(0x1800, 0x1000, ACCESS_RO))
    for iova in (0xFFF, 0x3000):
        with pytest.raises(NoEntryError) as missed:
            list(iotlb.ranges(iova, 0x800, ACCESS_RO))
        assert missed.value.iova == iova


def test_entries_follow_the_memory_table_and_come_back() -> None:
    iotlb = Iotlb(table_of(*APART))
    iotlb.update(0, 0x1000, 0x10000, ACCESS_RW)
    iotlb.update(0x1000, 0x1000, 0x11000, ACCESS_RW)
    iotlb.use_table(table_of((0x10000, 0x1000, 0x800000, 0)))
    assert rows(iotlb)[0] == (0, 0x1000, 0x800000, 0, ACCESS_RW)
    # Memory that has gone is nowhere, and certainly not where it was.
    assert not any(row[2] == 0x300000 for row in rows(iotlb))
    iotlb.invalidate(0, 1)
    iotlb.use_table(table_of(*APART))
    assert rows(iotlb) == [(0x1000, 0x1000, 0x300000, 0x90000, ACCESS_RW)]


def test_own_memory_that_is_not_there_is_no_miss() -> None:
    def usable(address: int, length: int) -> list[tuple[int, int]]:
        first, last = max(address, 0x10000), min(address + length, 0x20000)
        return [(first, last - first)] if first < last else []

    iotlb = Iotlb(MemoryTable([Mapping(MemoryRegion(0x5000, 0x1000, 0x11000), 0x11000)], usable))
    iotlb.update(0, 0x20000, 0x8000, ACCESS_RW)
    with pytest.raises(OSError, match="allows 0"):
        list(iotlb.ranges(0x7FFF, 1, ACCESS_RO))
    assert [(host, run) for host, run, _ in iotlb.ranges(0x8000, 0x10000, ACCESS_WO)] == [
        (0x10000, 0x1000),
        (0x11000, 0x1000),
        (0x12000, 0xE000),
    ]
    with pytest.raises(OSError, match="allows 0"):
        list(iotlb.ranges(0x18000, 1, ACCESS_RO))


numbers = st.integers(0, 40)
steps = st.lists(
    st.one_of(
        st.tuples(st.just("update"), numbers, st.integers(1, 12), st.integers(0, 60), st.integers(0, 3)),
        st.tuples(st.just("invalidate"), numbers, st.integers(1, 12)),
        st.tuples(st.just("table"), st.integers(0, 2)),
    ),
    max_size=25,
)
TABLES = (
    ((0, 100, 1000, 0),),
    ((0, 30, 1000, 500), (30, 70, 3000, 0)),
    ((0, 20, 1000, 0), (40, 60, 3000, 900)),
)


@given(steps)
def test_rows_are_what_a_search_of_every_byte_finds(told: list[tuple[str, *tuple[int, ...]]]) -> None:
    """And the block that has grown step by step is the one that is made from scratch."""
    at = 0
    iotlb = Iotlb(table_of(*TABLES[at]))
    entries: list[tuple[int, ...]] = []
    for what, *rest in told:
        if what == "update":
            iova, size, uaddr, _ = rest
            here = {u for user, length, _, _ in TABLES[at] for u in range(user, user + length)}
            if set(range(uaddr, uaddr + size)) <= here:
                iotlb.update(*rest)
                entries.append(tuple(rest))
            else:
                with pytest.raises(OSError, match="not in the memory table"):
                    iotlb.update(*rest)
        elif what == "invalidate":
            iova, size = rest
            iotlb.invalidate(iova, size)
            entries = [e for e in entries if not (e[0] < iova + size and iova < e[0] + e[1])]
        else:
            (at,) = rest
            iotlb.use_table(table_of(*TABLES[at]))
        found: dict[int, tuple[int, int, int]] = {}
        for start, size, host, guest, perm in rows(iotlb):
            assert not set(range(start, start + size)) & set(found)
            found |= {start + i: (host + i, guest + i, perm) for i in range(size)}
        assert list(found) == sorted(found)
        for iova in range(60):
            holders = [e for e in entries if e[0] <= iova < e[0] + e[1]]
            if not holders:
                assert iova not in found
                continue
            first = min(holders, key=lambda e: e[0])
            memory = {
                u: (h + u - user, g + u - user) for user, n, h, g in TABLES[at] for u in range(user, user + n)
            }
            got = found.get(iova, (0, 0, 0))
            if all(u in memory for u in range(first[2], first[2] + first[1])):
                assert got == (*memory[first[2] + iova - first[0]], first[3])
            else:
                # Memory that has gone, in whole or in part, is in no row, or in one that allows nothing.
                assert got[2] == 0
        before = rows(iotlb)
        iotlb._rebuild()
        assert rows(iotlb) == before


def test_what_an_invalidation_takes_away_from_writers() -> None:
    iotlb = Iotlb(table_of(*APART))
    # Two mappings of one page, one that may only be read, and one across both regions.
    iotlb.update(0x1000, PAGE, 0x10000, ACCESS_RW)
    iotlb.update(0x3000, PAGE, 0x10000, ACCESS_WO)
    iotlb.update(0x5000, PAGE, 0x11000, ACCESS_RO)
    assert iotlb.invalidate(0x5000, 1) == [], "nobody could write there"
    assert iotlb.invalidate(0x1800, 1) == [(0x5000, PAGE)]
    assert iotlb.lets_write(0x5010, 16), "by the other one"
    assert not iotlb.lets_write(0x5FF8, 16), "not all of it"
    assert not iotlb.lets_write(0x90000, 1)
    iotlb.update(0x8000, 0x1800, 0x10400, ACCESS_RW)
    assert sorted(iotlb.invalidate(0, TOP)) == [(0x5000, PAGE), (0x5400, 0xC00), (0x90000, 0xC00)]
    assert not iotlb.lets_write(0x5010, 16)
