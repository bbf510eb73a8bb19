"""What a backend is to the network device, and how to write one.

A backend opens descriptors, one a queue pair, and names the way in which the compiled loop moves frames over
them (`PortKind`). It never sees a frame itself. Everything is called on the control thread.

The life of one, as the device leads it:

1. it is made from its spec, which checks what was written and touches nothing;
2. `open(queue_pairs, poller)`;
3. whenever a driver has negotiated: `set_vnet_hdr_size`, `set_offloads`, `set_pairs`, in any order, repeatedly;
4. whenever the loop finds its descriptor at an end: `reopen()`;
5. `close()`, after which `open` may come again.

One of your own is a subclass that is registered under a name:

    from pyvhost.net.backends.base import Backend, PortKind
    from pyvhost.net.backends.registry import register

    class Pair(Backend):
        kind = PortKind.STREAM
        offloads = False
        queue_pairs_max = 1

        @classmethod
        def from_spec(cls, spec):
            spec.no_argument()
            return cls(spec.text)

        def open(self, queue_pairs, poller=None):
            self.check_pairs(queue_pairs)
            self.mine, yours = socket.socketpair()
            self.mine.setblocking(False)
            start_something_with(yours)
            self.fds = [self.mine.fileno()]
            return self.fds

        def close(self):
            self.fds = []
            self.mine.close()

    register("pair", Pair.from_spec)

Promises: `fds` has one entry a queue pair from `open` to `close`, -1 where there is nothing to talk to now.
Never: imports a device or a transport.
"""

from __future__ import annotations

import enum
from collections.abc import Callable
from typing import ClassVar

from pyvhost.dataplane import blocks
from pyvhost.host.poller import Poller
from pyvhost.net.backends.spec import Spec

#: Most queue pairs a device can have: vhost-user names a ring by 8 bits.
MAX_QUEUE_PAIRS = 128


class PortKind(enum.IntEnum):
    """How the compiled loop moves the frames of a port."""

    #: What the guest sends is swallowed; it receives nothing.
    NULL = blocks.PORT_NULL
    #: As NULL, and the guest receives `template` as fast as it takes it, `count` times.
    GENERATE = blocks.PORT_GENERATE
    #: The guest receives what it sends.
    LOOP = blocks.PORT_LOOP
    #: A non-blocking descriptor: one frame a read or write, behind `header_size` bytes of virtio_net_hdr.
    FD = blocks.PORT_FD
    #: A non-blocking stream socket: each frame behind its length, 4 bytes, big endian; no virtio_net_hdr.
    STREAM = blocks.PORT_STREAM
    #: The other members of a switch, and its uplink.
    SWITCH = blocks.PORT_SWITCH


class Backend:
    """The other end of a network device. As it stands, one without descriptors and without limits."""

    #: How frames are moved.
    kind: ClassVar[PortKind] = PortKind.NULL
    #: Whether a virtio_net_hdr that asks for checksums or segmentation may go out, and may come in. If not, the
    #: loop finishes what a driver left to do.
    offloads: ClassVar[bool] = True
    #: How many queue pairs it can serve.
    queue_pairs_max: ClassVar[int] = MAX_QUEUE_PAIRS
    #: The form of its spec, and what it is for, in a few words.
    usage: ClassVar[str] = ""
    summary: ClassVar[str] = ""

    #: GENERATE: the frame, and how many of them (-1: without end).
    template: bytes = b""
    count: int = -1

    def __init__(self, spec: str) -> None:
        #: As it was written.
        self.spec = spec
        #: One a queue pair, -1 for none. Empty while closed.
        self.fds: list[int] = []
        #: Bytes of virtio_net_hdr before each frame on `fds`; 0: none.
        self.header_size = 0
        #: Set by the device: called whenever `fds` or `link_up()` may have changed, except from within `open`,
        #: `close` and the setters. Former descriptors stay open until it returns: by then the loop must have
        #: let go of them.
        self.on_change: Callable[[], object] | None = None

    @classmethod
    def from_spec(cls, spec: Spec) -> Backend:
        """The backend that a spec of its kind means. SpecError: none. (`Spec.done` is the caller's to say.)"""
        spec.no_argument()
        return cls(spec.text)

    @property
    def mtu(self) -> int | None:
        """The MTU to tell the guest of, in bytes without the Ethernet header; None: no opinion."""
        return None

    @property
    def mac(self) -> bytes | None:
        """The address to give the guest, 6 bytes; None: no opinion."""
        return None

    def open(self, queue_pairs: int, poller: Poller | None = None) -> list[int]:
        """Open what there is to open; `fds`.

        `poller` runs on the calling thread and lets the backend hear of changes; some need it. ValueError: more
        queue pairs than it can serve. OSError: whatever the host says, with what to do about it.
        """
        self.check_pairs(queue_pairs)
        self.fds = [-1] * queue_pairs
        return self.fds

    def close(self) -> None:
        """Give everything back. Nothing happens if it is closed."""
        self.fds = []

    def set_vnet_hdr_size(self, size: int) -> None:
        """Have headers of `size` bytes (10, or 12 with num_buffers) on `fds`. `header_size` is what it came to."""

    def set_offloads(self, features: int) -> None:
        """Let in only what the driver can take, by the feature bits that were negotiated (VIRTIO_NET_F_GUEST_*).

        Where a backend can't see to that, the loop finishes checksums and segments itself.
        """

    def set_pairs(self, pairs: int) -> None:
        """Spread what comes in over the first `pairs` queue pairs, and no others."""

    def link_up(self) -> bool:
        """Whether the cable is in: what a driver is told by VIRTIO_NET_S_LINK_UP."""
        return True

    def reopen(self) -> None:
        """The loop found a descriptor at its end, or something impossible on it: look for another.

        `on_change` tells of it, at once or later. Nothing happens where all is well.
        """

    def check_pairs(self, queue_pairs: int) -> None:
        """ValueError: it can't serve so many queue pairs."""
        if not 1 <= queue_pairs <= self.queue_pairs_max:
            most = "1 queue pair" if self.queue_pairs_max == 1 else f"1 to {self.queue_pairs_max} queue pairs"
            raise ValueError(f"{self.spec}: it serves {most}, not {queue_pairs}")

    def changed(self) -> None:
        """Tell the device, if it listens."""
        if self.on_change is not None:
            self.on_change()

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.spec}>"
