"""A logical unit whose store isn't there yet: NOT READY, until the server is."""

from __future__ import annotations

from pathlib import Path

from pyvhost.host.poller import Poller
from pyvhost.scsi.nexus import Nexus
from pyvhost.scsi.stores import libnbd
from pyvhost.scsi.stores.nbd import NbdStore
from pyvhost.scsi.target import Target
from pyvhost.scsi.task import Task
from pyvhost.scsi.unit import LogicalUnit
from requirements import need
from scsi_scene import told
from stores import PATIENCE, nbdkit

NOT_READY = 2


def test_a_unit_is_not_ready_until_its_server_is_there(tmp_path: Path) -> None:
    try:
        libnbd.library()
    except libnbd.NbdError:
        need(False, "apt-get install libnbd0")
    with Poller() as poller:
        store = NbdStore(f"nbd+unix:///?socket={tmp_path / 'nbdkit.sock'}")
        unit = LogicalUnit(store)
        unit.open(poller)
        target, nexus = Target("target"), Nexus("one")
        target.add(0, unit)
        target.attach(nexus)
        late: list[bool] = []
        poller.call_later(PATIENCE, lambda: late.append(True))

        def do(cdb: str) -> Task:
            memory = memoryview(bytearray(4096))
            task = Task(bytes.fromhex(cdb), nexus, lambda _: None, tag=1, data_in=[memory])
            target.submit(task, 0)
            while not task.ended:
                poller.run_once()
                assert not late
            return task

        def ready() -> int:
            """What TEST UNIT READY says, when every unit attention has been told."""
            while (key := told(do("000000000000"))[0]) == 6:
                pass
            return key

        assert ready() == NOT_READY
        with nbdkit(tmp_path, "memory", "16M"):
            while ready() == NOT_READY:
                poller.run_once()
                assert not late
            assert ready() == 0
            capacity = do("25000000000000000000").data_in[0]
            assert int.from_bytes(capacity[:4]) == (16 << 20) // 512 - 1
            assert int.from_bytes(capacity[4:8]) == 512
            assert unit.write_through is False
            assert store.wce
            target.close()
            while store.online:
                poller.run_once()
                assert not late
