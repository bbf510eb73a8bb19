"""`pyvhost.open("/dev/vhost-vsock")`: a driver's sockets, and this process at their other end."""

from __future__ import annotations

import asyncio
import errno
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

import pyvhost
from pyvhost import vsock
from pyvhost.driver.memory import MIB, GuestMemory
from pyvhost.driver.vhost_ioctl import VhostVsockFrontend
from pyvhost.driver.vsock import VsockDriver
from pyvhost.vhost.handle import Handle

CID = 77
PATIENCE = 30.0
DATA = bytes(range(256)) * 4096


@pytest.fixture
def memory() -> Iterator[GuestMemory]:
    with GuestMemory(16 * MIB, anonymous=True) as memory:
        yield memory


@contextmanager
def driving(memory: GuestMemory, cid: int = CID) -> Iterator[tuple[Handle, VsockDriver]]:
    with pyvhost.open("/dev/vhost-vsock") as handle:
        front = VhostVsockFrontend(handle, cid)
        with VsockDriver(front, memory, timeout=PATIENCE) as driver:
            driver.start()
            yield handle, driver


def test_a_guest_reaches_what_listens_in_this_process(memory: GuestMemory) -> None:
    listening = threading.Event()
    done: list[bytes] = []

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        done.append(await reader.readexactly(len(DATA)))
        writer.write(DATA[::-1])
        await writer.drain()
        writer.close()
        served.set()

    async def serve() -> None:
        async with vsock.listen(5000, handle):
            listening.set()
            await served.wait()

    served = asyncio.Event()
    thread = threading.Thread(target=asyncio.run, args=(serve(),))
    thread.start()
    assert listening.wait(PATIENCE)
    with driving(memory) as (_, driver):
        sock = driver.connect(5000)
        sock.send(DATA)
        assert sock.recv_exactly(len(DATA)) == DATA[::-1]
        assert sock.recv(1) == b""
    thread.join(PATIENCE)
    assert not thread.is_alive()
    assert done == [DATA]


def test_a_port_of_the_guest_is_reached_from_this_process(memory: GuestMemory) -> None:
    async def call() -> bytes:
        async with vsock.connect(CID, 22) as (reader, writer):
            writer.write(b"hello")
            return await reader.read(100)

    with driving(memory) as (_, driver):
        listener = driver.listen(22)
        answers: list[bytes] = []
        thread = threading.Thread(target=lambda: answers.append(asyncio.run(call())))
        thread.start()
        sock = listener.accept()
        assert sock.recv(100) == b"hello"
        sock.send(b"world")
        thread.join(PATIENCE)
        assert answers == [b"world"]


def test_a_cid_is_one_guests_until_it_is_closed(memory: GuestMemory) -> None:
    with driving(memory), pyvhost.open("/dev/vhost-vsock") as other:
        front = VhostVsockFrontend(other, CID)
        with pytest.raises(OSError, match=f"CID {CID}") as refused:
            front.set_guest_cid(CID)
        assert refused.value.errno == errno.EADDRINUSE
        front.set_guest_cid(CID + 1)
    with pyvhost.open("/dev/vhost-vsock") as handle:
        VhostVsockFrontend(handle, CID).set_guest_cid(CID)


def test_a_guest_that_was_stopped_goes_on_where_it_was(memory: GuestMemory) -> None:
    with driving(memory) as (_, driver):
        front = driver.frontend
        assert isinstance(front, VhostVsockFrontend)
        with pytest.raises(ConnectionError):
            driver.connect(4)
        front.set_running(False)
        front.set_running(True)
        with pytest.raises(ConnectionError):
            driver.connect(4)
