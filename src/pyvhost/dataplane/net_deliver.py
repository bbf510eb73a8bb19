"""Frames from ring to ring: one guest's transmit chains into another's receive buffers, with one copy.

Promises: a guest never sees another's header unjudged, nor an offload that it did not negotiate (the checksum
is finished, the super-frame cut, in software); frames that find no buffer are counted where they were lost.
Never: makes a system call but the call of a guest that asked for it, save towards a switch's uplink.
"""

from __future__ import annotations

from pyvhost.abi.virtio_net import HDR_F_NEEDS_CSUM, HDR_GSO_ECN
from pyvhost.dataplane.access import clock_ns, load16, load32, load64, store64
from pyvhost.dataplane.blocks import (
    BATCH,
    C_BURSTS,
    C_BYTES,
    C_DROPS,
    C_NO_BUFFER,
    C_OVERSIZE,
    C_PACKETS,
    IOTLB_MISS,
    MAX_FRAME,
    MEMBER_BYTES,
    MEMBER_PORT,
    MEMBER_PORTS,
    REASON_RING,
    SCRATCH_CLOCK,
    SCRATCH_FRAME,
    SCRATCH_HEADER,
    SCRATCH_IOV,
    SCRATCH_SEGMENT,
    SLOT_BYTES,
    SLOT_IOV,
    SLOT_OUT_BYTES,
    SWITCH_COUNT,
    SWITCH_MEMBERS,
    Record,
    Records,
)
from pyvhost.dataplane.frames import buffers_for, gather, header_at, put, sane
from pyvhost.dataplane.net_send import send_fd
from pyvhost.dataplane.offload import finish_checksum, segment, segment_count
from pyvhost.dataplane.policy import inline, kernel
from pyvhost.dataplane.split_ring import WRITABLE, collect, count, publish, stop_at_fault, take
from pyvhost.dataplane.switch_table import learn, look_up
from pyvhost.dataplane.tap_ring import record_received

#: What `offer` answers besides a number of buffers.
TOO_LARGE = -1
FAULT = -2
#: How long a sender is held up by a receiver whose front end has to be asked where its buffers are.
_LONGEST_WAIT_NS = 100_000_000


@kernel
def guest_fault(worker: Record, rings: Records, index: int) -> None:
    """Stops ring `index`, whose record holds a fault or a miss, and has Python tell of it."""
    worker["faults"] = 1
    if rings[index]["fault"] == IOTLB_MISS and rings[index]["waits_since"] == 0:
        rings[index]["waits_since"] = clock_ns(worker["scratch"] + SCRATCH_CLOCK)
    if stop_at_fault(rings[index]):
        worker["reason"] |= REASON_RING


@kernel
def offer(ring: Record, port: Record, batch: int, at: int, have: int, length: int) -> int:
    """Walks buffers until a frame of `length` fits from slot `at`, or never will: how many slots the batch has.

    Negative when there are not enough now (`-1 - have`), so that the caller knows both.
    """
    while buffers_for(port, batch, at, have, length) == 0:
        if have - at >= ring["num"]:
            return have
        grown = collect(ring, batch, have, BATCH, WRITABLE, 2)
        if grown <= have:
            # A batch that is full of what the frame alone may have will never hold more.
            full = grown == have and at == 0 and (ring["seen_avail"] - ring["last_avail"]) & 0xFFFF > have
            return have if full else -1 - have
        have = grown
    return have


@kernel
def _waits(worker: Record, ring: Record) -> bool:
    """Whether a ring waits for the IOTLB, and not for so long that its frames are to be dropped."""
    if ring["running"] or ring["fault"] != IOTLB_MISS:
        return False
    return clock_ns(worker["scratch"] + SCRATCH_CLOCK) - ring["waits_since"] < _LONGEST_WAIT_NS


@inline
def _takes(out: Record, gso: int) -> bool:
    """Whether the receiver negotiated super-frames of this gso_type; `guest_gso` has a bit for each."""
    if gso & HDR_GSO_ECN and out["guest_gso"] & HDR_GSO_ECN == 0:
        return False
    return (out["guest_gso"] >> (gso & ~HDR_GSO_ECN)) & 1 != 0


@inline
def must_be_plain(out: Record, flags_word: int) -> bool:
    """Whether a frame has an offload that the receiver did not negotiate (virtio 1.2, 5.1.6.4.1)."""
    if flags_word & 0xFFFF == 0:
        return False
    if flags_word & HDR_F_NEEDS_CSUM and not out["guest_csum"]:
        return True
    return not _takes(out, (flags_word >> 8) & 0xFF)


