"""A queue pair: two rings and a port in a worker's arrays, tied to a backend's descriptor.

Promises: the worker is paused while its arrays change. Never: decides what was negotiated.
"""

from __future__ import annotations

import ctypes
import os
from typing import TYPE_CHECKING, Final

import numpy as np

from pyvhost.abi import virtio_net as abi
from pyvhost.dataplane import blocks
from pyvhost.net import features
from pyvhost.vhost.worker import Int64s, WorkerPlace

if TYPE_CHECKING:
    from pyvhost.net.device import NetDevice
    from pyvhost.net.process import Process

#: A pair's rings, in the order of its vrings (5.1.2).
RX: Final = 0
TX: Final = 1


class Pair:
    """Queue pair `index` of a device."""

    def __init__(self, process: Process, device: NetDevice, index: int) -> None:
        backend = device.backend
        self.index = index
        self._process = process
        self._fd = -1
        self._memory: list[Int64s] = []
        self.worker = device.switch.worker if device.switch else process.worker()
        self._device = device
        self._rows = [process.row(device.name, "net", f"{way}{index}", backend.spec) for way in ("rx", "tx")]
        with self.worker.paused():
            self.port = self.worker.add_port()
            self._rings = [
                self.worker.add_ring(self.port, row, f"{device.name}: vring {2 * index + way}")
                for way, row in enumerate(self._rows)
            ]
            record = self.worker.ports[self.port]
            record["rx"], record["tx"] = self._rings
            record["kind"] = backend.kind
            record["pair"] = index
            if backend.kind in (blocks.PORT_FD, blocks.PORT_STREAM):
                record["bounce"] = self._room(blocks.BOUNCE_BYTES)
            if backend.kind == blocks.PORT_STREAM:
                record["stream"] = self._room(blocks.STREAM_BYTES)
                record["unsent"] = self._room(blocks.MAX_FRAME + 64)
            if backend.kind == blocks.PORT_GENERATE:
                record["template"] = self._room(len(backend.template))
                ctypes.memmove(int(record["template"]), backend.template, len(backend.template))
                record["template_bytes"] = len(backend.template)
                record["left"] = backend.count
            if device.switch is not None:
                record["switch"] = device.switch.address
                record["member"] = device.member
            self.worker.on_backend_fault[self.port] = lambda code: device.backend_fault(self, code)
        self._places = [WorkerPlace(self.worker, self.port, ring) for ring in self._rings]

    def _room(self, size: int) -> int:
        """Memory that lives as long as the pair; untouched, it costs nothing."""
        memory = np.zeros(-(-size // 8), np.int64)
        self._memory.append(memory)
        return int(memory.ctypes.data)

    def place(self, way: int) -> WorkerPlace:
        """Where its receive (0) or transmit (1) ring runs."""
        return self._places[way]

    @property
    def running(self) -> bool:
        """Whether its guest can be reached through it."""
        # A ring that stands still after a fault runs on at its next kick.
        return self._device.vrings[2 * self.index + RX].place is self._places[RX]

    def negotiated(self, taken: int, header: int, fd_header: int) -> None:
        """Takes over features; called while paused."""
        record = self.worker.ports[self.port]
        record["header"] = header
        record["fd_header"] = fd_header
        record["mergeable"] = taken >> abi.F_MRG_RXBUF & 1
        record["guest_csum"] = taken >> abi.F_GUEST_CSUM & 1
        record["guest_gso"] = features.gso_types(taken)

    def use_fd(self, fd: int) -> None:
        """Takes the backend's new descriptor in place of the old one; what is under way on the same one stays."""
        if fd != self._fd:
            self._fd = self.worker.use_fd(self.port, self._fd, fd)

    def send_framed(self, frame: bytes) -> None:
        """Sends a frame on a stream, between the guest's; not if the stream is full. OSError: the host's."""
        with self.worker.paused():
            record = self.worker.ports[self.port]
            if record["fd"] < 0 or record["unsent_bytes"]:
                return
            data = len(frame).to_bytes(4, "big") + frame
            try:
                rest = data[os.write(int(record["fd"]), data) :]
            except BlockingIOError:
                return
            if rest:
                ctypes.memmove(int(record["unsent"]), rest, len(rest))
                record["unsent_at"] = 0
                record["unsent_bytes"] = len(rest)
                record["writable"] = 0

    def record(self, address: int) -> None:
        """Has its frames recorded in a tap ring."""
        with self.worker.paused():
            self.worker.ports[self.port]["record"] = address

    def close(self) -> None:
        """Gives up its place in the worker; its rings do not run any more."""
        self.use_fd(-1)
        with self.worker.paused():
            for ring in self._rings:
                self.worker.remove_ring(ring)
            self.worker.remove_port(self.port)
        for row in self._rows:
            self._process.counters.release(row)
