"""`pyvhost net` as a process of its own: how it is started, what it says, and how it ends."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from back_end import PATIENCE
from pyvhost.cli.serving import Serving
from pyvhost.control import client
from pyvhost.driver.memory import MIB, GuestMemory
from pyvhost.driver.net import NetDriver
from pyvhost.driver.vhost_user import VhostUserFrontend

COMMAND = [sys.executable, "-m", "pyvhost.cli.main", "net"]


def frame(number: int) -> bytes:
    return b"\xff" * 6 + bytes.fromhex("0200000000aa 88b5") + number.to_bytes(4, "big") + bytes(50)


def echo(frontend: VhostUserFrontend, number: int = 1) -> None:
    with (
        GuestMemory(4 * MIB) as memory,
        NetDriver(frontend, memory, ring_size=64, timeout=PATIENCE) as driver,
    ):
        driver.start()
        driver.send(frame(number))
        assert [got.frame for got in driver.receive()] == [frame(number)]


def refused(arguments: Sequence[str]) -> str:
    """What it says when it is started so; it ends by itself, with a status that is not 0."""
    child = subprocess.run([*COMMAND, *arguments], capture_output=True, text=True, timeout=600, check=False)
    assert child.returncode != 0
    assert "Traceback" not in child.stderr
    return child.stderr


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "vm0.sock"


def test_it_listens_serves_and_ends_on_sigterm(path: Path) -> None:
    with Serving(["net", "--socket-path", str(path), "--backend", "loop"], [path]) as serving:
        serving.wait_ready()
        for turn in range(3):
            with VhostUserFrontend.connect(path, timeout=PATIENCE) as frontend:
                echo(frontend, turn)
        with VhostUserFrontend.connect(path, timeout=PATIENCE) as frontend:
            echo(frontend)
            assert serving.close() == 0
            frontend.wait_closed()
        assert not path.exists()
        assert "-netdev vhost-user" in serving.tail()


def test_its_control_socket_lies_beside(path: Path) -> None:
    beside = path.with_name("vm0.sock.ctl")
    with Serving(["net", "--socket-path", str(path), "--backend", "loop"], [path, beside]) as serving:
        serving.wait_ready()
        assert client.ask(str(path), "status", [])["link"] == "up"
        client.ask(str(path), "link", ["down"])
        assert client.ask(str(path), "status", [])["link"] == "down"
        assert serving.close() == 0
        assert not beside.exists()


def test_a_control_socket_elsewhere_or_none(path: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "control"
    with Serving(["net", "--socket-path", str(path), "--control", str(elsewhere)], [path, elsewhere]) as one:
        one.wait_ready()
        assert client.ask(str(elsewhere), "status", [])["backend"] == "null"
        assert {each.name for each in tmp_path.iterdir()} == {"vm0.sock", "control"}
    with Serving(["net", "--socket-path", str(path), "--no-control"], [path]) as one:
        one.wait_ready()
        with VhostUserFrontend.connect(path, timeout=PATIENCE) as frontend:
            frontend.sync()
        assert {each.name for each in tmp_path.iterdir()} == {"vm0.sock"}


def test_it_ends_on_sigint_as_well(path: Path) -> None:
    with Serving(["net", "--socket-path", str(path)], [path]) as serving:
        serving.wait_ready()
        with VhostUserFrontend.connect(path, timeout=PATIENCE) as frontend:
            frontend.sync()
        os.kill(serving.pid, signal.SIGINT)
        assert serving.process.wait(PATIENCE) == 0
        assert not path.exists()


def test_two_guests_on_one_switch(tmp_path: Path) -> None:
    paths = [tmp_path / "a.sock", tmp_path / "b.sock"]
    options = [option for path in paths for option in ("--socket-path", str(path))]
    with Serving(["net", *options, "--backend", "switch:lan"], paths) as serving:
        serving.wait_ready()
        with (
            GuestMemory(4 * MIB) as here,
            GuestMemory(4 * MIB) as there,
            VhostUserFrontend.connect(paths[0], timeout=PATIENCE) as one,
            VhostUserFrontend.connect(paths[1], timeout=PATIENCE) as two,
            NetDriver(one, here, ring_size=64, timeout=PATIENCE) as sender,
            NetDriver(two, there, ring_size=64, timeout=PATIENCE) as receiver,
        ):
            sender.start()
            receiver.start()
            sender.send(frame(5))
            assert [got.frame for got in receiver.receive()] == [frame(5)]


def test_it_dials_and_dials_again(path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(str(path))
        listener.listen()
        with Serving(["net", "--socket-path", str(path), "--connect", "--backend", "loop"], [path]):
            for turn in range(2):
                with VhostUserFrontend.accept(listener, timeout=600) as frontend:
                    frontend.socket.settimeout(PATIENCE)
                    echo(frontend, turn)


def test_a_socket_that_it_inherits(path: Path) -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    with theirs:
        arguments = [*COMMAND, "--fd", str(theirs.fileno()), "--backend", "loop"]
        child = subprocess.Popen(arguments, pass_fds=[theirs.fileno()], stderr=subprocess.PIPE)
    with child:
        with VhostUserFrontend(ours, timeout=600) as frontend:
            echo(frontend)
        # Nobody can come after the one that it was started for.
        assert child.wait(PATIENCE) == 0


def test_a_listening_socket_that_it_inherits(path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(str(path))
        listener.listen()
        arguments = [*COMMAND, "--fd", str(listener.fileno()), "--backend", "loop"]
        child = subprocess.Popen(arguments, pass_fds=[listener.fileno()], stderr=subprocess.PIPE)
    with child:
        for turn in range(2):
            with VhostUserFrontend.connect(path, timeout=600) as frontend:
                echo(frontend, turn)
        child.terminate()
        assert child.wait(PATIENCE) == 0


def test_capabilities_are_json_whatever_else_is_said() -> None:
    for more in ([], ["--socket-path", "/nowhere/at/all", "--fd", "99"]):
        child = subprocess.run(
            [*COMMAND, "--print-capabilities", *more], capture_output=True, text=True, timeout=600, check=True
        )
        assert json.loads(child.stdout)["type"] == "net"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "--socket-path"),
        (["--fd", "0", "--socket-path", "x"], "--socket-path"),
        (["--fd", "99"], "descriptor"),
        (["--socket-path", "x", "--control", "/nowhere/at/all"], "/nowhere/at/all"),
        (["--socket-path", "x", "--socket-path", "y", "--control", "z"], "--control"),
        (["--socket-path", "x", "--no-control", "--control", "z"], "--control"),
        (["--fd", "0"], "socket"),
        (["--socket-path", "/nowhere/at/all"], "/nowhere/at/all"),
        (["--socket-path", "x" * 200], "107"),
        (["--socket-path", "x", "--backend", "nonsense"], "nonsense"),
        (["--socket-path", "x", "--backend", "generate:7"], "generate"),
        (["--socket-path", "x", "--mac", "hello"], "hello"),
        (["--socket-path", "x", "--queue-pairs", "0"], "queue"),
        (["--socket-path", "x", "--queue-pairs", "128"], "127"),
        (["--socket-path", "x", "--mtu", "1"], "68"),
        (["--no-such-option"], "--no-such-option"),
    ],
    ids=lambda value: " ".join(value)[:30] if isinstance(value, list) else "",
)
def test_what_it_can_not_do_it_says_at_once(
    arguments: list[str], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert words in refused(arguments)
    assert list(tmp_path.iterdir()) == []


def test_a_socket_in_use_stays_its_owners(path: Path) -> None:
    with Serving(["net", "--socket-path", str(path), "--backend", "loop"], [path]) as serving:
        serving.wait_ready()
        assert str(path) in refused(["--socket-path", str(path)])
        with VhostUserFrontend.connect(path, timeout=PATIENCE) as frontend:
            echo(frontend)


def test_a_socket_that_nobody_listens_on_is_replaced(path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as stale:
        stale.bind(str(path))
    with Serving(["net", "--socket-path", str(path), "--backend", "loop"], [path]) as serving:
        serving.wait_ready()
        with VhostUserFrontend.connect(path, timeout=PATIENCE) as frontend:
            echo(frontend)


def test_a_front_end_that_is_killed(path: Path) -> None:
    """Its process ends between two instructions, with frames under way; the next one finds all as new."""
    script = (
        "import os, signal, sys\n"
        "from pyvhost.driver.memory import GuestMemory\n"
        "from pyvhost.driver.net import NetDriver\n"
        "from pyvhost.driver.vhost_user import VhostUserFrontend\n"
        "driver = NetDriver(VhostUserFrontend.connect(sys.argv[1]), GuestMemory(4 << 20), ring_size=64)\n"
        "driver.start()\n"
        "driver.send_many([b'\\xff' * 100] * 50)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    with Serving(["net", "--socket-path", str(path), "--backend", "loop"], [path]) as serving:
        serving.wait_ready()
        for turn in range(3):
            child = subprocess.run([sys.executable, "-c", script, str(path)], timeout=600, check=False)
            assert child.returncode == -signal.SIGKILL
            with VhostUserFrontend.connect(path, timeout=PATIENCE) as frontend:
                echo(frontend, turn)
        assert serving.running
