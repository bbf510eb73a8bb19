"""Unix sockets as a guest's ports, by the convention that Firecracker began.

Who connects to the socket PATH and writes `CONNECT 1234` and a newline is connected to the guest's port 1234 when it
has read `OK PORT` and a newline. What the guest connects to on CID 2, port 1234, is the socket PATH_1234.
SOCK_SEQPACKET goes the same way, by PATH.seqpacket, where the line is the first message, and by PATH_1234 if it is
such a socket.

Promises: nothing behind the newline is read here; a client that does not come to the point is cut off, and stops
nobody else; a socket file that nobody listens on is replaced, any other is left alone. Never: blocks.
"""

from __future__ import annotations

import errno
import logging
import os
import select
import socket
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from pyvhost.abi import virtio_vsock as abi
from pyvhost.host import unix_socket
from pyvhost.host.poller import Timer
from pyvhost.vsock.ends.base import Guest, SocketEnd, kind_of

if TYPE_CHECKING:
    from pyvhost.vsock.connection import Connection, Request

_log = logging.getLogger(__name__)

#: What is put behind the path for SOCK_SEQPACKET.
SEQPACKET_SUFFIX: Final = ".seqpacket"
#: The longest line with its newline, bytes; a port has ten digits at most.
LINE: Final = 32
#: How long a client may take to say it, seconds.
PATIENCE: Final = 5.0
#: Clients that have not said it: who comes beyond that takes the place of the one who has waited longest.
UNANSWERED: Final = 256
#: Connections that wait in the kernel until they are accepted.
BACKLOG: Final = 1024
#: Accepted in one go.
_BATCH: Final = 64
#: How long a shortage of descriptors keeps a listening socket quiet, seconds.
_SHORTAGE: Final = 1.0
#: A listener whose backlog is full is tried again after so long, until the guest's patience ends; seconds.
_AGAIN: Final = 0.01
#: What happens often is told so often, seconds.
_TOLD: Final = 1.0


class UnixEnds:
    """A guest's ports as Unix sockets, PATH and those whose names begin with it.

    `unanswered`: clients that may be silent at a time; `patience`: for how long, seconds. OSError ENAMETOOLONG: no
    socket can have such names.
    """

    def __init__(
        self, path: str | os.PathLike[str], *, unanswered: int = UNANSWERED, patience: float = PATIENCE
    ) -> None:
        self._path = os.fspath(path)
        unix_socket.check_name(f"{self._path}_{abi.VMADDR_PORT_ANY}")
        self._unanswered = unanswered
        self._patience = patience
        self._guest: Guest | None = None
        self._doors: list[_Door] = []
        self._dialling: set[_Dial] = set()

    def open(self, guest: Guest) -> None:
        """Listens at PATH and PATH.seqpacket. OSError: as `unix_socket.listen`."""
        self._guest = guest
        try:
            for type, suffix in ((abi.TYPE_STREAM, ""), (abi.TYPE_SEQPACKET, SEQPACKET_SUFFIX)):
                self._doors.append(_Door(guest, self._path + suffix, type, self._unanswered, self._patience))
        except BaseException:
            self.close()
            raise

    def take(self, request: Request) -> bool:
        """Dials PATH_PORT; False: it is not the host's."""
        key, guest = request.key, self._guest
        if guest is None or key.peer_cid != abi.VMADDR_CID_HOST:
            return False
        dial = _Dial(guest, request, f"{self._path}_{key.peer_port}", self._dialling.discard)
        self._dialling.add(dial)
        dial.attempt()
        return True

    def close(self) -> None:
        """Listens no more; clients that are not connected yet are cut off."""
        doors, self._doors = self._doors, []
        for door in doors:
            door.close()
        for dial in list(self._dialling):
            dial.give_up()
        self._guest = None


class _Door:
    """A socket that listens, and the clients that have not said what they want."""

    def __init__(self, guest: Guest, path: str, type: int, unanswered: int, patience: float) -> None:
        self.guest = guest
        self.path = path
        self.type = type
        self.patience = patience
        self._limit = unanswered
        #: In the order in which they came.
        self._silent: dict[_Client, None] = {}
        self._pause: Timer | None = None
        self._told = -_TOLD
        self._sock, self._own = unix_socket.listen(path, kind=kind_of(type), backlog=BACKLOG)
        self._sock.setblocking(False)
        self._watch()

    def close(self) -> None:
        """Listens no more, and has nobody wait."""
        if self._pause is not None:
            self._pause.cancel()
        self.guest.poller.unregister(self._sock.fileno())
        self._sock.close()
        unix_socket.remove(self.path, self._own)
        for client in list(self._silent):
            client.cut_off("")

    def spoken(self, client: _Client) -> None:
        """A client waits here no more."""
        self._silent.pop(client, None)

    def tell(self, sock: socket.socket, why: str) -> None:
        """Says who is cut off, unless somebody was a moment ago."""
        now = time.monotonic()
        if now - self._told >= _TOLD:
            self._told = now
            _log.warning("%s: %s is cut off: %s", self.path, unix_socket.peer_of(sock), why)

    def _watch(self) -> None:
        self._pause = None
        self.guest.poller.register(self._sock.fileno(), select.EPOLLIN, self._accept)

    def _accept(self, mask: int) -> None:
        for _ in range(_BATCH):
            try:
                sock, _ = self._sock.accept()
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno in (errno.ECONNABORTED, errno.EINTR):
                    continue
                # Out of descriptors, most likely: who waits goes on waiting, and this loop must not spin.
                _log.error("%s: a client can't be let in: %s", self.path, error.strerror)
                self.guest.poller.unregister(self._sock.fileno())
                self._pause = self.guest.poller.call_later(_SHORTAGE, self._watch)
                return
            if len(self._silent) >= self._limit:
                next(iter(self._silent)).cut_off(f"{self._limit} clients are silent")
            client = _Client(self, sock)
            self._silent[client] = None
            client.listen()


