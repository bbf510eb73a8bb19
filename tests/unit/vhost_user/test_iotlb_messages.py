"""The IOTLB over vhost-user: updates in, misses out, and nobody who waits for anybody."""

from __future__ import annotations

import errno
import logging
import os
import socket
from collections.abc import Iterator

import pytest

from fronts import BIT_30, Front, Talk, until
from pyvhost.abi import vhost
from pyvhost.abi import vhost_user as abi
from pyvhost.abi.vhost_user import BackendRequest, Request
from pyvhost.host import fds as host_fds
from pyvhost.vhost_user.codec import Decoder, Message, Stream, decode_one, encode
from pyvhost.vhost_user.describe import describe
from pyvhost.vhost_user.frontend import FrontendSession
from pyvhost.vhost_user.outbox import MISSES_UNANSWERED
from pyvhost.vhost_user.payloads import U64, Inflight, Iotlb, VringFile, VringState
from pyvhost.vhost_user.server import Server
from recording_device import FEATURES, RecordingDevice, conversation, no_fd_leaks, spare_fd

ACCESS_PLATFORM = 1 << 33
REPLY_ACK = 1 << abi.PROTOCOL_F_REPLY_ACK
BACKEND_REQ = 1 << abi.PROTOCOL_F_BACKEND_REQ
CONFIG = 1 << abi.PROTOCOL_F_CONFIG


@pytest.fixture
def device() -> RecordingDevice:
    return RecordingDevice(features=FEATURES | ACCESS_PLATFORM)


def miss(iova: int, perm: int = vhost.ACCESS_RO) -> Iotlb:
    return Iotlb(iova, 0, 0, perm, vhost.IOTLB_MISS)


# --- who is offered it -----------------------------------------------------------------------------


def test_access_platform_is_offered_once_there_is_somebody_to_ask(talk: Talk) -> None:
    """QEMU asks for the features twice. UML asks once, and its guests fail with what they can't do."""
    assert talk.say(Request.GET_FEATURES) == U64(FEATURES | BIT_30)
    talk.negotiate(REPLY_ACK)
    assert talk.say(Request.GET_FEATURES) == U64(FEATURES | BIT_30)
    talk.negotiate(REPLY_ACK | BACKEND_REQ)
    assert talk.say(Request.GET_FEATURES) == U64(FEATURES | BIT_30 | ACCESS_PLATFORM)


def test_who_acknowledges_it_and_cant_be_asked_is_told_so_once(
    talk: Talk, device: RecordingDevice, caplog: pytest.LogCaptureFixture
) -> None:
    talk.say(Request.SET_FEATURES, U64(FEATURES | BIT_30 | ACCESS_PLATFORM))
    assert not caplog.records
    for index in (0, 1):
        talk.kick(index)
        talk.enable(index)
    device.miss(0, 0x1000, vhost.ACCESS_RO)
    talk.say(Request.GET_FEATURES)
    assert not talk.session.takes_misses
    assert len(device.misses) == 1
    (record,) = caplog.records
    assert "acknowledged ACCESS_PLATFORM" in record.message
    assert "SET_BACKEND_REQ_FD" in record.message
    assert [ring.running for ring in talk.session.rings[:2]] == [True, True]


