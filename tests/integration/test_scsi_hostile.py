"""Guests that send a SCSI host device what can't be, and stores that fail: nobody else is hurt, and it goes on."""

from __future__ import annotations

import errno
import os
import select
import threading
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from back_end import PATIENCE
from disk_scene import BLOCK, Kept, OnASocket, Scene, meet, scene
from pyvhost.abi import virtio_scsi as abi
from pyvhost.driver import cdb
from pyvhost.driver.memory import MIB, GuestMemory
from pyvhost.driver.scsi import ScsiDriver
from pyvhost.driver.scsi_command import UNTOUCHED, Format, address
from pyvhost.scsi import plane
from pyvhost.scsi.requests import HEADER_BYTES, RESPONSE_BYTES
from pyvhost.scsi.stores.memory import MemoryStore
from pyvhost.scsi.stores.wrappers import ErrorRate
from pyvhost.vhost.shared import Shared

HEADER = Format().command(address(0, 0), 1, cdb.read10(0, 1))


def goes_on(found: Scene, lun: int = 0) -> None:
    meet(found.driver, 0, lun)
    data = os.urandom(BLOCK)
    assert found.driver.command(0, lun, cdb.write10(5, 1), data).good
    assert found.driver.command(0, lun, cdb.read10(5, 1), data_in_length=BLOCK).data == data


BROKEN: dict[str, tuple[list[bytes], list[int]]] = {
    "no response": ([HEADER], []),
    "a response too short": ([HEADER], [RESPONSE_BYTES - 1]),
    "a response too short, in pieces": ([HEADER], [50, 57]),
    "no request": ([], [RESPONSE_BYTES + BLOCK]),
    "a request too short": ([HEADER[: HEADER_BYTES - 1]], [RESPONSE_BYTES]),
}


@pytest.mark.parametrize(("readable", "writable"), BROKEN.values(), ids=BROKEN.keys())
def test_a_chain_that_is_no_request_stops_its_ring(
    tmp_path: Path, readable: list[bytes], writable: list[int]
) -> None:
    """The ring says so by its err, others go on, and after a reset it does as well."""
    with scene(tmp_path, "memory:1M", request_queues=2) as found:
        found.driver.submit_raw(readable, writable)
        assert found.driver.requests[0].wait_error(PATIENCE)
        got = found.driver.command(0, 0, cdb.test_unit_ready(), queue=1)
        assert got.good
        found.front.close()
        with (
            found.back_end.connect() as front,
            GuestMemory(8 * MIB) as memory,
            ScsiDriver(front, memory, timeout=PATIENCE) as another,
        ):
            another.start()
            meet(another, 0, 0)
            assert another.command(0, 0, cdb.test_unit_ready()).good


