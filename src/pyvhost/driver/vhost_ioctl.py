"""A front end by ioctls: drives a vhost device of this process, or the kernel's own, alike.

    with open_kernel("/dev/vhost-net") as handle:           # or pyvhost.open("/dev/vhost-net")
        frontend = VhostNetFrontend(handle, tap.fileno())
        driver = NetDriver(frontend, GuestMemory(64 << 20, anonymous=True))

Methods are the ioctls by name (linux/vhost.h), with numbers for arguments. User addresses are this process's
own: the device finds memory, rings and the dirty log there without any file.

Promises: what the device refuses is OSError with its errno, as ioctl(2) has it; an argument is a writable
buffer of exactly the ioctl's size. Never: closes the handle, or a descriptor that it passes on.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import select
import sys
from collections.abc import Sequence
from types import TracebackType
from typing import Protocol, Self, TypeVar

from pyvhost.abi import vhost as abi
from pyvhost.abi import virtio
from pyvhost.driver.dirty_log import DirtyLog
from pyvhost.driver.errors import DeviceError, DriverError
from pyvhost.driver.iommu import Miss
from pyvhost.driver.memory import Region
from pyvhost.driver.queue import Queue

S = TypeVar("S", bound=ctypes.Structure)

MESSAGE_SIZE = ctypes.sizeof(abi.Msg)


class Handle(Protocol):
    """An open vhost device."""

    def ioctl(self, request: int, argument: bytearray | int = 0) -> object:
        """As fcntl.ioctl: what the device answers is written into a bytearray."""
        ...

    def read(self, size: int, /) -> bytes:
        """The next IOTLB message."""
        ...

    def write(self, data: bytes, /) -> int:
        """Give the device an IOTLB message."""
        ...

    def fileno(self) -> int:
        """A descriptor to poll: readable while an IOTLB message waits."""
        ...

    def close(self) -> None:
        """End the device."""
        ...


class KernelHandle:
    """A kernel's character device. OSError as open(2): ENOENT, or ENODEV without the module."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)

    def ioctl(self, request: int, argument: bytearray | int = 0) -> int:
        return fcntl.ioctl(self._fd, request, argument)

    def read(self, size: int, /) -> bytes:
        return os.read(self._fd, size)

    def write(self, data: bytes, /) -> int:
        return os.write(self._fd, data)

    def fileno(self) -> int:
        return self._fd

    def close(self) -> None:
        """Close it, which ends the device; nothing happens the second time."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def open_kernel(path: str | os.PathLike[str] = "/dev/vhost-net") -> KernelHandle:
    """The kernel's device at `path`."""
    return KernelHandle(path)


