"""The SCSI host device over vhost-user: requests of any shape, task management, events, and what comes in between.

What the compiled loop does by itself (a plain READ or WRITE) and what Python does has to look the same: most tests
run with a unit of either.
"""

from __future__ import annotations

import itertools
import os
import random
from pathlib import Path

import pytest

from back_end import PATIENCE
from disk_scene import BLOCK, Kept, OnASocket, meet, read_of, scene
from pyvhost.abi import virtio_scsi as abi
from pyvhost.driver import cdb
from pyvhost.driver.dirty_log import LOG_PAGE, DirtyLog
from pyvhost.driver.memory import MIB, GuestMemory
from pyvhost.driver.scsi import REQUEST, ScsiDriver
from pyvhost.driver.scsi_command import REPORT_LUNS, Layout, address
from pyvhost.scsi.requests import RESPONSE_BYTES

SPECS = {"by the loop": "memory:1M", "by Python": "memory:1M,delay=0"}
EITHER = pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS.keys())


# Requests


@EITHER
def test_any_layout(tmp_path: Path, spec: str) -> None:
    data = random.Random(1).randbytes(8 * BLOCK)
    with scene(tmp_path, spec, ring_size=256) as found:
        driver = found.driver
        for apart, piece, header_piece, indirect in itertools.product(
            (True, False), (0, 512, 700), (0, 1, 17), (True, False)
        ):
            layout = Layout(apart, piece, header_piece, indirect)
            lba = random.Random(str(layout)).randrange(1000)
            wrote = driver.command(0, 0, cdb.write10(lba, 8), data, layout=layout)
            assert (wrote.good, wrote.residual, wrote.written) == (True, 0, RESPONSE_BYTES), layout
            read = driver.command(0, 0, cdb.read10(lba, 8), data_in_length=len(data), layout=layout)
            assert (read.good, read.data) == (True, data), layout
            assert read.written == RESPONSE_BYTES + len(data)


@EITHER
@pytest.mark.parametrize("queue", [0, 1])
def test_every_form_of_read_and_write(tmp_path: Path, spec: str, queue: int) -> None:
    pairs = [
        (cdb.write6(7, 3), cdb.read6(7, 3), 3),
        (cdb.write6(9, 0), cdb.read6(9, 0), 256),
        (cdb.write10(300, 5), cdb.read10(300, 5), 5),
        (cdb.write12(400, 6), cdb.read12(400, 6), 6),
        (cdb.write16(500, 7), cdb.read16(500, 7), 7),
        (cdb.write10(600, 2, 8), cdb.read10(600, 2, 8), 2),
        (cdb.write10(700, 2, 0x10), cdb.read10(700, 2, 0x10), 2),
    ]
    with scene(tmp_path, spec, request_queues=2) as found:
        for write, read, blocks in pairs:
            data = random.Random(write).randbytes(blocks * BLOCK)
            assert found.driver.command(0, 0, write, data, queue=queue).good
            got = found.driver.command(0, 0, read, data_in_length=len(data), queue=1 - queue)
            assert got.good
            assert got.data == data


@EITHER
def test_buffers_that_are_too_long_or_too_short(tmp_path: Path, spec: str) -> None:
    with scene(tmp_path, spec) as found:
        driver = found.driver
        data = random.Random(2).randbytes(4 * BLOCK)
        assert driver.command(0, 0, cdb.write10(0, 4), data).good
        long = driver.command(0, 0, cdb.read10(0, 4), data_in_length=6 * BLOCK)
        assert (long.response, long.status, long.residual) == (abi.S_OK, 0, 2 * BLOCK)
        assert long.data == data
        assert long.written == RESPONSE_BYTES + len(data)
        short = driver.command(0, 0, cdb.read10(0, 4), data_in_length=2 * BLOCK)
        assert short.response == abi.S_OVERRUN
        over = driver.command(0, 0, cdb.write10(8, 2), data)
        assert (over.response, over.status, over.residual) == (abi.S_OK, 0, 2 * BLOCK)
        under = driver.command(0, 0, cdb.write10(8, 8), data)
        assert under.response == abi.S_OVERRUN
        assert driver.command(0, 0, cdb.read10(0, 4), data_in_length=4 * BLOCK).data == data


def test_a_request_both_ways(tmp_path: Path) -> None:
    with scene(tmp_path, "memory:1M") as found:
        pending = found.driver.submit(0, 0, cdb.read10(0, 1), bytes(100), BLOCK)
        got = found.driver.wait_for(pending)
        assert (got.response, got.status, got.residual) == (abi.S_OK, 0, 100)


