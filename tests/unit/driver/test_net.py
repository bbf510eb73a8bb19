"""The net driver against a device's half in the same process: chains, headers, merging, waiting."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from pyvhost.abi import virtio
from pyvhost.abi import virtio_net as abi
from pyvhost.driver.errors import DeviceError, DriverError, RefusedError
from pyvhost.driver.memory import GuestMemory
from pyvhost.driver.net import FEATURES, FRAME_MAX, NetDriver
from pyvhost.driver.net_frame import NetHdr, Received, Shape
from pyvhost.driver.split_ring import ByteOrder
from pyvhost.host import eventfd
from stub_device import WRITE, Taken
from stub_front_end import Server, StubFrontEnd

VERSION_1 = 1 << virtio.F_VERSION_1
EVENT_IDX = 1 << virtio.RING_F_EVENT_IDX
MRG_RXBUF = 1 << abi.F_MRG_RXBUF
LEGACY = 0
MAC = bytes.fromhex("020304050607")


class NetFrontEnd(StubFrontEnd):
    """With a network card's configuration space."""

    def __init__(
        self, features: int = (1 << 64) - 1, *, pairs: int = 1, status: int = 1, mtu: int = 1500
    ) -> None:
        config = MAC + b"".join(word.to_bytes(2, "little") for word in (status, pairs, mtu))
        super().__init__(features, queues=pairs, config=config)


@pytest.fixture
def memory() -> Iterator[GuestMemory]:
    with GuestMemory(64 << 20) as memory:
        yield memory


def give(front: NetFrontEnd, *buffers: bytes, pair: int = 0) -> None:
    """Put bytes into as many receive buffers, and publish them together."""
    device = front.rings[2 * pair]
    for data in buffers:
        (chain,) = device.take(1)
        assert device.scatter(chain, data) == len(data)
        device.use(chain.head, len(data), publish=False)
    device.publish()


@pytest.mark.parametrize(
    ("features", "size"),
    [(LEGACY, 10), (MRG_RXBUF, 12), (VERSION_1, 12), (VERSION_1 | MRG_RXBUF, 12)],
    ids=["legacy", "legacy mergeable", "modern", "modern mergeable"],
)
def test_a_frame_is_sent_behind_a_header_of_the_right_size(
    memory: GuestMemory, features: int, size: int
) -> None:
    front = NetFrontEnd()
    driver = NetDriver(front, memory, features=features)
    driver.start()
    driver.send(b"a frame", NetHdr(flags=1, gso_type=2, hdr_len=3, gso_size=4, csum_start=5, csum_offset=6))
    (chain,) = front.rings[1].take()
    data = front.rings[1].gather(chain)
    assert data == bytes.fromhex("01 02 0300 0400 0500 0600 0000")[:size] + b"a frame"
    assert chain.sizes(WRITE) == []
    driver.close()


def test_a_legacy_guest_of_the_other_byte_order(memory: GuestMemory) -> None:
    front = NetFrontEnd()
    driver = NetDriver(front, memory, features=MRG_RXBUF, byteorder="big")
    driver.start()
    driver.send(b"frame", NetHdr(hdr_len=0x1234))
    device = front.rings[1]
    assert device.gather(device.take()[0])[2:4] == b"\x12\x34"
    give(front, bytes(10) + b"\0\1" + b"came")
    assert driver.poll()[0].header.num_buffers == 1
    driver.close()
    with pytest.raises(DriverError, match="VERSION_1 was negotiated"):
        NetDriver(front, memory, features=VERSION_1, byteorder="big").start()


@pytest.mark.parametrize(
    ("shape", "sizes"),
    [
        (Shape(), [112]),
        (Shape(header_apart=True), [12, 100]),
        (Shape(piece=30), [42, 30, 30, 10]),
        (Shape(header_apart=True, piece=50), [12, 50, 50]),
        (Shape(piece=99, indirect=True), [111, 1]),
    ],
    ids=str,
)
def test_a_frame_is_cut_as_it_was_asked_for(memory: GuestMemory, shape: Shape, sizes: list[int]) -> None:
    front = NetFrontEnd()
    driver = NetDriver(front, memory)
    driver.start()
    frame = bytes(range(100))
    driver.send(frame, shape=shape)
    (chain,) = front.rings[1].take()
    assert chain.sizes(0) == sizes
    assert front.rings[1].gather(chain)[12:] == frame
    driver.close()


