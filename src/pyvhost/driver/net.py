"""A virtio-net driver in plain Python: queue pairs of split rings over any front end (virtio 1.3, 5.1).

    memory = GuestMemory(64 << 20)
    frontend = VhostUserFrontend.connect("/run/vm0.sock")
    with NetDriver(frontend, memory, queue_pairs=2) as driver:
        driver.start()
        driver.send(frame)
        print(driver.receive()[0].frame)

Ring 2n receives on pair n, ring 2n + 1 transmits, the control ring, where there is one, is the last. Frames
are whole Ethernet frames without checksum; lengths are bytes.

Promises: frames come out as they were put into the rings, in order within a pair; every wait ends after its
timeout; a device that breaks a rule of 5.1.6.4 is DeviceError. Never: starts a thread, or looks into a frame.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from pyvhost.abi import virtio
from pyvhost.abi import virtio_net as abi
from pyvhost.driver.device_driver import DeviceDriver
from pyvhost.driver.errors import DeviceError, DriverError
from pyvhost.driver.front_end import FrontEnd
from pyvhost.driver.iommu import Iommu
from pyvhost.driver.memory import GuestMemory
from pyvhost.driver.net_control import NetControl
from pyvhost.driver.net_frame import NetHdr, Received, Shape
from pyvhost.driver.queue import Queue
from pyvhost.driver.ring_parts import Buffer, ByteOrder, RingLayout

FEATURES = (
    1 << virtio.F_VERSION_1
    | 1 << virtio.RING_F_EVENT_IDX
    | 1 << virtio.RING_F_INDIRECT_DESC
    | 1 << abi.F_MRG_RXBUF
    | 1 << abi.F_MAC
    | 1 << abi.F_MTU
    | 1 << abi.F_STATUS
)
"""What a driver asks for when it is not told: no offloads, so that every frame is one that a wire could carry."""

FRAME_MAX = 65550
"""The largest frame that the header's rules allow: 64 KiB and an Ethernet header (virtio 1.3, 5.1.6.3.1)."""

_LARGE = 1 << abi.F_GUEST_TSO4 | 1 << abi.F_GUEST_TSO6 | 1 << abi.F_GUEST_UFO


class _Room(NamedTuple):
    """Room that was made for received bytes, whole again after each use."""

    buffers: tuple[Buffer, ...]
    size: int


