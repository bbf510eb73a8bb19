"""The vhost-user protocol: requests, protocol feature bits, message header and payloads.

Source: QEMU's docs/interop/vhost-user.rst; section names in brackets are its. Names are its without
`VHOST_USER_`; feature bits are bit numbers. Everything is in the machine's own byte order.

Promises: sizes are checked at import. Never packs or unpacks a message.
"""

from __future__ import annotations

from ctypes import Structure
from ctypes import c_uint8 as u8
from ctypes import c_uint16 as u16
from ctypes import c_uint32 as u32
from ctypes import c_uint64 as u64
from enum import IntEnum

from pyvhost.abi._check import sized
from pyvhost.abi.vhost import IotlbMsg as IotlbMsg
from pyvhost.abi.vhost import VringAddr as VringAddr
from pyvhost.abi.vhost import VringState as VringState

# The device feature bit that says "I have protocol features"; virtio reserves it
F_PROTOCOL_FEATURES = 30


class Request(IntEnum):
    """What the front end asks of the back end [Front-end message types]."""

    NONE = 0
    GET_FEATURES = 1
    SET_FEATURES = 2
    SET_OWNER = 3
    RESET_OWNER = 4
    SET_MEM_TABLE = 5
    SET_LOG_BASE = 6
    SET_LOG_FD = 7
    SET_VRING_NUM = 8
    SET_VRING_ADDR = 9
    SET_VRING_BASE = 10
    GET_VRING_BASE = 11
    SET_VRING_KICK = 12
    SET_VRING_CALL = 13
    SET_VRING_ERR = 14
    GET_PROTOCOL_FEATURES = 15
    SET_PROTOCOL_FEATURES = 16
    GET_QUEUE_NUM = 17
    SET_VRING_ENABLE = 18
    SEND_RARP = 19
    NET_SET_MTU = 20
    SET_BACKEND_REQ_FD = 21
    IOTLB_MSG = 22
    SET_VRING_ENDIAN = 23
    GET_CONFIG = 24
    SET_CONFIG = 25
    CREATE_CRYPTO_SESSION = 26
    CLOSE_CRYPTO_SESSION = 27
    POSTCOPY_ADVISE = 28
    POSTCOPY_LISTEN = 29
    POSTCOPY_END = 30
    GET_INFLIGHT_FD = 31
    SET_INFLIGHT_FD = 32
    GPU_SET_SOCKET = 33
    RESET_DEVICE = 34
    VRING_KICK = 35
    GET_MAX_MEM_SLOTS = 36
    ADD_MEM_REG = 37
    REM_MEM_REG = 38
    SET_STATUS = 39
    GET_STATUS = 40
    GET_SHARED_OBJECT = 41
    SET_DEVICE_STATE_FD = 42
    CHECK_DEVICE_STATE = 43
    GET_SHMEM_CONFIG = 44
    GET_VRING_BASE_SKIP_DRAIN = 45


class BackendRequest(IntEnum):
    """What the back end asks of the front end, on a socket of its own [Back-end message types]."""

    NONE = 0
    IOTLB_MSG = 1
    CONFIG_CHANGE_MSG = 2
    VRING_HOST_NOTIFIER_MSG = 3
    VRING_CALL = 4
    VRING_ERR = 5
    SHARED_OBJECT_ADD = 6
    SHARED_OBJECT_REMOVE = 7
    SHARED_OBJECT_LOOKUP = 8
    SHMEM_MAP = 9
    SHMEM_UNMAP = 10


# Protocol feature bits [Protocol features]
PROTOCOL_F_MQ = 0
PROTOCOL_F_LOG_SHMFD = 1
PROTOCOL_F_RARP = 2
PROTOCOL_F_REPLY_ACK = 3
PROTOCOL_F_MTU = 4
PROTOCOL_F_BACKEND_REQ = 5
PROTOCOL_F_CROSS_ENDIAN = 6
PROTOCOL_F_CRYPTO_SESSION = 7
PROTOCOL_F_PAGEFAULT = 8
PROTOCOL_F_CONFIG = 9
PROTOCOL_F_BACKEND_SEND_FD = 10
PROTOCOL_F_HOST_NOTIFIER = 11
PROTOCOL_F_INFLIGHT_SHMFD = 12
PROTOCOL_F_RESET_DEVICE = 13
PROTOCOL_F_INBAND_NOTIFICATIONS = 14
PROTOCOL_F_CONFIGURE_MEM_SLOTS = 15
PROTOCOL_F_STATUS = 16
PROTOCOL_F_XEN_MMAP = 17
PROTOCOL_F_SHARED_OBJECT = 18
PROTOCOL_F_DEVICE_STATE = 19
PROTOCOL_F_GET_VRING_BASE_INFLIGHT = 20
PROTOCOL_F_GPA_ADDRESSES = 21
PROTOCOL_F_SHMEM = 22
PROTOCOL_F_GET_VRING_BASE_SKIP_DRAIN = 23

# Header: flags [Header]
VERSION = 1
VERSION_MASK = 3
FLAG_REPLY = 1 << 2
FLAG_NEED_REPLY = 1 << 3

# SET_VRING_KICK, _CALL, _ERR: what their u64 says
VRING_IDX_MASK = 0xFF
VRING_NOFD_MASK = 1 << 8

# SET_DEVICE_STATE_FD's reply, and its two arguments [Migrating back-end state]
DEVICE_STATE_ERROR_MASK = 0xFF
DEVICE_STATE_NOFD_MASK = 1 << 8
TRANSFER_STATE_DIRECTION_SAVE = 0
TRANSFER_STATE_DIRECTION_LOAD = 1
TRANSFER_STATE_PHASE_STOPPED = 0

