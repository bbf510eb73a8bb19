"""A request queue by itself: chains from the compiled loop to Python and back, and those that nobody waits for."""

from __future__ import annotations

import select
import struct
import threading
import time
from collections.abc import Callable, Iterator

import numpy as np
import pytest

from in_process import PATIENCE, SPANS, FrontEnd, served
from pyvhost.dataplane import blocks
from pyvhost.driver.memory import GuestMemory
from pyvhost.driver.queue import Queue
from pyvhost.driver.split_ring import SplitRing
from pyvhost.scsi.plane import Counted, DiskWorker, Plane
from pyvhost.scsi.queue import RequestQueue
from pyvhost.scsi.requests import HEADER_BYTES, RESPONSE_BYTES
from pyvhost.scsi.units import UnitTable
from pyvhost.vhost.chains import Chain
from pyvhost.vhost.device import TRANSPORT_FEATURES, Device
from pyvhost.vhost.vring import Place


def row() -> np.ndarray:
    return np.zeros(len(blocks.COUNTERS), np.int64)


class OneQueue(Device):
    """A device of one vring, which keeps what it is handed. There are no units: nothing is the loop's own."""

    kind = "test"
    virtio_id = 0
    features = TRANSPORT_FEATURES

    def __init__(self) -> None:
        super().__init__("dev", 1)
        Plane.prepare()
        # Kernels know these by their addresses.
        self.rows = row(), row()
        self.worker = DiskWorker("test-disks", self.rows[0])
        self.units = UnitTable()
        self.got: list[tuple[Chain, int]] = []
        self.ended: list[Chain] = []
        self._queue: RequestQueue | None = None

    @property
    def queue(self) -> RequestQueue:
        if self._queue is None:
            assert self.poller is not None
            self._queue = RequestQueue(
                self.worker, "dev: vring 0", self.rows[1], self.poller, self._handle, self, self.units
            )
        return self._queue

    def _handle(self, queue: RequestQueue, chain: Chain, since: int) -> None:
        assert queue is self._queue
        self.got.append((chain, since))

    def place_of(self, index: int) -> Place:
        return self.queue

    def loop_ended(self, serial: int) -> None:
        raise AssertionError("the loop has begun nothing")

    def loop_drained(self) -> None:
        raise AssertionError("the loop has begun nothing")

    def chain_ended(self, chain: Chain) -> None:
        self.ended.append(chain)

    def queue_waits(self, queue: RequestQueue, iova: int, perm: int) -> None:
        raise AssertionError("there is no IOTLB")

    def close(self) -> None:
        super().close()
        self.worker.close()


class Scene:
    def __init__(self, front: FrontEnd, device: OneQueue, memory: GuestMemory) -> None:
        self.device = device
        self.memory = memory
        self.driver = Queue(SplitRing(memory, 256))
        front.negotiate(0)
        front.set_mem_table(memory.regions)
        front.start_ring(0, self.driver)

    def submit(self, header: bytes = bytes(HEADER_BYTES)) -> int:
        """Makes a request available; its head."""
        at, answer = self.memory.allocate(len(header)), self.memory.allocate(RESPONSE_BYTES)
        self.memory.write(at, header)
        head = self.driver.ring.add([(at, len(header))], [(answer, RESPONSE_BYTES)])
        self.driver.publish()
        return head

    def until(self, happened: Callable[[], bool]) -> None:
        """Runs the control loop."""
        poller = self.device.poller
        assert poller is not None
        late: list[bool] = []
        timer = poller.call_later(PATIENCE, lambda: late.append(True))
        while not happened():
            # What the loop does by itself wakes nobody here.
            poller.run_once(0.01)
            assert not late
        timer.cancel()

    def handed_over(self, count: int = 1) -> list[Chain]:
        self.until(lambda: len(self.device.got) >= count)
        return [chain for chain, _ in self.device.got]

    def used(self) -> list[tuple[int, int]]:
        """What the driver finds used now: head and bytes written."""
        return [(used[0], used[1]) for used in iter(self.driver.ring.pop_used, None)]


@pytest.fixture
def scene() -> Iterator[Scene]:
    device = OneQueue()
    with served(device) as front, GuestMemory(SPANS) as memory:
        scene = Scene(front, device, memory)
        yield scene
        scene.driver.close()


def test_a_chain_goes_to_python_and_back(scene: Scene) -> None:
    header = bytes(range(HEADER_BYTES))
    before = time.monotonic_ns()
    head = scene.submit(header)
    (chain,) = scene.handed_over()
    assert chain.read() == header
    assert before <= scene.device.got[0][1] <= time.monotonic_ns(), "since when it is there"
    queue = scene.device.queue
    assert queue.in_flight == 1
    assert queue.alive(chain)
    assert queue.pending == [chain]
    assert scene.used() == []
    queue.finish(chain, chain.write(bytes(RESPONSE_BYTES)))
    scene.driver.wait_used(PATIENCE)
    assert scene.used() == [(head, RESPONSE_BYTES)]
    assert scene.device.ended == [chain]
    assert not queue.alive(chain)


