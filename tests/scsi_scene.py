"""A target whose store does what a test tells it, and an initiator at it: no threads, no time."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable
from pathlib import Path

from pyvhost.host.poller import Poller
from pyvhost.scsi.nexus import Nexus
from pyvhost.scsi.stores.base import Done, Extent, ExtentsDone, ExtentState, Store
from pyvhost.scsi.target import Target
from pyvhost.scsi.task import Attribute, Status, Task
from pyvhost.scsi.unit import LogicalUnit


class RamStore(Store):
    """Memory. Operations end when `step` or `settle` is called; `failures` says with which errno."""

    def __init__(self, blocks: int = 64, *, cache: bool = True, thin: bool = True) -> None:
        super().__init__()
        self.data = bytearray(blocks * 512)
        self.mapped = [False] * blocks
        self.size = len(self.data)
        self.wce = cache
        self.can_unmap = thin
        self.unmap_granularity = 512
        self.spec = "ram"
        #: What was asked for, in words.
        self.log: list[str] = []
        #: Errno by kind of operation.
        self.failures: dict[str, int] = {}
        self.pending: deque[Callable[[], object]] = deque()
        self.closed = False

    def open(self, poller: Poller) -> None:
        self.closed = False

    def close(self) -> None:
        self.closed = True

    def call_soon(self, function: Callable[[], object]) -> None:
        self.pending.append(function)

    def step(self) -> None:
        """The oldest operation ends."""
        self.pending.popleft()()

    def settle(self) -> None:
        """Everything that is under way, and what it leads to, ends."""
        for _ in range(100_000):
            if not self.pending:
                return
            self.step()
        raise AssertionError("it doesn't come to an end")

    def _later(self, what: str, act: Callable[[], object], done: Done) -> None:
        self.log.append(what)

        def end() -> None:
            error = self.failures.get(what.split()[0], 0)
            if not error:
                act()
            done(error)

        self.pending.append(end)

    def read(self, offset: int, views: list[memoryview], done: Done) -> None:
        def act() -> None:
            at = offset
            for view in views:
                view[:] = self.data[at : at + len(view)]
                at += len(view)

        assert offset % 512 == 0
        assert sum(map(len, views)) % 512 == 0
        assert offset + sum(map(len, views)) <= self.size
        self._later("read", act, done)

    def write(self, offset: int, views: list[memoryview], done: Done, fua: bool = False) -> None:
        def act() -> None:
            at = offset
            for view in views:
                self.data[at : at + len(view)] = view
                at += len(view)
            self._mark(offset, at - offset, True)

        assert offset % 512 == 0
        assert sum(map(len, views)) % 512 == 0
        assert offset + sum(map(len, views)) <= self.size
        self._later("write fua" if fua else "write", act, done)

    def flush(self, done: Done) -> None:
        self._later("flush", lambda: None, done)

    def zero(self, offset: int, length: int, done: Done, unmap: bool = False) -> None:
        def act() -> None:
            self.data[offset : offset + length] = bytes(length)
            self._mark(offset, length, not unmap)

        assert offset + length <= self.size
        self._later("zero unmap" if unmap else "zero", act, done)

    def discard(self, offset: int, length: int, done: Done) -> None:
        def act() -> None:
            self.data[offset : offset + length] = bytes(length)
            self._mark(offset, length, False)

        assert offset + length <= self.size
        self._later("discard", act, done)

    def extents(self, offset: int, length: int, done: ExtentsDone) -> None:
        found: list[Extent] = []
        blocks = self.mapped[offset // 512 : (offset + length) // 512]
        for mapped, run in itertools.groupby(blocks):
            size = len(list(run)) * 512
            found.append((offset, size, ExtentState.MAPPED if mapped else ExtentState.DEALLOCATED))
            offset += size
        self._later("extents", lambda: None, lambda error: done(error, [] if error else found))

    def _mark(self, offset: int, length: int, mapped: bool) -> None:
        for block in range(offset // 512, (offset + length) // 512):
            self.mapped[block] = mapped


class Scene:
    """One target with a unit at LUN 0, and one initiator, `nexus`, that has heard of the power being on."""

    def __init__(
        self, store: RamStore | None = None, *, aptpl: Path | None = None, removable: bool = False
    ) -> None:
        self.store = store or RamStore()
        self.poller = Poller()
        self.target = Target("target")
        self.unit = LogicalUnit(self.store, serial="S1", aptpl=aptpl, removable=removable)
        self.unit.open(self.poller)
        self.target.add(0, self.unit)
        self.nexus = self.initiator("one")
        self._tags = itertools.count(1)

    def initiator(self, name: str) -> Nexus:
        """Another nexus, likewise."""
        nexus = Nexus(name)
        self.target.attach(nexus)
        for unit in self.target.units:
            while unit.attentions.take(nexus) is not None:
                pass
            unit.refresh()
        return nexus

    def begin(
        self,
        cdb: str | bytes,
        *,
        out: bytes | bytearray = b"",
        into: int = 0,
        nexus: Nexus | None = None,
        attribute: Attribute = Attribute.SIMPLE,
        tag: int | None = None,
        lun: int = 0,
        ended: Callable[[Task], object] = lambda task: None,
    ) -> Task:
        """Submit a command."""
        task = Task(
            bytes.fromhex(cdb) if isinstance(cdb, str) else cdb,
            nexus or self.nexus,
            ended,
            tag=next(self._tags) if tag is None else tag,
            attribute=attribute,
            data_out=[memoryview(bytearray(out))],
            data_in=[memoryview(bytearray(into))],
        )
        self.target.submit(task, lun)
        return task

    def do(
        self,
        cdb: str | bytes,
        *,
        out: bytes = b"",
        into: int = 4096,
        nexus: Nexus | None = None,
        lun: int = 0,
    ) -> Task:
        """Submit a command, and have the store do all of its work."""
        task = self.begin(cdb, out=out, into=0 if out else into, nexus=nexus, lun=lun)
        self.store.settle()
        assert task.ended
        return task

    def close(self) -> None:
        self.target.close()
        self.store.settle()
        self.poller.close()


def data(task: Task) -> bytes:
    """What came in, of a task that ended with GOOD."""
    assert task.status is Status.GOOD, (task, told(task))
    return b"".join(map(bytes, task.data_in))[: task.transferred_in]


def told(task: Task) -> tuple[int, int]:
    """Sense key and additional sense code, with its qualifier, of a task that ended with CHECK CONDITION."""
    if task.status is not Status.CHECK_CONDITION:
        return 0, 0
    sense = task.sense
    if sense[0] & 0x7F == 0x72:
        return sense[1], sense[2] << 8 | sense[3]
    return sense[2], sense[12] << 8 | sense[13]
