"""A run's results as a person reads them: tables, and a sentence on where the time goes.

Promises: ratios first; a rate never stands without the peer's beside it.
Never: measures.
"""

from __future__ import annotations

from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from pyvhost.cli.bench.results import ControlResult, IdleResult, Report, Result, SyscallResult

#: What control messages are to be answered within under full load, in ms.
CONTROL_GOAL_MS = 50.0
#: For eighty columns.
_PLAIN: dict[str, Any] = {"box": SIMPLE_HEAD, "pad_edge": False, "collapse_padding": True}


def print_report(report: Report, console: Console) -> None:
    """Everything, in the order it was measured."""
    if report.rows:
        console.print(ratio_table(report))
        for row in report.rows:
            console.print(
                f"  {row.title}, {row.size} B: {where_time_goes(row)}", highlight=False, markup=False
            )
        console.print()
    if report.syscalls:
        console.print(syscall_table(report.syscalls))
    if report.control is not None:
        console.print(control_sentence(report.control), highlight=False)
    if report.idle is not None:
        console.print(idle_sentence(report.idle), highlight=False)
    for line in report.skipped:
        console.print(f"[yellow]not measured:[/] {escape(line)}", highlight=False)


def ratio_table(report: Report) -> Table:
    """One line a case and size."""
    table = Table(title=f"{report.subject} against {report.peer}: the same front end, by turns", **_PLAIN)
    table.add_column("", no_wrap=True)
    table.add_column("ratio", justify="right", no_wrap=True)
    table.add_column("range", justify="right", no_wrap=True)
    table.add_column("Mpps", justify="right", no_wrap=True)
    table.add_column("cycles", justify="right", no_wrap=True)
    table.add_column("limit", no_wrap=True)
    table.add_column("line", justify="right", no_wrap=True)
    for row in report.rows:
        style = "green" if row.ratio.median >= 1.0 else "red"
        line = f"{row.round_trip_ns.median:.0f} {row.distance}" if row.round_trip_ns else "?"
        table.add_row(
            f"{row.title} {row.size}",
            f"[bold {style}]{row.ratio.median:.2f}[/]",
            f"{row.ratio.low:.2f}-{row.ratio.high:.2f}",
            f"{row.ours_mpps.median:.2f}/{row.theirs_mpps.median:.2f}",
            f"{row.ours_cycles:.0f}/{row.theirs_cycles:.0f}",
            "back" if row.ours_limits else "front",
            line,
        )
    pairs = report.rows[0].ratio.count
    table.caption = (
        f"ratio: ours over theirs, median of {pairs} pairs of slices; Mpps: by the front end's port statistics, "
        "ours / theirs; cycles: of the back end's processor a packet, empty polls included; limit: which "
        "end holds our pair up; line: a cache line's way to the other processor and back, ns"
    )
    return table


def _shares(samples: dict[str, float]) -> str:
    named = [f"{share:.0%} {kind}" for kind, share in samples.items() if share >= 0.015]
    return ", ".join(named[:4])


def where_time_goes(row: Result) -> str:
    """Who holds the pair up, and what the back ends' processors do meanwhile."""
    if row.ours_limits:
        limit = "pyvhost's back end is the limit"
    else:
        limit = "the front end is the limit: it can't keep pyvhost's back end busy"
    if row.ours_samples:
        ours = f"its time is {_shares(row.ours_samples)}"
    else:
        ours = f"{1 - row.ours_system_share:.0%} of its time is user, {row.ours_system_share:.0%} system"
    if row.theirs_samples:
        theirs = f"the peer's is {_shares(row.theirs_samples)}"
    else:
        theirs = f"the peer's is {1 - row.theirs_system_share:.0%} user"
    bursts = f", in bursts of {row.ours_burst:.0f}" if row.ours_burst is not None else ""
    return f"{limit}; {ours}{bursts}; {theirs}"


def syscall_table(results: list[SyscallResult]) -> Table:
    """One line a backend and direction."""
    table = Table(title="system calls a packet, of the whole back-end process", **_PLAIN)
    table.add_column("backend")
    table.add_column("direction", no_wrap=True)
    table.add_column("driver", no_wrap=True)
    table.add_column("packets", justify="right", no_wrap=True)
    table.add_column("a packet", justify="right", no_wrap=True)
    table.add_column("which")
    for result in results:
        named = sorted(result.calls.items(), key=lambda item: -item[1])
        which = ", ".join(f"{name} {number}" for name, number in named[:3] if number) or "none"
        calls = result.per_packet
        table.add_row(
            result.backend,
            result.direction,
            result.driver,
            f"{result.packets:,}",
            "?" if calls is None else f"{calls:.4f}",
            which,
        )
    table.caption = (
        f"counted by {', '.join(sorted({result.counted_by for result in results}))}; loop: there and back is one "
        "packet; user: without passt's own; where few packets pass, looks into epoll weigh more"
    )
    return table


def control_sentence(control: ControlResult) -> str:
    """Against the goal."""
    verdict = "[green]within[/]" if control.max_ms <= CONTROL_GOAL_MS else "[red]beyond[/]"
    return (
        f"control under full load ({control.flood_mpps:.1f} Mpps through another device of the process): "
        f"{control.messages} messages answered in {control.median_ms:.2f} ms (median), {control.p99_ms:.2f} ms "
        f"(p99), {control.max_ms:.2f} ms (max), {verdict} {CONTROL_GOAL_MS:.0f} ms; "
        f"{control.idle_median_ms:.2f} ms (median) without the load"
    )


def idle_sentence(idle: IdleResult) -> str:
    """Processor time and memory."""
    return (
        f"idle: {idle.devices} attached devices in one process used {idle.cpu_seconds * 1000:.1f} ms of processor "
        f"time in {idle.seconds:g} s, {idle.threads} threads; each device adds {idle.pss_per_device_kb:.0f} kB "
        f"(PSS {idle.pss_one_kb / 1024:.0f} MB with one, {idle.pss_kb / 1024:.0f} MB with all; "
        f"RSS {idle.rss_one_kb / 1024:.0f} and {idle.rss_kb / 1024:.0f} MB)"
    )
