"""A guest's READ and WRITE commands, straight to a store's descriptor; everything else to Python.

A command takes the short way if its unit says so and it is a plain one: a SIMPLE READ or WRITE of 6, 10, 12 or 16
bytes within the unit's capacity, whose buffers are exactly as long as what it moves, with its response in one
piece. What the host then fails is handed to Python as if it were new, which finds out and says why.

Promises: a chain that was taken is used exactly once; data goes between guest memory and store without a copy.
Never: blocks; says anything but GOOD by itself.
"""

from __future__ import annotations

from typing import Final

from pyvhost.abi.virtio_scsi import S_SIMPLE
from pyvhost.dataplane.access import (
    fill,
    load8,
    load16,
    load32,
    load64,
    load64_acquire,
    signal,
    store8,
    store64,
    store64_release,
)
from pyvhost.dataplane.blocks import (
    IOV_LOG,
    SLOT_HEAD,
    SLOT_IN,
    SLOT_IN_BYTES,
    SLOT_IOV,
    SLOT_OUT,
    SLOT_OUT_BYTES,
    Record,
)
from pyvhost.dataplane.dirty_log import mark
from pyvhost.dataplane.policy import inline, kernel
from pyvhost.dataplane.scsi_blocks import (
    DISKS_BEGUN,
    DISKS_DONE,
    DISKS_FREE,
    DISKS_OPS,
    DISKS_TODO,
    DISKS_TODO_PUT,
    DISKS_TODO_TAKEN,
    DONE_BYTES,
    ENTRIES,
    ENTRY_BYTES,
    FAST_READ,
    FAST_WRITE,
    OP_ABORT,
    OP_BYTES,
    OP_EXPECTED,
    OP_HEAD,
    OP_IS_WRITE,
    OP_MAX_PIECES,
    OP_NEXT,
    OP_PIECE,
    OP_PIECES,
    OP_QUEUE,
    OP_RESPONSE,
    OP_RING,
    OP_SERIAL,
    OP_STARTED,
    OP_STATE,
    OP_TAG,
    OP_UNIT,
    OP_WATCHED,
    OP_WRITTEN,
    REQUEST_ATTRIBUTE,
    REQUEST_CDB,
    REQUEST_TAG,
    RESPONSE_BYTES,
    RESPONSE_CODE,
    UNIT_BLOCKS,
    UNIT_BYTES,
    UNIT_DSYNC,
    UNIT_FAST,
    UNIT_FD,
    UNIT_IN_FLIGHT,
    UNIT_KEY,
    UNIT_PROBES,
    UNIT_SHIFT,
    UNIT_VALID,
    UNIT_WATCHED,
)
from pyvhost.dataplane.swap import swap16, swap32, swap64
from pyvhost.dataplane.uring import OP_READ, OP_READV, OP_WRITE, OP_WRITEV, push

_HEADER: Final = 51
_CDB_BYTES: Final = 32
_RWF_DSYNC: Final = 2
_FUA: Final = 8
_MAX_TRANSFER: Final = 1 << 30


@inline
def free_todo(disks: int) -> int:
    """How many entries Python's queue has room for."""
    taken = load64_acquire(load64(disks + DISKS_TODO_TAKEN))
    return ENTRIES - (load64(disks + DISKS_TODO_PUT) - taken)


@kernel
def tell(disks: int, kind: int, ring: int, head: int, extra: int) -> None:
    """Puts an entry into Python's queue, which has room."""
    put = load64(disks + DISKS_TODO_PUT)
    entry = load64(disks + DISKS_TODO) + (put & (ENTRIES - 1)) * ENTRY_BYTES
    store64(entry, kind)
    store64(entry + 8, ring)
    store64(entry + 16, head)
    store64(entry + 24, extra)
    # Pairs with Python's load, behind a lock, before it reads the entry.
    store64_release(disks + DISKS_TODO_PUT, put + 1)


