"""Other end to guest: what sockets and siblings have, and credit, into a vsock device's receive ring.

Connections that have something stand in the guest's ready list and get their turns one after the other.

Promises: a guest is sent no more than it has granted; a message that it has made too little room for ends its
connection; a STREAM socket is read straight into the guest's buffers, in turns that none can prolong; descriptors
that come with a socket's bytes are closed unseen. Never: reads what has no buffer to go to.
"""

from __future__ import annotations

import errno as codes
from typing import Final

from pyvhost.abi.virtio_vsock import OP_CREDIT_REQUEST, OP_CREDIT_UPDATE, OP_RW, SEQ_EOM, TYPE_SEQPACKET
from pyvhost.dataplane.access import fill, load32, load64, store64, sys_read, sys_recvmsg
from pyvhost.dataplane.blocks import (
    C_BYTES,
    C_CREDIT_STALLS,
    C_PACKETS,
    C_SYSCALLS,
    SCRATCH_IOV,
    SCRATCH_WORDS,
    Record,
    Records,
)
from pyvhost.dataplane.frames import transfer
from pyvhost.dataplane.policy import kernel
from pyvhost.dataplane.split_ring import count, publish
from pyvhost.dataplane.turns import activate
from pyvhost.dataplane.vsock_blocks import (
    MESSAGE_BYTES,
    MESSAGE_FLAGS,
    MESSAGE_IOV,
    MESSAGE_IOV_COUNT,
    QUANTUM,
    RECORD,
    SCRATCH_MESSAGE,
)
from pyvhost.dataplane.vsock_out import (
    drained,
    enqueue,
    forget_record,
    gone,
    pieces_of,
    record_bytes,
    record_flags,
    whole,
)
from pyvhost.dataplane.vsock_packets import (
    PIECES,
    credit,
    end,
    offer,
    put_control,
    put_data,
    put_packet,
    room_in,
)
from pyvhost.dataplane.vsock_wire import WORD

#: Buffers that one read is offered at most.
_BUFFERS: Final = 32
#: What a turn gives a guest at most, in bytes and in connections.
_TURN: Final = 4 * QUANTUM
_TURNS: Final = 64
#: A read had descriptors with it that it did not take.
_MSG_CTRUNC: Final = 0x8

#: What came of a connection's turn: nothing left, more to come, no buffer for it.
_DONE: Final = 0
_MORE: Final = 1
_DRY: Final = 2


@kernel
def _from_socket(
    worker: Record, rings: Records, guests: Records, connections: Records, index: int, slot: int
) -> int:
    """A STREAM socket's bytes, straight into the guest's buffers."""
    connection = connections[slot]
    have = offer(worker, rings, guests, index, max(1, min(connection["expect"], _BUFFERS)))
    if have == 0:
        return _DRY
    iov = worker["scratch"] + SCRATCH_IOV
    pieces = room_in(worker, have, min(credit(connection), QUANTUM), iov)
    offered = load64(worker["scratch"] + SCRATCH_WORDS)
    message = worker["scratch"] + SCRATCH_MESSAGE
    fill(message, 0, MESSAGE_BYTES)
    store64(message + MESSAGE_IOV, iov)
    store64(message + MESSAGE_IOV_COUNT, pieces)
    got = sys_recvmsg(connection["fd"], message)
    count(worker["row"], C_SYSCALLS, 1)
    if got <= 0:
        if got == -codes.EAGAIN:
            connection["readable"] = 0
        elif got != -codes.EINTR:
            end(guests[index], connections, slot, -got)
        return _DONE if got != -codes.EINTR else _MORE
    used = put_data(worker, rings, guests, connections, index, slot, got)
    if got == offered:
        connection["expect"] = min(2 * used, _BUFFERS)
        return _MORE
    connection["expect"] = used + 1
    cut = load32(message + MESSAGE_FLAGS) & _MSG_CTRUNC
    if not (connection["hung_up"] or connection["urgent"] or cut):
        # A stream that gives less than was asked for is empty, and epoll tells when it no longer is; but a read also
        # ends behind bytes that descriptors came with (the kernel closes them, and says so), and at an urgent byte.
        connection["readable"] = 0
        return _DONE
    return _MORE


