"""The socket device's dirty log: exactly the pages that it writes, and all a migration needs of them.

Rings are stopped before the log is held against memory: a page may be marked a moment after the driver has seen what
lies in it.
"""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from back_end import PATIENCE, BackEnd
from both_ways import DRIVERS, RX, devices_part, frame, pages, parted, parted_layout, used_pages
from pyvhost.abi import virtio_vsock as abi
from pyvhost.driver.dirty_log import LOG_PAGE, DirtyLog, Snapshot
from pyvhost.driver.memory import MIB, GuestMemory
from pyvhost.driver.vsock import VsockDriver
from pyvhost.driver.vsock_packet import HEADER
from pyvhost.driver.vsock_socket import VsockSocket
from pyvhost.vsock.device import VsockDevice
from vsock_scene import VsockScene

STREAM, SEQPACKET = abi.TYPE_STREAM, abi.TYPE_SEQPACKET
TYPES = pytest.mark.parametrize("type_", [STREAM, SEQPACKET], ids=["stream", "seqpacket"])
SIZE = 64
#: A guest, and its sibling.
HERE, THERE = 42, 43


@pytest.fixture
def memory() -> Iterator[GuestMemory]:
    with parted() as memory:
        yield memory


@pytest.fixture
def log(memory: GuestMemory) -> Iterator[DirtyLog]:
    with DirtyLog.covering(memory) as log:
        yield log


@pytest.fixture
def scene(tmp_path: Path) -> Iterator[VsockScene]:
    with VsockScene(tmp_path) as scene:
        yield scene


@contextmanager
def guest(
    back_end: BackEnd, memory: GuestMemory, rx_allocate: Callable[[int], int] | None = None, **options: Any
) -> Iterator[VsockDriver]:
    """A guest that keeps to the parts of `parted`: what it posts before it runs is for the device to write to."""
    posting = rx_allocate or (lambda size: memory.allocate(size, 16, RX))
    running = False

    def allocate(size: int) -> int:
        return memory.allocate(size, 16, DRIVERS) if running else posting(size)

    with (
        back_end.connect() as front,
        VsockDriver(
            front,
            memory,
            SIZE,
            allocate=allocate,
            layout=parted_layout(memory, SIZE),
            timeout=PATIENCE,
            **options,
        ) as driver,
    ):
        driver.start()
        running = True
        yield driver


def data(number: int, size: int) -> bytes:
    """Bytes that are none of `parted`'s poison, others for each number."""
    return frame(number, size)


def host_says(sock: VsockSocket, end: socket.socket, what: bytes) -> None:
    end.send(what)
    assert came(sock, len(what)) == what


def guest_says(sock: VsockSocket, end: socket.socket, what: bytes) -> None:
    sock.send(what)
    got = b""
    while len(got) < len(what):
        got += end.recv(len(what))
    assert got == what


def came(sock: VsockSocket, size: int) -> bytes:
    if sock.key.type == STREAM:
        return sock.recv_exactly(size)
    message = sock.recv_message()
    assert message is not None
    return message.data


@TYPES
@pytest.mark.parametrize(
    "rx_buffers", [(HEADER, 4096), (HEADER + 300,), (20, 100, 1000)], ids=["as Linux", "short", "in pieces"]
)
def test_the_pages_that_changed_and_no_other(
    scene: VsockScene, memory: GuestMemory, log: DirtyLog, type_: int, rx_buffers: tuple[int, ...]
) -> None:
    with guest(scene.back_end, memory, rx_buffers=rx_buffers) as driver:
        sock, end = scene.pair(driver, type=type_)
        driver.start_log(log)
        log.take()
        before = Snapshot(memory)
        for number in range(9):
            host_says(sock, end.theirs, data(number, 1 + 611 * number))
            guest_says(sock, end.theirs, data(number, 1 + 577 * number))
        driver.wait_sent()
        driver.stop()
        marked = log.take()
        assert marked == devices_part(memory, before.changed())
        assert marked >= used_pages(driver, 0, 1)
        assert len(marked) > 4


