"""The documentation's checker finds what it is for, and nothing else."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

PROGRAM = Path(__file__).resolve().parents[3] / "docs" / "check.py"


@pytest.fixture
def check(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    specification = importlib.util.spec_from_file_location("docs_check", PROGRAM)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    monkeypatch.setitem(sys.modules, "docs_check", module)
    specification.loader.exec_module(module)
    monkeypatch.setattr(module, "ROOT", tmp_path)
    helps = {
        ("pyvhost",): "usage: pyvhost {net,bench} ...",
        ("pyvhost", "net"): "usage: pyvhost net --socket-path S [--backend SPEC]",
        ("pyvhost", "bench"): "usage: pyvhost bench {net}",
        ("pyvhost", "bench", "net"): "usage: pyvhost bench net [--svg FILE]",
        ("./run",): "usage: ./run VERB\n\n  demo   boots\n  test   tests\n",
    }
    monkeypatch.setattr(module, "help_of", lambda *command: helps.get(command, ""))
    return module


def page(directory: Path, text: str) -> Path:
    path = directory / "page.md"
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    "link",
    [
        "[x](other.md)",
        "[x](other.md#two-words)",
        "[x](#here--there)",
        "[x](/other.md)",
        "![x](<other.md>)",
        '[x](other.md "Title")',
        "[x](https://example.org/y)",
        "[x](mailto:a@b)",
        "`[x](code)`",
    ],
)
def test_a_link_that_leads_somewhere(check: ModuleType, tmp_path: Path, link: str) -> None:
    (tmp_path / "other.md").write_text("# Two words\n")
    assert list(check.wrong_links(page(tmp_path, f"# Here & there\n\n{link}\n"))) == []


@pytest.mark.parametrize(
    "link", ["[x](absent.md)", "[x](#nowhere)", "[x](other.md#three)", "[a [b]](absent.md)"]
)
def test_a_link_that_does_not(check: ModuleType, tmp_path: Path, link: str) -> None:
    (tmp_path / "other.md").write_text("# Two words\n\n```\n# three\n```\n")
    (fault,) = check.wrong_links(page(tmp_path, f"# Here\n\n{link}\n"))
    assert fault.startswith("no such")


@pytest.mark.parametrize(
    "line",
    [
        "$ pyvhost net --socket-path /run/x.sock",
        "# pyvhost bench net --svg=out.svg",
        "./run test tests/unit -k x",
        "sudo A=1 pyvhost net --backend tap:vm0 >log & ls --nonsense",
        "pyvhost net \\\n  --backend null",
    ],
)
def test_a_command_that_exists(check: ModuleType, tmp_path: Path, line: str) -> None:
    assert list(check.wrong_commands(page(tmp_path, f"```console\n{line}\n```\n"))) == []


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        ("pyvhost net --socket /x", "no option --socket: pyvhost net --socket /x"),
        ("$ true && pyvhost bench net -x", "no option -x: pyvhost bench net -x"),
        ("pyvhost-nett --help", "no such command: pyvhost-nett --help"),
        ("pyvhost net \\\n  --svg=x", "no option --svg: pyvhost net --svg=x"),
        ("./run frobnicate", "no such verb: ./run frobnicate"),
    ],
)
def test_a_command_that_does_not(check: ModuleType, tmp_path: Path, line: str, fault: str) -> None:
    assert list(check.wrong_commands(page(tmp_path, f"```sh\n{line}\n```\n"))) == [fault]


def test_blocks_in_other_languages_are_left_alone(check: ModuleType, tmp_path: Path) -> None:
    assert list(check.wrong_commands(page(tmp_path, "```python\npyvhost --nonsense\n```\n"))) == []
