"""`pyvhost bench vsock`: every direction is measured against the real command, and written down."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest

from pyvhost.cli.bench import vsock
from pyvhost.cli.bench.vsock_ends import TO_GUEST, TO_HOST


def test_every_direction_is_measured_and_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = argparse.Namespace(turns=1, seconds=0.1, size=[4096], rx_buffer=4096, output=tmp_path)
    assert vsock.run(options) == 0
    found = json.loads((tmp_path / "bench-vsock.json").read_text())
    assert [(row["direction"], row["size"]) for row in found["rows"]] == [(TO_GUEST, 4096), (TO_HOST, 4096)]
    for row in found["rows"]:
        assert row["ratio"] > 0
        assert row["packets"] > 0
        assert row["kernel"] > 30_000
    assert found["rows"][0]["peer_share"] == pytest.approx(0.28, abs=0.01)
    assert found["connections"] > 0
    assert (tmp_path / "bench-vsock.svg").read_text().startswith("<?xml")
    assert "guest to host, 4096" in capsys.readouterr().out


def test_what_does_not_come_up_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vsock, "_CID", 0)
    options = argparse.Namespace(turns=1, seconds=0.1, size=[64], rx_buffer=4096, output=tmp_path)
    assert vsock.run(options) == 1
    assert not list(tmp_path.iterdir())
