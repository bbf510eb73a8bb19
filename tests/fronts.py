"""Front ends for tests: one that talks to a session, one that talks to a server over a socket."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable

from pyvhost.abi import vhost_user as abi
from pyvhost.abi.vhost_user import Request
from pyvhost.vhost_user.backend import BackendSession
from pyvhost.vhost_user.codec import Decoder, Fds, Message, Stream, decode_one, encode
from pyvhost.vhost_user.payloads import U64, Payload, VringFile, VringState
from pyvhost.vhost_user.server import Server
from recording_device import FEATURES, RecordingDevice, spare_fd

BIT_30 = 1 << abi.F_PROTOCOL_FEATURES


class Talk:
    """A front end that says one thing after another to a session."""

    def __init__(self, device: RecordingDevice) -> None:
        self.device = device
        self.session = BackendSession(device)
        #: What rode with the last answer to `say`; whoever takes it closes it.
        self.answer_fds = Fds()

    def raw(self, data: bytes, fds: list[int] | None = None) -> list[Message]:
        decoder = Decoder(Stream.REQUEST)
        message = decoder.feed(data[:12], fds or [])
        if message is None:
            message = decoder.feed(data[12:])
        assert message is not None
        answers = []
        for reply in self.session.receive(message):
            answer = decode_one(Stream.REPLY, reply.data)
            answer.fds = reply.fds
            answers.append(answer)
        return answers

    def say(
        self,
        request: int,
        payload: Payload | None = None,
        *,
        fds: list[int] | None = None,
        need_reply: bool = False,
    ) -> Payload | str | None:
        """The answer's payload; "silence" if there was none."""
        flags = abi.FLAG_NEED_REPLY if need_reply else 0
        answers = self.raw(encode(request, payload, flags=flags), fds)
        if not answers:
            return "silence"
        (answer,) = answers
        self.answer_fds, answer.fds = answer.fds, Fds()
        assert answer.request == request
        assert answer.flags == abi.VERSION | abi.FLAG_REPLY, "UML wants exactly this"
        return answer.payload

    def negotiate(self, bits: int) -> None:
        assert self.say(Request.SET_PROTOCOL_FEATURES, U64(bits)) == "silence"

    def kick(self, index: int) -> None:
        self.say(Request.SET_VRING_KICK, VringFile(index), fds=[spare_fd()])

    def enable(self, index: int, on: bool = True) -> None:
        self.say(Request.SET_VRING_ENABLE, VringState(index, int(on)))


def until(server: Server, condition: Callable[[], object]) -> None:
    """Let the loop go round until something is so; a loop that hangs fails by its own silence."""
    for _ in range(200):
        if condition():
            return
        server.poller.run_once(1.0)
    raise AssertionError("it did not come to that")


def until_resets(server: Server, device: RecordingDevice, count: int) -> None:
    """Let the loop go round until the device has seen `count` front ends leave."""
    until(server, lambda: device.resets == count)


class Front:
    """A front end's socket."""

    def __init__(self, server: Server, sock: socket.socket) -> None:
        self.server = server
        self.sock = sock
        sock.setblocking(False)
        self.decoder = Decoder(Stream.REPLY)

    @classmethod
    def at(cls, server: Server, path: str) -> Front:
        sock = socket.socket(socket.AF_UNIX)
        sock.connect(path)
        return cls(server, sock)

    def send(self, data: bytes, fds: list[int] | None = None) -> None:
        """The descriptors are given away."""
        if fds:
            socket.send_fds(self.sock, [data], fds)
            for fd in fds:
                os.close(fd)
        else:
            self.sock.sendall(data)

    def reply(self) -> Message | None:
        """The next reply if it is there by now."""
        while True:
            try:
                data = self.sock.recv(self.decoder.wanted)
            except BlockingIOError:
                return None
            assert data, "the connection ended instead"
            message = self.decoder.feed(data)
            if message is not None:
                return message

    def ask(self, request: int, payload: Payload | None = None, *, flags: int = 0) -> Payload | None:
        self.send(encode(request, payload, flags=flags))
        found: list[Message] = []

        def answered() -> bool:
            message = self.reply()
            if message is not None:
                found.append(message)
            return bool(found)

        until(self.server, answered)
        return found[0].payload

    def gone(self) -> bool:
        """Whether the back end has closed the connection."""
        try:
            return self.sock.recv(1) == b""
        except BlockingIOError:
            return False
        except ConnectionError:
            return True

    def close(self) -> None:
        self.sock.close()


def hello(server: Server, path: str) -> Front:
    front = Front.at(server, path)
    assert front.ask(Request.GET_FEATURES) == U64(FEATURES | BIT_30)
    return front
