"""What a net driver changes while it runs: logging, where rings lie; and an IOMMU before its device.

The device is a stub that translates every address itself, from what the IOMMU told it.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import pytest

from pyvhost.abi import virtio
from pyvhost.abi.vhost import ACCESS_RO, ACCESS_WO
from pyvhost.driver.dirty_log import DirtyLog
from pyvhost.driver.errors import DriverError
from pyvhost.driver.iommu import Iommu, Miss
from pyvhost.driver.memory import GuestMemory, Region
from pyvhost.driver.net import NetDriver
from pyvhost.driver.queue import Queue
from pyvhost.driver.ring_parts import RingLayout
from pyvhost.host import eventfd
from stub_device import StubDevice

VERSION_1 = 1 << virtio.F_VERSION_1
LOG_ALL = 1 << 26


class PlainFrontEnd:
    """Can start rings, and nothing else."""

    def __init__(self, features: int = (1 << 64) - 1) -> None:
        self.offered = features
        self.queues: dict[int, Queue] = {}

    def negotiate(self, features: int) -> int:
        return features & self.offered

    def set_mem_table(self, regions: Sequence[Region]) -> None: ...

    def get_queue_num(self) -> int:
        return 1

    def start_ring(self, index: int, queue: Queue, base: int | None = None) -> None:
        self.queues[index] = queue

    def stop_ring(self, index: int) -> int:
        del self.queues[index]
        return 0

    def get_config(self, offset: int, size: int) -> bytes:
        return bytes(size)

    def set_status(self, status: int) -> None: ...

    def fileno(self) -> int:
        return -1


class FullFrontEnd(PlainFrontEnd):
    """Keeps what it is told, in order; the device behind it misses what it was not told."""

    def __init__(self, features: int = (1 << 64) - 1) -> None:
        super().__init__(features)
        self.said: list[tuple[object, ...]] = []
        self.told: dict[int, tuple[int, int, int]] = {}
        self.missed: deque[Miss] = deque()
        self.miss_fd = eventfd.create()
        self.answered = threading.Event()

    def change_features(self, features: int) -> None:
        self.said.append(("features", features))

    def set_ring_addr(self, index: int, queue: Queue, *, log: bool = False) -> None:
        self.said.append(("addr", index, queue.ring.addresses, log))

    def set_log(self, log: DirtyLog) -> None:
        self.said.append(("log", log))

    def set_log_fd(self, fd: int) -> None:
        self.said.append(("log fd", fd))

    def iotlb_fileno(self) -> int:
        return self.miss_fd

    def take_miss(self) -> Miss | None:
        eventfd.drain(self.miss_fd)
        return self.missed.popleft() if self.missed else None

    def iotlb_update(self, iova: int, size: int, uaddr: int, perm: int) -> None:
        self.told[iova] = (size, uaddr, perm)
        self.answered.set()

    def iotlb_invalidate(self, iova: int, size: int) -> None:
        for start in [
            start for start in self.told if start < iova + size and iova < start + self.told[start][0]
        ]:
            del self.told[start]

    def close(self) -> None:
        os.close(self.miss_fd)


@pytest.fixture
def memory() -> Iterator[GuestMemory]:
    with GuestMemory(16 << 20) as memory:
        yield memory


@pytest.fixture
def front() -> Iterator[FullFrontEnd]:
    front = FullFrontEnd(VERSION_1 | 1 << virtio.F_ACCESS_PLATFORM)
    yield front
    front.close()


def test_logging_is_switched_on_and_off_in_the_order_of_a_migration(
    memory: GuestMemory, front: FullFrontEnd
) -> None:
    with NetDriver(front, memory, ring_size=4) as driver, DirtyLog.covering(memory) as log:
        driver.start()
        where = [driver.queues[index].ring.addresses for index in range(2)]
        driver.start_log(log)
        assert front.said == [
            ("log", log),
            ("features", VERSION_1 | LOG_ALL),
            ("addr", 0, where[0], True),
            ("addr", 1, where[1], True),
        ]
        front.said.clear()
        driver.stop_log()
        assert front.said == [
            ("features", VERSION_1),
            ("addr", 0, where[0], False),
            ("addr", 1, where[1], False),
        ]


def test_buffers_alone_or_rings_alone_are_logged(memory: GuestMemory, front: FullFrontEnd) -> None:
    with NetDriver(front, memory, ring_size=4) as driver, DirtyLog.covering(memory) as log:
        driver.start()
        driver.start_log(log, rings=False)
        assert ("features", VERSION_1 | LOG_ALL) in front.said
        assert [said[3] for said in front.said if said[0] == "addr"] == [False, False]
        front.said.clear()
        driver.start_log(log, buffers=False)
        assert not [said for said in front.said if said[0] == "features"]
        assert [said[3] for said in front.said if said[0] == "addr"] == [True, True]


def test_a_ring_moves_and_the_device_is_told(memory: GuestMemory, front: FullFrontEnd) -> None:
    with NetDriver(front, memory, ring_size=4) as driver:
        driver.start()
        old = driver.queues[1].ring.layout
        there = RingLayout.allocate(memory, 4)
        assert driver.move_ring(1, there) == old
        assert front.said == [("addr", 1, driver.queues[1].ring.addresses, False)]
        assert driver.queues[1].ring.layout == there


def test_what_a_plain_front_end_can_not(memory: GuestMemory) -> None:
    with NetDriver(PlainFrontEnd(), memory, ring_size=4) as driver, DirtyLog(1) as log:
        driver.start()
        with pytest.raises(DriverError, match="PlainFrontEnd can't have its device log"):
            driver.start_log(log)
        with pytest.raises(DriverError, match="move its rings"):
            driver.move_ring(0, driver.queues[0].ring.layout)
    driver = NetDriver(PlainFrontEnd(), memory, iommu=Iommu(memory))
    with driver, pytest.raises(DriverError, match="no IOTLB"):
        driver.start()


def test_an_iommu_needs_a_device_that_knows_of_it(memory: GuestMemory) -> None:
    front = FullFrontEnd(VERSION_1)
    driver = NetDriver(front, memory, iommu=Iommu(memory))
    with driver, pytest.raises(DriverError, match="ACCESS_PLATFORM"):
        driver.start()
    front.close()


def test_every_buffer_is_mapped_while_the_device_has_it(memory: GuestMemory, front: FullFrontEnd) -> None:
    iommu = Iommu(memory)
    with NetDriver(front, memory, ring_size=4, rx_depth=2, iommu=iommu) as driver:
        driver.start()
        rx, tx = driver.queues[0].ring, driver.queues[1].ring
        used = [iommu.lookup(ring.addresses.used) for ring in (rx, tx)]
        assert sorted(front.told) == [row.start for row in used if row], "used rings, unasked"
        buffers = [rx.desc[head] for head in range(2)]
        for buffer in buffers:
            row = iommu.lookup(buffer.addr)
            assert row is not None
            assert row.perm == ACCESS_WO
        driver.send(b"frame")
        sent = tx.desc[0]
        row = iommu.lookup(sent.addr)
        assert row is not None
        assert row.perm == ACCESS_RO
        assert memory.read(row.guest + sent.addr - row.start, sent.len)[12:] == b"frame"
        tx.set_used_element(0, 0, 0)
        tx.used_idx = 1
        driver.wait_sent()
        assert iommu.lookup(sent.addr) is None
    assert iommu.frontend is None


def test_misses_are_answered_while_the_driver_waits(memory: GuestMemory, front: FullFrontEnd) -> None:
    """The device, in a thread, uses the chain only when it has been told where the buffer is."""
    iommu = Iommu(memory)
    with NetDriver(front, memory, ring_size=4, rx_depth=2, iommu=iommu) as driver:
        driver.start(post=False)
        driver.send(b"frame")
        queue = driver.queues[1]
        sent = queue.ring.desc[0]
        device = StubDevice(queue.ring)

        def run() -> None:
            front.answered.clear()
            front.missed.append(Miss(sent.addr, ACCESS_RO))
            eventfd.signal(front.miss_fd)
            assert front.answered.wait(10)
            device.use(0)
            eventfd.signal(queue.call_fd)

        with ThreadPoolExecutor() as threads:
            running = threads.submit(run)
            driver.wait_sent()
            running.result()
        assert list(iommu.misses) == [Miss(sent.addr, ACCESS_RO)]
        assert not [start for start, (size, *_) in front.told.items() if start <= sent.addr < start + size]