def test_qemu_sees_the_offer_when_it_asks_again_and_answers_each_miss() -> None:
    """The recorded conversation: what is offered before and after BACKEND_REQ, misses, updates, acknowledgements."""
    talk = conversation("qemu-7.2-iommu")
    offers = [
        int.from_bytes(m.data[12:], "little")
        for m in talk
        if m.request == Request.GET_FEATURES and not m.front and not m.backend_channel
    ]
    assert [bool(bits & ACCESS_PLATFORM) for bits in offers] == [False] + [True] * (len(offers) - 1)
    misses = [m for m in talk if m.backend_channel and not m.front]
    acks = [m for m in talk if m.backend_channel and m.front]
    assert len(misses) == len(acks) == 26
    for sent in misses:
        payload = decode_one(Stream.BACKEND_REQUEST, sent.data).payload
        assert isinstance(payload, Iotlb)
        assert sent.data == encode(
            BackendRequest.IOTLB_MSG, miss(payload.iova, payload.perm), flags=abi.FLAG_NEED_REPLY
        )
    frontend = FrontendSession()
    frontend.request(Request.SET_PROTOCOL_FEATURES, U64(REPLY_ACK))
    assert acks[0].data == frontend.acknowledge(decode_one(Stream.BACKEND_REQUEST, misses[0].data))
    updates = [m for m in talk if m.request == Request.IOTLB_MSG and m.front and not m.backend_channel]
    told = [p for m in updates if isinstance(p := decode_one(Stream.REQUEST, m.data).payload, Iotlb)]
    assert {p.type for p in told} == {vhost.IOTLB_UPDATE, vhost.IOTLB_INVALIDATE}
    known = {p.iova for p in told if p.type == vhost.IOTLB_UPDATE}
    asked = [decode_one(Stream.BACKEND_REQUEST, m.data).payload for m in misses]
    assert {p.iova & ~0xFFF for p in asked if isinstance(p, Iotlb)} <= known


# --- what the front end says -----------------------------------------------------------------------


def test_updates_and_invalidations_reach_the_device_and_are_always_answered(
    talk: Talk, device: RecordingDevice
) -> None:
    update = Iotlb(0x1000, 0x2000, 0x7F0000001000, vhost.ACCESS_RW, vhost.IOTLB_UPDATE)
    for need_reply in (False, True):
        assert talk.say(Request.IOTLB_MSG, update, need_reply=need_reply) == U64(0)
    assert talk.say(Request.IOTLB_MSG, Iotlb(0x1000, 0x2000, 0, 0, vhost.IOTLB_INVALIDATE)) == U64(0)
    assert device.called("iotlb_update") == [(0x1000, 0x2000, 0x7F0000001000, 3)] * 2
    assert device.called("iotlb_invalidate") == [(0x1000, 0x2000)]


def test_the_bytes_are_those_of_struct_vhost_iotlb_msg(talk: Talk, device: RecordingDevice) -> None:
    data = (
        "16000000" "09000000" "20000000"
        "00f0ffff00000000" "0010000000000000" "0060a3f7ff7f0000" "01" "02" "000000000000"
    )  # fmt: skip
    (answer,) = talk.raw(bytes.fromhex(data))
    assert answer.payload == U64(0)
    assert device.called("iotlb_update") == [(0xFFFFF000, 0x1000, 0x7FFFF7A36000, 1)]
    assert encode(BackendRequest.IOTLB_MSG, miss(0xFFFFF000, 2), flags=8).hex() == (
        "010000000900000020000000" + "00f0ffff00000000" + "00" * 16 + "0201" + "00" * 6
    )


@pytest.mark.parametrize("kind", [0, vhost.IOTLB_MISS, vhost.IOTLB_ACCESS_FAIL, vhost.IOTLB_BATCH_BEGIN, 255])
def test_other_types_are_refused_by_number_and_the_conversation_goes_on(
    talk: Talk, device: RecordingDevice, kind: int, caplog: pytest.LogCaptureFixture
) -> None:
    assert talk.say(Request.IOTLB_MSG, Iotlb(0x1000, 0x1000, 0, 1, kind)) == U64(errno.EINVAL)
    assert f"type is {kind}, expected 2 (update) or 3 (invalidate)" in caplog.text
    assert talk.say(Request.IOTLB_MSG, Iotlb(0, 1, 0, 1, vhost.IOTLB_UPDATE)) == U64(0)
    assert len(device.calls) == 2


def test_what_the_device_refuses_is_answered_with_its_number(talk: Talk, device: RecordingDevice) -> None:
    device.refuse("iotlb_update", errno.EFAULT, "there is no IOTLB")
    assert talk.say(Request.IOTLB_MSG, Iotlb(0, 1, 0, 1, vhost.IOTLB_UPDATE)) == U64(errno.EFAULT)


# --- what the session says -------------------------------------------------------------------------


