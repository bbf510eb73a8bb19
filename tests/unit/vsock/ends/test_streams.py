"""A guest's ports as asyncio streams: the loop is the test's thread, the guest is served by another."""

from __future__ import annotations

import asyncio
import errno
import os
import socket
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager
from typing import Any, TypeVar

import pytest

from pyvhost.abi import virtio_vsock as abi
from pyvhost.vsock.contract import Key
from pyvhost.vsock.ends import streams
from pyvhost.vsock.ends.streams import StreamEnds
from vsock_host import PATIENCE, PlainHost
from vsock_parts import BOTH

T = TypeVar("T")
RESPONSE = (abi.OP_RESPONSE, 0)
RST = (abi.OP_RST, 0)


class Served:
    """A guest whose control thread runs; what the test wants of it is done there."""

    def __init__(self, cid: int = 52) -> None:
        self.host = PlainHost(StreamEnds(), cid=cid)
        self._stop = False
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        while not self._stop:
            self.host.poller.run_once()
            self.host.settle()

    async def ask(self, what: Callable[[PlainHost], T]) -> T:
        """`what`, on the control thread."""
        answer: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        loop = asyncio.get_running_loop()

        def do() -> None:
            try:
                loop.call_soon_threadsafe(answer.set_result, what(self.host))
            except BaseException as error:
                loop.call_soon_threadsafe(answer.set_exception, error)

        self.host.poller.call_soon_threadsafe(do)
        return await asyncio.wait_for(answer, PATIENCE)

    def close(self) -> None:
        self._stop = True
        self.host.poller.call_soon_threadsafe(lambda: None)
        self._thread.join()
        self.host.close()


@pytest.fixture
def guest() -> Iterator[Served]:
    served = Served()
    yield served
    served.close()


def run(main: Coroutine[Any, Any, T]) -> T:
    return asyncio.run(asyncio.wait_for(main, 2 * PATIENCE))


def copy_of(host: PlainHost, key: Key) -> socket.socket:
    """The connection's socket, for the test to play the data path with."""
    sock = socket.socket(fileno=os.dup(host.fd_of(key)))
    sock.setblocking(False)
    return sock


async def accept(guest: Served) -> tuple[Key, socket.socket]:
    """The guest accepts what it is asked for."""

    def answer(host: PlainHost) -> tuple[Key, socket.socket]:
        key = host.asked()
        host.says(key, abi.OP_RESPONSE)
        return key, copy_of(host, key)

    return await guest.ask(answer)


def test_a_stream_to_the_guest(guest: Served) -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        accepting = asyncio.create_task(accept(guest))
        async with streams.connect(52, 1234) as (reader, writer):
            key, other = await accepting
            assert (key.type, key.guest_port) == (abi.TYPE_STREAM, 1234)
            assert writer.get_extra_info("peername") == (52, 1234)
            assert writer.get_extra_info("sockname") == (2, key.peer_port)
            assert writer.get_extra_info("socket").family == socket.AF_UNIX
            with other:
                await loop.sock_sendall(other, b"a line\nand more")
                assert await reader.readline() == b"a line\n"
                writer.write(b"x" * 3_000_000)
                writer.write_eof()
                total = 0
                while got := await loop.sock_recv(other, 1 << 20):
                    total += len(got)
                assert total == 3_000_000
                await loop.sock_sendall(other, b"!")
                assert await reader.readexactly(9) == b"and more!"
        await guest.ask(lambda host: host.tell("eof", key))
        assert await guest.ask(lambda host: host.answer(key)) == (abi.OP_SHUTDOWN, BOTH)

    run(main())


def test_awaited_it_stays_open(guest: Served) -> None:
    async def main() -> None:
        accepting = asyncio.create_task(accept(guest))
        reader, writer = await streams.connect(52, 9)
        key, other = await accepting
        with other:
            await guest.ask(lambda host: host.says(key, abi.OP_SHUTDOWN, abi.SHUTDOWN_SEND))
            assert await reader.read() == b""
            writer.write(b"bye")
            await writer.drain()
            assert await asyncio.get_running_loop().sock_recv(other, 10) == b"bye"
        writer.close()
        await writer.wait_closed()

    run(main())


def test_a_guest_that_refuses_and_one_that_is_not_there(guest: Served) -> None:
    async def main() -> None:
        refusing = asyncio.create_task(guest.ask(lambda host: host.says(host.asked(), abi.OP_RST)))
        with pytest.raises(ConnectionRefusedError):
            await streams.connect(52, 9)
        await refusing
        with pytest.raises(ConnectionRefusedError, match="CID 53"):
            await streams.connect(53, 9)

    run(main())


def test_who_is_cancelled_takes_the_connection_along(guest: Served) -> None:
    async def main() -> None:
        connecting = asyncio.ensure_future(streams.connect_messages(52, 9)._connect())
        key = await guest.ask(lambda host: host.asked())
        connecting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await connecting
        await guest.ask(lambda host: host.says(key, abi.OP_RESPONSE))
        assert await guest.ask(lambda host: os.read(host.fd_of(key), 1)) == b""
        await guest.ask(lambda host: host.tell("eof", key))
        assert await guest.ask(lambda host: host.answer(key)) == (abi.OP_SHUTDOWN, BOTH)

    run(main())


