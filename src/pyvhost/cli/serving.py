"""A serving command as a child: started, waited for, listened to, ended.

Promises: the child is the command that a user would type, seen from outside; all that it prints is read at once,
kept, and told with every error; it ends with the thread that started it. Never: reaches into the process.
"""

from __future__ import annotations

import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from pyvhost.cli.guests.base import dying_with_parent

#: Lines kept of what it prints.
LINES = 2000
#: Seconds that it may take to end: some, where the machine is busy.
_PATIENCE = 20


class ServingError(RuntimeError):
    """The command did not come up, or ended. The message carries the end of what it printed."""


class Serving:
    """`pyvhost ARGUMENTS`, which is to listen at `sockets`. A context manager: leaving it ends the child.

    `program`: a Python file instead, which logs what the command would. `folder` is where it runs. `on_line` is
    called, on a thread of its own, with each line that the child prints.
    """

    def __init__(
        self,
        arguments: Sequence[str],
        sockets: Sequence[str | Path],
        *,
        program: str | None = None,
        folder: str | Path | None = None,
        on_line: Callable[[str], None] | None = None,
    ) -> None:
        self.arguments = list(arguments)
        self.program = program
        what = ["-m", "pyvhost.cli.main"] if program is None else [program]
        self.lines: deque[str] = deque(maxlen=LINES)
        self._on_line = on_line
        self._awaited = {str(path) for path in sockets}
        self._changed = threading.Condition()
        self._ended = False
        self.process = subprocess.Popen(
            [*dying_with_parent(), sys.executable, *what, *self.arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            cwd=folder,
        )
        self._reader = threading.Thread(target=self._read, name="pyvhost's output", daemon=True)
        self._reader.start()

    @property
    def pid(self) -> int:
        """The process's id."""
        return self.process.pid

    @property
    def running(self) -> bool:
        """Whether it runs."""
        return self.process.poll() is None

    def wait_ready(self, timeout: float = 600.0) -> Self:
        """Wait until it has named every socket, which it does when it listens there.

        Long enough for a first compilation. ServingError: it ended, or said nothing for `timeout` seconds.
        """
        with self._changed:
            self._changed.wait_for(lambda: not self._awaited or self._ended, timeout)
            if not self._awaited:
                return self
            ended = self._ended
        if ended:
            raise ServingError(f"{self} ended with status {self.process.wait()}:\n{self.tail()}")
        raise ServingError(f"{self} does not listen after {timeout:g} s:\n{self.tail()}")

    def tail(self, lines: int = 25) -> str:
        """The last lines that it printed."""
        return "\n".join(list(self.lines)[-lines:])

    def close(self) -> int:
        """Have it end, and if it does not, end it; its status."""
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(_PATIENCE)
            except subprocess.TimeoutExpired:
                self.process.kill()
        status = self.process.wait()
        self._reader.join(5)
        return status

    def __str__(self) -> str:
        return " ".join(["pyvhost" if self.program is None else f"python {self.program}", *self.arguments])

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _read(self) -> None:
        assert self.process.stdout is not None
        with self.process.stdout as pipe:
            for line in pipe:
                line = line.rstrip("\n")
                self.lines.append(line)
                if self._on_line is not None:
                    self._on_line(line)
                with self._changed:
                    self._awaited = {path for path in self._awaited if path not in line}
                    self._changed.notify_all()
        with self._changed:
            self._ended = True
            self._changed.notify_all()
