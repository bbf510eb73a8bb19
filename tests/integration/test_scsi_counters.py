"""What is counted of a logical unit, by the compiled loop and by Python, while a driver works."""

from __future__ import annotations

import errno
import time
from pathlib import Path

import pytest

from disk_scene import BLOCK, Kept, Scene, scene
from pyvhost.dataplane import blocks
from pyvhost.driver import cdb

#: Served by the compiled loop, and by Python alone.
EITHER = pytest.mark.parametrize("spec", ["memory:1M", "memory:1M,delay=0"])


def counters(found: Scene, lun: int) -> dict[str, int]:
    """The unit's row: the loop counts before it shows the driver that a command is done."""
    (row,) = (known.row for at, known in found.device._units.items() if at.lun == lun)
    return dict(zip(blocks.COUNTERS, map(int, row), strict=True))


def growth(found: Scene, lun: int, before: dict[str, int]) -> dict[str, int]:
    """What counts of commands have grown."""
    names = ("reads", "read_bytes", "writes", "written_bytes", "others", "errors")
    now = counters(found, lun)
    return {name: now[name] - before[name] for name in names if now[name] != before[name]}


@EITHER
def test_commands_are_counted_by_kind(tmp_path: Path, spec: str) -> None:
    with scene(tmp_path, spec, "memory:1M") as found:
        driver = found.driver
        before, other = counters(found, 0), counters(found, 1)
        began = time.monotonic_ns()
        assert driver.command(0, 0, cdb.write10(0, 8), bytes(8 * BLOCK)).good
        assert driver.command(0, 0, cdb.read10(0, 4), data_in_length=4 * BLOCK).good
        # Longer than what is read: Python's in any case.
        assert driver.command(0, 0, cdb.read10(0, 4), data_in_length=5 * BLOCK).good
        assert driver.command(0, 0, cdb.test_unit_ready()).good
        assert driver.command(0, 0, cdb.inquiry(36), data_in_length=36).good
        assert not driver.command(0, 0, cdb.read10(1 << 30, 4), data_in_length=4 * BLOCK).good
        took = time.monotonic_ns() - began
        assert growth(found, 0, before) == {
            "reads": 2,
            "read_bytes": 8 * BLOCK,
            "writes": 1,
            "written_bytes": 8 * BLOCK,
            "others": 2,
        }
        after = counters(found, 0)
        assert 0 < after["latency_ns"] - before["latency_ns"] <= took
        latencies = [after[f"latency_{i}"] - before[f"latency_{i}"] for i in range(blocks.LATENCIES)]
        assert sum(latencies) == 5
        assert growth(found, 1, other) == {}


def test_what_fails_is_an_error_of_the_unit_alone(tmp_path: Path) -> None:
    store = Kept()
    with scene(tmp_path, store, "memory:1M") as found:
        before, other = counters(found, 0), counters(found, 1)
        task = found.driver.submit(0, 0, cdb.read10(0, 1), data_in_length=BLOCK)
        found.driver.command(0, 1, cdb.test_unit_ready())
        found.ask(lambda: store.let_go(errno.EIO))
        found.driver.wait_all([task])
        assert growth(found, 0, before) == {"errors": 1}
        assert growth(found, 1, other) == {"others": 1}