@kernel
def _from_sibling(
    worker: Record, rings: Records, guests: Records, connections: Records, index: int, slot: int
) -> int:
    """What a sibling has sent: bytes of its STREAM."""
    connection = connections[slot]
    other = connections[connection["other"]]
    length = min(whole(other), credit(connection), QUANTUM)
    have = offer(worker, rings, guests, index, _BUFFERS)
    if have == 0:
        return _DRY
    iov = worker["scratch"] + SCRATCH_IOV
    source = iov + 16 * PIECES
    pieces = room_in(worker, have, length, iov)
    length = load64(worker["scratch"] + SCRATCH_WORDS)
    pieces_of(other, 0, length, source)
    transfer(source, 0, iov, 0, length)
    put_data(worker, rings, guests, connections, index, slot, length)
    other["out_taken"] += length
    _sibling_gone(worker, rings, guests, connections, connection["other"], length)
    return _MORE if pieces else _DONE


@kernel
def _sibling_gone(
    worker: Record, rings: Records, guests: Records, connections: Records, slot: int, length: int
) -> None:
    """`length` bytes of a sibling's have arrived."""
    index = connections[slot]["guest"]
    guest = guests[index]
    gone(guest, connections, slot, length)
    drained(guest, connections[slot], slot)
    activate(worker, rings, guests, index)


@kernel
def _fragment(
    worker: Record,
    rings: Records,
    guests: Records,
    connections: Records,
    index: int,
    slot: int,
    source: int,
    left: int,
    flags: int,
) -> int:
    """The next packet of a message, of which `left` bytes are at `source`; how many went, -1: there is no buffer."""
    guest = guests[index]
    if offer(worker, rings, guests, index, 1) == 0:
        return -1
    ring = rings[guest["rx"]]
    connection = connections[slot]
    iov = worker["scratch"] + SCRATCH_IOV
    room_in(worker, 1, min(left, max(credit(connection), 0), QUANTUM), iov)
    length = load64(worker["scratch"] + SCRATCH_WORDS)
    transfer(source, 0, iov, 0, length)
    put_packet(worker, guest, ring, connections, 0, slot, OP_RW, length, flags if length == left else 0)
    connection["tx_cnt"] = (connection["tx_cnt"] + length) & WORD
    count(ring["row"], C_PACKETS, 1)
    count(ring["row"], C_BYTES, length)
    return length


@kernel
def _message_from_sibling(
    worker: Record, rings: Records, guests: Records, connections: Records, index: int, slot: int
) -> int:
    """A packet of a sibling's message."""
    connection = connections[slot]
    other = connections[connection["other"]]
    length = record_bytes(other)
    begun = connection["record_gone"]
    source = worker["scratch"] + SCRATCH_IOV + 16 * PIECES
    pieces_of(other, RECORD + begun, length - begun, source)
    sent = _fragment(
        worker, rings, guests, connections, index, slot, source, length - begun, record_flags(other)
    )
    if sent < 0:
        return _DRY
    connection["record_gone"] = begun + sent
    if begun + sent == length:
        connection["record_gone"] = 0
        forget_record(other, length)
    _sibling_gone(worker, rings, guests, connections, connection["other"], sent)
    return _MORE


@kernel
def _message_from_socket(
    worker: Record, rings: Records, guests: Records, connections: Records, index: int, slot: int
) -> int:
    """A packet of a SEQPACKET socket's message, which is read first."""
    connection = connections[slot]
    if connection["message_bytes"] == 0:
        got = sys_read(connection["fd"], connection["message"], connection["message_room"])
        count(worker["row"], C_SYSCALLS, 1)
        if got <= 0:
            if got == -codes.EAGAIN:
                connection["readable"] = 0
            elif got != -codes.EINTR:
                # Nothing: the end, or an empty message. Python can tell.
                end(guests[index], connections, slot, -got)
            return _DONE if got != -codes.EINTR else _MORE
        if got == connection["message_room"] or got > connection["peer_buf_alloc"]:
            end(guests[index], connections, slot, codes.EMSGSIZE)
            return _DONE
        connection["message_bytes"] = got
        connection["message_gone"] = 0
    begun = connection["message_gone"]
    length = connection["message_bytes"]
    source = worker["scratch"] + SCRATCH_IOV + 16 * PIECES
    store64(source, connection["message"] + begun)
    store64(source + 8, length - begun)
    sent = _fragment(worker, rings, guests, connections, index, slot, source, length - begun, SEQ_EOM)
    if sent < 0:
        return _DRY
    connection["message_gone"] = begun + sent
    if begun + sent == length:
        connection["message_bytes"] = 0
    return _MORE


