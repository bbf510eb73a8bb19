"""Guest to other end: what a vsock device's transmit ring has goes to sockets, to siblings, or to Python.

Packets with data for one socket that follow each other go in one call, straight from the guest's memory.

Promises: every packet is taken at once, whoever does not read; a packet whose sender is not the guest is dropped;
what a connection was not granted is never kept. Never: answers what is not plain data or credit: Python does.
"""

from __future__ import annotations

from typing import Final

from pyvhost.abi.virtio_vsock import (
    OP_CREDIT_REQUEST,
    OP_CREDIT_UPDATE,
    OP_RESPONSE,
    OP_RW,
    OP_SHUTDOWN,
    SEQ_EOM,
    SHUTDOWN_SEND,
    TYPE_SEQPACKET,
)
from pyvhost.dataplane.access import load32, load64, store64
from pyvhost.dataplane.blocks import (
    BATCH,
    C_BURSTS,
    C_BYTES,
    C_ERRORS,
    C_PACKETS,
    FAULT_DIRECTION,
    FAULT_HEADER,
    SCRATCH_IOV,
    SLOT_BYTES,
    SLOT_HEAD,
    SLOT_IN,
    SLOT_IOV,
    SLOT_OUT,
    SLOT_OUT_BYTES,
    Record,
    Records,
)
from pyvhost.dataplane.net_deliver import guest_fault
from pyvhost.dataplane.policy import kernel
from pyvhost.dataplane.split_ring import collect, count, publish, use_batch
from pyvhost.dataplane.translate import fault
from pyvhost.dataplane.turns import activate
from pyvhost.dataplane.vsock_blocks import (
    HEADER,
    SCRATCH_READ,
    TODO_VIOLATED,
    TURN,
    VIOLATED_CREDIT,
    VIOLATED_LENGTH,
)
from pyvhost.dataplane.vsock_out import enqueue, flush, gone, keep, owe, send, under_way
from pyvhost.dataplane.vsock_wire import (
    WORD,
    find,
    hand_over,
    packet_flags,
    packet_length,
    packet_op,
    packet_type,
    read_header,
    source_cid,
    tell,
    todo_room,
)

#: Pieces that go in one call (UIO_MAXIOV).
_PIECES: Final = 1024


@kernel
def wake(worker: Record, rings: Records, guests: Records, connections: Records, slot: int) -> None:
    """Has the loop look whether a connection has something for its guest."""
    index = connections[slot]["guest"]
    enqueue(guests[index], connections, slot)
    activate(worker, rings, guests, index)


@kernel
def _break(guest: Record, connections: Records, slot: int, how: int) -> None:
    """The guest broke the rules on a connection: nothing more of it is kept, and Python ends it."""
    connection = connections[slot]
    connection["mute"] = 1
    if not connection["violated"]:
        connection["violated"] = 1
        tell(guest, TODO_VIOLATED, slot, how)


@kernel
def _pieces(slot: int, length: int, to: int) -> int:
    """The first `length` bytes behind a chain's header, as struct iovec at `to`; how many."""
    iov = load64(slot + SLOT_IOV)
    skip = HEADER
    pieces = 0
    while length > 0:
        run = load64(iov + 8)
        if skip >= run:
            skip -= run
        else:
            part = min(run - skip, length)
            store64(to + 16 * pieces, load64(iov) + skip)
            store64(to + 16 * pieces + 8, part)
            pieces += 1
            length -= part
            skip = 0
        iov += 16
    return pieces


@kernel
def _heard(
    worker: Record, rings: Records, guests: Records, connections: Records, slot: int, header: int
) -> None:
    """Takes over the guest's credit, which every packet carries."""
    connection = connections[slot]
    alloc = load32(header + 36)
    forwarded = load32(header + 40)
    if alloc == connection["peer_buf_alloc"] and forwarded == connection["peer_fwd_cnt"]:
        return
    other = connection["other"]
    if other >= 0 and alloc != connection["peer_buf_alloc"] and connection["type"] == TYPE_SEQPACKET:
        # A sibling may not send longer messages than this guest takes.
        connections[other]["credit_due"] = 1
        wake(worker, rings, guests, connections, other)
    if alloc < connection["peer_buf_alloc"]:
        connection["shrunk"] = 1
    connection["peer_buf_alloc"] = alloc
    connection["peer_fwd_cnt"] = forwarded
    connection["credit_asked"] = 0
    if connection["started"] and (
        connection["readable"]
        or connection["message_bytes"]
        or (other >= 0 and connections[other]["out_put"] != connections[other]["out_taken"])
    ):
        wake(worker, rings, guests, connections, slot)


