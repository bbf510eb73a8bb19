"""Vrings whose chains a Python function handles: what it is given, what becomes of its answer, and of its errors."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator

import pytest

from handled_device import Handled
from in_process import PATIENCE, SPANS, FrontEnd, served
from pyvhost.abi import virtio
from pyvhost.dataplane import blocks
from pyvhost.driver.memory import GuestMemory
from pyvhost.driver.queue import Queue
from pyvhost.driver.split_ring import SplitRing, Used
from pyvhost.vhost.chains import Chain

EVENT_IDX = 1 << virtio.RING_F_EVENT_IDX


class Scene:
    """A driver's ring and a device that keeps what it was given and answers it reversed."""

    def __init__(self, front: FrontEnd, memory: GuestMemory, event_idx: bool, size: int = 256) -> None:
        self.front = front
        self.memory = memory
        self.queue = Queue(SplitRing(memory, size, event_idx=event_idx))
        front.negotiate(EVENT_IDX if event_idx else 0)
        front.set_mem_table(memory.regions)
        front.start_ring(0, self.queue)
        # What `begin` asked for: a first look.
        self.turn()

    def turn(self) -> None:
        """One round of the control loop."""
        assert self.front.device.poller is not None
        self.front.device.poller.run_once(PATIENCE)

    def put(self, data: bytes) -> int:
        address = self.memory.allocate(max(len(data), 1))
        self.memory.write(address, data)
        return address

    def ask(self, data: bytes, room: int = 64, *, indirect: bool = False) -> tuple[int, int]:
        """Offers a chain of a question and room for the answer; its head and where the answer will be."""
        answer = self.put(bytes(room))
        head = self.queue.ring.add([(self.put(data), len(data))], [(answer, room)], indirect=indirect)
        return head, answer

    def answer(self) -> Used:
        self.queue.publish()
        while (used := self.queue.ring.pop_used()) is None:
            self.turn()
        return used


seen: list[bytes] = []


def reverse(chain: Chain) -> int:
    question = chain.read()
    seen.append(question)
    return chain.write(question[::-1])


@pytest.fixture(params=[False, True], ids=["flags", "event index"])
def scene(request: pytest.FixtureRequest) -> Iterator[Scene]:
    seen.clear()
    with served(Handled(reverse)) as front, GuestMemory(SPANS) as memory:
        scene = Scene(front, memory, request.param)
        yield scene
        scene.queue.close()


