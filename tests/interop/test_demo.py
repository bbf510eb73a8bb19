"""`pyvhost demo`, as a user types it: it ends by itself, with what it promised."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest

from requirements import need_program


def demo(guest: str) -> str:
    """What a demo of a second or two printed; it must have gone well."""
    done = subprocess.run(
        [sys.executable, "-m", "pyvhost.cli.main", "demo", "--guest", guest, "--seconds", "2"],
        capture_output=True,
        text=True,
        timeout=600,
        env={**os.environ, "COLUMNS": "120"},
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    return done.stdout


def test_two_uml_guests() -> None:
    need_program("linux.uml", package="user-mode-linux")
    need_program("mkfs.ext4", package="e2fsprogs")
    said = demo("uml")
    assert 'NetDevice("switch:demo", name="first")' in said
    assert "Two guests run Linux" in said
    assert re.search(r"eth0: <BROADCAST,MULTICAST,UP,LOWER_UP>.* state UP", said)
    assert "4 packets transmitted, 4 received, 0% packet loss" in said
    assert re.search(r"Linux [\d.]+, boot [0-9a-f-]{36}, called by CID 2", said)
    assert re.search(r"/dev/sda \S+ ext4 rw", said)
    written, read = re.findall(r"(?m)^([0-9a-f]{64})  data$", said)
    assert written == read
    counted = re.search(r"Disk: 16 MiB written to ext4, the same SHA-256 .*; (\d+) reads, (\d+) writes", said)
    assert counted, said
    assert min(map(int, counted.groups())) > 16, said
    assert re.search(r"TCP: [1-9]\d* MiB in .* the same SHA-256 at the far end", said)
    # What was counted, the transfer's own direction first: no packet of it was lost.
    for device, queue in (("first", "tx0"), ("second", "rx0")):
        assert re.search(rf"(?m)^(?:{device}|) +{queue} +[\d.]+ [kM] +[\d.]+ [MG] +0 ", said), said


def test_without_a_guest() -> None:
    said = demo("driver")
    assert "There is no guest" in said
    assert re.search(r"Frames: .* the same SHA-256 at the far end", said)
    assert "Disk: 4 MiB written and read again, the same SHA-256; 64 reads, 64 writes" in said


def test_a_guest_that_this_host_has_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """It says what to install, and that is all."""
    monkeypatch.setenv("PATH", "/nonexistent")
    done = subprocess.run(
        [sys.executable, "-m", "pyvhost.cli.main", "demo", "--guest", "uml"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "apt-get install user-mode-linux" in done.stdout
    assert "python demo.py" not in done.stdout
