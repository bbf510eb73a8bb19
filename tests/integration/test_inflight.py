"""Back ends and front ends that end without a word, and what was in hand then (INFLIGHT_SHMFD).

A frame may come twice: whoever sent it can't be told that it had gone. None may be lost, and every chain comes back
once.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from back_end import PATIENCE, BackEnd
from both_ways import EVENT_IDX, INDIRECT, MRG_RXBUF, VERSION_1, echo, frame
from pyvhost.cli.serving import Serving
from pyvhost.driver.inflight import Inflight
from pyvhost.driver.memory import GuestMemory
from pyvhost.driver.net import NetDriver
from pyvhost.driver.vhost_user import VhostUserFrontend
from pyvhost.net.device import NetDevice

SIZE = 64
MODERN = VERSION_1 | MRG_RXBUF | EVENT_IDX | INDIRECT


def connected(path: Path, table: Inflight | None = None) -> VhostUserFrontend:
    """A front end that has its back end keep a table, a new one or the one before."""
    front = VhostUserFrontend.connect(path, timeout=PATIENCE)
    front.inflight, front.inflight_size = table, (2, SIZE)
    return front


def driver_of(front: VhostUserFrontend, memory: GuestMemory, features: int) -> NetDriver:
    return NetDriver(front, memory, features=features, ring_size=SIZE, timeout=PATIENCE)


def all_come(driver: NetDriver, wanted: list[bytes]) -> None:
    """Every one of them comes, in order but for repetitions, and nothing else."""
    got: list[bytes] = []
    while set(got) != set(wanted):
        got += [one.frame for one in driver.receive()]
        assert set(got) <= set(wanted)
    driver.wait_sent()


def table_of(driver: NetDriver) -> Inflight:
    front = driver.frontend
    assert isinstance(front, VhostUserFrontend)
    assert front.inflight is not None
    return front.inflight


@pytest.mark.parametrize("features", [MODERN, 0], ids=["modern", "legacy"])
def test_a_back_end_that_is_killed_loses_nothing(tmp_path: Path, memory: GuestMemory, features: int) -> None:
    path = tmp_path / "vm0.sock"
    arguments = ["net", "--socket-path", str(path), "--backend", "loop"]
    serving = Serving(arguments, [path])
    driver: NetDriver | None = None
    try:
        serving.wait_ready()
        front = connected(path)
        driver = driver_of(front, memory, features)
        driver.start()
        echo(driver, frame(0))
        for turn in range(5):
            frames = [frame(turn * 100 + number) for number in range(50)]
            driver.send_many(frames)
            # The device is at work on them, or not yet, or no more.
            os.kill(serving.pid, signal.SIGKILL)
            serving.process.wait(PATIENCE)
            serving.close()
            serving = Serving(arguments, [path])
            serving.wait_ready()
            table = table_of(driver)
            front.close()
            front = connected(path, table)
            driver.resume(front)
            all_come(driver, frames)
            assert table.heads(0) == table.heads(1) == []
            echo(driver, frame(turn))
        assert driver.queues[1].ring.outstanding == 0
        table_of(driver).close()
        front.close()
    finally:
        if driver is not None:
            driver.close()
        serving.close()


@pytest.mark.parametrize("features", [MODERN, 0], ids=["modern", "legacy"])
def test_a_front_end_that_goes_and_comes_loses_nothing(
    tmp_path: Path, memory: GuestMemory, features: int
) -> None:
    with BackEnd(tmp_path, NetDevice("loop")) as back_end:
        front = connected(back_end.paths[0])
        with driver_of(front, memory, features) as driver:
            driver.start()
            for turn in range(30):
                frames = [frame(turn * 100 + number) for number in range(50)]
                driver.send_many(frames)
                table = table_of(driver)
                front.close()
                front = connected(back_end.paths[0], table)
                driver.resume(front)
                all_come(driver, frames)
            table_of(driver).close()
        front.close()


def test_the_table_is_the_rings(tmp_path: Path, memory: GuestMemory) -> None:
    with (
        BackEnd(tmp_path, NetDevice("loop")) as back_end,
        connected(back_end.paths[0]) as front,
        driver_of(front, memory, MODERN) as driver,
    ):
        driver.start()
        echo(driver, *(frame(number) for number in range(20)))
        driver.stop()
        with table_of(driver) as table:
            for index, queue in driver.queues.items():
                header = table.header(index)
                assert (header.version, header.desc_num) == (1, SIZE)
                assert header.used_idx == queue.ring.used_idx == 20
                assert table.heads(index) == []


def test_what_an_earlier_back_end_had_in_hand_is_done_again(tmp_path: Path, memory: GuestMemory) -> None:
    """A table that says so, written by nobody that is here: those chains first, in their order, then new ones."""
    with (
        BackEnd(tmp_path, NetDevice("loop")) as back_end,
        connected(back_end.paths[0]) as front,
        driver_of(front, memory, VERSION_1) as driver,
    ):
        driver.start()
        echo(driver, frame(0))
        bases = driver.stop()
        driver.send_many([frame(1), frame(2), frame(3)])
        ring = driver.queues[1].ring
        heads = [ring.avail_entry(1 + at) for at in range(3)]
        table = table_of(driver)
        # Two of them taken by the one before, the second first.
        region = table.mmap_offset + (16 + 16 * SIZE + 63) // 64 * 64
        for counter, head in ((7, heads[1]), (8, heads[0])):
            entry = bytes([1, 0, 0, 0, 0, 0, 0, 0]) + counter.to_bytes(8, "little")
            os.pwrite(table.fd, entry, region + 16 + 16 * head)
        assert table.heads(1) == [heads[1], heads[0]]
        front.close()
        with connected(back_end.paths[0], table) as again:
            assert bases[1] == 1
            driver.resume(again, {0: driver.queues[0].ring.used_idx, 1: 3})
            got = [one.frame for one in driver.receive(3)]
            driver.wait_sent()
            table.close()
        assert got == [frame(2), frame(1), frame(3)]