@kernel
def _waiting(connections: Records, slot: int) -> bool:
    """Whether the other end has something, or may have."""
    connection = connections[slot]
    if not connection["started"] or connection["hushed"]:
        return False
    if connection["other"] >= 0:
        return whole(connections[connection["other"]]) > 0
    if connection["fd"] < 0:
        return False
    return connection["message_bytes"] > 0 or (connection["readable"] != 0 and not connection["ended"])


@kernel
def _empty_message(connections: Records, slot: int) -> bool:
    """Whether a sibling's next message has no bytes: it goes without credit."""
    connection = connections[slot]
    if connection["other"] < 0 or connection["type"] != TYPE_SEQPACKET:
        return False
    return record_bytes(connections[connection["other"]]) == 0


@kernel
def _too_long(connections: Records, slot: int) -> bool:
    """Whether the guest has less room in all than its next message needs."""
    connection = connections[slot]
    if connection["type"] != TYPE_SEQPACKET or not connection["started"] or connection["hushed"]:
        return False
    room = connection["peer_buf_alloc"]
    if connection["other"] < 0:
        return connection["message_bytes"] > room
    sender = connections[connection["other"]]
    if whole(sender) > 0:
        return record_bytes(sender) > room
    # Of one that is not whole yet there is more to come, and its sender may send no more than this guest takes.
    unfinished = sender["out_put"] - sender["out_open"] - RECORD
    return connection["shrunk"] != 0 and sender["out_open"] >= 0 and unfinished >= room


@kernel
def _turn(
    worker: Record, rings: Records, guests: Records, connections: Records, index: int, slot: int
) -> int:
    """A connection's turn."""
    connection = connections[slot]
    if not connection["started"]:
        # Nothing comes before RESPONSE, credit neither: START gives it a turn.
        return _DONE
    if _too_long(connections, slot):
        connection["message_bytes"] = 0
        connection["hushed"] = 1
        end(guests[index], connections, slot, codes.EMSGSIZE)
    if _waiting(connections, slot):
        if credit(connection) > 0 or _empty_message(connections, slot):
            if connection["other"] >= 0:
                if connection["type"] == TYPE_SEQPACKET:
                    return _message_from_sibling(worker, rings, guests, connections, index, slot)
                return _from_sibling(worker, rings, guests, connections, index, slot)
            if connection["type"] == TYPE_SEQPACKET:
                return _message_from_socket(worker, rings, guests, connections, index, slot)
            return _from_socket(worker, rings, guests, connections, index, slot)
        if not connection["credit_asked"]:
            # The guest says when there is room again; it is asked once, in case that got lost with a former life.
            if not put_control(worker, rings, guests, connections, index, slot, OP_CREDIT_REQUEST):
                return _DRY
            connection["credit_asked"] = 1
            count(rings[guests[index]["rx"]]["row"], C_CREDIT_STALLS, 1)
    if connection["credit_due"] and not put_control(
        worker, rings, guests, connections, index, slot, OP_CREDIT_UPDATE
    ):
        return _DRY
    return _DONE


@kernel
def receive(worker: Record, rings: Records, guests: Records, connections: Records, index: int) -> int:
    """Gives the connections that are ready their turns; how many."""
    guest = guests[index]
    ring = rings[guest["rx"]]
    turns = 0
    before = load64(ring["row"] + C_BYTES)
    while turns < _TURNS and guest["ready_first"] >= 0 and ring["running"]:
        slot = guest["ready_first"]
        connection = connections[slot]
        guest["ready_first"] = connection["next"]
        if connection["next"] < 0:
            guest["ready_last"] = -1
        connection["queued"] = 0
        came = _turn(worker, rings, guests, connections, index, slot)
        if came == _DRY:
            _put_back(guest, connections, slot)
            break
        turns += 1
        if came == _MORE or (connection["credit_due"] and connection["started"]):
            enqueue(guest, connections, slot)
        if load64(ring["row"] + C_BYTES) - before >= _TURN:
            break
    publish(ring)
    return turns


@kernel
def _put_back(guest: Record, connections: Records, slot: int) -> None:
    """The connection that was taken from the ready list is its first again."""
    connection = connections[slot]
    if connection["queued"]:
        # It came to the end meanwhile: there it stays.
        return
    connection["queued"] = 1
    connection["next"] = guest["ready_first"]
    guest["ready_first"] = slot
    if guest["ready_last"] < 0:
        guest["ready_last"] = slot
