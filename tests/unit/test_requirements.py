"""What the tests' own requirements do: skip, or with REQUIRE_ALL fail, and say what to do."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

import requirements


@pytest.fixture(params=["", "0"])
def lenient(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REQUIRE_ALL", request.param)


@pytest.fixture
def strict(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REQUIRE_ALL", "1")


@pytest.mark.usefixtures("strict")
def test_what_is_there_is_given_even_when_all_is_required(tmp_path: Path) -> None:
    requirements.need(True, "nothing")
    assert Path(requirements.need_program("sh")).name == "sh"
    assert requirements.need_file(str(tmp_path), package="x") == tmp_path


@pytest.mark.usefixtures("lenient")
def test_an_absence_skips_and_says_what_to_install() -> None:
    with pytest.raises(pytest.skip.Exception, match="apt-get install some-package"):
        requirements.need_program("no-such-program", package="some-package")
    with pytest.raises(pytest.skip.Exception, match="apt-get install no-such-program"):
        requirements.need_program("no-such-program")
    with pytest.raises(pytest.skip.Exception, match=r"apt-get install headers \(for /no/such/file\)"):
        requirements.need_file("/no/such/file", package="headers")
    with pytest.raises(pytest.skip.Exception, match="modprobe tun"):
        requirements.need(None, "modprobe tun")


@pytest.mark.usefixtures("strict")
def test_with_require_all_an_absence_fails() -> None:
    with pytest.raises(pytest.fail.Exception, match="lacks something: apt-get install some-package"):
        requirements.need_program("no-such-program", package="some-package")


@pytest.mark.usefixtures("strict")
def test_a_program_of_the_system_administrator_is_found(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    program = tmp_path / "only-in-sbin"
    program.symlink_to(sys.executable)
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setattr(requirements, "SYSTEM_DIRECTORIES", (str(tmp_path),))
    assert requirements.need_program("only-in-sbin") == str(program)


@pytest.mark.usefixtures("strict")
def test_root_is_who_the_kernel_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    requirements.need_root()
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(pytest.fail.Exception, match="run as root"):
        requirements.need_root()
