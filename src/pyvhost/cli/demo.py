"""`pyvhost demo`: two guests that nobody here wrote, their cards, disk and sockets served by one process, watched.

Promises: needs no root and touches nothing of the host's network: the guests meet in a switch within the serving
process; ends by itself, with a summary, and leaves nothing behind. Where no guest can be booted it uses the
driver side of this package, and says so. Never: shows a figure that it did not measure.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory

from rich.console import Console, RenderableType
from rich.live import Live
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from pyvhost.cli.arguments import seconds
from pyvhost.cli.demo_disk import make_disk
from pyvhost.cli.demo_guests import KINDS, DemoError, Ends, make_ends
from pyvhost.cli.guests import GuestError
from pyvhost.cli.serving import Serving, ServingError
from pyvhost.observe.reader import Row, Snapshot, snapshot
from pyvhost.observe.top import History, render, scaled

#: What serves, as anybody could write it. It has the names of the sockets, in the folder where it runs.
PROGRAM = """\
import logging
from pyvhost import NetDevice, ScsiDevice, VsockDevice, serve

logging.basicConfig(format="%(levelname)s: %(message)s")
logging.getLogger("pyvhost").setLevel("INFO")
serve({
    "first": NetDevice("switch:demo", name="first"),
    "second": NetDevice("switch:demo", name="second"),
    "disks": ScsiDevice(["disk.img"], name="disks"),
    "sockets": VsockDevice(3, uds_path="guest", name="sockets"),
})
"""
_LOOK_SECONDS = 0.5
# Where there is no terminal to redraw, a table now and then will do.
_PRINT_SECONDS = 5.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `pyvhost demo`."""
    parser.description = (
        "Boot two unmodified Linux guests whose network cards, disk and sockets pyvhost serves: one mounts the disk, "
        "pings the other, answers on a vsock port and sends the other data over TCP. Watch what is served. Needs no "
        "root. Ends by itself."
    )
    parser.add_argument(
        "--seconds",
        type=seconds(1, 3600),
        default=10.0,
        metavar="N",
        help="how long to transfer (default: 10)",
    )
    parser.add_argument(
        "--guest",
        choices=("auto", *KINDS),
        default="auto",
        help="uml: User Mode Linux; qemu: QEMU without KVM, with Debian's kernel, fetched if absent; "
        "driver: this package's own driver side, no guest (default: the first of these that works here)",
    )


def run(args: argparse.Namespace) -> int:
    """Runs the command; its exit status."""
    console = Console(highlight=False)
    kinds = list(KINDS) if args.guest == "auto" else [args.guest]
    for kind in kinds:
        try:
            with ExitStack() as stack:
                Demo(console, kind, args.seconds, stack).run()
            return 0
        except KeyboardInterrupt:
            return 130
        except DemoError as problem:
            # Nothing has been served yet: there may be another kind of guest.
            console.print(Text(f"No {KINDS[kind]}: {problem}\n", "yellow"))
        except ServingError as problem:
            # All that it printed is above.
            print(f"pyvhost demo: {str(problem).partition(chr(10))[0]}", file=sys.stderr)
            return 1
        except GuestError as problem:
            print(f"pyvhost demo: {problem}", file=sys.stderr)
            return 1
    return 1


