"""Experiments with the receive ring, with other backends, with stopping and going on, and with the dirty log."""

from __future__ import annotations

import os
from contextlib import closing

from kernel.bench import (
    BUFFERS,
    FILL,
    LOG_ALL,
    MRG,
    NET_F,
    NEXT,
    PAGE,
    RX,
    TX,
    V1,
    WRITE,
    Bench,
    Host,
    frame,
    packet_socket,
    unmapped,
)
from kernel.experiment import experiment
from pyvhost.driver.dirty_log import DirtyLog
from pyvhost.host import eventfd

#: Where buffer 2 is.
AT_TWO = BUFFERS + 2 * PAGE


@experiment("net/rx/plain")
def plain(bench: Bench) -> None:
    for name, features in (("legacy", 0), ("VERSION_1", V1), ("MRG_RXBUF", MRG), ("both", V1 | MRG)):
        plain_with(bench, name, features)


def plain_with(bench: Bench, name: str, features: int) -> None:
    """One packet with these features."""
    bench.ready(features)
    rx, header, data = bench.rx, bench.header, frame(seed=7)
    rx.buffers(2000, at=2)
    rx.kick()
    bench.host.send(data)
    behind = data + bytes([FILL])
    bench.used(rx, f"{name}: used [id, len]")
    bench.fact(f"{name}: header bytes", lambda: bench.memory.read(AT_TWO, header).hex())
    bench.fact(f"{name}: data unchanged", lambda: bench.memory.read(AT_TWO + header, len(behind)) == behind)
    bench.state(rx, f"{name}: rx state")


@experiment("net/rx/mergeable")
def mergeable(bench: Bench) -> None:
    bench.ready(MRG)
    rx = bench.rx
    rx.buffers(*[64] * 10)
    rx.kick()
    bench.settle()
    bench.host.send(frame(300))
    bench.used(rx, "used [id, len]")
    bench.fact("header", lambda: bench.memory.read(BUFFERS, 12).hex())
    bench.state(rx, "rx state")
    bench.host.send(frame(330))
    bench.used(rx, "342 bytes for the 5 buffers (320 bytes) left: used")
    bench.state(rx, "rx state")
    rx.buffers(64)
    rx.kick()
    bench.used(rx, "one more buffer: used")
    bench.state(rx, "rx state")


@experiment("net/rx/too-small")
def too_small(bench: Bench) -> None:
    bench.ready()
    rx = bench.rx
    rx.buffers(64)
    rx.kick()
    bench.host.send(frame(60))
    bench.used(rx)
    bench.fact("buffer's first 16 bytes", lambda: bench.memory.read(BUFFERS, 16).hex())
    bench.state(rx)
    bench.host.send(frame(40))
    bench.used(rx, "a packet that fits (40+10): used")
    bench.state(rx)


@experiment("net/rx/no-buffers-then-kick")
def no_buffers_then_kick(bench: Bench) -> None:
    bench.ready()
    for _ in range(3):
        bench.host.send(frame())
    bench.state(bench.rx)
    bench.rx.buffers(2000, 2000, 2000)
    bench.rx.kick()
    bench.used(bench.rx)
    bench.state(bench.rx)


@experiment("net/backend/raw-socket")
def raw_socket(bench: Bench) -> None:
    for features in (NET_F, NET_F | V1 | MRG):
        with packet_socket("lo") as backend, closing(Host("lo")) as host:
            raw_socket_with(bench, features, backend, host)


def raw_socket_with(bench: Bench, features: int, backend: int, host: Host) -> None:
    """A packet each way with these features."""
    bench.ready(features, backend=backend)
    header, other = bench.header, frame(seed=9)
    bench.rx.buffers(2000)
    bench.rx.kick()
    bench.settle()
    host.send(frame())
    bench.used(bench.rx, f"features {features:#x}: rx used")
    bench.fact("header", lambda: bench.memory.read(BUFFERS, header).hex())
    # What is sent into a loopback is heard there too.
    bench.until(lambda: host.received() == [frame()])
    host.frames.clear()
    bench.memory.write(BUFFERS, bytes(header) + other)
    bench.tx.chain((BUFFERS, header + len(other), 0, 0))
    bench.tx.kick()
    bench.used(bench.tx, "tx used")
    bench.fact("tx came out of the interface without header", lambda: host.received() == [other])


# --- stopping and going on -------------------------------------------------------------------------------


