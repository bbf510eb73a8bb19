"""What every virtio device shares: device numbers, status and feature bits, split and packed rings.

Source: virtio 1.3 and Linux's virtio_ids.h, virtio_config.h, virtio_ring.h. Names are the headers' without
`VIRTIO_`; those that begin with `VRING_` keep it. Feature bits are bit numbers, flags are values, but the
packed ring's AVAIL and USED, which are bit numbers as in the header. Layouts are little endian, as virtio 1
has them; a legacy device has the same in the guest's own byte order.

Promises: sizes are checked at import. Never holds behaviour.
"""

from __future__ import annotations

from ctypes import LittleEndianStructure
from ctypes import c_uint16 as u16
from ctypes import c_uint32 as u32
from ctypes import c_uint64 as u64

from pyvhost.abi._check import sized

# Device numbers (virtio 1.3, 5 "Device Types"; virtio_ids.h)
ID_NET = 1
ID_BLOCK = 2
ID_CONSOLE = 3
ID_RNG = 4
ID_BALLOON = 5
ID_IOMEM = 6
ID_RPMSG = 7
ID_SCSI = 8
ID_9P = 9
ID_MAC80211_WLAN = 10
ID_RPROC_SERIAL = 11
ID_CAIF = 12
ID_MEMORY_BALLOON = 13
ID_GPU = 16
ID_CLOCK = 17
ID_INPUT = 18
ID_VSOCK = 19
ID_CRYPTO = 20
ID_SIGNAL_DIST = 21
ID_PSTORE = 22
ID_IOMMU = 23
ID_MEM = 24
ID_SOUND = 25
ID_FS = 26
ID_PMEM = 27
ID_RPMB = 28
ID_MAC80211_HWSIM = 29
ID_VIDEO_ENCODER = 30
ID_VIDEO_DECODER = 31
ID_SCMI = 32
ID_NITRO_SEC_MOD = 33
ID_I2C_ADAPTER = 34
ID_WATCHDOG = 35
ID_CAN = 36
ID_DMABUF = 37
ID_PARAM_SERV = 38
ID_AUDIO_POLICY = 39
ID_BT = 40
ID_GPIO = 41
ID_SPI = 45
ID_MEDIA = 48

# PCI device numbers of transitional devices
TRANS_ID_NET = 0x1000
TRANS_ID_BLOCK = 0x1001
TRANS_ID_BALLOON = 0x1002
TRANS_ID_CONSOLE = 0x1003
TRANS_ID_SCSI = 0x1004
TRANS_ID_RNG = 0x1005
TRANS_ID_9P = 0x1009

# Device status (virtio 1.3, 2.1; virtio_config.h)
CONFIG_S_ACKNOWLEDGE = 1
CONFIG_S_DRIVER = 2
CONFIG_S_DRIVER_OK = 4
CONFIG_S_FEATURES_OK = 8
CONFIG_S_NEEDS_RESET = 0x40
CONFIG_S_FAILED = 0x80

# Feature bits that belong to no one device type (virtio 1.3, 6; virtio_config.h, virtio_ring.h)
TRANSPORT_F_START = 28
F_NOTIFY_ON_EMPTY = 24
F_ANY_LAYOUT = 27
RING_F_INDIRECT_DESC = 28
RING_F_EVENT_IDX = 29
F_VERSION_1 = 32
F_ACCESS_PLATFORM = 33
F_IOMMU_PLATFORM = F_ACCESS_PLATFORM
F_RING_PACKED = 34
F_IN_ORDER = 35
F_ORDER_PLATFORM = 36
F_SR_IOV = 37
F_NOTIFICATION_DATA = 38
F_NOTIF_CONFIG_DATA = 39
F_RING_RESET = 40
F_ADMIN_VQ = 41

# Descriptor flags, both rings
VRING_DESC_F_NEXT = 1
VRING_DESC_F_WRITE = 2
VRING_DESC_F_INDIRECT = 4

# Packed ring: bit numbers within a descriptor's flags
VRING_PACKED_DESC_F_AVAIL = 7
VRING_PACKED_DESC_F_USED = 15

# Split ring: the flags words
VRING_USED_F_NO_NOTIFY = 1
VRING_AVAIL_F_NO_INTERRUPT = 1

# Packed ring: event suppression
VRING_PACKED_EVENT_FLAG_ENABLE = 0
VRING_PACKED_EVENT_FLAG_DISABLE = 1
VRING_PACKED_EVENT_FLAG_DESC = 2
VRING_PACKED_EVENT_F_WRAP_CTR = 15

# What a ring's parts must be aligned to, in bytes (virtio 1.3, 2.7)
VRING_AVAIL_ALIGN_SIZE = 2
VRING_USED_ALIGN_SIZE = 4
VRING_DESC_ALIGN_SIZE = 16

# The most entries a ring may have (virtio 1.3, 2.7 and 2.8.10; no header names it)
QUEUE_SIZE_MAX = 32768


@sized(16)
class VringDesc(LittleEndianStructure):
    """One descriptor of a split ring, or of an indirect table (virtio 1.3, 2.7.5)."""

    _fields_ = (("addr", u64), ("len", u32), ("flags", u16), ("next", u16))


@sized(4)
class VringAvail(LittleEndianStructure):
    """The available ring (virtio 1.3, 2.7.6): `ring` has one u16 an entry, then a u16 `used_event`."""

    _fields_ = (("flags", u16), ("idx", u16), ("ring", u16 * 0))


@sized(8)
class VringUsedElem(LittleEndianStructure):
    """One used element: the head of a chain, and the bytes that the device wrote into it."""

    _fields_ = (("id", u32), ("len", u32))


@sized(4)
class VringUsed(LittleEndianStructure):
    """The used ring (virtio 1.3, 2.7.8): `ring` has one element an entry, then a u16 `avail_event`."""

    _fields_ = (("flags", u16), ("idx", u16), ("ring", VringUsedElem * 0))


@sized(16)
class VringPackedDesc(LittleEndianStructure):
    """One descriptor of a packed ring (virtio 1.3, 2.8.13)."""

    _fields_ = (("addr", u64), ("len", u32), ("id", u16), ("flags", u16))


@sized(4)
class VringPackedDescEvent(LittleEndianStructure):
    """A packed ring's event suppression area, the driver's or the device's (virtio 1.3, 2.8.14)."""

    _fields_ = (("off_wrap", u16), ("flags", u16))
