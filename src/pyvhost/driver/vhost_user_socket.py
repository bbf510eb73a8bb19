"""A vhost-user front end's connection: messages sent and received, and who waits for which.

`VhostUserFrontend` gives the requests their names; this knows what a request, a reply and the back end's own
channel are. `send` puts any bytes and descriptors on the wire, for back ends that must stand them.

Promises: every wait ends after the timeout. What the other side does wrong is DeviceError (RefusedError when
it says that a request failed, BackendGoneError when it hangs up), and names the request. Never: starts a
thread; reads the backend's own requests unless asked (`backend_request`, `take_miss`).
"""

from __future__ import annotations

import errno
import os
import select
import socket
import struct
from collections import deque
from collections.abc import Sequence
from types import TracebackType
from typing import Self

from pyvhost.abi import vhost
from pyvhost.abi import vhost_user as abi
from pyvhost.abi.vhost_user import BackendRequest, Request
from pyvhost.driver.errors import BackendGoneError, DeviceError, DriverError, RefusedError
from pyvhost.driver.iommu import Miss
from pyvhost.host import fds as host_fds
from pyvhost.vhost_user import frontend as protocol
from pyvhost.vhost_user.codec import Decoder, Message, Stream, request_name
from pyvhost.vhost_user.payloads import U64, CodecError, Iotlb, Payload

PROTOCOL_FEATURES = (
    1 << abi.PROTOCOL_F_MQ
    | 1 << abi.PROTOCOL_F_LOG_SHMFD
    | 1 << abi.PROTOCOL_F_RARP
    | 1 << abi.PROTOCOL_F_REPLY_ACK
    | 1 << abi.PROTOCOL_F_MTU
    | 1 << abi.PROTOCOL_F_BACKEND_REQ
    | 1 << abi.PROTOCOL_F_CROSS_ENDIAN
    | 1 << abi.PROTOCOL_F_CONFIG
    | 1 << abi.PROTOCOL_F_BACKEND_SEND_FD
    | 1 << abi.PROTOCOL_F_INFLIGHT_SHMFD
    | 1 << abi.PROTOCOL_F_RESET_DEVICE
    | 1 << abi.PROTOCOL_F_CONFIGURE_MEM_SLOTS
    | 1 << abi.PROTOCOL_F_STATUS
)
"""What a front end asks for when it is not told."""


