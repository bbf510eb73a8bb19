"""The event queue: what the device tells a driver that did not ask (virtio 1.2, 5.6.6.3).

Promises: an event goes into the driver's next buffer, and if there is none the driver hears, with the next one it
gives, that it has missed some. Never: decides what a driver wants to hear.
"""

from __future__ import annotations

from pyvhost.abi import virtio_scsi as abi
from pyvhost.host.poller import Poller
from pyvhost.vhost.chains import BufferRing
from pyvhost.vhost.worker import Int64s


class EventQueue:
    """A device's event queue; `ring` is its place."""

    def __init__(self, name: str, poller: Poller, row: Int64s) -> None:
        self.ring = BufferRing(name, poller, row)
        self.ring.on_buffers = self._buffers_came
        #: There was an event for which the driver had no buffer.
        self.missed = False

    def tell(self, event: int, lun: bytes, reason: int) -> None:
        """Tells of an event, or remembers that one was missed. `lun`: eight bytes."""
        if not self._put(event, lun, reason):
            self.missed = True

    def _buffers_came(self) -> None:
        if self.missed:
            self._put(abi.T_NO_EVENT, bytes(8), 0)

    def _put(self, event: int, lun: bytes, reason: int) -> bool:
        word = event | (abi.T_EVENTS_MISSED if self.missed else 0)
        order = self.ring.byteorder
        if self.ring.put(word.to_bytes(4, order) + lun + reason.to_bytes(4, order)):
            self.missed = False
            return True
        return False
