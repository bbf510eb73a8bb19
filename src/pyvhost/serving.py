"""`serve`: one call from devices and paths to guests that use them.

Promises: returns when it is told to stop (SIGTERM, SIGINT), with the devices closed. Never: forks.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import ExitStack

from pyvhost.control.commands import of_device
from pyvhost.control.protocol import SUFFIX
from pyvhost.control.server import ControlServer
from pyvhost.vhost.device import Device
from pyvhost.vhost_user.server import Server

Path = str | os.PathLike[str]


def serve(
    device: Device | Mapping[Path, Device],
    path: Path | None = None,
    *,
    connect: bool = False,
    control: bool = False,
) -> None:
    """Serves over vhost-user until the process is asked to end.

    Either one device at the Unix socket `path`, or several: a mapping from paths to devices. `connect`: dial
    front ends that listen there, instead of listening. `control`: have a control socket PATH.ctl beside each, for
    `pyvhost ctl`. OSError: a backend or a socket that can't be had.
    """
    if isinstance(device, Mapping):
        places = dict(device)
    elif path is not None:
        places = {path: device}
    else:
        raise TypeError("serve(device, path), or serve({path: device, ...})")
    with ExitStack() as closing, Server() as server:
        for where, what in places.items():
            closing.callback(what.close)
            (server.connect if connect else server.listen)(where, what)
            if control:
                beside = os.fspath(where) + SUFFIX
                closing.enter_context(ControlServer(server.poller, beside, of_device(what)))
        server.run()
