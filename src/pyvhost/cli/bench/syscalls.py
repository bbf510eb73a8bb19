"""System calls a packet, for each backend: the back end's whole process counted while packets pass.

Most are counted while testpmd, which polls and never sleeps, keeps the back end busy. Some again with a driver
that behaves as a guest at ease: it sends a burst, kicks, and sleeps until it is called.

Backends that reach the kernel get their far end inside a network namespace of the back end's own, so that
nothing of a flood gets out of it: a tap with nobody behind it, a veth pair, and for `user` another one as the
only way out.

Promises: counts only between two moments at which nothing moved, so that calls and packets are of one span.
Never: measures speed.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import socket
import struct
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from pyvhost.cli.bench import counting
from pyvhost.cli.bench.backend import BackEnd, net_arguments
from pyvhost.cli.bench.net import LOOP_BURSTS
from pyvhost.cli.bench.results import SyscallResult
from pyvhost.cli.bench.testpmd import Cores, Testpmd, front_end_arguments
from pyvhost.driver.memory import GuestMemory
from pyvhost.driver.net import NetDriver
from pyvhost.driver.vhost_user import VhostUserFrontend

TO_HOST = "guest to host"
TO_GUEST = "host to guest"
BOTH = "both ways"
_FRAME = 64
#: What the driver at ease sends between two sleeps.
_BURST = 32
#: The front end's mode for that driver.
_AT_EASE = "bursts"
_CLONE_NEWNET = 0x40000000

#: Run in the back end's own network namespace before it starts.
_NAMESPACE = """
set -e
echo 1 > /proc/sys/net/ipv6/conf/all/disable_ipv6 2>/dev/null || true
echo 1 > /proc/sys/net/ipv6/conf/default/disable_ipv6 2>/dev/null || true
ip link set lo up
ip link add pvbench0 type veth peer name pvbench1
ip link set pvbench0 up
ip link set pvbench1 up
ip link add pvbench2 type veth peer name pvbench4
ip address add 192.0.2.2/24 dev pvbench2
ip link set pvbench2 up
ip link set pvbench4 up
ip route add default via 192.0.2.1
exec "$@"
"""


@dataclass(frozen=True)
class Subject:
    """One line of the table."""

    backend: str
    direction: str
    spec: str
    front_mode: str
    counts: str
    first_bursts: int = 0
    namespace: bool = False
    far_end: str = ""

    @property
    def driver(self) -> str:
        """How the guest's side behaves, in words."""
        return f"{_BURST}, then sleeps" if self.front_mode == _AT_EASE else "polls"


SUBJECTS = (
    Subject("null", TO_HOST, "null", "txonly", "tx"),
    Subject("generate", TO_GUEST, f"generate:{_FRAME}", "rxonly", "rx"),
    Subject("loop", BOTH, "loop", "io", "rx", first_bursts=LOOP_BURSTS),
    Subject("switch", "guest to guest", "switch:bench", "txonly", "peer"),
    Subject("tap", TO_HOST, "tap:pvbench3", "txonly", "tx", namespace=True),
    Subject("tap", TO_GUEST, "tap:pvbench3", "rxonly", "rx", namespace=True, far_end="pvbench3"),
    Subject("packet", TO_HOST, "packet:pvbench0", "txonly", "tx", namespace=True),
    Subject("packet", TO_GUEST, "packet:pvbench0", "rxonly", "rx", namespace=True, far_end="pvbench1"),
    Subject("stream", TO_HOST, "stream:{socket}", "txonly", "tx", far_end="sink"),
    Subject("stream", TO_GUEST, "stream:{socket}", "rxonly", "rx", far_end="source"),
    Subject("null", TO_HOST, "null", _AT_EASE, "tx"),
    Subject("tap", TO_HOST, "tap:pvbench3", _AT_EASE, "tx", namespace=True),
    Subject("user", TO_HOST, "user", "txonly", "tx", namespace=True),
)


