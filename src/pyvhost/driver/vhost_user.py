"""A vhost-user front end over a Unix socket: what a hypervisor does to a back end, one call a message.

Methods are the protocol's requests by name. Every one waits for its answer where one is due: an
acknowledgement too, wherever REPLY_ACK was negotiated. `send` puts any bytes and descriptors on the wire,
for back ends that must stand them.

Promises: every wait ends after the timeout. What the other side does wrong is DeviceError (RefusedError when
it says that a request failed, BackendGoneError when it hangs up), and names the request. Never: starts a
thread; reads the backend's own requests unless asked (`backend_request`).
"""

from __future__ import annotations

import errno
import os
import socket
import struct
from collections.abc import Sequence
from types import TracebackType
from typing import Self

from pyvhost.abi import vhost_user as abi
from pyvhost.abi.vhost_user import Request
from pyvhost.driver.errors import BackendGoneError, DeviceError, DriverError, RefusedError
from pyvhost.driver.memory import Region
from pyvhost.driver.queue import Queue
from pyvhost.host import fds as host_fds
from pyvhost.vhost_user import frontend as protocol
from pyvhost.vhost_user.codec import Decoder, Message, Stream, request_name
from pyvhost.vhost_user.payloads import (
    U64,
    CodecError,
    Config,
    Log,
    MemReg,
    MemTable,
    Payload,
    VringAddr,
    VringFile,
    VringState,
)
from pyvhost.vhost_user.payloads import Region as TableRegion

PROTOCOL_FEATURES = (
    1 << abi.PROTOCOL_F_MQ
    | 1 << abi.PROTOCOL_F_RARP
    | 1 << abi.PROTOCOL_F_REPLY_ACK
    | 1 << abi.PROTOCOL_F_MTU
    | 1 << abi.PROTOCOL_F_BACKEND_REQ
    | 1 << abi.PROTOCOL_F_CONFIG
    | 1 << abi.PROTOCOL_F_BACKEND_SEND_FD
    | 1 << abi.PROTOCOL_F_RESET_DEVICE
    | 1 << abi.PROTOCOL_F_CONFIGURE_MEM_SLOTS
    | 1 << abi.PROTOCOL_F_STATUS
)
"""What a front end asks for when it is not told."""

_BIT_30 = 1 << abi.F_PROTOCOL_FEATURES


