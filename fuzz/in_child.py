"""What the fuzz targets that run case after case in one process have in common.

Promises: the cases run in a child, so that whatever becomes of it somebody is left who says at which case; a run
ends after `--seconds` and the case that is under way; a case is a function of seed and number.
Never: is a target itself, or imports what is fuzzed in the parent.
"""

from __future__ import annotations

import argparse
import mmap
import os
import random
import select
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Never

_ROOT = Path(__file__).resolve().parent.parent
_HANGS_AFTER_SECONDS = 300

#: The cases that are to be played, each with its number and its dice.
Cases = Iterator[tuple[int, random.Random]]


def give_up() -> Never:
    """End the child at once, with the exception that is being handled: nothing that was set up is taken down."""
    traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1)


def main(name: str, what: str, play: Callable[[Cases], None]) -> int:
    """A target's command; its exit status. `play` runs the cases that it is given, and raises if one fails."""
    parser = argparse.ArgumentParser(description=what)
    parser.add_argument("--seconds", type=float, default=30.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--case", type=int, help="only this one")
    arguments = parser.parse_args()

    current = mmap.mmap(-1, mmap.PAGESIZE)
    child = os.fork()
    if child == 0:
        try:
            sys.path[:0] = [str(_ROOT / "tests"), str(_ROOT / "src")]
            play(_cases(arguments, current))
            played = 1 if arguments.case is not None else int.from_bytes(current[:8], "little")
            print(f"{name}: {played} cases", flush=True)
        except BaseException:
            give_up()
        os._exit(0)
    hung = _wait(child, current)
    _, status = os.waitpid(child, 0)
    if status == 0:
        return 0
    case = int.from_bytes(current[:8], "little")
    code = os.waitstatus_to_exitcode(status)
    how = "does not end" if hung else f"ended by {signal.Signals(-code).name}" if code < 0 else "failed"
    print(f"{name}: {how}; again with: --seed {arguments.seed} --case {case}", file=sys.stderr)
    return 1


def _cases(arguments: argparse.Namespace, current: mmap.mmap) -> Cases:
    """The cases; `current` tells the parent which one is under way, and at the end how many there were."""
    end = time.monotonic() + arguments.seconds
    case = 0 if arguments.case is None else arguments.case
    while arguments.case is not None or time.monotonic() < end:
        current[:8] = case.to_bytes(8, "little")
        yield case, random.Random(f"{arguments.seed}/{case}")
        if arguments.case is not None:
            return
        case += 1
    current[:8] = case.to_bytes(8, "little")


def _wait(child: int, current: mmap.mmap) -> bool:
    """Until the child has ended; True: it had to be killed, for a case that did not end."""
    handle = os.pidfd_open(child)
    before = b""
    hung = False
    while not select.select([handle], [], [], _HANGS_AFTER_SECONDS)[0]:
        if current[:8] == before:
            hung = True
            os.kill(child, signal.SIGKILL)
        before = current[:8]
    os.close(handle)
    return hung
