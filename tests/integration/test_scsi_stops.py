"""Stops, resets and front ends that leave, while a store stalls: the host may write into the guest's memory until it
is done, so that nobody is told before that the memory is theirs again (decision 24).
"""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import pyvhost
from back_end import PATIENCE
from disk_scene import BLOCK, Kept, OnASocket, Scene, go_on, meet, read_of, scene, waiting
from pyvhost.abi import virtio_scsi as abi
from pyvhost.driver import cdb
from pyvhost.driver.errors import BackendGoneError
from pyvhost.driver.memory import MIB, GuestMemory
from pyvhost.driver.scsi import FEATURES, REQUEST, ScsiDriver
from pyvhost.driver.vhost_ioctl import VhostScsiFrontend
from pyvhost.driver.vhost_user import VhostUserFrontend
from pyvhost.host.control_thread import ControlThread
from pyvhost.scsi import endpoints
from pyvhost.vhost_user import connection

KINDS = pytest.mark.parametrize("kind", [OnASocket, Kept])
Kind = type[OnASocket] | type[Kept]


@contextmanager
def meanwhile(function: Callable[[], object]) -> Iterator[Callable[[], bool]]:
    """Runs it in a thread, which has to end in the block; gives whether it has come back."""
    thread = threading.Thread(target=function)
    thread.start()
    try:
        yield lambda: not thread.is_alive()
    finally:
        thread.join(PATIENCE)
    assert not thread.is_alive(), "it does not come back"


@KINDS
def test_a_stop_waits_however_long_it_takes(
    tmp_path: Path, kind: Kind, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = kind()
    with waiting(monkeypatch) as waits, scene(tmp_path, store) as found:
        task = read_of(found)
        bases: list[dict[int, int]] = []
        with meanwhile(lambda: bases.append(found.driver.stop())) as is_back:
            waits()
            waits()
            assert not is_back()
            assert found.ask(lambda: True), "the control thread has time for others"
            go_on(found, store)
        assert bases[0][REQUEST] == found.driver.requests[0].ring.used_idx
        found.driver.wait_all([task])
        assert task.response is not None
        assert task.response.good
        found.driver.resume(bases=bases[0])
        if isinstance(store, Kept):
            store.keeps = False
        assert found.driver.command(0, 0, cdb.write10(0, 1), bytes(BLOCK)).good


@KINDS
def test_a_stop_is_over_as_soon_as_its_store_is_done(
    tmp_path: Path, kind: Kind, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The device says so: nobody has to look."""
    monkeypatch.setattr(connection, "LOOK", 2 * PATIENCE)
    store, tick = kind(), threading.Event()
    with scene(tmp_path, store) as found:
        read_of(found)
        with meanwhile(found.driver.stop):
            while found.ask(lambda: found.device.progress) is None:
                tick.wait(0.001)
            go_on(found, store)


@pytest.mark.parametrize("reset", [VhostUserFrontend.reset_device, lambda front: front.set_status(0)])
@KINDS
def test_a_reset_waits(
    tmp_path: Path,
    kind: Kind,
    reset: Callable[[VhostUserFrontend], object],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    store = kind()
    with waiting(monkeypatch) as waits, scene(tmp_path, store) as found:
        task = read_of(found)

        def stop() -> None:
            reset(found.front)
            found.front.sync()

        with meanwhile(stop) as is_back:
            waits()
            assert not is_back()
            go_on(found, store)
        # It is the driver's again.
        found.driver.wait_all([task])
        assert task.response is not None
        assert task.response.good


@KINDS
def test_a_stop_waits_for_functions_as_well(
    tmp_path: Path, kind: Kind, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = kind()
    with waiting(monkeypatch) as waits, scene(tmp_path, store) as found:
        task = read_of(found)
        answers: list[int] = []
        with meanwhile(lambda: answers.append(found.driver.abort_task(task))):
            while not found.ask(lambda: found.device.under_way([0])):
                pass
            with meanwhile(lambda: found.front.get_vring_base(0)) as is_back:
                waits()
                assert not is_back()
                go_on(found, store)
        assert answers == [abi.S_OK]


@KINDS
def test_a_front_end_that_leaves_and_comes_back_with_its_memory(
    tmp_path: Path, kind: Kind, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It gets to use it when nobody else writes there; one that loses patience does not keep the next out."""
    store = kind()
    with waiting(monkeypatch) as waits, scene(tmp_path, store, "memory:1M") as found:
        read_of(found)
        found.front.close()
        with found.back_end.connect() as impatient, meanwhile(lambda: _gives(impatient, found)) as is_back:
            waits()
            assert not is_back()
            impatient.socket.shutdown(socket.SHUT_RDWR)
        with found.back_end.connect() as front, GuestMemory(8 * MIB) as memory:
            # Other memory is nobody else's.
            front.set_mem_table(memory.regions)
            front.sync()
            with meanwhile(lambda: _gives(front, found)) as is_back:
                waits()
                assert not is_back()
                go_on(found, store)
        if isinstance(store, Kept):
            store.keeps = False
        with (
            found.back_end.connect() as front,
            ScsiDriver(front, found.memory, timeout=PATIENCE) as driver,
        ):
            driver.start()
            meet(driver, 0, 1)
            assert driver.command(0, 1, cdb.read10(0, 1), data_in_length=BLOCK).good


def _gives(front: VhostUserFrontend, found: Scene) -> None:
    with contextlib.suppress(BackendGoneError):
        front.set_mem_table(found.memory.regions)
        front.sync()


@pytest.mark.parametrize("how", ["clear", "close"])
@KINDS
def test_in_process(kind: Kind, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The memory is this process's own, and may be anything next."""
    store = kind()
    endpoint = endpoints.register("naa.6001405000000024", [])
    try:
        endpoint.add_lun(1, 0, store)
        with (
            waiting(monkeypatch) as waits,
            GuestMemory(16 * MIB, anonymous=True) as memory,
            pyvhost.open("/dev/vhost-scsi") as handle,
        ):
            front = VhostScsiFrontend(handle, endpoint.wwpn)
            with ScsiDriver(front, memory, features=FEATURES, timeout=PATIENCE) as driver:
                driver.start()
                meet(driver, 1, 0)
                task = driver.submit(1, 0, cdb.read10(0, 8), data_in_length=8 * BLOCK)
                assert driver.query_task(task) == abi.S_FUNCTION_SUCCEEDED
                stop = {"clear": front.clear_endpoint, "close": handle.close}[how]
                with meanwhile(stop) as is_back:
                    waits()
                    assert not is_back()
                    if isinstance(store, OnASocket):
                        store.answer(b"g" * 8 * BLOCK)
                    else:
                        ControlThread.get().call(store.let_go)
                driver.wait_all([task])
                assert task.response is not None
                assert task.response.good
    finally:
        endpoint.unregister()
        if isinstance(store, OnASocket):
            store.end()
