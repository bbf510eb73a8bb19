"""`pyvhost bench net`: what is measured in which order, where the results go, how long it may take.

Promises: bounded in time; says what it does meanwhile; leaves the machine as it was.
Never: fails for one part that this host cannot do: it says which and why, and measures the rest.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from rich.console import Console
from rich.progress import Progress

from pyvhost.cli.bench import control, idle, machine, net, plot, running
from pyvhost.cli.bench.report import print_report
from pyvhost.cli.bench.results import Report, result, worst
from pyvhost.cli.bench.syscalls import SUBJECTS, SyscallBench
from pyvhost.cli.bench.testpmd import PACKAGE, PROGRAM, Cores

PARTS = ("ratio", "syscalls", "control", "idle")
_DEFAULT_SECONDS = 90.0
_QUICK_SECONDS = 30.0


@dataclass(frozen=True)
class Places:
    """What every part needs to know of where it runs."""

    scratch: Path
    huge: Path
    cores: Cores
    transcripts: Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `pyvhost bench net`."""
    parser.add_argument(
        "--seconds",
        type=float,
        default=_DEFAULT_SECONDS,
        metavar="N",
        help="how long the comparison may take (default: %(default)g); the other parts take about 60 more",
    )
    parser.add_argument("--quick", action="store_true", help="few slices, short counts: to see that it works")
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("build/out"),
        metavar="DIR",
        help="where bench-net.json, bench-net.svg and the programs' transcripts go (default: %(default)s)",
    )
    parser.add_argument(
        "--case",
        action="append",
        choices=[case.key for case in net.CASES],
        help="compare only this case (may be given again)",
    )
    parser.add_argument(
        "--size", action="append", type=int, help="frames of this size only (may be given again)"
    )
    parser.add_argument(
        "--part", action="append", choices=PARTS, help="measure only this part (may be given again)"
    )
    parser.add_argument(
        "--self-check",
        action="store_true",
        help="compare DPDK's back end with itself: the ratios must come out near 1.0",
    )


def run(arguments: argparse.Namespace) -> int:
    """Measures, prints, writes. Returns the exit status: 0, or 1 when nothing could be measured."""
    console = Console()
    if shutil.which(PROGRAM) is None:
        console.print(f"[red]cannot measure:[/] {PROGRAM} is not installed: apt-get install {PACKAGE}")
        return 1
    parts = tuple(arguments.part or (("ratio",) if arguments.self_check else PARTS))
    output: Path = arguments.output
    transcripts = output / "bench-net-transcripts"
    transcripts.mkdir(parents=True, exist_ok=True)
    for old in transcripts.glob("*.log"):
        old.unlink()
    report = Report(machine=describe_machine(), peer=peer_name())
    if arguments.self_check:
        report.subject = "DPDK (self-check)"
    try:
        cores = machine.pick_cores()
        with (
            machine.ended_by_signals(),
            machine.scratch_directory() as scratch,
            machine.huge_pages(scratch / "huge") as huge,
            running.progress(console) as progress,
        ):
            places = Places(scratch, huge, cores, transcripts)
            for part in parts:
                with running.lenient(report.skipped, part, RuntimeError):
                    _PARTS[part](arguments, places, report, progress)
    except (machine.UnfitError, FileNotFoundError) as error:
        console.print(f"[red]cannot measure:[/] {error}", highlight=False)
        return 1
    print_report(report, console)
    _write(report, output, console)
    return 0 if report.rows or report.syscalls or report.control or report.idle else 1


# --- the parts ---------------------------------------------------------------------------------------------


