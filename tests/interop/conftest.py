"""Real guests against the real `pyvhost net`, `scsi` and `vsock`: what the tests of this folder share."""

from __future__ import annotations

import dataclasses
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest

from netns import network_namespace
from pyvhost.cli.guests import Kernel, KernelError, find_kernel
from pyvhost.cli.serving import Serving
from pyvhost.observe.reader import Row, snapshot
from requirements import need, need_program

Ip = Callable[[str], str]


@dataclasses.dataclass
class Card:
    """A NIC that is served: by which process, at which socket."""

    serving: Serving
    socket: Path

    def counted(self, queue: str) -> Row:
        """The counters of one of its queues, as `pyvhost top` would read them."""
        rows = [
            row
            for process in snapshot().processes
            if process.pid == self.serving.pid
            for row in process.rows
            if row.label("queue") == queue
        ]
        assert len(rows) == 1, rows
        return rows[0]


@dataclasses.dataclass
class Controller(Card):
    """A SCSI controller that is served."""

    def ctl(self, *words: str, status: int = 0) -> Any:
        """What `pyvhost ctl` prints of it, as JSON. With `status` that of a refusal: its message."""
        command = [sys.executable, "-m", "pyvhost.cli.main", "ctl", str(self.socket), *words]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == status, done.stderr
        if status:
            return done.stderr
        return json.loads(done.stdout) if done.stdout else None


@dataclasses.dataclass
class SocketDevice(Card):
    """A socket device that is served, and where its guest's ports are on the host."""

    cid: int
    uds: Path

    def connect(self, port: int, kind: int = socket.SOCK_STREAM) -> socket.socket:
        """A connection to a port of the guest. ConnectionRefusedError: there is none."""
        seqpacket = kind == socket.SOCK_SEQPACKET
        sock = socket.socket(socket.AF_UNIX, kind)
        try:
            sock.settimeout(60.0)
            sock.connect(f"{self.uds}.seqpacket" if seqpacket else str(self.uds))
            sock.sendall(b"CONNECT %d\n" % port)
            answer = sock.recv(64) if seqpacket else b""
            while not seqpacket and not answer.endswith(b"\n") and (byte := sock.recv(1)):
                answer += byte
            if not answer.startswith(b"OK "):
                raise ConnectionRefusedError(f"{self.uds}: port {port}: {answer!r}")
            sock.setblocking(True)
        except BaseException:
            sock.close()
            raise
        return sock

    def listen(self, port: int, kind: int = socket.SOCK_STREAM) -> socket.socket:
        """Where the guest arrives that connects to this port of the host."""
        server = socket.socket(socket.AF_UNIX, kind)
        server.bind(f"{self.uds}_{port}")
        server.listen(4096)
        return server


class Served:
    """Starts `pyvhost net` for cards, `pyvhost scsi` for controllers, `pyvhost vsock`, and ends them all.

    None may have died or spoken of an error of its own.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._servings: list[Serving] = []

    def start(
        self,
        name: str,
        backend: str,
        *options: str,
        sockets: int = 1,
        on_line: Callable[[str], None] | None = None,
    ) -> list[Card]:
        """Cards with the same backend, in one process. It is not waited for: see `wait`.

        `on_line` is called with each line that it prints, on a thread of its own.
        """
        paths = [self.folder / f"{name}{number}" for number in range(sockets)]
        arguments = ["net", "--backend", backend, *options]
        for path in paths:
            arguments += ["--socket-path", str(path)]
        serving = Serving(arguments, paths, on_line=on_line)
        self._servings.append(serving)
        return [Card(serving, path) for path in paths]

    def start_disks(
        self, name: str, *luns: str, request_queues: int = 1, on_line: Callable[[str], None] | None = None
    ) -> Controller:
        """A controller with these LUNs, `[TARGET:LUN=]SPEC` each. It is not waited for: see `wait`."""
        path = self.folder / name
        arguments = ["scsi", "--socket-path", str(path), "--request-queues", str(request_queues)]
        for lun in luns:
            arguments += ["--lun", lun]
        serving = Serving(arguments, [path], on_line=on_line)
        self._servings.append(serving)
        return Controller(serving, path)

    def start_vsock(self, name: str, *cids: int, group: bool = False) -> list[SocketDevice]:
        """A socket device for each of these guests, in one process. It is not waited for: see `wait`."""
        paths = [self.folder / f"{name}{cid}" for cid in cids]
        arguments = ["vsock", *(["--group", name] if group else [])]
        for path, cid in zip(paths, cids, strict=True):
            arguments += ["--socket-path", str(path), "--guest-cid", str(cid), "--uds-path", f"{path}.host"]
        serving = Serving(arguments, paths)
        self._servings.append(serving)
        return [
            SocketDevice(serving, path, cid, Path(f"{path}.host"))
            for path, cid in zip(paths, cids, strict=True)
        ]

    def wait(self) -> None:
        """Until all listen."""
        for serving in self._servings:
            serving.wait_ready()

    def kill(self, serving: Serving) -> None:
        """End one as nothing ought to end: at once, with nothing put in order."""
        self._servings.remove(serving)
        serving.process.kill()
        serving.close()

    def end(self, serving: Serving) -> None:
        """End one; it was well until now."""
        self._servings.remove(serving)
        died = not serving.running
        status = serving.close()
        said = "\n".join(serving.lines)
        assert not died, f"{serving} ended with {status}:\n{said}"
        assert "Traceback" not in said, f"{serving}:\n{said}"

    def close(self) -> None:
        """End all of them."""
        with ExitStack() as stack:
            for serving in self._servings:
                stack.callback(self.end, serving)


@pytest.fixture(scope="module")
def is_root() -> bool:
    return os.geteuid() == 0


@pytest.fixture(scope="module")
def ip(is_root: bool) -> Iterator[Ip | None]:
    """As root: this module's tests, and all they start, are in a network of their own. Else None."""
    with network_namespace() if is_root else nullcontext() as command:
        yield command


@pytest.fixture(scope="module")
def served(ip: Ip | None) -> Iterator[Served]:
    """Where cards are served from."""
    with TemporaryDirectory(prefix="pyvhost-test-") as folder:
        all_served = Served(Path(folder))
        with ExitStack() as stack:
            stack.callback(all_served.close)
            yield all_served


@pytest.fixture(scope="session")
def kernel() -> Kernel:
    """Debian's kernel for QEMU, fetched if it is not here."""
    need_program("qemu-system-x86_64", package="qemu-system-x86")
    need_program("busybox", package="busybox-static")
    try:
        return find_kernel()
    except KernelError as problem:
        need(False, str(problem))
        raise


def eventually(condition: Callable[[], object], seconds: float = 30.0) -> None:
    """Waits for what nothing announces: counters in a file, or in another program."""
    tick = threading.Event()
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come about"
        tick.wait(0.05)
