"""The SCSI host device behind an IOMMU: addresses that mean something only while they are mapped."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from disk_scene import BLOCK, Kept, OnASocket, read_of, scene
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
    tmp_path: Path, kind: type[OnASocket] | type[Kept], caplog: pytest.LogCaptureFixture
) -> None:
    """A driver that unmaps a buffer is answered when nobody writes there any more, and need not wait for others."""
    store = kind()
    with GuestMemory(32 * MIB) as memory:
        iommu = Iommu(memory)
        with scene(tmp_path, store, memory=memory, iommu=iommu, event_buffers=0) as found:
            device, happened = found.device, list[str]()
            task = read_of(found)
            elsewhere = memory.user_address(memory.allocate(4096, 4096))

            def let_go() -> None:
                happened.append("it goes on")
                if isinstance(store, OnASocket):
                    store.answer(b"v" * 8 * BLOCK)
                else:
                    store.let_go()

            def invalidate() -> None:
                device.iotlb_update(0x1000, 4096, elsewhere, 3)
                device.iotlb_invalidate(0x1000, 4096)
                happened.append("elsewhere")
                assert device.poller is not None
                device.poller.call_soon_threadsafe(let_go)
                device.iotlb_invalidate(0, 1 << 64)
                happened.append("everywhere")

            found.ask(invalidate)
            assert happened == ["elsewhere", "it goes on", "everywhere"]
            content = b"".join(memory.read(at, size) for at, size in task.writable)
            assert content[-8 * BLOCK :] == (b"v" if isinstance(store, OnASocket) else bytes(1)) * 8 * BLOCK
            found.driver.wait_all([task])
            assert task.response is not None
            assert task.response.good
    assert "do not end" not in caplog.text, (
        "what shares a page with it, in a mapping of its own, was waited for"
    )