@EITHER
def test_beyond_the_end(tmp_path: Path, spec: str) -> None:
    with scene(tmp_path, spec) as found:
        for lba, blocks in ((2048, 1), (2047, 2), (0xFFFFFFFF, 1)):
            got = found.driver.command(0, 0, cdb.read10(lba, blocks), data_in_length=blocks * BLOCK)
            assert (got.sense_key, got.asc) == (5, 0x2100)
        for lba in (1 << 63, (1 << 64) - 1):
            got = found.driver.command(0, 0, cdb.read16(lba, 1), data_in_length=BLOCK)
            assert (got.sense_key, got.asc) == (5, 0x2100)


def test_addresses(tmp_path: Path) -> None:
    with scene(tmp_path, "memory:1M") as found:
        found.add(7, 0x3FF, "memory:2M")
        driver = found.driver
        for lun in (address(0, 0), address(0, 0, peripheral=True)):
            meet(driver, 0, lun)
            assert driver.command(0, lun, cdb.test_unit_ready()).good
            assert driver.command(0, lun, cdb.read10(0, 1), data_in_length=BLOCK).good
        meet(driver, 7, 0x3FF)
        assert driver.command(7, 0x3FF, cdb.read10(4095, 1), data_in_length=BLOCK).good
        luns = driver.command(0, REPORT_LUNS, cdb.report_luns(), data_in_length=16384)
        assert (luns.status, luns.response) == (0, abi.S_OK)
        assert luns.data[:4] == (8).to_bytes(4, "big")
        for nowhere in (address(1, 0), bytes(8), b"\xff" * 8, bytes([1, 0, 0x80, 0, 0, 0, 0, 0])):
            for one in (cdb.inquiry(), cdb.read10(0, 1)):
                assert driver.command(0, nowhere, one, data_in_length=BLOCK).response == abi.S_BAD_TARGET
        absent = driver.command(0, 5, cdb.read10(0, 1), data_in_length=BLOCK)
        assert (absent.sense_key, absent.asc) == (5, 0x2500)


# Task management


STOPS = {
    "ABORT TASK": (abi.T_TMF_ABORT_TASK, abi.S_ABORTED),
    "ABORT TASK SET": (abi.T_TMF_ABORT_TASK_SET, abi.S_ABORTED),
    "CLEAR TASK SET": (abi.T_TMF_CLEAR_TASK_SET, abi.S_ABORTED),
    "LOGICAL UNIT RESET": (abi.T_TMF_LOGICAL_UNIT_RESET, abi.S_RESET),
    "I_T NEXUS RESET": (abi.T_TMF_I_T_NEXUS_RESET, abi.S_RESET),
}


@pytest.mark.parametrize("kind", [OnASocket, Kept])
@pytest.mark.parametrize(("function", "response"), STOPS.values(), ids=STOPS.keys())
def test_functions_that_stop_tasks(
    tmp_path: Path, kind: type[OnASocket] | type[Kept], function: int, response: int
) -> None:
    """The function is answered when what it stopped has stopped, and nobody else's task is."""
    store = kind()
    with scene(tmp_path, store, "memory:1M") as found:
        driver = found.driver
        task = read_of(found)
        asked = driver.submit_tmf(function, 0, 0, task.tag)
        assert driver.query_task(task) == abi.S_FUNCTION_SUCCEEDED
        assert driver.command(0, 1, cdb.test_unit_ready()).response == abi.S_OK
        assert not asked.done
        assert not task.done
        if isinstance(store, OnASocket):
            store.answer(bytes(8 * BLOCK))
        else:
            found.ask(store.let_go)
        driver.wait_all([asked, task])
        assert driver.tmf_response(asked) == abi.S_OK
        assert task.response is not None
        assert task.response.response == response
        assert task.written == RESPONSE_BYTES
        assert driver.query_task(task) == abi.S_OK
        if isinstance(store, Kept):
            store.keeps = False
        meet(driver, 0, 0)


def test_functions_that_ask(tmp_path: Path) -> None:
    with scene(tmp_path, "memory:1M") as found:
        driver = found.driver
        assert driver.tmf(abi.T_TMF_QUERY_TASK, 0, 0, 77) == abi.S_OK
        assert driver.tmf(abi.T_TMF_QUERY_TASK_SET, 0, 0) == abi.S_OK
        assert driver.tmf(abi.T_TMF_CLEAR_ACA, 0, 0) == abi.S_OK
        assert driver.tmf(abi.T_TMF_ABORT_TASK, 0, 0, 77) == abi.S_OK
        assert driver.tmf(abi.T_TMF_QUERY_TASK_SET, 3, 0) == abi.S_BAD_TARGET
        assert driver.tmf(abi.T_TMF_LOGICAL_UNIT_RESET, 0, 9) == abi.S_INCORRECT_LUN
        assert driver.tmf(99, 0, 0) == abi.S_FUNCTION_REJECTED
        assert driver.subscribe(0, 0, 0xFF) == (0, abi.S_OK)
        assert driver.query_events(4, 0, 0xFF)[1] == abi.S_BAD_TARGET


