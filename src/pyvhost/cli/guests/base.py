"""A guest, whatever runs it: its process, its console, its shell.

Promises: one thread a guest reads its console and its shell, so that neither ever fills up; every wait has a
limit, and what goes wrong is told with the console's last lines; `stop` ends the process that `start` made, with
the children it left in its own session, and nothing else. Never: retries.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import select
import selectors
import shutil
import signal
import socket
import subprocess
import threading
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from types import TracebackType
from typing import Self

from pyvhost.cli.guests import agent

#: How many lines of a console are kept.
CONSOLE_LINES = 4000
#: A guest that took a command this much longer than the command's own limit is not going to answer.
GRACE_SECONDS = 10.0

_READY = re.compile(rf"{agent.READY} (\S+)")
_REFUSED = re.compile(rf"{agent.REFUSED} (.*)")
_END = re.compile(r"[0-9a-f]{16} \d+")
_ESCAPES = re.compile(r"\x1b(?:\[[0-9;?]*[A-Za-z]|[@-Z\\-_])")

LineCallback = Callable[[str], None]


class GuestError(RuntimeError):
    """A guest did not do as told. The message says what was wanted and ends with the console's last lines."""


class GuestTimeoutError(GuestError):
    """It did not do it in time."""


@dataclass(frozen=True)
class Result:
    """What a command in a guest came to: its exit status, and what it wrote to stdout and stderr together."""

    status: int
    output: str


