"""The control queue (virtio 1.2, 5.1.6.5): commands that a driver sends once in a while.

A front end like QEMU answers them itself; UML and others hand the queue over.

Promises: each command is judged by its length and numbers, and what is not known is answered ERR.
Never: filters frames. Receive modes and address filters are accepted, and all frames go on being delivered,
as 5.1.6.5.1 and 5.1.6.5.2 allow ("best effort").
"""

from __future__ import annotations

import logging
from typing import Final, Literal, Protocol

from pyvhost.abi import virtio_net as abi
from pyvhost.vhost.chains import Chain

_log = logging.getLogger(__name__)

_MAC_ENTRIES: Final = 4096


class Controlled(Protocol):
    """What a command can change."""

    name: str

    def use_pairs(self, pairs: int) -> bool:
        """Use so many queue pairs; False if that can't be."""

    def announced(self) -> None:
        """The driver has announced itself, as it was asked to."""

    def set_mac(self, mac: bytes) -> None:
        """The driver's address has changed."""

    def set_guest_offloads(self, offloads: int) -> bool:
        """Which GUEST_ offloads are on now; False if one was not negotiated."""


def handle(device: Controlled, chain: Chain) -> int:
    """Does one command; the bytes written (its ack)."""
    command = chain.read(16 + 2 * 6 * _MAC_ENTRIES)
    done = len(command) >= 2 and _obey(device, command[0], command[1], command[2:], chain.byteorder)
    if not done:
        # A guest may send as many as it likes: no louder.
        _log.debug("%s: control command %s refused", device.name, command[:8].hex() or "(empty)")
    return chain.write(bytes([abi.OK if done else abi.ERR]))


def _obey(device: Controlled, group: int, command: int, data: bytes, order: Literal["little", "big"]) -> bool:
    match group, command:
        case abi.CTRL_RX, n if n <= abi.CTRL_RX_NOBCAST:
            return len(data) == 1
        case abi.CTRL_MAC, abi.CTRL_MAC_TABLE_SET:
            return _is_mac_tables(data, order)
        case abi.CTRL_MAC, abi.CTRL_MAC_ADDR_SET:
            if len(data) != 6:
                return False
            device.set_mac(data)
            return True
        case abi.CTRL_ANNOUNCE, abi.CTRL_ANNOUNCE_ACK:
            device.announced()
            return True
        case abi.CTRL_MQ, abi.CTRL_MQ_VQ_PAIRS_SET:
            return len(data) == 2 and device.use_pairs(int.from_bytes(data, order))
        case abi.CTRL_GUEST_OFFLOADS, abi.CTRL_GUEST_OFFLOADS_SET:
            return len(data) == 8 and device.set_guest_offloads(int.from_bytes(data, order))
    return False


def _is_mac_tables(data: bytes, order: Literal["little", "big"]) -> bool:
    """Whether these are two tables of addresses, unicast and multicast, each behind its count."""
    for _ in range(2):
        if len(data) < 4:
            return False
        entries = int.from_bytes(data[:4], order)
        if entries > _MAC_ENTRIES or len(data) < 4 + 6 * entries:
            return False
        data = data[4 + 6 * entries :]
    return not data
