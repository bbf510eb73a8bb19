"""The vsock worker's loop: the guests that a thread serves, until Python is needed.

A turn of a guest does what Python wants, takes a batch of what the guest has sent, and gives it a share of what
there is for it. Then the loop sleeps in epoll, which wakes it for kicks, for Python, and for sockets.

Promises: a turn gives each guest at most one batch each way; a request to stop is seen once a turn; Python's commands
are done in their order; packets, and what begins behind them, wait for the guest's buffers in theirs, and nothing
else waits for a guest. Never: returns without a reason (`REASON_*`).
"""

from __future__ import annotations

import errno as codes
from typing import Final

from pyvhost.abi.virtio_vsock import OP_RESPONSE, OP_RW, SEQ_EOM, TYPE_SEQPACKET
from pyvhost.dataplane.access import (
    clock_ns,
    copy,
    load32,
    load64,
    load64_acquire,
    relax,
    store64,
    store64_release,
)
from pyvhost.dataplane.blocks import (
    C_PACKETS,
    CONTROL_STOP,
    EVENT_KICK,
    EVENT_PORT,
    REASON_STOP,
    SCRATCH_CLOCK,
    Record,
    Records,
)
from pyvhost.dataplane.policy import inline, kernel
from pyvhost.dataplane.split_ring import count, publish
from pyvhost.dataplane.turns import activate, ask_kicks, kicked, retire, sleep
from pyvhost.dataplane.vsock_blocks import (
    CMD_CLOSE,
    CMD_DRAIN,
    CMD_HUSH,
    CMD_JOIN,
    CMD_MESSAGE,
    CMD_OPEN,
    CMD_SEND,
    CMD_START,
    ENTRY_A,
    ENTRY_B,
    ENTRY_BYTES,
    ENTRY_GUEST_PORT,
    ENTRY_KIND,
    ENTRY_OP,
    ENTRY_PEER_CID,
    ENTRY_PEER_PORT,
    ENTRY_SERIAL,
    ENTRY_SLOT,
    ENTRY_TYPE,
    EVENT_CONNECTION,
    GONE,
    QUEUE_ENTRIES,
    QUEUE_PUT,
    QUEUE_TAKEN,
    SCRATCH_WRITTEN,
    TODO_CLOSED,
)
from pyvhost.dataplane.vsock_out import dequeue, drained, enqueue, flush, give_up
from pyvhost.dataplane.vsock_packets import end, offer, put_header, put_packet
from pyvhost.dataplane.vsock_receive import receive
from pyvhost.dataplane.vsock_transmit import transmit, wake
from pyvhost.dataplane.vsock_wire import WORD, find, insert, remove, speak, tell, write_header

_EPOLLIN_OR_HUP: Final = 0x1 | 0x8 | 0x10 | 0x2000
_EPOLLHUP: Final = 0x8 | 0x10 | 0x2000
_EPOLLPRI: Final = 0x2
_EPOLLOUT: Final = 0x4
#: EPOLLHUP or EPOLLERR: the other side has closed, and not only shut down its sending one.
_GONE: Final = 0x18
#: While guests are busy, epoll is asked this seldom for sockets and for what rests: nanoseconds.
_LOOK_NS: Final = 20_000
#: Between two looks at the clock while nothing but polled rings are left.
_RELAX: Final = 4
_BREATH_NS: Final = 2_000


@kernel
def _close(worker: Record, guest: Record, connections: Records, slot: int) -> None:
    """Takes a connection out, and gives it back to Python."""
    connection = connections[slot]
    if connection["open"]:
        remove(guest, connections, slot)
    connection["started"] = 0
    other = connection["other"]
    if other >= 0:
        connections[other]["other"] = -1
        connection["other"] = -1
    if connection["queued"]:
        dequeue(guest, connections, slot)
    tell(guest, TODO_CLOSED, slot, 0)


@kernel
def _find_out(guest: Record, connections: Records, slot: int) -> None:
    """Tells Python of another side that has closed, if nobody would read any more, and find out."""
    connection = connections[slot]
    if not connection["started"] or not (connection["ended"] or connection["hushed"]):
        return
    if not connection["mute"]:
        give_up(guest, connections, slot, codes.EPIPE)
    if not connection["ended"]:
        end(guest, connections, slot, 0)


