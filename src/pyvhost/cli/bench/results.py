"""What a run found, as plain data: what the table, the JSON file and the drawing are made from.

Promises: everything that is printed is in here, and everything in here can be written as JSON.
Never: measures, prints or draws.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from pyvhost.cli.bench.net import Measured, Row
from pyvhost.cli.bench.stats import Spread, nearness, pairwise_ratios, spread

#: Of the JSON file; raised when a field changes its meaning.
SCHEMA = 1


@dataclass(frozen=True)
class Result:
    """One row of the comparison. Rates in million packets a second, distances in ns, cycles of the TSC."""

    case: str
    title: str
    size: int
    ours_mpps: Spread
    theirs_mpps: Spread
    ratio: Spread
    ratios: tuple[float, ...]
    ours_cycles: float
    theirs_cycles: float
    theirs_busy_cycles: float | None
    ours_limits: bool
    theirs_limits: bool
    ours_system_share: float
    theirs_system_share: float
    ours_samples: dict[str, float] | None
    theirs_samples: dict[str, float] | None
    round_trip_ns: Spread | None
    ours_burst: float | None = None

    @property
    def distance(self) -> str:
        """`near`, `far`, both when it changed during the row, or `?`."""
        if self.round_trip_ns is None:
            return "?"
        ends = (nearness(self.round_trip_ns.low), nearness(self.round_trip_ns.median))
        high = nearness(self.round_trip_ns.high)
        # One slow look is an interrupted look; a median tells of the row.
        return ends[1] if ends[1] == ends[0] or ends[1] == high else "near/far"


def _system_share(measured: Measured) -> float:
    return measured.cpu.system / measured.cpu.total if measured.cpu.total else 0.0


def result(row: Row) -> Result:
    """Sums up one row. Raises ValueError when a slice of the peer saw nothing."""
    ratios = pairwise_ratios(row.ours.mpps, row.theirs.mpps)
    ours, theirs = row.ours.account, row.theirs.account
    if ours is None or theirs is None:
        raise ValueError(f"the row {row.case.key} {row.size} was not closed")
    return Result(
        case=row.case.key,
        title=row.case.title,
        size=row.size,
        ours_mpps=spread(row.ours.mpps),
        theirs_mpps=spread(row.theirs.mpps),
        ratio=spread(ratios),
        ratios=tuple(ratios),
        ours_cycles=ours.cycles_per_packet,
        theirs_cycles=theirs.cycles_per_packet,
        theirs_busy_cycles=theirs.busy_cycles_per_packet,
        ours_limits=ours.back_end_limits,
        theirs_limits=theirs.back_end_limits,
        ours_system_share=_system_share(row.ours),
        theirs_system_share=_system_share(row.theirs),
        ours_samples=ours.samples,
        theirs_samples=theirs.samples,
        round_trip_ns=spread(row.round_trips_ns) if row.round_trips_ns else None,
        ours_burst=ours.burst,
    )


@dataclass(frozen=True)
class SyscallResult:
    """System calls of the back end's process over packets of one backend and direction."""

    backend: str
    direction: str
    packets: int
    calls: dict[str, int]
    total: int
    counted_by: str
    driver: str = "polls"

    @property
    def per_packet(self) -> float | None:
        """None when no packet moved."""
        return self.total / self.packets if self.packets else None


@dataclass(frozen=True)
class ControlResult:
    """How soon control messages of one device were answered while another's worker was busy, in ms."""

    messages: int
    median_ms: float
    p99_ms: float
    max_ms: float
    idle_median_ms: float
    flood_mpps: float


@dataclass(frozen=True)
class IdleResult:
    """What idle devices cost: processor seconds over `seconds`, and memory in kB."""

    devices: int
    seconds: float
    cpu_seconds: float
    threads: int
    rss_kb: int
    pss_kb: int
    rss_one_kb: int
    pss_one_kb: int

    @property
    def pss_per_device_kb(self) -> float:
        """What each device added to a process with one."""
        return (self.pss_kb - self.pss_one_kb) / max(self.devices - 1, 1)


@dataclass
class Report:
    """A whole run."""

    machine: dict[str, str]
    peer: str
    rows: list[Result] = field(default_factory=list)
    syscalls: list[SyscallResult] = field(default_factory=list)
    control: ControlResult | None = None
    idle: IdleResult | None = None
    skipped: list[str] = field(default_factory=list)
    subject: str = "pyvhost"

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        found: dict[str, Any] = {"schema": SCHEMA, **asdict(self)}
        for written, row in zip(found["rows"], self.rows, strict=True):
            written["distance"] = row.distance
        for written, calls in zip(found["syscalls"], self.syscalls, strict=True):
            written["per_packet"] = calls.per_packet
        if self.idle is not None:
            found["idle"]["pss_per_device_kb"] = self.idle.pss_per_device_kb
        return found


def worst(rows: Sequence[Result]) -> Result | None:
    """The row with the least median ratio."""
    return min(rows, key=lambda row: row.ratio.median, default=None)
