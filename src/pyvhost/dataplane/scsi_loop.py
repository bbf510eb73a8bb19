"""The scsi worker's loop: the request queues that a thread serves, until Python is needed.

A turn uses what Python has finished, reaps what the host has finished, takes a batch from each active queue, and
submits all that came of it in one call. Then it sleeps in epoll, which io_uring's descriptor wakes as well.

Promises: each queue gets at most one batch a turn; a chain that was taken is in the inflight memory until it is
used; a request to stop is seen once a turn.
Never: returns without a reason (`REASON_*`).
"""

from __future__ import annotations

from typing import Final

from pyvhost.dataplane.access import (
    clock_ns,
    load32,
    load64,
    load64_acquire,
    signal,
    store64,
    store64_release,
)
from pyvhost.dataplane.blocks import (
    BATCH,
    C_ERRORS,
    C_LATENCY,
    C_LATENCY_NS,
    C_READ_BYTES,
    C_READS,
    C_SYSCALLS,
    C_WRITES,
    C_WRITTEN_BYTES,
    CONTROL_STOP,
    EVENT_KICK,
    FAULT_HEADER,
    LATENCIES,
    REASON_RING,
    REASON_STOP,
    SCRATCH_CLOCK,
    SLOT_BYTES,
    SLOT_HEAD,
    SLOT_IN_BYTES,
    SLOT_OUT_BYTES,
    Record,
    Records,
)
from pyvhost.dataplane.inflight import begin
from pyvhost.dataplane.policy import kernel
from pyvhost.dataplane.scsi_blocks import (
    DISKS_AT_ONCE,
    DISKS_DONE_PUT,
    DISKS_DONE_TAKEN,
    DISKS_LOOKED,
    DISKS_OPS,
    DONE_FAILED,
    DONE_HEAD,
    DONE_KIND,
    DONE_LENGTH,
    DONE_NS,
    DONE_RING,
    DONE_ROW,
    DONE_WRITTEN,
    OP_ABORT,
    OP_BYTES,
    OP_EXPECTED,
    OP_HEAD,
    OP_IS_WRITE,
    OP_RING,
    OP_SERIAL,
    OP_STARTED,
    OP_UNIT,
    OP_WATCHED,
    OP_WRITTEN,
    OPS,
    RESPONSE_BYTES,
    TODO_CHAIN,
    TODO_DRAINED,
    TODO_ENDED,
    TODO_FAILED,
    UNIT_ROW,
)
from pyvhost.dataplane.scsi_io import done_entry, free_todo, give_back, respond, start, tell
from pyvhost.dataplane.split_ring import collect, count, publish, stop_at_fault, take_kept, use, want_kicks
from pyvhost.dataplane.translate import fault
from pyvhost.dataplane.turns import enlist, kicked, retire, sleep
from pyvhost.dataplane.uring import completions, consume, needs_a_call, next_completion, submit, withdraw

#: Room in Python's queue that is kept for operations that end: what each may have to say, and once more.
_RESERVED: Final = 4 * OPS
#: Bytes that are submitted in one call to a store that answers at once: the driver has something to do meanwhile.
_AT_ONCE_BYTES: Final = 64 << 10
#: A worker that does not sleep looks into epoll after so long.
_LOOK_NS: Final = 32 << 10
#: A queue that was idle no longer than this the last time is looked at for so long before it rests.
_SHORT_NS: Final = 32 << 10


@kernel
def _used(rings: Records, queues: Records, index: int, head: int, written: int) -> None:
    """Uses a chain; it is shown at the end of the turn."""
    ring = rings[index]
    queue = queues[ring["port"]]
    queue["in_flight"] -= 1
    if not queue["orphan"]:
        use(ring, head, written)
        ring["unshown"] = 1


@kernel
def _show(rings: Records, queues: Records, index: int) -> bool:
    """Shows the driver what was used of a queue's ring; whether there was any."""
    ring = rings[queues[index]["tx"]]
    shown = False
    if ring["unshown"] and ring["located"]:
        ring["unshown"] = 0
        publish(ring)
        shown = True
    if queues[index]["held_back"] and queues[index]["in_flight"] == 0:
        # Python waits for the last one.
        signal(queues[index]["python_fd"])
    return shown


@kernel
def _count(row: int, kind: int, length: int, nanoseconds: int) -> None:
    """Counts a command in its unit's row."""
    count(row, kind, 1)
    if kind == C_WRITES:
        count(row, C_WRITTEN_BYTES, length)
    elif kind == C_READS:
        count(row, C_READ_BYTES, length)
    count(row, C_LATENCY_NS, nanoseconds)
    micros = nanoseconds // 1000
    bucket = 0
    while micros > 0 and bucket < LATENCIES - 1:
        micros >>= 1
        bucket += 1
    count(row, C_LATENCY + 8 * bucket, 1)