@kernel
def _start(worker: Record, rings: Records, guests: Records, connections: Records, slot: int) -> None:
    """Data flows from now on; some may have come before."""
    connection = connections[slot]
    connection["started"] = 1
    if connection["fd"] >= 0:
        connection["readable"] = 1
        connection["writable"] = 1
        flush(worker, guests[connection["guest"]], connections, slot)
    elif connection["other"] >= 0:
        wake(worker, rings, guests, connections, connection["other"])
    if connection["hung_up"] == GONE:
        _find_out(guests[connection["guest"]], connections, slot)
    wake(worker, rings, guests, connections, slot)


@kernel
def _put(
    worker: Record, rings: Records, guests: Records, connections: Records, index: int, entry: int
) -> bool:
    """Puts a packet of Python's into the receive ring; False: there is no buffer."""
    guest = guests[index]
    slot = load64(entry + ENTRY_SLOT)
    there = _there(connections, entry)
    if slot >= 0 and not there:
        other = _named(guest, connections, entry)
        if other >= 0 and connections[other]["by_guest"]:
            # It has begun another by that name, and done with the former: it would take this for an answer.
            return True
    if not rings[guest["rx"]]["running"] or offer(worker, rings, guests, index, 1) == 0:
        return False
    ring = rings[guest["rx"]]
    count(ring["row"], C_PACKETS, 1)
    if load64(entry + ENTRY_KIND) == CMD_MESSAGE:
        put_packet(worker, guest, ring, connections, 0, slot, OP_RW, 0, SEQ_EOM)
        connections[slot]["ended"] = 0
        connections[slot]["readable"] = 1
        enqueue(guest, connections, slot)
        return True
    op = load64(entry + ENTRY_OP) & WORD
    flags = load64(entry + ENTRY_OP) >> 32
    if there:
        put_packet(worker, guest, ring, connections, 0, slot, op, 0, flags)
        return True
    header = worker["scratch"] + SCRATCH_WRITTEN
    write_header(
        header,
        guest["cid"],
        load64(entry + ENTRY_PEER_CID),
        load64(entry + ENTRY_PEER_PORT),
        load64(entry + ENTRY_GUEST_PORT),
        load64(entry + ENTRY_TYPE),
        op,
        0,
        flags,
    )
    # It has no room any more.
    store64(header + 36, 0)
    put_header(ring, worker["rx_batch"], header, 0)
    return True


@inline
def _there(connections: Records, entry: int) -> bool:
    """Whether the connection that a command is about is still there."""
    slot = load64(entry + ENTRY_SLOT)
    if slot < 0:
        return False
    return connections[slot]["open"] != 0 and connections[slot]["serial"] == load64(entry + ENTRY_SERIAL)


@inline
def _named(guest: Record, connections: Records, entry: int) -> int:
    """The connection that there is by the name in a command, or -1."""
    return find(
        guest,
        connections,
        load64(entry + ENTRY_TYPE),
        load64(entry + ENTRY_GUEST_PORT),
        load64(entry + ENTRY_PEER_CID),
        load64(entry + ENTRY_PEER_PORT),
    )


@kernel
def _in_turn(
    worker: Record, rings: Records, guests: Records, connections: Records, index: int, entry: int
) -> bool:
    """Does what may have to wait for a buffer; False: there is none."""
    kind = load64(entry + ENTRY_KIND)
    if kind == CMD_SEND or (kind == CMD_MESSAGE and _there(connections, entry)):
        return _put(worker, rings, guests, connections, index, entry)
    if kind == CMD_START and _there(connections, entry):
        _start(worker, rings, guests, connections, load64(entry + ENTRY_SLOT))
    return True


@inline
def _waits(guest: Record) -> bool:
    """Whether something waits for the guest's buffers already."""
    return load64(guest["packets"] + QUEUE_PUT) != load64(guest["packets"] + QUEUE_TAKEN)


