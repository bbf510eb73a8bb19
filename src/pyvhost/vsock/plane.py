"""The vsock workers: threads in `vsock_loop`, and the connections that they carry.

Promises: a guest that is served has places for all the connections that it may have, and no other gets them; where
the process can't have what all of these need, guests have equal shares. Never: knows what a packet says.
"""

from __future__ import annotations

import errno
import logging
import threading
from pathlib import Path
from typing import Any, Final

import numpy as np

from pyvhost.dataplane import blocks, policy
from pyvhost.dataplane import vsock_blocks as layout
from pyvhost.dataplane.vsock_loop import vsock_loop
from pyvhost.host import fds
from pyvhost.vhost.shared import Shared, called_by_python
from pyvhost.vhost.worker import Int64s, Slots, Worker, Workers

_log = logging.getLogger(__name__)

#: A connection takes a descriptor and a mapping. What a guest has of either besides: rings, its memory, clients that
#: have not said whom they want; a quarter of its share, where that is less. And what the process has.
_OF_GUEST: Final = 640
_FILES: Final = 256
_MAPS: Final = 4096


class VsockWorker(Worker):
    """One thread in the vsock loop."""

    def __init__(self, name: str, row: Int64s) -> None:
        self.connections: Any = np.zeros(layout.MAX_CONNECTIONS, layout.CONNECTION)
        self._places = Slots(layout.MAX_CONNECTIONS, "connections")
        self._reserved = 0
        super().__init__(
            lambda records, rings, guests: vsock_loop(records, rings, guests, self.connections),
            name,
            row,
            layout.GUEST,
        )

    def reserve(self, number: int) -> list[int]:
        """Places in `connections` that are one guest's until they are given back; only while paused.

        OSError ENOSPC: the worker's guests have all of them.
        """
        if self._reserved + number > layout.MAX_CONNECTIONS:
            raise OSError(
                errno.ENOSPC,
                f"{self.name} has room for {layout.MAX_CONNECTIONS} connections: {self._reserved} are its guests' "
                f"already, and {number} more are asked for",
            )
        self._reserved += number
        return [self._places.take() for _ in range(number)]

    def give_back(self, places: list[int]) -> None:
        """The guest is gone; only while paused."""
        self._reserved -= len(places)
        for place in places:
            self._places.give_back(place)


class Plane(Shared):
    """What the vsock devices of one process share: workers and counters."""

    def __init__(self, workers: int | None = None) -> None:
        super().__init__()
        self.workers: Workers[VsockWorker] = Workers(
            lambda name: VsockWorker(name, self.row(name, "worker", "-", "-")), "vsock", workers
        )
        self._lock = threading.Lock()
        self._serial = 0
        #: How many connections each guest may have by its own limit, and by what this process may have.
        self._limits: dict[object, int] = {}
        self._each = layout.MAX_OF_GUEST

    @staticmethod
    def prepare() -> None:
        """Has the data plane compiled, or loaded from the cache."""
        worker, rings, guests, connections = (
            np.zeros(1, kind) for kind in (blocks.WORKER, blocks.RING, layout.GUEST, layout.CONNECTION)
        )
        ring = rings[0]
        policy.prepare(
            "the vsock data plane",
            [
                (vsock_loop, (worker, rings, guests, connections)),
                *called_by_python(ring),
            ],
        )

    def serial(self) -> int:
        """A connection's number, which no other has or will have."""
        with self._lock:
            self._serial += 1
            return self._serial

    @property
    def each(self) -> int:
        """Connections that no guest may have more of, so that all may have as many."""
        return self._each

    def enter(self, guest: object, name: str, limit: int) -> None:
        """A guest is served from now on, which may have `limit` connections."""
        with self._lock:
            self._limits[guest] = limit
            scarce = self._share_out()
            if limit > self._each:
                _log.warning(
                    "%s: each of %d guests has %d connections at most, as this process may have %s",
                    name,
                    len(self._limits),
                    self._each,
                    scarce,
                )

    def leave(self, guest: object) -> None:
        """It is not, any more."""
        with self._lock:
            del self._limits[guest]
            self._share_out()

    def _share_out(self) -> str:
        """What there is least of, in words, if there is too little."""
        self._each, scarce = layout.MAX_OF_GUEST, ""
        guests = len(self._limits)
        wanted = sum(self._limits.values()) + guests * _OF_GUEST
        files = fds.room_for(wanted + _FILES)
        for have, apart, what in (
            (files, _FILES, f"{files} open files (ulimit -n)"),
            (_most_maps(), _MAPS, f"{_most_maps()} mappings (vm.max_map_count)"),
        ):
            if guests and have < wanted + apart:
                share = max(1, (have - apart) // guests)
                each = max(share - _OF_GUEST, share - share // 4)
                if each < self._each:
                    self._each, scarce = each, what
        return scarce


def _most_maps() -> int:
    try:
        return int(Path("/proc/sys/vm/max_map_count").read_text())
    except OSError:
        # Linux's own.
        return 65530
