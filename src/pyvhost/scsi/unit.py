"""A logical unit: a direct access block device (SBC-3) over a store.

Here is what commands share and what outlives them: capacity, mode pages, unit attentions, reservations, the task
set, the medium's state, and whether reading and writing needs nothing but the store (`fast`).

Promises: everything on the control thread; tasks end in finite time if the store's operations do; a store that
fails hurts this unit's tasks only. Never: knows a transport; interprets a CDB (`commands` does).
"""

from __future__ import annotations

import enum
import logging
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from pyvhost.host.poller import Poller
from pyvhost.scsi.attention import Attentions
from pyvhost.scsi.commands import dispatch
from pyvhost.scsi.commands.copy import Result
from pyvhost.scsi.mode_pages import ModePages
from pyvhost.scsi.nexus import Nexus, world_wide_name
from pyvhost.scsi.operation import Operation, Runner, Stopped, Work
from pyvhost.scsi.ranges import Hold, Ranges
from pyvhost.scsi.reservations import Access, Reservations
from pyvhost.scsi.sense import Asc, CheckCondition, Key, Sense, store_failed
from pyvhost.scsi.stores.base import Extent, Store
from pyvhost.scsi.task import Outcome, Task
from pyvhost.scsi.task_set import Done, TaskSet

if TYPE_CHECKING:
    from pyvhost.scsi.target import Target

_log = logging.getLogger(__name__)


class Fast(enum.IntFlag):
    """What the compiled loop may do for a nexus without asking."""

    NONE = 0
    READ = 1
    WRITE = 2


