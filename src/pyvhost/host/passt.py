"""passt as a child: a guest's way into the host's network without any privilege (https://passt.top).

passt is spoken to over one end of a socket pair, in the framing of QEMU's stream sockets.

Promises: passt lives as long as the descriptor, not a moment longer: it ends by itself when its socket does, so
also when this process is killed. What it says goes to the log, and into the error if it fails.
Never: reads or writes a frame; leaves a child behind.
"""

from __future__ import annotations

import errno
import logging
import os
import pwd
import re
import select
import shutil
import socket
import subprocess
import tempfile
import time
from collections import deque
from collections.abc import Callable, Sequence

from pyvhost.host.poller import Poller

#: Seconds that passt may take to get ready.
PATIENCE = 20.0

#: What passt says where there is no system logger; it says it for every line.
_NOISE = re.compile(rb"Failed to send \d+ bytes to syslog")

_log = logging.getLogger(__name__)


def program() -> str:
    """Where passt is. OSError ENOENT: not installed."""
    path = shutil.which("passt")
    if path is None:
        raise OSError(errno.ENOENT, "passt is not installed: apt-get install passt")
    return path


class Passt:
    """One passt, from `start` to its end or `close`. All on the poller's thread.

    `on_exit` is called when it has ended by itself; `start` may be called again then.
    """

    def __init__(self, options: Sequence[str], poller: Poller, on_exit: Callable[[], object]) -> None:
        self.options = list(options)
        self._poller = poller
        self._on_exit = on_exit
        self._socket: socket.socket | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._pidfd = -1
        self._tail = b""
        #: The last lines it said.
        self.said: deque[str] = deque(maxlen=20)

    @property
    def fd(self) -> int:
        """Our end of its socket; -1 when it doesn't run. It stays open until `close` or `start`."""
        return self._socket.fileno() if self._socket is not None else -1

    @property
    def pid(self) -> int:
        """Its process id; -1 when it doesn't run."""
        return self._process.pid if self._process is not None else -1

    def start(self, *, wait: bool = True) -> None:
        """Start it, and with `wait`, wait until it is ready. The former socket, if any, is closed.

        OSError: ENOENT it is not installed; ETIMEDOUT; ECHILD it ended at once, the text has what it said.
        """
        self.close()
        self.said.clear()
        path = program()
        if not wait:
            self._spawn([path, "--foreground", *self.options])
            return
        with tempfile.TemporaryDirectory(prefix="pyvhost-") as directory:
            # passt writes its process id when it has set itself up; a FIFO is a file that can be waited for.
            ready = os.path.join(directory, "pid")
            os.mkfifo(ready, 0o600)
            if os.geteuid() == 0:
                # It gives up root first.
                owner = self._runs_as()
                os.chown(directory, owner, -1)
                os.chown(ready, owner, -1)
            reader = os.open(ready, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            try:
                self._spawn([path, "--foreground", "--pid", ready, *self.options])
                self._await(reader)
            except BaseException:
                self.close()
                raise
            finally:
                os.close(reader)

    def kill(self) -> None:
        """End it, and have `on_exit` called when it has ended. Nothing happens if it doesn't run."""
        if self._process is not None:
            self._process.kill()

    def close(self) -> None:
        """End it, if it runs, and close the socket."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None
        if self._process is not None:
            self._process.kill()
            self._reap()

    def _spawn(self, command: list[str]) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            ours.setblocking(False)
            try:
                self._process = subprocess.Popen(
                    [*command, "--fd", str(theirs.fileno())],
                    pass_fds=[theirs.fileno()],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.PIPE,
                    # A signal from the terminal is for this process, which ends passt when it wants to.
                    process_group=0,
                )
            except BaseException:
                ours.close()
                raise
        self._socket = ours
        self._pidfd = os.pidfd_open(self._process.pid)
        self._poller.register(self._pidfd, select.EPOLLIN, self._ended)
        assert self._process.stderr is not None
        os.set_blocking(self._process.stderr.fileno(), False)
        self._poller.register(self._process.stderr.fileno(), select.EPOLLIN, self._hear)

    def _await(self, reader: int) -> None:
        assert self._process is not None
        assert self._process.stderr is not None
        poll = select.poll()
        for fd in (reader, self._pidfd, self._process.stderr.fileno()):
            poll.register(fd, select.POLLIN)
        end = time.monotonic() + PATIENCE
        while True:
            now = time.monotonic()
            events = dict(poll.poll(max(0.0, end - now) * 1000))
            if not events:
                raise OSError(errno.ETIMEDOUT, f"passt was not ready within {PATIENCE:g} s{self._words()}")
            if self._process.stderr.fileno() in events and not self._hear(0):
                poll.unregister(self._process.stderr.fileno())
            if self._pidfd in events:
                code = self._reap()
                raise OSError(errno.ECHILD, f"passt ended at once, {_ending(code)}{self._words()}")
            if reader in events:
                if os.read(reader, 100):
                    return
                poll.unregister(reader)  # closed without a word: its end will be told, or is awaited

    def _ended(self, mask: int) -> None:
        code = self._reap()
        _log.error("passt ended, %s%s", _ending(code), self._words())
        self._on_exit()

    def _reap(self) -> int:
        assert self._process is not None
        code = self._process.wait()
        self._hear(0)
        if self._pidfd >= 0:
            self._poller.unregister(self._pidfd)
            os.close(self._pidfd)
            self._pidfd = -1
        if self._process.stderr is not None:
            self._poller.unregister(self._process.stderr.fileno())
            self._process.stderr.close()
        self._process = None
        return code

    def _hear(self, mask: int) -> bool:
        """Take in what passt says, 64 KiB at most; whether there may be more to come."""
        assert self._process is not None
        assert self._process.stderr is not None
        try:
            got = os.read(self._process.stderr.fileno(), 65536)
        except BlockingIOError:
            return True
        *lines, self._tail = (self._tail + got).split(b"\n")
        if not got:
            self._poller.unregister(self._process.stderr.fileno())
            lines, self._tail = [self._tail], b""
        for line in lines:
            if line.strip() and not _NOISE.fullmatch(line.strip()):
                text = line.decode(errors="replace").rstrip()
                self.said.append(text)
                _log.debug("passt: %s", text)
        # A line without an end is not kept for ever.
        self._tail = self._tail[-4096:]
        return bool(got)

    def _words(self) -> str:
        return ": " + " / ".join(self.said) if self.said else ""

    def _runs_as(self) -> int:
        """The user that passt becomes when it is started by root."""
        name = "nobody"
        for option, value in zip(self.options, self.options[1:], strict=False):
            if option == "--runas":
                name = value.split(":")[0]
        return int(name) if name.isdigit() else pwd.getpwnam(name).pw_uid


def _ending(code: int) -> str:
    return f"killed by signal {-code}" if code < 0 else f"exit status {code}"
