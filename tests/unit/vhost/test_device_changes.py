"""Features, memory, log and translation that change under running rings: what is refused changes nothing."""

from __future__ import annotations

import errno
import os
import select
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from handled_device import Handled
from in_process import PATIENCE, SPANS, FrontEnd, echo, handed_over, open_fds, refused, served, traffic
from pyvhost.abi import vhost, virtio
from pyvhost.driver.dirty_log import DirtyLog as DriversLog
from pyvhost.driver.iommu import Iommu
from pyvhost.driver.memory import MIB, GuestMemory, Span
from pyvhost.driver.net import NetDriver
from pyvhost.driver.queue import Queue
from pyvhost.driver.ring_parts import RingLayout
from pyvhost.driver.split_ring import SplitRing
from pyvhost.host import memfd
from pyvhost.memory.dirty_log import DirtyLog
from pyvhost.net.device import NetDevice
from pyvhost.vhost.chains import Chain
from pyvhost.vhost.misses import WAITING, IotlbMiss, Misses

RX, TX = 0, 1
EVENT_IDX = 1 << virtio.RING_F_EVENT_IDX
PLATFORM = 1 << virtio.F_ACCESS_PLATFORM
LOG_ALL = 1 << vhost.F_LOG_ALL


def file_log(size: int) -> DirtyLog:
    return DirtyLog.mapped(memfd.create("log", size), 0, size)


# Features


def test_a_translation_that_rings_need_is_not_given_up(front: FrontEnd, memory: GuestMemory) -> None:
    iommu = Iommu(memory)
    with NetDriver(front, memory, timeout=PATIENCE, iommu=iommu) as driver:
        driver.start()
        echo(driver)
        for _ in range(2):
            with refused(errno.EFAULT, "vring 0: descriptor table"):
                front.device.set_features(driver.features & ~PLATFORM)
            assert front.device.acked_features == driver.features
            assert front.device.has_iotlb
        missed = iommu.missed
        echo(driver)
        driver.wait_sent()
        # Nothing was forgotten, so that only new buffers are asked for, never a ring.
        rings = {part for queue in driver.queues.values() for part in queue.ring.addresses}
        assert not rings & {miss.iova for miss in list(iommu.misses)[missed:]}


def test_an_event_index_that_lies_outside_memory_is_refused(front: FrontEnd) -> None:
    """Without the event index a ring is two bytes shorter, and these two are not there."""
    with GuestMemory([Span(0, 4 * MIB), Span(16 * MIB, MIB)]) as memory:
        end = memory.regions[1].end
        size = 64

        def layout(index: int) -> RingLayout:
            desc, avail, used = RingLayout.sizes(size)
            return RingLayout(
                memory.allocate(desc, 16, 0), memory.allocate(avail, 2, 0), memory.allocate(used, 4, 0)
            )

        with NetDriver(front, memory, ring_size=size, features=0, timeout=PATIENCE, layout=layout) as driver:
            driver.start(post=False)
            at = driver.queues[TX].ring.addresses
            ring = memory.user_address(end - 1) + 1 - (4 + 8 * size)
            front.device.set_vring_addr(TX, 0, at.desc, ring, at.avail, 0)
            with refused(errno.EFAULT, "vring 1: used ring"):
                front.device.set_features(EVENT_IDX)
            assert front.device.acked_features == 0
            # A table in which it has as much as it needs now is a good one.
            front.set_mem_table(memory.regions)


def test_the_byte_order_is_settled_before_a_ring_runs(front: FrontEnd, driver: NetDriver) -> None:
    with refused(errno.EBUSY, "vring 1: endian"):
        front.device.set_vring_endian(TX, vhost.VRING_BIG_ENDIAN)
    with refused(errno.EBUSY, "vring 1: endian"):
        front.device.set_vring_endian(TX, 7)
    front.stop_ring(TX)
    for bad in (2, -1, 1 << 31):
        with refused(errno.EINVAL, "neither 0 nor 1"):
            front.device.set_vring_endian(TX, bad)
    assert front.device.get_vring_endian(TX) == vhost.VRING_LITTLE_ENDIAN
    front.device.set_vring_endian(TX, vhost.VRING_BIG_ENDIAN)
    assert front.device.get_vring_endian(TX) == vhost.VRING_BIG_ENDIAN
    with refused(errno.ENOBUFS, "no vring 9"):
        front.device.get_vring_endian(9)


# Memory


