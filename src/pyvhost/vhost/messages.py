"""The IOTLB's messages as they are read from and written to a vhost device (struct vhost_msg, vhost_msg_v2).

Promises: the kernel's lengths and errors. Never: waits, or keeps a message.
"""

from __future__ import annotations

import ctypes
import errno
import sys

from pyvhost.abi import vhost as abi
from pyvhost.vhost.errors import VhostError
from pyvhost.vhost.kernel_device import KernelDevice

#: Both layouts have the message itself behind a type and four more bytes.
_HEAD = 8
_SIZE = ctypes.sizeof(abi.Msg)


def write(device: KernelDevice, raw: bytes) -> int:
    """Takes a message; 72, which is what the kernel answers to any that is long enough. OSError: EINVAL, EFAULT."""
    kind = int.from_bytes(raw[:4], sys.byteorder)
    if len(raw) < _HEAD + ctypes.sizeof(abi.IotlbMsg) or kind not in (abi.IOTLB_MSG, abi.IOTLB_MSG_V2):
        raise VhostError(errno.EINVAL, f"{device.name}: {len(raw)} bytes of kind {kind} are no IOTLB message")
    msg = abi.IotlbMsg.from_buffer_copy(raw, _HEAD)
    if msg.type == abi.IOTLB_UPDATE:
        if msg.size == 0:
            raise VhostError(errno.EINVAL, f"{device.name}: an IOTLB entry at {msg.iova:#x} without a byte")
        device.iotlb_update(msg.iova, msg.size, msg.uaddr, msg.perm)
    elif msg.type == abi.IOTLB_INVALIDATE:
        device.iotlb_invalidate(msg.iova, msg.size)
    else:
        raise VhostError(
            errno.EFAULT, f"{device.name}: an IOTLB message of type {msg.type} is not for a device"
        )
    return _SIZE


def read(device: KernelDevice) -> bytes | None:
    """The next miss as a message of 72 bytes, in the layout that was acknowledged; None: there is none."""
    miss = device.take_iotlb_miss()
    if miss is None:
        return None
    body = abi.IotlbMsg(iova=miss.iova, perm=miss.perm, type=abi.IOTLB_MISS)
    second = device.acked_backend_features >> abi.BACKEND_F_IOTLB_MSG_V2 & 1
    kind = abi.IOTLB_MSG_V2 if second else abi.IOTLB_MSG
    return (bytes(ctypes.c_uint32(kind)) + bytes(4) + bytes(body)).ljust(_SIZE, b"\0")
