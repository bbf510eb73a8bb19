"""Chains that were taken and not yet used when a back end died: the inflight memory (vhost-user, split rings).

A front end keeps the memory while back ends come and go. Each vring has a queue region in it: what features, a
version, how many descriptors, the used index, and for each descriptor whether it is in flight and since when.

Promises: what is read from the memory is read once and judged; a vring begins with the chains of a former life,
in the order in which they were taken. Never: marks a chain. Its device does, while it has it.
"""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Final

from pyvhost.dataplane.plain import load16, load64, store8, store16
from pyvhost.host.memfd import create
from pyvhost.memory.mapped import Guard, Mapped

#: struct QueueRegionSplit: features, version, desc_num, last_batch_head, used_idx; then its descriptors.
_VERSION_AT: Final = 8
_DESC_NUM_AT: Final = 10
_LAST_BATCH_HEAD_AT: Final = 12
_USED_IDX_AT: Final = 14
_DESC_AT: Final = 16
#: struct DescStateSplit: inflight, padding, next, counter.
_DESC_BYTES: Final = 16
_NEXT_AT: Final = 6
_COUNTER_AT: Final = 8
_COUNTERS: Final = (1 << 64) - 1
_VERSION: Final = 1
_ALIGN: Final = 64


def region_size(queue_size: int) -> int:
    """Bytes of one queue's region."""
    return -(-(_DESC_AT + _DESC_BYTES * queue_size) // _ALIGN) * _ALIGN


@dataclass(frozen=True)
class Inflight:
    """The memory as a message describes it (VhostUserInflight); whoever is handed it owns `fd`."""

    fd: int
    mmap_size: int
    mmap_offset: int
    num_queues: int
    queue_size: int

    @classmethod
    def make(cls, num_queues: int, queue_size: int) -> Inflight:
        """New memory, all zeros, for a front end to keep."""
        size = num_queues * region_size(queue_size)
        return cls(create("pyvhost-inflight", size), size, 0, num_queues, queue_size)


@dataclass(frozen=True)
class Recovered:
    """Where a vring goes on: its region's address, the heads that come first, the next available index.

    `taken`: the counter of the next chain that is taken, above all that are there.
    """

    address: int
    heads: Sequence[int]
    base: int
    taken: int = 0


class InflightArea:
    """The memory, mapped. OSError EINVAL: it is too small for its queues. Closes the descriptor."""

    def __init__(self, inflight: Inflight, guard: Guard | None = None) -> None:
        self.num_queues = inflight.num_queues
        self.queue_size = inflight.queue_size
        try:
            needed = inflight.num_queues * region_size(inflight.queue_size)
            if inflight.queue_size <= 0 or not 0 < needed <= inflight.mmap_size:
                raise OSError(
                    errno.EINVAL,
                    f"inflight memory of {inflight.mmap_size} bytes for {inflight.num_queues} queues of "
                    f"{inflight.queue_size}: {needed} are needed",
                )
            self._mapped = Mapped.of(
                inflight.fd, inflight.mmap_offset, inflight.mmap_size, "inflight memory", guard
            )
        finally:
            with suppress(OSError):
                os.close(inflight.fd)

    @property
    def lost(self) -> bool:
        """Whether its file was made smaller."""
        return self._mapped.lost

    def recover(self, index: int, num: int, used_idx: int, base: int) -> Recovered | None:
        """What vring `index`, of `num` descriptors, left behind; None: it has no region.

        `used_idx`: the used ring's. `base`: where the front end says that it goes on, which counts for a region
        that nobody has used yet. OSError EINVAL: the region is none that we can read, with the numbers.
        """
        if index >= self.num_queues:
            return None
        if num > self.queue_size:
            raise OSError(
                errno.EINVAL, f"inflight regions are for {self.queue_size} descriptors, it has {num}"
            )
        address = self._mapped.address + index * region_size(self.queue_size)
        version = load16(address + _VERSION_AT)
        if version == 0:
            store16(address + _DESC_NUM_AT, num)
            store16(address + _USED_IDX_AT, used_idx)
            store16(address + _VERSION_AT, _VERSION)
            return Recovered(address, (), base)
        desc_num = load16(address + _DESC_NUM_AT)
        if version != _VERSION or desc_num > self.queue_size:
            raise OSError(
                errno.EINVAL,
                f"inflight region of version {version} with {desc_num} of {self.queue_size} descriptors",
            )
        news = (used_idx - load16(address + _USED_IDX_AT)) & 0xFFFF
        if news:
            # It died between showing its last batch as used and noting that: those, a list, are done.
            head = load16(address + _LAST_BATCH_HEAD_AT)
            for _ in range(min(news, desc_num)):
                if head >= desc_num:
                    break
                state = address + _DESC_AT + head * _DESC_BYTES
                store8(state, 0)
                head = load16(state + _NEXT_AT)
            store16(address + _USED_IDX_AT, used_idx)
        states = ctypes.string_at(address + _DESC_AT, min(desc_num, num) * _DESC_BYTES)
        taken = [head for head in range(len(states) // _DESC_BYTES) if states[head * _DESC_BYTES] == 1]
        counters = {
            head: load64(address + _DESC_AT + head * _DESC_BYTES + _COUNTER_AT) & _COUNTERS for head in taken
        }
        heads = sorted(taken, key=lambda head: counters[head])
        # As the signed number that a record has: whoever wrote the region may have counted as far as it goes.
        following = ctypes.c_int64(max(counters.values(), default=-1) + 1).value
        return Recovered(address, heads, (used_idx + len(heads)) & 0xFFFF, following)

    def close(self) -> None:
        """Unmaps it."""
        self._mapped.close()
