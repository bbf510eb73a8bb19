"""What the kinds of other ends have in common: whose they are, who is asked first, and an end that is a socket.

Promises: a request that no kind takes is refused. Never: reads or writes what a connection carries.
"""

from __future__ import annotations

import array
import fcntl
import logging
import select
import socket
import termios
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Protocol

from pyvhost.abi import virtio_vsock as abi
from pyvhost.host.poller import Poller
from pyvhost.vsock.ends.groups import Groups

if TYPE_CHECKING:
    from pyvhost.vsock.connection import Request
    from pyvhost.vsock.connections import Connections

_log = logging.getLogger(__name__)

#: What a socket may hold of what was written to it, bytes, as far as the host lets it (net.core.wmem_max).
BUFFER: Final = 1 << 20

_KINDS: Final = {abi.TYPE_STREAM: socket.SOCK_STREAM, abi.TYPE_SEQPACKET: socket.SOCK_SEQPACKET}


@dataclass(eq=False)
class Guest:
    """A guest as its ends know it."""

    name: str
    cid: int
    #: Whose siblings it has; None: it has none.
    group: str | None
    poller: Poller
    connections: Connections


class Ends(Protocol):
    """One kind of other ends of one guest. All on the control thread."""

    def open(self, guest: Guest) -> None:
        """Begins. OSError: what the host refuses; nothing is left behind."""
        ...

    def take(self, request: Request) -> bool:
        """Whether a request of the guest's is of this kind: then it is answered, now or later."""
        ...

    def close(self) -> None:
        """Begins no more. Ends of connections that there are go on until these end."""
        ...


class Host:
    """All that a guest can reach and be reached by; the first of `ends` that takes a request has it."""

    def __init__(self, guest: Guest, ends: Sequence[Ends]) -> None:
        self.guest = guest
        self._ends = list(ends)
        self._opened: list[Ends] = []

    def open(self) -> None:
        """Begins. OSError EADDRINUSE: another guest has this CID; else as `Ends.open`."""
        Groups.of_process().add(self.guest)
        try:
            for ends in self._ends:
                ends.open(self.guest)
                self._opened.append(ends)
        except BaseException:
            self.close()
            raise
        self.guest.connections.on_request = self.request

    def request(self, request: Request) -> None:
        """The guest wants to connect."""
        if not any(ends.take(request) for ends in self._opened):
            request.refuse()

    def move(self, cid: int) -> None:
        """The guest has another CID from now on. OSError EADDRINUSE: another guest has it."""
        Groups.of_process().move(self.guest, cid)

    def close(self) -> None:
        """Begins no more."""
        Groups.of_process().remove(self.guest)
        opened, self._opened = self._opened, []
        for ends in reversed(opened):
            ends.close()


class SocketEnd:
    """An end that is a socket, which belongs to it."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        enlarge(sock)
        self.sock = sock
        self.fd = sock.fileno()

    def accepted(self) -> None:
        """The guest has accepted what this end asked for."""

    def refused(self, reason: str) -> None:
        """The guest has not."""
        self.sock.close()

    def shutdown(self, flags: int) -> None:
        """Passes on what the guest has shut down."""
        for flag, how in ((abi.SHUTDOWN_SEND, socket.SHUT_WR), (abi.SHUTDOWN_RCV, socket.SHUT_RD)):
            if flags & flag:
                try:
                    self.sock.shutdown(how)
                except OSError:
                    pass  # the other side is gone, which its end says anyway

    def ended(self) -> int:
        """After a read of 0: what the other side has shut down (SHUTDOWN_*); 0: it was an empty message.

        An empty message that is the last before the end of a SEQPACKET socket can't be told from it.
        """
        mask = self._poll()
        if mask & (select.POLLHUP | select.POLLERR):
            flags = abi.SHUTDOWN_SEND | abi.SHUTDOWN_RCV
        else:
            flags = abi.SHUTDOWN_SEND if mask & select.POLLRDHUP else 0
        # Messages that came before its end are still to be read.
        return 0 if flags and self.sock.type == socket.SOCK_SEQPACKET and unread(self.sock) else flags

    def close(self, reset: bool) -> None:
        """It is over."""
        self.sock.close()

    def _poll(self) -> int:
        poll = select.poll()
        poll.register(self.sock.fileno(), select.POLLRDHUP)
        return sum(mask for _, mask in poll.poll(0))


def kind_of(type: int) -> socket.SocketKind:
    """The host's kind of socket for a type of virtio's."""
    return _KINDS[type]


def enlarge(sock: socket.socket) -> None:
    """Has a socket hold as much as the host lets it: fewer turns for much data, and longer messages."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, BUFFER)


def unread(sock: socket.socket) -> int:
    """Bytes that a socket has for its reader."""
    number = array.array("i", [0])
    fcntl.ioctl(sock, termios.FIONREAD, number)
    return number[0]
