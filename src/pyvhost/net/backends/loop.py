"""`loop`: the guest receives every frame that it sends, on the same queue pair.

Promises and never: as `base`.
"""

from __future__ import annotations

from typing import ClassVar

from pyvhost.net.backends.base import Backend, PortKind


class LoopBackend(Backend):
    """A cable from the transmitter to the receiver."""

    kind = PortKind.LOOP
    usage: ClassVar[str] = "loop"
    summary: ClassVar[str] = "give every frame back"
