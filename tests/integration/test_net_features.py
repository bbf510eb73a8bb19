"""What a net device offers beyond plain frames: configuration, control commands, notifications, offloads."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from back_end import PATIENCE, BackEnd
from pyvhost.abi import virtio
from pyvhost.abi import virtio_net as abi
from pyvhost.driver.errors import RefusedError
from pyvhost.driver.memory import MIB, GuestMemory
from pyvhost.driver.net import FEATURES, NetDriver
from pyvhost.driver.net_frame import NetHdr
from pyvhost.net.device import NetDevice

VERSION_1 = 1 << virtio.F_VERSION_1
EVENT_IDX = 1 << virtio.RING_F_EVENT_IDX
NOTIFY_ON_EMPTY = 1 << virtio.F_NOTIFY_ON_EMPTY
MRG_RXBUF = 1 << abi.F_MRG_RXBUF
CSUM = 1 << abi.F_CSUM
GUEST_CSUM = 1 << abi.F_GUEST_CSUM
GUEST_TSO4 = 1 << abi.F_GUEST_TSO4
HOST_TSO4 = 1 << abi.F_HOST_TSO4
CTRL = 1 << abi.F_CTRL_VQ | 1 << abi.F_MQ | 1 << abi.F_GUEST_ANNOUNCE
MAC = bytes.fromhex("52540012abcd")
BROADCAST = b"\xff" * 6


def frame(number: int, to: bytes = BROADCAST, source: bytes = MAC) -> bytes:
    return to + source + bytes.fromhex("88b5") + number.to_bytes(4, "big") + bytes(46)


@pytest.fixture
def memory() -> Iterator[GuestMemory]:
    with GuestMemory(64 * MIB) as memory:
        yield memory


@contextmanager
def attached(
    directory: Path, device: NetDevice, memory: GuestMemory, *, post: bool = True, **options: Any
) -> Iterator[NetDriver]:
    """A driver that has started on `device`; `options` are NetDriver's."""
    with (
        BackEnd(directory, device) as back_end,
        back_end.connect() as frontend,
        NetDriver(frontend, memory, timeout=PATIENCE, **options) as driver,
    ):
        driver.start(post=post)
        yield driver


# --- configuration space, control queue ----------------------------------------------------------------


def test_the_configuration_space(tmp_path: Path, memory: GuestMemory) -> None:
    device = NetDevice(backend="null", queue_pairs=3, mac="52:54:00:12:ab:cd", mtu=4321)
    with BackEnd(tmp_path, device) as back_end, back_end.connect() as frontend:
        driver = NetDriver(frontend, memory, queue_pairs=3, ring_size=8, timeout=PATIENCE)
        with driver:
            driver.start(post=False)
            assert (driver.mac(), driver.mtu(), driver.max_queue_pairs()) == (MAC, 4321, 3)
            assert driver.status() == abi.S_LINK_UP
            assert frontend.get_config(0, 8) == MAC + b"\1\0"
            assert frontend.get_config(8, 100)[:4] == struct.pack("<HH", 3, 4321)
            frontend.net_set_mtu(1400)
            assert driver.mtu() == 1400
            with pytest.raises(RefusedError):
                frontend.net_set_mtu(67)
            assert driver.mtu() == 1400


def test_features_that_were_not_offered_are_refused(tmp_path: Path) -> None:
    with BackEnd(tmp_path, NetDevice(backend="null")) as back_end, back_end.connect() as frontend:
        frontend.negotiate(VERSION_1)
        offered = frontend.get_features()
        assert offered & (1 << abi.F_MQ) == 0, "one pair is no multiqueue"
        for bit in range(64):
            if not offered >> bit & 1:
                with pytest.raises(RefusedError, match="SET_FEATURES"):
                    frontend.set_features(offered & VERSION_1 | 1 << 30 | 1 << bit)
        frontend.set_features(offered)