def _ratio(arguments: argparse.Namespace, places: Places, report: Report, progress: Progress) -> None:
    cases = [case for case in net.CASES if not arguments.case or case.key in arguments.case]
    sizes = arguments.size or net.SIZES
    rows = [(case, size) for case in cases for size in sizes]
    pace = net.pace_for(_QUICK_SECONDS if arguments.quick else arguments.seconds, len(rows))
    bench = net.Bench(places.scratch, places.huge, places.cores, places.transcripts, arguments.self_check)
    task = progress.add_task("comparing", total=len(rows) * pace.pairs)
    for case, size in rows:
        progress.update(task, description=f"{case.title}, {size} B")
        with running.lenient(report.skipped, f"{case.title}, {size} B", RuntimeError):
            report.rows.append(result(bench.run(case, size, pace, lambda: progress.advance(task))))
    progress.update(task, completed=len(rows) * pace.pairs, description="compared")


def _syscalls(arguments: argparse.Namespace, places: Places, report: Report, progress: Progress) -> None:
    seconds = 0.3 if arguments.quick else 1.0
    bench = SyscallBench(places.scratch, places.huge, places.cores, places.transcripts, seconds)
    task = progress.add_task("system calls", total=len(SUBJECTS))
    for subject in SUBJECTS:
        progress.update(task, description=f"system calls: {subject.backend}, {subject.direction}")
        lacking = bench.missing(subject)
        if lacking is None:
            with running.lenient(
                report.skipped, f"system calls of {subject.backend}, {subject.direction}", RuntimeError
            ):
                report.syscalls.append(bench.run(subject))
        else:
            report.skipped.append(f"system calls of {lacking}")
        progress.advance(task)
    progress.update(task, description="system calls")


def _control(arguments: argparse.Namespace, places: Places, report: Report, progress: Progress) -> None:
    task = progress.add_task("control under load", total=None)
    report.control = control.measure(places.scratch, places.huge, places.cores, places.transcripts)
    progress.update(task, total=1, completed=1)


def _idle(arguments: argparse.Namespace, places: Places, report: Report, progress: Progress) -> None:
    task = progress.add_task("idle devices", total=None)
    seconds = 2.0 if arguments.quick else 5.0
    report.idle = idle.measure(places.scratch, places.transcripts, seconds=seconds)
    progress.update(task, total=1, completed=1)


_PARTS: dict[str, Callable[[argparse.Namespace, Places, Report, Progress], None]] = {
    "ratio": _ratio,
    "syscalls": _syscalls,
    "control": _control,
    "idle": _idle,
}


# --- what is written ---------------------------------------------------------------------------------------


def peer_name() -> str:
    """The peer and its version, as testpmd tells it."""
    told = subprocess.run(
        [PROGRAM, "-v", "--no-pci", "--in-memory", "--no-huge", "--no-telemetry", "--help"],
        capture_output=True,
        text=True,
        check=False,
    )
    found = re.search(r"RTE Version: '(.+?)'", told.stdout + told.stderr)
    return f"{found[1] if found else 'DPDK'} vhost"


def describe_machine() -> dict[str, str]:
    """What a reader needs to place the figures; nothing that names the machine."""
    try:
        cpu = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        cpu = None
    versions = {name: metadata.version(name) for name in ("numba", "llvmlite", "numpy")}
    return {
        "cpu": cpu[1] if cpu else platform.machine(),
        "processors": str(len(os.sched_getaffinity(0))),
        "kernel": platform.release(),
        "python": platform.python_version(),
        **versions,
    }


def _write(report: Report, output: Path, console: Console) -> None:
    written = [output / "bench-net.json"]
    written[0].write_text(json.dumps(report.as_dict(), indent=2) + "\n")
    if report.rows:
        try:
            plot.draw(report, output / "bench-net.svg")
            written.append(output / "bench-net.svg")
        except plot.NoMatplotlibError as error:
            console.print(f"[yellow]not drawn:[/] {error}", highlight=False)
        least = worst(report.rows)
        if least is not None:
            console.print(
                f"least median ratio: {least.ratio.median:.2f} ({least.title}, {least.size} B)",
                highlight=False,
            )
    console.print("written: " + ", ".join(str(path) for path in written), highlight=False)
