"""Requests that are one call on the device, whatever the conversation has come to.

Promises: what a message carries reaches the device as it is, its descriptors included; what can't be asked of
any device is refused here, in words that name the fields and their numbers.
Never: knows what was negotiated, or which ring runs; makes a reply but for what a handler returns.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from pyvhost.abi import vhost
from pyvhost.abi.vhost_user import Request
from pyvhost.memory.dirty_log import DirtyLog
from pyvhost.memory.regions import MemoryRegion
from pyvhost.vhost.device_memory import GUARD
from pyvhost.vhost.inflight import Inflight as InflightRegion
from pyvhost.vhost_user.codec import Message
from pyvhost.vhost_user.device import Device
from pyvhost.vhost_user.payloads import (
    U64,
    Config,
    Inflight,
    Iotlb,
    Log,
    MemReg,
    MemTable,
    Payload,
    Region,
    VringAddr,
    VringFile,
    VringState,
)


@dataclass(frozen=True)
class WithFd:
    """An answer that a descriptor rides with, which is whoever's who has this."""

    payload: Payload
    fd: int


Answer = Payload | WithFd | None


def value_of(message: Message) -> int:
    """The number that the message carries."""
    assert isinstance(message.payload, U64)
    return message.payload.value


def state_of(message: Message) -> VringState:
    """The ring's index and number that the message carries."""
    assert isinstance(message.payload, VringState)
    return message.payload


def file_of(device: Device, message: Message) -> tuple[int, int]:
    """The ring that a descriptor is for, and the descriptor, now the caller's; -1: there is none."""
    assert isinstance(message.payload, VringFile)
    index = ring_of(device, message.payload.index)
    return index, -1 if message.payload.no_fd else message.fds.take()


def ring_of(device: Device, index: int) -> int:
    """`index`, if there is such a ring. OSError ENOBUFS: there is none."""
    if index >= device.vring_count:
        raise OSError(
            errno.ENOBUFS, f"there is no vring {index}: this device has {device.vring_count}, from 0"
        )
    return index


# --- memory --------------------------------------------------------------------------------------------


def _set_mem_table(device: Device, message: Message) -> None:
    assert isinstance(message.payload, MemTable)
    device.set_mem_table(
        [_region(piece, message.fds.take(i)) for i, piece in enumerate(message.payload.regions)]
    )


def _get_max_mem_slots(device: Device, message: Message) -> Payload:
    return U64(device.max_mem_slots)


def _add_mem_reg(device: Device, message: Message) -> None:
    assert isinstance(message.payload, MemReg)
    device.add_mem_region(_region(message.payload.region, message.fds.take()))


def _rem_mem_reg(device: Device, message: Message) -> None:
    assert isinstance(message.payload, MemReg)
    device.remove_mem_region(_region(message.payload.region, -1))


def _region(piece: Region, fd: int) -> MemoryRegion:
    return MemoryRegion(piece.guest_phys_addr, piece.memory_size, piece.userspace_addr, piece.mmap_offset, fd)


def iotlb_msg(device: Device, message: Message) -> Payload:
    """IOTLB_MSG of a front end, which is always answered."""
    told = message.payload
    assert isinstance(told, Iotlb)
    if told.type == vhost.IOTLB_UPDATE:
        device.iotlb_update(told.iova, told.size, told.uaddr, told.perm)
    elif told.type == vhost.IOTLB_INVALIDATE:
        device.iotlb_invalidate(told.iova, told.size)
    else:
        # As the kernel answers them: misses and access failures are the back end's to tell.
        raise OSError(
            errno.EINVAL,
            f"type is {told.type}, expected {vhost.IOTLB_UPDATE} (update) or {vhost.IOTLB_INVALIDATE} (invalidate)",
        )
    return U64(0)


# --- what outlives a connection ------------------------------------------------------------------------


def set_log_base(device: Device, message: Message) -> Payload:
    """SET_LOG_BASE where LOG_SHMFD was negotiated; the answer is the request's own payload (decision 12)."""
    log = message.payload
    if not isinstance(log, Log):
        raise OSError(
            errno.EINVAL,
            f"an address, {value_of(message):#x}, is of no use here: with LOG_SHMFD a log is a size and an"
            " offset in a file (16 bytes)",
        )
    if not len(message.fds):
        raise OSError(errno.EBADF, "no descriptor came with it, and the log is in a file")
    _in_file("log", log.mmap_offset, log.mmap_size)
    device.set_log_base(DirtyLog.mapped(message.fds.take(), log.mmap_offset, log.mmap_size, GUARD))
    return log


def _set_log_fd(device: Device, message: Message) -> None:
    device.set_log_fd(message.fds.take() if len(message.fds) else -1)