def test_the_control_queue(tmp_path: Path, memory: GuestMemory) -> None:
    device = NetDevice(backend="loop", queue_pairs=4)
    with attached(tmp_path, device, memory, queue_pairs=4, ring_size=16, features=FEATURES | CTRL) as driver:
        control = driver.control
        assert control is not None
        for pairs in (1, 4, 2):
            control.set_queue_pairs(pairs)
        for pairs in (0, 5, 0x8000, 0xFFFF):
            with pytest.raises(RefusedError):
                control.set_queue_pairs(pairs)
        control.set_rx_mode(abi.CTRL_RX_PROMISC, True)
        control.set_rx_mode(abi.CTRL_RX_ALLMULTI, False)
        control.set_mac_table([MAC], [BROADCAST, MAC])
        control.set_mac(MAC)
        assert driver.mac() == MAC
        assert control.command(abi.CTRL_MAC, abi.CTRL_MAC_ADDR_SET, MAC, indirect=True) == abi.OK
        for kind, command, data in (
            (77, 0, b""),
            (abi.CTRL_RX, 99, b"\1"),
            (abi.CTRL_RX, abi.CTRL_RX_PROMISC, b""),
            (abi.CTRL_MAC, abi.CTRL_MAC_ADDR_SET, MAC[:5]),
            (abi.CTRL_MAC, abi.CTRL_MAC_TABLE_SET, b"\xff\xff\xff\xff"),
            (abi.CTRL_MAC, abi.CTRL_MAC_TABLE_SET, struct.pack("<I", 2) + MAC),
            (abi.CTRL_MQ, abi.CTRL_MQ_VQ_PAIRS_SET, b"\1"),
        ):
            assert control.command(kind, command, data) == abi.ERR, (kind, command, data)
        driver.send(frame(1))
        assert driver.receive()[0].frame == frame(1)


def test_the_control_queue_without_multiqueue_is_the_third(tmp_path: Path, memory: GuestMemory) -> None:
    device = NetDevice(backend="loop", queue_pairs=4)
    features = VERSION_1 | 1 << abi.F_CTRL_VQ
    with attached(tmp_path, device, memory, ring_size=16, features=features) as driver:
        assert driver.control is not None
        driver.control.set_mac(MAC)
        assert driver.control.command(abi.CTRL_MQ, abi.CTRL_MQ_VQ_PAIRS_SET, b"\1\0") == abi.ERR


def test_a_control_queue_at_fault_stops_alone(tmp_path: Path, memory: GuestMemory) -> None:
    with attached(
        tmp_path, NetDevice(backend="loop"), memory, ring_size=16, features=VERSION_1 | 1 << abi.F_CTRL_VQ
    ) as driver:
        assert driver.control is not None
        queue = driver.control.queue
        queue.ring.offer(0xFFFF)
        queue.ring.publish()
        queue.kick()
        assert queue.wait_error(PATIENCE)
        driver.send(frame(1))
        assert driver.receive()[0].frame == frame(1)
        # A command without room for its answer, and one of nothing but the answer: used, and that's all.
        queue.ring.set_avail_entry(0, 0)
        where = memory.allocate(64)
        memory.write(where, b"\0\0\1")
        queue.ring.desc.set(0, where, 3, 0)
        queue.kick()
        assert queue.wait_call(PATIENCE)
        assert queue.ring.used_element(0) == (0, 0)
        queue.ring.desc.set(1, where, 1, virtio.VRING_DESC_F_WRITE)
        queue.ring.offer(1)
        queue.ring.publish()
        queue.kick()
        assert queue.wait_call(PATIENCE)
        assert queue.ring.used_element(1) == (1, 1)
        assert memory.read(where, 1) == bytes([abi.ERR])


def test_a_guest_is_asked_to_announce_itself(tmp_path: Path, memory: GuestMemory) -> None:
    device = NetDevice(backend="loop")
    with BackEnd(tmp_path, device) as back_end, back_end.connect() as frontend:
        features = FEATURES | CTRL & ~(1 << abi.F_MQ)
        with NetDriver(frontend, memory, ring_size=16, features=features, timeout=PATIENCE) as driver:
            driver.start()
            assert driver.control is not None
            assert not driver.announce
            back_end.ask(device.announce)
            with frontend.backend_request(PATIENCE).fds:
                pass
            assert driver.announce
            driver.control.ack_announce()
            assert not driver.announce
            back_end.ask(lambda: device.set_link(False))
            assert frontend.backend_request(PATIENCE).name == "CONFIG_CHANGE_MSG"
            assert driver.status() == 0


# --- backends that need nothing of the host ----------------------------------------------------------------


@pytest.mark.parametrize("features", [FEATURES, VERSION_1, 0], ids=["default", "big", "legacy"])
@pytest.mark.parametrize("size", [64, 1514, 9000])
def test_generated_frames(tmp_path: Path, memory: GuestMemory, size: int, features: int) -> None:
    device = NetDevice(backend=f"generate:{size},count=1000")
    with attached(tmp_path, device, memory, features=features, rx_buffer=9100) as driver:
        frames = [got.frame for got in driver.receive(1000)]
        assert len(frames) == 1000
        assert {len(one) for one in frames} == {size}
        assert len(set(frames)) == 1
        assert frames[0][12:14] == b"\x08\x00"
        assert driver.poll() == []


