"""A virtio-net device's control queue, from the driver's side (virtio 1.3, 5.1.6.5).

Promises: one command at a time, each waited for. A command that the device answers with ERR is RefusedError,
an acknowledgement that is neither OK nor ERR is DeviceError. Never: asks whether the feature that a command
needs was negotiated: a device must stand one that was not.
"""

from __future__ import annotations

from collections.abc import Sequence

from pyvhost.abi import virtio_net as abi
from pyvhost.driver.errors import DeviceError, RefusedError
from pyvhost.driver.memory import GuestMemory
from pyvhost.driver.queue import Queue, Service, wait
from pyvhost.driver.ring_parts import ByteOrder

_UNTOUCHED = 0xA5


class NetControl:
    """Commands on `queue`; `timeout` in seconds bounds each. `peer` is a descriptor that hangs up with
    the device; `services` have their turns while a command is waited for.
    """

    def __init__(
        self,
        queue: Queue,
        memory: GuestMemory,
        *,
        timeout: float = 10.0,
        peer: int = -1,
        byteorder: ByteOrder = "little",
        services: Sequence[Service] = (),
    ) -> None:
        self.queue = queue
        self.memory = memory
        self.timeout = timeout
        self.peer = peer
        self.byteorder: ByteOrder = byteorder
        self.services = services

    def command(self, kind: int, command: int, data: bytes = b"", *, indirect: bool = False) -> int:
        """Give one command with its `data`; returns the acknowledgement, whatever it is.

        Header and data lie in a descriptor each, and the acknowledgement in a third.
        """
        parts = [bytes([kind, command]), data] if data else [bytes([kind, command])]
        addresses = [self.memory.allocate(len(part)) for part in parts]
        ack = self.memory.allocate(1)
        for address, part in zip(addresses, parts, strict=True):
            self.memory.write(address, part)
        self.memory.write(ack, bytes([_UNTOUCHED]))
        readable = [(address, len(part)) for address, part in zip(addresses, parts, strict=True)]
        ring = self.queue.ring
        ring.add(readable, [(ack, 1)], indirect=indirect)
        self.queue.publish()
        what = f"answer to command {kind}/{command}"
        wait(
            lambda: ring.used_pending() > 0,
            [self.queue],
            self.timeout,
            what,
            peer=self.peer,
            services=self.services,
        )
        used = ring.pop_used()
        assert used is not None
        answer = self.memory.read(ack, 1)[0]
        for address in (*addresses, ack):
            self.memory.free(address)
        if used.len != 1:
            raise DeviceError(
                f"command {kind}/{command}: {used.len} bytes were written, the acknowledgement has 1"
            )
        return answer

    def _must(self, kind: int, command: int, data: bytes = b"") -> None:
        answer = self.command(kind, command, data)
        if answer == abi.ERR:
            raise RefusedError(f"the device refused command {kind}/{command} with {data.hex() or 'no data'}")
        if answer != abi.OK:
            raise DeviceError(f"command {kind}/{command}: acknowledgement {answer:#x} is neither OK nor ERR")

    def set_queue_pairs(self, pairs: int) -> None:
        """Use the first `pairs` queue pairs (feature MQ)."""
        self._must(abi.CTRL_MQ, abi.CTRL_MQ_VQ_PAIRS_SET, pairs.to_bytes(2, self.byteorder))

    def ack_announce(self) -> None:
        """We have announced ourselves (feature GUEST_ANNOUNCE)."""
        self._must(abi.CTRL_ANNOUNCE, abi.CTRL_ANNOUNCE_ACK)

    def set_mac(self, mac: bytes) -> None:
        """Take this address (feature CTRL_MAC_ADDR)."""
        self._must(abi.CTRL_MAC, abi.CTRL_MAC_ADDR_SET, mac)

    def set_mac_table(self, unicast: Sequence[bytes], multicast: Sequence[bytes]) -> None:
        """Receive frames to these addresses too (feature CTRL_RX)."""
        tables = [len(table).to_bytes(4, self.byteorder) + b"".join(table) for table in (unicast, multicast)]
        self._must(abi.CTRL_MAC, abi.CTRL_MAC_TABLE_SET, b"".join(tables))

    def set_rx_mode(self, mode: int, on: bool) -> None:
        """Turn one of `CTRL_RX_PROMISC` ... `CTRL_RX_NOBCAST` on or off (features CTRL_RX, CTRL_RX_EXTRA)."""
        self._must(abi.CTRL_RX, mode, bytes([on]))

    def add_vlan(self, vlan: int) -> None:
        """Let frames of this VLAN through (feature CTRL_VLAN)."""
        self._must(abi.CTRL_VLAN, abi.CTRL_VLAN_ADD, vlan.to_bytes(2, self.byteorder))

    def delete_vlan(self, vlan: int) -> None:
        """Stop what `add_vlan` began."""
        self._must(abi.CTRL_VLAN, abi.CTRL_VLAN_DEL, vlan.to_bytes(2, self.byteorder))

    def set_guest_offloads(self, offloads: int) -> None:
        """Of the GUEST_* features negotiated, those in effect (feature CTRL_GUEST_OFFLOADS)."""
        self._must(abi.CTRL_GUEST_OFFLOADS, abi.CTRL_GUEST_OFFLOADS_SET, offloads.to_bytes(8, self.byteorder))
