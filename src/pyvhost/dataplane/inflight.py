"""Marks in the inflight memory: which chains a device that works out of order has taken and not yet used.

The chains of one publication form a list (vhost-user, "Inflight I/O tracking"), so that whoever finds the memory
after a crash in the middle of it knows which of them were used.

Promises: `begin` before anything is done for a chain; `listed` before the used index shows it, `done` after.
Never: decides what is used.
"""

from __future__ import annotations

from typing import Final

from pyvhost.dataplane.access import load16, load64, store8, store16, store16_release, store64
from pyvhost.dataplane.blocks import INFLIGHT_DESC, INFLIGHT_DESC_BYTES, INFLIGHT_USED_IDX, Record
from pyvhost.dataplane.policy import inline, kernel

_LAST_BATCH_HEAD: Final = 12
_NEXT: Final = 6
_COUNTER: Final = 8


@inline
def begin(ring: Record, head: int) -> None:
    """A chain is taken."""
    if ring["inflight"]:
        state = ring["inflight"] + INFLIGHT_DESC + head * INFLIGHT_DESC_BYTES
        store64(state + _COUNTER, ring["taken"])
        ring["taken"] += 1
        store8(state, 1)


@inline
def listed(ring: Record, head: int) -> None:
    """A chain's used element is written, and about to be shown."""
    if ring["inflight"]:
        area = ring["inflight"]
        store16(area + INFLIGHT_DESC + head * INFLIGHT_DESC_BYTES + _NEXT, load16(area + _LAST_BATCH_HEAD))
        store16_release(area + _LAST_BATCH_HEAD, head)


@kernel
def done(ring: Record, before: int) -> None:
    """The used index went from `before` to what it is: those chains are in flight no more."""
    area = ring["inflight"]
    head = load16(area + _LAST_BATCH_HEAD)
    used = ring["used_idx"]
    for _ in range((used - before) & 0xFFFF):
        if head >= ring["num"]:
            break
        state = area + INFLIGHT_DESC + head * INFLIGHT_DESC_BYTES
        store8(state, 0)
        head = load64(state) >> 48 & 0xFFFF
    store16_release(area + INFLIGHT_USED_IDX, used)
