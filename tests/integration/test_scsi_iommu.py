"""The SCSI host device behind an IOMMU: addresses that mean something only while they are mapped."""

from __future__ import annotations

import random
import threading
from pathlib import Path

import pytest

from back_end import PATIENCE
from disk_scene import BLOCK, Kept, OnASocket, go_on, read_of, scene, waiting
from pyvhost.driver import cdb
from pyvhost.driver.iommu import Iommu
from pyvhost.driver.memory import MIB, GuestMemory

#: Served by the compiled loop, and by Python alone.
EITHER = pytest.mark.parametrize("spec", ["memory:1M", "memory:1M,delay=0"])


@pytest.mark.parametrize("by_page", [False, True])
@EITHER
def test_behind_an_iommu(tmp_path: Path, spec: str, by_page: bool) -> None:
    with GuestMemory(32 * MIB) as memory:
        iommu = Iommu(memory, by_page=by_page)
        with scene(tmp_path, spec, memory=memory, iommu=iommu, event_buffers=0) as found:
            for number in range(40):
                data = random.Random(number).randbytes(32 * BLOCK)
                assert found.driver.command(0, 0, cdb.write10(number, 32), data).good
                got = found.driver.command(0, 0, cdb.read10(number, 32), data_in_length=len(data))
                assert got.data == data


@pytest.mark.parametrize("kind", [OnASocket, Kept])
def test_a_ring_that_is_nowhere_when_a_task_ends(tmp_path: Path, kind: type[OnASocket] | type[Kept]) -> None:
    """Its used ring has no entry in the IOTLB any more: what was used is shown when it has one again."""
    store = kind()
    with GuestMemory(32 * MIB) as memory:
        iommu = Iommu(memory)
        with scene(tmp_path, store, memory=memory, iommu=iommu, event_buffers=0) as found:
            driver = found.driver
            task = read_of(found)
            used = driver.requests[0].ring.addresses.used
            found.front.iotlb_invalidate(used, 1)
            found.front.sync()
            if isinstance(store, OnASocket):
                store.answer(b"u" * 8 * BLOCK)
            else:
                found.ask(store.let_go)
            found.ask(lambda: None)
            driver.wait_all([task])
            assert task.response is not None
            assert task.response.good


@pytest.mark.parametrize("kind", [OnASocket, Kept])
def test_an_invalidation_waits_for_what_is_written_into_the_range(
    tmp_path: Path, kind: type[OnASocket] | type[Kept], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A driver that unmaps a buffer is answered when nobody writes there any more, and need not wait for others."""
    store = kind()
    with GuestMemory(32 * MIB) as memory, waiting(monkeypatch) as waits:
        iommu = Iommu(memory)
        with scene(tmp_path, store, memory=memory, iommu=iommu, event_buffers=0) as found:
            task = read_of(found)
            elsewhere = memory.user_address(memory.allocate(4096, 4096))
            found.front.iotlb_update(0x1000, 4096, elsewhere, 3)
            found.front.iotlb_invalidate(0x1000, 4096)
            invalidating = threading.Thread(target=lambda: found.front.iotlb_invalidate(0, 1 << 64))
            invalidating.start()
            waits()
            assert invalidating.is_alive()
            go_on(found, store)
            invalidating.join(PATIENCE)
            content = b"".join(memory.read(at, size) for at, size in task.writable)
            assert content[-8 * BLOCK :] == (b"g" if isinstance(store, OnASocket) else bytes(1)) * 8 * BLOCK
            found.driver.wait_all([task])
            assert task.response is not None
            assert task.response.good
