"""A socket device that is served, a guest's driver at it, and the host's ends of its connections as socket pairs.

    with VsockScene(tmp_path) as scene, scene.guest() as guest:
        host = scene.listen(80)
        sock = guest.connect(80)
        end = host.get()              # an `Ends.theirs` to read from and write to

Promises: what the device does is done on its control thread; all that was opened is closed. Never: knows any of the
package's own ends.
"""

from __future__ import annotations

import queue
import select
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from back_end import PATIENCE, BackEnd
from pyvhost.abi import virtio_vsock as abi
from pyvhost.driver.memory import MIB, GuestMemory
from pyvhost.driver.vsock import VsockDriver
from pyvhost.vsock.device import VsockDevice

CID = 52
KINDS = {abi.TYPE_STREAM: socket.SOCK_STREAM, abi.TYPE_SEQPACKET: socket.SOCK_SEQPACKET}


class PairEnd:
    """The other end of a connection: one half of a socket pair is the device's, `theirs` the test's."""

    def __init__(self, type_: int = abi.TYPE_STREAM, *, buffer: int | None = None) -> None:
        self._mine, self.theirs = socket.socketpair(socket.AF_UNIX, KINDS[type_])
        self._mine.setblocking(False)
        self.theirs.settimeout(PATIENCE)
        if buffer is not None:
            self._mine.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, buffer)
        self.fd = self._mine.fileno()
        #: "accepted", "refused", "shutdown FLAGS", "close" or "reset", as they came.
        self.told: queue.Queue[str] = queue.Queue()

    def accepted(self) -> None:
        self.told.put("accepted")

    def refused(self, reason: str) -> None:
        self._mine.close()
        self.told.put("refused")

    def shutdown(self, flags: int) -> None:
        if flags & abi.SHUTDOWN_SEND:
            self._mine.shutdown(socket.SHUT_WR)
        if flags & abi.SHUTDOWN_RCV:
            self._mine.shutdown(socket.SHUT_RD)
        # Who waits for it may look at the socket at once.
        self.told.put(f"shutdown {flags}")

    def ended(self) -> int:
        found = self._polled(select.POLLRDHUP)
        if found & select.POLLHUP:
            return abi.SHUTDOWN_SEND | abi.SHUTDOWN_RCV
        return abi.SHUTDOWN_SEND if found & select.POLLRDHUP else 0

    def close(self, reset: bool) -> None:
        self._mine.close()
        self.told.put("reset" if reset else "close")

    def wait_told(self, *words: str) -> None:
        """What it is told next, in this order."""
        for word in words:
            assert (found := self.told.get(timeout=PATIENCE)) == word, found

    def wait_over(self) -> str:
        """The last that it is told."""
        while (word := self.told.get(timeout=PATIENCE)) not in ("close", "reset", "refused"):
            pass
        return word

    def _polled(self, events: int) -> int:
        poller = select.poll()
        poller.register(self.fd, events)
        return sum(event for _, event in poller.poll(0))


class VsockScene:
    """Devices on sockets in a folder, one for each of `cids`."""

    def __init__(self, folder: Path, *cids: int, **options: Any) -> None:
        self.devices = [VsockDevice(cid, **options) for cid in cids or (CID,)]
        self.back_end = BackEnd(folder, *self.devices)
        self._accepting: dict[int, Callable[[Any], None]] = {}
        self._ends: list[PairEnd] = []
        for device in self.devices:
            self.back_end.ask(lambda device=device: self._listen_on(device))  # type: ignore[misc]

    def _listen_on(self, device: VsockDevice) -> None:
        device.connections.on_request = self._requested

    @property
    def device(self) -> VsockDevice:
        """The first one."""
        return self.devices[0]

    @contextmanager
    def guest(self, at: int = 0, **options: Any) -> Iterator[VsockDriver]:
        """A guest's driver that has started, on the device of number `at`."""
        options.setdefault("timeout", PATIENCE)
        with ExitStack() as stack:
            memory = stack.enter_context(GuestMemory(64 * MIB))
            front = stack.enter_context(self.back_end.connect(at))
            driver = stack.enter_context(VsockDriver(front, memory, **options))
            driver.start()
            yield driver

    def listen(self, port: int, **options: Any) -> queue.Queue[PairEnd]:
        """Have the host accept what guests ask of `port`; the ends as they come."""
        accepted: queue.Queue[PairEnd] = queue.Queue()

        def accept(request: Any) -> None:
            end = self._keep(PairEnd(request.key.type, **options))
            request.accept(end)
            accepted.put(end)

        self._accepting[port] = accept
        return accepted

    def hold(self, port: int) -> queue.Queue[Any]:
        """Have the host answer what guests ask of `port` not at all; the requests as they come."""
        asked: queue.Queue[Any] = queue.Queue()
        self._accepting[port] = asked.put
        return asked

    def connect(self, guest_port: int, type_: int = abi.TYPE_STREAM, at: int = 0, **options: Any) -> PairEnd:
        """Have the host ask the guest for a connection."""
        end = self._keep(PairEnd(type_, **options))
        assert self.back_end.ask(lambda: self.devices[at].connections.connect(end, type_, guest_port))
        return end

    def pair(self, guest: VsockDriver, port: int = 80, **options: Any) -> tuple[Any, PairEnd]:
        """A connection that the guest has asked for, and its other end."""
        accepted = self.listen(port, **options.pop("end", {}))
        return guest.connect(port, **options), accepted.get(timeout=PATIENCE)

    def count(self, name: str, at: int = 0) -> int:
        """One of the state machine's counters."""
        return int(self.back_end.ask(lambda: getattr(self.devices[at].connections, name)))

    def open_connections(self, at: int = 0) -> int:
        """How many the data path has."""
        return self.back_end.ask(lambda: self.devices[at].link.open_connections)

    def wait_closed(self, guest: VsockDriver | None = None, *, at: int = 0) -> None:
        """Until the data path has let go of all; `guest` reads what it is told meanwhile."""
        tick, deadline = threading.Event(), time.monotonic() + PATIENCE
        while number := self.open_connections(at):
            assert time.monotonic() < deadline, f"{number} connections are left"
            tick.wait(0.005)
            if guest is not None:
                guest.pump()

    def _requested(self, request: Any) -> None:
        accept = self._accepting.get(request.key.peer_port)
        if accept is None:
            request.refuse()
        else:
            accept(request)

    def _keep(self, end: PairEnd) -> PairEnd:
        self._ends.append(end)
        return end

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.back_end.close()
        for end in self._ends:
            end.theirs.close()