class Channel:
    """A session with a socket of SET_BACKEND_REQ_FD and rings that translate."""

    def __init__(self, talk: Talk, bits: int = REPLY_ACK) -> None:
        self.talk = talk
        talk.negotiate(BACKEND_REQ | CONFIG | bits)
        theirs, ours = socket.socketpair()
        theirs.close()
        talk.say(Request.SET_BACKEND_REQ_FD, fds=[ours.detach()])
        talk.say(Request.SET_FEATURES, U64(FEATURES | BIT_30 | ACCESS_PLATFORM))
        talk.kick(0)
        talk.enable(0)

    def told(self) -> list[Message]:
        """What is said until nothing more is, as whoever sends it takes it."""
        messages = []
        self.talk.session.announce()
        while self.talk.session.backend_output:
            messages.append(decode_one(Stream.BACKEND_REQUEST, bytes(self.talk.session.backend_output)))
            self.talk.session.backend_output.clear()
            self.talk.session.announce()
        return messages

    def answer(self, value: int = 0, request: int = BackendRequest.IOTLB_MSG) -> None:
        data = encode(request, U64(value), flags=abi.FLAG_REPLY)
        self.talk.session.receive_backend_reply(decode_one(Stream.BACKEND_REPLY, data))


def test_misses_are_told_in_their_order(talk: Talk, device: RecordingDevice) -> None:
    channel = Channel(talk)
    device.miss(0, 0x1000, vhost.ACCESS_RO)
    device.miss(1, 0x5000, vhost.ACCESS_WO)
    told = channel.told()
    assert [m.payload for m in told] == [miss(0x1000), miss(0x5000, vhost.ACCESS_WO)]
    assert all(m.need_reply for m in told)
    assert describe(told[1]) == ("back end's request: IOTLB_MSG need_reply MISS iova=0x5000 perm=WO")


def test_without_reply_ack_no_answer_is_wanted(talk: Talk, device: RecordingDevice) -> None:
    channel = Channel(talk, bits=0)
    for number in range(3 * MISSES_UNANSWERED):
        device.miss(0, number << 12, vhost.ACCESS_RO)
    told = channel.told()
    assert len(told) == 3 * MISSES_UNANSWERED
    assert not any(m.need_reply for m in told)


def test_misses_nobody_answers_wait_in_the_device(talk: Talk, device: RecordingDevice) -> None:
    channel = Channel(talk)
    for number in range(MISSES_UNANSWERED + 2):
        device.miss(0, number << 12, vhost.ACCESS_RO)
    assert len(channel.told()) == MISSES_UNANSWERED
    assert not talk.session.takes_misses
    assert len(device.misses) == 2
    channel.answer()
    assert [m.payload for m in channel.told()] == [miss(MISSES_UNANSWERED << 12)]
    channel.answer()
    channel.told()
    channel.answer()
    assert talk.session.takes_misses


def test_a_miss_that_cant_be_sent_holds_back_the_next(talk: Talk, device: RecordingDevice) -> None:
    Channel(talk)
    for number in range(100):
        device.miss(0, number << 12, vhost.ACCESS_RO)
        talk.session.announce()
    assert len(talk.session.backend_output) == 44
    assert len(device.misses) == 99
    assert not talk.session.takes_misses


def test_a_suspended_front_end_hears_of_no_miss(talk: Talk, device: RecordingDevice) -> None:
    channel = Channel(talk)
    talk.say(Request.GET_VRING_BASE, VringState(0, 0))
    device.miss(0, 0x1000, vhost.ACCESS_RO)
    assert channel.told() == []
    assert not talk.session.takes_misses
    talk.kick(0)
    assert len(channel.told()) == 1


def test_misses_are_not_looked_for_without_the_feature(talk: Talk, device: RecordingDevice) -> None:
    channel = Channel(talk)
    talk.say(Request.SET_FEATURES, U64(FEATURES | BIT_30))
    device.miss(0, 0x1000, vhost.ACCESS_RO)
    assert channel.told() == []
    assert not talk.session.takes_misses


