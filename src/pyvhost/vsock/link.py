"""A guest's connections in the worker's loop: what the state machine asks of the data path (`contract.Carrier`).

Commands go to the loop, and what it has to tell comes back, through two queues in memory, each with a descriptor that
wakes the other side.

Promises: commands are done in their order; packets, and what begins behind them, wait for the guest's buffers, and
are bounded in number; a connection's slot, buffers and descriptor are the loop's until `closed` has been told; the
control thread deals with a bounded batch at a time; a guest's slots are its own.
Never: decides what becomes of a connection.
"""

from __future__ import annotations

import logging
import mmap
import os
import secrets
import select
import struct
import time
from collections import deque
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import numpy as np

from pyvhost.abi import virtio_vsock as abi
from pyvhost.dataplane import blocks
from pyvhost.dataplane import vsock_blocks as layout
from pyvhost.dataplane.plain import load64_acquire, store64_release
from pyvhost.host import eventfd
from pyvhost.host.poller import Poller, Timer
from pyvhost.vhost.worker import Int64s, WorkerPlace
from pyvhost.vsock.contract import Carrier, Key
from pyvhost.vsock.plane import Plane, VsockWorker
from pyvhost.vsock.share import Share

if TYPE_CHECKING:
    from pyvhost.vsock.connections import Connections

_log = logging.getLogger(__name__)