@kernel
def _set_aside(guest: Record, entry: int) -> bool:
    """Lets a command wait, behind those that do; False: there are more than there can be (`Link`)."""
    queue = guest["packets"]
    put = load64(queue + QUEUE_PUT)
    if put - load64(queue + QUEUE_TAKEN) > guest["packets_mask"]:
        return False
    copy(queue + QUEUE_ENTRIES + (put & guest["packets_mask"]) * ENTRY_BYTES, entry, ENTRY_BYTES)
    # Python reads both numbers.
    store64_release(queue + QUEUE_PUT, put + 1)
    return True


@kernel
def _catch_up(worker: Record, rings: Records, guests: Records, connections: Records, index: int) -> int:
    """Does what has waited for the guest's buffers, as far as they go; how much."""
    guest = guests[index]
    queue = guest["packets"]
    taken = load64(queue + QUEUE_TAKEN)
    first = taken
    while _waits(guest):
        entry = queue + QUEUE_ENTRIES + (taken & guest["packets_mask"]) * ENTRY_BYTES
        if not _in_turn(worker, rings, guests, connections, index, entry):
            break
        taken += 1
        store64_release(queue + QUEUE_TAKEN, taken)
    return taken - first


@kernel
def obey(worker: Record, rings: Records, guests: Records, connections: Records, index: int) -> int:
    """Does what Python wants of a guest's connections, packets as far as the guest's buffers go; how much."""
    guest = guests[index]
    done = _catch_up(worker, rings, guests, connections, index)
    queue = guest["commands"]
    taken = load64(queue + QUEUE_TAKEN)
    # Pairs with Python's release store of the number, behind the entries.
    put = load64_acquire(queue + QUEUE_PUT)
    rx = guest["rx"]
    while taken < put:
        entry = queue + QUEUE_ENTRIES + (taken & guest["commands_mask"]) * ENTRY_BYTES
        kind = load64(entry + ENTRY_KIND)
        slot = load64(entry + ENTRY_SLOT)
        if kind in (CMD_SEND, CMD_MESSAGE, CMD_START):
            if kind == CMD_SEND and slot >= 0 and load64(entry + ENTRY_OP) & WORD == OP_RESPONSE:
                connections[slot]["accepted"] = 1
            # No data before RESPONSE: START waits for what waits.
            if (
                _waits(guest) or not _in_turn(worker, rings, guests, connections, index, entry)
            ) and not _set_aside(guest, entry):
                break
        elif kind == CMD_OPEN:
            insert(guest, connections, slot)
        elif kind == CMD_DRAIN:
            connections[slot]["drain"] = 1
            drained(guest, connections[slot], slot)
        elif kind == CMD_HUSH:
            connections[slot]["hushed"] = 1
            if connections[slot]["hung_up"] == GONE:
                _find_out(guest, connections, slot)
        elif kind == CMD_JOIN:
            other = load64(entry + ENTRY_A)
            # The sibling's commands are not in one queue with these: it may be another connection by now.
            if connections[other]["open"] and connections[other]["serial"] == load64(entry + ENTRY_B):
                connections[slot]["other"] = other
                connections[other]["other"] = slot
                if connections[slot]["type"] == TYPE_SEQPACKET:
                    # What a message may have depends on this guest from now on.
                    connections[other]["credit_due"] = 1
                wake(worker, rings, guests, connections, slot)
                wake(worker, rings, guests, connections, other)
        elif kind == CMD_CLOSE:
            _close(worker, guest, connections, slot)
        taken += 1
        done += 1
        # Pairs with Python's acquire load before it uses the entry again.
        store64_release(queue + QUEUE_TAKEN, taken)
    if done and rx >= 0 and rings[rx]["located"]:
        publish(rings[rx])
    return done


@kernel
def serve(worker: Record, rings: Records, guests: Records, connections: Records, index: int) -> int:
    """One turn of a guest, both ways; how much it moved."""
    guest = guests[index]
    moved = obey(worker, rings, guests, connections, index)
    if guest["tx"] >= 0 and rings[guest["tx"]]["running"]:
        moved += transmit(worker, rings, guests, connections, index)
    if guest["rx"] >= 0 and rings[guest["rx"]]["running"]:
        moved += receive(worker, rings, guests, connections, index)
    speak(guest)
    return moved


