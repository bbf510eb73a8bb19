"""A vhost-net device between a tap and two rings laid out by hand: what the experiments are done with.

It stands on the driver's rooms and the standard library alone, so that the kernel's own device can be had the same
way, in its lab. An experiment is a list of facts, each with the value that is expected; a fact has until `PATIENCE`
to come true, because a device works on threads of its own, and is recorded as it was found. What nobody announces
is waited for by `settle` first, which returns when the device has dealt with all that it was told.
"""

from __future__ import annotations

import ctypes
import os
import platform
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self, TypeVar

from kernel.counted import CountedRing
from pyvhost.abi import vhost as abi
from pyvhost.abi import virtio, virtio_net
from pyvhost.driver.memory import GuestMemory
from pyvhost.driver.split_ring import RingLayout, SplitRing
from pyvhost.driver.vhost_ioctl import Handle, KernelHandle, VhostNetFrontend
from pyvhost.host import eventfd, interface, tap

Fact = tuple[str, object]
OpenDevice = Callable[[str], Handle]

#: Seconds for a fact to come true, and how long a look at it is put off.
PATIENCE = 3.0
TICK = 0.005

MEMORY = 4 << 20
PAGE = 4096
#: Where the experiments have things, in the guest's addresses.
RINGS = ((0x3E0000, 0x3E8000, 0x3F0000), (0x3E4000, 0x3EC000, 0x3F8000))
BUFFERS = 0x100000
TABLES = 0x080000
RX, TX = 0, 1
FILL = 0xEE

ETHERTYPE = 0x88B5  # IEEE 802's for local experiments: nobody else sends it
NET_F = 1 << abi.NET_F_VIRTIO_NET_HDR
V1 = 1 << virtio.F_VERSION_1
MRG = 1 << virtio_net.F_MRG_RXBUF
EVENT_IDX = 1 << virtio.RING_F_EVENT_IDX
LOG_ALL = 1 << abi.F_LOG_ALL
NEXT, WRITE, INDIRECT = virtio.VRING_DESC_F_NEXT, virtio.VRING_DESC_F_WRITE, virtio.VRING_DESC_F_INDIRECT

_T = TypeVar("_T", bound="Closable")

#: By machine: epoll_wait, epoll_pwait, epoll_pwait2.
_EPOLL_WAITS = ("232", "281", "441") if platform.machine() == "x86_64" else ("22", "441")

Descriptor = tuple[int, int, int, int]
"""Address, length, flags, next."""


def frame(size: int = 60, seed: int = 0) -> bytes:
    """An Ethernet frame of the experiments' own type, of `size` bytes."""
    header = bytes.fromhex("ffffffffffff 020000000001") + ETHERTYPE.to_bytes(2, "big")
    return (header + bytes((at + seed) & 0xFF for at in range(max(0, size - 14))))[:size]


class Closable(Protocol):
    """What has to be let go of."""

    def close(self) -> None: ...


class Host:
    """The host's side of an interface: frames that come out of it, and a way to send some in."""

    def __init__(self, name: str) -> None:
        self._socket = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETHERTYPE))
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
        self._socket.bind((name, ETHERTYPE))
        self._socket.setblocking(False)
        self.frames: list[bytes] = []

    def send(self, data: bytes) -> None:
        """Into the interface, which is out of the device's receive ring."""
        self._socket.send(data)

    def received(self) -> list[bytes]:
        """All frames that came so far since this was last empty."""
        with suppress(BlockingIOError):
            while True:
                self.frames.append(self._socket.recv(1 << 16))
        return self.frames

    def length(self) -> int | None:
        """The first frame's, or None for none."""
        found = self.received()
        return len(found[0]) if found else None

    def close(self) -> None:
        self._socket.close()


