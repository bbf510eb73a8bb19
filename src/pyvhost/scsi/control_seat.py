"""The process's control thread in memory that was lent to `/dev/vhost-scsi`: what a worker has of itself.

Commands, functions and events are Python's, on the control thread. It has a seat of its own with the guard, so that
lent memory that was unmapped is zeros to it as to a worker; all rings that were lent the page stop then.

Promises: a fault that is not in lent memory is none of its business. Never: touches guest memory.
"""

from __future__ import annotations

import ctypes
import logging
import mmap
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar

import numpy as np

from pyvhost.dataplane import blocks, guard
from pyvhost.host.control_thread import ControlThread
from pyvhost.vhost import lent

_log = logging.getLogger(__name__)

_PAGE = mmap.PAGESIZE


class ControlSeat:
    """One for the process. On the control thread, but for `get`."""

    _the: ClassVar[ControlSeat | None] = None

    def __init__(self, control: ControlThread) -> None:
        #: A record for each device: not of a ring, but of what it was lent.
        self.rings: Any = np.zeros(blocks.MAX_RINGS, blocks.RING)
        self.ring_names: dict[int, str] = {}
        self._stop = np.zeros(8, np.int64)
        self._pages = np.zeros(1 + guard.LOST_PAGES, np.int64)
        self._losers: dict[int, Callable[[int], object]] = {}
        self._free = list(range(blocks.MAX_RINGS - 1, -1, -1))
        seat = guard.take_seat(self.rings.ctypes.data, self._stop.ctypes.data, self._pages.ctypes.data)
        guard.enter(seat)
        control.after_round.append(self._look)

    @classmethod
    def get(cls) -> ControlSeat:
        """The process's. On the control thread."""
        if cls._the is None:
            cls._the = cls(ControlThread.get())
        return cls._the

    def paused(self) -> AbstractContextManager[None]:
        """Who calls is the thread itself."""
        return nullcontext()

    def take(self, lost: Callable[[int], object]) -> int:
        """A record's index. `lost` is told of a page that is gone."""
        index = self._free.pop()
        self._losers[index] = lost
        return index

    def give_back(self, index: int) -> None:
        """It has nothing that was lent any more."""
        self.rings[index]["own"] = 0
        del self._losers[index]
        self._free.append(index)

    def _look(self) -> None:
        count = int(self._pages[0])
        if not count:
            return
        pages = [int(page) for page in self._pages[1 : 1 + count]]
        self._pages[0] = self._stop[blocks.CONTROL_STOP] = 0
        lent.tell_others(self, pages)
        for index, lost in list(self._losers.items()):
            for page in pages:
                if self.rings[index]["own"] and self._has(index, page):
                    lost(page)
                    break

    def _has(self, index: int, page: int) -> bool:
        record = self.rings[index]
        count = int(record["region_count"])
        rows = (ctypes.c_int64 * 5 * count).from_address(int(record["regions"])) if count else ()
        return any(access and host < page + _PAGE and page < host + size for _, size, host, _, access in rows)
