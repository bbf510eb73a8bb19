"""The socket device: feature bits, packet header, operations, events, configuration space.

Source: virtio 1.3, 5.10, and Linux's virtio_vsock.h; the CIDs are vm_sockets.h's. Names are the header's
without `VIRTIO_VSOCK_`, but `VMADDR_*`, which are whole; feature bits are bit numbers. Little endian.

Promises: sizes are checked at import. Never holds behaviour.
"""

from __future__ import annotations

from ctypes import LittleEndianStructure
from ctypes import c_uint16 as u16
from ctypes import c_uint32 as u32
from ctypes import c_uint64 as u64

from pyvhost.abi._check import sized

# Feature bits (virtio 1.3, 5.10.3)
F_STREAM = 0
F_SEQPACKET = 1
F_NO_IMPLIED_STREAM = 2

# Socket types
TYPE_STREAM = 1
TYPE_SEQPACKET = 2

# Operations (virtio 1.3, 5.10.6)
OP_INVALID = 0
OP_REQUEST = 1
OP_RESPONSE = 2
OP_RST = 3
OP_SHUTDOWN = 4
OP_RW = 5
OP_CREDIT_UPDATE = 6
OP_CREDIT_REQUEST = 7

# Flags of OP_SHUTDOWN, and of OP_RW on a SEQPACKET socket
SHUTDOWN_RCV = 1
SHUTDOWN_SEND = 2
SEQ_EOM = 1
SEQ_EOR = 2

# Events
EVENT_TRANSPORT_RESET = 0

# Well-known addresses (vm_sockets.h)
VMADDR_CID_ANY = 0xFFFFFFFF
VMADDR_CID_HYPERVISOR = 0
VMADDR_CID_LOCAL = 1
VMADDR_CID_HOST = 2
VMADDR_PORT_ANY = 0xFFFFFFFF
VMADDR_FLAG_TO_HOST = 1


class _Packed(LittleEndianStructure):
    _pack_ = 1
    _layout_ = "ms"


@sized(44)
class VsockHdr(_Packed):
    """Before every packet; `len`, `buf_alloc` and `fwd_cnt` in bytes."""

    _fields_ = (
        ("src_cid", u64),
        ("dst_cid", u64),
        ("src_port", u32),
        ("dst_port", u32),
        ("len", u32),
        ("type", u16),
        ("op", u16),
        ("flags", u32),
        ("buf_alloc", u32),
        ("fwd_cnt", u32),
    )


@sized(8)
class VsockConfig(_Packed):
    """The configuration space: the guest's CID."""

    _fields_ = (("guest_cid", u64),)


@sized(4)
class VsockEvent(_Packed):
    """What the device puts on the event queue."""

    _fields_ = (("id", u32),)
