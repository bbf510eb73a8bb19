"""The driver's half of a split ring, against a device's half written from the specification."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from pyvhost.driver import barrier
from pyvhost.driver.errors import DeviceError, RingFullError
from pyvhost.driver.memory import GuestMemory, Span
from pyvhost.driver.split_ring import ByteOrder, Descriptor, RingLayout, SplitRing
from stub_device import INDIRECT, NEXT, WRITE, StubDevice


@pytest.fixture
def memory() -> Iterator[GuestMemory]:
    with GuestMemory(1 << 20) as memory:
        yield memory


@pytest.mark.parametrize("size", [0, 3, 65536, -1])
def test_a_size_that_no_ring_has(memory: GuestMemory, size: int) -> None:
    with pytest.raises(ValueError, match="power of two"):
        SplitRing(memory, size)


def test_a_chain_lies_in_memory_as_the_specification_says(memory: GuestMemory) -> None:
    ring = SplitRing(memory, 4, RingLayout(0x1000, 0x2000, 0x3000))
    assert ring.add([(0xAAAA, 5), (0xBBBB, 6)], [(0xCCCC, 7)]) == 0
    assert ring.publish() == 1
    table = memory.read(0x1000, 48)
    assert table[:16] == bytes.fromhex("aaaa000000000000 05000000 0100 0100")
    assert table[16:32] == bytes.fromhex("bbbb000000000000 06000000 0100 0200")
    assert table[32:] == bytes.fromhex("cccc000000000000 07000000 0200 0000")
    assert memory.read(0x2000, 14) == bytes.fromhex("0000 0100 0000 0000 0000 0000 0000")


def test_a_legacy_guests_own_byte_order(memory: GuestMemory) -> None:
    ring = SplitRing(memory, 2, RingLayout(0x1000, 0x2000, 0x3000), byteorder="big", event_idx=True)
    ring.add([(0x1122334455667788, 0x99AABBCC)])
    ring.publish()
    assert memory.read(0x1000, 16) == bytes.fromhex("1122334455667788 99aabbcc 0000 0000")
    assert memory.read(0x2002, 2) == b"\0\1"
    assert ring.desc[0] == Descriptor(0x1122334455667788, 0x99AABBCC, 0, 0)
    memory.write(0x3002, b"\0\1" + bytes.fromhex("00000000 00000000"))
    assert ring.pop_used() is not None
    ring.enable_calls()
    assert memory.read(0x2008, 2) == b"\0\1"


def test_the_legacy_layout_is_one_piece(memory: GuestMemory) -> None:
    layout = RingLayout.legacy(memory, 256)
    assert layout.desc % 4096 == 0
    assert layout.avail == layout.desc + 4096
    assert layout.used == layout.desc + 8192


@pytest.mark.parametrize("indirect", [False, True])
@pytest.mark.parametrize("byteorder", ["little", "big"])
def test_buffers_arrive_and_come_back(memory: GuestMemory, byteorder: ByteOrder, indirect: bool) -> None:
    ring = SplitRing(memory, 8, byteorder=byteorder)
    device = StubDevice(ring)
    out = [(memory.allocate(3), 3), (memory.allocate(4), 4)]
    into = [(memory.allocate(2), 2), (memory.allocate(9), 9)]
    memory.write(out[0][0], b"abc")
    memory.write(out[1][0], b"defg")
    head = ring.add(out, into, indirect=indirect, token="mine")
    assert device.take() == []
    ring.publish()
    (chain,) = device.take()
    assert chain.head == head
    assert [(a, n) for a, n, _ in chain.buffers] == out + into
    assert [flags & WRITE for _, _, flags in chain.buffers] == [0, 0, WRITE, WRITE]
    assert device.gather(chain) == b"abcdefg"
    written = device.scatter(chain, b"hello")
    assert ring.pop_used() is None
    device.use(head, written)
    used = ring.pop_used()
    assert used is not None
    assert (used.head, used.len, used.token) == (head, 5, "mine")
    assert memory.read(into[0][0], 2) + memory.read(into[1][0], 3) == b"hello"
    assert ring.free_descriptors == 8
    assert ring.outstanding == 0


def test_an_indirect_chain_takes_one_descriptor_and_its_table_is_given_back(memory: GuestMemory) -> None:
    ring = SplitRing(memory, 2)
    device = StubDevice(ring)
    before = memory.allocate(16)
    memory.free(before)
    head = ring.add([(0, 1)] * 5, [(0, 1)] * 4, indirect=True)
    assert ring.desc[head].flags == INDIRECT
    assert ring.desc[head].len == 9 * 16
    assert ring.free_descriptors == 1
    ring.publish()
    device.take()
    device.use(head)
    assert ring.pop_used() is not None
    assert memory.allocate(16) == before


def test_chains_cross_regions() -> None:
    with GuestMemory([Span(0, 1 << 16), Span(1 << 16, 1 << 16), Span(1 << 20, 1 << 16)]) as memory:
        across = memory.allocate_across(6)
        ring = SplitRing(memory, 4, RingLayout.allocate(memory, 4, (2, 0, 1)))
        device = StubDevice(ring)
        assert [address >> 16 for address in ring.layout] == [16, 0, 1]
        buffers = [(memory.allocate(5, region=2), 5), (across, 6), (memory.allocate(5), 5)]
        for (address, _), text in zip(buffers, (b"first", b"across", b"third"), strict=True):
            memory.write(address, text)
        ring.add(buffers)
        ring.publish()
        assert device.gather(device.take()[0]) == b"firstacrossthird"


def test_a_full_ring_says_so_and_changes_nothing(memory: GuestMemory) -> None:
    ring = SplitRing(memory, 4)
    ring.add([(0, 1)] * 3)
    with pytest.raises(RingFullError, match="2 descriptors wanted, 1 of 4"):
        ring.add([(0, 1)] * 2)
    ring.add([(0, 1)] * 9, indirect=True)
    with pytest.raises(RingFullError):
        ring.add([(0, 1)])
    assert ring.publish() == 2
    assert [len(chain.buffers) for chain in StubDevice(ring).take()] == [3, 9]


def test_a_chain_of_nothing_is_refused(memory: GuestMemory) -> None:
    with pytest.raises(ValueError, match="at least one"):
        SplitRing(memory, 4).add()


def test_indices_wrap_and_chains_may_come_back_in_any_order(memory: GuestMemory) -> None:
    ring = SplitRing(memory, 4, start=65534)
    device = StubDevice(ring)
    for turn in range(5):
        heads = [ring.add([(0, 1)], token=(turn, n)) for n in range(4)]
        assert ring.publish() == 4
        assert [chain.head for chain in device.take()] == heads
        for head in (heads[2], heads[0], heads[3], heads[1]):
            device.use(head, publish=False)
        assert ring.pop_used() is None
        device.publish()
        assert ring.used_pending() == 4
        tokens = [used.token for used in iter(ring.pop_used, None)]
        assert tokens == [(turn, 2), (turn, 0), (turn, 3), (turn, 1)]
    assert ring.next_used == (65534 + 20) & 0xFFFF


def test_descriptors_that_came_back_in_another_order_are_chained_rightly(memory: GuestMemory) -> None:
    ring = SplitRing(memory, 4)
    device = StubDevice(ring)
    heads = [ring.add([(0, 1)]) for _ in range(4)]
    ring.publish()
    device.take()
    for head in (heads[1], heads[3], heads[0], heads[2]):
        device.use(head)
        assert ring.pop_used() is not None
    buffers = [(n, n + 1) for n in range(4)]
    ring.add(buffers)
    ring.publish()
    assert [(address, length) for address, length, _ in device.take()[0].buffers] == buffers


def test_what_the_device_says_is_judged(memory: GuestMemory) -> None:
    ring = SplitRing(memory, 4)
    head = ring.add([], [(0, 10)])
    ring.publish()
    ring.used_idx = 2
    with pytest.raises(DeviceError, match=r"used.idx went from 0 to 2: 2 chains, where 1 are out"):
        ring.pop_used()
    ring.used_idx = 65535
    with pytest.raises(DeviceError, match="65535 chains"):
        ring.pop_used()
    ring.used_idx = 1
    ring.set_used_element(0, head + 1, 0)
    with pytest.raises(DeviceError, match="no head of a chain that is out"):
        ring.pop_used()
    ring.set_used_element(0, head | 1 << 16, 0)
    with pytest.raises(DeviceError, match="no head of a chain that is out"):
        ring.pop_used()
    ring.set_used_element(0, head, 11)
    with pytest.raises(DeviceError, match="11 bytes were written where 10 were writable"):
        ring.pop_used()
    ring.set_used_element(0, head, 10)
    assert ring.pop_used() is not None
    assert ring.pop_used() is None


@pytest.mark.parametrize("event_idx", [False, True])
def test_kicks_only_where_they_are_asked_for(memory: GuestMemory, event_idx: bool) -> None:
    ring = SplitRing(memory, 8, event_idx=event_idx, start=65533)
    device = StubDevice(ring)

    def publish(count: int) -> bool:
        for _ in range(count):
            ring.add([(0, 1)])
        ring.publish()
        return ring.needs_kick()

    device.want_kicks(True)
    assert publish(0) is False
    assert publish(3) is True
    # With the event index one kick is all that was asked for; without it every batch has one.
    assert publish(1) is not event_idx
    device.take()
    device.want_kicks(False)
    assert publish(2) is False
    device.take()
    device.want_kicks(True)
    assert publish(1) is True
    assert ring.needs_kick() is False


def test_the_device_may_ask_for_a_kick_further_ahead(memory: GuestMemory) -> None:
    ring = SplitRing(memory, 8, event_idx=True)
    ring.avail_event = 2
    kicks = []
    for _ in range(5):
        ring.add([(0, 1)])
        ring.publish()
        kicks.append(ring.needs_kick())
    assert kicks == [False, False, True, False, False]


def test_without_the_event_index_its_word_is_not_looked_at(memory: GuestMemory) -> None:
    ring = SplitRing(memory, 8)
    ring.avail_event = 7
    ring.add([(0, 1)])
    ring.publish()
    assert ring.needs_kick() is True


@pytest.mark.parametrize("event_idx", [False, True])
def test_calls_only_where_they_are_asked_for(memory: GuestMemory, event_idx: bool) -> None:
    ring = SplitRing(memory, 8, event_idx=event_idx, start=65533)
    device = StubDevice(ring)

    def use(count: int) -> bool:
        for _ in range(count):
            ring.add([(0, 1)])
        ring.publish()
        for chain in device.take():
            device.use(chain.head)
        before, now = device.signalled, device.used_idx
        due = ring.call_is_due(before, now)
        assert device.call_due() is due
        return due

    def pop_all() -> None:
        while ring.pop_used():
            pass

    assert ring.enable_calls() is True
    assert use(2) is True
    assert ring.enable_calls() is False  # there are used chains: waiting for a call would be wrong
    pop_all()
    assert ring.enable_calls() is True
    ring.disable_calls()
    assert use(3) is False
    pop_all()
    assert ring.enable_calls() is True
    assert use(1) is True
    assert ring.avail_flags == 0


def test_a_call_can_be_asked_for_further_ahead(memory: GuestMemory) -> None:
    ring = SplitRing(memory, 8, event_idx=True)
    device = StubDevice(ring)
    assert ring.enable_calls(after=2) is True
    for _ in range(4):
        ring.add([(0, 1)])
    ring.publish()
    due = []
    for chain in device.take():
        device.use(chain.head)
        due.append(device.call_due())
    assert due == [False, False, True, False]
    assert ring.enable_calls(after=3) is False
    assert ring.enable_calls(after=4) is True


def test_notify_on_empty_outweighs_suppression(memory: GuestMemory) -> None:
    ring = SplitRing(memory, 4)
    ring.disable_calls()
    assert ring.call_is_due(0, 1) is False
    assert ring.call_is_due(0, 1, emptied=True) is True
    assert ring.call_is_due(1, 1, emptied=True) is False


def test_what_the_other_side_does_within_a_full_fence_is_not_missed(
    memory: GuestMemory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A driver that looked before its fence, or stored behind it, would miss what the device does there."""
    ring = SplitRing(memory, 4, event_idx=True)
    device = StubDevice(ring)
    seen = []

    def device_asks_for_a_kick() -> None:
        seen.append(ring.avail_idx)
        ring.avail_event = 0

    def device_uses_a_chain() -> None:
        monkeypatch.setattr(barrier, "full", lambda: None)  # the device's own
        seen.append(ring.used_event)
        device.use(head)

    ring.avail_event = 3
    head = ring.add([(0, 1)])
    ring.publish()
    monkeypatch.setattr(barrier, "full", device_asks_for_a_kick)
    assert ring.needs_kick() is True
    ring.used_event = 7
    monkeypatch.setattr(barrier, "full", device_uses_a_chain)
    assert ring.enable_calls() is False
    assert seen == [1, 0]


