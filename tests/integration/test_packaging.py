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

import pytest

from pyvhost.driver.vhost_user import VhostUserFrontend
from requirements import need_program

PACKAGING = Path(__file__).parents[2] / "packaging"
KINDS = pytest.mark.parametrize("device", ["net", "scsi", "vsock"])


def program_of(device: str) -> str:
    return f"/usr/local/bin/pyvhost-{device}"


def unit(kind: str, device: str) -> configparser.RawConfigParser:
    parser = configparser.RawConfigParser(strict=False)
    parser.optionxform = str  # type: ignore[assignment,method-assign]
    parser.read(PACKAGING / f"pyvhost-{device}@.{kind}")
    return parser


@KINDS
def test_systemd_takes_the_units(tmp_path: Path, device: str) -> None:
    verify = need_program("systemd-analyze", package="systemd")
    for kind in ("socket", "service"):
        text = (PACKAGING / f"pyvhost-{device}@.{kind}").read_text()
        # It wants the program to be there.
        (tmp_path / f"pyvhost-{device}@vm0.{kind}").write_text(
            text.replace(program_of(device), sys.executable)
        )
    units = [str(tmp_path / f"pyvhost-{device}@vm0.{kind}") for kind in ("socket", "service")]
    done = subprocess.run([verify, "verify", *units], capture_output=True, text=True, check=False)
    said = [line for line in done.stderr.splitlines() if "pyvhost" in line]
    assert said == []


@pytest.mark.parametrize(
    ("device", "words"),
    [
        ("net", {"BACKEND": "null", "QUEUE_PAIRS": "2"}),
        ("scsi", {"LUNS": "--lun=memory:1M --lun=2:2=memory:1M", "REQUEST_QUEUES": "2"}),
        ("vsock", {"GUEST_CID": "42", "OPTIONS": "--group=lab"}),
    ],
)
def test_the_services_command_line_serves_one_front_end_after_another(
    tmp_path: Path, device: str, words: dict[str, str]
) -> None:
    """As systemd starts it: the socket that listens is descriptor 3."""
    service = unit("service", device)["Service"]
    assert all(f"{name}=" in service["Environment"] for name in words)
    command = service["ExecStart"]
    for name, value in words.items():
        command = command.replace("${" + name + "}", value).replace("$" + name, value)
    command = command.replace(f"/run/pyvhost-{device}-%i", str(tmp_path))
    program, *arguments = shlex.split(command)
    assert program == program_of(device)

    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "vm0.sock"))
        listener.listen()

        # A second process: descriptor 3 of this one is somebody's.
        script = "import os, sys; os.dup2(int(sys.argv[1]), 3); os.execv(sys.argv[2], sys.argv[2:])"
        ours = str(Path(sys.executable).with_name(f"pyvhost-{device}"))
        process = subprocess.Popen(
            [sys.executable, "-c", script, str(listener.fileno()), ours, *arguments],
            pass_fds=[listener.fileno()],
            env={**os.environ, "LISTEN_FDS": "1"},
        )
    try:
        for _ in range(2):
            with VhostUserFrontend.connect(tmp_path / "vm0.sock", timeout=600) as frontend:
                assert frontend.negotiate(1 << 32) == 1 << 32
    finally:
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0


@KINDS
def test_the_description_for_qemu_is_what_the_program_says_itself(device: str) -> None:
    """QEMU's docs/interop/vhost-user.json, BackendProgram."""
    described = json.loads((PACKAGING / f"50-pyvhost-{device}.json").read_text())
    assert set(described) == {"description", "type", "binary"}
    assert described["binary"] == program_of(device)
    said = subprocess.run(
        [Path(sys.executable).with_name(f"pyvhost-{device}"), "--print-capabilities"],
        capture_output=True,
        check=True,
    )
    assert json.loads(said.stdout)["type"] == described["type"]


@KINDS
def test_the_socket_is_where_the_pages_say(device: str) -> None:
    path = unit("socket", device)["Socket"]["ListenStream"]
    assert path.replace("%i", "vm0") in (PACKAGING.parent / "docs/howto/install.md").read_text()
