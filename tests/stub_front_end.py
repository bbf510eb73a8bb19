"""A front end without a back end, and a device's half that serves its rings: the test says what a chain gets."""

from __future__ import annotations

import select
import threading
from collections.abc import Callable, Sequence

from pyvhost.driver.memory import Region
from pyvhost.driver.queue import Queue
from pyvhost.driver.split_ring import SplitRing
from pyvhost.host import eventfd
from stub_device import StubDevice, Taken


class StubFrontEnd:
    """A front end without a back end: it keeps the rings, and the test plays the device."""

    def __init__(self, features: int = (1 << 64) - 1, *, queues: int = 1, config: bytes = b"") -> None:
        self.offered = features
        self.queue_num = queues
        self.config = bytearray(config)
        self.rings: dict[int, StubDevice] = {}
        self.queues: dict[int, Queue] = {}
        self.bases: dict[int, int] = {}
        self.statuses: list[int] = []
        self.regions: Sequence[Region] = ()

    def negotiate(self, features: int) -> int:
        return features & self.offered

    def set_mem_table(self, regions: Sequence[Region]) -> None:
        self.regions = regions

    def get_queue_num(self) -> int:
        return self.queue_num

    def start_ring(self, index: int, queue: Queue, base: int | None = None) -> None:
        assert isinstance(queue.ring, SplitRing)
        self.queues[index] = queue
        self.rings[index] = StubDevice(queue.ring)
        self.bases[index] = self.rings[index].last_avail = queue.ring.used_idx if base is None else base

    def stop_ring(self, index: int) -> int:
        del self.queues[index]
        return self.rings.pop(index).last_avail

    def get_config(self, offset: int, size: int) -> bytes:
        return bytes(self.config[offset : offset + size])

    def set_config(self, offset: int, data: bytes) -> None:
        self.config[offset : offset + len(data)] = data

    def set_status(self, status: int) -> None:
        self.statuses.append(status)

    def fileno(self) -> int:
        return -1

    def use(self, index: int, head: int, written: int = 0) -> None:
        """Use one chain of a ring, and call if the driver wants that."""
        device = self.rings[index]
        device.use(head, written)
        if device.call_due():
            eventfd.signal(self.queues[index].call_fd)


class Server(threading.Thread):
    """A device that handles each chain of its rings as it is kicked, until `stop`."""

    def __init__(self, front: StubFrontEnd, handle: Callable[[int, Taken], int]) -> None:
        super().__init__()
        self.front = front
        self.handle = handle
        self.end = eventfd.create()
        self.start()

    def run(self) -> None:
        poller = select.poll()
        poller.register(self.end, select.POLLIN)
        kicks = {queue.kick_fd: index for index, queue in self.front.queues.items()}
        for fd in kicks:
            poller.register(fd, select.POLLIN)
        while True:
            for fd, _ in poller.poll():
                if fd == self.end:
                    return
                eventfd.drain(fd)
                index = kicks[fd]
                device = self.front.rings[index]
                while chains := device.take():
                    for chain in chains:
                        self.front.use(index, chain.head, self.handle(index, chain))
                    device.want_kicks(True)

    def stop(self) -> None:
        eventfd.signal(self.end)
        self.join()
