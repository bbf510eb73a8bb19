"""What happened between two snapshots: each queue's counters as rates and ratios.

Promises: a queue that is new, or whose process is, has no rates (None) and not a wild number; a counter that
went backwards counts as one that stood still. Never: does input or output.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from pyvhost.observe import latency
from pyvhost.observe.reader import Process, Row, Snapshot

#: The kind of a row that is no device's queue but a thread's that serves queues.
WORKER: Final = "worker"
#: The kind of a row of a SCSI device: a queue's, or a logical unit's, TARGET:LUN.
SCSI: Final = "scsi"
#: What is counted of logical units alone; of what others count, they have errors.
DISK_FIELDS: Final = ("reads", "writes", "others", "read_bytes", "written_bytes")

#: The kind of a socket device's rows, and what is counted by its queues alone; `connections` is how many there are.
VSOCK: Final = "vsock"
VSOCK_FIELDS: Final = {
    "event": ("connections", "connects", "refused", "resets"),
    "rx": ("credit_stalls", "credit_updates"),
}
_ANY_VSOCK: Final = frozenset(name for names in VSOCK_FIELDS.values() for name in names)
#: What is no counter but a number of the moment.
GAUGES: Final = frozenset({"connections"})

#: Names a queue across snapshots: its file, its use of a row, its labels.
Key = tuple[str, int, tuple[tuple[str, str], ...]]


@dataclass(frozen=True)
class Queue:
    """One queue at one moment, and since the moment before."""

    process: Process
    row: Row
    #: How much each counter grew, None if there was no moment before.
    growth: dict[str, int] | None
    #: Over how many seconds.
    seconds: float

    @property
    def key(self) -> Key:
        return key(self.process, self.row)

    def total(self, name: str) -> int | None:
        """The counter since its beginning; None if the file has no such field."""
        return self.row.values.get(name)

    def rate(self, name: str) -> float | None:
        """Its growth a second; None if unknown."""
        if self.growth is None or name not in self.growth or self.seconds <= 0:
            return None
        return self.growth[name] / self.seconds

    def bits(self) -> float | None:
        """Bits of frames a second."""
        rate = self.rate("bytes")
        return None if rate is None else 8 * rate

    def ratio(self, name: str, to: str) -> float | None:
        """How much of `name` came on one of `to`: lately, or if nothing came lately, since the beginning."""
        for counters in (self.growth, self.row.values):
            if counters and counters.get(to) and name in counters:
                return counters[name] / counters[to]
        return None

    def syscalls_per_packet(self) -> float | None:
        return self.ratio("syscalls", "packets")

    def batch(self) -> float | None:
        """Packets that were done in one go, on average."""
        return self.ratio("packets", "bursts")

    def suppressed(self) -> float | None:
        """The part of the calls that the driver did not want, 0 to 1; None if there was none of either."""
        for counters in (self.growth, self.row.values):
            if counters and "calls" in counters and "calls_suppressed" in counters:
                chances = counters["calls"] + counters["calls_suppressed"]
                if chances:
                    return counters["calls_suppressed"] / chances
        return None

    # --- of a logical unit -----------------------------------------------------------------------------------

    @property
    def is_disk(self) -> bool:
        """Whether this is no queue but a logical unit."""
        return is_disk(self.row)

    def iops(self) -> float | None:
        """Reads and writes a second."""
        return self._both("reads", "writes")

    def throughput(self) -> float | None:
        """Bytes a second, both ways."""
        return self._both("read_bytes", "written_bytes")

    def pace(self) -> float | None:
        """What it does a second: reads and writes, or packets."""
        return self.iops() if self.is_disk else self.rate("packets")

    def percentile(self, part: float) -> float | None:
        """The latency in microseconds that `part` of the operations stayed below: lately, or in all its life."""
        for counters in (self.growth, self.row.values):
            if counters and (found := latency.percentile(latency.buckets(counters), part)) is not None:
                return found
        return None

    def depth(self) -> float | None:
        """How many operations were under way, on average (Little's law); None if unknown."""
        if self.growth is None or self.seconds <= 0:
            return None
        return latency.total_us(self.growth) / 1e6 / self.seconds

    def mean(self) -> float | None:
        """The mean latency in microseconds: lately, or in all its life."""
        for counters in (self.growth, self.row.values):
            if counters and (commands := sum(latency.buckets(counters))):
                return latency.total_us(counters) / commands
        return None

    def _both(self, one: str, other: str) -> float | None:
        first, second = self.rate(one), self.rate(other)
        return None if first is None or second is None else first + second


def is_disk(row: Row) -> bool:
    """Whether a row is a logical unit's."""
    return row.label("kind") == SCSI and ":" in row.label("queue")


def counted(row: Row) -> dict[str, int]:
    """The counters that mean something for such a row, without the latencies."""
    if is_disk(row):
        return {name: row.values[name] for name in (*DISK_FIELDS, "errors") if name in row.values}
    its = VSOCK_FIELDS.get(row.label("queue"), ()) if row.label("kind") == VSOCK else ()
    return {
        name: value
        for name, value in row.values.items()
        if name not in DISK_FIELDS
        and not name.startswith(latency.PREFIX)
        and (name in its or name not in _ANY_VSOCK)
    }


def key(process: Process, row: Row) -> Key:
    return f"{process.path}@{process.started}", row.generation, tuple(sorted(row.labels.items()))


#: Queues without a number, a control queue as a rule, come behind the others.
_UNNUMBERED = 10**9


def _order(row: Row) -> tuple[bool, str, bool, int, int, str]:
    """By device, then 0:0, 0:1, ... and rx0, tx0, rx1, ..., rx10; workers behind all devices."""
    queue = row.label("queue")
    name = queue.rstrip("0123456789")
    number = _number(queue[len(name) :])
    target = _number(name.removesuffix(":")) if is_disk(row) else 0
    return row.label("kind") == WORKER, row.label("device"), not is_disk(row), target, number, name


def _number(text: str) -> int:
    return int(text[:9]) if text.isascii() and text.isdecimal() else _UNNUMBERED


def queues(snapshot: Snapshot, previous: Snapshot | None = None, dt: float | None = None) -> Iterator[Queue]:
    """Every queue of `snapshot`, device by device. `dt`: seconds between the two, by default as they say."""
    before: dict[Key, Row] = {}
    seconds = 0.0
    if previous is not None:
        before = {key(process, row): row for process in previous.processes for row in process.rows}
        seconds = snapshot.monotonic - previous.monotonic if dt is None else dt
    for process in snapshot.processes:
        for row in sorted(process.rows, key=_order):
            old = before.get(key(process, row))
            growth = None
            if old is not None:
                growth = {name: max(0, value - old.get(name)) for name, value in row.values.items()}
            yield Queue(process, row, growth, seconds)
