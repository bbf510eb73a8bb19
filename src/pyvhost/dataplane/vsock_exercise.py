"""A guest's half and a host's program for the vsock benchmark: what moves bytes as fast as it can, and counts them.

The guest's side works on rings that a driver has set up and handed over: chains are prepared, used in their order,
and only indices and credit change. Each side sleeps when there is nothing to do, as a guest and a program do.

Promises: never more is sent than was granted; ends soon after it was told to. Never: is part of a device, looks at
payload, or checks what a device may not do.
"""

from __future__ import annotations

from typing import Final

from pyvhost.abi.virtio_vsock import (
    OP_REQUEST,
    OP_RESPONSE,
    OP_RST,
    OP_RW,
    OP_SHUTDOWN,
)
from pyvhost.dataplane import policy
from pyvhost.dataplane.access import (
    fence,
    load16,
    load16_acquire,
    load32,
    load64,
    load64_acquire,
    signal,
    store16,
    store16_release,
    store32,
    store64_release,
    sys_epoll_wait,
    sys_read,
    sys_write,
)
from pyvhost.dataplane.blocks import Record, Records, int64s
from pyvhost.dataplane.policy import inline, kernel

#: A guest's side of one connection; addresses are this process's.
SIDE: Final = int64s(
    # The rings: descriptors, available and used parts, entries; the next available and used indices; eventfds.
    "tx_desc",
    "tx_avail",
    "tx_used",
    "tx_num",
    "tx_idx",
    "tx_seen",
    "tx_kick",
    "rx_desc",
    "rx_avail",
    "rx_used",
    "rx_num",
    "rx_idx",
    "rx_seen",
    "rx_kick",
    # Where guest address 0 is.
    "memory",
    # An epoll descriptor of both rings' calls, edge by edge, and room for its answer.
    "epoll",
    "events",
    # Bytes a packet; the connection's credit, modulo 2**32.
    "size",
    "peer_buf_alloc",
    "peer_fwd_cnt",
    "tx_cnt",
    "fwd_cnt",
    "fwd_told",
    "update_after",
    # Set from outside to end it; counted for the outside: bytes, packets, sleeps, connections.
    "stop",
    "bytes",
    "packets",
    "sleeps",
    "done",
    # For connections: how many are under way, and the next one's port.
    "under_way",
    "port",
)


@inline
def _publish(avail: int, used: int, num: int, old: int, new: int, kick: int) -> None:
    """The index, and a kick if the device wants it (VIRTIO_RING_F_EVENT_IDX)."""
    store16_release(avail + 2, new)
    fence()
    if ((new - load16(used + 4 + 8 * num) - 1) & 0xFFFF) < ((new - old) & 0xFFFF):
        signal(kick)


@kernel
def _sleep(side: Record, tx_after: int) -> None:
    """Until something was received, or more than `tx_after` chains more were used (-1: no matter)."""
    store16(side["rx_avail"] + 4 + 2 * side["rx_num"], side["rx_seen"])
    if tx_after >= 0:
        store16(side["tx_avail"] + 4 + 2 * side["tx_num"], (side["tx_seen"] + tx_after) & 0xFFFF)
    fence()
    if load16_acquire(side["rx_used"] + 2) != side["rx_seen"]:
        return
    used = (load16_acquire(side["tx_used"] + 2) - side["tx_seen"]) & 0xFFFF
    if tx_after >= 0 and used > tx_after:
        return
    side["sleeps"] += 1
    sys_epoll_wait(side["epoll"], side["events"], 1, 1000)


@inline
def _received(side: Record) -> int:
    """The address of the header of the next packet received, 0: none."""
    if load16_acquire(side["rx_used"] + 2) == side["rx_seen"]:
        return 0
    head = load32(side["rx_used"] + 4 + 8 * (side["rx_seen"] % side["rx_num"]))
    return side["memory"] + load64(side["rx_desc"] + 16 * head)


@inline
def _give_back(side: Record) -> None:
    """The chain of the packet that `_received` told of goes into the ring again; not published."""
    head = load32(side["rx_used"] + 4 + 8 * (side["rx_seen"] % side["rx_num"]))
    store16(side["rx_avail"] + 4 + 2 * (side["rx_idx"] % side["rx_num"]), head)
    side["rx_idx"] = (side["rx_idx"] + 1) & 0xFFFF
    side["rx_seen"] = (side["rx_seen"] + 1) & 0xFFFF


@inline
def _publish_rx(side: Record, old: int) -> None:
    if side["rx_idx"] != old:
        _publish(side["rx_avail"], side["rx_used"], side["rx_num"], old, side["rx_idx"], side["rx_kick"])


@inline
def _publish_tx(side: Record, old: int) -> None:
    if side["tx_idx"] != old:
        _publish(side["tx_avail"], side["tx_used"], side["tx_num"], old, side["tx_idx"], side["tx_kick"])


@inline
def _free(side: Record) -> int:
    side["tx_seen"] = load16_acquire(side["tx_used"] + 2)
    return side["tx_num"] - ((side["tx_idx"] - side["tx_seen"]) & 0xFFFF)


@inline
def _next_header(side: Record) -> int:
    """The address of the header of the next chain to send, which is the one of its place in the ring."""
    return side["memory"] + load64(side["tx_desc"] + 16 * (side["tx_idx"] % side["tx_num"]))


