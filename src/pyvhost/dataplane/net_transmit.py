"""Guest to backend: what a net device's transmit ring has goes out of its port.

Promises: a chain is used only once its frame has gone or is lost for good, and each loss is counted; what the
host can't take now stays in the ring. Never: blocks, or sends what has not been checked against the regions.
"""

from __future__ import annotations

from pyvhost.dataplane.access import load64
from pyvhost.dataplane.blocks import (
    BATCH,
    C_BURSTS,
    C_BYTES,
    C_DROPS,
    C_ERRORS,
    C_OVERSIZE,
    C_PACKETS,
    FAULT_DIRECTION,
    FAULT_HEADER,
    LONGEST_FRAME,
    MIN_FRAME,
    PORT_FD,
    PORT_LOOP,
    PORT_STREAM,
    PORT_SWITCH,
    SLOT_BYTES,
    SLOT_HEAD,
    SLOT_IN,
    SLOT_OUT_BYTES,
    Record,
    Records,
)
from pyvhost.dataplane.net_deliver import deliver, forward, guest_fault
from pyvhost.dataplane.net_send import send_fd, send_stream
from pyvhost.dataplane.policy import inline, kernel
from pyvhost.dataplane.split_ring import collect, count, publish, use_batch
from pyvhost.dataplane.tap_ring import record_sent


@inline
def _count(first_slot: int, header: int, chains: int, row: int) -> None:
    """Counts frames that have gone."""
    sent = 0
    for i in range(chains):
        sent += load64(first_slot + i * SLOT_BYTES + SLOT_OUT_BYTES) - header
    count(row, C_PACKETS, chains)
    count(row, C_BYTES, sent)


@inline
def _judge(ring: Record, batch: int, chains: int, header: int) -> int:
    """How many of the batch's chains are frames to send; the first that is none leaves its fault in the ring."""
    for i in range(chains):
        slot = batch + i * SLOT_BYTES
        if load64(slot + SLOT_IN) != 0 or load64(slot + SLOT_OUT_BYTES) < header:
            head = load64(slot + SLOT_HEAD)
            ring["fault"] = FAULT_DIRECTION if load64(slot + SLOT_IN) != 0 else FAULT_HEADER
            ring["fault_descriptor"] = head
            ring["fault_a"] = load64(slot + SLOT_OUT_BYTES)
            ring["fault_b"] = header
            return i
    return chains


@kernel
def transmit(worker: Record, rings: Records, ports: Records, index: int) -> int:
    """Takes one batch from a port's transmit ring; how many chains it was done with."""
    port = ports[index]
    ring = rings[port["tx"]]
    batch = worker["tx_batch"]
    row = ring["row"]
    kind = port["kind"]
    # Who only counts needs no payload; the kernel fetches its own.
    lines = 2 if kind in (PORT_LOOP, PORT_SWITCH) else 1 if kind == PORT_FD else 0
    chains = collect(ring, batch, 0, BATCH, 0, lines)
    if chains == 0:
        return 0
    header = port["header"]
    good = _judge(ring, batch, chains, header) if chains > 0 else 0
    done = 0
    at = 0
    while at < good:
        # Frames that no port can carry are taken out one by one; the runs between them go in one piece.
        size = load64(batch + at * SLOT_BYTES + SLOT_OUT_BYTES) - header
        if size < MIN_FRAME or size > LONGEST_FRAME:
            count(row, C_OVERSIZE if size > MIN_FRAME else C_ERRORS, 1)
            count(row, C_DROPS, 1)
            at += 1
            done = at
            continue
        end = at + 1
        while end < good:
            size = load64(batch + end * SLOT_BYTES + SLOT_OUT_BYTES) - header
            if size < MIN_FRAME or size > LONGEST_FRAME:
                break
            end += 1
        done = _send(worker, rings, ports, index, batch, at, end)
        if port["record"]:
            record_sent(port["record"], batch, at, done, header)
        if done < end:
            break
        at = end
    if done > 0:
        count(row, C_BURSTS, 1)
        use_batch(ring, batch, done)
        publish(ring)
    if chains < 0 or (done == good and good < chains):
        guest_fault(worker, rings, port["tx"])
    return done


@kernel
def _send(
    worker: Record, rings: Records, ports: Records, index: int, batch: int, first: int, end: int
) -> int:
    """Sends slots `first` to `end` to what is at the port's other end; the slot after the last done with."""
    port = ports[index]
    kind = port["kind"]
    header = port["header"]
    row = rings[port["tx"]]["row"]
    if kind in (PORT_FD, PORT_STREAM) and port["fd"] < 0:
        # The cable is out: what is sent is lost, not kept for whoever comes next.
        count(row, C_DROPS, end - first)
        return end
    if kind == PORT_FD:
        if not port["writable"]:
            return first
        return send_fd(worker, ports, index, header, rings[port["tx"]]["swap"], batch, first, end, row)
    if kind == PORT_STREAM:
        return (
            send_stream(worker, ports, index, header, batch, first, end, row) if port["writable"] else first
        )
    done = end
    if kind == PORT_LOOP:
        done = deliver(worker, rings, ports, index, index, batch, first, end, True)
    elif kind == PORT_SWITCH:
        done = forward(worker, rings, ports, index, batch, first, end)
    _count(batch + first * SLOT_BYTES, header, done - first, row)
    return done
