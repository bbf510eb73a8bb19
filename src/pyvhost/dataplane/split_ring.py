"""The device's side of a split virtqueue (virtio 1.2, 2.7), compiled.

`collect` walks what the driver made available into a batch, without consuming it; `use` writes used elements
and consumes; `publish` shows them to the driver and calls it if it asked; `want_kicks` asks the driver for
kicks or spares it them.

Promises: each word that the guest can write is read once into a local and the local is judged. A fault is left
in the ring's record and nothing of that chain is consumed; so is a miss in the IOTLB, which is none. A ring of
the other byte order costs the others a few branches that are always foreseen.
Never: copies a payload, or looks into one.
"""

from __future__ import annotations

from typing import Final

from pyvhost.abi.virtio import VRING_AVAIL_F_NO_INTERRUPT, VRING_DESC_F_WRITE, VRING_USED_F_NO_NOTIFY
from pyvhost.dataplane.access import (
    below,
    fence,
    load16,
    load16_acquire,
    load64,
    prefetch,
    prefetch_write,
    signal,
    store16,
    store16_release,
    store64,
)
from pyvhost.dataplane.blocks import (
    BATCH_SCRATCH,
    C_CALLS,
    C_CALLS_SUPPRESSED,
    C_FAULTS,
    C_SYSCALLS,
    FAULT_AVAIL_INDEX,
    FAULT_DIRECTION,
    FAULT_HEAD,
    FAULT_LENGTH,
    IOTLB_MISS,
    IOV_LOG,
    MAX_CHAIN,
    SLOT_BYTES,
    SLOT_HEAD,
    SLOT_IN,
    SLOT_IN_BYTES,
    SLOT_IOV,
    SLOT_OUT,
    SLOT_OUT_BYTES,
    SLOTS,
    Record,
)
from pyvhost.dataplane.dirty_log import log_elements, log_slot, log_used
from pyvhost.dataplane.inflight import forget_used, list_used
from pyvhost.dataplane.policy import inline, kernel
from pyvhost.dataplane.swap import swap16, swap32
from pyvhost.dataplane.translate import fault
from pyvhost.dataplane.walk import walk

#: `collect`'s `plain` for a receive ring: a chain with anything to read in it is at fault (5.1.6.3).
WRITABLE: Final = 1 << 16 | VRING_DESC_F_WRITE


@inline
def count(row: int, counter: int, amount: int) -> None:
    """Adds to a counter; each row has one writer."""
    store64(row + counter, load64(row + counter) + amount)


@kernel
def ready(ring: Record) -> int:
    """How many chains the driver has made available and nobody has taken; negative on a fault."""
    # Pairs with the driver's barrier between its ring entries and avail->idx (2.7.13.3).
    seen = load16_acquire(ring["avail"] + 2)
    if ring["swap"]:
        seen = swap16(seen)
    waiting = (seen - ring["last_avail"]) & 0xFFFF
    if waiting > ring["num"]:
        return fault(ring, FAULT_AVAIL_INDEX, 0, seen, ring["last_avail"])
    ring["seen_avail"] = seen
    return waiting


