"""The net worker's loop: every port that a thread serves, until Python is needed.

Poll what is active; a port without work goes on being polled for its `busy_ns`, then asks its driver for kicks,
is looked at once more, and rests until a kick or its descriptor wakes it. The loop sleeps in epoll when no port
is active, and looks into epoll now and then while some are.

Promises: a turn gives each active port at most one batch each way, so that none starves another; a request to
stop is seen once a turn; descriptors are watched edge-triggered, so that an eventfd never needs to be read.
Never: returns without a reason (`REASON_*`).
"""

from __future__ import annotations

from typing import Final

from pyvhost.dataplane.access import clock_ns, load32, load64, load64_acquire, relax
from pyvhost.dataplane.blocks import (
    CONTROL_STOP,
    EVENT_KICK,
    EVENT_PORT,
    PORT_FD,
    PORT_GENERATE,
    PORT_STREAM,
    REASON_STOP,
    SCRATCH_CLOCK,
    Record,
    Records,
)
from pyvhost.dataplane.net_receive import generate, receive_fd, receive_stream, receive_uplink
from pyvhost.dataplane.net_send import flush_unsent
from pyvhost.dataplane.net_transmit import transmit
from pyvhost.dataplane.policy import kernel
from pyvhost.dataplane.turns import activate, ask_kicks, kicked, retire, sleep

_EPOLLIN: Final = 0x1
_EPOLLOUT: Final = 0x4
_EPOLLERR_OR_HUP: Final = 0x18
#: How long polling rings are left alone for each chain of the last busy turns, and at most: nanoseconds.
_BREATH_NS: Final = 200
_LONGEST_BREATH_NS: Final = 20_000
#: Between two looks at the clock meanwhile.
_RELAX: Final = 4
#: While ports are busy, epoll is asked this seldom for what rests: nanoseconds.
_LOOK_NS: Final = 20_000


@kernel
def serve(worker: Record, rings: Records, ports: Records, index: int) -> int:
    """One turn of a port, both ways; how much it moved."""
    port = ports[index]
    kind = port["kind"]
    moved = 0
    tx = port["tx"]
    if port["unsent_bytes"] and port["writable"]:
        # The rest of a frame goes even if no other comes, and its guest has gone.
        flush_unsent(worker, ports, index, rings[tx]["row"])
    if tx >= 0 and rings[tx]["running"]:
        moved += transmit(worker, rings, ports, index)
    rx = port["rx"]
    if port["row"]:
        if kind == PORT_FD:
            moved += receive_uplink(worker, rings, ports, index)
    elif rx >= 0 and rings[rx]["running"]:
        if kind == PORT_FD:
            moved += receive_fd(worker, rings, ports, index)
        elif kind == PORT_GENERATE:
            moved += generate(worker, rings, ports, index)
        elif kind == PORT_STREAM:
            moved += receive_stream(worker, rings, ports, index)
    return moved


@kernel
def _wait(worker: Record, rings: Records, ports: Records, timeout_ms: int) -> None:
    """Sleeps in epoll and wakes the ports that something happened to."""
    events = worker["events"]
    for i in range(sleep(worker, timeout_ms)):
        # struct epoll_event is packed: 4 bytes of events, 8 of data.
        happened = load32(events + 12 * i)
        kind = load32(events + 12 * i + 8)
        index = load32(events + 12 * i + 4)
        if kind == EVENT_KICK:
            kicked(worker, rings[index])
            activate(worker, rings, ports, rings[index]["port"])
        elif kind == EVENT_PORT:
            port = ports[index]
            if happened & (_EPOLLIN | _EPOLLERR_OR_HUP):
                port["readable"] = 1
            if happened & (_EPOLLOUT | _EPOLLERR_OR_HUP):
                port["writable"] = 1
            activate(worker, rings, ports, index)


@kernel
def _rest(worker: Record, rings: Records, ports: Records, index: int, now: int) -> bool:
    """Whether a port without work may rest: not while it is polled, nor if asking for kicks shows work."""
    port = ports[index]
    if port["held_up"]:
        return False
    if port["busy_ns"]:
        if port["idle_since"] == 0:
            port["idle_since"] = now
        if now - port["idle_since"] < port["busy_ns"]:
            return False
    ask_kicks(rings, port, True)
    if serve(worker, rings, ports, index):
        ask_kicks(rings, port, False)
        port["idle_since"] = 0
        return False
    return True


@kernel
def _breathe(worker: Record, now: int, moved: int) -> None:
    """Leaves the rings alone for a while after `moved` were taken from or put into them.

    A look at an index that has not changed takes its cache line away from the driver, which is about to write
    there. What the driver makes meanwhile comes in one go, and it is late by a small part of what it took.
    """
    clock = worker["scratch"] + SCRATCH_CLOCK
    end = now + min(moved * _BREATH_NS, _LONGEST_BREATH_NS)
    while load64_acquire(worker["control"] + 8 * CONTROL_STOP) == 0:
        for _ in range(_RELAX):
            relax()
        if clock_ns(clock) >= end:
            break


@kernel
def net_loop(workers: Records, rings: Records, ports: Records) -> int:
    """Serves the ports of `workers[0]` until there is a reason to return, which it returns."""
    worker = workers[0]
    active = worker["active"]
    clock = worker["scratch"] + SCRATCH_CLOCK
    looked = 0
    run = 0
    worker["reason"] = REASON_STOP
    # Pairs with the store of the control thread that wants to change something.
    while load64_acquire(worker["control"] + 8 * CONTROL_STOP) == 0:
        if worker["active_count"] == 0:
            _wait(worker, rings, ports, -1)
            if worker["reason"] != REASON_STOP:
                return worker["reason"]
            continue
        now = clock_ns(clock)
        if now - looked > _LOOK_NS and (
            worker["ports"] > worker["active_count"] or worker["watched"] or worker["faults"]
        ):
            looked = now
            _wait(worker, rings, ports, 0)
        at = 0
        moved = 0
        while at < worker["active_count"]:
            index = load64(active + 8 * at)
            served = serve(worker, rings, ports, index)
            if served:
                moved += served
                ports[index]["idle_since"] = 0
                at += 1
            elif _rest(worker, rings, ports, index, now):
                retire(worker, ports[index], at)
            else:
                at += 1
            if worker["reason"] != REASON_STOP:
                return worker["reason"]
        run += moved
        if moved == 0 and worker["active_count"] > 0:
            _breathe(worker, now, run)
            run = 0
    return REASON_STOP
