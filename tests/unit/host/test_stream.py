"""The one peer on a stream socket: found, lost, found again, from either side."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from pyvhost.host import stream
from pyvhost.host.poller import Poller, Timer
from pyvhost.host.stream import Role, StreamPeer


class Seen:
    """What `on_change` found, and a way to run the loop until it finds something."""

    def __init__(self, poller: Poller) -> None:
        self.poller = poller
        self.peer: StreamPeer
        self.fds: list[int] = []

    def __call__(self) -> None:
        self.fds.append(self.peer.fd)
        self.poller.stop()

    def next(self) -> int:
        """The descriptor after the next change."""
        before = len(self.fds)
        guard = self.poller.call_later(30, self.poller.stop)
        self.poller.run()
        guard.cancel()
        assert len(self.fds) > before, "it was told of no change"
        return self.fds[-1]


@pytest.fixture
def seen(poller: Poller) -> Seen:
    return Seen(poller)


def peer_at(path: Path, role: Role, seen: Seen) -> StreamPeer:
    seen.peer = StreamPeer(str(path), role, seen.poller, seen)
    return seen.peer


def listener_at(path: Path) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.bind(str(path))
    sock.listen(1)
    return sock


def connect_to(path: Path) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.connect(str(path))
    return sock


@pytest.mark.parametrize("role", [Role.AUTO, Role.CONNECT])
def test_somebody_listens_and_is_connected_to_at_once(tmp_path: Path, seen: Seen, role: Role) -> None:
    with listener_at(tmp_path / "s") as listener:
        peer = peer_at(tmp_path / "s", role, seen)
        peer.open()
        assert peer.fd >= 0
        assert not os.get_blocking(peer.fd)
        assert not os.get_inheritable(peer.fd)
        there, _ = listener.accept()
        with there:
            os.write(peer.fd, b"hello")
            assert there.recv(10) == b"hello"
        peer.close()
        assert peer.fd == -1
    assert (tmp_path / "s").exists(), "the other's socket was removed"
    assert seen.fds == []


@pytest.mark.parametrize("role", [Role.AUTO, Role.LISTEN])
def test_nobody_listens_so_it_does_until_it_is_closed(tmp_path: Path, seen: Seen, role: Role) -> None:
    peer = peer_at(tmp_path / "s", role, seen)
    peer.open()
    assert peer.fd == -1
    with connect_to(tmp_path / "s") as there:
        assert seen.next() >= 0
        os.write(peer.fd, b"hello")
        assert there.recv(10) == b"hello"
    peer.close()
    assert not (tmp_path / "s").exists()


def test_a_peer_that_leaves_is_noticed_and_the_next_one_taken(tmp_path: Path, seen: Seen) -> None:
    peer = peer_at(tmp_path / "s", Role.LISTEN, seen)
    peer.open()
    for greeting in (b"one", b"two"):
        with connect_to(tmp_path / "s") as there:
            assert seen.next() >= 0
            os.write(peer.fd, greeting)
            assert there.recv(10) == greeting
        assert seen.next() == -1
    peer.close()


def test_a_second_peer_waits_for_the_first_to_leave(tmp_path: Path, seen: Seen) -> None:
    peer = peer_at(tmp_path / "s", Role.LISTEN, seen)
    peer.open()
    first = connect_to(tmp_path / "s")
    seen.next()
    with connect_to(tmp_path / "s") as second:
        seen.poller.run_once(0)
        assert len(seen.fds) == 1
        first.close()
        assert seen.next() == -1
        assert seen.next() >= 0
        os.write(peer.fd, b"second")
        assert second.recv(10) == b"second"
    peer.close()


def test_what_a_peer_sent_before_it_left_can_still_be_read(tmp_path: Path, seen: Seen) -> None:
    peer = peer_at(tmp_path / "s", Role.LISTEN, seen)
    peer.open()
    there = connect_to(tmp_path / "s")
    fd = seen.next()
    there.send(b"last words")
    there.close()
    for _ in range(3):
        seen.poller.run_once(0)
    assert peer.fd == fd
    assert os.read(fd, 100) == b"last words"
    assert os.read(fd, 100) == b""
    peer.drop()
    assert peer.fd == -1
    peer.close()


def test_a_new_peer_does_not_wait_until_the_last_words_are_read(tmp_path: Path, seen: Seen) -> None:
    """Nobody may be reading: a guest that has not booted."""
    peer = peer_at(tmp_path / "s", Role.LISTEN, seen)
    peer.open()
    there = connect_to(tmp_path / "s")
    seen.next()
    there.send(b"last words")
    there.close()
    with connect_to(tmp_path / "s") as there:
        assert seen.next() >= 0
        os.write(peer.fd, b"new")
        assert there.recv(10) == b"new"
    assert seen.next() == -1
    peer.close()


def test_the_former_descriptor_is_open_until_the_change_was_told(tmp_path: Path, poller: Poller) -> None:
    """A worker may be using it, and its number must not become another file's meanwhile."""
    told: list[bool] = []

    def on_change() -> None:
        if peer.fd >= 0:
            former.append(peer.fd)
        else:
            os.fstat(former[0])
            told.append(True)
        poller.stop()

    former: list[int] = []
    peer = StreamPeer(str(tmp_path / "s"), Role.LISTEN, poller, on_change)
    peer.open()
    with connect_to(tmp_path / "s"):
        poller.run()
        peer.drop()
    assert told == [True]
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(former[0])
    peer.close()


