"""The vsock driver against a device's half in the same process: packets, sockets, credit, events."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Any

import pytest

from pyvhost.abi import virtio_vsock as abi
from pyvhost.driver.errors import DeviceError, DriverError
from pyvhost.driver.memory import GuestMemory
from pyvhost.driver.vsock import BUF_ALLOC, EVENT, RX, TX, VsockDriver
from pyvhost.driver.vsock_packet import HEADER, PAYLOAD_MAX, Packet
from pyvhost.driver.vsock_socket import VsockSocket
from stub_device import Taken
from stub_front_end import StubFrontEnd

CID = 52
SEQPACKET = abi.TYPE_SEQPACKET


class Scene:
    """A driver that has started, and the device's half of its rings."""

    def __init__(self, memory: GuestMemory, **options: Any) -> None:
        self.front = StubFrontEnd(config=struct.pack("<Q", CID))
        options = {"ring_size": 16, "timeout": 10.0, **options}
        self.driver = VsockDriver(self.front, memory, **options)
        self.driver.start()

    def sent(self) -> list[Packet]:
        """What the driver has put into its TX ring; used at once."""
        ring = self.front.rings[TX]
        packets = []
        for chain in ring.take():
            packets.append(Packet.unpack(ring.gather(chain)))
            self.front.use(TX, chain.head)
        return packets

    def the_sent(self) -> Packet:
        (packet,) = self.sent()
        return packet

    def give(self, raw: Packet | bytes, *, used: int | None = None) -> None:
        """Put a packet into the next receive chain."""
        (chain,) = self.front.rings[RX].take(1)
        written = self.front.rings[RX].scatter(chain, raw if isinstance(raw, bytes) else raw.pack())
        self.front.use(RX, chain.head, written if used is None else used)

    def answer(self, to: Packet, op: int, payload: bytes = b"", **fields: int) -> None:
        """A packet from where `to` went."""
        fields = {"buf_alloc": 1000, "type": to.type, **fields}
        self.give(Packet(op, to.dst_cid, to.src_cid, to.dst_port, to.src_port, payload, **fields))

    def connected(self, **options: Any) -> tuple[VsockSocket, Packet]:
        """A connection to port 7 that the device has accepted, and what asked for it."""
        sock = self.driver.connect(7, wait=False, **options)
        request = self.the_sent()
        self.answer(request, abi.OP_RESPONSE)
        sock.wait_connected()
        return sock, request


@pytest.fixture
def memory() -> Iterator[GuestMemory]:
    with GuestMemory(16 << 20) as memory:
        yield memory


@pytest.fixture
def scene(memory: GuestMemory) -> Iterator[Scene]:
    scene = Scene(memory)
    yield scene
    scene.driver.close()


def sizes(chain: Taken) -> list[int]:
    return [length for _, length, _ in chain.buffers]


def test_a_header_has_44_bytes_in_the_standards_order() -> None:
    packet = Packet(5, 1 << 33, 2, 3, 4, b"xyz", 2, 6, 7, 8, 9)
    assert packet.pack() == struct.pack("<QQIIIHHIII", 1 << 33, 2, 3, 4, 9, 2, 5, 6, 7, 8) + b"xyz"
    assert HEADER == 44
    assert Packet.unpack(packet.pack()) == packet
    assert str(packet).startswith("RW 8589934592:3 to 2:4, seqpacket, 9 bytes")


def test_a_true_length_is_not_told() -> None:
    packet = Packet(abi.OP_RW, 3, 2, 1, 1, b"abc")
    assert Packet.unpack(packet.pack()) == packet
    assert Packet.unpack(packet.pack()).length is None
    with pytest.raises(ValueError, match="43 bytes, a header has 44"):
        Packet.unpack(bytes(43))


def test_rings_are_filled_at_the_start(scene: Scene) -> None:
    assert scene.driver.guest_cid == CID
    assert [sizes(chain) for chain in scene.front.rings[RX].take()] == [[44, 4096]] * 8
    assert [sizes(chain) for chain in scene.front.rings[EVENT].take()] == [[4]] * 8


def test_connecting(scene: Scene) -> None:
    sock, request = scene.connected()
    assert request == Packet(abi.OP_REQUEST, CID, 2, 1024, 7, buf_alloc=BUF_ALLOC)
    assert sock.credit == 1000
    assert not scene.sent()


