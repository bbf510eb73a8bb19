"""Memory that was lent to a device in process and is unmapped while its rings run.

Each case is a process of its own, in the test's network namespace: what fails here ends the process it fails in.

Promises: every child ends by itself, or is told how it died.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

from netns import network_namespace

# What each child starts with: a tap, and a device whose rings' parts and buffers lie in regions of their own.
PRELUDE = """
import ctypes, faulthandler, itertools, mmap, os, select, signal, threading
import pyvhost
from kernel.driver_cases import Tapped, frame
from pyvhost.abi import vhost as abi
from pyvhost.driver.memory import MIB, GuestMemory, Span
from pyvhost.driver.net import NetDriver
from pyvhost.driver.ring_parts import RingLayout
from pyvhost.driver.vhost_ioctl import VhostNetFrontend
from pyvhost.host import tap

libc = ctypes.CDLL(None, use_errno=True)
PAGE = mmap.PAGESIZE
VERSION_1 = 1 << 32
RINGS, BUFFERS = 0, 16 * MIB

class Lent:
    # A device, and its driver; `regions` of memory, which others may have as well.
    def __init__(self, fd, memory=None, features=VERSION_1):
        self.memory = memory or GuestMemory([Span(RINGS, MIB), Span(BUFFERS, MIB)], anonymous=True)
        self.handle = pyvhost.open("/dev/vhost-net")
        self.front = VhostNetFrontend(self.handle, fd)
        tap.set_vnet_hdr_size(fd, 12)
        self.start(features)

    def start(self, features=VERSION_1):
        memory = self.memory
        self.driver = NetDriver(
            self.front, memory, ring_size=64, features=features, rx_buffer=4096, timeout=30.0,
            layout=lambda index: RingLayout.allocate(memory, 64, (0, 0, 0)),
            allocate=lambda size: memory.allocate(size, 16, 1),
        )
        self.driver.start()
        self.queues = [self.driver.rx[0], self.driver.tx[0]]

    @property
    def device(self):
        return self.handle._device

    def region(self, guest):
        (found,) = [r for r in self.memory.regions if r.guest_phys_addr == guest]
        return found.userspace_addr, found.memory_size

    def kick(self):
        for queue in self.queues:
            os.eventfd_write(queue.kick_fd, 1)

    def stopped(self):
        # Both rings' err, without a limit: the test process has one.
        for queue in self.queues:
            select.select([queue.err_fd], [], [])
        assert self.device.lost_memory

    def offer_until_stopped(self):
        # Used buffers go back unread: the last frame may have come, into the last buffer, before they were unmapped.
        rx = self.queues[0]
        while not select.select([rx.err_fd], [], [], 0.01)[0]:
            while (used := rx.ring.pop_used()) is not None:
                self.driver._offer(rx, used.token)
            rx.publish()
        self.stopped()

def unmap(address, size):
    assert libc.munmap(ctypes.c_void_p(address), ctypes.c_size_t(size)) == 0

def mapped(address, size):
    with open("/proc/self/maps") as maps:
        ranges = [[int(x, 16) for x in line.split()[0].split("-")] for line in maps]
    return sum(max(0, min(high, address + size) - max(low, address)) for low, high in ranges)

def flood(tapped):
    # Frames for the guest, for as long as the process lives.
    def send():
        for number in itertools.count():
            try:
                tapped.host.send(frame(number & 0xFFFF, 200 + number % 1000))
            except OSError:
                pass
    threading.Thread(target=send, daemon=True).start()

def the_end():
    # What was unmapped is not to be unmapped again.
    print("the end", flush=True)
    os._exit(0)
