"""The host's ends with the real data path: what guests and the host's programs say to each other, byte for byte."""

from __future__ import annotations

import asyncio
import errno
import hashlib
import os
import random
import select
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, TypeVar

import pytest

from back_end import PATIENCE, BackEnd
from pyvhost import vsock
from pyvhost.abi import virtio_vsock as abi
from pyvhost.driver.memory import MIB, GuestMemory
from pyvhost.driver.vsock import VsockDriver
from pyvhost.driver.vsock_socket import VsockSocket
from pyvhost.vsock.device import VsockDevice

STREAM, SEQPACKET = abi.TYPE_STREAM, abi.TYPE_SEQPACKET
T = TypeVar("T")


@contextmanager
def guest(back_end: BackEnd, at: int = 0, **options: Any) -> Iterator[VsockDriver]:
    with (
        back_end.connect(at) as front,
        GuestMemory(64 * MIB) as memory,
        VsockDriver(front, memory, timeout=PATIENCE, **options) as driver,
    ):
        driver.start()
        yield driver


@pytest.fixture
def uds(tmp_path: Path) -> Path:
    return tmp_path / "v"


@pytest.fixture
def back_end(tmp_path: Path, uds: Path) -> Iterator[BackEnd]:
    with BackEnd(tmp_path, VsockDevice(42, uds_path=uds)) as back_end:
        yield back_end


@pytest.fixture
def driver(back_end: BackEnd) -> Iterator[VsockDriver]:
    with guest(back_end) as driver:
        yield driver


def dial(uds: Path, port: int, suffix: str = "") -> socket.socket:
    """A client that has asked for a port, and not been answered yet."""
    kind = socket.SOCK_SEQPACKET if suffix else socket.SOCK_STREAM
    sock = socket.socket(socket.AF_UNIX, kind)
    sock.settimeout(PATIENCE)
    sock.connect(f"{uds}{suffix}")
    sock.send(f"CONNECT {port}\n".encode())
    return sock


def serve(uds: Path, port: int, kind: int = socket.SOCK_STREAM) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, kind)
    sock.bind(f"{uds}_{port}")
    sock.listen(64)
    sock.settimeout(PATIENCE)
    return sock


def line_of(sock: socket.socket) -> bytes:
    """To the newline and no further."""
    line = b""
    while not line.endswith(b"\n"):
        more = sock.recv(1)
        assert more, line
        line += more
    return line


class Aside(threading.Thread):
    """Something that is done meanwhile; `result` waits for it."""

    def __init__(self, what: Callable[[], Any]) -> None:
        super().__init__()
        self._what = what
        self._found: Any = None
        self._error: BaseException | None = None
        self.start()

    def run(self) -> None:
        try:
            self._found = self._what()
        except BaseException as error:
            self._error = error

    def result(self) -> Any:
        self.join(2 * PATIENCE)
        assert not self.is_alive()
        if self._error is not None:
            raise self._error
        return self._found


def all_of(sock: socket.socket) -> str:
    """A checksum of all that comes until the end."""
    digest = hashlib.sha256()
    while data := sock.recv(1 << 16):
        digest.update(data)
    return digest.hexdigest()


def all_to(sock: VsockSocket) -> str:
    digest = hashlib.sha256()
    while data := sock.recv(1 << 16):
        digest.update(data)
    return digest.hexdigest()


def read_all(sock: VsockSocket, size: int) -> bytes:
    """So many bytes, fewer at the end."""
    data = b""
    while len(data) < size and (more := sock.recv(size - len(data))):
        data += more
    return data


# --- Unix sockets ------------------------------------------------------------------------------------------


def test_what_the_host_sends_after_the_line_comes_first(uds: Path, driver: VsockDriver) -> None:
    listener = driver.listen(1234)
    data = random.Random(1).randbytes(3_000_001)
    with dial(uds, 1234) as sock:

        def send() -> None:
            # It does not wait for the answer, as one may.
            sock.sendall(data)
            sock.shutdown(socket.SHUT_WR)

        sending = Aside(send)
        accepted = listener.accept()
        assert all_to(accepted) == hashlib.sha256(data).hexdigest()
        sending.result()
        accepted.send(b"all of it")
        accepted.close()
        assert line_of(sock) == f"OK {accepted.key.peer_port}\n".encode()
        assert sock.recv(100) == b"all of it"
        assert sock.recv(100) == b""