class VhostUserFrontend:
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

    # --- the device as a whole ---------------------------------------------------------------------------

    def set_owner(self) -> None:
        self.request(Request.SET_OWNER)

    def reset_owner(self) -> None:
        self.request(Request.RESET_OWNER)

    def reset_device(self) -> None:
        self.request(Request.RESET_DEVICE)

    def get_features(self) -> int:
        return self._number(Request.GET_FEATURES)

    def set_features(self, features: int) -> None:
        self.features = features
        self.request(Request.SET_FEATURES, U64(features))

    def get_protocol_features(self) -> int:
        return self._number(Request.GET_PROTOCOL_FEATURES)

    def set_protocol_features(self, features: int) -> None:
        self.request(Request.SET_PROTOCOL_FEATURES, U64(features))

    def get_queue_num(self) -> int:
        """How many queues (for net: pairs) there are; 1 without the protocol feature MQ."""
        if not self.has(abi.PROTOCOL_F_MQ):
            return 1
        return self._number(Request.GET_QUEUE_NUM)

    def set_status(self, status: int) -> None:
        """Virtio's device status. Nothing is sent without the protocol feature STATUS."""
        if self.has(abi.PROTOCOL_F_STATUS):
            self.request(Request.SET_STATUS, U64(status))

    def get_status(self) -> int:
        return self._number(Request.GET_STATUS)

    def get_config(self, offset: int, size: int) -> bytes:
        """`size` bytes of the configuration space, from `offset`."""
        answer = self.request(Request.GET_CONFIG, Config(offset, 0, bytes(size)))
        assert isinstance(answer, Config)
        if (answer.offset, answer.size) != (offset, size):
            raise DeviceError(
                f"GET_CONFIG of {size} bytes at {offset} was answered with {answer.size} bytes at {answer.offset}"
            )
        return answer.data

    def set_config(self, offset: int, data: bytes, flags: int = abi.SET_CONFIG_TYPE_FRONTEND) -> None:
        self.request(Request.SET_CONFIG, Config(offset, flags, data))

    def send_rarp(self, mac: bytes) -> None:
        self.request(Request.SEND_RARP, U64(int.from_bytes(mac + b"\0\0", "little")))

    def net_set_mtu(self, mtu: int) -> None:
        self.request(Request.NET_SET_MTU, U64(mtu))

    def set_log_base(self, size: int, offset: int, fd: int) -> None:
        """Where the dirty log lies, in bytes of a file."""
        self.request(Request.SET_LOG_BASE, Log(size, offset), [fd])

    def set_log_fd(self, fd: int) -> None:
        self.request(Request.SET_LOG_FD, None, [fd])

    # --- memory --------------------------------------------------------------------------------------------

    def set_mem_table(self, regions: Sequence[Region]) -> None:
        """The whole table; more regions than one message holds are added one by one."""
        fit = regions if len(regions) <= abi.MEMORY_BASELINE_NREGIONS else ()
        if regions and not fit and not self.has(abi.PROTOCOL_F_CONFIGURE_MEM_SLOTS):
            raise DriverError(f"{len(regions)} regions need the protocol feature CONFIGURE_MEM_SLOTS")
        if not regions or fit:
            table = MemTable(tuple(_row(region) for region in fit))
            self.request(Request.SET_MEM_TABLE, table, [region.fd for region in fit])
            return
        for region in regions:
            self.add_mem_reg(region)

    def get_max_mem_slots(self) -> int:
        return self._number(Request.GET_MAX_MEM_SLOTS)

    def add_mem_reg(self, region: Region) -> None:
        self.request(Request.ADD_MEM_REG, MemReg(_row(region)), [region.fd])

    def rem_mem_reg(self, region: Region) -> None:
        self.request(Request.REM_MEM_REG, MemReg(_row(region)))

    # --- rings ---------------------------------------------------------------------------------------------

    def set_vring_num(self, index: int, num: int) -> None:
        self.request(Request.SET_VRING_NUM, VringState(index, num))

    def set_vring_base(self, index: int, num: int) -> None:
        self.request(Request.SET_VRING_BASE, VringState(index, num))

    def get_vring_base(self, index: int) -> int:
        """Stops the ring; returns the next available index that the back end would have looked at."""
        answer = self.request(Request.GET_VRING_BASE, VringState(index, 0))
        assert isinstance(answer, VringState)
        if answer.index != index:
            raise DeviceError(f"GET_VRING_BASE of ring {index} was answered for ring {answer.index}")
        return answer.num

    def set_vring_addr(
        self,
        index: int,
        desc_user_addr: int,
        used_user_addr: int,
        avail_user_addr: int,
        *,
        flags: int = 0,
        log_guest_addr: int = 0,
    ) -> None:
        """User addresses, as the memory table has them."""
        addresses = VringAddr(index, flags, desc_user_addr, used_user_addr, avail_user_addr, log_guest_addr)
        self.request(Request.SET_VRING_ADDR, addresses)

    def set_vring_kick(self, index: int, fd: int = -1) -> None:
        """Starts the ring. -1 sends no descriptor: the back end polls."""
        self._vring_file(Request.SET_VRING_KICK, index, fd)

    def set_vring_call(self, index: int, fd: int = -1) -> None:
        self._vring_file(Request.SET_VRING_CALL, index, fd)

    def set_vring_err(self, index: int, fd: int = -1) -> None:
        self._vring_file(Request.SET_VRING_ERR, index, fd)

    def set_vring_enable(self, index: int, enable: bool) -> None:
        self.request(Request.SET_VRING_ENABLE, VringState(index, int(enable)))

    def _vring_file(self, request: Request, index: int, fd: int) -> None:
        self.request(request, VringFile(index, no_fd=fd < 0), [] if fd < 0 else [fd])

    # --- several at once ---------------------------------------------------------------------------------

    def has(self, bit: int) -> bool:
        """Whether a protocol feature, by its bit number, was negotiated."""
        return self.session.has(bit)

    def negotiate(self, features: int) -> int:
        """Own the device, and acknowledge those of `features` that it offers; returns them.

        Bit 30 goes by itself, unless `protocol_features` is 0 or the back end has none. With BACKEND_REQ
        negotiated the back end gets its channel.
        """
        self.set_owner()
        offered = self.get_features()
        acked = offered & features & ~_BIT_30
        if self.protocol_features and offered & _BIT_30:
            self.set_protocol_features(self.get_protocol_features() & self.protocol_features)
            if self.has(abi.PROTOCOL_F_BACKEND_REQ):
                self.set_backend_req_fd()
            self.set_features(acked | _BIT_30)
        else:
            self.set_features(acked)
        return acked

    def start_ring(self, index: int, queue: Queue, base: int | None = None) -> None:
        """Everything that ring `index` needs to run; `base` None is its used index, as it stands in memory.

        The kick descriptor, which starts the ring, comes last, and then enabling, where bit 30 was
        negotiated.
        """
        ring = queue.ring
        user = ring.memory.user_address
        self.set_vring_num(index, ring.size)
        self.set_vring_base(index, ring.used_idx if base is None else base)
        self.set_vring_addr(index, user(ring.layout.desc), user(ring.layout.used), user(ring.layout.avail))
        self.set_vring_call(index, queue.call_fd)
        self.set_vring_err(index, queue.err_fd)
        self.set_vring_kick(index, queue.kick_fd)
        if self.features & _BIT_30:
            self.set_vring_enable(index, True)

    def stop_ring(self, index: int) -> int:
        """Disable the ring where it can be, and stop it; returns its base."""
        if self.features & _BIT_30:
            self.set_vring_enable(index, False)
        return self.get_vring_base(index)

    def sync(self) -> None:
        """Wait until everything sent before was dealt with; GET_FEATURES does for this, and is always
        answered.
        """
        self.get_features()

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
        if self._channel is None:
            raise DriverError("the back end has no channel: BACKEND_REQ was not negotiated")
        self._channel.settimeout(self.timeout if timeout is None else timeout)
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


def _row(region: Region) -> TableRegion:
    return TableRegion(region.guest_phys_addr, region.memory_size, region.userspace_addr, region.mmap_offset)
