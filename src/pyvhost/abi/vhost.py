"""Linux's vhost character devices: ioctls, messages, feature bits (linux/vhost.h, linux/vhost_types.h).

Everything of the header as it was in 2016, and what it gained since. Names are the header's without `VHOST_`;
feature bits and `VRING_F_LOG` are bit numbers. Layouts are in the machine's own byte order.

Promises: sizes are checked at import; ioctl numbers are computed, none is written out. Never calls anything.
"""

from __future__ import annotations

from ctypes import Structure, Union, c_char, c_int, c_uint, c_ushort
from ctypes import c_uint8 as u8
from ctypes import c_uint16 as u16
from ctypes import c_uint32 as u32
from ctypes import c_uint64 as u64

from pyvhost.abi._check import sized
from pyvhost.abi._ioctl import _IO, _IOR, _IOW, _IOWR

# --- layouts ---------------------------------------------------------------------------------------


@sized(8)
class VringState(Structure):
    """A ring's index, and a number about it."""

    _fields_ = (("index", c_uint), ("num", c_uint))


@sized(8)
class VringFile(Structure):
    """A ring's index, and a descriptor for it; `FILE_UNBIND` takes the descriptor away."""

    _fields_ = (("index", c_uint), ("fd", c_int))


@sized(40)
class VringAddr(Structure):
    """Where a ring's three parts lie, as user addresses, and where writes to its used ring are logged."""

    _fields_ = (
        ("index", c_uint),
        ("flags", c_uint),
        ("desc_user_addr", u64),
        ("used_user_addr", u64),
        ("avail_user_addr", u64),
        ("log_guest_addr", u64),
    )


@sized(4)
class WorkerState(Structure):
    """A worker thread's id (since Linux 6.5)."""

    _fields_ = (("worker_id", c_uint),)


@sized(8)
class VringWorker(Structure):
    """Which worker serves which ring (since Linux 6.5)."""

    _fields_ = (("index", c_uint), ("worker_id", c_uint))


@sized(32)
class IotlbMsg(Structure):
    """One miss, update or invalidation of a translation; sizes in bytes."""

    _fields_ = (("iova", u64), ("size", u64), ("uaddr", u64), ("perm", u8), ("type", u8))


class _MsgPayload(Union):
    _fields_ = (("iotlb", IotlbMsg), ("padding", u8 * 64))


@sized(72)
class Msg(Structure):
    """What is read from and written to the device when it has an IOTLB."""

    _anonymous_ = ("payload",)
    _fields_ = (("type", c_int), ("payload", _MsgPayload))


@sized(72)
class MsgV2(Structure):
    """The same with an address space, once `BACKEND_F_IOTLB_MSG_V2` is acknowledged."""

    _anonymous_ = ("payload",)
    _fields_ = (("type", u32), ("asid", u32), ("payload", _MsgPayload))


@sized(32)
class MemoryRegion(Structure):
    """A piece of guest memory; sizes in bytes."""

    _fields_ = (
        ("guest_phys_addr", u64),
        ("memory_size", u64),
        ("userspace_addr", u64),
        ("flags_padding", u64),
    )


@sized(8)
class Memory(Structure):
    """The memory table's head; `regions` has `nregions` of `MemoryRegion`."""

    _fields_ = (("nregions", u32), ("padding", u32), ("regions", MemoryRegion * 0))


@sized(232)
class ScsiTarget(Structure):
    """The endpoint of a vhost-scsi device."""

    _fields_ = (
        ("abi_version", c_int),
        ("vhost_wwpn", c_char * 224),
        ("vhost_tpgt", c_ushort),
        ("reserved", c_ushort),
    )


@sized(8)
class VdpaConfig(Structure):
    """A piece of the configuration space; `buf` has `len` bytes from offset `off`."""

    _fields_ = (("off", u32), ("len", u32), ("buf", u8 * 0))


@sized(16)
class VdpaIovaRange(Structure):
    """The first and the last address that can be mapped."""

    _fields_ = (("first", u64), ("last", u64))


@sized(8)
class FeaturesArray(Structure):
    """Feature bits beyond 63 (since Linux 6.17); `features` has `count` words of 64 bits, lowest first."""

    _fields_ = (("count", u64), ("features", u64 * 0))


# --- values ----------------------------------------------------------------------------------------

FILE_UNBIND = -1
PAGE_SIZE = 0x1000

VRING_F_LOG = 0

ACCESS_RO = 1
ACCESS_WO = 2
ACCESS_RW = 3

IOTLB_MISS = 1
IOTLB_UPDATE = 2
IOTLB_INVALIDATE = 3
IOTLB_ACCESS_FAIL = 4
IOTLB_BATCH_BEGIN = 5
IOTLB_BATCH_END = 6

IOTLB_MSG = 1
IOTLB_MSG_V2 = 2

VRING_LITTLE_ENDIAN = 0
VRING_BIG_ENDIAN = 1

SCSI_ABI_VERSION = 1

FORK_OWNER_KTHREAD = 0
FORK_OWNER_TASK = 1

# Feature bits
F_LOG_ALL = 26
NET_F_VIRTIO_NET_HDR = 27
F_DEVICE_IOTLB = 63  # in the header of 2016; later ones have virtio's F_ACCESS_PLATFORM, 33, instead

