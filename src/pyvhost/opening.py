"""`pyvhost.open`: a `/dev/vhost-*` in this process, with the kernel's own interface and none of its modules.

Promises: a device is this process's alone, and made anew by each call. Never: touches the file of that name.
"""

from __future__ import annotations

import os

# Importing a device type's room registers what it has.
import pyvhost.net.vhost_net
import pyvhost.scsi.vhost_scsi
import pyvhost.vsock.vhost_vsock  # noqa: F401
from pyvhost.vhost.handle import Handle
from pyvhost.vhost.opening import open_registered


def open(path: str | os.PathLike[str], flags: int = os.O_RDWR) -> Handle:
    """Opens a vhost device by the kernel's name: "/dev/vhost-net", "/dev/vhost-scsi" or "/dev/vhost-vsock".

    `flags`: as `os.open`; what counts is O_RDONLY, O_WRONLY, O_RDWR and O_NONBLOCK. The answer has `ioctl`, `read`,
    `write`, `fileno` and `close`, and is a context manager. OSError: ENOENT, no such device is here.
    """
    return open_registered(path, flags)
