"""The server: who is let in, who is turned away, and that one front end's end is nobody else's."""

from __future__ import annotations

import errno
import logging
import mmap
import os
import signal
import socket
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pyvhost.abi import vhost_user as abi
from pyvhost.abi.vhost_user import BackendRequest, Request
from pyvhost.dataplane import guard
from pyvhost.dataplane.plain import load16
from pyvhost.host import memfd
from pyvhost.vhost_user import server as server_module
from pyvhost.vhost_user.codec import Decoder, Message, Stream, decode_one, encode
from pyvhost.vhost_user.describe import TRACE
from pyvhost.vhost_user.hints import private_memory
from pyvhost.vhost_user.payloads import (
    U64,
    Config,
    MemReg,
    MemTable,
    Payload,
    Region,
    VringAddr,
    VringFile,
    VringState,
)
from pyvhost.vhost_user.server import Server
from recording_device import FEATURES, InertDevice, RecordingDevice, is_open, no_fd_leaks, spare_fd

BIT_30 = 1 << abi.F_PROTOCOL_FEATURES


@pytest.fixture(autouse=True, scope="module")
def memory_guard() -> None:
    """Its one descriptor is the process's for good: made before descriptors are counted."""
    guard.install()


@pytest.fixture
def device() -> RecordingDevice:
    return RecordingDevice()


@pytest.fixture
def server() -> Iterator[Server]:
    with no_fd_leaks(), Server() as server:
        yield server


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "vm0.sock")


def until(server: Server, condition: Callable[[], object]) -> None:
    """Let the loop go round until something is so; a loop that hangs fails by its own silence."""
    for _ in range(200):
        if condition():
            return
        server.poller.run_once(1.0)
    raise AssertionError("it did not come to that")


def until_resets(server: Server, device: RecordingDevice, count: int) -> None:
    """Let the loop go round until the device has seen `count` front ends leave."""
    until(server, lambda: device.resets == count)


class Front:
    """A front end's socket."""

    def __init__(self, server: Server, sock: socket.socket) -> None:
        self.server = server
        self.sock = sock
        sock.setblocking(False)
        self.decoder = Decoder(Stream.REPLY)

    @classmethod
    def at(cls, server: Server, path: str) -> Front:
        sock = socket.socket(socket.AF_UNIX)
        sock.connect(path)
        return cls(server, sock)

    def send(self, data: bytes, fds: list[int] | None = None) -> None:
        """The descriptors are given away."""
        if fds:
            socket.send_fds(self.sock, [data], fds)
            for fd in fds:
                os.close(fd)
        else:
            self.sock.sendall(data)

    def reply(self) -> Message | None:
        """The next reply if it is there by now."""
        while True:
            try:
                data = self.sock.recv(self.decoder.wanted)
            except BlockingIOError:
                return None
            assert data, "the connection ended instead"
            message = self.decoder.feed(data)
            if message is not None:
                return message

    def ask(self, request: int, payload: Payload | None = None, *, flags: int = 0) -> Payload | None:
        self.send(encode(request, payload, flags=flags))
        found: list[Message] = []

        def answered() -> bool:
            message = self.reply()
            if message is not None:
                found.append(message)
            return bool(found)

        until(self.server, answered)
        return found[0].payload

    def gone(self) -> bool:
        """Whether the back end has closed the connection."""
        try:
            return self.sock.recv(1) == b""
        except BlockingIOError:
            return False
        except ConnectionError:
            return True

    def close(self) -> None:
        self.sock.close()


@pytest.fixture
def front(server: Server, device: RecordingDevice, path: str) -> Iterator[Front]:
    """One that is attached."""
    server.listen(path, device)
    front = Front.at(server, path)
    assert front.ask(Request.GET_FEATURES) == U64(FEATURES | BIT_30)
    yield front
    front.close()
    until_resets(server, device, 1)


def hello(server: Server, path: str) -> Front:
    front = Front.at(server, path)
    assert front.ask(Request.GET_FEATURES) == U64(FEATURES | BIT_30)
    return front


