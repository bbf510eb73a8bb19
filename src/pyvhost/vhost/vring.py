"""A virtqueue as a front end set it up, and the place where it runs.

Promises: nothing: it is what the device model keeps, and what it asks of a worker or a chain handler.
Never: has behaviour.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Final, Protocol

from pyvhost.abi.vhost import VRING_BIG_ENDIAN, VRING_LITTLE_ENDIAN
from pyvhost.memory.mapped import Mapped

#: What a legacy guest's numbers are if nobody says otherwise.
NATIVE_ENDIAN: Final = VRING_LITTLE_ENDIAN if sys.byteorder == "little" else VRING_BIG_ENDIAN


@dataclass
class Vring:
    """A virtqueue as the front end set it up. Addresses are the front end's own; -1: no descriptor."""

    index: int
    num: int = 0
    base: int = 0
    flags: int = 0
    desc: int | None = None
    used: int = 0
    avail: int = 0
    log: int = 0
    kick: int = -1
    call: int = -1
    err: int = -1
    #: VRING_LITTLE_ENDIAN or VRING_BIG_ENDIAN: what a legacy guest's numbers are.
    endian: int = NATIVE_ENDIAN
    #: Microseconds that it is polled before it rests.
    busyloop_timeout: int = 0
    #: The transport wants it to run; it does as soon as it has addresses.
    wanted: bool = False
    place: Place | None = None
    #: It has run in its place: its used index is known.
    begun: bool = False
    #: What was mapped for it, so that parts that lie apart are in a row.
    stitched: list[Mapped] = field(default_factory=list)

    def let_go(self) -> None:
        """Unmaps what was mapped for it; nobody reads its record any more."""
        for mapped in self.stitched:
            mapped.close()
        self.stitched = []


class Place(Protocol):
    """Where a running vring's record (`blocks.RING`) is, and who reads it."""

    @property
    def record(self) -> Any: ...
    def paused(self) -> AbstractContextManager[None]:
        """While this is held nobody reads or changes the record."""

    def begin(self, vring: Vring) -> None:
        """The record is filled: serve it. Called while paused."""

    def end(self, vring: Vring) -> None:
        """Serve it no more: for good, if it has no place any more. Called while paused."""

    def look(self) -> None:
        """Look at it again, with no kick. Called while paused."""

    def poll_for(self, vring: Vring) -> None:
        """Poll it for its `busyloop_timeout` before it rests. Called while paused."""

    @property
    def on_wait(self) -> Callable[[], None] | None:
        """Called, by whoever reads the record, when the vring waits for the IOTLB."""

    @on_wait.setter
    def on_wait(self, waits: Callable[[], None] | None) -> None: ...