class Demo:
    """One run with one kind of guest. What it starts is on `stack`."""

    def __init__(self, console: Console, kind: str, seconds: float, stack: ExitStack) -> None:
        self.console = console
        self.kind = kind
        self.seconds = seconds
        self._stack = stack
        self._history = History()

    def run(self) -> None:
        """Everything, from the back end's start to the summary. DemoError: this kind of guest can't be had."""
        folder = Path(self._stack.enter_context(TemporaryDirectory(prefix="pyvhost-demo-")))
        sockets = [folder / "first", folder / "second"]
        ends = make_ends(self.kind, sockets, folder / "disks", folder / "sockets", self._say)
        make_disk(folder / "disk.img")
        serving = self._serve([*sockets, folder / "disks", folder / "sockets"])
        self._stack.callback(ends.stop)
        with self.console.status("booting"):
            ends.start()
        self._say(ends.description)
        for title, show in (*ends.shows, (f"TCP from the first to the second, {self.seconds:g} s", None)):
            self.console.print(Rule(title, align="left", style="bold"))
            if show is not None:
                show(lambda line: self.console.print(Text(line)))
        before, after = self._watched(serving, ends)
        ends.check()
        self._summary(ends, before, after)

    def _serve(self, sockets: Sequence[Path]) -> Serving:
        folder = sockets[0].parent
        (folder / "demo.py").write_text(PROGRAM)
        self.console.print(Text("$ cat demo.py", "bold"))
        self.console.print(Text(PROGRAM.rstrip()))
        self.console.print(Text("$ python demo.py", "bold"))
        names = [path.name for path in sockets]
        serving = Serving([], names, program="demo.py", folder=folder, on_line=self._served)
        self._stack.callback(serving.close)
        with self.console.status("starting; the first time, the data plane is compiled"):
            return serving.wait_ready()

    def _watched(self, serving: Serving, ends: Ends) -> tuple[Snapshot, Snapshot]:
        """Transfers, showing what is served meanwhile; what was counted before and after."""
        problems: list[BaseException] = []
        done = threading.Event()

        def transfer() -> None:
            try:
                ends.transfer(self.seconds)
            except BaseException as problem:
                problems.append(problem)
            finally:
                done.set()

        first = previous = now = _of(serving)
        thread = threading.Thread(target=transfer, name="transfer", daemon=True)
        thread.start()
        shown: RenderableType = ""
        live = self.console.is_terminal
        with Live(shown, console=self.console, auto_refresh=False, transient=live) as screen:
            last_print = first.monotonic
            while not done.wait(_LOOK_SECONDS):
                now = _of(serving)
                shown = render(now, previous, history=self._history, width=self.console.width)
                previous = now
                if live:
                    screen.update(shown, refresh=True)
                elif now.monotonic - last_print >= _PRINT_SECONDS:
                    self.console.print(shown)
                    last_print = now.monotonic
        if live or last_print == first.monotonic:
            # The last look with traffic stays on the screen; where nothing was printed yet it is the one.
            self.console.print(shown)
        thread.join()
        if problems:
            raise problems[0]
        return first, _of(serving)

    def _summary(self, ends: Ends, before: Snapshot, after: Snapshot) -> None:
        self.console.print(Rule("Summary", align="left", style="bold"))
        self.console.print(Text(ends.result, "bold green"))
        if ends.disk_result:
            disk = next(row for row in _grown(after).values() if row.label("queue") == "0:0")
            counted = f"{disk.get('reads')} reads, {disk.get('writes')} writes"
            self.console.print(Text(f"{ends.disk_result}; {counted} since it was served", "bold green"))
        self.console.print(_table(_grown(before), _grown(after)))

    def _served(self, line: str) -> None:
        # What to paste for QEMU is of no use here: the guests are started already.
        if "for QEMU:" not in line and "for UML:" not in line:
            self.console.print(Text("  " + line, "dim"))

    def _say(self, text: str) -> None:
        self.console.print(Text(text))


def _of(serving: Serving) -> Snapshot:
    """What the serving process counts, and nobody else's counters."""
    now = snapshot()
    return dataclasses.replace(
        now, processes=tuple(process for process in now.processes if process.pid == serving.pid), problems=()
    )


_Queues = dict[tuple[str, str, int], Row]


def _grown(look: Snapshot) -> _Queues:
    return {
        (row.label("device"), row.label("queue"), row.generation): row
        for process in look.processes
        for row in process.rows
    }


def _table(before: _Queues, after: _Queues) -> Table:
    """What the transfer came to, a line a queue and one for all."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), show_footer=True)
    rows = {key: _growth(row, before.get(key)) for key, row in after.items()}
    rows = {key: growth for key, growth in rows.items() if growth.get("packets")}
    total: dict[str, int] = {}
    for growth in rows.values():
        for name, value in growth.items():
            total[name] = total.get(name, 0) + value
    table.add_column("device", "all")
    table.add_column("queue")
    for title, cell in _COLUMNS:
        table.add_column(title, cell(total), justify="right")
    device = None
    for (name, queue, _), growth in sorted(rows.items()):
        table.add_row("" if name == device else name, queue, *(cell(growth) for _, cell in _COLUMNS))
        device = name
    return table


def _growth(row: Row, before: Row | None) -> dict[str, int]:
    return {
        name: value - (before.get(name) if before is not None else 0) for name, value in row.values.items()
    }


def _counter(name: str) -> Callable[[dict[str, int]], str]:
    return lambda growth: scaled(growth.get(name, 0))


def _per_packet(growth: dict[str, int]) -> str:
    packets = growth.get("packets", 0)
    return f"{growth.get('syscalls', 0) / packets:.4f}" if packets else "-"


_COLUMNS: tuple[tuple[str, Callable[[dict[str, int]], str]], ...] = (
    ("packets", _counter("packets")),
    ("bytes", _counter("bytes")),
    ("drops", _counter("drops")),
    ("kicks", _counter("kicks")),
    ("calls", _counter("calls")),
    ("suppressed", _counter("calls_suppressed")),
    ("syscalls\n/packet", _per_packet),
)
