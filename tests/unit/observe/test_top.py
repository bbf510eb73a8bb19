"""The live table: what is in it, how wide it is, what is drawn."""

from __future__ import annotations

from itertools import pairwise

import pytest
from rich.console import Console, RenderableType

from pyvhost.observe.rates import queues
from pyvhost.observe.reader import Row
from pyvhost.observe.top import MOMENTS, History, duration, render, scaled, sparkline
from unit.observe.samples import disk, process, row, snapshot, sockets


def text(table: RenderableType, width: int = 200) -> str:
    console = Console(width=width, color_system=None)
    with console.capture() as capture:
        console.print(table)
    return capture.get()


BEFORE = snapshot(
    10,
    process(row("vm0", "rx0"), row("vm0", "tx0"), row("vm1", "rx0", "stream:/run/vm1.sock")),
)
NOW = snapshot(
    12,
    process(
        row(
            "vm0", "rx0", packets=2_000_000, bytes=128_000_000, drops=17, kicks=4000, calls=1000,
            calls_suppressed=3000, syscalls=100_000, bursts=62_500,
        ),
        row("vm0", "tx0", packets=10, bytes=600, syscalls=20),
        row("vm1", "rx0", "stream:/run/vm1.sock"),
    ),
)  # fmt: skip


def test_one_line_a_queue_with_its_numbers() -> None:
    lines = text(render(NOW, BEFORE)).splitlines()
    title = lines[1].split()
    assert title == [
        "device", "backend", "queue", "packets/s", "bits/s", "packets", "bytes", "drops", "kicks/s", "calls/s",
        "suppressed", "/packet", "batch",
    ]  # fmt: skip
    rx0 = "vm0 tap:vm0 rx0 1.00 M 512 M 2.00 M 128 M 17 2.00 k 500 75 % 0.050 32"
    assert " ".join(lines[3].split()) == rx0
    tx0 = "tx0 5.0 2.40 k 10 600 0 0 0 – 2.00 –"
    assert " ".join(lines[4].split()) == tx0, "its device is named once"
    assert lines[5].split()[:4] == ["vm1", "stream:/run/vm1.sock", "rx0", "0"]
    assert lines[6].strip() == "1 process, 2 devices: 1.00 M packets/s, 512 Mbit/s"


def test_without_a_moment_before_there_are_totals_alone() -> None:
    lines = text(render(NOW)).splitlines()
    assert " ".join(lines[3].split()) == "vm0 tap:vm0 rx0 – – 2.00 M 128 M 17 – – 75 % 0.050 32"
    assert lines[6].strip() == "1 process, 2 devices"


def test_drawing_goes_back_in_time() -> None:
    history = History()
    moments = [snapshot(at, process(row("vm0", "rx0", packets=at * at))) for at in range(9)]
    for before, now in pairwise(moments):
        table = render(now, before, history=history)
    assert "▁▂▃▄▅▆▇█" in text(table)


def test_history_forgets_what_is_gone_and_what_is_long_ago() -> None:
    history = History()
    for at in range(100):
        before = snapshot(at, process(row("vm0", "rx0", packets=at)))
        now = snapshot(at + 1, process(row("vm0", "rx0", packets=at + 1)))
        render(now, before, history=history)
    (queue,) = queues(now)
    assert len(history.of(queue)) == MOMENTS
    render(snapshot(101), now, history=history)
    assert history.of(queue) == ()


@pytest.mark.parametrize("width", [30, 40, 60, 80, 100, 120, 160, 200])
@pytest.mark.parametrize("drawn", [True, False])
def test_it_fits(width: int, drawn: bool) -> None:
    history = History() if drawn else None
    shown = text(render(NOW, BEFORE, history=history, width=width), width)
    assert max(len(line) for line in shown.splitlines()) <= width
    rows = [line for line in shown.splitlines() if "rx0" in line]
    assert len(rows) == 2
    if width >= 40:
        assert "…" not in "".join(rows), "whole columns are left out, none is cut"
    for important in ("vm0", "rx0", "1.00 M"):
        assert important in rows[0]


def test_a_worker_is_shown_and_is_no_device() -> None:
    worker = Row({"device": "net-worker0", "kind": "worker", "queue": "-"}, 1, {"syscalls": 12345})
    lines = text(render(snapshot(1, process(worker, row("vm0", "rx0"))))).splitlines()
    assert "net-worker0" in lines[4]
    assert lines[5].strip() == "1 process, 1 device"


def test_markup_in_labels_is_text() -> None:
    now = snapshot(1, process(row("[red]x[/red]", "rx0", "[link=http://a]b")))
    shown = text(render(now))
    assert "[red]x[/red]" in shown
    assert "[link=http://a]b" in shown


def test_wide_letters_keep_the_table_in_its_width() -> None:
    now = snapshot(1, process(row("仮想機械" * 4, "rx0")))
    assert "仮想機械" in text(render(now, width=60), 60)


def test_nothing_to_see() -> None:
    assert "nothing is served at the moment" in text(render(snapshot(1)))
    assert "no queue runs" in text(render(snapshot(1, process())))


