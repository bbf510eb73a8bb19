"""A guest's shell, console and end, with a stand-in for the guest: a process that keeps the same protocol."""

from __future__ import annotations

import os
import select
import signal
import socket
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from pyvhost.cli.guests import Guest, GuestError, GuestTimeoutError, agent

# Obeys the line protocol of `agent`, with the host's sh; `die` has it end in the middle.
STAND_IN = """
import base64, os, socket, subprocess, sys
shell = socket.socket(fileno=int(sys.argv[1]))
print("console: up", flush=True)
lines = shell.makefile("r")
def ready(boot):
    shell.sendall(f"{sys.argv[2]} {boot}\\n".encode())
boot = 1
ready(boot)
for line in lines:
    token, seconds, *length, script = line.split()
    if token == "poweroff":
        print("console: off", flush=True)
        break
    if token == "reboot":
        boot += 1
        print("console: up again", flush=True)
        ready(boot)
        continue
    if script == base64.b64encode(b"die").decode():
        print("console: Kernel panic - not syncing", flush=True)
        os._exit(3)
    done = subprocess.run(
        ["timeout", seconds, "sh", "-c", base64.b64decode(script).decode()],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
    )
    status = 128 - done.returncode if done.returncode < 0 else done.returncode
    shell.sendall(done.stdout + f"\\n{token} {status}\\n".encode())
"""


class StandIn(Guest):
    """The stand-in as a guest. `program` may be another one."""

    def __init__(self, program: str = STAND_IN) -> None:
        super().__init__("stand-in")
        self._program = program

    def _command(
        self, folder: Path, shell: socket.socket
    ) -> tuple[list[str], dict[str, str], list[socket.socket]]:
        return [sys.executable, "-I", "-c", self._program, str(shell.fileno()), agent.READY], {}, []


def test_output_comes_back_as_it_was() -> None:
    with StandIn() as guest:
        assert guest.run("echo one; echo two >&2").output == "one\ntwo\n"
        assert guest.run("printf 'no newline'").output == "no newline"
        assert guest.run("true").output == ""
        assert guest.run("echo; echo").output == "\n\n"
        assert guest.run("seq 100000").output.split() == [str(n) for n in range(1, 100001)]


def test_words_reach_the_command_whole() -> None:
    with StandIn() as guest:
        assert guest.run(["printf", "%s|", "a b", "it's", "$HOME", ""]).output == "a b|it's|$HOME||"


def test_what_looks_like_an_end_is_none_without_the_token() -> None:
    with StandIn() as guest:
        assert guest.run("echo 0123456789abcdef 7").output == "0123456789abcdef 7\n"


def test_lines_are_told_as_they_come() -> None:
    lines: list[str] = []
    with StandIn() as guest:
        guest.run("echo one; echo; echo three", on_line=lines.append)
    assert lines == ["one", "", "three"]


def test_a_status_is_an_error_unless_it_is_asked_for() -> None:
    with StandIn() as guest:
        assert guest.run("echo why; exit 5", check=False).status == 5
        with pytest.raises(GuestError, match=r"(?s)status 5 from: echo why.*why.*console: up"):
            guest.run("echo why; exit 5")


def test_a_command_that_takes_too_long_ends_and_the_guest_goes_on() -> None:
    with StandIn() as guest:
        with pytest.raises(GuestTimeoutError, match="longer than 1 s"):
            guest.run("echo first; sleep 60", timeout=1)
        assert guest.run("echo then").output == "then\n"


def test_a_guest_that_dies_is_told_with_its_console() -> None:
    with StandIn() as guest, pytest.raises(GuestError, match=r"(?s)ended with status 3.*Kernel panic"):
        guest.run("die")


def test_a_guest_that_never_boots_is_told_with_its_console() -> None:
    program = "import time; print('waiting for a root', flush=True); time.sleep(60)"
    guest = StandIn(program)
    with pytest.raises(GuestTimeoutError, match=r"(?s)to boot.*waiting for a root"):
        guest.start(timeout=1)
    assert not guest.running


def test_a_program_that_is_not_there() -> None:
    class Absent(StandIn):
        def _command(
            self, folder: Path, shell: socket.socket
        ) -> tuple[list[str], dict[str, str], list[socket.socket]]:
            raise FileNotFoundError("no such kernel")

    with pytest.raises(GuestError, match="no such kernel"):
        Absent().start()


def test_reboot_and_power_off() -> None:
    with StandIn() as guest:
        assert guest.boot_id == "1"
        guest.reboot()
        assert guest.boot_id == "2"
        assert guest.run("echo still").output == "still\n"
        assert guest.power_off() == 0
        assert list(guest.console) == ["console: up", "console: up again", "console: off"]
        with pytest.raises(GuestError, match="does not run"):
            guest.run("echo")


def test_stopping_ends_what_it_started_in_its_session() -> None:
    program = "import subprocess; print(subprocess.Popen(['sleep', '1000']).pid, flush=True)\n" + STAND_IN
    with StandIn(program) as guest:
        child = os.pidfd_open(int(guest.console[0]))
        guest.stop()
        guest.stop()
    ended, _, _ = select.select([child], [], [], 10)
    os.close(child)
    assert ended


def test_a_guest_that_ignores_sigterm_is_killed() -> None:
    program = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)\n" + STAND_IN
    with StandIn(program) as guest:
        guest.stop()
        assert guest.wait() == -signal.SIGKILL


def test_escape_sequences_stay_off_the_console() -> None:
    with StandIn("print('\\x1b[1;31mred\\x1b[0m', flush=True)\n" + STAND_IN) as guest:
        assert guest.console[0] == "red"


class ShellGuest(Guest):
    """What a guest's own agent is, served by the host's sh."""

    # sh knows descriptors of one digit.
    LAUNCH = "import os, sys; os.dup2(int(sys.argv[1]), 3); os.execvp('sh', ['sh', '-c', *sys.argv[2:]])"
    FUNCTIONS = "poweroff_now() { exit 0; }\nreboot_now() { exit 1; }\nline_gone() { exit 2; }\nTMPDIR=$0\n"

    def _command(
        self, folder: Path, shell: socket.socket
    ) -> tuple[list[str], dict[str, str], list[socket.socket]]:
        script = self.FUNCTIONS + agent.LOOP
        return [sys.executable, "-I", "-c", self.LAUNCH, str(shell.fileno()), script, str(folder)], {}, []


def test_the_agent_runs_scripts_and_ends_when_told() -> None:
    with ShellGuest("sh") as guest:
        assert guest.run("echo one; echo two >&2; printf three").output == "one\ntwo\nthree"
        assert guest.run("exit 7", check=False).status == 7
        assert guest.run("true").output == ""
        assert guest.power_off() == 0


@pytest.mark.parametrize(
    "cut",
    [
        lambda line: line[20:],
        lambda line: line[3:],
        lambda line: line[:30] + line[31:],
        lambda line: line[-5:],
        lambda line: b"\n",
        lambda line: b"!" + line[1:],
        lambda line: line[:-6] + b"*" + line[-5:],
    ],
)
def test_a_damaged_request_is_answered_and_not_run(
    cut: Callable[[bytes], bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = agent.request
    with ShellGuest("sh") as guest:
        monkeypatch.setattr(agent, "request", lambda *words: cut(whole(*words)))
        with pytest.raises(GuestError, match="did not understand a request"):
            guest.run("echo it ran; exit 9", check=False)
        monkeypatch.undo()
        assert guest.run("echo and on").output == "and on\n"