@pytest.mark.parametrize(
    ("readable", "writable"),
    [([b"\1\0\0"], [1]), ([bytes(24)], []), ([], [5]), ([b"\xff" * 24], [5]), ([b"\1" + bytes(19)], [5])],
)
def test_control_requests_that_are_none(tmp_path: Path, readable: list[bytes], writable: list[int]) -> None:
    with scene(tmp_path, "memory:1M") as found:
        pending = found.driver.submit_raw(readable, writable, found.driver.control)
        found.driver.wait_all([pending])
        assert found.driver.reset_lun(0, 0) == abi.S_OK
        goes_on(found)


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_any_request_at_all_is_answered(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    found = _shared(tmp_path_factory)
    for _ in range(8):
        one = data.draw(
            st.tuples(
                st.one_of(st.just(address(0, 0)), st.just(address(0, 1)), st.binary(min_size=8, max_size=8)),
                st.one_of(
                    st.binary(max_size=32),
                    st.builds(
                        lambda opcode, rest: bytes([opcode]) + rest,
                        st.sampled_from([0x08, 0x0A, 0x28, 0x2A, 0x88, 0x8A, 0xA8, 0xAA]),
                        st.binary(min_size=15, max_size=15),
                    ),
                ),
                st.integers(0, 255),
                st.sampled_from([0, 1, 36, 512, 513, 4096]),
                st.sampled_from([0, 1, 24, 512, 4096]),
            )
        )
        lun, command, attribute, data_in, data_out = one
        pending = found.driver.submit(
            0, lun, command, os.urandom(data_out), data_in, attribute=attribute, crn=attribute
        )
        try:
            found.driver.wait_all([pending], 10)
        except TimeoutError:
            # Blocked by an auto contingent allegiance that a request before it has established.
            assert found.driver.tmf(abi.T_TMF_CLEAR_ACA, 0, 0) == abi.S_OK
            assert found.driver.tmf(abi.T_TMF_CLEAR_ACA, 0, 1) == abi.S_OK
            found.driver.wait_all([pending])
        assert pending.raw[11] != UNTOUCHED
        if pending.raw[11] == abi.S_OK:
            assert pending.written >= RESPONSE_BYTES


_kept: dict[str, Any] = {}


def _shared(factory: pytest.TempPathFactory) -> Scene:
    if "scene" not in _kept:
        _kept["context"] = scene(factory.mktemp("any"), "memory:1M", "memory:1M,delay=0")
        _kept["scene"] = _kept["context"].__enter__()
    found = _kept["scene"]
    assert isinstance(found, Scene)
    return found


def test_after_any_request_it_goes_on(tmp_path_factory: pytest.TempPathFactory) -> None:
    found = _shared(tmp_path_factory)
    try:
        for lun in (0, 1):
            assert found.driver.reset_lun(0, lun) == abi.S_OK
            meet(found.driver, 0, lun)
            assert found.driver.command(0, lun, cdb.inquiry(), data_in_length=96).good
    finally:
        _kept.pop("context").__exit__(None, None, None)
        _kept.clear()


def test_a_guest_that_changes_its_request_meanwhile(tmp_path: Path) -> None:
    """What is judged was read once: whatever comes of it is a status, and nobody is hurt."""
    with scene(tmp_path, "memory:1M", "memory:1M,delay=0") as found:
        for lun in (0, 1):
            at = found.memory.allocate(HEADER_BYTES)
            stop = threading.Event()

            def scribble(at: int = at, stop: threading.Event = stop) -> None:
                while not stop.is_set():
                    found.memory.write(at, os.urandom(HEADER_BYTES))

            header = Format().command(address(0, lun), 1, cdb.read10(0, 8))
            found.memory.write(at, header)
            writer = threading.Thread(target=scribble)
            writer.start()
            ring = found.driver.requests[0].ring
            for _ in range(200):
                room = found.memory.allocate(RESPONSE_BYTES + 8 * BLOCK)
                ring.add([(at, HEADER_BYTES)], [(room, RESPONSE_BYTES + 8 * BLOCK)], token=room)
                found.driver.requests[0].publish()
                found.driver.requests[0].wait_used(PATIENCE)
                while (used := ring.pop_used()) is not None:
                    assert isinstance(used.token, int)
                    found.memory.free(used.token)
            stop.set()
            writer.join(PATIENCE)
            assert found.driver.reset_lun(0, lun) == abi.S_OK
            goes_on(found, lun)


# Stores


class Failing(ErrorRate):
    """Fails everything, when it is told to."""

    def __init__(self, number: int) -> None:
        super().__init__(MemoryStore(MIB), 0, number)


FAILURES = {
    "EIO": (errno.EIO, 3, 0x1100, 0x0C00),
    "ENOSPC": (errno.ENOSPC, 7, None, 0x2707),
    "ENODEV": (errno.ENODEV, 2, None, None),
    "EROFS": (errno.EROFS, 7, None, 0x2700),
}


@pytest.mark.parametrize(("number", "key", "read", "write"), FAILURES.values(), ids=FAILURES.keys())
def test_a_store_that_fails(
    tmp_path: Path, number: int, key: int, read: int | None, write: int | None
) -> None:
    store = Failing(number)
    with scene(tmp_path, store, "memory:1M") as found:
        goes_on(found)
        found.ask(lambda: setattr(store, "rate", 1))
        wrote = found.driver.command(0, 0, cdb.write10(0, 1), bytes(BLOCK))
        assert (wrote.status, wrote.sense_key) == (2, key), wrote
        if write is not None:
            assert wrote.asc == write
        if read is not None:
            got = found.driver.command(0, 0, cdb.read10(0, 1), data_in_length=BLOCK)
            assert (got.status, got.sense_key, got.asc) == (2, key, read)
        goes_on(found, 1)
        found.ask(lambda: setattr(store, "rate", 0))
        goes_on(found)


def test_a_file_that_is_cut_while_it_is_served(tmp_path: Path) -> None:
    """The compiled loop's short read is Python's to explain; the other unit has nothing to do with it."""
    image = tmp_path / "disk.img"
    image.write_bytes(bytes(MIB))
    with scene(tmp_path, str(image), "memory:1M") as found:
        goes_on(found)
        os.truncate(image, 4096)
        got = found.driver.command(0, 0, cdb.read10(1000, 8), data_in_length=8 * BLOCK)
        assert got.status == 2
        assert got.sense_key in (3, 5, 6)
        goes_on(found, 1)


def test_a_store_that_stalls_holds_up_nobody(tmp_path: Path) -> None:
    kept, held = Kept(), OnASocket()
    with scene(tmp_path, kept, held, "memory:1M") as found:
        waiting = [
            found.driver.submit(0, lun, cdb.read10(0, 1), data_in_length=BLOCK)
            for lun in (0, 1)
            for _ in range(8)
        ]
        for _ in range(20):
            goes_on(found, 2)
        assert not [one.response for one in waiting if one.done]
        held.answer(bytes(8 * BLOCK))
        found.ask(kept.let_go)
        found.driver.wait_all(waiting)
        assert all(one.response is not None and one.response.good for one in waiting)


def test_more_than_the_loop_can_have_under_way(tmp_path: Path) -> None:
    """What finds no free operation is Python's."""
    held = OnASocket()
    with scene(tmp_path, held, ring_size=1024) as found:
        waiting = [found.driver.submit(0, 0, cdb.read10(0, 1), data_in_length=BLOCK) for _ in range(300)]
        found.driver.wait_all(waiting[256:])
        held.answer(bytes(256 * BLOCK))
        found.driver.wait_all(waiting)
        assert all(one.response is not None and one.response.good for one in waiting)


def test_a_host_without_io_uring(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(entries: int) -> None:
        raise OSError(errno.EPERM, "io_uring_setup: Operation not permitted")

    monkeypatch.setattr(plane, "Uring", none)
    monkeypatch.setattr(Shared, "_made", {})
    image = tmp_path / "disk.img"
    image.write_bytes(bytes(MIB))
    with scene(tmp_path, "memory:1M", str(image), request_queues=2) as found:
        for _ in range(10):
            goes_on(found, 0)
            goes_on(found, 1)
        task = found.driver.submit(0, 0, cdb.read10(0, 8), data_in_length=8 * BLOCK)
        found.driver.tmf(abi.T_TMF_ABORT_TASK, 0, 0, task.tag)
        found.driver.wait_all([task])
        found.driver.resume(bases=found.driver.stop())
        goes_on(found)


def test_memory_that_is_taken_away_under_a_request(tmp_path: Path) -> None:
    """The file behind guest memory is cut: the front end is done with, the device is not."""
    with scene(tmp_path, "memory:1M", "memory:1M,delay=0") as found:
        goes_on(found)
        pending = found.driver.submit(0, 0, cdb.read10(0, 8), data_in_length=8 * BLOCK, publish=False)
        assert not pending.done
        for region in found.memory.regions:
            os.ftruncate(region.fd, 0)
        os.eventfd_write(found.driver.requests[0].kick_fd, 1)
        assert select.select([found.front.fileno()], [], [], PATIENCE)[0], "it was not sent away"
        found.front.close()
        with (
            found.back_end.connect() as front,
            GuestMemory(8 * MIB) as memory,
            ScsiDriver(front, memory, timeout=PATIENCE) as another,
        ):
            another.start()
            for lun in (0, 1):
                meet(another, 0, lun)
                assert another.command(0, lun, cdb.read10(0, 8), data_in_length=8 * BLOCK).good
