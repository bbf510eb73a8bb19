"""A guest's vsock sockets (virtio 1.3, 5.10.6): connections and listeners of a `VsockDriver`.

Promises: data comes out as it went in, bytes of a stream in order, messages of a SEQPACKET whole and apart; never
more is sent than the other side has room for; room is given back as it is read; every wait ends after its timeout;
a device that sends more than it was granted is DeviceError. Never: starts a thread, or touches a ring itself.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Final, NamedTuple

from pyvhost.abi import virtio_vsock as abi
from pyvhost.driver.errors import DeviceError
from pyvhost.driver.vsock_packet import PAYLOAD_MAX, Packet

if TYPE_CHECKING:
    from pyvhost.driver.vsock import VsockDriver

_U32: Final = 0xFFFFFFFF
_BOTH: Final = abi.SHUTDOWN_RCV | abi.SHUTDOWN_SEND


class Key(NamedTuple):
    """What tells connections of one guest apart: socket type, own port, the other side."""

    type: int
    port: int
    peer_cid: int
    peer_port: int


class Message(NamedTuple):
    """A SEQPACKET message, and whether it ends a record (MSG_EOR)."""

    data: bytes
    eor: bool


class VsockSocket:
    """One connection. `VsockDriver.connect` and `Listener.accept` make them.

    `auto_credit` unset: reading gives back no room until `update_credit`. `fwd_cnt` and `buf_alloc` are this side's,
    as the next packet says them; `peer_fwd_cnt` and `peer_buf_alloc` as the other side's last one did.
    """

    def __init__(self, driver: VsockDriver, key: Key, buf_alloc: int) -> None:
        self.driver = driver
        self.key = key
        self.buf_alloc = buf_alloc
        self.auto_credit = True
        self.connected = False
        #: The other side said RST, or never accepted.
        self.reset = False
        #: This side has let go of it; nothing more is sent or taken.
        self.closed = False
        #: SHUTDOWN_* flags that the other side sent, and that this side sent.
        self.peer_shutdown = 0
        self.own_shutdown = 0
        self.tx_cnt = 0
        self.peer_buf_alloc = 0
        self.peer_fwd_cnt = 0
        self.fwd_cnt = 0
        #: Bytes that came, read or not.
        self.received = 0
        #: Packets that came, by op.
        self.counts: dict[int, int] = {}
        self._told_fwd_cnt = 0
        self._parts: deque[tuple[bytes, int]] = deque()

    # --- what the application does -------------------------------------------------------------------------

    def wait_connected(self, timeout: float | None = None) -> None:
        """Wait until the other side accepts. ConnectionRefusedError: it does not; TimeoutError."""
        self._wait(lambda: self.connected or self.reset, "RESPONSE", timeout)
        if self.reset and not self.connected:
            raise ConnectionRefusedError(f"{self}: reset")

    @property
    def credit(self) -> int:
        """How many bytes the other side has room for."""
        return self.peer_buf_alloc - ((self.tx_cnt - self.peer_fwd_cnt) & _U32)

    def send(self, data: bytes, *, eor: bool = False, timeout: float | None = None) -> None:
        """Send all of `data`, on a SEQPACKET socket as one message; waits for credit as need be.

        BrokenPipeError: the other side takes nothing more, or this one has shut down; ConnectionResetError.
        """
        view = memoryview(data)
        seqpacket = self.key.type == abi.TYPE_SEQPACKET
        while True:
            if view:
                self._wait(lambda: self.credit > 0 or self._broken(), "credit", timeout)
            self._check_writable()
            piece = view[: min(self.credit, PAYLOAD_MAX)] if view else view
            view = view[len(piece) :]
            flags = 0
            if seqpacket and not view:
                flags = abi.SEQ_EOM | (abi.SEQ_EOR if eor else 0)
            if piece or seqpacket:
                self.packet(abi.OP_RW, bytes(piece), flags)
                self.tx_cnt = (self.tx_cnt + len(piece)) & _U32
            if not view:
                return

    def recv(self, size: int, timeout: float | None = None) -> bytes:
        """Up to `size` bytes of a stream, at least one; b"" at its end. ConnectionResetError, TimeoutError."""
        self._wait(lambda: bool(self._parts) or self._ended(), "data", timeout)
        if not self._parts:
            if self.reset and not self.peer_shutdown & abi.SHUTDOWN_SEND:
                raise ConnectionResetError(f"{self}: reset")
            return b""
        taken = bytearray()
        while self._parts and len(taken) < size:
            data, flags = self._parts.popleft()
            left = size - len(taken)
            taken += data[:left]
            if len(data) > left:
                self._parts.appendleft((data[left:], flags))
        self._read(len(taken))
        return bytes(taken)

    def recv_exactly(self, size: int, timeout: float | None = None) -> bytes:
        """`size` bytes of a stream. EOFError: it ended before."""
        data = bytearray()
        while len(data) < size:
            more = self.recv(size - len(data), timeout)
            if not more:
                raise EOFError(f"{self}: ended after {len(data)} of {size} bytes")
            data += more
        return bytes(data)

    def recv_message(self, timeout: float | None = None) -> Message | None:
        """The next message of a SEQPACKET; None at the end. Its room is given back packet by packet."""
        data = bytearray()
        while True:
            self._wait(lambda: bool(self._parts) or self._ended(), "message", timeout)
            if not self._parts:
                if self.reset and not self.peer_shutdown & abi.SHUTDOWN_SEND:
                    raise ConnectionResetError(f"{self}: reset")
                return None
            part, flags = self._parts.popleft()
            data += part
            self._read(len(part))
            if flags & abi.SEQ_EOM:
                return Message(bytes(data), bool(flags & abi.SEQ_EOR))

    @property
    def pending(self) -> int:
        """Bytes that came and were not read."""
        return sum(len(data) for data, _ in self._parts)

    def shutdown(self, flags: int) -> None:
        """Shut down one direction or both (SHUTDOWN_RCV, SHUTDOWN_SEND)."""
        self.own_shutdown |= flags
        self.packet(abi.OP_SHUTDOWN, flags=flags)

    def close(self, timeout: float | None = None) -> None:
        """SHUTDOWN both ways, and wait until the other side confirms by RST. TimeoutError: it does not."""
        if not self.reset:
            self.shutdown(_BOTH)
            self._wait(lambda: self.reset, "RST", timeout)
        self.forget()

    def abort(self) -> None:
        """RST, and forget it."""
        if not self.reset:
            self.packet(abi.OP_RST)
        self.forget()

    def forget(self) -> None:
        """Know nothing of it any more; nothing is sent."""
        self.closed = True
        self.driver.sockets.pop(self.key, None)

    def update_credit(self) -> None:
        """Tell the other side how much room there is."""
        self.packet(abi.OP_CREDIT_UPDATE)

    def request_credit(self) -> None:
        """Ask the other side how much room it has."""
        self.packet(abi.OP_CREDIT_REQUEST)

    def packet(self, op: int, payload: bytes = b"", flags: int = 0, *, length: int | None = None) -> None:
        """Send any packet on this connection, with its true credit; nothing is checked or counted."""
        self._told_fwd_cnt = self.fwd_cnt
        self.driver.send_packet(self._made(op, payload, flags, length))

    # --- what the driver does ------------------------------------------------------------------------------

    def take(self, packet: Packet) -> None:
        """A packet has come for it."""
        self.counts[packet.op] = self.counts.get(packet.op, 0) + 1
        self.peer_buf_alloc = packet.buf_alloc
        self.peer_fwd_cnt = packet.fwd_cnt
        if packet.op == abi.OP_RESPONSE:
            if self.connected:
                raise DeviceError(f"{self}: a second RESPONSE: {packet}")
            self.connected = True
        elif packet.op == abi.OP_RST:
            self._over()
        elif packet.op == abi.OP_SHUTDOWN:
            self.peer_shutdown |= packet.flags & _BOTH
            self._answer_shutdown()
        elif packet.op == abi.OP_CREDIT_REQUEST:
            self.update_credit()
        elif packet.op == abi.OP_RW:
            self._take_data(packet)

    def transport_reset(self) -> None:
        """The device lost what it knew (5.10.6.7)."""
        self._over()

    def _take_data(self, packet: Packet) -> None:
        if not self.connected:
            raise DeviceError(f"{self}: data before RESPONSE: {packet}")
        if self.peer_shutdown & abi.SHUTDOWN_SEND:
            raise DeviceError(f"{self}: data after SHUTDOWN: {packet}")
        self.received += len(packet.payload)
        # What it has been told is all that it may know.
        out = (self.received - self._told_fwd_cnt) & _U32
        if out > self.buf_alloc:
            raise DeviceError(f"{self}: {out} bytes came where {self.buf_alloc} were granted: {packet}")
        if packet.payload or self.key.type == abi.TYPE_SEQPACKET:
            self._parts.append((packet.payload, packet.flags))

    def _read(self, count: int) -> None:
        self.fwd_cnt = (self.fwd_cnt + count) & _U32
        # As Linux does: before the other side believes that less than a packet's room is left.
        untold = (self.fwd_cnt - self._told_fwd_cnt) & _U32
        low = self.buf_alloc - untold < min(PAYLOAD_MAX, self.buf_alloc // 2)
        if self.auto_credit and low and not self.reset:
            self.update_credit()
        if not self._parts:
            self._answer_shutdown()

    def _answer_shutdown(self) -> None:
        """The other side has closed, and all that it sent is read: it waits for RST."""
        if self.peer_shutdown == _BOTH and not self._parts and not self.reset:
            self.packet(abi.OP_RST)
            self._over()

    def _over(self) -> None:
        self.reset = True
        self.driver.sockets.pop(self.key, None)

    def _ended(self) -> bool:
        return self.reset or bool(self.peer_shutdown & abi.SHUTDOWN_SEND)

    def _broken(self) -> bool:
        return self.reset or bool(self.peer_shutdown & abi.SHUTDOWN_RCV)

    def _check_writable(self) -> None:
        if self.reset and not self.peer_shutdown:
            raise ConnectionResetError(f"{self}: reset")
        if self._broken() or self.own_shutdown & abi.SHUTDOWN_SEND:
            raise BrokenPipeError(f"{self}: shut down")

    def _made(self, op: int, payload: bytes, flags: int, length: int | None) -> Packet:
        key = self.key
        return Packet(
            op,
            self.driver.guest_cid,
            key.peer_cid,
            key.port,
            key.peer_port,
            payload,
            key.type,
            flags,
            self.buf_alloc,
            self.fwd_cnt,
            length,
        )

    def _wait(self, ready: Callable[[], bool], what: str, timeout: float | None) -> None:
        self.driver.wait_for(ready, f"{what} on {self}", timeout)

    def __str__(self) -> str:
        key = self.key
        kind = "stream" if key.type == abi.TYPE_STREAM else "seqpacket"
        return f"{kind} {self.driver.guest_cid}:{key.port} - {key.peer_cid}:{key.peer_port}"


class Listener:
    """A port that takes connections of one type, up to `backlog` that nobody has accepted yet."""

    def __init__(self, driver: VsockDriver, port: int, type_: int, backlog: int) -> None:
        self.driver = driver
        self.port = port
        self.type = type_
        self.backlog = backlog
        self.waiting: deque[VsockSocket] = deque()

    def accept(self, timeout: float | None = None) -> VsockSocket:
        """The next connection; waits for it. TimeoutError: none came."""
        self.driver.wait_for(lambda: bool(self.waiting), f"connection to port {self.port}", timeout)
        return self.waiting.popleft()

    def close(self) -> None:
        """Take no more."""
        self.driver.listeners.pop((self.type, self.port), None)
