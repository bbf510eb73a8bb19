"""Backend to guest: what comes in at a port goes into a net device's receive ring.

Promises: a frame is read straight into the guest's buffers where it fits in as many as were offered; one that
came in and finds no room is held, and nothing more is read until there is some; one that no buffer of the
guest can ever hold is dropped and counted. Never: blocks, or reads more from the host than it can keep.
"""

from __future__ import annotations

import errno as codes
from typing import Final

from pyvhost.abi.virtio_net import HDR_F_NEEDS_CSUM
from pyvhost.dataplane.access import (
    copy,
    load16,
    load32,
    load64,
    move,
    store8,
    store16,
    store64,
    sys_read,
    sys_readv,
)
from pyvhost.dataplane.blocks import (
    BATCH,
    BOUNCE_FRAME,
    C_BURSTS,
    C_BYTES,
    C_DROPS,
    C_NO_BUFFER,
    C_OVERSIZE,
    C_PACKETS,
    C_SYSCALLS,
    LONGEST_FRAME,
    MAX_FRAME,
    MIN_FRAME,
    SCRATCH_HEADER,
    SCRATCH_IOV,
    SLOT_BYTES,
    SLOT_HEAD,
    SLOT_IN,
    SLOT_IN_BYTES,
    SLOT_IOV,
    SLOT_OUT,
    SLOT_OUT_BYTES,
    SLOTS,
    STREAM_BYTES,
    Record,
    Records,
)
from pyvhost.dataplane.dirty_log import log_slots
from pyvhost.dataplane.frames import buffers_for, gather, put, turn_header
from pyvhost.dataplane.net_deliver import deliver_plain, forward, guest_fault, must_be_plain, offer
from pyvhost.dataplane.net_send import backend_fault, touch
from pyvhost.dataplane.policy import inline, kernel
from pyvhost.dataplane.split_ring import WRITABLE, collect, count, publish, take, use
from pyvhost.dataplane.swap import swap16, swap32
from pyvhost.dataplane.tap_ring import record_received

_EAGAIN: Final = codes.EAGAIN
_EINTR: Final = codes.EINTR
_EFAULT: Final = codes.EFAULT
_EPIPE: Final = codes.EPIPE
_EPROTO: Final = codes.EPROTO
#: How many pieces of the guest's buffers one read is offered at most, so that the rest always fits behind.
_OFFERED: Final = 512


@inline
def _flags_for(port: Record, flags_word: int) -> int:
    """The first word of the host's virtio_net_hdr, without what only GUEST_CSUM lets a guest hear of (5.1.6.4.1)."""
    return flags_word if port["guest_csum"] else flags_word & ~(0xFF & ~HDR_F_NEEDS_CSUM)


@kernel
def put_whole(worker: Record, ring: Record, port: Record, header: int, frame: int, length: int) -> bool:
    """Puts a frame that lies in one piece into the ring; False if it has to wait for buffers.

    `header`: address of its virtio_net_hdr of 10 bytes, 0 for none.
    """
    row = ring["row"]
    if length > LONGEST_FRAME:
        count(row, C_OVERSIZE, 1)
        count(row, C_DROPS, 1)
        return True
    slots = worker["rx_batch"]
    piece = worker["scratch"] + SCRATCH_IOV
    store64(piece, frame)
    store64(piece + 8, length)
    flags_word = 0
    csum_offset = 0
    if header:
        flags_word = _flags_for(port, load64(header))
        csum_offset = load16(header + 8)
        if must_be_plain(port, flags_word):
            made = deliver_plain(worker, ring, port, flags_word, csum_offset, piece, 0, length)
            port["rx_dry"] = 1 if made == 0 else 0
            if made < 0:
                count(row, C_OVERSIZE, 1)
                count(row, C_DROPS, 1)
            elif made > 0:
                count(row, C_PACKETS, made)
                count(row, C_BYTES, length)
            return made != 0
    have = offer(ring, port, slots, 0, 0, length)
    if have < 0:
        if not port["rx_dry"]:
            count(row, C_NO_BUFFER, 1)
        port["rx_dry"] = 1
        return False
    port["rx_dry"] = 0
    buffers = buffers_for(port, slots, 0, have, length)
    if buffers <= 0:
        count(row, C_OVERSIZE, 1)
        count(row, C_DROPS, 1)
        return True
    put(
        port,
        ring,
        slots,
        0,
        buffers,
        flags_word,
        csum_offset,
        piece,
        0,
        length,
        worker["scratch"] + SCRATCH_HEADER,
    )
    if port["record"]:
        record_received(port["record"], slots, 0, buffers, port["header"], length)
    take(ring, buffers)
    count(row, C_PACKETS, 1)
    count(row, C_BYTES, length)
    return True