def test_the_barrier_leaves_nothing_behind() -> None:
    for _ in range(1000):
        barrier.full()
        barrier.release()
        barrier.acquire()


def test_everything_can_be_written_raw(memory: GuestMemory) -> None:
    ring = SplitRing(memory, 4, RingLayout(0x1000, 0x2000, 0x3000))
    ring.desc.set(3, 1 << 63, 0xFFFFFFFF, NEXT, 3)
    assert memory.read(0x1030, 16) == bytes.fromhex("0000000000000080 ffffffff 0100 0300")
    assert ring.desc[3] == Descriptor(1 << 63, 0xFFFFFFFF, NEXT, 3)
    ring.set_avail_entry(5, 0xFFFF)
    ring.avail_flags = 0x8001
    ring.avail_idx = 0xFFFE
    ring.used_event = 0x1234
    assert memory.read(0x2000, 14) == bytes.fromhex("0180 feff 0000 ffff 0000 0000 3412")
    ring.used_flags = 1
    ring.used_idx = 2
    ring.set_used_element(6, 0x10000, 9)
    ring.avail_event = 0xABCD
    assert memory.read(0x3000, 38) == bytes.fromhex("0100 0200") + bytes(16) + bytes.fromhex(
        "00000100 09000000"
    ) + bytes(8) + bytes.fromhex("cdab")
    assert (ring.avail_flags, ring.avail_idx, ring.avail_entry(5), ring.used_event) == (
        0x8001,
        0xFFFE,
        0xFFFF,
        0x1234,
    )
    assert (ring.used_flags, ring.used_idx, ring.used_element(2), ring.avail_event) == (
        1,
        2,
        (0x10000, 9),
        0xABCD,
    )


