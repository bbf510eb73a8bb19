"""Kick, call and err: whose they are, what they may be, and that they can change at any time."""

from __future__ import annotations

import errno
import os
import select
import socket

import pytest

from in_process import (
    PATIENCE,
    FrontEnd,
    echo,
    frame_of,
    open_fds,
    refused,
    traffic,
)
from pyvhost.abi import virtio
from pyvhost.driver.memory import GuestMemory
from pyvhost.driver.net import NetDriver
from pyvhost.net.device import NetDevice

RX, TX = 0, 1
ON_EMPTY = 1 << virtio.F_NOTIFY_ON_EMPTY


def is_open(fd: int) -> bool:
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True


def test_descriptors_of_the_wrong_kind_are_closed_and_the_old_ones_stay(
    front: FrontEnd, driver: NetDriver
) -> None:
    fds = open_fds()
    for take in (front.device.set_vring_kick, front.device.set_vring_call, front.device.set_vring_err):
        with refused(errno.EINVAL, "vring 1: (kick|call|err): descriptor [0-9]+ is not an eventfd"):
            take(TX, os.open("/dev/null", os.O_RDWR))
        with refused(errno.EBADF, "vring 1"):
            take(TX, 99999)
    # A kick that is a pipe could not be told from one that was never signalled.
    out, into = os.pipe()
    os.close(out)
    with refused(errno.EINVAL, "kick"):
        front.device.set_vring_kick(TX, into)
    assert open_fds() == fds
    echo(driver)


def test_kick_call_and_err_are_replaced_under_traffic(front: FrontEnd, driver: NetDriver) -> None:
    fds = open_fds()
    with traffic(driver) as seen:
        for _ in range(20):
            for index, queue in ((RX, driver.rx[0]), (TX, driver.tx[0])):
                front.device.set_vring_kick(index, os.dup(queue.kick_fd))
                front.device.set_vring_call(index, os.dup(queue.call_fd))
                front.device.set_vring_err(index, os.dup(queue.err_fd))
            seen()
    assert len(open_fds()) == len(fds)


def test_a_descriptor_is_closed_when_another_takes_its_place(front: FrontEnd) -> None:
    device = front.device
    for take in (device.set_vring_kick, device.set_vring_call, device.set_vring_err):
        one, two = os.eventfd(0), os.eventfd(0)
        take(0, one)
        assert is_open(one)
        take(0, two)
        assert not is_open(one)
        take(0, -1)
        assert not is_open(two)
        take(0, -1)


def _busy_ns(front: FrontEnd) -> int:
    device = front.device
    assert isinstance(device, NetDevice)
    (pair,) = device.pairs
    with pair.worker.paused():
        return int(pair.worker.ports[pair.port]["busy_ns"])


@pytest.mark.parametrize("silent", [[RX], [TX], [RX, TX]], ids=["rx", "tx", "both"])
def test_a_ring_without_a_kick_is_polled_as_long_as_it_runs(
    front: FrontEnd, driver: NetDriver, silent: list[int]
) -> None:
    for index in silent:
        front.device.set_vring_kick(index, -1)
    # Nobody listens to these any more.
    for queue in (driver.rx[0], driver.tx[0]):
        queue.kick()
    for number in range(20):
        echo(driver, number)
    assert _busy_ns(front) > 1 << 60
    for index in silent:
        front.device.set_vring_running(index, False)
    assert _busy_ns(front) == 0, "a processor would be busy for nobody"
    for index in silent:
        front.device.set_vring_running(index, True)
    assert _busy_ns(front) > 1 << 60
    for index, queue in ((RX, driver.rx[0]), (TX, driver.tx[0])):
        if index in silent:
            front.device.set_vring_kick(index, os.dup(queue.kick_fd))
    assert _busy_ns(front) == 0
    echo(driver)


def test_a_kick_from_before_the_start_is_not_lost(front: FrontEnd, memory: GuestMemory) -> None:
    with NetDriver(front, memory, timeout=PATIENCE) as driver:
        driver.start()
        bases = driver.stop()
        driver.send(frame_of(1))
        driver.tx[0].kick()
        for index, queue in ((RX, driver.rx[0]), (TX, driver.tx[0])):
            front.start_ring(index, queue, bases[index])
        assert driver.receive()[0].frame == frame_of(1)


def test_a_call_may_be_a_pipe_or_a_socket(front: FrontEnd, driver: NetDriver) -> None:
    ours, theirs = socket.socketpair()
    out, into = os.pipe()
    readers = [(os.dup(out), into), (ours.detach(), theirs.detach())]
    os.close(out)
    for reader, writer in readers:
        front.device.set_vring_call(RX, writer)
        driver.rx[0].ring.enable_calls()
        driver.send(frame_of(1))
        ready, _, _ = select.select([reader], [], [], PATIENCE)
        assert ready
        assert len(os.read(reader, 100)) % 8 == 0
        driver.receive()
    # One that nobody reads any more is no reason to stop.
    os.close(reader)
    driver.rx[0].ring.enable_calls()
    driver.send(frame_of(2))
    driver.wait_sent()
    assert len(driver.poll()) == 1
    os.close(readers[0][0])


def test_a_call_that_comes_late_is_signalled_for_what_was_used_before(
    front: FrontEnd, driver: NetDriver
) -> None:
    front.device.set_vring_call(RX, -1)
    driver.rx[0].ring.enable_calls()
    driver.send(frame_of(1))
    driver.wait_sent()
    assert driver.rx[0].take_calls() == 0
    front.device.set_vring_call(RX, os.dup(driver.rx[0].call_fd))
    assert driver.rx[0].wait_call(PATIENCE)
    assert driver.receive()[0].frame == frame_of(1)


def test_err_is_signalled_where_it_was_set(front: FrontEnd, driver: NetDriver) -> None:
    ring, queue = driver.tx[0].ring, driver.tx[0]
    event = os.eventfd(0, os.EFD_NONBLOCK)
    front.device.set_vring_err(TX, os.dup(event))
    ring.offer(ring.size)
    queue.publish()
    ready, _, _ = select.select([event], [], [], PATIENCE)
    assert ready
    assert os.eventfd_read(event) == 1
    assert queue.take_errors() == 0
    os.close(event)
