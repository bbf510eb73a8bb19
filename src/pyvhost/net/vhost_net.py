"""`/dev/vhost-net` without the kernel's: two rings, each bound to a tap or a packet socket (VHOST_NET_SET_BACKEND).

What is on the descriptor is the application's to negotiate with its guest, as with the kernel's device: offloads
are not this device's features, and a virtio_net_hdr goes through as it is.

Promises: the checks of SET_BACKEND, their order and errors, are the kernel's; a descriptor is duplicated, made
non-blocking while it is bound, and given back as it was.
Never: touches a frame. The worker's loop does.
"""

from __future__ import annotations

import errno
import logging
import os
import select
import threading
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, ClassVar, Final

import numpy as np

from pyvhost.abi import vhost as abi
from pyvhost.abi import virtio, virtio_net
from pyvhost.dataplane import blocks
from pyvhost.host import net_fd
from pyvhost.host.fds import close
from pyvhost.net import features
from pyvhost.net.process import Process
from pyvhost.vhost import ioctls
from pyvhost.vhost.device import TRANSPORT_FEATURES
from pyvhost.vhost.errors import VhostError
from pyvhost.vhost.kernel_device import KernelDevice
from pyvhost.vhost.opening import register
from pyvhost.vhost.vring import Vring
from pyvhost.vhost.worker import Worker, WorkerPlace

_log = logging.getLogger(__name__)

PATH: Final = "/dev/vhost-net"
#: Workers that a device may have; the kernel leaves that to the process's limits.
MAX_WORKERS: Final = 16
#: Everything that a header may say goes through: it is not this device that the guest negotiated that with.
_ANY_GSO: Final = 0xFF


class _Modes:
    """Which bound files were blocking: one that several rings are bound to is so again when the last lets go."""

    def __init__(self) -> None:
        self._held: dict[int, bool] = {}
        # Devices are used by threads of their own; a collector may close one in the middle of another's call.
        self._lock = threading.RLock()

    def take(self, fd: int) -> None:
        """A descriptor is bound: it doesn't block from now on."""
        with self._lock:
            self._held[fd] = os.get_blocking(fd) or any(self._held[other] for other in self._of_same_file(fd))
            os.set_blocking(fd, False)

    def give_back(self, fd: int) -> None:
        """It is bound no more."""
        with self._lock:
            was_blocking = self._held.pop(fd)
            if was_blocking and not self._of_same_file(fd):
                os.set_blocking(fd, True)

    def _of_same_file(self, fd: int) -> list[int]:
        return [other for other in list(self._held) if net_fd.same(fd, other)]


modes: Final = _Modes()


class KickedPlace(WorkerPlace):
    """A place whose ring rests where it has no kick, as the kernel's do: it is not polled instead."""

    def begin(self, vring: Vring) -> None:
        """Listens for kicks, if there is one to listen for."""
        if vring.kick >= 0:
            self.worker.watch(vring.kick, select.EPOLLIN, blocks.EVENT_KICK, self.ring)
        self.poll_for(vring)