class LogicalUnit:
    """One LUN over a store, which it owns from `open` to `close`.

    `block_size`: bytes of a logical block, None for the store's own. `physical_block_size`: what a physical block is
    said to have, None: as the store says. `aptpl`: the file in which persistent reservations are kept that are to
    outlive this process, None: they don't. ValueError: sizes that don't fit, or another file than one of those.
    """

    def __init__(
        self,
        store: Store,
        *,
        block_size: int | None = None,
        physical_block_size: int | None = None,
        serial: str | None = None,
        vendor: str = "PYVHOST",
        product: str = "DISK",
        removable: bool = False,
        read_only: bool = False,
        rotational: bool = False,
        aptpl: Path | None = None,
    ) -> None:
        self.store = store
        self._wanted_block_size = block_size
        self._wanted_physical = physical_block_size
        self._wanted_serial = serial
        self.block_size = block_size or 512
        self.physical_block_size = self.block_size
        self.serial = serial or ""
        self.vendor = vendor
        self.product = product
        self.removable = removable
        self.rotational = rotational
        self._read_only = read_only
        #: Logical blocks there are.
        self.blocks = 0
        #: Which target it belongs to, and its number there; set by the target.
        self.target: Target | None = None
        self.lun = 0

        #: Called when `fast` has become another for any nexus.
        self.on_fast_changed: Callable[[LogicalUnit], object] | None = None
        #: Told of what an initiator should hear of at once: the additional sense code of a unit attention.
        self.on_event: Callable[[LogicalUnit, Asc], object] | None = None

        self.modes = ModePages(False)
        self.modes.on_change = self._modes_changed
        self.attentions = Attentions()
        self.reservations = Reservations(self._notify_port, aptpl)
        self.ranges = Ranges()
        self.ranges.on_change = self.refresh
        self.tasks = TaskSet(lambda task: dispatch.begin(self, task))
        self.tasks.on_change = self.refresh
        self.tasks.on_cleared = self._cleared

        #: The store has gone away.
        self.gone = False
        #: A removable medium is in.
        self.loaded = True
        #: Nexuses that prevent the medium's removal.
        self.preventing: set[Nexus] = set()
        #: How far FORMAT UNIT has come, in 65536ths; None: none is under way.
        self.formatting: int | None = None
        #: What WRITE BUFFER left for READ BUFFER.
        self.echo = b""
        self.buffer = bytearray(4096)
        #: What became of the last EXTENDED COPY commands, by nexus and list identifier.
        self.copies: dict[tuple[Nexus, int], Result] = {}

        self._fast: dict[Nexus, Fast] = {}
        self._background: set[Runner] = set()
        self._open = False
        self._volatile: bool | None = None

    # Life

    def open(self, poller: Poller) -> None:
        """Open the store. OSError: it can't be opened. ValueError: it holds no whole block."""
        self.store.on_resize = self._resized
        self.store.on_state = self._store_state
        self.store.open(poller)
        try:
            self._take_sizes()
        except ValueError:
            self.store.close()
            raise
        self._open = True
        # A store behind a network says later when it is there.
        self.gone = not self.store.online
        self.refresh()

    def close(self, done: Done = lambda: None) -> None:
        """Abort every task, stop what runs in the background, close the store; then `done`."""
        for runner in list(self._background):
            runner.stop()

        def stopped() -> None:
            if self._open:
                self._open = False
                self.store.on_resize = self.store.on_state = None
                self.store.close()
            done()

        self.tasks.abort(self.tasks.of(None), stopped)

    def _take_sizes(self) -> None:
        store = self.store
        size = self._wanted_block_size or store.block_size
        if size < 512 or size & size - 1 or size > 65536 or size % store.block_size:
            raise ValueError(
                f"{store.spec}: blocks of {size} bytes: they have a power of two of bytes, from 512 to 65536, "
                f"and are multiples of the store's {store.block_size}"
            )
        physical = self._wanted_physical or max(size, store.physical_block_size)
        if physical < size or physical & physical - 1 or physical > size << 15:
            raise ValueError(f"{store.spec}: physical blocks of {physical} bytes don't fit blocks of {size}")
        self.block_size = size
        self.physical_block_size = physical
        self.blocks = store.size // size
        if self.blocks == 0 and store.online:
            raise ValueError(f"{store.spec}: {store.size} bytes hold no block of {size}")
        self.serial = self._wanted_serial or store.serial or f"{world_wide_name(store.spec):016x}"
        self._learn_cache()

    def _learn_cache(self) -> None:
        if (
            self._volatile is not self.store.wce
        ):  # only then: what was selected of the caching page ends with it
            self._volatile = self.store.wce
            self.modes.set_volatile_cache(self._volatile)

    @property
    def read_only(self) -> bool:
        """Whether nothing may be written, for whatever reason."""
        return self._read_only or self.store.read_only or self.modes.software_write_protect

    @property
    def write_through(self) -> bool:
        """Whether every write must be on stable storage at its status: the store has a cache, and WCE is 0."""
        return self.store.wce and not self.modes.wce

    @property
    def name(self) -> int:
        """Its world wide name (NAA)."""
        return world_wide_name(f"{self.vendor} {self.product} {self.serial}")

    # Tasks

    def submit(self, task: Task) -> None:
        """Take a task in; `task.on_done` says when it has ended."""
        task.encode = self.encode
        self.tasks.add(task)

    def encode(self, sense: Sense) -> bytes:
        """Sense data in the format that D_SENSE asks for."""
        return sense.encode(self.modes.descriptor_sense)

    def spawn(self, work: Work, what: str) -> None:
        """Carry something out that no task waits for (IMMED)."""

        def ended(error: BaseException | None) -> None:
            self._background.discard(runner)
            if error is not None and not isinstance(error, Stopped):
                _log.warning("LUN %d: %s failed: %s", self.lun, what, error)

        runner = Runner(work, ended)
        self._background.add(runner)
        runner.start()

    def attach(self, nexus: Nexus) -> None:
        """A nexus begins to exist."""
        self.attentions.attach(nexus)
        self.refresh()

    def detach(self, nexus: Nexus, done: Done = lambda: None) -> None:
        """A nexus is no more: its tasks are aborted, and what it held without persistence is free."""
        self._forget(nexus)

        def stopped() -> None:
            self.attentions.detach(nexus)
            self._fast.pop(nexus, None)
            self.refresh()
            done()

        self.tasks.abort(self.tasks.of(nexus), stopped, Outcome.RESET)

    def nexus_lost(self, nexus: Nexus, done: Done) -> None:
        """I_T NEXUS RESET: as if it had gone and come back (SAM-5, 6.3.4)."""
        self._forget(nexus)
        self.attentions.establish(Asc.I_T_NEXUS_LOSS_OCCURRED, nexus)
        self.refresh()
        self.tasks.abort(self.tasks.of(nexus), done, Outcome.RESET)

    def reset(self, done: Done) -> None:
        """LOGICAL UNIT RESET (SAM-5, 6.3.3); `done` when no task of before is left."""
        self.tasks.clear_aca()
        self.reservations.release(None)
        self.preventing.clear()
        self.modes.reset()
        self.attentions.establish_all(Asc.BUS_DEVICE_RESET_FUNCTION_OCCURRED)
        self.refresh()
        self.tasks.abort(self.tasks.of(None), done, Outcome.RESET)

    def _forget(self, nexus: Nexus) -> None:
        self.reservations.release(nexus)
        self.preventing.discard(nexus)
        if self.tasks.faulted is nexus:
            self.tasks.clear_aca()

    # What initiators are told

    def changed(self, asc: Asc, but: Nexus | None = None) -> None:
        """Establish a unit attention for every nexus except one, and tell of the event."""
        self.attentions.establish_all(asc, but)
        self.refresh()
        if self.on_event is not None:
            self.on_event(self, asc)

    def _notify_port(self, wwn: int, asc: Asc) -> None:
        for nexus in self.attentions.nexuses:
            if nexus.wwn == wwn:
                self.attentions.establish(asc, nexus)
        self.refresh()

    def _cleared(self, nexus: Nexus) -> None:
        self.attentions.establish(Asc.COMMANDS_CLEARED_BY_ANOTHER_INITIATOR, nexus)
        self.refresh()

    def _modes_changed(self) -> None:
        self.tasks.qerr = self.modes.qerr
        self.tasks.tas = self.modes.task_aborted_status
        self.refresh()

    def _resized(self, size: int) -> None:
        blocks = size // self.block_size
        if blocks != self.blocks:
            self.blocks = blocks
            self.changed(Asc.CAPACITY_DATA_HAS_CHANGED)

    def _store_state(self, there: bool) -> None:
        if self.gone is there:
            self.gone = not there
            if there:
                self._learn_cache()
                self.changed(Asc.NOT_READY_TO_READY_CHANGE)
        self.refresh()

    # What the compiled loop may do

    def fast(self, nexus: Nexus) -> Fast:
        """What a SIMPLE task of `nexus` within the capacity needs nothing for but the store.

        Whoever uses it also honours `write_through`, and FUA in the CDB.
        """
        if (
            not self._open
            or self.not_ready() is not None
            or self.attentions.pending(nexus)
            or self.tasks.restrictive
            or self.ranges.alone
            or nexus not in self.attentions.nexuses
        ):
            return Fast.NONE
        able = Fast.NONE
        if not self.reservations.conflicts(nexus, Access.READ):
            able |= Fast.READ
        if not self.read_only and not self.reservations.conflicts(nexus, Access.WRITE):
            able |= Fast.WRITE
        return able

    def refresh(self) -> None:
        """Find out whether `fast` has changed. To be called after whatever it depends on."""
        now = {nexus: self.fast(nexus) for nexus in self.attentions.nexuses}
        if now != self._fast:
            self._fast = now
            if self.on_fast_changed is not None:
                self.on_fast_changed(self)

    @property
    def drain(self) -> Callable[[Done], object] | None:
        """Set by whoever runs a compiled loop: calls its argument when nothing of the loop is under way."""
        return self.tasks.drain

    @drain.setter
    def drain(self, drain: Callable[[Done], object] | None) -> None:
        self.tasks.drain = drain

    def not_ready(self) -> Sense | None:
        """Why the medium can't be reached now; None: it can."""
        if not self.loaded:
            return Sense(Key.NOT_READY, Asc.MEDIUM_NOT_PRESENT)
        if self.gone:
            # It is looked for: an initiator tries again for a while, as Linux does for this one alone.
            return Sense(Key.NOT_READY, Asc.NOT_READY_BECOMING_READY)
        if self.formatting is not None:
            return Sense(Key.NOT_READY, Asc.NOT_READY_FORMAT_IN_PROGRESS, progress=self.formatting)
        return None

    # The store, for commands: blocks in, CheckCondition out

    async def hold(self, lba: int, blocks: int, alone: bool) -> Hold:
        """Hold a range of blocks; whoever does so releases it in a `finally`."""
        hold = self.ranges.ask(lba, blocks, alone)
        try:
            await self.ranges.granted(hold)
            drain = self.tasks.drain
            if alone and drain is not None:

                def begin(done: Callable[[None], None]) -> None:
                    drain(lambda: done(None))

                await Operation(begin)
        except BaseException:
            self.ranges.release(hold)
            raise
        return hold

    async def read(self, lba: int, views: list[memoryview]) -> None:
        """Fill `views`, whole blocks in all, from block `lba` on."""
        if views:
            offset = lba * self.block_size
            error = await Operation[int](lambda done: self.store.read(offset, views, done))
            self._judge(error, lba, False)

    async def write(self, lba: int, views: list[memoryview], fua: bool = False) -> None:
        """Write `views`, whole blocks in all, from block `lba` on; with FUA, or where WCE is 0, to stable storage."""
        if views:
            offset = lba * self.block_size
            through = self.store.wce and (fua or not self.modes.wce)
            error = await Operation[int](lambda done: self.store.write(offset, views, done, through))
            self._judge(error, lba, True)

    async def flush(self) -> None:
        """Everything that was written is on stable storage afterwards."""
        self._judge(await Operation[int](self.store.flush), None, True)

    async def zero(self, lba: int, blocks: int, unmap: bool) -> None:
        """Have blocks read as zeroes."""
        offset, length = lba * self.block_size, blocks * self.block_size
        error = await Operation[int](lambda done: self.store.zero(offset, length, done, unmap))
        self._judge(error, lba, True)
        await self._through()

    async def discard(self, lba: int, blocks: int) -> None:
        """Unmap blocks: they read as zeroes, where WCE is 0 after a loss of power as well."""
        offset, length = lba * self.block_size, blocks * self.block_size
        error = await Operation[int](lambda done: self.store.discard(offset, length, done))
        self._judge(error, lba, True)
        await self._through()

    async def extents(self, lba: int, blocks: int) -> list[Extent]:
        """Which parts of a range hold data, in bytes."""
        offset, length = lba * self.block_size, blocks * self.block_size

        def begin(done: Callable[[tuple[int, list[Extent]]], None]) -> None:
            self.store.extents(offset, length, lambda error, extents: done((error, extents)))

        answer = await Operation[tuple[int, list[Extent]]](begin)
        self._judge(answer[0], lba, False)
        return answer[1]

    async def _through(self) -> None:
        if self.write_through:
            await self.flush()

    def _judge(self, error: int, lba: int | None, writing: bool) -> None:
        if error:
            failure = store_failed(error, lba, writing)
            if self.gone and failure.sense.key is Key.NOT_READY:
                failure = CheckCondition(Sense(Key.NOT_READY, Asc.NOT_READY_BECOMING_READY))
            _log.debug("LUN %d, block %s: %s", self.lun, lba, failure)
            raise failure

    def __repr__(self) -> str:
        return f"<LogicalUnit {self.lun} {self.store.spec}>"
