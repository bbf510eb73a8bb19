"""pyvhost.abi.vhost_user against the protocol's text, said a second time in another form.

No system header has these numbers. Bytes recorded from QEMU, DPDK and UML pin the same in the codec's tests.
"""

from __future__ import annotations

import ctypes
import struct

import pytest

from pyvhost.abi import vhost_user


def test_front_end_requests_are_numbered_as_in_the_text() -> None:
    names = """
        GET_FEATURES SET_FEATURES SET_OWNER RESET_OWNER SET_MEM_TABLE SET_LOG_BASE SET_LOG_FD SET_VRING_NUM
        SET_VRING_ADDR SET_VRING_BASE GET_VRING_BASE SET_VRING_KICK SET_VRING_CALL SET_VRING_ERR
        GET_PROTOCOL_FEATURES SET_PROTOCOL_FEATURES GET_QUEUE_NUM SET_VRING_ENABLE SEND_RARP NET_SET_MTU
        SET_BACKEND_REQ_FD IOTLB_MSG SET_VRING_ENDIAN GET_CONFIG SET_CONFIG CREATE_CRYPTO_SESSION
        CLOSE_CRYPTO_SESSION POSTCOPY_ADVISE POSTCOPY_LISTEN POSTCOPY_END GET_INFLIGHT_FD SET_INFLIGHT_FD
        GPU_SET_SOCKET RESET_DEVICE VRING_KICK GET_MAX_MEM_SLOTS ADD_MEM_REG REM_MEM_REG SET_STATUS GET_STATUS
        GET_SHARED_OBJECT SET_DEVICE_STATE_FD CHECK_DEVICE_STATE GET_SHMEM_CONFIG GET_VRING_BASE_SKIP_DRAIN
    """
    assert ["NONE", *names.split()] == [vhost_user.Request(number).name for number in range(46)]
    assert len(vhost_user.Request) == 46


def test_back_end_requests_are_numbered_as_in_the_text() -> None:
    names = """
        IOTLB_MSG CONFIG_CHANGE_MSG VRING_HOST_NOTIFIER_MSG VRING_CALL VRING_ERR SHARED_OBJECT_ADD
        SHARED_OBJECT_REMOVE SHARED_OBJECT_LOOKUP SHMEM_MAP SHMEM_UNMAP
    """
    assert ["NONE", *names.split()] == [vhost_user.BackendRequest(number).name for number in range(11)]
    assert len(vhost_user.BackendRequest) == 11


def test_protocol_feature_bits_are_numbered_as_in_the_text() -> None:
    names = """
        MQ LOG_SHMFD RARP REPLY_ACK MTU BACKEND_REQ CROSS_ENDIAN CRYPTO_SESSION PAGEFAULT CONFIG
        BACKEND_SEND_FD HOST_NOTIFIER INFLIGHT_SHMFD RESET_DEVICE INBAND_NOTIFICATIONS CONFIGURE_MEM_SLOTS
        STATUS XEN_MMAP SHARED_OBJECT DEVICE_STATE GET_VRING_BASE_INFLIGHT GPA_ADDRESSES SHMEM
        GET_VRING_BASE_SKIP_DRAIN
    """
    prefix = "PROTOCOL_F_"
    bits = {name: value for name, value in vars(vhost_user).items() if name.startswith(prefix)}
    assert bits == {prefix + name: bit for bit, name in enumerate(names.split())}


@pytest.mark.parametrize(
    ("layout", "form"),
    [
        (vhost_user.Header, "=3I"),
        (vhost_user.VringState, "=2I"),
        (vhost_user.VringAddr, "=2I4Q"),
        (vhost_user.MemoryRegion, "=4Q"),
        (vhost_user.MemoryRegionXen, "=4Q2I"),
        (vhost_user.Memory, "=2I32Q"),
        (vhost_user.MemRegMsg, "=5Q"),
        (vhost_user.Log, "=2Q"),
        (vhost_user.IotlbMsg, "=3Q2B6x"),
        (vhost_user.Config, "=3I"),
        (vhost_user.VringArea, "=3Q"),
        (vhost_user.Inflight, "=2Q2H4x"),
        (vhost_user.Shared, "=16B"),
        (vhost_user.TransferDeviceState, "=2I"),
        (vhost_user.MMap, "=8B4Q"),
        (vhost_user.ShMemConfig, "=2I"),
        (vhost_user.DescStateSplit, "=6BHQ"),
        (vhost_user.QueueRegionSplit, "=Q4H"),
        (vhost_user.DescStatePacked, "=2B3HQ2HIQ"),
        (vhost_user.QueueRegionPacked, "=Q6H9B3x"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_a_layout_has_the_fields_of_the_text_in_its_order(layout: type[ctypes.Structure], form: str) -> None:
    size = struct.calcsize(form)
    assert ctypes.sizeof(layout) == size
    raw = bytes(i % 251 for i in range(size))
    flat = [number for field in _leaves(layout.from_buffer_copy(raw)) for number in field]
    assert tuple(flat) == struct.unpack(form, raw)


def _leaves(value: object) -> list[list[int]]:
    """Every number in a structure, in the order of its fields."""
    if isinstance(value, int):
        return [[value]]
    if isinstance(value, ctypes.Structure):
        return [leaf for name, *_ in value._fields_ for leaf in _leaves(getattr(value, name))]
    assert isinstance(value, ctypes.Array)
    return [leaf for each in value for leaf in _leaves(each)]