@kernel
def collect(ring: Record, batch: int, start: int, want: int, plain: int, lines: int) -> int:
    """Walks up to `want` chains, from `start` chains after the last one taken, into the batch from slot `start`.

    `plain` is the flag word of a chain of one descriptor of the wanted direction: 0 or VRING_DESC_F_WRITE, with
    which a chain may go both ways, or `WRITABLE`.
    `lines`: how many cache lines of each payload are going to be used at once, 0 to 2.
    How many slots the batch has now (`start` and more); a fault's code, negative, if the very next chain
    is at fault (one behind good ones is met the next time).
    """
    left = ring["replay_left"]
    # Chains of a former life come before those that the driver has made available since.
    last = ring["last_avail"] - left
    waiting = left + ((ring["seen_avail"] - ring["last_avail"]) & 0xFFFF)
    if waiting < start + want:
        waiting = ready(ring)
        if waiting < 0:
            return waiting
        waiting += left
    # A driver may take back what it made available: what the batch has, it keeps.
    end = max(min(waiting, start + want, SLOTS), start)
    num = ring["num"]
    mask = num - 1
    swap = ring["swap"]
    # What is to be turned round first is never plain.
    flag = -1 if swap else plain & 0xFFFF
    entries = ring["avail"] + 4
    desc = ring["desc"]
    iov = batch + SLOTS * SLOT_BYTES
    if start:
        before = batch + (start - 1) * SLOT_BYTES
        iov = load64(before + SLOT_IOV) + 16 * (load64(before + SLOT_OUT) + load64(before + SLOT_IN))
    for i in range(start, min(end, left)):
        store64(batch + i * SLOT_BYTES + SLOT_HEAD, load64(ring["replay"] + 8 * i))
    for i in range(max(start, left), end):
        head = load16(entries + 2 * ((last + i) & mask))
        if swap:
            head = swap16(head)
        store64(batch + i * SLOT_BYTES + SLOT_HEAD, head)
        if head < num:
            prefetch(desc + head * 16)
    # Behind the longest chain there is one more for each slot of the batch.
    last_iov = batch + SLOTS * SLOT_BYTES + MAX_CHAIN * 16
    hit_guest = ring["hit_guest"]
    hit_size = ring["hit_size"]
    hit_host = ring["hit_host"]
    hit_log = ring["hit_log"]
    for i in range(start, end):
        slot = batch + i * SLOT_BYTES
        head = load64(slot + SLOT_HEAD)
        if head >= num:
            return i if i > start else fault(ring, FAULT_HEAD, head, num, (last + i) & mask)
        address = load64(desc + head * 16)
        word = load64(desc + head * 16 + 8)
        length = word & 0xFFFFFFFF
        offset = address - hit_guest
        # Both compares are needed: an offset inside says nothing of a length larger than the region.
        if (
            (word >> 32) & 0xFFFF == flag
            and length != 0
            and below(offset, hit_size)
            and length <= hit_size - offset
        ):
            data = hit_host + offset
            if lines > 0:
                if flag:
                    prefetch_write(data)
                    if lines > 1:
                        prefetch_write(data + 64)
                else:
                    prefetch(data)
                    if lines > 1:
                        prefetch(data + 64)
            store64(iov, data)
            store64(iov + 8, length)
            store64(iov + IOV_LOG, hit_log + offset)
            store64(slot + SLOT_IOV, iov)
            if flag:
                store64(slot + SLOT_OUT, 0)
                store64(slot + SLOT_IN, 1)
                store64(slot + SLOT_OUT_BYTES, 0)
                store64(slot + SLOT_IN_BYTES, length)
            else:
                store64(slot + SLOT_OUT, 1)
                store64(slot + SLOT_IN, 0)
                store64(slot + SLOT_OUT_BYTES, length)
                store64(slot + SLOT_IN_BYTES, 0)
            iov += 16
            continue
        if iov > last_iov:
            return i
        failed = walk(ring, head, slot, iov, batch + BATCH_SCRATCH)
        if failed == 0 and plain == WRITABLE:
            if load64(slot + SLOT_OUT) != 0:
                failed = fault(ring, FAULT_DIRECTION, head, load64(slot + SLOT_OUT_BYTES), head)
            elif load64(slot + SLOT_IN) == 0:
                failed = fault(ring, FAULT_LENGTH, head, 0, head)
        if failed < 0:
            if i > start:
                # The good ones first: it is met again when they are used.
                ring["fault"] = 0
                return i
            return failed
        iov += 16 * (load64(slot + SLOT_OUT) + load64(slot + SLOT_IN))
        hit_guest = ring["hit_guest"]
        hit_size = ring["hit_size"]
        hit_host = ring["hit_host"]
        hit_log = ring["hit_log"]
        if lines > 0:
            prefetch(load64(load64(slot + SLOT_IOV)))
    return end


@inline
def use(ring: Record, head: int, length: int) -> None:
    """Writes the next used element: chain `head`, `length` bytes written; `publish` shows it."""
    used = ring["used_idx"]
    element = head | (length << 32)
    if ring["swap"]:
        element = swap32(head) | swap32(length) << 32
    store64(ring["used"] + 4 + 8 * (used & (ring["num"] - 1)), element)
    ring["used_idx"] = (used + 1) & 0xFFFF


@inline
def use_written(ring: Record, slot: int, length: int) -> None:
    """Uses the chain in `slot`, into which `length` bytes were written, and logs them."""
    use(ring, load64(slot + SLOT_HEAD), length)
    if ring["log_data"]:
        log_slot(ring, slot, length)


@kernel
def _take_replayed(ring: Record, chains: int) -> None:
    """Consumes chains of a former life, then others."""
    again = min(chains, ring["replay_left"])
    ring["replay"] += 8 * again
    ring["replay_left"] -= again
    ring["last_avail"] = (ring["last_avail"] + chains - again) & 0xFFFF


