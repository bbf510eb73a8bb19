"""The SCSI host device: feature bits, requests, responses, events, configuration space.

Source: virtio 1.3, 5.6, and Linux's virtio_scsi.h. Names are the header's without `VIRTIO_SCSI_`; feature
bits are bit numbers. Layouts are little endian, as virtio 1 has them; a legacy device has the same in the
guest's own byte order. CDB and sense have their default sizes here; the driver may set others.

Promises: sizes are checked at import. Never holds behaviour.
"""

from __future__ import annotations

from ctypes import LittleEndianStructure
from ctypes import c_uint8 as u8
from ctypes import c_uint16 as u16
from ctypes import c_uint32 as u32
from ctypes import c_uint64 as u64

from pyvhost.abi._check import sized

CDB_DEFAULT_SIZE = 32
SENSE_DEFAULT_SIZE = 96
CDB_SIZE = CDB_DEFAULT_SIZE
SENSE_SIZE = SENSE_DEFAULT_SIZE

# Feature bits (virtio 1.3, 5.6.3)
F_INOUT = 0
F_HOTPLUG = 1
F_CHANGE = 2
F_T10_PI = 3

# Response codes (virtio 1.3, 5.6.6.1 and 5.6.6.2)
S_OK = 0
S_OVERRUN = 1
S_ABORTED = 2
S_BAD_TARGET = 3
S_RESET = 4
S_BUSY = 5
S_TRANSPORT_FAILURE = 6
S_TARGET_FAILURE = 7
S_NEXUS_FAILURE = 8
S_FAILURE = 9
S_FUNCTION_SUCCEEDED = 10
S_FUNCTION_REJECTED = 11
S_INCORRECT_LUN = 12

# Task attributes
S_SIMPLE = 0
S_ORDERED = 1
S_HEAD = 2
S_ACA = 3

# Control queue: types, and task management's subtypes
T_TMF = 0
T_AN_QUERY = 1
T_AN_SUBSCRIBE = 2

T_TMF_ABORT_TASK = 0
T_TMF_ABORT_TASK_SET = 1
T_TMF_CLEAR_ACA = 2
T_TMF_CLEAR_TASK_SET = 3
T_TMF_I_T_NEXUS_RESET = 4
T_TMF_LOGICAL_UNIT_RESET = 5
T_TMF_QUERY_TASK = 6
T_TMF_QUERY_TASK_SET = 7

# Events, and the reasons of a transport reset
T_EVENTS_MISSED = 0x80000000
T_NO_EVENT = 0
T_TRANSPORT_RESET = 1
T_ASYNC_NOTIFY = 2
T_PARAM_CHANGE = 3

EVT_RESET_HARD = 0
EVT_RESET_RESCAN = 1
EVT_RESET_REMOVED = 2

# Events of an asynchronous notification (virtio 1.3, 5.6.6.2; no header names them)
EVT_ASYNC_OPERATIONAL_CHANGE = 2
EVT_ASYNC_POWER_MGMT = 4
EVT_ASYNC_EXTERNAL_REQUEST = 8
EVT_ASYNC_MEDIA_CHANGE = 16
EVT_ASYNC_MULTI_HOST = 32
EVT_ASYNC_DEVICE_BUSY = 64


class _Packed(LittleEndianStructure):
    _pack_ = 1
    _layout_ = "ms"


@sized(51)
class ScsiCmdReq(_Packed):
    """A command, before the data that goes out."""

    _fields_ = (
        ("lun", u8 * 8),
        ("tag", u64),
        ("task_attr", u8),
        ("prio", u8),
        ("crn", u8),
        ("cdb", u8 * CDB_SIZE),
    )


@sized(59)
class ScsiCmdReqPi(_Packed):
    """A command with T10_PI, before the protection information; counts in bytes."""

    _fields_ = (
        ("lun", u8 * 8),
        ("tag", u64),
        ("task_attr", u8),
        ("prio", u8),
        ("crn", u8),
        ("pi_bytesout", u32),
        ("pi_bytesin", u32),
        ("cdb", u8 * CDB_SIZE),
    )


@sized(108)
class ScsiCmdResp(_Packed):
    """A command's response, before the data that comes in; lengths in bytes."""

    _fields_ = (
        ("sense_len", u32),
        ("resid", u32),
        ("status_qualifier", u16),
        ("status", u8),
        ("response", u8),
        ("sense", u8 * SENSE_SIZE),
    )


@sized(24)
class ScsiCtrlTmfReq(_Packed):
    """A task management function."""

    _fields_ = (("type", u32), ("subtype", u32), ("lun", u8 * 8), ("tag", u64))


@sized(1)
class ScsiCtrlTmfResp(_Packed):
    """Its response."""

    _fields_ = (("response", u8),)


@sized(16)
class ScsiCtrlAnReq(_Packed):
    """A query of, or a subscription to, asynchronous notifications."""

    _fields_ = (("type", u32), ("lun", u8 * 8), ("event_requested", u32))


@sized(5)
class ScsiCtrlAnResp(_Packed):
    """Its response."""

    _fields_ = (("event_actual", u32), ("response", u8))


@sized(16)
class ScsiEvent(_Packed):
    """What the device puts on the event queue."""

    _fields_ = (("event", u32), ("lun", u8 * 8), ("reason", u32))


@sized(36)
class ScsiConfig(_Packed):
    """The configuration space (virtio 1.3, 5.6.4); sizes in bytes, `max_sectors` of 512."""

    _fields_ = (
        ("num_queues", u32),
        ("seg_max", u32),
        ("max_sectors", u32),
        ("cmd_per_lun", u32),
        ("event_info_size", u32),
        ("sense_size", u32),
        ("cdb_size", u32),
        ("max_channel", u16),
        ("max_target", u16),
        ("max_lun", u32),
    )