def test_a_generator_waits_for_buffers(tmp_path: Path, memory: GuestMemory) -> None:
    with attached(
        tmp_path, NetDevice(backend="generate:64"), memory, features=VERSION_1, ring_size=64, post=False
    ) as driver:
        for _ in range(50):
            driver.post(0, 7)
            driver.rx[0].wait_used(PATIENCE, 7)
            for _ in range(7):
                used = driver.rx[0].ring.pop_used()
                assert used is not None
                assert used.len == 12 + 64


def test_frames_in_buffers_of_many_sizes(tmp_path: Path, memory: GuestMemory) -> None:
    """Mergeable buffers, each of another size than the last: full but the last of each frame."""
    device = NetDevice(backend="generate:5000,count=20")
    with attached(
        tmp_path, device, memory, features=VERSION_1 | MRG_RXBUF, ring_size=256, post=False
    ) as driver:
        ring = driver.rx[0].ring
        sizes = [12 + 7 * n % 1500 for n in range(250)]
        rooms = [memory.allocate(size) for size in sizes]
        for room, size in zip(rooms, sizes, strict=True):
            ring.add([], [(room, size)], token=(room, size))
        driver.rx[0].publish()
        frames = []
        for _ in range(20):
            driver.rx[0].wait_used(PATIENCE)
            data, buffers = b"", 1
            while buffers:
                used = ring.pop_used()
                assert used is not None, "a frame's buffers are used together"
                assert isinstance(used.token, tuple)
                room, size = used.token
                if not data:
                    buffers = NetHdr.unpack(memory.read(room, 12)).num_buffers
                buffers -= 1
                assert used.len == size or buffers == 0
                data += memory.read(room, used.len)
            frames.append(data[12:])
        assert [len(one) for one in frames] == [5000] * 20
        assert len(set(frames)) == 1


def test_frames_too_large_for_the_buffers_are_dropped(tmp_path: Path, memory: GuestMemory) -> None:
    with attached(tmp_path, NetDevice(backend="loop"), memory, features=VERSION_1, rx_buffer=100) as driver:
        driver.send_many([frame(1), frame(2) + bytes(100), frame(3), frame(4) + bytes(25)])
        assert [got.frame for got in driver.receive(2)] == [frame(1), frame(3)]
        driver.wait_sent()
        assert driver.poll() == []


@pytest.mark.parametrize("size", [0, 1, 13])
def test_frames_that_are_none_are_dropped(tmp_path: Path, memory: GuestMemory, size: int) -> None:
    with attached(tmp_path, NetDevice(backend="loop"), memory, features=VERSION_1) as driver:
        driver.send_many([frame(1), frame(2)[:size], frame(3)])
        assert [got.frame for got in driver.receive(2)] == [frame(1), frame(3)]
        driver.wait_sent()


def test_null_uses_everything(tmp_path: Path, memory: GuestMemory) -> None:
    with attached(tmp_path, NetDevice(backend="null"), memory, ring_size=32) as driver:
        for _ in range(20):
            driver.send_many([frame(n) for n in range(100)])
            driver.wait_sent()
        assert driver.poll() == []
        assert driver.stop()[1] == 2000


def test_guests_on_a_switch(tmp_path: Path) -> None:
    """What nobody has spoken from goes to all others, what is known to one alone, and nothing comes back."""
    devices = [NetDevice(backend=f"switch:{tmp_path.name}") for _ in range(3)]
    macs = [MAC[:5] + bytes([number]) for number in range(3)]
    with BackEnd(tmp_path, *devices) as back_end, ExitStack() as stack:
        guests = []
        for at, features in enumerate((FEATURES, VERSION_1, 0)):
            frontend, memory = (
                stack.enter_context(back_end.connect(at)),
                stack.enter_context(GuestMemory(MIB)),
            )
            driver = NetDriver(frontend, memory, ring_size=64, features=features, timeout=PATIENCE)
            guests.append(stack.enter_context(driver))
            driver.start()
        for source, mac in enumerate(macs):
            sent = frame(source, BROADCAST, mac)
            guests[source].send(sent)
            for to in {0, 1, 2} - {source}:
                assert [got.frame for got in guests[to].receive()] == [sent]
        for source, mac in enumerate(macs):
            for to in {0, 1, 2} - {source}:
                sent = frame(10 * source + to, macs[to], mac)
                guests[source].send(sent)
                assert [got.frame for got in guests[to].receive()] == [sent]
        for guest in guests:
            guest.wait_sent()
            assert guest.poll() == []


