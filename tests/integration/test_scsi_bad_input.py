"""What a SCSI host device is given that does not fit: data of the wrong direction, resets in mid-flight, stores
that fill up or vanish. The guest is told what is so, and no other unit is hurt.
"""

from __future__ import annotations

import os
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from back_end import PATIENCE
from disk_scene import BLOCK, Kept, OnASocket, Scene, go_on, meet, read_of, scene, sense_of, waiting
from pyvhost.abi import virtio_scsi as abi
from pyvhost.driver import cdb
from pyvhost.driver.memory import MIB
from pyvhost.driver.scsi import ScsiDriver
from pyvhost.driver.scsi_command import UNTOUCHED
from pyvhost.scsi.requests import RESPONSE_BYTES
from requirements import need_program, need_root
from stores import nbdkit

EITHER = pytest.mark.parametrize("options", ["", ",delay=0"], ids=["by the loop", "by Python"])
GONE = (2, 0x0401)
NO_SPACE = (7, 0x2707)


def works(driver: ScsiDriver, lun: int) -> None:
    meet(driver, 0, lun)
    data = os.urandom(BLOCK)
    assert driver.command(0, lun, cdb.write10(5, 1), data).good
    assert driver.command(0, lun, cdb.read10(5, 1), data_in_length=BLOCK).data == data


def overrun(driver: ScsiDriver, command: bytes, data: bytes = b"", room: int = 0) -> tuple[int, bytes]:
    """The residual of a command whose buffer is too short, and what is in `room` afterwards."""
    pending = driver.submit(0, 0, command, data, room)
    assert driver.wait_for(pending).response == abi.S_OVERRUN
    return int.from_bytes(pending.raw[4:8], "little"), pending.raw[RESPONSE_BYTES:]


# Directions


@EITHER
def test_data_that_goes_the_wrong_way(tmp_path: Path, options: str) -> None:
    """A command that has no buffer of its direction moves nothing; the other direction's stays as it is."""
    with scene(tmp_path, "memory:1M" + options) as found:
        driver = found.driver
        content = os.urandom(2 * BLOCK)
        assert driver.command(0, 0, cdb.write10(0, 2), content).good
        assert overrun(driver, cdb.read10(0, 2), os.urandom(2 * BLOCK)) == (2 * BLOCK, b"")
        residual, data = overrun(driver, cdb.write10(0, 2), room=2 * BLOCK)
        assert (residual, set(data)) == (2 * BLOCK, {UNTOUCHED})
        assert driver.command(0, 0, cdb.read10(0, 2), data_in_length=2 * BLOCK).data == content
        # Commands that move nothing, with data.
        for data, room in ((b"x" * 100, 0), (b"", 100), (b"x" * 100, 100)):
            got = driver.command(0, 0, cdb.test_unit_ready(), data, room)
            assert (got.response, got.status, got.residual) == (abi.S_OK, 0, len(data) + room)


@EITHER
@pytest.mark.parametrize("length", [1, BLOCK - 1, BLOCK + 1, 2 * BLOCK - 1])
def test_lengths_that_are_no_blocks(tmp_path: Path, options: str, length: int) -> None:
    with scene(tmp_path, "memory:1M" + options) as found:
        driver = found.driver
        content = os.urandom(2 * BLOCK)
        assert driver.command(0, 0, cdb.write10(0, 2), content).good
        residual, data = overrun(driver, cdb.read10(0, 2), room=length)
        assert residual == 2 * BLOCK - length
        assert data in (content[:length], bytes([UNTOUCHED]) * length), "all that fits, or nothing"
        sent = os.urandom(length)
        assert overrun(driver, cdb.write10(0, 2), sent)[0] == 2 * BLOCK - length
        after = driver.command(0, 0, cdb.read10(0, 2), data_in_length=2 * BLOCK).data
        assert after == sent + content[length:], "what was not sent is as it was"


# Guests


