"""The control queue's commands, each judged by its length and numbers."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyvhost.abi import virtio_net as abi
from pyvhost.net import control
from pyvhost.vhost.chains import Chain


@dataclass
class Device:
    """Keeps what it was told, and agrees to it or not."""

    name: str = "dev"
    agrees: bool = True
    told: list[tuple[Any, ...]] = field(default_factory=list)

    def use_pairs(self, pairs: int) -> bool:
        self.told.append(("pairs", pairs))
        return self.agrees

    def announced(self) -> None:
        self.told.append(("announced",))

    def set_mac(self, mac: bytes) -> None:
        self.told.append(("mac", mac))

    def set_guest_offloads(self, offloads: int) -> bool:
        self.told.append(("offloads", offloads))
        return self.agrees


def command(device: Device, *parts: bytes) -> int:
    """The answer to a command whose readable part is cut like this."""
    ack = bytearray(b"\xa5")
    chain = Chain(0, [memoryview(part) for part in parts if part], [memoryview(ack)])
    assert control.handle(device, chain) == 1
    return ack[0]


MAC = bytes.fromhex("525400123456")


def tables(*counts: tuple[int, int]) -> bytes:
    return b"".join(said.to_bytes(4, "little") + MAC * there for said, there in counts)


@pytest.mark.parametrize(
    ("kind", "number", "data", "told"),
    [
        (abi.CTRL_MQ, abi.CTRL_MQ_VQ_PAIRS_SET, b"\x02\x01", ("pairs", 258)),
        (abi.CTRL_ANNOUNCE, abi.CTRL_ANNOUNCE_ACK, b"", ("announced",)),
        (abi.CTRL_MAC, abi.CTRL_MAC_ADDR_SET, MAC, ("mac", MAC)),
        (abi.CTRL_GUEST_OFFLOADS, abi.CTRL_GUEST_OFFLOADS_SET, b"\x82" + bytes(7), ("offloads", 0x82)),
    ],
)
def test_a_command_in_any_layout(kind: int, number: int, data: bytes, told: tuple[Any, ...]) -> None:
    whole = bytes([kind, number]) + data
    for cut in (
        [whole],
        [whole[:2], whole[2:]],
        [whole[at : at + 1] for at in range(len(whole))],
        [whole[:1], whole[1:]],
    ):
        device = Device()
        assert command(device, *cut) == abi.OK
        assert device.told == [told]
    device = Device(agrees=False)
    assert command(device, whole) == (abi.ERR if kind in (abi.CTRL_MQ, abi.CTRL_GUEST_OFFLOADS) else abi.OK)


@pytest.mark.parametrize("mode", range(abi.CTRL_RX_PROMISC, abi.CTRL_RX_NOBCAST + 1))
def test_receive_modes_are_accepted(mode: int) -> None:
    device = Device()
    assert command(device, bytes([abi.CTRL_RX, mode, 1])) == abi.OK
    assert command(device, bytes([abi.CTRL_RX, mode])) == abi.ERR
    assert command(device, bytes([abi.CTRL_RX, mode, 1, 0])) == abi.ERR
    assert device.told == []


@pytest.mark.parametrize(
    ("data", "answer"),
    [
        (tables((0, 0), (0, 0)), abi.OK),
        (tables((1, 1), (2, 2)), abi.OK),
        (tables((4096, 4096), (4096, 4096)), abi.OK),
        (tables((4097, 4097), (0, 0)), abi.ERR),
        (tables((1, 0), (0, 0)), abi.ERR),
        (tables((0, 0)), abi.ERR),
        (tables((0, 0), (0, 0), (0, 0)), abi.ERR),
        (tables((0xFFFFFFFF, 2), (0, 0)), abi.ERR),
        (b"", abi.ERR),
        (tables((1, 1), (1, 1))[:-1], abi.ERR),
    ],
)
def test_address_tables_are_as_long_as_they_say(data: bytes, answer: int) -> None:
    assert command(Device(), bytes([abi.CTRL_MAC, abi.CTRL_MAC_TABLE_SET]), data) == answer


@pytest.mark.parametrize(
    "wrong",
    [
        b"",
        b"\x04",
        bytes([abi.CTRL_MQ, abi.CTRL_MQ_VQ_PAIRS_SET, 2]),
        bytes([abi.CTRL_MQ, abi.CTRL_MQ_VQ_PAIRS_SET, 2, 0, 0]),
        bytes([abi.CTRL_MQ, 9, 2, 0]),
        bytes([abi.CTRL_MAC, abi.CTRL_MAC_ADDR_SET]) + MAC + b"\0",
        bytes([abi.CTRL_MAC, abi.CTRL_MAC_ADDR_SET]) + MAC[:5],
        bytes([abi.CTRL_GUEST_OFFLOADS, abi.CTRL_GUEST_OFFLOADS_SET]) + bytes(7),
        bytes([abi.CTRL_RX, abi.CTRL_RX_NOBCAST + 1, 1]),
        bytes([abi.CTRL_VLAN, abi.CTRL_VLAN_ADD, 1, 0]),
        bytes([0xFF, 0xFF]),
    ],
    ids=bytes.hex,
)
def test_what_is_not_known_or_cut_is_refused_and_changes_nothing(wrong: bytes) -> None:
    device = Device()
    assert command(device, wrong) == abi.ERR
    assert device.told == []


def test_a_driver_that_leaves_no_room_for_an_answer_gets_none() -> None:
    device = Device()
    assert control.handle(device, Chain(0, [memoryview(bytes([abi.CTRL_MQ, 0, 1, 0]))], [])) == 0


@given(st.binary(max_size=64), st.integers(0, 5))
def test_any_bytes_are_answered_with_ok_or_err(data: bytes, cut: int) -> None:
    answer = command(Device(), data[:cut], data[cut:])
    assert answer in (abi.OK, abi.ERR)


def test_words_are_in_a_legacy_guests_own_order() -> None:
    """A big-endian guest's numbers (virtio 1.3, 1.4.1); the device knows its order from the ring."""
    wanted: list[tuple[int, int, bytes, tuple[Any, ...]]] = [
        (abi.CTRL_MQ, abi.CTRL_MQ_VQ_PAIRS_SET, b"\x01\x02", ("pairs", 258)),
        (abi.CTRL_GUEST_OFFLOADS, abi.CTRL_GUEST_OFFLOADS_SET, bytes(7) + b"\x82", ("offloads", 0x82)),
    ]
    for kind, number, data, told in wanted:
        device, ack = Device(), bytearray(1)
        said = [memoryview(bytes([kind, number]) + data)]
        assert control.handle(device, Chain(0, said, [memoryview(ack)], "big")) == 1
        assert (ack[0], device.told) == (abi.OK, [told])
    table = (1).to_bytes(4, "big") + MAC + bytes(4)
    said = [memoryview(bytes([abi.CTRL_MAC, abi.CTRL_MAC_TABLE_SET]) + table)]
    ack = bytearray(1)
    control.handle(Device(), Chain(0, said, [memoryview(ack)], "big"))
    assert ack[0] == abi.OK
