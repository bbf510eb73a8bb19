"""The device model under a front end that changes its mind, on real rings with real traffic."""

from __future__ import annotations

import errno
import os

import pytest

from in_process import (
    PATIENCE,
    SPANS,
    FrontEnd,
    echo,
    frame_of,
    mapped_files,
    open_fds,
    refused,
    served,
    traffic,
)
from pyvhost.abi import virtio
from pyvhost.driver.memory import MIB, GuestMemory
from pyvhost.driver.net import NetDriver
from pyvhost.net.device import NetDevice

RX, TX = 0, 1
ON_EMPTY = 1 << virtio.F_NOTIFY_ON_EMPTY


def test_one_owner_until_it_is_reset(front: FrontEnd) -> None:
    front.device.set_owner()
    with refused(errno.EBUSY, "owner"):
        front.device.set_owner()
    front.device.reset_owner()
    front.device.set_owner()


def test_features_that_were_not_offered_change_nothing(front: FrontEnd) -> None:
    front.device.set_features(1 << virtio.RING_F_EVENT_IDX)
    with refused(errno.EOPNOTSUPP, "0x4000000000000000"):
        front.device.set_features(1 << 62)
    assert front.device.acked_features == 1 << virtio.RING_F_EVENT_IDX


def test_features_change_while_rings_run(front: FrontEnd, driver: NetDriver) -> None:
    with traffic(driver) as seen:
        for _ in range(20):
            front.device.set_features(driver.features | ON_EMPTY)
            seen()
            front.device.set_features(driver.features)


def test_a_header_grows_and_shrinks_with_what_is_negotiated(front: FrontEnd, memory: GuestMemory) -> None:
    legacy = 1 << virtio.F_ANY_LAYOUT
    with NetDriver(front, memory, features=legacy, timeout=PATIENCE) as driver:
        driver.start()
        echo(driver)
        assert driver.header_size == 10
        front.device.set_features(legacy | 1 << virtio.F_VERSION_1)
        driver.features |= 1 << virtio.F_VERSION_1
        driver.header_size = 12
        echo(driver)
        front.device.set_features(legacy)
        driver.features = legacy
        driver.header_size = 10
        echo(driver)


@pytest.mark.parametrize("num", [0, 3, 65536, 32769, -1, -4])
def test_a_size_that_can_not_be(front: FrontEnd, num: int) -> None:
    with refused(errno.EINVAL, "power of two"):
        front.device.set_vring_num(0, num)


@pytest.mark.parametrize("base", [65536, -1])
def test_a_base_that_can_not_be(front: FrontEnd, base: int) -> None:
    with refused(errno.EINVAL, "base"):
        front.device.set_vring_base(0, base)


@pytest.mark.parametrize("index", [3, 255, 1 << 31, -1])
def test_a_vring_that_is_not_there(front: FrontEnd, index: int) -> None:
    device = front.device
    for call in (
        lambda: device.set_vring_num(index, 8),
        lambda: device.set_vring_base(index, 0),
        lambda: device.get_vring_base(index),
        lambda: device.set_vring_addr(index, 0, 0, 0, 0, 0),
        lambda: device.set_vring_running(index, True),
        lambda: device.set_vring_running(index, False),
    ):
        with refused(errno.ENOBUFS, "only 3"):
            call()
    fds = open_fds()
    for take in (device.set_vring_kick, device.set_vring_call, device.set_vring_err):
        with refused(errno.ENOBUFS, "only 3"):
            take(index, os.eventfd(0))
    assert open_fds() == fds


def test_size_and_base_of_a_running_ring_are_fixed(front: FrontEnd, driver: NetDriver) -> None:
    with refused(errno.EBUSY, "while it runs"):
        front.device.set_vring_num(TX, 0)
    with refused(errno.EBUSY, "while it runs"):
        front.device.set_vring_base(TX, 1 << 20)
    echo(driver)


def test_addresses_of_a_stopped_ring_are_anything_that_is_aligned(front: FrontEnd) -> None:
    top = (1 << 64) - 16
    front.device.set_vring_addr(0, 1, top + 1, top, top, top + 15)
    for desc, used, avail, words in ((0, 0, 1, "avail"), (0, 2, 0, "used"), (0, 0, top + 1, "2-byte")):
        with refused(errno.EINVAL, words):
            front.device.set_vring_addr(0, 0, desc, used, avail, 0)
    for flags in (2, 3, 1 << 31):
        with refused(errno.EOPNOTSUPP, "flags"):
            # Before the addresses are looked at.
            front.device.set_vring_addr(0, flags, 0, 1, 1, 0)


