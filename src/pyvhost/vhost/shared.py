"""What the devices of one kind share in a process: its counters, and whatever a subclass adds, workers above all.

Promises: there is one of each subclass, made when first needed. Never: knows a device.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, ClassVar, Self

from pyvhost.dataplane import inflight, split_ring
from pyvhost.dataplane.dirty_log import log_slot, log_used
from pyvhost.vhost import counters
from pyvhost.vhost.worker import Int64s


class Shared:
    """The process's own of its kind is `get()`."""

    _made: ClassVar[dict[type[Shared], Shared]] = {}
    _making: ClassVar[threading.Lock] = threading.Lock()

    def __init__(self) -> None:
        self.counters = counters.of_process()

    @classmethod
    def get(cls) -> Self:
        """The process's own."""
        with Shared._making:
            the = Shared._made.get(cls)
            if the is None:
                the = Shared._made[cls] = cls()
        assert isinstance(the, cls)
        return the

    def row(self, device: str, kind: str, queue: str, backend: str) -> Int64s:
        """A row of counters."""
        return self.counters.row({"device": device, "kind": kind, "queue": queue, "backend": backend})


def called_by_python(ring: Any) -> list[tuple[Callable[..., Any], tuple[Any, ...]]]:
    """What Python calls of the ring's compiled code, with arguments of the right types, for `policy.prepare`."""
    return [
        (split_ring.collect, (ring, 0, 0, 0, 0, 0)),
        (split_ring.use, (ring, 0, 0)),
        (split_ring.use_written, (ring, 0, 0)),
        (inflight.begin, (ring, 0)),
        (split_ring.take, (ring, 0)),
        (split_ring.publish, (ring,)),
        (split_ring.want_kicks, (ring, True)),
        (split_ring.stop_at_fault, (ring,)),
        (log_used, (ring, 0, 0)),
        (log_slot, (ring, 0, 0)),
    ]