class Ring(CountedRing):
    """One of the device's two rings."""

    def __init__(self, bench: Bench, index: int, size: int, event_idx: bool) -> None:
        self.bench = bench
        ring = SplitRing(bench.memory, size, RingLayout(*RINGS[index]), event_idx=event_idx)
        super().__init__(bench, index, ring, ("rx", "tx")[index])

    def chain(
        self, *descriptors: Descriptor, at: int = 0, head: int | None = None, offer: bool = True
    ) -> None:
        """Write descriptors from number `at` on, and offer the chain that begins at `head`, default `at`."""
        for number, descriptor in enumerate(descriptors):
            self.ring.desc.set(at + number, *descriptor)
        if offer:
            self.ring.offer(at if head is None else head)

    def kick(self) -> None:
        """Let the device see what was offered, and kick, asked for or not."""
        self.ring.publish()
        self.queue.kick()

    def buffers(self, *sizes: int, at: int = 0, start: int = BUFFERS, step: int = PAGE) -> None:
        """Offer writable buffers, one a chain, filled so that what is written shows."""
        for number, size in enumerate(sizes, start=at):
            self.bench.memory.write(start + number * step, bytes([FILL]) * size)
            self.chain((start + number * step, size, WRITE, 0), at=number)

    # --- what is seen: each may be asked for again and again until the fact is told ---------------------

    def used(self) -> list[list[int]]:
        """The used elements that no fact was told of."""
        ring = self.ring
        count = (ring.used_idx - self._seen) & 0xFFFF
        return [list(ring.used_element((self._seen + at) & 0xFFFF)) for at in range(count)]

    def told(self, *what: str) -> None:
        """A fact was told of these: the next one begins there."""
        if "used" in what:
            self._seen = self.ring.used_idx
        if "calls" in what:
            self._calls = 0
        if "errs" in what:
            self._errs = 0


class Bench:
    """A device, its tap and its rings. `expected` are the facts that are to be found, in order.

    `device` opens "/dev/vhost-net"; `header` is the tap's.
    """

    def __init__(self, device: OpenDevice, expected: Sequence[Fact]) -> None:
        self.device = device
        self.expected = list(expected)
        self.facts: list[Fact] = []
        self._stack = ExitStack()
        self._after = ExitStack()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    # --- setting up --------------------------------------------------------------------------------------

    def set_up(
        self,
        features: int = 0,
        *,
        size: int = 16,
        backend: int | None = None,
        memory: GuestMemory | None = None,
        up: bool = True,
    ) -> None:
        """A device afresh with these features, both rings bound to a tap that is up, or to `backend`."""
        self._stack.close()
        self._stack = stack = ExitStack()
        self._after = stack.enter_context(ExitStack())
        self.header = 12 if features & (V1 | MRG) else 10
        if backend is None:
            (backend,) = tap.open_tap("vhosttap")
            stack.callback(os.close, backend)
            tap.set_vnet_hdr_size(backend, self.header)
            quiet("vhosttap")
            interface.set_mtu("vhosttap", 9000)
            interface.set_up("vhosttap", up)
            self.host = Host("vhosttap")
            stack.callback(self.host.close)
        self.backend = backend
        self.memory = memory or GuestMemory(MEMORY, anonymous=True)
        stack.callback(self.memory.close)
        self._others = _threads()
        self.handle = self.device("/dev/vhost-net")
        stack.callback(self.handle.close)
        self.front = VhostNetFrontend(self.handle, backend)
        event_idx = bool(features & EVENT_IDX)
        self.rx = Ring(self, RX, size, event_idx)
        self.tx = Ring(self, TX, size, event_idx)
        self.front.set_owner()
        self.front.set_features(features)
        self.front.set_mem_table(self.memory.regions)
        self._spare = [eventfd.create(), eventfd.create()]
        for fd in self._spare:
            stack.callback(os.close, fd)
        for ring in (self.rx, self.tx):
            stack.callback(ring.queue.close)

    def start(self) -> None:
        """Bind both rings."""
        for ring in (self.rx, self.tx):
            self.front.start_ring(ring.index, ring.queue)
        # Binding has the device look at its rings once: not while an experiment lays something there.
        self.settle()

    def ready(self, features: int = 0, **options: object) -> None:
        """`set_up` and `start`."""
        self.set_up(features, **options)  # type: ignore[arg-type]
        self.start()

    def owned(self, thing: _T) -> _T:
        """Have something closed after the device."""
        self._after.callback(thing.close)
        return thing

    def set_backend(self, index: int, fd: int) -> int:
        """Bind a ring, as ioctl(2) answers."""
        self.front.set_backend(index, fd)
        return 0

    # --- what is done ------------------------------------------------------------------------------------

    def send(self, data: bytes, *, at: int = 0, kick: bool = True) -> None:
        """Offer a frame behind a header of zeros, in one descriptor, in the transmit ring."""
        address = BUFFERS + at * PAGE
        self.memory.write(address, bytes(self.header) + data)
        self.tx.chain((address, self.header + len(data), 0, 0), at=at)
        if kick:
            self.tx.kick()

    def settle(self) -> None:
        """Return when the device has worked on every kick and every frame so far."""
        if not isinstance(self.handle, KernelHandle):
            eventually(lambda: all(map(_sleeps, self._workers())))
            return
        for ring in (self.rx, self.tx):
            # Taking a kick eventfd away waits for the kernel's worker, which never reads one: nothing would be left
            # to tell an old kick from a new one.
            fd = ring.queue.kick_fd
            eventfd.drain(fd)
            for other in (self._spare[ring.index], fd):
                self.front.set_vring_kick(ring.index, other)

    def _workers(self) -> list[int]:
        """The threads that came with the device."""
        return [thread for thread in _threads() if thread not in self._others]

    def until(self, condition: Callable[[], bool]) -> None:
        """Wait for what has to have happened before anything is found; a fact says if it did not."""
        eventually(condition)

    # --- what is found -----------------------------------------------------------------------------------

    def fact(self, name: str, value: Callable[[], object], *told: tuple[Ring, str]) -> None:
        """Find the next fact, which is called `name`; `told` is what begins anew after it."""
        self.settle()
        expected = next(
            (wanted for called, wanted in self.expected[len(self.facts) :] if called == name), None
        )
        deadline = time.monotonic() + PATIENCE
        while (found := value()) != expected and time.monotonic() < deadline:
            threading.Event().wait(TICK)
        self.facts.append((name, found))
        for ring, what in told:
            ring.told(what)

    def used(self, ring: Ring, name: str = "used") -> None:
        """The fact of what a ring has used."""
        self.fact(name, ring.used, (ring, "used"))

    def state(self, ring: Ring, name: str = "state") -> None:
        """The fact of a ring's state."""
        self.fact(name, ring.state, (ring, "calls"), (ring, "errs"))

    def calls(self, ring: Ring, name: str, value: Callable[[], object] | None = None) -> None:
        """A fact that calls are part of."""
        self.fact(name, value or ring.calls, (ring, "calls"))


