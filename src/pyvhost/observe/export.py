"""The counters for programs: JSON, and Prometheus.

Promises: every number that the table shows, and every counter as it was counted; `prometheus_client` is
imported only when asked for. Never: listens anywhere by itself but where it is told to.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import accumulate
from typing import TYPE_CHECKING, Any, Final

from pyvhost.observe import latency
from pyvhost.observe.rates import GAUGES, Queue, counted, is_disk, queues
from pyvhost.observe.reader import Process, Snapshot

if TYPE_CHECKING:
    from prometheus_client.core import Metric

#: What the counters of this project's devices mean.
MEANINGS: Final = {
    "packets": "Frames that passed.",
    "bytes": "Bytes of frames that passed.",
    "drops": "Frames that were dropped, for whatever reason.",
    "errors": "Frames that were malformed, or that the backend refused; of a logical unit, operations that failed.",
    "kicks": "Notifications from the driver.",
    "calls": "Notifications to the driver.",
    "calls_suppressed": "Notifications that the driver did not want.",
    "syscalls": "System calls that moving the frames took.",
    "bursts": "Batches that the frames were moved in.",
    "oversize": "Frames that no buffer could hold.",
    "no_buffer": "Times that frames had to wait for a buffer of the driver's.",
    "faults": "Times that the ring was stopped because of what the driver had written.",
    "reads": "Reads that a logical unit has done.",
    "writes": "Writes that a logical unit has done.",
    "read_bytes": "Bytes that were read.",
    "written_bytes": "Bytes that were written.",
    "others": "Commands that a logical unit has done which neither read nor wrote.",
    "connections": "Connections that a guest has now.",
    "connects": "Connections that a guest has asked for and got, or was asked for and accepted.",
    "refused": "Connections that came to nothing.",
    "resets": "Connections that were broken off.",
    "credit_stalls": "Times that a connection had something for its guest, which had no room for it.",
    "credit_updates": "Packets that told a guest of nothing but room.",
}


def as_json(snapshot: Snapshot, previous: Snapshot | None = None, dt: float | None = None) -> dict[str, Any]:
    """The snapshot as JSON's own types. Rates are a second, since `previous`; null where there was none."""
    by_process: dict[int, list[dict[str, Any]]] = {id(process): [] for process in snapshot.processes}
    seconds = None
    for queue in queues(snapshot, previous, dt):
        by_process[id(queue.process)].append(_queue(queue))
        seconds = queue.seconds if previous is not None else None
    return {
        "time": snapshot.time,
        "interval": seconds,
        "processes": [_process(process, by_process[id(process)]) for process in snapshot.processes],
        "problems": list(snapshot.problems),
    }


def _process(process: Process, rows: list[dict[str, Any]]) -> dict[str, Any]:
    return {"pid": process.pid, "started": process.started, "file": str(process.path), "queues": rows}


def _queue(queue: Queue) -> dict[str, Any]:
    counters = counted(queue.row)
    rates = None
    if queue.growth is not None and queue.seconds > 0:
        rates = {name: queue.growth[name] / queue.seconds for name in counters if name not in GAUGES}
    common = {"labels": queue.row.labels, "counters": counters, "rates": rates}
    if queue.is_disk:
        return common | {
            "latency_buckets": latency.buckets(queue.row.values),
            "latency_us": {f"p{part:g}": queue.percentile(part / 100) for part in (50, 90, 99, 99.9)}
            | {"mean": queue.mean()},
            "queue_depth": queue.depth(),
        }
    if rates is not None:
        rates["bits"] = 8 * rates.get("bytes", 0.0)
    return common | {
        "syscalls_per_packet": queue.syscalls_per_packet(),
        "packets_per_batch": queue.batch(),
        "calls_suppressed_part": queue.suppressed(),
    }


class Collector:
    """A custom collector for `prometheus_client`: looks when it is asked, keeps nothing in between.

    Each counter becomes ``pyvhost_NAME_total`` with the labels pid, device, kind, queue and backend; what is a number
    of the moment, a guest's connections, the gauge ``pyvhost_NAME``; the latencies
    of a logical unit, ``pyvhost_latency_seconds``, a histogram.
    """

    LABELS: Final = ("device", "kind", "queue", "backend")

    def __init__(self, look: Callable[[], Snapshot]) -> None:
        self._look = look

    def collect(self) -> Iterable[Metric]:
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily

        snapshot = self._look()
        labels = ("pid", *self.LABELS)
        sums: dict[str, dict[tuple[str, ...], int]] = {name: {} for name in MEANINGS}
        latencies: dict[tuple[str, ...], list[int]] = {}
        seconds: dict[tuple[str, ...], float] = {}
        for process in snapshot.processes:
            for row in process.rows:
                whose = (str(process.pid), *(row.label(name) for name in self.LABELS))
                if is_disk(row) and (counts := latency.buckets(row.values)):
                    known = latencies.get(whose, [0] * len(counts))
                    latencies[whose] = [one + other for one, other in zip(known, counts, strict=False)]
                    seconds[whose] = seconds.get(whose, 0.0) + latency.total_us(row.values) / 1e6
                for name, value in counted(row).items():
                    # Two rows of the same labels would be the same series twice.
                    series = sums.setdefault(name, {})
                    series[whose] = series.get(whose, 0) + value
        for name, series in sums.items():
            meaning = MEANINGS.get(name, f"Counter {name} of a pyvhost process.")
            family = GaugeMetricFamily if name in GAUGES else CounterMetricFamily
            counter = family(f"pyvhost_{name}", meaning, labels=labels)
            for whose, value in series.items():
                counter.add_metric(whose, value)
            yield counter
        histogram = HistogramMetricFamily(
            "pyvhost_latency_seconds", "From a command's arrival to its end.", labels=labels
        )
        for whose, counts in latencies.items():
            histogram.add_metric(whose, _cumulative(counts), seconds[whose])
        yield histogram
        started = GaugeMetricFamily(
            "pyvhost_process_start_time_seconds",
            "When the process started, since the epoch.",
            labels=("pid",),
        )
        for process in snapshot.processes:
            started.add_metric((str(process.pid),), process.started)
        yield started
        yield GaugeMetricFamily(
            "pyvhost_unreadable_files",
            "Counters' files that were found and could not be believed.",
            value=len(snapshot.problems),
        )


def _cumulative(counts: list[int]) -> list[tuple[str, float]]:
    ends = [str(latency.bounds(bucket)[1] / 1e6) for bucket in range(len(counts) - 1)]
    return list(zip([*ends, "+Inf"], accumulate(map(float, counts)), strict=True))


def serve_prometheus(address: str, port: int, look: Callable[[], Snapshot]) -> tuple[Any, int]:
    """Answers scrapes at `address`:`port` (0: any) in a thread; its server, to be shut down, and the port.

    OSError: as bind(2).
    """
    from prometheus_client import CollectorRegistry, start_http_server

    registry = CollectorRegistry(auto_describe=False)
    registry.register(Collector(look))
    server, _ = start_http_server(port, address, registry)
    return server, server.server_port