# --- coming and going ------------------------------------------------------------------------------


def test_many_front_ends_come_and_go_and_each_finds_the_device_as_new(
    server: Server, device: RecordingDevice, path: str
) -> None:
    server.listen(path, device)
    for count in range(1, 6):
        front = hello(server, path)
        front.send(encode(Request.SET_VRING_KICK, VringFile(0)), [spare_fd()])
        front.close()
        until_resets(server, device, count)
    assert len(device.called("set_owner")) == 5
    assert device.poller is server.poller


def test_a_message_in_pieces_is_put_together(server: Server, device: RecordingDevice, front: Front) -> None:
    data = encode(Request.SET_VRING_NUM, VringState(1, 256)) + encode(Request.GET_QUEUE_NUM)
    for byte in data[:-1]:
        front.send(bytes([byte]))
        server.poller.run_once(1.0)
    front.send(data[-1:])
    until(server, lambda: front.reply() is not None)
    assert device.called("set_vring_num") == [(1, 256)]


def test_messages_in_one_piece_with_the_descriptors_of_the_last_are_told_apart(
    server: Server, device: RecordingDevice, front: Front
) -> None:
    """The kernel hands out what came without descriptors together with what came after."""
    front.send(
        encode(Request.SET_VRING_NUM, VringState(0, 64)) + encode(Request.SET_VRING_BASE, VringState(0, 0))
    )
    front.send(encode(Request.SET_VRING_CALL, VringFile(0)), [spare_fd()])
    front.send(encode(Request.SET_VRING_ERR, VringFile(0)), [spare_fd()])
    assert front.ask(Request.GET_QUEUE_NUM) == U64(4)
    assert [c[0] for c in device.calls[-4:]] == [
        "set_vring_num",
        "set_vring_base",
        "set_vring_call",
        "set_vring_err",
    ]


