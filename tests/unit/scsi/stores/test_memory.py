"""A disk in memory."""

from __future__ import annotations

import os

import pytest

from pyvhost.host.poller import Poller
from pyvhost.scsi.stores.memory import MemoryStore
from stores import Disk

MIB = 1 << 20


def test_it_is_empty_keeps_what_is_written_and_forgets_it_when_closed(poller: Poller) -> None:
    store = MemoryStore(1 << 40)
    with Disk(store, poller) as disk:
        assert not store.wce
        assert disk.read(1 << 39, 4096) == bytes(4096)
        assert disk.write(1 << 39, b"m" * 4096, cuts=[1, 77], fua=True) == 0
        assert disk.flush() == 0
        assert disk.read((1 << 39) - 512, 1024) == bytes(512) + b"m" * 512
    with Disk(store, poller) as disk:
        assert disk.read(1 << 39, 4096) == bytes(4096)


def test_what_is_discarded_takes_no_memory(poller: Poller) -> None:
    with Disk(MemoryStore(64 * MIB), poller) as disk:
        assert disk.write(0, b"m" * (8 * MIB)) == 0
        assert disk.mapped(0, 8 * MIB)
        assert disk.discard(0, 8 * MIB) == 0
        assert not disk.mapped(0, 64 * MIB)
        assert os.fstat(disk.store.fd).st_blocks == 0
        assert disk.zero(MIB, MIB) == 0
        assert disk.mapped(MIB, MIB), "nobody asked for its space back"


def test_it_can_be_made_larger_and_smaller(poller: Poller) -> None:
    store = MemoryStore(MIB)
    with Disk(store, poller) as disk:
        for size in (2 * MIB, MIB // 2):
            store.resize(size)
            disk.until(lambda size=size: disk.sizes[-1:] == [size])  # type: ignore[misc]
            assert disk.write(size - 512, b"r" * 512) == 0
    with pytest.raises(ValueError, match="blocks"):
        store.resize(1000)


def test_sizes_that_are_no_blocks_are_refused() -> None:
    for size in (0, -512, 100):
        with pytest.raises(ValueError, match="blocks"):
            MemoryStore(size)
    with pytest.raises(ValueError, match="blocks of 4096"):
        MemoryStore(512, block_size=4096)
