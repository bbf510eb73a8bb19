"""Vsock's packet header, and the table that finds a packet's connection (virtio 1.2, 5.10.6).

Promises: a header is read once, into this process's memory, and judged there; how ports are chosen does not decide
how long a search takes, for the hash is mixed with a secret. Never: looks at a payload.
"""

from __future__ import annotations

from typing import Final

from pyvhost.dataplane.access import (
    load16,
    load32,
    load64,
    load64_acquire,
    signal,
    store16,
    store32,
    store64,
    store64_release,
)
from pyvhost.dataplane.blocks import SLOT_IOV, Record, Records
from pyvhost.dataplane.frames import gather
from pyvhost.dataplane.policy import inline, kernel
from pyvhost.dataplane.vsock_blocks import (
    ENTRY_A,
    ENTRY_BYTES,
    ENTRY_FLAGS,
    ENTRY_GUEST_PORT,
    ENTRY_KIND,
    ENTRY_OP,
    ENTRY_PEER_CID,
    ENTRY_PEER_PORT,
    ENTRY_SLOT,
    ENTRY_TYPE,
    HEADER,
    QUEUE_ENTRIES,
    QUEUE_PUT,
    QUEUE_TAKEN,
    TODO_PACKET,
)

WORD: Final = 0xFFFFFFFF


@inline
def read_header(slot: int, to: int) -> None:
    """Copies a transmitted chain's header, which it has, to `to`: once."""
    iov = load64(slot + SLOT_IOV)
    if load64(iov + 8) >= HEADER:
        source = load64(iov)
        for i in range(5):
            store64(to + 8 * i, load64(source + 8 * i))
        store32(to + 40, load32(source + 40))
    else:
        gather(iov, 0, to, HEADER)


@inline
def write_header(
    to: int,
    cid: int,
    peer_cid: int,
    peer_port: int,
    guest_port: int,
    kind: int,
    op: int,
    length: int,
    flags: int,
) -> None:
    """Writes a packet's header for the guest; its credit is `write_credit`'s."""
    store64(to, peer_cid)
    store64(to + 8, cid)
    store32(to + 16, peer_port)
    store32(to + 20, guest_port)
    store32(to + 24, length)
    store16(to + 28, kind)
    store16(to + 30, op)
    store32(to + 32, flags)


@inline
def source_cid(header: int) -> int:
    return load64(header)


@inline
def packet_length(header: int) -> int:
    return load32(header + 24)


@inline
def packet_type(header: int) -> int:
    return load16(header + 28)


@inline
def packet_op(header: int) -> int:
    return load16(header + 30)


@inline
def packet_flags(header: int) -> int:
    return load32(header + 32)


@inline
def bucket(guest: Record, kind: int, guest_port: int, peer_cid: int, peer_port: int) -> int:
    """Address of a key's bucket."""
    # No product reaches 63 bits: what overflows is undefined.
    seed = guest["seed"]
    mixed = ((guest_port ^ seed) & WORD) * 0x2545F491
    mixed = ((mixed >> 29 ^ peer_port ^ seed >> 32) & WORD) * 0x2C1B3C6D
    mixed = ((mixed >> 29 ^ peer_cid ^ kind << 24) & WORD) * 0x297A2D39
    return guest["table"] + 8 * (mixed >> 29 & guest["table_mask"])


@kernel
def find(
    guest: Record, connections: Records, kind: int, guest_port: int, peer_cid: int, peer_port: int
) -> int:
    """The connection of a key, or -1."""
    slot = load64(bucket(guest, kind, guest_port, peer_cid, peer_port))
    while slot >= 0:
        connection = connections[slot]
        if (
            connection["guest_port"] == guest_port
            and connection["peer_port"] == peer_port
            and connection["peer_cid"] == peer_cid
            and connection["type"] == kind
        ):
            return slot
        slot = connection["bucket_next"]
    return -1


@kernel
def insert(guest: Record, connections: Records, slot: int) -> None:
    """Puts a connection into its guest's table."""
    connection = connections[slot]
    at = bucket(
        guest, connection["type"], connection["guest_port"], connection["peer_cid"], connection["peer_port"]
    )
    connection["bucket_next"] = load64(at)
    connection["open"] = 1
    store64(at, slot)


@kernel
def remove(guest: Record, connections: Records, slot: int) -> None:
    """Takes it out."""
    connection = connections[slot]
    at = bucket(
        guest, connection["type"], connection["guest_port"], connection["peer_cid"], connection["peer_port"]
    )
    connection["open"] = 0
    here = load64(at)
    if here == slot:
        store64(at, connection["bucket_next"])
        return
    while here >= 0:
        following = connections[here]["bucket_next"]
        if following == slot:
            connections[here]["bucket_next"] = connection["bucket_next"]
            return
        here = following


@inline
def todo_room(guest: Record) -> int:
    """How many more entries Python's queue takes."""
    todo = guest["todo"]
    # Pairs with Python's release store, behind its last use of an entry.
    return guest["todo_mask"] + 1 - (load64(todo + QUEUE_PUT) - load64_acquire(todo + QUEUE_TAKEN))


@kernel
def speak(guest: Record) -> None:
    """Wakes Python if it was told something."""
    if guest["news"]:
        guest["news"] = 0
        signal(guest["python_fd"])


@inline
def _entry(guest: Record) -> int:
    todo = guest["todo"]
    return todo + QUEUE_ENTRIES + (load64(todo + QUEUE_PUT) & guest["todo_mask"]) * ENTRY_BYTES


@inline
def _put(guest: Record) -> None:
    todo = guest["todo"]
    # Pairs with Python's acquire load of the number.
    store64_release(todo + QUEUE_PUT, load64(todo + QUEUE_PUT) + 1)
    guest["news"] = 1


@kernel
def tell(guest: Record, kind: int, slot: int, a: int) -> None:
    """Tells Python of a connection; there is room (`TOLD_AT_MOST`)."""
    entry = _entry(guest)
    store64(entry + ENTRY_KIND, kind)
    store64(entry + ENTRY_SLOT, slot)
    store64(entry + ENTRY_A, a)
    _put(guest)


@kernel
def hand_over(guest: Record, header: int, slot: int) -> None:
    """Gives Python a packet; there is room."""
    entry = _entry(guest)
    store64(entry + ENTRY_KIND, TODO_PACKET)
    store64(entry + ENTRY_SLOT, slot)
    store64(entry + ENTRY_TYPE, packet_type(header))
    store64(entry + ENTRY_GUEST_PORT, load32(header + 16))
    store64(entry + ENTRY_PEER_CID, load64(header + 8))
    store64(entry + ENTRY_PEER_PORT, load32(header + 20))
    store64(entry + ENTRY_OP, packet_op(header) | load32(header + 36) << 32)
    store64(entry + ENTRY_FLAGS, packet_flags(header) | load32(header + 40) << 32)
    _put(guest)