def test_a_batch_is_kicked_once_and_its_room_comes_back(memory: GuestMemory) -> None:
    front = NetFrontEnd()
    driver = NetDriver(front, memory, features=VERSION_1, ring_size=4)
    driver.start(post=False)
    kicks = driver.tx[0].kicks
    server = Server(front, lambda index, chain: 0)
    try:
        free = memory.allocate(1)
        memory.free(free)
        assert driver.send_many([b"one", b"two", b"three"]) == 3
        assert driver.tx[0].kicks == kicks + 1
        driver.wait_sent()
        assert driver.tx[0].ring.outstanding == 0
        assert memory.allocate(1) == free
        assert driver.send_many(bytes([n]) for n in range(50)) == 50
        driver.wait_sent(0)
    finally:
        server.stop()
    driver.close()


def test_a_device_that_takes_nothing_is_a_timeout_that_says_where(memory: GuestMemory) -> None:
    driver = NetDriver(NetFrontEnd(), memory, ring_size=4, timeout=0.01)
    driver.start()
    with pytest.raises(TimeoutError, match=r"no room on tx 0 within .* \(tx 0: 4 out"):
        driver.send_many([b"frame"] * 5)
    with pytest.raises(TimeoutError, match="0 of 1 frames"):
        driver.receive()
    driver.close()


def test_an_err_ends_a_wait(memory: GuestMemory) -> None:
    front = NetFrontEnd()
    driver = NetDriver(front, memory)
    driver.start()
    eventfd.signal(front.queues[0].err_fd)
    with pytest.raises(DeviceError, match="rx 0: the device signalled err"):
        driver.receive()
    driver.close()


def test_frames_that_came_are_given_out_in_order_and_the_buffers_go_back(memory: GuestMemory) -> None:
    front = NetFrontEnd()
    driver = NetDriver(front, memory, features=VERSION_1, ring_size=8, rx_depth=4)
    driver.start()
    for turn in range(10):
        give(front, bytes(12) + b"first %d" % turn, bytes(12) + b"second %d" % turn)
        assert [got.frame for got in driver.poll()] == [b"first %d" % turn, b"second %d" % turn]
        assert driver.rx[0].ring.outstanding == 4
    assert driver.poll() == []
    driver.close()


@pytest.mark.parametrize("features", [VERSION_1, VERSION_1 | EVENT_IDX], ids=["flags", "event index"])
def test_receiving_waits_for_calls(memory: GuestMemory, features: int) -> None:
    front = NetFrontEnd()
    driver = NetDriver(front, memory, features=features)
    driver.start(post=False)
    server = Server(front, lambda index, chain: front.rings[0].scatter(chain, bytes(12) + b"came"))
    try:
        driver.post(0, 3)  # which the device fills whenever they are offered again
        for _ in range(100):
            frames = [got.frame for got in driver.receive(3)]
            assert len(frames) >= 3
            assert set(frames) == {b"came"}
    finally:
        server.stop()
    driver.close()


@pytest.mark.parametrize(
    "shape", [Shape(), Shape(header_apart=True, piece=20), Shape(piece=7, indirect=True)], ids=str
)
@pytest.mark.parametrize("byteorder", ["little", "big"])
def test_a_frame_in_several_buffers_is_put_together(
    memory: GuestMemory, byteorder: ByteOrder, shape: Shape
) -> None:
    front = NetFrontEnd()
    features = MRG_RXBUF | (VERSION_1 if byteorder == "little" else 0)
    driver = NetDriver(front, memory, features=features, rx_buffer=64, rx_shape=shape, byteorder=byteorder)
    driver.start()
    whole = NetHdr(num_buffers=3).pack(12, byteorder) + bytes(range(140))
    give(front, whole[:64], whole[64:128], whole[128:])
    give(front, NetHdr(num_buffers=1).pack(12, byteorder) + b"next")
    assert driver.poll() == [
        Received(bytes(range(140)), NetHdr(num_buffers=3), 0, 3),
        Received(b"next", NetHdr(num_buffers=1)),
    ]
    driver.close()


@pytest.mark.parametrize(
    ("buffers", "message"),
    [
        ([NetHdr(num_buffers=0).pack(12)], "num_buffers is 0"),
        ([NetHdr(num_buffers=257).pack(12)], "num_buffers is 257"),
        ([NetHdr(num_buffers=2).pack(12) + bytes(52)], "only 1 are used"),
        ([NetHdr(num_buffers=2).pack(12), bytes(64)], "buffer 1 of 2 is not the last, and not full"),
        ([bytes(11)], "11 bytes received, a header has 12"),
    ],
)
def test_a_device_that_merges_wrongly(memory: GuestMemory, buffers: list[bytes], message: str) -> None:
    front = NetFrontEnd()
    driver = NetDriver(front, memory, rx_buffer=64)
    driver.start()
    give(front, *buffers)
    with pytest.raises(DeviceError, match=message):
        driver.poll()
    driver.close()


