"""`pyvhost bench vsock`: a guest's connection against a plain unix socket pair, by turns, in the same run.

A `pyvhost vsock` process serves a guest's socket device. The guest's side is a driver in compiled code on rings of
256 entries with a credit of 256 KiB; the host's side a program, compiled too, at the device's unix socket, which
reads or writes so many bytes a call. The pair has the same program at both ends. Beside it: the published comparison
of Linux's vhost-vsock with the userspace peer, on another machine, with the same settings.

Promises: ratios from turns of the same run, their median; bytes are counted where they arrive, by who received them.
Never: has a guest's kernel in the way, or looks at what is sent.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

from rich.console import Console
from rich.table import Table

from pyvhost.cli.bench import vsock_ends, vsock_plot
from pyvhost.cli.bench.backend import BackEnd, BackEndError
from pyvhost.cli.bench.counting import CannotCountError
from pyvhost.cli.bench.machine import ended_by_signals, favour, favoured, scratch_directory
from pyvhost.cli.bench.vsock_ends import CONNECTING, TO_GUEST, TO_HOST, Guest, HostEnd, unix_pair
from pyvhost.driver.errors import DriverError
from pyvhost.observe.top import scaled

SIZES: Final = (64, 4096, 65536)
#: Mbit/s of the published comparison by direction and size: Linux's vhost-vsock, the userspace peer.
PUBLISHED: Final = {
    (TO_GUEST, 64): (715.0, 193.0),
    (TO_GUEST, 4096): (36_209.0, 10_294.0),
    (TO_GUEST, 65536): (93_541.0, 41_307.0),
    (TO_HOST, 64): (927.0, None),
    (TO_HOST, 4096): (35_752.0, None),
}
#: A guest's CID; nobody else's in this process.
_CID: Final = 42


@dataclass
class Row:
    """A direction and a size: Mbit/s of each turn, system calls a packet, and the published figures."""

    direction: str
    size: int
    ours: list[float]
    pair: list[float]
    packets: float
    calls: float | None = None
    counted_by: str = ""
    kernel: float | None = None
    peer: float | None = None

    @property
    def ratios(self) -> list[float]:
        """Ours over the pair's, turn by turn."""
        return [a / b for a, b in zip(self.ours, self.pair, strict=True)]

    @property
    def ratio(self) -> float:
        """Their median."""
        return statistics.median(self.ratios)

    @property
    def peer_share(self) -> float | None:
        """The peer's part of what Linux got."""
        return self.peer / self.kernel if self.peer and self.kernel else None

    def as_dict(self) -> dict[str, object]:
        """For the file."""
        return {**asdict(self), "ratio": self.ratio, "peer_share": self.peer_share}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `pyvhost bench vsock`."""
    parser.add_argument(
        "--turns", type=int, default=3, metavar="N", help="turns a row (default: %(default)s)"
    )
    parser.add_argument(
        "--seconds",
        type=float,
        default=1.0,
        metavar="S",
        help="how long each is measured (default: %(default)s)",
    )
    parser.add_argument("--size", type=int, action="append", help="only this size (may be given again)")
    parser.add_argument(
        "--rx-buffer",
        type=int,
        default=4096,
        metavar="BYTES",
        help="payload that one of the guest's receive buffers has room for (default: %(default)s, as Linux's)",
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("build/out"),
        metavar="DIR",
        help="where bench-vsock.json and bench-vsock.svg go (default: %(default)s)",
    )


def run(arguments: argparse.Namespace) -> int:
    """Measures, prints a table, and writes it down; the exit status."""
    console = Console()
    vsock_ends.prepare()
    try:
        with ended_by_signals(), scratch_directory() as scratch:
            bench = Bench(scratch, arguments.turns, arguments.seconds, arguments.rx_buffer)
            with favoured(), bench.back_end:
                bench.back_end.wait_ready([bench.socket])
                # What else runs on the machine blurs a comparison less when both go before it.
                favour(bench.back_end.pid)
                rows = [
                    bench.row(direction, size)
                    for direction in (TO_GUEST, TO_HOST)
                    for size in arguments.size or SIZES
                ]
                connections = bench.connections()
    except (BackEndError, DriverError, OSError) as error:
        console.print(f"[red]cannot measure:[/] {error}", highlight=False)
        return 1
    console.print(_table(rows))
    console.print(
        f"connections a second, opened by the guest and closed: {connections:,.0f}", highlight=False
    )
    arguments.output.mkdir(parents=True, exist_ok=True)
    path = arguments.output / "bench-vsock.json"
    found = {"rows": [row.as_dict() for row in rows], "connections": connections}
    found["settings"] = {"rx_buffer": arguments.rx_buffer, "python": sys.version.split()[0]}
    path.write_text(json.dumps(found, indent=1) + "\n")
    drawn = path.with_suffix(".svg")
    try:
        titles = [f"{row.direction}, {_bytes(row.size)}" for row in rows]
        vsock_plot.draw(titles, [row.ratios for row in rows], [row.peer_share for row in rows], drawn)
        console.print(f"written: {path}, {drawn}", highlight=False)
    except ImportError:
        console.print(f"written: {path}; not drawn: install matplotlib", highlight=False)
    return 0


class Bench:
    """The device, and what is measured of it."""

    def __init__(self, folder: Path, turns: int, seconds: float, rx_buffer: int) -> None:
        self.socket = folder / "guest"
        self._uds = folder / "host"
        self._turns = max(1, turns)
        self._seconds = seconds
        self._rx_buffer = rx_buffer
        arguments = ["vsock", "--socket-path", str(self.socket), "--guest-cid", str(_CID)]
        arguments += ["--uds-path", str(self._uds)]
        self.back_end = BackEnd("pyvhost vsock", arguments)

    def row(self, direction: str, size: int) -> Row:
        """One direction and size: both by turns, then the system calls."""
        row = Row(direction, size, [], [], 0.0)
        row.kernel, row.peer = PUBLISHED.get((direction, size), (None, None))
        packets = []
        for _ in range(self._turns):
            with unix_pair(size) as pair:
                row.pair.append(_mbit(pair.rate(self._seconds)))
            with self._guest(size) as guest, HostEnd(guest, self._uds, direction, size) as end:
                row.ours.append(_mbit(end.rate(self._seconds)))
                packets.append(guest.packet_rate)
        row.packets = statistics.median(packets)
        with self._guest(size) as guest, HostEnd(guest, self._uds, direction, size) as end:
            try:
                row.calls, row.counted_by = end.calls_a_packet(self.back_end.pid, min(self._seconds, 0.5))
            except CannotCountError:
                pass
        return row

    def connections(self) -> float:
        """Connections a second: asked for by the guest, accepted by the host, shut down, confirmed."""

        def once() -> float:
            with self._guest(32) as guest, HostEnd(guest, self._uds, CONNECTING, 32) as end:
                return end.rate(self._seconds)

        return statistics.median(once() for _ in range(self._turns))

    def _guest(self, size: int) -> Guest:
        return Guest(self.socket, size, self._rx_buffer)


def _mbit(bytes_a_second: float) -> float:
    return bytes_a_second * 8 / 1e6


def _table(rows: list[Row]) -> Table:
    table = Table(
        title="a guest's connection against a unix socket pair, Mbit/s; packets a second, system calls a packet",
        caption="published, on another machine: Linux's vhost-vsock, the userspace peer, its share of the kernel's",
        box=None,
        pad_edge=False,
        padding=(0, 1, 0, 0),
    )
    table.add_column("", no_wrap=True)
    for name in ("ours", "unix", "ratio", "packets", "calls", "kernel", "peer", "its"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(
            f"{row.direction}, {row.size}",
            f"{statistics.median(row.ours):,.0f}",
            f"{statistics.median(row.pair):,.0f}",
            f"{row.ratio:.2f}",
            scaled(round(row.packets)),
            _shown(row.calls, "{:.3f}"),
            _shown(row.kernel, "{:,.0f}"),
            _shown(row.peer, "{:,.0f}"),
            _shown(row.peer_share, "{:.2f}"),
        )
    return table


def _bytes(size: int) -> str:
    return f"{size >> 10} KiB" if size >= 1024 else f"{size} B"


def _shown(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)
