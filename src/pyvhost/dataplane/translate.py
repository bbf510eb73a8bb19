"""From a guest's addresses to this process's: by the memory table, or by the IOTLB.

A ring's record has the table (sorted, searched by bisection) and its last hit, which is looked at first; an
entry that does not allow everything is never kept as the hit, so that a hit needs no look at permissions.

Promises: nothing outside the table is ever given out; an IOTLB without an entry is told from an address that
can't be (`IOTLB_MISS`: the ring waits), and both leave what is wrong in the ring's record.
Never: reads guest memory but to copy a descriptor.
"""

from __future__ import annotations

from typing import Final

from pyvhost.abi.vhost import ACCESS_RW
from pyvhost.dataplane.access import below, copy, load64, store64
from pyvhost.dataplane.blocks import (
    FAULT_PERMISSION,
    IOTLB_MISS,
    IOV_LOG,
    REGION_ACCESS,
    REGION_BYTES,
    REGION_HOST,
    REGION_LOG,
    REGION_SIZE,
    Record,
)
from pyvhost.dataplane.policy import inline, kernel

#: What `pieces` answers besides how many: some of it is not memory; the iovecs do not suffice; the ring's record
#: says what else.
NOT_MEMORY: Final = 0
NO_ROOM: Final = -1
REFUSED: Final = -2


@inline
def fault(ring: Record, code: int, descriptor: int, a: int, b: int) -> int:
    """Leaves a fault in the ring's record; its code, negative."""
    ring["fault"] = code
    ring["fault_descriptor"] = descriptor
    ring["fault_a"] = a
    ring["fault_b"] = b
    return -code


@kernel
def find_region(ring: Record, address: int, access: int) -> int:
    """Makes the region that holds `address` the ring's last hit: 1, NOT_MEMORY or REFUSED."""
    table = ring["regions"]
    low = 0
    high = ring["region_count"]
    while low < high:
        middle = (low + high) >> 1
        if below(address, load64(table + middle * REGION_BYTES)):
            high = middle
        else:
            low = middle + 1
    region = table + (low - 1) * REGION_BYTES
    if low == 0 or not below(address - load64(region), load64(region + REGION_SIZE)):
        if not ring["iotlb"]:
            return NOT_MEMORY
        fault(ring, IOTLB_MISS, 0, address, access)
        return REFUSED
    allowed = load64(region + REGION_ACCESS)
    if allowed & access != access:
        fault(ring, FAULT_PERMISSION, allowed, address, access)
        return REFUSED
    ring["hit_guest"] = load64(region)
    ring["hit_size"] = load64(region + REGION_SIZE)
    ring["hit_host"] = load64(region + REGION_HOST)
    ring["hit_log"] = load64(region + REGION_LOG)
    ring["hit_access"] = allowed
    return 1


@inline
def forget_limited(ring: Record) -> None:
    """Keeps the last hit only if it allows everything."""
    if ring["hit_access"] != ACCESS_RW:
        ring["hit_size"] = 0


@kernel
def pieces(ring: Record, address: int, length: int, access: int, iov: int, room: int) -> int:
    """Turns a guest range into struct iovec at `iov`, one a region; how many, or NOT_MEMORY, NO_ROOM, REFUSED.

    `access`: what the device is going to do there, ACCESS_RO or ACCESS_WO.
    """
    if below(address + length - 1, address):
        return NOT_MEMORY  # it wraps
    done = 0
    while length > 0:
        if not below(address - ring["hit_guest"], ring["hit_size"]):
            found = find_region(ring, address, access)
            if found <= 0:
                return found
        if done == room:
            forget_limited(ring)
            return NO_ROOM
        offset = address - ring["hit_guest"]
        run = min(ring["hit_size"] - offset, length)
        store64(iov + done * 16, ring["hit_host"] + offset)
        store64(iov + done * 16 + 8, run)
        store64(iov + done * 16 + IOV_LOG, ring["hit_log"] + offset)
        forget_limited(ring)
        done += 1
        address += run
        length -= run
    return done


@kernel
def copy_guest(ring: Record, address: int, length: int, to: int) -> int:
    """Copies a guest range that may cross regions to `to`; 1, or NOT_MEMORY or REFUSED."""
    while length > 0:
        if not below(address - ring["hit_guest"], ring["hit_size"]):
            found = find_region(ring, address, 1)
            if found <= 0:
                return found
        offset = address - ring["hit_guest"]
        run = min(ring["hit_size"] - offset, length)
        copy(to, ring["hit_host"] + offset, run)
        forget_limited(ring)
        to += run
        address += run
        length -= run
    return 1