def frame_from_host(size: int = _FRAME) -> bytes:
    """A broadcast frame of an Ethernet type that nobody serves (IEEE's for local experiments)."""
    return (b"\xff" * 6 + b"\x02\x00\x00\x00\x00\x07" + b"\x88\xb5").ljust(size, b"\0")


def stream_block(frame: bytes, frames: int) -> bytes:
    """As QEMU's stream netdev frames them: a 32-bit length in network order, then the frame."""
    return (struct.pack("!I", len(frame)) + frame) * frames


class Flood:
    """Sends one thing over and over from a thread, until it is stopped; never faster than it is taken."""

    def __init__(self, send: Callable[[], None]) -> None:
        self._send = send
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="flood", daemon=True)

    def start(self) -> None:
        """Begins."""
        self._thread.start()

    def stop(self) -> None:
        """Ends; nothing more is sent when this returns."""
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stop.is_set():
            with contextlib.suppress(TimeoutError, BlockingIOError):
                self._send()


def socket_in_namespace_of(pid: int, interface: str) -> socket.socket:
    """A raw packet socket on an interface of that process's network namespace (packet(7), setns(2))."""
    made: list[socket.socket | OSError] = []
    libc = ctypes.CDLL(None, use_errno=True)

    def make() -> None:
        # A namespace belongs to a thread; this one ends here, the socket keeps where it was made.
        try:
            with open(f"/proc/{pid}/ns/net", "rb") as namespace:
                if libc.setns(namespace.fileno(), _CLONE_NEWNET) != 0:
                    raise OSError(ctypes.get_errno(), "setns")
            raw = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
            raw.bind((interface, 0))
            made.append(raw)
        except OSError as error:
            made.append(error)

    maker = threading.Thread(target=make)
    maker.start()
    maker.join()
    if isinstance(made[0], OSError):
        raise made[0]
    return made[0]


class _StreamEnd:
    """The other end of a `stream` backend: listens, then reads all or writes frames for ever."""

    def __init__(self, path: Path) -> None:
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(str(path))
        self._listener.listen(1)
        self._listener.settimeout(20)

    def accept(self) -> socket.socket:
        connection, _ = self._listener.accept()
        # Short, so that a flood that nobody takes can still be stopped.
        connection.settimeout(0.2)
        return connection

    def close(self) -> None:
        self._listener.close()


