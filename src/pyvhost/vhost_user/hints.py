"""How far a front end came, and what a person should mend if it did not come all the way.

Promises: says in one sentence why no packet flows, where the conversation or /proc shows it: the driver never
started, the guest's memory is not shared, a ring never ran. Never: judges a front end that got all it came
for; needs a privilege (what /proc does not show goes unsaid).
"""

from __future__ import annotations

import os
from collections.abc import Iterable

from pyvhost.abi.vhost_user import Request

SHARE_IT = (
    "guest memory must be shared: QEMU wants -object memory-backend-memfd,id=mem,size=...,share=on and"
    " -machine memory-backend=mem, libvirt <memoryBacking> with <source type='memfd'/> and"
    " <access mode='shared'/>, Cloud Hypervisor --memory shared=on"
)

#: The requests that name memory.
MEMORY = (Request.SET_MEM_TABLE, Request.ADD_MEM_REG)


def private_memory(pid: int, fds: Iterable[int]) -> str:
    """What to say if the front end maps a file that it shares for itself alone; nothing if it does not.

    QEMU with share=off hands out a file of which it uses a private copy: everything works, and nothing the
    guest writes is ever seen here. `pid` is the front end's; 0 or one that can't be looked at says nothing.
    """
    wanted = {(os.major(s.st_dev), os.minor(s.st_dev), s.st_ino) for s in map(os.fstat, fds)}
    shared: dict[tuple[int, int, int], bool] = {}
    try:
        with open(f"/proc/{pid}/maps", encoding="utf-8", errors="replace") as maps:
            for line in maps:
                _, permissions, _, device, inode, *_ = line.split(maxsplit=5)
                major, minor = (int(number, 16) for number in device.split(":"))
                file = (major, minor, int(inode))
                if file in wanted:
                    shared[file] = shared.get(file, False) or permissions[3] == "s"
    except (OSError, ValueError):
        return ""
    if all(shared.values()):
        return ""
    return f"it maps the memory it names privately, so that nothing its guest writes is seen here: {SHARE_IT}"


class Progress:
    """What a front end has said so far."""

    def __init__(self) -> None:
        self._seen: set[int] = set()

    def saw(self, request: int) -> None:
        """A request came."""
        self._seen.add(request)

    @property
    def negotiated(self) -> bool:
        """Whether it came as far as SET_FEATURES."""
        return Request.SET_FEATURES in self._seen

    @property
    def named_memory(self) -> bool:
        """Whether it ever named a piece of memory."""
        return bool(self._seen.intersection(MEMORY))

    def farewell(self) -> str:
        """What the conversation lacked, now that it is over; nothing if it lacked nothing."""
        if not self._seen:
            return "it left without a word: something that only looked whether the socket answers"
        if not self.negotiated:
            return (
                "it left before SET_FEATURES: the guest's driver never started (is the guest up,"
                " has it the virtio driver?)"
            )
        if not self.named_memory:
            return f"it left without having named its memory: {SHARE_IT}"
        if Request.SET_VRING_KICK not in self._seen:
            return "it left before SET_VRING_KICK: no ring was ever started"
        return ""
