"""A virtio-scsi driver in plain Python over any front end (virtio 1.3, 5.6): commands, task management, events.

    memory = GuestMemory(64 << 20)
    frontend = VhostUserFrontend.connect("/run/vm0.sock")
    with ScsiDriver(frontend, memory, request_queues=2) as driver:
        driver.start()
        print(driver.command(0, 0, cdb.inquiry(96), data_in_length=96).data)

Ring 0 is the control queue, ring 1 the event queue, the request queues follow. Lengths are bytes.

Promises: a command's bytes go out and come back as the layout says, wherever its descriptors lie; commands of
any number are in flight together, each found by what `submit` gave; every wait ends after its timeout; a
response that can't be is DeviceError, one that only says no is returned. Never: starts a thread; judges a CDB,
nor what a target makes of it; sets used lengths against anything but the room there was.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import count
from typing import Final, NamedTuple, Protocol, runtime_checkable

from pyvhost.abi import virtio
from pyvhost.abi import virtio_scsi as abi
from pyvhost.driver.device_driver import DeviceDriver
from pyvhost.driver.errors import DeviceError, DriverError
from pyvhost.driver.front_end import FrontEnd
from pyvhost.driver.iommu import Iommu
from pyvhost.driver.memory import GuestMemory
from pyvhost.driver.queue import Queue
from pyvhost.driver.ring_parts import Buffer, ByteOrder, RingLayout
from pyvhost.driver.scsi_command import UNTOUCHED, Event, Format, Layout, Pending, Response, address

FEATURES: Final = (
    1 << virtio.F_VERSION_1
    | 1 << virtio.RING_F_EVENT_IDX
    | 1 << virtio.RING_F_INDIRECT_DESC
    | 1 << abi.F_INOUT
    | 1 << abi.F_HOTPLUG
    | 1 << abi.F_CHANGE
)
"""What a driver asks for when it is not told: everything but protection information."""

CONTROL, EVENT, REQUEST = 0, 1, 2
"""The queues' indices (5.6.2): request queues begin with the last."""

_EVENT_SIZE: Final = 16
_SENSE_SIZE_AT, _CDB_SIZE_AT = abi.ScsiConfig.sense_size.offset, abi.ScsiConfig.cdb_size.offset


@runtime_checkable
class ConfigFrontEnd(FrontEnd, Protocol):
    """A front end that can write to the configuration space."""

    def set_config(self, offset: int, data: bytes) -> None:
        """Write `data` at `offset`."""
        ...


class Config(NamedTuple):
    """The configuration space (5.6.4); sizes in bytes, `max_sectors` of 512."""

    num_queues: int
    seg_max: int
    max_sectors: int
    cmd_per_lun: int
    event_info_size: int
    sense_size: int
    cdb_size: int
    max_channel: int
    max_target: int
    max_lun: int


