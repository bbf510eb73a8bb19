"""What logging, translation and byte order cost: the same rings served with and without, by turns.

A driver in compiled code fills both rings of a port and has the data plane serve it, on one core, with no
thread, no system call and no guest in between: what differs is what the ring's record says.

Promises: ratios to the plain ring of the same run, the median of many turns. Never: an absolute time alone.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

from pyvhost.abi.virtio import VRING_AVAIL_F_NO_INTERRUPT, VRING_DESC_F_WRITE
from pyvhost.dataplane import blocks, exercise

NUM: Final = 256
_BUFFER: Final = 2048
_HEADER: Final = 12
_PAGE: Final = 4096
_ROUNDS: Final = 200
_GUEST: Final = 1 << 32
KINDS: Final = {"null": blocks.PORT_NULL, "generate": blocks.PORT_GENERATE, "loop": blocks.PORT_LOOP}
WAYS: Final = ("plain", "dirty log", "IOTLB", "other byte order")


@dataclass(frozen=True)
class Row:
    """A case: nanoseconds a frame each way, and its ratio to the plain ring's rate in the same turn."""

    kind: str
    size: int
    way: str
    ns: float
    ratio: float


class Bench:
    """Two rings and a port over memory of this process."""

    def __init__(self) -> None:
        self._kept: list[Any] = []
        self.workers: Any = np.zeros(1, blocks.WORKER)
        self.rings: Any = np.zeros(2, blocks.RING)
        self.ports: Any = np.zeros(1, blocks.PORT)
        memory = np.zeros((64 + 2 * NUM * _BUFFER // _PAGE) * _PAGE // 8 + _PAGE, np.int64)
        self._kept.append(memory)
        self._base = -(-int(memory.ctypes.data) // _PAGE) * _PAGE
        self._memory = memory.view(np.uint8)[self._base - int(memory.ctypes.data) :]
        self._size = (64 + 2 * NUM * _BUFFER // _PAGE) * _PAGE
        worker = self.workers[0]
        worker["tx_batch"] = self._room(blocks.BATCH_BYTES)
        worker["rx_batch"] = self._room(blocks.BATCH_BYTES)
        worker["scratch"] = self._room(blocks.SCRATCH_BYTES)
        worker["row"] = self._room(8 * len(blocks.COUNTERS))
        self.log = np.zeros(1 << 15, np.int64)
        rows = [(_GUEST, self._size, self._base, _GUEST, 3)]
        pages = [(_GUEST + at, _PAGE, self._base + at, _GUEST + at, 3) for at in range(0, self._size, _PAGE)]
        self._tables = {way: np.array(rows, np.int64) for way in WAYS}
        self._tables["IOTLB"] = np.array(pages, np.int64)

    def _room(self, size: int) -> int:
        memory = np.zeros(size // 8 + 8, np.int64)
        self._kept.append(memory)
        return int(memory.ctypes.data)

    def _put(self, at: int, kind: str, *numbers: int) -> None:
        data = np.array(numbers, kind).tobytes()
        self._memory[at : at + len(data)] = np.frombuffer(data, np.uint8)

    def set_up(self, kind: str, size: int, way: str) -> None:
        """Fills rings, port and memory for a case."""
        swap = way == "other byte order"
        order = "<" if (sys.byteorder == "little") != swap else ">"
        for index, flags in enumerate((VRING_DESC_F_WRITE, 0)):
            desc = index * 16 * _PAGE
            avail, used = desc + 4 * _PAGE, desc + 8 * _PAGE
            ring = self.rings[index]
            self.rings[index] = np.zeros(1, blocks.RING)[0]
            ring["desc"], ring["avail"], ring["used"] = (self._base + part for part in (desc, avail, used))
            ring["num"] = NUM
            ring["regions"], ring["region_count"] = self._tables[way].ctypes.data, len(self._tables[way])
            ring["iotlb"], ring["swap"] = way == "IOTLB", swap
            ring["call_fd"] = ring["err_fd"] = ring["log_fd"] = -1
            ring["running"] = ring["located"] = 1
            ring["row"] = self.workers[0]["row"]
            if way == "dirty log":
                ring["log_data"] = ring["log_used"] = self.log.ctypes.data
                ring["log_bytes"] = self.log.nbytes
                ring["log_used_at"] = _GUEST + used
            length = _BUFFER if flags else size + _HEADER
            buffers = _GUEST + (64 + index * NUM * _BUFFER // _PAGE) * _PAGE
            self._put(used, f"{order}u2", 0, 0)
            self._put(avail, f"{order}u2", VRING_AVAIL_F_NO_INTERRUPT, 0, *range(NUM))
            for number in range(NUM):
                self._put(desc + 16 * number, f"{order}u8", buffers + number * _BUFFER)
                self._put(desc + 16 * number + 8, f"{order}u4", length)
                self._put(desc + 16 * number + 12, f"{order}u2", flags, 0)
        port = self.ports[0]
        self.ports[0] = np.zeros(1, blocks.PORT)[0]
        port["kind"] = KINDS[kind]
        port["fd"] = port["left"] = -1
        port["tx"], port["used"], port["mergeable"], port["header"] = 1, 1, 1, _HEADER
        port["template"], port["template_bytes"] = self._base, size

    def run(self, rounds: int = _ROUNDS) -> float:
        """Nanoseconds a frame."""
        took = exercise.exercise(self.workers, self.rings, self.ports, rounds)
        if took < 0:
            raise RuntimeError("a ring stopped in the middle of the benchmark")
        return float(took) / (rounds * NUM)


def measure(turns: int, console: Console) -> list[Row]:
    """All cases, `turns` times each, the ways of a case one after the other in each turn."""
    bench = Bench()
    exercise.prepare(bench.workers, bench.rings, bench.ports)
    rows = []
    cases = [(kind, size) for kind in KINDS for size in (64, 1518)]
    for kind, size in track(cases, "rings", console=console, transient=True):
        taken: dict[str, list[float]] = {way: [] for way in WAYS}
        for _ in range(turns):
            for way in WAYS:
                bench.set_up(kind, size, way)
                taken[way].append(bench.run())
        for way in WAYS:
            ratios = [plain / other for plain, other in zip(taken["plain"], taken[way], strict=True)]
            rows.append(Row(kind, size, way, statistics.median(taken[way]), statistics.median(ratios)))
    return rows


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `pyvhost bench ring`."""
    parser.add_argument(
        "--turns", type=int, default=15, metavar="N", help="turns a case (default: %(default)s)"
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("build/out"),
        metavar="DIR",
        help="where bench-ring.json and bench-ring.svg go (default: %(default)s)",
    )


def run(arguments: argparse.Namespace) -> int:
    """Measures, prints a table, and writes it down and draws it; the exit status."""
    console = Console()
    rows = measure(max(1, arguments.turns), console)
    table = Table(title="frames a second, against the plain ring in the same run", box=None, pad_edge=False)
    table.add_column("")
    for way in WAYS:
        table.add_column(way, justify="right")
    for kind, size in _cases(rows):
        cells = {row.way: row for row in rows if (row.kind, row.size) == (kind, size)}
        table.add_row(f"{kind} {size} B", *(f"{cells[way].ratio:.2f}" for way in WAYS))
    console.print(table)
    arguments.output.mkdir(parents=True, exist_ok=True)
    path = arguments.output / "bench-ring.json"
    path.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    console.print(f"written: {path}", highlight=False)
    try:
        drawn = _draw(rows, path.with_suffix(".svg"))
    except ImportError:
        console.print("not drawn: that needs matplotlib", highlight=False)
    else:
        console.print(f"drawn: {drawn}", highlight=False)
    return 0


def _cases(rows: list[Row]) -> list[tuple[str, int]]:
    return list(dict.fromkeys((row.kind, row.size) for row in rows))


def _draw(rows: list[Row], path: Path) -> Path:
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"svg.hashsalt": "pyvhost", "font.family": "sans-serif", "font.size": 10}):
        figure = Figure(figsize=(8.6, 4.2), facecolor="white")
        FigureCanvasSVG(figure)
        axes = figure.add_subplot()
        cases = _cases(rows)
        for number, (way, colour) in enumerate(zip(WAYS[1:], ("#2a6f97", "#61a5c2", "#b5535a"), strict=True)):
            heights = [row.ratio for row in rows if row.way == way]
            axes.bar(
                [at + 0.27 * (number - 1) for at in range(len(cases))], heights, 0.25, color=colour, label=way
            )
        axes.axhline(1.0, color="#222222", lw=0.8)
        axes.set_xticks(range(len(cases)), [f"{kind}\n{size} B" for kind, size in cases])
        axes.set_ylabel("rate, plain ring = 1")
        axes.legend(frameon=False, ncols=3, loc="upper center", bbox_to_anchor=(0.5, 1.12))
        axes.spines[["top", "right"]].set_visible(False)
        figure.savefig(path, format="svg", metadata={"Date": None})
    return path
