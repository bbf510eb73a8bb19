"""A virtio-blk driver in plain Python over any front end (virtio 1.3, 5.2): reads, writes and flushes, one at a time.

It is there to measure others' block devices beside ours, and no more than that needs.

Promises: every wait ends after its timeout; a request that failed is DeviceError and says its status.
Never: starts a thread, or has two requests under way.
"""

from __future__ import annotations

from typing import Final

from pyvhost.abi import virtio
from pyvhost.abi import virtio_blk as abi
from pyvhost.driver.device_driver import DeviceDriver
from pyvhost.driver.errors import DeviceError
from pyvhost.driver.front_end import FrontEnd
from pyvhost.driver.memory import GuestMemory
from pyvhost.driver.queue import Queue

FEATURES: Final = (
    1 << virtio.F_VERSION_1
    | 1 << virtio.RING_F_EVENT_IDX
    | 1 << virtio.RING_F_INDIRECT_DESC
    | 1 << abi.F_FLUSH
)

#: The unit of positions and of the capacity (5.2.4), whatever the block size.
SECTOR: Final = 512


class BlkDriver(DeviceDriver):
    """A driver for one block device, with one queue."""

    def __init__(
        self, frontend: FrontEnd, memory: GuestMemory, ring_size: int = 128, *, timeout: float = 10.0
    ) -> None:
        super().__init__(frontend, memory, ring_size, FEATURES, timeout=timeout)
        self.queue: Queue

    def start(self) -> None:
        """Negotiate, make the ring, and let the device run."""
        self._negotiate()
        self.queue = self._queue(0, "requests")
        self.resume()

    @property
    def capacity(self) -> int:
        """The device's size in bytes."""
        return int.from_bytes(self.frontend.get_config(0, 8), "little") * SECTOR

    def read(self, offset: int, length: int) -> bytes:
        """`length` bytes from `offset`, both multiples of 512."""
        return self._request(abi.T_IN, offset, b"", length)

    def write(self, offset: int, data: bytes) -> None:
        """Writes `data`, whose length is a multiple of 512 as `offset` is."""
        self._request(abi.T_OUT, offset, data, 0)

    def flush(self) -> None:
        """Has the device put all that was written on its medium."""
        self._request(abi.T_FLUSH, 0, b"", 0)

    def _request(self, kind: int, offset: int, data: bytes, length: int) -> bytes:
        header = bytes(abi.Outhdr(kind, 0, offset // SECTOR))
        room = self.memory.allocate(len(header) + len(data) + length + 1)
        at = room + len(header)
        status = at + len(data) + length
        try:
            self.memory.write(room, header + data)
            self.memory.write(status, b"\xff")
            pieces = [(at, length)] if length else []
            sent = [(at, len(data))] if data else []
            self.queue.ring.add([(room, len(header)), *sent], [*pieces, (status, 1)])
            self.queue.publish()
            self._wait(lambda: self.queue.ring.used_pending() > 0, [self.queue], "used request")
            self.queue.ring.pop_used()
            (told,) = self.memory.read(status, 1)
            if told != abi.S_OK:
                raise DeviceError(f"request {kind} at {offset:#x} failed with status {told}")
            return self.memory.read(at, length)
        finally:
            self.memory.free(room)
