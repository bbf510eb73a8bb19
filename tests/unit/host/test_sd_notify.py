"""Readiness: told to the manager that asked, and to nobody else."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from pyvhost.host import sd_notify


def test_without_a_manager_nothing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    assert not sd_notify.ready()


@pytest.mark.parametrize("abstract", [False, True])
def test_the_manager_reads_the_state(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, abstract: bool) -> None:
    path = str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind("\0" + path if abstract else path)
        monkeypatch.setenv("NOTIFY_SOCKET", "@" + path if abstract else path)
        assert sd_notify.ready("two devices")
        assert manager.recv(100) == b"READY=1\nSTATUS=two devices"
        assert sd_notify.stopping()
        assert manager.recv(100) == b"STOPPING=1"


def test_a_manager_that_is_gone_does_not_matter(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "nobody"))
    assert not sd_notify.ready()
