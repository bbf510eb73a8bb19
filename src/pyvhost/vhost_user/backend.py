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
- ACCESS_PLATFORM is offered once BACKEND_REQ is negotiated, since misses can't be asked without: QEMU asks for
  the features again then, UML, whose guests would acknowledge the feature and then fail, does not.
"""

from __future__ import annotations

import errno
import logging
import os
import stat
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from pyvhost.abi import vhost, virtio
from pyvhost.abi import vhost_user as abi
from pyvhost.abi.vhost_user import Request
from pyvhost.host.fds import close
from pyvhost.vhost_user import describe, requests
from pyvhost.vhost_user.codec import Fds, Message, Stream, encode
from pyvhost.vhost_user.device import Device
from pyvhost.vhost_user.hints import SHARE_IT, Progress
from pyvhost.vhost_user.offer import NEEDS, NOT_OFFERED, PROTOCOL_FEATURES
from pyvhost.vhost_user.outbox import Outbox
from pyvhost.vhost_user.payloads import (
    ALWAYS_ANSWERED,
    ANSWERED_WITH_RESULT,
    U64,
    Inflight,
    Iotlb,
    Payload,
    Raw,
    VringState,
)
from pyvhost.vhost_user.requests import Answer, WithFd, state_of, value_of

_BIT_30 = 1 << abi.F_PROTOCOL_FEATURES
_ACCESS_PLATFORM = 1 << virtio.F_ACCESS_PLATFORM

_log = logging.getLogger(__name__)


#: Why a connection ends whose front end took its memory away.
LOST_MEMORY = "its memory file became smaller than what it shared of it; the guest's memory is gone"


class SessionError(Exception):
    """The connection can't go on; the text is for the log."""


