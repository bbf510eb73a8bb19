"""What a benchmark borrows from the machine and gives back: huge pages, two processors, their distance.

Promises: whatever was changed is changed back when the block is left, by an error or a signal too.
Never: measures a device.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

import numpy

from pyvhost.cli.bench.testpmd import Cores
from pyvhost.dataplane import pingpong

_NR_HUGEPAGES = Path("/proc/sys/vm/nr_hugepages")
#: Three testpmd (four in a self-check) of 256 MB each in 2 MB pages, and what cannot be placed.
HUGE_PAGES = 600
_GAMES = 5
_ROUNDS = 1000


class UnfitError(RuntimeError):
    """This machine cannot run the benchmark; the message says what would have to change."""


def pick_cores() -> Cores:
    """The first two processors this process may run on. Raises UnfitError when there is only one."""
    allowed = sorted(os.sched_getaffinity(0))
    if len(allowed) < 2:
        raise UnfitError(
            "a back end and a front end each need a processor of their own: 2 are needed, 1 is there"
        )
    return Cores(back_end=allowed[0], front_end=allowed[1])


def favour(pid: int, nice: int = -20) -> None:
    """Lets a process go before all others that are not favoured too, as far as this user may."""
    with contextlib.suppress(OSError):
        for task in os.listdir(f"/proc/{pid}/task"):
            os.setpriority(os.PRIO_PROCESS, int(task), nice)
    # Where sessions are groups of their own (sched(7), autogroup), a nice value counts only inside one.
    with contextlib.suppress(OSError):
        Path(f"/proc/{pid}/autogroup").write_text(str(nice))


@contextlib.contextmanager
def favoured() -> Iterator[None]:
    """Favours this process: it could not tell the others to change places if it had to wait behind them."""
    before = os.getpriority(os.PRIO_PROCESS, 0)
    favour(os.getpid())
    try:
        yield
    finally:
        favour(os.getpid(), before)


@contextlib.contextmanager
def scratch_directory() -> Iterator[Path]:
    """A short-named folder for sockets (their paths are limited to 107 bytes), removed at the end."""
    path = Path(tempfile.mkdtemp(prefix="pyvhost-bench-"))
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


@contextlib.contextmanager
def huge_pages(directory: Path, count: int = HUGE_PAGES) -> Iterator[Path]:
    """Mounts huge pages at `directory`, after making sure that `count` of them are free.

    Raises UnfitError without root, or when memory is too fragmented to give them.
    """
    if os.geteuid() != 0:
        raise UnfitError("testpmd needs huge pages, and setting them up needs root")
    directory.mkdir()
    # Relative, both times: others may use huge pages, and reserve more meanwhile.
    added = max(0, count - _free_huge_pages())
    mounted = False
    try:
        if added:
            _reserve(added)
            free = _free_huge_pages()
            if free < count:
                raise UnfitError(f"the kernel has {free} of {count} huge pages of 2 MB: free some memory")
        subprocess.run(
            ["mount", "-t", "hugetlbfs", "-o", "pagesize=2M", "pyvhost-bench", str(directory)], check=True
        )
        mounted = True
        yield directory
    finally:
        if mounted:
            subprocess.run(["umount", "--lazy", str(directory)], check=False)
        if added:
            _reserve(-added)


def _reserve(more: int) -> None:
    _NR_HUGEPAGES.write_text(str(max(0, int(_NR_HUGEPAGES.read_text()) + more)))


def _free_huge_pages() -> int:
    """Pages of the pool that nobody has or was promised (/proc/meminfo: the default size, 2 MB on x86)."""
    found = dict(
        re.findall(r"^HugePages_(Free|Rsvd):\s*(\d+)", Path("/proc/meminfo").read_text(), re.MULTILINE)
    )
    return int(found.get("Free", 0)) - int(found.get("Rsvd", 0))


@contextlib.contextmanager
def ended_by_signals() -> Iterator[None]:
    """Lets SIGTERM and SIGHUP unwind the blocks above, as SIGINT does."""

    def end(number: int, frame: object) -> NoReturn:
        raise SystemExit(128 + number)

    before = {number: signal.signal(number, end) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class CacheLine:
    """One cache line that two processors can pass to each other."""

    def __init__(self, cores: Cores) -> None:
        self._cores = cores
        # On a boundary of two lines: the neighbour that some processors fetch along belongs to nobody else.
        self._room = numpy.zeros(pingpong.ROOM + 128, dtype=numpy.uint8)
        self._address = -(-self._room.ctypes.data // 128) * 128
        pingpong.prepare()

    def round_trip_ns(self) -> float | None:
        """How long the line takes to the other processor and back, in ns; None when one side was kept away.

        About a millisecond of both processors' time. The least of a few games: an interrupt in the middle of one
        says nothing of the distance.
        """
        games = [self._game() for _ in range(_GAMES)]
        return min((game for game in games if game is not None), default=None)

    def _game(self) -> float | None:
        self._room[:] = 0
        elapsed = [0, 0]

        def take_part(core: int, side: int) -> None:
            os.sched_setaffinity(0, {core})
            elapsed[side] = pingpong.play(self._address, side, _ROUNDS)

        players = [
            threading.Thread(target=take_part, args=(core, side), name=f"line-{side}")
            for side, core in enumerate((self._cores.back_end, self._cores.front_end))
        ]
        for player in players:
            player.start()
        for player in players:
            player.join()
        return elapsed[0] / _ROUNDS if min(elapsed) >= 0 else None
