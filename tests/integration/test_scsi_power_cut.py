"""A power cut: what was acknowledged with FUA, by a flush, or without a cache is on the medium, and not in a cache.

A kill of the process alone proves little, for what it wrote outlives it in the page cache. Here the disk is a loop
device: what was written to it and not flushed is in the device's page cache, or in the cache that the device says it
has; the medium is the file behind it, which is read at the moment after the kill, as a power cut would leave it. The
device counts the flushes that reached it (/sys/block/*/stat), whoever asked for them: compiled loop or Python.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from back_end import PATIENCE
from disk_scene import BLOCK, meet
from pyvhost.cli.serving import Serving
from pyvhost.driver import cdb
from pyvhost.driver.memory import MIB, GuestMemory
from pyvhost.driver.scsi import ScsiDriver
from pyvhost.driver.vhost_user import VhostUserFrontend
from requirements import need, need_program, need_root

SIZE = 8 * MIB
BLOCKS = 16
FUA = 8


@dataclass
class Loop:
    """A loop device over a file."""

    path: Path
    medium: Path

    def flushes(self) -> int:
        """How many have reached it (Documentation/block/stat: the 16th number)."""
        return int(Path(f"/sys/block/{self.path.name}/stat").read_text().split()[15])

    def on_medium(self, lba: int, size: int) -> bytes:
        """What a power cut would leave there."""
        with self.medium.open("rb") as file:
            file.seek(lba * BLOCK)
            return file.read(size)


@pytest.fixture
def loop(tmp_path: Path) -> Iterator[Loop]:
    need_root()
    losetup = need_program("losetup", package="mount")
    need(Path("/dev/loop-control").exists(), "give the container loop devices")
    medium = tmp_path / "medium"
    medium.write_bytes(bytes(SIZE))
    made = subprocess.run(
        [losetup, "--find", "--show", str(medium)], capture_output=True, text=True, check=False
    )
    need(made.returncode == 0, f"losetup: {made.stderr.strip()}")
    path = Path(made.stdout.strip())
    try:
        yield Loop(path, medium)
    finally:
        subprocess.run([losetup, "--detach", str(path)], check=True)


@contextmanager
def serving(folder: Path, lun: str) -> Iterator[tuple[Serving, ScsiDriver]]:
    """`pyvhost scsi` over a store, and a driver that has met its disk."""
    path = folder / "vm0.sock"
    arguments = ["scsi", "--socket-path", str(path), "--lun", lun, "--no-control"]
    with (
        Serving(arguments, [path]).wait_ready() as process,
        VhostUserFrontend.connect(path, timeout=PATIENCE) as front,
        GuestMemory(8 * MIB) as memory,
        ScsiDriver(front, memory, timeout=PATIENCE) as driver,
    ):
        driver.start()
        meet(driver, 0, 0)
        yield process, driver


def write_through(driver: ScsiDriver) -> None:
    """MODE SELECT: WCE 0."""
    sensed = driver.command(0, 0, cdb.mode_sense10(8, length=100), data_in_length=100).data
    page = bytearray(sensed[8 + int.from_bytes(sensed[6:8], "big") :][:20])
    page[0] &= 0x3F
    page[2] &= ~4
    assert driver.command(0, 0, cdb.mode_select10(28), bytes(8) + bytes(page)).good


def fua(driver: ScsiDriver, lba: int, data: bytes) -> None:
    assert driver.command(0, 0, cdb.write10(lba, BLOCKS, FUA), data).good


def flushed(driver: ScsiDriver, lba: int, data: bytes) -> None:
    assert driver.command(0, 0, cdb.write10(lba, BLOCKS), data).good
    assert driver.command(0, 0, cdb.synchronize_cache10()).good


def plain(driver: ScsiDriver, lba: int, data: bytes) -> None:
    assert driver.command(0, 0, cdb.write10(lba, BLOCKS), data).good


#: By the compiled loop, past the page cache or through it; by Python.
STORES = {"direct": "", "cached": ",direct=off", "Python": ",direct=off,delay=0"}


@pytest.mark.parametrize("store", STORES)
def test_what_was_acknowledged_is_on_the_medium(tmp_path: Path, loop: Loop, store: str) -> None:
    dice = random.Random(7)
    written: dict[int, bytes] = {}
    with serving(tmp_path, f"{loop.path}{STORES[store]}") as (process, driver):

        def writes(way: Callable[[ScsiDriver, int, bytes], None]) -> None:
            for turn in range(8):
                lba, data = dice.randrange(SIZE // BLOCK // BLOCKS) * BLOCKS, dice.randbytes(BLOCKS * BLOCK)
                before = loop.flushes()
                way(driver, lba, data)
                written[lba] = data
                assert loop.flushes() > before, (way, turn)
                assert loop.on_medium(lba, len(data)) == data, (way, turn)

        writes(fua)
        writes(flushed)
        write_through(driver)
        writes(plain)
        kill(process)
    for lba, data in written.items():
        assert loop.on_medium(lba, len(data)) == data


def test_a_plain_write_asks_for_no_flush(tmp_path: Path, loop: Loop) -> None:
    """Else the tests above would prove nothing; and it is fast for that."""
    data = os.urandom(BLOCKS * BLOCK)
    with serving(tmp_path, f"{loop.path},direct=off") as (process, driver):
        before = loop.flushes()
        plain(driver, 0, data)
        assert loop.on_medium(0, len(data)) == bytes(len(data)), "it is in a cache"
        assert loop.flushes() == before
        kill(process)


def kill(process: Serving) -> None:
    os.kill(process.pid, signal.SIGKILL)
    process.process.wait(PATIENCE)
