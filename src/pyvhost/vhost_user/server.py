"""Where front ends come from: sockets that listen, sockets to dial, descriptors that were handed over.

Promises: many front ends come and go while the process lives, one at a time a device; a second one is turned
away at once with a line that names both; the end of one that leaves is dealt with before the next is judged;
a socket file that nobody listens on is replaced, any other is left alone, and at the end only a file that is
still this server's is removed; SIGTERM and SIGINT end `run` at once.
Never: reads a message (`connection` does); serves more than the control thread can.
"""

from __future__ import annotations

import errno
import logging
import os
import select
import signal
import socket
import threading
from collections.abc import Callable
from types import FrameType, TracebackType

from pyvhost.host import sd_notify, unix_socket
from pyvhost.host.poller import Poller, Timer
from pyvhost.host.unix_socket import peer_of
from pyvhost.vhost_user.connection import AGAIN, Connection
from pyvhost.vhost_user.device import Device

#: What may be served of the present front end before a new one is judged: enough for it to have left.
LAST_WORDS = 4096
#: How long a descriptor shortage keeps a listening socket quiet, in seconds.
SHORTAGE_PAUSE = 1.0
#: The first and the longest pause between two attempts to reach a front end, in seconds.
DIAL_FIRST, DIAL_LONGEST = 0.1, 3.0

_log = logging.getLogger(__name__)


class Server:
    """Devices and the sockets they are served on, in one control loop."""

    def __init__(self, poller: Poller | None = None) -> None:
        self._own_poller = poller is None
        self.poller = Poller() if poller is None else poller
        self._seats: dict[int, _Seat] = {}
        self._places: list[_Listener | _Dialer | _Guest] = []

    def listen(self, path: str | os.PathLike[str], device: Device) -> None:
        """Serve `device` to whoever connects to the socket `path`, which is made.

        OSError EADDRINUSE: a process listens there (the text names it); EEXIST: something else than a socket
        lies there; otherwise as bind(2).
        """
        name = os.fspath(path)
        sock, own = unix_socket.listen(name)
        try:
            seat = self._seat(device)
        except BaseException:
            sock.close()
            unix_socket.remove(name, own)
            raise
        self._places.append(_Listener(self, sock, seat, name, own))

    def connect(self, path: str | os.PathLike[str], device: Device) -> None:
        """Serve `device` to the front end that listens at `path`; dial again whenever it is not there.

        OSError ENAMETOOLONG: no socket can have that name.
        """
        unix_socket.check_name(os.fspath(path))
        self._places.append(_Dialer(self, os.fspath(path), self._seat(device)))

    def serve_fd(self, fd: int, device: Device) -> None:
        """Serve `device` on a Unix stream socket that was handed over, listening or connected; it is ours now.

        When all that was handed over are connected sockets, `run` returns with the last front end.
        OSError EBADF, ENOTSOCK, EPROTOTYPE: it is no such socket.
        """
        try:
            sock = socket.socket(fileno=fd)
        except OSError as error:
            raise OSError(error.errno, f"descriptor {fd}: {error.strerror}") from None
        if sock.family != socket.AF_UNIX or sock.type != socket.SOCK_STREAM:
            sock.detach()
            raise OSError(errno.EPROTOTYPE, f"descriptor {fd} is not a Unix stream socket")
        if sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
            where = sock.getsockname() or f"fd {fd}"
            self._places.append(_Listener(self, sock, self._seat(device), str(where), None))
        else:
            guest = _Guest(self)
            self._places.append(guest)
            self._seat(device).admit(sock, f"fd {fd}", guest.left)

    def run(self) -> None:
        """Serve until `stop`, SIGTERM or SIGINT, then close everything."""
        with _Signals(self.stop):
            try:
                sd_notify.ready()
                self.poller.run()
            finally:
                sd_notify.stopping()
                self.close()

    def stop(self) -> None:
        """Make `run` return. Any thread, or a signal handler."""
        self.poller.stop()

    def close(self) -> None:
        """End every connection and remove the socket files that are still ours."""
        places, self._places = self._places, []
        for place in places:
            place.close()
        for seat in self._seats.values():
            if seat.taken_by is not None:
                seat.taken_by.end("the server ends")
        if self._own_poller:
            self.poller.close()

    def __enter__(self) -> Server:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _seat(self, device: Device) -> _Seat:
        if id(device) not in self._seats:
            device.attach(self.poller)
            self._seats[id(device)] = _Seat(self.poller, device)
        return self._seats[id(device)]

    def _leave(self, place: _Guest) -> None:
        if place in self._places:
            self._places.remove(place)
            if not self._places:
                self.stop()


