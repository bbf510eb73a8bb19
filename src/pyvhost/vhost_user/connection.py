"""One front end's connection: its sockets, between the control loop and a `BackendSession`.

Promises: nothing here blocks; a front end that doesn't read its replies is not read from either, so that what
waits for it stays a few hundred bytes; misses of the IOTLB are looked for while the front end can be told of
them, and cost nothing otherwise; whatever goes wrong ends this connection alone, with one line in the
log; afterwards its sockets and descriptors are closed and the device is as new.
Never: decides what a message does; accepts or dials.
"""

from __future__ import annotations

import errno
import logging
import select
import socket
from collections.abc import Callable

from pyvhost.host import fds as host_fds
from pyvhost.host.poller import Poller
from pyvhost.host.unix_socket import peer_of, peer_pid
from pyvhost.vhost_user.backend import LOST_MEMORY, BackendSession, SessionError
from pyvhost.vhost_user.codec import HEADER_SIZE, Decoder, Fds, Message, Stream, decode_one
from pyvhost.vhost_user.describe import TRACE, describe
from pyvhost.vhost_user.device import Device
from pyvhost.vhost_user.hints import MEMORY, private_memory
from pyvhost.vhost_user.payloads import CodecError

#: Messages that one front end is served in a row before others have their turn.
MESSAGES_A_TURN = 64

#: What a non-blocking socket says when there is nothing to do.
AGAIN = (errno.EAGAIN, errno.EWOULDBLOCK, errno.EINTR)

_log = logging.getLogger(__name__)


class Connection:
    """A front end that is there, from its arrival until `alive` is false."""

    def __init__(
        self,
        poller: Poller,
        sock: socket.socket,
        device: Device,
        *,
        where: str,
        on_end: Callable[[Connection], object],
    ) -> None:
        """Take over a connected socket. `where` is the socket's name for the log; `on_end` is called once."""
        sock.setblocking(False)
        self.peer = peer_of(sock)
        self._pid = peer_pid(sock)
        self._memory_seen = False
        self.label = f"{where}: {self.peer}"
        self.alive = True
        self.session = BackendSession(device, label=self.label)
        self._poller = poller
        self._sock = sock
        self._device = device
        self._on_end = on_end
        self._decoder = Decoder(Stream.REQUEST)
        self._output = bytearray()
        self._output_fds = Fds()
        self._channel: _Channel | None = None
        self._misses_fd = -1
        # A device may notice a change on any thread; the session belongs to the control thread.
        device.config_changed = lambda: poller.call_soon_threadsafe(self.session.config_changed)
        device.memory_lost = lambda: self.end(f"{LOST_MEMORY}; its connection ends", logging.ERROR)
        poller.register(sock.fileno(), select.EPOLLIN, self._on_event)
        _log.info("%s attached to %s", self.label, device.name)

    def serve(self, messages: int = MESSAGES_A_TURN) -> bool:
        """Do what has arrived, `messages` at most; whether the front end is still there."""
        try:
            for _ in range(messages):
                if not (self.alive and self._flush() and self._serve_one()):
                    break
        except (CodecError, SessionError) as fault:
            self.end(f"{fault}; its connection ends", logging.ERROR)
        except ConnectionError as error:
            self.end(f"it left: {error.strerror}")
        except OSError as error:
            self.end(f"{error.strerror}; its connection ends", logging.ERROR)
        except Exception:
            _log.exception("%s: a fault of this program", self.label)
            self.end("its connection ends", logging.ERROR)
        return self.alive

    def end(self, why: str, level: int = logging.INFO) -> None:
        """Let go of everything; nothing happens the second time."""
        if not self.alive:
            return
        self.alive = False
        _log.log(level, "%s: %s", self.label, why)
        self._poller.unregister(self._sock.fileno())
        self._poller.unregister(self._misses_fd)
        self._sock.close()
        self._decoder.close()
        self._output_fds.close()
        if self._channel is not None:
            self._channel.close()
        try:
            self.session.close()
        except Exception:
            _log.exception("%s: %s could not be reset", self.label, self._device.name)
        self._on_end(self)

    def _on_event(self, mask: int) -> None:
        self.serve()

    def _serve_one(self) -> bool:
        """Read once, and do what that completes; whether there may be more to read."""
        try:
            data, fds = host_fds.recv(self._sock, self._decoder.wanted)
        except OSError as error:
            if error.errno in AGAIN:
                return False
            raise
        if not data:
            host_fds.close_all(fds)
            self._decoder.end()
            hint = self.session.progress.farewell()
            self.end(hint or "it left", logging.WARNING if hint else logging.INFO)
            return False
        message = self._decoder.feed(data, fds)
        if message is None:
            return True
        self._trace(message)
        if message.request in MEMORY and len(message.fds) and not self._memory_seen:
            self._memory_seen = True
            hint = private_memory(self._pid, message.fds)
            if hint:
                _log.warning("%s: %s", self.label, hint)
        for reply in self.session.receive(message):
            # Nothing else waits to be sent: `serve` reads the next message when all of this has gone.
            self._trace_bytes(Stream.REPLY, reply.data, reply.fds)
            self._output += reply.data
            self._output_fds = reply.fds
        self._adopt_channel()
        self._watch_misses()
        self._flush()
        return True

    def _flush(self) -> bool:
        """Send what waits; whether nothing waits any more. Only then more is read."""
        if self._output:
            try:
                sent = host_fds.send(self._sock, self._output, list(self._output_fds))
                self._output_fds.close()
                self._output_fds = Fds()
                del self._output[:sent]
            except OSError as error:
                if error.errno not in AGAIN:
                    raise
        self._poller.modify(self._sock.fileno(), select.EPOLLOUT if self._output else select.EPOLLIN)
        return not self._output

    def _adopt_channel(self) -> None:
        """Take up the socket of SET_BACKEND_REQ_FD when it has come, and say what is to be said on it."""
        fd = self.session.take_backend_fd()
        if fd >= 0:
            if self._channel is not None:
                self._channel.close()
            self._channel = _Channel(fd, self.session, self._poller, self._trace, self._watch_misses)
            self.session.on_backend_output = self._channel.flush
        if self._channel is not None:
            self._channel.flush()

    def _watch_misses(self) -> None:
        """Wait for misses while the front end can be told of one; they wait in the device otherwise."""
        fd = self._device.iotlb_fd if self.alive and self.session.takes_misses else -1
        if fd != self._misses_fd:
            self._poller.unregister(self._misses_fd)
            if fd >= 0:
                self._poller.register(fd, select.EPOLLIN, self._on_miss)
            self._misses_fd = fd

    def _on_miss(self, mask: int) -> None:
        self.session.announce()
        if self._channel is not None:
            self._channel.flush()

    def _trace(self, message: Message) -> None:
        if _log.isEnabledFor(TRACE):
            _log.log(TRACE, "%s: %s", self.label, describe(message, self._device.virtio_id))

    def _trace_bytes(self, stream: Stream, data: bytes, fds: Fds) -> None:
        if _log.isEnabledFor(TRACE):
            message = decode_one(stream, data)
            message.fds = fds
            self._trace(message)


