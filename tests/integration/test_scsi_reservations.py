"""Persistent reservations of a guest: how long they last, and what an initiator that has none may do."""

from __future__ import annotations

from pathlib import Path

import pytest

from disk_scene import BLOCK, scene
from pyvhost.driver import cdb
from pyvhost.driver.memory import MIB
from pyvhost.driver.scsi import ScsiDriver

KEY = 0x5EC2E7
#: PERSISTENT RESERVE IN: READ KEYS, READ RESERVATION, REPORT CAPABILITIES; OUT: REGISTER, RESERVE (SPC-4, 6.15).
READ_KEYS, READ_RESERVATION, REPORT_CAPABILITIES = 0, 1, 2
REGISTER, RESERVE = 0, 1
WRITE_EXCLUSIVE = 1
CONFLICT = 0x18


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    with path.open("wb") as file:
        file.truncate(4 * MIB)
    return path


def reserve(driver: ScsiDriver, *, aptpl: bool) -> None:
    parameters = cdb.reservation_parameters(0, KEY, aptpl=aptpl)
    assert driver.command(0, 0, cdb.persistent_reserve_out(REGISTER), parameters).good
    parameters = cdb.reservation_parameters(KEY)
    assert driver.command(0, 0, cdb.persistent_reserve_out(RESERVE, WRITE_EXCLUSIVE), parameters).good


def told(driver: ScsiDriver, action: int) -> bytes:
    response = driver.command(0, 0, cdb.persistent_reserve_in(action, 64), data_in_length=64)
    assert response.good
    return bytes(response.data)


def test_reservations_outlive_the_device(tmp_path: Path, image: Path) -> None:
    """With a file for them PTPL_C is 1; the next device of that name is the same initiator's."""
    kept = tmp_path / "kept"
    spec = f"{image},aptpl={kept}"
    with scene(tmp_path, spec, name="guest") as found:
        assert told(found.driver, REPORT_CAPABILITIES)[2] & 1, "PTPL_C"
        assert not told(found.driver, REPORT_CAPABILITIES)[3] & 1, "PTPL_A"
        reserve(found.driver, aptpl=True)
        assert told(found.driver, REPORT_CAPABILITIES)[3] & 1
    assert kept.exists()
    with scene(tmp_path, spec, name="another guest") as found:
        assert told(found.driver, READ_KEYS)[8:16] == KEY.to_bytes(8, "big")
        assert told(found.driver, READ_RESERVATION)[8:16] == KEY.to_bytes(8, "big")
        written = found.driver.command(0, 0, cdb.write10(0, 1), bytes(BLOCK))
        assert written.status == CONFLICT
        assert found.driver.command(0, 0, cdb.read10(0, 1), data_in_length=BLOCK).good
    with scene(tmp_path, spec, name="guest") as found:
        assert found.driver.command(0, 0, cdb.write10(0, 1), bytes(BLOCK)).good
        parameters = cdb.reservation_parameters(KEY, 0)
        assert found.driver.command(0, 0, cdb.persistent_reserve_out(REGISTER), parameters).good
    assert not kept.exists(), "nobody is registered with APTPL any more"


def test_without_aptpl_they_end_with_the_device(tmp_path: Path, image: Path) -> None:
    kept = tmp_path / "kept"
    spec = f"{image},aptpl={kept}"
    with scene(tmp_path, spec, name="guest") as found:
        reserve(found.driver, aptpl=False)
    assert not kept.exists()
    with scene(tmp_path, spec, name="another guest") as found:
        assert found.driver.command(0, 0, cdb.write10(0, 1), bytes(BLOCK)).good


def test_without_a_file_there_is_no_aptpl(tmp_path: Path) -> None:
    with scene(tmp_path, "memory:1M") as found:
        assert not told(found.driver, REPORT_CAPABILITIES)[2] & 1, "PTPL_C"
        parameters = cdb.reservation_parameters(0, KEY, aptpl=True)
        assert not found.driver.command(0, 0, cdb.persistent_reserve_out(REGISTER), parameters).good


def test_files_that_can_not_be_used(tmp_path: Path) -> None:
    (tmp_path / "other").write_text("something else")
    with scene(tmp_path, f"memory:1M,aptpl={tmp_path / 'kept'}", start=False) as found:

        def refused(name: str, error: type[Exception], match: str) -> None:
            with pytest.raises(error, match=match):
                found.device.add_lun(0, 1, f"memory:1M,aptpl={tmp_path / name}")

        found.ask(lambda: refused("absent/kept", OSError, "no directory"))
        found.ask(lambda: refused(".", OSError, "is a directory"))
        found.ask(lambda: refused("other", ValueError, "not a file of persistent reservations"))
        found.ask(lambda: refused("kept", ValueError, "another unit's"))
