"""A driver for benchmarks: offers all of two rings again and again, and has a port served until nothing is left.

Promises: ends after the rounds that were asked for; asks for no call. Never: is part of a device.
"""

from __future__ import annotations

from pyvhost.dataplane import policy
from pyvhost.dataplane.access import clock_ns, store16_release
from pyvhost.dataplane.blocks import SCRATCH_CLOCK, Record, Records
from pyvhost.dataplane.net_loop import serve
from pyvhost.dataplane.policy import kernel
from pyvhost.dataplane.swap import swap16


@kernel
def _offer(ring: Record, idx: int) -> None:
    store16_release(ring["avail"] + 2, swap16(idx) if ring["swap"] else idx)


@kernel
def exercise(workers: Records, rings: Records, ports: Records, rounds: int) -> int:
    """Serves port 0, with its rings 0 and 1, `rounds` times over; nanoseconds, or -1 if a ring stopped."""
    worker = workers[0]
    clock = worker["scratch"] + SCRATCH_CLOCK
    idx = 0
    started = clock_ns(clock)
    for _ in range(rounds):
        idx = (idx + rings[0]["num"]) & 0xFFFF
        _offer(rings[0], idx)
        _offer(rings[1], idx)
        while serve(worker, rings, ports, 0):
            pass
        if rings[0]["fault"] or rings[1]["fault"]:
            return -1
    return clock_ns(clock) - started


def prepare(workers: Records, rings: Records, ports: Records) -> None:
    """Compiles, or loads from the cache."""
    policy.prepare("the ring benchmark", [(exercise, (workers, rings, ports, 0))])