def test_what_is_not_believed_is_said() -> None:
    assert "/run/x.counters: [bad] is of version 2" in text(
        render(snapshot(1, problems=("/run/x.counters: [bad] is of version 2",)))
    )


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (None, "–"),
        (0, "0"),
        (0.04, "0.0"),
        (5, "5.0"),
        (9.96, "10"),
        (999, "999"),
        (999.4, "999"),
        (999.5, "1.00 k"),
        (1234, "1.23 k"),
        (9994, "9.99 k"),
        (9996, "10.0 k"),
        (99_960, "100 k"),
        (999_499, "999 k"),
        (999_500, "1.00 M"),
        (14_880_952, "14.9 M"),
        (2**63, "9223 P"),
    ],
)
def test_three_digits_and_a_prefix(value: float | None, shown: str) -> None:
    assert scaled(value) == shown


def test_sparkline() -> None:
    assert sparkline([], 4) == "    "
    assert sparkline([0, 0], 4) == "    "
    assert sparkline([1, 2, 4, 8], 4) == "▂▃▅█"
    assert sparkline([100, 0, 1, 8], 3) == " ▂█", "scaled by what is shown"
    assert sparkline([5], 4) == "   █"


DISKS_BEFORE = snapshot(
    10,
    process(disk("vm0", "0:0"), disk("vm0", "0:1", "nbd://b"), disk("vm0", "req0", "-"), row("vm1", "rx0")),
)
DISKS = snapshot(
    11,
    process(
        disk(
            "vm0", "0:0", reads=60_000, writes=40_000, read_bytes=245_760_000, written_bytes=163_840_000,
            latency_7=100_000, latency_ns=9_000_000_000,
        ),
        disk("vm0", "0:1", "nbd://b", reads=1, errors=2, latency_11=1),
        disk("vm0", "req0", "-", kicks=500),
        row("vm1", "rx0", packets=10, bytes=100),
    ),
)  # fmt: skip


def test_disks_have_a_table_of_their_own() -> None:
    lines = [
        " ".join(line.split()) for line in text(render(DISKS, DISKS_BEFORE)).splitlines() if line.strip()
    ]
    assert lines[0] == (
        "device store LUN IOPS bytes/s reads/s read/s writes/s written/s mean p50 p99 depth errors"
    )
    assert lines[2] == "vm0 a.img 0:0 100 k 410 M 60.0 k 246 M 40.0 k 164 M 90.0 us 96.0 us 127 us 9.00 0"
    assert lines[3] == "nbd://b 0:1 1.0 0 1.0 0 0 0 1.54 ms 1.54 ms 2.04 ms 0.002 2.0"
    assert lines[7].startswith("vm0 - req0 0")
    assert lines[-1] == "1 process, 2 devices: 100 k IOPS, 410 MB/s; 10 packets/s, 800 bit/s"


@pytest.mark.parametrize("width", [40, 60, 80, 120])
def test_disks_fit(width: int) -> None:
    shown = text(render(DISKS, DISKS_BEFORE, history=History(), width=width), width)
    assert max(len(line) for line in shown.splitlines()) <= width
    assert "100 k" in shown


SOCKETS_BEFORE = snapshot(
    10,
    process(sockets("vm0", "rx"), sockets("vm0", "tx"), sockets("vm0", "event"), sockets("vm1", "rx", "43")),
)
SOCKETS = snapshot(
    11,
    process(
        sockets("vm0", "rx", packets=1000, bytes=60_000_000, credit_stalls=7),
        sockets("vm0", "tx", packets=500, bytes=2_000_000),
        sockets("vm0", "event", connections=12, connects=30, refused=3, resets=2),
        sockets("vm1", "rx", "43"),
    ),
)


def test_a_guest_with_sockets_is_one_line() -> None:
    lines = [
        " ".join(line.split()) for line in text(render(SOCKETS, SOCKETS_BEFORE)).splitlines() if line.strip()
    ]
    assert lines[1] == (
        "device CID connections connects/s to guest/s from guest/s packets/s stalls/s refused resets calls/s /packet"
    )
    assert lines[-3:] == [
        "vm0 42 12 30 60.0 M 2.00 M 1.50 k 7.0 3.0 2.0 0 0",
        "vm1 43 0 0 0 – 0 0 0 0 0 –",
        "1 process, 2 devices: 1.50 k packets/s, 496 Mbit/s",
    ]


def test_a_guests_traffic_is_drawn() -> None:
    history = History()
    for before, now in ((None, SOCKETS_BEFORE), (SOCKETS_BEFORE, SOCKETS)):
        shown = text(render(now, before, history=history))
    assert "█" in shown


@pytest.mark.parametrize("width", [60, 80, 120])
def test_sockets_fit(width: int) -> None:
    shown = text(render(SOCKETS, SOCKETS_BEFORE, history=History(), width=width), width)
    assert max(len(line) for line in shown.splitlines()) <= width
    assert "60.0 M" in shown


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (None, "–"),
        (0.5, "0.50 us"),
        (96, "96.0 us"),
        (999.6, "1.00 ms"),
        (15_000, "15.0 ms"),
        (8e6, "8.00 s"),
        (1e10, "10000 s"),
    ],
)
def test_a_duration(value: float | None, shown: str) -> None:
    assert duration(value) == shown
