"""What a net device offers, and what the bits that were negotiated mean for a port."""

from __future__ import annotations

import pytest

from pyvhost.abi import virtio
from pyvhost.abi import virtio_net as abi
from pyvhost.net import features


def bits(*numbers: int) -> int:
    return features.mask(*numbers)


def test_offloads_are_offered_where_they_can_be_carried() -> None:
    offloads = bits(
        abi.F_CSUM,
        abi.F_GUEST_CSUM,
        abi.F_GUEST_TSO4,
        abi.F_GUEST_TSO6,
        abi.F_GUEST_ECN,
        abi.F_GUEST_UFO,
        abi.F_HOST_TSO4,
        abi.F_HOST_TSO6,
        abi.F_HOST_ECN,
        abi.F_HOST_UFO,
        abi.F_CTRL_GUEST_OFFLOADS,
    )
    carried = features.offered(offloads=True, queue_pairs=1)
    plain = features.offered(offloads=False, queue_pairs=1)
    assert carried == plain | offloads
    assert plain & offloads == 0


def test_mq_is_offered_where_there_is_more_than_one_pair() -> None:
    one, two = (features.offered(offloads=True, queue_pairs=pairs) for pairs in (1, 2))
    assert two == one | bits(abi.F_MQ)
    assert one & bits(abi.F_MQ) == 0


@pytest.mark.parametrize("offloads", [False, True])
def test_what_is_always_there(offloads: bool) -> None:
    """The seed's transport bits, and what the issue asks of every net device."""
    always = bits(
        virtio.F_NOTIFY_ON_EMPTY,
        virtio.F_ANY_LAYOUT,
        virtio.RING_F_INDIRECT_DESC,
        virtio.RING_F_EVENT_IDX,
        virtio.F_VERSION_1,
        abi.F_MRG_RXBUF,
        abi.F_MAC,
        abi.F_MTU,
        abi.F_STATUS,
        abi.F_CTRL_VQ,
        abi.F_GUEST_ANNOUNCE,
    )
    offered = features.offered(offloads=offloads, queue_pairs=1)
    assert offered & always == always
    # Nobody has written these yet.
    for absent in (
        virtio.F_RING_PACKED,
        abi.F_RSS,
        abi.F_GUEST_USO4,
        abi.F_HOST_USO,
    ):
        assert offered >> absent & 1 == 0
    # Bit 30 belongs to the transport.
    assert offered >> 30 & 1 == 0


@pytest.mark.parametrize(
    ("negotiated", "size"),
    [
        (0, 10),
        (bits(abi.F_CSUM, virtio.F_ANY_LAYOUT), 10),
        (bits(abi.F_MRG_RXBUF), 12),
        (bits(virtio.F_VERSION_1), 12),
        (bits(virtio.F_VERSION_1, abi.F_MRG_RXBUF), 12),
    ],
)
def test_num_buffers_is_in_every_header_but_a_legacy_one(negotiated: int, size: int) -> None:
    assert features.header_size(negotiated) == size


def test_a_port_takes_the_gso_types_that_its_guest_negotiated() -> None:
    none = 1 << abi.HDR_GSO_NONE
    assert features.gso_types(0) == none
    for feature, kind in (
        (abi.F_GUEST_TSO4, abi.HDR_GSO_TCPV4),
        (abi.F_GUEST_TSO6, abi.HDR_GSO_TCPV6),
        (abi.F_GUEST_UFO, abi.HDR_GSO_UDP),
    ):
        assert features.gso_types(bits(feature)) == none | 1 << kind
    # The HOST_ features say what the guest sends, not what it takes.
    assert features.gso_types(bits(abi.F_HOST_TSO4, abi.F_HOST_TSO6, abi.F_HOST_UFO, abi.F_HOST_ECN)) == none
    assert features.gso_types(bits(abi.F_GUEST_ECN)) == none | abi.HDR_GSO_ECN
