"""A store in memory: a disk that is empty when it is opened and forgotten when it is closed.

Promises: only what was written takes memory. Never: touches the file system.
"""

from __future__ import annotations

import mmap
import os

from pyvhost.host import memfd
from pyvhost.host.poller import Poller
from pyvhost.scsi.stores.descriptor import DescriptorStore


class MemoryStore(DescriptorStore):
    """`size` bytes of memory, all zero. ValueError: no whole number of blocks."""

    def __init__(self, size: int, *, block_size: int = 512, read_only: bool = False, spec: str = "") -> None:
        super().__init__(threads=2)
        if size <= 0 or size % block_size:
            raise ValueError(f"{size} bytes are no whole number of blocks of {block_size}")
        self.spec = spec or f"memory:{size}"
        self.block_size = block_size
        self.read_only = read_only
        self._size = size
        # A loss of power would take all of it, not half a write.
        self.atomic_max = 1 << 20

    def open(self, poller: Poller) -> None:
        """Make the memory file."""
        self.fd = memfd.create("pyvhost-disk", self._size, seals=0)
        self.size = self._size
        self.can_unmap = not self.read_only
        self.can_write_zeroes = True
        self.unmap_granularity = mmap.PAGESIZE
        # Memory files can be given holes, and no more than that.
        self._ranges = False
        self._start(poller, "memory")

    def resize(self, size: int) -> None:
        """Make it `size` bytes; the logical unit is told. ValueError: no whole number of blocks."""
        if size <= 0 or size % self.block_size:
            raise ValueError(f"{size} bytes are no whole number of blocks of {self.block_size}")
        self._size = size
        if self.fd >= 0:
            os.ftruncate(self.fd, size)
            self.check_size()

    def _measure(self, fd: int) -> int:
        return os.fstat(fd).st_size