@kernel
def _happened(
    worker: Record, rings: Records, guests: Records, connections: Records, slot: int, what: int
) -> None:
    """Something happened at a connection's socket."""
    connection = connections[slot]
    if not connection["open"] or connection["fd"] < 0:
        # It was closed since.
        return
    if what & _EPOLLIN_OR_HUP:
        connection["readable"] = 1 - connection["ended"]
    if what & _EPOLLPRI:
        connection["urgent"] = 1
    if what & _EPOLLHUP:
        connection["hung_up"] = GONE if what & _GONE else 1
    if what & (_EPOLLOUT | _EPOLLHUP):
        connection["writable"] = 1
        if connection["started"]:
            flush(worker, guests[connection["guest"]], connections, slot)
    if what & _GONE:
        _find_out(guests[connection["guest"]], connections, slot)
    wake(worker, rings, guests, connections, slot)


@kernel
def _wait(worker: Record, rings: Records, guests: Records, connections: Records, timeout_ms: int) -> None:
    """Sleeps in epoll and wakes the guests that something happened to."""
    events = worker["events"]
    for i in range(sleep(worker, timeout_ms)):
        # struct epoll_event is packed: 4 bytes of events, 8 of data.
        kind = load32(events + 12 * i + 8)
        index = load32(events + 12 * i + 4)
        if kind == EVENT_KICK:
            kicked(worker, rings[index])
            activate(worker, rings, guests, rings[index]["port"])
        elif kind == EVENT_PORT:
            activate(worker, rings, guests, index)
        elif kind == EVENT_CONNECTION:
            _happened(worker, rings, guests, connections, index, load32(events + 12 * i))


@kernel
def _rest(
    worker: Record, rings: Records, guests: Records, connections: Records, index: int, now: int
) -> bool:
    """Whether a guest without work may rest: not while it is polled, nor if asking for kicks shows work."""
    guest = guests[index]
    if guest["busy_ns"]:
        if guest["idle_since"] == 0:
            guest["idle_since"] = now
        if now - guest["idle_since"] < guest["busy_ns"]:
            return False
    ask_kicks(rings, guest, True)
    if serve(worker, rings, guests, connections, index):
        ask_kicks(rings, guest, False)
        guest["idle_since"] = 0
        return False
    return True


@kernel
def _breathe(worker: Record, now: int) -> None:
    """Leaves polled rings alone for a moment: a look at an index takes its cache line away from the driver."""
    clock = worker["scratch"] + SCRATCH_CLOCK
    while load64_acquire(worker["control"] + 8 * CONTROL_STOP) == 0 and clock_ns(clock) < now + _BREATH_NS:
        for _ in range(_RELAX):
            relax()


@kernel
def vsock_loop(workers: Records, rings: Records, guests: Records, connections: Records) -> int:
    """Serves the guests of `workers[0]` until there is a reason to return, which it returns."""
    worker = workers[0]
    active = worker["active"]
    clock = worker["scratch"] + SCRATCH_CLOCK
    looked = 0
    worker["reason"] = REASON_STOP
    # Pairs with the store of the control thread that wants to change something.
    while load64_acquire(worker["control"] + 8 * CONTROL_STOP) == 0:
        if worker["active_count"] == 0:
            _wait(worker, rings, guests, connections, -1)
            if worker["reason"] != REASON_STOP:
                return worker["reason"]
            continue
        now = clock_ns(clock)
        if now - looked > _LOOK_NS:
            looked = now
            _wait(worker, rings, guests, connections, 0)
        at = 0
        moved = 0
        while at < worker["active_count"]:
            index = load64(active + 8 * at)
            served = serve(worker, rings, guests, connections, index)
            if served:
                moved += served
                guests[index]["idle_since"] = 0
                at += 1
            elif _rest(worker, rings, guests, connections, index, now):
                retire(worker, guests[index], at)
            else:
                at += 1
            if worker["reason"] != REASON_STOP:
                return worker["reason"]
        if moved == 0 and worker["active_count"] > 0:
            _breathe(worker, now)
    return REASON_STOP
