"""The two ends of the vsock benchmark: a guest's rings under a compiled driver, a program at a unix socket.

Promises: every thread that it starts has ended when its `with` ends. Never: judges a figure.
"""

from __future__ import annotations

import os
import select
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import numpy as np

from pyvhost.abi import virtio_vsock as abi
from pyvhost.cli.bench.counting import system_calls
from pyvhost.dataplane import vsock_exercise
from pyvhost.dataplane.vsock_exercise import SIDE
from pyvhost.driver.memory import MIB, GuestMemory
from pyvhost.driver.vhost_user import VhostUserFrontend
from pyvhost.driver.vsock import BUF_ALLOC, VsockDriver
from pyvhost.driver.vsock_packet import HEADER, Packet
from pyvhost.driver.vsock_socket import VsockSocket

TO_HOST: Final = "guest to host"
TO_GUEST: Final = "host to guest"
CONNECTING: Final = "connecting"
RING: Final = 256
_PORT: Final = 5000
#: What is not measured: caches fill, buffers fill.
_WARM_UP: Final = 0.2
_PATIENCE: Final = 20.0
#: Each time that a packet's room is free again. Linux waits until that is all that the other side knows of, which
#: would make the driver what holds up large packets.
_UPDATE_AFTER: Final = BUF_ALLOC // 4


def prepare() -> None:
    """Compiles what moves the bytes, or loads it."""
    vsock_exercise.prepare(np.zeros(1, SIDE))


