"""What a vhost-user message carries: one frozen dataclass a payload layout, and the tables that say which
request carries which, how long it may be and how many descriptors ride with it.

Promises: a payload that parses says exactly what its bytes said; every length and count is bounded before
anything of that size is kept. Fields carry the names of `abi.vhost_user`'s structures.
Never: judges whether a value makes sense to a device; touches a descriptor.

Source: QEMU's docs/interop/vhost-user.rst, sections "Payload", "Front-end message types" and "Back-end
message types". Where front ends in the field differ from it, the line says which one does.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from sys import byteorder
from typing import ClassVar, TypeAlias

from pyvhost.abi import vhost_user as abi
from pyvhost.abi.vhost_user import BackendRequest, Request


class CodecError(Exception):
    """Bytes or descriptors that are no vhost-user message; the text names request, field and numbers."""


@dataclass(frozen=True, slots=True)
class U64:
    """A single number: features, an acknowledgement, a status."""

    value: int

    def pack(self) -> bytes:
        return bytes(ctypes.c_uint64(self.value))

    @classmethod
    def parse(cls, name: str, data: bytes) -> U64:
        return cls(int.from_bytes(data, byteorder))


@dataclass(frozen=True, slots=True)
class VringState:
    """A ring's index and a number about it."""

    index: int
    num: int

    def pack(self) -> bytes:
        return bytes(abi.VringState(self.index, self.num))

    @classmethod
    def parse(cls, name: str, data: bytes) -> VringState:
        c = abi.VringState.from_buffer_copy(data)
        return cls(c.index, c.num)


@dataclass(frozen=True, slots=True)
class VringAddr:
    """Where a ring's parts lie, as user addresses."""

    index: int
    flags: int
    desc_user_addr: int
    used_user_addr: int
    avail_user_addr: int
    log_guest_addr: int = 0

    def pack(self) -> bytes:
        return bytes(
            abi.VringAddr(
                self.index,
                self.flags,
                self.desc_user_addr,
                self.used_user_addr,
                self.avail_user_addr,
                self.log_guest_addr,
            )
        )

    @classmethod
    def parse(cls, name: str, data: bytes) -> VringAddr:
        c = abi.VringAddr.from_buffer_copy(data)
        return cls(c.index, c.flags, c.desc_user_addr, c.used_user_addr, c.avail_user_addr, c.log_guest_addr)


@dataclass(frozen=True, slots=True)
class VringFile:
    """Which ring a descriptor is for; with `no_fd` there is none, and polling takes its place."""

    index: int
    no_fd: bool = False

    def pack(self) -> bytes:
        return U64(self.index | (abi.VRING_NOFD_MASK if self.no_fd else 0)).pack()

    @classmethod
    def parse(cls, name: str, data: bytes) -> VringFile:
        value = int.from_bytes(data, byteorder)
        if value & ~(abi.VRING_IDX_MASK | abi.VRING_NOFD_MASK):
            raise CodecError(f"{name}: u64 {value:#x} has bits beside index (0-7) and no-descriptor (8)")
        return cls(value & abi.VRING_IDX_MASK, bool(value & abi.VRING_NOFD_MASK))


@dataclass(frozen=True, slots=True)
class Region:
    """A piece of guest memory; sizes and offsets in bytes."""

    guest_phys_addr: int
    memory_size: int
    userspace_addr: int
    mmap_offset: int

    def pack(self) -> bytes:
        return bytes(
            abi.MemoryRegion(self.guest_phys_addr, self.memory_size, self.userspace_addr, self.mmap_offset)
        )

    @classmethod
    def parse(cls, data: bytes, offset: int) -> Region:
        c = abi.MemoryRegion.from_buffer_copy(data, offset)
        return cls(c.guest_phys_addr, c.memory_size, c.userspace_addr, c.mmap_offset)


@dataclass(frozen=True, slots=True)
class MemTable:
    """The memory table, one descriptor a region, in order."""

    regions: tuple[Region, ...]

    HEAD: ClassVar[int] = 8

    def pack(self) -> bytes:
        head = bytes(ctypes.c_uint32(len(self.regions))) + bytes(4)
        return head + b"".join(region.pack() for region in self.regions)

    @classmethod
    def parse(cls, name: str, data: bytes) -> MemTable:
        nregions = int.from_bytes(data[:4], byteorder)
        if nregions > abi.MEMORY_BASELINE_NREGIONS:
            raise CodecError(f"{name}: nregions is {nregions}, at most {abi.MEMORY_BASELINE_NREGIONS} fit")
        size = ctypes.sizeof(abi.MemoryRegion)
        # UML sends room for two regions whatever their number: more room than regions is no error.
        if len(data) < cls.HEAD + nregions * size:
            raise CodecError(
                f"{name}: nregions is {nregions}, which takes {cls.HEAD + nregions * size} bytes,"
                f" but the payload has {len(data)}"
            )
        return cls(tuple(Region.parse(data, cls.HEAD + i * size) for i in range(nregions)))


