"""A driver for benchmarks: keeps so many prepared requests of one ring under way, as a guest's driver would.

Each request is one descriptor whose chain lies in an indirect table that is written once. When it comes back, its
verdict is looked at, another position is written into its header, and it is offered again. The driver kicks and
asks for calls as the ring's features have it, and sleeps until it is called.

Promises: ends after `deadline` with nothing under way, or says that nothing came back; looks at every verdict.
Never: is part of a device, or shares its ring code.
"""

from __future__ import annotations

from typing import Final

from pyvhost.dataplane import policy
from pyvhost.dataplane.access import (
    clock_ns,
    fence,
    load16,
    load16_acquire,
    load32,
    load64,
    signal,
    store16,
    store16_release,
    store32,
    store64,
    sys_epoll_wait,
)
from pyvhost.dataplane.blocks import Record, Records, int64s
from pyvhost.dataplane.policy import kernel
from pyvhost.dataplane.swap import swap32

#: What is driven, and what came of it.
LOAD: Final = int64s(
    # The ring's parts in this process, its entries, whether it has event indices, where it stands.
    *("avail", "used", "num", "event_idx", "avail_idx", "used_idx"),
    # An eventfd to kick; an epoll that is told of calls.
    *("kick_fd", "epoll"),
    # Requests by head: `REQUEST_BYTES` each; how many of them are kept under way.
    *("requests", "depth"),
    # Positions: how many there are, how far apart (in the unit of the header's word), whether they are 32 bits big
    # endian or 64 little, whether they follow each other; the next, or the state of the random numbers.
    *("places", "stride", "big32", "sequential", "state"),
    # What a good request's verdict is not: it is written before, and has to be gone (0) after.
    "pending",
    # 64 bytes for the clock and for events.
    "scratch",
    # Requests that came back, those whose verdict was bad, kicks, sleeps.
    *("done", "bad", "kicks", "sleeps"),
)

#: A request: addresses of its position and of its verdict.
REQUEST_PLACE: Final = 0
REQUEST_VERDICT: Final = 8
REQUEST_BYTES: Final = 16

#: A device that gives nothing back for this long is stuck.
_PATIENCE_MS: Final = 10_000
_SPREAD: Final = 6364136223846793005


@kernel
def _offer(load: Record, head: int) -> None:
    """Puts a request at another position, and into the available ring; `_publish` shows it."""
    request = load["requests"] + REQUEST_BYTES * head
    state = load["state"]
    if load["sequential"]:
        place = state % load["places"]
        load["state"] = state + 1
    else:
        # Knuth's MMIX generator: the upper half is good enough to spread requests.
        state = state * _SPREAD + 1442695040888963407
        load["state"] = state
        place = ((state >> 33) & 0x3FFFFFFF) % load["places"]
    at = load64(request + REQUEST_PLACE)
    if load["big32"]:
        store32(at, swap32(place * load["stride"]))
    else:
        store64(at, place * load["stride"])
    store16(load64(request + REQUEST_VERDICT), load["pending"])
    idx = load["avail_idx"]
    store16(load["avail"] + 4 + 2 * (idx & (load["num"] - 1)), head)
    load["avail_idx"] = (idx + 1) & 0xFFFF


@kernel
def _publish(load: Record, before: int) -> None:
    """Shows the device what was offered since `before`, and kicks it if it wants that (virtio 1.3, 2.7.13)."""
    now = load["avail_idx"]
    if now == before:
        return
    # Pairs with the device's acquire load of avail->idx.
    store16_release(load["avail"] + 2, now)
    # Pairs with the device's barrier between its avail_event or flags, and its last look at avail->idx.
    fence()
    if load["event_idx"]:
        event = load16(load["used"] + 4 + 8 * load["num"])
        wanted = ((now - event - 1) & 0xFFFF) < ((now - before) & 0xFFFF)
    else:
        wanted = load16(load["used"]) & 1 == 0
    if wanted:
        signal(load["kick_fd"])
        load["kicks"] += 1


@kernel
def _take(load: Record, again: bool) -> int:
    """Takes what was used, and offers it `again`; how many."""
    # Pairs with the device's release store of used->idx.
    end = load16_acquire(load["used"] + 2)
    idx = load["used_idx"]
    took = (end - idx) & 0xFFFF
    for i in range(took):
        head = load32(load["used"] + 4 + 8 * ((idx + i) & (load["num"] - 1)))
        request = load["requests"] + REQUEST_BYTES * (head & (load["num"] - 1))
        if load16(load64(request + REQUEST_VERDICT)) != 0:
            load["bad"] += 1
        if again:
            _offer(load, head)
    load["used_idx"] = end
    load["done"] += took
    return took


@kernel
def drive(loads: Records, deadline: int) -> int:
    """Keeps `depth` requests under way until the clock shows `deadline`, then takes back all.

    Nanoseconds that it took, -1 if nothing came back for ten seconds.
    """
    load = loads[0]
    clock = load["scratch"]
    started = clock_ns(clock)
    under_way = load["depth"]
    before = load["avail_idx"]
    # Not asked for calls while it looks by itself.
    store16(load["avail"], 0 if load["event_idx"] else 1)
    for head in range(under_way):
        _offer(load, head)
    _publish(load, before)
    while under_way > 0:
        again = clock_ns(clock) < deadline
        before = load["avail_idx"]
        took = _take(load, again)
        if took:
            _publish(load, before)
            if not again:
                under_way -= took
            continue
        if load["event_idx"]:
            store16(load["avail"] + 4 + 2 * load["num"], load["used_idx"])
        else:
            store16(load["avail"], 0)
        # Pairs with the device's barrier between used->idx and its look at used_event or flags.
        fence()
        if load16_acquire(load["used"] + 2) == load["used_idx"]:
            load["sleeps"] += 1
            if sys_epoll_wait(load["epoll"], clock + 16, 1, _PATIENCE_MS) == 0:
                return -1
        if not load["event_idx"]:
            store16(load["avail"], 1)
    return clock_ns(clock) - started


def prepare(loads: Records) -> None:
    """Compiles, or loads from the cache."""
    policy.prepare("the benchmark's driver", [(drive, (loads, 0))])
