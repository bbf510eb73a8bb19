"""Guests that break their rings: err is signalled, that ring stops with nothing consumed, everything else lives."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from back_end import PATIENCE, BackEnd
from pyvhost.abi import virtio
from pyvhost.driver.memory import MIB, GuestMemory, Span
from pyvhost.driver.net import NetDriver
from pyvhost.driver.queue import Queue
from pyvhost.driver.split_ring import DescriptorTable, SplitRing
from pyvhost.net.device import NetDevice

NEXT = virtio.VRING_DESC_F_NEXT
WRITE = virtio.VRING_DESC_F_WRITE
INDIRECT = virtio.VRING_DESC_F_INDIRECT

SIZE = 2048
FRAME = b"\xff" * 6 + bytes.fromhex("0200000000aa 88b5") + bytes(range(200))
# A gap below, one in the middle, and a border that a buffer may cross.
SPANS = [Span(MIB, 8 * MIB), Span(9 * MIB, 4 * MIB), Span(64 * MIB, 4 * MIB)]
END = 68 * MIB


# Where a lie's descriptors begin: honest ones come from the lower end.
FIRST = 900


class Scene:
    """A guest with two queue pairs on a loop device, of which pair 0 is about to misbehave."""

    def __init__(self, back_end: BackEnd) -> None:
        self.memory = GuestMemory(SPANS)
        self.frontend = back_end.connect()
        self.driver = NetDriver(self.frontend, self.memory, queue_pairs=2, ring_size=SIZE, timeout=PATIENCE)
        self.driver.start(post=False)
        self.driver.post(1, 8)
        self.address = self.memory.allocate(4096)

    def close(self) -> None:
        self.driver.close()
        self.frontend.close()
        self.memory.close()

    def lives(self, pair: int) -> None:
        """A frame that is sent on this pair comes back."""
        self.driver.send(FRAME, pair=pair)
        assert [(got.pair, got.frame) for got in self.driver.receive()] == [(pair, FRAME)]

    def lives_beside(self, pair: int) -> None:
        """The same while frames come on the other pair, of which nothing is known."""
        self.driver.send(FRAME, pair=pair)
        while not (came := [got.frame for got in self.driver.receive() if got.pair == pair]):
            pass
        assert came == [FRAME]

    def fails(self, queue: Queue, used: int = 0) -> None:
        """The ring signals err with `used` chains used; the other pair and the control messages go on."""
        assert queue.wait_error(PATIENCE), "err was not signalled"
        assert queue.ring.used_idx == used, "the chain was consumed"
        self.lives(1)
        self.frontend.sync()
        # As Linux has it, the next kick is another look; it shows the same.
        queue.kick()
        assert queue.wait_error(PATIENCE), "err was not signalled again"
        assert queue.ring.used_idx == used
        # A look for each kick, and one if the ring was looked at anyway, but never one after the other.
        self.frontend.sync()
        queue.take_errors()
        assert queue.errors <= queue.kicks + 1


@pytest.fixture(scope="module")
def back_end(tmp_path_factory: pytest.TempPathFactory) -> Iterator[BackEnd]:
    with BackEnd(tmp_path_factory.mktemp("hostile"), NetDevice(backend="loop", queue_pairs=2)) as back_end:
        yield back_end


@pytest.fixture
def scene(back_end: BackEnd) -> Iterator[Scene]:
    scene = Scene(back_end)
    yield scene
    scene.close()


Entry = tuple[int | None, int, int, int]
"""A descriptor's addr (None: of a good buffer of 4096 bytes), len, flags and next (counted from its chain's)."""

Lie = Callable[[SplitRing, int, int], None]
"""Makes a chain that can't be at descriptor FIRST. Takes the ring, the good buffer's address, and what to turn
round in the flags: for a receive ring WRITE."""


def chain(*entries: Entry) -> Lie:
    """These descriptors, the first being the head."""

    def lie(ring: SplitRing, address: int, turn: int) -> None:
        for at, (addr, length, flags, following) in enumerate(entries):
            shifted = following + FIRST if following < 1100 else following
            flags ^= 0 if flags & INDIRECT else turn
            ring.desc.set(FIRST + at, address if addr is None else addr, length, flags, shifted)

    return lie


def table(*entries: Entry, length: int | None = None) -> Lie:
    """The same in an indirect table, whose descriptor says `length` bytes if that is to be a lie."""

    def lie(ring: SplitRing, address: int, turn: int) -> None:
        where = ring.memory.allocate(16 * max(len(entries), 1))
        inside = DescriptorTable(ring.memory, where, max(len(entries), 1))
        for at, (addr, size, flags, following) in enumerate(entries):
            flags ^= 0 if flags & INDIRECT else turn
            inside.set(at, address if addr is None else addr, size, flags, following)
        ring.desc.set(FIRST, where, 16 * len(entries) if length is None else length, INDIRECT)

    return lie


GOOD: Entry = (None, 256, 0, 0)

LIES: dict[str, Lie] = {
    "next is the ring's size": chain((None, 256, NEXT, SIZE)),
    "next is 65535": chain((None, 256, NEXT, 0xFFFF)),
    "a loop of one": chain((None, 256, NEXT, 0)),
    "a loop of three": chain((None, 9, NEXT, 1), (None, 9, NEXT, 2), (None, 9, NEXT, 0)),
    "a loop behind good descriptors": chain((None, 9, NEXT, 1), (None, 9, NEXT, 2), (None, 9, NEXT, 1)),
    "length 0": chain((None, 0, 0, 0)),
    "length 4 GiB - 1": chain((None, 0xFFFFFFFF, 0, 0)),
    "below memory": chain((0, 256, 0, 0)),
    "just below memory": chain((MIB - 1, 256, 0, 0)),
    "behind memory": chain((END, 256, 0, 0)),
    "the last byte lies behind memory": chain((END - 255, 256, 0, 0)),
    "into the gap": chain((13 * MIB - 255, 256, 0, 0)),
    "across the gap": chain((13 * MIB - 10, 52 * MIB, 0, 0)),
    "at the top of all addresses": chain(((1 << 64) - 1, 1, 0, 0)),
    "wraps round 2**64": chain(((1 << 64) - 10, 256, 0, 0)),
    "a length as large as the address is far": chain((END + 0x1000, 0x1000, 0, 0)),
    "an address of the host's": chain((0x7FFF_FFFF_F000, 256, 0, 0)),
    "an address of the kernel's": chain((0xFFFF_8880_0000_0000, 256, 0, 0)),
    "the second descriptor outside": chain((None, 256, NEXT, 1), (END, 1, 0, 0)),
    "less than a header": chain((None, 11, 0, 0)),
    "less than a header in crumbs": chain((None, 1, NEXT, 1), (None, 10, 0, 0)),
    "writable": chain((None, 256, WRITE, 0)),
    "writable at the end": chain((None, 256, NEXT, 1), (None, 256, WRITE, 0)),
    "readable behind writable": chain((None, 256, NEXT | WRITE, 1), (None, 256, 0, 0)),
    "1025 pieces": chain(*((None, 1, NEXT, at) for at in range(1, 1025)), (None, 1, 0, 0)),
    "an indirect table of nothing": table(length=0),
    "an indirect table of half a descriptor": table(GOOD, length=8),
    "an indirect table and a half": table(GOOD, GOOD, length=24),
    "an indirect table of 4 GiB - 16": table(GOOD, length=0xFFFFFFF0),
    "an indirect table outside": chain((END, 32, INDIRECT, 0)),
    "an indirect table at the top of all addresses": chain(((1 << 64) - 16, 32, INDIRECT, 0)),
    "an indirect table that runs into the gap": chain((13 * MIB - 16, 32, INDIRECT, 0)),
    "a table in a table": table((None, 32, INDIRECT, 0)),
    "a loop in a table": table((None, 9, NEXT, 1), (None, 9, NEXT, 0)),
    "next beyond the table": table((None, 256, NEXT, 2), GOOD),
    "next beyond the table, within the ring": table((None, 256, NEXT, 100), GOOD),
    "a table's address outside": table((END, 256, 0, 0)),
    "a table's length 0": table((None, 0, 0, 0)),
    "1025 pieces in a table": table(*((None, 1, NEXT, at) for at in range(1, 1025)), (None, 1, 0, 0)),
}


def tell(queue: Queue, head: int = FIRST) -> int:
    """Make `head` available, and kick; its available index."""
    index = queue.ring.avail_idx
    queue.ring.offer(head)
    queue.ring.publish()
    queue.kick()
    return index


@pytest.mark.parametrize("lie", LIES.values(), ids=LIES)
def test_a_chain_to_transmit_that_can_not_be(scene: Scene, lie: Lie) -> None:
    driver, queue = scene.driver, scene.driver.tx[0]
    driver.post(0, 8)
    lie(queue.ring, scene.address, 0)
    index = tell(queue)
    scene.fails(queue)
    # Mended, it goes through at the next kick, and nothing of this has bent the ring's state.
    scene.memory.write(scene.address, bytes(12) + FRAME)
    queue.ring.desc.set(FIRST, scene.address, 12 + len(FRAME), 0)
    queue.kick()
    assert [got.frame for got in driver.receive()] == [FRAME]
    assert driver.stop()[1] == index + 1


RX_LIES = {name: lie for name, lie in LIES.items() if "header" not in name}


@pytest.mark.parametrize("lie", RX_LIES.values(), ids=RX_LIES)
def test_a_receive_buffer_that_can_not_be(scene: Scene, lie: Lie) -> None:
    driver, queue = scene.driver, scene.driver.rx[0]
    lie(queue.ring, scene.address, WRITE)
    index = tell(queue)
    driver.send(FRAME)
    scene.fails(queue)
    # The frame waits for a buffer that is none: it comes as soon as there is one.
    queue.ring.desc.set(FIRST, scene.address, 4096, WRITE)
    queue.kick()
    assert queue.wait_call(PATIENCE)
    assert queue.ring.used_element(index) == (FIRST, 12 + len(FRAME))
    assert scene.memory.read(scene.address + 12, len(FRAME)) == FRAME
    driver.wait_sent()
    assert driver.stop()[0] == index + 1


@pytest.mark.parametrize("lie", LIES.values(), ids=LIES)
def test_good_chains_before_a_bad_one_are_served(scene: Scene, lie: Lie) -> None:
    queue = scene.driver.tx[0]
    scene.driver.post(0, 8)
    frames = [FRAME + bytes([number]) for number in range(5)]
    for frame in frames:
        room = scene.memory.allocate(12 + len(frame))
        scene.memory.write(room, bytes(12) + frame)
        queue.ring.add([(room, 12 + len(frame))])
    lie(queue.ring, scene.address, 0)
    index = tell(queue)
    assert index == 0, "good and bad are published together"
    assert [got.frame for got in scene.driver.receive(5)] == frames
    scene.fails(queue, used=5)
    assert scene.driver.stop()[1] == 5


@pytest.mark.parametrize("ring", ["tx", "rx"])
@pytest.mark.parametrize("head", [SIZE, SIZE + 1, 0x7FFF, 0x8000, 0xFFFF])
def test_a_head_that_is_no_descriptor(scene: Scene, ring: str, head: int) -> None:
    queue = scene.driver.tx[0] if ring == "tx" else scene.driver.rx[0]
    tell(queue, head)
    if ring == "rx":
        scene.driver.send(FRAME)
    else:
        scene.driver.post(0, 8)
    scene.fails(queue)
    scene.memory.write(scene.address, bytes(12) + FRAME)
    queue.ring.desc.set(
        FIRST, scene.address, 4096 if ring == "rx" else 12 + len(FRAME), WRITE if ring == "rx" else 0
    )
    queue.ring.set_avail_entry(0, FIRST)
    queue.kick()
    other = scene.driver.rx[0]
    assert other.wait_call(PATIENCE)
    # A frame comes before the chain that it came from is shown as used; a ring that has stopped has done both.
    scene.driver.stop()
    assert queue.ring.used_element(0)[0] == FIRST


@pytest.mark.parametrize("ring", ["tx", "rx"])
@pytest.mark.parametrize("ahead", [SIZE + 1, SIZE + 2, 0x7FFF, 0x8000, 0xFFFF])
def test_an_available_index_too_far_ahead(scene: Scene, ring: str, ahead: int) -> None:
    queue = scene.driver.tx[0] if ring == "tx" else scene.driver.rx[0]
    queue.ring.avail_idx = ahead
    queue.kick()
    if ring == "rx":
        scene.driver.send(FRAME)
    scene.fails(queue)
    queue.ring.avail_idx = 0
    queue.kick()
    if ring == "tx":
        scene.driver.send(FRAME)
    scene.driver.post(0, 8)
    assert [got.frame for got in scene.driver.receive()] == [FRAME]


def test_a_whole_ring_of_one_head_again_and_again(scene: Scene) -> None:
    """The same descriptor in every entry is foolish, and harms nobody: it is SIZE chains."""
    queue = scene.driver.tx[0]
    scene.driver.post(0, 512)
    scene.memory.write(scene.address, bytes(12) + FRAME)
    queue.ring.desc.set(FIRST, scene.address, 12 + len(FRAME), 0)
    for _ in range(SIZE):
        queue.ring.offer(FIRST)
    queue.ring.publish()
    queue.kick()
    came = 0
    while came < SIZE:
        frames = [got.frame for got in scene.driver.receive()]
        assert set(frames) == {FRAME}
        came += len(frames)
    assert came == SIZE
    scene.lives(1)
    scene.driver.stop()
    assert queue.ring.used_idx == SIZE
    assert not queue.wait_error(0)


def test_a_buffer_smaller_than_a_header_costs_the_frame_alone(scene: Scene) -> None:
    """The frame is dropped and the buffer kept, as the kernel's device has it."""
    queue = scene.driver.rx[0]
    queue.ring.desc.set(FIRST, scene.address, 11, WRITE)
    tell(queue)
    scene.driver.send(FRAME)
    scene.driver.wait_sent(0)
    assert queue.ring.used_idx == 0
    queue.ring.desc.set(FIRST, scene.address, 4096, WRITE)
    scene.driver.send(FRAME)
    assert queue.wait_call(PATIENCE)
    assert queue.ring.used_element(0) == (FIRST, 12 + len(FRAME))


