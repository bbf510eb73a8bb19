"""How far a front end came, and what a person should mend if it did not come all the way.

Promises: `farewell` says in one sentence why no packet flowed, where the conversation shows it: the driver
never started, memory was never shared, a ring never ran. Never: judges a front end that got all it came for.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable

from pyvhost.abi.vhost_user import Request

SHARE_IT = (
    "guest memory must be shared: QEMU wants -object memory-backend-memfd,id=mem,size=...,share=on and"
    " -machine memory-backend=mem, libvirt <memoryBacking> with <source type='memfd'/> and"
    " <access mode='shared'/>, Cloud Hypervisor --memory shared=on"
)

_MEMORY = (Request.SET_MEM_TABLE, Request.ADD_MEM_REG)


def _blocks(fd: int) -> int:
    """How much a file holds; what is no plain file (a DAX device) counts as full."""
    status = os.fstat(fd)
    return status.st_blocks if stat.S_ISREG(status.st_mode) else 1


class Progress:
    """What a front end has said so far."""

    def __init__(self) -> None:
        self._seen: set[int] = set()
        self._blocks: int | None = None
        self._warned = False

    def saw(self, request: int) -> None:
        """A request came."""
        self._seen.add(request)

    @property
    def negotiated(self) -> bool:
        """Whether it came as far as SET_FEATURES."""
        return Request.SET_FEATURES in self._seen

    def new_table(self, fds: Iterable[int]) -> None:
        """All memory was named anew."""
        self._blocks = None
        self.more_memory(fds)

    def more_memory(self, fds: Iterable[int]) -> None:
        """Memory was named; its descriptors are only looked at."""
        self._blocks = (self._blocks or 0) + sum(_blocks(fd) for fd in fds)

    def ring_started(self) -> str:
        """What to say when a ring starts; nothing most of the time.

        A guest that starts a ring has written to its memory. If the files it shared hold not one page, it
        wrote elsewhere: QEMU with share=off hands out a file that it does not use itself.
        """
        if self._warned or self._blocks != 0:
            return ""
        self._warned = True
        return f"its memory files hold nothing although a ring starts; if no packet flows, {SHARE_IT}"

    def farewell(self) -> str:
        """What the conversation lacked, now that it is over; nothing if it lacked nothing."""
        if not self._seen:
            return "it left without a word: something that only looked whether the socket answers"
        if not self.negotiated:
            return (
                "it left before SET_FEATURES: the guest's driver never started (is the guest up,"
                " has it the virtio driver?)"
            )
        if not self._seen.intersection(_MEMORY):
            return f"it left without having named its memory: {SHARE_IT}"
        if Request.SET_VRING_KICK not in self._seen:
            return "it left before SET_VRING_KICK: no ring was ever started"
        return ""