@pytest.mark.parametrize("indirect", [False, True], ids=["direct", "indirect"])
def test_a_chain_is_read_and_answered(scene: Scene, indirect: bool) -> None:
    for number in range(300):
        question = b"question %d" % number
        head, answer = scene.ask(question, indirect=indirect)
        assert scene.answer()[:2] == (head, len(question))
        assert scene.memory.read(answer, len(question)) == question[::-1]
    device = scene.front.device
    assert isinstance(device, Handled)
    assert device.row[blocks.C_PACKETS // 8] == 300


def test_a_chain_in_many_pieces_and_across_regions(scene: Scene) -> None:
    question = bytes(range(200))
    parts = [(scene.put(question[at : at + 13]), len(question[at : at + 13])) for at in range(0, 150, 13)]
    border = scene.memory.allocate_across(44)
    scene.memory.write(border, question[156:])
    room = [scene.memory.allocate_across(64, 0) if i == 9 else scene.put(bytes(7)) for i in range(9)]
    head = scene.queue.ring.add([*parts, (border, 44)], [(address, 7) for address in room])
    assert scene.answer()[:2] == (head, 63)
    assert seen == [question]
    assert b"".join(scene.memory.read(address, 7) for address in room) == question[::-1][:63]


def test_what_does_not_fit_is_cut(scene: Scene) -> None:
    head, answer = scene.ask(b"abcdef", room=4)
    assert scene.answer()[:2] == (head, 4)
    assert scene.memory.read(answer, 4) == b"fedc"


def test_a_chain_of_one_direction_alone(scene: Scene) -> None:
    head = scene.queue.ring.add([(scene.put(b"news"), 4)])
    assert scene.answer()[:2] == (head, 0)
    head = scene.queue.ring.add([], [(scene.put(bytes(8)), 8)])
    assert scene.answer()[:2] == (head, 0)
    assert seen == [b"news", b""]


def test_read_stops_at_its_limit() -> None:
    chain = Chain(0, [memoryview(b"abc"), memoryview(b"def"), memoryview(b"ghi")], [])
    assert chain.read(0) == b""
    assert chain.read(4) == b"abcd"
    assert chain.read(6) == b"abcdef"
    assert chain.read() == b"abcdefghi"


def test_write_fills_what_there_is() -> None:
    rooms = [bytearray(2), bytearray(3)]
    chain = Chain(0, [], [memoryview(room) for room in rooms])
    assert chain.write(b"abcdefgh") == 5
    assert rooms == [b"ab", b"cde"]
    assert chain.write(b"x") == 1
    assert rooms == [b"xb", b"cde"]
    assert chain.write(b"") == 0
    assert Chain(0, [], []).write(b"x") == 0


def test_a_handler_that_raises_costs_its_chain_alone(caplog: pytest.LogCaptureFixture) -> None:
    def picky(chain: Chain) -> int:
        if chain.read() == b"bad":
            raise ValueError("I will not have this")
        return chain.write(b"fine")

    with served(Handled(picky)) as front, GuestMemory(SPANS) as memory:
        scene = Scene(front, memory, False)
        with scene.queue:
            for question, length in ((b"good", 4), (b"bad", 0), (b"good", 4)):
                head, _ = scene.ask(question)
                assert scene.answer()[:2] == (head, length)
    (told,) = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert told.getMessage().startswith("dev: queue: chain ")


def test_a_full_ring_leaves_the_control_thread_time_for_others(scene: Scene) -> None:
    """A guest that never stops: by the time that all is done, others have had many turns."""
    poller = scene.front.device.poller
    assert poller is not None
    for _ in range(128):
        scene.ask(b"x")
    others: list[int] = []

    def other() -> None:
        others.append(len(seen))
        if len(seen) < 128:
            poller.call_soon_threadsafe(other)

    poller.call_soon_threadsafe(other)
    scene.queue.publish()
    while len(seen) < 128:
        scene.turn()
    assert any(0 < count < 128 for count in others)


def test_kicks_are_asked_for_when_there_is_no_more(scene: Scene) -> None:
    for _ in range(3):
        scene.ask(b"x")
        scene.answer()
    assert scene.queue.kicks == 3
    assert scene.queue.ring.used_flags == 0


def test_a_fault_stops_the_ring_until_its_next_kick(scene: Scene, caplog: pytest.LogCaptureFixture) -> None:
    ring = scene.queue.ring
    head, answer = scene.ask(b"question")
    honest, slot = ring.desc[head], ring.avail_idx
    ring.desc.set(head, 1 << 40, honest.len, honest.flags, honest.next)
    for _ in range(2):
        scene.queue.publish()
        scene.queue.kick()
        while not scene.queue.take_errors():
            scene.turn()
        assert ring.used_idx == slot
    assert seen == []
    (told,) = [record.message for record in caplog.records]
    assert told.startswith("dev: queue: stopped: descriptor ")
    ring.desc.set(head, *honest)
    scene.queue.kick()
    assert scene.answer()[:2] == (head, 8)
    assert scene.memory.read(answer, 8) == b"noitseuq"


def test_a_ring_that_stopped_is_not_served(scene: Scene) -> None:
    scene.ask(b"late")
    scene.queue.publish()
    scene.queue.kick()
    base = scene.front.stop_ring(0)
    poller = scene.front.device.poller
    assert poller is not None
    poller.run_once(0)
    assert seen == []
    scene.front.start_ring(0, scene.queue, base)
    scene.answer()
    assert seen == [b"late"]


def test_the_kick_is_replaced_while_it_runs(scene: Scene) -> None:
    old = scene.front.device.vrings[0].kick
    scene.front.device.set_vring_kick(0, os.dup(scene.queue.kick_fd))
    poller = scene.front.device.poller
    assert poller is not None
    assert not poller.registered(old)
    scene.turn()
    head, _ = scene.ask(b"abc")
    assert scene.answer()[:2] == (head, 3)
    new = scene.front.device.vrings[0].kick
    scene.front.device.reset()
    assert not poller.registered(new)