class SyscallBench:
    """Runs the subjects one after the other."""

    def __init__(self, scratch: Path, huge: Path, cores: Cores, transcripts: Path, seconds: float) -> None:
        """`seconds`: how long each subject is counted."""
        self._scratch = scratch
        self._huge = huge
        self._cores = cores
        self._transcripts = transcripts
        self._seconds = seconds

    def missing(self, subject: Subject) -> str | None:
        """What this host lacks for the subject; None when it has all."""
        if subject.namespace and shutil.which("ip") is None:
            return f"{subject.backend}: install iproute2"
        if subject.backend == "tap" and not os.path.exists("/dev/net/tun"):
            return "tap: there is no /dev/net/tun"
        if subject.backend == "user" and shutil.which("passt") is None:
            return "user: install passt"
        return None

    def run(self, subject: Subject) -> SyscallResult:
        """Counts one subject."""
        name = f"syscalls-{subject.backend}-{subject.front_mode}"
        sockets = [self._scratch / f"{name}-{index}" for index in range(2 if subject.counts == "peer" else 1)]
        stream = self._scratch / f"{name}-stream"
        with contextlib.ExitStack() as stack:
            end = None
            if subject.far_end in ("sink", "source"):
                end = stack.enter_context(contextlib.closing(_StreamEnd(stream)))
            back = stack.enter_context(
                BackEnd(
                    f"{name} back",
                    net_arguments(
                        sockets,
                        subject.spec.format(socket=stream),
                        busyloop=subject.front_mode != _AT_EASE,
                    ),
                    core=self._cores.back_end,
                    wrap=["unshare", "--net", "sh", "-c", _NAMESPACE, "sh"] if subject.namespace else (),
                    transcript=self._transcripts / f"{name}-back.log",
                )
            )
            back.wait_ready(sockets)
            fronts: list[Testpmd] = []
            driver: NetDriver | None = None
            if subject.front_mode == _AT_EASE:
                driver = self._driver(stack, sockets[0])
            else:
                fronts += [
                    stack.enter_context(self._front(f"{name}-front-{index}", path, subject, index))
                    for index, path in enumerate(sockets)
                ]
            for front in fronts:
                front.wait_ready()
            if subject.backend == "tap":
                subprocess.run(
                    ["nsenter", "-t", str(back.pid), "-n", "ip", "link", "set", "pvbench3", "up"], check=True
                )
            with self._far_end(subject, back, end) as flood, counting.system_calls(back.pid) as count:
                packets = self._move_in_bursts(driver) if driver else self._move(subject, fronts, flood)
        return SyscallResult(
            subject.backend, subject.direction, packets, count.calls, count.total, count.by, subject.driver
        )

    @staticmethod
    def _driver(stack: contextlib.ExitStack, path: Path) -> NetDriver:
        memory = stack.enter_context(contextlib.closing(GuestMemory(4 << 20)))
        driver = NetDriver(stack.enter_context(VhostUserFrontend.connect(path)), memory)
        stack.callback(driver.close)
        driver.start()
        return driver

    def _move_in_bursts(self, driver: NetDriver) -> int:
        burst = [frame_from_host()] * _BURST
        sent = 0
        end = time.monotonic() + self._seconds
        while time.monotonic() < end:
            sent += driver.send_many(burst)
            driver.wait_sent()
        return sent

    def _move(self, subject: Subject, fronts: Sequence[Testpmd], flood: Flood | None) -> int:
        """Starts, waits, stops; how many packets the front end saw."""
        for front in reversed(fronts):
            front.start(subject.first_bursts)
        if flood is not None:
            flood.start()
        time.sleep(self._seconds)
        if flood is not None:
            flood.stop()
        stats = [front.stop() for front in fronts]
        if subject.counts == "tx":
            return stats[0].tx_packets
        return stats[-1].rx_packets

    @contextlib.contextmanager
    def _far_end(self, subject: Subject, back: BackEnd, end: _StreamEnd | None) -> Iterator[Flood | None]:
        if not subject.far_end:
            yield None
        elif end is not None:
            with end.accept() as connection:
                if subject.far_end == "source":
                    block = stream_block(frame_from_host(), 256)
                    yield Flood(_sender(connection, block))
                else:
                    drain = Flood(lambda: _receive(connection))
                    drain.start()
                    try:
                        yield None
                    finally:
                        drain.stop()
        else:
            with socket_in_namespace_of(back.pid, subject.far_end) as raw:
                raw.settimeout(0.2)
                frame = frame_from_host()
                yield Flood(lambda: _send_many(raw, frame))

    def _front(self, name: str, path: Path, subject: Subject, index: int) -> Testpmd:
        mode = "rxonly" if index == 1 else subject.front_mode
        return Testpmd(
            name,
            front_end_arguments(path, name, mode, self._cores, self._huge),
            self._transcripts / f"{name}.log",
        )


def _sender(connection: socket.socket, block: bytes) -> Callable[[], None]:
    """Sends the block over and over; what a full socket left over goes first the next time."""
    rest = memoryview(block)

    def send() -> None:
        nonlocal rest
        rest = rest[connection.send(rest) :] or memoryview(block)

    return send


def _receive(connection: socket.socket) -> None:
    connection.recv(1 << 20)


def _send_many(raw: socket.socket, frame: bytes) -> None:
    for _ in range(64):
        # A full queue drops, as a network does.
        with contextlib.suppress(OSError):
            raw.send(frame)
