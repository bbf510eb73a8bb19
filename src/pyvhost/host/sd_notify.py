"""Telling a service manager that the service is ready (sd_notify(3)'s protocol, without its library).

Promises: without NOTIFY_SOCKET in the environment nothing happens. Never: fails the service: a manager that
does not listen is logged, at debug level.
"""

from __future__ import annotations

import logging
import os
import socket

_log = logging.getLogger(__name__)


def notify(*assignments: str) -> bool:
    """Send `assignments` ("READY=1", "STATUS=two devices", "STOPPING=1"); whether a manager was told."""
    path = os.environ.get("NOTIFY_SOCKET", "")
    if not path.startswith(("/", "@")):
        return False
    address = "\0" + path[1:] if path.startswith("@") else path
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
            # Its queue may be full: waiting for a manager is not worth a device's time.
            sock.setblocking(False)
            sock.connect(address)
            sock.send("\n".join(assignments).encode())
    except OSError as error:
        _log.debug("the service manager at %s was not told %s: %s", path, assignments, error)
        return False
    return True


def ready(status: str = "") -> bool:
    """Say that start-up is over, with a line for `systemctl status`."""
    return notify("READY=1", *([f"STATUS={status}"] if status else []))


def stopping() -> bool:
    """Say that the service is on its way out."""
    return notify("STOPPING=1")
