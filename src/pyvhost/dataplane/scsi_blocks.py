"""The blocks of the scsi loop: disks' request queues, logical units, operations under way, queues from and to Python.

A *queue* (one request virtqueue) takes the place that a port has in the net loop. What is not int64 records of a
worker's arrays lies in plain memory, at the offsets below.

Promises: sizes are checked at import. Never: has behaviour.
"""

from __future__ import annotations

from typing import Final

from pyvhost.dataplane.blocks import int64s

#: A request virtqueue, in a worker's array of ports.
QUEUE: Final = int64s(
    # Scheduling, as a net port has it; it has one ring (`tx`) and no descriptor of its own.
    "used",
    "active",
    "tx",
    "rx",
    "fd",
    "row",
    "idle_since",
    "busy_ns",
    "readable",
    # The device's logical units: address and mask of a table; the size of a request's header.
    "units",
    "unit_mask",
    "header",
    # Chains that were taken and are not used; whether more may be taken; an eventfd of Python's, to be signalled
    # when there is something to do.
    "in_flight",
    "held_back",
    # Nobody waits for its chains any more, and its ring is not to be touched.
    "orphan",
    "python_fd",
    # Whether something was under way when it became idle; whether the last time that it was idle was short, with
    # nothing under way and with something.
    "idle_waiting",
    "short_alone",
    "short_waiting",
)

#: A logical unit: its key (0: free), and what a READ or WRITE needs of it. `FAST`: what Python has nothing to say
#: to (`FAST_READ`, `FAST_WRITE`).
UNIT_KEY: Final = 0
UNIT_FAST: Final = 8
UNIT_FD: Final = 16
UNIT_SHIFT: Final = 24
UNIT_BLOCKS: Final = 32
#: Every write goes to the medium: there is no cache, or it is switched off.
UNIT_DSYNC: Final = 48
UNIT_ROW: Final = 56
UNIT_IN_FLIGHT: Final = 64
#: Python wants to know when the last operation has ended.
UNIT_WATCHED: Final = 72
UNIT_BYTES: Final = 128
#: The key of unit `lun` of `target`: this bit and the two numbers.
UNIT_VALID: Final = 1 << 32
UNIT_PROBES: Final = 16
#: A key that was taken out: the search goes on behind it.
UNIT_GONE: Final = 1
FAST_READ: Final = 1
FAST_WRITE: Final = 2

#: An operation under way.
OP_STATE: Final = 0
OP_RING: Final = 8
OP_HEAD: Final = 16
OP_RESPONSE: Final = 24
OP_WRITTEN: Final = 32
OP_EXPECTED: Final = 40
OP_UNIT: Final = 48
OP_STARTED: Final = 56
OP_TAG: Final = 64
#: A response code that takes the place of what comes of it; 0: none.
OP_ABORT: Final = 72
OP_IS_WRITE: Final = 80
OP_NEXT: Final = 88
OP_QUEUE: Final = 96
#: What is logged when it is done: how many pieces, and guest address and bytes of each.
OP_PIECES: Final = 104
#: Which one it is of all that the worker has ever begun; whether Python wants to know when it has ended.
OP_SERIAL: Final = 112
OP_WATCHED: Final = 120
OP_PIECE: Final = 128
#: A chain of more pieces than this is Python's.
OP_MAX_PIECES: Final = 132
OP_BYTES: Final = OP_PIECE + 16 * OP_MAX_PIECES
OPS: Final = 256

#: What a worker has besides: addresses of its parts, one int64 each.
DISKS_URING_FD: Final = 0
DISKS_SQ_TAIL: Final = 8
DISKS_SQ_MASK: Final = 16
DISKS_SQ_ARRAY: Final = 24
DISKS_SQES: Final = 32
DISKS_CQ_HEAD: Final = 40
DISKS_CQ_TAIL: Final = 48
DISKS_CQ_MASK: Final = 56
DISKS_CQES: Final = 64
DISKS_PUSHED: Final = 72
DISKS_BUSY: Final = 80
DISKS_OPS: Final = 88
DISKS_FREE: Final = 96
#: From the loop to Python: entries, how many were put there, how many Python has taken.
DISKS_TODO: Final = 104
DISKS_TODO_PUT: Final = 112
DISKS_TODO_TAKEN: Final = 120
#: From Python to the loop.
DISKS_DONE: Final = 128
DISKS_DONE_PUT: Final = 136
DISKS_DONE_TAKEN: Final = 144
#: How many operations were begun.
DISKS_BEGUN: Final = 152
#: Whether what was submitted last had ended before the call was back: the store answers from memory.
DISKS_AT_ONCE: Final = 160
#: When epoll was looked into.
DISKS_LOOKED: Final = 168
#: The submission queue's flags: whether operations have ended that the host has yet to say so of.
DISKS_SQ_FLAGS: Final = 176
DISKS_BYTES: Final = 192

#: An entry to Python: four numbers.
ENTRY_BYTES: Final = 32
ENTRIES: Final = 1 << 16
#: What it says: a chain to be handled (ring, head, since when); one whose operation the host failed (ring,
#: head, errno); an operation that was watched has ended (ring, head, serial number).
TODO_CHAIN: Final = 1
TODO_FAILED: Final = 2
TODO_ENDED: Final = 3
#: The last operation of a watched unit has ended (ring, head).
TODO_DRAINED: Final = 4
#: An entry to the loop: a chain that is done with, and what is to be counted of it: the unit's row (0: nothing), how
#: many commands failed, and else which kind of command it was (C_READS, C_WRITES, C_OTHERS), its bytes, and ns.
DONE_RING: Final = 0
DONE_HEAD: Final = 8
DONE_WRITTEN: Final = 16
DONE_ROW: Final = 24
DONE_FAILED: Final = 32
DONE_KIND: Final = 40
DONE_LENGTH: Final = 48
DONE_NS: Final = 56
DONE_BYTES: Final = 64

RESPONSE_BYTES: Final = 108
REQUEST_TAG: Final = 8
REQUEST_ATTRIBUTE: Final = 16
REQUEST_CDB: Final = 19
RESPONSE_CODE: Final = 11

assert OP_BYTES % 64 == 0
assert UNIT_BYTES % 64 == 0
