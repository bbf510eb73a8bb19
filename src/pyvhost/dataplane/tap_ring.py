"""Frames on their way into a recording: a byte ring between one worker's loop and the thread that writes a file.

What lies in the ring is what is to be in the file: Enhanced Packet Blocks (draft-ietf-opsawg-pcapng, 4.3), one
behind the other, so that nobody has to look at a frame again. `head` and `tail` count bytes and never wrap; a
byte's place is its number modulo the size. All of a block's parts are multiples of 4 bytes, and so is the size:
a word is never cut by the ring's end, a frame may be.

Promises: never blocks the loop: without room, or when nobody writes any more, a frame is counted as lost; one
system call at most, when the writer sleeps. Never: checks an address. The caller has.
"""

from __future__ import annotations

from typing import Final

from pyvhost.dataplane.access import (
    clock_ns,
    copy,
    fence,
    load64,
    load64_acquire,
    signal,
    store8,
    store16,
    store32,
    store64,
    store64_release,
)
from pyvhost.dataplane.blocks import SLOT_BYTES, SLOT_IN, SLOT_IOV, SLOT_OUT, SLOT_OUT_BYTES
from pyvhost.dataplane.policy import inline, kernel

#: The ring's words, each an int64. Set once: where its bytes are, how many (a power of two), how many of a frame
#: are kept, its interface's number in the file, and the eventfd that wakes the writer.
RING_DATA: Final = 0
RING_SIZE: Final = 8
RING_SNAPLEN: Final = 16
RING_INTERFACE: Final = 24
RING_WAKE: Final = 32
#: The loop's: bytes that are in, frames that are in, frames that were lost, 16 bytes for the clock.
RING_HEAD: Final = 64
RING_FRAMES: Final = 72
RING_LOST: Final = 80
RING_CLOCK: Final = 88
#: The writer's: bytes that are out, whether it sleeps, whether it still writes, CLOCK_REALTIME - CLOCK_MONOTONIC.
RING_TAIL: Final = 128
RING_SLEEPS: Final = 136
RING_OPEN: Final = 144
RING_EPOCH: Final = 152
RING_BYTES: Final = 192

#: Where a frame goes, seen from the guest's network card (epb_flags, bits 0-1).
INBOUND: Final = 1
OUTBOUND: Final = 2

#: pcapng: the block's type, what goes before the frame and behind it, the option that has the direction.
_PACKET_BLOCK: Final = 6
_BEFORE: Final = 28
_BEHIND: Final = 16
_EPB_FLAGS: Final = 2
#: More pieces than any frame has.
_ALL: Final = 1 << 30


@kernel
def record(ring: int, iov: int, pieces: int, length: int, skip: int, direction: int) -> bool:
    """Puts a frame into the ring at address `ring`; whether there was room.

    The frame is `length` bytes in `pieces` struct iovec at `iov`, after their first `skip`; no more pieces are
    looked at than hold what is kept. `direction`: INBOUND or OUTBOUND.
    """
    kept = min(length, load64(ring + RING_SNAPLEN))
    size = load64(ring + RING_SIZE)
    head = load64(ring + RING_HEAD)
    # Pairs with `give_back`: the bytes that are taken now have been written out.
    room = size - (head - load64_acquire(ring + RING_TAIL))
    if load64_acquire(ring + RING_OPEN) == 0 or ((kept + 3) & ~3) + _BEFORE + _BEHIND > room:
        store64_release(ring + RING_LOST, load64(ring + RING_LOST) + 1)
        return False
    data = load64(ring + RING_DATA)
    mask = size - 1
    got = _copy_in(data, mask, head + _BEFORE, iov, pieces, skip, kept)
    end = head + _BEFORE + got
    while end & 3:
        store8(data + (end & mask), 0)
        end += 1
    total = end + _BEHIND - head
    now = clock_ns(ring + RING_CLOCK) + load64(ring + RING_EPOCH)
    store32(data + (head & mask), _PACKET_BLOCK)
    store32(data + ((head + 4) & mask), total)
    store32(data + ((head + 8) & mask), load64(ring + RING_INTERFACE))
    store32(data + ((head + 12) & mask), (now >> 32) & 0xFFFFFFFF)
    store32(data + ((head + 16) & mask), now & 0xFFFFFFFF)
    store32(data + ((head + 20) & mask), got)
    store32(data + ((head + 24) & mask), length)
    store16(data + (end & mask), _EPB_FLAGS)
    store16(data + ((end + 2) & mask), 4)
    store32(data + ((end + 4) & mask), direction)
    store32(data + ((end + 8) & mask), 0)
    store32(data + ((end + 12) & mask), total)
    store64(ring + RING_FRAMES, load64(ring + RING_FRAMES) + 1)
    # Pairs with `filled`.
    store64_release(ring + RING_HEAD, head + total)
    # Before the look at SLEEPS, as `falls_asleep` has one between the two the other way round.
    fence()
    if load64_acquire(ring + RING_SLEEPS):
        store64_release(ring + RING_SLEEPS, 0)
        signal(load64(ring + RING_WAKE))
    return True


