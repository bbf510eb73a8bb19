"""vhost in Python: the device half of virtio, served by an ordinary process.

    from pyvhost import NetDevice, serve
    serve(NetDevice(backend="tap:vm0", queue_pairs=2), "/run/vm0.sock")

Promises: importing this package alone imports neither NumPy nor Numba; they come with the first name used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pyvhost import vsock
    from pyvhost.net.device import NetDevice
    from pyvhost.opening import open
    from pyvhost.scsi.device import ScsiDevice
    from pyvhost.serving import serve
    from pyvhost.vsock.device import VsockDevice

__version__ = "0.1.0"

__all__ = ["NetDevice", "ScsiDevice", "VsockDevice", "__version__", "open", "serve", "vsock"]

_HOMES = {
    "NetDevice": "pyvhost.net.device",
    "ScsiDevice": "pyvhost.scsi.device",
    "VsockDevice": "pyvhost.vsock.device",
    "open": "pyvhost.opening",
    "serve": "pyvhost.serving",
}


def __getattr__(name: str) -> Any:
    import importlib

    if name == "vsock":
        return importlib.import_module("pyvhost.vsock")
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
