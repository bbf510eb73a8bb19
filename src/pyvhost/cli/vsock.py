"""`pyvhost vsock`: sockets for guests, served until SIGTERM.

Promises: fails early and says why; prints the QEMU and UML lines that fit, ready to paste.
Never: imports the data plane before the arguments are right.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from itertools import repeat
from typing import TYPE_CHECKING, Final

from pyvhost.abi import virtio
from pyvhost.cli import serve

if TYPE_CHECKING:
    from pyvhost.vsock.device import VsockDevice

#: How many ports one `--forward` may name.
_MOST_PORTS: Final = 65536


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `pyvhost vsock`."""
    serve.add_arguments(parser, "a guest for each, in the order of --guest-cid and --uds-path")
    parser.add_argument(
        "--guest-cid",
        type=int,
        action="append",
        default=[],
        metavar="N",
        help="the guest's CID, 3 to 4294967294; repeated: one for each --socket-path",
    )
    parser.add_argument(
        "--uds-path",
        action="append",
        default=[],
        metavar="PATH",
        help="the guest's ports as Unix sockets: PATH, PATH.seqpacket, and PATH_PORT for what the guest connects to;"
        " repeated: one for each --socket-path",
    )
    parser.add_argument(
        "--forward",
        type=_ports,
        action="append",
        default=[],
        metavar="PORT[-LAST]",
        help="let guests reach this AF_VSOCK port of the host; repeated: these",
    )
    parser.add_argument(
        "--group", metavar="NAME", help="the guests of this command reach each other by their CIDs"
    )
    parser.add_argument(
        "--max-connections", type=int, default=4096, metavar="N", help="of a guest (default: 4096)"
    )


def run(args: argparse.Namespace) -> int:
    """Serves; the exit status."""
    if args.print_capabilities:
        print(json.dumps({"type": "vsock"}))
        return 0
    if not serve.possible(args) or not _possible(args):
        return 2
    places = iter(zip(args.guest_cid, args.uds_path or repeat(None), strict=False))
    return serve.run(
        args,
        lambda path: _device(args, path, *next(places)),
        lambda path: {"QEMU": qemu_line(path, connect=args.connect), "UML": uml_line(path)},
    )


def _possible(args: argparse.Namespace) -> bool:
    guests = len(args.socket_path) or 1
    words = ""
    if len(args.guest_cid) != guests:
        words = f"{guests} --socket-path want as many --guest-cid, not {len(args.guest_cid)}"
        if guests == 1:
            words = "give one --guest-cid for the one --socket-path or --fd"
    elif args.uds_path and len(args.uds_path) != guests:
        words = f"{guests} guests have {guests} --uds-path or none, not {len(args.uds_path)}"
    elif len(set(args.guest_cid)) != guests:
        words = "a CID is one guest's"
    if words:
        print(f"pyvhost: {words}", file=sys.stderr)
    return not words


def _device(args: argparse.Namespace, path: str | None, cid: int, uds_path: str | None) -> VsockDevice:
    from pyvhost.vsock.device import VsockDevice

    return VsockDevice(
        cid,
        uds_path=uds_path,
        forward=[port for ports in args.forward for port in ports],
        group=args.group,
        max_connections=args.max_connections,
        busyloop_timeout=args.busyloop_timeout,
        name=path,
    )


def _ports(text: str) -> range:
    """What `--forward` takes."""
    first, dash, last = text.partition("-")
    try:
        ports = range(int(first), int(last if dash else first) + 1)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text}: expected a port, or PORT-LAST") from None
    if not 0 < len(ports) <= _MOST_PORTS:
        raise argparse.ArgumentTypeError(f"{text}: expected 1 to {_MOST_PORTS} ports")
    return ports


def qemu_line(path: str, *, connect: bool = False) -> str:
    """The QEMU options that attach a guest to the socket `path`."""
    # Three queues have a vector each, and the configuration another one.
    return f"{serve.qemu_options(path, connect)} -device vhost-user-vsock-pci,chardev=vhost0{serve.vectors(4, False)}"


def uml_line(path: str) -> str:
    """What goes on the command line of UML."""
    return f"virtio_uml.device={shlex.quote(path)}:{virtio.ID_VSOCK}"