def test_a_miss_the_front_end_has_no_answer_to_is_logged_with_its_address_once(
    talk: Talk, device: RecordingDevice, caplog: pytest.LogCaptureFixture
) -> None:
    channel = Channel(talk)
    with caplog.at_level(logging.DEBUG):
        for iova in (0x1000, 0xDEAD000, 0xBEEF000):
            device.miss(0, iova, vhost.ACCESS_WO)
        channel.told()
        for value in (0, 1, 1):
            channel.answer(value)
    first, second = [r for r in caplog.records if "translation" in r.message]
    assert "no translation of iova 0xdead000 for perm 2 (IOTLB_MSG refused: 1)" in first.message
    assert (first.levelno, second.levelno) == (logging.WARNING, logging.DEBUG)


def test_a_new_socket_begins_anew_and_a_lost_one_is_named(
    talk: Talk, device: RecordingDevice, caplog: pytest.LogCaptureFixture
) -> None:
    channel = Channel(talk)
    for number in range(MISSES_UNANSWERED + 1):
        device.miss(0, number << 12, vhost.ACCESS_RO)
    channel.told()
    talk.session.backend_channel_closed()
    assert "no socket (SET_BACKEND_REQ_FD)" in caplog.text
    assert not talk.session.takes_misses
    Channel(talk)
    assert len(channel.told()) == 1


def test_nobody_is_asked_again_for_what_has_not_come_yet(talk: Talk, device: RecordingDevice) -> None:
    """Each kick of a vring that waits is a miss anew, and QEMU may get to the second after the page has gone."""
    channel = Channel(talk)
    for index in (0, 0, 1):
        device.miss(index, 0x1000, vhost.ACCESS_RO)
    device.miss(0, 0x1000, vhost.ACCESS_WO)
    assert [m.payload for m in channel.told()] == [miss(0x1000), miss(0x1000, vhost.ACCESS_WO)]
    # An answer without an entry: a kick may ask again.
    channel.answer(1)
    device.miss(0, 0x1000, vhost.ACCESS_RO)
    assert len(channel.told()) == 1
    # An entry: whatever is missed from now on is another miss, though the answer has not come.
    talk.say(Request.IOTLB_MSG, Iotlb(0x1000, 0x1000, 0x7000, vhost.ACCESS_RO, vhost.IOTLB_UPDATE))
    device.miss(0, 0x1000, vhost.ACCESS_RO)
    device.miss(0, 0x1000, vhost.ACCESS_WO)
    assert [m.payload for m in channel.told()] == [miss(0x1000)]


def test_nobody_is_asked_for_what_has_come_or_gone_meanwhile(talk: Talk, device: RecordingDevice) -> None:
    channel = Channel(talk)
    device.miss(0, 0x9000, vhost.ACCESS_RO)
    talk.session.announce()
    for iova in (0x1000, 0x1FFF, 0x2000, 0x3000):
        device.miss(0, iova, vhost.ACCESS_RO)
    device.miss(0, 0x1000, vhost.ACCESS_WO)
    talk.say(Request.IOTLB_MSG, Iotlb(0x1000, 0x1000, 0x7000, vhost.ACCESS_RO, vhost.IOTLB_UPDATE))
    talk.say(Request.IOTLB_MSG, Iotlb(0x3000, 0x1000, 0, 0, vhost.IOTLB_INVALIDATE))
    assert [m.payload for m in channel.told()] == [miss(0x9000), miss(0x2000), miss(0x1000, vhost.ACCESS_WO)]


def test_a_vring_whose_miss_has_gone_unsaid_looks_again(talk: Talk, device: RecordingDevice) -> None:
    """What it still needs it asks for anew; nobody else would wake it."""
    channel = Channel(talk)
    device.miss(0, 0x9000, vhost.ACCESS_RO)
    talk.session.announce()
    for index, iova in ((0, 0x2000), (1, 0x3000), (1, 0x3800), (0, 0x4000)):
        device.miss(index, iova, vhost.ACCESS_RO)
    # What was said is the front end's to answer.
    for iova, size in ((0x3000, 0x1000), (0x9000, 0x1000), (0x2000, 0)):
        assert talk.say(Request.IOTLB_MSG, Iotlb(iova, size, 0, 0, vhost.IOTLB_INVALIDATE)) == U64(0)
    assert device.called("look_for_entries") == [(1,)]
    assert [m.payload for m in channel.told()] == [miss(0x9000), miss(0x2000), miss(0x4000)]


