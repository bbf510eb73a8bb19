"""A device whose one ring Python handles: what chains and rings in Python are tested with."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from pyvhost.dataplane import blocks
from pyvhost.vhost.chains import Chain, PythonRing
from pyvhost.vhost.device import TRANSPORT_FEATURES, Device
from pyvhost.vhost.vring import Place


class Handled(Device):
    """A device of one vring, handled by `handler`."""

    kind = "test"
    virtio_id = 0
    features = TRANSPORT_FEATURES

    def __init__(self, handler: Callable[[Chain], int]) -> None:
        super().__init__("dev", 1)
        self._handler = handler
        self.row = np.zeros(len(blocks.COUNTERS), np.int64)
        self._ring: PythonRing | None = None

    def place_of(self, index: int) -> Place:
        if self._ring is None:
            assert self.poller is not None
            self._ring = PythonRing("dev: queue", self._handler, self.poller, self.row)
        return self._ring