class ScsiDriver(DeviceDriver):
    """A driver for one SCSI host device; what it shares with others is in `DeviceDriver`.

    `request_queues`: how many it uses. `event_buffers`: how many it gives the device for events,
    16 bytes each; 0: none until `post_events`. `layout` says where the parts of a ring lie, by its index;
    `shape` how chains are cut unless a command says otherwise. `cdb_size` and `sense_size` are written to the
    configuration space where they are not the defaults, 32 and 96.
    """

    def __init__(
        self,
        frontend: FrontEnd,
        memory: GuestMemory,
        request_queues: int = 1,
        ring_size: int = 128,
        features: int = FEATURES,
        *,
        event_buffers: int = 8,
        cdb_size: int = abi.CDB_DEFAULT_SIZE,
        sense_size: int = abi.SENSE_DEFAULT_SIZE,
        shape: Layout = Layout(),  # noqa: B008 - frozen
        allocate: Callable[[int], int] | None = None,
        layout: Callable[[int], RingLayout] | None = None,
        iommu: Iommu | None = None,
        byteorder: ByteOrder = "little",
        timeout: float = 10.0,
    ) -> None:
        super().__init__(
            frontend,
            memory,
            ring_size,
            features,
            allocate=allocate,
            layout=layout,
            iommu=iommu,
            byteorder=byteorder,
            timeout=timeout,
        )
        self.request_queues = request_queues
        self.shape = shape
        self.format = Format(byteorder, cdb_size=cdb_size, sense_size=sense_size)
        #: The rings; `requests` in their order.
        self.control: Queue
        self.event: Queue
        self.requests: list[Queue] = []
        self._event_buffers = event_buffers
        self._events: list[Event] = []
        self._ended: list[Pending] = []
        self._tags = count(1)

    # --- coming up -----------------------------------------------------------------------------------------

    def start(self) -> None:
        """Negotiate, make the rings, give the device its event buffers, and let it run."""
        self._negotiate()
        old = self.format
        self.format = Format(
            self.byteorder,
            cdb_size=old.cdb_size,
            sense_size=old.sense_size,
            pi=self.has(abi.F_T10_PI),
        )
        for at, size, default in (
            (_SENSE_SIZE_AT, old.sense_size, abi.SENSE_DEFAULT_SIZE),
            (_CDB_SIZE_AT, old.cdb_size, abi.CDB_DEFAULT_SIZE),
        ):
            if size != default:
                self._write_config(at, size)
        self.control = self._queue(CONTROL, "control")
        self.event = self._queue(EVENT, "event")
        self.requests = [self._queue(REQUEST + i, f"request {i}") for i in range(self.request_queues)]
        if self._event_buffers:
            self.post_events(min(self._event_buffers, self.ring_size))
        self.resume()

    def _write_config(self, at: int, value: int) -> None:
        if not isinstance(self.frontend, ConfigFrontEnd):
            raise DriverError(f"{type(self.frontend).__name__} can't write to the configuration space")
        self.frontend.set_config(at, value.to_bytes(4, self.byteorder))

    def config(self) -> Config:
        """The configuration space, as it is now."""
        raw = self.frontend.get_config(0, 36)
        sizes = (4, 4, 4, 4, 4, 4, 4, 2, 2, 4)
        at, words = 0, []
        for size in sizes:
            words.append(int.from_bytes(raw[at : at + size], self.byteorder))
            at += size
        return Config(*words)

    # --- commands ------------------------------------------------------------------------------------------

    def command(
        self,
        target: int,
        lun: int | bytes,
        cdb: bytes,
        data_out: bytes = b"",
        data_in_length: int = 0,
        *,
        attribute: int = abi.S_SIMPLE,
        tag: int | None = None,
        queue: int = 0,
        layout: Layout | None = None,
        timeout: float | None = None,
    ) -> Response:
        """Give one command and wait for what comes of it; TimeoutError after `timeout` seconds."""
        pending = self.submit(
            target,
            lun,
            cdb,
            data_out,
            data_in_length,
            attribute=attribute,
            tag=tag,
            queue=queue,
            layout=layout,
        )
        return self.wait_for(pending, timeout)

    def submit(
        self,
        target: int,
        lun: int | bytes,
        cdb: bytes,
        data_out: bytes = b"",
        data_in_length: int = 0,
        *,
        attribute: int = abi.S_SIMPLE,
        tag: int | None = None,
        priority: int = 0,
        crn: int = 0,
        queue: int = 0,
        layout: Layout | None = None,
        pi_out: bytes = b"",
        pi_in_length: int = 0,
        publish: bool = True,
    ) -> Pending:
        """Give one command to request queue `queue`, and do not wait.

        `lun` of 8 bytes goes as it is (`scsi_command.address` makes any form), a number by flat addressing.
        `tag` None: one that no other command has. Not `publish`: the device sees it with the next that is, or
        after `publish`. RingFullError: no descriptors.
        """
        tag = next(self._tags) if tag is None else tag
        where = address(target, lun)
        head = self.format.command(
            where,
            tag,
            cdb,
            attribute=attribute,
            priority=priority,
            crn=crn,
            pi_out=len(pi_out),
            pi_in=pi_in_length,
        )
        shape = layout or self.shape
        pending = Pending(
            f"{self.requests[queue].name}: command {tag:#x} ({cdb[:1].hex()}h)",
            tag,
            where,
            command=True,
            pi_in=pi_in_length,
            data_in=data_in_length,
            data_out=len(data_out),
        )
        more = pi_out + data_out
        readable = shape.cut(len(head), len(more))
        writable = shape.cut(self.format.response_size, pi_in_length + data_in_length)
        self._add(self.requests[queue], pending, head + more, readable, writable, shape.indirect)
        if publish:
            self.requests[queue].publish()
        return pending

    def submit_raw(
        self,
        readable: Sequence[bytes],
        writable: Sequence[int],
        queue: Queue | int = 0,
        *,
        indirect: bool = False,
    ) -> Pending:
        """Give a chain of exactly these descriptors, whatever they make, to a request queue or to any.

        Its `raw` holds what is in the writable ones when it comes back, every byte 0xA5 that was not written.
        """
        ring = self.requests[queue] if isinstance(queue, int) else queue
        pending = Pending(f"{ring.name}: a chain of {len(readable)} + {len(writable)}")
        self._add(ring, pending, b"".join(readable), [len(part) for part in readable], writable, indirect)
        ring.publish()
        return pending

    def publish(self, queue: int = 0) -> int:
        """Let the device see what was submitted without; returns how many."""
        return self.requests[queue].publish()

    def collect(self) -> list[Pending]:
        """The commands and functions that have ended since this was last asked; does not wait."""
        for queue in (self.control, *self.requests):
            self._take(queue)
        ended, self._ended = self._ended, []
        return ended

    def wait_for(self, pending: Pending, timeout: float | None = None) -> Response:
        """What came of one command; waits for it. TimeoutError after `timeout` seconds."""
        self.wait_all([pending], timeout)
        assert pending.response is not None
        return pending.response

    def wait_all(self, pendings: Iterable[Pending], timeout: float | None = None) -> None:
        """Wait until all of them have ended; `collect` need not be asked for them any more."""
        left = list(pendings)

        def ready() -> bool:
            for queue in (self.control, *self.requests):
                self._take(queue)
            left[:] = [one for one in left if not one.done]
            return not left

        waited = set(map(id, left))
        names = left[0].name if len(left) == 1 else f"end of {len(left)} commands"
        self._wait(ready, [self.control, *self.requests], names, timeout)
        self._ended = [one for one in self._ended if id(one) not in waited]

    # --- the control queue ---------------------------------------------------------------------------------

    def tmf(
        self, subtype: int, target: int, lun: int | bytes = 0, tag: int = 0, *, timeout: float | None = None
    ) -> int:
        """Ask for a task management function (`virtio_scsi.T_TMF_*`), and wait; returns the response code."""
        pending = self.submit_tmf(subtype, target, lun, tag)
        self.wait_all([pending], timeout)
        return self.tmf_response(pending)

    def submit_tmf(self, subtype: int, target: int, lun: int | bytes = 0, tag: int = 0) -> Pending:
        """Ask for a task management function, and do not wait."""
        return self._ask(f"function {subtype}", self.format.tmf(subtype, address(target, lun), tag), 1)

    @staticmethod
    def tmf_response(pending: Pending) -> int:
        """The response code of a function that has ended. DeviceError: the device wrote none."""
        if pending.raw[0] == UNTOUCHED:
            raise DeviceError(f"{pending.name}: used, and its response was not written")
        return pending.raw[0]

    def abort_task(self, task: Pending) -> int:
        """ABORT TASK, of a command that is under way."""
        return self.tmf(abi.T_TMF_ABORT_TASK, 0, task.lun, task.tag)

    def query_task(self, task: Pending) -> int:
        """QUERY TASK: S_FUNCTION_SUCCEEDED while it is under way."""
        return self.tmf(abi.T_TMF_QUERY_TASK, 0, task.lun, task.tag)

    def reset_lun(self, target: int, lun: int | bytes = 0) -> int:
        """LOGICAL UNIT RESET."""
        return self.tmf(abi.T_TMF_LOGICAL_UNIT_RESET, target, lun)

    def query_events(self, target: int, lun: int | bytes, events: int) -> tuple[int, int]:
        """Which of `events` (`virtio_scsi.EVT_ASYNC_*`) the unit has; these, and the response code."""
        return self._query(abi.T_AN_QUERY, target, lun, events)

    def subscribe(self, target: int, lun: int | bytes, events: int) -> tuple[int, int]:
        """Ask to be told of `events` of a unit; which of them the device can tell, and the response code."""
        return self._query(abi.T_AN_SUBSCRIBE, target, lun, events)

    def _query(self, kind: int, target: int, lun: int | bytes, events: int) -> tuple[int, int]:
        pending = self._ask(f"query {kind}", self.format.query(kind, address(target, lun), events), 5)
        self.wait_all([pending])
        actual, response = self.format.query_answer(pending.raw)
        if response == UNTOUCHED:
            raise DeviceError(f"{pending.name}: used, and its response was not written")
        return actual, response

    def _ask(self, what: str, request: bytes, room: int) -> Pending:
        pending = Pending(f"control: {what}")
        shape = self.shape
        self._add(
            self.control, pending, request, shape.cut(len(request), 0), shape.cut(room, 0), shape.indirect
        )
        self.control.publish()
        return pending

    # --- events --------------------------------------------------------------------------------------------

    def post_events(self, number: int, size: int = _EVENT_SIZE) -> None:
        """Give the device room for so many more events, `size` bytes each."""
        for _ in range(number):
            self.event.ring.add(writable=[buffer := (self._allocate(size), size)], token=buffer)
        self.event.publish()

    def poll_events(self, *, again: bool = True) -> list[Event]:
        """The events that have come; does not wait. Not `again`: their buffers do not go back."""
        self._take_events(again)
        events, self._events = self._events, []
        return events

    def wait_events(
        self, number: int = 1, *, again: bool = True, timeout: float | None = None
    ) -> list[Event]:
        """Wait for events, and return all that have come, at least `number`. TimeoutError keeps those that did."""

        def enough() -> bool:
            self._take_events(again)
            return len(self._events) >= number

        self._wait(enough, [self.event], f"event (of {number})", timeout)
        return self.poll_events(again=again)

    def _take_events(self, again: bool) -> None:
        taken = False
        while (used := self.event.ring.pop_used()) is not None:
            assert isinstance(used.token, tuple)
            at, _ = used.token
            self._events.append(Event.unpack(self.memory.read(at, used.len), self.byteorder))
            if again:
                self.event.ring.add(writable=[used.token], token=used.token)
                taken = True
            else:
                self.memory.free(at)
        if taken:
            self.event.publish()

    # --- chains --------------------------------------------------------------------------------------------

    def _add(
        self,
        queue: Queue,
        pending: Pending,
        data: bytes,
        readable: Sequence[int],
        writable: Sequence[int],
        indirect: bool,
    ) -> None:
        pending.readable = self._room(readable)
        pending.writable = self._room(writable)
        at = 0
        for address_, size in pending.readable:
            self.memory.write(address_, data[at : at + size])
            at += size
        for address_, size in pending.writable:
            self.memory.write(address_, bytes((UNTOUCHED,)) * size)
        try:
            queue.ring.add(pending.readable, pending.writable, indirect=indirect, token=pending)
        except BaseException:
            self._free(pending)
            raise

    def _room(self, sizes: Sequence[int]) -> list[Buffer]:
        # A descriptor of no bytes has to lie somewhere all the same.
        return [(self._allocate(max(size, 1)), size) for size in sizes]

    def _free(self, pending: Pending) -> None:
        for at, _ in (*pending.readable, *pending.writable):
            self.memory.free(at)
        pending.readable, pending.writable = [], []

    def _take(self, queue: Queue) -> None:
        """Take back what the device has used of one queue."""
        while (used := queue.ring.pop_used()) is not None:
            pending = used.token
            assert isinstance(pending, Pending)
            pending.raw = b"".join(self.memory.read(at, size) for at, size in pending.writable)
            pending.written = used.len
            pending.done = True
            self._free(pending)
            self._ended.append(pending)
            if pending.command:
                pending.response = self.format.response(pending)
