"""Rates and ratios between two snapshots."""

from __future__ import annotations

import pytest

from pyvhost.observe.rates import queues
from pyvhost.observe.reader import Row
from unit.observe.samples import disk, process, row, snapshot


def test_growth_a_second() -> None:
    before = snapshot(10, process(row("vm0", "rx0", packets=100, bytes=6400)))
    now = snapshot(12, process(row("vm0", "rx0", packets=300, bytes=19200)))
    (queue,) = queues(now, before)
    assert queue.rate("packets") == 100
    assert queue.bits() == 8 * 6400
    assert queue.total("packets") == 300
    (queue,) = queues(now, before, dt=4)
    assert queue.rate("packets") == 50


def test_nothing_before_is_no_rate() -> None:
    now = snapshot(12, process(row("vm0", "rx0", packets=300)))
    (queue,) = queues(now)
    assert queue.rate("packets") is None
    assert queue.bits() is None
    assert queue.total("packets") == 300
    assert queue.total("no such") is None


def test_two_looks_at_once_are_no_rate() -> None:
    now = snapshot(12, process(row("vm0", "rx0", packets=300)))
    (queue,) = queues(now, now)
    assert queue.rate("packets") is None


@pytest.mark.parametrize(
    "old",
    [
        process(row("vm0", "rx0", generation=3, packets=1)),
        process(row("vm1", "rx0", packets=1)),
        process(row("vm0", "rx0", packets=1), pid=99),
        process(row("vm0", "rx0", packets=1), started=999.0),
    ],
    ids=["another use of the row", "another device", "another process", "the same pid again"],
)
def test_another_queue_is_not_taken_for_it(old: object) -> None:
    now = snapshot(12, process(row("vm0", "rx0", packets=300)))
    (queue,) = queues(now, snapshot(10, old))  # type: ignore[arg-type]
    assert queue.growth is None


def test_a_counter_that_goes_backwards_stands_still() -> None:
    before = snapshot(10, process(row("vm0", "rx0", packets=100)))
    (queue,) = queues(snapshot(11, process(row("vm0", "rx0", packets=90))), before)
    assert queue.rate("packets") == 0


def test_ratios_are_of_lately() -> None:
    before = snapshot(10, process(row("vm0", "rx0", packets=1000, syscalls=1000, bursts=1000, calls=9)))
    then = row("vm0", "rx0", packets=1100, syscalls=1010, bursts=1025, calls=10, calls_suppressed=3)
    (queue,) = queues(snapshot(11, process(then)), before)
    assert queue.syscalls_per_packet() == 0.1
    assert queue.batch() == 4
    assert queue.suppressed() == 0.75


def test_ratios_of_a_queue_that_rests_are_of_all_its_life() -> None:
    before = snapshot(10, process(row("vm0", "rx0", packets=1000, syscalls=500, bursts=100, calls=1)))
    (queue,) = queues(snapshot(11, process(before.processes[0].rows[0])), before)
    assert queue.syscalls_per_packet() == 0.5
    assert queue.batch() == 10
    assert queue.suppressed() == 0


def test_ratios_of_nothing() -> None:
    (queue,) = queues(snapshot(10, process(row("vm0", "rx0"))))
    assert queue.syscalls_per_packet() is None
    assert queue.batch() is None
    assert queue.suppressed() is None


def test_order_is_by_device_and_number() -> None:
    names = ["tx1", "rx10", "rx2", "ctrl", "rx0", "tx0", "rx1", "x²"]
    rows = [row(device, name) for name in names for device in ("vm1", "vm0")]
    ordered = [(q.row.label("device"), q.row.label("queue")) for q in queues(snapshot(1, process(*rows)))]
    queue_order = ["rx0", "tx0", "rx1", "tx1", "rx2", "rx10", "ctrl", "x²"]
    assert ordered == [(device, name) for device in ("vm0", "vm1") for name in queue_order]


def test_workers_come_behind_all_devices() -> None:
    worker = Row({"device": "a-worker", "kind": "worker", "queue": "-"}, 1, {"syscalls": 1})
    found = list(queues(snapshot(1, process(worker, row("vm0", "rx0")))))
    assert [queue.row.label("device") for queue in found] == ["vm0", "a-worker"]


def test_disks_come_before_their_devices_queues_in_order() -> None:
    rows = [disk("vm0", lun) for lun in ("1:2", "0:10", "req0", "0:9", "ctrl")]
    found = [queue.row.label("queue") for queue in queues(snapshot(1, process(*rows)))]
    assert found == ["0:9", "0:10", "1:2", "req0", "ctrl"]


def test_what_a_disk_does() -> None:
    before = snapshot(10, process(disk("vm0", "0:0", reads=5, writes=5, latency_0=10)))
    then = disk(
        "vm0", "0:0", reads=15, writes=25, read_bytes=100, written_bytes=300, latency_0=10, latency_20=30
    )
    (now,) = queues(snapshot(12, process(then)), before)
    assert now.iops() == now.pace() == 15
    assert now.throughput() == 200
    assert now.percentile(0.5) == 2**19 * 1.5
    # 30 operations of 3/4 of 2**20 us each, in 2 s.
    assert now.depth() == pytest.approx(30 * 0.75 * 2**20 / 1e6 / 2)
    (alone,) = queues(snapshot(12, process(then)))
    assert (alone.iops(), alone.throughput(), alone.depth()) == (None, None, None)
    assert alone.percentile(0.1) is not None


def test_latencies_that_were_added_up() -> None:
    before = snapshot(10, process(disk("vm0", "0:0", latency_3=10, latency_ns=50_000)))
    then = disk("vm0", "0:0", latency_3=40, latency_ns=50_000 + 30 * 5_000)
    (now,) = queues(snapshot(12, process(then)), before)
    assert now.mean() == pytest.approx(5.0)
    assert now.depth() == pytest.approx(30 * 5e-6 / 2)
    (idle,) = queues(snapshot(13, process(then)), snapshot(12, process(then)))
    assert idle.mean() == pytest.approx(5.0), "of all its life"
    (new,) = queues(snapshot(13, process(disk("vm0", "0:0", latency_ns=0))))
    assert new.mean() is None
