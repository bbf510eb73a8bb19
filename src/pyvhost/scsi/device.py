"""The SCSI host device (virtio 1.2, 5.6): a guest's disks.

Requests that only read or write go through the compiled loop (`scsi_loop`); all others, and all that the loop can't
do, become tasks of a `Target`. The guest is one initiator, with a nexus of its own to each target.

Promises: a request is answered once, or its ring is gone; a task management function is answered when what it
stopped has stopped; a ring stops when what it began has ended, however long its store takes (decision 24); a store
that stalls holds up nobody else's requests.
Never: carries out a command itself.
"""

from __future__ import annotations

import ctypes
import errno
import logging
import time
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import ClassVar, Final

from pyvhost.abi import virtio
from pyvhost.abi import virtio_scsi as abi
from pyvhost.host.poller import Poller
from pyvhost.scsi import requests
from pyvhost.scsi.control import ControlQueue
from pyvhost.scsi.counting import counted
from pyvhost.scsi.device_units import DeviceUnits
from pyvhost.scsi.endings import Endings
from pyvhost.scsi.events import EventQueue
from pyvhost.scsi.lun import MAX_LUN, MAX_TARGET, Lun, place
from pyvhost.scsi.nexus import Nexus
from pyvhost.scsi.plane import Chosen, DiskWorker, Plane
from pyvhost.scsi.queue import RequestQueue
from pyvhost.scsi.requests import Request
from pyvhost.scsi.task import Task
from pyvhost.vhost.chains import Chain
from pyvhost.vhost.device import TRANSPORT_FEATURES
from pyvhost.vhost.errors import VhostError
from pyvhost.vhost.vring import Place
from pyvhost.vhost.worker import Int64s

_log = logging.getLogger(__name__)

MAX_REQUEST_QUEUES: Final = 128
#: Control and event queue come before the request queues (5.6.2).
CONTROL: Final = 0
EVENT: Final = 1
REQUEST: Final = 2
#: How often the log says that a stop waits for what a store has under way, in seconds.
PATIENCE: Final = 10.0
#: And the end of the device.
CLOSE_WAITS: Final = 2.0