def test_a_running_ring_keeps_its_place_when_the_new_one_is_no_memory(
    front: FrontEnd, driver: NetDriver
) -> None:
    for desc, used, avail in ((8, 0, 0), (0, 8, 0), (0, 0, 8), (0, 0, (1 << 64) - 2)):
        with refused(errno.EFAULT, "vring 1"):
            front.device.set_vring_addr(TX, 0, desc, used, avail, 0)
    echo(driver)
    driver.stop()
    driver.resume()
    echo(driver)


def test_a_ring_without_a_size_does_not_start(front: FrontEnd, memory: GuestMemory) -> None:
    front.set_mem_table(memory.regions)
    front.device.set_vring_addr(0, 0, *(memory.user_address(0),) * 3, 0)
    with refused(errno.EINVAL, "SET_VRING_NUM"):
        front.device.set_vring_running(0, True)
    front.device.set_vring_num(0, 8)
    front.device.set_vring_running(0, True)


def test_a_ring_that_is_wanted_starts_when_it_gets_its_addresses(
    front: FrontEnd, memory: GuestMemory
) -> None:
    with NetDriver(front, memory, timeout=PATIENCE) as driver:
        driver.start()
        driver.stop()
        front.device.reset()
        front.negotiate(driver.features)
        front.set_mem_table(memory.regions)
        for index, queue in ((RX, driver.rx[0]), (TX, driver.tx[0])):
            front.device.set_vring_num(index, queue.ring.size)
            front.device.set_vring_base(index, queue.ring.used_idx)
            front.device.set_vring_kick(index, os.dup(queue.kick_fd))
            front.device.set_vring_call(index, os.dup(queue.call_fd))
            front.device.set_vring_running(index, True)
            front.device.set_vring_running(index, True)
            assert front.device.get_vring_base(index) == queue.ring.used_idx
            front.set_ring_addr(index, queue)
        echo(driver)


def test_a_ring_stops_where_it_is_and_goes_on_from_there(front: FrontEnd, driver: NetDriver) -> None:
    for number in range(5):
        echo(driver, number)
    bases = driver.stop()
    assert bases == {RX: 5, TX: 5}
    assert front.device.get_vring_base(TX) == 5
    frames = [frame_of(i) for i in range(10)]
    driver.send_many(frames)
    front.device.set_vring_running(TX, False)
    driver.resume(bases=bases)
    assert [got.frame for got in driver.receive(10)] == frames


def resident() -> int:
    """Bytes of this process in memory."""
    with open("/proc/self/statm", encoding="ascii") as statm:
        return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_a_hundred_front_ends_leave_nothing_behind(front: FrontEnd) -> None:
    seen = []
    for number in range(100):
        with GuestMemory(SPANS) as memory, NetDriver(front, memory, ring_size=32, timeout=PATIENCE) as driver:
            driver.start()
            echo(driver, number)
            if number % 2:
                driver.stop()
        front.device.reset()
        front.device.reset()
        seen.append((len(open_fds()), mapped_files()))
        if number == 50:
            half = resident()
    assert len(set(seen)) == 1
    assert front.device.acked_features == 0
    assert not front.device.owned
    # A leak of one frame's room would be 6 MB by now.
    assert resident() - half < 3 * MIB


def test_devices_come_and_go_without_a_trace(memory: GuestMemory) -> None:
    seen = []
    for _ in range(10):
        device = NetDevice("loop", queue_pairs=2)
        with served(device) as front, NetDriver(front, memory, 2, 32, timeout=PATIENCE) as driver:
            driver.start()
            echo(driver)
            places = [pair.place(way) for pair in device.pairs for way in (0, 1)]
            seen.append(sorted((place.worker.name, place.port, place.ring) for place in places))
        assert device.pairs == []
        # Whose turn it is among the workers differs; the places in their arrays are used again.
        assert {ring for _, _, ring in seen[-1]} <= {ring for row in seen[:2] for _, _, ring in row}
        seen[2:] = []


def test_a_device_is_served_once(front: FrontEnd) -> None:
    poller = front.device.poller
    assert poller is not None
    with pytest.raises(RuntimeError, match="served already"):
        front.device.attach(poller)


def test_a_device_may_be_closed_again() -> None:
    for _ in range(2):
        device = NetDevice("null")
        device.close()
        device.close()
