"""`pyvhost top`: what the serving processes do, live; as JSON; for Prometheus.

Promises: only reads; starts fast, without Numba. Never: listens beyond this host unless an address says so.
"""

from __future__ import annotations

import argparse
import json
import sys
import threading
from collections.abc import Iterator
from functools import partial

from pyvhost.cli.arguments import seconds
from pyvhost.observe.reader import Snapshot, snapshot

LOOPBACK = "127.0.0.1"


def _endpoint(text: str) -> tuple[str, int]:
    """ADDR:PORT, [ADDR]:PORT or PORT."""
    address, colon, port = text.rpartition(":")
    if not port.isascii() or not port.isdigit() or int(port) > 65535 or (colon and not address):
        raise argparse.ArgumentTypeError(f"{text!r} is not [ADDR:]PORT")
    return address.strip("[]") or LOOPBACK, int(port)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `pyvhost top`."""
    parser.description = (
        "Watch what is served: each disk's operations and latencies, each guest's sockets, each queue's packets, "
        "drops, notifications and system calls."
    )
    parser.add_argument(
        "--interval",
        type=seconds(0.05, 86400),
        default=1.0,
        metavar="S",
        help="seconds between two looks (default: 1)",
    )
    parser.add_argument("--once", action="store_true", help="look at one interval, and end")
    parser.add_argument("--json", action="store_true", help="print JSON, one line an interval")
    parser.add_argument(
        "--prometheus",
        type=_endpoint,
        metavar="[ADDR:]PORT",
        help=f"serve http://ADDR:PORT/metrics instead (default address: {LOOPBACK}; port 0: any)",
    )
    parser.add_argument(
        "--directory",
        action="append",
        metavar="DIR",
        help="look for counters here, not in the usual places; may be given more than once",
    )


def run(args: argparse.Namespace) -> int:
    """Runs the command; its exit status."""
    try:
        if args.prometheus is not None:
            return _prometheus(args)
        if args.json:
            return _json(args)
        return _table(args)
    except KeyboardInterrupt:
        return 0
    except BrokenPipeError:
        # Who read us has seen enough; keep the interpreter from trying again when it flushes.
        sys.stdout = None
        return 0


def _moments(args: argparse.Namespace) -> Iterator[tuple[Snapshot, Snapshot | None]]:
    """Snapshots with the one before, an interval apart; with --once the first pair alone."""
    tick = threading.Event()
    previous = snapshot(args.directory)
    if not args.once:
        yield previous, None
    while True:
        tick.wait(args.interval)
        now = snapshot(args.directory)
        yield now, previous
        if args.once:
            return
        previous = now


def _json(args: argparse.Namespace) -> int:
    from pyvhost.observe.export import as_json

    for now, previous in _moments(args):
        print(json.dumps(as_json(now, previous), ensure_ascii=False), flush=True)
    return 0


def _table(args: argparse.Namespace) -> int:
    from rich.console import Console
    from rich.live import Live

    from pyvhost.observe.top import History, render

    console = Console()
    # One moment alone draws nothing.
    history = None if args.once else History()
    if args.once or not console.is_terminal:
        for now, previous in _moments(args):
            console.print(render(now, previous, history=history, width=console.width))
        return 0
    last = None
    try:
        with Live(console=console, screen=True, auto_refresh=False) as live:
            for now, previous in _moments(args):
                last = render(now, previous, history=history, width=console.width)
                live.update(last, refresh=True)
    finally:
        if last is not None:
            console.print(last)
    return 0


def _prometheus(args: argparse.Namespace) -> int:
    from pyvhost.observe.export import serve_prometheus

    address, port = args.prometheus
    try:
        _, port = serve_prometheus(address, port, partial(snapshot, args.directory))
    except OSError as error:
        print(f"pyvhost top: can't listen at {address} port {port}: {error}", file=sys.stderr)
        return 1
    shown = f"[{address}]" if ":" in address else address
    print(f"serving http://{shown}:{port}/metrics", flush=True)
    threading.Event().wait()
    return 0
