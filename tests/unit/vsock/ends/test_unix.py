"""Unix sockets as a guest's ports: who is let in, what is read of whom, and what the guest reaches."""

from __future__ import annotations

import errno
import os
import resource
import socket
import stat
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from pyvhost.abi import virtio_vsock as abi
from pyvhost.vsock.ends import unix
from pyvhost.vsock.ends.unix import UnixEnds
from vsock_host import PATIENCE, PlainHost, shut
from vsock_parts import BOTH

RESPONSE = (abi.OP_RESPONSE, 0)
RST = (abi.OP_RST, 0)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "v.sock"


@pytest.fixture
def host(path: Path) -> Iterator[PlainHost]:
    with PlainHost(UnixEnds(path)) as host:
        yield host


def client(path: Path, kind: int = socket.SOCK_STREAM) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, kind)
    sock.settimeout(PATIENCE)
    sock.connect(str(path))
    return sock


def test_a_client_is_connected_when_the_guest_has_accepted(host: PlainHost, path: Path) -> None:
    with client(path) as sock:
        sock.sendall(b"CONNECT 1234\n")
        key = host.asked()
        assert (key.type, key.guest_port, key.peer_cid) == (abi.TYPE_STREAM, 1234, 2)
        sock.setblocking(False)
        with pytest.raises(BlockingIOError):
            sock.recv(1)
        sock.settimeout(PATIENCE)
        host.says(key, abi.OP_RESPONSE)
        assert sock.recv(100) == f"OK {key.peer_port}\n".encode()
        os.write(host.fd_of(key), b"hello")
        assert sock.recv(100) == b"hello"
        shut(host, [key])
        assert sock.recv(100) == b""


def test_nothing_behind_the_newline_is_taken(host: PlainHost, path: Path) -> None:
    with client(path) as sock:
        sock.sendall(b"CONNECT 7\nGET / HTTP/1.0\n\n")
        key = host.asked()
        host.says(key, abi.OP_RESPONSE)
        assert os.read(host.fd_of(key), 100) == b"GET / HTTP/1.0\n\n"


def test_the_line_may_come_in_pieces(host: PlainHost, path: Path) -> None:
    with client(path) as sock:
        for piece in (b"CON", b"NECT ", b"12"):
            sock.sendall(piece)
            host.turn()
        sock.sendall(b"34\nrest")
        key = host.asked()
        assert key.guest_port == 1234
        host.says(key, abi.OP_RESPONSE)
        assert os.read(host.fd_of(key), 100) == b"rest"


@pytest.mark.parametrize(
    "line",
    [
        b"CONNECT\n",
        b"CONNECT 1 2\n",
        b"CONNECT -1\n",
        b"CONNECT x\n",
        b"CONNECT 4294967295\n",
        b"HELLO 1\n",
        b"\n",
        b"\0\xff\n",
        b"CONNECT 1" + bytes(40),
        b"x" * 10_000,
    ],
)
def test_who_says_something_else_is_cut_off_and_nobody_else(host: PlainHost, path: Path, line: bytes) -> None:
    with client(path) as bad, client(path) as good:
        bad.sendall(line)
        good.sendall(b"CONNECT 1\n")
        key = host.asked()
        assert key.guest_port == 1
        host.turn()
        with pytest.raises((ConnectionResetError, IndexError)):
            # What was not read of it makes its end a reset.
            bad.recv(1)[0]
        host.says(key, abi.OP_RESPONSE)
        assert good.recv(100).startswith(b"OK ")


def test_who_forgets_the_newline_is_cut_off_in_time(path: Path) -> None:
    with PlainHost(UnixEnds(path, patience=0.05)) as host, client(path) as sock, client(path) as dumb:
        sock.sendall(b"CONNECT 1234")
        sock.setblocking(False)
        dumb.setblocking(False)

        def over(which: socket.socket) -> bool:
            try:
                return which.recv(1) == b""
            except BlockingIOError:
                return False

        host.until(lambda: over(sock), "its end")
        host.until(lambda: over(dumb), "its end")
        assert len(host.connections) == 0


def test_a_client_that_goes_away_before_it_has_spoken(host: PlainHost, path: Path) -> None:
    with client(path) as sock:
        sock.sendall(b"CONN")
    host.turn()
    with client(path) as sock:
        sock.sendall(b"CONNECT 3\n")
        assert host.asked().guest_port == 3


def test_a_client_that_goes_away_while_the_guest_thinks(host: PlainHost, path: Path) -> None:
    with client(path) as sock:
        sock.sendall(b"CONNECT 3\n")
        key = host.asked()
    assert host.answer(key) == RST
    assert len(host.connections) == 0