def test_no_memory_at_all_is_refused_and_what_there_was_stays(front: FrontEnd, driver: NetDriver) -> None:
    with refused(errno.EFAULT, "vring 0"):
        front.device.set_mem_table([])
    driver.wait_sent()
    bases = driver.stop()
    # The table of before is the device's still, whoever asks.
    for index, queue in driver.queues.items():
        front.start_ring(index, queue, bases[index])
    echo(driver)


def test_memory_is_replaced_behind_an_iotlb(front: FrontEnd, memory: GuestMemory) -> None:
    iommu = Iommu(memory)
    with NetDriver(front, memory, timeout=PATIENCE, iommu=iommu) as driver:
        driver.start()
        echo(driver)
        for _ in range(20):
            missed = iommu.missed
            front.set_mem_table(memory.regions)
            assert front.device.take_iotlb_miss() is None
            assert iommu.missed == missed
            echo(driver)
        # Without any, the rings wait for it, and the table is no mistake of the front end's.
        front.device.set_mem_table([])
        front.set_mem_table(memory.regions)
        echo(driver)


# The log


def test_a_log_that_is_too_short_is_refused_whoever_comes_first(
    front: FrontEnd, driver: NetDriver, memory: GuestMemory
) -> None:
    fds = open_fds()
    front.device.set_log_base(file_log(8))
    with refused(errno.EFAULT, "no bit for"):
        front.device.set_features(driver.features | LOG_ALL)
    assert front.device.acked_features == driver.features
    enough = max(region.end for region in memory.regions) // (8 * 4096)
    front.device.set_log_base(file_log(enough))
    front.device.set_features(driver.features | LOG_ALL)
    with refused(errno.EFAULT, "no bit for"):
        front.device.set_log_base(file_log(enough - 1))
    region = memory.regions[0]
    more = handed_over(region, guest_phys_addr=1 << 30, userspace_addr=1 << 60)
    with refused(errno.EFAULT, "no bit for 0x40"):
        front.device.add_mem_region(more)
    echo(driver)
    front.device.set_features(driver.features)
    front.device.add_mem_region(handed_over(region, guest_phys_addr=1 << 30, userspace_addr=1 << 60))
    assert open_fds() == fds


def test_logging_is_switched_on_and_off_under_traffic(
    front: FrontEnd, driver: NetDriver, memory: GuestMemory
) -> None:
    event = os.eventfd(0, os.EFD_NONBLOCK)
    with DriversLog.covering(memory) as log, traffic(driver) as seen:
        front.device.set_log_fd(os.dup(event))
        for _ in range(15):
            driver.start_log(log)
            seen()
            # The frame is there before it is logged, and that before anybody is told.
            assert select.select([event], [], [], PATIENCE)[0]
            os.eventfd_read(event)
            driver.stop_log()
            log.take()
            seen()
            assert log.pages() == set()
        front.device.set_log_fd(-1)
        driver.start_log(log)
        seen()
        front.device.set_log_base(None)
        log.take()
        seen()
        assert log.pages() == set()
    os.close(event)


def test_what_is_no_eventfd_is_told_of_no_log(front: FrontEnd) -> None:
    fds = open_fds()
    with refused(errno.EINVAL, "dev: log"):
        front.device.set_log_fd(memfd.create("x", 1))
    with refused(errno.EBADF, "dev: log"):
        front.device.set_log_fd(99999)
    assert open_fds() == fds


# Polling


def test_a_port_is_polled_for_as_long_as_its_most_patient_ring(front: FrontEnd, driver: NetDriver) -> None:
    assert isinstance(front.device, NetDevice)
    (pair,) = front.device.pairs

    def polled() -> int:
        return int(pair.worker.ports[pair.port]["busy_ns"])

    assert polled() == 0
    front.device.set_vring_busyloop_timeout(RX, 50)
    front.device.set_vring_busyloop_timeout(TX, 20)
    assert polled() == 50 * 1024
    assert front.device.get_vring_busyloop_timeout(TX) == 20
    front.device.set_vring_busyloop_timeout(TX, 70)
    assert polled() == 70 * 1024
    echo(driver)
    front.stop_ring(TX)
    assert polled() == 50 * 1024
    front.device.set_vring_busyloop_timeout(RX, 0xFFFFFFFF)
    assert polled() == 0xFFFFFFFF * 1024
    front.device.set_vring_busyloop_timeout(RX, 0)
    assert polled() == 0


# Misses


@contextmanager
def some_misses() -> Iterator[Misses]:
    misses = Misses()
    try:
        yield misses
    finally:
        misses.close()
        misses.close()


