"""The dirty log: which pages of the guest's memory the device wrote to (VHOST_F_LOG_ALL, VHOST_VRING_F_LOG).

A page of 4096 bytes is a bit: page N is bit N % 8 of byte N / 8. Buffers are logged by their guest physical
address, what is written to the used ring by `log_guest_addr`.

Promises: a bit is set after what it stands for was written, by an atomic OR, since the reader takes bits away
meanwhile; exactly the pages written; no bit outside the log. Never: clears a bit.
"""

from __future__ import annotations

from typing import Final

from pyvhost.abi.vhost import ACCESS_WO
from pyvhost.dataplane.access import below, fetch_or8, load64, signal
from pyvhost.dataplane.blocks import (
    IOV_LOG,
    SLOT_BYTES,
    SLOT_IN,
    SLOT_IN_BYTES,
    SLOT_IOV,
    SLOT_OUT,
    Record,
)
from pyvhost.dataplane.policy import inline, kernel
from pyvhost.dataplane.translate import fault, find_region, forget_limited

#: A page of the log (VHOST_PAGE_SIZE), as a shift.
PAGE_SHIFT: Final = 12


@kernel
def mark(log: int, size: int, address: int, length: int) -> None:
    """Sets the bits of the pages of `address` to `address + length` in a log of `size` bytes."""
    if length <= 0:
        return
    # An address above 2**63 is negative: shifted as one that is not.
    page = (address >> PAGE_SHIFT) & 0xFFFFFFFFFFFFF
    last = ((address + length - 1) >> PAGE_SHIFT) & 0xFFFFFFFFFFFFF
    while page <= last:
        if below(page >> 3, size):
            # Pairs with the reader's exchange: what was written is seen by who sees the bit.
            fetch_or8(log + (page >> 3), 1 << (page & 7))
        page += 1


@inline
def _tell(ring: Record) -> None:
    if ring["log_fd"] >= 0:
        signal(ring["log_fd"])


@kernel
def log_slot(ring: Record, slot: int, length: int) -> None:
    """Logs the first `length` writable bytes of the chain in `slot`."""
    iov = load64(slot + SLOT_IOV) + 16 * load64(slot + SLOT_OUT)
    for _ in range(load64(slot + SLOT_IN)):
        run = min(load64(iov + 8), length)
        mark(ring["log_data"], ring["log_bytes"], load64(iov + IOV_LOG), run)
        length -= run
        iov += 16
    _tell(ring)


@kernel
def log_slots(ring: Record, slot: int, length: int) -> None:
    """Logs the first `length` writable bytes of the chains from `slot` on, of which there are enough."""
    while length > 0:
        run = min(load64(slot + SLOT_IN_BYTES), length)
        log_slot(ring, slot, run)
        length -= run
        slot += SLOT_BYTES


@kernel
def log_used(ring: Record, offset: int, length: int) -> None:
    """Logs `length` bytes of the used ring, from `offset` on."""
    address = ring["log_used_at"] + offset
    if ring["iotlb"]:
        # The used ring lies at an I/O virtual address then, and its pages anywhere. A fault that the record
        # holds has yet to be told of.
        code = ring["fault"]
        descriptor = ring["fault_descriptor"]
        a = ring["fault_a"]
        b = ring["fault_b"]
        while length > 0 and find_region(ring, address, ACCESS_WO) > 0:
            inside = address - ring["hit_guest"]
            run = min(ring["hit_size"] - inside, length)
            mark(ring["log_used"], ring["log_bytes"], ring["hit_log"] + inside, run)
            forget_limited(ring)
            address += run
            length -= run
        fault(ring, code, descriptor, a, b)
    else:
        mark(ring["log_used"], ring["log_bytes"], address, length)
    _tell(ring)


@kernel
def log_elements(ring: Record, first: int, end: int) -> None:
    """Logs used elements `first` to `end` (indices modulo 65536) and the used index."""
    mask = ring["num"] - 1
    at = first & mask
    # With chains of a former life it can be more than the ring has.
    news = min((end - first) & 0xFFFF, ring["num"])
    run = min(news, ring["num"] - at)
    log_used(ring, 4 + 8 * at, 8 * run)
    if news > run:
        log_used(ring, 4, 8 * (news - run))
    log_used(ring, 2, 2)
