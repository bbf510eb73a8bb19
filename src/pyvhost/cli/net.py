"""`pyvhost net`: network cards for guests, served until SIGTERM.

Promises: fails early and says why; prints the QEMU line that fits, ready to paste.
Never: imports the data plane before the arguments are right.
"""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING

from pyvhost.cli import serve

if TYPE_CHECKING:
    from pyvhost.net.device import NetDevice


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `pyvhost net`."""
    serve.add_arguments(parser, "a card for each, all with the same backend")
    parser.add_argument(
        "--backend",
        default="null",
        metavar="SPEC",
        help="tap:NAME, packet:IFNAME, switch:NAME, user, stream:PATH, loop, null or generate[:SIZE] (default: null)",
    )
    parser.add_argument("--queue-pairs", type=int, default=1, metavar="N", help="queue pairs (default: 1)")
    parser.add_argument(
        "--mac", metavar="ADDRESS", help="the guest's address, where the front end has none for it"
    )
    parser.add_argument(
        "--mtu", type=int, metavar="BYTES", help="the guest's MTU (default: the backend's, or 1500)"
    )
    parser.add_argument("--pcap", metavar="FILE", help="record every frame")
    parser.add_argument(
        "--workers", type=int, metavar="N", help="threads that serve queue pairs (default: one a processor)"
    )


def run(args: argparse.Namespace) -> int:
    """Serves; the exit status."""
    if args.print_capabilities:
        print(json.dumps({"type": "net"}))
        return 0
    if not serve.possible(args):
        return 2
    from pyvhost.net.process import Process

    if args.workers is not None:
        Process.configure(workers=args.workers)
    return serve.run(
        args,
        lambda path: _device(args, path if len(args.socket_path) > 1 else None),
        lambda path: {"QEMU": qemu_line(path, args.queue_pairs, connect=args.connect)},
    )


def _device(args: argparse.Namespace, path: str | None) -> NetDevice:
    from pyvhost.net.device import NetDevice

    return NetDevice(
        args.backend,
        queue_pairs=args.queue_pairs,
        mac=args.mac,
        mtu=args.mtu,
        busyloop_timeout=args.busyloop_timeout,
        pcap=args.pcap,
        name=path,
    )


def qemu_line(path: str, queue_pairs: int = 1, *, connect: bool = False) -> str:
    """The QEMU options that attach a guest to the socket `path`."""
    several = queue_pairs > 1
    queues = f",queues={queue_pairs}" if several else ""
    vectors = serve.vectors(2 * queue_pairs + 2, several)
    card = f"virtio-net-pci,netdev=net0{',mq=on' if several else ''}{vectors}"
    return f"{serve.qemu_options(path, connect)} -netdev vhost-user,id=net0,chardev=vhost0{queues} -device {card}"
