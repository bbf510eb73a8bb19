"""A device of this process and a front end that calls its methods: no socket, and the test is the control thread.

    with served(NetDevice("loop")) as front:
        driver = NetDriver(front, memory)
        driver.start()

Promises: what a test leaves behind, `served` ends: the device is closed, and its poller. Never: a second control
thread at the same time: `serving` runs the loop in a thread while the test only waits.
"""

from __future__ import annotations

import gc
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from pyvhost.driver.dirty_log import DirtyLog as DriversLog
from pyvhost.driver.iommu import Miss
from pyvhost.driver.memory import MIB, Region, Span
from pyvhost.driver.net import NetDriver
from pyvhost.driver.queue import Queue
from pyvhost.host.poller import Poller
from pyvhost.memory.dirty_log import DirtyLog
from pyvhost.memory.regions import MemoryRegion
from pyvhost.vhost.device import Device
from pyvhost.vhost.errors import VhostError

#: How long a step may take before a test gives up on it, in seconds.
PATIENCE = 30.0
#: Two neighbours and one apart.
SPANS = [Span(0, 2 * MIB), Span(2 * MIB, 2 * MIB), Span(16 * MIB, MIB)]


def handed_over(region: Region, **changes: int) -> MemoryRegion:
    """A driver's region as a device is given it, with a descriptor of its own; `changes` are lies about it."""
    fields = {
        "guest_phys_addr": region.guest_phys_addr,
        "memory_size": region.memory_size,
        "userspace_addr": region.userspace_addr,
        "mmap_offset": region.mmap_offset,
        "fd": changes.get("fd", -1) if "fd" in changes else os.dup(region.fd),
    }
    return MemoryRegion(**(fields | changes))


class FrontEnd:
    """`driver.front_end.LogFrontEnd` and `driver.iommu.IotlbFrontEnd`, by method calls."""

    def __init__(self, device: Device) -> None:
        self.device = device

    def negotiate(self, features: int) -> int:
        if not self.device.owned:
            self.device.set_owner()
        acked = features & self.device.features
        self.device.set_features(acked)
        return acked

    def set_mem_table(self, regions: Sequence[Region]) -> None:
        self.device.set_mem_table([handed_over(region) for region in regions])

    def get_queue_num(self) -> int:
        return self.device.queue_num

    def set_ring_addr(self, index: int, queue: Queue, *, log: bool = False) -> None:
        at, log_at = queue.ring.addresses, queue.ring.layout.used if log else 0
        self.device.set_vring_addr(index, int(log), at.desc, at.used, at.avail, log_at)

    def set_up_ring(self, index: int, queue: Queue, base: int | None = None) -> None:
        """All but to let it run."""
        self.device.set_vring_num(index, queue.ring.size)
        self.device.set_vring_base(index, queue.ring.used_idx if base is None else base)
        self.set_ring_addr(index, queue)
        self.device.set_vring_endian(index, int(queue.ring.byteorder == "big"))
        self.device.set_vring_call(index, os.dup(queue.call_fd))
        self.device.set_vring_err(index, os.dup(queue.err_fd))
        self.device.set_vring_kick(index, os.dup(queue.kick_fd))

    def start_ring(self, index: int, queue: Queue, base: int | None = None) -> None:
        self.set_up_ring(index, queue, base)
        self.device.set_vring_running(index, True)

    def stop_ring(self, index: int) -> int:
        self.device.set_vring_running(index, False)
        return self.device.get_vring_base(index)

    def get_config(self, offset: int, size: int) -> bytes:
        return self.device.get_config(offset, size)

    def set_status(self, status: int) -> None: ...

    def fileno(self) -> int:
        return -1

    def change_features(self, features: int) -> None:
        self.device.set_features(features)

    def set_log(self, log: DriversLog) -> None:
        self.device.set_log_base(DirtyLog(log.address, log.size))

    def set_log_fd(self, fd: int) -> None:
        self.device.set_log_fd(os.dup(fd) if fd >= 0 else -1)

    def iotlb_fileno(self) -> int:
        return self.device.iotlb_fd

    def take_miss(self) -> Miss | None:
        miss = self.device.take_iotlb_miss()
        return None if miss is None else Miss(miss.iova, miss.perm)

    def iotlb_update(self, iova: int, size: int, uaddr: int, perm: int) -> None:
        self.device.iotlb_update(iova, size, uaddr, perm)

    def iotlb_invalidate(self, iova: int, size: int) -> None:
        self.device.iotlb_invalidate(iova, size)


@contextmanager
def served(device: Device) -> Iterator[FrontEnd]:
    """The device, attached to a poller that nobody runs, until the end."""
    with Poller() as poller:
        try:
            device.attach(poller)
            yield FrontEnd(device)
        finally:
            device.close()


@contextmanager
def serving(*devices: Device) -> Iterator[None]:
    """Runs the devices' loops meanwhile; the test leaves the devices alone."""
    pollers = [device.poller for device in devices if device.poller is not None]
    threads = [threading.Thread(target=poller.run) for poller in pollers]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        for poller, thread in zip(pollers, threads, strict=True):
            poller.stop()
            thread.join(PATIENCE)
            assert not thread.is_alive()


def _settle() -> None:
    """Lets go of what nobody knows any more: a mapping in Python keeps a descriptor of its own."""
    gc.collect()
    # What is there by now is not looked at again: with Numba's half million objects that would take its time.
    gc.freeze()


def open_fds() -> set[int]:
    """This process's descriptors, but for the one that this takes."""
    _settle()
    listing = os.listdir("/proc/self/fd")
    return {int(fd) for fd in listing if Path(f"/proc/self/fd/{fd}").exists()}


def mapped_files() -> int:
    """How many mappings of memory files this process has."""
    _settle()
    return Path("/proc/self/maps").read_text().count("/memfd:")


def frame_of(number: int) -> bytes:
    return b"\xff" * 6 + bytes.fromhex("0200000000aa 88b5") + number.to_bytes(8, "big") * (1 + number % 100)


def echo(driver: NetDriver, number: int = 1) -> None:
    frame = frame_of(number)
    driver.send(frame)
    assert [got.frame for got in driver.receive()] == [frame]


@contextmanager
def traffic(driver: NetDriver) -> Iterator[Callable[[], int]]:
    """Frames go round in another thread meanwhile, none lost and none out of order; how many did so far."""
    stop = threading.Event()
    moved = threading.Event()
    rounds = [0]
    failures: list[BaseException] = []

    def run() -> None:
        try:
            while not stop.is_set():
                frames = [frame_of(rounds[0] * 8 + i) for i in range(8)]
                driver.send_many(frames)
                assert [got.frame for got in driver.receive(8)] == frames
                rounds[0] += 1
                moved.set()
        except BaseException as error:
            failures.append(error)
            moved.set()

    def seen() -> int:
        moved.clear()
        assert moved.wait(PATIENCE)
        assert failures == []
        return rounds[0]

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield seen
    finally:
        stop.set()
        thread.join(PATIENCE)
        assert not thread.is_alive()
    assert failures == []


def refused(code: int, words: str) -> pytest.RaisesExc[VhostError]:
    return pytest.raises(VhostError, match=words, check=lambda error: error.errno == code)
