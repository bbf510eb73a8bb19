"""The net device (virtio 1.2, 5.1): queue pairs between a guest's rings and a backend's ports.

Promises: what the guest negotiated is what the backend is set to, before the first frame; the backend lives as
long as the device, whatever front ends come and go.
Never: touches a frame. The worker's loop does.
"""

from __future__ import annotations

import errno
import logging
import os
import secrets
from collections.abc import Callable
from contextlib import ExitStack
from typing import ClassVar, Final

from pyvhost.abi import virtio
from pyvhost.abi import virtio_net as abi
from pyvhost.dataplane import blocks
from pyvhost.host.poller import Poller
from pyvhost.net import control, features
from pyvhost.net.backends.base import Backend
from pyvhost.net.backends.registry import make as make_backend
from pyvhost.net.backends.switch import SwitchBackend
from pyvhost.net.pairs import Pair
from pyvhost.net.pcap import Recorder
from pyvhost.net.process import Process
from pyvhost.net.switches import SwitchPlane
from pyvhost.vhost.chains import Chain, PythonRing
from pyvhost.vhost.device import Device
from pyvhost.vhost.errors import VhostError
from pyvhost.vhost.vring import Place
from pyvhost.vhost.worker import Int64s

_log = logging.getLogger(__name__)

#: A kick's message names a vring by 8 bits, and the control queue comes behind all pairs.
MAX_QUEUE_PAIRS: Final = 127
_MIN_MTU: Final = 68
_MAX_MTU: Final = 65535


def new_mac() -> bytes:
    """A locally administered unicast address that nobody else has (52:54:00 and 24 random bits)."""
    return b"\x52\x54\x00" + secrets.token_bytes(3)


