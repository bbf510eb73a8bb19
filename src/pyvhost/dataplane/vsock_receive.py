"""Other end to guest: what sockets and siblings have, and credit, into a vsock device's receive ring.

Connections that have something stand in the guest's ready list and get their turns one after the other.

Promises: a guest is sent no more than it has granted; a STREAM socket is read straight into the guest's buffers, in
turns that none can prolong. Never: reads what has no buffer to go to.
"""

from __future__ import annotations

import errno as codes
from typing import Final

from pyvhost.abi.virtio_vsock import (
    OP_CREDIT_REQUEST,
    OP_CREDIT_UPDATE,
    OP_RW,
    SEQ_EOM,
    TYPE_SEQPACKET,
)
from pyvhost.dataplane.access import copy, load64, store32, store64, sys_read, sys_readv
from pyvhost.dataplane.blocks import (
    C_BURSTS,
    C_BYTES,
    C_CREDIT_STALLS,
    C_CREDIT_UPDATES,
    C_NO_BUFFER,
    C_PACKETS,
    C_SYSCALLS,
    FAULT_HEADER,
    SCRATCH_IOV,
    SCRATCH_WORDS,
    SLOT_BYTES,
    SLOT_HEAD,
    SLOT_IN,
    SLOT_IN_BYTES,
    SLOT_IOV,
    Record,
    Records,
)
from pyvhost.dataplane.frames import scatter, transfer
from pyvhost.dataplane.net_deliver import guest_fault
from pyvhost.dataplane.policy import inline, kernel
from pyvhost.dataplane.split_ring import WRITABLE, collect, count, publish, take, use_written
from pyvhost.dataplane.translate import fault
from pyvhost.dataplane.vsock_blocks import (
    HEADER,
    QUANTUM,
    RECORD,
    SCRATCH_WRITTEN,
    TODO_EOF,
    TODO_FAILED,
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
from pyvhost.dataplane.vsock_transmit import activate
from pyvhost.dataplane.vsock_wire import WORD, tell, write_header

#: Buffers that one read is offered at most, and pieces.
_BUFFERS: Final = 32
_PIECES: Final = 1024
#: What a turn gives a guest at most, in bytes and in connections.
_TURN: Final = 4 * QUANTUM
_TURNS: Final = 64

#: What came of a connection's turn: nothing left, more to come, no buffer for it.
_DONE: Final = 0
_MORE: Final = 1
_DRY: Final = 2


@inline
def credit(connection: Record) -> int:
    """Bytes that the guest takes; whatever it says, below 2**32."""
    return connection["peer_buf_alloc"] - ((connection["tx_cnt"] - connection["peer_fwd_cnt"]) & WORD)


@kernel
def offer(worker: Record, rings: Records, guests: Records, index: int, wanted: int) -> int:
    """How many of the guest's buffers, up to `wanted`, are in the batch; each has room for more than a header."""
    guest = guests[index]
    ring = rings[guest["rx"]]
    batch = worker["rx_batch"]
    have = collect(ring, batch, 0, wanted, WRITABLE, 0)
    for i in range(have):
        slot = batch + i * SLOT_BYTES
        if load64(slot + SLOT_IN_BYTES) <= HEADER:
            if i > 0:
                return i
            fault(ring, FAULT_HEADER, load64(slot + SLOT_HEAD), load64(slot + SLOT_IN_BYTES), HEADER + 1)
            have = -1
            break
    if have < 0:
        guest_fault(worker, rings, guest["rx"])
        return 0
    if have == 0:
        guest["rx_dry"] = 1
        count(ring["row"], C_NO_BUFFER, 1)
    else:
        guest["rx_dry"] = 0
    return have


@kernel
def _credit(connections: Records, slot: int, header: int) -> None:
    """Tells the guest, in a header, what it may send."""
    connection = connections[slot]
    alloc = connection["buf_alloc"]
    other = connection["other"]
    if other >= 0 and connection["type"] == TYPE_SEQPACKET:
        alloc = min(alloc, connections[other]["peer_buf_alloc"])
    store32(header + 36, alloc)
    store32(header + 40, connection["fwd_cnt"])
    connection["alloc_told"] = alloc
    connection["fwd_told"] = connection["fwd_cnt"]
    connection["credit_due"] = 0


@kernel
def put_packet(
    worker: Record,
    guest: Record,
    ring: Record,
    connections: Records,
    at: int,
    slot: int,
    op: int,
    length: int,
    flags: int,
) -> None:
    """Writes a connection's header into buffer `at` of the batch, behind which `length` bytes lie, and uses it."""
    connection = connections[slot]
    header = worker["scratch"] + SCRATCH_WRITTEN
    write_header(
        header,
        guest["cid"],
        connection["peer_cid"],
        connection["peer_port"],
        connection["guest_port"],
        connection["type"],
        op,
        length,
        flags,
    )
    _credit(connections, slot, header)
    buffer = worker["rx_batch"] + at * SLOT_BYTES
    put_header(ring, buffer, header, length)


@kernel
def put_header(ring: Record, buffer: int, header: int, length: int) -> None:
    """Puts a header into a buffer and uses it."""
    iov = load64(buffer + SLOT_IOV)
    if load64(iov + 8) >= HEADER:
        copy(load64(iov), header, HEADER)
    else:
        scatter(header, iov, 0, HEADER)
    take(ring, 1)
    use_written(ring, buffer, HEADER + length)


@kernel
def _control(
    worker: Record, rings: Records, guests: Records, connections: Records, index: int, slot: int, op: int
) -> bool:
    """Puts a packet without data; False: there is no buffer."""
    if offer(worker, rings, guests, index, 1) == 0:
        return False
    guest = guests[index]
    ring = rings[guest["rx"]]
    put_packet(worker, guest, ring, connections, 0, slot, op, 0, 0)
    count(ring["row"], C_PACKETS, 1)
    if op == OP_CREDIT_UPDATE:
        count(ring["row"], C_CREDIT_UPDATES, 1)
    return True


@kernel
def _room(worker: Record, have: int, limit: int, iov: int) -> int:
    """Where up to `limit` bytes go in `have` buffers: struct iovec at `iov`, how many; SCRATCH_WORDS: their bytes."""
    pieces = 0
    total = 0
    for i in range(have):
        buffer = worker["rx_batch"] + i * SLOT_BYTES
        source = load64(buffer + SLOT_IOV)
        skip = HEADER
        for _ in range(load64(buffer + SLOT_IN)):
            run = load64(source + 8)
            if skip >= run:
                skip -= run
            elif total < limit and pieces < _PIECES:
                part = min(run - skip, limit - total)
                store64(iov + 16 * pieces, load64(source) + skip)
                store64(iov + 16 * pieces + 8, part)
                pieces += 1
                total += part
                skip = 0
            source += 16
    store64(worker["scratch"] + SCRATCH_WORDS, total)
    return pieces


@kernel
def _put_data(
    worker: Record, rings: Records, guests: Records, connections: Records, index: int, slot: int, length: int
) -> int:
    """Headers for `length` bytes that lie in the first buffers of the batch; how many buffers."""
    guest = guests[index]
    ring = rings[guest["rx"]]
    connection = connections[slot]
    left = length
    used = 0
    while left > 0:
        part = min(load64(worker["rx_batch"] + used * SLOT_BYTES + SLOT_IN_BYTES) - HEADER, left)
        put_packet(worker, guest, ring, connections, used, slot, OP_RW, part, 0)
        left -= part
        used += 1
    connection["tx_cnt"] = (connection["tx_cnt"] + length) & WORD
    count(ring["row"], C_PACKETS, used)
    count(ring["row"], C_BYTES, length)
    count(ring["row"], C_BURSTS, 1)
    return used


@kernel
def end(guest: Record, connections: Records, slot: int, code: int) -> None:
    """The other end has ended (0), or failed: Python says what becomes of it."""
    connection = connections[slot]
    connection["ended"] = 1
    connection["readable"] = 0
    if code:
        tell(guest, TODO_FAILED, slot, code)
    else:
        tell(guest, TODO_EOF, slot, 0)


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
    pieces = _room(worker, have, min(credit(connection), QUANTUM), iov)
    offered = load64(worker["scratch"] + SCRATCH_WORDS)
    got = sys_readv(connection["fd"], iov, pieces)
    count(worker["row"], C_SYSCALLS, 1)
    if got <= 0:
        if got == -codes.EAGAIN:
            connection["readable"] = 0
        elif got != -codes.EINTR:
            end(guests[index], connections, slot, -got)
        return _DONE if got != -codes.EINTR else _MORE
    used = _put_data(worker, rings, guests, connections, index, slot, got)
    if got == offered:
        connection["expect"] = min(2 * used, _BUFFERS)
        return _MORE
    connection["expect"] = used + 1
    if not connection["hung_up"]:
        # A stream that gives less than was asked for is empty, and epoll tells when it no longer is.
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
    source = iov + 16 * _PIECES
    pieces = _room(worker, have, length, iov)
    length = load64(worker["scratch"] + SCRATCH_WORDS)
    pieces_of(other, 0, length, source)
    transfer(source, 0, iov, 0, length)
    _put_data(worker, rings, guests, connections, index, slot, length)
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
    _room(worker, 1, min(left, max(credit(connection), 0), QUANTUM), iov)
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
    source = worker["scratch"] + SCRATCH_IOV + 16 * _PIECES
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
    source = worker["scratch"] + SCRATCH_IOV + 16 * _PIECES
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
def _turn(
    worker: Record, rings: Records, guests: Records, connections: Records, index: int, slot: int
) -> int:
    """A connection's turn."""
    connection = connections[slot]
    if not connection["open"]:
        return _DONE
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
            if not _control(worker, rings, guests, connections, index, slot, OP_CREDIT_REQUEST):
                return _DRY
            connection["credit_asked"] = 1
            count(rings[guests[index]["rx"]]["row"], C_CREDIT_STALLS, 1)
    if connection["credit_due"] and not _control(
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
        if came == _MORE or connection["credit_due"]:
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
