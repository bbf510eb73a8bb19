"""The socket device (virtio 1.2, 5.10): a guest's AF_VSOCK, and what is at the other end of its connections.

Data and credit are the compiled loop's (`vsock_loop`); connecting, refusing, shutting down and timing out those of
`connections`; sockets and siblings belong to `ends`.

Promises: whatever one connection does, others go on; a guest hears RST of what it was connected to in a former life.
Never: uses a socket itself.
"""

from __future__ import annotations

import errno
import logging
import os
import time
from collections.abc import Iterable, Sequence
from typing import ClassVar, Final

from pyvhost.abi import virtio
from pyvhost.abi import virtio_vsock as abi
from pyvhost.dataplane import blocks
from pyvhost.dataplane.vsock_blocks import MAX_OF_GUEST
from pyvhost.host.poller import Poller, Timer
from pyvhost.vhost.chains import BufferRing
from pyvhost.vhost.device import TRANSPORT_FEATURES, Device
from pyvhost.vhost.errors import VhostError
from pyvhost.vhost.vring import Place
from pyvhost.vhost.worker import Int64s
from pyvhost.vsock.connections import Connections
from pyvhost.vsock.ends.base import Ends, Guest, Host
from pyvhost.vsock.ends.forward import ForwardEnds
from pyvhost.vsock.ends.siblings import SiblingEnds
from pyvhost.vsock.ends.streams import StreamEnds
from pyvhost.vsock.ends.unix import UnixEnds
from pyvhost.vsock.link import Link
from pyvhost.vsock.plane import Plane
from pyvhost.vsock.share import LEAST

_log = logging.getLogger(__name__)

#: The virtqueues, in their order (5.10.2).
RX: Final = 0
TX: Final = 1
EVENT: Final = 2

#: Connections at most, and what each may have under way, bytes.
MAX_CONNECTIONS: Final = 4096
BUFFER: Final = 256 << 10
#: How long the end of the device waits for the loop to let go, seconds.
CLOSE_WAITS: Final = 2.0
#: How often what is only shown is counted anew, seconds.
_SHOWN: Final = 0.5

_LEAST_CID: Final = 3
_MOST_CID: Final = (1 << 32) - 2


