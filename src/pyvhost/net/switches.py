"""The data plane's side of learning switches between the guests of one process: their memory, and who is on them.

Promises: all members of a switch are served by one worker, so that a frame needs no lock; a member that leaves
is forgotten at once. Never: forwards (the compiled loop does).
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

import numpy as np

from pyvhost.dataplane import blocks
from pyvhost.dataplane.switch_table import learn
from pyvhost.net import features
from pyvhost.net.backends.base import Backend
from pyvhost.net.backends.switch import Switch
from pyvhost.vhost.worker import Slots

if TYPE_CHECKING:
    from pyvhost.net.process import Process

_log = logging.getLogger(__name__)

_ENTRIES: Final = 4096
_HEADER: Final = 10
MAX_MEMBERS: Final = 256


class SwitchPlane:
    """What the loop reads of one switch, and the port of its uplink."""

    def __init__(self, group: Switch, process: Process) -> None:
        self.worker = process.worker(f"switch:{group.name}")
        self.name = group.name
        self._group = group
        self._process = process
        self._table = np.zeros((_ENTRIES, 2), np.int64)
        self._members = np.zeros((MAX_MEMBERS, blocks.MEMBER_BYTES // 8), np.int64)
        self._slots = Slots(MAX_MEMBERS, "members of a switch")
        self._block = np.zeros(blocks.SWITCH_BYTES // 8, np.int64)
        self._block[blocks.SWITCH_TABLE // 8] = self._table.ctypes.data
        self._block[blocks.SWITCH_MASK // 8] = _ENTRIES - 1
        self._block[blocks.SWITCH_MEMBERS // 8] = self._members.ctypes.data
        self._uplink: _Uplink | None = None
        if group.uplink is not None:
            self._uplink = _Uplink(self, group.uplink, process)

    @classmethod
    def of(cls, group: Switch, process: Process) -> SwitchPlane:
        """The switch's own; made for its first member."""
        if not isinstance(group.state, cls):
            group.state = cls(group, process)
        elif group.state._uplink is None and group.uplink is not None:
            group.state._uplink = _Uplink(group.state, group.uplink, process)
        return group.state

    @property
    def address(self) -> int:
        """Of the block that kernels read."""
        return int(self._block.ctypes.data)

    def join(self) -> int:
        """A new member, without ports yet."""
        with self.worker.paused():
            member = self._slots.take()
            count = self._block[blocks.SWITCH_COUNT // 8]
            self._block[blocks.SWITCH_COUNT // 8] = max(count, member + 1)
            return member

    def set_ports(self, member: int, ports: Sequence[int]) -> None:
        """Which ports a member can be reached through now; none while its guest is away."""
        ports = ports[: blocks.MEMBER_MAX_PORTS]
        with self.worker.paused():
            row = self._members[member]
            row[blocks.MEMBER_PORTS // 8] = len(ports)
            row[blocks.MEMBER_PORT // 8 :][: len(ports)] = ports
            if not ports:
                self._forget(member)

    def leave(self, member: int) -> None:
        """The member is no more; with the last one the uplink goes."""
        self.set_ports(member, [])
        self._slots.give_back(member)
        if len(self._group.members) <= 1 and self._uplink is not None:
            self._uplink.close()
            self._uplink = None

    def announce(self, member: int, mac: bytes, frame: bytes) -> None:
        """A guest has moved to `member`: learns that, and tells the uplink with `frame`."""
        with self.worker.paused():
            learn(self.address, int.from_bytes(mac, "little"), member)
        if self._uplink is not None:
            self._uplink.send(frame)

    def _forget(self, member: int) -> None:
        """Drops what was learned of a member; entries behind a gap stay reachable: the rest moves up."""
        known = self._table[self._table[:, 0] != 0]
        kept = known[known[:, 1] != member]
        self._table[:] = 0
        for key, whose in kept:
            learn(self.address, int(key) & ((1 << 48) - 1), int(whose))


class _Uplink:
    """The switch's member that is an interface of the host: a port without rings."""

    def __init__(self, plane: SwitchPlane, backend: Backend, process: Process) -> None:
        self._plane = plane
        self._backend = backend
        self._process = process
        self._worker = plane.worker
        self._bounce = np.zeros(blocks.BOUNCE_BYTES // 8, np.int64)
        self._row = process.row(f"switch {plane.name}", "net", "uplink", backend.spec)
        self._member = plane.join()
        # The shortest header: whatever the guests' are, theirs begin with it.
        backend.set_vnet_hdr_size(_HEADER)
        backend.set_offloads(features.OFFLOADS)
        with self._worker.paused():
            self._port = self._worker.add_port()
            record = self._worker.ports[self._port]
            record["kind"] = blocks.PORT_FD
            record["header"] = record["fd_header"] = _HEADER
            record["switch"] = plane.address
            record["member"] = self._member
            record["bounce"] = self._bounce.ctypes.data
            record["row"] = self._row.ctypes.data
            self._worker.on_backend_fault[self._port] = self._failed
        self._fd = -1
        self._use_fd()
        plane.set_ports(self._member, [self._port])
        backend.on_change = self._use_fd

    def _use_fd(self) -> None:
        self._fd = self._worker.use_fd(self._port, self._fd, self._backend.fds[0])

    def _failed(self, code: int) -> None:
        _log.error("%s: %s", self._backend.spec, os.strerror(code))

    def send(self, frame: bytes) -> None:
        if self._fd >= 0:
            try:
                os.write(self._fd, bytes(_HEADER) + frame)
            except OSError as error:
                _log.warning("%s: %s", self._backend.spec, error.strerror)

    def close(self) -> None:
        self._backend.on_change = None
        self._plane.set_ports(self._member, [])
        self._worker.use_fd(self._port, self._fd, -1)
        with self._worker.paused():
            self._worker.remove_port(self._port)
        self._process.counters.release(self._row)