class VhostUserSocket:
    """One connection to a back end; `timeout`, in seconds, bounds each wait for it.

    `protocol_features` is what `negotiate` asks for of these; 0 does without them.
    """

    def __init__(
        self, connection: socket.socket, *, timeout: float = 10.0, protocol_features: int = PROTOCOL_FEATURES
    ) -> None:
        self.socket = connection
        self.protocol_features = protocol_features
        self.timeout = timeout
        self.socket.settimeout(timeout)
        self.session = protocol.FrontendSession()
        self.features = 0
        self._decoder = Decoder(Stream.REPLY)
        self._channel: socket.socket | None = None
        self._channel_decoder = Decoder(Stream.BACKEND_REQUEST)
        self._asked: deque[Message] = deque()

    @classmethod
    def connect(
        cls,
        path: str | os.PathLike[str],
        *,
        timeout: float = 10.0,
        protocol_features: int = PROTOCOL_FEATURES,
    ) -> Self:
        """Dial a back end that listens at `path`. OSError as connect(2), with the path."""
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            # Not settimeout: a non-blocking connect to a listener whose queue is full fails at once (unix(7)).
            seconds, rest = divmod(timeout, 1)
            limit = struct.pack("@ll", int(seconds), int(rest * 1_000_000))
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)
            connection.connect(os.fspath(path))
        except OSError as error:
            connection.close()
            why = f"no back end to connect to: {error.strerror}"
            if error.errno == errno.EAGAIN:
                raise TimeoutError(
                    errno.ETIMEDOUT, f"nobody accepts within {timeout} s", os.fspath(path)
                ) from None
            raise OSError(error.errno, why, os.fspath(path)) from None
        return cls(connection, timeout=timeout, protocol_features=protocol_features)

    @classmethod
    def accept(cls, listener: socket.socket, *, timeout: float = 10.0) -> Self:
        """Take a back end that dials; `listener` stays the caller's. TimeoutError when none comes."""
        listener.settimeout(timeout)
        try:
            connection, _ = listener.accept()
        except TimeoutError:
            raise TimeoutError(f"no back end connected within {timeout} s") from None
        return cls(connection, timeout=timeout)

    # --- messages --------------------------------------------------------------------------------------

    def fileno(self) -> int:
        """The socket's descriptor."""
        return self.socket.fileno()

    def send(self, data: bytes, fds: Sequence[int] = ()) -> None:
        """Put these bytes on the wire as they are, the descriptors with the first of them."""
        try:
            sent = host_fds.send(self.socket, data, fds)
            if sent < len(data):
                self.socket.sendall(data[sent:])
        except (BrokenPipeError, ConnectionResetError):
            raise BackendGoneError("the back end closed the connection; nothing could be sent") from None

    def request(
        self,
        request: int,
        payload: Payload | None = None,
        fds: Sequence[int] = (),
        *,
        need_reply: bool | None = None,
    ) -> Payload | None:
        """Send one request, and return what it is answered with, if it is answered."""
        due = self.session.waiting
        self.send(self.session.request(request, payload, need_reply=need_reply), fds)
        if self.session.waiting == due:
            return None
        message = self.receive()
        with message.fds:
            return self._answer(message, request)

    def request_fd(self, request: int, payload: Payload | None = None) -> tuple[Payload | None, int]:
        """Send one request that is answered with a descriptor, now the caller's, or -1 if none came."""
        self.send(self.session.request(request, payload))
        message = self.receive()
        with message.fds:
            answer = self._answer(message, request)
            return answer, message.fds.take() if len(message.fds) else -1

    def receive(self) -> Message:
        """The next message of the back end's, whatever it is; its descriptors are the caller's to close."""
        return self._read(self.socket, self._decoder, "a reply")

    def wait_closed(self, timeout: float | None = None) -> None:
        """Wait until the back end hangs up; TimeoutError if it does not. Replies that come first are
        dropped.
        """
        self.socket.settimeout(self.timeout if timeout is None else timeout)
        try:
            while True:
                data, fds = host_fds.recv(self.socket, 4096, abi.MAX_FDS)
                host_fds.close_all(fds)
                if not data:
                    return
        except ConnectionResetError:
            return
        except TimeoutError:
            raise TimeoutError("the back end did not close the connection") from None
        finally:
            self.socket.settimeout(self.timeout)

    def _answer(self, message: Message, request: int) -> Payload | None:
        try:
            return self.session.receive(message)
        except protocol.RefusedError as error:
            raise RefusedError(str(error)) from None
        except protocol.FrontendError as error:
            raise DeviceError(f"after {request_name(Stream.REQUEST, request)}: {error}") from None

    @staticmethod
    def _read(connection: socket.socket, decoder: Decoder, what: str) -> Message:
        try:
            while True:
                data, fds = host_fds.recv(connection, decoder.wanted, abi.MAX_FDS)
                if not data:
                    decoder.end()
                    raise BackendGoneError(f"the back end closed the connection instead of sending {what}")
                message = decoder.feed(data, fds)
                if message is not None:
                    return message
        except ConnectionResetError:
            raise BackendGoneError(f"the back end reset the connection instead of sending {what}") from None
        except TimeoutError:
            waited = connection.gettimeout()
            raise TimeoutError(f"waited {waited} s for {what}, and the back end sent none") from None
        except CodecError as error:
            raise DeviceError(f"the back end sent what is no message: {error}") from None

    def _number(self, request: Request) -> int:
        answer = self.request(request)
        assert isinstance(answer, U64)
        return answer.value

    def has(self, bit: int) -> bool:
        """Whether a protocol feature, by its bit number, was negotiated."""
        return self.session.has(bit)

    # --- what the back end asks --------------------------------------------------------------------------

    def set_backend_req_fd(self) -> None:
        """Give the back end a channel of its own."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        with theirs:
            ours.settimeout(self.timeout)
            if self._channel is not None:
                self._channel.close()
            self._channel = ours
            self._channel_decoder = Decoder(Stream.BACKEND_REQUEST)
            self.request(Request.SET_BACKEND_REQ_FD, None, [theirs.fileno()])

    def backend_request(self, timeout: float | None = None, *, result: int = 0) -> Message:
        """Wait for the next request of the back end's; answer it with `result` if it wants an answer.

        Its descriptors are the caller's to close. TimeoutError after `timeout` seconds.
        """
        if self._asked:
            return self._asked.popleft()
        return self._asking(self.timeout if timeout is None else timeout, result)

    def iotlb_fileno(self) -> int:
        """The back end's channel, or -1 without one."""
        return -1 if self._channel is None else self._channel.fileno()

    def take_miss(self) -> Miss | None:
        """The next IOTLB miss, if there is one by now. What else the back end asked on its way is kept for
        `backend_request`.
        """
        while self._channel is not None and select.select([self._channel], [], [], 0)[0]:
            message = self._asking(self.timeout, 0)
            told = message.payload
            if message.request == BackendRequest.IOTLB_MSG and isinstance(told, Iotlb):
                if told.type == vhost.IOTLB_MISS:
                    return Miss(told.iova, told.perm)
                if told.type != vhost.IOTLB_ACCESS_FAIL:
                    raise DeviceError(f"the back end sent an IOTLB message of type {told.type}: {told}")
            self._asked.append(message)
        return None

    def _asking(self, timeout: float, result: int) -> Message:
        if self._channel is None:
            raise DriverError("the back end has no channel: BACKEND_REQ was not negotiated")
        self._channel.settimeout(timeout)
        message = self._read(self._channel, self._channel_decoder, "a request")
        answer = self.session.acknowledge(message, result)
        if answer:
            self._channel.sendall(answer)
        return message

    # --- the end -----------------------------------------------------------------------------------------

    def close(self) -> None:
        """Hang up; nothing happens the second time."""
        self._decoder.close()
        self._channel_decoder.close()
        for message in self._asked:
            message.fds.close()
        self._asked.clear()
        self.socket.close()
        if self._channel is not None:
            self._channel.close()
            self._channel = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
