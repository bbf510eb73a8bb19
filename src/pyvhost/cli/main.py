"""The command `pyvhost` and its parts, `pyvhost-net`, `pyvhost-scsi` and `pyvhost-vsock` among them.

Promises: a command that does not serve imports no Numba; what the user got wrong is one line on standard error
and exit status 2, what the host refuses is one line and status 1.
Never: daemonises.
"""

from __future__ import annotations

import argparse
import importlib
import logging
import sys
from collections.abc import Sequence
from typing import Final

from pyvhost import __version__
from pyvhost.host.errors import words

#: A command, the module that has `add_arguments(parser)` and `run(args) -> int`, and what it is for.
COMMANDS: Final = (
    ("net", "pyvhost.cli.net", "serve network cards to guests"),
    ("scsi", "pyvhost.cli.scsi", "serve disks to a guest"),
    ("vsock", "pyvhost.cli.vsock", "serve sockets to guests"),
    ("connect", "pyvhost.cli.connect", "a guest's vsock port on standard input and output"),
    ("ctl", "pyvhost.cli.ctl", "ask something of a device that is served: its state, another disk"),
    (
        "demo",
        "pyvhost.cli.demo",
        "boot guests and watch them use network cards, a disk and sockets that are served here",
    ),
    ("top", "pyvhost.cli.top", "watch what is served"),
    ("doctor", "pyvhost.cli.doctor", "what this host can do, and what to install for the rest"),
)
#: `pyvhost bench`, by what is measured.
BENCHES: Final = (
    ("net", "pyvhost.cli.bench.command", "the network card against DPDK's back end"),
    ("scsi", "pyvhost.cli.bench.scsi", "a disk against its file, qemu-storage-daemon's and QEMU's own"),
    ("ring", "pyvhost.cli.bench.ring", "what logging, translation and byte order cost a ring"),
    ("vsock", "pyvhost.cli.bench.vsock", "a guest's sockets against a unix socket pair"),
)

_LEVELS: Final = ("trace", "debug", "info", "warning", "error")
_TRACE: Final = 5


def _common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--log-level", choices=_LEVELS, default="info", help="trace shows every message (default: info)"
    )


def _set_up_logging(level: str) -> None:
    logging.addLevelName(_TRACE, "TRACE")
    number = _TRACE if level == "trace" else getattr(logging, level.upper())
    logging.basicConfig(format="%(levelname)s: %(message)s", stream=sys.stderr)
    # Not the root's level: Numba logs all that it does.
    logging.getLogger("pyvhost").setLevel(number)


def _run(module: str, args: argparse.Namespace) -> int:
    _set_up_logging(args.log_level)
    try:
        status = importlib.import_module(module).run(args)
    except KeyboardInterrupt:
        return 130
    except (OSError, ValueError) as error:
        print(f"pyvhost: {words(error)}", file=sys.stderr)
        return 1 if isinstance(error, OSError) else 2
    return int(status)


def _parser(words: Sequence[str]) -> argparse.ArgumentParser:
    """The parser; of all commands only the one that is named gets its options, so that only it is imported."""
    parser = argparse.ArgumentParser(
        prog="pyvhost", description="vhost in Python: the device half of virtio."
    )
    parser.add_argument("--version", action="version", version=f"pyvhost {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, module, what in COMMANDS:
        sub = commands.add_parser(name, help=what, description=what)
        if name in words:
            _fill(sub, module)
    bench = commands.add_parser("bench", help="measure against a peer, in the same run")
    kinds = bench.add_subparsers(dest="bench", required=True, metavar="{net,scsi,ring,vsock}")
    for name, module, what in BENCHES:
        sub = kinds.add_parser(name, help=what, description=what)
        if "bench" in words:
            _fill(sub, module)
    return parser


def _fill(parser: argparse.ArgumentParser, module: str) -> None:
    _common(parser)
    importlib.import_module(module).add_arguments(parser)
    parser.set_defaults(module=module)


def main(arguments: Sequence[str] | None = None) -> int:
    """`pyvhost`; the exit status."""
    words = sys.argv[1:] if arguments is None else list(arguments)
    args = _parser(words).parse_args(words)
    return _run(args.module, args)


def _main_of(name: str, arguments: Sequence[str] | None) -> int:
    """A serving command under a name of its own, as QEMU's back-end programs are called."""
    module, what = next((module, what) for command, module, what in COMMANDS if command == name)
    parser = argparse.ArgumentParser(prog=f"pyvhost-{name}", description=f"{what.capitalize()}.")
    parser.add_argument("--version", action="version", version=f"pyvhost {__version__}")
    _fill(parser, module)
    args = parser.parse_args(arguments)
    return _run(args.module, args)


def main_net(arguments: Sequence[str] | None = None) -> int:
    """`pyvhost-net`: `pyvhost net`."""
    return _main_of("net", arguments)


def main_scsi(arguments: Sequence[str] | None = None) -> int:
    """`pyvhost-scsi`: `pyvhost scsi`."""
    return _main_of("scsi", arguments)


def main_vsock(arguments: Sequence[str] | None = None) -> int:
    """`pyvhost-vsock`: `pyvhost vsock`."""
    return _main_of("vsock", arguments)


if __name__ == "__main__":
    sys.exit(main())
