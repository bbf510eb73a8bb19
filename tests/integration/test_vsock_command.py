"""`pyvhost vsock` as a process of its own: how it is started, what its guests reach, and how it ends."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from back_end import PATIENCE
from pyvhost.cli.main import main
from pyvhost.cli.serving import Serving
from pyvhost.control import client
from pyvhost.driver.memory import MIB, GuestMemory
from pyvhost.driver.vhost_user import VhostUserFrontend
from pyvhost.driver.vsock import VsockDriver

COMMAND = [sys.executable, "-m", "pyvhost.cli.main", "vsock"]


@contextmanager
def guest(path: Path) -> Iterator[VsockDriver]:
    with (
        VhostUserFrontend.connect(path, timeout=PATIENCE) as frontend,
        GuestMemory(16 * MIB) as memory,
        VsockDriver(frontend, memory, timeout=PATIENCE) as driver,
    ):
        driver.start()
        yield driver


def test_a_guest_is_served_by_unix_sockets(tmp_path: Path) -> None:
    path, uds = tmp_path / "vm0.sock", tmp_path / "v.sock"
    words = ["vsock", "--socket-path", str(path), "--guest-cid", "42", "--uds-path", str(uds)]
    with Serving(words, [path]) as serving:
        serving.wait_ready()
        with guest(path) as driver, socket.socket(socket.AF_UNIX) as sock:
            assert driver.guest_cid == 42
            listener = driver.listen(1234)
            sock.settimeout(PATIENCE)
            sock.connect(str(uds))
            sock.sendall(b"CONNECT 1234\nhello")
            accepted = listener.accept()
            assert sock.recv(100) == f"OK {accepted.key.peer_port}\n".encode()
            assert accepted.recv_exactly(5) == b"hello"
            status = client.ask(str(path), "status", [])
            assert (status["guest_cid"], status["connections"]) == (42, 1)
            sock.close()
            assert accepted.recv(1) == b""
        assert serving.close() == 0
        assert "-device vhost-user-vsock-pci,chardev=vhost0" in serving.tail()
        assert f"virtio_uml.device={path}:19" in serving.tail()
    assert list(tmp_path.iterdir()) == []


def test_guests_of_one_command_reach_each_other_in_a_group_alone(tmp_path: Path) -> None:
    paths = [tmp_path / name for name in ("a.sock", "b.sock")]
    words = ["vsock"]
    for path, cid in zip(paths, ("3", "4"), strict=True):
        words += ["--socket-path", str(path), "--guest-cid", cid]
    for group in ([], ["--group", "lab"]):
        with Serving([*words, *group], paths) as serving:
            serving.wait_ready()
            with guest(paths[0]) as one, guest(paths[1]) as two:
                listener = two.listen(7)
                asking = one.connect(7, 4, wait=False)
                if group:
                    accepted = listener.accept()
                    assert (accepted.key.peer_cid, accepted.key.peer_port) == (3, asking.key.port)
                    asking.wait_connected()
                    asking.send(b"hello, sibling")
                    assert accepted.recv_exactly(14) == b"hello, sibling"
                else:
                    with pytest.raises(ConnectionRefusedError):
                        asking.wait_connected()
            assert serving.close() == 0


def test_capabilities_are_json() -> None:
    child = subprocess.run([*COMMAND, "--print-capabilities"], capture_output=True, text=True, check=True)
    assert json.loads(child.stdout)["type"] == "vsock"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "--socket-path"),
        (["--socket-path", "x"], "--guest-cid"),
        (["--socket-path", "x", "--guest-cid", "2"], "CID 2"),
        (["--socket-path", "x", "--guest-cid", "4294967295"], "CID 4294967295"),
        (["--socket-path", "x", "--guest-cid", "3", "--guest-cid", "4"], "--guest-cid"),
        (["--socket-path", "x", "--socket-path", "y", "--guest-cid", "3"], "as many --guest-cid"),
        (["--socket-path", "x", "--socket-path", "y", "--guest-cid", "3", "--guest-cid", "3"], "one guest's"),
        (["--socket-path", "x", "--guest-cid", "3", "--uds-path", "u", "--uds-path", "v"], "--uds-path"),
        (["--socket-path", "x", "--guest-cid", "3", "--uds-path", "/nowhere/u"], "/nowhere/u"),
        (["--socket-path", "x", "--guest-cid", "3", "--uds-path", "u" * 100], "107 bytes"),
        (["--socket-path", "x", "--guest-cid", "3", "--forward", "ssh"], "ssh"),
        (["--socket-path", "x", "--guest-cid", "3", "--forward", "9-1"], "9-1"),
        (["--socket-path", "x", "--guest-cid", "3", "--forward", "4294967295"], "4294967295"),
        (["--socket-path", "x", "--guest-cid", "3", "--max-connections", "0"], "16384"),
        (["--socket-path", "x", "--guest-cid", "3", "--busyloop-timeout", "-1"], "busyloop_timeout -1"),
        (["--socket-path", "x", "--guest-cid", "3", "--busyloop-timeout", str(1 << 32)], "busyloop_timeout"),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else "",
)
def test_what_it_can_not_do_it_says_at_once(
    arguments: Sequence[str],
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    # argparse ends by itself.
    with suppress(SystemExit):
        assert main(["vsock", *arguments]) != 0
    assert words in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