def test_a_refusal(scene: Scene) -> None:
    sock = scene.driver.connect(7, wait=False, type=SEQPACKET)
    scene.answer(scene.the_sent(), abi.OP_RST)
    with pytest.raises(ConnectionRefusedError, match="seqpacket 52:1024 - 2:7"):
        sock.wait_connected()
    assert not scene.driver.sockets


def test_a_port_is_used_once(scene: Scene) -> None:
    scene.driver.connect(7, from_port=5, wait=False)
    with pytest.raises(DriverError, match="in use"):
        scene.driver.connect(7, from_port=5, wait=False)
    scene.driver.connect(8, from_port=5, wait=False)


def test_accepting(scene: Scene) -> None:
    listener = scene.driver.listen(80)
    scene.give(Packet(abi.OP_REQUEST, 2, CID, 9999, 80, buf_alloc=55))
    sock = listener.accept()
    assert sock.credit == 55
    assert scene.the_sent() == Packet(abi.OP_RESPONSE, CID, 2, 80, 9999, buf_alloc=BUF_ALLOC)
    listener.close()
    scene.give(Packet(abi.OP_REQUEST, 2, CID, 10000, 80))
    assert [packet.src_port for packet in scene.driver.stray()] == [10000]
    assert scene.the_sent().op == abi.OP_RST


def test_a_backlog_that_is_full_refuses(scene: Scene) -> None:
    scene.driver.listen(80, backlog=1)
    for port in (1, 2):
        scene.give(Packet(abi.OP_REQUEST, 2, CID, port, 80))
    scene.driver.pump()
    assert [(packet.op, packet.dst_port) for packet in scene.sent()] == [
        (abi.OP_RESPONSE, 1),
        (abi.OP_RST, 2),
    ]


def test_nobody_answers_a_reset(scene: Scene) -> None:
    scene.give(Packet(abi.OP_RST, 2, CID, 1, 2))
    scene.driver.stray()
    assert not scene.sent()


def test_a_guest_that_does_not_answer(memory: GuestMemory) -> None:
    scene = Scene(memory, answers=False)
    scene.give(Packet(abi.OP_RW, 2, CID, 1, 2, b"?"))
    assert scene.driver.stray()[0].payload == b"?"
    assert not scene.sent()


def test_data_is_cut_to_credit_and_packets(scene: Scene) -> None:
    sock, request = scene.connected()
    scene.answer(request, abi.OP_CREDIT_UPDATE, buf_alloc=200_000)
    scene.driver.pump()
    data = bytes(range(250)) * 600
    sock.send(data)
    packets = scene.sent()
    assert [len(packet.payload) for packet in packets] == [
        PAYLOAD_MAX,
        PAYLOAD_MAX,
        150_000 - 2 * PAYLOAD_MAX,
    ]
    assert b"".join(packet.payload for packet in packets) == data
    assert sock.credit == 50_000


def test_no_credit_no_data(scene: Scene) -> None:
    sock, request = scene.connected()
    sock.send(bytes(1000))
    with pytest.raises(TimeoutError, match="no credit on stream 52:1024"):
        sock.send(b"x", timeout=0.01)
    scene.answer(request, abi.OP_CREDIT_UPDATE, fwd_cnt=999)
    sock.send(b"x" * 999)
    assert [len(packet.payload) for packet in scene.sent()] == [1000, 999]


def test_counters_of_credit_wrap(scene: Scene) -> None:
    sock, request = scene.connected()
    sock.tx_cnt = sock.peer_fwd_cnt = 0xFFFFFFF0
    sock.send(bytes(100))
    assert sock.tx_cnt == 84
    assert sock.credit == 900
    scene.answer(request, abi.OP_CREDIT_UPDATE, fwd_cnt=80)
    scene.driver.pump()
    assert sock.credit == 996


def test_messages_keep_their_boundaries(scene: Scene) -> None:
    sock, request = scene.connected(type=SEQPACKET)
    scene.answer(request, abi.OP_CREDIT_UPDATE, buf_alloc=1 << 20)
    scene.driver.pump()
    sock.send(b"")
    sock.send(bytes(PAYLOAD_MAX + 1), eor=True)
    both = abi.SEQ_EOM | abi.SEQ_EOR
    assert [(len(packet.payload), packet.flags) for packet in scene.sent()] == [
        (0, abi.SEQ_EOM),
        (PAYLOAD_MAX, 0),
        (1, both),
    ]
    for payload, flags in [(b"ab", 0), (b"c", both), (b"", abi.SEQ_EOM), (b"d", abi.SEQ_EOM)]:
        scene.answer(request, abi.OP_RW, payload, flags=flags)
    scene.answer(request, abi.OP_SHUTDOWN, flags=abi.SHUTDOWN_SEND)
    assert sock.recv_message() == (b"abc", True)
    assert sock.recv_message() == (b"", False)
    assert sock.recv_message() == (b"d", False)
    assert sock.recv_message() is None


