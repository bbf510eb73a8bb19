"""What a front end did wrong, with the kernel's errno for it and words that name the queue and the numbers.

Promises: `errno` is what Linux's vhost answers in the same case where it has such a case.
Never: raised for what a guest wrote into a ring (see `faults`) or for the host's own troubles.
"""

from __future__ import annotations


class VhostError(OSError):
    """A request that is refused: `errno`, and `strerror` for a person."""