def test_reset_forgets_everything_and_gives_tables_back(memory: GuestMemory) -> None:
    ring = SplitRing(memory, 4)
    ring.add([(0, 1)] * 3, indirect=True)
    ring.publish()
    ring.reset()
    assert (ring.avail_idx, ring.outstanding, ring.free_descriptors) == (0, 0, 4)
    ring.close()
    assert memory.allocate(1 << 20) == 0


class Mapper:
    """Maps by an offset, and keeps what is mapped."""

    def __init__(self) -> None:
        self.mapped: dict[int, tuple[int, int, int]] = {}

    def map(self, address: int, length: int, perm: int) -> int:
        iova = (1 << 40) + len(self.mapped) * (1 << 20) + address
        assert iova not in self.mapped
        self.mapped[iova] = (address, length, perm)
        return iova

    def unmap(self, iova: int) -> None:
        del self.mapped[iova]


def test_the_device_is_told_mapped_addresses_only(memory: GuestMemory) -> None:
    dma = Mapper()
    ring = SplitRing(memory, 4, RingLayout(0x1000, 0x2000, 0x3000), dma=dma)
    parts = [(0x1000, 64, 1), (0x2000, 14, 1), (0x3000, 38, 3)]
    assert [dma.mapped[at] for at in ring.addresses] == parts
    ring.add([(0x5000, 5)], [(0x6000, 6)])
    first, second = ring.desc[0], ring.desc[1]
    assert [dma.mapped[at.addr] for at in (first, second)] == [(0x5000, 5, 1), (0x6000, 6, 2)]
    ring.set_used_element(0, 0, 6)
    ring.used_idx = 1
    assert ring.pop_used() is not None
    assert list(dma.mapped.values()) == parts
    ring.close()
    assert dma.mapped == {}