@experiment("net/stop-and-go")
def stop_and_go(bench: Bench) -> None:
    bench.ready()
    bench.send(frame())
    bench.used(bench.tx)
    bench.fact("SET_BACKEND -1", lambda: bench.set_backend(TX, -1))
    bench.fact("base after stop", lambda: bench.front.get_vring_base(TX))
    bench.send(frame(), at=1)
    bench.state(bench.tx, "offered and kicked while stopped: state")
    bench.fact("SET_BACKEND again", lambda: bench.set_backend(TX, bench.backend))
    bench.used(bench.tx, "used (without another kick)")
    bench.state(bench.tx)


@experiment("net/stop-with-rx-buffers")
def stop_with_rx_buffers(bench: Bench) -> None:
    bench.ready()
    bench.rx.buffers(2000, 2000, 2000)
    bench.rx.kick()
    bench.settle()
    bench.host.send(frame())
    bench.used(bench.rx)
    bench.front.set_backend(RX, -1)
    bench.fact("base, used_idx", lambda: [bench.front.get_vring_base(RX), bench.rx.ring.used_idx])
    bench.front.set_backend(RX, bench.backend)
    bench.host.send(frame())
    bench.used(bench.rx, "after a restart, one more packet: used")


# --- the dirty log ---------------------------------------------------------------------------------------


class Log:
    """A dirty log of the bench's memory and its eventfd."""

    def __init__(self, bench: Bench) -> None:
        self.bench = bench
        self._log = DirtyLog.covering(bench.memory)
        self._fd = eventfd.create()
        self._signals = 0
        bench.front.set_log_base(self._log.address)
        bench.front.set_log_fd(self._fd)

    def start(self, ring_writes: bool = True) -> None:
        """As `Bench.start`, with or without the rings' own writes logged."""
        for ring in (self.bench.rx, self.bench.tx):
            front, queue = self.bench.front, ring.queue
            front.set_vring_num(ring.index, ring.ring.size)
            front.set_ring_addr(ring.index, queue, log=ring_writes)
            front.set_vring_call(ring.index, queue.call_fd)
            front.set_vring_err(ring.index, queue.err_fd)
            front.set_vring_kick(ring.index, queue.kick_fd)
            front.bind(ring.index)
        self.bench.settle()

    def pages(self) -> list[str]:
        """The guest addresses of pages that are marked."""
        return [hex(page * PAGE) for page in sorted(self._log.pages())]

    def found(self) -> list[object]:
        """Pages, and how often the eventfd was signalled, since they were last taken."""
        self._signals += eventfd.drain(self._fd)
        return [self.pages(), self._signals]

    def fact(self, name: str) -> None:
        """The next fact about the log, which begins anew."""
        self.bench.fact(f"{name}: pages, log eventfd", self.found)
        self._log.take()
        self._signals = 0

    def close(self) -> None:
        """Let go of both, once the device is gone."""
        self._log.close()
        os.close(self._fd)


@experiment("net/log/rx")
def log_rx(bench: Bench) -> None:
    bench.set_up(V1 | LOG_ALL)
    log = bench.owned(Log(bench))
    log.start()
    log.fact("binding marks (used->flags written)")
    rx = bench.rx
    rx.chain((0x180F00, 0x200, WRITE | NEXT, 1), (0x190800, 0x2000, WRITE, 0))
    rx.kick()
    log.fact("buffer offered and kicked")
    bench.host.send(frame(3000))
    bench.used(rx)
    log.fact(
        "3012 bytes into 0x180f00+0x200, 0x190800+0x2000 -> bytes 0x180f00..0x181100, 0x190800..0x1911c4"
    )
    rx.chain((0x1A0000, 0x4000, WRITE, 0), at=2)
    rx.kick()
    bench.host.send(frame(60))
    log.fact("72 bytes into 0x1a0000+0x4000")
    bench.send(frame())
    log.fact("a tx packet")


@experiment("net/log/without-ring-flag")
def log_without_ring_flag(bench: Bench) -> None:
    bench.set_up(V1 | LOG_ALL)
    log = bench.owned(Log(bench))
    log.start(ring_writes=False)
    bench.rx.chain((0x1A0000, 0x4000, WRITE, 0))
    bench.rx.kick()
    bench.host.send(frame(60))
    bench.fact("pages", log.pages)


@experiment("net/log/base-missing")
def log_base_missing(bench: Bench) -> None:
    for name, base in (("0", 0), ("unmapped", unmapped(PAGE))):
        bench.set_up(LOG_ALL)
        bench.front.set_log_base(base)
        bench.start()
        bench.rx.buffers(2000)
        bench.rx.kick()
        bench.host.send(frame())
        bench.used(bench.rx, f"{name}: used")
        bench.state(bench.rx, f"{name}: state")
