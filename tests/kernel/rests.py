"""When a kernel's vhost workers have done what there was to do.

Promises: what they were woken for before is done. Never: wakes one.
"""

from __future__ import annotations

import glob
import time
from pathlib import Path
from typing import Final

#: Seconds.
_PATIENCE: Final = 20.0


def kernel_rests() -> None:
    """Waits until the kernel's workers have done what they were woken for: all of their threads sleep.

    A kick has woken its worker by the time its write returns. Linux has them as its own threads, since 6.4 as ours.
    """
    end = time.monotonic() + _PATIENCE
    while any(_state(task) != "S" for task in _workers()):
        assert time.monotonic() < end, "a worker of the kernel's does not rest"
        time.sleep(0)


def _workers() -> list[str]:
    """The folders of the tasks in /proc that are called vhost-PID."""
    tasks = glob.glob("/proc/[0-9]*/task/[0-9]*")
    return [task for task in tasks if _read(f"{task}/comm").startswith("vhost-")]


def _state(task: str) -> str:
    """S: it sleeps, as one that has ended meanwhile does for ever."""
    stat = _read(f"{task}/stat")
    return stat.rpartition(")")[2].split()[0] if stat else "S"


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""