@kernel
def _offer_pieces(port: Record, batch: int, at: int, buffers: int, iov: int) -> int:
    """Lists the pieces of `buffers` buffers for a read, the port's header first; how many."""
    header = port["header"]
    own = port["fd_header"]
    made = 0
    skip = 0
    slot = batch + at * SLOT_BYTES
    base = load64(load64(slot + SLOT_IOV))
    if own != header:
        if own > 0:
            store64(iov, base)
            store64(iov + 8, own)
            made = 1
        skip = header
    for i in range(buffers):
        pieces = load64(slot + i * SLOT_BYTES + SLOT_IOV)
        for j in range(load64(slot + i * SLOT_BYTES + SLOT_IN)):
            run = load64(pieces + j * 16 + 8) - skip
            if run > 0:
                store64(iov + made * 16, load64(pieces + j * 16) + skip)
                store64(iov + made * 16 + 8, run)
                made += 1
            skip = 0
    return made


@kernel
def _receive_one(
    worker: Record, ring: Record, ports: Records, index: int, batch: int, at: int, have: int
) -> int:
    """Reads one frame into buffers from slot `at` on; how many it filled.

    0: nothing to read. -1: it is held now: it did not fit in what was offered, or is not yet what the guest
    negotiated.
    """
    port = ports[index]
    row = ring["row"]
    header = port["header"]
    own = port["fd_header"]
    iov = worker["scratch"] + SCRATCH_IOV
    first = batch + at * SLOT_BYTES
    buffers = 0
    room = 0
    pieces = 0
    # The header goes in one piece, so a first piece that is shorter gets its frame by way of the bounce buffer.
    if load64(load64(first + SLOT_IOV) + 8) >= max(header, own):
        wanted = port["expect"] + header
        listed = 0
        while at + buffers < have and room < wanted and (buffers == 0 or port["mergeable"]):
            listed += load64(first + buffers * SLOT_BYTES + SLOT_IN)
            if listed > _OFFERED:
                break
            room += load64(first + buffers * SLOT_BYTES + SLOT_IN_BYTES)
            buffers += 1
        if buffers > 0:
            pieces = _offer_pieces(port, batch, at, buffers, iov)
            room -= header
    bounce = port["bounce"]
    if buffers == 0:
        if own > 0:
            store64(iov, bounce)
            store64(iov + 8, own)
            pieces = 1
        room = 0
    if room <= MAX_FRAME:
        store64(iov + pieces * 16, bounce + BOUNCE_FRAME + room)
        store64(iov + pieces * 16 + 8, MAX_FRAME)
        pieces += 1
    got = sys_readv(port["fd"], iov, pieces)
    count(row, C_SYSCALLS, 1)
    if got <= own:
        if got != -_EINTR:
            port["readable"] = 0
        if got == -_EFAULT:
            touch(iov, pieces)
        if got < 0 and got != -_EAGAIN and got != -_EINTR:
            backend_fault(worker, ports, index, -got)
        return 0
    length = got - own
    port["expect"] = max(length, port["expect"] - (port["expect"] >> 4))
    base = load64(load64(first + SLOT_IOV))
    offloads = 0
    if own > 0:
        offloads = load64(base if buffers > 0 else bounce)
    if (
        length > room
        or buffers == 0
        or length > LONGEST_FRAME
        or must_be_plain(port, _flags_for(port, offloads))
    ):
        if buffers > 0:
            if own > 0:
                copy(bounce, base, own)
            _gather_slots(batch, at, header, bounce + BOUNCE_FRAME, min(room, length))
            if ring["log_data"]:
                # They are not used, and yet written.
                log_slots(ring, first, header + min(room, length))
        if own == 0:
            store64(bounce, 0)
            store16(bounce + 8, 0)
        port["held"] = length
        return -1
    if own == 0:
        store64(base, 0)
        store16(base + 8, 0)
    elif not port["guest_csum"]:
        # NEEDS_CSUM is not set, and of the other flags such a guest is not to hear.
        store8(base, 0)
    if ring["swap"]:
        turn_header(base)
    left = length + header
    filled = 0
    while left > 0:
        part = min(load64(first + filled * SLOT_BYTES + SLOT_IN_BYTES), left)
        use(ring, load64(first + filled * SLOT_BYTES + SLOT_HEAD), part)
        left -= part
        filled += 1
    if header == 12:
        store16(base + 10, swap16(filled) if ring["swap"] else filled)
    if ring["log_data"]:
        log_slots(ring, first, header + length)
    if port["record"]:
        record_received(port["record"], batch, at, filled, header, length)
    count(row, C_PACKETS, 1)
    count(row, C_BYTES, length)
    return filled


