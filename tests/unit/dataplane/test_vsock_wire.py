"""The table that finds a packet's connection, and headers that lie in pieces."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest

from pyvhost.abi.virtio_vsock import OP_RW, TYPE_SEQPACKET, TYPE_STREAM, VsockHdr
from pyvhost.dataplane import blocks, vsock_wire
from pyvhost.dataplane import vsock_blocks as layout

Key = tuple[int, int, int, int]


class Table:
    """A guest's connections, with `buckets` buckets."""

    def __init__(self, buckets: int, seed: int) -> None:
        self.buckets = np.full(buckets, -1, np.int64)
        self.guests: Any = np.zeros(1, layout.GUEST)
        self.connections: Any = np.zeros(64, layout.CONNECTION)
        guest = self.guests[0]
        guest["table"], guest["table_mask"], guest["seed"] = self.buckets.ctypes.data, buckets - 1, seed

    def insert(self, slot: int, key: Key) -> None:
        record = self.connections[slot]
        record["type"], record["guest_port"], record["peer_cid"], record["peer_port"] = key
        vsock_wire.insert(self.guests[0], self.connections, slot)

    def remove(self, slot: int) -> None:
        vsock_wire.remove(self.guests[0], self.connections, slot)

    def find(self, key: Key) -> int:
        return int(vsock_wire.find(self.guests[0], self.connections, *key))


def keys(dice: random.Random, count: int) -> list[Key]:
    """Different ones, of few ports, so that they are alike."""
    made: set[Key] = set()
    while len(made) < count:
        made.add(
            (
                dice.choice((TYPE_STREAM, TYPE_SEQPACKET)),
                dice.choice((0, 1, 1024, 0xFFFFFFFF, dice.randrange(1 << 32))),
                dice.choice((2, 5, 0xFFFFFFFE)),
                dice.choice((0, 1, 1024, 0xFFFFFFFF, dice.randrange(1 << 32))),
            )
        )
    return sorted(made)


@pytest.mark.parametrize("buckets", [1, 4, 128])
def test_what_was_put_in_is_found_until_it_is_taken_out(buckets: int) -> None:
    dice = random.Random(buckets)
    table = Table(buckets, dice.randrange(1 << 62))
    known = dict(enumerate(keys(dice, 64)))
    there: set[int] = set()
    for _ in range(500):
        slot = dice.randrange(64)
        if slot in there:
            table.remove(slot)
            there.remove(slot)
        else:
            table.insert(slot, known[slot])
            there.add(slot)
        probe = dice.randrange(64)
        assert table.find(known[probe]) == (probe if probe in there else -1)
    assert {slot for slot in known if table.connections[slot]["open"]} == there


def test_where_a_key_is_looked_for_depends_on_the_secret() -> None:
    dice = random.Random(1)
    some = keys(dice, 40)
    places = []
    for seed in (1, 2, 1 << 40):
        table = Table(128, seed)
        places.append([vsock_wire.bucket(table.guests[0], *key) - table.guests[0]["table"] for key in some])
        assert all(0 <= place < 128 * 8 for place in places[-1])
    assert places[0] != places[1] != places[2]


@pytest.mark.parametrize("first", [44, 60, 1, 7, 43])
def test_a_header_in_pieces_is_read_whole(first: int) -> None:
    header = bytes(
        VsockHdr(src_cid=5, dst_cid=2, src_port=7, dst_port=0xFFFFFFFF, len=9, type=1, op=OP_RW, flags=3)
    ) + bytes(range(16))
    data = np.frombuffer(header, np.uint8)
    at = int(data.ctypes.data)
    pieces = [(at, min(first, len(header))), (at + first, len(header) - first)]
    iov = np.array([part for piece in pieces for part in piece], np.int64)
    slot = np.zeros(blocks.SLOT_BYTES // 8, np.int64)
    slot[blocks.SLOT_IOV // 8] = iov.ctypes.data
    read = np.zeros(6, np.int64)
    to = int(read.ctypes.data)
    vsock_wire.read_header(int(slot.ctypes.data), to)
    assert read.tobytes()[: layout.HEADER] == header[: layout.HEADER]
    assert vsock_wire.source_cid(to) == 5
    assert vsock_wire.packet_length(to) == 9
    assert (vsock_wire.packet_type(to), vsock_wire.packet_op(to), vsock_wire.packet_flags(to)) == (
        1,
        OP_RW,
        3,
    )