def test_an_invalidation_of_nothing_at_0_is_one_of_everything(talk: Talk, device: RecordingDevice) -> None:
    """What a flush of a whole IOMMU domain comes to, 2**64 bytes, has no other way to be said."""
    channel = Channel(talk)
    for index, iova in ((1, 0), (0, (1 << 64) - 1)):
        device.miss(index, iova, vhost.ACCESS_RO)
    assert talk.say(Request.IOTLB_MSG, Iotlb(0, 0, 0, 0, vhost.IOTLB_INVALIDATE)) == U64(0)
    assert device.called("iotlb_invalidate") == [(0, 0)]
    assert device.called("look_for_entries") == [(0,), (1,)]
    assert channel.told() == []


def test_a_vring_that_stops_asks_for_nothing_more(talk: Talk, device: RecordingDevice) -> None:
    channel = Channel(talk)
    talk.kick(1)
    talk.enable(1)
    for index in (0, 1):
        device.miss(index, 0x1000 << index, vhost.ACCESS_RO)
    talk.session.backend_output.extend(b"busy")
    talk.say(Request.IOTLB_MSG, Iotlb(0x9000, 0x1000, 0x7000, vhost.ACCESS_RO, vhost.IOTLB_UPDATE))
    talk.say(Request.GET_VRING_BASE, VringState(0, 0))
    talk.session.backend_output.clear()
    assert [m.payload for m in channel.told()] == [miss(0x2000)]


def test_news_and_misses_share_the_socket(talk: Talk, device: RecordingDevice) -> None:
    channel = Channel(talk)
    assert device.config_changed is not None
    device.miss(0, 0x1000, vhost.ACCESS_RO)
    device.config_changed()
    device.config_changed()
    assert [m.name for m in channel.told()] == ["CONFIG_CHANGE_MSG", "IOTLB_MSG"]
    channel.answer()
    assert channel.told() == []
    channel.answer(request=BackendRequest.CONFIG_CHANGE_MSG)
    assert [m.name for m in channel.told()] == ["CONFIG_CHANGE_MSG"]


# --- the connection --------------------------------------------------------------------------------


class Socket:
    """The front end's end of the socket of SET_BACKEND_REQ_FD."""

    def __init__(self, server: Server, front: Front) -> None:
        self.server = server
        self.sock, theirs = socket.socketpair()
        self.sock.setblocking(False)
        front.send(encode(Request.SET_BACKEND_REQ_FD), [theirs.detach()])
        self.decoder = Decoder(Stream.BACKEND_REQUEST)
        self.seen: list[Message] = []

    def read(self) -> list[Message]:
        """All that has come so far."""
        while True:
            try:
                data = self.sock.recv(self.decoder.wanted)
            except BlockingIOError:
                return self.seen
            assert data, "the back end closed its end"
            message = self.decoder.feed(data)
            if message is not None:
                self.seen.append(message)

    def answer(self, value: int = 0) -> None:
        self.sock.sendall(encode(BackendRequest.IOTLB_MSG, U64(value), flags=abi.FLAG_REPLY))


@pytest.fixture
def polled(server: Server, device: RecordingDevice, path: str) -> Iterator[RecordingDevice]:
    device.iotlb_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
    server.listen(path, device)
    yield device
    server.close()
    os.close(device.iotlb_fd)


def attach(server: Server, path: str, bits: int) -> tuple[Front, Socket]:
    front = Front.at(server, path)
    front.send(encode(Request.SET_PROTOCOL_FEATURES, U64(BACKEND_REQ | bits)))
    sock = Socket(server, front)
    front.send(encode(Request.SET_FEATURES, U64(FEATURES | BIT_30 | ACCESS_PLATFORM)))
    front.send(encode(Request.SET_VRING_KICK, VringFile(0)), [spare_fd()])
    front.send(encode(Request.SET_VRING_ENABLE, VringState(0, 1)))
    assert front.ask(Request.GET_STATUS) == U64(0)
    return front, sock


