"""A descriptor chain, walked: from its head to struct iovec (virtio 1.2, 2.7.5).

Promises: each word that the guest can write is read once into a local and the local is judged; the walk ends
after at most `num` descriptors, and the indirect table's, and `MAX_CHAIN` pieces; each piece lies inside one
region. What Linux's vhost takes is taken: descriptors of no bytes, and a chain that goes on behind an indirect
descriptor. Never: consumes anything.
"""

from __future__ import annotations

from pyvhost.abi.vhost import ACCESS_RO, ACCESS_WO
from pyvhost.abi.virtio import VRING_DESC_F_INDIRECT, VRING_DESC_F_NEXT, VRING_DESC_F_WRITE
from pyvhost.dataplane.access import load64, store64
from pyvhost.dataplane.blocks import (
    FAULT_ADDRESS,
    FAULT_DIRECTION,
    FAULT_INDIRECT,
    FAULT_INDIRECT_SIZE,
    FAULT_LOOP,
    FAULT_NEXT,
    FAULT_TOO_LONG,
    MAX_CHAIN,
    SLOT_HEAD,
    SLOT_IN,
    SLOT_IN_BYTES,
    SLOT_IOV,
    SLOT_OUT,
    SLOT_OUT_BYTES,
    Record,
)
from pyvhost.dataplane.policy import kernel
from pyvhost.dataplane.swap import swap64, swap_descriptor
from pyvhost.dataplane.translate import NO_ROOM, NOT_MEMORY, REFUSED, copy_guest, fault, pieces


@kernel
def walk(ring: Record, head: int, slot: int, iov: int, scratch: int) -> int:
    """Walks the chain at `head` into `slot` and the struct iovec at `iov`; 0, or a fault's code, negative.

    Readable pieces come first, then writable ones, as 2.7.4.2 wants them. `scratch` is room for one
    descriptor of an indirect table that lies across two regions.
    """
    swap = ring["swap"]
    table = ring["desc"]
    limit = ring["num"]
    table_guest = 0
    inside = False
    # Where the chain goes on behind an indirect table, if it does, and how many were walked before.
    behind = -1
    before = 0
    total = 0
    readable = 0
    out_bytes = 0
    in_bytes = 0
    index = head
    walked = 0
    while True:
        if walked >= limit:
            return fault(ring, FAULT_LOOP, index, head, limit)
        walked += 1
        entry = table + index * 16
        if inside and table == 0:
            found = copy_guest(ring, table_guest + index * 16, 16, scratch)
            if found == NOT_MEMORY:
                return fault(ring, FAULT_INDIRECT, index, table_guest, limit * 16)
            if found < 0:
                return -ring["fault"]
            entry = scratch
        address = load64(entry)
        word = load64(entry + 8)
        if swap:
            address = swap64(address)
            word = swap_descriptor(word)
        length = word & 0xFFFFFFFF
        flags = (word >> 32) & 0xFFFF
        following = (word >> 48) & 0xFFFF
        if flags & VRING_DESC_F_INDIRECT:
            if inside:
                return fault(ring, FAULT_INDIRECT, index, flags, head)
            if length == 0 or length & 15 or length > 65536 * 16:
                return fault(ring, FAULT_INDIRECT_SIZE, index, length, head)
            if total == MAX_CHAIN:
                return fault(ring, FAULT_TOO_LONG, index, head, MAX_CHAIN)
            first = pieces(ring, address, length, ACCESS_RO, iov + total * 16, 1)
            if first == NOT_MEMORY:
                return fault(ring, FAULT_INDIRECT, index, address, length)
            if first == REFUSED:
                return -ring["fault"]
            # A table inside one region is read where it lies; across regions, a descriptor at a time.
            table = load64(iov + total * 16) if first == 1 else 0
            table_guest = address
            behind = following if flags & VRING_DESC_F_NEXT else -1
            before = walked
            limit = length >> 4
            inside = True
            index = 0
            walked = 0
            continue
        if length != 0:
            access = ACCESS_WO if flags & VRING_DESC_F_WRITE else ACCESS_RO
            made = pieces(ring, address, length, access, iov + total * 16, MAX_CHAIN - total)
            if made == NOT_MEMORY:
                return fault(ring, FAULT_ADDRESS, index, address, length)
            if made == NO_ROOM:
                return fault(ring, FAULT_TOO_LONG, index, head, MAX_CHAIN)
            if made == REFUSED:
                ring["fault_descriptor"] = index
                return -ring["fault"]
            total += made
        if flags & VRING_DESC_F_WRITE:
            in_bytes += length
        else:
            if in_bytes:
                return fault(ring, FAULT_DIRECTION, index, flags, head)
            out_bytes += length
            readable = total
        if flags & VRING_DESC_F_NEXT:
            index = following
        elif behind >= 0:
            index = behind
            behind = -1
            table = ring["desc"]
            limit = ring["num"]
            inside = False
            walked = before
        else:
            break
        if index >= limit:
            return fault(ring, FAULT_NEXT, index, head, limit)
    store64(slot + SLOT_HEAD, head)
    store64(slot + SLOT_IOV, iov)
    store64(slot + SLOT_OUT, readable)
    store64(slot + SLOT_IN, total - readable)
    store64(slot + SLOT_OUT_BYTES, out_bytes)
    store64(slot + SLOT_IN_BYTES, in_bytes)
    return 0
