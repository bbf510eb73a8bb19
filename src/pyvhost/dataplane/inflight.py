"""The inflight memory, kept while a ring runs: what a later life must know if this one ends in the middle.

The chains of one publication form a list, from the last batch's head on (vhost-user, "Inflight I/O tracking").
Whoever finds a used index that the region has not noted yet walks that list as far as the two are apart.

Promises: the list is there before the used index shows its chains, the marks go after it has.
Never: marks a chain as taken. A device that works in order has none that a used index does not tell of.
"""

from __future__ import annotations

from typing import Final

from pyvhost.dataplane.access import load16, load32, store8, store16, store16_release
from pyvhost.dataplane.blocks import INFLIGHT_DESC, INFLIGHT_DESC_BYTES, INFLIGHT_USED_IDX, Record
from pyvhost.dataplane.policy import kernel
from pyvhost.dataplane.swap import swap32

LAST_BATCH_HEAD: Final = 12
NEXT: Final = 6


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
