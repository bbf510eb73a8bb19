"""Descriptors on their way over a Unix socket: all arrive, or none stays open."""

from __future__ import annotations

import errno
import os
import resource
import socket
from collections.abc import Iterator

import pytest

from pyvhost.host import fds
from pyvhost.host.fds import Fd

Pair = tuple[socket.socket, socket.socket]


@pytest.fixture
def pair() -> Iterator[Pair]:
    here, there = socket.socketpair()
    with here, there:
        yield here, there


def open_fds() -> set[str]:
    return set(os.listdir("/proc/self/fd"))


def test_bytes_and_descriptors_arrive_together(pair: Pair) -> None:
    reader, writer = os.pipe()
    assert fds.send(pair[0], b"take these", [reader, writer]) == 10
    data, received = fds.recv(pair[1], 100, 2)
    assert data == b"take these"
    assert len(received) == 2
    assert not any(os.get_inheritable(fd) for fd in received)
    os.write(received[1], b"through the copy")
    assert os.read(reader, 100) == b"through the copy"
    fds.close_all([reader, writer, *received])


def test_without_descriptors_and_at_the_end(pair: Pair) -> None:
    fds.send(pair[0], b"bytes")
    assert fds.recv(pair[1], 100, 0) == (b"bytes", [])
    pair[0].close()
    assert fds.recv(pair[1], 100) == (b"", [])


@pytest.mark.parametrize("sent", [2, 3, 8])
def test_more_than_expected_are_closed_and_refused(pair: Pair, sent: int) -> None:
    """Two where one is expected would fit into the room for one, which is rounded up."""
    before = open_fds()
    fds.send(pair[0], b"x", [0] * sent)
    with pytest.raises(OSError, match="more descriptors") as caught:
        fds.recv(pair[1], 100, 1)
    assert caught.value.errno == errno.EMSGSIZE
    assert open_fds() == before


def test_more_than_may_be_open_are_closed_and_refused(pair: Pair) -> None:
    before = open_fds()
    fds.send(pair[0], b"x", [0] * 8)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    # Room for three more.
    free = sorted(set(range(1024)) - {int(fd) for fd in before})
    resource.setrlimit(resource.RLIMIT_NOFILE, (free[3], hard))
    try:
        with pytest.raises(OSError, match="more descriptors"):
            fds.recv(pair[1], 100, 8)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert open_fds() == before


def test_a_peer_that_is_gone_is_an_error_and_no_signal(pair: Pair) -> None:
    pair[1].close()
    with pytest.raises(BrokenPipeError):
        fds.send(pair[0], b"x")


def test_an_owned_descriptor_is_closed_once() -> None:
    number = os.open("/dev/null", os.O_RDONLY)
    with Fd(number) as owned:
        assert owned.fileno() == number
    assert owned.closed
    with pytest.raises(OSError, match="closed"):
        owned.fileno()

    again = os.open("/dev/null", os.O_RDONLY)
    assert again == number
    owned.close()
    os.fstat(again)
    os.close(again)


def test_a_forgotten_one_is_closed_and_a_detached_one_is_not() -> None:
    forgotten = os.open("/dev/null", os.O_RDONLY)
    owned = Fd(forgotten)
    del owned
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(forgotten)

    kept = Fd(os.open("/dev/null", os.O_RDONLY)).detach()
    os.fstat(kept)
    os.close(kept)


def test_a_negative_number_is_nothing_to_own() -> None:
    with pytest.raises(OSError, match="no descriptor"):
        Fd(-1)


def test_the_limit_is_raised_as_far_as_it_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (500, hard))
        assert fds.room_for(400) == 500
        assert fds.room_for(600) == 600
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (600, hard)
        if hard != resource.RLIM_INFINITY:
            assert fds.room_for(hard + 1) == hard
        resource.setrlimit(resource.RLIMIT_NOFILE, (500, hard))
        with monkeypatch.context() as may_not:
            may_not.setattr(resource, "setrlimit", refuse)
            assert fds.room_for(600) == 500
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
