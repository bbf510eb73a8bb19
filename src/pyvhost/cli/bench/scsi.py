"""`pyvhost bench scsi`: a disk against the file it is made of, qemu-storage-daemon's, and QEMU's own in a guest.

Promises: bounded in time; the file lies in a temporary folder and goes with it; what this host can't measure is said,
and the rest is measured. Never: a figure that was not taken beside its peer's.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import Progress

from pyvhost.cli.bench import disk_plot, disks, machine, profile, running
from pyvhost.cli.bench.command import describe_machine
from pyvhost.cli.bench.counting import CannotCountError
from pyvhost.cli.bench.disk_guest import DiskGuest, disk_guest
from pyvhost.cli.bench.disk_results import Report, print_report, row
from pyvhost.cli.bench.disks import BenchError, Contender, Fio, Sample
from pyvhost.cli.bench.loader import Workload
from pyvhost.cli.bench.machine import UnfitError, favoured
from pyvhost.cli.bench.testpmd import Cores
from pyvhost.cli.guests import GuestError

WORKLOADS = (
    *(Workload(writes, True, 4096, depth) for writes in (False, True) for depth in (1, 32, 128)),
    *(Workload(writes, False, 1 << 20, 8) for writes in (False, True)),
)
#: Where the file is, and whether the page cache is passed by.
PLACES = {"direct": True, "page cache": False}
PARTS = (*PLACES, "guest")
#: Of whose I/O in the guest the cost is measured.
_COSTED = Workload(writes=False, random=True, size=4096, depth=32)
_IMAGE_BYTES = 256 << 20
#: What else a part of it may fail of.
_FAILURES = (BenchError, GuestError, KeyError)
_PACKAGES = {"fio": "fio", disks.DAEMON: "qemu-system-common", "qemu-system-x86_64": "qemu-system-x86"}


@dataclass(frozen=True)
class Pace:
    """Turns, and the seconds of each slice: on the host, and in the guest."""

    turns: int
    slice: float
    guest_turns: int
    guest_slice: float


FULL = Pace(turns=5, slice=0.25, guest_turns=3, guest_slice=0.4)
#: What comes later in a part of the host's, where programs start slowly, gets `FEWEST_TURNS`.
LONG_SECONDS = 50.0
FEWEST_TURNS = 3
QUICK = Pace(turns=1, slice=0.1, guest_turns=1, guest_slice=0.2)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `pyvhost bench scsi`."""
    parser.add_argument("--quick", action="store_true", help="one short turn each: to see that it works")
    parser.add_argument(
        "--part", action="append", choices=PARTS, help="measure only this part (may be given again)"
    )
    parser.add_argument(
        "--workload",
        action="append",
        choices=[each.key for each in WORKLOADS],
        help="measure only this (may be given again)",
    )
    parser.add_argument(
        "--folder",
        type=Path,
        metavar="DIR",
        help="where the file of 256 MiB lies meanwhile (default: a temporary folder)",
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("build/out"),
        metavar="DIR",
        help="where bench-scsi.json, bench-scsi.svg and transcripts go (default: %(default)s)",
    )


def run(arguments: argparse.Namespace) -> int:
    """Measures, prints, writes. Returns the exit status: 0, or 1 when nothing could be measured."""
    console = Console()
    report = Report(machine=describe_machine(), peers=_versions())
    pace = QUICK if arguments.quick else FULL
    chosen = [each for each in WORKLOADS if not arguments.workload or each.key in arguments.workload]
    transcripts = arguments.output / "bench-scsi-transcripts"
    transcripts.mkdir(parents=True, exist_ok=True)
    try:
        cores = machine.pick_cores()
        with (
            machine.ended_by_signals(),
            machine.scratch_directory() as sockets,
            tempfile.TemporaryDirectory(prefix="pyvhost-bench-", dir=arguments.folder) as folder,
            running.progress(console) as progress,
        ):
            image = Path(folder) / "disk"
            disks.make_image(image, _IMAGE_BYTES)
            bench = Bench(image, sockets, cores, transcripts, pace, report, progress)
            for part in arguments.part or PARTS:
                with running.lenient(report.skipped, part, *_FAILURES):
                    bench.guest(chosen) if part == "guest" else bench.host(part, chosen)
    except UnfitError as error:
        console.print(f"[red]cannot measure:[/] {error}", highlight=False)
        return 1
    print_report(report, console)
    _write(report, arguments.output, console)
    return 0 if report.rows else 1