@kernel
def _gather_slots(batch: int, at: int, skip: int, to: int, length: int) -> None:
    """Copies what a read put into the buffers from slot `at` on, after `skip` bytes, to `to`."""
    slot = batch + at * SLOT_BYTES
    while length > 0:
        part = min(load64(slot + SLOT_IN_BYTES) - skip, length)
        gather(load64(slot + SLOT_IOV), skip, to, part)
        to += part
        length -= part
        skip = 0
        slot += SLOT_BYTES


@kernel
def receive_fd(worker: Record, rings: Records, ports: Records, index: int) -> int:
    """Reads frames from a tap or packet socket until it has no more or a batch is full; how many."""
    port = ports[index]
    ring = rings[port["rx"]]
    if port["rx_dry"] == 0 and port["held"] == 0 and port["readable"] == 0:
        return 0
    batch = worker["rx_batch"]
    done = 0
    while done < BATCH:
        if port["held"]:
            if not put_whole(worker, ring, port, port["bounce"], port["bounce"] + BOUNCE_FRAME, port["held"]):
                break
            port["held"] = 0
            done += 1
            continue
        if not port["readable"]:
            break
        have = collect(ring, batch, 0, SLOTS if port["expect"] > 4096 else BATCH, WRITABLE, 1)
        if have <= 0:
            port["rx_dry"] = 1
            break
        port["rx_dry"] = 0
        at = 0
        while at < have and done < BATCH:
            filled = _receive_one(worker, ring, ports, index, batch, at, have)
            if filled <= 0:
                break
            at += filled
            done += 1
        take(ring, at)
    if ring["fault"]:
        guest_fault(worker, rings, port["rx"])
    if done:
        count(ring["row"], C_BURSTS, 1)
    publish(ring)
    return done


@kernel
def receive_uplink(worker: Record, rings: Records, ports: Records, index: int) -> int:
    """Reads frames from a switch's uplink and switches them, one by one; how many."""
    port = ports[index]
    batch = worker["tx_batch"]
    bounce = port["bounce"]
    row = port["row"]
    done = 0
    while port["readable"] and done < BATCH:
        got = sys_read(port["fd"], bounce, MAX_FRAME)
        count(row, C_SYSCALLS, 1)
        done += 1
        if got < port["header"] + MIN_FRAME:
            if got < 0 and got != -_EINTR:
                done -= 1
                port["readable"] = 0
                if got != -_EAGAIN:
                    backend_fault(worker, ports, index, -got)
            continue
        iov = batch + SLOTS * SLOT_BYTES
        store64(iov, bounce)
        store64(iov + 8, got)
        store64(batch + SLOT_IOV, iov)
        store64(batch + SLOT_OUT, 1)
        store64(batch + SLOT_IN, 0)
        store64(batch + SLOT_OUT_BYTES, got)
        forward(worker, rings, ports, index, batch, 0, 1)
        count(row, C_PACKETS, 1)
        count(row, C_BYTES, got - port["header"])
    return done