def test_a_chain_of_more_than_4_gib_is_a_frame_too_large(scene: Scene) -> None:
    queue = scene.driver.tx[0]
    scene.driver.post(0, 8)
    chain(*((MIB, 8 * MIB, NEXT, at) for at in range(1, 600)), (MIB, 8 * MIB, 0, 0))(queue.ring, 0, 0)
    tell(queue)
    scene.memory.write(scene.address, bytes(12) + FRAME)
    queue.ring.desc.set(FIRST + 1000, scene.address, 12 + len(FRAME), 0)
    tell(queue, FIRST + 1000)
    assert [got.frame for got in scene.driver.receive()] == [FRAME]
    scene.driver.stop()
    assert queue.ring.used_idx == 2
    assert not queue.wait_error(0)


def test_descriptors_that_change_while_they_are_read(scene: Scene) -> None:
    """A guest that writes wild values into a chain all the time: served or refused, the back end lives."""
    queue = scene.driver.tx[0]
    scene.driver.post(0, 64)
    scene.memory.write(scene.address, bytes(12) + FRAME)
    ring = queue.ring
    wild = [
        (END, 0xFFFFFFFF, NEXT, 0xFFFF),
        (0, 0, INDIRECT, 0),
        (1 << 63, 1, WRITE, FIRST),
        (MIB, 32, INDIRECT, 0),
    ]
    for turn in range(300):
        ring.desc.set(FIRST, scene.address, 12 + len(FRAME), 0)
        tell(queue)
        addr, length, flags, following = wild[turn % len(wild)]
        ring.desc.set(FIRST, addr, length, flags, following)
        if turn % 50 == 49:
            scene.lives_beside(1)
    ring.desc.set(FIRST, scene.address, 12 + len(FRAME), 0)
    queue.kick()
    scene.frontend.sync()
    scene.driver.stop()
    scene.driver.resume(bases=None)


def test_a_guest_at_fault_leaves_no_mark_on_the_next(back_end: BackEnd, tmp_path: Path) -> None:
    for lie in list(LIES.values())[:5]:
        scene = Scene(back_end)
        lie(scene.driver.tx[0].ring, scene.address, 0)
        tell(scene.driver.tx[0])
        assert scene.driver.tx[0].wait_error(PATIENCE)
        scene.close()
        scene = Scene(back_end)
        scene.driver.post(0, 8)
        scene.lives(0)
        scene.close()
