"""pyvhost's own back end as a process to be measured: the command that a user would type, nothing else.

Promises: the process ends with the benchmark, whatever happens to the benchmark; what it said is kept.
Never: reaches into the process. It is seen from outside, as the peer is.
"""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

#: How long an idle queue is polled where the benchmark's front end never sleeps, in microseconds.
BUSYLOOP_US = 1000


class BackEndError(RuntimeError):
    """The back end did not come up; the message carries the last line that it printed."""


class BackEnd:
    """One `pyvhost net` process."""

    def __init__(
        self,
        name: str,
        arguments: Sequence[str],
        *,
        core: int | None = None,
        wrap: Sequence[str] = (),
        transcript: Path | None = None,
    ) -> None:
        """Starts `pyvhost ARGUMENTS`, on one processor where `core` says so.

        `wrap`: words that go before the command (`unshare --net ...`). What it prints goes to `transcript`.
        """
        self.name = name
        pinned = ["taskset", "--cpu-list", str(core)] if core is not None else []
        command = [sys.executable, "-m", "pyvhost.cli.main", *arguments]
        self._transcript = transcript
        self._output = b""
        self.process = subprocess.Popen(
            ["setpriv", "--pdeathsig", "KILL", *wrap, *pinned, *command],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    @property
    def pid(self) -> int:
        """The process's id."""
        return self.process.pid

    def __enter__(self) -> BackEnd:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def wait_ready(self, sockets: Sequence[Path], seconds: float = 120.0) -> None:
        """Waits until it has said of each socket that it listens there.

        Long enough for a first compilation. Raises BackEndError when the process ends or stays silent.
        """
        assert self.process.stdout is not None
        deadline = time.monotonic() + seconds
        wanted = [str(path).encode() for path in sockets]
        while not all(path in self._output for path in wanted):
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([self.process.stdout], [], [], left)[0]:
                raise BackEndError(f"{self.name} did not listen within {seconds:g} s: {self._end()}")
            chunk = os.read(self.process.stdout.fileno(), 65536)
            if not chunk:
                raise BackEndError(f"{self.name} ended with status {self.process.wait()}: {self._end()}")
            self._output += chunk

    def pause(self) -> None:
        """Takes the whole process off its processors."""
        os.kill(self.pid, signal.SIGSTOP)

    def resume(self) -> None:
        """Puts it back."""
        os.kill(self.pid, signal.SIGCONT)

    def close(self) -> None:
        """Ends the process: asked first, so that it takes down what it set up; then killed."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGCONT)
            self.process.terminate()
        try:
            rest, _ = self.process.communicate(timeout=5)
        except subprocess.TimeoutExpired:
            self.process.kill()
            rest, _ = self.process.communicate()
        self._output += rest or b""
        if self._transcript is not None and self._output:
            self._transcript.write_bytes(self._output)

    def _end(self) -> str:
        # The whole of it is in the transcript.
        lines = self._output.decode(errors="replace").strip().splitlines()
        return lines[-1] if lines else "it said nothing"


def net_arguments(sockets: Sequence[Path], spec: str, *, busyloop: bool = False) -> list[str]:
    """`pyvhost net` that serves one device a socket, all on backends of one kind.

    `busyloop`: idle queues are polled, as DPDK's back end polls for ever.
    """
    arguments = ["net", "--backend", spec]
    if busyloop:
        arguments += ["--busyloop-timeout", str(BUSYLOOP_US)]
    for path in sockets:
        arguments += ["--socket-path", str(path)]
    return arguments