"""

TESTS = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def namespace() -> Iterator[None]:
    with network_namespace():
        yield


def child(script: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(TESTS), *(entry for entry in sys.path if entry)])
    return subprocess.run(
        [sys.executable, "-c", PRELUDE + textwrap.dedent(script)],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def succeeds(script: str) -> str:
    done = child(script)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "the end\n"
    return done.stderr


def test_rings_that_go_while_frames_come_in() -> None:
    heard = succeeds(
        """
        with Tapped("t0") as tapped:
            lent = Lent(tapped.fd)
            flood(tapped)
            lent.driver.receive(100)
            unmap(*lent.region(RINGS))
            lent.stopped()
            # Neither kicks nor frames have them run again; a page here and there is all that there is.
            lent.kick()
            with lent.device._ports[0].worker.paused():
                assert not any(port.place.record["running"] for port in lent.device._ports)
            assert 0 < mapped(*lent.region(RINGS)) <= 8 * PAGE
            lent.handle.close()
            # The process goes on, and so does the tap with another device.
            Lent(tapped.fd).driver.receive(100)
            the_end()
        """
    )
    assert "vring 0: stopped: memory that was lent to it has been unmapped, at 0x" in heard
    assert "vring 1: stopped: memory that was lent to it has been unmapped, at 0x" in heard


@pytest.mark.parametrize("features", ["VERSION_1", "VERSION_1 | 1 << 15 | 1 << 29"])
def test_buffers_that_go_while_frames_come_in(features: str) -> None:
    succeeds(
        f"""
        with Tapped("t0") as tapped:
            lent = Lent(tapped.fd, features={features})
            flood(tapped)
            lent.driver.receive(100)
            unmap(*lent.region(BUFFERS))
            lent.offer_until_stopped()
            the_end()
        """
    )


def test_buffers_that_go_before_they_are_sent() -> None:
    succeeds(
        """
        with Tapped("t0") as tapped:
            lent = Lent(tapped.fd)
            lent.driver.send(frame(1))
            lent.front.set_vring_kick(1, -1)
            lent.driver.send(frame(2))
            unmap(*lent.region(BUFFERS))
            lent.front.set_vring_kick(1, lent.queues[1].kick_fd)
            lent.kick()
            lent.stopped()
            the_end()
        """
    )


def test_a_log_that_goes_stops_what_is_logged() -> None:
    succeeds(
        """
        with Tapped("t0") as tapped:
            lent = Lent(tapped.fd)
            log = mmap.mmap(-1, PAGE)
            address = ctypes.addressof(ctypes.c_char.from_buffer(log))
            lent.front.set_log_base(address)
            lent.front.set_features(VERSION_1 | 1 << abi.F_LOG_ALL)
            flood(tapped)
            lent.driver.receive(10)
            assert any(log[:])
            unmap(address, PAGE)
            while not select.select([lent.queues[0].err_fd], [], [], 0)[0]:
                lent.driver.receive(0)
            assert lent.device.lost_memory
            the_end()
        """
    )


def test_a_device_that_has_the_same_memory_and_another_worker_stops_as_well() -> None:
    succeeds(
        """
        with Tapped("t0") as tapped, Tapped("t1") as idle, Tapped("t2") as other:
            lent = Lent(tapped.fd)
            sharing = Lent(idle.fd, lent.memory)
            for index in (0, 1):
                number = sharing.front.ioctl(abi.NEW_WORKER, abi.WorkerState()).worker_id
                sharing.front.ioctl(abi.ATTACH_VRING_WORKER, abi.VringWorker(index, number))
            alone = Lent(other.fd)
            flood(tapped)
            lent.driver.receive(10)
            unmap(*lent.region(BUFFERS))
            lent.offer_until_stopped()
            sharing.stopped()
            # What has other memory does not notice.
            flood(other)
            alone.driver.receive(100)
            assert not alone.device.lost_memory
            the_end()
        """
    )


def test_a_ring_that_is_bound_anew_to_other_memory_goes_on() -> None:
    succeeds(
        """
        with Tapped("t0") as tapped:
            lent = Lent(tapped.fd)
            flood(tapped)
            lent.driver.receive(10)
            unmap(*lent.region(RINGS))
            lent.stopped()
            for index in (0, 1):
                lent.front.unbind(index)
            assert not lent.device.lost_memory
            lent.memory = GuestMemory([Span(RINGS, MIB), Span(BUFFERS, MIB)], anonymous=True)
            lent.start()
            lent.driver.receive(100)
            the_end()
        """
    )


DIES = """
with Tapped("t0") as tapped:
    lent = Lent(tapped.fd)
    lent.driver.send(frame(1))
    faulthandler.enable()
    {again}
    address, size = lent.region(BUFFERS)
    {fault}
    print("survived", flush=True)
    os._exit(0)
"""


@pytest.mark.parametrize("again", ["pass", "lent.front.unbind(0); lent.front.bind(0)"], ids=["over", "under"])
def test_a_fault_of_the_applications_own_is_its_own(again: str) -> None:
    """faulthandler, on top of ours or under it, says what it says, and the process dies of it."""
    done = child(DIES.format(again=again, fault="unmap(address, size); ctypes.string_at(address, 1)"))
    assert (done.returncode, done.stdout) == (-signal.SIGSEGV, "")
    assert "Fatal Python error: Segmentation fault" in done.stderr


def test_memory_that_may_not_be_written_is_its_owners_matter() -> None:
    """A write barrier is not ours to take down: its handler is asked, and here there is none but faulthandler."""
    fault = """libc.mprotect(ctypes.c_void_p(address), ctypes.c_size_t(size), 0)
    flood(tapped)
    select.select([], [], [])"""
    done = child(DIES.format(again="lent.front.unbind(0); lent.front.bind(0)", fault=fault))
    assert (done.returncode, done.stdout) == (-signal.SIGSEGV, "")
    assert "Fatal Python error: Segmentation fault" in done.stderr