def eventually(condition: Callable[[], bool]) -> None:
    """Wait for what nothing announces, up to `PATIENCE` seconds."""
    deadline = time.monotonic() + PATIENCE
    while not condition() and time.monotonic() < deadline:
        threading.Event().wait(TICK)


def _threads() -> list[int]:
    return [int(entry) for entry in os.listdir("/proc/self/task")]


def _sleeps(thread: int) -> bool:
    """Whether a thread waits in epoll_wait(2): a kick or a frame makes it runnable before its sender goes on."""
    try:
        return Path(f"/proc/self/task/{thread}/syscall").read_text().split()[0] in _EPOLL_WAITS
    except FileNotFoundError:
        return True  # it has ended


def quiet(name: str) -> None:
    """No kernel's own frames on an interface."""
    path = Path(f"/proc/sys/net/ipv6/conf/{name}/disable_ipv6")
    if path.exists():
        path.write_text("1")


@contextmanager
def packet_socket(name: str) -> Iterator[int]:
    """An AF_PACKET socket that a device may have for a backend: of the experiments' frames, and no others."""
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETHERTYPE)) as found:
        found.bind((name, ETHERTYPE))
        yield found.fileno()


def unmapped(size: int) -> int:
    """An address of this process with nothing at it."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    none, private_anonymous = 0, 0x22
    found = libc.mmap(None, ctypes.c_size_t(size), none, private_anonymous, -1, ctypes.c_long(0))
    assert found not in (None, ctypes.c_void_p(-1).value)
    return int(found)
