"""`/dev/vhost-vsock` without the kernel's: the guest of a driver in this process, and its sockets.

What the kernel's has at the other end of its connections is the host's AF_VSOCK. Here it is this process:
`vsock.listen` and `vsock.connect`.

Promises: the checks of VHOST_VSOCK_SET_GUEST_CID and SET_RUNNING, their order and errors, are the kernel's; a CID is
one guest's of this process. Never: uses the host's own AF_VSOCK.
"""

from __future__ import annotations

from typing import ClassVar, Final

from pyvhost.abi import vhost as abi
from pyvhost.abi import virtio_vsock
from pyvhost.host.control_thread import ControlThread
from pyvhost.vhost import ioctls
from pyvhost.vhost.device import TRANSPORT_FEATURES
from pyvhost.vhost.kernel_device import KernelDevice
from pyvhost.vhost.opening import register
from pyvhost.vsock.device import RX, VsockDevice

PATH: Final = "/dev/vhost-vsock"


class VhostVsock(VsockDevice, KernelDevice):
    """An open `/dev/vhost-vsock`: receive and transmit; events are the application's to give."""

    rings: ClassVar[int] = 2
    unknown: ClassVar[frozenset[int]] = frozenset(
        {
            abi.GET_FEATURES_ARRAY,
            abi.SET_FEATURES_ARRAY,
            abi.NEW_WORKER,
            abi.FREE_WORKER,
            abi.ATTACH_VRING_WORKER,
            abi.GET_VRING_WORKER,
        }
    )

    def __init__(self, name: str = PATH) -> None:
        super().__init__(None, name=name)
        self.control = ControlThread.get()
        poller = self.control.poller
        self.control.call(lambda: self.attach(poller))

    @property
    def features(self) -> int:
        """VHOST_VSOCK_FEATURES."""
        return TRANSPORT_FEATURES | 1 << virtio_vsock.F_SEQPACKET

    # --- the seed's ioctls that are vsock's own -------------------------------------------------------------

    def set_running(self, running: bool) -> None:
        """VHOST_VSOCK_SET_RUNNING: serves both rings, or none. EFAULT: one is not in memory; neither runs then."""
        if not running:
            for vring in self.vrings:
                self.unbind(vring.index)
            return
        begun: list[int] = []
        try:
            for vring in self.vrings:
                self.check_access(vring.index)
                if not self.is_bound(vring.index):
                    self.prepare(vring.index)
                    begun.append(vring.index)
                    self.bind(vring.index, look=vring.index == RX)
        except OSError:
            for index in begun:
                self.unbind(index)
            raise


def _set_guest_cid(device: VhostVsock, argument: ioctls.Argument) -> None:
    device.set_guest_cid(ioctls.number(argument, 8))


def _set_running(device: VhostVsock, argument: ioctls.Argument) -> None:
    running = ioctls.number(argument, 4)
    device.require_owner()
    device.set_running(bool(running))


VhostVsock.ioctls = {
    abi.VSOCK_SET_GUEST_CID: _set_guest_cid,
    abi.VSOCK_SET_RUNNING: _set_running,
}
register(PATH, VhostVsock)