def test_a_stream_has_no_boundaries(scene: Scene) -> None:
    sock, request = scene.connected()
    for payload in (b"abc", b"def", b"gh"):
        scene.answer(request, abi.OP_RW, payload)
    assert sock.recv_exactly(7) == b"abcdefg"
    assert sock.pending == 1
    scene.answer(request, abi.OP_SHUTDOWN, flags=abi.SHUTDOWN_SEND)
    with pytest.raises(EOFError, match="after 1 of 2 bytes"):
        sock.recv_exactly(2)
    assert sock.recv(1) == b""


def test_room_is_given_back_as_it_is_read(memory: GuestMemory) -> None:
    scene = Scene(memory, buf_alloc=8192)
    sock, request = scene.connected()
    for _ in range(2):
        scene.answer(request, abi.OP_RW, bytes(4096))
    assert sock.recv_exactly(4096) == bytes(4096)
    assert not scene.sent(), "half of it is free"
    sock.recv_exactly(1)
    assert (update := scene.the_sent()).op == abi.OP_CREDIT_UPDATE
    assert update.fwd_cnt == 4097
    scene.answer(request, abi.OP_RW, bytes(4096))
    scene.answer(request, abi.OP_RW, b"x")
    scene.driver.pump()
    scene.answer(request, abi.OP_RW, b"y")
    with pytest.raises(DeviceError, match="8193 bytes came where 8192 were granted"):
        scene.driver.pump()


def test_a_credit_request_is_answered(scene: Scene) -> None:
    _, request = scene.connected()
    scene.answer(request, abi.OP_CREDIT_REQUEST)
    scene.driver.pump()
    assert scene.the_sent().op == abi.OP_CREDIT_UPDATE


def test_half_closed(scene: Scene) -> None:
    sock, request = scene.connected()
    sock.shutdown(abi.SHUTDOWN_SEND)
    assert (shut := scene.the_sent()).op == abi.OP_SHUTDOWN
    assert shut.flags == abi.SHUTDOWN_SEND
    with pytest.raises(BrokenPipeError):
        sock.send(b"x")
    scene.answer(request, abi.OP_RW, b"still")
    assert sock.recv(100) == b"still"


def test_the_other_side_takes_no_more(scene: Scene) -> None:
    sock, request = scene.connected()
    scene.answer(request, abi.OP_SHUTDOWN, flags=abi.SHUTDOWN_RCV)
    scene.driver.pump()
    with pytest.raises(BrokenPipeError):
        sock.send(b"x")


def test_a_close_of_the_other_side_is_confirmed_when_all_is_read(scene: Scene) -> None:
    sock, request = scene.connected()
    scene.answer(request, abi.OP_RW, b"last")
    scene.answer(request, abi.OP_SHUTDOWN, flags=abi.SHUTDOWN_SEND)
    scene.answer(request, abi.OP_SHUTDOWN, flags=abi.SHUTDOWN_RCV)
    scene.driver.pump()
    assert not scene.sent()
    assert sock.recv(10) == b"last"
    assert scene.the_sent().op == abi.OP_RST
    assert sock.recv(10) == b""
    assert not scene.driver.sockets


def test_a_close_waits_for_its_confirmation(scene: Scene) -> None:
    sock, request = scene.connected()
    with pytest.raises(TimeoutError, match="no RST"):
        sock.close(timeout=0.01)
    assert scene.the_sent().flags == abi.SHUTDOWN_SEND | abi.SHUTDOWN_RCV
    scene.answer(request, abi.OP_RST)
    sock.close()
    assert not scene.driver.sockets


def test_a_reset(scene: Scene) -> None:
    sock, request = scene.connected()
    scene.answer(request, abi.OP_RW, b"before")
    scene.answer(request, abi.OP_RST)
    assert sock.recv(100) == b"before"
    with pytest.raises(ConnectionResetError):
        sock.recv(1)
    with pytest.raises(ConnectionResetError):
        sock.send(b"x")
    other, _ = scene.connected()
    other.abort()
    assert scene.the_sent().op == abi.OP_RST