class Guest:
    """A driver on the device's socket, whose rings can be handed to compiled code. A context manager."""

    def __init__(self, path: Path, size: int, rx_buffer: int) -> None:
        self.size = size
        self.packet_rate = 0.0
        self._path = path
        self._rx_buffer = rx_buffer
        self.sides: Any = np.zeros(1, SIDE)
        self._events = np.zeros(64, np.uint8)
        self._epoll = -1
        self._threads: list[threading.Thread] = []

    def __enter__(self) -> Self:
        self._memory = GuestMemory(96 * MIB)
        self._frontend = VhostUserFrontend.connect(self._path, timeout=_PATIENCE)
        self.driver = VsockDriver(
            self._frontend,
            self._memory,
            RING,
            rx_buffers=(HEADER + self._rx_buffer,),
            tx_cut=lambda size: [size],
            timeout=_PATIENCE,
        )
        self.driver.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.halt()
        if self._epoll >= 0:
            os.close(self._epoll)
        self.driver.close()
        self._frontend.close()
        self._memory.close()

    @property
    def side(self) -> Any:
        """The compiled side's block."""
        return self.sides[0]

    def hand_over(self, kernel: Callable[..., int], packet: Packet, sock: VsockSocket | None) -> None:
        """Have `kernel` use the rings from now on, with `packet` in every chain that it sends."""
        self.driver.wait_sent()
        side, base = self.side, self._memory.user_address(0)
        for name, queue in (("tx", self.driver.tx), ("rx", self.driver.rx)):
            ring = queue.ring
            for part in ("desc", "avail", "used"):
                side[f"{name}_{part}"] = base + getattr(ring.layout, part)
            side[f"{name}_num"] = RING
            side[f"{name}_idx"] = ring.avail_idx
            side[f"{name}_seen"] = ring.next_used
            side[f"{name}_kick"] = queue.kick_fd
        ring = self.driver.tx.ring
        data = packet.pack()
        # As a guest's allocator does: what was sent is used again; twice as many as can be under way are enough.
        packets = [
            self._memory.allocate(len(data)) for _ in range(min(RING, max(2, 2 * BUF_ALLOC // self.size)))
        ]
        for address in packets:
            self._memory.write(address, data)
        for index in range(RING):
            ring.desc.set(index, packets[index % len(packets)], len(data), 0)
            self._memory.write(ring.layout.avail + 4 + 2 * index, index.to_bytes(2, "little"))
        side["memory"] = base
        side["size"] = self.size
        side["update_after"] = _UPDATE_AFTER
        side["port"] = 1024
        if sock is not None:
            side["peer_buf_alloc"], side["peer_fwd_cnt"] = sock.peer_buf_alloc, sock.peer_fwd_cnt
            side["tx_cnt"], side["fwd_cnt"] = sock.tx_cnt, sock.fwd_cnt
            side["fwd_told"] = sock.fwd_cnt
        self._epoll = select.epoll()  # type: ignore[assignment]
        epoll: Any = self._epoll
        for queue in (self.driver.tx, self.driver.rx):
            epoll.register(queue.call_fd, select.EPOLLIN | select.EPOLLET)
        self._epoll = os.dup(epoll.fileno())
        epoll.close()
        side["epoll"] = self._epoll
        side["events"] = self._events.ctypes.data
        self._start(kernel)

    def _start(self, kernel: Callable[..., int]) -> None:
        thread = threading.Thread(
            target=kernel, args=(self.sides, self.sides.ctypes.data), name="guest", daemon=True
        )
        self._threads.append(thread)
        thread.start()

    def halt(self) -> None:
        """End the compiled code."""
        self.side["stop"] = 1
        for thread in self._threads:
            thread.join(_PATIENCE)
            if thread.is_alive():
                raise TimeoutError("the guest's side does not end")


class Program:
    """A thread that reads or writes at a socket in compiled code, and what it has counted."""

    def __init__(self, kernel: Callable[..., int], sock: socket.socket, size: int) -> None:
        self._buffer = np.zeros(max(size, 4096), np.uint8)
        self._counted = np.zeros(1, np.int64)
        self._sock = sock
        sock.setblocking(True)
        arguments = (sock.fileno(), self._buffer.ctypes.data, size, self._counted.ctypes.data)
        self._thread = threading.Thread(target=kernel, args=arguments, name="program", daemon=True)
        self._thread.start()

    @property
    def bytes(self) -> int:
        """So far."""
        return int(self._counted[0])

    def end(self) -> None:
        """The socket's end is the program's."""
        self._sock.shutdown(socket.SHUT_RDWR)
        self._thread.join(_PATIENCE)
        if self._thread.is_alive():
            raise TimeoutError("the host's program does not end")
        self._sock.close()


class UnixPair:
    """A writer and a reader at the two ends of a unix socket pair."""

    def __init__(self, writer: Program, reader: Program) -> None:
        self._writer = writer
        self._reader = reader

    def rate(self, seconds: float) -> float:
        """Bytes a second that arrive."""
        return _rate(lambda: self._reader.bytes, seconds)


@contextmanager
def unix_pair(size: int) -> Iterator[UnixPair]:
    """Bytes go through it inside the block."""
    left, right = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    reader = Program(vsock_exercise.drain, right, size)
    writer = Program(vsock_exercise.pour, left, size)
    try:
        yield UnixPair(writer, reader)
    finally:
        writer.end()
        reader.end()


class HostEnd:
    """The host's side of one connection of `guest`, or of many. A context manager; entering has the guest run."""

    def __init__(self, guest: Guest, uds: Path, direction: str, size: int) -> None:
        self._guest = guest
        self._uds = uds
        self._direction = direction
        self._size = size
        self._server: socket.socket | None = None
        self._program: Program | None = None
        self._acceptor: threading.Thread | None = None

    def __enter__(self) -> Self:
        path = Path(f"{self._uds}_{_PORT}")
        path.unlink(missing_ok=True)
        self._server = socket.socket(socket.AF_UNIX)
        self._server.bind(str(path))
        self._server.listen(1024)
        driver = self._guest.driver
        if self._direction == CONNECTING:
            self._acceptor = threading.Thread(target=self._accept_all, daemon=True)
            self._acceptor.start()
            packet = driver.packet(abi.OP_REQUEST, 0, _PORT)
            self._guest.hand_over(vsock_exercise.guest_connect, packet, None)
            return self
        sock = driver.connect(_PORT)
        end, _ = self._server.accept()
        if self._direction == TO_HOST:
            packet = driver.packet(abi.OP_RW, sock.key.port, _PORT, bytes(self._size))
            self._program = Program(vsock_exercise.drain, end, self._size)
            self._guest.hand_over(vsock_exercise.guest_send, packet, sock)
        else:
            packet = driver.packet(abi.OP_CREDIT_UPDATE, sock.key.port, _PORT)
            self._guest.hand_over(vsock_exercise.guest_receive, packet, sock)
            self._program = Program(vsock_exercise.pour, end, self._size)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._guest.halt()
        if self._program is not None:
            self._program.end()
        if self._server is not None:
            self._server.shutdown(socket.SHUT_RDWR)
            if self._acceptor is not None:
                self._acceptor.join(_PATIENCE)
            self._server.close()

    def _accept_all(self) -> None:
        """Takes connections; each is closed when the guest has long been done with it."""
        assert self._server is not None
        kept: deque[socket.socket] = deque()
        while True:
            try:
                kept.append(self._server.accept()[0])
            except OSError:
                break
            if len(kept) > 4 * self._size:
                kept.popleft().close()
        for sock in kept:
            sock.close()

    def _arrived(self) -> int:
        """Bytes so far, counted by who receives; or connections that have ended."""
        if self._direction == CONNECTING:
            return int(self._guest.side["done"])
        if self._direction == TO_HOST:
            assert self._program is not None
            return self._program.bytes
        return int(self._guest.side["bytes"])

    def rate(self, seconds: float) -> float:
        """Bytes, or connections, a second."""
        side = self._guest.side
        time.sleep(_WARM_UP)
        packets, arrived, began = int(side["packets"]), self._arrived(), time.monotonic()
        time.sleep(seconds)
        arrived, took = self._arrived() - arrived, time.monotonic() - began
        self._guest.packet_rate = (int(side["packets"]) - packets) / took
        return arrived / took

    def calls_a_packet(self, pid: int, seconds: float) -> tuple[float, str]:
        """System calls of the process `pid` for each packet, and what counted them. CannotCountError."""
        side = self._guest.side
        time.sleep(_WARM_UP)
        with system_calls(pid) as count:
            packets = int(side["packets"])
            time.sleep(seconds)
            packets = int(side["packets"]) - packets
        return count.total / max(packets, 1), count.by


def _rate(arrived: Callable[[], int], seconds: float) -> float:
    time.sleep(_WARM_UP)
    before, began = arrived(), time.monotonic()
    time.sleep(seconds)
    return (arrived() - before) / (time.monotonic() - began)
