"""What drivers of all device types have in common: features, rings that come up and go down, migration, waiting.

Promises: rings run from `resume` to `stop`, and their chains outlive both; every wait ends after its timeout.
Never: starts a thread, or knows what lies in a chain.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Self

from pyvhost.abi import vhost, virtio
from pyvhost.driver.dirty_log import DirtyLog
from pyvhost.driver.errors import DriverError
from pyvhost.driver.front_end import FrontEnd, LogFrontEnd
from pyvhost.driver.iommu import Iommu, IotlbFrontEnd, Miss
from pyvhost.driver.memory import GuestMemory
from pyvhost.driver.queue import Queue, wait
from pyvhost.driver.ring_parts import ByteOrder, RingLayout
from pyvhost.driver.split_ring import SplitRing

_STARTED = virtio.CONFIG_S_ACKNOWLEDGE | virtio.CONFIG_S_DRIVER | virtio.CONFIG_S_FEATURES_OK


class DeviceDriver:
    """A driver for one device; the device types' own derive from it.

    `features` are asked for, and what the device has of them is in `self.features` after `start`. `ring_size`
    is every ring's; `layout` says where the parts of a ring lie, by its index; `allocate` (bytes to guest
    address) where each descriptor's bytes lie, anywhere in `memory` unless told. `byteorder` is that of a
    legacy guest. With `iommu` all addresses are mapped ones (F_ACCESS_PLATFORM). `timeout` is in seconds.
    """

    def __init__(
        self,
        frontend: FrontEnd,
        memory: GuestMemory,
        ring_size: int,
        features: int,
        *,
        allocate: Callable[[int], int] | None = None,
        layout: Callable[[int], RingLayout] | None = None,
        iommu: Iommu | None = None,
        byteorder: ByteOrder = "little",
        timeout: float = 10.0,
    ) -> None:
        self.frontend = frontend
        self.memory = memory
        self.ring_size = ring_size
        self.wanted = features
        if iommu is not None:
            self.wanted |= 1 << virtio.F_ACCESS_PLATFORM
        self.features = 0
        self.byteorder: ByteOrder = byteorder
        self.timeout = timeout
        self.running = False
        self.iommu = iommu
        self._allocate = allocate or memory.allocate
        self._layout = layout
        self._services = [] if iommu is None else [iommu]
        self._indices: dict[int, Queue] = {}

    # --- coming up and going down ------------------------------------------------------------------------

    def has(self, bit: int) -> bool:
        """Whether a feature, by its bit number, was negotiated."""
        return bool(self.features >> bit & 1)

    def _negotiate(self) -> None:
        if self._indices:
            raise DriverError("the driver has started; resume() is what brings it up again")
        self.features = self.frontend.negotiate(self.wanted)
        if self.iommu is not None and not self.has(virtio.F_ACCESS_PLATFORM):
            raise DriverError(
                "the device takes no address but a physical one: ACCESS_PLATFORM is not offered"
            )
        if self.byteorder != "little" and self.has(virtio.F_VERSION_1):
            raise DriverError("only a legacy guest has a byte order of its own; VERSION_1 was negotiated")

    def resume(self, frontend: FrontEnd | None = None, bases: dict[int, int] | None = None) -> None:
        """Bring the rings up as they are: for the first time, after `stop`, or on a new `frontend`.

        A new front end must negotiate what the old one did; DriverError if its back end can't. `bases` are
        those that `stop` returned; without them each ring goes on from its used index.
        """
        if frontend is not None:
            self.frontend = frontend
            acked = frontend.negotiate(self.features)
            if acked != self.features:
                raise DriverError(
                    f"features were {self.features:#x}, the new back end has {acked:#x} of them"
                )
        self.frontend.set_mem_table(self.memory.regions)
        self.frontend.set_status(_STARTED)
        if self.iommu is not None:
            self._stand_before(self.iommu)
        for index, queue in self._indices.items():
            self.frontend.start_ring(index, queue, None if bases is None else bases[index])
        self.frontend.set_status(_STARTED | virtio.CONFIG_S_DRIVER_OK)
        self.running = True
        # Chains that were published for a device that had stopped, or was never there, have not been kicked.
        for queue in self._indices.values():
            if queue.ring.outstanding:
                queue.ring.needs_kick()
                queue.kick()

    def _stand_before(self, iommu: Iommu) -> None:
        """Put the IOMMU between the front end's device and memory."""
        if not isinstance(self.frontend, IotlbFrontEnd):
            raise DriverError(f"{type(self.frontend).__name__} has no IOTLB")
        iommu.frontend = self.frontend
        if iommu.prefill:
            for queue in self._indices.values():
                iommu.answer(Miss(queue.ring.addresses.used, vhost.ACCESS_RO))

    def stop(self) -> dict[int, int]:
        """Stop every ring; returns their bases by index. What was used before can still be taken."""
        self.running = False
        return {index: self.frontend.stop_ring(index) for index in self._indices}

    def close(self) -> None:
        """Close the queues. The front end and the memory stay the caller's."""
        for queue in self._indices.values():
            queue.close()
        self._indices = {}
        self.running = False
        if self.iommu is not None:
            self.iommu.frontend = None

    def _queue(self, index: int, name: str) -> Queue:
        event_idx = self.has(virtio.RING_F_EVENT_IDX)
        ring = SplitRing(
            self.memory,
            self.ring_size,
            None if self._layout is None else self._layout(index),
            event_idx=event_idx,
            byteorder=self.byteorder,
            dma=self.iommu,
        )
        queue = Queue(ring, name)
        self._indices[index] = queue
        return queue

    # --- while it runs -------------------------------------------------------------------------------------

    @property
    def queues(self) -> dict[int, Queue]:
        """Every ring, by its index."""
        return dict(self._indices)

    def start_log(self, log: DirtyLog, *, buffers: bool = True, rings: bool = True) -> None:
        """Have the device log what it writes from now on: into buffers (F_LOG_ALL), into used rings."""
        frontend = self._logging()
        frontend.set_log(log)
        if buffers:
            frontend.change_features(self.features | 1 << vhost.F_LOG_ALL)
        for index, queue in self._indices.items():
            frontend.set_ring_addr(index, queue, log=rings)

    def stop_log(self) -> None:
        """Have the device log nothing more; when this returns it does not."""
        frontend = self._logging()
        frontend.change_features(self.features & ~(1 << vhost.F_LOG_ALL))
        for index, queue in self._indices.items():
            frontend.set_ring_addr(index, queue)

    def move_ring(self, index: int, layout: RingLayout, *, copy: bool = True) -> RingLayout:
        """Move a ring that runs, as `SplitRing.move` does; returns where it was. It is not logged then."""
        queue, frontend = self._indices[index], self._logging()
        return queue.ring.move(layout, lambda: frontend.set_ring_addr(index, queue), copy=copy)

    def _logging(self) -> LogFrontEnd:
        if not isinstance(self.frontend, LogFrontEnd):
            raise DriverError(f"{type(self.frontend).__name__} can't have its device log, or move its rings")
        return self.frontend

    # --- waiting -----------------------------------------------------------------------------------------

    def _wait(
        self, ready: Callable[[], bool], queues: Sequence[Queue], what: str, timeout: float | None = None
    ) -> None:
        patience = self.timeout if timeout is None else timeout
        wait(ready, queues, patience, what, peer=self.frontend.fileno(), services=self._services)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