@kernel
def _from_python(worker: Record, rings: Records, queues: Records) -> int:
    """Uses the chains that Python has finished; how many."""
    disks = worker["disks"]
    taken = load64(disks + DISKS_DONE_TAKEN)
    # Pairs with Python's store of the number, behind what it counts.
    put = load64_acquire(disks + DISKS_DONE_PUT)
    for number in range(taken, put):
        entry = done_entry(disks, number)
        index = load64(entry + DONE_RING)
        row = load64(entry + DONE_ROW)
        if row and load64(entry + DONE_FAILED):
            count(row, C_ERRORS, 1)
        elif row:
            _count(row, load64(entry + DONE_KIND), load64(entry + DONE_LENGTH), load64(entry + DONE_NS))
        _used(rings, queues, index, load64(entry + DONE_HEAD), load64(entry + DONE_WRITTEN))
        _activate(worker, rings, queues, rings[index]["port"])
    store64_release(disks + DISKS_DONE_TAKEN, put)
    return put - taken


@kernel
def _reap(worker: Record, rings: Records, queues: Records, now: int) -> int:
    """Uses the chains whose operations the host has finished; how many."""
    disks = worker["disks"]
    reaped = 0
    while True:
        completion = next_completion(disks)
        if completion == 0:
            return reaped
        number = load64(completion)
        result = load32(completion + 8)
        if result >= 1 << 31:
            result -= 1 << 32
        consume(disks)
        reaped += 1
        op = load64(disks + DISKS_OPS) + number * OP_BYTES
        index = load64(op + OP_RING)
        head = load64(op + OP_HEAD)
        ring = rings[index]
        abort = load64(op + OP_ABORT)
        orphan = queues[ring["port"]]["orphan"]
        if abort == 0 and result != load64(op + OP_EXPECTED) and not orphan:
            # What the host failed, or did in part, is Python's to do again and to explain.
            tell(disks, TODO_FAILED, index, head, -result if result < 0 else 0)
            signal(queues[ring["port"]]["python_fd"])
        else:
            if abort:
                store64(op + OP_WRITTEN, RESPONSE_BYTES)
            elif not orphan:
                _count(
                    load64(load64(op + OP_UNIT) + UNIT_ROW),
                    C_WRITES if load64(op + OP_IS_WRITE) else C_READS,
                    load64(op + OP_EXPECTED),
                    now - load64(op + OP_STARTED),
                )
            if not orphan:
                respond(ring, op, abort)
            _used(rings, queues, index, head, load64(op + OP_WRITTEN))
        _over(worker, rings, queues, op, number)
        _activate(worker, rings, queues, ring["port"])


@kernel
def _over(worker: Record, rings: Records, queues: Records, op: int, number: int) -> None:
    """An operation has ended, one way or another: it is free again, and who waits for it is told."""
    disks = worker["disks"]
    index = load64(op + OP_RING)
    head = load64(op + OP_HEAD)
    queue = queues[rings[index]["port"]]
    if load64(op + OP_WATCHED):
        tell(disks, TODO_ENDED, index, head, load64(op + OP_SERIAL))
        signal(queue["python_fd"])
    if give_back(disks, op, number):
        tell(disks, TODO_DRAINED, index, head, number)
        signal(queue["python_fd"])


@kernel
def _refused(worker: Record, rings: Records, queues: Records, code: int) -> None:
    """The host took none of what is left in the submission queue: Python does it."""
    disks = worker["disks"]
    while True:
        number = withdraw(disks)
        if number < 0:
            return
        op = load64(disks + DISKS_OPS) + number * OP_BYTES
        index = load64(op + OP_RING)
        tell(disks, TODO_FAILED, index, load64(op + OP_HEAD), code)
        signal(queues[rings[index]["port"]]["python_fd"])
        _over(worker, rings, queues, op, number)


@kernel
def sweep(worker: Record, rings: Records, queues: Records, index: int) -> int:
    """Takes all that is available in a queue, for Python, while the loop is out; how many chains."""
    clock = worker["scratch"] + SCRATCH_CLOCK
    took = 0
    while True:
        more = _take(worker, rings, queues, index, clock_ns(clock))
        if more <= 0:
            return took
        took += more


