"""What a device driver needs of a front end, whichever way that reaches its back end.

vhost-user (`driver.vhost_user`) is one; ioctls (`driver.vhost_ioctl`), on a device in the same process or a
kernel's character device, another. `FrontEnd` is enough to move frames; `LogFrontEnd` is what a migration
needs, `iommu.IotlbFrontEnd` what an IOMMU does.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from pyvhost.driver.dirty_log import DirtyLog
from pyvhost.driver.memory import Region
from pyvhost.driver.queue import Queue


class FrontEnd(Protocol):
    """A connection to one device. Features are masks of virtio feature bits."""

    def negotiate(self, features: int) -> int:
        """Own the device and acknowledge those of `features` that it offers; returns them."""
        ...

    def set_mem_table(self, regions: Sequence[Region]) -> None:
        """Let the device see this memory, and no other."""
        ...

    def get_queue_num(self) -> int:
        """How many queues the device has; for net, how many pairs."""
        ...

    def start_ring(self, index: int, queue: Queue, base: int | None = None) -> None:
        """Bring up ring `index`; the device begins at available index `base`, None is its used index."""
        ...

    def stop_ring(self, index: int) -> int:
        """Stop ring `index`; returns the available index that the device would go on from."""
        ...

    def get_config(self, offset: int, size: int) -> bytes:
        """Bytes of the configuration space."""
        ...

    def set_status(self, status: int) -> None:
        """Tell the device its status, if it wants to know."""
        ...

    def fileno(self) -> int:
        """A descriptor that hangs up when the device is gone, or -1."""
        ...


@runtime_checkable
class LogFrontEnd(FrontEnd, Protocol):
    """A front end that can have its device log what it writes, and move its rings."""

    def change_features(self, features: int) -> None:
        """Acknowledge other features than before, while rings run or not."""
        ...

    def set_ring_addr(self, index: int, queue: Queue, *, log: bool = False) -> None:
        """Say where ring `index` lies now, and whether writes to its used ring are logged."""
        ...

    def set_log(self, log: DirtyLog) -> None:
        """Say where to log. The log stays the caller's, and stays until the device logs no more."""
        ...

    def set_log_fd(self, fd: int) -> None:
        """An eventfd to signal when something was logged; -1 for none."""
        ...
