"""The SCSI driver against a device's half in the same process: addresses, chains, responses, events."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator

import pytest

from pyvhost.abi import virtio
from pyvhost.abi import virtio_scsi as abi
from pyvhost.driver import cdb
from pyvhost.driver.errors import DeviceError, DriverError, RingFullError
from pyvhost.driver.memory import GuestMemory
from pyvhost.driver.scsi import CONTROL, EVENT, FEATURES, REQUEST, ScsiDriver
from pyvhost.driver.scsi_command import REPORT_LUNS, Event, Layout, Response, address, number
from stub_device import WRITE, Taken
from stub_front_end import Server, StubFrontEnd

CONFIG = struct.pack("<7I2HI", 3, 126, 0xFFFF, 128, 16, 96, 32, 0, 255, 16383)
LAYOUTS = [
    Layout(),
    Layout(header_apart=False),
    Layout(piece=100),
    Layout(header_piece=7, piece=33),
    Layout(header_apart=False, header_piece=50, piece=64),
    Layout(piece=99, indirect=True),
    Layout(header_apart=False, header_piece=1, piece=512, indirect=True),
]


def answer(
    *,
    response: int = 0,
    status: int = 0,
    resid: int = 0,
    sense: bytes = b"",
    data: bytes = b"",
    size: int = 96,
) -> bytes:
    """A struct virtio_scsi_cmd_resp, written out."""
    return struct.pack("<IIHBB", len(sense), resid, 0, status, response) + sense.ljust(size, b"\0") + data


@pytest.fixture
def memory() -> Iterator[GuestMemory]:
    with GuestMemory(16 << 20) as memory:
        yield memory


class Scene:
    """A driver that has started, and the device's half of its rings."""

    def __init__(self, memory: GuestMemory, features: int = FEATURES, **options: object) -> None:
        self.front = StubFrontEnd(config=CONFIG)
        self.driver = ScsiDriver(self.front, memory, features=features, timeout=10.0, **options)  # type: ignore[arg-type]
        self.driver.start()

    def take(self, ring: int = REQUEST) -> Taken:
        (chain,) = self.front.rings[ring].take()
        return chain

    def request(self, chain: Taken, ring: int = REQUEST) -> bytes:
        return self.front.rings[ring].gather(chain)

    def use(self, chain: Taken, data: bytes, ring: int = REQUEST) -> None:
        self.front.use(ring, chain.head, self.front.rings[ring].scatter(chain, data))


@pytest.fixture
def scene(memory: GuestMemory) -> Iterator[Scene]:
    scene = Scene(memory)
    yield scene
    scene.driver.close()


@pytest.mark.parametrize(
    ("target", "lun", "peripheral", "raw"),
    [
        (0, 0, False, "0100 4000 00000000"),
        (255, 16383, False, "01ff 7fff 00000000"),
        (1, 256, False, "0101 4100 00000000"),
        (3, 255, True, "0103 00ff 00000000"),
    ],
)
def test_a_logical_unit_has_eight_bytes(target: int, lun: int, peripheral: bool, raw: str) -> None:
    assert address(target, lun, peripheral=peripheral) == bytes.fromhex(raw)
    assert number(bytes.fromhex(raw)) == (target, lun)


def test_addresses_that_name_nothing() -> None:
    assert address(0, REPORT_LUNS) == bytes.fromhex("c101000000000000")
    for target, lun, peripheral in [(256, 0, False), (-1, 0, False), (0, 16384, False), (0, 256, True)]:
        with pytest.raises(ValueError, match="go up to 255"):
            address(target, lun, peripheral=peripheral)
    with pytest.raises(ValueError, match="8 bytes, not 7"):
        address(0, bytes(7))
    for raw in ("c101000000000000", "0100800000000000", "0100010000000000", "0100400000000001"):
        with pytest.raises(DeviceError, match="no logical unit"):
            number(bytes.fromhex(raw))


