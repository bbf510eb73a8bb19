"""The table in which a back end notes the chains it has in hand, so that the next one finds them again.

A vhost-user front end asks the back end for it (GET_INFLIGHT_FD), keeps it, and gives it to the back end that
comes after (SET_INFLIGHT_FD). The front end never needs to look inside; a test may. Source: vhost-user,
"Inflight I/O tracking".

Promises: the file is closed once. Never: writes to the table.
"""

from __future__ import annotations

import ctypes
import os
from types import TracebackType
from typing import Self

from pyvhost.abi import vhost_user as abi
from pyvhost.driver.errors import DeviceError

_ALIGN = 64


class Inflight:
    """`mmap_size` bytes at `mmap_offset` of the file `fd`, which this owns; queues and their size in entries."""

    def __init__(self, fd: int, mmap_size: int, mmap_offset: int, num_queues: int, queue_size: int) -> None:
        self.fd = fd
        self.mmap_size = mmap_size
        self.mmap_offset = mmap_offset
        self.num_queues = num_queues
        self.queue_size = queue_size

    def _region(self, index: int) -> bytes:
        """The bytes that belong to split ring `index`."""
        if not 0 <= index < self.num_queues:
            raise ValueError(f"queue {index} of {self.num_queues}")
        size = ctypes.sizeof(abi.QueueRegionSplit) + self.queue_size * ctypes.sizeof(abi.DescStateSplit)
        size = -(-size // _ALIGN) * _ALIGN
        if size * self.num_queues > self.mmap_size:
            raise DeviceError(
                f"{self.num_queues} queues of {self.queue_size} need {size * self.num_queues} bytes, the table"
                f" has {self.mmap_size}"
            )
        # A file's length is its owner's: read, not mapped.
        data = os.pread(self.fd, size, self.mmap_offset + index * size)
        if len(data) < size:
            raise DeviceError(f"the inflight file ends before queue {index}")
        return data

    def header(self, index: int) -> abi.QueueRegionSplit:
        """What the back end notes of split ring `index` as a whole."""
        return abi.QueueRegionSplit.from_buffer_copy(self._region(index))

    def heads(self, index: int) -> list[int]:
        """The heads that split ring `index` has in flight, in the order in which they were taken."""
        data = self._region(index)
        first = ctypes.sizeof(abi.QueueRegionSplit)
        step = ctypes.sizeof(abi.DescStateSplit)
        states = [
            abi.DescStateSplit.from_buffer_copy(data, first + at * step) for at in range(self.queue_size)
        ]
        flying = [(int(state.counter), head) for head, state in enumerate(states) if state.inflight]
        return [head for _, head in sorted(flying)]

    def close(self) -> None:
        """Close the file; nothing happens the second time."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