@kernel
def find_unit(units: int, mask: int, lun: int) -> int:
    """Address of the unit that a request's first eight bytes (as one little-endian number) name; 0: none here.

    virtio 1.2, 5.6.6.1: 1, target, then the unit's number in peripheral or flat form (SAM-5).
    """
    if lun & 0xFF != 1 or lun >> 32 != 0:
        return 0
    high = lun >> 16 & 0xFF
    if high & 0x80 or (high & 0x40 == 0 and high != 0):
        return 0
    key = UNIT_VALID | (lun >> 8 & 0xFF) << 16 | (high & 0x3F) << 8 | lun >> 24 & 0xFF
    # Fibonacci hashing: neighbours come to lie apart. A product that overflows is nothing in compiled code.
    at = ((key & 0xFFFFFF) * 0x9E3779B1 >> 8) & mask
    for _ in range(UNIT_PROBES):
        unit = units + at * UNIT_BYTES
        found = load64(unit + UNIT_KEY)
        if found == key:
            return unit
        if found == 0:
            return 0
        at = (at + 1) & mask
    return 0


@inline
def _big32(address: int) -> int:
    return swap32(load32(address))


@kernel
def start(worker: Record, queue: Record, ring_index: int, ring: Record, slot: int, now: int) -> bool:
    """Begins the command in `slot` if it may take the short way; False if it is Python's."""
    disks = worker["disks"]
    number = load64(disks + DISKS_FREE)
    request = load64(slot + SLOT_IOV)
    outs = load64(slot + SLOT_OUT)
    ins = load64(slot + SLOT_IN)
    response_iov = request + 16 * outs
    header = queue["header"]
    if (
        number < 0
        or load64(request + 8) < header
        or load64(response_iov + 8) < RESPONSE_BYTES
        or ins > OP_MAX_PIECES
    ):
        return False
    at = load64(request)
    unit = find_unit(queue["units"], queue["unit_mask"], load64(at))
    if unit == 0 or load8(at + REQUEST_ATTRIBUTE) != S_SIMPLE:
        return False
    # With T10_PI the lengths of protection information come before the CDB; what brings any is Python's.
    if header > _HEADER and load64(at + REQUEST_CDB) != 0:
        return False
    cdb = at + header - _CDB_BYTES
    opcode = load8(cdb)
    flags = load8(cdb + 1)
    kind = opcode & 0x1F
    if kind != 0x08 and kind != 0x0A:
        return False
    group = opcode >> 5
    if group == 0:
        lba = (flags & 0x1F) << 16 | swap16(load16(cdb + 2))
        blocks = load8(cdb + 4)
        control = load8(cdb + 5)
        flags = 0
        if blocks == 0:
            blocks = 256
    elif group == 1:
        lba = _big32(cdb + 2)
        blocks = swap16(load16(cdb + 7))
        control = load8(cdb + 9)
    elif group == 5:
        lba = _big32(cdb + 2)
        blocks = _big32(cdb + 6)
        control = load8(cdb + 11)
    elif group == 4:
        lba = swap64(load64(cdb + 2))
        blocks = _big32(cdb + 10)
        control = load8(cdb + 15)
    else:
        return False
    # Protection information, the rarely used bits, and NACA are Python's.
    if control != 0 or flags & ~(_FUA | 0x10) or blocks == 0 or lba < 0:
        return False
    shift = load64(unit + UNIT_SHIFT)
    capacity = load64(unit + UNIT_BLOCKS)
    length = blocks << shift
    if lba >= capacity or blocks > capacity - lba or length > _MAX_TRANSFER:
        return False
    writes = kind == 0x0A
    if load64(unit + UNIT_FAST) & (FAST_WRITE if writes else FAST_READ) == 0:
        return False
    out_bytes = load64(slot + SLOT_OUT_BYTES) - header
    in_bytes = load64(slot + SLOT_IN_BYTES) - RESPONSE_BYTES
    if out_bytes != (length if writes else 0) or in_bytes != (0 if writes else length):
        return False
    op = load64(disks + DISKS_OPS) + number * OP_BYTES
    # What is logged when it is done: the response, and the data of a READ.
    store64(op + OP_PIECES, ins)
    for i in range(ins):
        piece = op + OP_PIECE + 16 * i
        store64(piece, load64(response_iov + 16 * i + IOV_LOG))
        store64(piece + 8, load64(response_iov + 16 * i + 8))
    store64(op + OP_RESPONSE, load64(response_iov))
    # The data begin behind the header, or the response, maybe in the same piece.
    first = request if writes else response_iov
    skip = header if writes else RESPONSE_BYTES
    pieces = outs if writes else ins
    if load64(first + 8) == skip:
        first += 16
        pieces -= 1
    else:
        store64(first, load64(first) + skip)
        store64(first + 8, load64(first + 8) - skip)
    store64(disks + DISKS_FREE, load64(op + OP_NEXT))
    store64(op + OP_STATE, 1)
    store64(op + OP_RING, ring_index)
    store64(op + OP_HEAD, load64(slot + SLOT_HEAD))
    store64(op + OP_WRITTEN, RESPONSE_BYTES + in_bytes)
    store64(op + OP_EXPECTED, length)
    store64(op + OP_UNIT, unit)
    store64(op + OP_STARTED, now)
    store64(op + OP_TAG, load64(at + REQUEST_TAG))
    store64(op + OP_ABORT, 0)
    store64(op + OP_WATCHED, 0)
    store64(disks + DISKS_BEGUN, load64(disks + DISKS_BEGUN) + 1)
    store64(op + OP_SERIAL, load64(disks + DISKS_BEGUN))
    store64(op + OP_IS_WRITE, 1 if writes else 0)
    store64(op + OP_QUEUE, ring["port"])
    store64(unit + UNIT_IN_FLIGHT, load64(unit + UNIT_IN_FLIGHT) + 1)
    dsync = 0
    if writes and (flags & _FUA or load64(unit + UNIT_DSYNC)):
        dsync = _RWF_DSYNC
    fd = load64(unit + UNIT_FD)
    if pieces == 1:
        # Without a struct iovec for the host to fetch and check.
        opcode = OP_WRITE if writes else OP_READ
        push(disks, opcode, fd, load64(first), length, lba << shift, dsync, number)
    else:
        push(disks, OP_WRITEV if writes else OP_READV, fd, first, pieces, lba << shift, dsync, number)
    return True