@kernel
def receive_stream(worker: Record, rings: Records, ports: Records, index: int) -> int:
    """Reads frames from a stream socket, many a call, each behind its length; how many."""
    port = ports[index]
    ring = rings[port["rx"]]
    buffer = port["stream"]
    done = 0
    while done < BATCH:
        waiting = port["stream_have"] - port["stream_at"]
        if waiting >= 4:
            length = swap32(load32(buffer + port["stream_at"]))
            if length > LONGEST_FRAME:
                backend_fault(worker, ports, index, _EPROTO)
                port["readable"] = 0
                port["stream_at"] = 0
                port["stream_have"] = 0
                break
            if waiting >= 4 + length:
                frame = buffer + port["stream_at"] + 4
                if length >= MIN_FRAME and not put_whole(worker, ring, port, 0, frame, length):
                    break
                port["stream_at"] += 4 + length
                done += 1
                continue
        if not port["readable"]:
            break
        if port["stream_at"]:
            move(buffer, buffer + port["stream_at"], waiting)
            port["stream_have"] = waiting
            port["stream_at"] = 0
        got = sys_read(port["fd"], buffer + waiting, STREAM_BYTES - waiting)
        count(ring["row"], C_SYSCALLS, 1)
        if got > 0:
            port["stream_have"] = waiting + got
        elif got != -_EINTR:
            port["readable"] = 0
            if got != -_EAGAIN:
                backend_fault(worker, ports, index, -got if got < 0 else _EPIPE)
    if ring["fault"]:
        guest_fault(worker, rings, port["rx"])
    if done:
        count(ring["row"], C_BURSTS, 1)
    publish(ring)
    return done


@kernel
def generate(worker: Record, rings: Records, ports: Records, index: int) -> int:
    """Fills the receive ring with copies of the port's template; how many."""
    port = ports[index]
    ring = rings[port["rx"]]
    want = BATCH
    if port["left"] >= 0:
        want = min(want, port["left"])
    if want == 0:
        return 0
    batch = worker["rx_batch"]
    length = port["template_bytes"]
    piece = worker["scratch"] + SCRATCH_IOV
    store64(piece, port["template"])
    store64(piece + 8, length)
    have = max(collect(ring, batch, 0, want, WRITABLE, 2), 0)
    at = 0
    done = 0
    while done < want:
        buffers = buffers_for(port, batch, at, have, length)
        if buffers == 0 and have > at:
            have = offer(ring, port, batch, at, have, length)
            if have < 0:
                break
            buffers = buffers_for(port, batch, at, have, length)
            if buffers == 0:
                buffers = -1
        if buffers == 0:
            break
        if buffers < 0:
            count(ring["row"], C_OVERSIZE, 1)
            count(ring["row"], C_DROPS, 1)
            # A guest whose buffers never fit would be offered frames for ever: it is asked again at its next kick.
            break
        put(port, ring, batch, at, buffers, 0, 0, piece, 0, length, worker["scratch"] + SCRATCH_HEADER)
        if port["record"]:
            record_received(port["record"], batch, at, buffers, port["header"], length)
        at += buffers
        done += 1
    port["rx_dry"] = 1 if done < want else 0
    if done:
        take(ring, at)
        count(ring["row"], C_PACKETS, done)
        count(ring["row"], C_BYTES, done * length)
        count(ring["row"], C_BURSTS, 1)
        if port["left"] > 0:
            port["left"] -= done
        publish(ring)
    if ring["fault"]:
        guest_fault(worker, rings, port["rx"])
    return done
