"""The seed's ioctls: a request number and an argument become one call on a `KernelDevice`.

The order of checks is the kernel's: what a device type has of its own comes first, then SET_OWNER, then who the
owner is, then the device, then the ring that the argument's first word names; a request that nobody knows is
taken for a ring's.

Promises: every refusal is an OSError with the kernel's errno; what is refused changes nothing.
Never: knows how the argument came here (`Argument`), or a device type (`KernelDevice.ioctls`).
"""

from __future__ import annotations

import ctypes
import errno
import sys
from collections.abc import Callable, Mapping
from typing import Final, Protocol, TypeVar

from pyvhost.abi import vhost as abi
from pyvhost.host import eventfd, fds
from pyvhost.memory.regions import MemoryRegion
from pyvhost.vhost.errors import VhostError
from pyvhost.vhost.kernel_device import KernelDevice


class Argument(Protocol):
    """What the third parameter of an ioctl points at."""

    def read(self, size: int, offset: int = 0) -> bytes:
        """`size` bytes at `offset`. OSError EFAULT: they are not there."""

    def write(self, data: bytes, offset: int = 0) -> None:
        """Puts `data` at `offset`. OSError EFAULT: it can't go there."""

    def take_fd(self, fd: int) -> int:
        """A descriptor that the argument names, as one of this process's own. OSError EBADF: there is none."""


D = TypeVar("D", bound=KernelDevice)
Ioctl = Callable[[D, Argument], None]
_ORDER: Final = sys.byteorder
_S = TypeVar("_S", bound=ctypes.Structure)


def unpack(argument: Argument, kind: type[_S]) -> _S:
    """A structure of the interface, from the argument."""
    return kind.from_buffer_copy(argument.read(ctypes.sizeof(kind)))


def number(argument: Argument, size: int, *, signed: bool = False) -> int:
    """An integer of `size` bytes, in the machine's order, from the argument."""
    return int.from_bytes(argument.read(size), _ORDER, signed=signed)


def put(argument: Argument, value: int, size: int) -> None:
    """An integer of `size` bytes into the argument."""
    argument.write(value.to_bytes(size, _ORDER))


def perform(device: KernelDevice, request: int, argument: Argument) -> int:
    """Does what an ioctl asks for; its result, which is 0. OSError: the kernel's errno for what is wrong."""
    request &= 0xFFFFFFFF
    known = request not in device.unknown
    own = device.ioctls.get(request) or (_ANYBODY.get(request) if known else None)
    if own is not None:
        own(device, argument)
        return 0
    device.require_owner()
    whole = _DEVICE.get(request) if known else None
    if whole is not None:
        whole(device, argument)
        return 0
    index = number(argument, 4)
    device.require_vring(index)
    ring = _VRING.get(request) if known else None
    if ring is None:
        raise VhostError(errno.ENOTTY, f"{device.name}: ioctl {request:#010x} is none of its")
    ring(device, index, argument)
    return 0


# --- anybody's ------------------------------------------------------------------------------------------------


def _get_features(device: KernelDevice, argument: Argument) -> None:
    put(argument, device.features, 8)


def _set_features(device: KernelDevice, argument: Argument) -> None:
    device.set_features(number(argument, 8))


def _get_backend_features(device: KernelDevice, argument: Argument) -> None:
    put(argument, device.backend_features, 8)


def _set_backend_features(device: KernelDevice, argument: Argument) -> None:
    device.set_backend_features(number(argument, 8))


def _set_owner(device: KernelDevice, argument: Argument) -> None:
    device.set_owner()


def _set_fork(device: KernelDevice, argument: Argument) -> None:
    device.require_no_owner()
    device.set_fork_from_owner(number(argument, 1))


def _get_fork(device: KernelDevice, argument: Argument) -> None:
    put(argument, device.fork_from_owner, 1)


_WORDS: Final = 2
#: Bytes that a features array is handled in at a time: its count is the caller's to say.
_CHUNK: Final = 4096


def _get_features_array(device: KernelDevice, argument: Argument) -> None:
    count = number(argument, 8)
    words = device.features.to_bytes(8 * _WORDS, _ORDER)
    argument.write(words[: 8 * min(count, _WORDS)], 8)
    at, end = 8 * (1 + min(count, _WORDS)), 8 * (1 + count)
    while at < end:
        argument.write(bytes(min(_CHUNK, end - at)), at)
        at += _CHUNK


def _set_features_array(device: KernelDevice, argument: Argument) -> None:
    count = number(argument, 8)
    bits = int.from_bytes(argument.read(8 * min(count, _WORDS), 8), _ORDER)
    at, end = 8 * (1 + min(count, _WORDS)), 8 * (1 + count)
    while at < end:
        if any(argument.read(min(_CHUNK, end - at), at)):
            raise VhostError(
                errno.EOPNOTSUPP, f"{device.name}: features from {64 * _WORDS} on are not offered"
            )
        at += _CHUNK
    device.set_features(bits)


_ANYBODY: Final[Mapping[int, Ioctl[KernelDevice]]] = {
    abi.GET_FEATURES: _get_features,
    abi.SET_FEATURES: _set_features,
    abi.GET_BACKEND_FEATURES: _get_backend_features,
    abi.SET_BACKEND_FEATURES: _set_backend_features,
    abi.GET_FEATURES_ARRAY: _get_features_array,
    abi.SET_FEATURES_ARRAY: _set_features_array,
    abi.SET_OWNER: _set_owner,
    abi.SET_FORK_FROM_OWNER: _set_fork,
    abi.GET_FORK_FROM_OWNER: _get_fork,
}

# --- the owner's, about the whole device ------------------------------------------------------------------------


