"""The answering side of a control socket, in the control loop.

Promises: only this user and root are served; nothing a client sends or fails to read holds up the loop or grows
without bound; the file is its owner's alone (0600) and goes at the end; a command that fails is an answer.
Never: runs a command of its own.
"""

from __future__ import annotations

import errno
import logging
import os
import select
import socket
from collections.abc import Mapping
from types import TracebackType
from typing import Final, Self

from pyvhost.control import protocol
from pyvhost.control.commands import Command
from pyvhost.host import unix_socket
from pyvhost.host.poller import Poller, Timer

#: Clients at a time; a further one waits in the socket's queue.
CLIENTS: Final = 16
#: How long a descriptor shortage keeps the socket quiet, in seconds.
_PAUSE: Final = 1.0
_AGAIN: Final = (errno.EAGAIN, errno.EINTR)

_log = logging.getLogger(__name__)


class ControlServer:
    """Serves `commands` at the socket `path`, which is made, until `close`. OSError: as `unix_socket.listen`."""

    def __init__(self, poller: Poller, path: str | os.PathLike[str], commands: Mapping[str, Command]) -> None:
        self.path = os.fspath(path)
        self.commands = commands
        self._poller = poller
        self._clients: set[_Client] = set()
        self._pause: Timer | None = None
        self._listening = False
        self._sock, self._own = unix_socket.listen(self.path, 0o600)
        self._sock.setblocking(False)
        self._watch()
        _log.info("%s: waits for `pyvhost ctl`", self.path)

    def _watch(self) -> None:
        if not self._listening and self._sock.fileno() >= 0 and len(self._clients) < CLIENTS:
            self._poller.register(self._sock.fileno(), select.EPOLLIN, lambda _mask: self._accept())
            self._listening = True

    def _rest(self) -> None:
        self._poller.unregister(self._sock.fileno())
        self._listening = False

    def _accept(self) -> None:
        try:
            sock, _ = self._sock.accept()
        except OSError as error:
            if error.errno not in (*_AGAIN, errno.ECONNABORTED):
                _log.error("%s: nobody can be let in: %s", self.path, error.strerror)
                self._rest()
                self._pause = self._poller.call_later(_PAUSE, self._watch)
            return
        uid = unix_socket.peer_uid(sock)
        if uid not in (0, os.geteuid()):
            _log.warning("%s: %s of user %d turned away", self.path, unix_socket.peer_of(sock), uid)
            sock.close()
            return
        self._clients.add(_Client(self, self._poller, sock))
        if len(self._clients) >= CLIENTS:
            self._rest()

    def left(self, client: _Client) -> None:
        """A client has gone."""
        self._clients.discard(client)
        self._watch()

    def answer(self, line: bytes, peer: str) -> bytes:
        """What is said to one line."""
        try:
            name, arguments = protocol.parse_request(line)
            command = self.commands.get(name)
            if command is None:
                raise ValueError(f"there is no command {name!r}; there are {', '.join(self.commands)}")
            reply = protocol.result(command.run(arguments))
        except (OSError, ValueError) as error:
            return protocol.refusal(error)
        except Exception as error:
            _log.exception("%s: command %s failed", self.path, line[:200])
            return protocol.refusal(ValueError(f"{type(error).__name__}: {error}"))
        if command.changes:
            _log.info("%s: %s: %s", self.path, peer, " ".join((name, *arguments)))
        return reply

    def close(self) -> None:
        """End every client and remove the file, if it is still this server's."""
        if self._sock.fileno() < 0:
            return
        if self._pause is not None:
            self._pause.cancel()
        self._poller.unregister(self._sock.fileno())
        self._sock.close()
        for client in list(self._clients):
            client.close()
        unix_socket.remove(self.path, self._own)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


class _Client:
    """Somebody who asks: one line at a time, the next is read when the answer is gone."""

    def __init__(self, server: ControlServer, poller: Poller, sock: socket.socket) -> None:
        sock.setblocking(False)
        self._server = server
        self._poller = poller
        self._sock = sock
        self._peer = unix_socket.peer_of(sock)
        self._input = bytearray()
        self._output = bytearray()
        poller.register(sock.fileno(), select.EPOLLIN, self._on_event)

    def _on_event(self, mask: int) -> None:
        try:
            if not self._output:
                data = self._sock.recv(65536)
                if not data:
                    self.close()
                    return
                self._input += data
            self._serve()
        except OSError as error:
            if error.errno not in _AGAIN:
                self.close()

    def _serve(self) -> None:
        while self._send():
            line, end, rest = self._input.partition(b"\n")
            if not end:
                if len(self._input) > protocol.LINE_MAX:
                    self._output += protocol.refusal(ValueError("a line is longer than 1 MiB"))
                    self._send()
                    self.close()
                return
            self._input = rest
            self._output += self._server.answer(bytes(line), self._peer)

    def _send(self) -> bool:
        """Send what waits; whether nothing does any more."""
        while self._output:
            try:
                sent = self._sock.send(self._output)
            except BlockingIOError:
                self._poller.modify(self._sock.fileno(), select.EPOLLOUT)
                return False
            del self._output[:sent]
        self._poller.modify(self._sock.fileno(), select.EPOLLIN)
        return True

    def close(self) -> None:
        if self._sock.fileno() >= 0:
            self._poller.unregister(self._sock.fileno())
            self._sock.close()
            self._server.left(self)
