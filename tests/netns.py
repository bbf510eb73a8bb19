"""A network namespace of a test's own: whatever interfaces it makes are nobody else's, and go with it.

    with network_namespace() as ip:
        ip("link add name v0 type veth peer name v1")

The thread of the test is in it, and so are the programs that it starts. Needs root: `need_root()` first.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from requirements import need_program, need_root

CLONE_NEWNET = 0x40000000

_libc = ctypes.CDLL(None, use_errno=True)


def _check(result: int) -> None:
    if result:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


@contextmanager
def network_namespace() -> Iterator[Callable[[str], str]]:
    """Enters a new network namespace with its loopback up, and leaves it at the end.

    What it gives runs `ip` with the words of its argument, and answers with what that printed.
    """
    need_root()
    program = need_program("ip", package="iproute2")

    def ip(words: str) -> str:
        done = subprocess.run([program, *words.split()], capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"ip {words}: {done.stderr}"
        return done.stdout

    home = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    try:
        _check(_libc.unshare(CLONE_NEWNET))
        try:
            ip("link set lo up")
            yield ip
        finally:
            _check(_libc.setns(home, CLONE_NEWNET))
    finally:
        os.close(home)


def way_out_of(ip: Callable[[str], str]) -> None:
    """An interface with an address and a default route, which leads to nobody: passt wants to see one."""
    ip("link add name out type veth peer name far")
    ip("addr add 10.9.0.2/24 dev out")
    ip("link set out up")
    ip("link set far up")
    ip("route add default via 10.9.0.1")