@kernel
def respond(ring: Record, op: int, code: int) -> None:
    """Writes an operation's response: GOOD, or the transport's `code`; and logs what was written."""
    response = load64(op + OP_RESPONSE)
    fill(response, 0, RESPONSE_BYTES)
    if code:
        store8(response + RESPONSE_CODE, code)
    if ring["log_data"]:
        left = load64(op + OP_WRITTEN)
        for i in range(load64(op + OP_PIECES)):
            piece = op + OP_PIECE + 16 * i
            run = min(load64(piece + 8), left)
            mark(ring["log_data"], ring["log_bytes"], load64(piece), run)
            left -= run
        if ring["log_fd"] >= 0:
            signal(ring["log_fd"])


@inline
def give_back(disks: int, op: int, number: int) -> bool:
    """An operation is free again; whether Python waits for its unit, and it was the last."""
    unit = load64(op + OP_UNIT)
    left = load64(unit + UNIT_IN_FLIGHT) - 1
    store64(unit + UNIT_IN_FLIGHT, left)
    store64(op + OP_STATE, 0)
    store64(op + OP_NEXT, load64(disks + DISKS_FREE))
    store64(disks + DISKS_FREE, number)
    if left == 0 and load64(unit + UNIT_WATCHED):
        store64(unit + UNIT_WATCHED, 0)
        return True
    return False


@inline
def done_entry(disks: int, number: int) -> int:
    """Address of entry `number` of the queue from Python."""
    return load64(disks + DISKS_DONE) + (number & (ENTRIES - 1)) * DONE_BYTES