def test_a_guest_reaches_who_listens(guest: Served) -> None:
    async def main() -> None:
        met: asyncio.Queue[tuple[int, int]] = asyncio.Queue()

        async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            met.put_nowait(writer.get_extra_info("peername"))
            writer.write((await reader.readline()).upper())
            await writer.drain()
            writer.close()

        async with streams.listen(80, handle) as server:
            with pytest.raises(OSError, match="listened on already"):
                streams.listen(80, handle)
            serving = asyncio.create_task(server.serve_forever())
            key = await guest.ask(lambda host: host.connected(80))
            with await guest.ask(lambda host: copy_of(host, key)) as other:
                loop = asyncio.get_running_loop()
                await loop.sock_sendall(other, b"hello\n")
                assert await loop.sock_recv(other, 100) == b"HELLO\n"
                assert await loop.sock_recv(other, 100) == b""
            assert met.get_nowait() == (52, key.guest_port)
            assert not serving.done()
            # Another type of socket is another port.
            assert (
                await guest.ask(lambda host: host.answer(host.request(80, type_=abi.TYPE_SEQPACKET))) == RST
            )
        await serving
        assert await guest.ask(lambda host: host.answer(host.request(80))) == RST

    run(main())


def test_a_port_for_one_guest_alone(guest: Served) -> None:
    async def main() -> None:
        def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.close()

        async with streams.listen(80, handle, cid=53):
            assert await guest.ask(lambda host: host.answer(host.request(80))) == RST
            async with streams.listen(80, handle, cid=52):
                await guest.ask(lambda host: host.connected(80))

    run(main())


def test_what_a_handler_raises_ends_its_connection_and_no_other(
    guest: Served, caplog: pytest.LogCaptureFixture
) -> None:
    async def main() -> None:
        async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            raise RuntimeError("no such luck")

        async with streams.listen(80, handle):
            for _ in range(2):
                key = await guest.ask(lambda host: host.connected(80))
                with await guest.ask(lambda host, key=key: copy_of(host, key)) as other:  # type: ignore[misc]
                    assert await asyncio.get_running_loop().sock_recv(other, 1) == b""

    run(main())
    assert [str(record.exc_info[1]) for record in caplog.records if record.exc_info] == ["no such luck"] * 2


def test_more_than_the_backlog_is_refused(guest: Served) -> None:
    async def main() -> None:
        def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.close()

        async with streams.listen(80, handle, backlog=2):
            done = threading.Event()
            answers: list[tuple[int, int]] = []

            def flood() -> None:
                answers.extend(guest.host.answer(guest.host.request(80)) for _ in range(4))
                done.set()

            # The loop sees none of them while it waits for this.
            guest.host.poller.call_soon_threadsafe(flood)
            assert done.wait(PATIENCE)
            assert answers == [RESPONSE, RESPONSE, RST, RST]
            await asyncio.sleep(0)
            assert await guest.ask(lambda host: host.answer(host.request(80))) == RESPONSE

    run(main())


def test_a_shortage_of_descriptors_takes_nothing_of_the_backlog(
    guest: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(type: int) -> tuple[object, socket.socket]:
        raise OSError(errno.EMFILE, "Too many open files")

    async def main() -> None:
        async with streams.listen(80, lambda reader, writer: writer.close(), backlog=2):
            with monkeypatch.context() as patch:
                patch.setattr(streams, "_pair", refuse)
                for _ in range(3):
                    assert await guest.ask(lambda host: host.answer(host.request(80))) == RST
            assert await guest.ask(lambda host: host.answer(host.request(80))) == RESPONSE

    run(main())


def test_a_loop_that_has_ended_is_nobody(guest: Served) -> None:
    left: list[streams.Listener] = []

    async def main() -> None:
        left.append(streams.listen(80, lambda reader, writer: None))

    run(main())
    assert run(guest.ask(lambda host: host.answer(host.request(80)))) == RST
    left[0].close()


@asynccontextmanager
async def messages(guest: Served) -> AsyncIterator[tuple[streams.Messages, Key, socket.socket]]:
    accepting = asyncio.create_task(accept(guest))
    async with streams.connect_messages(52, 7) as ours:
        key, other = await accepting
        with other:
            yield ours, key, other


def test_messages_stay_messages(guest: Served) -> None:
    async def main() -> None:
        async with messages(guest) as (ours, key, other):
            assert key.type == abi.TYPE_SEQPACKET
            assert (ours.peer, ours.address) == ((52, 7), (2, key.peer_port))
            for length in (1, 2000, 150_000):
                await ours.send(bytes(length))
            with pytest.raises(ValueError, match="empty"):
                await ours.send(b"")
            ours.send_eof()
            loop = asyncio.get_running_loop()
            assert [len(await loop.sock_recv(other, 1 << 20)) for _ in range(4)] == [1, 2000, 150_000, 0]
            for message in (b"one", b"two"):
                other.send(message)
            other.shutdown(socket.SHUT_WR)
            assert [message async for message in ours] == [b"one", b"two"]

    run(main())


def test_a_guest_sends_messages_to_who_listens(guest: Served) -> None:
    async def main() -> None:
        async def handle(ours: streams.Messages) -> None:
            async with ours:
                async for message in ours:
                    await ours.send(message[::-1])

        async with streams.listen_messages(80, handle):
            key = await guest.ask(lambda host: host.connected(80, abi.TYPE_SEQPACKET))
            with await guest.ask(lambda host: copy_of(host, key)) as other:
                loop = asyncio.get_running_loop()
                other.send(b"abc")
                assert await loop.sock_recv(other, 100) == b"cba"

    run(main())


def test_listening_wants_a_loop() -> None:
    with pytest.raises(RuntimeError):
        streams.listen(80, lambda reader, writer: None)