@pytest.mark.parametrize(
    ("layout", "sizes"),
    [
        (Layout(), [51, 1000]),
        (Layout(header_apart=False), [1051]),
        (Layout(piece=400), [51, 400, 400, 200]),
        (Layout(header_piece=30, piece=600), [30, 21, 600, 400]),
        (Layout(header_piece=30, piece=600, header_apart=False), [30, 621, 400]),
    ],
    ids=str,
)
def test_how_a_chain_is_cut(layout: Layout, sizes: list[int]) -> None:
    assert layout.cut(51, 1000) == sizes
    assert sum(layout.cut(51, 0)) == 51


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_a_write_goes_out_as_it_was_asked_for(scene: Scene, layout: Layout) -> None:
    data = bytes(range(256)) * 2
    pending = scene.driver.submit(
        2, 5, cdb.write10(7, 1), data, attribute=abi.S_ORDERED, tag=0x1234, priority=3, crn=9, layout=layout
    )
    chain = scene.take()
    assert chain.sizes(0) == layout.cut(51, 512)
    assert chain.sizes(WRITE) == layout.cut(108, 0)
    head = bytes.fromhex("0102 4005 00000000 3412000000000000 01 03 09")
    assert scene.request(chain) == head + cdb.write10(7, 1).ljust(32, b"\0") + data
    assert scene.driver.collect() == []
    scene.use(chain, answer(resid=12))
    assert scene.driver.collect() == [pending]
    assert pending.response == Response(0, 0, b"", 12, b"", written=108)
    assert pending.response.good


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_a_read_brings_its_data_less_the_residual(scene: Scene, layout: Layout) -> None:
    pending = scene.driver.submit(0, 0, cdb.inquiry(600), data_in_length=600, layout=layout)
    chain = scene.take()
    assert chain.sizes(WRITE) == layout.cut(108, 600)
    data = bytes(range(200)) * 2
    scene.use(chain, answer(resid=200, data=data))
    assert scene.driver.wait_for(pending).data == data
    assert pending.written == 508


def test_both_ways_at_once(scene: Scene) -> None:
    pending = scene.driver.submit(0, 0, b"\xee", b"out" * 10, 20)
    chain = scene.take()
    assert scene.request(chain)[51:] == b"out" * 10
    assert chain.sizes(WRITE) == [108, 20]
    scene.use(chain, answer(data=b"in" * 10))
    assert scene.driver.wait_for(pending).data == b"in" * 10


def test_protection_information_goes_before_the_data(memory: GuestMemory) -> None:
    scene = Scene(memory, FEATURES | 1 << abi.F_T10_PI)
    pending = scene.driver.submit(
        0, 0, cdb.write16(0, 1), bytes(512), 16, pi_out=b"pi-bytes", pi_in_length=4, tag=1
    )
    chain = scene.take()
    request = scene.request(chain)
    assert request[19:27] == struct.pack("<II", 8, 4)
    assert request[27:29] == cdb.write16(0, 1)[:2]
    assert request[59:67] == b"pi-bytes"
    scene.use(chain, answer(data=b"PI!!" + b"d" * 16))
    response = scene.driver.wait_for(pending)
    assert (response.pi, response.data) == (b"PI!!", b"d" * 16)
    scene.driver.close()


def test_protection_information_wants_its_feature(scene: Scene) -> None:
    with pytest.raises(ValueError, match="T10_PI"):
        scene.driver.submit(0, 0, cdb.write16(0, 1), bytes(512), pi_out=bytes(8))


@pytest.mark.parametrize("byteorder", ["little", "big"])
def test_a_legacy_guests_byte_order(memory: GuestMemory, byteorder: str) -> None:
    scene = Scene(memory, FEATURES & ~(1 << virtio.F_VERSION_1), byteorder=byteorder)
    scene.driver.submit(0, 0, cdb.test_unit_ready(), tag=0x0102)
    assert scene.request(scene.take())[8:16] == (0x0102).to_bytes(8, byteorder)  # type: ignore[arg-type]
    scene.driver.close()


def test_sizes_of_ones_own(memory: GuestMemory) -> None:
    scene = Scene(memory, cdb_size=64, sense_size=20)
    assert (scene.driver.config().sense_size, scene.driver.config().cdb_size) == (20, 64)
    assert scene.driver.config().max_target == 255
    pending = scene.driver.submit(0, 0, b"\x7f" * 64, data_in_length=4)
    chain = scene.take()
    assert scene.request(chain)[19:] == b"\x7f" * 64
    scene.use(chain, answer(sense=b"s" * 20, status=2, size=20, data=b"data"))
    response = scene.driver.wait_for(pending)
    assert (response.sense, response.data, response.status) == (b"s" * 20, b"data", 2)
    with pytest.raises(ValueError, match="CDB of 65 bytes"):
        scene.driver.submit(0, 0, bytes(65))
    scene.driver.close()