def test_the_device_forgets_everything(scene: Scene) -> None:
    sock, _ = scene.connected()
    scene.front.config[:] = struct.pack("<Q", 53)
    (chain,) = scene.front.rings[EVENT].take(1)
    scene.front.use(EVENT, chain.head, scene.front.rings[EVENT].scatter(chain, bytes(4)))
    scene.driver.wait_transport_reset()
    assert sock.reset
    assert scene.driver.guest_cid == 53
    assert len(scene.front.rings[EVENT].take()) == 8, "the buffer is there again"


@pytest.mark.parametrize(
    ("raw", "used", "message"),
    [
        (bytes(44), 43, "a header has 44"),
        (Packet(abi.OP_RW, 2, CID, 1, 1, b"abc", length=4), None, "3 bytes came with the header of RW"),
        (Packet(abi.OP_RW, 2, CID + 1, 1, 1), None, "another guest than 52"),
    ],
)
def test_what_a_device_may_not_do(scene: Scene, raw: Packet | bytes, used: int | None, message: str) -> None:
    scene.give(raw, used=used)
    with pytest.raises(DeviceError, match=message):
        scene.driver.pump()


def test_a_connection_that_has_not_begun_has_no_data(scene: Scene) -> None:
    scene.driver.connect(7, wait=False)
    request = scene.the_sent()
    scene.answer(request, abi.OP_RW, b"early")
    with pytest.raises(DeviceError, match="data before RESPONSE"):
        scene.driver.pump()


def test_data_after_shutdown(scene: Scene) -> None:
    _, request = scene.connected()
    scene.answer(request, abi.OP_SHUTDOWN, flags=abi.SHUTDOWN_SEND)
    scene.answer(request, abi.OP_RW, b"late")
    with pytest.raises(DeviceError, match="data after SHUTDOWN"):
        scene.driver.pump()


def test_any_packet_can_be_sent(scene: Scene) -> None:
    driver = scene.driver
    lie = driver.packet(abi.OP_RW, 1, 2, b"abc", src_cid=1 << 40, length=0xFFFFFFFF, type=77, flags=3)
    driver.send_packet(lie)
    assert scene.the_sent() == lie
    driver.send_raw(b"short", [2, 0, 3], writable=[10])
    (chain,) = scene.front.rings[TX].take()
    assert sizes(chain) == [2, 0, 3, 10]
    assert scene.front.rings[TX].gather(chain) == b"short"
    with pytest.raises(DriverError, match="17 descriptors"):
        driver.send_raw(b"", [0] * 17)


@pytest.mark.parametrize("indirect", [False, True])
def test_a_ring_that_is_full_is_waited_for(memory: GuestMemory, indirect: bool) -> None:
    scene = Scene(memory, indirect=indirect, tx_cut=lambda size: [size // 2, size - size // 2])
    free = memory.allocate(1)
    memory.free(free)
    for _ in range(16 if indirect else 8):
        scene.driver.send_packet(scene.driver.packet(abi.OP_RW, 1, 2, b"x"))
    scene.driver.timeout = 0.01
    with pytest.raises(TimeoutError, match="no room on tx"):
        scene.driver.send_packet(scene.driver.packet(abi.OP_RW, 1, 2, b"x"))
    assert len(scene.sent()) == (16 if indirect else 8)
    scene.driver.send_packet(scene.driver.packet(abi.OP_RW, 1, 2, b"y"))
    assert scene.the_sent().payload == b"y"
    scene.driver.wait_sent()
    assert memory.allocate(1) == free, "what was sent takes no memory any more"


def test_a_guest_that_does_not_read(scene: Scene) -> None:
    scene.driver.reads = False
    scene.give(Packet(abi.OP_RW, 2, CID, 1, 1))
    with pytest.raises(TimeoutError):
        scene.driver.stray(timeout=0.01)
    scene.driver.reads = True
    assert len(scene.driver.stray()) == 1


def test_what_comes_while_room_is_waited_for_comes_in_its_order(scene: Scene) -> None:
    sock, request = scene.connected()
    for _ in range(16):
        sock.packet(abi.OP_CREDIT_UPDATE)
    for number in range(20):
        if number % 8 == 0:
            scene.driver.timeout = 0.01
            with pytest.raises(TimeoutError, match="no room"):
                sock.packet(abi.OP_CREDIT_UPDATE)
        scene.answer(request, abi.OP_RW, bytes([number]))
    assert sock.recv(100) == bytes(range(20))
