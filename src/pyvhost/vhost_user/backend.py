"""The back end's side of a vhost-user conversation: a message in, calls on the device, replies out.

Promises: ring states are the specification's ("Ring states"): started by SET_VRING_KICK, stopped by
GET_VRING_BASE, enabled and disabled by SET_VRING_ENABLE, each on its own, and a ring runs while it is both;
a state that the device can't follow stays as it was; a failure is answered where the front end asked for an
answer and is a `SessionError` otherwise, in words that name request, fields and numbers; each descriptor goes
to the device or is closed.
Never: reads or writes a socket; knows a device type.

Left to the peers' practice where the specification leaves room, and seen on the wire:

- RESET_OWNER disables all rings, as the specification recommends; nothing else is forgotten.
- SET_STATUS 0 stops the rings and nothing more: QEMU 7.2 sends it before GET_VRING_BASE, and after a guest's
  reboot does not send its memory again. For RESET_DEVICE memory stays for the same reason.
- Call and err descriptors stay when a ring stops: UML's call is a pipe, and it does not bear its end.
- A ring that is started but disabled is left alone: what the driver made available, and its kick, wait for
  SET_VRING_ENABLE. (The specification would have a net device throw away what is sent meanwhile.)
- While all rings are stopped the front end is told nothing ("Suspended device state"): a change of the
  configuration space is announced when a ring starts.
"""

from __future__ import annotations

import errno
import logging
import os
import stat
from collections.abc import Callable
from dataclasses import dataclass

from pyvhost.abi import vhost_user as abi
from pyvhost.abi import virtio
from pyvhost.abi.vhost_user import BackendRequest, Request
from pyvhost.host.fds import close
from pyvhost.memory.regions import MemoryRegion
from pyvhost.vhost_user import describe
from pyvhost.vhost_user.codec import Message, Stream, encode
from pyvhost.vhost_user.device import Device
from pyvhost.vhost_user.hints import SHARE_IT, Progress
from pyvhost.vhost_user.offer import NOT_OFFERED, PROTOCOL_FEATURES
from pyvhost.vhost_user.payloads import (
    ALWAYS_ANSWERED,
    ANSWERED_WITH_RESULT,
    U64,
    Config,
    MemReg,
    MemTable,
    Payload,
    Raw,
    Region,
    VringAddr,
    VringFile,
    VringState,
)

_BIT_30 = 1 << abi.F_PROTOCOL_FEATURES

_log = logging.getLogger(__name__)


#: Why a connection ends whose front end took its memory away.
LOST_MEMORY = "its memory file became smaller than what it shared of it; the guest's memory is gone"


class SessionError(Exception):
    """The connection can't go on; the text is for the log."""


@dataclass(slots=True)
class Ring:
    """A ring's two states, and what the device was told of them."""

    index: int
    started: bool = False
    enabled: bool = False
    running: bool = False


