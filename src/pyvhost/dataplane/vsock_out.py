"""What a guest has sent on a connection, on its way to the other end: the `out` buffer, and the credit it costs.

A guest may have `buf_alloc` bytes under way; they are written straight from its memory where the socket takes them,
and wait in `out` else, so that a reader who stalls holds up nobody but itself.

Promises: never keeps more than was granted; a message of a SEQPACKET connection goes on when it is whole; credit is
told anew before half of it is all that the guest knows of. Never: blocks.
"""

from __future__ import annotations

import errno as codes
from typing import Final

from pyvhost.abi.virtio_vsock import SEQ_EOM, TYPE_SEQPACKET
from pyvhost.dataplane.access import (
    copy,
    load32,
    load64,
    store32,
    store64,
    sys_epoll_modify,
    sys_send,
    sys_writev,
)
from pyvhost.dataplane.blocks import C_SYSCALLS, SCRATCH_WORDS, Record, Records
from pyvhost.dataplane.policy import inline, kernel
from pyvhost.dataplane.split_ring import count
from pyvhost.dataplane.vsock_blocks import (
    EVENT_CONNECTION,
    RECORD,
    TODO_DRAINED,
    TODO_FAILED,
    VIOLATED_RECORDS,
)
from pyvhost.dataplane.vsock_wire import WORD, tell

_EPOLL_IN_PRI_HUP: Final = 0x2003
_EPOLL_OUT: Final = 0x4
_EPOLL_EDGE: Final = 1 << 31
#: Messages that go on in one turn.
_MESSAGES: Final = 64


@kernel
def enqueue(guest: Record, connections: Records, slot: int) -> None:
    """Puts a connection into its guest's ready list, at its end."""
    connection = connections[slot]
    if connection["queued"]:
        return
    connection["queued"] = 1
    connection["next"] = -1
    if guest["ready_last"] < 0:
        guest["ready_first"] = slot
    else:
        connections[guest["ready_last"]]["next"] = slot
    guest["ready_last"] = slot


@kernel
def dequeue(guest: Record, connections: Records, slot: int) -> None:
    """Takes a connection out of the ready list, which it is in."""
    following = connections[slot]["next"]
    connections[slot]["queued"] = 0
    if guest["ready_first"] == slot:
        guest["ready_first"] = following
        if following < 0:
            guest["ready_last"] = -1
        return
    before = guest["ready_first"]
    while connections[before]["next"] != slot:
        before = connections[before]["next"]
    connections[before]["next"] = following
    if following < 0:
        guest["ready_last"] = before


@inline
def under_way(connection: Record) -> int:
    """Bytes that came from the guest and have not gone on."""
    return (connection["rx_cnt"] - connection["fwd_cnt"]) & WORD


@kernel
def owe(guest: Record, connections: Records, slot: int) -> None:
    """Has the guest told of its credit, when what it knows of is half or less."""
    connection = connections[slot]
    alloc = connection["alloc_told"]
    known = alloc - ((connection["rx_cnt"] - connection["fwd_told"]) & WORD)
    if known <= alloc >> 1 and connection["fwd_cnt"] != connection["fwd_told"] and connection["open"]:
        connection["credit_due"] = 1
        enqueue(guest, connections, slot)


@kernel
def gone(guest: Record, connections: Records, slot: int, length: int) -> None:
    """`length` bytes have gone on: there is room again."""
    connection = connections[slot]
    connection["fwd_cnt"] = (connection["fwd_cnt"] + length) & WORD
    owe(guest, connections, slot)


@inline
def whole(connection: Record) -> int:
    """Bytes in `out` that may go on."""
    return connection["out_whole"] - connection["out_taken"]


@kernel
def drained(guest: Record, connection: Record, slot: int) -> None:
    """Tells Python if it waits for the last byte to go on, and it has."""
    if connection["drain"] and whole(connection) == 0:
        connection["drain"] = 0
        tell(guest, TODO_DRAINED, slot, 0)


@kernel
def give_up(guest: Record, connections: Records, slot: int, code: int) -> None:
    """The other end takes nothing more: what is for it is dropped."""
    connection = connections[slot]
    connection["mute"] = 1
    connection["out_taken"] = connection["out_whole"] = connection["out_put"]
    connection["out_open"] = -1
    gone(guest, connections, slot, under_way(connection))
    # Who has hung up with something unread may have something to say nevertheless.
    tell(guest, TODO_FAILED, slot, codes.EPIPE if code == codes.ECONNRESET else code)
    drained(guest, connection, slot)


@kernel
def watch_writable(worker: Record, connection: Record, slot: int, wanted: int) -> None:
    """Has epoll tell when a socket takes more, or spares us its telling of each read at the other end."""
    if connection["watches_writable"] == wanted:
        return
    connection["watches_writable"] = wanted
    event = worker["scratch"] + SCRATCH_WORDS
    store32(event, _EPOLL_IN_PRI_HUP | _EPOLL_EDGE | (_EPOLL_OUT if wanted else 0))
    store32(event + 4, slot)
    store32(event + 8, EVENT_CONNECTION)
    sys_epoll_modify(worker["epoll"], connection["fd"], event)
    count(worker["row"], C_SYSCALLS, 1)