class Bench:
    """What the parts share."""

    def __init__(
        self,
        image: Path,
        sockets: Path,
        cores: Cores,
        transcripts: Path,
        pace: Pace,
        report: Report,
        progress: Progress,
    ) -> None:
        self._image = image
        self._sockets = sockets
        self._cores = cores
        self._transcripts = transcripts
        self._pace = pace
        self._report = report
        self._progress = progress
        self._began = 0.0

    def host(self, place: str, workloads: Sequence[Workload]) -> None:
        """The file, pyvhost and the daemon, on the host."""
        _need("fio", disks.DAEMON)
        task = self._progress.add_task(place, total=len(workloads) * (self._pace.turns + 1))
        direct = PLACES[place]
        self._began = time.monotonic()
        word = place.replace(" ", "-")
        if not direct:
            disks.warm(self._image)
        with contextlib.ExitStack() as stack:
            stack.enter_context(favoured())
            ours, daemon = (
                stack.enter_context(
                    begin(
                        self._sockets / f"{word}-{name}",
                        self._image,
                        self._cores,
                        direct=direct,
                        transcript=self._transcripts / f"{word}-{name}.log",
                    )
                )
                for name, begin in (("pyvhost", disks.pyvhost_disk), ("daemon", disks.daemon_disk))
            )
            everybody: list[Contender] = [ours, Fio(self._image, self._cores, direct=direct), daemon]
            for workload in workloads:
                self._progress.update(task, description=f"{place}: {workload.title}")
                with running.lenient(self._report.skipped, f"{place}, {workload.title}", *_FAILURES):
                    self._compare(place, workload, everybody, lambda: self._progress.advance(task))
            if not self._report.shares.get(place) and workloads:
                self._look(place, ours, workloads[min(1, len(workloads) - 1)])
        self._progress.update(task, completed=len(workloads) * (self._pace.turns + 1), description=place)

    def _compare(
        self, place: str, workload: Workload, everybody: Sequence[Contender], tick: Callable[[], None]
    ) -> None:
        turns: dict[str, list[Sample]] = {each.name: [] for each in everybody}
        long = time.monotonic() - self._began > LONG_SECONDS
        for number in range(min(self._pace.turns, FEWEST_TURNS) if long else self._pace.turns):
            first = number % len(everybody)
            for each in (*everybody[first:], *everybody[:first]):
                turns[each.name].append(each.measure(workload, self._pace.slice))
            tick()
        counted = {}
        with contextlib.suppress(CannotCountError):
            for each in everybody:
                counted[each.name] = each.measure(workload, self._pace.slice, count=True).calls_each
        tick()
        self._report.rows.append(row(place, workload, turns, calls=counted))

    def _look(self, place: str, ours: disks.Served, workload: Workload) -> None:
        """Where pyvhost's time goes, in a span of its own."""
        with ours.loaded(workload, 3 * self._pace.slice):
            found = profile.samples(ours.pid, 2 * self._pace.slice)
        if found:
            self._report.shares[f"{place}, {workload.title}"] = found

    def guest(self, workloads: Sequence[Workload]) -> None:
        """Two disks of one guest."""
        _need("fio", "qemu-system-x86_64")
        pace = self._pace
        task = self._progress.add_task("guest: it boots", total=pace.guest_turns + 1)
        with disk_guest(self._sockets, self._image, self._transcripts / "guest-pyvhost.log") as guest:
            turns = []
            for number in range(pace.guest_turns):
                self._progress.update(task, description=f"guest: turn {number + 1}")
                turns.append(guest.turn(workloads, pace.guest_slice))
                self._progress.advance(task)
            self._progress.update(task, description="guest: what it costs")
            for workload in workloads:
                samples = {who: [turn[workload.key, who] for turn in turns] for who in guest.names}
                costs = self._costs(guest, workload) if workload == _COSTED and pace.guest_turns > 1 else {}
                with running.lenient(self._report.skipped, f"guest, {workload.title}", *_FAILURES):
                    self._report.rows.append(row("guest", workload, samples, costs=costs, cpu=False))
        self._progress.update(task, completed=pace.guest_turns + 1, description="guest")

    def _costs(self, guest: DiskGuest, workload: Workload) -> dict[str, Sample]:
        try:
            return {
                who: guest.cost(workload, who, 4 * self._pace.guest_slice, count=True) for who in guest.names
            }
        except (CannotCountError, GuestError) as error:
            self._report.skipped.append(f"what {workload.title} costs in the guest: {error}")
            return {}


def _need(*programs: str) -> None:
    lacking = disks.missing(programs)
    if lacking:
        raise BenchError(f"install {', '.join(_PACKAGES[name] for name in lacking)}")


def _versions() -> dict[str, str]:
    """Of the peers, as they tell them."""
    found = {}
    for program in _PACKAGES:
        if not disks.missing([program]):
            done = subprocess.run([program, "--version"], capture_output=True, text=True, check=False)
            found[program] = (done.stdout.splitlines() or [""])[0]
    return found


def _write(report: Report, output: Path, console: Console) -> None:
    written = [output / "bench-scsi.json"]
    written[0].write_text(json.dumps(report.as_dict(), indent=1) + "\n")
    if report.rows:
        try:
            disk_plot.draw(report, output / "bench-scsi.svg")
            written.append(output / "bench-scsi.svg")
        except ImportError:
            console.print("not drawn: that needs matplotlib", highlight=False)
    console.print("written: " + ", ".join(str(path) for path in written), highlight=False)
