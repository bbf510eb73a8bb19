"""`pyvhost scsi` killed with SIGKILL: while it works, with inflight memory; and after what it has acknowledged.

What a file holds after a kill is what the page cache has: a kill of a process proves that a write was made before
its status was given, no more. That it also went to the medium is proved by what the kernel was asked for, which
strace tells.
"""

from __future__ import annotations

import os
import random
import re
import signal
import subprocess
from pathlib import Path

import pytest

from back_end import PATIENCE
from disk_scene import BLOCK, meet
from pyvhost.cli.serving import Serving
from pyvhost.driver import cdb
from pyvhost.driver.inflight import Inflight
from pyvhost.driver.memory import GuestMemory
from pyvhost.driver.scsi import ScsiDriver
from pyvhost.driver.scsi_command import Pending
from pyvhost.driver.vhost_user import VhostUserFrontend
from requirements import need_program

KILLS = 10
#: Of one write: some blocks.
PIECE = 8
PIECES = 256
QUEUES = 2


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(PIECES * PIECE * BLOCK))
    return path


def serve(path: Path, lun: str) -> Serving:
    return Serving(
        ["scsi", "--socket-path", str(path), "--request-queues", str(QUEUES), "--lun", lun], [path]
    ).wait_ready()


def connected(path: Path, table: Inflight | None = None) -> VhostUserFrontend:
    front = VhostUserFrontend.connect(path, timeout=PATIENCE)
    front.inflight, front.inflight_size = table, (2 + QUEUES, 128)
    return front


def kill(serving: Serving) -> None:
    os.kill(serving.pid, signal.SIGKILL)
    serving.process.wait(PATIENCE)
    serving.close()


def content(at: int, version: int) -> bytes:
    return random.Random((at << 32) + version).randbytes(PIECE * BLOCK)


class Load:
    """Writes and reads of pieces, each under way once at most, and what each piece holds."""

    def __init__(self, driver: ScsiDriver) -> None:
        self.driver = driver
        self.versions = [0] * PIECES
        self._random = random.Random(4)
        self._busy: dict[int, tuple[Pending, bool]] = {}

    def submit(self, count: int) -> None:
        """So many more."""
        for _ in range(count):
            free = [at for at in range(PIECES) if at not in self._busy]
            at = self._random.choice(free)
            writes = self._random.random() < 0.6
            lba = at * PIECE
            queue = self._random.randrange(QUEUES)
            if writes:
                self.versions[at] += 1
                data = content(at, self.versions[at])
                pending = self.driver.submit(0, 0, cdb.write10(lba, PIECE), data, queue=queue)
            else:
                pending = self.driver.submit(
                    0, 0, cdb.read10(lba, PIECE), data_in_length=PIECE * BLOCK, queue=queue
                )
            self._busy[at] = pending, writes

    def wait(self) -> None:
        """All of them end well, and what was read is what was written last."""
        self.driver.wait_all([pending for pending, _ in self._busy.values()])
        for at, (pending, writes) in self._busy.items():
            self.judge(at, pending, writes)
        self._busy.clear()

    def judge(self, at: int, pending: Pending, writes: bool) -> None:
        response = pending.response
        assert response is not None
        assert (response.response, response.sense_key) in ((0, None), (0, 6)), response
        if response.sense_key == 6:
            # A unit attention of the new target: the command was not done, or by the one before. A driver repeats it.
            if writes:
                found = self.read(at)
                if found != self.expected(at):
                    self.versions[at] -= 1
                assert found == self.expected(at)
            return
        if not writes:
            assert response.data == self.expected(at), at

    def read(self, at: int) -> bytes:
        meet(self.driver, 0, 0)
        got = self.driver.command(0, 0, cdb.read10(at * PIECE, PIECE), data_in_length=PIECE * BLOCK)
        assert got.good
        return got.data

    def expected(self, at: int) -> bytes:
        return content(at, self.versions[at]) if self.versions[at] else bytes(PIECE * BLOCK)