# --- notifications ------------------------------------------------------------------------------------------


def test_no_calls_where_none_are_wanted(tmp_path: Path, memory: GuestMemory) -> None:
    with attached(tmp_path, NetDevice(backend="loop"), memory, features=VERSION_1) as driver:
        driver.rx[0].ring.disable_calls()
        driver.send_many([frame(n) for n in range(20)])
        driver.stop()
        assert driver.rx[0].ring.used_pending() == driver.tx[0].ring.used_pending()
        assert (driver.rx[0].take_calls(), driver.tx[0].take_calls()) == (0, 0)


def test_notify_on_empty_calls_all_the_same(tmp_path: Path, memory: GuestMemory) -> None:
    with attached(
        tmp_path, NetDevice(backend="null"), memory, features=VERSION_1 | NOTIFY_ON_EMPTY
    ) as driver:
        for _ in range(10):
            driver.tx[0].ring.disable_calls()
            driver.send_many([frame(n) for n in range(20)])
            assert driver.tx[0].wait_call(PATIENCE)


def test_a_call_at_the_index_that_was_asked_for(tmp_path: Path, memory: GuestMemory) -> None:
    features = VERSION_1 | EVENT_IDX
    with attached(tmp_path, NetDevice(backend="null"), memory, features=features) as driver:
        queue = driver.tx[0]
        # A device's first call after it was started may come unasked.
        driver.send(frame(0))
        driver.wait_sent()
        for _ in range(50):
            queue.take_calls()
            before = queue.calls
            assert queue.ring.enable_calls(after=4)
            for number in range(5):
                driver.send(frame(number))
            assert queue.wait_call(PATIENCE)
            assert queue.ring.used_pending() == 5
            assert queue.calls == before + 1
            driver.wait_sent()


def test_a_device_at_rest_asks_for_kicks(tmp_path: Path, memory: GuestMemory) -> None:
    """Each frame on its own: whatever the device had suppressed, no kick is missed."""
    for features in (VERSION_1, VERSION_1 | EVENT_IDX):
        with attached(tmp_path, NetDevice(backend="loop"), memory, features=features) as driver:
            for number in range(500):
                driver.send(frame(number))
                assert driver.receive()[0].frame == frame(number)


# --- offloads -------------------------------------------------------------------------------------------------