class ScsiDevice(DeviceUnits):
    """Disks for a guest.

    `luns`: what there is at first, `[TARGET:LUN=]SPEC` each; without a place they get the first free unit of target
    0. `request_queues`: 1 to 128. `busyloop_timeout`: microseconds that a queue is polled before it rests.
    ValueError: an argument that can't be.
    """

    kind: ClassVar[str] = "scsi"
    virtio_id: ClassVar[int] = virtio.ID_SCSI

    def __init__(
        self,
        luns: Iterable[str | Lun] = (),
        *,
        request_queues: int = 1,
        busyloop_timeout: int = 0,
        name: str | None = None,
    ) -> None:
        if not 1 <= request_queues <= MAX_REQUEST_QUEUES:
            raise ValueError(f"request_queues is {request_queues}, expected 1 to {MAX_REQUEST_QUEUES}")
        super().__init__(name or "scsi", REQUEST + request_queues, busyloop_timeout=busyloop_timeout)
        self.request_queues = request_queues
        self._first = place(luns)
        self._queues: list[RequestQueue] = []
        self._control: ControlQueue | None = None
        #: Who waits for operations of the loop (by serial number) and chains of Python's to end.
        self._endings = Endings()
        #: Operations and chains that may write into memory which the IOTLB has lost.
        self._losing: set[Hashable] = set()
        #: Queues that front ends have left with something under way, and the files of their memory.
        self._former: dict[RequestQueue, frozenset[tuple[int, int]]] = {}
        self._looked_for = False
        self._queue_rows: dict[int, Int64s] = {}
        #: Queues that nobody waits for, and which have something in flight.
        self._left: list[RequestQueue] = []

    def attach(self, poller: Poller) -> None:
        """Opens the stores and takes its place in the process's workers."""
        super().attach(poller)
        plane = Plane.get()
        plane.prepare()
        try:
            self._worker = self._take_worker()
            control, event = (self._row(queue) for queue in ("ctrl", "event"))
            self._control = ControlQueue(self, f"{self.name}: control queue", poller, control)
            self._events = EventQueue(f"{self.name}: event queue", poller, event)
            for index in range(self.request_queues):
                self._queues.append(self._make_queue(index))
            for lun in self._first:
                self.add_lun(*lun)
        except BaseException:
            self.close()
            raise

    # --- what vhost.Device asks ---------------------------------------------------------------------------

    @property
    def features(self) -> int:
        """Offered, without what belongs to a transport."""
        return TRANSPORT_FEATURES | 1 << abi.F_INOUT | 1 << abi.F_HOTPLUG | 1 << abi.F_CHANGE

    def place_of(self, index: int) -> Place:
        """Control, event, then the request queues."""
        if self._control is None or self._events is None:
            raise VhostError(errno.ENODEV, f"{self.name}: it is not served")
        if index == CONTROL:
            return self._control.ring
        if index == EVENT:
            return self._events.ring
        queue = self._queues[index - REQUEST]
        if queue.dead:
            self._leave(queue)
            queue = self._queues[index - REQUEST] = self._make_queue(index - REQUEST)
        return queue

    def get_config(self, offset: int, size: int) -> bytes:
        """Bytes of struct virtio_scsi_config (5.6.4)."""
        config = abi.ScsiConfig(
            num_queues=self.request_queues,
            seg_max=126,
            max_sectors=0xFFFF,
            cmd_per_lun=128,
            event_info_size=ctypes.sizeof(abi.ScsiEvent),
            sense_size=abi.SENSE_SIZE,
            cdb_size=abi.CDB_SIZE,
            max_channel=0,
            max_target=MAX_TARGET,
            max_lun=MAX_LUN,
        )
        return bytes(config)[offset : offset + size]

    def set_config(self, offset: int, data: bytes, flags: int) -> None:
        """A driver may write sense_size and cdb_size, of which the default is all that is served (5.6.4)."""
        if self.get_config(offset, len(data)) != data:
            raise VhostError(
                errno.EINVAL,
                f"{self.name}: configuration bytes {offset}+{len(data)}: only the defaults are served",
            )

    def set_vring_running(self, index: int, running: bool) -> None:
        """Serve a vring, or let it rest: what it has begun is done first."""
        if running or not 0 <= index < len(self.vrings) or self.vrings[index].place is None:
            super().set_vring_running(index, running)
            return
        with self._settled(index):
            super().set_vring_running(index, False)

    def give_up_vring(self, index: int) -> None:
        """Nobody waits for what a vring has in flight."""
        if REQUEST <= index < len(self.vrings) and self.vrings[index].place is not None:
            queue = self._queues[index - REQUEST]
            queue.hold_back(True)
            if queue.in_flight:
                queue.orphan()

    def under_way(self, rings: Sequence[int], *, former: Collection[tuple[int, int]] = ()) -> str:
        """What these vrings have begun, and begin no more of meanwhile; see `vhost.Device`."""
        for index in rings:
            if index >= REQUEST and self.vrings[index].place is not None:
                self._queues[index - REQUEST].hold_back(True)
        told = self._begun(rings, former=former)
        if told and not self._looked_for and self._worker is not None:
            self._looked_for = True
            self._worker.see_off(self._progressed)
        return told

    def _begun(self, rings: Sequence[int], *, former: Collection[tuple[int, int]] = ()) -> str:
        parts = []
        for index in rings:
            if index == CONTROL and self._control is not None and self._control.ring.in_flight:
                parts.append(f"vring {index}: {self._control.ring.in_flight} functions are under way")
            elif index >= REQUEST and not (queue := self._queues[index - REQUEST]).dead and queue.begun:
                parts.append(f"vring {index}: {queue.begun} requests are under way")
        left = [queue for queue, files in self._former.items() if not files.isdisjoint(former)]
        if count := sum(queue.in_flight for queue in left):
            parts.append(f"{count} requests of a front end that had the same memory and left are under way")
        if self._losing:
            parts.append(f"{len(self._losing)} requests are under way whose memory was unmapped")
        return ", ".join(parts)

    def _progressed(self) -> bool:
        """Tells who waits for what is under way; whether somebody does."""
        self._looked_for = self.progress is not None
        if self.progress is not None:
            self.progress()
        return self._looked_for

    def reset(self) -> None:
        """The initiator is gone: its tasks are aborted, what the host has under way ends unseen."""
        for queue in self._queues:
            # Nothing more is taken, so that what is in flight is what there is.
            queue.hold_back(True)
            if queue.in_flight:
                queue.orphan()
        files, self._files = frozenset(self._files), set()
        for queue in (*self._queues, *self._left):
            if queue.dead and queue.in_flight:
                self._former.setdefault(queue, files)
        super().reset()
        for queue in self._queues:
            if not queue.dead:
                queue.hold_back(False)
        for target in self._targets.values():
            target.detach(self._nexus)
        self._nexus = Nexus(self.name)
        for target in self._targets.values():
            target.attach(self._nexus)
        for known in self._units.values():
            self._fast_changed(known)
        if self._events is not None:
            self._events.missed = False

    def close(self) -> None:
        """Gives up rings, units and stores; what a store has under way has a moment to end."""
        self.reset()
        for address in list(self._units):
            self.remove_lun(address.target, address.lun)
        queues, self._queues = self._queues, []
        for queue in queues:
            self._leave(queue)
        if self.poller is not None and (self._left or self._draining or self._endings):
            ended = self.poller.run_inner(
                lambda: not (self._left or self._draining or self._endings), CLOSE_WAITS
            )
            if not ended:
                _log.error("%s: closed with requests that don't end", self.name)
        for row in self._rows:
            Plane.get().counters.release(row)
        self._rows = []
        self._control = self._events = None
        super().close()

    # --- requests -----------------------------------------------------------------------------------------

    def _request(self, queue: RequestQueue, chain: Chain, since: int) -> None:
        request = Request.parse(chain, protected=bool(self.acked_features >> abi.F_T10_PI & 1))
        if request is None:
            # The loop has seen that it was long enough; the guest has changed it since.
            queue.finish(chain, 0)
            return
        address = requests.parse_lun(request.lun)
        target = self.target_of(address) if address is not None else None
        if address is None or target is None:
            queue.finish(chain, request.respond(abi.S_BAD_TARGET))
            return

        def done(task: Task) -> None:
            if not queue.alive(chain):
                queue.finish(chain, 0)
                return
            known = self._units.get(address)
            row = int(known.row.ctypes.data) if known is not None else 0
            queue.finish(chain, request.complete(task), counted(task, row, time.monotonic_ns() - since))

        task = Task(
            request.cdb,
            self._nexus,
            done,
            tag=request.tag,
            attribute=request.task_attribute,
            data_out=request.data_out,
            data_in=request.data_in,
            crn=request.crn,
            priority=request.priority,
        )
        target.submit(task, address.lun)

    @contextmanager
    def _settled(self, index: int) -> Iterator[None]:
        """A vring's chains are done with, or given up, and no more are taken meanwhile."""
        assert self.poller is not None
        if index == CONTROL and self._control is not None:
            ring = self._control.ring
            self._wait(lambda: ring.in_flight == 0, index)
        if index < REQUEST:
            yield
            return
        queue = self._queues[index - REQUEST]
        queue.hold_back(True)
        try:
            if not queue.dead:
                self._wait(lambda: queue.begun == 0, index)
                if queue.in_flight:
                    _log.error(
                        "%s: vring %d: %d requests wait for the IOTLB: given up",
                        *(self.name, index, queue.in_flight),
                    )
                    queue.orphan()
            yield
        finally:
            if not queue.dead:
                queue.hold_back(False)

    def _wait(self, until: Callable[[], bool], index: int) -> None:
        """Waits however long it takes: what the host has begun writes where it was told to, and can't be called back.

        For a front end that is this process; another one's connection waits before it comes here (`under_way`).
        """
        assert self.poller is not None
        since = time.monotonic()
        while not self.poller.run_inner(until, PATIENCE) and not self.poller.closed:
            _log.warning(
                "%s: %s since %d s; no sooner it stops",
                *(self.name, self._begun((index,)), time.monotonic() - since),
            )

    def _leave(self, queue: RequestQueue) -> None:
        self._left.append(queue)

        def left() -> None:
            self._left.remove(queue)
            self._former.pop(queue, None)

        queue.leave(left)

    def _after_what_is_under_way(self, done: Callable[[], object]) -> None:
        names: set[Hashable] = set()
        for queue in (*self._queues, *self._left):
            names.update(queue.pending)
        if self._control is not None:
            names.update(self._control.asked)
        if self._worker is not None:
            names.update(self._worker.watch_operations(self._ports(), lambda unit, tag: True))
        self._endings.wait(names, done)

    def _lose(self, lost: Sequence[tuple[int, int]], kept: Callable[[int, int], bool]) -> None:
        if not lost or self._worker is None:
            return
        # Of what is lost, ends and then starts: a piece is part of it unless as many have ended as have begun.
        starts = sorted(start for start, _ in lost)
        ends = sorted(start + length for start, length in lost)

        def touches(at: int, size: int) -> bool:
            return bisect_left(starts, at + size) > bisect_right(ends, at) and not kept(at, size)

        writing: set[Hashable] = set(self._worker.watch_writing(self._ports(), touches))
        for queue in (*self._queues, *self._left):
            writing.update(chain for chain in queue.pending if any(touches(*piece) for piece in chain.logged))
        self._losing |= writing
        self._endings.wait(writing, lambda: self._losing.difference_update(writing))

    # --- the compiled loop --------------------------------------------------------------------------------

    def paused(self) -> AbstractContextManager[None]:
        """The loop that serves this device is out while this is held."""
        assert self._worker is not None
        return self._worker.paused()

    def sweep(self) -> None:
        """Has all requests that came before a task management function begun."""
        for queue in self._queues:
            queue.sweep()

    def abort_loop(self, chosen: Chosen, code: int, done: Callable[[], object]) -> None:
        """Aborts the loop's operations of which `chosen(unit's entry, tag)`; `done` when they have ended."""
        assert self._worker is not None
        self._endings.wait(self._worker.watch_operations(self._ports(), chosen, code), done)

    def in_loop(self, chosen: Chosen) -> bool:
        """Whether the loop has an operation of which `chosen(unit's entry, tag)`."""
        assert self._worker is not None
        with self._worker.paused():
            return any(self._worker.operations({queue.port for queue in self._queues}, chosen))

    def _ports(self) -> set[int]:
        return {queue.port for queue in (*self._queues, *self._left)}

    def loop_ended(self, serial: int) -> None:
        """A watched operation has ended."""
        self._endings.ended(serial)

    def chain_ended(self, chain: Chain) -> None:
        """Nobody uses a chain's memory any more."""
        self._endings.ended(chain)

    def queue_waits(self, queue: RequestQueue, iova: int, perm: int) -> None:
        """A chain that is Python's needs an entry of the IOTLB."""
        if queue in self._queues:
            self.iotlb_miss(REQUEST + self._queues.index(queue), iova, perm)

    # --- within -------------------------------------------------------------------------------------------

    def _take_worker(self) -> DiskWorker:
        """A worker whose loop serves this device; it tells the poller that the device is attached to."""
        return Plane.get().workers.take()

    def _make_queue(self, index: int) -> RequestQueue:
        assert self.poller is not None
        assert self._worker is not None
        name = f"{self.name}: vring {REQUEST + index}"
        if index not in self._queue_rows:
            self._queue_rows[index] = self._row(f"req{index}")
        row = self._queue_rows[index]
        return RequestQueue(self._worker, name, row, self.poller, self._request, self, self._table)