class VringPort:
    """A ring's own port in a worker's arrays, and the descriptor that it is bound to."""

    def __init__(self, process: Process, worker: Worker, device: VhostNet, index: int) -> None:
        self.worker = worker
        self.fd = -1
        self._process = process
        self._row = process.row(device.name, "net", f"{'tx' if index else 'rx'}0", "fd")
        self._bounce = np.zeros(-(-blocks.BOUNCE_BYTES // 8), np.int64)
        with worker.paused():
            self.port = worker.add_port()
            self._ring = worker.add_ring(self.port, self._row, f"{device.name}: vring {index}")
            record = self.record
            record["tx" if index else "rx"] = self._ring
            record["kind"] = blocks.PORT_FD
            record["bounce"] = self._bounce.ctypes.data
            worker.on_backend_fault[self.port] = lambda code: device.backend_fault(index, code)
        self.place = KickedPlace(worker, self.port, self._ring)

    @property
    def record(self) -> Any:
        """The port's record."""
        return self.worker.ports[self.port]

    def use_fd(self, fd: int) -> None:
        """Takes a descriptor, now the port's, in place of the one before; -1: none. OSError: the one before stays."""
        old = self.fd
        with ExitStack() as refused:
            refused.callback(close, fd)
            if fd >= 0:
                modes.take(fd)
                refused.callback(modes.give_back, fd)
            self.fd = self.worker.use_fd(self.port, old, fd)
            refused.pop_all()
        if old >= 0:
            modes.give_back(old)
            close(old)

    def negotiated(self, acked: int) -> None:
        """Takes over features. While paused."""
        record = self.record
        record["header"] = features.header_size(acked)
        own = acked >> abi.NET_F_VIRTIO_NET_HDR & 1
        record["fd_header"] = 0 if own or self.fd < 0 else net_fd.header_size(self.fd)
        record["mergeable"] = acked >> virtio_net.F_MRG_RXBUF & 1
        record["guest_csum"] = 1
        record["guest_gso"] = _ANY_GSO

    def close(self) -> None:
        """Gives up its place in the worker; its ring does not run any more."""
        self.use_fd(-1)
        with self.worker.paused():
            self.worker.remove_ring(self._ring)
            self.worker.remove_port(self.port)
        self._process.counters.release(self._row)


class VhostNet(KernelDevice):
    """An open `/dev/vhost-net`: ring 0 receives, ring 1 transmits (as the guest sees it)."""

    kind: ClassVar[str] = "net"
    virtio_id: ClassVar[int] = virtio.ID_NET

    def __init__(self, name: str = PATH) -> None:
        self._ports: list[VringPort] = []
        super().__init__(name, 2)
        self._process = Process.get()
        self._process.prepare()
        #: Worker threads by the number that the front end has for them; 0 is there from the start.
        self._workers: dict[int, Worker] = {0: self._process.worker()}
        self._worker_of = [0, 0]
        self._ports = [VringPort(self._process, self._workers[0], self, i) for i in range(2)]
        self.features_changed()

    # --- what vhost.Device asks ---------------------------------------------------------------------------

    @property
    def features(self) -> int:
        """VHOST_NET_FEATURES of the seed's time, and ACCESS_PLATFORM."""
        return TRANSPORT_FEATURES | features.mask(virtio_net.F_MRG_RXBUF, abi.NET_F_VIRTIO_NET_HDR)

    def place_of(self, index: int) -> WorkerPlace:
        """Each ring has its own."""
        return self._ports[index].place

    def features_changed(self) -> None:
        """Sets the ports to what was negotiated."""
        for port in self._ports:
            with port.worker.paused():
                port.negotiated(self.acked_features)

    def reset(self) -> None:
        """Unbinds both rings, and forgets everything."""
        super().reset()
        for port in self._ports:
            port.use_fd(-1)
        if self._ports:
            self._workers.setdefault(0, self._process.worker())
        for index in range(len(self._ports)):
            self._move(index, 0)
        for number in [number for number in getattr(self, "_workers", {}) if number]:
            self._process.end_worker(self._workers.pop(number))

    def close(self) -> None:
        """Gives up rings, ports and descriptors."""
        super().close()
        for port in self._ports:
            port.close()
        self._ports = []

    # --- the seed's ioctl that is net's own -----------------------------------------------------------------

    def set_backend(self, index: int, fd: int) -> None:
        """VHOST_NET_SET_BACKEND: binds a ring to a descriptor, which stays the caller's; -1 unbinds it.

        In this order: ENOBUFS no such ring; EFAULT no memory table, or an address that is not user space; ENOTSOCK
        not a tap or a packet socket; EFAULT the used ring is not there; EINVAL a tap without an interface. The
        same file again changes nothing.
        """
        self.require_vring(index)
        if fd == abi.FILE_UNBIND:
            self.clear_iotlb_misses()
        self.check_access(index)
        port = self._ports[index]
        if fd == abi.FILE_UNBIND:
            self.unbind(index)
            port.use_fd(-1)
            return
        self._host(net_fd.require, fd)
        if port.fd >= 0 and net_fd.same(port.fd, fd):
            return
        # All that can be refused comes first: the one before stays then.
        self.prepare(index)
        self._host(net_fd.ready, fd)
        taken = self._host(os.dup, fd)
        with port.worker.paused():
            self._host(port.use_fd, taken)
            if self.is_bound(index):
                self.unbind(index)
            self._bind(index)

    def _bind(self, index: int) -> None:
        """Binds a ring that is not bound to its port's descriptor."""
        port = self._ports[index]
        with port.worker.paused():
            port.negotiated(self.acked_features)
        events = self._host(net_fd.poll, port.fd)
        self.bind(index, look=bool(events & (select.POLLOUT if index else select.POLLIN)))

    def backend_fault(self, index: int, code: int) -> None:
        """The host's fault at a descriptor. In the worker's thread."""
        words = f"{errno.errorcode.get(code, code)} ({os.strerror(code)})"
        _log.error("%s: vring %d: its descriptor: %s", self.name, index, words)

    def _host(self, ask: Callable[[int], Any], fd: int) -> Any:
        try:
            return ask(fd)
        except OSError as error:
            raise VhostError(error.errno or errno.EINVAL, f"{self.name}: {error.strerror}") from None

    # --- workers ----------------------------------------------------------------------------------------------

    def new_worker(self) -> int:
        """VHOST_NEW_WORKER. ENOMEM: it has 16."""
        if len(self._workers) >= MAX_WORKERS:
            raise VhostError(errno.ENOMEM, f"{self.name}: it has {MAX_WORKERS} workers already")
        number = next(number for number in range(MAX_WORKERS) if number not in self._workers)
        self._workers[number] = self._process.own_worker(f"{self.name}: worker {number}")
        return number

    def free_worker(self, worker: int) -> None:
        """VHOST_FREE_WORKER. ENODEV: there is none such; EBUSY: a ring is attached to it."""
        self._require_worker(worker)
        if worker in self._worker_of:
            raise VhostError(errno.EBUSY, f"{self.name}: worker {worker} serves a ring")
        freed = self._workers.pop(worker)
        if worker:
            # Number 0 is the process's, and others' rings are there as well.
            self._process.end_worker(freed)

    def attach_vring_worker(self, index: int, worker: int) -> None:
        """VHOST_ATTACH_VRING_WORKER, running or not. ENODEV: there is none such."""
        self._require_worker(worker)
        self._move(index, worker)

    def get_vring_worker(self, index: int) -> int:
        """VHOST_GET_VRING_WORKER."""
        return self._worker_of[index]

    def _require_worker(self, worker: int) -> None:
        if worker not in self._workers:
            raise VhostError(errno.ENODEV, f"{self.name}: it has no worker {worker}")

    def _move(self, index: int, worker: int) -> None:
        """Has another worker serve a ring from here on."""
        if self._worker_of[index] == worker:
            return
        port = self._ports[index]
        bound = self.is_bound(index)
        with ExitStack() as stack:
            fd = self._host(os.dup, port.fd) if bound else -1
            stack.callback(close, fd)
            if bound:
                self.unbind(index)
            port.close()
            self._worker_of[index] = worker
            self._ports[index] = VringPort(self._process, self._workers[worker], self, index)
            stack.pop_all()
        if bound:
            self._host(self._ports[index].use_fd, fd)
            self._bind(index)


def _set_backend(device: VhostNet, argument: ioctls.Argument) -> None:
    file = ioctls.unpack(argument, abi.VringFile)
    device.require_owner()
    device.require_vring(file.index)
    device.set_backend(file.index, file.fd)


def _reset_owner(device: VhostNet, argument: ioctls.Argument) -> None:
    device.reset_owner()


VhostNet.ioctls = {abi.NET_SET_BACKEND: _set_backend, abi.RESET_OWNER: _reset_owner}
register(PATH, VhostNet)
