"""The device's side of a split virtqueue (virtio 1.2, 2.7), compiled.

`collect` walks what the driver made available into a batch, without consuming it; `use` writes used elements
and consumes; `publish` shows them to the driver and calls it if it asked; `want_kicks` asks the driver for
kicks or spares it them.

Promises: each word that the guest can write is read once into a local and the local is judged; each walk ends
after at most `num` descriptors (or the indirect table's) and `MAX_CHAIN` pieces; each piece of a chain lies
inside one region. A fault is left in the ring's record and nothing of that chain is consumed.
Never: copies a payload, or looks into one.
"""

from __future__ import annotations

from typing import Final

from pyvhost.abi.virtio import (
    VRING_AVAIL_F_NO_INTERRUPT,
    VRING_DESC_F_INDIRECT,
    VRING_DESC_F_NEXT,
    VRING_DESC_F_WRITE,
    VRING_USED_F_NO_NOTIFY,
)
from pyvhost.dataplane.access import (
    below,
    copy,
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
    FAULT_ADDRESS,
    FAULT_AVAIL_INDEX,
    FAULT_DIRECTION,
    FAULT_HEAD,
    FAULT_INDIRECT,
    FAULT_INDIRECT_SIZE,
    FAULT_LENGTH,
    FAULT_LOOP,
    FAULT_NEXT,
    FAULT_TOO_LONG,
    MAX_CHAIN,
    REGION_BYTES,
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
from pyvhost.dataplane.policy import inline, kernel

#: `collect`'s `plain` for a receive ring: a chain with anything to read in it is at fault (5.1.6.3).
WRITABLE: Final = 1 << 16 | VRING_DESC_F_WRITE


@inline
def count(row: int, counter: int, amount: int) -> None:
    """Adds to a counter; each row has one writer."""
    store64(row + counter, load64(row + counter) + amount)


@inline
def _fault(ring: Record, code: int, descriptor: int, a: int, b: int) -> int:
    ring["fault"] = code
    ring["fault_descriptor"] = descriptor
    ring["fault_a"] = a
    ring["fault_b"] = b
    return -code


@kernel
def find_region(ring: Record, address: int) -> bool:
    """Makes the region that holds guest `address` the ring's last hit; False if there is none."""
    table = ring["regions"]
    low = 0
    high = ring["region_count"]
    while low < high:
        middle = (low + high) >> 1
        if below(address, load64(table + middle * REGION_BYTES)):
            high = middle
        else:
            low = middle + 1
    if low == 0:
        return False
    region = table + (low - 1) * REGION_BYTES
    guest = load64(region)
    if not below(address - guest, load64(region + 8)):
        return False
    ring["hit_guest"] = guest
    ring["hit_size"] = load64(region + 8)
    ring["hit_host"] = load64(region + 16)
    return True


@kernel
def pieces(ring: Record, address: int, length: int, iov: int, room: int) -> int:
    """Turns a guest range into struct iovec at `iov`, one a region; how many, 0 if not all of it is memory.

    -1 if `room` is not enough.
    """
    done = 0
    while length > 0:
        if not below(address - ring["hit_guest"], ring["hit_size"]) and not find_region(ring, address):
            return 0
        if done == room:
            return -1
        offset = address - ring["hit_guest"]
        run = min(ring["hit_size"] - offset, length)
        store64(iov + done * 16, ring["hit_host"] + offset)
        store64(iov + done * 16 + 8, run)
        done += 1
        address += run
        length -= run
    return done


@kernel
def _copy_table(ring: Record, address: int, length: int, to: int) -> bool:
    """Copies a guest range that crosses regions to `to`; False if not all of it is memory."""
    while length > 0:
        if not below(address - ring["hit_guest"], ring["hit_size"]) and not find_region(ring, address):
            return False
        offset = address - ring["hit_guest"]
        run = min(ring["hit_size"] - offset, length)
        copy(to, ring["hit_host"] + offset, run)
        to += run
        address += run
        length -= run
    return True


@kernel
def walk(ring: Record, head: int, slot: int, iov: int, scratch: int) -> int:
    """Walks the chain at `head` into `slot` and the struct iovec at `iov`; 0, or a fault's code, negative.

    Readable pieces come first, then writable ones, as 2.7.4.2 wants them. `scratch` is room for one
    descriptor of an indirect table that lies across two regions.
    """
    table = ring["desc"]
    limit = ring["num"]
    table_guest = 0
    inside = False
    total = 0
    readable = 0
    out_bytes = 0
    in_bytes = 0
    index = head
    walked = 0
    while True:
        if walked >= limit:
            return _fault(ring, FAULT_LOOP, index, head, limit)
        walked += 1
        entry = table + index * 16
        if inside and table == 0:
            if not _copy_table(ring, table_guest + index * 16, 16, scratch):
                return _fault(ring, FAULT_INDIRECT, index, table_guest, limit * 16)
            entry = scratch
        address = load64(entry)
        word = load64(entry + 8)
        length = word & 0xFFFFFFFF
        flags = (word >> 32) & 0xFFFF
        if flags & VRING_DESC_F_INDIRECT:
            if inside or flags & VRING_DESC_F_NEXT:
                return _fault(ring, FAULT_INDIRECT, index, flags, head)
            if length == 0 or length & 15 or length > 65536 * 16:
                return _fault(ring, FAULT_INDIRECT_SIZE, index, length, head)
            if total == MAX_CHAIN:
                return _fault(ring, FAULT_TOO_LONG, index, head, MAX_CHAIN)
            first = pieces(ring, address, length, iov + total * 16, 1)
            if first == 0:
                return _fault(ring, FAULT_INDIRECT, index, address, length)
            # A table inside one region is read where it lies; across regions, a descriptor at a time.
            table = load64(iov + total * 16) if first == 1 else 0
            table_guest = address
            limit = length >> 4
            inside = True
            index = 0
            walked = 0
            continue
        if length == 0:
            return _fault(ring, FAULT_LENGTH, index, 0, head)
        made = pieces(ring, address, length, iov + total * 16, MAX_CHAIN - total)
        if made == 0:
            return _fault(ring, FAULT_ADDRESS, index, address, length)
        if made < 0:
            return _fault(ring, FAULT_TOO_LONG, index, head, MAX_CHAIN)
        total += made
        if flags & VRING_DESC_F_WRITE:
            in_bytes += length
        else:
            if in_bytes:
                return _fault(ring, FAULT_DIRECTION, index, flags, head)
            out_bytes += length
            readable = total
        if not flags & VRING_DESC_F_NEXT:
            break
        index = (word >> 48) & 0xFFFF
        if index >= limit:
            return _fault(ring, FAULT_NEXT, index, head, limit)
    store64(slot + SLOT_HEAD, head)
    store64(slot + SLOT_IOV, iov)
    store64(slot + SLOT_OUT, readable)
    store64(slot + SLOT_IN, total - readable)
    store64(slot + SLOT_OUT_BYTES, out_bytes)
    store64(slot + SLOT_IN_BYTES, in_bytes)
    return 0


@kernel
def ready(ring: Record) -> int:
    """How many chains the driver has made available and nobody has taken; negative on a fault."""
    # Pairs with the driver's barrier between its ring entries and avail->idx (2.7.13.3).
    seen = load16_acquire(ring["avail"] + 2)
    waiting = (seen - ring["last_avail"]) & 0xFFFF
    if waiting > ring["num"]:
        return _fault(ring, FAULT_AVAIL_INDEX, 0, seen, ring["last_avail"])
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
    last = ring["last_avail"]
    waiting = (ring["seen_avail"] - last) & 0xFFFF
    if waiting < start + want:
        waiting = ready(ring)
        if waiting < 0:
            return waiting
    # A driver may take back what it made available: what the batch has, it keeps.
    end = max(min(waiting, start + want, SLOTS), start)
    num = ring["num"]
    mask = num - 1
    flag = plain & 0xFFFF
    entries = ring["avail"] + 4
    desc = ring["desc"]
    iov = batch + SLOTS * SLOT_BYTES
    if start:
        before = batch + (start - 1) * SLOT_BYTES
        iov = load64(before + SLOT_IOV) + 16 * (load64(before + SLOT_OUT) + load64(before + SLOT_IN))
    for i in range(start, end):
        head = load16(entries + 2 * ((last + i) & mask))
        store64(batch + i * SLOT_BYTES + SLOT_HEAD, head)
        if head < num:
            prefetch(desc + head * 16)
    # Behind the longest chain there is one more for each slot of the batch.
    last_iov = batch + SLOTS * SLOT_BYTES + MAX_CHAIN * 16
    hit_guest = ring["hit_guest"]
    hit_size = ring["hit_size"]
    hit_host = ring["hit_host"]
    for i in range(start, end):
        slot = batch + i * SLOT_BYTES
        head = load64(slot + SLOT_HEAD)
        if head >= num:
            return i if i > start else _fault(ring, FAULT_HEAD, head, num, (last + i) & mask)
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
        if failed == 0 and plain == WRITABLE and load64(slot + SLOT_OUT) != 0:
            failed = _fault(ring, FAULT_DIRECTION, head, load64(slot + SLOT_OUT_BYTES), head)
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
        if lines > 0:
            prefetch(load64(load64(slot + SLOT_IOV)))
    return end


@inline
def use(ring: Record, head: int, length: int) -> None:
    """Writes the next used element: chain `head`, `length` bytes written; `publish` shows it."""
    used = ring["used_idx"]
    store64(ring["used"] + 4 + 8 * (used & (ring["num"] - 1)), head | (length << 32))
    ring["used_idx"] = (used + 1) & 0xFFFF


@inline
def take(ring: Record, chains: int) -> None:
    """Consumes the next `chains` chains."""
    ring["last_avail"] = (ring["last_avail"] + chains) & 0xFFFF


@kernel
def use_batch(ring: Record, batch: int, chains: int) -> None:
    """Consumes the first `chains` of a batch that the device only read: used, with nothing written."""
    elements = ring["used"] + 4
    mask = ring["num"] - 1
    used = ring["used_idx"]
    for i in range(chains):
        store64(elements + 8 * ((used + i) & mask), load64(batch + i * SLOT_BYTES + SLOT_HEAD))
    ring["used_idx"] = (used + chains) & 0xFFFF
    take(ring, chains)


@kernel
def publish(ring: Record) -> None:
    """Shows the driver what was used, and calls it if it asked (2.7.7.2)."""
    used = ring["used_idx"]
    if used == ring["published"]:
        return
    # Pairs with the driver's barrier between used->idx and the elements (2.7.14).
    store16_release(ring["used"] + 2, used)
    ring["published"] = used
    # Pairs with the driver's barrier between used_event or flags, and its last look at used->idx.
    fence()
    row = ring["row"]
    if ring["event_idx"]:
        event = load16(ring["avail"] + 4 + 2 * ring["num"])
        news = (used - ring["signalled"]) & 0xFFFF
        wanted = ring["signalled_valid"] == 0 or ((used - event - 1) & 0xFFFF) < news
        ring["signalled"] = used
        ring["signalled_valid"] = 1
    else:
        wanted = load16(ring["avail"]) & VRING_AVAIL_F_NO_INTERRUPT == 0
    if ring["notify_on_empty"] and load16_acquire(ring["avail"] + 2) == ring["last_avail"]:
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
    if ring["event_idx"]:
        if wanted:
            store16(ring["used"] + 4 + 8 * ring["num"], ring["seen_avail"])
    else:
        store16(ring["used"], 0 if wanted else VRING_USED_F_NO_NOTIFY)
    ring["notify"] = 1 if wanted else 0
    # Pairs with the driver's barrier between avail->idx and its look at used->flags or avail_event.
    fence()


@kernel
def stop_at_fault(ring: Record) -> bool:
    """Stops a ring whose record holds a fault, and signals `err`; whether Python has yet to tell of it."""
    ring["running"] = 0
    count(ring["row"], C_FAULTS, 1)
    if ring["err_fd"] >= 0:
        signal(ring["err_fd"])
        count(ring["row"], C_SYSCALLS, 1)
    if ring["fault_told"]:
        return False
    ring["fault_told"] = 1
    return True