class NetDevice(Device):
    """A network card for a guest.

    `backend`: where its frames go, as on the command line ("tap:vm0", "switch:lan", ...) or a `Backend`.
    `queue_pairs`: 1 to 127. `mac`: 6 bytes or "52:54:00:12:34:56"; None: one is made up. `mtu`: bytes; None: the
    backend's, or 1500. `busyloop_timeout`: microseconds that a queue is polled before it rests. `pcap`: a file
    that records every frame. ValueError: an argument that can't be; OSError: the host refuses the backend.
    """

    kind: ClassVar[str] = "net"
    virtio_id: ClassVar[int] = virtio.ID_NET

    def __init__(
        self,
        backend: str | Backend = "null",
        *,
        queue_pairs: int = 1,
        mac: bytes | str | None = None,
        mtu: int | None = None,
        busyloop_timeout: int = 0,
        pcap: str | os.PathLike[str] | None = None,
        name: str | None = None,
    ) -> None:
        self.backend = make_backend(backend) if isinstance(backend, str) else backend
        if not 1 <= queue_pairs <= MAX_QUEUE_PAIRS:
            raise ValueError(f"queue_pairs is {queue_pairs}, expected 1 to {MAX_QUEUE_PAIRS}")
        self.backend.check_pairs(queue_pairs)
        super().__init__(
            name or f"net {self.backend.spec}", 2 * queue_pairs + 1, busyloop_timeout=busyloop_timeout
        )
        self.queue_pairs = queue_pairs
        self.pairs: list[Pair] = []
        #: The switch that it is a member of, if its backend is one, and as which.
        self.switch: SwitchPlane | None = None
        self.member = -1
        self._mac = _parse_mac(mac) if mac is not None else None
        if mtu is not None and not _MIN_MTU <= mtu <= _MAX_MTU:
            raise ValueError(f"mtu is {mtu}, expected {_MIN_MTU} to {_MAX_MTU}")
        self._mtu = mtu
        self._pcap = pcap
        self._recorder: Recorder | None = None
        self._status = abi.S_LINK_UP
        #: What this device was made with: address and MTU.
        self._own = (self._mac, self._mtu)
        #: The features that the rest here is set to.
        self._former = 0
        self._driver_pairs: int | None = None
        self._running_pairs = 0
        self._offloads_off = 0
        self._control: PythonRing | None = None
        self._control_row: Int64s | None = None

    def attach(self, poller: Poller) -> None:
        """Opens the backend and takes its place in the process's workers."""
        super().attach(poller)
        process = Process.get()
        process.prepare()
        fds = self.backend.open(self.queue_pairs, poller)
        try:
            if self._mac is None:
                self._mac = self.backend.mac or new_mac()
            if isinstance(self.backend, SwitchBackend):
                assert self.backend.group is not None
                self.switch = SwitchPlane.of(self.backend.group, process)
                self.member = self.switch.join()
            self._own = (self._mac, self._mtu)
            for i in range(self.queue_pairs):
                self.pairs.append(Pair(process, self, i))
            if self._pcap is not None:
                self._recorder = Recorder(self._pcap, self.name, self.queue_pairs)
                for pair, address in zip(self.pairs, self._recorder.addresses, strict=True):
                    pair.record(address)
            self._control_row = process.row(self.name, "net", "ctrl", self.backend.spec)
            self._control = PythonRing(
                f"{self.name}: control queue", self._command, poller, self._control_row
            )
            self.features_changed()
            for pair, fd in zip(self.pairs, fds, strict=True):
                pair.use_fd(fd)
        except BaseException:
            self.close()
            raise
        self.set_link(self.backend.link_up())
        self.backend.on_change = self._backend_changed

    # --- what vhost.Device asks ---------------------------------------------------------------------------

    @property
    def features(self) -> int:
        """Offered, without what belongs to a transport."""
        return features.offered(offloads=self.backend.offloads, queue_pairs=self.queue_pairs)

    @property
    def queue_num(self) -> int:
        """Queue pairs, as QEMU and DPDK count a net device's queues."""
        return self.queue_pairs

    def place_of(self, index: int) -> Place:
        """The control queue comes behind all pairs, or behind the first where MQ was not negotiated (5.1.2)."""
        pairs = self.queue_pairs if self.acked_features >> abi.F_MQ & 1 else 1
        if index == 2 * pairs and self._control is not None:
            return self._control
        if index >= 2 * len(self.pairs):
            raise VhostError(
                errno.EINVAL,
                f"{self.name}: vring {index} is none of this device's while MQ is not negotiated",
            )
        return self.pairs[index // 2].place(index % 2)

    def reset(self) -> None:
        """Everything as new: what a driver said of address and MTU goes with its front end."""
        super().reset()
        self._mac, self._mtu = self._own
        self._status &= ~abi.S_ANNOUNCE

    def features_changed(self) -> None:
        """Sets ports and backend to what was negotiated."""
        changed, self._former = self._former ^ self.acked_features, self.acked_features
        several = features.mask(abi.F_MQ, abi.F_CTRL_VQ)
        # Where the control queue is ours, the driver uses one pair until it says otherwise (5.1.6.5.5).
        if changed & several:
            self._driver_pairs = 1 if self.acked_features & several == several else None
        if changed & _GUEST_OFFLOADS:
            self._offloads_off = 0
        self._set_ports()
        if changed & several:
            self.running_changed()

    def running_changed(self) -> None:
        """Sets the backend to the queue pairs that are served now."""
        running = [pair for pair in self.pairs[: self._driver_pairs] if pair.running]
        if len(running) != self._running_pairs:
            self._running_pairs = len(running)
            self._host(lambda: self.backend.set_pairs(max(1, len(running))))
        if self.switch is not None:
            self.switch.set_ports(self.member, [pair.port for pair in running])

    def get_config(self, offset: int, size: int) -> bytes:
        """Bytes of struct virtio_net_config (5.1.4)."""
        config = abi.NetConfig()
        config.mac[:] = self.mac
        config.status = self._status
        config.max_virtqueue_pairs = self.queue_pairs
        config.mtu = self._mtu or self.backend.mtu or 1500
        return bytes(config)[offset : offset + size]

    def set_config(self, offset: int, data: bytes, flags: int) -> None:
        """A legacy driver writes its address (5.1.4.2); QEMU restores the whole space, of which that counts."""
        config = bytearray(self.get_config(0, 65536))
        if offset + len(data) > len(config):
            raise VhostError(
                errno.EINVAL, f"{self.name}: configuration bytes {offset}+{len(data)} of {len(config)}"
            )
        config[offset : offset + len(data)] = data
        self._mac = bytes(config[:6])

    def send_rarp(self, mac: bytes) -> None:
        """Announces a guest that has moved here and can't do it itself."""
        frame = rarp(mac)
        if self.switch is not None:
            self.switch.announce(self.member, mac, frame)
        elif self.backend.fds and self.backend.fds[0] >= 0:
            if self.backend.kind == blocks.PORT_STREAM:
                self._host(lambda: self.pairs[0].send_framed(frame))
            else:
                data = bytes(self.backend.header_size) + frame
                self._host(lambda: os.write(self.backend.fds[0], data))

    def set_mtu(self, mtu: int) -> None:
        """Takes the guest's MTU. EINVAL: outside 68 to 65535."""
        if not _MIN_MTU <= mtu <= _MAX_MTU:
            raise VhostError(errno.EINVAL, f"{self.name}: mtu {mtu}, expected {_MIN_MTU} to {_MAX_MTU}")
        self._mtu = mtu

    # --- what a user may ask --------------------------------------------------------------------------------

    @property
    def mac(self) -> bytes:
        """The guest's address; made up if nobody has said one."""
        if self._mac is None:
            self._mac = new_mac()
        return self._mac

    @property
    def link(self) -> bool:
        """Whether the guest sees a cable that is plugged in."""
        return bool(self._status & abi.S_LINK_UP)

    def set_link(self, up: bool) -> None:
        """Shows the guest a cable that is plugged in, or not."""
        self._set_status(self._status | abi.S_LINK_UP if up else self._status & ~abi.S_LINK_UP)

    def announce(self) -> None:
        """Asks the driver to announce itself on the network (GUEST_ANNOUNCE)."""
        self._set_status(self._status | abi.S_ANNOUNCE)

    def close(self) -> None:
        """Gives up rings, ports and backend."""
        self.reset()
        self.backend.on_change = None
        for pair in self.pairs:
            pair.close()
        self.pairs = []
        if self.switch is not None and self.member >= 0:
            self.switch.leave(self.member)
        self.switch, self.member = None, -1
        if self._control_row is not None:
            Process.get().counters.release(self._control_row)
        self._control = self._control_row = None
        if self._recorder is not None:
            self._recorder.close()
            self._recorder = None
        self.backend.close()

    # --- the control queue's commands -----------------------------------------------------------------------

    def _command(self, chain: Chain) -> int:
        return control.handle(self, chain)

    def use_pairs(self, pairs: int) -> bool:
        """VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET."""
        if not self.acked_features >> abi.F_MQ & 1 or not 1 <= pairs <= self.queue_pairs:
            return False
        self._driver_pairs = pairs
        self.running_changed()
        return True

    def announced(self) -> None:
        """VIRTIO_NET_CTRL_ANNOUNCE_ACK."""
        self._status &= ~abi.S_ANNOUNCE

    def set_mac(self, mac: bytes) -> None:
        """VIRTIO_NET_CTRL_MAC_ADDR_SET."""
        self._mac = mac

    def set_guest_offloads(self, offloads: int) -> bool:
        """VIRTIO_NET_CTRL_GUEST_OFFLOADS_SET: some of the negotiated GUEST_ offloads, switched off for now."""
        negotiated = self.acked_features & _GUEST_OFFLOADS
        if offloads & ~negotiated:
            return False
        self._offloads_off = negotiated & ~offloads
        self._set_ports()
        return True

    # --- within -----------------------------------------------------------------------------------------------

    def _set_ports(self) -> None:
        header = features.header_size(self.acked_features)
        taken = self.acked_features & ~self._offloads_off
        with ExitStack() as stack:
            for pair in self.pairs:
                stack.enter_context(pair.worker.paused())
            self._host(lambda: self.backend.set_vnet_hdr_size(header))
            self._host(lambda: self.backend.set_offloads(taken))
            for pair in self.pairs:
                pair.negotiated(taken, header, self.backend.header_size)

    def _set_status(self, status: int) -> None:
        if status != self._status:
            self._status = status
            if self.config_changed is not None:
                self.config_changed()

    def _host(self, action: Callable[[], object]) -> None:
        """Does what the host may refuse: that is reported, and the guest goes on with what there is."""
        try:
            action()
        except OSError as error:
            _log.error("%s: %s", self.name, error.strerror or error)

    def _backend_changed(self) -> None:
        """The backend's other end came or went; maybe with a new descriptor. On the control thread."""
        fds = self.backend.fds
        for pair, fd in zip(self.pairs, fds, strict=False):
            pair.use_fd(fd)
        self.set_link(self.backend.link_up())

    def backend_fault(self, pair: Pair, code: int) -> None:
        """The host's fault at a port. In the worker's thread."""
        words = f"{errno.errorcode.get(code, code)} ({os.strerror(code)})"
        _log.error("%s: %s: queue pair %d: %s", self.name, self.backend.spec, pair.index, words)
        if self.poller is not None:
            self.poller.call_soon_threadsafe(self.backend.reopen)


#: The GUEST_ features that CTRL_GUEST_OFFLOADS switches (5.1.6.5.6).
_GUEST_OFFLOADS: Final = features.mask(
    abi.F_GUEST_CSUM, abi.F_GUEST_TSO4, abi.F_GUEST_TSO6, abi.F_GUEST_ECN, abi.F_GUEST_UFO
)


def _parse_mac(mac: bytes | str) -> bytes:
    """An Ethernet address in either form. ValueError: it is none, or is a group's."""
    try:
        raw = bytes.fromhex(mac.replace(":", "")) if isinstance(mac, str) else bytes(mac)
    except ValueError:
        raw = b""
    if len(raw) != 6 or raw[0] & 1:
        raise ValueError(f"mac {mac!r} is not the address of one station, like 52:54:00:12:34:56")
    return raw


def rarp(mac: bytes) -> bytes:
    """A RARP request that says where `mac` is now (RFC 903), as a whole frame."""
    body = bytes.fromhex("0001080006040003") + mac + bytes(4) + mac + bytes(4)
    return (b"\xff" * 6 + mac + bytes.fromhex("8035") + body).ljust(60, b"\0")
