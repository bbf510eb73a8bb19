"""Which paths can be opened, and by whom: a device type's room registers what stands for its `/dev/vhost-*`.

Promises: a path that nobody has registered is ENOENT. Never: imports a device type.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from typing import Final

from pyvhost.vhost.handle import Handle
from pyvhost.vhost.kernel_device import KernelDevice

#: Makes a device, as new, whose name is given.
Factory = Callable[[str], KernelDevice]

_factories: Final[dict[str, Factory]] = {}


def register(path: str, factory: Factory) -> None:
    """Has `factory` make the device for every opening of `path`. ValueError: it is registered."""
    if path in _factories:
        raise ValueError(f"{path} is registered already")
    _factories[path] = factory


def registered() -> list[str]:
    """The paths that can be opened."""
    return sorted(_factories)


def open_registered(path: str | os.PathLike[str], flags: int = os.O_RDWR) -> Handle:
    """A new device. OSError ENOENT: no such path is registered."""
    name = os.fspath(path)
    factory = _factories.get(name)
    if factory is None:
        there = ", ".join(registered())
        raise OSError(errno.ENOENT, f"no device of that name: there is {there}", name)
    return Handle(factory(name), flags)
