"""vhost in Python: the device half of virtio, served by an ordinary process.

    from pyvhost import NetDevice, serve
    serve(NetDevice(backend="tap:vm0", queue_pairs=2), "/run/vm0.sock")

Promises: importing this package alone imports neither NumPy nor Numba; they come with the first name used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pyvhost.net.device import NetDevice
    from pyvhost.opening import open
    from pyvhost.scsi.device import ScsiDevice
    from pyvhost.serving import serve

__version__ = "0.1.0"

__all__ = ["NetDevice", "ScsiDevice", "__version__", "open", "serve"]

_HOMES = {
    "NetDevice": "pyvhost.net.device",
    "ScsiDevice": "pyvhost.scsi.device",
    "open": "pyvhost.opening",
    "serve": "pyvhost.serving",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        import importlib

        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