def test_the_room_of_a_receive_buffer(memory: GuestMemory) -> None:
    front = NetFrontEnd(mtu=9000)

    def room(features: int) -> int:
        driver = NetDriver(front, memory, features=features, ring_size=2)
        driver.start()
        driver.close()
        return driver.rx_buffer_size()

    assert room(LEGACY) == 10 + 14 + 1500
    assert room(VERSION_1 | 1 << abi.F_MTU) == 12 + 14 + 9000
    assert room(VERSION_1 | 1 << abi.F_GUEST_TSO6) == 12 + FRAME_MAX
    assert room(VERSION_1 | 1 << abi.F_GUEST_TSO6 | MRG_RXBUF) == 4096


def test_queue_pairs_have_rings_of_their_own(memory: GuestMemory) -> None:
    front = NetFrontEnd(pairs=4)
    driver = NetDriver(front, memory, queue_pairs=3, ring_size=4, features=FEATURES | 1 << abi.F_CTRL_VQ)
    driver.start()
    assert driver.has(abi.F_MQ)
    assert sorted(front.rings) == [0, 1, 2, 3, 4, 5, 8]
    driver.send(b"frame", pair=2)
    assert [len(front.rings[index].take()) for index in (1, 3, 5)] == [0, 0, 1]
    give(front, NetHdr(num_buffers=1).pack(12) + b"to pair 1", pair=1)
    assert [(got.pair, got.frame) for got in driver.poll()] == [(1, b"to pair 1")]
    driver.close()


def test_stop_and_resume_go_on_where_the_device_was(memory: GuestMemory) -> None:
    front = NetFrontEnd(features=VERSION_1)
    driver = NetDriver(front, memory, ring_size=4)
    driver.start()
    assert front.statuses == [11, 15]
    driver.send(b"before")
    (chain,) = front.rings[1].take()
    front.use(1, chain.head)
    give(front, bytes(12) + b"came")
    driver.send(b"not looked at")
    bases = driver.stop()
    assert bases == {0: 1, 1: 1}
    assert not driver.running
    assert [got.frame for got in driver.poll()] == [b"came"]
    driver.resume(bases=bases)
    assert front.bases == bases
    device = front.rings[1]
    assert [device.gather(chain)[12:] for chain in device.take()] == [b"not looked at"]
    driver.stop()
    # A back end that died said nothing: what it had taken and not used is offered again.
    other = NetFrontEnd(features=VERSION_1)
    driver.resume(other)
    assert other.bases == {0: 1, 1: 1}
    assert len(other.rings[1].take()) == 1
    with pytest.raises(DriverError, match="the new back end has 0x0 of them"):
        driver.resume(NetFrontEnd(features=0))
    with pytest.raises(DriverError, match="has started"):
        driver.start()
    driver.close()


def test_the_configuration_space(memory: GuestMemory) -> None:
    driver = NetDriver(NetFrontEnd(pairs=8, status=abi.S_LINK_UP | abi.S_ANNOUNCE, mtu=4000), memory)
    driver.start()
    assert (driver.mac(), driver.status(), driver.max_queue_pairs(), driver.mtu()) == (MAC, 3, 8, 4000)
    assert driver.announce
    driver.close()


def test_control_commands(memory: GuestMemory) -> None:
    front = NetFrontEnd(pairs=2)
    driver = NetDriver(front, memory, features=FEATURES | 1 << abi.F_CTRL_VQ | 1 << abi.F_MQ, timeout=10)
    driver.start(post=False)
    commands: list[bytes] = []
    answers = [0, 0, 0, 0, 0, 0, 0, 0, 1, 7]

    def handle(index: int, chain: Taken) -> int:
        assert index == 4
        assert chain.sizes(WRITE) == [1]
        commands.append(front.rings[index].gather(chain))
        return front.rings[index].scatter(chain, bytes([answers[len(commands) - 1]]))

    server = Server(front, handle)
    try:
        control = driver.control
        assert control is not None
        control.set_queue_pairs(2)
        control.ack_announce()
        control.set_mac(MAC)
        control.set_mac_table([], [MAC])
        control.set_rx_mode(abi.CTRL_RX_PROMISC, True)
        control.add_vlan(0x123)
        control.delete_vlan(0x123)
        control.set_guest_offloads(3)
        with pytest.raises(RefusedError, match="command 4/0"):
            control.set_queue_pairs(3)
        with pytest.raises(DeviceError, match="0x7 is neither"):
            control.ack_announce()
    finally:
        server.stop()
    assert [command.hex(" ", 2) for command in commands[:8]] == [
        "0400 0200",
        "0300",
        "0101 0203 0405 0607",
        "0100 0000 0000 0100 0000 0203 0405 0607",
        "0000 01",
        "0200 2301",
        "0201 2301",
        "0500 0300 0000 0000 0000",
    ] or commands
    driver.close()
