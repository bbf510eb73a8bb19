"""`pyvhost scsi`: disks for a guest, served until SIGTERM.

Promises: fails early and says why; prints the QEMU and UML lines that fit, ready to paste.
Never: imports the data plane before the arguments are right.
"""

from __future__ import annotations

import argparse
import json
import shlex
from typing import TYPE_CHECKING

from pyvhost.abi import virtio
from pyvhost.cli import serve

if TYPE_CHECKING:
    from pyvhost.scsi.device import ScsiDevice


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `pyvhost scsi`."""
    serve.add_arguments(parser)
    parser.add_argument(
        "--lun",
        action="append",
        metavar="[TARGET:LUN=]SPEC",
        default=[],
        help="a disk: a path, memory:SIZE or nbd:URI, options after commas; repeated: a disk for each,"
        " without a place at the first free LUN of target 0",
    )
    parser.add_argument("--request-queues", type=int, default=1, metavar="N", help="1 to 128 (default: 1)")


def run(args: argparse.Namespace) -> int:
    """Serves; the exit status."""
    if args.print_capabilities:
        print(json.dumps({"type": "scsi"}))
        return 0
    if not serve.possible(args):
        return 2
    from pyvhost.scsi.lun import place

    place(args.lun)
    return serve.run(
        args,
        lambda path: _device(args, path),
        lambda path: {
            "QEMU": qemu_line(path, args.request_queues, connect=args.connect),
            "UML": uml_line(path),
        },
    )


def _device(args: argparse.Namespace, path: str | None) -> ScsiDevice:
    from pyvhost.scsi.device import ScsiDevice

    return ScsiDevice(args.lun, request_queues=args.request_queues, name=path)


def qemu_line(path: str, request_queues: int = 1, *, connect: bool = False) -> str:
    """The QEMU options that attach a guest to the socket `path`."""
    # Control and event queue have a vector each, and the configuration another one.
    vectors = serve.vectors(request_queues + 3, False)
    return (
        f"{serve.qemu_options(path, connect)}"
        f" -device vhost-user-scsi-pci,chardev=vhost0,num_queues={request_queues}{vectors}"
    )


def uml_line(path: str) -> str:
    """What goes on the command line of UML."""
    return f"virtio_uml.device={shlex.quote(path)}:{virtio.ID_SCSI}"
