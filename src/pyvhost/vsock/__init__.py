"""Sockets for guests: the device, and, in the process that serves it, a guest's ports in Python.

    async with vsock.connect(3, 1234) as (reader, writer): ...
    async with vsock.listen(5000, handle) as server: ...

Promises: importing this alone imports neither NumPy nor Numba.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pyvhost.vsock.ends.streams import (
        Listener,
        Messages,
        connect,
        connect_messages,
        listen,
        listen_messages,
    )

__all__ = ["Listener", "Messages", "connect", "connect_messages", "listen", "listen_messages"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        # Not before it is asked for: whoever serves sockets and nothing else has no use for asyncio.
        from pyvhost.vsock.ends import streams

        return getattr(streams, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