@inline
def take(ring: Record, chains: int) -> None:
    """Consumes the next `chains` chains."""
    if ring["replay_left"]:
        _take_replayed(ring, chains)
    else:
        ring["last_avail"] = (ring["last_avail"] + chains) & 0xFFFF


@inline
def take_kept(ring: Record, chains: int) -> None:
    """Consumes the next `chains` chains, which are in the inflight memory until they are used."""
    again = min(chains, ring["replay_left"])
    ring["replay"] += 8 * again
    ring["replay_left"] -= again
    ring["last_avail"] = (ring["last_avail"] + chains - again) & 0xFFFF


@kernel
def use_batch(ring: Record, batch: int, chains: int) -> None:
    """Consumes the first `chains` of a batch that the device only read: used, with nothing written."""
    elements = ring["used"] + 4
    mask = ring["num"] - 1
    used = ring["used_idx"]
    swap = ring["swap"]
    for i in range(chains):
        head = load64(batch + i * SLOT_BYTES + SLOT_HEAD)
        if swap:
            head = swap32(head)
        store64(elements + 8 * ((used + i) & mask), head)
    ring["used_idx"] = (used + chains) & 0xFFFF
    take(ring, chains)


@kernel
def publish(ring: Record) -> None:
    """Shows the driver what was used, and calls it if it asked (2.7.7.2)."""
    used = ring["used_idx"]
    if used == ring["published"]:
        return
    # Pairs with the driver's barrier between used->idx and the elements (2.7.14).
    swap = ring["swap"]
    if ring["inflight"]:
        list_used(ring, ring["published"], used)
    store16_release(ring["used"] + 2, swap16(used) if swap else used)
    if ring["log_used"]:
        log_elements(ring, ring["published"], used)
    if ring["inflight"]:
        forget_used(ring, ring["published"], used)
    ring["published"] = used
    # Pairs with the driver's barrier between used_event or flags, and its last look at used->idx.
    fence()
    row = ring["row"]
    if ring["event_idx"]:
        event = load16(ring["avail"] + 4 + 2 * ring["num"])
        if swap:
            event = swap16(event)
        news = (used - ring["signalled"]) & 0xFFFF
        wanted = ring["signalled_valid"] == 0 or ((used - event - 1) & 0xFFFF) < news
        ring["signalled"] = used
        ring["signalled_valid"] = 1
    else:
        flags = load16(ring["avail"])
        if swap:
            flags = swap16(flags)
        wanted = flags & VRING_AVAIL_F_NO_INTERRUPT == 0
    if ring["notify_on_empty"]:
        seen = load16_acquire(ring["avail"] + 2)
        if (swap16(seen) if swap else seen) == ring["last_avail"]:
            wanted = True
    if wanted and ring["call_fd"] >= 0:
        signal(ring["call_fd"])
        count(row, C_CALLS, 1)
        count(row, C_SYSCALLS, 1)
    else:
        count(row, C_CALLS_SUPPRESSED, 1)


@kernel
def want_kicks(ring: Record, wanted: bool) -> None:
    """Asks the driver to kick when it adds to what was seen, or spares it the kicks (2.7.10).

    After asking, look once more: what came between the last look and the request came without a kick.
    """
    swap = ring["swap"]
    if ring["event_idx"]:
        if wanted:
            seen = ring["seen_avail"]
            store16(ring["used"] + 4 + 8 * ring["num"], swap16(seen) if swap else seen)
            if ring["log_used"]:
                log_used(ring, 4 + 8 * ring["num"], 2)
    else:
        flags = 0 if wanted else VRING_USED_F_NO_NOTIFY
        store16(ring["used"], swap16(flags) if swap else flags)
        if ring["log_used"]:
            log_used(ring, 0, 2)
    ring["notify"] = 1 if wanted else 0
    # Pairs with the driver's barrier between avail->idx and its look at used->flags or avail_event.
    fence()


@kernel
def stop_at_fault(ring: Record) -> bool:
    """Stops a ring whose record holds a fault, and signals `err`; whether Python has yet to tell of it.

    One that misses an entry of the IOTLB only waits, and Python asks for it, each time.
    """
    ring["running"] = 0
    if ring["fault"] == IOTLB_MISS:
        ring["fault_told"] = 0
        return True
    count(ring["row"], C_FAULTS, 1)
    if ring["err_fd"] >= 0:
        signal(ring["err_fd"])
        count(ring["row"], C_SYSCALLS, 1)
    return ring["fault_told"] == 0