@pytest.mark.parametrize("how", ["RESET_DEVICE", "status 0", "GET_VRING_BASE"])
@pytest.mark.parametrize("kind", [OnASocket, Kept])
def test_a_guest_that_resets_in_mid_flight(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: type[OnASocket] | type[Kept], how: str
) -> None:
    """What it has begun ends before the reset does, and the memory is not touched afterwards."""
    store = kind()
    with waiting(monkeypatch) as waits, scene(tmp_path, store, "memory:1M") as found:
        begun = [read_of(found) for _ in range(3)]
        resets: dict[str, Callable[[], object]] = {
            "RESET_DEVICE": found.front.reset_device,
            "status 0": lambda: found.front.set_status(0),
            "GET_VRING_BASE": found.driver.stop,
        }

        def reset() -> None:
            resets[how]()
            found.front.sync()

        resetting = threading.Thread(target=reset)
        resetting.start()
        waits()
        assert resetting.is_alive()
        go_on(found, store, 3 * 8)
        if isinstance(store, Kept):
            store.keeps = False
        resetting.join(PATIENCE)
        pieces = [piece for task in begun for piece in task.writable]
        for at, size in pieces:
            found.memory.write(at, b"mine" * (size // 4) + bytes(size % 4))
        with ScsiDriver(found.front, found.memory, timeout=PATIENCE) as again:
            again.start()
            works(again, 1)
            meet(again, 0, 0)
            assert again.command(0, 0, cdb.write10(0, 1), bytes(BLOCK)).good
        for at, size in pieces:
            assert found.memory.read(at, size) == b"mine" * (size // 4) + bytes(size % 4)


# Stores


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """A file system of 256 KiB."""
    need_root()
    mount, umount = (need_program(name, package="mount") for name in ("mount", "umount"))
    where = tmp_path / "small"
    where.mkdir()
    subprocess.run([mount, "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(where)], check=True)
    yield where
    subprocess.run([umount, str(where)], check=True)


@EITHER
def test_a_store_that_fills_up(tmp_path: Path, small: Path, options: str) -> None:
    """A file of 1 MiB where there is room for a quarter: writes that find none say so, and find some after UNMAP."""
    image = small / "disk.img"
    with image.open("wb") as file:
        file.truncate(MIB)
    with scene(tmp_path, str(image) + options, "memory:1M") as found:
        driver = found.driver
        content = os.urandom(64 * BLOCK)
        said = [driver.command(0, 0, cdb.write10(at * 64, 64), content) for at in range(16)]
        full = next(at for at, got in enumerate(said) if not got.good)
        assert full > 0
        assert all((got.status, sense_of(got)) == (2, NO_SPACE) for got in said[full + 1 :])
        works(driver, 1)
        got = driver.command(0, 0, cdb.read10(0, 64), data_in_length=64 * BLOCK)
        assert got.data == content, "what was written before is there"
        parameters = cdb.unmap_parameters([(0, 2048)])
        assert driver.command(0, 0, cdb.unmap(len(parameters)), parameters).good
        assert driver.command(0, 0, cdb.write10(1984, 64), content).good
        assert driver.command(0, 0, cdb.read10(1984, 64), data_in_length=64 * BLOCK).data == content


def test_a_server_that_vanishes_and_comes_back(tmp_path: Path) -> None:
    """Its disk says that it is becoming ready, at once when that is known; others go on."""
    with scene(tmp_path, "memory:1M", start=False) as found:
        with nbdkit(tmp_path, "memory", "1M") as server:
            found.add(0, 1, f"nbd+unix:///?socket={server.socket},timeout=1")
            found.driver.start()
            meet(found.driver, 0, 0)
            until(found, 1, (None, None))
            works(found.driver, 1)
        # What is under way when it goes waits for it; then there is nothing to wait for.
        until(found, 1, GONE)
        got = found.driver.command(0, 1, cdb.read10(0, 1), data_in_length=BLOCK)
        assert (got.status, sense_of(got)) == (2, GONE)
        assert found.driver.command(0, 1, cdb.inquiry(36), data_in_length=36).good, "what it is, is known"
        works(found.driver, 0)
        with nbdkit(tmp_path, "memory", "1M"):
            until(found, 1, (None, None))
            works(found.driver, 1)


def until(found: Scene, lun: int, sense: tuple[int | None, int | None]) -> None:
    """Reads until that is what is said of it: each read ends by itself, within the store's time limit."""
    for _ in range(100_000):
        got = found.driver.command(0, lun, cdb.read10(0, 1), data_in_length=BLOCK)
        if sense_of(got) == sense:
            return
    raise AssertionError(f"it never says {sense}, but {sense_of(got)}")
