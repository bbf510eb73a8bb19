"""JSON and Prometheus."""

from __future__ import annotations

import json
import subprocess
import sys
import urllib.request

import pytest
from prometheus_client.parser import text_string_to_metric_families

from pyvhost.observe.export import MEANINGS, Collector, as_json, serve_prometheus
from pyvhost.observe.reader import Snapshot
from unit.observe.samples import FIELDS, disk, process, row, snapshot, sockets

BEFORE = snapshot(10, process(row("vm0", "rx0", packets=100)))
NOW = snapshot(
    12,
    process(row("vm0", "rx0", packets=300, bytes=1000, syscalls=50, bursts=100), row("vm0", "tx0")),
    process(row("vm1", "rx0", "null"), pid=200),
    problems=("/x: is bad",),
)


def test_json_has_every_number() -> None:
    data = json.loads(json.dumps(as_json(NOW, BEFORE)))
    assert data["interval"] == 2
    assert data["problems"] == ["/x: is bad"]
    assert [p["pid"] for p in data["processes"]] == [100, 200]
    rx0, tx0 = data["processes"][0]["queues"]
    assert rx0["labels"] == {"device": "vm0", "kind": "net", "queue": "rx0", "backend": "tap:vm0"}
    assert set(rx0["counters"]) == set(FIELDS)
    assert rx0["counters"]["packets"] == 300
    assert rx0["rates"]["packets"] == 100
    assert rx0["rates"]["bits"] == 4000
    assert rx0["syscalls_per_packet"] == 0.25
    assert rx0["packets_per_batch"] == 2
    assert rx0["calls_suppressed_part"] is None
    assert tx0["rates"] is None


def test_json_of_a_first_look() -> None:
    data = as_json(NOW)
    assert data["interval"] is None
    assert data["processes"][1]["queues"][0]["rates"] is None


def scrape(now: Snapshot) -> dict[str, dict[tuple[str, ...], float]]:
    server, port = serve_prometheus("127.0.0.1", 0, lambda: now)
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=30) as answer:
            text = answer.read().decode()
    finally:
        server.shutdown()
        server.server_close()
    found: dict[str, dict[tuple[str, ...], float]] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            whose = tuple(
                sample.labels.get(name, "") for name in ("pid", "device", "kind", "queue", "backend")
            )
            series = found.setdefault(sample.name, {})
            assert whose not in series, "a series twice"
            series[whose] = sample.value
    return found


def test_prometheus_has_every_counter() -> None:
    found = scrape(NOW)
    assert found["pyvhost_packets_total"] == {
        ("100", "vm0", "net", "rx0", "tap:vm0"): 300,
        ("100", "vm0", "net", "tx0", "tap:vm0"): 0,
        ("200", "vm1", "net", "rx0", "null"): 0,
    }
    assert {f"pyvhost_{name}_total" for name in FIELDS} <= set(found)
    assert found["pyvhost_process_start_time_seconds"][("100", "", "", "", "")] == 1000
    assert found["pyvhost_unreadable_files"] == {("",) * 5: 1}


def test_prometheus_adds_up_rows_of_the_same_labels() -> None:
    found = scrape(snapshot(1, process(row("a", "rx0", packets=1), row("a", "rx0", generation=3, packets=2))))
    assert found["pyvhost_packets_total"] == {("100", "a", "net", "rx0", "tap:vm0"): 3}


def test_prometheus_quotes_labels() -> None:
    odd = 'a"b\\c{}'
    found = scrape(snapshot(1, process(row(odd, "rx0", packets=1))))
    assert ("100", odd, "net", "rx0", "tap:vm0") in found["pyvhost_packets_total"]


def test_prometheus_port_in_use() -> None:
    server, port = serve_prometheus("127.0.0.1", 0, lambda: NOW)
    try:
        with pytest.raises(OSError, match="in use"):
            serve_prometheus("127.0.0.1", port, lambda: NOW)
    finally:
        server.shutdown()
        server.server_close()


def test_every_counter_of_the_data_plane_has_a_meaning() -> None:
    # In a process of its own: the blocks bring NumPy, and the plain twin's tests want to choose its mode.
    code = "from pyvhost.dataplane.blocks import COUNTERS; print(*COUNTERS)"
    out = subprocess.run(
        [sys.executable, "-c", code],
        env={"PYTHONPATH": ":".join(sys.path)},
        capture_output=True,
        text=True,
        check=True,
    )
    named = [name for name in out.stdout.split() if not name.startswith("latency_")]
    assert named == list(MEANINGS)