class BackendSession:
    """One front end's conversation, from its connection to its end."""

    def __init__(self, device: Device, *, label: str = "front end") -> None:
        self.device = device
        #: Who it is, for the log.
        self.label = label
        self.rings = [Ring(i) for i in range(device.vring_count)]
        #: The protocol feature bits that the front end acknowledged.
        self.protocol_features = 0
        self.status = 0
        #: How far it came: what the log says when it leaves.
        self.progress = Progress()
        #: Bytes to send on the socket of SET_BACKEND_REQ_FD; who sends them deletes them, and calls `announce`.
        self.backend_output = bytearray()
        #: Called when `backend_output` got something outside of `receive`.
        self.on_backend_output: Callable[[], None] | None = None
        self._owned = False
        self._features_refused = False
        self._channel_fd = -1
        self._channel_open = False
        self._config_news = False
        self._awaits_ack = False
        self._closed = False
        device.config_changed = self.config_changed

    def receive(self, message: Message) -> list[bytes]:
        """Do what a front end's request asks; the replies to send, in order.

        The message's descriptors are the session's from here on. SessionError: the connection must end (and
        `close` be called).
        """
        if message.stream is not Stream.REQUEST:
            raise ValueError(f"{message.stream.value} is not the stream of requests")
        with message.fds:
            self.progress.saw(message.request)
            answer = self._obey(message)
        if self.device.lost_memory:
            raise SessionError(LOST_MEMORY)
        self.announce()
        if answer is None and message.need_reply and self._has(abi.PROTOCOL_F_REPLY_ACK):
            answer = U64(0)
        if answer is None:
            return []
        return [encode(message.request, answer, flags=abi.FLAG_REPLY)]

    def receive_backend_reply(self, message: Message) -> None:
        """The front end's answer to a request of the back end's own."""
        if message.stream is not Stream.BACKEND_REPLY:
            raise ValueError(f"{message.stream.value} is not the stream of answers to the back end")
        with message.fds:
            self._awaits_ack = False
            if isinstance(message.payload, U64) and message.payload.value:
                _log.warning("%s: it refused %s (%d)", self.label, message.name, message.payload.value)
        self.announce()

    def take_backend_fd(self) -> int:
        """The socket of SET_BACKEND_REQ_FD that came since the last call, now the caller's; -1: none did."""
        fd, self._channel_fd = self._channel_fd, -1
        return fd

    def backend_channel_closed(self) -> None:
        """Nobody listens on the socket of SET_BACKEND_REQ_FD any more."""
        self._channel_open = False
        self._awaits_ack = False
        self.backend_output.clear()

    def close(self) -> None:
        """The front end is gone: the device is as new. Nothing happens the second time."""
        if self._closed:
            return
        self._closed = True
        self.on_backend_output = None
        close(self.take_backend_fd())
        self.device.config_changed = None
        self.device.memory_lost = None
        self.device.reset()

    # --- what a message comes to ---------------------------------------------------------------------

    def _obey(self, message: Message) -> Payload | None:
        try:
            handler = _HANDLERS.get(message.request)
            if handler is None:
                raise _unsupported(message)
            if not self._owned:
                # Its connection makes a front end the owner; not every one says SET_OWNER, some say it twice.
                self.device.set_owner()
                self._owned = True
            return handler(self, message)
        except OSError as error:
            fault = error.strerror or str(error)
            text = f"{describe.summary(message, self.device.virtio_id)}: {fault}"
            if error.errno == errno.EFAULT and not self.progress.named_memory:
                # What QEMU does with memory that can't be shared, without a word of its own.
                text += f"; it has named no memory at all: {SHARE_IT}"
            answer = self._refusal(message, error)
            if answer is None:
                raise SessionError(text) from error
            _log.error("%s: refused: %s", self.label, text)
            return answer

    def _refusal(self, message: Message, error: OSError) -> Payload | None:
        """What tells the front end that its request failed; None: it can't be told."""
        number = error.errno or errno.EINVAL
        if message.request in ALWAYS_ANSWERED:
            # need_reply means nothing here, and most of these answers have no way to say no.
            if message.request == Request.GET_CONFIG:
                return _REFUSED
            if message.request == Request.SET_DEVICE_STATE_FD:
                return U64(number & abi.DEVICE_STATE_ERROR_MASK | abi.DEVICE_STATE_NOFD_MASK)
            return U64(number) if message.request in ANSWERED_WITH_RESULT else None
        asked = message.need_reply and self._has(abi.PROTOCOL_F_REPLY_ACK)
        return U64(number) if asked else None

    def _has(self, bit: int) -> bool:
        return bool(self.protocol_features >> bit & 1)

    def _ring(self, index: int) -> Ring:
        if index >= len(self.rings):
            raise OSError(
                errno.ENOBUFS, f"there is no vring {index}: this device has {len(self.rings)}, from 0"
            )
        return self.rings[index]

    def _set_state(self, ring: Ring, *, started: bool | None = None, enabled: bool | None = None) -> None:
        """Set one state or both, and have the device follow; if it can't, they stay as they were."""
        before = ring.started, ring.enabled
        if started is not None:
            ring.started = started
        if enabled is not None:
            ring.enabled = enabled
        run = ring.started and ring.enabled
        if run != ring.running:
            try:
                self.device.set_vring_running(ring.index, run)
            except BaseException:
                ring.started, ring.enabled = before
                raise
            ring.running = run

    # --- owner, features, status -----------------------------------------------------------------------

    def _set_owner(self, message: Message) -> None:
        """It is already: see `_obey`."""

    def _reset_owner(self, message: Message) -> None:
        for ring in self.rings:
            self._set_state(ring, enabled=False)

    def _get_features(self, message: Message) -> Payload:
        return U64(self.device.features | _BIT_30)

    def _set_features(self, message: Message) -> None:
        bits = _value(message)
        self._features_refused = True
        self.device.set_features(bits & ~_BIT_30)
        self._features_refused = False
        if not bits & _BIT_30:
            # Such a front end knows nothing of SET_VRING_ENABLE. With bit 30 no ring changes its state:
            # SET_FEATURES comes again while rings run, to switch the dirty log on and off.
            for ring in self.rings:
                self._set_state(ring, enabled=True)

    def _get_protocol_features(self, message: Message) -> Payload:
        return U64(PROTOCOL_FEATURES)

    def _set_protocol_features(self, message: Message) -> None:
        bits = _value(message)
        odd = bits & ~PROTOCOL_FEATURES
        if odd:
            raise OSError(errno.EOPNOTSUPP, f"not offered: {describe.protocol_features(odd)}")
        self.protocol_features = bits

    def _get_queue_num(self, message: Message) -> Payload:
        return U64(self.device.queue_num)

    def _get_status(self, message: Message) -> Payload:
        return U64(self.status)

    def _set_status(self, message: Message) -> None:
        value = _value(message)
        if value > 0xFF:
            raise OSError(errno.EINVAL, f"a device status has 8 bits, not {value:#x}")
        if value == 0:
            for ring in self.rings:
                self._set_state(ring, started=False)
        if self._features_refused:
            value &= ~virtio.CONFIG_S_FEATURES_OK
        self.status = value

    def _reset_device(self, message: Message) -> None:
        for ring in self.rings:
            self._set_state(ring, started=False, enabled=False)
        for ring in self.rings:
            self.device.set_vring_base(ring.index, 0)
        self.device.set_features(0)
        self.status = 0
        self._features_refused = False

    # --- memory ----------------------------------------------------------------------------------------

    def _set_mem_table(self, message: Message) -> None:
        assert isinstance(message.payload, MemTable)
        self.device.set_mem_table(
            [_region(piece, message.fds.take(i)) for i, piece in enumerate(message.payload.regions)]
        )

    def _get_max_mem_slots(self, message: Message) -> Payload:
        return U64(self.device.max_mem_slots)

    def _add_mem_reg(self, message: Message) -> None:
        assert isinstance(message.payload, MemReg)
        self.device.add_mem_region(_region(message.payload.region, message.fds.take()))

    def _rem_mem_reg(self, message: Message) -> None:
        assert isinstance(message.payload, MemReg)
        self.device.remove_mem_region(_region(message.payload.region, -1))

    # --- rings -----------------------------------------------------------------------------------------

    def _set_vring_num(self, message: Message) -> None:
        state = _state(message)
        self.device.set_vring_num(self._ring(state.index).index, state.num)

    def _set_vring_base(self, message: Message) -> None:
        state = _state(message)
        self.device.set_vring_base(self._ring(state.index).index, state.num)

    def _get_vring_base(self, message: Message) -> Payload:
        ring = self._ring(_state(message).index)
        self._set_state(ring, started=False)
        return VringState(ring.index, self.device.get_vring_base(ring.index))

    def _set_vring_addr(self, message: Message) -> None:
        addr = message.payload
        assert isinstance(addr, VringAddr)
        self.device.set_vring_addr(
            self._ring(addr.index).index,
            addr.flags,
            addr.desc_user_addr,
            addr.used_user_addr,
            addr.avail_user_addr,
            addr.log_guest_addr,
        )

    def _set_vring_kick(self, message: Message) -> None:
        ring, fd = self._file(message)
        self.device.set_vring_kick(ring.index, fd)
        self._set_state(ring, started=True)

    def _set_vring_call(self, message: Message) -> None:
        ring, fd = self._file(message)
        self.device.set_vring_call(ring.index, fd)

    def _set_vring_err(self, message: Message) -> None:
        ring, fd = self._file(message)
        self.device.set_vring_err(ring.index, fd)

    def _file(self, message: Message) -> tuple[Ring, int]:
        """The ring that a descriptor is for, and the descriptor, now the caller's; -1: there is none."""
        assert isinstance(message.payload, VringFile)
        ring = self._ring(message.payload.index)
        return ring, -1 if message.payload.no_fd else message.fds.take()

    def _set_vring_enable(self, message: Message) -> None:
        state = _state(message)
        if state.num not in (0, 1):
            raise OSError(
                errno.EINVAL, f"vring {state.index}: num is {state.num}, expected 0 (off) or 1 (on)"
            )
        self._set_state(self._ring(state.index), enabled=bool(state.num))

    # --- the device's own ------------------------------------------------------------------------------

    def _get_config(self, message: Message) -> Payload:
        asked = message.payload
        assert isinstance(asked, Config)
        if not asked.size:
            raise OSError(errno.EINVAL, "it asks for 0 bytes")
        data = self.device.get_config(asked.offset, asked.size)
        # A newer front end may know more fields than the device has: they read as zero, and the reply is as
        # long as the request, which it must be.
        return Config(asked.offset, asked.flags, data[: asked.size].ljust(asked.size, b"\0"))

    def _set_config(self, message: Message) -> None:
        asked = message.payload
        assert isinstance(asked, Config)
        self.device.set_config(asked.offset, asked.data, asked.flags)

    def _send_rarp(self, message: Message) -> None:
        self.device.send_rarp(U64(_value(message)).pack()[:6])

    def _net_set_mtu(self, message: Message) -> None:
        self.device.set_mtu(_value(message))

    # --- the back end's own requests -------------------------------------------------------------------

    def _set_backend_req_fd(self, message: Message) -> None:
        (fd,) = message.fds
        if not stat.S_ISSOCK(os.fstat(fd).st_mode):
            raise OSError(errno.ENOTSOCK, f"descriptor {fd} is not a socket")
        close(self.take_backend_fd())
        self._channel_fd = message.fds.take()
        self._channel_open = True
        self._awaits_ack = False
        self.backend_output.clear()

    def config_changed(self) -> None:
        """The device's configuration space has changed; the front end hears of it as soon as it may."""
        if self._closed:
            return
        self._config_news = True
        self.announce()
        if self.backend_output and self.on_backend_output is not None:
            self.on_backend_output()

    def announce(self) -> None:
        """Put CONFIG_CHANGE_MSG into `backend_output` if there is such news and it may be told now."""
        if not (self._config_news and self._channel_open and self._has(abi.PROTOCOL_F_CONFIG)):
            return
        # One at a time: a front end that is slow to read or to answer hears of all later changes at once.
        if self.backend_output or self._awaits_ack or not any(ring.started for ring in self.rings):
            return
        self._config_news = False
        self._awaits_ack = self._has(abi.PROTOCOL_F_REPLY_ACK)
        flags = abi.FLAG_NEED_REPLY if self._awaits_ack else 0
        self.backend_output += encode(BackendRequest.CONFIG_CHANGE_MSG, flags=flags)


