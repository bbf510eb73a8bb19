"""What is installed besides the package: units that systemd takes, and a command line that the program takes."""

from __future__ import annotations

import configparser
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
from pathlib import Path

from pyvhost.driver.vhost_user import VhostUserFrontend
from requirements import need_program

PACKAGING = Path(__file__).parents[2] / "packaging"
PROGRAM = "/usr/local/bin/pyvhost-net"


def unit(kind: str) -> configparser.RawConfigParser:
    parser = configparser.RawConfigParser(strict=False)
    parser.optionxform = str  # type: ignore[assignment,method-assign]
    parser.read(PACKAGING / f"pyvhost-net@.{kind}")
    return parser


def test_systemd_takes_the_units(tmp_path: Path) -> None:
    verify = need_program("systemd-analyze", package="systemd")
    for kind in ("socket", "service"):
        text = (PACKAGING / f"pyvhost-net@.{kind}").read_text()
        # It wants the program to be there.
        (tmp_path / f"pyvhost-net@vm0.{kind}").write_text(text.replace(PROGRAM, sys.executable))
    units = [str(tmp_path / f"pyvhost-net@vm0.{kind}") for kind in ("socket", "service")]
    done = subprocess.run([verify, "verify", *units], capture_output=True, text=True, check=False)
    said = [line for line in done.stderr.splitlines() if "pyvhost" in line]
    assert said == []


def test_the_services_command_line_serves_one_front_end_after_another(tmp_path: Path) -> None:
    """As systemd starts it: the socket that listens is descriptor 3."""
    service = unit("service")["Service"]
    words = {"BACKEND": "null", "QUEUE_PAIRS": "2"}
    assert all(f"{name}=" in service["Environment"] for name in words)
    command = service["ExecStart"]
    for name, value in words.items():
        command = command.replace("${" + name + "}", value)
    program, *arguments = shlex.split(command)
    assert program == PROGRAM

    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "vm0.sock"))
        listener.listen()

        # A second process: descriptor 3 of this one is somebody's.
        script = "import os, sys; os.dup2(int(sys.argv[1]), 3); os.execv(sys.argv[2], sys.argv[2:])"
        ours = str(Path(sys.executable).with_name("pyvhost-net"))
        process = subprocess.Popen(
            [sys.executable, "-c", script, str(listener.fileno()), ours, *arguments],
            pass_fds=[listener.fileno()],
            env={**os.environ, "LISTEN_FDS": "1"},
        )
    try:
        for _ in range(2):
            with VhostUserFrontend.connect(tmp_path / "vm0.sock", timeout=60) as frontend:
                assert frontend.negotiate(1 << 32) == 1 << 32
    finally:
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0


def test_the_description_for_qemu_is_what_the_program_says_itself() -> None:
    """QEMU's docs/interop/vhost-user.json, BackendProgram."""
    described = json.loads((PACKAGING / "50-pyvhost-net.json").read_text())
    assert set(described) == {"description", "type", "binary"}
    assert described["binary"] == PROGRAM
    said = subprocess.run(
        [Path(sys.executable).with_name("pyvhost-net"), "--print-capabilities"],
        capture_output=True,
        check=True,
    )
    assert json.loads(said.stdout)["type"] == described["type"]


def test_the_socket_is_where_the_pages_say() -> None:
    path = unit("socket")["Socket"]["ListenStream"]
    assert path.replace("%i", "vm0") in (PACKAGING.parent / "docs/howto/install.md").read_text()
