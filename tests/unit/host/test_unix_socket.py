"""Sockets with a file: whose they are, who may use them, who is at the other end."""

from __future__ import annotations

import errno
import os
import socket
import stat
from pathlib import Path

import pytest

from pyvhost.host import unix_socket


def connected(path: Path) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX)
    sock.connect(str(path))
    return sock


def test_the_file_has_its_mode_from_the_first_moment(tmp_path: Path) -> None:
    path = tmp_path / "a.sock"
    sock, own = unix_socket.listen(str(path), 0o600)
    with sock:
        found = path.stat()
        assert stat.S_IMODE(found.st_mode) == 0o600
        assert own == (found.st_dev, found.st_ino)


def test_one_that_nobody_listens_on_is_replaced_and_one_in_use_is_not(tmp_path: Path) -> None:
    path = tmp_path / "a.sock"
    sock, _ = unix_socket.listen(str(path))
    with pytest.raises(OSError, match=rf"pid {os.getpid()}\) listens there already") as caught:
        unix_socket.listen(str(path))
    assert caught.value.errno == errno.EADDRINUSE
    sock.close()
    again, own = unix_socket.listen(str(path))
    with again, connected(path):
        unix_socket.remove(str(path), (own[0], own[1] + 1))
        assert path.exists(), "another's"
        unix_socket.remove(str(path), own)
        assert not path.exists()
        unix_socket.remove(str(path), own)


def test_what_is_no_socket_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "notes"
    path.write_text("mine")
    with pytest.raises(OSError, match="is not a socket"):
        unix_socket.listen(str(path))
    assert path.read_text() == "mine"
    with pytest.raises(OSError, match="107 bytes at most, this one 200"):
        unix_socket.listen("x" * 200)


def test_who_is_at_the_other_end() -> None:
    one, other = socket.socketpair()
    with one, other:
        assert unix_socket.peer_pid(one) == os.getpid()
        assert unix_socket.peer_uid(one) == os.geteuid()
        assert f"(pid {os.getpid()})" in unix_socket.peer_of(one)
