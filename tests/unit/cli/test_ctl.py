"""`pyvhost ctl`: what it prints, and how it ends."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from pyvhost.cli.main import main
from pyvhost.control.commands import Command
from pyvhost.control.server import ControlServer
from pyvhost.host.poller import Poller


def refuse() -> None:
    raise FileExistsError(17, "LUN 0:3 is there already")


@pytest.fixture
def path(tmp_path: Path) -> Iterator[str]:
    listed = [{"command": "add-lun", "usage": "SPEC", "what": "add a disk"}]
    commands = [
        Command("status", "", "", lambda: {"device": "höst"}),
        Command("help", "", "", lambda: listed),
        Command("none", "", "", lambda: None),
        Command("refuse", "", "", refuse),
    ]
    known = {each.name: each for each in commands}
    with Poller() as poller, ControlServer(poller, tmp_path / "vm0.sock.ctl", known):
        thread = threading.Thread(target=poller.run)
        thread.start()
        yield str(tmp_path / "vm0.sock")
        poller.stop()
        thread.join()


def test_an_answer_is_json(path: str, capsys: pytest.CaptureFixture[str]) -> None:
    for words in ([path], [path, "status"], [path + ".ctl", "status"]):
        assert main(["ctl", *words]) == 0
        assert json.loads(capsys.readouterr().out) == {"device": "höst"}
    assert main(["ctl", path, "none"]) == 0
    assert capsys.readouterr().out == ""


def test_help_is_for_reading(path: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ctl", path, "help"]) == 0
    assert capsys.readouterr().out == "add-lun SPEC  add a disk\n"


def test_a_refusal_is_a_line(path: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ctl", path, "refuse"]) == 1
    assert capsys.readouterr().err == "pyvhost: LUN 0:3 is there already\n"
    assert main(["ctl", path + ".absent"]) == 1
    assert "No such file" in capsys.readouterr().err


@pytest.mark.parametrize("timeout", ["0", "-1", "nan", "inf", "soon"])
def test_a_timeout_that_is_none(timeout: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["ctl", "x", f"--timeout={timeout}"])
    assert caught.value.code == 2
    assert "no number of seconds" in capsys.readouterr().err
