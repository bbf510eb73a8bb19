"""What a run's results turn into: JSON, tables, a sentence, a drawing."""

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from rich.console import Console

from pyvhost.cli.bench import plot
from pyvhost.cli.bench.net import CASES, Account, Measured, Row
from pyvhost.cli.bench.report import print_report, where_time_goes
from pyvhost.cli.bench.results import ControlResult, IdleResult, Report, SyscallResult, result, worst
from pyvhost.cli.bench.usage import CpuTime
from requirements import need

ACCOUNT = Account(
    packets=1000,
    cycles_per_packet=120.0,
    busy_cycles_per_packet=None,
    waits=0.4,
    back_end_limits=True,
    samples={"compiled loop": 0.8, "memory copies": 0.19, "kernel": 0.01},
)


def measured(*mpps: float, **account: Any) -> Measured:
    return Measured(list(mpps), CpuTime(0.9, 0.1), 1.0, replace(ACCOUNT, **account))


def row(
    case: int = 0,
    size: int = 64,
    ours: tuple[float, ...] = (6.0, 3.0),
    theirs: tuple[float, ...] = (4.0, 2.0),
) -> Row:
    return Row(
        CASES[case],
        size,
        measured(*ours),
        measured(*theirs, busy_cycles_per_packet=80.0, samples={"librte_vhost": 1.0}),
        [90.0, 100.0, 800.0],
        2800.0,
    )


def report(*rows: Row) -> Report:
    return Report({"cpu": "a processor"}, "DPDK 22.11 vhost", [result(one) for one in rows])


def printed(some: Report) -> str:
    stream = io.StringIO()
    print_report(some, Console(file=stream, width=200, color_system=None))
    return stream.getvalue()


def test_a_row_sums_up_to_the_median_of_its_pairs() -> None:
    found = result(row(ours=(6.0, 3.0, 1.0), theirs=(4.0, 2.0, 1.0)))
    assert (found.ratio.median, found.ratio.low, found.ratio.high) == (1.5, 1.0, 1.5)
    assert found.ratios == (1.5, 1.5, 1.0)
    assert (found.ours_cycles, found.theirs_busy_cycles) == (120.0, 80.0)
    assert found.ours_system_share == pytest.approx(0.1)


def test_a_row_that_was_not_closed_is_no_result() -> None:
    open_row = row()
    open_row.ours.account = None
    with pytest.raises(ValueError, match="not closed"):
        result(open_row)


@pytest.mark.parametrize(
    ("trips", "said"),
    [
        ([90.0, 100.0, 800.0], "near"),
        ([400.0, 420.0, 440.0], "far"),
        ([90.0, 400.0, 440.0], "far"),
        ([], "?"),
    ],
)
def test_the_distance_is_the_median_looks(trips: list[float], said: str) -> None:
    far = row()
    far.round_trips_ns = trips
    assert result(far).distance == said


def test_the_json_holds_what_was_measured() -> None:
    some = report(row(), row(1, 1518))
    some.syscalls = [SyscallResult("tap", "guest to host", 1000, {"write": 1000}, 1010, "perf")]
    some.control = ControlResult(200, 0.1, 0.5, 0.9, 0.1, 5.0)
    some.idle = IdleResult(100, 5.0, 0.001, 5, 200_000, 150_000, 140_000, 130_200)
    found = json.loads(json.dumps(some.as_dict()))
    assert found["schema"] == 1
    assert [one["ratio"]["median"] for one in found["rows"]] == [1.5, 1.5]
    assert found["rows"][0]["distance"] == "near"
    assert found["syscalls"][0]["per_packet"] == 1.01
    assert found["control"]["max_ms"] == 0.9
    assert found["idle"]["pss_per_device_kb"] == 200.0


def test_no_packets_have_no_calls_each() -> None:
    assert SyscallResult("tap", "guest to host", 0, {}, 5, "perf").per_packet is None


def test_the_table_names_ratio_range_and_both_rates() -> None:
    text = printed(report(row(), row(1, 1518, ours=(1.0, 1.0), theirs=(2.0, 2.0))))
    assert "DPDK 22.11 vhost" in text
    for words in (
        "guest to host",
        "1.50-1.50",
        "4.50/3.00",
        "host to guest",
        "0.50-0.50",
        "100 near",
    ):
        assert words in text


def test_the_sentence_says_who_waits_and_where_the_time_goes() -> None:
    limited = result(row())
    assert where_time_goes(limited) == (
        "pyvhost's back end is the limit; its time is 80% compiled loop, 19% memory copies; "
        "the peer's is 100% librte_vhost"
    )
    assert "19% memory copies, in bursts of 31;" in where_time_goes(replace(limited, ours_burst=31.4))
    front = where_time_goes(replace(limited, ours_limits=False, ours_samples=None, theirs_samples=None))
    assert front.startswith("the front end is the limit")
    assert "90% of its time is user, 10% system" in front


def test_what_was_left_out_is_said() -> None:
    some = report()
    some.skipped.append("user: install passt")
    assert "not measured: user: install passt" in printed(some)


def test_the_other_parts_are_printed() -> None:
    some = report()
    some.syscalls = [SyscallResult("null", "guest to host", 12_000, {}, 0, "strace -c -f")]
    some.control = ControlResult(200, 0.1, 0.5, 60.0, 0.1, 5.0)
    some.idle = IdleResult(100, 5.0, 0.001, 5, 200_000, 150_000, 140_000, 130_200)
    text = printed(some)
    assert "12,000" in text
    assert "0.0000" in text
    assert "60.00 ms (max), beyond 50 ms" in text
    assert "100 attached devices" in text
    assert "each device adds 200 kB" in text


def test_the_worst_row_is_the_one_with_the_least_median() -> None:
    some = report(row(), row(1, 1518, ours=(1.0, 1.0), theirs=(2.0, 2.0)))
    found = worst(some.rows)
    assert found is not None
    assert found.size == 1518
    assert worst([]) is None


class TestDrawing:
    """The SVG: readable as XML, the same for the same results, and honest about what is behind."""

    @pytest.fixture(autouse=True)
    def matplotlib(self) -> None:
        try:
            import matplotlib  # noqa: F401
        except ImportError:
            need(False, "pip install matplotlib")

    def draw(self, path: Path, *rows: Row) -> str:
        plot.draw(report(*rows), path)
        return path.read_text()

    def test_it_is_svg_and_the_same_every_time(self, tmp_path: Path) -> None:
        first = self.draw(tmp_path / "a.svg", row(), row(1, 1518))
        assert ElementTree.fromstring(first).tag == "{http://www.w3.org/2000/svg}svg"
        assert self.draw(tmp_path / "b.svg", row(), row(1, 1518)) == first

    def test_a_row_that_is_behind_is_not_drawn_as_one_that_is_ahead(self, tmp_path: Path) -> None:
        ahead = self.draw(tmp_path / "a.svg", row())
        behind = self.draw(tmp_path / "b.svg", row(ours=(1.0, 1.0), theirs=(2.0, 2.0)))
        assert "#b5535a" in behind
        assert "#b5535a" not in ahead

    def test_nothing_is_not_drawn(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="nothing to draw"):
            plot.draw(report(), tmp_path / "a.svg")
