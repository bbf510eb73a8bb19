"""`pyvhost bench ring`: every case comes out, beside the plain ring of the same turn."""

import argparse
import json
from pathlib import Path

import pytest

from pyvhost.cli.bench import ring
from pyvhost.dataplane.policy import PLAIN


@pytest.mark.skipif(PLAIN, reason="a benchmark of compiled code")
def test_every_case_is_measured_written_and_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert ring.run(argparse.Namespace(turns=1, output=tmp_path)) == 0
    rows = json.loads((tmp_path / "bench-ring.json").read_text())
    cases = {(row["kind"], row["size"], row["way"]) for row in rows}
    assert cases == {(kind, size, way) for kind in ring.KINDS for size in (64, 1518) for way in ring.WAYS}
    assert all(row["ns"] > 0 and row["ratio"] > 0 for row in rows)
    assert {row["ratio"] for row in rows if row["way"] == "plain"} == {1.0}
    assert (tmp_path / "bench-ring.svg").read_text().startswith("<?xml")
    assert "other byte order" in capsys.readouterr().out


def test_the_log_has_the_pages_that_were_written() -> None:
    """What is measured is the work: a bit for each buffer's page."""
    bench = ring.Bench()
    bench.set_up("generate", 64, "dirty log")
    bench.run(rounds=1)
    # Two buffers a page, and a page for each used ring.
    assert sum(int(word).bit_count() for word in bench.log.view("u8")) == ring.NUM // 2 + 2