@kernel
def _put_one(
    ring: Record,
    out: Record,
    slots: int,
    flags_word: int,
    csum_offset: int,
    iov: int,
    skip: int,
    length: int,
    scratch: int,
) -> int:
    """Puts a frame into buffers walked for it alone: 1, 0 if there are not enough now, TOO_LARGE if ever."""
    have = offer(ring, out, slots, 0, 0, length)
    if have < 0:
        return 0
    buffers = buffers_for(out, slots, 0, have, length)
    if buffers <= 0:
        return TOO_LARGE
    put(out, ring, slots, 0, buffers, flags_word, csum_offset, iov, skip, length, scratch + SCRATCH_HEADER)
    if out["record"]:
        record_received(out["record"], slots, 0, buffers, out["header"], length)
    take(ring, buffers)
    return 1


@kernel
def deliver_plain(
    worker: Record,
    ring: Record,
    out: Record,
    flags_word: int,
    csum_offset: int,
    iov: int,
    skip: int,
    length: int,
) -> int:
    """Delivers a frame without the offloads it came with; how many frames that made, 0 or less as `_put_one`."""
    scratch = worker["scratch"]
    frame = scratch + SCRATCH_FRAME
    piece = scratch + SCRATCH_IOV
    gather(iov, skip, frame, length)
    gso = (flags_word >> 8) & 0xFF
    csum_start = (flags_word >> 48) & 0xFFFF
    if gso & ~HDR_GSO_ECN == 0:
        if finish_checksum(frame, length, csum_start, csum_offset) < 0:
            return TOO_LARGE
        store64(piece, frame)
        store64(piece + 8, length)
        return _put_one(ring, out, worker["rx_batch"], 0, 0, piece, 0, length, scratch)
    gso_size = (flags_word >> 32) & 0xFFFF
    parts = segment_count(frame, length, gso, gso_size)
    if parts <= 0:
        return TOO_LARGE
    made = 0
    # Only fragments of IPv6 want a number of their own: one that no other frame has now.
    ident = load64(ring["row"] + C_PACKETS) & 0xFFFFFFFF
    for i in range(parts):
        to = scratch + SCRATCH_SEGMENT
        size = segment(frame, length, gso, gso_size, i, to, MAX_FRAME, ident)
        if size <= 0:
            return TOO_LARGE if made == 0 else made
        store64(piece, to)
        store64(piece + 8, size)
        if _put_one(ring, out, worker["rx_batch"], 0, 0, piece, 0, size, scratch) <= 0:
            if made:
                # What else was cut is lost like any other burst that overran a receiver.
                count(ring["row"], C_DROPS, 1)
                count(ring["row"], C_NO_BUFFER, 1)
            return made
        made += 1
    return made