class VhostFrontend:
    """What all vhost devices have. One that moves data adds `bind` and `unbind`, which start and stop a
    ring. `message_v2` asks for IOTLB messages with an address space (BACKEND_F_IOTLB_MSG_V2).
    """

    def __init__(self, handle: Handle, *, message_v2: bool = False) -> None:
        self.handle = handle
        self.message_v2 = message_v2
        self.owned = False
        self.features = 0
        self.backend_features = 0
        self._big: set[int] = set()
        self._poller = select.poll()
        self._poller.register(handle.fileno(), select.POLLIN)

    # --- ioctls ----------------------------------------------------------------------------------------

    def ioctl(self, request: int, argument: S) -> S:
        """Any ioctl with a structure; returns the structure as it was left."""
        buffer = bytearray(bytes(argument))
        self.handle.ioctl(request, buffer)
        return type(argument).from_buffer_copy(buffer)

    def _number(self, request: int, value: int = 0, size: int = 8) -> int:
        buffer = bytearray((value % (1 << 8 * size)).to_bytes(size, sys.byteorder))
        self.handle.ioctl(request, buffer)
        return int.from_bytes(buffer, sys.byteorder)

    def set_owner(self) -> None:
        self.handle.ioctl(abi.SET_OWNER)
        self.owned = True

    def reset_owner(self) -> None:
        self.handle.ioctl(abi.RESET_OWNER)
        self.owned = False

    def get_features(self) -> int:
        return self._number(abi.GET_FEATURES)

    def set_features(self, features: int) -> None:
        self._number(abi.SET_FEATURES, features)
        self.features = features

    def get_backend_features(self) -> int:
        return self._number(abi.GET_BACKEND_FEATURES)

    def set_backend_features(self, features: int) -> None:
        self._number(abi.SET_BACKEND_FEATURES, features)
        self.backend_features = features

    def set_mem_table(self, regions: Sequence[Region]) -> None:
        rows = b"".join(
            bytes(abi.MemoryRegion(region.guest_phys_addr, region.memory_size, region.userspace_addr))
            for region in regions
        )
        self.handle.ioctl(abi.SET_MEM_TABLE, bytearray(bytes(abi.Memory(len(regions))) + rows))

    def set_log_base(self, address: int) -> None:
        """Where the dirty log lies in this process."""
        self._number(abi.SET_LOG_BASE, address)

    def set_log_fd(self, fd: int) -> None:
        """An eventfd to signal when something was logged; -1 for none."""
        self._number(abi.SET_LOG_FD, fd, 4)

    def set_vring_num(self, index: int, num: int) -> None:
        self.ioctl(abi.SET_VRING_NUM, abi.VringState(index, num))

    def set_vring_base(self, index: int, num: int) -> None:
        self.ioctl(abi.SET_VRING_BASE, abi.VringState(index, num))

    def get_vring_base(self, index: int) -> int:
        """The next available index that the device would look at. Stops nothing."""
        return int(self.ioctl(abi.GET_VRING_BASE, abi.VringState(index)).num)

    def set_vring_addr(
        self,
        index: int,
        desc_user_addr: int,
        used_user_addr: int,
        avail_user_addr: int,
        *,
        flags: int = 0,
        log_guest_addr: int = 0,
    ) -> None:
        """User addresses, or IOVAs with F_ACCESS_PLATFORM; `log_guest_addr` is a guest address."""
        addresses = abi.VringAddr(
            index, flags, desc_user_addr, used_user_addr, avail_user_addr, log_guest_addr
        )
        self.ioctl(abi.SET_VRING_ADDR, addresses)

    def set_vring_endian(self, index: int, num: int) -> None:
        """VRING_LITTLE_ENDIAN or VRING_BIG_ENDIAN, of a legacy guest. ENOTTY: a kernel built without it."""
        self.ioctl(abi.SET_VRING_ENDIAN, abi.VringState(index, num))

    def get_vring_endian(self, index: int) -> int:
        return int(self.ioctl(abi.GET_VRING_ENDIAN, abi.VringState(index)).num)

    def set_vring_busyloop_timeout(self, index: int, microseconds: int) -> None:
        """How long the device looks for more before it asks for a kick and rests."""
        self.ioctl(abi.SET_VRING_BUSYLOOP_TIMEOUT, abi.VringState(index, microseconds))

    def get_vring_busyloop_timeout(self, index: int) -> int:
        return int(self.ioctl(abi.GET_VRING_BUSYLOOP_TIMEOUT, abi.VringState(index)).num)

    def set_vring_kick(self, index: int, fd: int = -1) -> None:
        self.ioctl(abi.SET_VRING_KICK, abi.VringFile(index, fd))

    def set_vring_call(self, index: int, fd: int = -1) -> None:
        self.ioctl(abi.SET_VRING_CALL, abi.VringFile(index, fd))

    def set_vring_err(self, index: int, fd: int = -1) -> None:
        self.ioctl(abi.SET_VRING_ERR, abi.VringFile(index, fd))

    # --- what a device adds ------------------------------------------------------------------------------

    def bind(self, index: int) -> None:
        """Give ring `index` what it works on, which starts it."""
        raise NotImplementedError

    def unbind(self, index: int) -> None:
        """Take it away again, which stops the ring."""
        raise NotImplementedError

    # --- `FrontEnd`: several at once -----------------------------------------------------------------------

    def negotiate(self, features: int) -> int:
        """Own the device unless it is owned, and acknowledge those of `features` that it offers; returns
        them.
        """
        if not self.owned:
            self.set_owner()
        if self.message_v2:
            wanted = 1 << abi.BACKEND_F_IOTLB_MSG_V2
            if not self.get_backend_features() & wanted:
                raise DriverError("the device has no IOTLB messages of version 2")
            self.set_backend_features(wanted)
        self.set_features(self.get_features() & features)
        return self.features

    def get_queue_num(self) -> int:
        """One: a vhost device has one pair of queues, and more of them are more devices."""
        return 1

    def start_ring(self, index: int, queue: Queue, base: int | None = None) -> None:
        """Everything that ring `index` needs to run; `base` None is its used index, as it stands in memory.

        A byte order is told where it is not the machine's own, or was not before.
        """
        ring = queue.ring
        self.set_vring_num(index, ring.size)
        self.set_vring_base(index, ring.used_idx if base is None else base)
        if ring.byteorder == "big" or index in self._big:
            self.set_vring_endian(index, int(ring.byteorder == "big"))
            self._big = self._big | {index} if ring.byteorder == "big" else self._big - {index}
        self.set_ring_addr(index, queue)
        self.set_vring_call(index, queue.call_fd)
        self.set_vring_err(index, queue.err_fd)
        self.set_vring_kick(index, queue.kick_fd)
        self.bind(index)

    def stop_ring(self, index: int) -> int:
        """Stop the ring; returns its base. Its eventfds are let go of."""
        self.unbind(index)
        base = self.get_vring_base(index)
        for forget in (self.set_vring_kick, self.set_vring_call, self.set_vring_err):
            forget(index, -1)
        return base

    def get_config(self, offset: int, size: int) -> bytes:
        raise DriverError(
            f"{size} bytes of configuration at {offset}: a vhost device has none, its front end keeps it"
        )

    def set_status(self, status: int) -> None:
        """A vhost device does not want to know."""

    def fileno(self) -> int:
        """-1: the device lives as long as its handle."""
        return -1

    # --- `LogFrontEnd` -------------------------------------------------------------------------------------

    def change_features(self, features: int) -> None:
        self.set_features(features)

    def set_ring_addr(self, index: int, queue: Queue, *, log: bool = False) -> None:
        """Where the ring lies now; with `log` its used ring's own guest address is where writes are logged."""
        at = queue.ring.addresses
        flags = int(log) << abi.VRING_F_LOG
        log_at = queue.ring.layout.used if log else 0
        self.set_vring_addr(index, at.desc, at.used, at.avail, flags=flags, log_guest_addr=log_at)

    def set_log(self, log: DirtyLog) -> None:
        self.set_log_base(log.address)

    # --- `IotlbFrontEnd` -----------------------------------------------------------------------------------

    def iotlb_fileno(self) -> int:
        return self.handle.fileno()

    def take_miss(self) -> Miss | None:
        if not any(events & select.POLLIN for _, events in self._poller.poll(0)):
            return None
        data = self.handle.read(MESSAGE_SIZE)
        if len(data) != MESSAGE_SIZE:
            raise DeviceError(f"an IOTLB message has {MESSAGE_SIZE} bytes, the device gave {len(data)}")
        version = abi.IOTLB_MSG_V2 if self._v2 else abi.IOTLB_MSG
        message = (abi.MsgV2 if self._v2 else abi.Msg).from_buffer_copy(data)
        told = message.iotlb
        if message.type != version or told.type != abi.IOTLB_MISS:
            raise DeviceError(
                f"the device sent message {told.type} of version {message.type}, expected a miss of version {version}"
            )
        return Miss(told.iova, told.perm)

    def iotlb_update(self, iova: int, size: int, uaddr: int, perm: int) -> None:
        self.iotlb_message(abi.IotlbMsg(iova, size, uaddr, perm, abi.IOTLB_UPDATE))

    def iotlb_invalidate(self, iova: int, size: int) -> None:
        self.iotlb_message(abi.IotlbMsg(iova, size, 0, 0, abi.IOTLB_INVALIDATE))

    def iotlb_message(self, message: abi.IotlbMsg) -> None:
        """Write any message, in the version that was negotiated."""
        if self._v2:
            data = bytes(abi.MsgV2(abi.IOTLB_MSG_V2, 0, iotlb=message))
        else:
            data = bytes(abi.Msg(abi.IOTLB_MSG, iotlb=message))
        self.handle.write(data)

    @property
    def _v2(self) -> bool:
        return bool(self.backend_features >> abi.BACKEND_F_IOTLB_MSG_V2 & 1)