#: A reply without payload: how GET_CONFIG is refused [GET_CONFIG].
_REFUSED = Raw(b"")


def _value(message: Message) -> int:
    assert isinstance(message.payload, U64)
    return message.payload.value


def _state(message: Message) -> VringState:
    assert isinstance(message.payload, VringState)
    return message.payload


def _region(piece: Region, fd: int) -> MemoryRegion:
    return MemoryRegion(piece.guest_phys_addr, piece.memory_size, piece.userspace_addr, piece.mmap_offset, fd)


def _unsupported(message: Message) -> OSError:
    why = NOT_OFFERED.get(message.request)
    if why is None:
        return OSError(errno.EOPNOTSUPP, "no such request is known here")
    return OSError(errno.EOPNOTSUPP, f"{why} was not offered")


_S = BackendSession
_HANDLERS: dict[int, Callable[[BackendSession, Message], Payload | None]] = {
    Request.GET_FEATURES: _S._get_features,
    Request.SET_FEATURES: _S._set_features,
    Request.SET_OWNER: _S._set_owner,
    Request.RESET_OWNER: _S._reset_owner,
    Request.SET_MEM_TABLE: _S._set_mem_table,
    Request.SET_VRING_NUM: _S._set_vring_num,
    Request.SET_VRING_ADDR: _S._set_vring_addr,
    Request.SET_VRING_BASE: _S._set_vring_base,
    Request.GET_VRING_BASE: _S._get_vring_base,
    Request.SET_VRING_KICK: _S._set_vring_kick,
    Request.SET_VRING_CALL: _S._set_vring_call,
    Request.SET_VRING_ERR: _S._set_vring_err,
    Request.GET_PROTOCOL_FEATURES: _S._get_protocol_features,
    Request.SET_PROTOCOL_FEATURES: _S._set_protocol_features,
    Request.GET_QUEUE_NUM: _S._get_queue_num,
    Request.SET_VRING_ENABLE: _S._set_vring_enable,
    Request.SEND_RARP: _S._send_rarp,
    Request.NET_SET_MTU: _S._net_set_mtu,
    Request.SET_BACKEND_REQ_FD: _S._set_backend_req_fd,
    Request.GET_CONFIG: _S._get_config,
    Request.SET_CONFIG: _S._set_config,
    Request.RESET_DEVICE: _S._reset_device,
    Request.GET_MAX_MEM_SLOTS: _S._get_max_mem_slots,
    Request.ADD_MEM_REG: _S._add_mem_reg,
    Request.REM_MEM_REG: _S._rem_mem_reg,
    Request.SET_STATUS: _S._set_status,
    Request.GET_STATUS: _S._get_status,
}