_COMMANDS: Final = 4096
#: While so much waits to be done, and two for each connection that there may be, none is added, nor is RST for what
#: is none: a guest that offers no buffers has it pile up.
_WAITING: Final = 2 * _COMMANDS
#: What a connection asks for at most that waits for a buffer: REQUEST or RESPONSE, what begins with it, an empty
#: message, SHUTDOWN twice, RST.
_OF_CONNECTION: Final = 6
#: Packets that Python may be behind.
_PACKETS: Final = 1024
#: What is told in one go.
_BATCH: Final = 256
#: A SEQPACKET connection's buffer for each byte that it is granted: messages of one byte take a record each.
_RECORDS: Final = 2 * layout.RECORD
#: How long a command waits when the queue is full, seconds.
_AGAIN: Final = 0.005
_WORD: Final = 0xFFFFFFFF
#: An entry of a queue.
_ENTRY: Final = struct.Struct(f"={layout.ENTRY_BYTES // 8}q")
#: What a signed word's highest bit counts.
_TOP: Final = 1 << 63
_ZEROS: Final = (0,) * (layout.ENTRY_BYTES // 8)
#: What the loop hears of a socket; PRI: there is an urgent byte.
_WATCHED: Final = select.EPOLLIN | select.EPOLLPRI | select.EPOLLRDHUP

_VIOLATIONS: Final = {
    layout.VIOLATED_CREDIT: "more data than it was granted",
    layout.VIOLATED_RECORDS: "more messages than there is room for",
    layout.VIOLATED_LENGTH: "a packet that is longer than its descriptors",
}


def _power(number: int) -> int:
    """The least power of two that is no less."""
    return 1 << (number - 1).bit_length()


class _Queue:
    """A queue in memory, of `size` entries, a power of two (`layout.QUEUE_*`)."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._memory = np.zeros((layout.QUEUE_ENTRIES + size * layout.ENTRY_BYTES) // 8, np.int64)
        self.at = int(self._memory.ctypes.data)

    @property
    def put(self) -> int:
        """How many were put in."""
        # Pairs with the other side's release store, behind the entries.
        return load64_acquire(self.at + layout.QUEUE_PUT)

    @property
    def taken(self) -> int:
        """How many were taken out."""
        # Pairs with the other side's release store, behind its last use of an entry.
        return load64_acquire(self.at + layout.QUEUE_TAKEN)

    def get(self, number: int) -> tuple[int, ...]:
        """An entry's words."""
        return _ENTRY.unpack_from(self._memory.data, self._offset(number))

    def set(self, number: int, words: tuple[int, ...]) -> None:
        """Writes an entry; the words that are not given are 0."""
        at, rest = self._offset(number), _ZEROS[len(words) :]
        try:
            _ENTRY.pack_into(self._memory.data, at, *words, *rest)
        except struct.error:
            # Only a CID that a guest has made up takes more than 63 bits.
            signed = ((word & _TOP - 1) - (word & _TOP) for word in words)
            _ENTRY.pack_into(self._memory.data, at, *signed, *rest)

    def _offset(self, number: int) -> int:
        return layout.QUEUE_ENTRIES + (number & self.size - 1) * layout.ENTRY_BYTES

    def void(self, kinds: tuple[int, ...]) -> None:
        """Has entries of these kinds mean nothing; while the loop is paused."""
        of_entries = self._memory[(layout.QUEUE_ENTRIES + layout.ENTRY_KIND) // 8 :: layout.ENTRY_BYTES // 8]
        held = np.arange(self.taken, self.put) & self.size - 1
        of_entries[held[np.isin(of_entries[held], kinds)]] = 0


class _Held(NamedTuple):
    """What the loop holds of a connection."""

    key: Key
    serial: int
    memory: mmap.mmap
    granted: int


class Link:
    """One guest in a worker's loop. `limit`: connections at most; `buffer`: bytes that each may have under way."""

    def __init__(
        self,
        name: str,
        cid: int,
        rows: tuple[Int64s, Int64s],
        poller: Poller,
        worker: VsockWorker,
        limit: int,
        buffer: int,
    ) -> None:
        self.name = name
        self.worker = worker
        self.limit = limit
        self.connections: Connections | None = None
        self._buffer = buffer
        self._poller = poller
        self._plane = Plane.get()
        #: By slot.
        self._held: dict[int, _Held] = {}
        self._share = Share()
        self._backlog: deque[tuple[int, ...]] = deque()
        self._within = self._owed = False
        #: buf_alloc and fwd_cnt of the packet that is told: a REQUEST's are those of the connection that it opens.
        self._credit = 0, 0
        kept = layout.TOLD_AT_MOST * limit
        self._table = np.full(_power(2 * limit), -1, np.int64)
        self._commands = _Queue(_COMMANDS)
        self._most_waiting = _WAITING + 2 * limit
        self._packets = _Queue(_power(self._most_waiting + _OF_CONNECTION * limit))
        self._todo = _Queue(_power(kept + _PACKETS))
        self._later: Timer | None = None
        # What is to be given back at the end, or now if there is no room for all of it; while paused.
        with worker.paused(), ExitStack() as held:
            self._slots = worker.reserve(limit)[::-1]
            held.callback(lambda: worker.give_back(self._slots))
            self._bell, self._python_fd = _eventfd(held), _eventfd(held)
            self.port = worker.add_port()
            held.callback(worker.remove_port, self.port)
            rings = []
            for index, row in enumerate(rows):
                rings.append(worker.add_ring(self.port, row, f"{name}: vring {index}"))
                held.callback(worker.remove_ring, rings[index])
            record = worker.ports[self.port]
            record["rx"], record["tx"] = rings
            record["cid"] = cid
            record["table"] = self._table.ctypes.data
            record["table_mask"] = len(self._table) - 1
            record["seed"] = secrets.randbits(62)
            for field, queue in (
                ("commands", self._commands),
                ("packets", self._packets),
                ("todo", self._todo),
            ):
                record[field], record[f"{field}_mask"] = queue.at, queue.size - 1
            record["todo_kept"] = kept
            record["python_fd"] = self._python_fd
            record["ready_first"] = record["ready_last"] = -1
            worker.watch(self._bell, select.EPOLLIN, blocks.EVENT_PORT, self.port)
            held.callback(worker.unwatch, self._bell, blocks.EVENT_PORT)
            poller.register(self._python_fd, select.EPOLLIN, lambda _events: self.serve(), inner=True)
            held.callback(poller.unregister, self._python_fd)
            self._plane.enter(self, name, limit)
            held.callback(self._plane.leave, self)
            self._place = held.pop_all()
        self.places = [WorkerPlace(worker, self.port, ring) for ring in rings]

    # --- contract.Carrier ---------------------------------------------------------------------------------

    def open(self, key: Key, by_guest: bool) -> int | None:
        """A slot for a connection, which the loop knows of from now on; None: there is no room."""
        if len(self._held) >= min(self.limit, self._plane.each) or self._behind():
            return None
        slot = self._slots.pop()
        granted = self._share.grant(self._buffer, key.peer_cid)
        size, room = granted, 0
        if key.type == abi.TYPE_SEQPACKET:
            # A message of the host's, and one byte more than any that is taken: it shows what was cut off.
            size, room = granted * _RECORDS, self._buffer + 1
        try:
            memory = mmap.mmap(-1, size + room, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        except OSError as error:
            _log.error("%s: no memory for another connection: %s", self.name, error.strerror)
            self._share.give_back(granted, key.peer_cid)
            self._slots.append(slot)
            return None
        out = _address(memory)
        held = self._held[slot] = _Held(key, self._plane.serial(), memory, granted)
        self.worker.connections[slot] = np.zeros(1, layout.CONNECTION)[0]
        record = self.worker.connections[slot]
        for field, value in (
            ("serial", held.serial),
            ("guest", self.port),
            ("by_guest", int(by_guest)),
            ("type", key.type),
            ("guest_port", key.guest_port),
            # 64 bits of the guest's choice.
            ("peer_cid", key.peer_cid - (key.peer_cid >> 63 << 64)),
            ("peer_port", key.peer_port),
            ("fd", -1),
            ("other", -1),
            ("buf_alloc", granted),
            ("alloc_told", granted),
            ("out", out),
            ("out_size", size),
            ("message", out + size),
            ("message_room", room),
            ("out_open", -1),
            ("next", -1),
            ("peer_buf_alloc", self._credit[0]),
            ("peer_fwd_cnt", self._credit[1]),
            ("expect", 2),
        ):
            record[field] = value
        self._push(layout.CMD_OPEN, slot)
        return slot

    def attach(self, slot: int, fd: int) -> None:
        """Says which socket is at the other end; it is used from `start` on."""
        self.worker.connections[slot]["fd"] = fd

    def join(self, slot: int, other: Carrier, other_slot: int) -> None:
        """Ties a connection to one of a sibling, whose worker is the same."""
        assert isinstance(other, Link)
        if other.worker is not self.worker:
            raise ValueError(f"{self.name} and {other.name} are served by different workers")
        serial = int(self.worker.connections[other_slot]["serial"])
        self._push(layout.CMD_JOIN, slot, other_slot, serial)

    def send(self, slot: int, op: int, flags: int = 0) -> None:
        """A packet without data."""
        held = self._held[slot]
        self._push(layout.CMD_SEND, slot, *held.key, op | flags << 32, held.serial)

    def reset(self, key: Key) -> None:
        """RST for a connection that nobody knows."""
        if self._behind():
            # Who sends so much to nobody needs no answer to all of it.
            return
        self._push(layout.CMD_SEND, -1, *key, abi.OP_RST)

    def start(self, slot: int) -> None:
        """Data may flow."""
        record = self.worker.connections[slot]
        if record["fd"] >= 0:
            try:
                self.worker.watch(int(record["fd"]), _WATCHED, layout.EVENT_CONNECTION, slot)
            except OSError as error:
                code = error.errno or 0
                self._poller.call_soon_threadsafe(lambda: self._told().failed(slot, code))
                return
        self._push_with_serial(layout.CMD_START, slot)

    def when_drained(self, slot: int) -> None:
        """Has `drained` told when all that the guest has sent so far has gone on."""
        self._push(layout.CMD_DRAIN, slot)

    def hush(self, slot: int) -> None:
        """The guest takes nothing more."""
        self._push(layout.CMD_HUSH, slot)

    def message(self, slot: int) -> None:
        """An empty message, and reading goes on."""
        self._push_with_serial(layout.CMD_MESSAGE, slot)

    def close(self, slot: int) -> None:
        """Takes a connection out; `closed` is told when the loop has let go of it."""
        self._push(layout.CMD_CLOSE, slot)

    # --- the device's ------------------------------------------------------------------------------------

    @property
    def open_connections(self) -> int:
        """How many the loop has, those on their way out as well."""
        return len(self._held)

    def forget_packets(self) -> None:
        """The driver is gone: packets that wait for its buffers are not wanted any more."""
        unwanted = (layout.CMD_SEND, layout.CMD_MESSAGE)
        self._backlog = deque(command for command in self._backlog if command[0] not in unwanted)
        with self.worker.paused():
            for queue in (self._commands, self._packets):
                queue.void(unwanted)
        self._ring()

    def set_cid(self, cid: int) -> None:
        """The guest has another CID from now on."""
        with self.worker.paused():
            self.worker.ports[self.port]["cid"] = cid

    def serve_all(self) -> None:
        """Tells of all that the loop has put until now, as `serve`."""
        self.serve(self._todo.size)

    def serve(self, most: int = _BATCH) -> None:
        """Tells of what the loop has put, of so much in one go; on the control thread."""
        eventfd.drain(self._python_fd)
        queue = self._todo
        taken, put = queue.taken, queue.put
        full = put - taken > _PACKETS // 2
        with self._batch():
            for number in range(taken, min(put, taken + most)):
                words = queue.get(number)
                store64_release(queue.at + layout.QUEUE_TAKEN, number + 1)
                try:
                    self._tell(words)
                except Exception:
                    _log.exception("%s: what the loop told of connection %d", self.name, words[1])
        if put > taken + most:
            os.eventfd_write(self._python_fd, 1)
        if full:
            self._ring()

    def wind_up(self, seconds: float) -> bool:
        """Waits, so long at most, until the loop has let go of all connections; whether it has.

        The poller may be closed by then.
        """
        end = time.monotonic() + seconds
        poll = select.poll()
        poll.register(self._python_fd, select.POLLIN)
        while self._held and (left := end - time.monotonic()) > 0:
            # While the queue is full, look again soon.
            poll.poll(1000 * (min(left, _AGAIN) if self._backlog else left))
            self.serve()
            if self._backlog:
                self._hand_on()
        return not self._held

    def shut(self) -> None:
        """Gives up its place; no ring of it runs. Connections that are left are told of as closed."""
        if self._later is not None:
            self._later.cancel()
        left = list(self._held)
        with self.worker.paused():
            for slot in left:
                # The loop has not let go of it: neither may a sibling look at it any more.
                record = self.worker.connections[slot]
                if record["other"] >= 0:
                    self.worker.connections[record["other"]]["other"] = -1
                record["open"], record["other"] = 0, -1
                self._let_go(slot)
            self._place.close()
        for slot in left:
            self._told().closed(slot)

    # --- within ---------------------------------------------------------------------------------------------

    def _told(self) -> Connections:
        assert self.connections is not None
        return self.connections

    def _tell(self, words: tuple[int, ...]) -> None:
        kind, slot, a = words[:3]
        told = self._told()
        if kind == layout.TODO_PACKET:
            key = Key(words[2], words[3], words[4] & (1 << 64) - 1, words[5])
            op, flags = words[6] & _WORD, words[7] & _WORD
            self._credit = words[6] >> 32 & _WORD, words[7] >> 32 & _WORD
            try:
                told.packet(slot if slot >= 0 else None, key, op, flags)
            finally:
                self._credit = 0, 0
        elif kind == layout.TODO_EOF:
            told.eof(slot)
        elif kind == layout.TODO_FAILED:
            told.failed(slot, a)
        elif kind == layout.TODO_VIOLATED:
            told.violated(slot, _VIOLATIONS[a])
        elif kind == layout.TODO_DRAINED:
            told.drained(slot)
        else:
            self._let_go(slot)
            told.closed(slot)

    def _let_go(self, slot: int) -> None:
        """The loop has nothing of a connection any more."""
        record = self.worker.connections[slot]
        if record["fd"] >= 0:
            self.worker.unwatch(int(record["fd"]), layout.EVENT_CONNECTION)
        record["fd"] = -1
        held = self._held.pop(slot)
        held.memory.close()
        self._share.give_back(held.granted, held.key.peer_cid)
        self._slots.append(slot)

    def _behind(self) -> bool:
        """Whether too much waits to be done."""
        commands, packets = self._commands, self._packets
        waits = len(self._backlog) + commands.put - commands.taken + packets.put - packets.taken
        return waits >= self._most_waiting

    def _push_with_serial(self, kind: int, slot: int) -> None:
        self._push(kind, slot, 0, 0, 0, 0, 0, self._held[slot].serial)

    def _push(self, *command: int) -> None:
        self._backlog.append(command)
        if len(self._backlog) == 1:
            # A new connection can wait for its first packet, or for the guest's next: commands come before those.
            self._hand_on(command[0] != layout.CMD_OPEN)

    def _hand_on(self, at_once: bool = True) -> None:
        queue = self._commands
        put = queue.put
        room = queue.size - (put - queue.taken)
        while self._backlog and room:
            queue.set(put, self._backlog.popleft())
            put += 1
            room -= 1
        # Pairs with the loop's acquire load of the number.
        store64_release(queue.at + layout.QUEUE_PUT, put)
        if self._backlog and (self._later is None or not self._later.pending):
            self._later = self._poller.call_later(_AGAIN, self._hand_on)
        if at_once:
            self._ring()

    def _ring(self) -> None:
        if self._within:
            self._owed = True
        else:
            os.eventfd_write(self._bell, 1)

    @contextmanager
    def _batch(self) -> Iterator[None]:
        """The loop is woken once, at the end, if there is something for it."""
        self._within, self._owed = True, False
        try:
            yield
        finally:
            self._within = False
            if self._owed:
                self._ring()


def _eventfd(held: ExitStack) -> int:
    fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
    held.callback(os.close, fd)
    return fd


def _address(memory: mmap.mmap) -> int:
    """Where mapped memory lies."""
    whole: Any = np.frombuffer(memory, np.uint8)
    return int(whole.ctypes.data)