@kernel
def guest_send(sides: Records, address: int) -> int:
    """Sends packets of `size` bytes as fast as ring and credit allow, until `stop`; -1: the connection has ended.

    `address` is that of the first of `sides`, here and below.
    """
    side = sides[0]
    while load64_acquire(address + _STOP) == 0:
        old = side["rx_idx"]
        header = _received(side)
        while header != 0:
            if load16(header + 30) == OP_RST:
                return -1
            side["peer_buf_alloc"] = load32(header + 36)
            side["peer_fwd_cnt"] = load32(header + 40)
            _give_back(side)
            header = _received(side)
        _publish_rx(side, old)
        under_way = (side["tx_cnt"] - side["peer_fwd_cnt"]) & 0xFFFFFFFF
        room = (side["peer_buf_alloc"] - under_way) // side["size"]
        free = _free(side)
        count = min(room, free)
        if count <= 0:
            _sleep(side, side["tx_num"] // 2 if free <= 0 else -1)
            continue
        old = side["tx_idx"]
        side["tx_idx"] = (old + count) & 0xFFFF
        side["tx_cnt"] = (side["tx_cnt"] + count * side["size"]) & 0xFFFFFFFF
        _publish_tx(side, old)
        store64_release(address + _PACKETS, side["packets"] + count)
    return 0


@kernel
def guest_receive(sides: Records, address: int) -> int:
    """Takes what comes and gives its credit back, until `stop`; -1: the connection has ended."""
    side = sides[0]
    while load64_acquire(address + _STOP) == 0:
        old = side["rx_idx"]
        got = 0
        packets = 0
        header = _received(side)
        while header != 0 and packets < side["rx_num"] // 4:
            op = load16(header + 30)
            if op == OP_RST:
                return -1
            if op == OP_RW:
                got += load32(header + 24)
                packets += 1
            _give_back(side)
            header = _received(side)
        if side["rx_idx"] == old:
            _sleep(side, -1)
            continue
        _publish_rx(side, old)
        side["fwd_cnt"] = (side["fwd_cnt"] + got) & 0xFFFFFFFF
        if ((side["fwd_cnt"] - side["fwd_told"]) & 0xFFFFFFFF) >= side["update_after"] and _free(side) > 0:
            store32(_next_header(side) + 40, side["fwd_cnt"])
            side["fwd_told"] = side["fwd_cnt"]
            old = side["tx_idx"]
            side["tx_idx"] = (old + 1) & 0xFFFF
            _publish_tx(side, old)
        store64_release(address + _PACKETS, side["packets"] + packets)
        store64_release(address + _BYTES, side["bytes"] + got)
    return 0


@inline
def _send_op(side: Record, op: int, port: int) -> None:
    """A packet without data from this guest's port; the rest of the header is prepared. Room has been seen to."""
    header = _next_header(side)
    store32(header + 16, port)
    store16(header + 30, op)
    store32(header + 32, 3 if op == OP_SHUTDOWN else 0)
    side["tx_idx"] = (side["tx_idx"] + 1) & 0xFFFF


@kernel
def guest_connect(sides: Records, address: int) -> int:
    """Connects, shuts down both ways and waits for the end, `size` at a time, until `stop`; -1: one was refused."""
    side = sides[0]
    while load64_acquire(address + _STOP) == 0:
        old = side["rx_idx"]
        sent = side["tx_idx"]
        free = _free(side)
        header = _received(side)
        while free > 0 and header != 0:
            op = load16(header + 30)
            if op == OP_RESPONSE:
                _send_op(side, OP_SHUTDOWN, load32(header + 20))
                side["bytes"] += 1
                free -= 1
            elif op == OP_RST:
                side["under_way"] -= 1
                store64_release(address + _DONE, side["done"] + 1)
            _give_back(side)
            header = _received(side)
        _publish_rx(side, old)
        while free > 0 and side["under_way"] < side["size"]:
            _send_op(side, OP_REQUEST, side["port"])
            side["port"] = 1024 + (side["port"] - 1023) % 1_000_000
            side["under_way"] += 1
            free -= 1
        if side["tx_idx"] == sent:
            _sleep(side, 0 if free <= 0 else -1)
            continue
        _publish_tx(side, sent)
    return 0


@kernel
def pour(fd: int, buffer: int, size: int, counted: int) -> int:
    """Writes `size` bytes again and again until that fails; bytes so far are stored at `counted`. -errno."""
    total = 0
    while True:
        done = sys_write(fd, buffer, size)
        if done <= 0:
            return done
        total += done
        store64_release(counted, total)


@kernel
def drain(fd: int, buffer: int, size: int, counted: int) -> int:
    """Reads up to `size` bytes again and again to the end; bytes so far are stored at `counted`. 0 or -errno."""
    total = 0
    while True:
        done = sys_read(fd, buffer, size)
        if done <= 0:
            return done
        total += done
        store64_release(counted, total)


_OFFSETS = {name: field[1] for name, field in (SIDE.fields or {}).items()}
_STOP: Final = _OFFSETS["stop"]
_PACKETS: Final = _OFFSETS["packets"]
_BYTES: Final = _OFFSETS["bytes"]
_DONE: Final = _OFFSETS["done"]


def prepare(sides: Records) -> None:
    """Compiles, or loads from the cache."""
    policy.prepare(
        "the vsock benchmark",
        [
            (guest_send, (sides, 0)),
            (guest_receive, (sides, 0)),
            (guest_connect, (sides, 0)),
            (pour, (0, 0, 0, 0)),
            (drain, (0, 0, 0, 0)),
        ],
    )