def test_a_chain_is_finished_once(scene: Scene, caplog: pytest.LogCaptureFixture) -> None:
    scene.submit()
    (chain,) = scene.handed_over()
    scene.device.queue.finish(chain, 1)
    scene.device.queue.finish(chain, 2)
    assert "was finished before" in caplog.text
    other = scene.submit()
    scene.device.queue.finish(scene.handed_over(2)[1], 3)
    scene.driver.wait_used(PATIENCE, 2)
    assert scene.used() == [(chain.head, 1), (other, 3)]
    assert scene.device.ended[0] is chain
    assert len(scene.device.ended) == 2


def test_chains_finished_by_many_threads(scene: Scene) -> None:
    heads = {scene.submit() for _ in range(64)}
    chains = scene.handed_over(64)

    def finish(part: list[Chain]) -> None:
        for chain in part:
            scene.device.queue.disk_worker.finish(scene.device.queue.ring, chain.head, chain.head % 108)

    threads = [threading.Thread(target=finish, args=(chains[at::4],)) for at in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
    scene.driver.wait_used(PATIENCE, 64)
    assert sorted(scene.used()) == sorted((head, head % 108) for head in heads)
    assert scene.device.queue.in_flight == 0


def test_what_a_command_counts_as_is_counted_by_the_loop(scene: Scene) -> None:
    counters = row()
    at = int(counters.ctypes.data)
    for said in (
        Counted(at, False, blocks.C_READS, 512, 3_000),
        Counted(at, False, blocks.C_WRITES, 1024, 5_000),
        Counted(at, False, blocks.C_OTHERS, 0, 900),
        Counted(at, True, blocks.C_WRITES, 4096, 7_000),
        Counted(0, False, blocks.C_WRITES, 4096, 7_000),
        None,
    ):
        scene.submit()
        scene.device.queue.finish(scene.handed_over(len(scene.device.ended) + 1)[-1], 0, said)
    scene.driver.wait_used(PATIENCE, 6)
    found = {name: int(value) for name, value in zip(blocks.COUNTERS, counters, strict=True) if value}
    assert found == {
        "reads": 1,
        "read_bytes": 512,
        "writes": 1,
        "written_bytes": 1024,
        "others": 1,
        "errors": 1,
        "latency_ns": 8_900,
        "latency_0": 1,
        "latency_2": 1,
        "latency_3": 1,
    }


def test_nothing_is_taken_while_it_is_held_back(scene: Scene) -> None:
    queue = scene.device.queue
    queue.hold_back(True)
    scene.submit()
    queue.sweep()
    assert queue.in_flight == 0
    assert scene.device.got == []
    queue.hold_back(False)
    (chain,) = scene.handed_over()
    queue.hold_back(True)
    scene.submit()
    # Python hears when the last one has ended.
    queue.finish(chain, 0)
    scene.until(lambda: queue.in_flight == 0)
    assert len(scene.device.got) == 1
    queue.hold_back(False)
    queue.finish(scene.handed_over(2)[1], 0)
    scene.driver.wait_used(PATIENCE, 2)


def test_a_sweep_hands_over_all_that_is_available(scene: Scene) -> None:
    """Without waiting for the control loop's turn: a task management function is behind all of them."""
    heads = [scene.submit() for _ in range(100)]
    queue = scene.device.queue
    queue.sweep()
    assert [chain.head for chain, _ in scene.device.got] == heads
    for chain, _ in scene.device.got:
        queue.finish(chain, 0)
    scene.driver.wait_used(PATIENCE, 100)


def test_what_nobody_waits_for_leaves_no_trace(scene: Scene) -> None:
    queue = scene.device.queue
    scene.submit()
    (chain,) = scene.handed_over()
    queue.orphan()
    assert queue.dead
    assert not queue.alive(chain)
    assert queue.pending == [chain], "its memory is used all the same"
    queue.finish(chain, 5)
    scene.until(lambda: queue.in_flight == 0)
    assert scene.used() == []
    assert scene.device.ended == [chain]


def test_it_leaves_when_its_last_chain_has_ended(scene: Scene) -> None:
    queue, left = scene.device.queue, list[bool]()
    scene.submit()
    (chain,) = scene.handed_over()
    queue.leave(lambda: left.append(True))
    assert left == []
    queue.finish(chain, 0)
    scene.until(lambda: left == [True])
    assert scene.used() == []


def test_a_chain_that_its_driver_breaks_meanwhile(scene: Scene, caplog: pytest.LogCaptureFixture) -> None:
    """The loop has found it whole; when Python walks it, its first descriptor leads nowhere."""
    queue = scene.device.queue
    head = scene.submit()
    # The loop has taken it when it says so; Python has not had its turn yet.
    assert select.select([queue.disk_worker.python_fd], [], [], PATIENCE)[0]
    scene.memory.write(scene.driver.ring.layout.desc + 16 * head, struct.pack("<Q", 1 << 60))
    scene.until(lambda: queue.in_flight == 0)
    assert scene.device.got == []
    assert "dev: vring 0" in caplog.text
    assert scene.used() == [(head, 0)], "it is used, with nothing in it"
    scene.submit()
    queue.finish(scene.handed_over()[0], 0)
    scene.driver.wait_used(PATIENCE)
