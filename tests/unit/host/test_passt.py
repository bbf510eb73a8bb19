"""A real passt: started, spoken to, and gone in every way it can go."""

from __future__ import annotations

import os
import select
import signal
import socket
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from netns import network_namespace
from pyvhost.host import passt
from pyvhost.host.passt import Passt
from pyvhost.host.poller import Poller
from requirements import need_program

MAC = bytes.fromhex("525400000001")


@pytest.fixture
def host() -> Iterator[None]:
    """A host with a way out, which passt asks for."""
    need_program("passt")
    with network_namespace() as ip:
        ip("link add name out type veth peer name far")
        ip("addr add 10.9.0.2/24 dev out")
        ip("link set out up")
        ip("link set far up")
        ip("route add default via 10.9.0.1")
        yield


def who_has_the_gateway() -> bytes:
    arp = (
        struct.pack(">HHBBH", 1, 0x0800, 6, 4, 1)
        + MAC
        + bytes([10, 9, 0, 2])
        + bytes(6)
        + bytes([10, 9, 0, 1])
    )
    return b"\xff" * 6 + MAC + b"\x08\x06" + arp


def receive(fd: int, size: int) -> bytes:
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    got = b""
    while len(got) < size:
        assert poll.poll(5000), "passt doesn't answer"
        part = os.read(fd, size - len(got))
        assert part, "passt has gone"
        got += part
    return got


def ask(fd: int) -> bytes:
    """passt's answer to one frame."""
    frame = who_has_the_gateway()
    os.write(fd, struct.pack(">I", len(frame)) + frame)
    while True:
        (length,) = struct.unpack(">I", receive(fd, 4))
        answer = receive(fd, length)
        if answer[12:14] == b"\x08\x06":
            return answer


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.usefixtures("host")
def test_it_answers_for_the_gateway_and_ends_with_close(poller: Poller) -> None:
    child = Passt([], poller, lambda: pytest.fail("ended by itself"))
    before = set(os.listdir("/proc/self/fd"))
    child.start()
    pid = child.pid
    assert not os.get_blocking(child.fd)
    answer = ask(child.fd)
    assert answer[:6] == MAC
    assert struct.unpack_from(">H", answer, 20) == (2,), "an ARP reply"
    assert answer[28:32] == bytes([10, 9, 0, 1])

    child.close()
    assert (child.fd, child.pid) == (-1, -1)
    assert not is_alive(pid)
    assert set(os.listdir("/proc/self/fd")) == before
    child.close()


@pytest.mark.usefixtures("host")
def test_its_death_is_told_and_it_can_be_started_again(
    poller: Poller, caplog: pytest.LogCaptureFixture
) -> None:
    child = Passt([], poller, poller.stop)
    child.start()
    os.kill(child.pid, signal.SIGKILL)
    poller.run()
    assert child.pid == -1
    assert "passt ended, killed by signal 9" in caplog.text
    child.start(wait=False)
    assert ask(child.fd)
    child.close()


@pytest.mark.usefixtures("host")
def test_it_ends_when_this_process_is_killed(tmp_path: Path) -> None:
    script = """
import sys, signal
from pyvhost.host.passt import Passt
from pyvhost.host.poller import Poller
child = Passt([], Poller(), lambda: None)
child.start()
print(child.pid, flush=True)
signal.pause()
"""
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        pidfd = os.pidfd_open(pid)
        parent.kill()
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    assert poll.poll(5000), "passt outlived its parent"
    os.close(pidfd)


@pytest.mark.usefixtures("host")
def test_what_it_says_is_in_the_error(poller: Poller) -> None:
    child = Passt(["--address", "not an address"], poller, lambda: None)
    before = set(os.listdir("/proc/self/fd"))
    with pytest.raises(OSError, match=r"ended at once, exit status 1: .*Invalid address") as caught:
        child.start()
    assert "syslog" not in str(caught.value)
    assert child.fd == -1
    assert set(os.listdir("/proc/self/fd")) == before


def test_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(OSError, match="apt-get install passt"):
        passt.program()


def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    """A program called passt that does what `script` says."""
    path = tmp_path / "passt"
    path.write_text("#!/bin/sh\n" + script)
    path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")


def test_one_that_never_gets_ready_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, poller: Poller
) -> None:
    fake(tmp_path, monkeypatch, "echo waiting for something >&2\nexec 2>&-\nexec sleep 1000\n")
    monkeypatch.setattr(passt, "PATIENCE", 0.2)
    child = Passt([], poller, lambda: None)
    with pytest.raises(TimeoutError, match=r"not ready within .*waiting for something"):
        child.start()
    assert child.pid == -1


def test_an_endless_line_is_not_kept_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, poller: Poller
) -> None:
    fake(tmp_path, monkeypatch, "head -c 300000 /dev/zero | tr '\\0' x >&2\n")
    child = Passt([], poller, poller.stop)
    child.start(wait=False)
    poller.run()
    assert sum(map(len, child.said)) < 100_000


def test_the_user_it_becomes(poller: Poller) -> None:
    assert Passt([], poller, lambda: None)._runs_as() == 65534
    assert Passt(["--runas", "0:0"], poller, lambda: None)._runs_as() == 0
    assert Passt(["--mtu", "1500", "--runas", "1234"], poller, lambda: None)._runs_as() == 1234


def test_a_closed_socket_pair_is_not_shared_with_other_children(poller: Poller) -> None:
    """Another child that inherited our end would keep passt alive."""
    here, there = socket.socketpair()
    with here, there:
        assert not os.get_inheritable(here.fileno())
