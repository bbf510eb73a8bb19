"""Which features a net device offers, and what those that were negotiated mean for a port.

Promises: an offload is offered only where the backend carries it or the data plane does it in software.
Never: keeps state.
"""

from __future__ import annotations

from typing import Final

from pyvhost.abi import virtio
from pyvhost.abi import virtio_net as abi
from pyvhost.vhost.device import TRANSPORT_FEATURES


def mask(*bits: int) -> int:
    """Feature bits by number, as a mask."""
    return sum(1 << bit for bit in bits)


#: What the guest may leave to us on transmit, and we to it on receive (virtio 1.2, 5.1.3).
OFFLOADS: Final = mask(
    abi.F_CSUM,
    abi.F_GUEST_CSUM,
    abi.F_HOST_TSO4,
    abi.F_HOST_TSO6,
    abi.F_HOST_ECN,
    abi.F_HOST_UFO,
    abi.F_GUEST_TSO4,
    abi.F_GUEST_TSO6,
    abi.F_GUEST_ECN,
    abi.F_GUEST_UFO,
)

_ALWAYS: Final = TRANSPORT_FEATURES | mask(
    virtio.F_IN_ORDER,
    abi.F_MTU,
    abi.F_MAC,
    abi.F_MRG_RXBUF,
    abi.F_STATUS,
    abi.F_CTRL_VQ,
    abi.F_CTRL_RX,
    abi.F_CTRL_MAC_ADDR,
    abi.F_GUEST_ANNOUNCE,
)


def offered(*, offloads: bool, queue_pairs: int) -> int:
    """The features of a device whose backend carries `offloads`, with this many queue pairs."""
    bits = _ALWAYS
    if offloads:
        bits |= OFFLOADS | mask(abi.F_CTRL_GUEST_OFFLOADS)
    if queue_pairs > 1:
        bits |= mask(abi.F_MQ)
    return bits


def header_size(features: int) -> int:
    """Bytes of virtio_net_hdr in front of each frame: 12 with num_buffers, else the legacy 10 (5.1.6)."""
    return 12 if features & mask(virtio.F_VERSION_1, abi.F_MRG_RXBUF) else 10


def gso_types(features: int) -> int:
    """The gso_types that the guest takes, a bit each by its number; bit 7 for ECN, bit 0 for none."""
    taken = 1 << abi.HDR_GSO_NONE
    for bit, kind in (
        (abi.F_GUEST_TSO4, abi.HDR_GSO_TCPV4),
        (abi.F_GUEST_TSO6, abi.HDR_GSO_TCPV6),
        (abi.F_GUEST_UFO, abi.HDR_GSO_UDP),
    ):
        if features >> bit & 1:
            taken |= 1 << kind
    if features >> abi.F_GUEST_ECN & 1:
        taken |= abi.HDR_GSO_ECN
    return taken