# Back-end feature bits
BACKEND_F_IOTLB_MSG_V2 = 1
BACKEND_F_IOTLB_BATCH = 2
BACKEND_F_IOTLB_ASID = 3
BACKEND_F_SUSPEND = 4
BACKEND_F_RESUME = 5
BACKEND_F_ENABLE_AFTER_DRIVER_OK = 6
BACKEND_F_DESC_ASID = 7
BACKEND_F_IOTLB_PERSIST = 8

# --- ioctls ----------------------------------------------------------------------------------------

VIRTIO = 0xAF

# Any device
GET_FEATURES = _IOR(VIRTIO, 0x00, u64)
SET_FEATURES = _IOW(VIRTIO, 0x00, u64)
SET_OWNER = _IO(VIRTIO, 0x01)
RESET_OWNER = _IO(VIRTIO, 0x02)
SET_MEM_TABLE = _IOW(VIRTIO, 0x03, Memory)
SET_LOG_BASE = _IOW(VIRTIO, 0x04, u64)
SET_LOG_FD = _IOW(VIRTIO, 0x07, c_int)
NEW_WORKER = _IOR(VIRTIO, 0x08, WorkerState)
FREE_WORKER = _IOW(VIRTIO, 0x09, WorkerState)

SET_VRING_NUM = _IOW(VIRTIO, 0x10, VringState)
SET_VRING_ADDR = _IOW(VIRTIO, 0x11, VringAddr)
SET_VRING_BASE = _IOW(VIRTIO, 0x12, VringState)
GET_VRING_BASE = _IOWR(VIRTIO, 0x12, VringState)
SET_VRING_ENDIAN = _IOW(VIRTIO, 0x13, VringState)
GET_VRING_ENDIAN = _IOW(VIRTIO, 0x14, VringState)
ATTACH_VRING_WORKER = _IOW(VIRTIO, 0x15, VringWorker)
GET_VRING_WORKER = _IOWR(VIRTIO, 0x16, VringWorker)

SET_VRING_KICK = _IOW(VIRTIO, 0x20, VringFile)
SET_VRING_CALL = _IOW(VIRTIO, 0x21, VringFile)
SET_VRING_ERR = _IOW(VIRTIO, 0x22, VringFile)
SET_VRING_BUSYLOOP_TIMEOUT = _IOW(VIRTIO, 0x23, VringState)
GET_VRING_BUSYLOOP_TIMEOUT = _IOW(VIRTIO, 0x24, VringState)
SET_BACKEND_FEATURES = _IOW(VIRTIO, 0x25, u64)
GET_BACKEND_FEATURES = _IOR(VIRTIO, 0x26, u64)

GET_FEATURES_ARRAY = _IOR(VIRTIO, 0x83, FeaturesArray)
SET_FEATURES_ARRAY = _IOW(VIRTIO, 0x83, FeaturesArray)
SET_FORK_FROM_OWNER = _IOW(VIRTIO, 0x84, u8)
GET_FORK_FROM_OWNER = _IOR(VIRTIO, 0x85, u8)

# vhost-net
NET_SET_BACKEND = _IOW(VIRTIO, 0x30, VringFile)

# vhost-scsi
SCSI_SET_ENDPOINT = _IOW(VIRTIO, 0x40, ScsiTarget)
SCSI_CLEAR_ENDPOINT = _IOW(VIRTIO, 0x41, ScsiTarget)
SCSI_GET_ABI_VERSION = _IOW(VIRTIO, 0x42, c_int)
SCSI_SET_EVENTS_MISSED = _IOW(VIRTIO, 0x43, u32)
SCSI_GET_EVENTS_MISSED = _IOW(VIRTIO, 0x44, u32)

# vhost-vsock
VSOCK_SET_GUEST_CID = _IOW(VIRTIO, 0x60, u64)
VSOCK_SET_RUNNING = _IOW(VIRTIO, 0x61, c_int)

# vhost-vDPA
VDPA_GET_DEVICE_ID = _IOR(VIRTIO, 0x70, u32)
VDPA_GET_STATUS = _IOR(VIRTIO, 0x71, u8)
VDPA_SET_STATUS = _IOW(VIRTIO, 0x72, u8)
VDPA_GET_CONFIG = _IOR(VIRTIO, 0x73, VdpaConfig)
VDPA_SET_CONFIG = _IOW(VIRTIO, 0x74, VdpaConfig)
VDPA_SET_VRING_ENABLE = _IOW(VIRTIO, 0x75, VringState)
VDPA_GET_VRING_NUM = _IOR(VIRTIO, 0x76, u16)
VDPA_SET_CONFIG_CALL = _IOW(VIRTIO, 0x77, c_int)
VDPA_GET_IOVA_RANGE = _IOR(VIRTIO, 0x78, VdpaIovaRange)
VDPA_GET_CONFIG_SIZE = _IOR(VIRTIO, 0x79, u32)
VDPA_GET_AS_NUM = _IOR(VIRTIO, 0x7A, c_uint)
VDPA_GET_VRING_GROUP = _IOWR(VIRTIO, 0x7B, VringState)
VDPA_SET_GROUP_ASID = _IOW(VIRTIO, 0x7C, VringState)
VDPA_SUSPEND = _IO(VIRTIO, 0x7D)
VDPA_RESUME = _IO(VIRTIO, 0x7E)
VDPA_GET_VRING_DESC_GROUP = _IOWR(VIRTIO, 0x7F, VringState)
VDPA_GET_VQS_COUNT = _IOR(VIRTIO, 0x80, u32)
VDPA_GET_GROUP_NUM = _IOR(VIRTIO, 0x81, u32)
VDPA_GET_VRING_SIZE = _IOWR(VIRTIO, 0x82, VringState)