def test_what_the_guest_sends_before_it_closes_arrives(uds: Path, driver: VsockDriver) -> None:
    data = random.Random(2).randbytes(3_000_001)
    with serve(uds, 80) as listener:
        sock = driver.connect(80)
        accepted, _ = listener.accept()
        with accepted:
            receiving = Aside(lambda: all_of(accepted))
            sock.send(data)
            sock.close()
            assert receiving.result() == hashlib.sha256(data).hexdigest()


def test_messages_both_ways(uds: Path, driver: VsockDriver) -> None:
    lengths = [1, 44, 4096, 65_536, 150_000]
    guests = driver.listen(9, type=SEQPACKET)
    with dial(uds, 9, ".seqpacket") as sock, serve(uds, 10, socket.SOCK_SEQPACKET) as listener:
        accepted = guests.accept()
        assert sock.recv(100) == f"OK {accepted.key.peer_port}\n".encode()
        asked = driver.connect(10, type=SEQPACKET)
        other, _ = listener.accept()
        with other:
            for ours, theirs in ((accepted, sock), (asked, other)):
                sending = Aside(lambda theirs=theirs: [theirs.send(bytes(n)) for n in lengths])  # type: ignore[misc]
                for length in lengths:
                    message = ours.recv_message()
                    assert message is not None
                    assert len(message.data) == length
                sending.result()
                receiving = Aside(lambda theirs=theirs: [len(theirs.recv(1 << 18)) for _ in lengths])  # type: ignore[misc]
                for length in lengths:
                    ours.send(bytes(length))
                assert receiving.result() == lengths


def beyond(sock: socket.socket, data: bytes) -> int:
    """Sends bytes with the only writing end of a pipe twice; the reading end, which hangs up when both are closed."""
    reader, writer = os.pipe()
    assert socket.send_fds(sock, [data], [writer, writer]) == len(data)
    os.close(writer)
    return reader


def closed(reader: int) -> bool:
    """Whether nobody has the writing end any more, in a while at most."""
    poll = select.poll()
    poll.register(reader, 0)
    found = poll.poll(1000 * PATIENCE)
    os.close(reader)
    return bool(found)


@pytest.mark.parametrize("suffix", ["", ".seqpacket"])
def test_descriptors_are_closed_and_the_bytes_they_came_with_arrive(
    uds: Path, driver: VsockDriver, suffix: str
) -> None:
    """All is sent before anything is read: nothing that comes later wakes the loop."""
    kind = socket.SOCK_SEQPACKET if suffix else socket.SOCK_STREAM
    with socket.socket(socket.AF_UNIX, kind) as sock:
        sock.connect(f"{uds}{suffix}")
        listener = driver.listen(1234, type=SEQPACKET if suffix else STREAM)
        pieces = [b"%d:" % number * (1 + number) for number in range(12)]
        line = [b"CONNECT 1234\n"] if suffix else [b"CONN", b"ECT 1234\nthen "]
        readers = [beyond(sock, piece) for piece in line]
        for number, piece in enumerate(pieces):
            if number % 3:
                readers.append(beyond(sock, piece))
            else:
                sock.send(piece)
        accepted = listener.accept()
        if suffix:
            assert [accepted.recv_message().data for _ in pieces] == pieces  # type: ignore[union-attr]
        else:
            wanted = b"then " + b"".join(pieces)
            assert read_all(accepted, len(wanted)) == wanted
        for reader in readers:
            assert closed(reader)


def test_urgent_bytes_stop_nobody(uds: Path, driver: VsockDriver) -> None:
    """They are not in the stream, as anywhere; a read ends where they stood."""
    with dial(uds, 1234) as sock:
        listener = driver.listen(1234)
        sock.send(b"one, ")
        try:
            sock.send(b"!", socket.MSG_OOB)
        except OSError as error:
            if error.errno != errno.EOPNOTSUPP:
                raise
            pytest.skip("this kernel's Unix sockets know no urgent bytes")
        sock.send(b"two, ")
        accepted = listener.accept()
        assert read_all(accepted, 10) == b"one, two, "
        sock.send(b"three, ")
        sock.send(b"!", socket.MSG_OOB)
        sock.send(b"four")
        assert read_all(accepted, 11) == b"three, four"