class Guest(ABC):
    """A booted Linux with its NICs. Use it as a context manager: entering starts it, leaving stops it.

    `name` is for messages. `on_line` is called, on the guest's own thread, with every line of its console.
    One thread at a time may have it run commands; `stop` and the console may be used by any.
    """

    def __init__(self, name: str, *, on_line: LineCallback | None = None) -> None:
        self.name = name
        self.console: deque[str] = deque(maxlen=CONSOLE_LINES)
        self._on_line = on_line
        self._changed = threading.Condition()
        self._process: subprocess.Popen[bytes] | None = None
        self._shell: socket.socket | None = None
        self._reader: threading.Thread | None = None
        self._received = ""  # what came over the shell and nobody took
        self._shell_line: LineCallback | None = None
        self._blank = 0
        self._boots: list[str] = []
        self._ended = False
        self._unanswered = False
        self._refused = ""  # why the last request was not run
        self._folder: TemporaryDirectory[str] | None = None

    # What each kind of guest does its own way.

    @abstractmethod
    def _command(
        self, folder: Path, shell: socket.socket
    ) -> tuple[list[str], dict[str, str], list[socket.socket]]:
        """What to execute, with what environment added, and the sockets that the program inherits.

        `folder` is the guest's own until it is stopped; `shell` is the program's end of the shell.
        """

    def _launched(self) -> None:  # noqa: B027
        """Called when the process runs, before its boot is waited for."""

    def _released(self) -> None:  # noqa: B027
        """Called once the process is gone."""

    # Life.

    def start(self, timeout: float = 60.0) -> Self:
        """Launch it, and wait until it takes commands. Errors as from `wait_booted`."""
        self.launch()
        return self.wait_booted(timeout)

    def launch(self) -> Self:
        """Start its process, which ends with the calling thread. GuestError: something that it needs is absent."""
        if self._process is not None:
            raise GuestError(f"{self.name} has been started already")
        self._folder = TemporaryDirectory(prefix="pyvhost-guest-")
        self._shell, theirs = socket.socketpair()
        given: list[socket.socket] = [theirs]
        try:
            argv, environment, more = self._command(Path(self._folder.name), theirs)
            given += more
            self._process = subprocess.Popen(
                [*dying_with_parent(), *argv],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                pass_fds=[sock.fileno() for sock in given],
                env={**os.environ, **environment},
                start_new_session=True,
            )
        except BaseException as problem:
            self.stop()
            if isinstance(problem, OSError):
                raise GuestError(f"{self.name} cannot be started: {problem}") from problem
            raise
        finally:
            for sock in given:
                sock.close()
        self._reader = threading.Thread(target=self._read, name=f"{self.name} console", daemon=True)
        self._reader.start()
        return self

    def wait_booted(self, timeout: float = 60.0) -> Self:
        """Wait until it takes commands. GuestError: it died; GuestTimeoutError: not after `timeout` seconds."""
        try:
            self._launched()
            self._wait_for(lambda: bool(self._boots), "to boot", timeout)
        except BaseException:
            self.stop()
            raise
        return self

    @property
    def pid(self) -> int:
        """The process's id. GuestError: it was not started."""
        if self._process is None:
            raise GuestError(f"{self.name} has not been started")
        return self._process.pid

    @property
    def running(self) -> bool:
        """Whether the process runs."""
        process = self._process
        if process is None or process.returncode is not None:
            return False
        return os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT | os.WNOHANG) is None

    def wait(self, timeout: float = 30.0) -> int:
        """Wait for the process's end; its exit status. GuestTimeoutError: it still runs."""
        if self._process is None:
            raise GuestError(f"{self.name} has not been started")
        if not self._reaped(timeout):
            raise GuestTimeoutError(self._told(f"{self.name} did not end within {timeout:g} s"))
        if self._reader is not None:
            self._reader.join(timeout)
        return self._process.wait()

    def _reaped(self, timeout: float) -> bool:
        """Whether it ended within so many seconds; then what is left of its session has ended too."""
        process = self._process
        assert process is not None
        if process.returncode is not None:
            return True
        fd = os.pidfd_open(process.pid)
        try:
            if not select.select([fd], [], [], timeout)[0]:
                return False
        finally:
            os.close(fd)
        # UML's address spaces are processes of its session. Until the dead leader is reaped its id is nobody else's.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return True

    def power_off(self, timeout: float = 30.0) -> int:
        """Have the guest shut its devices down and end by itself; the process's exit status."""
        self._send(b"poweroff 0 0\n")
        return self.wait(timeout)

    def reboot(self, timeout: float = 60.0) -> None:
        """Have the guest reboot itself in order, and wait until it takes commands again."""
        self._reboot(lambda: self._send(b"reboot 0 0\n"), timeout)

    def _reboot(self, act: Callable[[], None], timeout: float) -> None:
        """Do what makes it boot again, and wait for that."""
        boots = len(self._boots)
        with self._changed:
            self._unanswered = False
        act()
        self._wait_for(lambda: len(self._boots) > boots, "to boot again", timeout)

    @property
    def boot_id(self) -> str:
        """The kernel's own name of this boot; another one after each."""
        return self._boots[-1] if self._boots else ""

    def stop(self) -> None:
        """End it at once, if it runs, and let go of all it had. May be called again."""
        process = self._process
        if process is not None:
            if self.running:
                process.terminate()
            if not self._reaped(3):
                process.kill()
                self._reaped(10)
        if self._reader is not None and self._reader is not threading.current_thread():
            self._reader.join(5)
        if self._shell is not None:
            self._shell.close()
        self._released()
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None

    def __enter__(self) -> Self:
        if self._process is None:
            self.launch()
        return self if self._boots else self.wait_booted()

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()

    # Commands.

    def run(
        self,
        command: str | Sequence[str],
        *,
        timeout: float = 30.0,
        check: bool = True,
        on_line: LineCallback | None = None,
    ) -> Result:
        """Run a shell script, or one command with its arguments, in the guest, as its root.

        `on_line` is called with each line of output as it comes, on the guest's thread. GuestError: with `check`,
        the status was not 0, or the request came through damaged and was not run; GuestTimeoutError: it ran longer
        than `timeout` seconds and was ended in the guest.
        """
        script = command if isinstance(command, str) else " ".join(_quote(word) for word in command)
        token = secrets.token_hex(8)
        end = re.compile(rf"\n{token} (\d+)\n")
        with self._changed:
            if self._unanswered:
                raise GuestError(self._told(f"{self.name} still owes an answer, and takes no commands"))
            self._received = ""
            self._shell_line = on_line
            self._blank = 0
            self._refused = ""
            self._unanswered = True
        self._send(agent.request(token, script, timeout))
        self._wait_for(
            lambda: bool(self._refused) or end.search("\n" + self._received) is not None,
            f"to run: {script}",
            timeout + GRACE_SECONDS,
            lambda: self._received,
        )
        with self._changed:
            if self._refused:
                self._shell_line = None
                self._unanswered = False
                raise GuestError(
                    self._told(f"{self.name} did not understand a request ({self._refused}): {script}")
                )
            found = end.search("\n" + self._received)
            assert found is not None
            output = ("\n" + self._received)[1 : found.start()] if found.start() else ""
            self._received = ("\n" + self._received)[found.end() :]
            self._shell_line = None
            self._unanswered = False
        status = int(found[1])
        if status in (124, 143) and check:
            raise GuestTimeoutError(
                self._told(f"{self.name} ran longer than {timeout:g} s: {script}", output)
            )
        if status and check:
            raise GuestError(self._told(f"{self.name}: status {status} from: {script}", output))
        return Result(status, output)

    def console_tail(self, lines: int = 25) -> str:
        """The last lines of the console."""
        return "\n".join(list(self.console)[-lines:])

    # The thread that reads.

    def _read(self) -> None:
        process, shell = self._process, self._shell
        assert process is not None
        assert process.stdout is not None
        assert shell is not None
        console = _Lines(self._console_line)
        commands = _Lines(self._command_line)
        with selectors.DefaultSelector() as selector, process.stdout as pipe:
            selector.register(pipe, selectors.EVENT_READ)
            selector.register(shell, selectors.EVENT_READ)
            # What UML leaves behind may hold the pipe open: the process's own end counts.
            ended = os.pidfd_open(process.pid)
            selector.register(ended, selectors.EVENT_READ)
            while selector.get_map():
                ready = {key.fileobj for key, _ in selector.select()}
                if ready == {ended}:
                    break
                if pipe in ready:
                    data = os.read(pipe.fileno(), 65536)
                    console.feed(data)
                    if not data:
                        selector.unregister(pipe)
                if shell in ready:
                    try:
                        data = shell.recv(65536)
                    except OSError:
                        data = b""
                    if data:
                        self._shell_data(commands, data)
                    else:
                        selector.unregister(shell)
            os.close(ended)
        console.flush()
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    def _console_line(self, line: str) -> None:
        line = _ESCAPES.sub("", line)
        self.console.append(line)
        if self._on_line is not None:
            self._on_line(line)

    def _shell_data(self, lines: _Lines, data: bytes) -> None:
        with self._changed:
            self._received += data.decode(errors="replace")
        lines.feed(data)
        with self._changed:
            self._changed.notify_all()

    def _command_line(self, line: str) -> None:
        if ready := _READY.fullmatch(line):
            with self._changed:
                self._boots.append(ready[1])
                self._received = ""
            return
        if refused := _REFUSED.fullmatch(line):
            with self._changed:
                self._refused = refused[1]
            return
        # The end of an output is a newline more and the token: an empty line waits for what follows it.
        if (callback := self._shell_line) is not None and not _END.fullmatch(line) and line:
            for _ in range(self._blank):
                callback("")
            callback(line)
        self._blank = 0 if line else self._blank + 1

    # Helpers.

    def _send(self, data: bytes) -> None:
        if self._shell is None or not self.running:
            raise GuestError(self._told(f"{self.name} does not run"))
        try:
            self._shell.sendall(data)
        except OSError as problem:
            raise GuestError(self._told(f"{self.name} does not listen: {problem}")) from problem

    def _wait_for(
        self, done: Callable[[], bool], what: str, timeout: float, seen: Callable[[], str] = str
    ) -> None:
        with self._changed:
            self._changed.wait_for(lambda: done() or self._ended, timeout)
            if done():
                return
            ended = self._ended
        if ended:
            status = self.wait() if self._process is not None else -1
            raise GuestError(self._told(f"{self.name} was {what}, and ended with status {status}", seen()))
        raise GuestTimeoutError(
            self._told(f"{self.name} was {what}, and did not within {timeout:g} s", seen())
        )

    def _told(self, text: str, output: str = "") -> str:
        parts = [text]
        if output.strip():
            parts.append("--- its output:\n" + output.strip("\n"))
        parts.append("--- the end of its console:\n" + self.console_tail())
        return "\n".join(parts)


class _Lines:
    """Bytes in, whole lines out, without their ends."""

    def __init__(self, out: LineCallback) -> None:
        self._out = out
        self._rest = b""

    def feed(self, data: bytes) -> None:
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            self._out(line.decode(errors="replace").rstrip("\r"))

    def flush(self) -> None:
        if self._rest:
            self.feed(b"\n")


def _quote(word: str) -> str:
    return "'" + word.replace("'", "'\\''") + "'"


def dying_with_parent() -> list[str]:
    """The words before a command that is to get SIGTERM when the thread that started it ends, if this host can."""
    setpriv = shutil.which("setpriv")
    return [setpriv, "--pdeathsig", "TERM"] if setpriv else []
