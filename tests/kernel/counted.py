"""A ring of the experiments whose notifications are counted from fact to fact.

Never: knows what kind of device the ring is of.
"""

from __future__ import annotations

from typing import Protocol

from pyvhost.driver.queue import Queue
from pyvhost.driver.split_ring import SplitRing
from pyvhost.host import eventfd


class _Front(Protocol):
    def get_vring_base(self, index: int) -> int: ...


class _Bench(Protocol):
    @property
    def front(self) -> _Front: ...


class CountedRing:
    """Ring `index` of a bench's device: `SplitRing`, raw, with what was counted."""

    def __init__(self, bench: _Bench, index: int, ring: SplitRing, name: str) -> None:
        self.index = index
        self.ring = ring
        self.queue = Queue(ring, name)
        self._of = bench
        self._calls = self._errs = 0
        #: Used elements that a fact was told of.
        self._seen = 0

    def calls(self) -> int:
        """Calls since the last fact about them."""
        self._calls += eventfd.drain(self.queue.call_fd)
        return self._calls

    def errs(self) -> int:
        """Signals of err since the last fact about them."""
        self._errs += eventfd.drain(self.queue.err_fd)
        return self._errs

    def state(self) -> dict[str, int]:
        """The whole of it."""
        return {
            "used_idx": self.ring.used_idx,
            "used_flags": self.ring.used_flags,
            "avail_event": self.ring.avail_event,
            "base": self._of.front.get_vring_base(self.index),
            "calls": self.calls(),
            "errs": self.errs(),
        }