def test_hundreds_of_clients_at_once(uds: Path, driver: VsockDriver) -> None:
    listener = driver.listen(7)
    with ExitStack() as stack:
        clients = [stack.enter_context(dial(uds, 7)) for _ in range(300)]
        accepted = [listener.accept() for _ in clients]
        ports = {sock.key.peer_port: sock for sock in accepted}
        for number, client in enumerate(clients):
            word, port = line_of(client).split()
            assert word == b"OK"
            client.sendall(b"%d" % number)
            sock = ports.pop(int(port))
            assert sock.recv(100) == b"%d" % number
            sock.send(b"you are %d" % number)
            assert client.recv(100) == b"you are %d" % number
        assert not ports


def test_a_client_that_never_reads_stops_nobody(uds: Path, driver: VsockDriver) -> None:
    listener = driver.listen(7)
    with dial(uds, 7) as stalled, dial(uds, 7) as other:
        first, second = listener.accept(), listener.accept()
        # Until its room is used up: nobody takes it away.
        sent = 0
        while first.credit:
            sent += first.credit
            first.send(bytes(first.credit))
            driver.wait_sent()
            driver.pump()
        assert sent >= first.buf_alloc
        assert line_of(other).startswith(b"OK ")
        receiving = Aside(lambda: all_of(other))
        data = random.Random(3).randbytes(2_000_000)
        second.send(data)
        second.shutdown(abi.SHUTDOWN_SEND)
        assert receiving.result() == hashlib.sha256(data).hexdigest()
        assert line_of(stalled).startswith(b"OK ")


def test_a_client_that_breaks_off(uds: Path, driver: VsockDriver) -> None:
    listener = driver.listen(7)
    with dial(uds, 7) as sock:
        accepted = listener.accept()
        line_of(sock)
    assert accepted.recv(1) == b""
    with pytest.raises(BrokenPipeError):
        accepted.send(b"x")


def test_a_driver_that_starts_anew_ends_its_connections(uds: Path, back_end: BackEnd) -> None:
    with guest(back_end) as driver:
        listener = driver.listen(7)
        sock = dial(uds, 7)
        listener.accept()
        line_of(sock)
    with sock:
        assert sock.recv(1) == b""
    with guest(back_end) as driver:
        listener = driver.listen(7)
        with dial(uds, 7) as sock:
            listener.accept().send(b"again")
            line_of(sock)
            assert sock.recv(100) == b"again"


def test_the_devices_end_is_that_of_its_connections(tmp_path: Path, uds: Path) -> None:
    with BackEnd(tmp_path, VsockDevice(42, uds_path=uds)) as back_end, guest(back_end) as driver:
        listener = driver.listen(7)
        sock = dial(uds, 7)
        listener.accept()
        line_of(sock)
        back_end.close()
        with sock:
            assert sock.recv(1) == b""
    assert not uds.exists()


# --- siblings ----------------------------------------------------------------------------------------------


@pytest.fixture
def siblings(tmp_path: Path) -> Iterator[tuple[VsockDriver, VsockDriver]]:
    devices = [VsockDevice(cid, group="lab") for cid in (3, 4)]
    with BackEnd(tmp_path, *devices) as back_end, guest(back_end) as one, guest(back_end, 1) as two:
        yield one, two


def joined(one: VsockDriver, two: VsockDriver, type_: int = STREAM) -> tuple[VsockSocket, VsockSocket]:
    listener = two.listen(80, type=type_)
    asking = one.connect(80, 4, type=type_, wait=False)
    accepted = listener.accept()
    asking.wait_connected()
    return asking, accepted


def test_siblings_talk_both_ways_at_once(siblings: tuple[VsockDriver, VsockDriver]) -> None:
    ours, theirs = joined(*siblings)
    data = [random.Random(seed).randbytes(4_000_003) for seed in (1, 2)]

    def talk(sock: VsockSocket, says: bytes) -> str:
        digest = hashlib.sha256()
        left = memoryview(says)
        heard = 0
        while left or heard < len(says):
            says_more = bool(left)

            def turn(says_more: bool = says_more) -> bool:
                return bool(sock.pending or (says_more and sock.credit))

            sock.driver.wait_for(turn, "a turn")
            if sock.pending:
                found = sock.recv(1 << 16)
                heard += len(found)
                digest.update(found)
            piece = left[: min(sock.credit, 30_000)]
            if piece:
                sock.send(bytes(piece))
                left = left[len(piece) :]
        return digest.hexdigest()

    other = Aside(lambda: talk(theirs, data[1]))
    assert talk(ours, data[0]) == hashlib.sha256(data[1]).hexdigest()
    assert other.result() == hashlib.sha256(data[0]).hexdigest()


