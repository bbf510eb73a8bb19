"""The block device: feature bits, requests, status.

Source: virtio 1.3, 5.2, and Linux's virtio_blk.h. Names are the header's without `VIRTIO_BLK_`; feature bits are
bit numbers. Layouts are little endian, as virtio 1 has them.

Promises: sizes are checked at import. Never holds behaviour.
"""

from __future__ import annotations

from ctypes import LittleEndianStructure
from ctypes import c_uint32 as u32
from ctypes import c_uint64 as u64

from pyvhost.abi._check import sized

# Feature bits (5.2.3)
F_SIZE_MAX = 1
F_SEG_MAX = 2
F_BLK_SIZE = 6
F_FLUSH = 9
F_MQ = 12

# Types of request (5.2.6)
T_IN = 0
T_OUT = 1
T_FLUSH = 4
T_GET_ID = 8

# Status (5.2.6)
S_OK = 0
S_IOERR = 1
S_UNSUPP = 2


@sized(16)
class Outhdr(LittleEndianStructure):
    """What a request begins with; `type` first, `sector` in units of 512 bytes."""

    _fields_ = (("type", u32), ("ioprio", u32), ("sector", u64))