def test_a_listener_that_is_not_there_yet_is_tried_again(tmp_path: Path, seen: Seen) -> None:
    peer = peer_at(tmp_path / "s", Role.CONNECT, seen)
    peer.open()
    assert peer.fd == -1
    with listener_at(tmp_path / "s"):
        assert seen.next() >= 0
    peer.close()


def test_a_listener_that_goes_away_is_dialled_again(tmp_path: Path, seen: Seen) -> None:
    listener = listener_at(tmp_path / "s")
    peer = peer_at(tmp_path / "s", Role.AUTO, seen)
    peer.open()
    there, _ = listener.accept()
    there.close()
    listener.close()
    assert seen.next() == -1
    os.unlink(tmp_path / "s")
    with listener_at(tmp_path / "s"):
        assert seen.next() >= 0
    peer.close()


def test_a_socket_left_behind_is_replaced(tmp_path: Path, seen: Seen) -> None:
    listener_at(tmp_path / "s").close()
    peer = peer_at(tmp_path / "s", Role.AUTO, seen)
    peer.open()
    with connect_to(tmp_path / "s"):
        assert seen.next() >= 0
    peer.close()


def test_a_path_that_is_in_use_is_left_alone(tmp_path: Path, seen: Seen) -> None:
    with listener_at(tmp_path / "s"):
        peer = peer_at(tmp_path / "s", Role.LISTEN, seen)
        with pytest.raises(OSError, match=r"listening at .*in use") as caught:
            peer.open()
        assert caught.value.errno == errno.EADDRINUSE
        connect_to(tmp_path / "s").close()

    (tmp_path / "file").write_text("precious")
    with pytest.raises(OSError, match="in use"):
        peer_at(tmp_path / "file", Role.AUTO, seen).open()
    assert (tmp_path / "file").read_text() == "precious"


def test_a_socket_that_another_put_at_the_path_is_not_removed(tmp_path: Path, seen: Seen) -> None:
    peer = peer_at(tmp_path / "s", Role.LISTEN, seen)
    peer.open()
    os.unlink(tmp_path / "s")
    with listener_at(tmp_path / "s"):
        peer.close()
        assert (tmp_path / "s").exists()


def test_a_failing_listener_of_the_change_loses_no_peer(
    tmp_path: Path, poller: Poller, caplog: pytest.LogCaptureFixture
) -> None:
    calls: list[int] = []

    def on_change() -> None:
        calls.append(peer.fd)
        poller.stop()
        raise RuntimeError("the device is on fire")

    peer = StreamPeer(str(tmp_path / "s"), Role.LISTEN, poller, on_change)
    peer.open()
    with connect_to(tmp_path / "s"):
        poller.run()
        with connect_to(tmp_path / "s"):  # waits, as it would if nothing had failed
            poller.run_once(0)
            assert len(calls) == 1
    poller.run()
    poller.run()
    assert [fd >= 0 for fd in calls] == [True, False, True]
    assert "the device is on fire" in caplog.text
    peer.close()


def test_a_listener_whose_backlog_is_full_is_still_a_listener(tmp_path: Path, seen: Seen) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(str(tmp_path / "s"))
        listener.listen(0)
        waiting = connect_to(tmp_path / "s")
        peer = peer_at(tmp_path / "s", Role.AUTO, seen)
        peer.open()
        assert (peer.fd, peer.role) == (-1, Role.CONNECT)
        listener.accept()[0].close()
        waiting.close()
        assert seen.next() >= 0
        peer.close()


def test_paths_that_can_not_be(tmp_path: Path, seen: Seen) -> None:
    with pytest.raises(OSError, match="107 bytes") as caught:
        peer_at(tmp_path / ("x" * 107), Role.AUTO, seen).open()
    assert caught.value.errno == errno.ENAMETOOLONG
    with pytest.raises(ValueError, match="no path"):
        StreamPeer("", Role.AUTO, seen.poller, seen).open()
    with pytest.raises(OSError, match="No such file"):
        peer_at(tmp_path / "absent" / "s", Role.AUTO, seen).open()


def test_the_wait_between_attempts_grows_to_a_limit(
    tmp_path: Path, poller: Poller, monkeypatch: pytest.MonkeyPatch
) -> None:
    delays: list[float] = []
    later = poller.call_later

    def at_once(delay: float, function: Callable[[], object]) -> Timer:
        delays.append(delay)
        return later(0, function)

    monkeypatch.setattr(poller, "call_later", at_once)
    peer = StreamPeer(str(tmp_path / "s"), Role.CONNECT, poller, lambda: None)
    peer.open()
    while len(delays) < 8:
        poller.run_once()
    assert delays == [0.1, 0.2, 0.4, 0.8, 1.6, 2.0, 2.0, 2.0]
    assert delays[-1] == stream.RETRY_MOST
    peer.close()