def test_siblings_messages_keep_their_bounds_and_their_records(
    siblings: tuple[VsockDriver, VsockDriver],
) -> None:
    ours, theirs = joined(*siblings, type_=SEQPACKET)
    said = [(1, False), (70_000, True), (4096, False), (200_000, True)]

    def say() -> None:
        for length, eor in said:
            ours.send(bytes(length), eor=eor)

    saying = Aside(say)
    heard = []
    for _ in said:
        message = theirs.recv_message()
        assert message is not None
        heard.append((len(message.data), message.eor))
    assert heard == said
    saying.result()


def test_siblings_may_send_a_message_as_long_as_the_other_takes(tmp_path: Path) -> None:
    """Each hears of the other's room, and not of ours, which is larger, before it has sent anything."""
    devices = [VsockDevice(cid, group="lab") for cid in (3, 4)]
    with (
        BackEnd(tmp_path, *devices) as back_end,
        guest(back_end, buf_alloc=5000) as one,
        guest(back_end, 1, buf_alloc=7000) as two,
    ):
        asking, accepted = joined(one, two, SEQPACKET)
        assert asking.peer_buf_alloc == 7000
        two.wait_for(lambda: accepted.peer_buf_alloc == 5000, "the room of the one that asked")


def test_a_sibling_that_reads_no_more_is_not_written_to(siblings: tuple[VsockDriver, VsockDriver]) -> None:
    ours, theirs = joined(*siblings)
    theirs.shutdown(abi.SHUTDOWN_RCV)
    ours.driver.wait_for(lambda: bool(ours.peer_shutdown & abi.SHUTDOWN_RCV), "its shutdown")
    with pytest.raises(BrokenPipeError):
        ours.send(b"x")
    theirs.send(b"but it writes")
    assert ours.recv(100) == b"but it writes"


def test_a_siblings_last_words_arrive(siblings: tuple[VsockDriver, VsockDriver]) -> None:
    ours, theirs = joined(*siblings)
    ours.send(bytes(100_000))
    ours.close()
    assert len(theirs.recv_exactly(100_000)) == 100_000
    assert theirs.recv(1) == b""


def test_a_sibling_that_vanishes(tmp_path: Path) -> None:
    devices = [VsockDevice(cid, group="lab") for cid in (3, 4)]
    with BackEnd(tmp_path, *devices) as back_end, guest(back_end) as one:
        with guest(back_end, 1) as two:
            ours, _ = joined(one, two)
        ours.driver.wait_for(lambda: ours.reset, "RST")
        with pytest.raises(ConnectionRefusedError):
            one.connect(80, 77)


# --- Python ------------------------------------------------------------------------------------------------


def test_a_guests_ports_in_python(driver: VsockDriver) -> None:
    data = random.Random(4).randbytes(1_000_003)
    listener = driver.listen(9)
    listening = threading.Event()

    def serve_guest() -> str:
        accepted = listener.accept()
        found = all_to(accepted)
        accepted.send(found.encode())
        accepted.close()
        listening.wait(PATIENCE)
        sock = driver.connect(5000)
        sock.send(b"what is your name?\n")
        answer = sock.recv(100).decode()
        sock.close()
        return answer

    async def main() -> None:
        async with vsock.connect(42, 9) as (reader, writer):
            writer.write(data)
            writer.write_eof()
            assert (await reader.read()).decode() == hashlib.sha256(data).hexdigest()
        asked = asyncio.Event()

        async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.readline()
            cid, _ = writer.get_extra_info("peername")
            writer.write(b"you are guest %d" % cid)
            assert await reader.read() == b""
            writer.close()
            asked.set()

        async with vsock.listen(5000, handle):
            listening.set()
            await asked.wait()

    ours = Aside(serve_guest)
    asyncio.run(asyncio.wait_for(main(), 2 * PATIENCE))
    assert ours.result() == "you are guest 42"
