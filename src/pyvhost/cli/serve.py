"""What the serving commands have in common: where the front end is, the control socket, the lines to paste.

Promises: QEMU's conventions for back-end programs (--socket-path, --fd, --print-capabilities), and SIGTERM ends it.
Never: imports the data plane before the arguments are right.
"""

from __future__ import annotations

import argparse
import logging
import shlex
import sys
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import TYPE_CHECKING

from pyvhost.host import kvm
from pyvhost.host.errors import words

if TYPE_CHECKING:
    from pyvhost.vhost.device import Device
    from pyvhost.vhost_user.server import Server

_log = logging.getLogger(__name__)


def add_arguments(parser: argparse.ArgumentParser, each: str | None = None) -> None:
    """The options. `each`: what several --socket-path make; None: there is one."""
    where = parser.add_argument_group("where the front end is (one of)")
    where.add_argument(
        "--socket-path",
        "--socket",
        action="append",
        metavar="PATH",
        default=[],
        help="listen on this Unix socket" + (f"; repeated: {each}" if each else ""),
    )
    where.add_argument(
        "--fd", type=int, metavar="FD", help="serve this inherited socket, listening or connected"
    )
    where.add_argument(
        "--connect", action="store_true", help="dial PATH instead, again whenever it goes away"
    )
    control = parser.add_argument_group("what `pyvhost ctl` reaches")
    control.add_argument(
        "--control", metavar="PATH", help="the control socket (default: PATH.ctl for --socket-path PATH)"
    )
    control.add_argument("--no-control", action="store_true", help="have none")
    parser.add_argument(
        "--busyloop-timeout",
        type=int,
        default=0,
        metavar="US",
        help="microseconds that an idle queue is polled before its worker sleeps (default: 0)",
    )
    parser.add_argument("--print-capabilities", action="store_true", help="print them as JSON, and exit")
    parser.set_defaults(several=each is not None)


def possible(args: argparse.Namespace) -> bool:
    """Whether the options go together; if not, standard error says why."""
    words = ""
    if (args.fd is None) == (not args.socket_path):
        words = "give --socket-path or --fd, one of them"
    elif args.connect and args.fd is not None:
        words = "--connect goes with --socket-path"
    elif len(args.socket_path) > 1 and not args.several:
        words = "there is one --socket-path"
    elif args.control and (args.no_control or len(args.socket_path) > 1):
        words = "--control names the control socket of one device"
    if words:
        print(f"pyvhost: {words}", file=sys.stderr)
    return not words


def run(
    args: argparse.Namespace,
    make: Callable[[str | None], Device],
    lines: Callable[[str], Mapping[str, str]],
) -> int:
    """Serve what `make` makes, for each socket's path, until SIGTERM; the exit status.

    `lines`: for each hypervisor the line that attaches a guest to the socket.
    """
    from pyvhost.vhost_user.server import Server

    with ExitStack() as closing, Server() as server:
        for path in args.socket_path or [None]:
            device = make(path)
            closing.callback(device.close)
            if path is None:
                server.serve_fd(args.fd, device)
            elif args.connect:
                server.connect(path, device)
            else:
                server.listen(path, device)
            _control(args, server, device, path, closing)
            if path is not None:
                for whose, line in lines(path).items():
                    _log.info("%s: for %s: %s", path, whose, line)
        server.run()
    return 0


def _control(
    args: argparse.Namespace, server: Server, device: Device, path: str | None, closing: ExitStack
) -> None:
    from pyvhost.control import protocol
    from pyvhost.control.commands import of_device
    from pyvhost.control.server import ControlServer

    where = args.control or (path and path + protocol.SUFFIX)
    if args.no_control or not where:
        return
    try:
        closing.enter_context(ControlServer(server.poller, where, of_device(device)))
    except OSError as error:
        if args.control:
            raise
        # Nobody asked for it.
        _log.warning("no control socket: %s", words(error))


def qemu_options(path: str, connect: bool) -> str:
    """The QEMU options before the device's own: shared memory, and a chardev `vhost0` at the socket `path`."""
    server = ",server=on,wait=off" if connect else ""
    return (
        f"-accel {'kvm' if kvm.likely() else 'tcg'}"
        f" -object memory-backend-memfd,id=mem,size=SIZE,share=on -machine memory-backend=mem -m SIZE"
        f" -chardev socket,id=vhost0,path={shlex.quote(path)}{server}"
    )


def vectors(number: int, needed: bool) -> str:
    """The property that sets a PCI device's MSI-X vectors, where it has to be said."""
    # QEMU 7.2 crashes where it emulates and the device has MSI-X vectors.
    fast = kvm.likely()
    return f",vectors={number if fast else 0}" if needed or not fast else ""
