"""`pyvhost ctl`: ask something of a device that is served, while guests run.

Promises: what a device answers is printed as JSON; a refusal is one line on standard error and exit status 1.
Never: imports the data plane.
"""

from __future__ import annotations

import argparse
import json
import sys

from pyvhost.cli.arguments import seconds
from pyvhost.control import client
from pyvhost.control.protocol import RefusedError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `pyvhost ctl`."""
    parser.epilog = "`pyvhost ctl SOCKET help` lists what a device can be asked."
    parser.add_argument(
        "--timeout",
        type=seconds(0.001, 86400),
        default=60.0,
        metavar="S",
        help="seconds to wait for an answer (default: 60)",
    )
    parser.add_argument("socket", metavar="SOCKET", help="the device's vhost socket, or its control socket")
    parser.add_argument("word", nargs="*", metavar="COMMAND ARGUMENT", help="default: status")


def run(args: argparse.Namespace) -> int:
    """Asks; the exit status."""
    command, *arguments = args.word or ["status"]
    try:
        answer = client.ask(args.socket, command, arguments, args.timeout)
    except RefusedError as error:
        print(f"pyvhost: {error}", file=sys.stderr)
        return 1
    if command == "help":
        rows = [(f"{row['command']} {row['usage']}".rstrip(), row["what"]) for row in answer]
        width = max(len(left) for left, _ in rows)
        for left, right in rows:
            print(f"{left:{width}}  {right}")
    elif answer is not None:
        print(json.dumps(answer, indent=2, ensure_ascii=False))
    return 0
