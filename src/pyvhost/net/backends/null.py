"""`null`: what the guest sends is swallowed, and nothing comes.

Promises and never: as `base`.
"""

from __future__ import annotations

from typing import ClassVar

from pyvhost.net.backends.base import Backend, PortKind


class NullBackend(Backend):
    """A cable into nothing. With it, a device's own cost can be measured."""

    kind = PortKind.NULL
    usage: ClassVar[str] = "null"
    summary: ClassVar[str] = "swallow every frame"