def _get_inflight_fd(device: Device, message: Message) -> WithFd:
    asked = _inflight(device, message)
    made = device.make_inflight(asked.num_queues, asked.queue_size)
    return WithFd(Inflight(made.mmap_size, made.mmap_offset, made.num_queues, made.queue_size), made.fd)


def _set_inflight_fd(device: Device, message: Message) -> None:
    told = _inflight(device, message)
    _in_file("region", told.mmap_offset, told.mmap_size)
    device.set_inflight(
        InflightRegion(message.fds.take(), told.mmap_size, told.mmap_offset, told.num_queues, told.queue_size)
    )


def _inflight(device: Device, message: Message) -> Inflight:
    told = message.payload
    assert isinstance(told, Inflight)
    if not 0 < told.num_queues <= device.vring_count:
        raise OSError(
            errno.EINVAL, f"num_queues is {told.num_queues}, expected 1 to the device's {device.vring_count}"
        )
    if told.queue_size == 0:
        raise OSError(errno.EINVAL, "queue_size is 0")
    return told


def _in_file(what: str, offset: int, size: int) -> None:
    """OSError EINVAL: no file can have a piece there (off_t is signed)."""
    if not 0 < size <= offset + size <= (1 << 63) - 1:
        raise OSError(errno.EINVAL, f"no file has a {what} of {size:#x} bytes at {offset:#x}")


# --- rings ---------------------------------------------------------------------------------------------


def _set_vring_num(device: Device, message: Message) -> None:
    state = state_of(message)
    device.set_vring_num(ring_of(device, state.index), state.num)


def _set_vring_base(device: Device, message: Message) -> None:
    state = state_of(message)
    device.set_vring_base(ring_of(device, state.index), state.num)


def _set_vring_endian(device: Device, message: Message) -> None:
    state = state_of(message)
    device.set_vring_endian(ring_of(device, state.index), state.num)


def _set_vring_addr(device: Device, message: Message) -> None:
    addr = message.payload
    assert isinstance(addr, VringAddr)
    device.set_vring_addr(
        ring_of(device, addr.index),
        addr.flags,
        addr.desc_user_addr,
        addr.used_user_addr,
        addr.avail_user_addr,
        addr.log_guest_addr,
    )


def _set_vring_call(device: Device, message: Message) -> None:
    device.set_vring_call(*file_of(device, message))


def _set_vring_err(device: Device, message: Message) -> None:
    device.set_vring_err(*file_of(device, message))


# --- the device's own ----------------------------------------------------------------------------------


def _get_queue_num(device: Device, message: Message) -> Payload:
    return U64(device.queue_num)


def _get_config(device: Device, message: Message) -> Payload:
    asked = message.payload
    assert isinstance(asked, Config)
    if not asked.size:
        raise OSError(errno.EINVAL, "it asks for 0 bytes")
    data = device.get_config(asked.offset, asked.size)
    # A newer front end may know more fields than the device has: they read as zero, and the reply is as
    # long as the request, which it must be.
    return Config(asked.offset, asked.flags, data[: asked.size].ljust(asked.size, b"\0"))


def _set_config(device: Device, message: Message) -> None:
    asked = message.payload
    assert isinstance(asked, Config)
    device.set_config(asked.offset, asked.data, asked.flags)


def _send_rarp(device: Device, message: Message) -> None:
    device.send_rarp(U64(value_of(message)).pack()[:6])


def _net_set_mtu(device: Device, message: Message) -> None:
    device.set_mtu(value_of(message))


HANDLERS: Mapping[int, Callable[[Device, Message], Answer]] = {
    Request.SET_MEM_TABLE: _set_mem_table,
    Request.SET_LOG_FD: _set_log_fd,
    Request.SET_VRING_NUM: _set_vring_num,
    Request.SET_VRING_ADDR: _set_vring_addr,
    Request.SET_VRING_BASE: _set_vring_base,
    Request.SET_VRING_CALL: _set_vring_call,
    Request.SET_VRING_ERR: _set_vring_err,
    Request.GET_QUEUE_NUM: _get_queue_num,
    Request.SEND_RARP: _send_rarp,
    Request.NET_SET_MTU: _net_set_mtu,
    Request.SET_VRING_ENDIAN: _set_vring_endian,
    Request.GET_CONFIG: _get_config,
    Request.SET_CONFIG: _set_config,
    Request.GET_INFLIGHT_FD: _get_inflight_fd,
    Request.SET_INFLIGHT_FD: _set_inflight_fd,
    Request.GET_MAX_MEM_SLOTS: _get_max_mem_slots,
    Request.ADD_MEM_REG: _add_mem_reg,
    Request.REM_MEM_REG: _rem_mem_reg,
}
"""What the requests come to that are one call on the device."""