def test_only_the_one_that_is_meant_is_aborted(tmp_path: Path) -> None:
    store = OnASocket()
    with scene(tmp_path, store) as found:
        first, second = read_of(found), read_of(found)
        asked = found.driver.submit_tmf(abi.T_TMF_ABORT_TASK, 0, 0, second.tag)
        # The next function is only looked at when this one has been.
        assert found.driver.query_task(second) == abi.S_FUNCTION_SUCCEEDED
        # Which of the two takes the first half is the host's choice.
        store.answer(b"1" * 16 * BLOCK)
        found.driver.wait_all([first, asked, second])
        assert first.response is not None
        assert first.response.data == b"1" * 8 * BLOCK
        assert second.response is not None
        assert second.response.response == abi.S_ABORTED


def test_functions_stay_when_the_kick_is_replaced(tmp_path: Path) -> None:
    store = Kept()
    with scene(tmp_path, store) as found:
        driver = found.driver
        task = read_of(found)
        asked = driver.submit_tmf(abi.T_TMF_ABORT_TASK, 0, 0, task.tag)
        assert driver.query_task(task) == abi.S_FUNCTION_SUCCEEDED
        found.ask(lambda: found.device.set_vring_kick(0, os.dup(driver.control.kick_fd)))
        found.ask(store.let_go)
        driver.wait_all([asked, task])
        assert driver.tmf_response(asked) == abi.S_OK


# Units that come, go and change


def test_events(tmp_path: Path) -> None:
    with scene(tmp_path, "memory:1M", event_buffers=2) as found:
        driver = found.driver
        found.add(3, 300, "memory:1M")
        (event,) = driver.wait_events()
        assert (event.event, event.reason, event.missed) == (
            abi.T_TRANSPORT_RESET,
            abi.EVT_RESET_RESCAN,
            False,
        )
        assert event.lun == bytes([1, 3, 0x41, 0x2C, 0, 0, 0, 0])
        found.ask(lambda: found.device.resize_lun(3, 300, 2 * MIB))
        (event,) = driver.wait_events()
        assert (event.event, event.reason) == (abi.T_PARAM_CHANGE, 0x092A)
        found.ask(lambda: found.device.remove_lun(3, 300))
        (event,) = driver.wait_events()
        assert (event.event, event.reason) == (abi.T_TRANSPORT_RESET, abi.EVT_RESET_REMOVED)


def test_events_that_found_no_room(tmp_path: Path) -> None:
    """The driver hears that there were some as soon as it gives room again."""
    with scene(tmp_path, event_buffers=1) as found:
        driver = found.driver
        for turn in range(3):
            for lun in range(3):
                found.add(turn, lun, "memory:1M")
            (event,) = driver.wait_events(again=False)
            assert event.event == abi.T_TRANSPORT_RESET
            assert not event.missed
            driver.post_events(1)
            (event,) = driver.wait_events(again=False)
            assert (event.event, event.missed) == (abi.T_NO_EVENT, True)
            driver.post_events(1)


def test_a_unit_that_goes_while_it_is_read(tmp_path: Path) -> None:
    """Its store is closed when what the host has of it has ended."""
    store = OnASocket()
    with scene(tmp_path, store, "memory:1M") as found:
        task = read_of(found)
        closed: list[bool] = []
        found.ask(lambda: found.device.remove_lun(0, 0))
        found.ask(lambda: setattr(store.inner, "close", lambda: closed.append(True)))
        assert found.driver.command(0, 0, cdb.test_unit_ready()).asc == 0x2500
        assert closed == []
        store.answer(bytes(8 * BLOCK))
        found.driver.wait_all([task])
        found.ask(lambda: None)
        assert found.ask(lambda: list(closed)) == [True]


# Rings that stop, front ends that go, memory that moves


