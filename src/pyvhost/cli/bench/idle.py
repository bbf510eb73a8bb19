"""What devices cost that nobody uses: a hundred of them in one process, each with a front end and running rings.

Promises: processor time is exact (the scheduler's nanoseconds), memory is the kernel's own account of the
process; both are read while nothing is sent.
Never: judges.
"""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass
from pathlib import Path

from pyvhost.cli.bench import usage
from pyvhost.cli.bench.backend import BackEnd, net_arguments
from pyvhost.cli.bench.results import IdleResult
from pyvhost.driver.memory import GuestMemory
from pyvhost.driver.net import NetDriver
from pyvhost.driver.vhost_user import VhostUserFrontend

DEVICES = 100
#: Attaching has its echoes (a last round of busy polling, allocations); they are over after this, in seconds.
_SETTLE_SECONDS = 1.0


@dataclass(frozen=True)
class _Seen:
    cpu_seconds: float
    threads: int
    memory: usage.Memory


def _observe(scratch: Path, transcripts: Path, devices: int, seconds: float) -> _Seen:
    name = f"idle-{devices}"
    sockets = [scratch / f"{name}-{index}" for index in range(devices)]
    with contextlib.ExitStack() as stack:
        back = stack.enter_context(
            BackEnd(name, net_arguments(sockets, "null"), transcript=transcripts / f"{name}-back.log")
        )
        back.wait_ready(sockets)
        for path in sockets:
            memory = stack.enter_context(contextlib.closing(GuestMemory(2 << 20)))
            front = stack.enter_context(VhostUserFrontend.connect(path))
            driver = NetDriver(front, memory)
            stack.callback(driver.close)
            driver.start()
        time.sleep(_SETTLE_SECONDS)
        before = usage.cpu_seconds_exact(back.pid)
        time.sleep(seconds)
        used = usage.cpu_seconds_exact(back.pid) - before
        threads = sum(1 for _ in Path(f"/proc/{back.pid}/task").iterdir())
        return _Seen(used, threads, usage.memory(back.pid))


def measure(scratch: Path, transcripts: Path, *, devices: int = DEVICES, seconds: float = 5.0) -> IdleResult:
    """Observes a process with `devices` idle devices, and one with a single one for its memory."""
    one = _observe(scratch, transcripts, 1, 0.1)
    many = _observe(scratch, transcripts, devices, seconds)
    return IdleResult(
        devices=devices,
        seconds=seconds,
        cpu_seconds=many.cpu_seconds,
        threads=many.threads,
        rss_kb=many.memory.rss,
        pss_kb=many.memory.pss,
        rss_one_kb=one.memory.rss,
        pss_one_kb=one.memory.pss,
    )
