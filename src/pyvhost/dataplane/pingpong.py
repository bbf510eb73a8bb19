"""A cache line passed between two processors and back: how far apart they are, in nanoseconds.

Every figure of a polling back end is ruled by this distance, which on a virtual machine changes by itself;
the benchmarks print it beside each row.

Promises: ends by itself, even when the other side never comes.
Never: is part of a device.
"""

from __future__ import annotations

from pyvhost.dataplane import policy
from pyvhost.dataplane.access import clock_ns, load64_acquire, store64_release
from pyvhost.dataplane.policy import kernel

#: Bytes needed at the address: the word's own pair of lines, then each side's scratch space for the clock.
ROOM = 128 + 2 * 64

# A tenth of a second of looking, about; the other thread may have to be scheduled first.
_PATIENCE = 100_000_000


@kernel
def play(address: int, side: int, rounds: int) -> int:
    """Passes the word at `address` to and fro `rounds` times; side 0 serves, side 1 returns.

    `address`: `ROOM` bytes, aligned to 128. Both sides call this at once, on their own threads, the word
    being zero. Returns ns, or -1 when the other side stayed away. The first round, in which the two meet, is
    not timed.
    """
    scratch = address + 128 + 64 * side
    started = 0
    for number in range(rounds + 1):
        if number == 1:
            started = clock_ns(scratch)
        if side == 0:
            store64_release(address, 2 * number + 1)
        awaited = 2 * number + 2 - side
        looks = 0
        while load64_acquire(address) != awaited:
            looks += 1
            if looks > _PATIENCE:
                return -1
        if side == 1:
            store64_release(address, 2 * number + 2)
    return clock_ns(scratch) - started


def prepare() -> None:
    """Compiles, or loads from the cache."""
    policy.prepare("the cache line's game", [(play, (0, 0, 0))])