@pytest.mark.parametrize("kind", [OnASocket, Kept])
def test_a_stop_that_waits_for_nothing(tmp_path: Path, kind: type[OnASocket] | type[Kept]) -> None:
    """GET_VRING_BASE_SKIP_DRAIN: what is under way is in the inflight memory, for whoever goes on."""
    store = kind()
    with scene(tmp_path, store, "memory:1M", inflight=True) as found:
        driver = found.driver
        task = read_of(found)
        used = driver.requests[0].ring.used_idx
        base = found.front.get_vring_base_skip_drain(REQUEST)
        assert base == used + 1
        assert not task.done
        table = found.front.inflight
        assert table is not None
        assert len(table.heads(REQUEST)) == 1
        driver.stop()
        driver.resume()
        assert driver.query_task(task) == abi.S_FUNCTION_SUCCEEDED
        if isinstance(store, OnASocket):
            store.answer(b"s" * 2 * 8 * BLOCK)
        else:
            found.ask(store.let_go)
        driver.wait_all([task])
        assert task.response is not None
        assert task.response.good


def mapped(memory: GuestMemory) -> int:
    """How many mappings of a driver's memory this process has."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    inodes = {str(os.fstat(region.fd).st_ino) for region in memory.regions}
    return sum(line.split()[4] in inodes for line in lines)


@pytest.mark.parametrize("kind", [OnASocket, Kept])
def test_memory_stays_while_it_is_used(tmp_path: Path, kind: type[OnASocket] | type[Kept]) -> None:
    """A memory table that was replaced, and one whose front end has gone, wait for what was begun in them."""
    store = kind()
    with scene(tmp_path, store, "memory:1M") as found:
        driver = found.driver
        with_one = mapped(found.memory)
        task = read_of(found)
        found.front.set_mem_table(found.memory.regions)
        found.front.sync()
        assert mapped(found.memory) == with_one + 1
        # What begins now, and ends, is none of the old table's.
        assert driver.command(0, 1, cdb.read10(0, 1), data_in_length=BLOCK).response == abi.S_OK
        assert mapped(found.memory) == with_one + 1
        if isinstance(store, OnASocket):
            store.answer(b"y" * 8 * BLOCK)
        else:
            found.ask(store.let_go)
        driver.wait_all([task])
        assert task.response is not None
        assert task.response.good
        if isinstance(store, OnASocket):
            assert task.response.data == b"y" * 8 * BLOCK
        found.ask(lambda: None)
        assert mapped(found.memory) == with_one

        read_of(found)
        found.front.close()
        with (
            found.back_end.connect() as front,
            GuestMemory(8 * MIB) as memory,
            ScsiDriver(front, memory, timeout=PATIENCE) as another,
        ):
            another.start()
            meet(another, 0, 1)
            assert another.command(0, 1, cdb.read10(0, 1), data_in_length=BLOCK).good
            assert mapped(found.memory) == with_one
            if isinstance(store, OnASocket):
                store.answer(b"z" * 8 * BLOCK)
            else:
                found.ask(store.let_go)
                store.keeps = False
            meet(another, 0, 0)
            assert another.command(0, 0, cdb.write10(0, 1), bytes(BLOCK)).good
            found.ask(lambda: None)
            assert mapped(found.memory) == with_one - 1


@EITHER
def test_the_pages_that_are_written_are_logged(tmp_path: Path, spec: str) -> None:
    with scene(tmp_path, spec) as found, DirtyLog.covering(found.memory) as log:
        driver = found.driver
        driver.start_log(log, rings=False)
        for blocks, layout in itertools.product((1, 8, 100), (Layout(), Layout(False, 4096, 30, True))):
            log.take()
            pending = driver.submit(0, 0, cdb.read10(0, blocks), data_in_length=blocks * BLOCK, layout=layout)
            wanted = {
                page
                for at, size in pending.writable
                for page in range(at // LOG_PAGE, (at + size - 1) // LOG_PAGE + 1)
            }
            driver.wait_all([pending])
            driver.resume(bases=driver.stop())
            assert set(log.take()) == wanted
        driver.submit(0, 0, cdb.write10(0, 8), bytes(8 * BLOCK))


def test_several_queues_and_units_at_once(tmp_path: Path) -> None:
    with scene(tmp_path, "memory:1M", "memory:1M,delay=0", request_queues=4) as found:
        driver = found.driver
        for turn in range(20):
            writes = [
                driver.submit(0, n % 2, cdb.write10(n * 8, 8), bytes([n, turn]) * 2048, queue=n % 4)
                for n in range(64)
            ]
            driver.wait_all(writes)
            reads = [
                driver.submit(0, n % 2, cdb.read10(n * 8, 8), data_in_length=4096, queue=(n + turn) % 4)
                for n in range(64)
            ]
            driver.wait_all(reads)
            assert all(one.response is not None and one.response.good for one in writes)
            assert [one.response.data for one in reads if one.response] == [
                bytes([n, turn]) * 2048 for n in range(64)
            ]