def _set_mem_table(device: KernelDevice, argument: Argument) -> None:
    head = unpack(argument, abi.Memory)
    if head.padding:
        raise VhostError(
            errno.EOPNOTSUPP, f"{device.name}: memory table: padding is {head.padding:#x}, not 0"
        )
    if head.nregions > device.max_mem_slots:
        raise VhostError(
            errno.E2BIG,
            f"{device.name}: memory table: {head.nregions} regions, {device.max_mem_slots} at most",
        )
    size = ctypes.sizeof(abi.MemoryRegion)
    raw = argument.read(size * head.nregions, ctypes.sizeof(abi.Memory))
    regions = [abi.MemoryRegion.from_buffer_copy(raw, size * i) for i in range(head.nregions)]
    device.set_mem_table(
        [MemoryRegion(r.guest_phys_addr, r.memory_size, r.userspace_addr) for r in regions],
    )


def _set_log_base(device: KernelDevice, argument: Argument) -> None:
    device.set_log_address(number(argument, 8))


def _set_log_fd(device: KernelDevice, argument: Argument) -> None:
    device.set_log_fd(_take(argument, number(argument, 4, signed=True)))


def _new_worker(device: KernelDevice, argument: Argument) -> None:
    device.require_fork()
    worker = device.new_worker()
    try:
        put(argument, worker, 4)
    except OSError:
        # Nobody knows its number: the kernel leaves it behind, until the device is closed.
        device.free_worker(worker)
        raise


def _free_worker(device: KernelDevice, argument: Argument) -> None:
    device.require_fork()
    device.free_worker(number(argument, 4))


_DEVICE: Final[Mapping[int, Ioctl[KernelDevice]]] = {
    abi.SET_MEM_TABLE: _set_mem_table,
    abi.SET_LOG_BASE: _set_log_base,
    abi.SET_LOG_FD: _set_log_fd,
    abi.NEW_WORKER: _new_worker,
    abi.FREE_WORKER: _free_worker,
}

# --- the owner's, about one ring --------------------------------------------------------------------------------


def _set_num(device: KernelDevice, index: int, argument: Argument) -> None:
    device.require_stopped(index, "num")
    device.set_vring_num(index, unpack(argument, abi.VringState).num)


def _set_addr(device: KernelDevice, index: int, argument: Argument) -> None:
    addr = unpack(argument, abi.VringAddr)
    device.set_vring_addr(
        index, addr.flags, addr.desc_user_addr, addr.used_user_addr, addr.avail_user_addr, addr.log_guest_addr
    )


def _set_base(device: KernelDevice, index: int, argument: Argument) -> None:
    device.require_stopped(index, "base")
    device.set_vring_base(index, unpack(argument, abi.VringState).num)


def _get_base(device: KernelDevice, index: int, argument: Argument) -> None:
    _put_state(argument, index, device.get_vring_base(index))


def _set_endian(device: KernelDevice, index: int, argument: Argument) -> None:
    device.require_stopped(index, "the byte order")
    device.set_vring_endian(index, unpack(argument, abi.VringState).num)


def _get_endian(device: KernelDevice, index: int, argument: Argument) -> None:
    _put_state(argument, index, device.get_vring_endian(index))


def _set_busyloop(device: KernelDevice, index: int, argument: Argument) -> None:
    device.set_vring_busyloop_timeout(index, unpack(argument, abi.VringState).num)


def _get_busyloop(device: KernelDevice, index: int, argument: Argument) -> None:
    _put_state(argument, index, device.get_vring_busyloop_timeout(index))


def _set_kick(device: KernelDevice, index: int, argument: Argument) -> None:
    device.set_vring_kick(index, _take(argument, unpack(argument, abi.VringFile).fd))


def _set_call(device: KernelDevice, index: int, argument: Argument) -> None:
    device.set_vring_call(index, _take(argument, unpack(argument, abi.VringFile).fd))


def _set_err(device: KernelDevice, index: int, argument: Argument) -> None:
    device.set_vring_err(index, _take(argument, unpack(argument, abi.VringFile).fd))


def _attach_worker(device: KernelDevice, index: int, argument: Argument) -> None:
    device.attach_vring_worker(index, unpack(argument, abi.VringWorker).worker_id)


def _get_worker(device: KernelDevice, index: int, argument: Argument) -> None:
    _put_state(argument, index, device.get_vring_worker(index))


_VRING: Final[Mapping[int, Callable[[KernelDevice, int, Argument], None]]] = {
    abi.SET_VRING_NUM: _set_num,
    abi.SET_VRING_ADDR: _set_addr,
    abi.SET_VRING_BASE: _set_base,
    abi.GET_VRING_BASE: _get_base,
    abi.SET_VRING_ENDIAN: _set_endian,
    abi.GET_VRING_ENDIAN: _get_endian,
    abi.SET_VRING_KICK: _set_kick,
    abi.SET_VRING_CALL: _set_call,
    abi.SET_VRING_ERR: _set_err,
    abi.SET_VRING_BUSYLOOP_TIMEOUT: _set_busyloop,
    abi.GET_VRING_BUSYLOOP_TIMEOUT: _get_busyloop,
    abi.ATTACH_VRING_WORKER: _attach_worker,
    abi.GET_VRING_WORKER: _get_worker,
}


def _put_state(argument: Argument, index: int, num: int) -> None:
    argument.write(bytes(abi.VringState(index, num)))


def _take(argument: Argument, fd: int) -> int:
    """An eventfd that the argument names, the device's to keep; -1 stays -1. EINVAL: it is something else."""
    if fd == abi.FILE_UNBIND:
        return fd
    taken = argument.take_fd(fd)
    if not eventfd.is_eventfd(taken):
        fds.close(taken)
        raise VhostError(errno.EINVAL, f"descriptor {fd} is not an eventfd")
    return taken