def readable(fd: int) -> bool:
    try:
        os.eventfd_write(fd, os.eventfd_read(fd))
    except BlockingIOError:
        return False
    return True


def test_misses_are_taken_in_order_and_answered_once() -> None:
    with some_misses() as misses:
        assert misses.take() is None
        assert not readable(misses.fd)
        told = [IotlbMiss(1, 0x1000, 1), IotlbMiss(0, 0x2000, 2), IotlbMiss(0, 0x1800, 1)]
        for miss in told:
            misses.add(miss)
        # Not told yet: an entry for it restarts nobody.
        assert misses.answered(0, 1 << 64) == []
        assert [misses.take() for _ in told] == told
        assert not readable(misses.fd)
        assert misses.answered(0x1801, 0x7FF) == []
        assert misses.answered(0x1000, 0x801) == [0, 1]
        assert misses.answered(0x1000, 0x801) == []
        assert misses.answered(0x2000, 1) == [0]


def test_a_guest_that_misses_for_ever_costs_no_more_than_so_many() -> None:
    with some_misses() as misses:
        for iova in range(3 * WAITING):
            misses.add(IotlbMiss(0, iova, 1))
            if iova % 3 == 0:
                misses.take()
        taken = 0
        while misses.take() is not None:
            taken += 1
        assert taken <= WAITING
        assert not readable(misses.fd)
        assert len(misses._taken) <= WAITING


def test_a_ring_that_misses_for_ever_costs_others_nothing() -> None:
    """One that waits for a single entry goes on when it comes, whatever a guest does with another ring."""
    with some_misses() as misses:
        for index in (1, 2):
            misses.add(IotlbMiss(index, 0x1000 * index, 1))
            misses.take()
        for iova in range(2 * WAITING):
            misses.add(IotlbMiss(0, iova << 20, 1))
            misses.take()
        assert len(misses._taken) == WAITING
        assert misses.answered(0x1000, 0x2000) == [1, 2]
        assert misses.answered(0, 1 << 20) == []
        assert misses.answered((2 * WAITING - 1) << 20, 1) == [0]


def test_a_ring_that_stops_takes_its_misses_along() -> None:
    with some_misses() as misses:
        for index in (0, 1, 0):
            misses.add(IotlbMiss(index, 0x1000 * index, 1))
        misses.take()
        misses.forget(0)
        assert readable(misses.fd)
        assert misses.answered(0, 1) == []
        assert misses.take() == IotlbMiss(1, 0x1000, 1)
        assert not readable(misses.fd)
        misses.forget()
        assert misses.answered(0x1000, 1) == []


# Rings that Python handles


def answer(chain: Chain) -> int:
    return chain.write(chain.read() * 1000)


@pytest.mark.parametrize("translated", [False, True], ids=["plain", "behind an IOMMU"])
def test_python_logs_what_it_writes(translated: bool) -> None:
    with (
        served(Handled(answer)) as front,
        GuestMemory(SPANS) as memory,
        DriversLog.covering(memory) as log,
    ):
        iommu = Iommu(memory) if translated else None
        front.negotiate(LOG_ALL | (PLATFORM if translated else 0))
        front.set_mem_table(memory.regions)
        used = memory.allocate(4096, 4096, 2)
        layout = RingLayout(memory.allocate(1024, 4096, 0), memory.allocate(1024, 4096, 0), used)
        with Queue(SplitRing(memory, 16, layout, dma=iommu)) as queue:
            if iommu is not None:
                iommu.frontend = front
            front.set_log(log)
            front.start_ring(0, queue)
            front.set_ring_addr(0, queue, log=True)
            question = memory.allocate(4096, 4096, 1)
            room = memory.allocate(5 * 4096, 4096, 1) + 4000
            memory.write(question, b"abcd")
            head = queue.ring.add([(question, 4)], [(room, 50), (room + 50, 4 * 4096)])
            queue.publish()
            queue.kick()
            while (done := queue.ring.pop_used()) is None:
                assert front.device.poller is not None
                if iommu is not None:
                    iommu.service()
                front.device.poller.run_once(PATIENCE)
            assert done[:2] == (head, 4000)
            assert memory.read(room, 4000) == b"abcd" * 1000
            front.stop_ring(0)
            # 4000 bytes from 4000 on: two pages of five, and the used ring's.
            assert log.pages() == {room // 4096, room // 4096 + 1, used // 4096}


def test_a_device_may_be_closed_twice() -> None:
    device = NetDevice("null")
    device.close()
    device.close()
