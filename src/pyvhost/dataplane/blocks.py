"""The blocks that Python makes and kernels read: ring, port, worker, regions, and the counters' fields.

Every field is an int64. A block belongs to the worker whose arrays it lies in; Python writes to it only while
that worker is paused. Addresses are this process's own. A *batch* is scratch memory that `split_ring.collect`
fills: `SLOTS` slots, then `BATCH_IOVECS` struct iovec.

Promises: sizes are checked at import. Never: has behaviour.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np

#: A record of one of the dtypes below: a numpy void under plain Python, a pointer when compiled.
Record = Any
#: A one-dimensional array of such records.
Records = Any

#: Chains taken in one go; one used index, one fence and one look at the driver's flags a batch.
BATCH: Final = 32
#: The longest chain that is served, in struct iovec: as Linux's vhost (UIO_MAXIOV).
MAX_CHAIN: Final = 1024
#: Slots of a batch: more than are asked for in one go, for frames that fill many mergeable buffers.
SLOTS: Final = 352
#: struct iovec in a batch: a long chain ends its batch early, so that one more always fits, and one for each
#: slot that follows.
BATCH_IOVECS: Final = SLOTS + 2 * MAX_CHAIN
#: A slot: head, address of its first iovec, how many are readable, how many writable, bytes of each kind.
SLOT_BYTES: Final = 48
SLOT_HEAD: Final = 0
SLOT_IOV: Final = 8
SLOT_OUT: Final = 16
SLOT_IN: Final = 24
SLOT_OUT_BYTES: Final = 32
SLOT_IN_BYTES: Final = 40
#: From a struct iovec to the same piece's address in the dirty log, 16 bytes apart as they are.
IOV_LOG: Final = BATCH_IOVECS * 16
#: Behind them: room for one descriptor that lies across two regions.
BATCH_SCRATCH: Final = SLOTS * SLOT_BYTES + 2 * BATCH_IOVECS * 16
BATCH_BYTES: Final = BATCH_SCRATCH + 64

#: A region, or an entry of the IOTLB: address (the guest's physical one, or an I/O virtual one), bytes, host
#: address, guest physical address, what it may be used for (ACCESS_*); sorted by the first, never overlapping.
REGION_SIZE: Final = 8
REGION_HOST: Final = 16
REGION_LOG: Final = 24
REGION_ACCESS: Final = 32
REGION_BYTES: Final = 40

#: An entry of an inflight queue region begins behind its head (vhost-user, struct QueueRegionSplit).
INFLIGHT_USED_IDX: Final = 14
INFLIGHT_DESC: Final = 16
INFLIGHT_DESC_BYTES: Final = 16


def int64s(*names: str) -> np.dtype[np.void]:
    size = -(-len(names) * 8 // 64) * 64
    offsets = [8 * i for i in range(len(names))]
    return np.dtype({"names": names, "formats": ["<i8"] * len(names), "offsets": offsets, "itemsize": size})


RING: Final = int64s(
    # Where its parts lie, and how many descriptors it has.
    "desc",
    "avail",
    "used",
    "num",
    # The memory that its guest addresses mean, whether that is an IOTLB, and the region that was hit last.
    "regions",
    "region_count",
    "iotlb",
    "hit_guest",
    "hit_size",
    "hit_host",
    "hit_log",
    "hit_access",
    # Free-running indices modulo 65536: taken, seen of the driver's, used, published, signalled.
    "last_avail",
    "seen_avail",
    "used_idx",
    "published",
    "signalled",
    "signalled_valid",
    # What was negotiated.
    "event_idx",
    "notify_on_empty",
    # Whether its numbers are of the other byte order (a legacy guest's).
    "swap",
    # The dirty log: its address for what is written to buffers and for what is written to the used ring (0: not
    # logged), its bytes, the used ring's address in it, what to signal (-1: nothing).
    "log_data",
    "log_used",
    "log_bytes",
    "log_used_at",
    "log_fd",
    # Its part of the inflight memory (0: none); chains of a former life that come first: address of their heads
    # (an int64 each), and how many are left.
    "inflight",
    "replay",
    "replay_left",
    # How many chains were taken out of order, for that memory; whether some are used and not yet shown.
    "taken",
    "unshown",
    # Notifications: descriptors (-1: none), and whether the driver is asked to kick.
    "call_fd",
    "err_fd",
    "notify",
    # Since when it waits for the IOTLB: nanoseconds.
    "waits_since",
    # Whether its memory is this process's own, lent by pointer (while it is in its place), and whether any of that
    # was found missing: it does not run again then before it is put in its place anew.
    "own",
    "lost",
    # Whose it is, whether its parts are in memory, and whether it runs.
    "located",
    "running",
    "port",
    "row",
    # The fault that stopped it: a code, the descriptor, and two numbers; whether Python has told of it.
    "fault",
    "fault_descriptor",
    "fault_a",
    "fault_b",
    "fault_told",
)

PORT: Final = int64s(
    # What is at its other end (PORT_*), its descriptor, and the header that travels on it.
    "kind",
    "fd",
    "fd_header",
    # Its rings in the worker's array (-1: none) and the guest's header.
    "tx",
    "rx",
    "header",
    "mergeable",
    "guest_csum",
    "guest_gso",
    # Scheduling.
    "used",
    "active",
    "readable",
    "writable",
    "rx_dry",
    "tx_stalled",
    # Its frames wait for a moment until another guest's buffers can be found.
    "held_up",
    "idle_since",
    "busy_ns",
    # Scratch: room for one frame that is held back, and for what a stream has read or not yet written.
    "bounce",
    "held",
    "stream",
    "stream_have",
    "stream_at",
    "unsent",
    "unsent_at",
    "unsent_bytes",
    # What the last frames were like, so that the next read offers enough of the guest's buffers.
    "expect",
    # Frames of the generator: address, bytes, how many are left (-1: no end).
    "template",
    "template_bytes",
    "left",
    # The switch it is a member of (an address; 0: none), and as which member and queue pair.
    "switch",
    "member",
    "pair",
    # Recording: the address of a tap ring, 0 for none.
    "record",
    # The host's fault: errno, and which ones Python has told of (a bit each, modulo 64).
    "error",
    "error_told",
    # A row of counters for a port that has no rings (a switch's uplink).
    "row",
)

WORKER: Final = int64s(
    "control",
    "epoll",
    "tx_batch",
    "rx_batch",
    "scratch",
    "events",
    "ports",
    "active",
    "active_count",
    "watched",
    "row",
    # Why the loop comes back (REASON_*, together), and the port that it is about; a ring says so itself.
    "reason",
    "reason_port",
    # Whether a ring was ever stopped by a fault: its next kick has to be heard even while all ports are busy.
    "faults",
    # What a scsi worker has besides (an address; 0: none).
    "disks",
)

#: The longest frame: an IP packet of 64 KiB behind two addresses, two tags and a type, and then some.
LONGEST_FRAME: Final = 65536 + 64
#: Room for one with its header.
MAX_FRAME: Final = LONGEST_FRAME + 64
STREAM_BYTES: Final = 4 * MAX_FRAME
#: The shortest frame: two addresses and a type.
MIN_FRAME: Final = 14

#: Words of a worker's control block: the one that asks it to leave the loop.
CONTROL_STOP: Final = 0

#: A worker's scratch memory: the clock, a header, stream lengths, struct iovec being built, whole frames.
SCRATCH_CLOCK: Final = 0
SCRATCH_HEADER: Final = 32
SCRATCH_LENGTHS: Final = 64
#: A few words of a loop's own: an event for epoll, a struct iovec or two.
SCRATCH_WORDS: Final = 256
SCRATCH_IOV: Final = 512
SCRATCH_IOVECS: Final = 2 * MAX_CHAIN
SCRATCH_FRAME: Final = SCRATCH_IOV + 16 * SCRATCH_IOVECS
SCRATCH_SEGMENT: Final = SCRATCH_FRAME + MAX_FRAME
SCRATCH_BYTES: Final = SCRATCH_SEGMENT + MAX_FRAME

#: A port's bounce buffer: a header, then a frame twice over (what the guest's buffers took, and the rest).
BOUNCE_FRAME: Final = 64
BOUNCE_BYTES: Final = BOUNCE_FRAME + 2 * MAX_FRAME

#: A switch: address and mask of its table, address and number of its members.
SWITCH_TABLE: Final = 0
SWITCH_MASK: Final = 8
SWITCH_MEMBERS: Final = 16
SWITCH_COUNT: Final = 24
SWITCH_BYTES: Final = 64
#: An entry of the table: an address of 48 bits with bit 48 set (0: free), and the member behind it.
SWITCH_ENTRY_BYTES: Final = 16
SWITCH_PROBES: Final = 8
#: A member: how many ports (queue pairs) it has, then their indices.
MEMBER_PORTS: Final = 0
MEMBER_PORT: Final = 8
MEMBER_MAX_PORTS: Final = 31
MEMBER_BYTES: Final = 8 * (MEMBER_MAX_PORTS + 1)

#: Capacity of a worker's arrays; memory that is not used is not touched.
MAX_PORTS: Final = 2048
MAX_RINGS: Final = 2 * MAX_PORTS
EVENTS: Final = 64

#: What epoll's data says: its kind in the high half, an index in the low half.
EVENT_WAKE: Final = 0
EVENT_KICK: Final = 1
EVENT_PORT: Final = 2

#: Why a loop came back to Python; the latter two may come together.
REASON_STOP: Final = 0
REASON_RING: Final = 1
REASON_BACKEND_FAULT: Final = 2

#: What a ring's fault was; `pyvhost.vhost.faults` has the words.
FAULT_AVAIL_INDEX: Final = 1
FAULT_HEAD: Final = 2
FAULT_NEXT: Final = 3
FAULT_LOOP: Final = 4
FAULT_ADDRESS: Final = 5
FAULT_LENGTH: Final = 6
FAULT_INDIRECT: Final = 7
FAULT_INDIRECT_SIZE: Final = 8
FAULT_TOO_LONG: Final = 9
FAULT_DIRECTION: Final = 10
FAULT_HEADER: Final = 11
#: The IOTLB allows less than what the driver wants.
FAULT_PERMISSION: Final = 12
#: No fault: the IOTLB has no entry, so that the ring has to wait for one.
IOTLB_MISS: Final = 13

#: What is at the other end of a port.
PORT_NULL: Final = 0
PORT_GENERATE: Final = 1
PORT_LOOP: Final = 2
PORT_FD: Final = 3
PORT_STREAM: Final = 4
PORT_SWITCH: Final = 5

#: Buckets of a latency: below 1 us, below 2, below 4 ...
LATENCIES: Final = 24

COUNTERS: Final = (
    "packets",
    "bytes",
    "drops",
    "errors",
    "kicks",
    "calls",
    "calls_suppressed",
    "syscalls",
    "bursts",
    "oversize",
    "no_buffer",
    "faults",
    "reads",
    "writes",
    "read_bytes",
    "written_bytes",
    *(f"latency_{i}" for i in range(LATENCIES)),
    # All latencies together; what a logical unit did that was neither a read nor a write.
    "latency_ns",
    "others",
    # A vsock device's: how many there are; how many began, were refused, were reset; how often the guest had granted
    # nothing, and how often it was told what it may send.
    "connections",
    "connects",
    "refused",
    "resets",
    "credit_stalls",
    "credit_updates",
)
C_PACKETS: Final = 0
C_BYTES: Final = 8
C_DROPS: Final = 16
C_ERRORS: Final = 24
C_KICKS: Final = 32
C_CALLS: Final = 40
C_CALLS_SUPPRESSED: Final = 48
C_SYSCALLS: Final = 56
C_BURSTS: Final = 64
C_OVERSIZE: Final = 72
C_NO_BUFFER: Final = 80
C_FAULTS: Final = 88
C_READS: Final = 96
C_WRITES: Final = 104
C_READ_BYTES: Final = 112
C_WRITTEN_BYTES: Final = 120
C_LATENCY: Final = 128
C_LATENCY_NS: Final = C_LATENCY + 8 * LATENCIES
C_OTHERS: Final = C_LATENCY_NS + 8
C_CONNECTIONS: Final = C_OTHERS + 8
C_CONNECTS: Final = C_CONNECTIONS + 8
C_REFUSED: Final = C_CONNECTIONS + 16
C_RESETS: Final = C_CONNECTIONS + 24
C_CREDIT_STALLS: Final = C_CONNECTIONS + 32
C_CREDIT_UPDATES: Final = C_CONNECTIONS + 40

assert all(dtype.itemsize % 64 == 0 for dtype in (RING, PORT, WORKER))
assert len(COUNTERS) * 8 == C_CREDIT_UPDATES + 8
