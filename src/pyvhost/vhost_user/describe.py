"""Messages as a person reads them: the trace of `--log-level trace`.

Promises: one line a message (memory regions one more line each): who speaks, the request's name, its flags,
its payload by field, feature and status bits by name, descriptors by number.
Never: changes a message or takes its descriptors; fails on an odd one: what has no name is shown in hex.
"""

from __future__ import annotations

import logging
from types import ModuleType

from pyvhost.abi import vhost, virtio, virtio_net, virtio_scsi, virtio_vsock
from pyvhost.abi import vhost_user as abi
from pyvhost.abi.vhost_user import Request
from pyvhost.vhost_user.codec import Message, Stream
from pyvhost.vhost_user.payloads import (
    U64,
    Config,
    DeviceState,
    Inflight,
    Iotlb,
    Log,
    MemReg,
    MemTable,
    Payload,
    Raw,
    Region,
    VringAddr,
    VringArea,
    VringFile,
    VringState,
)

#: The logging level of the message trace, below DEBUG.
TRACE = 5
logging.addLevelName(TRACE, "TRACE")


def _bits(module: ModuleType, prefix: str) -> dict[int, str]:
    return {
        value: name.removeprefix(prefix)
        for name, value in vars(module).items()
        if name.startswith(prefix) and isinstance(value, int)
    }


_PROTOCOL_FEATURES = _bits(abi, "PROTOCOL_F_")
_ANY_DEVICE = {
    vhost.F_LOG_ALL: "LOG_ALL",
    abi.F_PROTOCOL_FEATURES: "PROTOCOL_FEATURES",
    **_bits(virtio, "F_"),
    **_bits(virtio, "RING_F_"),
    # Not its older name.
    virtio.F_ACCESS_PLATFORM: "ACCESS_PLATFORM",
}
_DEVICE_FEATURES: dict[int, dict[int, str]] = {
    virtio.ID_NET: _bits(virtio_net, "F_"),
    virtio.ID_SCSI: _bits(virtio_scsi, "F_"),
    virtio.ID_VSOCK: _bits(virtio_vsock, "F_"),
}
_STATUS = {value.bit_length() - 1: name for value, name in _bits(virtio, "CONFIG_S_").items()}
_IOTLB_TYPES = {
    getattr(vhost, f"IOTLB_{name}"): name
    for name in ("MISS", "UPDATE", "INVALIDATE", "ACCESS_FAIL", "BATCH_BEGIN", "BATCH_END")
}
_ACCESS = {vhost.ACCESS_RO: "RO", vhost.ACCESS_WO: "WO", vhost.ACCESS_RW: "RW"}


def _named_bits(value: int, names: dict[int, str]) -> str:
    """ "0x...", and in brackets the names of the bits, lowest first; a bit without a name by its number."""
    bits = [names.get(bit, f"bit {bit}") for bit in range(value.bit_length()) if value >> bit & 1]
    return f"{value:#x} ({', '.join(bits)})" if bits else f"{value:#x}"


def features(value: int, virtio_id: int = 0) -> str:
    """Device feature bits by name; those of a device type if its virtio number is given."""
    return _named_bits(value, {**_ANY_DEVICE, **_DEVICE_FEATURES.get(virtio_id, {})})


def protocol_features(value: int) -> str:
    """vhost-user's own feature bits by name."""
    return _named_bits(value, _PROTOCOL_FEATURES)


def status(value: int) -> str:
    """A device status by the names of its bits."""
    return _named_bits(value, _STATUS) if value else "0 (reset)"


def byte_size(size: int) -> str:
    """ "640 KiB": the largest unit that leaves a whole number."""
    for shift, unit in ((40, "TiB"), (30, "GiB"), (20, "MiB"), (10, "KiB")):
        if size and size % (1 << shift) == 0:
            return f"{size >> shift} {unit}"
    return f"{size} B"


def region(piece: Region) -> str:
    """Where a region lies: for the guest, for the front end, in its file."""
    last = piece.guest_phys_addr + max(piece.memory_size - 1, 0)
    return (
        f"guest {piece.guest_phys_addr:#x}-{last:#x} ({byte_size(piece.memory_size)})"
        f" user {piece.userspace_addr:#x} mmap_offset {piece.mmap_offset:#x}"
    )


def mac(value: int) -> str:
    """SEND_RARP's number as the address in its first six bytes."""
    return U64(value).pack()[:6].hex(":")


def describe(message: Message, virtio_id: int = 0) -> str:
    """The message as the lines of a trace; `virtio_id` says whose feature bits to name."""
    return f"{message.stream.value}: " + "\n    ".join(_lines(message, virtio_id))


def summary(message: Message, virtio_id: int = 0) -> str:
    """Request, flags and fields in one line, for an error message."""
    return "; ".join(_lines(message, virtio_id))


def _lines(message: Message, virtio_id: int) -> list[str]:
    line = [message.name]
    if message.need_reply:
        line.append("need_reply")
    odd = message.flags & ~(abi.VERSION_MASK | abi.FLAG_REPLY | abi.FLAG_NEED_REPLY)
    if odd:
        line.append(f"flags={message.flags:#x}")
    text, more = _payload(message, virtio_id)
    if text:
        line.append(text)
    fds = [str(fd) for fd in message.fds if fd >= 0]
    if fds:
        line.append("fd " + ", ".join(fds))
    return [" ".join(line), *more]


