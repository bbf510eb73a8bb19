"""Packets into a vsock device's receive ring: the buffers they go to, their headers, the credit those tell of.

Promises: a buffer is offered only if it has room for more than a header; each header tells the latest credit. Never:
looks for what a packet's data are.
"""

from __future__ import annotations

from typing import Final

from pyvhost.abi.virtio_vsock import (
    OP_CREDIT_UPDATE,
    OP_RW,
    TYPE_SEQPACKET,
)
from pyvhost.dataplane.access import copy, load64, store32, store64
from pyvhost.dataplane.blocks import (
    C_BURSTS,
    C_BYTES,
    C_CREDIT_UPDATES,
    C_NO_BUFFER,
    C_PACKETS,
    FAULT_HEADER,
    SCRATCH_WORDS,
    SLOT_BYTES,
    SLOT_HEAD,
    SLOT_IN,
    SLOT_IN_BYTES,
    SLOT_IOV,
    Record,
    Records,
)
from pyvhost.dataplane.frames import scatter
from pyvhost.dataplane.net_deliver import guest_fault
from pyvhost.dataplane.policy import inline, kernel
from pyvhost.dataplane.split_ring import WRITABLE, collect, count, take, use_written
from pyvhost.dataplane.translate import fault
from pyvhost.dataplane.vsock_blocks import HEADER, SCRATCH_WRITTEN, TODO_EOF, TODO_FAILED
from pyvhost.dataplane.vsock_wire import WORD, tell, write_header

#: Pieces that data go to at most.
PIECES: Final = 1024


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
def put_control(
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
def room_in(worker: Record, have: int, limit: int, iov: int) -> int:
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
            elif total < limit and pieces < PIECES:
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
def put_data(
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