def test_many_in_flight_on_several_queues_end_in_any_order(memory: GuestMemory) -> None:
    scene = Scene(memory, request_queues=3)
    given = [
        scene.driver.submit(0, i, cdb.test_unit_ready(), queue=i % 3, publish=i >= 27) for i in range(30)
    ]
    assert len({pending.tag for pending in given}) == 30
    for ring in (4, 3, 2):
        chains = scene.front.rings[ring].take()
        assert len(chains) == 10, "one kick for all of a batch"
        for chain in reversed(chains):
            tag = int.from_bytes(scene.request(chain, ring)[8:16], "little")
            scene.use(chain, answer(status=tag), ring)
    assert scene.driver.wait_for(given[7]).status == given[7].tag
    ended = scene.driver.collect()
    assert len(ended) == 29
    assert given[7] not in ended
    assert all(pending.response and pending.response.status == pending.tag for pending in given)
    scene.driver.close()


def test_room_comes_back(memory: GuestMemory) -> None:
    scene = Scene(memory, ring_size=4)
    free = memory.allocate(1)
    memory.free(free)
    for _ in range(3):
        pending = [scene.driver.submit(0, 0, bytes(6)) for _ in range(2)]
        with pytest.raises(RingFullError):
            scene.driver.submit(0, 0, bytes(6))
        for chain in scene.front.rings[REQUEST].take():
            scene.use(chain, answer())
        scene.driver.wait_all(pending)
        assert memory.allocate(1) == free
        memory.free(free)
    scene.driver.close()


def test_a_command_that_does_not_end_is_a_timeout_that_says_which(scene: Scene) -> None:
    with pytest.raises(TimeoutError, match=r"request 0: command 0x77 \(00h\) within"):
        scene.driver.command(0, 0, cdb.test_unit_ready(), tag=0x77, timeout=0.01)


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (b"", "response was not written"),
        (answer(sense=b"x")[:0] + struct.pack("<IIHBB", 97, 0, 0, 2, 0), "sense_len is 97, sense_size 96"),
        (answer(resid=11), "resid is 11, and there was room for 10"),
    ],
    ids=["none", "sense", "residual"],
)
def test_a_response_that_can_not_be(scene: Scene, raw: bytes, words: str) -> None:
    scene.driver.submit(0, 0, cdb.inquiry(10), data_in_length=10)
    scene.use(scene.take(), raw)
    with pytest.raises(DeviceError, match=words):
        scene.driver.collect()


@pytest.mark.parametrize("code", [abi.S_BAD_TARGET, abi.S_OVERRUN, abi.S_BUSY, abi.S_ABORTED])
def test_a_response_that_says_no_is_returned(scene: Scene, code: int) -> None:
    pending = scene.driver.submit(9, 0, cdb.inquiry(10), data_in_length=10)
    # All else in it means nothing then.
    scene.use(scene.take(), answer(response=code, resid=10**6))
    response = scene.driver.wait_for(pending)
    assert (response.response, response.good, response.data) == (code, False, b"")


@pytest.mark.parametrize(
    ("sense", "key", "asc"),
    [
        ("70 00 05 00000000 0a 00000000 2400 00 000000", 5, 0x2400),
        ("f0 00 e3 00000000 0a 00000000 1100 00 000000", 3, 0x1100),
        ("72 06 29 01 00000000", 6, 0x2901),
        ("72", None, None),
        ("", None, None),
    ],
)
def test_sense_data_of_either_format(sense: str, key: int | None, asc: int | None) -> None:
    response = Response(0, 2, bytes.fromhex(sense), 0, b"")
    assert (response.sense_key, response.asc) == (key, asc)


def test_descriptors_that_make_nothing(scene: Scene) -> None:
    pending = scene.driver.submit_raw([b"short"], [3, 0, 2])
    chain = scene.take()
    assert chain.sizes(0) == [5]
    assert chain.sizes(WRITE) == [3, 0, 2]
    scene.use(chain, b"two"[:2])
    scene.driver.wait_all([pending])
    assert pending.raw == b"tw" + b"\xa5" * 3
    assert pending.response is None


def serve(scene: Scene, handle: Callable[[bytes], bytes]) -> Server:
    """Answer all chains of all rings by what was asked."""

    def one(ring: int, chain: Taken) -> int:
        device = scene.front.rings[ring]
        return device.scatter(chain, handle(device.gather(chain)))

    return Server(scene.front, one)


