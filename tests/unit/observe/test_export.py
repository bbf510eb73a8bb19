"""JSON and Prometheus."""

from __future__ import annotations

import json
import subprocess
import sys
import urllib.request

import pytest
from prometheus_client.parser import text_string_to_metric_families

from pyvhost.observe.export import MEANINGS, as_json, serve_prometheus
from pyvhost.observe.reader import Snapshot
from unit.observe.samples import FIELDS, process, row, snapshot

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
    assert out.stdout.split() == list(MEANINGS)