@kernel
def transmit(worker: Record, rings: Records, guests: Records, connections: Records, index: int) -> int:
    """Takes one batch from a guest's transmit ring, `TURN` bytes or a little more at most; how many chains."""
    guest = guests[index]
    ring = rings[guest["tx"]]
    wanted = min(BATCH, todo_room(guest) - guest["todo_kept"])
    if wanted <= 0:
        # Python rings when it has made room.
        return 0
    batch = worker["tx_batch"]
    chains = collect(ring, batch, 0, wanted, 0, 1)
    if chains == 0:
        return 0
    row = ring["row"]
    header = worker["scratch"] + SCRATCH_READ
    iov = worker["scratch"] + SCRATCH_IOV
    done = 0
    # What is to go in one call: whose it is, how many pieces, how many bytes.
    run = -1
    pieces = 0
    run_bytes = 0
    moved = 0
    while done < chains and moved < TURN:
        slot = batch + done * SLOT_BYTES
        if load64(slot + SLOT_IN) != 0 or load64(slot + SLOT_OUT_BYTES) < HEADER:
            code = FAULT_DIRECTION if load64(slot + SLOT_IN) != 0 else FAULT_HEADER
            fault(ring, code, load64(slot + SLOT_HEAD), load64(slot + SLOT_OUT_BYTES), HEADER)
            break
        done += 1
        read_header(slot, header)
        if source_cid(header) != guest["cid"]:
            count(row, C_ERRORS, 1)
            continue
        kind = packet_type(header)
        op = packet_op(header)
        found = find(guest, connections, kind, load32(header + 16), load64(header + 8), load32(header + 20))
        if found < 0:
            hand_over(guest, header, -1)
            continue
        connection = connections[found]
        if op == OP_RESPONSE:
            connection["accepted"] = 1
        elif op == OP_RW and not connection["accepted"]:
            # It was sent on a former connection of that name.
            count(row, C_ERRORS, 1)
            continue
        _heard(worker, rings, guests, connections, found, header)
        if op == OP_CREDIT_REQUEST:
            connection["credit_due"] = 1
            enqueue(guest, connections, found)
            continue
        if op == OP_CREDIT_UPDATE:
            continue
        if op != OP_RW:
            if op == OP_SHUTDOWN and packet_flags(header) & SHUTDOWN_SEND:
                connection["guest_done"] = 1
            hand_over(guest, header, found)
            continue
        length = packet_length(header)
        if length > load64(slot + SLOT_OUT_BYTES) - HEADER:
            _break(guest, connections, found, VIOLATED_LENGTH)
            continue
        if connection["violated"] or connection["guest_done"]:
            count(row, C_ERRORS, 1)
            continue
        if under_way(connection) + length > connection["buf_alloc"]:
            _break(guest, connections, found, VIOLATED_CREDIT)
            continue
        connection["rx_cnt"] = (connection["rx_cnt"] + length) & WORD
        moved += length
        if connection["mute"]:
            gone(guest, connections, found, length)
            continue
        flags = packet_flags(header)
        framed = kind == TYPE_SEQPACKET
        if run >= 0 and (run != found or pieces + load64(slot + SLOT_OUT) > _PIECES):
            send(worker, guest, connections, run, iov, pieces, run_bytes, 0)
            run = -1
        straight = (
            connection["started"]
            and connection["fd"] >= 0
            and connection["writable"]
            and connection["out_put"] == connection["out_taken"]
        )
        broken = 0
        if straight and not framed:
            if run < 0:
                run = found
                pieces = 0
                run_bytes = 0
            pieces += _pieces(slot, length, iov + 16 * pieces)
            run_bytes += length
        elif straight and flags & SEQ_EOM and length > 0:
            pieces = _pieces(slot, length, iov)
            broken = send(worker, guest, connections, found, iov, pieces, length, flags)
        else:
            broken = keep(connection, load64(slot + SLOT_IOV), HEADER, length, flags)
            owe(guest, connections, found)
            if connection["started"] and connection["other"] >= 0:
                wake(worker, rings, guests, connections, connection["other"])
            elif connection["started"] and connection["writable"]:
                flush(worker, guest, connections, found)
        if broken:
            _break(guest, connections, found, broken)
    if run >= 0:
        send(worker, guest, connections, run, iov, pieces, run_bytes, 0)
    if done > 0:
        count(row, C_PACKETS, done)
        count(row, C_BYTES, moved)
        count(row, C_BURSTS, 1)
        use_batch(ring, batch, done)
        publish(ring)
    if chains < 0 or ring["fault"]:
        guest_fault(worker, rings, guest["tx"])
    return done
