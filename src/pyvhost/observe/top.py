"""The live tables: a line a disk, a guest with sockets, or a queue, its traffic drawn beside its numbers.

Promises: fits the width it is given, by leaving out what matters less; says which files were not believed.
Never: obeys markup or control characters in a label; does input or output.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from rich import box
from rich.cells import cell_len
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from pyvhost.observe import sockets
from pyvhost.observe.rates import SCSI, WORKER, Key, Queue, queues
from pyvhost.observe.reader import Snapshot

#: Moments that a queue's drawing goes back.
MOMENTS: Final = 30
_FEWEST_MOMENTS = 8
_BARS = "▁▂▃▄▅▆▇█"
_NONE = "–"
#: Cells between two columns.
_BETWEEN = 2


class History:
    """What each queue's packets, or disk's operations, a second were lately; one that is gone is forgotten."""

    def __init__(self) -> None:
        self._moments: dict[Key, deque[float]] = {}

    def add(self, now: Iterable[Queue]) -> None:
        """Takes note of one more moment."""
        kept: dict[Key, deque[float]] = {}
        for queue in now:
            moments = self._moments.get(queue.key) or deque(maxlen=MOMENTS)
            rate = queue.pace()
            if rate is not None:
                moments.append(rate)
            kept[queue.key] = moments
        self._moments = kept

    def of(self, queue: Queue) -> Sequence[float]:
        """Oldest first."""
        return tuple(self._moments.get(queue.key, ()))


def sparkline(values: Sequence[float], width: int) -> str:
    """The last `width` values as bars of eight heights, the highest one full; nothing is a gap."""
    shown = values[-width:]
    highest = max(shown, default=0.0)
    bars = "".join(_BARS[min(7, int(8 * value / highest))] if value > 0 else " " for value in shown)
    return bars.rjust(width)


def scaled(value: float | None) -> str:
    """Three digits and a prefix: 950, 1.20 k, 12.3 M."""
    if value is None:
        return _NONE
    if 0 < value < 9.95:
        return f"{value:.1f}"
    for prefix in ("", "k", "M", "G", "T", "P"):
        if value < 999.5 or prefix == "P":
            break
        value /= 1000
    if not prefix:
        return f"{value:.0f}"
    digits = 2 if value < 9.995 else 1 if value < 99.95 else 0
    return f"{value:.{digits}f} {prefix}"


def _of(value: float, unit: str) -> str:
    """Scaled, with its unit: 12.3 MB/s, 950 B/s."""
    number = scaled(value)
    return number + unit if number[-1].isalpha() else f"{number} {unit}"


def _ratio(value: float | None) -> str:
    if value is None:
        return _NONE
    if value == 0:
        return "0"
    return f"{value:.3f}" if value < 0.1 else f"{value:.2f}" if value < 10 else f"{value:.0f}"


def _percent(value: float | None) -> str:
    return _NONE if value is None else f"{100 * value:.0f} %"


def duration(microseconds: float | None) -> str:
    """Three digits and a unit: 84.0 us, 1.20 ms."""
    if microseconds is None:
        return _NONE
    for unit in ("us", "ms", "s"):
        if microseconds < 999.5 or unit == "s":
            break
        microseconds /= 1000
    digits = 2 if microseconds < 9.995 else 1 if microseconds < 99.95 else 0
    return f"{microseconds:.{digits}f} {unit}"


@dataclass(frozen=True)
class _Column:
    title: str
    cell: Callable[[Queue], str]
    #: The higher, the later it is left out.
    matters: int
    style: str = ""
    left: bool = False


_DRAWING: Final = "lately"
_QUEUES: Final = (
    _Column("device", lambda q: q.row.label("device") or str(q.process.pid), 100, "bold", left=True),
    _Column("backend", lambda q: q.row.label("backend"), 2, left=True),
    _Column("queue", lambda q: q.row.label("queue"), 100, left=True),
    _Column("packets/s", lambda q: scaled(q.rate("packets")), 100, "green"),
    _Column(_DRAWING, lambda q: "", 11, "cyan", left=True),
    _Column("bits/s", lambda q: scaled(q.bits()), 90, "green"),
    _Column("packets", lambda q: scaled(q.total("packets")), 1),
    _Column("bytes", lambda q: scaled(q.total("bytes")), 7),
    _Column("drops", lambda q: scaled(q.total("drops")), 10),
    _Column("kicks/s", lambda q: scaled(q.rate("kicks")), 6),
    _Column("calls/s", lambda q: scaled(q.rate("calls")), 5),
    _Column("suppressed", lambda q: _percent(q.suppressed()), 3),
    _Column("syscalls\n/packet", lambda q: _ratio(q.syscalls_per_packet()), 8),
    _Column("batch", lambda q: _ratio(q.batch()), 4),
)


_DISKS: Final = (
    _Column("device", lambda q: q.row.label("device") or str(q.process.pid), 100, "bold", left=True),
    _Column("store", lambda q: q.row.label("backend"), 2, left=True),
    _Column("LUN", lambda q: q.row.label("queue"), 100, left=True),
    _Column("IOPS", lambda q: scaled(q.iops()), 100, "green"),
    _Column(_DRAWING, lambda q: "", 11, "cyan", left=True),
    _Column("bytes/s", lambda q: scaled(q.throughput()), 90, "green"),
    _Column("reads/s", lambda q: scaled(q.rate("reads")), 5),
    _Column("read/s", lambda q: scaled(q.rate("read_bytes")), 3),
    _Column("writes/s", lambda q: scaled(q.rate("writes")), 6),
    _Column("written/s", lambda q: scaled(q.rate("written_bytes")), 4),
    _Column("mean", lambda q: duration(q.mean()), 3),
    _Column("p50", lambda q: duration(q.percentile(0.5)), 9),
    _Column("p99", lambda q: duration(q.percentile(0.99)), 10),
    _Column("depth", lambda q: _ratio(q.depth()), 8),
    _Column("errors", lambda q: scaled(q.total("errors")), 7),
)

_SOCKETS: Final = (
    _Column("device", lambda q: q.row.label("device") or str(q.process.pid), 100, "bold", left=True),
    _Column("CID", lambda q: q.row.label("backend"), 100),
    _Column("connections", lambda q: scaled(q.total("connections")), 100, "green"),
    _Column("connects/s", lambda q: scaled(q.rate("connects")), 8),
    _Column(_DRAWING, lambda q: "", 11, "cyan", left=True),
    _Column("to guest/s", lambda q: scaled(q.rate(sockets.RECEIVED)), 90, "green"),
    _Column("from guest/s", lambda q: scaled(q.rate(sockets.SENT)), 90, "green"),
    _Column("packets/s", lambda q: scaled(q.rate("packets")), 7),
    _Column("stalls/s", lambda q: scaled(q.rate("credit_stalls")), 9),
    _Column("refused", lambda q: scaled(q.total("refused")), 6),
    _Column("resets", lambda q: scaled(q.total("resets")), 10),
    _Column("calls/s", lambda q: scaled(q.rate("calls")), 5),
    _Column("syscalls\n/packet", lambda q: _ratio(q.syscalls_per_packet()), 4),
)
#: The counter that is shown yellow when it is not 0.
_TROUBLE: Final = {_QUEUES: "drops", _DISKS: "errors", _SOCKETS: "resets"}


def render(
    snapshot: Snapshot,
    previous: Snapshot | None = None,
    dt: float | None = None,
    *,
    history: History | None = None,
    width: int = 160,
) -> RenderableType:
    """The tables of `snapshot`; rates are since `previous`, `dt` seconds before (by default, as they say).

    `history`: told of this moment, and drawn. `width`: in terminal cells.
    """
    now = list(queues(snapshot, previous, dt))
    guests = sockets.guests(now)
    if history is not None:
        history.add([*now, *guests])
    disks = [queue for queue in now if queue.is_disk]
    others = [queue for queue in now if not queue.is_disk and not sockets.is_socket(queue)]
    tables = []
    if disks:
        tables.append(_table(disks, _DISKS, history, width))
    if guests:
        tables.append(_table(guests, _SOCKETS, history, width))
    if others or not tables:
        tables.append(_table(others, _QUEUES, history, width))
    tables[-1].caption = _caption(snapshot, now)
    parts: list[RenderableType] = []
    for table in tables:
        parts += ["", table] if parts else [table]
    return Group(*parts)


def _table(now: Sequence[Queue], columns: Sequence[_Column], history: History | None, width: int) -> Table:
    trouble = _TROUBLE[tuple(columns)]
    columns, drawing = _fitting(now, columns, width, history)
    table = Table(
        box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False, caption_justify="left"
    )
    for column in columns:
        table.add_column(
            column.title, justify="left" if column.left else "right", style=column.style, no_wrap=True
        )
    device = None
    for queue in now:
        cells = [Text(column.cell(queue)) for column in columns]
        if drawing and history is not None:
            at = next(i for i, column in enumerate(columns) if column.title == _DRAWING)
            cells[at] = Text(sparkline(history.of(queue), drawing))
        if queue.total(trouble):
            for cell, column in zip(cells, columns, strict=True):
                if column.title == trouble:
                    cell.stylize("yellow")
        whose = (queue.process.pid, queue.row.label("device"))
        if whose == device:
            for cell, column in zip(cells, columns, strict=True):
                if column.title in ("device", "backend"):
                    cell.plain = ""
        device = whose
        table.add_row(*cells, style="dim" if queue.row.label("kind") == WORKER else None)
    return table


def _fitting(
    now: Sequence[Queue], every: Sequence[_Column], width: int, history: History | None
) -> tuple[list[_Column], int]:
    """The columns that fit, and how wide the drawing may be (0: there is none)."""
    needs = {
        column.title: max(
            cell_len(text) for text in (*column.title.splitlines(), *(column.cell(queue) for queue in now))
        )
        for column in every
    }
    needs[_DRAWING] = _FEWEST_MOMENTS
    columns = [column for column in every if column.title != _DRAWING or history is not None]

    def total() -> int:
        return sum(needs[column.title] + _BETWEEN for column in columns)

    while total() > width and min(column.matters for column in columns) < 100:
        columns.remove(min(columns, key=lambda column: column.matters))
    if not any(column.title == _DRAWING for column in columns):
        return columns, 0
    return columns, min(MOMENTS, _FEWEST_MOMENTS + max(0, width - total()))


def _caption(snapshot: Snapshot, now: Sequence[Queue]) -> Text:
    caption = Text()
    if not now:
        caption.append("nothing is served at the moment\n" if not snapshot.processes else "no queue runs\n")
    else:
        devices = {
            (queue.process.pid, queue.row.label("device"))
            for queue in now
            if queue.row.label("kind") != WORKER
        }
        caption.append(f"{_count(snapshot.processes, 'process', 'processes')}, {_count(devices, 'device')}")
        sums = []
        disks = [queue for queue in now if queue.is_disk]
        operations = [rate for queue in disks if (rate := queue.iops()) is not None]
        if operations:
            moved = [rate for queue in disks if (rate := queue.throughput()) is not None]
            sums.append(f"{scaled(sum(operations))} IOPS, {_of(sum(moved), 'B/s')}")
        others = [queue for queue in now if queue.row.label("kind") != SCSI]
        packets = [rate for queue in others if (rate := queue.rate("packets")) is not None]
        if any(queue.row.label("kind") != WORKER for queue in others) and packets:
            bits = [rate for queue in others if (rate := queue.bits()) is not None]
            sums.append(f"{scaled(sum(packets))} packets/s, {_of(sum(bits), 'bit/s')}")
        if sums:
            caption.append(f": {'; '.join(sums)}")
        caption.append("\n")
    for problem in snapshot.problems:
        caption.append(problem + "\n", style="red")
    caption.rstrip()
    return caption


def _count(things: Iterable[object], one: str, many: str = "") -> str:
    number = len(list(things))
    return f"{number} {one if number == 1 else many or one + 's'}"