def test_an_indirect_table_is_mapped_too(memory: GuestMemory) -> None:
    dma = Mapper()
    ring = SplitRing(memory, 4, dma=dma)
    ring.add([(0x5000, 5)], [(0x6000, 6)], indirect=True)
    table, length, perm = dma.mapped[ring.desc[0].addr]
    assert (length, perm) == (32, 1)
    inside = [int.from_bytes(memory.read(table + at, 8), "little") for at in (0, 16)]
    assert [dma.mapped[at] for at in inside] == [(0x5000, 5, 1), (0x6000, 6, 2)]
    ring.reset()
    assert len(dma.mapped) == 3, "the ring's parts alone"


def test_without_mapping_the_device_is_told_user_addresses(memory: GuestMemory) -> None:
    ring = SplitRing(memory, 4)
    assert ring.addresses == tuple(memory.user_address(part) for part in ring.layout)


def test_a_ring_moves_with_what_is_in_it(memory: GuestMemory) -> None:
    dma = Mapper()
    ring = SplitRing(memory, 4, dma=dma)
    old = ring.layout
    ring.add([(0x5000, 5)], token="first")
    ring.publish()
    there = RingLayout.allocate(memory, 4)
    told: list[RingLayout] = []

    def tell() -> None:
        told.append(ring.addresses)
        assert len(dma.mapped) == 7, "the device is told before the old place is unmapped"

    assert ring.move(there, tell) == old
    assert len(dma.mapped) == 4
    assert [dma.mapped[at][0] for at in told[0]] == list(there)
    device = StubDevice(SplitRing(memory, 4, RingLayout.allocate(memory, 4)))
    device.desc, device.avail, device.used = there
    device.last_avail = device.used_idx = 0
    (chain,) = device.take()
    device.use(chain.head)
    used = ring.pop_used()
    assert used is not None
    assert used.token == "first"
    ring.add([(0x5000, 5)])
    ring.publish()
    assert memory.read(old.avail + 2, 2) == b"\1\0", "nobody writes where it was"


def test_a_ring_seen_at_another_address_is_not_copied() -> None:
    spans = [Span(0, 1 << 16, file=0), Span(1 << 40, 1 << 16, file=0)]
    with GuestMemory(spans) as memory:
        ring = SplitRing(memory, 4, RingLayout(0x1000, 0x2000, 0x3000))
        ring.add([(0x5000, 5)])
        ring.move(RingLayout(*(part + (1 << 40) for part in ring.layout)), lambda: None, copy=False)
        ring.publish()
        assert memory.read(0x2002, 2) == b"\1\0"
        assert ring.addresses.desc == memory.user_address((1 << 40) + 0x1000)