@TYPES
def test_what_a_sibling_sends_marks_the_receivers_pages(
    tmp_path: Path, memory: GuestMemory, log: DirtyLog, type_: int
) -> None:
    devices = [VsockDevice(cid, group="g") for cid in (HERE, THERE)]
    with (
        BackEnd(tmp_path, *devices) as back_end,
        guest(back_end, memory) as driver,
        GuestMemory(16 * MIB) as other,
        back_end.connect(1) as front,
        VsockDriver(front, other, timeout=PATIENCE) as sibling,
    ):
        sibling.start()
        listener = driver.listen(80, type=type_)
        theirs = sibling.connect(80, HERE, type=type_, wait=False)
        sock = listener.accept()
        theirs.wait_connected()
        driver.start_log(log)
        log.take()
        before = Snapshot(memory)
        for number in range(9):
            what = data(number, 1 + 611 * number)
            theirs.send(what)
            assert came(sock, len(what)) == what
            sock.send(what)
            assert came(theirs, len(what)) == what
        driver.wait_sent()
        driver.stop()
        marked = log.take()
        assert marked == devices_part(memory, before.changed())
        assert marked >= used_pages(driver, 0, 1)


def test_what_is_sent_marks_the_used_ring_alone(
    scene: VsockScene, memory: GuestMemory, log: DirtyLog
) -> None:
    with guest(scene.back_end, memory) as driver:
        sock, end = scene.pair(driver)
        driver.start_log(log)
        log.take()
        for number in range(20):
            guest_says(sock, end.theirs, data(number, 1000))
        driver.wait_sent()
        driver.frontend.stop_ring(1)
        assert log.take() == used_pages(driver, 1)


@TYPES
def test_one_packet_marks_the_pages_it_lies_in(
    scene: VsockScene, memory: GuestMemory, log: DirtyLog, type_: int
) -> None:
    """Computed, not compared: of a buffer over three pages a packet fills the first's end, and some of the next."""
    starts = []

    def over_page_ends(size: int) -> int:
        starts.append(memory.allocate(LOG_PAGE + size, LOG_PAGE, RX) + LOG_PAGE - 100)
        return starts[-1]

    options: dict[str, Any] = {"rx_buffers": (HEADER + 2 * LOG_PAGE,), "rx_depth": 2}
    with guest(scene.back_end, memory, over_page_ends, **options) as driver:
        sock, end = scene.pair(driver, type=type_)
        driver.start_log(log)
        log.take()
        # The first buffer had the answer to the request.
        for number, (size, start) in enumerate([(56, starts[1]), (57, starts[0]), (200, starts[1])]):
            host_says(sock, end.theirs, data(number, size))
            bases = driver.stop()
            # In the other ring it may have said that it wants kicks.
            marked = log.take() - used_pages(driver, 1)
            assert marked == used_pages(driver, 0) | pages(start, HEADER + size)
            driver.resume(bases=bases)
            driver.start_log(log)
            log.take()


@TYPES
def test_a_guest_that_migrates_with_traffic_takes_all_with_it(
    scene: VsockScene, memory: GuestMemory, log: DirtyLog, type_: int
) -> None:
    """Copied once, then page by page as the log says while both talk: what the destination has is what was there."""
    with guest(scene.back_end, memory) as driver:
        sock, end = scene.pair(driver, type=type_)
        driver.start_log(log)
        copy = {
            region.guest_phys_addr: bytearray(memory.read(region.guest_phys_addr, region.memory_size))
            for region in memory.regions[RX:]
        }
        rounds = 60

        def talk() -> None:
            for number in range(rounds):
                end.theirs.sendall(data(number, 6000))

        def listen() -> None:
            left = rounds * 3000
            while left:
                left -= len(end.theirs.recv(3000))

        threads = [threading.Thread(target=what) for what in (talk, listen)]
        for thread in threads:
            thread.start()
        logged = 0
        for number in range(rounds):
            assert came(sock, 6000) == data(number, 6000)
            sock.send(data(number, 3000))
            logged += _copy(memory, log, copy)
        for thread in threads:
            thread.join(PATIENCE)
            assert not thread.is_alive()
        driver.stop()
        _copy(memory, log, copy)
        assert logged > rounds
        for start, bytes_ in copy.items():
            assert memory.read(start, len(bytes_)) == bytes_


def _copy(memory: GuestMemory, log: DirtyLog, copy: dict[int, bytearray]) -> int:
    """Brings the copy to where the log says that memory is; how many pages."""
    marked = log.take()
    for page in marked:
        start = max(at for at in copy if at <= page * LOG_PAGE)
        at = page * LOG_PAGE - start
        copy[start][at : at + LOG_PAGE] = memory.read(page * LOG_PAGE, LOG_PAGE)
    return len(marked)