@pytest.mark.parametrize("features", [FEATURES, 1 << virtio.F_VERSION_1], ids=["event index", "flags"])
def test_commands_and_functions_are_waited_for(memory: GuestMemory, features: int) -> None:
    scene = Scene(memory, features, event_buffers=0)
    asked: list[bytes] = []

    def handle(request: bytes) -> bytes:
        asked.append(request)
        return bytes([len(request)]) if len(request) == 24 else answer(data=request[:8])

    server = serve(scene, handle)
    try:
        for i in range(50):
            got = scene.driver.command(0, i, cdb.inquiry(8), data_in_length=8)
            assert number(got.data) == (0, i)
            assert scene.driver.tmf(abi.T_TMF_LOGICAL_UNIT_RESET, 1, i, 77) == 24
        assert asked[1] == bytes.fromhex("00000000 05000000 0101400000000000 4d00000000000000")
        # Of two queues nobody knows which is served first.
        task = scene.driver.submit(4, 4, bytes(6), tag=99)
        scene.driver.wait_for(task)
        assert scene.driver.abort_task(task) == 24
        assert asked[-1] == struct.pack("<II8sQ", 0, 0, address(4, 4), 99)
        assert scene.driver.query_task(task) == 24
        assert asked[-1][4] == abi.T_TMF_QUERY_TASK
        assert scene.driver.reset_lun(1, 2) == 24
    finally:
        server.stop()
    scene.driver.close()


def test_functions_in_flight_with_others(scene: Scene) -> None:
    functions = [scene.driver.submit_tmf(subtype, 0, 0) for subtype in range(8)]
    for at, chain in enumerate(scene.front.rings[CONTROL].take()):
        scene.use(chain, bytes([at]) if at < 7 else b"", CONTROL)
    scene.driver.wait_all(functions)
    assert [scene.driver.tmf_response(one) for one in functions[:7]] == list(range(7))
    with pytest.raises(DeviceError, match="function 7: used, and its response was not written"):
        scene.driver.tmf_response(functions[7])


def test_asynchronous_notifications_are_asked_for(memory: GuestMemory) -> None:
    scene = Scene(memory, event_buffers=0)
    asked: list[bytes] = []

    def handle(request: bytes) -> bytes:
        asked.append(request)
        return struct.pack("<IB", 0x10, 3) if len(asked) < 3 else b"\0" * 4

    server = serve(scene, handle)
    try:
        assert scene.driver.query_events(1, 2, 0x12) == (0x10, 3)
        assert scene.driver.subscribe(1, 2, 0x12) == (0x10, 3)
        assert asked == [struct.pack("<I8sI", kind, address(1, 2), 0x12) for kind in (1, 2)]
        with pytest.raises(DeviceError, match="response was not written"):
            scene.driver.subscribe(1, 2, 1)
    finally:
        server.stop()
    scene.driver.close()


def tell(scene: Scene, event: int, lun: bytes = bytes(8), reason: int = 0) -> None:
    (chain,) = scene.front.rings[EVENT].take(1)
    scene.use(chain, struct.pack("<I8sI", event, lun, reason), EVENT)


def test_events_come_and_their_buffers_go_back(scene: Scene) -> None:
    for i in range(20):
        tell(scene, abi.T_TRANSPORT_RESET, address(1, i), abi.EVT_RESET_RESCAN)
        assert scene.driver.poll_events() == [Event(abi.T_TRANSPORT_RESET, address(1, i), 1)]
    assert scene.driver.event.ring.outstanding == 8
    tell(scene, abi.T_EVENTS_MISSED | abi.T_NO_EVENT)
    (missed,) = scene.driver.wait_events()
    assert missed == Event(abi.T_NO_EVENT, bytes(8), 0, missed=True)


def test_no_buffers_for_events_until_they_are_given(memory: GuestMemory) -> None:
    scene = Scene(memory, event_buffers=0)
    assert scene.front.rings[EVENT].take() == []
    with pytest.raises(TimeoutError, match="event"):
        scene.driver.wait_events(timeout=0.01)
    scene.driver.post_events(1)
    tell(scene, abi.T_PARAM_CHANGE, address(0, 3), 0x2A09)
    assert scene.driver.wait_events(again=False) == [Event(abi.T_PARAM_CHANGE, address(0, 3), 0x2A09)]
    assert scene.driver.event.ring.outstanding == 0
    scene.driver.post_events(1)
    (chain,) = scene.front.rings[EVENT].take()
    scene.use(chain, b"short", EVENT)
    with pytest.raises(DeviceError, match="an event of 5 bytes"):
        scene.driver.poll_events()
    scene.driver.close()


def test_it_stops_and_resumes_with_commands_in_flight(scene: Scene) -> None:
    pending = scene.driver.submit(0, 0, bytes(6), tag=0)
    bases = scene.driver.stop()
    assert set(bases) == {CONTROL, EVENT, REQUEST}
    scene.driver.resume(bases=bases)
    scene.use(scene.take(), answer())
    assert scene.driver.wait_for(pending).good
    with pytest.raises(DriverError, match="has started"):
        scene.driver.start()
