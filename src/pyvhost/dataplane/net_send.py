"""Frames of a batch to a descriptor of the host: a tap, a packet socket, a stream socket.

Promises: never blocks; what the host can't take now is left for later, what it refuses is counted as dropped
and told once. Never: looks into a payload.
"""

from __future__ import annotations

import errno as codes
from typing import Final

from pyvhost.dataplane.access import load8_acquire, load64, store32, store64, sys_write, sys_writev
from pyvhost.dataplane.blocks import (
    C_BYTES,
    C_DROPS,
    C_ERRORS,
    C_PACKETS,
    C_SYSCALLS,
    MAX_FRAME,
    REASON_BACKEND_FAULT,
    SCRATCH_HEADER,
    SCRATCH_IOV,
    SCRATCH_IOVECS,
    SCRATCH_LENGTHS,
    SLOT_BYTES,
    SLOT_IOV,
    SLOT_OUT,
    SLOT_OUT_BYTES,
    Record,
    Records,
)
from pyvhost.dataplane.frames import gather, header_at
from pyvhost.dataplane.policy import kernel
from pyvhost.dataplane.split_ring import count
from pyvhost.dataplane.swap import swap32

_EAGAIN: Final = codes.EAGAIN
_EINTR: Final = codes.EINTR
_EFAULT: Final = codes.EFAULT
_PAGE: Final = 4096


@kernel
def backend_fault(worker: Record, ports: Records, index: int, error: int) -> None:
    """Notes the host's errno at a port, and has Python tell of it, once for each there is with a descriptor."""
    port = ports[index]
    told = 1 << (error & 63)
    if port["error_told"] & told == 0:
        port["error"] = error
        port["error_told"] |= told
        worker["reason"] |= REASON_BACKEND_FAULT
        worker["reason_port"] = index


@kernel
def touch(iov: int, pieces: int) -> None:
    """Reads a byte of each page of the pieces, as far as one frame goes, and the last.

    A system call that met memory which is gone only said EFAULT; a load wakes the guard. It is an ordered one,
    for the compiler leaves out a plain load that nobody looks at.
    """
    left = MAX_FRAME
    for i in range(pieces):
        base = load64(iov + i * 16)
        run = min(load64(iov + i * 16 + 8), left)
        for at in range(0, run, _PAGE):
            load8_acquire(base + at)
        if run > 0:
            load8_acquire(base + run - 1)
        left -= run


@kernel
def payload(slot: int, skip: int, to: int) -> int:
    """Lists a chain's readable pieces without their first `skip` bytes at `to`; how many."""
    iov = load64(slot + SLOT_IOV)
    made = 0
    for i in range(load64(slot + SLOT_OUT)):
        base = load64(iov + i * 16)
        run = load64(iov + i * 16 + 8)
        if skip >= run:
            skip -= run
            continue
        store64(to + made * 16, base + skip)
        store64(to + made * 16 + 8, run - skip)
        skip = 0
        made += 1
    return made


@kernel
def send_fd(
    worker: Record,
    ports: Records,
    target: int,
    header: int,
    swap: int,
    batch: int,
    first: int,
    end: int,
    row: int,
) -> int:
    """Writes slots `first` to `end` to a tap or packet socket, a frame a call; how many are done with.

    `header`: the size of the virtio_net_hdr in front of each; the port's own may be shorter, or 0. `swap`: its
    numbers are of the other byte order.
    """
    port = ports[target]
    fd = port["fd"]
    own = port["fd_header"]
    scratch = worker["scratch"]
    packets = 0
    sent = 0
    calls = 0
    done = first
    while done < end:
        slot = batch + done * SLOT_BYTES
        iov = load64(slot + SLOT_IOV)
        pieces = load64(slot + SLOT_OUT)
        if own != header or swap:
            iov = scratch + SCRATCH_IOV
            lead = 0
            if own > 0:
                store64(iov, header_at(slot, header, scratch + SCRATCH_HEADER, swap))
                store64(iov + 8, own)
                lead = 1
            pieces = lead + payload(slot, header, iov + 16 * lead)
        if pieces == 1:
            wrote = sys_write(fd, load64(iov), load64(iov + 8))
        else:
            wrote = sys_writev(fd, iov, pieces)
        calls += 1
        if wrote < 0:
            if wrote == -_EINTR:
                continue
            if wrote == -_EAGAIN:
                port["writable"] = 0
                break
            if wrote == -_EFAULT:
                touch(iov, pieces)
            # The frame is lost, as on Linux's vhost; what was wrong is told once.
            count(row, C_ERRORS, 1)
            count(row, C_DROPS, 1)
            backend_fault(worker, ports, target, -wrote)
        else:
            packets += 1
            sent += load64(slot + SLOT_OUT_BYTES) - header
        done += 1
    count(row, C_PACKETS, packets)
    count(row, C_BYTES, sent)
    count(row, C_SYSCALLS, calls)
    return done


@kernel
def flush_unsent(worker: Record, ports: Records, index: int, row: int) -> bool:
    """Sends on what a stream took only half of; whether all of it has gone."""
    port = ports[index]
    while port["unsent_bytes"] > 0:
        wrote = sys_write(port["fd"], port["unsent"] + port["unsent_at"], port["unsent_bytes"])
        count(row, C_SYSCALLS, 1)
        if wrote == -_EINTR:
            continue
        if wrote < 0:
            port["writable"] = 0
            if wrote != -_EAGAIN:
                backend_fault(worker, ports, index, -wrote)
            return False
        port["unsent_at"] += wrote
        port["unsent_bytes"] -= wrote
    return True


@kernel
def send_stream(
    worker: Record, ports: Records, target: int, header: int, batch: int, first: int, end: int, row: int
) -> int:
    """Writes slots `first` to `end` to a stream, each behind its length, all in one call; how many are done with.

    What the socket took only half of is copied aside and goes first the next time.
    """
    if not flush_unsent(worker, ports, target, row):
        return first
    port = ports[target]
    lengths = worker["scratch"] + SCRATCH_LENGTHS
    iov = worker["scratch"] + SCRATCH_IOV
    made = 0
    last = first
    while last < end:
        slot = batch + last * SLOT_BYTES
        if made + 1 + load64(slot + SLOT_OUT) > SCRATCH_IOVECS // 2 and last > first:
            break
        size = load64(slot + SLOT_OUT_BYTES) - header
        length = lengths + (last - first) * 4
        store32(length, swap32(size))
        store64(iov + made * 16, length)
        store64(iov + made * 16 + 8, 4)
        made += 1
        made += payload(slot, header, iov + made * 16)
        last += 1
    wrote = -_EINTR
    while wrote == -_EINTR:
        wrote = sys_writev(port["fd"], iov, min(made, SCRATCH_IOVECS // 2))
        count(row, C_SYSCALLS, 1)
    if wrote < 0:
        port["writable"] = 0
        if wrote == -_EFAULT:
            touch(iov, made)
        if wrote != -_EAGAIN:
            backend_fault(worker, ports, target, -wrote)
        return first
    done = first
    while done < last and wrote > 0:
        slot = batch + done * SLOT_BYTES
        size = load64(slot + SLOT_OUT_BYTES) - header
        if wrote < size + 4:
            store32(port["unsent"], swap32(size))
            gather(load64(slot + SLOT_IOV), header, port["unsent"] + 4, size)
            port["unsent_at"] = wrote
            port["unsent_bytes"] = size + 4 - wrote
            port["writable"] = 0
            wrote = 0
        else:
            wrote -= size + 4
        count(row, C_PACKETS, 1)
        count(row, C_BYTES, size)
        done += 1
    return done