def test_a_client_that_only_has_nothing_more_to_say_waits(host: PlainHost, path: Path) -> None:
    with client(path) as sock:
        sock.sendall(b"CONNECT 3\nquestion")
        sock.shutdown(socket.SHUT_WR)
        key = host.asked()
        host.turn()
        host.says(key, abi.OP_RESPONSE)
        assert os.read(host.fd_of(key), 100) == b"question"
        assert os.read(host.fd_of(key), 100) == b""
        host.tell("eof", key)
        assert host.answer(key) == (abi.OP_SHUTDOWN, abi.SHUTDOWN_SEND)
        os.write(host.fd_of(key), b"answer")
        assert sock.recv(100) == f"OK {key.peer_port}\nanswer".encode()


def test_a_refusal_ends_the_clients_connection(host: PlainHost, path: Path) -> None:
    with client(path) as sock:
        sock.sendall(b"CONNECT 3\n")
        host.says(host.asked(), abi.OP_RST)
        assert sock.recv(100) == b""


def test_silence_of_the_guest_does_as_well(host: PlainHost, path: Path) -> None:
    with client(path) as sock:
        sock.sendall(b"CONNECT 3\n")
        host.asked()
        host.now += 3
        host.connections.tick()
        host.settle()
        assert sock.recv(100) == b""


def test_of_many_silent_ones_the_oldest_goes(path: Path) -> None:
    with PlainHost(UnixEnds(path, unanswered=3)) as host, ExitStack() as stack:
        silent = [stack.enter_context(client(path)) for _ in range(5)]
        host.turn()
        assert [sock.recv(1) for sock in silent[:2]] == [b"", b""]
        silent[2].sendall(b"CONNECT 9\n")
        assert host.asked().guest_port == 9


