"""`pyvhost doctor`: what it asks, what it answers, what it says to install."""

from __future__ import annotations

import argparse
import ctypes
import errno
import json
import os
import resource
from pathlib import Path

import pytest
from rich.console import Console

from pyvhost.cli import checks, doctor
from pyvhost.cli.checks import Check, Found, State
from pyvhost.host import kvm, memfd, tap
from pyvhost.scsi.stores import libnbd

YES = Found(State.YES, "it is")


def check(found: Found, name: str = "thing", *, vital: bool = False, group: str = "Group") -> Check:
    return Check(group, name, "to test", lambda: found, vital)


def answers(*asked: Check) -> list[tuple[Check, Found]]:
    return list(checks.ask_all(asked))


def run(monkeypatch: pytest.MonkeyPatch, asked: tuple[Check, ...], *options: str) -> int:
    monkeypatch.setattr(doctor, "ask_all", lambda **_: checks.ask_all(asked))
    parser = argparse.ArgumentParser()
    doctor.add_arguments(parser)
    return doctor.run(parser.parse_args(options))


def named(name: str) -> Found:
    (asked,) = [check for check in checks.CHECKS if check.name == name]
    return asked.ask()


# --- the command -------------------------------------------------------------------------------------


def test_all_well(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(monkeypatch, (check(YES, vital=True), check(YES, "other"))) == 0
    out = capsys.readouterr().out
    assert "✓  thing" in out
    assert "pyvhost can serve here." in out
    assert "apt-get" not in out


def test_what_is_missing_is_one_line_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    missing = [
        Found(State.NO, "no x", ("x", "y")),
        Found(State.NO, "no y", ("y",)),
        Found(State.NOTE, "z?", ("z",)),
    ]
    assert run(monkeypatch, tuple(check(found, f"thing {n}") for n, found in enumerate(missing))) == 0
    assert "sudo apt-get install -y --no-install-recommends x y z\n" in capsys.readouterr().out


def test_root_needs_no_sudo(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert doctor.apt_line(answers(check(Found(State.NO, "", ("x",))))).startswith("apt-get install")


def test_a_host_that_can_not_serve(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, (check(Found(State.NO, "broken"), vital=True), check(YES))) == 1
    out = capsys.readouterr().out
    assert "✗  thing" in out
    assert "pyvhost can serve nothing here: thing" in out


def test_a_note_on_what_is_vital_is_no_obstacle(monkeypatch: pytest.MonkeyPatch) -> None:
    assert run(monkeypatch, (check(Found(State.NOTE, "slow"), vital=True),)) == 0


def test_json(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    asked = (check(YES, vital=True), check(Found(State.NO, "no x", ("x",)), "other"))
    assert run(monkeypatch, asked, "--json") == 0
    data = json.loads(capsys.readouterr().out)
    assert data["able"] is True
    assert data["install"].endswith(" x")
    assert data["checks"][0] == {
        "group": "Group",
        "name": "thing",
        "purpose": "to test",
        "vital": True,
        "state": "yes",
        "found": "it is",
        "packages": [],
    }
    assert run(monkeypatch, (check(Found(State.NO, ""), vital=True),), "--json") == 1
    assert json.loads(capsys.readouterr().out)["able"] is False


def test_a_check_that_fails_itself_hides_no_other() -> None:
    def fails() -> Found:
        raise RuntimeError("odd host")

    odd, other = answers(Check("Group", "odd", "", fails), check(YES))
    assert odd[1].state is State.NO
    assert "odd host" in odd[1].text
    assert other[1] is YES


@pytest.mark.parametrize("width", [60, 80, 99, 100, 200])
def test_table_fits(width: int) -> None:
    found = Found(State.NO, "a long story [bold]with brackets[/] " * 6)
    console = Console(width=width, color_system=None)
    with console.capture() as capture:
        console.print(doctor.table(answers(check(found), check(YES, group="Other")), purposes=width >= 100))
    shown = capture.get()
    assert max(map(len, shown.splitlines())) <= width
    assert "[bold]with" in shown
    assert ("to test" in shown) == (width >= 100)


# --- the checks --------------------------------------------------------------------------------------


def test_this_host_is_found_out() -> None:
    quick = tuple(check for check in checks.CHECKS if check.name not in ("KVM", "compiler"))
    for asked, found in checks.ask_all(quick):
        assert "could not be found out" not in found.text, asked.name
        assert found.text, asked.name
        assert found.text.isprintable(), asked.name
        if found.packages:
            assert found.state is not State.YES, asked.name
    assert doctor.impossible(list(checks.ask_all(quick))) == [], "this very process could not run"


def test_without_programs_their_packages_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(os, "environ", {"PATH": str(tmp_path)})
    monkeypatch.setattr(checks, "_SYSTEM_DIRECTORIES", ())
    for name, package in {
        "user": "passt",
        "User Mode Linux": "user-mode-linux",
        "QEMU": "qemu-system-x86",
        "busybox": "busybox-static",
        "strace": "strace",
        "ip": "iproute2",
        "tcpdump": "tcpdump",
        "iperf3": "iperf3",
        "ethtool": "ethtool",
    }.items():
        found = named(name)
        assert (found.state, found.packages) == (State.NO, (package,))
    assert named("DPDK").packages


def test_a_program_that_prints_controls_or_hangs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    program = tmp_path / "passt"
    program.write_text("#!/bin/sh\nprintf 'passt \\033[31m1.0\\n'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert named("user").text == "passt [31m1.0"
    program.write_text("#!/bin/sh\nexec sleep 600\n")
    monkeypatch.setattr(checks, "_SECONDS", 0.2)
    assert named("user") == Found(State.YES, str(program))


def test_numba_that_does_not_import(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "_NUMBA", "raise ImportError('Numba needs NumPy 2.0 or less')")
    found = named("compiler")
    assert found.state is State.NO
    assert "Numba needs NumPy 2.0 or less" in found.text
    monkeypatch.setattr(checks, "_NUMBA", "import os; os.abort()")
    assert "status -6" in named("compiler").text


def numba_says(monkeypatch: pytest.MonkeyPatch, **about: object) -> Found:
    usual = {
        "version": "1.0",
        "plain": False,
        "seconds": 0.25,
        "wanted": "/c",
        "cache": "/c",
        "warm": ["net"],
    }
    monkeypatch.setattr(checks, "_NUMBA", f"print({json.dumps(json.dumps({**usual, **about}))})")
    return named("compiler")


def test_numba_and_its_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    assert numba_says(monkeypatch) == Found(State.YES, "Numba 1.0, imported in 0.2 s; compiled already")
    assert "first start will compile" in numba_says(monkeypatch, warm=[]).text
    assert numba_says(monkeypatch, cache=None).state is State.NOTE
    assert "/c can't be written" in numba_says(monkeypatch, cache=None).text
    assert "NUMBA_DISABLE_JIT" in numba_says(monkeypatch, plain=True).text


def test_numba_as_it_is_here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PYVHOST_CACHE_DIR", str(tmp_path))
    monkeypatch.delenv("NUMBA_DISABLE_JIT", raising=False)
    found = named("compiler")
    assert found.state is State.YES
    assert "the first start will compile" in found.text


def test_nbd_without_its_library(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> None:
        raise OSError(f"{name}: cannot open shared object file")

    libnbd.library.cache_clear()
    monkeypatch.setattr(ctypes, "CDLL", absent)
    found = named("NBD")
    assert (found.state, found.packages) == (State.NO, ("libnbd0",))
    assert "libnbd0" in found.text


@pytest.mark.parametrize(("number", "says"), [(errno.EPERM, "io_uring_disabled"), (errno.ENOSYS, "no rings")])
def test_a_host_without_io_uring(monkeypatch: pytest.MonkeyPatch, number: int, says: str) -> None:
    def refuse(entries: int) -> None:
        raise OSError(number, "no rings")

    monkeypatch.setattr(checks, "Uring", refuse)
    found = named("io_uring")
    assert found.state is State.NOTE, "disks are served all the same"
    assert says in found.text


def test_tap_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(code: int) -> None:
        def open_tap(name: str) -> list[int]:
            raise OSError(code, os.strerror(code))

        monkeypatch.setattr(tap, "open_tap", open_tap)

    monkeypatch.setenv("USER", "alice")
    refuse(errno.EPERM)
    assert "mode tap user alice" in named("tap").text
    refuse(errno.ENOENT)
    assert "modprobe tun" in named("tap").text
    refuse(errno.EBUSY)
    assert named("tap").state is State.NO


def test_kvm_that_runs_nothing_is_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kvm, "probe", lambda: kvm.Answer(False, "/dev/kvm opens, but no"))
    assert named("KVM") == Found(State.NOTE, "/dev/kvm opens, but no; QEMU will emulate")
    monkeypatch.setattr(kvm, "probe", lambda: kvm.Answer(True, "a guest ran"))
    assert named("KVM") == Found(State.YES, "a guest ran")


def test_seals_that_do_not_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    create = memfd.create
    monkeypatch.setattr(memfd, "create", lambda name, size: create(name, size, seals=0))
    assert named("shared memory") == Found(State.NOTE, "memory files, but no seals")
    monkeypatch.setattr(memfd, "can_shrink", lambda fd: False)
    assert named("shared memory") == Found(State.NOTE, "memory files, but seals do not hold")


def test_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda which: (120, resource.RLIM_INFINITY))
    found = named("open files")
    assert found.state is State.NOTE
    assert "120 now, unlimited at most: enough for some 10 devices" in found.text
    monkeypatch.setattr(resource, "getrlimit", lambda which: (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert named("open files").state is State.YES
    assert named("locked memory").text == "unlimited now, unlimited at most"


def test_back_end_descriptions(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(checks, "_DESCRIPTORS", (tmp_path / "absent", tmp_path))
    assert "0 of others" in named("descriptions").text
    for name, text in {"a": '{"binary": "/x/virtiofsd"}', "b": "[]", "c": "{", "d": '{"binary": 5}'}.items():
        (tmp_path / f"50-{name}.json").write_text(text)
    assert named("descriptions").state is State.NOTE
    (tmp_path / "50-pyvhost-net.json").write_text('{"type": "net", "binary": "/usr/bin/pyvhost-net"}')
    assert named("descriptions") == Found(State.YES, str(tmp_path / "50-pyvhost-net.json"))