class _Channel:
    """The socket of SET_BACKEND_REQ_FD: requests of ours out, acknowledgements in."""

    def __init__(
        self,
        fd: int,
        session: BackendSession,
        poller: Poller,
        trace: Callable[[Message], None],
        changed: Callable[[], None],
    ) -> None:
        """`changed`: called when it may take more than before, or less."""
        self._session = session
        self._changed = changed
        self._poller = poller
        self._trace = trace
        self._sock = socket.socket(fileno=fd)
        self._sock.setblocking(False)
        self._decoder = Decoder(Stream.BACKEND_REPLY)
        poller.register(fd, select.EPOLLIN, self._on_event)

    def close(self) -> None:
        """Close it; nothing happens the second time."""
        if self._sock.fileno() >= 0:
            self._poller.unregister(self._sock.fileno())
            self._sock.close()
            self._decoder.close()

    def flush(self) -> None:
        """Send what the session has to say."""
        output = self._session.backend_output
        try:
            for _ in range(MESSAGES_A_TURN):
                if not output or self._sock.fileno() < 0:
                    break
                if _log.isEnabledFor(TRACE) and len(output) >= HEADER_SIZE:
                    self._trace(decode_one(Stream.BACKEND_REQUEST, bytes(output)))
                del output[: host_fds.send(self._sock, output)]
                self._session.announce()
        except OSError as error:
            if error.errno not in AGAIN:
                self._broken(error.strerror or str(error))
                return
        if self._sock.fileno() >= 0:
            self._poller.modify(self._sock.fileno(), select.EPOLLIN | (select.EPOLLOUT if output else 0))
        self._changed()

    def _on_event(self, mask: int) -> None:
        try:
            for _ in range(MESSAGES_A_TURN):
                data, fds = host_fds.recv(self._sock, self._decoder.wanted)
                if not data:
                    host_fds.close_all(fds)
                    self._decoder.end()
                    self._broken("")
                    return
                message = self._decoder.feed(data, fds)
                if message is not None:
                    self._trace(message)
                    self._session.receive_backend_reply(message)
        except CodecError as fault:
            self._broken(str(fault))
            return
        except OSError as error:
            if error.errno not in AGAIN:
                self._broken(error.strerror or str(error))
                return
        self.flush()

    def _broken(self, why: str) -> None:
        """The front end goes on without being told of changes: the rings don't depend on it."""
        if why:
            _log.warning("%s: the socket of SET_BACKEND_REQ_FD: %s", self._session.label, why)
        self.close()
        self._session.backend_channel_closed()
        self._changed()