def test_who_comes_when_there_is_no_descriptor_left_waits(
    host: PlainHost, path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(unix, "_SHORTAGE", 0.01)
    with client(path) as sock:
        sock.sendall(b"CONNECT 3\n")
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        lowest = os.dup(0)
        os.close(lowest)
        resource.setrlimit(resource.RLIMIT_NOFILE, (lowest, hard))
        try:
            host.turn()
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        assert "a client can't be let in" in caplog.text
        assert host.asked().guest_port == 3


def test_a_client_that_cannot_be_waited_for_is_cut_off(
    host: PlainHost, path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with client(path) as sock, client(path) as next_one:
        with monkeypatch.context() as full:
            full.setattr(host.poller, "register", refuse)
            host.turn()
        assert sock.recv(1) == next_one.recv(1) == b""
        assert "is cut off: No space left on device" in caplog.text
    with client(path) as sock:
        sock.sendall(b"CONNECT 3\n")
        assert host.asked().guest_port == 3


def test_seqpacket_has_a_socket_of_its_own(host: PlainHost, path: Path) -> None:
    with client(Path(f"{path}.seqpacket"), socket.SOCK_SEQPACKET) as sock:
        sock.send(b"CONNECT 77")
        sock.send(b"a message")
        key = host.asked()
        assert (key.type, key.guest_port) == (abi.TYPE_SEQPACKET, 77)
        host.says(key, abi.OP_RESPONSE)
        assert sock.recv(100) == f"OK {key.peer_port}\n".encode()
        assert os.read(host.fd_of(key), 100) == b"a message"


def test_a_first_message_that_is_too_long(host: PlainHost, path: Path) -> None:
    with client(Path(f"{path}.seqpacket"), socket.SOCK_SEQPACKET) as sock:
        sock.send(b"CONNECT 77" + b" " * 30)
        host.turn()
        assert sock.recv(100) == b""


def test_an_empty_message_is_not_the_end(host: PlainHost, path: Path) -> None:
    with client(Path(f"{path}.seqpacket"), socket.SOCK_SEQPACKET) as sock:
        sock.send(b"CONNECT 77\n")
        key = host.asked()
        host.says(key, abi.OP_RESPONSE)
        fd = host.fd_of(key)
        assert sock.recv(100).startswith(b"OK ")
        sock.send(b"")
        assert os.read(fd, 10) == b""
        host.tell("eof", key)
        assert host.carrier.asked[-1] == "message"
        sock.send(b"")
        sock.send(b"last")
        sock.close()
        assert os.read(fd, 10) == b""
        host.tell("eof", key)
        assert host.carrier.asked[-1] == "message"
        assert (os.read(fd, 10), os.read(fd, 10)) == (b"last", b"")
        host.tell("eof", key)
        assert host.answer(key) == (abi.OP_SHUTDOWN, BOTH)


# --- what the guest asks for -------------------------------------------------------------------------------


def service(path: Path, port: int, kind: int = socket.SOCK_STREAM, backlog: int = 8) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, kind)
    sock.settimeout(PATIENCE)
    sock.bind(f"{path}_{port}")
    sock.listen(backlog)
    return sock


@pytest.mark.parametrize("kind", [abi.TYPE_STREAM, abi.TYPE_SEQPACKET])
def test_the_guest_reaches_a_socket_named_by_the_port(host: PlainHost, path: Path, kind: int) -> None:
    sockets = {abi.TYPE_STREAM: socket.SOCK_STREAM, abi.TYPE_SEQPACKET: socket.SOCK_SEQPACKET}
    with service(path, 52, sockets[kind]) as listener:
        key = host.connected(52, kind)
        sock, _ = listener.accept()
        with sock:
            os.write(host.fd_of(key), b"from the guest")
            assert sock.recv(100) == b"from the guest"
            shut(host, [key])
            assert sock.recv(100) == b""


def test_a_port_without_a_socket_is_refused(host: PlainHost) -> None:
    assert host.answer(host.request(53)) == RST


def test_a_socket_that_nobody_listens_on_is_refused(host: PlainHost, path: Path) -> None:
    service(path, 54).close()
    assert host.answer(host.request(54)) == RST


def test_a_socket_of_the_other_kind_is_refused(host: PlainHost, path: Path) -> None:
    with service(path, 55):
        assert host.answer(host.request(55, type_=abi.TYPE_SEQPACKET)) == RST


def test_another_cid_than_the_hosts_is_not_the_hosts(host: PlainHost, path: Path) -> None:
    with service(path, 56):
        for cid in (0, 1, 3, 52):
            assert host.answer(host.request(56, cid)) == RST


def test_a_service_with_its_hands_full_is_waited_for(host: PlainHost, path: Path) -> None:
    with service(path, 57, backlog=0) as listener:
        first, second = host.connected(57), host.request(57)
        host.turn()
        assert host.carrier.table.keys() == {first, second}
        listener.accept()[0].close()
        assert host.answer(second) == RESPONSE


def test_a_guest_that_waits_no_longer(host: PlainHost, path: Path) -> None:
    with service(path, 58, backlog=0):
        host.connected(58)
        key = host.request(58)
        host.now += 3
        host.connections.tick()
        assert host.answer(key) == RST
        key = host.request(58)
        host.says(key, abi.OP_RST)
        assert key not in host.carrier.table


def test_what_the_guest_shuts_down_the_service_sees(host: PlainHost, path: Path) -> None:
    with service(path, 59) as listener:
        key = host.connected(59)
        sock, _ = listener.accept()
        with sock:
            host.says(key, abi.OP_SHUTDOWN, abi.SHUTDOWN_SEND)
            assert sock.recv(1) == b""
            sock.send(b"still heard")
            assert os.read(host.fd_of(key), 100) == b"still heard"
            host.says(key, abi.OP_SHUTDOWN, abi.SHUTDOWN_RCV)
            with pytest.raises(BrokenPipeError):
                sock.send(b"not heard")


# --- files -------------------------------------------------------------------------------------------------


def test_files_go_with_the_device(path: Path) -> None:
    with PlainHost(UnixEnds(path)):
        assert stat.S_ISSOCK(path.stat().st_mode)
        assert Path(f"{path}.seqpacket").exists()
    assert list(path.parent.iterdir()) == []


def test_what_a_killed_process_has_left_is_replaced(path: Path) -> None:
    for name, kind in ((str(path), socket.SOCK_STREAM), (f"{path}.seqpacket", socket.SOCK_SEQPACKET)):
        with socket.socket(socket.AF_UNIX, kind) as stale:
            stale.bind(name)
    with PlainHost(UnixEnds(path)) as host, client(path) as sock:
        sock.sendall(b"CONNECT 1\n")
        host.asked()


@pytest.mark.parametrize("suffix", ["", ".seqpacket"])
def test_another_ones_socket_is_left_alone(path: Path, suffix: str) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as other:
        other.bind(f"{path}{suffix}")
        other.listen(1)
        with pytest.raises(OSError, match="listens there already"):
            PlainHost(UnixEnds(path))
    assert [file.name for file in path.parent.iterdir()] == [f"{path.name}{suffix}"]


def test_a_file_is_left_alone(path: Path) -> None:
    path.write_text("mine")
    with pytest.raises(FileExistsError):
        PlainHost(UnixEnds(path))
    assert path.read_text() == "mine"


def test_a_path_that_leaves_no_room_for_a_port() -> None:
    with pytest.raises(OSError, match="107 bytes"):
        UnixEnds("/tmp/" + "x" * 95)
