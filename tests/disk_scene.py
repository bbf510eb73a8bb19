"""A SCSI host device over vhost-user with a driver at it, and stores that wait for a test.

Promises: what a `scene` begins ends with it. Never: waits by the clock: a test says when a store goes on.
"""

from __future__ import annotations

import errno
import logging
import select
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from back_end import PATIENCE, BackEnd
from pyvhost.abi import virtio_scsi as abi
from pyvhost.driver import cdb
from pyvhost.driver.memory import MIB, GuestMemory
from pyvhost.driver.scsi import FEATURES, ScsiDriver
from pyvhost.driver.scsi_command import Pending, Response
from pyvhost.driver.vhost_user import VhostUserFrontend
from pyvhost.scsi import device as device_module
from pyvhost.scsi.device import ScsiDevice
from pyvhost.scsi.stores.base import Done, Store
from pyvhost.scsi.stores.memory import MemoryStore
from pyvhost.scsi.stores.wrappers import Wrapper
from pyvhost.vhost_user import connection

BLOCK = 512
UNIT_ATTENTION = 6


class OnASocket(Wrapper):
    """What the compiled loop reads comes from a socket, and ends when the test has sent it (`answer`).

    All else goes to memory. What it writes goes into the socket, which takes it at once.
    """

    def __init__(self, size: int = MIB) -> None:
        self._host, self._test = socket.socketpair()
        super().__init__(MemoryStore(size))
        self.spec = "socket"

    def _follow(self) -> None:
        super()._follow()
        self.fd = self._host.fileno()

    def answer(self, data: bytes) -> None:
        """Ends the oldest operation that waits, which wants exactly this many bytes."""
        self._test.sendall(data)

    def end(self) -> None:
        """Nothing waits any more."""
        self._host.close()
        self._test.close()


class Kept(Wrapper):
    """Every read and write waits until it is let go, with an errno; all of it is Python's."""

    def __init__(self, size: int = MIB) -> None:
        super().__init__(MemoryStore(size))
        self.kept: list[Callable[[int], object]] = []
        self.keeps = True

    def read(self, offset: int, views: list[memoryview], done: Done) -> None:
        """Waits first."""
        self._keep(lambda: self.inner.read(offset, views, done), done)

    def write(self, offset: int, views: list[memoryview], done: Done, fua: bool = False) -> None:
        """Waits first."""
        self._keep(lambda: self.inner.write(offset, views, done, fua), done)

    def _keep(self, go: Callable[[], object], done: Done) -> None:
        def on(number: int) -> object:
            return done(number) if number else go()

        if self.keeps:
            self.kept.append(on)
        else:
            go()

    def let_go(self, number: int = 0) -> None:
        """On the control thread."""
        kept, self.kept = self.kept, []
        for on in kept:
            on(number)

    def close(self) -> None:
        """Ends what waits."""
        self.let_go(errno.ECANCELED)
        super().close()


class Scene:
    """`device` behind a socket, `driver` at it."""

    def __init__(self, back_end: BackEnd, device: ScsiDevice, memory: GuestMemory) -> None:
        self.back_end = back_end
        self.device = device
        self.memory = memory
        self.front: VhostUserFrontend
        self.driver: ScsiDriver

    def add(self, target: int, lun: int, store: Store | str) -> None:
        """One unit more, met by the driver."""
        self.back_end.ask(lambda: self.device.add_lun(target, lun, store))

    def ask(self, function: Callable[[], Any]) -> Any:
        """On the control thread."""
        return self.back_end.ask(function)


def meet(driver: ScsiDriver, target: int, lun: int | bytes) -> None:
    """Hears what a unit has to say to one who is new."""
    for _ in range(8):
        if driver.command(target, lun, cdb.test_unit_ready()).sense_key != UNIT_ATTENTION:
            return
    raise AssertionError("unit attentions without end")


@contextmanager
def scene(
    directory: Path,
    *luns: str | Store,
    start: bool = True,
    features: int = FEATURES,
    memory: GuestMemory | None = None,
    request_queues: int = 1,
    inflight: bool = False,
    name: str | None = None,
    **options: Any,
) -> Iterator[Scene]:
    """`luns` are units 0, 1, ... of target 0, and no news to the driver. `name`: the device's."""
    device = ScsiDevice(request_queues=request_queues, name=name)
    with ExitStack() as stack:
        back_end = stack.enter_context(BackEnd(directory, device))
        found = Scene(back_end, device, memory or stack.enter_context(GuestMemory(32 * MIB)))
        for lun, store in enumerate(luns):
            back_end.ask(lambda lun=lun, store=store: device.add_lun(0, lun, store))  # type: ignore[misc]
        found.front = stack.enter_context(back_end.connect())
        if inflight:
            found.front.inflight, found.front.inflight_size = None, (request_queues + 2, 128)
        found.driver = stack.enter_context(
            ScsiDriver(
                found.front,
                found.memory,
                request_queues=request_queues,
                features=features,
                timeout=PATIENCE,
                **options,
            )
        )
        if start:
            found.driver.start()
            for lun in range(len(luns)):
                meet(found.driver, 0, lun)
        try:
            yield found
        finally:
            for store in luns:
                if isinstance(store, OnASocket):
                    store.end()


def read_of(found: Scene, lun: int = 0, blocks: int = 8) -> Pending:
    """A READ that waits, and is under way when this is back."""
    pending = found.driver.submit(0, lun, cdb.read10(0, blocks), data_in_length=blocks * BLOCK)
    for _ in range(100):
        # Behind an IOMMU it is not taken before all of its addresses are known.
        if found.driver.query_task(pending) == abi.S_FUNCTION_SUCCEEDED:
            return pending
    raise AssertionError("it is never begun")


def sense_of(response: Response) -> tuple[int | None, int | None]:
    """Sense key, additional sense code and its qualifier."""
    return response.sense_key, response.asc


@contextmanager
def waiting(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], None]]:
    """Gives what returns when the log says, once more, that somebody waits for a store: at once, for a test."""
    monkeypatch.setattr(connection, "TELL", 0.0)
    monkeypatch.setattr(connection, "TELL_AGAIN", 0.0)
    monkeypatch.setattr(connection, "LOOK", 0.01)
    monkeypatch.setattr(device_module, "PATIENCE", 0.01)
    said = threading.Event()

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if "no sooner" in record.getMessage():
                said.set()

    def waits() -> None:
        said.clear()
        assert said.wait(PATIENCE), "nobody waits"

    listener = Listener()
    logging.getLogger("pyvhost").addHandler(listener)
    try:
        yield waits
    finally:
        logging.getLogger("pyvhost").removeHandler(listener)


def go_on(found: Scene, store: OnASocket | Kept, blocks: int = 8) -> None:
    """Ends what a store keeps; of a socket the one READ of so many blocks."""
    if isinstance(store, OnASocket):
        store.answer(b"g" * blocks * BLOCK)
    else:
        found.ask(store.let_go)


def readable(fd: int) -> bool:
    """Whether there is something to read now."""
    return bool(select.select([fd], [], [], 0)[0])