class NetDriver(DeviceDriver):
    """A driver for one network device.

    `features` are asked for, and what the device has of them is in `self.features` after `start`. MQ is
    added where `queue_pairs` is more than 1. `ring_size` is every ring's; `rx_buffer` the room for header
    and frame in one receive chain (None: 4096 mergeable, else the largest frame that may come), `rx_depth`
    how many are posted (None: as many as the ring takes). `tx_shape` and `rx_shape` say how chains are cut;
    `allocate` (bytes to guest address) where each descriptor's bytes lie, anywhere in `memory` unless told,
    `rx_allocate` the same for what is received; `layout` where the parts of a ring lie, by its index.
    `byteorder` is that of a legacy guest. With `iommu` all addresses are mapped ones (F_ACCESS_PLATFORM).
    """

    def __init__(
        self,
        frontend: FrontEnd,
        memory: GuestMemory,
        queue_pairs: int = 1,
        ring_size: int = 256,
        features: int = FEATURES,
        *,
        rx_buffer: int | None = None,
        rx_depth: int | None = None,
        tx_shape: Shape = Shape(),  # noqa: B008 - frozen
        rx_shape: Shape = Shape(),  # noqa: B008 - frozen
        allocate: Callable[[int], int] | None = None,
        rx_allocate: Callable[[int], int] | None = None,
        layout: Callable[[int], RingLayout] | None = None,
        iommu: Iommu | None = None,
        byteorder: ByteOrder = "little",
        timeout: float = 10.0,
    ) -> None:
        super().__init__(
            frontend,
            memory,
            ring_size,
            features | (1 << abi.F_MQ if queue_pairs > 1 else 0),
            allocate=allocate,
            layout=layout,
            iommu=iommu,
            byteorder=byteorder,
            timeout=timeout,
        )
        self.queue_pairs = queue_pairs
        self.tx_shape = tx_shape
        self.rx_shape = rx_shape
        self.rx: list[Queue] = []
        self.tx: list[Queue] = []
        self.control: NetControl | None = None
        self.header_size = 0
        self._rx_buffer = rx_buffer
        self._rx_depth = rx_depth
        self._rx_allocate = rx_allocate or self._allocate
        self._received: deque[Received] = deque()

    # --- coming up and going down ------------------------------------------------------------------------

    def start(self, *, post: bool = True) -> None:
        """Negotiate, make the rings, fill the receive rings (unless not `post`), and let the device run."""
        self._negotiate()
        self.header_size = 12 if self.has(virtio.F_VERSION_1) or self.has(abi.F_MRG_RXBUF) else 10
        for pair in range(self.queue_pairs):
            self.rx.append(self._queue(2 * pair, f"rx {pair}"))
            self.tx.append(self._queue(2 * pair + 1, f"tx {pair}"))
            # Sent chains are taken back when room is short: calls for them are asked for only then.
            self.tx[pair].ring.disable_calls()
        if self.has(abi.F_CTRL_VQ):
            pairs = self.max_queue_pairs() if self.has(abi.F_MQ) else 1
            self.control = NetControl(
                self._queue(2 * pairs, "control"),
                self.memory,
                timeout=self.timeout,
                peer=self.frontend.fileno(),
                byteorder=self.byteorder,
                services=self._services,
            )
        if post:
            for pair in range(self.queue_pairs):
                self.post(pair)
        self.resume()

    def resume(self, frontend: FrontEnd | None = None, bases: dict[int, int] | None = None) -> None:
        """As `DeviceDriver.resume`; the control queue looks to the new front end."""
        if frontend is not None and self.control is not None:
            self.control.peer = frontend.fileno()
        super().resume(frontend, bases)

    # --- configuration space -------------------------------------------------------------------------------

    def max_queue_pairs(self) -> int:
        """How many pairs the device has, by its configuration space."""
        return int.from_bytes(self.frontend.get_config(8, 2), self.byteorder)

    def mac(self) -> bytes:
        """The device's address (feature MAC)."""
        return self.frontend.get_config(0, 6)

    def mtu(self) -> int:
        """The largest payload of a frame, in bytes (feature MTU)."""
        return int.from_bytes(self.frontend.get_config(10, 2), self.byteorder)

    def status(self) -> int:
        """S_LINK_UP and S_ANNOUNCE (feature STATUS)."""
        return int.from_bytes(self.frontend.get_config(6, 2), self.byteorder)

    @property
    def announce(self) -> bool:
        """Whether the device asks its driver to announce itself (feature GUEST_ANNOUNCE)."""
        return bool(self.status() & abi.S_ANNOUNCE)

    # --- transmitting --------------------------------------------------------------------------------------

    def send(
        self, frame: bytes, header: NetHdr | None = None, *, pair: int = 0, shape: Shape | None = None
    ) -> None:
        """Send one frame: give it to the device, and kick if that wants it. Does not wait for its use."""
        self.send_many([frame], header, pair=pair, shape=shape)

    def send_many(
        self,
        frames: Iterable[bytes],
        header: NetHdr | None = None,
        *,
        pair: int = 0,
        shape: Shape | None = None,
    ) -> int:
        """Send frames in one batch, or in as many as the ring has room for; returns how many.

        Waits for room, so that a device that takes nothing ends in TimeoutError.
        """
        queue = self.tx[pair]
        shape = shape or self.tx_shape
        packed = (header or NetHdr()).pack(self.header_size, self.byteorder)
        count = 0
        for frame in frames:
            sizes = shape.cut(self.header_size, len(frame))
            need = 1 if shape.indirect else len(sizes)
            if need > self.ring_size:
                raise DriverError(f"a chain of {need} descriptors fits no ring of {self.ring_size}")
            if queue.ring.free_descriptors < need:
                queue.publish()
                self._wait_for_room(queue, need)
            buffers = [(self._allocate(size), size) for size in sizes]
            self._fill(buffers, packed + frame)
            queue.ring.add(readable=buffers, indirect=shape.indirect, token=buffers)
            count += 1
        queue.publish()
        return count

    def wait_sent(self, pair: int | None = None) -> None:
        """Wait until the device has used everything sent on `pair`, or on all of them."""
        queues = self.tx if pair is None else [self.tx[pair]]

        def done() -> bool:
            for queue in queues:
                self._reclaim(queue)
            return not any(queue.ring.outstanding for queue in queues)

        self._wait_sent(done, queues, "end of what was sent")

    def _wait_for_room(self, queue: Queue, need: int) -> None:
        self._wait_sent(lambda: self._reclaim(queue) >= need, [queue], f"room on {queue.name}")

    def _wait_sent(self, ready: Callable[[], bool], queues: Sequence[Queue], what: str) -> None:
        try:
            self._wait(ready, queues, what)
        finally:
            for queue in queues:
                queue.ring.disable_calls()

    def _fill(self, buffers: list[Buffer], data: bytes) -> None:
        at = 0
        for address, size in buffers:
            self.memory.write(address, data[at : at + size])
            at += size

    def _reclaim(self, queue: Queue) -> int:
        """Take back sent chains; returns how many descriptors are free."""
        while (used := queue.ring.pop_used()) is not None:
            buffers = used.token
            assert isinstance(buffers, list)
            for address, _ in buffers:
                self.memory.free(address)
        return queue.ring.free_descriptors

    # --- receiving -----------------------------------------------------------------------------------------

    def rx_buffer_size(self) -> int:
        """Bytes of one receive chain, header included."""
        if self._rx_buffer is not None:
            return self._rx_buffer
        if self.has(abi.F_MRG_RXBUF):
            return 4096
        if self.features & _LARGE:
            return self.header_size + FRAME_MAX
        return self.header_size + 14 + (self.mtu() if self.has(abi.F_MTU) else 1500)

    def post(self, pair: int = 0, count: int | None = None) -> int:
        """Put new buffers into a receive ring, `count` or as many as `rx_depth` and the ring allow."""
        queue = self.rx[pair]
        size = self.rx_buffer_size()
        sizes = self.rx_shape.cut(self.header_size, size - self.header_size)
        if count is None:
            need = 1 if self.rx_shape.indirect else len(sizes)
            count = queue.ring.free_descriptors // need
            if self._rx_depth is not None:
                count = min(count, self._rx_depth - queue.ring.outstanding)
        for _ in range(count):
            room = _Room(tuple((self._rx_allocate(piece), piece) for piece in sizes), size)
            self._offer(queue, room)
        queue.publish()
        return count

    def _offer(self, queue: Queue, room: _Room) -> None:
        queue.ring.add(writable=room.buffers, indirect=self.rx_shape.indirect, token=room)

    def poll(self) -> list[Received]:
        """The frames that have come, on any pair; does not wait. Their buffers go back into the rings."""
        for pair in range(self.queue_pairs):
            self._collect(pair)
        return self._given()

    def receive(self, count: int = 1, *, timeout: float | None = None) -> list[Received]:
        """Wait for frames, and return all that have come, at least `count`.

        TimeoutError when fewer come within `timeout` seconds; those that did are kept for the next call.
        """

        def enough() -> bool:
            for pair in range(self.queue_pairs):
                self._collect(pair)
            return len(self._received) >= count

        try:
            self._wait(enough, self.rx, "frame", timeout)
        except TimeoutError as error:
            raise TimeoutError(f"{len(self._received)} of {count} frames received; {error}") from None
        return self._given()

    def _given(self) -> list[Received]:
        frames = list(self._received)
        self._received.clear()
        return frames

    def _collect(self, pair: int) -> None:
        queue = self.rx[pair]
        taken = False
        while (first := self._take(queue)) is not None:
            taken = True
            self._received.append(self._merge(queue, pair, *first))
        if taken:
            queue.publish()

    def _merge(self, queue: Queue, pair: int, first: bytes, whole: bool) -> Received:
        """The frame that begins in a used chain, with its other buffers if it has any (5.1.6.4.1)."""
        if len(first) < self.header_size:
            raise DeviceError(f"{queue.name}: {len(first)} bytes received, a header has {self.header_size}")
        header = NetHdr.unpack(first[: self.header_size], self.byteorder)
        parts = [first[self.header_size :]]
        if not self.has(abi.F_MRG_RXBUF):
            return Received(parts[0], header, pair)
        if not 1 <= header.num_buffers <= self.ring_size:
            raise DeviceError(f"{queue.name}: num_buffers is {header.num_buffers}")
        for number in range(1, header.num_buffers):
            if not whole:
                raise DeviceError(
                    f"{queue.name}: buffer {number} of {header.num_buffers} is not the last, and not full"
                )
            more = self._take(queue)
            if more is None:
                raise DeviceError(
                    f"{queue.name}: num_buffers is {header.num_buffers}, and only {number} are used: all of "
                    "a frame's are to be used together"
                )
            part, whole = more
            parts.append(part)
        return Received(b"".join(parts), header, pair, header.num_buffers)

    def _take(self, queue: Queue) -> tuple[bytes, bool] | None:
        """The bytes in the next used chain, and whether they fill it. The chain goes back into the ring."""
        used = queue.ring.pop_used()
        if used is None:
            return None
        room = used.token
        assert isinstance(room, _Room)
        parts = []
        left = used.len
        for address, size in room.buffers:
            here = min(size, left)
            parts.append(self.memory.read(address, here))
            left -= here
        self._offer(queue, room)
        return b"".join(parts), used.len == room.size
