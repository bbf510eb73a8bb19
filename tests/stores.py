"""A store for tests: its operations as calls that return, and NBD servers on Unix sockets.

Promises: a call that doesn't end within a minute is a failed test, not one that hangs; a server ends with its `with`.
"""

from __future__ import annotations

import contextlib
import itertools
import mmap
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType

from pyvhost.host.poller import Poller
from pyvhost.scsi.stores.base import Extent, ExtentState, Store
from requirements import need_program

PATIENCE = 20.0


class Disk:
    """An open store, driven from the test's own thread."""

    def __init__(self, store: Store, poller: Poller) -> None:
        self.store = store
        self.poller = poller
        self.sizes: list[int] = []
        self.states: list[bool] = []
        store.on_resize = self.sizes.append
        store.on_state = self.states.append
        store.open(poller)

    def __enter__(self) -> Disk:
        self.until(lambda: self.store.online)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.store.close()

    def until(self, condition: Callable[[], object]) -> None:
        """Runs the control loop until the condition holds."""
        late: list[bool] = []
        guard = self.poller.call_later(PATIENCE, lambda: late.append(True))
        while not condition():
            self.poller.run_once()
            assert not late, f"it never came: {self.store!r} {getattr(self.store, 'trouble', '')}"
        guard.cancel()

    def call(self, begin: Callable[[Callable[[int], object]], object]) -> int:
        """What the operation that `begin(done)` begins ends with."""
        ended: list[int] = []
        begin(ended.append)
        assert not ended, "done was called from within"
        self.until(lambda: ended)
        return ended[0]

    def read(self, offset: int, length: int, cuts: list[int] | None = None) -> bytes:
        """The bytes, read into views that are cut at `cuts`."""
        memory = aligned(length)
        assert self.call(lambda done: self.store.read(offset, pieces(memory, cuts), done)) == 0
        return bytes(memory)

    def write(self, offset: int, data: bytes, cuts: list[int] | None = None, fua: bool = False) -> int:
        """The errno of writing `data` from views that are cut at `cuts`."""
        memory = aligned(len(data))
        memory[:] = data
        return self.call(lambda done: self.store.write(offset, pieces(memory, cuts), done, fua))

    def flush(self) -> int:
        """The errno of a flush."""
        return self.call(self.store.flush)

    def zero(self, offset: int, length: int, unmap: bool = False) -> int:
        """The errno of zeroing."""
        return self.call(lambda done: self.store.zero(offset, length, done, unmap))

    def discard(self, offset: int, length: int) -> int:
        """The errno of a discard."""
        return self.call(lambda done: self.store.discard(offset, length, done))

    def extents(self, offset: int, length: int) -> list[Extent]:
        """The extents of a range, which they must cover from its beginning without gaps."""
        answers: list[tuple[int, list[Extent]]] = []
        self.store.extents(offset, length, lambda number, found: answers.append((number, found)))
        self.until(lambda: answers)
        number, found = answers[0]
        assert number == 0
        at = offset
        for start, count, _ in found:
            assert start == at
            assert count > 0
            at += count
        assert offset < at <= offset + length
        return found

    def mapped(self, offset: int, length: int) -> bool:
        """Whether any of the range is."""
        return any(state is ExtentState.MAPPED for _, _, state in self.extents(offset, length))


def aligned(length: int) -> memoryview:
    """Memory that begins at a page, as a guest's mostly does."""
    return memoryview(mmap.mmap(-1, max(length, 1)))[:length]


def pieces(memory: memoryview, cuts: list[int] | None) -> list[memoryview]:
    """The memory in views that are cut at these places."""
    places = [0, *sorted(cuts or []), len(memory)]
    return [memory[begin:end] for begin, end in itertools.pairwise(places)]


class Server:
    """An NBD server on a Unix socket, which can be killed and started again."""

    def __init__(self, command: list[str], socket: Path) -> None:
        self.command = command
        self.socket = socket
        self.uri = f"nbd+unix:///?socket={socket}"
        self._process: subprocess.Popen[bytes] | None = None
        self.start()

    def start(self) -> None:
        """Start it; whoever connects too early has to try again."""
        self.socket.unlink(missing_ok=True)
        self._process = subprocess.Popen(self.command, stdin=subprocess.DEVNULL)

    @property
    def pid(self) -> int:
        """The process."""
        assert self._process is not None
        return self._process.pid

    def kill(self) -> None:
        """As if the host had lost it."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def stop(self) -> None:
        """As its operator ends it."""
        assert self._process is not None
        self._process.terminate()
        try:
            self._process.wait(5)
        except subprocess.TimeoutExpired:
            self.kill()


@contextlib.contextmanager
def running(command: list[str], socket: Path) -> Iterator[Server]:
    """The server, for a while."""
    server = Server(command, socket)
    try:
        yield server
    finally:
        server.stop()


def nbdkit(directory: Path, *arguments: str) -> contextlib.AbstractContextManager[Server]:
    """nbdkit with these arguments (options, filters, plugin and its parameters)."""
    program = need_program("nbdkit")
    socket = directory / "nbdkit.sock"
    return running([program, "--foreground", "--exit-with-parent", "-U", str(socket), *arguments], socket)


def qemu_nbd(image: Path, kind: str, *arguments: str) -> contextlib.AbstractContextManager[Server]:
    """qemu-nbd with an image that it may be connected to again."""
    program = need_program("qemu-nbd", package="qemu-utils")
    socket = image.with_suffix(".sock")
    setpriv = need_program(
        "setpriv", package="util-linux"
    )  # qemu-nbd alone would outlive tests that are killed
    fixed = ["--persistent", "--socket", str(socket), "--format", kind, "--discard=unmap"]
    return running([setpriv, "--pdeathsig", "KILL", program, *fixed, *arguments, str(image)], socket)


def make_qcow2(path: Path, size: int) -> Path:
    """An empty qcow2 image."""
    program = need_program("qemu-img", package="qemu-utils")
    subprocess.run([program, "create", "-q", "-f", "qcow2", str(path), str(size)], check=True)
    return path