# GET_CONFIG, SET_CONFIG: flags
SET_CONFIG_TYPE_FRONTEND = 0
SET_CONFIG_TYPE_MIGRATION = 1

# SHMEM_MAP: flags; without it a mapping is read only
FLAG_MAP_RW = 1 << 0

# SET_STATUS, GET_STATUS speak virtio's device status: abi.virtio.CONFIG_S_*

# Limits
MAX_FDS = 8  # descriptors with one message
MEMORY_BASELINE_NREGIONS = 8  # regions in a SET_MEM_TABLE
MAX_RAM_SLOTS = 509  # the most that front ends make use of with CONFIGURE_MEM_SLOTS
MAX_CONFIG_SIZE = 256  # bytes of configuration space in one message
LOG_PAGE = 0x1000  # bytes that a bit of the dirty log stands for


@sized(12)
class Header(Structure):
    """Before every message; `size` is the payload's, in bytes."""

    _fields_ = (("request", u32), ("flags", u32), ("size", u32))


@sized(32)
class MemoryRegion(Structure):
    """A piece of guest memory: `memory_size` bytes, which begin `mmap_offset` bytes into its file."""

    _fields_ = (
        ("guest_phys_addr", u64),
        ("memory_size", u64),
        ("userspace_addr", u64),
        ("mmap_offset", u64),
    )


@sized(40)
class MemoryRegionXen(Structure):
    """The same with PROTOCOL_F_XEN_MMAP."""

    _fields_ = (
        ("guest_phys_addr", u64),
        ("memory_size", u64),
        ("userspace_addr", u64),
        ("mmap_offset", u64),
        ("xen_mmap_flags", u32),
        ("domid", u32),
    )


@sized(264)
class Memory(Structure):
    """The memory table; a message has only the first `nregions` of the regions."""

    _fields_ = (("nregions", u32), ("padding", u32), ("regions", MemoryRegion * MEMORY_BASELINE_NREGIONS))


@sized(40)
class MemRegMsg(Structure):
    """ADD_MEM_REG, REM_MEM_REG."""

    _fields_ = (("padding", u64), ("region", MemoryRegion))


@sized(16)
class Log(Structure):
    """SET_LOG_BASE: the dirty log's size and where it begins in its file, in bytes."""

    _fields_ = (("mmap_size", u64), ("mmap_offset", u64))


@sized(12)
class Config(Structure):
    """GET_CONFIG, SET_CONFIG; `region` has `size` bytes."""

    _fields_ = (("offset", u32), ("size", u32), ("flags", u32), ("region", u8 * 0))


@sized(24)
class VringArea(Structure):
    """VRING_HOST_NOTIFIER_MSG: a ring's index (and `VRING_NOFD_MASK`), and a piece of a file."""

    _fields_ = (("u64", u64), ("size", u64), ("offset", u64))


@sized(24)
class Inflight(Structure):
    """GET_INFLIGHT_FD, SET_INFLIGHT_FD. The last 4 bytes are C's padding, and on the wire."""

    _fields_ = (("mmap_size", u64), ("mmap_offset", u64), ("num_queues", u16), ("queue_size", u16))


@sized(16)
class Shared(Structure):
    """The SHARED_OBJECT requests."""

    _fields_ = (("uuid", u8 * 16),)


@sized(8)
class TransferDeviceState(Structure):
    """SET_DEVICE_STATE_FD."""

    _fields_ = (("direction", u32), ("phase", u32))


@sized(40)
class MMap(Structure):
    """SHMEM_MAP, SHMEM_UNMAP; offsets and length in bytes."""

    _fields_ = (
        ("shmid", u8),
        ("padding", u8 * 7),
        ("fd_offset", u64),
        ("shm_offset", u64),
        ("len", u64),
        ("flags", u64),
    )


@sized(8)
class ShMemConfig(Structure):
    """GET_SHMEM_CONFIG's reply; `memory_sizes` has a size in bytes for each region, 0 for an unused one."""

    _fields_ = (("nregions", u32), ("padding", u32), ("memory_sizes", u64 * 0))


# What lies in the file of GET_INFLIGHT_FD [Inflight I/O tracking]


@sized(16)
class DescStateSplit(Structure):
    """One descriptor of a split ring."""

    _fields_ = (("inflight", u8), ("padding", u8 * 5), ("next", u16), ("counter", u64))


@sized(16)
class QueueRegionSplit(Structure):
    """One split ring; `desc` has `desc_num` of `DescStateSplit`."""

    _fields_ = (
        ("features", u64),
        ("version", u16),
        ("desc_num", u16),
        ("last_batch_head", u16),
        ("used_idx", u16),
        ("desc", DescStateSplit * 0),
    )


@sized(32)
class DescStatePacked(Structure):
    """One descriptor of a packed ring."""

    _fields_ = (
        ("inflight", u8),
        ("padding", u8),
        ("next", u16),
        ("last", u16),
        ("num", u16),
        ("counter", u64),
        ("id", u16),
        ("flags", u16),
        ("len", u32),
        ("addr", u64),
    )


@sized(32)
class QueueRegionPacked(Structure):
    """One packed ring; `desc` has `desc_num` of `DescStatePacked`."""

    _fields_ = (
        ("features", u64),
        ("version", u16),
        ("desc_num", u16),
        ("free_head", u16),
        ("old_free_head", u16),
        ("used_idx", u16),
        ("old_used_idx", u16),
        ("used_wrap_counter", u8),
        ("old_used_wrap_counter", u8),
        ("padding", u8 * 7),
        ("desc", DescStatePacked * 0),
    )
