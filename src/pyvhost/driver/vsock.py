"""A virtio-vsock driver in plain Python over any front end (virtio 1.3, 5.10): a guest's sockets, and its packets.

    memory = GuestMemory(64 << 20)
    frontend = VhostUserFrontend.connect("/run/vm0.sock")
    with VsockDriver(frontend, memory) as driver:
        driver.start()
        sock = driver.connect(1234)
        sock.send(b"hello")
        print(sock.recv(100))

Ring 0 receives, ring 1 transmits, ring 2 has events. Packets of connections that the driver knows go to them, a
REQUEST for a port that is listened on makes one; all else is kept for `stray`, and answered by RST if `answers`.
A test that plays a bad guest sends what it likes by `send_packet` and `send_raw`.

Promises: packets come out as they were put into the rings, in order; every wait ends after its timeout; what a device
may not do is DeviceError (a header that does not fit its buffer, data that nobody granted). Never: starts a thread,
or does anything between two calls: a guest that is not waited for is a guest that hangs.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from itertools import count
from typing import Final

from pyvhost.abi import virtio
from pyvhost.abi import virtio_vsock as abi
from pyvhost.driver.device_driver import DeviceDriver
from pyvhost.driver.errors import DeviceError, DriverError
from pyvhost.driver.front_end import FrontEnd
from pyvhost.driver.iommu import Iommu
from pyvhost.driver.memory import GuestMemory
from pyvhost.driver.queue import Queue
from pyvhost.driver.ring_parts import Buffer, RingLayout
from pyvhost.driver.vsock_packet import HEADER, Packet
from pyvhost.driver.vsock_socket import Key, Listener, VsockSocket

RX, TX, EVENT = 0, 1, 2
"""The queues' indices (5.10.2)."""

FEATURES: Final = (
    1 << virtio.F_VERSION_1
    | 1 << virtio.RING_F_EVENT_IDX
    | 1 << virtio.RING_F_INDIRECT_DESC
    | 1 << abi.F_STREAM
    | 1 << abi.F_SEQPACKET
)
"""What a driver asks for when it is not told."""

BUF_ALLOC: Final = 256 << 10
"""The room of a connection, in bytes, as Linux has it."""

_EVENT_SIZE: Final = 4
_FIRST_PORT: Final = 1024