@kernel
def deliver(
    worker: Record,
    rings: Records,
    ports: Records,
    source: int,
    target: int,
    batch: int,
    first: int,
    end: int,
    lossless: bool,
) -> int:
    """Moves the frames of slots `first` to `end` into a port's receive ring; the slot after the last done with.

    `lossless`: stop at a frame that finds no buffer now. Otherwise it is dropped and counted. -1 - slot: it is
    to be tried again from there, for the receiver waits for the IOTLB.
    """
    out = ports[target]
    header = ports[source]["header"]
    # An uplink has no ring, and its frames this host's byte order.
    swap = rings[ports[source]["tx"]]["swap"] if ports[source]["tx"] >= 0 else 0
    if out["rx"] < 0:
        sent = first
        if out["writable"]:
            sent = send_fd(worker, ports, target, header, swap, batch, first, end, out["row"])
        count(out["row"], C_DROPS, end - sent)
        return end
    ring = rings[out["rx"]]
    row = ring["row"]
    if not ring["running"]:
        if lossless:
            return first
        if _waits(worker, ring):
            return -1 - first
        count(row, C_DROPS, end - first)
        return end
    out["rx_dry"] = 0
    slots = worker["rx_batch"]
    scratch = worker["scratch"]
    have = max(collect(ring, slots, 0, end - first, WRITABLE, 2), 0)
    at = 0
    packets = 0
    moved = 0
    held = False
    done = first
    while done < end:
        slot = batch + done * SLOT_BYTES
        start = header_at(slot, header, scratch + SCRATCH_HEADER, swap)
        flags_word = sane(load64(start))
        csum_offset = load16(start + 8)
        length = load64(slot + SLOT_OUT_BYTES) - header
        iov = load64(slot + SLOT_IOV)
        if must_be_plain(out, flags_word):
            take(ring, at)
            at = 0
            put_out = deliver_plain(worker, ring, out, flags_word, csum_offset, iov, header, length)
            have = max(collect(ring, slots, 0, end - done - 1, WRITABLE, 2), 0)
            buffers = put_out if put_out <= 0 else 0
            if put_out > 0:
                packets += put_out
                moved += length
                done += 1
                continue
        else:
            buffers = buffers_for(out, slots, at, have, length)
            if buffers == 0:
                take(ring, at)
                at = 0
                have = offer(ring, out, slots, 0, 0, length)
                if have < 0:
                    have = -1 - have
                else:
                    buffers = buffers_for(out, slots, 0, have, length)
                    if buffers == 0:
                        buffers = TOO_LARGE
        if buffers > 0:
            put(
                out,
                ring,
                slots,
                at,
                buffers,
                flags_word,
                csum_offset,
                iov,
                header,
                length,
                scratch + SCRATCH_HEADER,
            )
            if out["record"]:
                record_received(out["record"], slots, at, buffers, out["header"], length)
            at += buffers
            packets += 1
            moved += length
        elif buffers < 0:
            count(row, C_OVERSIZE, 1)
            count(row, C_DROPS, 1)
        elif lossless:
            out["rx_dry"] = 1
            break
        elif ring["fault"] == IOTLB_MISS:
            held = True
            break
        else:
            count(row, C_NO_BUFFER, 1)
            count(row, C_DROPS, 1)
        done += 1
    take(ring, at)
    if packets:
        ring["waits_since"] = 0
    if ring["fault"]:
        guest_fault(worker, rings, out["rx"])
    if packets:
        count(row, C_PACKETS, packets)
        count(row, C_BYTES, moved)
        count(row, C_BURSTS, 1)
        publish(ring)
    return -1 - done if held else done


@kernel
def _member_for(worker: Record, switch: int, member: int, slot: int, header: int) -> int:
    """Learns where a frame came from; the member it goes to, -1 for all others."""
    frame = worker["scratch"] + SCRATCH_HEADER
    iov = load64(slot + SLOT_IOV)
    if load64(iov + 8) >= header + 12:
        frame = load64(iov) + header
    else:
        gather(iov, header, frame, 12)
    destination = load32(frame) | load16(frame + 4) << 32
    source = load16(frame + 6) | load32(frame + 8) << 16
    if source & 1 == 0:
        learn(switch, source, member)
    return -1 if destination & 1 else look_up(switch, destination)


@kernel
def _alone(switch: int, own: int, other: int) -> bool:
    """Whether a switch has no member that takes frames besides these two."""
    for third in range(load64(switch + SWITCH_COUNT)):
        member = load64(switch + SWITCH_MEMBERS) + third * MEMBER_BYTES
        if third != own and third != other and load64(member + MEMBER_PORTS) > 0:
            return False
    return True


@kernel
def forward(
    worker: Record, rings: Records, ports: Records, source: int, batch: int, first: int, end: int
) -> int:
    """Switches the frames of slots `first` to `end`, to the member they are for or to all others; the slot after
    the last done with."""
    port = ports[source]
    switch = port["switch"]
    own = port["member"]
    header = port["header"]
    members = load64(switch + SWITCH_MEMBERS)
    port["held_up"] = 0
    at = first
    target = _member_for(worker, switch, own, batch + at * SLOT_BYTES, header)
    while at < end:
        run = at + 1
        following = target
        while run < end:
            following = _member_for(worker, switch, own, batch + run * SLOT_BYTES, header)
            if following != target:
                break
            run += 1
        for other in range(load64(switch + SWITCH_COUNT)):
            member = members + other * MEMBER_BYTES
            ways = load64(member + MEMBER_PORTS)
            if other != own and ways > 0 and (target < 0 or target == other):
                way = load64(member + MEMBER_PORT + 8 * (port["pair"] % ways))
                done = deliver(worker, rings, ports, source, way, batch, at, run, False)
                if done < 0:
                    if port["tx"] >= 0 and (target >= 0 or _alone(switch, own, other)):
                        # The frames stay where they are, for a moment.
                        port["held_up"] = 1
                        return -1 - done
                    # What goes to all was had by others already; an uplink can't wait.
                    count(rings[ports[way]["rx"]]["row"], C_DROPS, run + 1 + done)
        at = run
        target = following
    return end
