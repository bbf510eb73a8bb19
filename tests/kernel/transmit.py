"""Experiments with the transmit ring: what goes, what is told of it, and what a bad chain does."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from kernel.bench import (
    BUFFERS,
    EVENT_IDX,
    INDIRECT,
    NEXT,
    PAGE,
    TABLES,
    V1,
    WRITE,
    Bench,
    Descriptor,
    frame,
    unmapped,
)
from kernel.experiment import experiment
from pyvhost.abi import virtio
from pyvhost.driver.memory import GuestMemory, Span

GOOD = (BUFFERS, 70, 0, 0)
OUTSIDE = 0x10_0000_0000


@experiment("net/tx/version-1-scattered")
def version_1_scattered(bench: Bench) -> None:
    bench.ready(V1)
    data = frame(100)
    bench.memory.write(BUFFERS, bytes(12))
    bench.memory.write(BUFFERS + PAGE, data[:30])
    bench.memory.write(BUFFERS + 2 * PAGE, data[30:])
    bench.tx.chain(
        (BUFFERS, 12, NEXT, 4), (BUFFERS + PAGE, 30, NEXT, 5), (BUFFERS + 2 * PAGE, 70, 0, 0), at=3
    )
    bench.tx.kick()
    bench.used(bench.tx, "used elements")
    bench.fact("packet arrived unchanged", lambda: bench.host.received() == [data])
    bench.state(bench.tx, "tx afterwards")


@experiment("net/tx/notification-flags")
def notification_flags(bench: Bench) -> None:
    bench.ready()
    rx, tx = bench.rx, bench.tx
    bench.fact(
        "at rest, before any kick: rx flags, tx flags", lambda: [rx.ring.used_flags, tx.ring.used_flags]
    )
    bench.send(frame())
    bench.fact("after one tx packet: tx flags", lambda: tx.ring.used_flags)
    bench.calls(tx, "calls")
    tx.ring.avail_flags = virtio.VRING_AVAIL_F_NO_INTERRUPT
    bench.send(frame(), at=1)
    eventually_used(bench, 2)
    bench.calls(tx, "calls with NO_INTERRUPT")
    rx.buffers(2000)
    rx.kick()
    bench.fact("rx buffer offered and kicked, no packet: rx flags", lambda: rx.ring.used_flags)
    bench.host.send(frame())
    bench.used(rx, "rx used")
    bench.fact("after one rx packet: rx flags", lambda: rx.ring.used_flags)
    bench.host.send(frame())
    bench.fact("a packet waits, no buffer: rx flags", lambda: rx.ring.used_flags)


@experiment("net/tx/event-idx")
def event_idx(bench: Bench) -> None:
    bench.ready(EVENT_IDX)
    rx, tx = bench.rx, bench.tx
    bench.fact(
        "after binding: used flags, avail_event (tx)", lambda: [tx.ring.used_flags, tx.ring.avail_event]
    )
    bench.send(frame())
    bench.calls(
        tx,
        "used_event 0, first packet: calls, avail_event, used flags",
        lambda: [tx.calls(), tx.ring.avail_event, tx.ring.used_flags],
    )
    bench.send(frame(), at=1)
    eventually_used(bench, 2)
    bench.calls(
        tx,
        "used_event still 0, second: calls, avail_event",
        lambda: [tx.calls(), tx.ring.avail_event],
    )
    tx.ring.used_event = 2
    bench.send(frame(), at=2)
    bench.calls(
        tx,
        "used_event 2, third packet (index 2): calls, avail_event",
        lambda: [tx.calls(), tx.ring.avail_event],
    )
    tx.ring.used_event = 5
    for number in (3, 4, 5):
        bench.send(frame(), at=number)
        eventually_used(bench, number + 1)
        bench.calls(tx, f"used_event 5, packet {number}: calls")
    rx.buffers(2000, 2000, 2000, 2000)
    rx.kick()
    bench.fact("rx: 4 buffers offered: avail_event", lambda: rx.ring.avail_event)
    bench.host.send(frame())
    bench.calls(rx, "rx: one packet: avail_event, calls", lambda: [rx.ring.avail_event, rx.calls()])
    for _ in range(4):
        bench.host.send(frame())
    bench.calls(
        rx,
        "rx: 4 more packets for 3 buffers: used_idx, avail_event, calls",
        lambda: [rx.ring.used_idx, rx.ring.avail_event, rx.calls()],
    )


def eventually_used(bench: Bench, index: int) -> None:
    """What comes next is about a call that is not to be: the packet has to have gone first."""
    bench.until(lambda: bench.tx.ring.used_idx == index)


@experiment("net/tx/batch")
def batch(bench: Bench) -> None:
    bench.ready(size=256)
    for number in range(200):
        bench.send(frame(), at=number, kick=False)
    bench.tx.kick()

    def used() -> list[object]:
        found = bench.tx.used()
        return [
            len(found),
            all(size == 0 for _, size in found),
            [head for head, _ in found] == list(range(200)),
        ]

    bench.fact("used count, all len 0, in order", used)
    bench.calls(bench.tx, "calls (eventfd counter: one per signalled batch)")
    bench.fact("packets seen", lambda: len(bench.host.received()))


@experiment("net/tx/weight")
def weight(bench: Bench) -> None:
    bench.ready(size=1024)
    bench.memory.write(BUFFERS, bytes(bench.header) + frame())
    for number in range(1000):
        bench.tx.chain(GOOD, at=number)
    bench.tx.kick()
    bench.fact("used count", lambda: len(bench.tx.used()))
    bench.calls(bench.tx, "calls")


@experiment("net/tx/interface-down")
def interface_down(bench: Bench) -> None:
    bench.ready(up=False)
    bench.send(frame())
    bench.used(bench.tx)
    bench.state(bench.tx)

    def counters() -> dict[str, int]:
        # Of what receives, as it stands in the line of an interface: bytes, packets, errs, drop.
        (line,) = (
            line for line in Path("/proc/thread-self/net/dev").read_text().splitlines() if "vhosttap:" in line
        )
        words = line.partition(":")[2].split()
        return {"rx_packets": int(words[1]), "rx_dropped": int(words[3])}

    bench.fact("the interface's counters", counters)

    def write() -> str:
        try:
            os.write(bench.backend, bytes(10) + frame())
        except OSError as error:
            return "EIO" if error.errno == 5 else str(error)
        return "written"

    bench.fact("a plain write() to the tap", write)


# --- what is wrong with a chain ------------------------------------------------------------------------------


def table(bench: Bench, *descriptors: Descriptor) -> Descriptor:
    """An indirect table of these, and the descriptor that names it."""
    data = b"".join(
        address.to_bytes(8, "little")
        + length.to_bytes(4, "little")
        + flags.to_bytes(2, "little")
        + following.to_bytes(2, "little")
        for address, length, flags, following in descriptors
    )
    bench.memory.write(TABLES, data)
    return TABLES, len(data), INDIRECT, 0


def ahead(bench: Bench, count: int) -> None:
    """`avail->idx` that far ahead, whatever the entries say."""
    for number in range(count):
        bench.tx.chain(GOOD, at=number % 16)


CHAINS: dict[str, Callable[[Bench], None]] = {
    "head-out-of-range": lambda bench: bench.tx.chain(GOOD, head=16),
    "next-out-of-range": lambda bench: bench.tx.chain((BUFFERS, 70, NEXT, 16)),
    "loop": lambda bench: bench.tx.chain((BUFFERS, 35, NEXT, 1), (BUFFERS + 35, 35, NEXT, 0)),
    "address-wraps": lambda bench: bench.tx.chain(((1 << 64) - 8, 70, 0, 0)),
    "writable": lambda bench: bench.tx.chain((BUFFERS, 70, WRITE, 0)),
    "readable-then-writable": lambda bench: bench.tx.chain(
        (BUFFERS, 70, NEXT, 1), (BUFFERS + PAGE, 70, WRITE, 0)
    ),
    "writable-then-readable": lambda bench: bench.tx.chain(
        (BUFFERS + PAGE, 70, WRITE | NEXT, 1), (BUFFERS, 70, 0, 0)
    ),
    "zero-length": lambda bench: bench.tx.chain((BUFFERS, 0, 0, 0)),
    "zero-length-first": lambda bench: bench.tx.chain((BUFFERS, 0, NEXT, 1), GOOD),
    "header-only": lambda bench: bench.tx.chain((BUFFERS, 10, 0, 0)),
    "half-a-header": lambda bench: bench.tx.chain((BUFFERS, 5, 0, 0)),
    "header-and-one-byte": lambda bench: bench.tx.chain((BUFFERS, 11, 0, 0)),
    "header-and-14-bytes": lambda bench: bench.tx.chain((BUFFERS, 24, 0, 0)),
    "avail-jumps": lambda bench: ahead(bench, 17),
    "avail-full": lambda bench: ahead(bench, 16),
    "indirect-empty": lambda bench: bench.tx.chain((TABLES, 0, INDIRECT, 0)),
    "indirect-nested": lambda bench: bench.tx.chain(table(bench, (TABLES, 16, INDIRECT, 0))),
    "indirect-next-out": lambda bench: bench.tx.chain(table(bench, (BUFFERS, 70, NEXT, 1))),
    "indirect-and-next": lambda bench: bench.tx.chain(
        (*table(bench, (BUFFERS, 10, 0, 0))[:2], INDIRECT | NEXT, 1), (BUFFERS + 10, 60, 0, 0)
    ),
    "indirect-outside": lambda bench: bench.tx.chain((OUTSIDE, 16, INDIRECT, 0)),
}


def chain_experiment(name: str, make: Callable[[Bench], None]) -> None:
    @experiment(f"net/tx-errors/{name}")
    def bad_chain(bench: Bench) -> None:
        bench.ready()
        bench.memory.write(BUFFERS, bytes(10) + frame())
        make(bench)
        bench.tx.kick()
        bench.used(bench.tx)
        bench.fact("received", bench.host.length)
        bench.state(bench.tx, "state after")
        bench.tx.kick()
        bench.state(bench.tx, "kicked once more")


for _name, _make in CHAINS.items():
    chain_experiment(_name, _make)


@experiment("net/tx-errors/good-after-bad")
def good_after_bad(bench: Bench) -> None:
    bench.ready()
    bench.memory.write(BUFFERS, bytes(10) + frame())
    bench.tx.chain((BUFFERS, 70, WRITE, 0))
    bench.tx.chain(GOOD, at=1)
    bench.tx.kick()
    bench.used(bench.tx)
    bench.fact("received", bench.host.length)
    bench.state(bench.tx, "state after")
    bench.tx.kick()
    bench.state(bench.tx, "kicked once more")


@experiment("net/tx-errors/mend-and-kick")
def mend_and_kick(bench: Bench) -> None:
    bad: dict[str, Descriptor] = {
        "address outside the table": (OUTSIDE, 70, 0, 0),
        "writable": (BUFFERS, 70, WRITE, 0),
        "zero length": (BUFFERS, 0, 0, 0),
    }
    for name, descriptor in bad.items():
        bench.ready()
        bench.memory.write(BUFFERS, bytes(10) + frame())
        bench.tx.chain(descriptor)
        bench.tx.kick()
        bench.state(bench.tx, f"{name}: state")
        bench.tx.chain(GOOD, offer=False)
        bench.tx.kick()
        bench.used(bench.tx, f"{name}, mended and kicked: used")
        bench.state(bench.tx, f"{name}, mended and kicked: state")


@experiment("net/tx-errors/half-a-header-spins")
def half_a_header_spins(bench: Bench) -> None:
    """How often a worker tries depends on time; what comes of it does not."""
    bench.ready()
    bench.memory.write(BUFFERS, bytes(10) + frame())
    bench.tx.chain((BUFFERS, 5, 0, 0))
    bench.tx.kick()
    bench.tx.chain(GOOD, offer=False)
    bench.used(bench.tx, "mended, no kick: used")
    bench.state(bench.tx)


@experiment("net/tx-errors/unreadable-memory")
def unreadable_memory(bench: Bench) -> None:
    """The rings are there, the buffers are not."""
    hole = unmapped(PAGE)
    start = 1 << 32
    memory = GuestMemory([Span(0, 4 << 20), Span(start, PAGE, userspace_addr=hole)], anonymous=True)
    bench.ready(memory=memory)
    bench.tx.chain((start, 70, 0, 0))
    bench.tx.kick()
    bench.used(bench.tx, "tx used")
    bench.state(bench.tx, "tx state")
    bench.rx.chain((start, 2000, WRITE, 0))
    bench.rx.kick()
    bench.host.send(frame())
    bench.used(bench.rx, "rx used")
    bench.state(bench.rx, "rx state")
    bench.host.send(frame())
    bench.used(bench.rx, "second packet: rx used")
