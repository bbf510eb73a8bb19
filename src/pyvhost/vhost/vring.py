"""A virtqueue as a front end set it up, and the place where it runs.

Promises: nothing: it is what the device model keeps, and what it asks of a worker or a chain handler.
Never: has behaviour.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol


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
    #: The transport wants it to run; it does as soon as it has addresses.
    wanted: bool = False
    place: Place | None = None


class Place(Protocol):
    """Where a running vring's record (`blocks.RING`) is, and who reads it."""

    @property
    def record(self) -> Any: ...
    def paused(self) -> AbstractContextManager[None]:
        """While this is held nobody reads or changes the record."""

    def begin(self, vring: Vring) -> None:
        """The record is filled: serve it. Called while paused."""

    def end(self, vring: Vring) -> None:
        """Serve it no more. Called while paused."""
