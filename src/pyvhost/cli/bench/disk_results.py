"""What `bench scsi` found, as plain data, and as a person reads it.

Promises: everything that is printed is in here, and everything in here can be written as JSON; ratios first.
Never: measures or draws.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from pyvhost.cli.bench.disks import Sample
from pyvhost.cli.bench.loader import Workload
from pyvhost.cli.bench.stats import Spread, pairwise_ratios, spread

#: Of the JSON file; raised when a field changes its meaning.
SCHEMA = 1
OURS = "pyvhost"
#: What is aimed at, 32 deep: of the file's own rate, and of QEMU's.
GOALS = {"file": 0.9, "QEMU": 1.5}
_PLAIN: dict[str, Any] = {"box": SIMPLE_HEAD, "pad_edge": False, "collapse_padding": True}


@dataclass(frozen=True)
class Figures:
    """One contender's: I/Os a second, us of processor time and system calls of an I/O."""

    rate: Spread
    cpu_us: float | None
    calls: float | None


@dataclass(frozen=True)
class Row:
    """A workload at a place: all contenders, and ours over each other one turn by turn."""

    place: str
    key: str
    title: str
    depth: int
    figures: dict[str, Figures]
    ratios: dict[str, Spread]
    pairs: dict[str, tuple[float, ...]]


def row(
    place: str,
    workload: Workload,
    samples: Mapping[str, Sequence[Sample]],
    *,
    calls: Mapping[str, float | None] | None = None,
    costs: Mapping[str, Sample] | None = None,
    cpu: bool = True,
) -> Row:
    """Sums up a workload's turns, and `calls` an I/O by contender.

    `costs`: where processor time and calls were measured by themselves; `cpu`: whether the turns know the processor
    time. ValueError: somebody has done nothing.
    """
    figures = {}
    for name, turns in samples.items():
        cost = (costs or {}).get(name)
        times = [each.cpu_us for each in turns] if cpu else []
        if cost is not None:
            times = [cost.cpu_us]
        figures[name] = Figures(
            spread(each.rate for each in turns),
            median(times) if times else None,
            cost.calls_each if cost is not None else (calls or {}).get(name),
        )
    ours = [each.rate for each in samples[OURS]]
    pairs = {
        name: tuple(pairwise_ratios(ours, [each.rate for each in turns]))
        for name, turns in samples.items()
        if name != OURS
    }
    ratios = {name: spread(each) for name, each in pairs.items()}
    return Row(place, workload.key, workload.title, workload.depth, figures, ratios, pairs)


@dataclass
class Report:
    """A whole run."""

    machine: dict[str, str]
    peers: dict[str, str]
    rows: list[Row] = field(default_factory=list)
    shares: dict[str, dict[str, float]] = field(default_factory=dict)
    skipped: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {"schema": SCHEMA, **asdict(self)}


def print_report(report: Report, console: Console) -> None:
    """Everything, in the order it was measured."""
    for place in dict.fromkeys(row.place for row in report.rows):
        rows = [row for row in report.rows if row.place == place]
        console.print(_ratios(place, rows))
        if costs := _costs(place, rows):
            console.print(costs)
    for place, shares in report.shares.items():
        named = [f"{share:.0%} {kind}" for kind, share in shares.items() if share >= 0.02]
        console.print(f"{place}: pyvhost's time is {', '.join(named[:5])}", highlight=False, markup=False)
    for sentence in goals(report.rows):
        console.print(sentence, highlight=False, markup=False)
    for what in report.skipped:
        console.print(f"[yellow]not measured:[/] {what}", highlight=False)


def goals(rows: Sequence[Row]) -> list[str]:
    """Against what is aimed at."""
    sentences = []
    for peer, goal in GOALS.items():
        found = [row for row in rows if row.depth == 32 and peer in row.ratios]
        for row in found:
            ratio = row.ratios[peer].median
            verdict = "reached" if ratio >= goal else "not reached"
            sentences.append(f"{row.place}, {row.title}: {ratio:.2f} of {peer}, {goal:g} {verdict}")
    return sentences


def _peers(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(name for row in rows for name in row.ratios))


def _ratios(place: str, rows: Sequence[Row]) -> Table:
    """One line a workload: ours over each other."""
    peers = _peers(rows)
    table = Table(title=f"{place}: pyvhost's I/Os a second, over the others' by turns", **_PLAIN)
    table.add_column("", no_wrap=True)
    for name in peers:
        table.add_column(f"/ {name}", justify="right", no_wrap=True)
        table.add_column("range", justify="right", no_wrap=True)
    for row in rows:
        cells = [row.title]
        for name in peers:
            ratio = row.ratios[name]
            style = "green" if ratio.median >= GOALS.get(name, 1.0) else "red"
            cells += [f"[bold {style}]{ratio.median:.2f}[/]", f"{ratio.low:.2f}-{ratio.high:.2f}"]
        table.add_row(*cells)
    table.caption = (
        f"medians of {rows[0].ratios[peers[0]].count} turns; behind the comma: how many are under way"
    )
    return table


def _costs(place: str, rows: Sequence[Row]) -> Table | None:
    """One line a workload: what an I/O costs; None when nothing was measured."""
    names = [OURS, *_peers(rows)]
    table = Table(title=f"{place}: what an I/O costs", **_PLAIN)
    table.add_column("", no_wrap=True)
    for what in ("us", "calls"):
        for name in names:
            table.add_column(f"{what} {name}", justify="right")
    for row in rows:
        figures = [row.figures[name] for name in names]
        if any(each.cpu_us is not None or each.calls is not None for each in figures):
            times = ["?" if each.cpu_us is None else f"{each.cpu_us:.1f}" for each in figures]
            calls = ["?" if each.calls is None else f"{each.calls:.2f}" for each in figures]
            table.add_row(row.title, *times, *calls)
    table.caption = "processor time and system calls of the processes that do the I/O"
    return table if table.row_count else None