def test_a_miss_goes_out_by_itself_and_its_update_comes_in(
    server: Server, polled: RecordingDevice, path: str
) -> None:
    front, sock = attach(server, path, REPLY_ACK)
    for iova in (0x1000, 0x2000):
        polled.miss(0, iova, vhost.ACCESS_RO)
    until(server, lambda: len(sock.read()) == 2)
    assert [m.payload for m in sock.seen] == [miss(0x1000), miss(0x2000)]
    update = Iotlb(0x1000, 0x1000, 0x7000, vhost.ACCESS_RW, vhost.IOTLB_UPDATE)
    assert front.ask(Request.IOTLB_MSG, update) == U64(0)
    sock.answer()
    assert polled.called("iotlb_update") == [(0x1000, 0x1000, 0x7000, 3)]
    front.close()
    sock.sock.close()
    until(server, lambda: polled.resets == 1)
    assert not server.poller.registered(polled.iotlb_fd)


def test_a_front_end_that_reads_no_misses_is_served_all_the_same(
    server: Server, polled: RecordingDevice, path: str
) -> None:
    front, sock = attach(server, path, 0)
    number = 0
    # Until the socket is full: then misses stay where they are, and the loop does not spin on them.
    while server.poller.registered(polled.iotlb_fd):
        number += 1
        polled.miss(0, number << 12, vhost.ACCESS_RO)
        server.poller.run_once(0)
    polled.miss(0, 0xFFFF000, vhost.ACCESS_RO)
    assert front.ask(Request.GET_QUEUE_NUM) == U64(4)
    assert polled.misses[-1].iova == 0xFFFF000
    # It wakes up, and hears of each once, in order.
    until(server, lambda: sock.read()[-1].payload == miss(0xFFFF000))
    assert [m.payload for m in sock.seen[:number]] == [miss(n << 12) for n in range(1, number + 1)]
    assert not polled.misses
    front.close()
    sock.sock.close()


def test_misses_wait_for_the_answers_to_the_ones_before(
    server: Server, polled: RecordingDevice, path: str
) -> None:
    front, sock = attach(server, path, REPLY_ACK)
    for number in range(MISSES_UNANSWERED + 1):
        polled.miss(0, number << 12, vhost.ACCESS_RO)
    until(server, lambda: len(sock.read()) == MISSES_UNANSWERED)
    assert not server.poller.registered(polled.iotlb_fd)
    sock.answer()
    until(server, lambda: len(sock.read()) == MISSES_UNANSWERED + 1)
    front.close()
    sock.sock.close()


def test_a_front_end_that_closes_that_socket_keeps_its_connection(
    server: Server, polled: RecordingDevice, path: str, caplog: pytest.LogCaptureFixture
) -> None:
    front, sock = attach(server, path, REPLY_ACK)
    sock.sock.close()
    until(server, lambda: "no socket (SET_BACKEND_REQ_FD)" in caplog.text)
    assert not server.poller.registered(polled.iotlb_fd)
    polled.miss(0, 0x1000, vhost.ACCESS_RO)
    assert front.ask(Request.GET_QUEUE_NUM) == U64(4)
    front.close()


def test_inflight_memory_travels_as_a_descriptor(server: Server, device: RecordingDevice, path: str) -> None:
    server.listen(path, device)
    front = Front.at(server, path)
    with no_fd_leaks():
        front.send(encode(Request.GET_INFLIGHT_FD, Inflight(0, 0, 2, 128)))
        got: list[tuple[bytes, list[int]]] = []

        def arrived() -> bool:
            try:
                got.append(host_fds.recv(front.sock, 64))
            except BlockingIOError:
                return False
            return True

        until(server, arrived)
        ((data, fds),) = got
        assert decode_one(Stream.REPLY, data).payload == Inflight(4096, 0, 2, 128)
        assert len(fds) == 1
        host_fds.close_all(fds)
        front.close()
        until(server, lambda: device.resets == 1)