@dataclass(frozen=True, slots=True)
class MemReg:
    """One region, to add or to remove."""

    region: Region

    def pack(self) -> bytes:
        return bytes(8) + self.region.pack()

    @classmethod
    def parse(cls, name: str, data: bytes) -> MemReg:
        return cls(Region.parse(data, 8))


@dataclass(frozen=True, slots=True)
class Log:
    """Where the dirty log lies in its file, in bytes."""

    mmap_size: int
    mmap_offset: int

    def pack(self) -> bytes:
        return bytes(abi.Log(self.mmap_size, self.mmap_offset))

    @classmethod
    def parse(cls, name: str, data: bytes) -> Log:
        c = abi.Log.from_buffer_copy(data)
        return cls(c.mmap_size, c.mmap_offset)


@dataclass(frozen=True, slots=True)
class Iotlb:
    """One miss, update or invalidation of a translation."""

    iova: int
    size: int
    uaddr: int
    perm: int
    type: int

    def pack(self) -> bytes:
        return bytes(abi.IotlbMsg(self.iova, self.size, self.uaddr, self.perm, self.type))

    @classmethod
    def parse(cls, name: str, data: bytes) -> Iotlb:
        c = abi.IotlbMsg.from_buffer_copy(data)
        return cls(c.iova, c.size, c.uaddr, c.perm, c.type)


@dataclass(frozen=True, slots=True)
class Config:
    """A piece of the configuration space, from `offset`; `data` is as long as the message says."""

    offset: int
    flags: int
    data: bytes

    HEAD: ClassVar[int] = ctypes.sizeof(abi.Config)

    @property
    def size(self) -> int:
        """How many bytes of configuration space."""
        return len(self.data)

    def pack(self) -> bytes:
        return bytes(abi.Config(self.offset, len(self.data), self.flags)) + self.data

    @classmethod
    def parse(cls, name: str, data: bytes) -> Config:
        if len(data) < cls.HEAD:
            raise CodecError(f"{name}: the payload has {len(data)} bytes, expected at least {cls.HEAD}")
        c = abi.Config.from_buffer_copy(data)
        if c.size != len(data) - cls.HEAD:
            raise CodecError(f"{name}: size is {c.size}, but {len(data) - cls.HEAD} bytes follow it")
        return cls(c.offset, c.flags, data[cls.HEAD :])


@dataclass(frozen=True, slots=True)
class VringArea:
    """A piece of a file that belongs to a ring."""

    u64: int
    size: int
    offset: int

    def pack(self) -> bytes:
        return bytes(abi.VringArea(self.u64, self.size, self.offset))

    @classmethod
    def parse(cls, name: str, data: bytes) -> VringArea:
        c = abi.VringArea.from_buffer_copy(data)
        return cls(c.u64, c.size, c.offset)


@dataclass(frozen=True, slots=True)
class Inflight:
    """Where the table of requests in flight lies in its file."""

    mmap_size: int
    mmap_offset: int
    num_queues: int
    queue_size: int

    def pack(self) -> bytes:
        return bytes(abi.Inflight(self.mmap_size, self.mmap_offset, self.num_queues, self.queue_size))

    @classmethod
    def parse(cls, name: str, data: bytes) -> Inflight:
        # The last 4 bytes are C's padding: a front end with a packed structure leaves them out.
        c = abi.Inflight.from_buffer_copy(data.ljust(ctypes.sizeof(abi.Inflight), b"\0"))
        return cls(c.mmap_size, c.mmap_offset, c.num_queues, c.queue_size)


@dataclass(frozen=True, slots=True)
class DeviceState:
    """Which way the device's own state goes, and in what phase of migration."""

    direction: int
    phase: int

    def pack(self) -> bytes:
        return bytes(abi.TransferDeviceState(self.direction, self.phase))

    @classmethod
    def parse(cls, name: str, data: bytes) -> DeviceState:
        c = abi.TransferDeviceState.from_buffer_copy(data)
        return cls(c.direction, c.phase)


@dataclass(frozen=True, slots=True)
class Raw:
    """Bytes that nothing here reads: a request nobody knows, or one whose payload has no name yet."""

    data: bytes

    def pack(self) -> bytes:
        return self.data

    @classmethod
    def parse(cls, name: str, data: bytes) -> Raw:
        return cls(data)


Payload: TypeAlias = (
    U64
    | VringState
    | VringAddr
    | VringFile
    | MemTable
    | MemReg
    | Log
    | Iotlb
    | Config
    | VringArea
    | Inflight
    | DeviceState
    | Raw
)