@kernel
def _into(connection: Record, source: int, length: int) -> None:
    """Copies bytes to the end of `out`, where there is room."""
    size = connection["out_size"]
    at = connection["out_put"] & (size - 1)
    run = min(length, size - at)
    copy(connection["out"] + at, source, run)
    if length > run:
        copy(connection["out"], source + run, length - run)
    connection["out_put"] += length


@inline
def room(connection: Record) -> int:
    """How many bytes `out` still takes."""
    return connection["out_size"] - (connection["out_put"] - connection["out_taken"])


@kernel
def keep(connection: Record, iov: int, skip: int, length: int, flags: int) -> int:
    """Puts `length` bytes of the pieces at `iov`, after the first `skip`, into `out`; 0, or VIOLATED_RECORDS."""
    framed = connection["type"] == TYPE_SEQPACKET
    if framed:
        # Rounding up needs no room of its own: the buffer's end is a multiple of RECORD.
        if room(connection) < length + (RECORD if connection["out_open"] < 0 else 0):
            return VIOLATED_RECORDS
        if connection["out_open"] < 0:
            connection["out_open"] = connection["out_put"]
            connection["out_put"] += RECORD
    left = length
    while left > 0:
        run = load64(iov + 8)
        if skip >= run:
            skip -= run
        else:
            part = min(run - skip, left)
            _into(connection, load64(iov) + skip, part)
            left -= part
            skip = 0
        iov += 16
    if not framed:
        connection["out_whole"] = connection["out_put"]
    elif flags & SEQ_EOM:
        at = connection["out_open"]
        # Records begin at multiples of RECORD, so that none's head lies across the end.
        record = connection["out"] + (at & (connection["out_size"] - 1))
        store32(record, connection["out_put"] - at - RECORD)
        store32(record + 4, flags)
        connection["out_put"] = (connection["out_put"] + RECORD - 1) & ~(RECORD - 1)
        connection["out_whole"] = connection["out_put"]
        connection["out_open"] = -1
    return 0


@inline
def record_bytes(connection: Record) -> int:
    """Bytes of the first whole message in `out`."""
    return load32(connection["out"] + (connection["out_taken"] & (connection["out_size"] - 1)))


@inline
def record_flags(connection: Record) -> int:
    return load32(connection["out"] + (connection["out_taken"] & (connection["out_size"] - 1)) + 4)


@inline
def forget_record(connection: Record, length: int) -> None:
    """The first message has gone on."""
    connection["out_taken"] += (length + 2 * RECORD - 1) & ~(RECORD - 1)


@kernel
def pieces_of(connection: Record, offset: int, length: int, iov: int) -> int:
    """Where `length` bytes of `out`, `offset` behind what was taken, lie: struct iovec at `iov`, one or two."""
    size = connection["out_size"]
    at = (connection["out_taken"] + offset) & (size - 1)
    run = min(length, size - at)
    store64(iov, connection["out"] + at)
    store64(iov + 8, run)
    if length == run:
        return 1
    store64(iov + 16, connection["out"])
    store64(iov + 24, length - run)
    return 2


@kernel
def flush(worker: Record, guest: Record, connections: Records, slot: int) -> None:
    """Writes what is in `out` to the socket, as far as it goes."""
    connection = connections[slot]
    iov = worker["scratch"] + SCRATCH_WORDS
    for _ in range(_MESSAGES):
        length = whole(connection)
        if length == 0 or connection["mute"]:
            break
        if connection["type"] == TYPE_SEQPACKET:
            length = record_bytes(connection)
            if length:
                done = sys_writev(connection["fd"], iov, pieces_of(connection, RECORD, length, iov))
            else:
                done = sys_send(connection["fd"], iov, 0)
        else:
            done = sys_writev(connection["fd"], iov, pieces_of(connection, 0, length, iov))
        count(worker["row"], C_SYSCALLS, 1)
        if done < 0:
            if done == -codes.EAGAIN:
                connection["writable"] = 0
                break
            if done != -codes.EINTR:
                give_up(guest, connections, slot, -done)
            continue
        if connection["type"] == TYPE_SEQPACKET:
            forget_record(connection, length)
        else:
            connection["out_taken"] += done
        gone(guest, connections, slot, done)
    drained(guest, connection, slot)
    if connection["started"] and not connection["mute"]:
        waits = 1 if whole(connection) else 0
        if waits and connection["writable"]:
            # More than its share of this turn: asked anew, epoll tells at once.
            connection["watches_writable"] = 0
        watch_writable(worker, connection, slot, waits)


@kernel
def send(
    worker: Record,
    guest: Record,
    connections: Records,
    slot: int,
    iov: int,
    pieces: int,
    length: int,
    flags: int,
) -> int:
    """Writes pieces of the guest's memory to a socket that takes something, and keeps what is left over; as `keep`.

    Of a SEQPACKET connection, one whole message.
    """
    connection = connections[slot]
    if length == 0:
        return 0
    done = sys_writev(connection["fd"], iov, pieces)
    count(worker["row"], C_SYSCALLS, 1)
    if done < 0:
        if done != -codes.EAGAIN and done != -codes.EINTR:
            give_up(guest, connections, slot, -done)
            return 0
        done = 0
    elif connection["type"] == TYPE_SEQPACKET:
        done = length
    if done:
        gone(guest, connections, slot, done)
        if done == length:
            return 0
    connection["writable"] = 0
    broken = keep(connection, iov, done, length - done, flags)
    watch_writable(worker, connection, slot, 1)
    return broken