@inline
def _copy_in(data: int, mask: int, at: int, iov: int, pieces: int, skip: int, length: int) -> int:
    """Copies `length` bytes, or as many as the pieces have, to the ring's byte `at` and on; how many."""
    start = at
    while length > 0 and pieces > 0:
        base = load64(iov) + skip
        run = min(load64(iov + 8) - skip, length)
        if run <= 0:
            skip -= load64(iov + 8)
        else:
            skip = 0
            length -= run
            whole = min(run, mask + 1 - (at & mask))
            copy(data + (at & mask), base, whole)
            if run > whole:
                copy(data, base + whole, run - whole)
            at += run
        iov += 16
        pieces -= 1
    return at - start


@kernel
def record_sent(ring: int, batch: int, first: int, end: int, header: int) -> None:
    """Records what the transmit chains of slots `first` to `end` of a batch hold behind their headers."""
    for i in range(first, end):
        slot = batch + i * SLOT_BYTES
        length = load64(slot + SLOT_OUT_BYTES) - header
        record(ring, load64(slot + SLOT_IOV), load64(slot + SLOT_OUT), length, header, OUTBOUND)


@kernel
def record_received(ring: int, batch: int, at: int, buffers: int, header: int, length: int) -> None:
    """Records the frame of `length` bytes that lies behind a header in the receive buffers from slot `at` on."""
    slot = batch + at * SLOT_BYTES
    pieces = 0
    for i in range(buffers):
        # Receive chains have no readable pieces, so that the pieces of one slot follow those of the last.
        pieces += load64(slot + i * SLOT_BYTES + SLOT_IN)
    record(ring, load64(slot + SLOT_IOV), pieces, length, header, INBOUND)


@kernel
def record_piece(ring: int, frame: int, length: int, scratch: int, direction: int) -> None:
    """Records a frame that lies in one piece. `scratch`: 16 bytes to name it in."""
    store64(scratch, frame)
    store64(scratch + 8, length)
    record(ring, scratch, _ALL, length, 0, direction)


# --- the writer's side -------------------------------------------------------------------------------


@kernel
def filled(ring: int) -> int:
    """How many bytes have ever been put in. What they say is there to be read."""
    return load64_acquire(ring + RING_HEAD)


@kernel
def give_back(ring: int, tail: int) -> None:
    """The bytes before number `tail` may be overwritten."""
    store64_release(ring + RING_TAIL, tail)


@kernel
def falls_asleep(ring: int) -> bool:
    """Asks for a signal when there is something; whether there is nothing so far."""
    store64_release(ring + RING_SLEEPS, 1)
    fence()
    return load64_acquire(ring + RING_HEAD) == load64(ring + RING_TAIL)