def sum16(data: bytes) -> int:
    """The ones' complement sum (RFC 1071), not yet complemented."""
    data += bytes(len(data) % 2)
    total: int = sum(struct.unpack(f">{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return total


FROM, TO = bytes([192, 0, 2, 1]), bytes([192, 0, 2, 2])


def tcp_frame(payload: bytes, *, partial: bool) -> bytes:
    """TCP over IPv4; `partial`: in the checksum's place the pseudo header's sum, as CSUM has it."""
    length = 20 + len(payload)
    ip = struct.pack(">BBHHHBBH4s4s", 0x45, 0, 20 + length, 7, 0x4000, 64, 6, 0, FROM, TO)
    ip = ip[:10] + struct.pack(">H", 0xFFFF ^ sum16(ip)) + ip[12:]
    tcp = struct.pack(">HHIIBBHHH", 1000, 2000, 1 << 20, 5, 0x50, 0x18, 1000, 0, 0) + payload
    pseudo = FROM + TO + struct.pack(">HH", 6, length)
    check = sum16(pseudo) if partial else 0xFFFF ^ sum16(pseudo + tcp)
    return BROADCAST + MAC + b"\x08\x00" + ip + tcp[:16] + struct.pack(">H", check) + tcp[18:]


def checked(one: bytes) -> tuple[int, bytes]:
    """A received TCP frame's sequence number and payload, its lengths and checksums held against it."""
    ip, tcp = one[14:34], one[34:]
    assert sum16(ip) == 0xFFFF
    assert struct.unpack(">H", ip[2:4])[0] == len(one) - 14
    assert sum16(FROM + TO + struct.pack(">HH", 6, len(tcp)) + tcp) == 0xFFFF
    return int.from_bytes(tcp[4:8], "big"), tcp[20:]


NEEDS_CSUM = NetHdr(flags=abi.HDR_F_NEEDS_CSUM, csum_start=34, csum_offset=16)


@pytest.mark.parametrize("mergeable", [0, MRG_RXBUF], ids=["big", "mergeable"])
def test_a_checksum_goes_unfinished_only_to_a_guest_that_takes_it(
    tmp_path: Path, memory: GuestMemory, mergeable: int
) -> None:
    payload = bytes(range(251)) * 3
    unfinished, finished = tcp_frame(payload, partial=True), tcp_frame(payload, partial=False)
    for guest in (0, GUEST_CSUM):
        wanted = VERSION_1 | CSUM | guest | mergeable
        device = NetDevice(backend="loop")
        with attached(
            tmp_path, device, memory, features=wanted, rx_buffer=300 if mergeable else None
        ) as driver:
            assert driver.features == wanted
            driver.send(unfinished, NEEDS_CSUM)
            (got,) = driver.receive()
            if guest:
                assert got.frame == unfinished
                assert got.header == replace(NEEDS_CSUM, num_buffers=got.buffers)
            else:
                assert got.frame == finished
                assert got.header == NetHdr(num_buffers=got.buffers)


@pytest.mark.parametrize("mergeable", [0, MRG_RXBUF], ids=["big", "mergeable"])
def test_a_super_frame_is_cut_for_a_guest_that_does_not_take_it(
    tmp_path: Path, memory: GuestMemory, mergeable: int
) -> None:
    payload = bytes(range(256)) * 200
    header = NetHdr(1, abi.HDR_GSO_TCPV4, 54, 1448, 34, 16)
    sent = tcp_frame(payload, partial=True)
    for guest in (0, GUEST_CSUM, GUEST_CSUM | GUEST_TSO4):
        with attached(
            tmp_path,
            NetDevice(backend="loop"),
            memory,
            features=VERSION_1 | CSUM | HOST_TSO4 | guest | mergeable,
        ) as driver:
            driver.send(sent, header)
            if guest & GUEST_TSO4:
                (got,) = driver.receive()
                assert got.frame == sent
                assert got.header == NetHdr(
                    1, abi.HDR_GSO_TCPV4, 54, 1448, 34, 16, got.buffers if mergeable else 1
                )
            else:
                parts = driver.receive(-(-len(payload) // 1448))
                pieces = [checked(part.frame) for part in parts]
                assert b"".join(piece for _, piece in pieces) == payload
                assert [start for start, _ in pieces] == [(1 << 20) + 1448 * n for n in range(len(pieces))]
            driver.wait_sent()


WILD = [
    NetHdr(1, 0, 0, 0, 0xFFFF, 0),
    NetHdr(1, 0, 0, 0, 34, 0xFFFF),
    NetHdr(1, 0, 0, 0, 0xFFFF, 0xFFFF),
    NetHdr(1, 0, 0, 0, 63, 0),
    NetHdr(1, abi.HDR_GSO_TCPV4, 54, 0, 34, 16),
    NetHdr(1, abi.HDR_GSO_TCPV4, 0xFFFF, 1, 34, 16),
    NetHdr(1, abi.HDR_GSO_TCPV6, 54, 1448, 34, 16),
    NetHdr(1, abi.HDR_GSO_UDP, 0, 1, 0, 0),
    NetHdr(0, abi.HDR_GSO_TCPV4, 54, 1448, 34, 16),
    NetHdr(0xFF, 0xFF, 0xFFFF, 0xFFFF, 0xFFFF, 0xFFFF, 0xFFFF),
    NetHdr(0, 2, 1, 1, 1, 1),
    NetHdr(0, 0x80, 1, 1, 1, 1),
]


@pytest.mark.parametrize("guest", [0, GUEST_CSUM, GUEST_CSUM | GUEST_TSO4], ids=["none", "csum", "tso"])
@pytest.mark.parametrize("header", WILD, ids=str)
def test_a_header_that_means_nothing_harms_nobody(
    tmp_path: Path, memory: GuestMemory, header: NetHdr, guest: int
) -> None:
    """The frame comes, or it is dropped; the one behind it comes, and its header is its own."""
    with attached(
        tmp_path, NetDevice(backend="loop"), memory, features=VERSION_1 | CSUM | HOST_TSO4 | guest | MRG_RXBUF
    ) as driver:
        for one in (frame(1), tcp_frame(bytes(3000), partial=True)):
            driver.send(one, header)
            driver.wait_sent()
            for got in driver.poll():
                taken = got.header.flags & ~1 == 0 and got.header.gso_type in (0, abi.HDR_GSO_TCPV4)
                assert taken, got.header
                assert got.header.gso_type == 0 or guest & GUEST_TSO4
                assert got.header.flags == 0 or guest & GUEST_CSUM
        driver.send(frame(2))
        (got,) = driver.receive()
        assert (got.frame, got.header) == (frame(2), NetHdr(num_buffers=1))
