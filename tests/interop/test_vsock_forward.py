"""`pyvhost vsock --forward` to real services on AF_VSOCK: those of a UML guest, in which the back end runs."""

from __future__ import annotations

import json
import os
import sys

from interop import vsock_forwarded
from pyvhost.abi import virtio_vsock as abi
from pyvhost.cli.guests import UmlGuest
from pyvhost.dataplane import policy
from pyvhost.vsock.plane import Plane
from requirements import need, need_program


def test_a_guest_reaches_the_services_that_were_named() -> None:
    need_program("linux.uml", package="user-mode-linux")
    need(policy.CACHE is not None, "without NUMBA_DISABLE_JIT, with a cache that can be written to")
    Plane.prepare()
    with UmlGuest(memory_mib=512, modules=["vsock_loopback"]) as host:
        said = host.run(
            # The guest's own root can't be written to.
            f"mkdir $TMPDIR/cache && cp -r {policy.CACHE} $TMPDIR/cache && PYVHOST_CACHE_DIR=$TMPDIR/cache "
            f"PYTHONPATH={os.pathsep.join(sys.path)} {sys.executable} {vsock_forwarded.__file__}",
            timeout=120,
        )
    assert json.loads(said.output.splitlines()[-1]) == {
        "stream": "whole",
        "messages": [1, 4096, 60_000],
        "nobody": "refused",
        "apart": "refused",
        "clients": [str(abi.VMADDR_CID_LOCAL)],
        "status": 0,
    }
