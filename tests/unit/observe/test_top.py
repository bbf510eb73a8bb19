"""The live table: what is in it, how wide it is, what is drawn."""

from __future__ import annotations

from itertools import pairwise

import pytest
from rich.console import Console
from rich.table import Table

from pyvhost.observe.rates import queues
from pyvhost.observe.reader import Row
from pyvhost.observe.top import MOMENTS, History, render, scaled, sparkline
from unit.observe.samples import process, row, snapshot


def text(table: Table, width: int = 200) -> str:
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
