"""One front end's connection: its sockets, between the control loop and a `BackendSession`.

A message that stops a ring waits until the device has ended what the ring began, and one that gives memory until
what a former front end's rings began in the same memory has ended: the driver may use it for something else as soon
as it is answered, and the host would still write into it.

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
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from pyvhost.host import fds as host_fds
from pyvhost.host.poller import Poller, Timer
from pyvhost.host.unix_socket import peer_of, peer_pid
from pyvhost.memory.regions import file_of
from pyvhost.vhost_user.backend import LOST_MEMORY, BackendSession, Reply, SessionError
from pyvhost.vhost_user.codec import HEADER_SIZE, Decoder, Fds, Message, Stream, decode_one
from pyvhost.vhost_user.describe import TRACE, describe, summary
from pyvhost.vhost_user.device import Device
from pyvhost.vhost_user.hints import MEMORY, private_memory
from pyvhost.vhost_user.payloads import CodecError

#: Messages that one front end is served in a row before others have their turn.
MESSAGES_A_TURN = 64

#: How often a front end that waits for the device is looked at, in seconds, if the device says nothing by itself.
LOOK: Final = 0.25
#: After how long the log says that it waits, and how often then.
TELL: Final = 5.0
TELL_AGAIN: Final = 60.0

#: What a non-blocking socket says when there is nothing to do.
AGAIN = (errno.EAGAIN, errno.EWOULDBLOCK, errno.EINTR)

_log = logging.getLogger(__name__)


@dataclass
class _Wait:
    """What waits for the device to end something: `then` is due when `ask` says nothing any more."""

    what: str
    ask: Callable[[], str]
    then: Callable[[], None]
    fds: list[Fds]
    since: float
    tell: float
    told: bool = False


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
        self._waiting: _Wait | None = None
        self._look: Timer | None = None
        # A device may notice a change on any thread; the session belongs to the control thread.
        device.config_changed = lambda: poller.call_soon_threadsafe(self.session.config_changed)
        device.memory_lost = lambda: self.end(f"{LOST_MEMORY}; its connection ends", logging.ERROR)
        poller.register(sock.fileno(), select.EPOLLIN, self._on_event)
        _log.info("%s attached to %s", self.label, device.name)

    def serve(self, messages: int = MESSAGES_A_TURN) -> bool:
        """Do what has arrived, `messages` at most; whether the front end is still there."""
        try:
            for _ in range(messages):
                if not (self.alive and self._through() and self._flush() and self._serve_one()):
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
        for fds in self._waiting.fds if self._waiting is not None else ():
            fds.close()
        self._waiting = None
        if self._look is not None:
            self._look.cancel()
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
        stops = self.session.stops(message)
        gives = {file_of(fd) for fd in message.fds} if message.request in MEMORY else set()
        self._when(
            lambda: f"{summary(message, self._device.virtio_id)} is obeyed",
            lambda: self._device.under_way(stops, former=gives) if stops or gives else "",
            lambda: self._obey(message),
            [message.fds],
        )
        return self._waiting is None

    def _obey(self, message: Message) -> None:
        replies = self.session.receive(message)
        self._when(
            lambda: f"{summary(message, self._device.virtio_id)} is answered",
            lambda: self._device.under_way(()),
            lambda: self._answer(replies),
            [reply.fds for reply in replies],
        )

    def _answer(self, replies: list[Reply]) -> None:
        for reply in replies:
            # Nothing else waits to be sent: `serve` reads the next message when all of this has gone.
            self._trace_bytes(Stream.REPLY, reply.data, reply.fds)
            self._output += reply.data
            self._output_fds = reply.fds
        self._adopt_channel()
        self._watch_misses()
        self._flush()

    def _when(
        self,
        what: Callable[[], str],
        ask: Callable[[], str],
        then: Callable[[], None],
        fds: Sequence[Fds] = (),
    ) -> None:
        """Does `then` when `ask` says of nothing that it is under way; until then no message is read."""
        # A device that is asked has to know whom to tell.
        self._device.progress = lambda: self._poller.call_soon_threadsafe(self._look_again)
        if not ask():
            self._device.progress = None
            then()
            return
        now = time.monotonic()
        self._waiting = _Wait(what(), ask, then, list(fds), now, now + TELL)
        # Only its end is heard of.
        self._poller.modify(self._sock.fileno(), 0)
        self._look = self._poller.call_later(LOOK, self._look_again)

    def _look_again(self) -> None:
        if self.alive and self._waiting is not None:
            self.serve()

    def _through(self) -> bool:
        """Whether nothing waits for the device any more; goes on with what did."""
        waiting = self._waiting
        if waiting is None:
            return True
        if _hung_up(self._sock):
            self.end("it left")
            return False
        under_way, now = waiting.ask(), time.monotonic()
        if under_way:
            if now >= waiting.tell:
                waiting.told, waiting.tell = True, now + TELL_AGAIN
                _log.warning(
                    "%s: %s: %s since %d s; no sooner %s",
                    *(self.label, self._device.name, under_way, now - waiting.since, waiting.what),
                )
            if self._look is None or not self._look.pending:
                self._look = self._poller.call_later(LOOK, self._look_again)
            return False
        if waiting.told:
            _log.warning(
                "%s: %s: that has ended, after %d s", self.label, self._device.name, now - waiting.since
            )
        self._waiting = None
        if self._look is not None:
            self._look.cancel()
        self._device.progress = None
        waiting.then()
        return self._waiting is None

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


def _hung_up(sock: socket.socket) -> bool:
    """Whether the other end has closed it, whatever is still to be read."""
    poll = select.poll()
    poll.register(sock, 0)
    return bool(poll.poll(0))


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
