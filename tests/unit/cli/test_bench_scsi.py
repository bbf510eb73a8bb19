"""`pyvhost bench scsi`: what is measured is work that was done, every case comes out, and what is printed adds up."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest
from rich.console import Console

from pyvhost.cli.bench import disk_results, disks, scsi
from pyvhost.cli.bench.disks import Sample
from pyvhost.cli.bench.loader import Workload
from pyvhost.cli.bench.machine import pick_cores
from pyvhost.dataplane.policy import PLAIN
from pyvhost.driver.errors import DeviceError
from requirements import need_program

compiled = pytest.mark.skipif(PLAIN, reason="a benchmark of compiled code")
READ = Workload(writes=False, random=True, size=4096, depth=32)
MIB = 1 << 20


def sample(rate: float, cpu_us: float = 1.0) -> Sample:
    return Sample(round(rate), 1.0, rate * cpu_us / 1e6)


def test_a_row_is_made_of_turns_beside_each_other() -> None:
    row = disk_results.row(
        "direct",
        READ,
        {"pyvhost": [sample(90), sample(300), sample(50)], "file": [sample(100), sample(100), sample(100)]},
        calls={"pyvhost": 0.25, "file": 1.0},
    )
    ratio = row.ratios["file"]
    assert (ratio.median, ratio.low, ratio.high) == (0.9, 0.5, 3.0)
    assert row.figures["pyvhost"].calls == 0.25
    assert disk_results.goals([row]) == ["direct, 4 KiB random read, 32: 0.90 of file, 0.9 reached"]


def test_what_was_measured_by_itself_goes_before_the_turns() -> None:
    cost = Sample(ios=100, seconds=1.0, cpu_seconds=0.002, calls=300)
    turns = {"pyvhost": [sample(10)], "QEMU": [sample(10)]}
    row = disk_results.row("guest", READ, turns, costs={"pyvhost": cost}, cpu=False)
    assert (row.figures["pyvhost"].cpu_us, row.figures["pyvhost"].calls) == (20.0, 3.0)
    assert (row.figures["QEMU"].cpu_us, row.figures["QEMU"].calls) == (None, None)


def test_who_has_done_nothing_is_an_error() -> None:
    with pytest.raises(ValueError, match="saw no packets"):
        disk_results.row("direct", READ, {"pyvhost": [sample(1)], "file": [Sample(0, 1.0, 0.0)]})


def test_fio_is_read_by_its_jobs() -> None:
    side = {"total_ios": 500, "runtime": 250, "iops": 2000}
    none = {"total_ios": 0, "runtime": 0, "iops": 0}
    job = {"jobname": "one", "read": none, "write": side, "usr_cpu": 10, "sys_cpu": 30, "job_runtime": 250}
    found = disks.parse_fio("fio: a warning\n" + json.dumps({"jobs": [job]}) + "\n")
    assert (found["one"].rate, found["one"].cpu_us) == (2000.0, 200.0)


@compiled
def test_what_is_written_arrives(tmp_path: Path) -> None:
    """The compiled driver's requests are real ones: the file holds what they carried, at every place."""
    image = tmp_path / "disk"
    image.write_bytes(bytes(MIB))
    with disks.pyvhost_disk(
        tmp_path / "s", image, pick_cores(), direct=False, transcript=tmp_path / "log"
    ) as disk:
        written = disk.measure(Workload(writes=True, random=False, size=64 << 10, depth=4), 0.1)
        assert written.ios >= 16
        assert written.cpu_seconds > 0
        read = disk.measure(Workload(writes=False, random=True, size=4096, depth=128), 0.05)
        assert read.ios >= 128
    data = image.read_bytes()
    assert all(any(data[at : at + 4096]) for at in range(0, MIB, 64 << 10))


@compiled
def test_a_request_that_fails_is_no_result(tmp_path: Path) -> None:
    image = tmp_path / "disk"
    image.write_bytes(bytes(MIB))
    with disks.pyvhost_disk(
        tmp_path / "s", image, pick_cores(), direct=False, transcript=tmp_path / "log"
    ) as disk:
        with image.open("r+b") as file:
            file.truncate(MIB // 2)
        with pytest.raises(DeviceError, match="requests failed"):
            disk.measure(READ, 0.1)


@compiled
@pytest.mark.parametrize("part", scsi.PARTS)
def test_a_quick_run_measures_writes_and_draws(
    part: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    need_program("fio", package="fio")
    need_program("qemu-storage-daemon", package="qemu-system-common")
    need_program("qemu-system-x86_64", package="qemu-system-x86")
    arguments = argparse.Namespace(
        quick=True, part=[part], workload=[READ.key], folder=tmp_path, output=tmp_path / "out"
    )
    assert scsi.run(arguments) == 0, capsys.readouterr().out
    written = json.loads((tmp_path / "out" / "bench-scsi.json").read_text())
    (row,) = written["rows"]
    peers = {"QEMU"} if part == "guest" else {"file", "daemon"}
    assert (row["place"], row["key"], set(row["ratios"])) == (part, READ.key, peers)
    assert all(figures["rate"]["median"] > 0 for figures in row["figures"].values())
    assert written["skipped"] == []
    assert (tmp_path / "out" / "bench-scsi.svg").read_text().startswith("<?xml")
    # The file and its folder are gone.
    assert [each.name for each in tmp_path.iterdir()] == ["out"]


def test_a_report_says_what_was_left_out() -> None:
    report = disk_results.Report(machine={}, peers={}, skipped=["guest: install fio"])
    console = Console(record=True, width=80)
    disk_results.print_report(report, console)
    assert "not measured: guest: install fio" in console.export_text()