@kernel
def _take(worker: Record, rings: Records, queues: Records, index: int, now: int) -> int:
    """Takes a batch from a queue; how many chains."""
    queue = queues[index]
    ring = rings[queue["tx"]]
    if not ring["running"] or queue["held_back"]:
        return 0
    disks = worker["disks"]
    batch = worker["tx_batch"]
    room = min(BATCH, free_todo(disks) - _RESERVED)
    if room <= 0:
        return 0
    chains = collect(ring, batch, 0, room, 0, 0)
    took = 0
    told = False
    left = _AT_ONCE_BYTES if load64(disks + DISKS_AT_ONCE) else 1 << 62
    while took < chains and left > 0:
        slot = batch + took * SLOT_BYTES
        head = load64(slot + SLOT_HEAD)
        left -= load64(slot + SLOT_OUT_BYTES) + load64(slot + SLOT_IN_BYTES)
        if load64(slot + SLOT_OUT_BYTES) < queue["header"] or load64(slot + SLOT_IN_BYTES) < RESPONSE_BYTES:
            short = load64(slot + SLOT_OUT_BYTES) < queue["header"]
            fault(
                ring,
                FAULT_HEADER,
                head,
                load64(slot + SLOT_OUT_BYTES) if short else load64(slot + SLOT_IN_BYTES),
                queue["header"] if short else RESPONSE_BYTES,
            )
            break
        begin(ring, head)
        if not start(worker, queue, queue["tx"], ring, slot, now):
            tell(disks, TODO_CHAIN, queue["tx"], head, now)
            told = True
        took += 1
    take_kept(ring, max(took, 0))
    queue["in_flight"] += took
    if told:
        signal(queue["python_fd"])
    if ring["fault"]:
        worker["faults"] = 1
        if stop_at_fault(ring):
            worker["reason"] |= REASON_RING
    ended = completions(disks)
    # The iovecs lie in the batch: they have been read when this is back, or nobody is going to.
    calls = submit(disks)
    if calls < 0:
        _refused(worker, rings, queues, -calls)
    elif calls > 0:
        count(worker["row"], C_SYSCALLS, calls)
        store64(disks + DISKS_AT_ONCE, 1 if completions(disks) - ended >= took - (took >> 2) else 0)
    return took


@kernel
def _activate(worker: Record, rings: Records, queues: Records, index: int) -> None:
    queue = queues[index]
    if queue["active"] == 0 and queue["used"]:
        enlist(worker, queue, index)
        ring = rings[queue["tx"]]
        if ring["running"]:
            want_kicks(ring, False)


@kernel
def _wait(worker: Record, rings: Records, queues: Records, timeout_ms: int) -> None:
    """Sleeps in epoll and wakes the queues that were kicked."""
    events = worker["events"]
    for i in range(sleep(worker, timeout_ms)):
        # struct epoll_event is packed: 4 bytes of events, 8 of data.
        kind = load32(events + 12 * i + 8)
        index = load32(events + 12 * i + 4)
        if kind == EVENT_KICK:
            kicked(worker, rings[index])
            _activate(worker, rings, queues, rings[index]["port"])


@kernel
def _stir(queue: Record, now: int) -> None:
    """A queue has work: how long it was idle says whether it is worth while to look for the next."""
    if queue["idle_since"]:
        short = 1 if now - queue["idle_since"] < _SHORT_NS else 0
        if queue["idle_waiting"]:
            queue["short_waiting"] = short
        else:
            queue["short_alone"] = short
        queue["idle_since"] = 0


@kernel
def _rest(worker: Record, rings: Records, queues: Records, index: int, now: int) -> bool:
    """Whether a queue without work may rest: not while it is polled, nor if asking for kicks shows work."""
    queue = queues[index]
    if queue["idle_since"] == 0:
        queue["idle_since"] = now
        queue["idle_waiting"] = 1 if queue["in_flight"] else 0
    polled = queue["busy_ns"]
    if queue["short_waiting"] if queue["idle_waiting"] else queue["short_alone"]:
        polled = max(polled, _SHORT_NS)
    if now - queue["idle_since"] < polled:
        return False
    ring = rings[queue["tx"]]
    if ring["running"]:
        want_kicks(ring, True)
        if _take(worker, rings, queues, index, now):
            want_kicks(ring, False)
            _stir(queue, now)
            return False
    return True


@kernel
def scsi_loop(workers: Records, rings: Records, queues: Records) -> int:
    """Serves the queues of `workers[0]` until there is a reason to return, which it returns."""
    worker = workers[0]
    disks = worker["disks"]
    active = worker["active"]
    clock = worker["scratch"] + SCRATCH_CLOCK
    worker["reason"] = REASON_STOP
    # Pairs with the store of the control thread that wants to change something.
    while load64_acquire(worker["control"] + 8 * CONTROL_STOP) == 0:
        now = clock_ns(clock)
        moved = _from_python(worker, rings, queues)
        moved += _reap(worker, rings, queues, now)
        at = 0
        while at < worker["active_count"]:
            index = load64(active + 8 * at)
            # First what was used: the driver goes on with that while the host works.
            shown = _show(rings, queues, index)
            served = _take(worker, rings, queues, index, now)
            if served or shown:
                moved += 1
                _stir(queues[index], now)
                at += 1
            elif _rest(worker, rings, queues, index, now):
                retire(worker, queues[index], at)
            else:
                at += 1
        # Not before every queue has had its turn: what was used is shown when the loop is out.
        if worker["reason"] != REASON_STOP:
            return worker["reason"]
        if moved == 0 and worker["active_count"] == 0:
            # Asleep until a kick, Python, or the host.
            _wait(worker, rings, queues, -1)
        elif now - load64(disks + DISKS_LOOKED) >= _LOOK_NS or needs_a_call(disks) or worker["faults"]:
            _wait(worker, rings, queues, 0)
            store64(disks + DISKS_LOOKED, now)
        if worker["reason"] != REASON_STOP:
            return worker["reason"]
    return REASON_STOP
