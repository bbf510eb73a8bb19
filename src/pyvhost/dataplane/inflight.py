"""The inflight memory, kept while a ring runs: what a later life must know if this one ends in the middle.

The chains of one publication form a list, from the last batch's head on (vhost-user, "Inflight I/O tracking").
Whoever finds a used index that the region has not noted yet walks that list as far as the two are apart.

Promises: the list is there before the used index shows its chains, the marks go after it has; `begin` marks a chain
before anything is done for it, where a device works out of order. Never: decides what is used.
"""

from __future__ import annotations

from typing import Final

from pyvhost.dataplane.access import load16, load32, store8, store16, store16_release, store64
from pyvhost.dataplane.blocks import INFLIGHT_DESC, INFLIGHT_DESC_BYTES, INFLIGHT_USED_IDX, Record
from pyvhost.dataplane.policy import inline, kernel
from pyvhost.dataplane.swap import swap32

LAST_BATCH_HEAD: Final = 12
NEXT: Final = 6
COUNTER: Final = 8


@inline
def begin(ring: Record, head: int) -> None:
    """A chain is taken, and may be used after others that come later."""
    if ring["inflight"]:
        state = ring["inflight"] + INFLIGHT_DESC + head * INFLIGHT_DESC_BYTES
        store64(state + COUNTER, ring["taken"])
        ring["taken"] += 1
        store8(state, 1)


@kernel
def list_used(ring: Record, first: int, end: int) -> None:
    """Makes used elements `first` to `end` (indices modulo 65536) the list of the last batch."""
    area = ring["inflight"]
    mask = ring["num"] - 1
    last = load16(area + LAST_BATCH_HEAD)
    for i in range((end - first) & 0xFFFF):
        # The guest may have written there: what is no head is left out.
        head = load32(ring["used"] + 4 + 8 * ((first + i) & mask))
        if ring["swap"]:
            head = swap32(head)
        if head < ring["num"]:
            store16(area + INFLIGHT_DESC + head * INFLIGHT_DESC_BYTES + NEXT, last)
            last = head
    # Pairs with nobody: it only has to come before the used index, which is a release store as well.
    store16_release(area + LAST_BATCH_HEAD, last)


@kernel
def forget_used(ring: Record, first: int, end: int) -> None:
    """Used elements `first` to `end` have been shown: their chains are in flight no more."""
    area = ring["inflight"]
    head = load16(area + LAST_BATCH_HEAD)
    for _ in range((end - first) & 0xFFFF):
        if head >= ring["num"]:
            break
        store8(area + INFLIGHT_DESC + head * INFLIGHT_DESC_BYTES, 0)
        head = load16(area + INFLIGHT_DESC + head * INFLIGHT_DESC_BYTES + NEXT)
    store16_release(area + INFLIGHT_USED_IDX, end)
