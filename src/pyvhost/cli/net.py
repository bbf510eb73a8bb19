"""`pyvhost net`: network cards for guests, served until SIGTERM.

Promises: fails early and says why; prints the QEMU line that fits, ready to paste.
Never: imports the data plane before the arguments are right.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import shlex
import sys
from contextlib import ExitStack
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pyvhost.net.device import NetDevice

_log = logging.getLogger(__name__)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `pyvhost net`."""
    where = parser.add_argument_group("where the front end is (one of)")
    where.add_argument(
        "--socket-path",
        "--socket",
        action="append",
        metavar="PATH",
        default=[],
        help="listen on this Unix socket; repeated: a card for each, all with the same backend",
    )
    where.add_argument(
        "--fd", type=int, metavar="FD", help="serve this inherited socket, listening or connected"
    )
    where.add_argument(
        "--connect", action="store_true", help="dial PATH instead, again whenever it goes away"
    )
    parser.add_argument("--print-capabilities", action="store_true", help="print them as JSON, and exit")
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
        "--busyloop-timeout",
        type=int,
        default=0,
        metavar="US",
        help="microseconds that an idle queue is polled before its worker sleeps (default: 0)",
    )
    parser.add_argument(
        "--workers", type=int, metavar="N", help="threads that serve queue pairs (default: one a processor)"
    )


def run(args: argparse.Namespace) -> int:
    """Serves; the exit status."""
    if args.print_capabilities:
        print(json.dumps({"type": "net"}))
        return 0
    if (args.fd is None) == (not args.socket_path):
        print("pyvhost: give --socket-path or --fd, one of them", file=sys.stderr)
        return 2
    if args.connect and args.fd is not None:
        print("pyvhost: --connect goes with --socket-path", file=sys.stderr)
        return 2
    from pyvhost.net.process import Process
    from pyvhost.vhost_user.server import Server

    if args.workers is not None:
        Process.configure(workers=args.workers)
    with ExitStack() as closing, Server() as server:
        places = args.socket_path or [None]
        for path in places:
            device = _device(args, path if len(places) > 1 else None)
            closing.callback(device.close)
            if path is None:
                server.serve_fd(args.fd, device)
            elif args.connect:
                server.connect(path, device)
            else:
                server.listen(path, device)
            if path is not None:
                _log.info("%s: for QEMU: %s", path, qemu_line(path, args.queue_pairs, connect=args.connect))
        server.run()
    return 0


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
    server = ",server=on,wait=off" if connect else ""
    several = queue_pairs > 1
    queues = f",queues={queue_pairs}" if several else ""
    kvm = os.access("/dev/kvm", os.R_OK | os.W_OK)
    # QEMU 7.2 crashes where it emulates and the card has MSI-X vectors.
    vectors = f",vectors={2 * queue_pairs + 2 if kvm else 0}" if several or not kvm else ""
    card = f"virtio-net-pci,netdev=net0{',mq=on' if several else ''}{vectors}"
    return (
        f"-accel {'kvm' if kvm else 'tcg'}"
        f" -object memory-backend-memfd,id=mem,size=SIZE,share=on -machine memory-backend=mem -m SIZE"
        f" -chardev socket,id=vhost0,path={shlex.quote(path)}{server}"
        f" -netdev vhost-user,id=net0,chardev=vhost0{queues} -device {card}"
    )
