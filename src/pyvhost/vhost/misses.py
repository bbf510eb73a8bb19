"""Misses in the IOTLB on their way to the front end, and those that it has taken and not yet answered.

Promises: any thread may add; they are taken in the order in which they were missed; the descriptor is readable
while one waits; a guest that misses for ever costs `WAITING` of them, and other vrings none of theirs.
Never: restarts a vring. An answer names those to restart.
"""

from __future__ import annotations

import os
import threading
from collections import Counter, deque
from contextlib import suppress
from dataclasses import dataclass
from typing import Final

#: Misses that wait at most; a vring whose miss did not fit misses again at its next kick, as on Linux.
WAITING: Final = 2048


@dataclass(frozen=True)
class IotlbMiss:
    """Vring `index` needs an entry for `iova` that allows `perm` (ACCESS_*)."""

    index: int
    iova: int
    perm: int


class Misses:
    """The misses of one device."""

    def __init__(self) -> None:
        self._waiting: deque[IotlbMiss] = deque()
        #: As a set that keeps the order.
        self._taken: dict[IotlbMiss, None] = {}
        self._lock = threading.Lock()
        self.fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)

    def add(self, miss: IotlbMiss) -> None:
        """A vring needs an entry. From any thread."""
        with self._lock:
            if len(self._waiting) < WAITING:
                self._waiting.append(miss)
                os.eventfd_write(self.fd, 1)

    def take(self) -> IotlbMiss | None:
        """The oldest one, which the front end is now told of."""
        with self._lock:
            if not self._waiting:
                return None
            miss = self._waiting.popleft()
            if not self._waiting:
                with suppress(BlockingIOError):
                    os.eventfd_read(self.fd)
            self._taken.pop(miss, None)
            if len(self._taken) == WAITING:
                self._forget_one_of_many()
            self._taken[miss] = None
            return miss

    def answered(self, iova: int, size: int) -> list[int]:
        """The vrings whose taken misses an entry answers, which are done with."""
        with self._lock:
            found = [miss for miss in self._taken if iova <= miss.iova < iova + size]
            for miss in found:
                del self._taken[miss]
        return sorted({miss.index for miss in found})

    def forget(self, index: int | None = None) -> None:
        """Those of one vring, or all."""
        with self._lock:
            self._waiting = deque(m for m in self._waiting if index is not None and m.index != index)
            self._taken = {m: None for m in self._taken if index is not None and m.index != index}
            if not self._waiting and self.fd >= 0:
                with suppress(BlockingIOError):
                    os.eventfd_read(self.fd)

    def _forget_one_of_many(self) -> None:
        """The oldest of the vring that has most: one that has a single one waits for that."""
        ((index, _),) = Counter(miss.index for miss in self._taken).most_common(1)
        del self._taken[next(miss for miss in self._taken if miss.index == index)]

    def close(self) -> None:
        """Gives up the descriptor."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1