class VhostNetFrontend(VhostFrontend):
    """/dev/vhost-net. `backend` is a descriptor of the tap or packet socket that frames go to and come from,
    or two of them, for the receive and the transmit ring.

    A tap wants IFF_VNET_HDR and TUNSETVNETHDRSZ to what the features make the header: 12 bytes with
    VERSION_1 or MRG_RXBUF, 10 without.
    """

    def __init__(
        self, handle: Handle, backend: int | tuple[int, int] = -1, *, message_v2: bool = False
    ) -> None:
        super().__init__(handle, message_v2=message_v2)
        self.backends = (backend, backend) if isinstance(backend, int) else backend

    def set_backend(self, index: int, fd: int) -> None:
        """Bind ring `index` to a backend, or with -1 to none."""
        self.ioctl(abi.NET_SET_BACKEND, abi.VringFile(index, fd))

    def bind(self, index: int) -> None:
        self.set_backend(index, self.backends[index])

    def unbind(self, index: int) -> None:
        self.set_backend(index, abi.FILE_UNBIND)


class VhostScsiFrontend(VhostFrontend):
    """/dev/vhost-scsi. `wwpn` is the endpoint's name; it is set when the driver says DRIVER_OK, which starts all
    rings at once, and cleared before the first of them stops.
    """

    def __init__(self, handle: Handle, wwpn: str) -> None:
        super().__init__(handle)
        self.wwpn = wwpn
        self._set = False

    def set_endpoint(self, wwpn: str | None = None, *, tpgt: int = 0) -> None:
        """Serve all rings with the targets of that name; None: of the one that this was made with."""
        self._endpoint(abi.SCSI_SET_ENDPOINT, wwpn, tpgt)
        self._set = True

    def clear_endpoint(self, wwpn: str | None = None, *, tpgt: int = 0) -> None:
        """Serve no ring any more."""
        self._endpoint(abi.SCSI_CLEAR_ENDPOINT, wwpn, tpgt)
        self._set = False

    def _endpoint(self, request: int, wwpn: str | None, tpgt: int) -> None:
        name = (self.wwpn if wwpn is None else wwpn).encode()
        self.ioctl(request, abi.ScsiTarget(abi.SCSI_ABI_VERSION, name, tpgt, 0))

    def get_abi_version(self) -> int:
        return self._number(abi.SCSI_GET_ABI_VERSION, size=4)

    def get_events_missed(self) -> bool:
        return bool(self._number(abi.SCSI_GET_EVENTS_MISSED, size=4))

    def set_events_missed(self, missed: bool) -> None:
        self._number(abi.SCSI_SET_EVENTS_MISSED, int(missed), 4)

    def set_status(self, status: int) -> None:
        if status & virtio.CONFIG_S_DRIVER_OK and not self._set:
            self.set_endpoint()

    def bind(self, index: int) -> None:
        """Nothing: the endpoint starts them all."""

    def unbind(self, index: int) -> None:
        if self._set:
            self.clear_endpoint()