class VsockDriver(DeviceDriver):
    """A driver for one vsock device; what it shares with others is in `DeviceDriver`.

    `rx_buffers` says what a receive chain is made of, in bytes: by default a header's and 4096, as Linux 6.1 has it;
    `rx_depth` how many are posted (None: as many as the ring takes). `tx_cut` cuts a packet's bytes (how many) into
    descriptors; `indirect` puts them into tables of their own. `buf_alloc` is the room of a connection. `answers`:
    what nobody knows gets RST, as Linux does it.
    """

    def __init__(
        self,
        frontend: FrontEnd,
        memory: GuestMemory,
        ring_size: int = 128,
        features: int = FEATURES,
        *,
        rx_buffers: Sequence[int] = (HEADER, 4096),
        rx_depth: int | None = None,
        tx_cut: Callable[[int], Sequence[int]] | None = None,
        indirect: bool = False,
        event_buffers: int = 8,
        buf_alloc: int = BUF_ALLOC,
        answers: bool = True,
        allocate: Callable[[int], int] | None = None,
        layout: Callable[[int], RingLayout] | None = None,
        iommu: Iommu | None = None,
        timeout: float = 10.0,
    ) -> None:
        super().__init__(
            frontend,
            memory,
            ring_size,
            features,
            allocate=allocate,
            layout=layout,
            iommu=iommu,
            timeout=timeout,
        )
        self.rx: Queue
        self.tx: Queue
        self.event: Queue
        self.guest_cid = 0
        self.buf_alloc = buf_alloc
        self.answers = answers
        self.sockets: dict[Key, VsockSocket] = {}
        self.listeners: dict[tuple[int, int], Listener] = {}
        #: How many times the device said that its connections are gone.
        self.transport_resets = 0
        self.rx_buffers = tuple(rx_buffers)
        self.rx_depth = rx_depth
        self.tx_cut = tx_cut or _header_apart
        self.indirect = indirect
        #: Whether what comes is taken out of the receive ring; a guest that does not is one that hangs.
        self.reads = True
        self._event_buffers = event_buffers
        self._come: deque[Packet] = deque()
        self._stray: deque[Packet] = deque()
        self._ports = count(_FIRST_PORT)

    # --- coming up -----------------------------------------------------------------------------------------

    def start(self, *, post: bool = True) -> None:
        """Negotiate, make the rings, fill the receive ring (unless not `post`), and let the device run."""
        self._negotiate()
        self.guest_cid = self.read_cid()
        self.rx = self._queue(RX, "rx")
        self.tx = self._queue(TX, "tx")
        self.event = self._queue(EVENT, "event")
        # Sent chains are taken back when room is short: calls for them are asked for only then.
        self.tx.ring.disable_calls()
        if post:
            self.post()
        for _ in range(min(self._event_buffers, self.ring_size)):
            self.event.ring.add(writable=[room := (self._allocate(_EVENT_SIZE), _EVENT_SIZE)], token=room)
        self.event.publish()
        self.resume()

    def read_cid(self) -> int:
        """The CID that the configuration space says."""
        return int.from_bytes(self.frontend.get_config(0, 8), "little")

    def post(self, number: int | None = None) -> int:
        """Put new buffers into the receive ring, `number` or as many as `rx_depth` and the ring allow."""
        ring = self.rx.ring
        if number is None:
            number = ring.free_descriptors // (1 if self.indirect else len(self.rx_buffers))
            if self.rx_depth is not None:
                number = min(number, self.rx_depth - ring.outstanding)
        for _ in range(number):
            self._offer([(self._allocate(size), size) for size in self.rx_buffers])
        self.rx.publish()
        return number

    def _offer(self, room: list[Buffer]) -> None:
        self.rx.ring.add(writable=room, indirect=self.indirect, token=room)

    # --- sockets -------------------------------------------------------------------------------------------

    def connect(
        self,
        port: int,
        cid: int = abi.VMADDR_CID_HOST,
        *,
        type: int = abi.TYPE_STREAM,
        from_port: int | None = None,
        wait: bool = True,
        timeout: float | None = None,
    ) -> VsockSocket:
        """A connection to a port of the host or of a sibling. Not `wait`: it is not yet one when this returns.

        ConnectionRefusedError: RST; TimeoutError: no answer.
        """
        key = Key(type, next(self._ports) if from_port is None else from_port, cid, port)
        if key in self.sockets:
            raise DriverError(f"{key} is in use")
        sock = self.sockets[key] = VsockSocket(self, key, self.buf_alloc)
        sock.packet(abi.OP_REQUEST)
        if wait:
            sock.wait_connected(timeout)
        return sock

    def listen(self, port: int, *, type: int = abi.TYPE_STREAM, backlog: int = 1 << 16) -> Listener:
        """Take connections to a port of this guest."""
        listener = self.listeners[type, port] = Listener(self, port, type, backlog)
        return listener

    def pump(self) -> None:
        """Take what has come, and do what it asks for; does not wait."""
        self._take_events()
        if self.reads:
            self._take_packets()
        while self._come:
            self._dispatch(self._come.popleft())

    def wait_for(self, ready: Callable[[], bool], what: str, timeout: float | None = None) -> None:
        """Take what comes until `ready`. TimeoutError after `timeout` seconds."""

        def pumped() -> bool:
            self.pump()
            return ready()

        # Not asked for calls while it isn't read: what lies in the RX ring would end the wait again and again.
        queues = [self.rx, self.event] if self.reads else [self.event]
        self._wait(pumped, queues, what, timeout)

    # --- packets -------------------------------------------------------------------------------------------

    def packet(self, op: int, src_port: int, dst_port: int, payload: bytes = b"", **fields: int) -> Packet:
        """A packet of this guest to the host, with this driver's room, but for what `fields` say."""
        fields = {
            "src_cid": self.guest_cid,
            "dst_cid": abi.VMADDR_CID_HOST,
            "buf_alloc": self.buf_alloc,
            **fields,
        }
        return Packet(op, src_port=src_port, dst_port=dst_port, payload=payload, **fields)

    def send_packet(self, packet: Packet, *, publish: bool = True) -> None:
        """Put any packet into the ring; waits for room alone. Not `publish`: the device sees it with the next."""
        self.send_raw(packet.pack(), publish=publish)

    def send_raw(
        self,
        data: bytes,
        cut: Sequence[int] | None = None,
        writable: Sequence[int] = (),
        *,
        publish: bool = True,
    ) -> None:
        """Put a chain of any bytes, cut in any way, with writable descriptors of any sizes, into the TX ring."""
        sizes = list(self.tx_cut(len(data)) if cut is None else cut)
        need = 1 if self.indirect else len(sizes) + len(writable)
        if need > self.ring_size:
            raise DriverError(f"a chain of {need} descriptors fits no ring of {self.ring_size}")
        if self.tx.ring.free_descriptors < need and self._reclaim() < need:
            self.tx.publish()
            self._wait_sent(lambda: self._reclaim() >= need, "room on tx")
        # A descriptor of no bytes has to lie somewhere all the same.
        readable = [(self._allocate(max(size, 1)), size) for size in sizes]
        room = [(self._allocate(max(size, 1)), size) for size in writable]
        at = 0
        for address, size in readable:
            self.memory.write(address, data[at : at + size])
            at += size
        self.tx.ring.add(readable, room, indirect=self.indirect, token=[*readable, *room])
        if publish:
            self.tx.publish()

    def wait_sent(self, timeout: float | None = None) -> None:
        """Wait until the device has used everything that was put into the TX ring."""
        self.tx.publish()

        def done() -> bool:
            self._reclaim()
            return not self.tx.ring.outstanding

        self._wait_sent(done, "end of what was sent", timeout)

    def _wait_sent(self, done: Callable[[], bool], what: str, timeout: float | None = None) -> None:
        """Wait until `done`. What comes meanwhile is taken out of the ring: both sides waiting would be for ever."""

        def ready() -> bool:
            if self.reads:
                self._take_packets()
            return done()

        try:
            self._wait(ready, [self.tx, self.rx] if self.reads else [self.tx], what, timeout)
        finally:
            self.tx.ring.disable_calls()

    def stray(self, number: int = 1, timeout: float | None = None) -> list[Packet]:
        """The packets that came for no socket, at least so many; waits for them."""
        self.wait_for(lambda: len(self._stray) >= number, f"packet ({number} wanted)", timeout)
        packets = list(self._stray)
        self._stray.clear()
        return packets

    def _reclaim(self) -> int:
        """Take back sent chains; returns how many descriptors are free."""
        while (used := self.tx.ring.pop_used()) is not None:
            assert isinstance(used.token, list)
            for address, _ in used.token:
                self.memory.free(address)
        return self.tx.ring.free_descriptors

    def _take_packets(self) -> None:
        """Take what has come out of the ring, and put its buffers in again."""
        taken = False
        while (used := self.rx.ring.pop_used()) is not None:
            taken = True
            room = used.token
            assert isinstance(room, list)
            self._come.append(self._read(room, used.len))
            self._offer(room)
        if taken:
            self.rx.publish()

    def _read(self, room: list[Buffer], length: int) -> Packet:
        parts, left = [], length
        for address, size in room:
            parts.append(self.memory.read(address, min(size, left)))
            left -= len(parts[-1])
        raw = b"".join(parts)
        if len(raw) < HEADER:
            raise DeviceError(f"{length} bytes received, a header has {HEADER}")
        packet = Packet.unpack(raw)
        if packet.length is not None:
            raise DeviceError(f"{length - HEADER} bytes came with the header of {packet}")
        if packet.dst_cid != self.guest_cid:
            raise DeviceError(f"a packet for another guest than {self.guest_cid}: {packet}")
        return packet

    def _dispatch(self, packet: Packet) -> None:
        key = Key(packet.type, packet.dst_port, packet.src_cid, packet.src_port)
        sock = self.sockets.get(key)
        if sock is not None:
            sock.take(packet)
            return
        listener = self.listeners.get((packet.type, packet.dst_port))
        room = listener is not None and len(listener.waiting) < listener.backlog
        if packet.op == abi.OP_REQUEST and listener is not None and room:
            sock = self.sockets[key] = VsockSocket(self, key, self.buf_alloc)
            sock.connected = True
            sock.take(packet)
            sock.packet(abi.OP_RESPONSE)
            listener.waiting.append(sock)
            return
        self._stray.append(packet)
        if self.answers and packet.op != abi.OP_RST:
            self.send_packet(
                Packet(
                    abi.OP_RST,
                    self.guest_cid,
                    packet.src_cid,
                    packet.dst_port,
                    packet.src_port,
                    type=packet.type,
                )
            )

    # --- events --------------------------------------------------------------------------------------------

    def wait_transport_reset(self, number: int = 1, timeout: float | None = None) -> None:
        """Wait until the device has said so many times that its connections are gone."""
        self.wait_for(lambda: self.transport_resets >= number, "transport reset", timeout)

    def _take_events(self) -> None:
        taken = False
        while (used := self.event.ring.pop_used()) is not None:
            taken = True
            assert isinstance(used.token, tuple)
            event = int.from_bytes(self.memory.read(used.token[0], used.len), "little")
            if used.len != _EVENT_SIZE or event != abi.EVENT_TRANSPORT_RESET:
                raise DeviceError(f"an event of {used.len} bytes: {event}")
            self.event.ring.add(writable=[used.token], token=used.token)
            self.transport_resets += 1
            self.guest_cid = self.read_cid()
            for sock in list(self.sockets.values()):
                sock.transport_reset()
        if taken:
            self.event.publish()


def _header_apart(size: int) -> list[int]:
    """As Linux 6.1 cuts a packet: the header, and what follows."""
    return [HEADER, size - HEADER] if size > HEADER else [size]