@dataclass(frozen=True, slots=True)
class Shape:
    """What one message may look like: its payload's length in bytes, what reads it, how many descriptors."""

    parse: Callable[[str, bytes], Payload] | None = None
    low: int = 0
    high: int = 0
    fds: tuple[int, int] = (0, 0)

    @property
    def sizes(self) -> str:
        """The lengths allowed, as a phrase."""
        return f"{self.low}" if self.low == self.high else f"{self.low} to {self.high}"


def _exactly(parse: Callable[[str, bytes], Payload], size: int, fds: tuple[int, int] = (0, 0)) -> Shape:
    return Shape(parse, size, size, fds)


def _log_base(name: str, data: bytes) -> Payload:
    """With LOG_SHMFD a size and an offset, else an address."""
    if len(data) == 16:
        return Log.parse(name, data)
    if len(data) == 8:
        return U64.parse(name, data)
    raise CodecError(f"{name}: the payload has {len(data)} bytes, expected 8 or 16")


def _acknowledged_table(name: str, data: bytes) -> Payload:
    """An acknowledgement, or in postcopy the table with this side's addresses."""
    return U64.parse(name, data) if len(data) == 8 else MemTable.parse(name, data)


def _acknowledged_region(name: str, data: bytes) -> Payload:
    if len(data) == 8:
        return U64.parse(name, data)
    if len(data) == 40:
        return MemReg.parse(name, data)
    raise CodecError(f"{name}: the reply has {len(data)} bytes, expected 8 or 40")


_EMPTY = Shape()
_U64 = _exactly(U64.parse, 8)
_STATE = _exactly(VringState.parse, 8)
_FILE = _exactly(VringFile.parse, 8, (0, 1))
_TABLE_MAX = ctypes.sizeof(abi.Memory)
_CONFIG = Shape(Config.parse, Config.HEAD, Config.HEAD + abi.MAX_CONFIG_SIZE)
_REGION = ctypes.sizeof(abi.MemRegMsg)
_INFLIGHT = ctypes.sizeof(abi.Inflight)
_IOTLB = _exactly(Iotlb.parse, ctypes.sizeof(abi.IotlbMsg))
_UUID = _exactly(Raw.parse, ctypes.sizeof(abi.Shared))
#: What a request that nobody knows may carry. It is read only to find the next message.
UNKNOWN = Shape(Raw.parse, 0, 4096, (0, abi.MAX_FDS))

REQUESTS: dict[int, Shape] = {
    Request.GET_FEATURES: _EMPTY,
    Request.SET_FEATURES: _U64,
    Request.SET_OWNER: _EMPTY,
    Request.RESET_OWNER: _EMPTY,
    Request.SET_MEM_TABLE: Shape(MemTable.parse, MemTable.HEAD, _TABLE_MAX, (0, abi.MAX_FDS)),
    Request.SET_LOG_BASE: Shape(_log_base, 8, 16, (0, 1)),
    Request.SET_LOG_FD: Shape(fds=(0, 1)),
    Request.SET_VRING_NUM: _STATE,
    Request.SET_VRING_ADDR: _exactly(VringAddr.parse, 40),
    Request.SET_VRING_BASE: _STATE,
    Request.GET_VRING_BASE: _STATE,
    Request.SET_VRING_KICK: _FILE,
    Request.SET_VRING_CALL: _FILE,
    Request.SET_VRING_ERR: _FILE,
    Request.GET_PROTOCOL_FEATURES: _EMPTY,
    Request.SET_PROTOCOL_FEATURES: _U64,
    Request.GET_QUEUE_NUM: _EMPTY,
    Request.SET_VRING_ENABLE: _STATE,
    Request.SEND_RARP: _U64,
    Request.NET_SET_MTU: _U64,
    Request.SET_BACKEND_REQ_FD: Shape(fds=(1, 1)),
    Request.IOTLB_MSG: _IOTLB,
    Request.SET_VRING_ENDIAN: _STATE,
    Request.GET_CONFIG: _CONFIG,
    Request.SET_CONFIG: _CONFIG,
    Request.CLOSE_CRYPTO_SESSION: _U64,
    Request.POSTCOPY_ADVISE: _EMPTY,
    Request.POSTCOPY_LISTEN: _EMPTY,
    Request.POSTCOPY_END: _EMPTY,
    Request.GET_INFLIGHT_FD: Shape(Inflight.parse, _INFLIGHT - 4, _INFLIGHT),
    Request.SET_INFLIGHT_FD: Shape(Inflight.parse, _INFLIGHT - 4, _INFLIGHT, (1, 1)),
    Request.GPU_SET_SOCKET: Shape(fds=(1, 1)),
    Request.RESET_DEVICE: _EMPTY,
    Request.VRING_KICK: _STATE,
    Request.GET_MAX_MEM_SLOTS: _EMPTY,
    Request.ADD_MEM_REG: _exactly(MemReg.parse, _REGION, (1, 1)),
    # No descriptor should come; some front ends send one, and it is closed unused.
    Request.REM_MEM_REG: _exactly(MemReg.parse, _REGION, (0, 1)),
    Request.SET_STATUS: _U64,
    Request.GET_STATUS: _EMPTY,
    Request.GET_SHARED_OBJECT: _UUID,
    Request.SET_DEVICE_STATE_FD: _exactly(DeviceState.parse, 8, (1, 1)),
    Request.CHECK_DEVICE_STATE: _EMPTY,
    Request.GET_SHMEM_CONFIG: _EMPTY,
    Request.GET_VRING_BASE_SKIP_DRAIN: _STATE,
}

