"""io_uring from compiled code: operations pushed, submitted in one call, and reaped (io_uring_enter(2)).

Promises: nothing is pushed beyond the operations there are; a struct iovec has to live until `submit` returns, and
for what that could not hand over until `withdraw` has taken it back.
Never: waits.
"""

from __future__ import annotations

from typing import Final

from pyvhost.dataplane.access import (
    fill,
    load32,
    load32_acquire,
    load64,
    store8,
    store32,
    store32_release,
    store64,
    sys_uring_enter,
)
from pyvhost.dataplane.policy import inline, kernel
from pyvhost.dataplane.scsi_blocks import (
    DISKS_BUSY,
    DISKS_CQ_HEAD,
    DISKS_CQ_MASK,
    DISKS_CQ_TAIL,
    DISKS_CQES,
    DISKS_PUSHED,
    DISKS_SQ_ARRAY,
    DISKS_SQ_FLAGS,
    DISKS_SQ_MASK,
    DISKS_SQ_TAIL,
    DISKS_SQES,
    DISKS_URING_FD,
)

OP_READV: Final = 1
OP_WRITEV: Final = 2
#: One buffer: its address and length take the place of those of the iovecs (Linux 5.6).
OP_READ: Final = 22
OP_WRITE: Final = 23
_SQ_TASKRUN: Final = 4
_SQE_BYTES: Final = 64
_CQE_BYTES: Final = 16


@kernel
def push(disks: int, opcode: int, fd: int, at: int, count: int, offset: int, flags: int, mark: int) -> None:
    """Puts an operation into the submission queue; `mark` comes back with its completion.

    `at`: address of `count` struct iovec, or of `count` bytes, as `opcode` wants it.
    """
    mask = load64(disks + DISKS_SQ_MASK)
    tail_at = load64(disks + DISKS_SQ_TAIL)
    tail = load32(tail_at)
    index = tail & mask
    entry = load64(disks + DISKS_SQES) + index * _SQE_BYTES
    fill(entry, 0, _SQE_BYTES)
    store8(entry, opcode)
    store32(entry + 4, fd)
    store64(entry + 8, offset)
    store64(entry + 16, at)
    store32(entry + 24, count)
    store32(entry + 28, flags)
    store64(entry + 32, mark)
    store32(load64(disks + DISKS_SQ_ARRAY) + 4 * index, index)
    # Pairs with the kernel's acquire load of the tail.
    store32_release(tail_at, (tail + 1) & 0xFFFFFFFF)
    store64(disks + DISKS_PUSHED, load64(disks + DISKS_PUSHED) + 1)


@kernel
def submit(disks: int) -> int:
    """Hands over what was pushed; how many calls that took, negative errno if some of it is still there."""
    pushed = load64(disks + DISKS_PUSHED)
    calls = 0
    while pushed > 0:
        took = sys_uring_enter(load64(disks + DISKS_URING_FD), pushed, 0, 0)
        calls += 1
        if took < 0:
            if took == -4:
                continue
            return took
        pushed -= took
        store64(disks + DISKS_PUSHED, pushed)
        store64(disks + DISKS_BUSY, load64(disks + DISKS_BUSY) + took)
    return calls


@kernel
def withdraw(disks: int) -> int:
    """Takes back the newest operation that was pushed and that `submit` could not hand over; its mark, -1: none."""
    pushed = load64(disks + DISKS_PUSHED)
    if pushed == 0:
        return -1
    tail_at = load64(disks + DISKS_SQ_TAIL)
    # The kernel looks at the tail within a call alone: until then it is ours.
    tail = (load32(tail_at) - 1) & 0xFFFFFFFF
    store32_release(tail_at, tail)
    store64(disks + DISKS_PUSHED, pushed - 1)
    return load64(load64(disks + DISKS_SQES) + (tail & load64(disks + DISKS_SQ_MASK)) * _SQE_BYTES + 32)


@inline
def needs_a_call(disks: int) -> bool:
    """Whether operations have ended, and only the next system call makes completions of that."""
    return load32(load64(disks + DISKS_SQ_FLAGS)) & _SQ_TASKRUN != 0


@inline
def completions(disks: int) -> int:
    """How many operations have ended and are not consumed."""
    # Pairs with the kernel's release store of the tail.
    return (
        load32_acquire(load64(disks + DISKS_CQ_TAIL)) - load32(load64(disks + DISKS_CQ_HEAD))
    ) & 0xFFFFFFFF


@kernel
def next_completion(disks: int) -> int:
    """Address of the oldest completion (mark, result), 0 if there is none; `consume` it before the next."""
    head = load32(load64(disks + DISKS_CQ_HEAD))
    # Pairs with the kernel's release store of the tail.
    if head == load32_acquire(load64(disks + DISKS_CQ_TAIL)):
        return 0
    return load64(disks + DISKS_CQES) + (head & load64(disks + DISKS_CQ_MASK)) * _CQE_BYTES


@kernel
def consume(disks: int) -> None:
    """The oldest completion is done with."""
    at = load64(disks + DISKS_CQ_HEAD)
    store64(disks + DISKS_BUSY, load64(disks + DISKS_BUSY) - 1)
    # Pairs with the kernel's acquire load of the head.
    store32_release(at, (load32(at) + 1) & 0xFFFFFFFF)