class VhostVsockFrontend(VhostFrontend):
    """/dev/vhost-vsock for the guest `cid`, which starts when the driver says DRIVER_OK.

    The device has two rings; the event ring and the configuration space are the front end's own, so that the driver's
    third ring is nobody's here.
    """

    RINGS = 2

    def __init__(self, handle: Handle, cid: int) -> None:
        super().__init__(handle)
        self.cid = cid
        self._running = False

    def set_guest_cid(self, cid: int) -> None:
        """Say which CID the guest has."""
        self._number(abi.VSOCK_SET_GUEST_CID, cid)
        self.cid = cid

    def set_running(self, running: bool) -> None:
        """Serve both rings, or none."""
        self._number(abi.VSOCK_SET_RUNNING, int(running), 4)
        self._running = running

    def get_config(self, offset: int, size: int) -> bytes:
        return self.cid.to_bytes(8, "little")[offset : offset + size]

    def set_status(self, status: int) -> None:
        if status & virtio.CONFIG_S_DRIVER_OK and not self._running:
            self.set_guest_cid(self.cid)
            self.set_running(True)

    def start_ring(self, index: int, queue: Queue, base: int | None = None) -> None:
        if index < self.RINGS:
            super().start_ring(index, queue, base)

    def stop_ring(self, index: int) -> int:
        return super().stop_ring(index) if index < self.RINGS else 0

    def bind(self, index: int) -> None:
        """Nothing: SET_RUNNING starts both."""

    def unbind(self, index: int) -> None:
        if self._running:
            self.set_running(False)
