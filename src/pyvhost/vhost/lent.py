"""Memory of this process's own that was lent to rings and is not there any more: which rings stop for it.

A worker's loop found pages missing, and the guard put zeros in their place (`dataplane.guard`). All rings that
were lent any of these pages stop for good, on whatever worker, whether they have looked there or not.

Promises: a ring that stops signals err once, and the log says which page is gone; only what is done to it on
purpose (it is bound anew) has it run again. Never: waits for a worker on a worker's thread.
"""

from __future__ import annotations

import ctypes
import logging
import mmap
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any, Final, Protocol
from weakref import WeakSet

import numpy as np

from pyvhost.dataplane import blocks
from pyvhost.host import eventfd

_log = logging.getLogger(__name__)

_PAGE: Final = mmap.PAGESIZE


class Server(Protocol):
    """What a worker is, as far as this goes."""

    rings: Any
    ring_names: dict[int, str]

    def paused(self) -> AbstractContextManager[None]:
        """While this is held, it is outside its loop."""


_servers: Final[WeakSet[Server]] = WeakSet()
_lock: Final = threading.Lock()


def know(server: Server) -> None:
    """Another worker. From any thread."""
    with _lock:
        _servers.add(server)


def tell_others(server: Server, pages: list[int]) -> None:
    """Has all other workers' rings stop that were lent any of `pages`, soon. On `server`'s thread."""
    with _lock:
        others = [other for other in _servers if other is not server and other.rings["own"].any()]
    if others:
        # Two workers that found something at once would wait for each other.
        threading.Thread(target=_stop_all, args=(others, pages), name="pyvhost-lent", daemon=True).start()


def _stop_all(servers: list[Server], pages: list[int]) -> None:
    for server in servers:
        with server.paused():
            stop(server, pages)


def stop(server: Server, pages: list[int]) -> None:
    """Stops the rings of one worker that were lent any of `pages`. While it is outside its loop."""
    for index in np.flatnonzero(server.rings["own"]):
        record = server.rings[index]
        # What waits for its parts has nothing of what its record says.
        page = next((page for page in pages if record["located"] and _has(record, page)), None)
        if page is None:
            continue
        # A fault that this loop has found came of the zeros, and has signalled err; an older one was told of.
        signalled = record["fault"] and record["fault"] != blocks.IOTLB_MISS and not record["fault_told"]
        # Neither at fault nor waiting: no kick has it run again.
        record["running"] = record["fault"] = record["own"] = 0
        record["lost"] = 1
        name = server.ring_names.get(int(index), f"ring {index}")
        _log.error(
            "%s: stopped: memory that was lent to it has been unmapped, at %#x; it rests until it is bound anew",
            name,
            page,
        )
        if record["err_fd"] >= 0 and not signalled:
            eventfd.signal(int(record["err_fd"]))


def _has(record: Any, page: int) -> bool:
    return any(start < page + _PAGE and page < start + size for start, size in _ranges(record))


def _ranges(record: Any) -> Iterator[tuple[int, int]]:
    """What a ring was lent: its parts, its log, its memory; the addresses and bytes that the guard goes by."""
    num = int(record["num"])
    yield int(record["desc"]), 16 * num
    yield int(record["avail"]), 6 + 2 * num
    yield int(record["used"]), 6 + 8 * num
    for log in ("log_data", "log_used"):
        if record[log]:
            yield int(record[log]), int(record["log_bytes"])
    count = int(record["region_count"])
    rows = (ctypes.c_int64 * 5 * count).from_address(int(record["regions"])) if count else ()
    for _, size, host, _, access in rows:
        if access:
            yield host, size