def _payload(message: Message, virtio_id: int) -> tuple[str, list[str]]:
    payload = message.payload
    if isinstance(payload, U64):
        return _number(message, payload.value, virtio_id), []
    if isinstance(payload, MemTable):
        fds = list(message.fds)
        lines = [f"region {i}: {region(piece)}" for i, piece in enumerate(payload.regions)]
        if len(fds) == len(lines):
            lines = [f"{line} fd {fd}" for line, fd in zip(lines, fds, strict=True)]
        return f"nregions={len(lines)}", lines
    if payload is None:
        refused = message.stream is Stream.REPLY and message.request == Request.GET_CONFIG
        return ("refused" if refused else ""), []
    return _fields(message, payload), []


def _number(message: Message, value: int, virtio_id: int) -> str:
    request = message.request
    if message.stream.is_backend_channel:
        return _acknowledgement(value)
    if request in (Request.GET_FEATURES, Request.SET_FEATURES) and _is_content(message):
        return features(value, virtio_id)
    if request in (Request.GET_PROTOCOL_FEATURES, Request.SET_PROTOCOL_FEATURES) and _is_content(message):
        return protocol_features(value)
    if request in (Request.GET_STATUS, Request.SET_STATUS) and _is_content(message):
        return status(value)
    if message.stream is Stream.REQUEST:
        if request == Request.SEND_RARP:
            return f"mac={mac(value)}"
        return f"mtu={value}" if request == Request.NET_SET_MTU else f"u64={value:#x}"
    if request in (Request.GET_QUEUE_NUM, Request.GET_MAX_MEM_SLOTS):
        return f"{value}"
    if request == Request.SET_LOG_BASE:
        # libvhost-user's shape of this reply, whose number means nothing.
        return f"u64={value:#x}"
    return _acknowledgement(value)


def _is_content(message: Message) -> bool:
    """Whether the number is what the request is about: in a SET_ request, and in the reply to a GET_."""
    return message.name.startswith("GET_") == (message.stream is Stream.REPLY)


def _acknowledgement(value: int) -> str:
    return "ack: success" if value == 0 else f"ack: FAILURE ({value})"


def _fields(message: Message, payload: Payload) -> str:
    match payload:
        case VringState(index, num):
            if message.request == Request.SET_VRING_ENABLE and not message.stream.is_backend_channel:
                return f"index={index} {'on' if num == 1 else 'off' if num == 0 else f'num={num}'}"
            if message.request == Request.SET_VRING_ENDIAN and not message.stream.is_backend_channel:
                order = {vhost.VRING_LITTLE_ENDIAN: "little-endian", vhost.VRING_BIG_ENDIAN: "big-endian"}
                return f"index={index} {order.get(num, f'num={num}')}"
            return f"index={index} num={num}"
        case VringAddr(index, flags, desc, used, avail, log):
            logged = " (F_LOG)" if flags >> vhost.VRING_F_LOG & 1 else ""
            return (
                f"index={index} flags={flags:#x}{logged} desc={desc:#x} used={used:#x} avail={avail:#x}"
                f" log={log:#x}"
            )
        case VringFile(index, no_fd):
            return f"index={index}" + (" no descriptor" if no_fd else "")
        case MemReg(piece):
            return region(piece)
        case Log(size, offset):
            return f"mmap_size={size:#x} mmap_offset={offset:#x}"
        case Iotlb(iova, size, uaddr, perm, kind):
            # A miss has an address and what it wanted; an invalidation an address and a size.
            text = f"{_IOTLB_TYPES.get(kind, f'type={kind}')} iova={iova:#x}"
            if kind not in (vhost.IOTLB_MISS, vhost.IOTLB_ACCESS_FAIL) or size:
                text += f" size={size:#x}"
            if kind == vhost.IOTLB_INVALIDATE:
                # QEMU leaves what is not used as it was on its stack.
                return text
            if kind == vhost.IOTLB_UPDATE or uaddr:
                text += f" uaddr={uaddr:#x}"
            return f"{text} perm={_ACCESS.get(perm, perm)}"
        case Config(offset, flags, data):
            asked = message.stream is Stream.REQUEST and message.request == Request.GET_CONFIG
            return f"offset={offset} size={len(data)} flags={flags:#x}" + ("" if asked else f" {data.hex()}")
        case VringArea(u64, size, offset):
            return f"u64={u64:#x} size={size:#x} offset={offset:#x}"
        case Inflight(size, offset, queues, queue_size):
            text = f"mmap_size={size:#x} mmap_offset={offset:#x} num_queues={queues} queue_size={queue_size}"
            return text if size or message.stream is Stream.REQUEST else f"refused ({text})"
        case DeviceState(direction, phase):
            saves = direction == abi.TRANSFER_STATE_DIRECTION_SAVE
            return f"direction={direction} ({'save' if saves else 'load'}) phase={phase}"
        case Raw(data):
            return data[:64].hex() + (f"... ({len(data)} bytes)" if len(data) > 64 else "")
    return repr(payload)
