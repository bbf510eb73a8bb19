"""A device of this process and a front end that calls its methods: no socket, and the test is the control thread.

    with served(NetDevice("loop")) as front:
        driver = NetDriver(front, memory)
        driver.start()

Promises: what a test leaves behind, `served` ends: the device is closed, and its poller. Never: a second control
thread at the same time: `serving` runs the loop in a thread while the test only waits.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from pyvhost.driver.memory import Region
from pyvhost.driver.queue import Queue
from pyvhost.host.poller import Poller
from pyvhost.memory.regions import MemoryRegion
from pyvhost.vhost.device import Device

#: How long a step may take before a test gives up on it, in seconds.
PATIENCE = 30.0


def handed_over(region: Region, **changes: int) -> MemoryRegion:
    """A driver's region as a device is given it, with a descriptor of its own; `changes` are lies about it."""
    fields = {
        "guest_phys_addr": region.guest_phys_addr,
        "memory_size": region.memory_size,
        "userspace_addr": region.userspace_addr,
        "mmap_offset": region.mmap_offset,
        "fd": os.dup(region.fd),
    }
    return MemoryRegion(**(fields | changes))


class FrontEnd:
    """`pyvhost.driver.front_end.FrontEnd`, by method calls."""

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

    def set_addr(self, index: int, queue: Queue) -> None:
        memory, layout = queue.ring.memory, queue.ring.layout
        desc, used, avail = (memory.user_address(part) for part in (layout.desc, layout.used, layout.avail))
        self.device.set_vring_addr(index, 0, desc, used, avail, 0)

    def set_up_ring(self, index: int, queue: Queue, base: int | None = None) -> None:
        """All but to let it run."""
        self.device.set_vring_num(index, queue.ring.size)
        self.device.set_vring_base(index, queue.ring.used_idx if base is None else base)
        self.set_addr(index, queue)
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


def open_fds() -> set[int]:
    """This process's descriptors, but for the one that this takes."""
    listing = os.listdir("/proc/self/fd")
    return {int(fd) for fd in listing if Path(f"/proc/self/fd/{fd}").exists()}


def mapped_files() -> int:
    """How many mappings of memory files this process has."""
    return Path("/proc/self/maps").read_text().count("/memfd:")
