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

import pytest

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


@pytest.mark.parametrize(("block_size", "removable"), [(512, True), (4096, False)])
def test_scsi_families_pass(tmp_path: Path, block_size: int, removable: bool) -> None:
    program = need_program("iscsi-test-cu", package="libiscsi-bin")
    with portal(tmp_path, block_size=block_size, removable=removable, atomic=1 << 20) as url:
        # The same URL twice is two ways to one unit, for the multipath tests. With a removable medium there are
        # tests that don't reckon with the second way's unit attention after a reset.
        urls = [url] if removable else [url, url]
        ended = subprocess.run(
            [program, "--dataloss", "--silent", "--normal", "--ignore", "--test", "SCSI", *urls],
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
    assert passed == ran == total > 150
