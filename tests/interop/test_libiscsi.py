"""libiscsi's test suite against the SCSI target, through a small iSCSI portal of the tests' own.

The portal isn't what is judged: tests of iSCSI's own protocol errors are left out.
"""

from __future__ import annotations

import re
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from iscsi_portal import Portal
from pyvhost.host.poller import Poller
from pyvhost.scsi.stores.memory import MemoryStore
from pyvhost.scsi.target import Target
from pyvhost.scsi.unit import LogicalUnit
from requirements import need_program

SIZE = 64 << 20


@contextmanager
def portal(
    tmp_path: Path, *, block_size: int = 512, removable: bool = False, atomic: int = 0
) -> Iterator[str]:
    """A target with one unit in memory, served by a thread; its URL."""
    poller = Poller()
    target = Target("libiscsi")
    store = MemoryStore(SIZE, block_size=block_size)
    unit = LogicalUnit(store, removable=removable, aptpl=tmp_path / "reservations")
    unit.open(poller)
    store.atomic_max = atomic  # nothing here loses power
    target.add(0, unit)
    served = Portal(poller, target)
    thread = threading.Thread(target=poller.run)
    thread.start()
    try:
        yield served.url
    finally:

        def end() -> None:
            served.close()
            target.close(poller.stop)

        poller.call_soon_threadsafe(end)
        thread.join(30)
        assert not thread.is_alive()
        poller.close()


#: What depends on the size of a block, or on a second way to the unit, which wants an empty disk; the rest takes a
#: minute and a half more.
SOME = ("MultipathIO", "Read10", "Write16", "ReadCapacity16", "GetLBAStatus", "Unmap")


def passed(url: str, tests: str, *, twice: bool) -> int:
    """Runs tests, of which none fails; how many there were."""
    program = need_program("iscsi-test-cu", package="libiscsi-bin")
    ended = subprocess.run(
        [program, "--dataloss", "--silent", "--normal", "--ignore", "--test", tests, *[url] * (1 + twice)],
        capture_output=True,
        text=True,
        errors="replace",
        timeout=300,
        check=False,
    )
    said = ended.stdout + ended.stderr
    summary = re.search(r"tests +(\d+) +(\d+) +(\d+) +(\d+)", said)
    assert summary is not None, said[-4000:]
    total, ran, passed, failed = map(int, summary.groups())
    assert failed == 0, said[-4000:]
    assert passed == ran == total
    return total


def test_scsi_families_pass(tmp_path: Path) -> None:
    # With a removable medium there are tests that don't reckon with a second way's unit attention after a reset.
    with portal(tmp_path, block_size=512, removable=True, atomic=1 << 20) as url:
        assert passed(url, "SCSI", twice=False) > 150


def test_blocks_of_4096_bytes_and_two_ways_to_them(tmp_path: Path) -> None:
    with portal(tmp_path, block_size=4096, removable=False, atomic=1 << 20) as url:
        assert sum(passed(url, f"SCSI.{family}", twice=True) for family in SOME) > 20