DISKS = snapshot(
    14,
    process(
        disk(
            "vm0", "0:0", reads=30, writes=10, read_bytes=4096, errors=1, latency_3=30, latency_23=10,
            latency_ns=50_000_000_000,
        ),
        row("vm0", "rx0", packets=1),
    ),
)  # fmt: skip
DISKS_BEFORE = snapshot(12, process(disk("vm0", "0:0", reads=10, latency_3=10, latency_ns=60_000)))


def test_json_of_a_disk() -> None:
    data = as_json(DISKS, DISKS_BEFORE)
    lun, queue = data["processes"][0]["queues"]
    assert lun["counters"] == {
        "reads": 30,
        "writes": 10,
        "others": 0,
        "read_bytes": 4096,
        "written_bytes": 0,
        "errors": 1,
    }
    assert lun["rates"]["reads"] == 10
    assert lun["latency_buckets"] == [0, 0, 0, 30, *[0] * 19, 10]
    assert lun["latency_us"]["p50"] == 4 + 4 * 15 / 20, "of the 30 since the look before"
    assert lun["latency_us"]["p99"] > 2**22
    assert lun["latency_us"]["mean"] == (50_000_000 - 60) / 30
    assert lun["queue_depth"] == (50_000_000 - 60) / 1e6 / 2
    assert "packets_per_batch" not in lun
    assert "reads" not in queue["counters"]


def test_prometheus_has_a_histogram_of_a_disk() -> None:
    server, port = serve_prometheus("127.0.0.1", 0, lambda: DISKS)
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=30) as answer:
            families = {one.name: one for one in text_string_to_metric_families(answer.read().decode())}
    finally:
        server.shutdown()
        server.server_close()
    samples = families["pyvhost_latency_seconds"].samples
    buckets = [(one.labels["le"], one.value) for one in samples if one.name.endswith("_bucket")]
    assert {one.name: one.value for one in samples if not one.name.endswith("_bucket")} == {
        "pyvhost_latency_seconds_count": 40,
        "pyvhost_latency_seconds_sum": 50,
    }
    assert buckets[2:4] == [("4e-06", 0), ("8e-06", 30)]
    assert buckets[-2:] == [("4.194304", 30), ("+Inf", 40)]
    (reads,) = families["pyvhost_reads"].samples
    assert (reads.labels["queue"], reads.labels["backend"], reads.value) == ("0:0", "a.img", 30)
    assert [one.labels["queue"] for one in families["pyvhost_packets"].samples] == ["rx0"]
    assert [one.labels["queue"] for one in families["pyvhost_errors"].samples] == ["0:0", "rx0"]


SOCKETS = snapshot(
    10,
    process(
        sockets("vm0", "rx", packets=10, credit_stalls=7, credit_updates=1),
        sockets("vm0", "tx", packets=5),
        sockets("vm0", "event", connections=12, connects=30, refused=3, resets=2),
    ),
)


def test_json_of_a_guest_with_sockets() -> None:
    rx, tx, event = as_json(SOCKETS, SOCKETS, 1)["processes"][0]["queues"][:3]
    by_queue = {row["labels"]["queue"]: row for row in (rx, tx, event)}
    counters = by_queue["event"]["counters"]
    assert (counters["connections"], counters["connects"], counters["refused"], counters["resets"]) == (
        12,
        30,
        3,
        2,
    )
    assert "connections" not in by_queue["event"]["rates"]
    assert by_queue["rx"]["counters"]["credit_stalls"] == 7
    assert not {"connections", "credit_stalls"} & by_queue["tx"]["counters"].keys()


def test_prometheus_has_connections_as_a_gauge() -> None:
    families = {family.name: family for family in Collector(lambda: SOCKETS).collect()}
    connections = families["pyvhost_connections"]
    assert connections.type == "gauge"
    assert [(one.name, one.labels["queue"], one.value) for one in connections.samples] == [
        ("pyvhost_connections", "event", 12)
    ]
    assert [one.name for one in families["pyvhost_resets"].samples] == ["pyvhost_resets_total"]
