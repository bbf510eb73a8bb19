"""Snapshots to look at, as a reader would have made them."""

from __future__ import annotations

from pathlib import Path

from pyvhost.observe.reader import Process, Row, Snapshot

FIELDS = (
    "packets", "bytes", "drops", "errors", "kicks", "calls", "calls_suppressed", "syscalls", "bursts",
)  # fmt: skip


def row(device: str, queue: str, backend: str = "tap:vm0", generation: int = 1, **values: int) -> Row:
    """A queue's row; counters that are not named are 0."""
    labels = {"device": device, "kind": "net", "queue": queue, "backend": backend}
    return Row(labels, generation, {name: values.get(name, 0) for name in FIELDS})


DISK_FIELDS = (
    "errors",
    "reads",
    "writes",
    "others",
    "read_bytes",
    "written_bytes",
    *(f"latency_{i}" for i in range(24)),
)


def disk(device: str, lun: str, store: str = "a.img", generation: int = 1, **values: int) -> Row:
    """A logical unit's row, without a sum of the latencies unless it is named, as older files have it."""
    labels = {"device": device, "kind": "scsi", "queue": lun, "backend": store}
    return Row(labels, generation, {name: values.get(name, 0) for name in (*FIELDS, *DISK_FIELDS, *values)})


SOCKET_FIELDS = ("connections", "connects", "refused", "resets", "credit_stalls", "credit_updates")


def sockets(device: str, queue: str, cid: str = "42", generation: int = 1, **values: int) -> Row:
    """A row of a socket device's: rx, tx or event."""
    labels = {"device": device, "kind": "vsock", "queue": queue, "backend": cid}
    return Row(labels, generation, {name: values.get(name, 0) for name in (*FIELDS, *SOCKET_FIELDS)})


def process(*rows: Row, pid: int = 100, started: float = 1000.0) -> Process:
    return Process(pid, started, Path(f"/run/pyvhost/{pid}.counters"), FIELDS, rows)


def snapshot(at: float, *processes: Process, problems: tuple[str, ...] = ()) -> Snapshot:
    return Snapshot(at, 1_700_000_000.0 + at, processes, problems)
