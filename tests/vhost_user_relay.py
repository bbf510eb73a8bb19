"""A relay between a front end that can't dial again and back ends that die: to the one there is one connection for
ever, to the others it is a front end that reconnects and tracks requests in flight (vhost-user, "Inflight I/O
tracking").

QEMU before 8.2 refuses to dial a SCSI back end again, and UML ends with its first death; a later QEMU does what this
does. It knows as much of the protocol as that takes, from the specification, and nothing of the device.

Promises: messages go through as they are, but for INFLIGHT_SHMFD, which is acknowledged for a front end that does
not know it. Never: touches a ring, or a guest's memory.
"""

from __future__ import annotations

import os
import select
import socket
import struct
import threading
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

from pyvhost.abi import vhost_user as abi
from pyvhost.abi.vhost_user import Request
from pyvhost.driver.inflight import Inflight

_HEADER = struct.Struct("=III")
_INFLIGHT = struct.Struct("=QQHH4x")

#: What a new back end has to be told of the whole device, in this order.
_DEVICE = (
    Request.SET_OWNER,
    Request.SET_PROTOCOL_FEATURES,
    Request.SET_BACKEND_REQ_FD,
    Request.SET_FEATURES,
    Request.SET_MEM_TABLE,
    Request.SET_INFLIGHT_FD,
)
#: And of each ring.
_RING = (
    Request.SET_VRING_NUM,
    Request.SET_VRING_BASE,
    Request.SET_VRING_ADDR,
    Request.SET_VRING_CALL,
    Request.SET_VRING_ERR,
    Request.SET_VRING_KICK,
    Request.SET_VRING_ENABLE,
)


class _Message(NamedTuple):
    request: int
    flags: int
    payload: bytes
    fds: list[int]


class Relay:
    """Listens at `path` for one front end, and dials `back_end`, again and again. `queues`: how many are tracked."""

    def __init__(self, path: Path, back_end: Path, queues: int, queue_size: int) -> None:
        self.path = path
        self._back_end = back_end
        self._queues, self._queue_size = queues, queue_size
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen(1)
        self._stop, self._stopped = os.pipe()
        self._said: dict[tuple[int, int], _Message] = {}
        self.inflight: Inflight | None = None
        self.error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="relay", daemon=True)
        self._thread.start()

    def in_flight(self) -> int:
        """Requests that are in flight, or were when the back end died."""
        assert self.inflight is not None
        return sum(len(self.inflight.heads(index)) for index in range(2, self._queues))

    def close(self) -> None:
        """Ends both connections. What went wrong on its own thread is raised."""
        os.close(self._stopped)
        self._thread.join()
        os.close(self._stop)
        self._listener.close()
        for message in self._said.values():
            for fd in message.fds:
                os.close(fd)
        if self.inflight is not None:
            self.inflight.close()
        if self.error is not None:
            raise self.error

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # --- on its own thread --------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            if not self._wait(self._listener):
                return
            front, _ = self._listener.accept()
            with front:
                self._serve(front)
        except BaseException as error:
            self.error = error

    def _wait(self, *sockets: socket.socket, seconds: float | None = None) -> list[socket.socket]:
        """Which can be read; none when it was closed, or time is up."""
        known = {one.fileno(): one for one in sockets}
        ready, _, _ = select.select([*known, self._stop], [], [], seconds)
        return [] if self._stop in ready else [known[fd] for fd in ready]

    def _serve(self, front: socket.socket) -> None:
        back = self._dial()
        while back is not None:
            ready = self._wait(front, back)
            if not ready:
                break
            if back in ready:
                message = _receive(back)
                if message is None:
                    back.close()
                    back = self._dial()
                    if back is not None:
                        self._tell_all(back)
                    continue
                _send(front, message)
            if front in ready:
                message = _receive(front)
                if message is None:
                    break
                self._forward(back, message)
        if back is not None:
            back.close()

    def _dial(self) -> socket.socket | None:
        while True:
            back = socket.socket(socket.AF_UNIX)
            try:
                back.connect(str(self._back_end))
                return back
            except OSError:
                back.close()
            if select.select([self._stop], [], [], 0.02)[0]:
                return None

    def _forward(self, back: socket.socket, message: _Message) -> None:
        if message.request == Request.SET_PROTOCOL_FEATURES:
            (bits,) = struct.unpack("=Q", message.payload)
            bits |= 1 << abi.PROTOCOL_F_INFLIGHT_SHMFD
            message = message._replace(payload=struct.pack("=Q", bits))
        if message.request == Request.SET_VRING_NUM and self.inflight is None:
            self._track(back)
        if message.request in _DEVICE or message.request in _RING:
            self._remember(message)
        _send(back, message)
        if message.request not in _DEVICE and message.request not in _RING:
            for fd in message.fds:
                os.close(fd)

    def _remember(self, message: _Message) -> None:
        of_ring = message.request in _RING
        index = struct.unpack_from("=I", message.payload)[0] & 0xFF if of_ring else 0
        former = self._said.pop((message.request, index), None)
        for fd in former.fds if former is not None else ():
            os.close(fd)
        self._said[message.request, index] = message

    def _track(self, back: socket.socket) -> None:
        """Has the back end make the memory, and gives it back to it."""
        asked = _INFLIGHT.pack(0, 0, self._queues, self._queue_size)
        _send(back, _Message(Request.GET_INFLIGHT_FD, abi.VERSION, asked, []))
        answer = _receive(back)
        assert answer is not None
        assert len(answer.fds) == 1, answer
        self.inflight = Inflight(answer.fds[0], *_INFLIGHT.unpack(answer.payload))
        given = _Message(Request.SET_INFLIGHT_FD, abi.VERSION, answer.payload, [os.dup(self.inflight.fd)])
        self._remember(given)
        _send(back, given)

    def _tell_all(self, back: socket.socket) -> None:
        for request in _DEVICE:
            self._tell(back, request, 0)
        for index in sorted({index for request, index in self._said if request in _RING}):
            for request in _RING:
                self._tell(back, request, index)

    def _tell(self, back: socket.socket, request: int, index: int) -> None:
        message = self._said.get((request, index))
        if message is not None:
            _send(back, message._replace(flags=message.flags & ~abi.FLAG_NEED_REPLY))


def _receive(sock: socket.socket) -> _Message | None:
    """One message; None: the other side has gone. Whoever holds it owns its descriptors."""
    try:
        head, fds, _, _ = socket.recv_fds(sock, _HEADER.size, 8)
        while 0 < len(head) < _HEADER.size:
            head += sock.recv(_HEADER.size - len(head))
        if not head:
            return None
        request, flags, size = _HEADER.unpack(head)
        payload = b""
        while len(payload) < size:
            more = sock.recv(size - len(payload))
            if not more:
                return None
            payload += more
    except ConnectionResetError:
        return None
    return _Message(request, flags, payload, fds)


def _send(sock: socket.socket, message: _Message) -> None:
    data = _HEADER.pack(message.request, message.flags, len(message.payload)) + message.payload
    try:
        if message.fds:
            sent = socket.send_fds(sock, [data], message.fds)
            sock.sendall(data[sent:])
        else:
            sock.sendall(data)
    except (BrokenPipeError, ConnectionResetError):
        pass  # the next look at it tells
