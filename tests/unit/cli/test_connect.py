"""`pyvhost connect`: in between a guest's port and standard input and output."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PATIENCE = 60


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "v"


@pytest.fixture
def listener(path: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        listener.settimeout(PATIENCE)
        yield listener


def started(path: Path, port: str = "22") -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "pyvhost.cli.main", "connect", str(path), port]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe)


def asked(listener: socket.socket) -> socket.socket:
    sock, _ = listener.accept()
    sock.settimeout(PATIENCE)
    line = b""
    while not line.endswith(b"\n"):
        line += sock.recv(1)
    assert line == b"CONNECT 22\n"
    return sock


def test_it_is_in_between(path: Path, listener: socket.socket) -> None:
    question, answer = os.urandom(300_000), os.urandom(100_000)
    with started(path) as child, asked(listener) as sock:
        sock.sendall(b"OK 1024\nSSH-2.0\r\n")
        assert child.stdin is not None
        assert child.stdout is not None
        assert child.stdout.readline() == b"SSH-2.0\r\n"
        child.stdin.write(question)
        child.stdin.close()
        heard = b""
        while more := sock.recv(1 << 16):
            heard += more
        assert heard == question
        sock.sendall(answer)
        sock.close()
        assert child.stdout.read() == answer
        assert child.wait(PATIENCE) == 0


def test_it_ends_with_the_guest(path: Path, listener: socket.socket) -> None:
    with started(path) as child:
        with asked(listener) as sock:
            sock.sendall(b"OK 1024\n")
        # Its standard input is still open.
        assert child.wait(PATIENCE) == 0
        assert child.stdout is not None
        assert child.stdout.read() == b""


@pytest.mark.parametrize("says", [b"", b"x" * 100])
def test_a_port_that_is_refused(path: Path, listener: socket.socket, says: bytes) -> None:
    with started(path) as child:
        with asked(listener) as sock:
            sock.sendall(says)
        _, error = child.communicate(timeout=PATIENCE)
        assert child.returncode == 1
        assert error == b"pyvhost: port 22 of the guest: connection refused\n"


def test_nobody_there(path: Path) -> None:
    with started(path) as child:
        _, error = child.communicate(timeout=PATIENCE)
        assert child.returncode == 1
        assert (
            error.decode()
            == f"pyvhost: {path}: No such file or directory; does `pyvhost vsock --uds-path` serve it?\n"
        )