#: Replies whose layout is their request's own; every other reply is an acknowledgement, a `U64`.
REPLIES: dict[int, Shape] = {
    Request.GET_VRING_BASE: _STATE,
    Request.GET_VRING_BASE_SKIP_DRAIN: _STATE,
    Request.SET_MEM_TABLE: Shape(_acknowledged_table, 8, _TABLE_MAX),
    Request.ADD_MEM_REG: Shape(_acknowledged_region, 8, _REGION),
    # Three shapes in the field: nothing (DPDK), a u64 (libvhost-user), the request's own (rust-vmm).
    Request.SET_LOG_BASE: Shape(_log_base, 0, 16),
    # No payload at all is how the back end refuses.
    Request.GET_CONFIG: Shape(Config.parse, 0, Config.HEAD + abi.MAX_CONFIG_SIZE),
    Request.CREATE_CRYPTO_SESSION: UNKNOWN,
    Request.POSTCOPY_ADVISE: Shape(fds=(1, 1)),
    Request.GET_INFLIGHT_FD: Shape(Inflight.parse, _INFLIGHT - 4, _INFLIGHT, (0, 1)),
    Request.GET_SHARED_OBJECT: Shape(Raw.parse, 0, 16, (0, 1)),
    Request.SET_DEVICE_STATE_FD: _exactly(U64.parse, 8, (0, 1)),
    Request.GET_SHMEM_CONFIG: UNKNOWN,
}

#: Requests that are always answered, need_reply or not [Communication, and each request's "reply payload"].
ALWAYS_ANSWERED = frozenset(
    {
        Request.GET_FEATURES,
        Request.GET_PROTOCOL_FEATURES,
        Request.GET_VRING_BASE,
        Request.GET_VRING_BASE_SKIP_DRAIN,
        Request.GET_QUEUE_NUM,
        Request.IOTLB_MSG,
        Request.GET_CONFIG,
        Request.CREATE_CRYPTO_SESSION,
        Request.POSTCOPY_ADVISE,
        Request.POSTCOPY_END,
        Request.GET_INFLIGHT_FD,
        Request.GET_MAX_MEM_SLOTS,
        Request.GET_STATUS,
        Request.GET_SHARED_OBJECT,
        Request.SET_DEVICE_STATE_FD,
        Request.CHECK_DEVICE_STATE,
        Request.GET_SHMEM_CONFIG,
    }
)

#: Those of them whose answer is nothing but success (0) or failure.
ANSWERED_WITH_RESULT = frozenset({Request.IOTLB_MSG, Request.POSTCOPY_END, Request.CHECK_DEVICE_STATE})

_MMAP = ctypes.sizeof(abi.MMap)

BACKEND_REQUESTS: dict[int, Shape] = {
    BackendRequest.IOTLB_MSG: _IOTLB,
    BackendRequest.CONFIG_CHANGE_MSG: _EMPTY,
    BackendRequest.VRING_HOST_NOTIFIER_MSG: _exactly(VringArea.parse, 24, (0, 1)),
    BackendRequest.VRING_CALL: _STATE,
    BackendRequest.VRING_ERR: _STATE,
    BackendRequest.SHARED_OBJECT_ADD: _UUID,
    BackendRequest.SHARED_OBJECT_REMOVE: _UUID,
    BackendRequest.SHARED_OBJECT_LOOKUP: _UUID,
    BackendRequest.SHMEM_MAP: _exactly(Raw.parse, _MMAP, (1, 1)),
    BackendRequest.SHMEM_UNMAP: _exactly(Raw.parse, _MMAP),
}

BACKEND_REPLIES: dict[int, Shape] = {
    BackendRequest.SHARED_OBJECT_LOOKUP: _exactly(U64.parse, 8, (0, 1)),
}

ACKNOWLEDGEMENT = _U64
