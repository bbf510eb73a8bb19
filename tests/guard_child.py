"""Processes in which the guard against SIGBUS and SIGSEGV is tried: what fails there ends the process it fails in.

Promises: every child ends by itself or is told how it died. Never: raises either in the test process.
"""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap

import pytest

# What each child starts with: a shared mapping of a memfd, as a front end hands one over.
PRELUDE = """
import ctypes, mmap, os, select, signal, threading
from pyvhost.dataplane import guard

PAGE = mmap.PAGESIZE

def mapping(pages):
    fd = os.memfd_create("guest")
    os.ftruncate(fd, pages * PAGE)
    memory = mmap.mmap(fd, pages * PAGE)
    return fd, memory, ctypes.addressof(ctypes.c_char.from_buffer(memory))

def heard(event):
    # Waits, without a limit: the test process has one.
    select.select([event], [], [])
    return int.from_bytes(os.read(event, 8), "little")
"""

both_modes = pytest.mark.parametrize("plain", [False, True], ids=["compiled", "plain"])


def child(script: str, plain: bool = False) -> subprocess.CompletedProcess[str]:
    environment = dict(os.environ)
    environment.pop("NUMBA_DISABLE_JIT", None)
    if plain:
        environment["NUMBA_DISABLE_JIT"] = "1"
    return subprocess.run(
        [sys.executable, "-c", PRELUDE + textwrap.dedent(script)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def succeeds(script: str, plain: bool = False) -> None:
    done = child(script, plain)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "the end\n"
