"""`pyvhost scsi` killed ten times in the middle of fio's verification in a guest: no error, and no wrong block.

The guest is UML, with a stock driver. It can't dial again, and QEMU before 8.2 refuses to for SCSI:
`vhost_user_relay` keeps the connection for it, and tracks requests in flight, as a later QEMU would.
"""

from __future__ import annotations

import random
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from interop.conftest import eventually
from pyvhost.cli.guests import UmlGuest
from pyvhost.cli.serving import Serving
from pyvhost.observe.reader import snapshot
from requirements import need_program
from vhost_user_relay import Relay

KILLS = 10
SIZE = 24 << 20
QUEUES = 1
#: Control, event and request queues.
VRINGS = 2 + QUEUES
PATIENCE = 60.0

# Writes and verifies until it is told that this is enough; each block is read back soon after it was written, and
# all of them at the end of a round.
LOAD = f"""
cd /dev/shm
echo 1 >/proc/sys/vm/overcommit_memory
touch rounds
cat >load.sh <<'end'
until [ -e enough ]; do
    fio --name=kills --filename=/dev/sda --direct=1 --ioengine=libaio --iodepth=32 --rw=randwrite --bsrange=4k-64k \
        --size={SIZE} --norandommap --randrepeat=0 --verify=crc32c --verify_fatal=1 --verify_backlog=256 \
        --eta=never >last 2>&1 || cp last wrong
    [ -e wrong ] && break
    echo round >>rounds
done
touch over
end
sh load.sh >/dev/null 2>&1 </dev/null &
"""
ENOUGH = """
cd /dev/shm
touch enough
until [ -e over ]; do sleep 0.1; done
if [ -e wrong ]; then cat wrong; exit 1; fi
wc -l <rounds
"""


class Disk:
    """`pyvhost scsi` over a file, one life after another."""

    def __init__(self, folder: Path) -> None:
        self.socket = folder / "disk"
        self._image = folder / "disk.img"
        with self._image.open("wb") as image:
            image.truncate(SIZE)
        self._serving: Serving | None = None

    def serve(self) -> None:
        """The next life."""
        arguments = ["scsi", "--socket-path", str(self.socket), "--request-queues", str(QUEUES)]
        arguments += ["--lun", str(self._image)]
        self._serving = Serving([*arguments, "--no-control"], [self.socket]).wait_ready()

    def kill(self) -> None:
        """With SIGKILL."""
        assert self._serving is not None
        serving, self._serving = self._serving, None
        serving.process.send_signal(signal.SIGKILL)
        serving.process.wait(PATIENCE)
        serving.close()

    def commands(self) -> int:
        """How many reads and writes this life has carried out."""
        assert self._serving is not None
        pid = self._serving.pid
        rows = [row for process in snapshot().processes if process.pid == pid for row in process.rows]
        return sum(row.get("reads") + row.get("writes") for row in rows if row.label("queue") == "0:0")

    def close(self) -> None:
        """The last life ends."""
        if self._serving is not None:
            serving, self._serving = self._serving, None
            serving.close()
            assert "Traceback" not in "\n".join(serving.lines)


def at_once(condition: Callable[[], bool]) -> None:
    """Waits for what is soon over: with no pause."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, "it did not come about"


@pytest.fixture
def folder() -> Iterator[Path]:
    """Short, for a socket's path."""
    with TemporaryDirectory(prefix="pyvhost-test-") as name:
        yield Path(name)


def test_killed_ten_times_while_fio_verifies(folder: Path) -> None:
    need_program("linux.uml", package="user-mode-linux")
    need_program("fio")
    chance = random.Random(10)
    with ExitStack() as stack:
        disk = Disk(folder)
        stack.callback(disk.close)
        disk.serve()
        relay = stack.enter_context(Relay(folder / "relay", disk.socket, VRINGS, 256))
        guest = stack.enter_context(UmlGuest(disks=[relay.path], memory_mib=256))
        guest.run("until [ -b /dev/sda ]; do sleep 0.1; done")
        guest.run(LOAD)
        left = []
        for _ in range(KILLS):
            # Not always at the same place.
            many = chance.randrange(50, 200)
            eventually(lambda many=many: disk.commands() >= many, PATIENCE)  # type: ignore[misc]
            at_once(lambda: relay.in_flight() >= 8)
            disk.kill()
            left.append(relay.in_flight())
            disk.serve()
        eventually(lambda: disk.commands() >= 100, PATIENCE)
        rounds = int(guest.run(ENOUGH, timeout=PATIENCE).output)
        complaints = guest.run("dmesg | grep -iE 'i/o error|abort|reset by|offline|timed out' || true").output
        assert rounds >= 1
        assert complaints == ""
        assert sum(left) > KILLS, f"killed in the middle of something: {left}"