class VsockDevice(Device):
    """Sockets for a guest, which come from and go to the first of its ends that takes them.

    `guest_cid`: 3 to 2**32 - 2; None: `set_guest_cid` says it. `uds_path`: the guest's ports are Unix sockets there
    (`ends.unix`). `forward`: ports of the host's own AF_VSOCK that the guest reaches. `group`: devices of one
    group, whose guests may reach each other, share a worker. `ends`: other ends, which are asked first. `buffer`:
    bytes that a connection's guest may send ahead, a power of two of 16 KiB or more. ValueError: an argument that
    can't be.
    """

    kind: ClassVar[str] = "vsock"
    virtio_id: ClassVar[int] = virtio.ID_VSOCK
    #: Receive, transmit, event.
    rings: ClassVar[int] = 3

    def __init__(
        self,
        guest_cid: int | None,
        *,
        uds_path: str | os.PathLike[str] | None = None,
        forward: Iterable[int] = (),
        group: str | None = None,
        ends: Sequence[Ends] = (),
        max_connections: int = MAX_CONNECTIONS,
        buffer: int = BUFFER,
        busyloop_timeout: int = 0,
        name: str | None = None,
    ) -> None:
        if guest_cid is not None:
            check_cid(guest_cid)
        if buffer < LEAST or buffer & (buffer - 1):
            raise ValueError(f"buffer is {buffer}, expected a power of two from {LEAST} on")
        if not 1 <= max_connections <= MAX_OF_GUEST:
            raise ValueError(f"max_connections is {max_connections}, expected 1 to {MAX_OF_GUEST}")
        super().__init__(name or f"vsock {guest_cid}", self.rings, busyloop_timeout=busyloop_timeout)
        #: 0: nobody has said it yet.
        self.guest_cid = guest_cid or 0
        self.group = group
        self._ends: list[Ends] = [*ends, StreamEnds()]
        if forwarded := frozenset(forward):
            for port in forwarded:
                check_port(port)
            self._ends.append(ForwardEnds(forwarded))
        if uds_path is not None:
            self._ends.append(UnixEnds(uds_path))
        if group is not None:
            self._ends.append(SiblingEnds())
        self._host: Host | None = None
        self._limit = max_connections
        self._buffer = buffer
        self._link: Link | None = None
        self._connections: Connections | None = None
        self._events: BufferRing | None = None
        self._rows: list[Int64s] = []
        self._timer: Timer | None = None
        self._shown: Timer | None = None
        #: Which of the rings have run since the last reset, and whether one had run before that, elsewhere.
        self._seen: set[int] = set()
        self._resumed = False

    def attach(self, poller: Poller) -> None:
        """Takes its place in the process's workers."""
        super().attach(poller)
        plane = Plane.get()
        plane.prepare()
        worker = plane.workers.take(f"group {self.group}" if self.group is not None else None)
        self._rows = [
            plane.row(self.name, "vsock", queue, str(self.guest_cid)) for queue in ("rx", "tx", "event")
        ]
        link = Link(
            self.name,
            self.guest_cid,
            (self._rows[RX], self._rows[TX]),
            poller,
            worker,
            self._limit,
            self._buffer,
        )
        self._link = link
        self._connections = link.connections = Connections(
            link, self.guest_cid, clock=time.monotonic, limit=self._limit, name=self.name
        )
        self._connections.on_timer = self._tick
        self._events = BufferRing(f"{self.name}: event queue", poller, self._rows[EVENT])
        self._show()
        if self.guest_cid:
            self._open_host()

    def _open_host(self) -> None:
        assert self.poller is not None
        guest = Guest(self.name, self.guest_cid, self.group, self.poller, self.connections)
        host = Host(guest, self._ends)
        host.open()
        self._host = host

    @property
    def connections(self) -> Connections:
        """The guest's. RuntimeError: the device is not served."""
        if self._connections is None:
            raise RuntimeError(f"{self.name}: it is not served")
        return self._connections

    @property
    def link(self) -> Link:
        """Its place in the loop. RuntimeError: the device is not served."""
        if self._link is None:
            raise RuntimeError(f"{self.name}: it is not served")
        return self._link

    def set_guest_cid(self, guest_cid: int) -> None:
        """VHOST_VSOCK_SET_GUEST_CID. EINVAL: no guest can have it; EADDRINUSE: another guest has."""
        try:
            check_cid(guest_cid)
        except ValueError as error:
            raise VhostError(errno.EINVAL, f"{self.name}: {error}") from None
        former, self.guest_cid = self.guest_cid, guest_cid
        try:
            if self._host is not None:
                self._host.move(guest_cid)
            elif self._link is not None:
                self._open_host()
        except OSError as error:
            self.guest_cid = former
            raise VhostError(error.errno or errno.EIO, f"{self.name}: {error.strerror or error}") from error
        if self._link is not None:
            self._link.set_cid(guest_cid)
            self.connections.guest_cid = guest_cid

    # --- what vhost.Device asks ---------------------------------------------------------------------------

    @property
    def features(self) -> int:
        """Offered, without what belongs to a transport."""
        return TRANSPORT_FEATURES | 1 << abi.F_STREAM | 1 << abi.F_SEQPACKET | 1 << abi.F_NO_IMPLIED_STREAM

    def features_changed(self) -> None:
        """A driver that takes none of the types is one from before there were any: it has STREAM (5.10.3)."""
        taken = self.acked_features
        types = set()
        if taken >> abi.F_SEQPACKET & 1:
            types.add(abi.TYPE_SEQPACKET)
        if taken >> abi.F_STREAM & 1 or not taken >> abi.F_NO_IMPLIED_STREAM & 1:
            types.add(abi.TYPE_STREAM)
        if self._connections is not None:
            self._connections.types = frozenset(types)

    def place_of(self, index: int) -> Place:
        """Receive, transmit, event."""
        if self._link is None or self._events is None:
            raise VhostError(errno.ENODEV, f"{self.name}: it is not served")
        return self._events if index == EVENT else self._link.places[index]

    def get_config(self, offset: int, size: int) -> bytes:
        """Bytes of struct virtio_vsock_config (5.10.4)."""
        return bytes(abi.VsockConfig(guest_cid=self.guest_cid))[offset : offset + size]

    def set_vring_running(self, index: int, running: bool) -> None:
        """Serve a vring, or let it rest.

        A driver that knew another back end hears that its connections are gone; one that begins anew, as after
        QEMU's reset, has none of its predecessor's.
        """
        first = running and 0 <= index < len(self.vrings) and index not in self._seen
        if running and not first and self._anew(index):
            self._forget()
        if first:
            self._seen.add(index)
            self._resumed |= self.vrings[index].base != 0
        super().set_vring_running(index, running)
        if first and self._resumed and len(self._seen) == len(self.vrings):
            self.transport_reset()

    def _anew(self, index: int) -> bool:
        """Whether with this ring both that carry packets, which have run before, begin at their beginning."""
        if index not in (RX, TX):
            return False
        other = self.vrings[TX if index == RX else RX]
        return self.vrings[index].base == 0 and other.place is not None and other.base == 0

    def _forget(self) -> None:
        if self._link is not None:
            # What the driver said before it went counts: that it had sent all, above all.
            self._link.serve_all()
            self._link.forget_packets()
            self.connections.restart()

    def transport_reset(self) -> bool:
        """Tells the guest that none of its connections is left (5.10.6.7); False: it has no buffer for that."""
        if self._events is None:
            return False
        return self._events.put(bytes(abi.VsockEvent(id=abi.EVENT_TRANSPORT_RESET)))

    def reset(self) -> None:
        """The driver is gone, and all connections with it."""
        super().reset()
        self._seen.clear()
        self._resumed = False
        self._forget()

    def close(self) -> None:
        """Gives up rings and connections."""
        if self._host is not None:
            self._host.close()
            self._host = None
        self.reset()
        if self._connections is not None:
            self._connections.stop()
        for timer in (self._timer, self._shown):
            if timer is not None:
                timer.cancel()
        self._timer = self._shown = None
        link, self._link = self._link, None
        if link is not None:
            if not link.wind_up(CLOSE_WAITS):
                _log.error("%s: closed with %d connections", self.name, link.open_connections)
            link.shut()
        self._connections = None
        self._events = None
        for row in self._rows:
            Plane.get().counters.release(row)
        self._rows = []
        super().close()

    # --- within -------------------------------------------------------------------------------------------

    def _tick(self) -> None:
        """Has the connections look at the clock, now and when the next of them is due."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._connections is None or self.poller is None:
            return
        due = self._connections.tick()
        if due is not None:
            self._timer = self.poller.call_later(due, self._tick)

    def _show(self) -> None:
        """Puts what Python counts where `pyvhost top` looks."""
        if self.poller is None or self._connections is None or self._link is None:
            return
        told, row = self._connections, self._rows[EVENT]
        for at, value in (
            (blocks.C_CONNECTIONS, self._link.open_connections),
            (blocks.C_CONNECTS, told.connects + told.accepts),
            (blocks.C_REFUSED, told.refused),
            (blocks.C_RESETS, told.resets),
        ):
            row[at // 8] = value
        self._shown = self.poller.call_later(_SHOWN, self._show)


def check_cid(cid: int) -> None:
    """ValueError: no guest can have this CID (5.10.4)."""
    if not _LEAST_CID <= cid <= _MOST_CID:
        raise ValueError(f"CID {cid}: a guest's go from {_LEAST_CID} to {_MOST_CID}")


def check_port(port: int) -> None:
    """ValueError: nobody can listen at this port."""
    if not 0 <= port < abi.VMADDR_PORT_ANY:
        raise ValueError(f"vsock port {port}: they go from 0 to {abi.VMADDR_PORT_ANY - 1}")