class Reply(NamedTuple):
    """What to send back: bytes, and the descriptors that ride with the first of them."""

    data: bytes
    fds: Fds


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
        #: Called when `backend_output` got something outside of `receive`.
        self.on_backend_output: Callable[[], None] | None = None
        self._outbox = Outbox(device, label)
        self._features = 0
        self._owned = False
        self._features_refused = False
        self._channel_fd = -1
        self._told_no_channel = False
        self._closed = False
        device.config_changed = self.config_changed

    def receive(self, message: Message) -> list[Reply]:
        """Do what a front end's request asks; the replies to send, in order, with descriptors to close.

        The message's descriptors are the session's from here on. SessionError: the connection must end (and
        `close` be called).
        """
        if message.stream is not Stream.REQUEST:
            raise ValueError(f"{message.stream.value} is not the stream of requests")
        with message.fds:
            self.progress.saw(message.request)
            answer = self._obey(message)
        payload, fds = (answer.payload, Fds([answer.fd])) if isinstance(answer, WithFd) else (answer, Fds())
        if self.device.lost_memory:
            fds.close()
            raise SessionError(LOST_MEMORY)
        self.announce()
        if payload is None and message.need_reply and self._has(abi.PROTOCOL_F_REPLY_ACK):
            payload = U64(0)
        if payload is None:
            return []
        return [Reply(encode(message.request, payload, flags=abi.FLAG_REPLY), fds)]

    def stops(self, message: Message) -> list[int]:
        """The vrings that a request stops: what they have under way has to end before it is obeyed."""
        running = [ring.index for ring in self.rings if ring.running]
        payload = message.payload
        if message.request in (Request.RESET_OWNER, Request.RESET_DEVICE):
            return running
        if message.request == Request.SET_STATUS:
            return running if payload == U64(0) else []
        if isinstance(payload, VringState) and (
            message.request == Request.GET_VRING_BASE
            or (message.request == Request.SET_VRING_ENABLE and payload.num == 0)
        ):
            return [index for index in running if index == payload.index]
        return []

    def receive_backend_reply(self, message: Message) -> None:
        """The front end's answer to a request of the back end's own."""
        if message.stream is not Stream.BACKEND_REPLY:
            raise ValueError(f"{message.stream.value} is not the stream of answers to the back end")
        with message.fds:
            self._outbox.answered(message)
        self.announce()

    def take_backend_fd(self) -> int:
        """The socket of SET_BACKEND_REQ_FD that came since the last call, now the caller's; -1: none did."""
        fd, self._channel_fd = self._channel_fd, -1
        return fd

    def backend_channel_closed(self) -> None:
        """Nobody listens on the socket of SET_BACKEND_REQ_FD any more."""
        self._outbox.closed()
        self._look_for_channel()

    @property
    def backend_output(self) -> bytearray:
        """Bytes to send on the socket of SET_BACKEND_REQ_FD; who sends them deletes them, and calls `announce`."""
        return self._outbox.output

    @property
    def takes_misses(self) -> bool:
        """Whether a miss of the device's IOTLB would be told now: when `announce` is worth calling for one."""
        return self._misses_matter and self._outbox.takes_misses(self.protocol_features)

    def close(self) -> None:
        """The front end is gone: the device is as new. Nothing happens the second time."""
        if self._closed:
            return
        self._closed = True
        self.on_backend_output = None
        close(self.take_backend_fd())
        self.device.config_changed = None
        self.device.memory_lost = None
        self.device.progress = None
        self.device.reset()

    # --- what a message comes to ---------------------------------------------------------------------

    def _obey(self, message: Message) -> Answer:
        try:
            handler = _HANDLERS.get(message.request)
            direct = requests.HANDLERS.get(message.request)
            if handler is None and direct is None:
                raise _unsupported(message)
            if not self._owned:
                # Its connection makes a front end the owner; not every one says SET_OWNER, some say it twice.
                self.device.set_owner()
                self._owned = True
            if handler is not None:
                return handler(self, message)
            assert direct is not None
            return direct(self.device, message)
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
        if message.request in ALWAYS_ANSWERED or self._answers_log_base(message):
            # need_reply means nothing here, and most of these answers have no way to say no.
            if message.request == Request.GET_CONFIG:
                return _REFUSED
            if message.request == Request.GET_INFLIGHT_FD and isinstance(message.payload, Inflight):
                # No size and no descriptor: QEMU then does without, others see that it failed.
                return Inflight(0, 0, message.payload.num_queues, message.payload.queue_size)
            if message.request == Request.SET_DEVICE_STATE_FD:
                return U64(number & abi.DEVICE_STATE_ERROR_MASK | abi.DEVICE_STATE_NOFD_MASK)
            return U64(number) if message.request in ANSWERED_WITH_RESULT else None
        asked = message.need_reply and self._has(abi.PROTOCOL_F_REPLY_ACK)
        return U64(number) if asked else None

    def _has(self, bit: int) -> bool:
        return bool(self.protocol_features >> bit & 1)

    def _answers_log_base(self, message: Message) -> bool:
        return message.request == Request.SET_LOG_BASE and self._has(abi.PROTOCOL_F_LOG_SHMFD)

    def _ring(self, index: int) -> Ring:
        return self.rings[requests.ring_of(self.device, index)]

    @property
    def _suspended(self) -> bool:
        return not any(ring.started for ring in self.rings)

    @property
    def _misses_matter(self) -> bool:
        """Whether addresses are translated, and a ring may have one that is not known."""
        return bool(self._features & _ACCESS_PLATFORM) and not self._suspended

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
            if not run:
                self._outbox.forget_misses(ring.index)
            self._look_for_channel()

    def _look_for_channel(self) -> None:
        """Say it, once, if rings run whose misses can't be told anybody."""
        if self._told_no_channel or self._outbox.open or self._closed:
            return
        if self._features & _ACCESS_PLATFORM and any(ring.running for ring in self.rings):
            self._told_no_channel = True
            _log.error(
                "%s: it acknowledged ACCESS_PLATFORM, and there is no socket (SET_BACKEND_REQ_FD) to ask it for"
                " translations: vrings wait for what it does not send by itself",
                self.label,
            )

    # --- owner, features, status -----------------------------------------------------------------------

    def _set_owner(self, message: Message) -> None:
        """It is already: see `_obey`."""

    def _reset_owner(self, message: Message) -> None:
        for ring in self.rings:
            self._set_state(ring, enabled=False)

    def _get_features(self, message: Message) -> Payload:
        bits = self.device.features
        if not self._has(abi.PROTOCOL_F_BACKEND_REQ):
            bits &= ~_ACCESS_PLATFORM
        return U64(bits | _BIT_30)

    def _set_features(self, message: Message) -> None:
        bits = value_of(message)
        self._features_refused = True
        self.device.set_features(bits & ~_BIT_30)
        self._features_refused = False
        self._features = bits
        self._look_for_channel()
        if not bits & _BIT_30:
            # Such a front end knows nothing of SET_VRING_ENABLE. With bit 30 no ring changes its state:
            # SET_FEATURES comes again while rings run, to switch the dirty log on and off.
            for ring in self.rings:
                self._set_state(ring, enabled=True)

    def _get_protocol_features(self, message: Message) -> Payload:
        return U64(PROTOCOL_FEATURES)

    def _set_protocol_features(self, message: Message) -> None:
        bits = value_of(message)
        odd = bits & ~PROTOCOL_FEATURES
        if odd:
            raise OSError(errno.EOPNOTSUPP, f"not offered: {describe.protocol_features(odd)}")
        for bit, needed in NEEDS.items():
            lacking = needed & ~bits
            if bits >> bit & 1 and lacking:
                raise OSError(
                    errno.EINVAL,
                    f"{describe.protocol_features(1 << bit)} is nothing without"
                    f" {describe.protocol_features(lacking)}",
                )
        self.protocol_features = bits

    def _get_status(self, message: Message) -> Payload:
        return U64(self.status)

    def _set_status(self, message: Message) -> None:
        value = value_of(message)
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
        self._features = 0
        self.status = 0
        self._features_refused = False

    # --- rings -----------------------------------------------------------------------------------------

    def _get_vring_base_skip_drain(self, message: Message) -> Payload:
        self.device.give_up_vring(self._ring(state_of(message).index).index)
        return self._get_vring_base(message)

    def _get_vring_base(self, message: Message) -> Payload:
        ring = self._ring(state_of(message).index)
        self._set_state(ring, started=False)
        return VringState(ring.index, self.device.get_vring_base(ring.index))

    def _set_vring_kick(self, message: Message) -> None:
        index, fd = requests.file_of(self.device, message)
        self.device.set_vring_kick(index, fd)
        self._set_state(self.rings[index], started=True)

    def _set_vring_enable(self, message: Message) -> None:
        state = state_of(message)
        if state.num not in (0, 1):
            raise OSError(
                errno.EINVAL, f"vring {state.index}: num is {state.num}, expected 0 (off) or 1 (on)"
            )
        self._set_state(self._ring(state.index), enabled=bool(state.num))

    # --- the back end's own requests -------------------------------------------------------------------

    def _set_backend_req_fd(self, message: Message) -> None:
        (fd,) = message.fds
        if not stat.S_ISSOCK(os.fstat(fd).st_mode):
            raise OSError(errno.ENOTSOCK, f"descriptor {fd} is not a socket")
        close(self.take_backend_fd())
        self._channel_fd = message.fds.take()
        self._outbox.opened()

    def config_changed(self) -> None:
        """The device's configuration space has changed; the front end hears of it as soon as it may."""
        if self._closed:
            return
        self._outbox.config_changed()
        self.announce()
        if self.backend_output and self.on_backend_output is not None:
            self.on_backend_output()

    def announce(self) -> None:
        """Put the next message into `backend_output`, if there is one and it may be told now."""
        if not self._suspended:
            self._outbox.fill(self.protocol_features, iotlb=self._misses_matter)

    def _iotlb_msg(self, message: Message) -> Payload:
        entry = message.payload
        assert isinstance(entry, Iotlb)
        if entry.type == vhost.IOTLB_UPDATE:
            self._outbox.take_misses()
        answer = requests.iotlb_msg(self.device, message)
        if entry.type == vhost.IOTLB_UPDATE:
            self._outbox.entered(entry)
        else:
            self._outbox.left(entry)
        return answer

    # --- the dirty log ---------------------------------------------------------------------------------

    def _set_log_base(self, message: Message) -> Payload:
        if not self._has(abi.PROTOCOL_F_LOG_SHMFD):
            raise OSError(errno.EOPNOTSUPP, "without LOG_SHMFD the log can't be reached")
        return requests.set_log_base(self.device, message)


#: A reply without payload: how GET_CONFIG is refused [GET_CONFIG].
_REFUSED = Raw(b"")


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
    Request.SET_LOG_BASE: _S._set_log_base,
    Request.IOTLB_MSG: _S._iotlb_msg,
    Request.GET_VRING_BASE: _S._get_vring_base,
    Request.GET_VRING_BASE_SKIP_DRAIN: _S._get_vring_base_skip_drain,
    Request.SET_VRING_KICK: _S._set_vring_kick,
    Request.GET_PROTOCOL_FEATURES: _S._get_protocol_features,
    Request.SET_PROTOCOL_FEATURES: _S._set_protocol_features,
    Request.SET_VRING_ENABLE: _S._set_vring_enable,
    Request.SET_BACKEND_REQ_FD: _S._set_backend_req_fd,
    Request.RESET_DEVICE: _S._reset_device,
    Request.SET_STATUS: _S._set_status,
    Request.GET_STATUS: _S._get_status,
}
