"""What the workers' loops have in common: who is active, kicks asked for and heard, and sleep.

A *port* here is whatever has its turns in a loop: a net port, a socket device's guest, a queue of disks.

Promises: a port is in the worker's list of active ones once at most; a ring at fault is looked at again at the next
kick. Never: looks into a ring.
"""

from __future__ import annotations

from pyvhost.dataplane.access import load64, store64, sys_epoll_wait
from pyvhost.dataplane.blocks import (
    C_KICKS,
    C_SYSCALLS,
    EVENTS,
    IOTLB_MISS,
    REASON_RING,
    Record,
    Records,
)
from pyvhost.dataplane.policy import inline, kernel
from pyvhost.dataplane.split_ring import count, want_kicks


@kernel
def ask_kicks(rings: Records, port: Record, wanted: bool) -> None:
    """Asks a port's driver for kicks, or spares it them: on receive only where buffers have run out."""
    if port["tx"] >= 0 and rings[port["tx"]]["running"]:
        want_kicks(rings[port["tx"]], wanted)
    if port["rx"] >= 0 and rings[port["rx"]]["running"]:
        want_kicks(rings[port["rx"]], wanted and port["rx_dry"] != 0)


@kernel
def activate(worker: Record, rings: Records, ports: Records, index: int) -> None:
    """Has the loop look at a port in this turn or the next."""
    port = ports[index]
    if port["active"] == 0 and port["used"]:
        enlist(worker, port, index)
        port["idle_since"] = 0
        ask_kicks(rings, port, False)


@inline
def enlist(worker: Record, port: Record, index: int) -> None:
    """Puts a port that is not active among those that are."""
    port["active"] = 1
    store64(worker["active"] + 8 * worker["active_count"], index)
    worker["active_count"] += 1


@inline
def retire(worker: Record, port: Record, at: int) -> None:
    """Lets an active port rest, which has place `at` among them: the last one gets that."""
    port["active"] = 0
    worker["active_count"] -= 1
    store64(worker["active"] + 8 * at, load64(worker["active"] + 8 * worker["active_count"]))


@inline
def sleep(worker: Record, timeout_ms: int) -> int:
    """Waits in epoll, so long at most (-1: for ever); how many struct epoll_event are at `worker["events"]`."""
    ready = sys_epoll_wait(worker["epoll"], worker["events"], EVENTS, timeout_ms)
    count(worker["row"], C_SYSCALLS, 1)
    return ready


@kernel
def kicked(worker: Record, ring: Record) -> None:
    """A driver has kicked: a ring at fault is looked at again, as on Linux; one that isn't located misses again."""
    count(ring["row"], C_KICKS, 1)
    if ring["fault"] and not ring["running"] and ring["located"]:
        ring["fault"] = 0
        ring["running"] = 1
    elif not ring["running"] and not ring["located"]:
        ring["fault"] = IOTLB_MISS
        ring["fault_told"] = 0
        worker["reason"] |= REASON_RING
