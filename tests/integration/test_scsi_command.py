"""`pyvhost scsi` as a process of its own: how it is started, disks that come and go, and how it ends."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from back_end import PATIENCE
from pyvhost.abi import virtio_scsi as abi
from pyvhost.cli.serving import Serving
from pyvhost.control import client
from pyvhost.control.protocol import RefusedError
from pyvhost.driver import cdb
from pyvhost.driver.memory import MIB, GuestMemory
from pyvhost.driver.scsi import ScsiDriver
from pyvhost.driver.scsi_command import number
from pyvhost.driver.vhost_user import VhostUserFrontend

COMMAND = [sys.executable, "-m", "pyvhost.cli.main", "scsi"]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "vm0.sock"


def beside(path: Path) -> Path:
    return path.with_name(path.name + ".ctl")


def capacity(driver: ScsiDriver, target: int, lun: int) -> int:
    """Bytes; the first command of a unit may be told that it is new."""
    for _ in range(3):
        got = driver.command(target, lun, cdb.read_capacity16(), data_in_length=32)
        if got.sense_key != 6:
            break
    assert got.good, got
    return (int.from_bytes(got.data[:8], "big") + 1) * int.from_bytes(got.data[8:12], "big")


def test_disks_are_served_and_come_and_go(path: Path, tmp_path: Path) -> None:
    image = tmp_path / "disk.img"
    image.write_bytes(bytes(MIB))
    words = [
        "scsi",
        "--socket-path",
        str(path),
        "--lun",
        str(image),
        "--lun",
        "2:5=memory:2M",
        "--request-queues",
        "2",
    ]
    with Serving(words, [path, beside(path)]) as serving:
        serving.wait_ready()
        with (
            VhostUserFrontend.connect(path, timeout=PATIENCE) as frontend,
            GuestMemory(8 * MIB) as memory,
            ScsiDriver(frontend, memory, request_queues=2, timeout=PATIENCE) as driver,
        ):
            driver.start()
            assert (capacity(driver, 0, 0), capacity(driver, 2, 5)) == (MIB, 2 * MIB)

            assert client.ask(str(path), "add-lun", ["memory:3M"]) == {"lun": "0:1"}
            (event,) = driver.wait_events()
            assert (event.event, event.reason) == (abi.T_TRANSPORT_RESET, abi.EVT_RESET_RESCAN)
            assert number(event.lun) == (0, 1)
            assert capacity(driver, 0, 1) == 3 * MIB
            with pytest.raises(RefusedError, match="0:1 is there already"):
                client.ask(str(path), "add-lun", ["0:1=memory:1M"])

            client.ask(str(path), "resize-lun", ["0:1", "4M"])
            (event,) = driver.wait_events()
            assert (event.event, event.reason & 0xFF, event.reason >> 8) == (abi.T_PARAM_CHANGE, 0x2A, 9)
            assert capacity(driver, 0, 1) == 4 * MIB

            client.ask(str(path), "remove-lun", ["2:5"])
            (event,) = driver.wait_events()
            assert (event.event, event.reason) == (abi.T_TRANSPORT_RESET, abi.EVT_RESET_REMOVED)
            assert number(event.lun) == (2, 5)
            assert [unit["lun"] for unit in client.ask(str(path), "status", [])["luns"]] == ["0:0", "0:1"]
        assert serving.close() == 0
        assert "vhost-user-scsi-pci,chardev=vhost0,num_queues=2" in serving.tail()
        assert f"virtio_uml.device={path}:8" in serving.tail()


def test_capabilities_are_json() -> None:
    child = subprocess.run([*COMMAND, "--print-capabilities"], capture_output=True, text=True, check=True)
    assert json.loads(child.stdout)["type"] == "scsi"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "--socket-path"),
        (["--socket-path", "x", "--socket-path", "y"], "one --socket-path"),
        (["--socket-path", "x", "--lun", "/nowhere/at/all"], "/nowhere/at/all"),
        (["--socket-path", "x", "--lun", "0:1=memory:1M", "--lun", "0:1=memory:1M"], "0:1"),
        (["--socket-path", "x", "--lun", "256:0=memory:1M"], "255"),
        (["--socket-path", "x", "--lun", "memory:lots"], "lots"),
        (["--socket-path", "x", "--request-queues", "0"], "128"),
        (["--socket-path", "x", "--request-queues", "129"], "128"),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else "",
)
def test_what_it_can_not_do_it_says_at_once(
    arguments: Sequence[str], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    child = subprocess.run([*COMMAND, *arguments], capture_output=True, text=True, timeout=600, check=False)
    assert child.returncode != 0
    assert "Traceback" not in child.stderr
    assert words in child.stderr
    assert list(tmp_path.iterdir()) == []