@pytest.mark.parametrize("options", ["", ",delay=0.001"], ids=["by the loop", "by Python"])
def test_killed_ten_times_under_load(tmp_path: Path, image: Path, memory: GuestMemory, options: str) -> None:
    """No error and no wrong block: what was in hand is done again by the next one."""
    path = tmp_path / "vm0.sock"
    serving = serve(path, f"{image}{options}")
    driver: ScsiDriver | None = None
    try:
        front = connected(path)
        driver = ScsiDriver(front, memory, request_queues=QUEUES, timeout=PATIENCE)
        driver.start()
        meet(driver, 0, 0)
        load = Load(driver)
        for turn in range(KILLS):
            load.submit(40)
            load.wait()
            load.submit(40)
            if turn % 2:
                driver.wait_all([next(iter(load._busy.values()))[0]])
            kill(serving)
            serving = serve(path, f"{image}{options}")
            table = front.inflight
            assert table is not None
            front.close()
            front = connected(path, table)
            driver.resume(front)
            load.wait()
            assert all(table.heads(2 + queue) == [] for queue in range(QUEUES))
        meet(driver, 0, 0)
        for at in range(PIECES):
            assert load.read(at) == load.expected(at)
        kill(serving)
        data = image.read_bytes()
        for at in range(PIECES):
            assert data[at * PIECE * BLOCK : (at + 1) * PIECE * BLOCK] == load.expected(at)
    finally:
        if driver is not None:
            driver.close()
        serving.close()


WAYS = {
    "FUA": (cdb.write10(0, PIECE, 8), None),
    "flush": (cdb.write10(0, PIECE), cdb.synchronize_cache10()),
    "write-through": (cdb.write10(0, PIECE), None),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("options", ["", ",delay=0.001"], ids=["by the loop", "by Python"])
def test_what_was_acknowledged_is_there_after_a_kill(
    tmp_path: Path, image: Path, memory: GuestMemory, way: str, options: str
) -> None:
    path = tmp_path / "vm0.sock"
    command, flush = WAYS[way]
    data = content(0, 1)
    with (
        serve(path, f"{image}{options}") as serving,
        connected(path) as front,
        ScsiDriver(front, memory, request_queues=QUEUES, timeout=PATIENCE) as driver,
    ):
        driver.start()
        meet(driver, 0, 0)
        if way == "write-through":
            without_cache(driver)
        assert driver.command(0, 0, command, data).good
        if flush:
            assert driver.command(0, 0, flush).good
        kill(serving)
    assert image.read_bytes()[: len(data)] == data


def without_cache(driver: ScsiDriver) -> None:
    """MODE SELECT of the caching page with WCE 0."""
    sensed = driver.command(0, 0, cdb.mode_sense10(8, length=100), data_in_length=100)
    assert sensed.good
    page = bytearray(sensed.data[8 + int.from_bytes(sensed.data[6:8], "big") :][:20])
    assert page[2] & 4, "there is a cache"
    page[0] &= 0x3F
    page[2] &= ~4
    parameters = bytes(8) + bytes(page)
    assert driver.command(0, 0, cdb.mode_select10(len(parameters)), parameters).good


def test_what_the_kernel_is_asked_for(tmp_path: Path, image: Path, memory: GuestMemory) -> None:
    """With FUA or without a cache RWF_DSYNC, for a flush fdatasync, and neither for a plain write."""
    strace = need_program("strace")
    path, told = tmp_path / "vm0.sock", tmp_path / "told"

    def calls(lun: str, *, through: bool, command: bytes, flush: bool) -> str:
        with (
            serve(path, lun) as serving,
            connected(path) as front,
            ScsiDriver(front, memory, request_queues=QUEUES, timeout=PATIENCE) as driver,
        ):
            driver.start()
            meet(driver, 0, 0)
            if through:
                without_cache(driver)
            tracer = subprocess.Popen(
                [
                    strace,
                    "-f",
                    "-e",
                    "trace=pwritev2,pwritev,fdatasync,fsync",
                    "-o",
                    str(told),
                    "-p",
                    str(serving.pid),
                ],
                stderr=subprocess.PIPE,
                text=True,
            )
            assert tracer.stderr is not None
            line = tracer.stderr.readline()
            if "attached" not in line:
                tracer.kill()
                pytest.skip(f"strace can't attach: {line.strip()}")
            assert driver.command(0, 0, command, content(0, 2)).good
            if flush:
                assert driver.command(0, 0, cdb.synchronize_cache10()).good
            serving.close()
            tracer.wait(PATIENCE)
        return told.read_text()

    slow = f"{image},delay=0"
    assert "RWF_DSYNC" in calls(slow, through=False, command=cdb.write10(0, PIECE, 8), flush=False)
    assert "RWF_DSYNC" in calls(slow, through=True, command=cdb.write10(0, PIECE), flush=False)
    plain = calls(slow, through=False, command=cdb.write10(0, PIECE), flush=False)
    assert "RWF_DSYNC" not in plain
    assert not re.search("f(data)?sync", plain)
    assert re.search("f(data)?sync", calls(slow, through=False, command=cdb.write10(0, PIECE), flush=True))