class _Seat:
    """A device's one place for a front end."""

    def __init__(self, poller: Poller, device: Device) -> None:
        self._poller = poller
        self.device = device
        self.taken_by: Connection | None = None

    def admit(self, sock: socket.socket, where: str, left: Callable[[Connection], object]) -> bool:
        """Give the place to a front end, or turn it away because another one has it."""
        # The one that has it may have gone already: its end is read before this one is judged.
        if self.taken_by is not None and self.taken_by.serve(LAST_WORDS):
            _log.warning(
                "%s: %s turned away: %s has %s, and a device serves one front end at a time",
                where,
                peer_of(sock),
                self.taken_by.peer,
                self.device.name,
            )
            sock.close()
            return False

        def ended(connection: Connection) -> None:
            self.taken_by = None
            left(connection)

        try:
            self.taken_by = Connection(self._poller, sock, self.device, where=where, on_end=ended)
        except OSError as error:
            _log.error("%s: %s can't be served: %s", where, peer_of(sock), error.strerror)
            sock.close()
            return False
        return True


class _Listener:
    """A socket that listens."""

    def __init__(
        self, server: Server, sock: socket.socket, seat: _Seat, path: str, own: tuple[int, int] | None
    ) -> None:
        sock.setblocking(False)
        self._poller = server.poller
        self._sock = sock
        self._seat = seat
        self._path = path
        self._own = own
        self._pause: Timer | None = None
        self._watch()
        _log.info("%s: %s waits for a front end", path, seat.device.name)

    def close(self) -> None:
        if self._pause is not None:
            self._pause.cancel()
        self._poller.unregister(self._sock.fileno())
        self._sock.close()
        if self._own is not None:
            unix_socket.remove(self._path, self._own)

    def _watch(self) -> None:
        self._poller.register(self._sock.fileno(), select.EPOLLIN, self._on_event)

    def _on_event(self, mask: int) -> None:
        try:
            sock, _ = self._sock.accept()
        except OSError as error:
            if error.errno in AGAIN or error.errno == errno.ECONNABORTED:
                return
            # Out of descriptors, most likely: the one who waits goes on waiting, and this loop must not spin.
            _log.error("%s: a front end can't be let in: %s", self._path, error.strerror)
            self._poller.unregister(self._sock.fileno())
            self._pause = self._poller.call_later(SHORTAGE_PAUSE, self._watch)
            return
        self._seat.admit(sock, self._path, lambda _: None)


class _Dialer:
    """A socket that a front end listens on."""

    def __init__(self, server: Server, path: str, seat: _Seat) -> None:
        self._poller = server.poller
        self._path = path
        self._seat = seat
        self._delay = DIAL_FIRST
        self._told = ""
        self._closed = False
        self._timer = self._poller.call_later(0, self._dial)

    def close(self) -> None:
        self._closed = True
        self._timer.cancel()

    def _dial(self) -> None:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        sock.setblocking(False)
        try:
            sock.connect(self._path)
        except OSError as error:
            sock.close()
            self._tell(error.strerror or str(error))
            self._again()
            return
        self._told = ""
        if not self._seat.admit(sock, self._path, self._left):
            self._again()

    def _tell(self, why: str) -> None:
        """Once for each reason, not once for each attempt."""
        if why != self._told:
            self._told = why
            _log.info("%s: no front end listens (%s); dialling until one does", self._path, why)

    def _left(self, connection: Connection) -> None:
        # One that came as far as features was a front end: the next one is worth looking for at once.
        if connection.session.progress.negotiated:
            self._delay = DIAL_FIRST
        self._again()

    def _again(self) -> None:
        if not self._closed:
            self._timer = self._poller.call_later(self._delay, self._dial)
            self._delay = min(self._delay * 2, DIAL_LONGEST)


class _Guest:
    """A connected socket that was handed over: it has no successor."""

    def __init__(self, server: Server) -> None:
        self._server = server

    def left(self, connection: Connection) -> None:
        self._server._leave(self)

    def close(self) -> None: ...


class _Signals:
    """SIGTERM and SIGINT stop the server while this is entered; only the main thread can have them do so."""

    def __init__(self, stop: Callable[[], None]) -> None:
        self._stop = stop
        self._before: dict[int, object] = {}

    def __enter__(self) -> None:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._on_signal)

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._stop()