class _Client(SocketEnd):
    """A client of the host: silent, then waiting for the guest's answer, then one end of a connection."""

    def __init__(self, door: _Door, sock: socket.socket) -> None:
        super().__init__(sock)
        self._door = door
        self._poller = door.guest.poller
        self._line = b""
        self._connection: Connection | None = None
        self._timer: Timer | None = None

    def listen(self) -> None:
        """Waits for its line, which most have sent already."""
        try:
            self._poller.register(self.fd, select.EPOLLIN, self._readable)
        except OSError as error:
            # epoll has a limit of its own (fs.epoll.max_user_watches).
            self.cut_off(error.strerror or str(error))
            return
        self._timer = self._poller.call_later(
            self._door.patience, lambda: self.cut_off("it was silent for too long")
        )
        self._readable(0)

    def cut_off(self, why: str) -> None:
        """It is not served."""
        if why:
            self._door.tell(self.sock, why)
        self._leave()
        self.sock.close()

    def accepted(self) -> None:
        """The guest has accepted: the client is told so, before anything that the guest says."""
        assert self._connection is not None
        self._poller.unregister(self.fd)
        try:
            self.sock.send(f"OK {self._connection.key.peer_port}\n".encode(), socket.MSG_NOSIGNAL)
        except OSError:
            self._connection.reset()

    def refused(self, reason: str) -> None:
        """The guest has not: the client finds its socket closed."""
        self._poller.unregister(self.fd)
        super().refused(reason)

    def _readable(self, mask: int) -> None:
        try:
            end = self._read()
        except BlockingIOError:
            return
        except OSError as error:
            self.cut_off(error.strerror or str(error))
            return
        if end is None:
            return
        port = _port(self._line) if end else None
        if port is None:
            self.cut_off(f"{self._line!r} is not CONNECT and a port")
            return
        self._leave()
        # Who waits for the guest may give up: one that has closed both ways has.
        self._poller.register(self.fd, 0, self._gone)
        self._connection = self._door.guest.connections.connect(self, self._door.type, port)

    def _read(self) -> bool | None:
        """Takes what belongs to the line; True: it is whole, False: it never will be, None: more may come."""
        if self._door.type == abi.TYPE_SEQPACKET:
            self._line = self.sock.recv(LINE + 1)
            return 0 < len(self._line) <= LINE
        seen = self.sock.recv(LINE - len(self._line), socket.MSG_PEEK)
        at = seen.find(b"\n")
        self._line += self.sock.recv(at + 1 if at >= 0 else len(seen)) if seen else b""
        if at >= 0:
            return True
        return None if seen and len(self._line) < LINE else False

    def _gone(self, mask: int) -> None:
        self._poller.unregister(self.fd)
        if self._connection is not None:
            self._connection.reset()

    def _leave(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._poller.unregister(self.fd)
        self._door.spoken(self)


class _Dial:
    """A guest's request on its way to a socket of the host."""

    def __init__(self, guest: Guest, request: Request, path: str, over: Callable[[_Dial], object]) -> None:
        self._poller = guest.poller
        self._request = request
        self._path = path
        self._over = over
        self._timer: Timer | None = None
        request.on_cancelled = self._forget

    def attempt(self) -> None:
        """Connects, which a Unix socket does at once or not at all."""
        try:
            sock = self._connect()
        except BlockingIOError:
            # It listens, and has its hands full.
            self._timer = self._poller.call_later(_AGAIN, self.attempt)
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ECONNREFUSED):
                _log.debug("%s: %s", self._path, error.strerror)
            self.give_up()
        else:
            self._forget()
            self._request.accept(SocketEnd(sock))

    def _connect(self) -> socket.socket:
        sock = socket.socket(socket.AF_UNIX, kind_of(self._request.key.type) | socket.SOCK_NONBLOCK)
        try:
            sock.connect(self._path)
        except BaseException:
            sock.close()
            raise
        return sock

    def give_up(self) -> None:
        """It is refused."""
        self._forget()
        self._request.refuse()

    def _forget(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._over(self)


def _port(line: bytes) -> int | None:
    """The port of `CONNECT 1234`, however it is spaced; None: it is something else."""
    words = line.split()
    if len(words) != 2 or words[0].upper() != b"CONNECT" or not words[1].isdigit():
        return None
    port = int(words[1])
    return port if port < abi.VMADDR_PORT_ANY else None