def test_a_front_ends_fault_ends_its_connection_alone_and_is_logged_with_its_numbers(
    server: Server, path: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    one, two = RecordingDevice("net0"), RecordingDevice("net1")
    other_path = str(tmp_path / "vm1.sock")
    server.listen(path, one)
    server.listen(other_path, two)
    bad, good = hello(server, path), hello(server, other_path)
    bad.send(encode(Request.SET_VRING_NUM, VringState(99, 256)))
    until(server, bad.gone)
    assert (one.resets, two.resets) == (1, 0)
    assert good.ask(Request.GET_QUEUE_NUM) == U64(4)
    (record,) = [r for r in caplog.records if r.levelno >= logging.ERROR]
    assert "SET_VRING_NUM index=99 num=256: there is no vring 99" in record.getMessage()
    assert "vm0.sock" in record.getMessage()
    assert f"pid {os.getpid()}" in record.getMessage()
    for front in (bad, good):
        front.close()
    # The device that lost its front end serves the next one.
    hello(server, path).close()


@pytest.mark.parametrize(
    ("data", "count", "words"),
    [
        (b"GET / HTTP/1.1\r\n\r\n", 0, "expected 1"),
        (encode(Request.SET_OWNER), 1, "SET_OWNER: 1 descriptors came with it, expected 0"),
        (encode(Request.SET_MEM_TABLE), 9, "SET_MEM_TABLE: size is 0 bytes, expected 8 to 264"),
        (encode(Request.SET_VRING_KICK, VringFile(0)), 200, "200 descriptors came with it, expected 0 to 1"),
    ],
)
def test_garbage_ends_the_connection_and_leaks_nothing(
    server: Server,
    device: RecordingDevice,
    path: str,
    data: bytes,
    count: int,
    words: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    server.listen(path, device)
    front = Front.at(server, path)
    front.send(data, [spare_fd() for _ in range(count)])
    until(server, front.gone)
    front.close()
    assert words in caplog.text
    assert device.resets == 1


def test_a_front_end_that_leaves_within_a_message_is_a_fault_that_says_so(
    server: Server, device: RecordingDevice, path: str, caplog: pytest.LogCaptureFixture
) -> None:
    server.listen(path, device)
    front = hello(server, path)
    front.send(encode(Request.SET_VRING_CALL, VringFile(0))[:13], [spare_fd()])
    front.close()
    until_resets(server, device, 1)
    assert "SET_VRING_CALL: the connection ended after 13 bytes of it, 7 bytes short" in caplog.text


def test_a_fault_of_this_program_ends_the_connection_and_not_the_process(
    server: Server, device: RecordingDevice, path: str, caplog: pytest.LogCaptureFixture
) -> None:
    server.listen(path, device)
    front = hello(server, path)
    device.refusals["set_vring_num"] = ZeroDivisionError("a bug")  # type: ignore[assignment]
    front.send(encode(Request.SET_VRING_NUM, VringState(0, 1)))
    until(server, front.gone)
    front.close()
    assert "ZeroDivisionError" in caplog.text
    hello(server, path).close()


def test_memory_that_is_lost_ends_the_connection_without_another_word(
    server: Server, device: RecordingDevice, path: str, caplog: pytest.LogCaptureFixture
) -> None:
    server.listen(path, device)
    front = hello(server, path)
    device.lost_memory = True
    assert device.memory_lost is not None
    device.memory_lost()
    until(server, front.gone)
    front.close()
    (record,) = [r for r in caplog.records if r.levelno == logging.ERROR]
    assert "memory file became smaller" in record.getMessage()
    device.lost_memory = False
    hello(server, path).close()


def test_a_front_end_that_shrinks_its_memory_loses_its_connection_and_nobody_else_does(
    server: Server, path: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The real device model: what reads the ring next finds zeros, and the loop is told."""
    one, two = InertDevice(), InertDevice()
    other_path = str(tmp_path / "vm1.sock")
    server.listen(path, one)
    server.listen(other_path, two)
    shrinks, stays = Front.at(server, path), Front.at(server, other_path)
    files = [memfd.create("guest", 1 << 20, seals=0) for _ in range(2)]
    for front, file in zip((shrinks, stays), files, strict=True):
        table = MemTable((Region(0, 1 << 20, 0x10000, 0),))
        front.send(encode(Request.SET_FEATURES, U64(1 << 32 | BIT_30)))
        front.send(encode(Request.SET_MEM_TABLE, table), [os.dup(file)])
        front.send(encode(Request.SET_VRING_NUM, VringState(0, 64)))
        front.send(encode(Request.SET_VRING_ADDR, VringAddr(0, 0, 0x10000, 0x12000, 0x11000)))
        front.send(encode(Request.SET_VRING_KICK, VringFile(0)), [spare_fd()])
        front.send(encode(Request.SET_VRING_ENABLE, VringState(0, 1)))
        front.ask(Request.GET_QUEUE_NUM)
    os.ftruncate(files[0], 0)
    assert load16(int(one.places[0].record["avail"]) + 2) == 0
    until(server, shrinks.gone)
    assert "memory file became smaller" in caplog.text
    assert one.vrings[0].place is None
    assert two.vrings[0].place is not None
    assert stays.ask(Request.GET_VRING_BASE, VringState(0, 0)) == VringState(0, 0)
    for front, file in zip((shrinks, stays), files, strict=True):
        front.close()
        os.close(file)
    until(server, lambda: not two.owned)


def test_a_device_that_cant_be_reset_does_not_keep_the_next_front_end_out(
    server: Server, device: RecordingDevice, path: str, caplog: pytest.LogCaptureFixture
) -> None:
    server.listen(path, device)
    device.refuse("reset")
    hello(server, path).close()
    until(server, lambda: device.called("reset"))
    device.refusals.clear()
    hello(server, path).close()


@pytest.mark.parametrize(
    ("last", "words"),
    [
        (None, "it left without a word"),
        (encode(Request.SET_OWNER), "it left before SET_FEATURES"),
        (encode(Request.SET_FEATURES, U64(BIT_30)), "memory-backend-memfd"),
    ],
)
def test_a_front_end_that_leaves_early_draws_a_hint(
    server: Server,
    device: RecordingDevice,
    path: str,
    last: bytes | None,
    words: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    server.listen(path, device)
    front = Front.at(server, path)
    if last:
        front.send(last)
    front.close()
    until_resets(server, device, 1)
    (record,) = [r for r in caplog.records if r.levelno == logging.WARNING]
    assert words in record.getMessage()


@pytest.mark.parametrize("private", [True, False])
def test_memory_that_the_front_end_maps_privately_draws_a_hint(
    server: Server, front: Front, private: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """The front end is this very process; QEMU does so with share=off."""
    fd = memfd.create("guest", 8192)
    with mmap.mmap(fd, 8192, flags=mmap.MAP_PRIVATE if private else mmap.MAP_SHARED):
        for start in (0, 4096):
            front.send(encode(Request.ADD_MEM_REG, MemReg(Region(start, 4096, start, start))), [os.dup(fd)])
        front.ask(Request.GET_QUEUE_NUM)
    os.close(fd)
    hints = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert len(hints) == int(private)
    assert all("share=on" in hint for hint in hints)


def test_a_front_end_that_cant_be_looked_at_draws_no_hint() -> None:
    fd = memfd.create("guest", 4096)
    assert private_memory(0, [fd]) == ""
    assert private_memory(os.getpid(), [fd]) == ""
    os.close(fd)


# --- one at a time ---------------------------------------------------------------------------------


def test_a_second_front_end_is_turned_away_with_a_line_that_names_both(
    server: Server, device: RecordingDevice, path: str, front: Front, caplog: pytest.LogCaptureFixture
) -> None:
    child = subprocess.Popen(
        [sys.executable, "-c", f"import socket; s = socket.socket(1); s.connect({path!r}); s.recv(1)"]
    )
    until(server, lambda: child.poll() is not None)
    (record,) = [r for r in caplog.records if "turned away" in r.getMessage()]
    assert f"(pid {child.pid}) turned away" in record.getMessage()
    assert f"(pid {os.getpid()}) has net0" in record.getMessage()
    assert front.ask(Request.GET_QUEUE_NUM) == U64(4)


def test_the_end_of_one_that_leaves_is_dealt_with_before_the_next_is_judged(
    server: Server, device: RecordingDevice, path: str
) -> None:
    """Detach and attach again before the loop has looked: both have happened when it does."""
    server.listen(path, device)
    for _ in range(20):
        before = device.resets
        leaving = hello(server, path)
        leaving.send(encode(Request.SET_VRING_NUM, VringState(0, 256)) * 100)
        leaving.close()
        coming = Front.at(server, path)
        assert coming.ask(Request.GET_FEATURES) == U64(FEATURES | BIT_30)
        assert device.resets == before + 1
        coming.close()
        until_resets(server, device, before + 2)


def test_a_front_end_that_reads_nothing_is_not_read_from_and_others_are_served(
    server: Server, device: RecordingDevice, path: str, tmp_path: Path
) -> None:
    other_path = str(tmp_path / "vm1.sock")
    server.listen(path, device)
    server.listen(other_path, RecordingDevice("net1"))
    deaf, other = hello(server, path), hello(server, other_path)
    asked = encode(Request.GET_CONFIG, Config(0, 0, bytes(256)))
    sent = 0
    stuck = False
    while not stuck:
        try:
            sent += deaf.sock.send(asked)
        except BlockingIOError:
            # Full: if the loop takes no more of it either, the back end waits for its replies to be read.
            before = len(device.called("get_config"))
            for _ in range(5):
                server.poller.run_once(0)
            stuck = len(device.called("get_config")) == before
        server.poller.run_once(0)
    assert other.ask(Request.GET_QUEUE_NUM) == U64(4)
    # It reads after all: all that it asked is answered, in order.
    answered: list[Message] = []

    def all_answered() -> bool:
        while (message := deaf.reply()) is not None:
            answered.append(message)
        return len(answered) == sent // len(asked)

    until(server, all_answered)
    deaf.close()
    other.close()
    until_resets(server, device, 1)


def test_a_front_end_that_leaves_with_its_replies_unread_is_let_go(
    server: Server, device: RecordingDevice, path: str
) -> None:
    server.listen(path, device)
    deaf = hello(server, path)
    asked = encode(Request.GET_CONFIG, Config(0, 0, bytes(256)))
    try:
        while True:
            deaf.sock.send(asked)
    except BlockingIOError:
        pass
    for _ in range(50):
        server.poller.run_once(0)
    deaf.close()
    until_resets(server, device, 1)


# --- socket files ----------------------------------------------------------------------------------


def test_a_socket_file_that_nobody_listens_on_is_replaced(
    server: Server, device: RecordingDevice, path: str
) -> None:
    stale = socket.socket(socket.AF_UNIX)
    stale.bind(path)
    stale.close()
    server.listen(path, device)
    hello(server, path).close()


def test_a_socket_that_somebody_listens_on_is_left_alone_and_named(
    server: Server, device: RecordingDevice, path: str
) -> None:
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(path)
        other.listen()
        with pytest.raises(OSError, match=rf"pid {os.getpid()}\) listens there already") as caught:
            server.listen(path, device)
        assert caught.value.errno == errno.EADDRINUSE
        assert os.path.exists(path)


def test_a_file_that_is_no_socket_is_left_alone(server: Server, device: RecordingDevice, path: str) -> None:
    Path(path).write_text("precious")
    with pytest.raises(OSError, match="exists, and is not a socket") as caught:
        server.listen(path, device)
    assert caught.value.errno == errno.EEXIST
    assert Path(path).read_text() == "precious"


def test_a_name_that_is_too_long_is_refused_with_the_limit(server: Server, device: RecordingDevice) -> None:
    for way in (server.listen, server.connect):
        with pytest.raises(OSError, match="107 bytes at most, this one 200") as caught:
            way("/" + "x" * 199, device)
        assert caught.value.errno == errno.ENAMETOOLONG


def test_a_folder_that_isnt_there_is_named(server: Server, device: RecordingDevice, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere/vm0\.sock"):
        server.listen(tmp_path / "nowhere" / "vm0.sock", device)


def test_the_socket_file_goes_with_the_server(device: RecordingDevice, path: str) -> None:
    with Server() as server:
        server.listen(path, device)
        assert os.path.exists(path)
    assert not os.path.exists(path)


def test_a_socket_file_that_has_become_somebody_elses_stays(device: RecordingDevice, path: str) -> None:
    with Server() as server:
        server.listen(path, device)
        os.unlink(path)
        with socket.socket(socket.AF_UNIX) as other:
            other.bind(path)
    assert os.path.exists(path)


# --- dialling, and sockets handed over -------------------------------------------------------------


def test_a_front_end_that_listens_is_dialled_and_dialled_again_when_it_comes_back(
    server: Server, device: RecordingDevice, path: str
) -> None:
    server.connect(path, device)
    server.poller.run_once(1.0)
    for count in range(2):
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(path)
            listener.listen()
            listener.setblocking(False)
            accepted: list[socket.socket] = []

            def arrived(listener: socket.socket = listener, accepted: list[socket.socket] = accepted) -> bool:
                try:
                    accepted.append(listener.accept()[0])
                except BlockingIOError:
                    return False
                return True

            until(server, arrived)
            front = Front(server, accepted[0])
            assert front.ask(Request.GET_FEATURES) == U64(FEATURES | BIT_30)
            front.close()
        until_resets(server, device, count + 1)
        os.unlink(path)


def test_why_nobody_is_reached_is_said_once_not_with_each_attempt(
    server: Server,
    device: RecordingDevice,
    path: str,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(server_module, "DIAL_LONGEST", 0.0)
    server.connect(path, device)
    for _ in range(10):
        server.poller.run_once(1.0)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        for _ in range(10):
            server.poller.run_once(1.0)
    assert [r.getMessage().split(path)[1] for r in caplog.records] == [
        ": no front end listens (No such file or directory); dialling until one does",
        ": no front end listens (Connection refused); dialling until one does",
    ]


def test_a_connected_socket_that_was_handed_over_is_served_and_its_end_is_the_servers(
    device: RecordingDevice,
) -> None:
    with no_fd_leaks():
        ours, theirs = socket.socketpair()
        server = Server()
        server.serve_fd(ours.detach(), device)
        front = Front(server, theirs)
        assert front.ask(Request.GET_QUEUE_NUM) == U64(4)
        front.close()
        server.run()
    assert device.resets == 1


def test_a_listening_socket_that_was_handed_over_serves_one_after_another_and_keeps_its_file(
    device: RecordingDevice, path: str
) -> None:
    with no_fd_leaks(), Server() as server:
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(path)
        listener.listen()
        server.serve_fd(listener.detach(), device)
        for count in (1, 2):
            hello(server, path).close()
            until_resets(server, device, count)
    assert os.path.exists(path)


def test_a_descriptor_that_is_no_unix_socket_is_refused_and_stays_the_callers(
    server: Server, device: RecordingDevice
) -> None:
    with socket.socket(socket.AF_INET) as inet:
        with pytest.raises(OSError, match="is not a Unix stream socket"):
            server.serve_fd(inet.fileno(), device)
        assert is_open(inet.fileno())
    fd = spare_fd()
    with pytest.raises(OSError, match="socket"):
        server.serve_fd(fd, device)
    assert is_open(fd)
    os.close(fd)


# --- the back end's own socket ---------------------------------------------------------------------


def test_a_change_of_the_configuration_reaches_the_front_end_from_any_thread(
    server: Server, device: RecordingDevice, front: Front
) -> None:
    bits = 1 << abi.PROTOCOL_F_CONFIG | 1 << abi.PROTOCOL_F_BACKEND_REQ | 1 << abi.PROTOCOL_F_REPLY_ACK
    theirs, ours = socket.socketpair()
    theirs.setblocking(False)
    front.send(encode(Request.SET_PROTOCOL_FEATURES, U64(bits)))
    front.send(encode(Request.SET_BACKEND_REQ_FD), [ours.detach()])
    front.send(encode(Request.SET_VRING_KICK, VringFile(0)), [spare_fd()])
    front.ask(Request.GET_QUEUE_NUM)

    news: list[bytes] = []

    def told() -> bool:
        try:
            news.append(theirs.recv(100))
        except BlockingIOError:
            return False
        return True

    for _ in range(3):
        assert device.config_changed is not None
        device.config_changed()
        until(server, told)
        message = decode_one(Stream.BACKEND_REQUEST, news[-1])
        assert (message.name, message.need_reply) == ("CONFIG_CHANGE_MSG", True)
        theirs.sendall(encode(BackendRequest.CONFIG_CHANGE_MSG, U64(0), flags=abi.FLAG_REPLY))
    theirs.close()
    assert front.ask(Request.GET_QUEUE_NUM) == U64(4)
    change = device.config_changed
    assert change is not None
    change()
    assert front.ask(Request.GET_QUEUE_NUM) == U64(4)


def test_nonsense_on_the_back_ends_own_socket_closes_it_alone(
    server: Server, device: RecordingDevice, front: Front, caplog: pytest.LogCaptureFixture
) -> None:
    theirs, ours = socket.socketpair()
    front.send(encode(Request.SET_BACKEND_REQ_FD), [ours.detach()])
    front.ask(Request.GET_QUEUE_NUM)
    theirs.sendall(b"x" * 12)
    until(server, lambda: "SET_BACKEND_REQ_FD" in caplog.text)
    assert front.ask(Request.GET_QUEUE_NUM) == U64(4)
    assert theirs.recv(1) == b""
    theirs.close()


def test_the_back_ends_own_socket_is_closed_with_the_connection(
    server: Server, device: RecordingDevice, path: str
) -> None:
    server.listen(path, device)
    front = hello(server, path)
    theirs, ours = socket.socketpair()
    theirs.setblocking(False)
    front.send(encode(Request.SET_BACKEND_REQ_FD), [ours.detach()])
    front.ask(Request.GET_QUEUE_NUM)
    front.close()
    until_resets(server, device, 1)
    assert theirs.recv(1) == b""
    theirs.close()


def test_a_message_under_way_when_the_server_ends_leaves_nothing_open(
    device: RecordingDevice, path: str
) -> None:
    with no_fd_leaks():
        with Server() as server:
            server.listen(path, device)
            front = hello(server, path)
            front.send(encode(Request.SET_VRING_CALL, VringFile(0))[:15], [spare_fd()])
            server.poller.run_once(1.0)
        front.close()
    assert device.resets == 1


def test_the_trace_has_both_sides(
    server: Server, device: RecordingDevice, path: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(TRACE)
    server.listen(path, device)
    hello(server, path).close()
    lines = [r.getMessage() for r in caplog.records if r.levelno == TRACE]
    assert [line.split("): ", 1)[1].split(" 0x")[0] for line in lines] == [
        "front end: GET_FEATURES",
        "back end: GET_FEATURES",
    ]


# --- the end ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_server_with_a_front_end_attached(number: signal.Signals, path: str) -> None:
    program = textwrap.dedent(
        f"""
        import sys
        sys.path[:0] = {sys.path!r}
        from recording_device import RecordingDevice
        from pyvhost.vhost_user.server import Server
        device = RecordingDevice()
        server = Server()
        server.listen({path!r}, device)
        print("ready", flush=True)
        server.run()
        print("resets", device.resets, flush=True)
        """
    )
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n"
        with socket.socket(socket.AF_UNIX) as front:
            front.connect(path)
            front.sendall(encode(Request.GET_FEATURES))
            assert len(front.recv(100)) == 20
            child.send_signal(number)
            assert child.stdout.readline() == "resets 1\n"
    assert child.returncode == 0
    assert not os.path.exists(path)


def test_a_shortage_of_descriptors_pauses_the_listening_socket_and_ends_nothing(path: str) -> None:
    """In a process of its own: the limit is the process's."""
    program = textwrap.dedent(
        f"""
        import resource, socket, sys, logging
        sys.path[:0] = {sys.path!r}
        logging.basicConfig(stream=sys.stdout, format="%(message)s")
        from recording_device import RecordingDevice
        from pyvhost.vhost_user import server as server_module
        server_module.SHORTAGE_PAUSE = 0.0
        server = server_module.Server()
        server.listen({path!r}, RecordingDevice())
        front = socket.socket(socket.AF_UNIX)
        front.connect({path!r})
        limit = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (front.fileno() + 1, limit[1]))
        server.poller.run_once(1)
        resource.setrlimit(resource.RLIMIT_NOFILE, limit)
        front.sendall(bytes.fromhex("010000000100000000000000"))
        front.settimeout(0)
        answer = b""
        while not answer:
            server.poller.run_once(1)
            try:
                answer = front.recv(100)
            except BlockingIOError:
                pass
        print("answered", len(answer))
        """
    )
    done = subprocess.run([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, check=True)
    assert [line.split(": ", 1)[1] for line in done.stdout.splitlines()[:-1]] == [
        "a front end can't be let in: Too many open files"
    ]
    assert done.stdout.endswith("answered 20\n")


def test_more_descriptors_than_may_be_open_end_the_connection(path: str) -> None:
    program = textwrap.dedent(
        f"""
        import os, resource, socket, sys, logging
        sys.path[:0] = {sys.path!r}
        logging.basicConfig(stream=sys.stdout, format="%(message)s")
        from recording_device import RecordingDevice
        from pyvhost.vhost_user.server import Server
        device = RecordingDevice()
        server = Server()
        server.listen({path!r}, device)
        front = socket.socket(socket.AF_UNIX)
        front.connect({path!r})
        server.poller.run_once(1)
        socket.send_fds(front, [bytes.fromhex("010000000100000000000000")], [1] * 8)
        open_now = max(int(fd) for fd in os.listdir("/proc/self/fd"))
        hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (open_now + 2, hard))
        while not device.resets:
            server.poller.run_once(1)
        """
    )
    done = subprocess.run([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, check=True)
    assert "more descriptors came than" in done.stdout
