"""Frames between struct iovec, and into a receive ring: headers, mergeable buffers, used elements.

A frame on its way is (header, pieces): `flags_word`, the first 8 bytes of virtio_net_hdr as one number, and
`csum_offset`, the next 2; the pieces are struct iovec of which the first `skip` bytes are not the frame's.

Promises: writes no byte beyond the buffers in the batch, and writes `num_buffers` wherever the header has it
(virtio 1.2, 5.1.6.4.1, where Linux's vhost leaves it alone). Never: decides where a frame goes.
"""

from __future__ import annotations

from pyvhost.abi.virtio_net import HDR_F_NEEDS_CSUM, HDR_GSO_ECN, HDR_GSO_NONE, HDR_GSO_UDP_L4
from pyvhost.dataplane.access import copy, load16, load64, store16, store64
from pyvhost.dataplane.blocks import (
    SLOT_BYTES,
    SLOT_IN,
    SLOT_IN_BYTES,
    SLOT_IOV,
    Record,
)
from pyvhost.dataplane.policy import inline, kernel
from pyvhost.dataplane.split_ring import use_written
from pyvhost.dataplane.swap import swap16, swap_header


@kernel
def gather(iov: int, skip: int, to: int, length: int) -> None:
    """Copies `length` bytes of the pieces at `iov`, after the first `skip`, to `to`."""
    while length > 0:
        run = load64(iov + 8)
        if skip >= run:
            skip -= run
        else:
            part = min(run - skip, length)
            copy(to, load64(iov) + skip, part)
            to += part
            length -= part
            skip = 0
        iov += 16


@kernel
def scatter(source: int, to_iov: int, to_skip: int, length: int) -> None:
    """Copies `length` bytes from `source` into the pieces at `to_iov`, after their first `to_skip`."""
    while length > 0:
        run = load64(to_iov + 8)
        if to_skip >= run:
            to_skip -= run
        else:
            part = min(run - to_skip, length)
            copy(load64(to_iov) + to_skip, source, part)
            source += part
            length -= part
            to_skip = 0
        to_iov += 16


@kernel
def transfer(iov: int, skip: int, to_iov: int, to_skip: int, length: int) -> None:
    """Copies `length` bytes from pieces to pieces."""
    while length > 0:
        run = load64(iov + 8)
        if skip >= run:
            skip -= run
        else:
            part = min(run - skip, length)
            scatter(load64(iov) + skip, to_iov, to_skip, part)
            to_skip += part
            length -= part
            skip = 0
        iov += 16


@inline
def header_at(slot: int, size: int, scratch: int, swap: int) -> int:
    """Address of a transmitted chain's header in one piece and this byte order: where it lies, or at `scratch`."""
    iov = load64(slot + SLOT_IOV)
    if not swap and load64(iov + 8) >= size:
        return load64(iov)
    gather(iov, 0, scratch, size)
    if swap:
        turn_header(scratch)
    return scratch


@kernel
def turn_header(header: int) -> None:
    """Turns the numbers of the struct virtio_net_hdr at `header` into the other byte order."""
    store64(header, swap_header(load64(header)))
    store16(header + 8, swap16(load16(header + 8)))


@inline
def sane(flags_word: int) -> int:
    """A guest's header as another may see it: only NEEDS_CSUM of the flags; without known GSO, none at all."""
    gso = (flags_word >> 8) & 0xFF & ~HDR_GSO_ECN
    if gso > HDR_GSO_UDP_L4 or gso == 2 or flags_word & HDR_F_NEEDS_CSUM == 0:
        gso = HDR_GSO_NONE
    if gso == HDR_GSO_NONE:
        # gso_type and gso_size only mean something together.
        flags_word = flags_word & ~0x0000FFFF0000FF00
    return flags_word & ~0xFE


@inline
def buffers_for(port: Record, batch: int, at: int, have: int, length: int) -> int:
    """How many buffers from slot `at` a frame of `length` fills: 0 if `have` is not enough, -1 if none ever is."""
    need = length + port["header"]
    room = 0
    slot = batch + at * SLOT_BYTES
    used = 0
    if at < have and load64(slot + SLOT_IN_BYTES) < port["header"]:
        return -1  # 5.1.6.3.2: a buffer holds the header at least
    while at + used < have:
        room += load64(slot + SLOT_IN_BYTES)
        used += 1
        if room >= need:
            return used
        if not port["mergeable"]:
            return -1
        slot += SLOT_BYTES
    return 0


@kernel
def put_merged(
    port: Record,
    ring: Record,
    batch: int,
    at: int,
    buffers: int,
    flags_word: int,
    csum_offset: int,
    iov: int,
    skip: int,
    length: int,
    scratch: int,
) -> None:
    """Writes one frame into `buffers` buffers from slot `at`, in any layout, and their used elements."""
    header = port["header"]
    store64(scratch, flags_word)
    store16(scratch + 8, csum_offset)
    store16(scratch + 10, swap16(buffers) if ring["swap"] else buffers)
    if ring["swap"]:
        turn_header(scratch)
    slot = batch + at * SLOT_BYTES
    lead = header
    for _ in range(buffers):
        pieces = load64(slot + SLOT_IOV)
        room = load64(slot + SLOT_IN_BYTES)
        part = min(room - lead, length)
        if lead:
            scatter(scratch, pieces, 0, lead)
        transfer(iov, skip, pieces, lead, part)
        skip += part
        length -= part
        use_written(ring, slot, lead + part)
        lead = 0
        slot += SLOT_BYTES


@inline
def put(
    port: Record,
    ring: Record,
    batch: int,
    at: int,
    buffers: int,
    flags_word: int,
    csum_offset: int,
    iov: int,
    skip: int,
    length: int,
    scratch: int,
) -> None:
    """Writes one frame into the `buffers` buffers from slot `at` that `buffers_for` found, as used."""
    slot = batch + at * SLOT_BYTES
    pieces = load64(slot + SLOT_IOV)
    if buffers == 1 and load64(slot + SLOT_IN) == 1 and load64(iov + 8) >= skip + length and not ring["swap"]:
        header = port["header"]
        to = load64(pieces)
        store64(to, flags_word)
        if header == 12:
            store16(to + 8, csum_offset)
            store16(to + 10, 1)
        else:
            store16(to + 8, csum_offset)
        copy(to + header, load64(iov) + skip, length)
        use_written(ring, slot, header + length)
    else:
        put_merged(port, ring, batch, at, buffers, flags_word, csum_offset, iov, skip, length, scratch)
