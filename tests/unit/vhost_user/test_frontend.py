"""The front end's session: what it sends, and what it makes of answers, DPDK's recorded ones among them."""

from __future__ import annotations

import pytest

from pyvhost.abi import vhost_user as abi
from pyvhost.abi.vhost_user import BackendRequest, Request
from pyvhost.vhost_user.codec import Fds, Message, Stream, decode_one, encode
from pyvhost.vhost_user.frontend import FrontendError, FrontendSession, RefusedError
from pyvhost.vhost_user.payloads import U64, Config, Inflight, Iotlb, Payload, VringState
from recording_device import conversation

REPLY_ACK = U64(1 << abi.PROTOCOL_F_REPLY_ACK)


def reply(request: int, payload: Payload | None) -> Message:
    return decode_one(Stream.REPLY, encode(request, payload, flags=abi.FLAG_REPLY))


def flags_of(data: bytes) -> int:
    return int.from_bytes(data[4:8], "little")


@pytest.fixture
def session() -> FrontendSession:
    """One that has negotiated REPLY_ACK."""
    session = FrontendSession()
    session.request(Request.SET_PROTOCOL_FEATURES, REPLY_ACK)
    return session


@pytest.mark.parametrize("name", ["qemu-7.2-dpdk-22.11", "testpmd-22.11"])
def test_dpdks_answers_match_the_requests_that_qemu_and_testpmd_sent(name: str) -> None:
    session = FrontendSession()
    for recorded in conversation(name):
        if recorded.front:
            # Descriptors play no part here: a message that needs one is read by its header and its bytes.
            flags = flags_of(recorded.data)
            payload = U64(int.from_bytes(recorded.data[12:20], "little"))
            again = session.request(
                recorded.request,
                payload if recorded.request == Request.SET_PROTOCOL_FEATURES else None,
                need_reply=bool(flags & abi.FLAG_NEED_REPLY),
            )
            assert flags_of(again) == flags
        else:
            session.receive(decode_one(Stream.REPLY, recorded.data))
    assert session.waiting == 0


def test_without_reply_ack_no_acknowledgement_is_asked_for() -> None:
    session = FrontendSession()
    assert flags_of(session.request(Request.SET_OWNER)) == 1
    assert session.waiting == 0


def test_with_reply_ack_one_is_asked_for_unless_the_request_has_an_answer_anyway(
    session: FrontendSession,
) -> None:
    assert flags_of(session.request(Request.SET_OWNER)) == 1 | abi.FLAG_NEED_REPLY
    assert flags_of(session.request(Request.GET_FEATURES)) == 1
    assert session.waiting == 2
    assert session.receive(reply(Request.SET_OWNER, U64(0))) == U64(0)
    assert session.receive(reply(Request.GET_FEATURES, U64(7))) == U64(7)


def test_need_reply_without_reply_ack_makes_nobody_wait() -> None:
    session = FrontendSession()
    assert flags_of(session.request(Request.SET_OWNER, need_reply=True)) == 9
    assert session.waiting == 0


def test_reply_ack_counts_within_the_request_that_negotiates_it() -> None:
    session = FrontendSession()
    session.request(Request.SET_PROTOCOL_FEATURES, REPLY_ACK, need_reply=True)
    assert session.receive(reply(Request.SET_PROTOCOL_FEATURES, U64(0))) == U64(0)


def test_an_answer_other_than_zero_is_a_refusal(session: FrontendSession) -> None:
    session.request(Request.SET_VRING_NUM, VringState(0, 3))
    with pytest.raises(RefusedError, match="SET_VRING_NUM: the back end answered 22"):
        session.receive(reply(Request.SET_VRING_NUM, U64(22)))


def test_a_configuration_of_no_bytes_is_a_refusal(session: FrontendSession) -> None:
    session.request(Request.GET_CONFIG, Config(0, 0, bytes(6)))
    with pytest.raises(RefusedError, match="GET_CONFIG"):
        session.receive(reply(Request.GET_CONFIG, None))


def test_inflight_memory_is_a_size_and_a_descriptor_or_a_refusal(session: FrontendSession) -> None:
    def answer(size: int, fds: list[int]) -> Message:
        message = reply(Request.GET_INFLIGHT_FD, Inflight(size, 0, 2, 128))
        message.fds = Fds(fds)
        return message

    for _ in range(3):
        assert flags_of(session.request(Request.GET_INFLIGHT_FD, Inflight(0, 0, 2, 128))) == 1
    assert session.receive(answer(4096, [99])) == Inflight(4096, 0, 2, 128)
    with pytest.raises(RefusedError, match="GET_INFLIGHT_FD: the back end has no memory to give"):
        session.receive(answer(0, []))
    with pytest.raises(FrontendError, match="GET_INFLIGHT_FD: 0 descriptors came with it, expected 1"):
        session.receive(answer(4096, []))


def test_an_iotlb_message_waits_for_its_answer_with_or_without_reply_ack() -> None:
    session = FrontendSession()
    update = Iotlb(0x1000, 0x1000, 0x7000, 3, 2)
    session.request(Request.IOTLB_MSG, update)
    assert session.receive(reply(Request.IOTLB_MSG, U64(0))) == U64(0)
    session.request(Request.IOTLB_MSG, update)
    with pytest.raises(RefusedError, match="IOTLB_MSG: the back end answered 14"):
        session.receive(reply(Request.IOTLB_MSG, U64(14)))


def test_a_reply_that_nobody_waits_for_is_a_fault(session: FrontendSession) -> None:
    with pytest.raises(FrontendError, match="GET_FEATURES: a reply that nobody waits for"):
        session.receive(reply(Request.GET_FEATURES, U64(0)))


def test_a_reply_to_another_request_is_a_fault_that_names_both(session: FrontendSession) -> None:
    session.request(Request.GET_FEATURES)
    with pytest.raises(FrontendError, match="the reply is to GET_QUEUE_NUM, but GET_FEATURES waits"):
        session.receive(reply(Request.GET_QUEUE_NUM, U64(0)))


def test_set_log_base_waits_for_a_reply_with_log_shmfd_alone() -> None:
    session = FrontendSession()
    session.request(Request.SET_LOG_BASE, U64(0))
    assert session.waiting == 0
    session.request(Request.SET_PROTOCOL_FEATURES, U64(1 << abi.PROTOCOL_F_LOG_SHMFD))
    for payload in (None, U64(1), U64(0)):
        session.request(Request.SET_LOG_BASE, U64(0))
        assert session.receive(reply(Request.SET_LOG_BASE, payload)) == payload


def test_a_request_of_the_back_ends_is_acknowledged_if_it_asks(session: FrontendSession) -> None:
    asks = decode_one(
        Stream.BACKEND_REQUEST, encode(BackendRequest.CONFIG_CHANGE_MSG, flags=abi.FLAG_NEED_REPLY)
    )
    (recorded,) = [m for m in conversation("uml-6.1") if m.backend_channel and m.front]
    assert session.acknowledge(asks) == recorded.data
    silent = decode_one(Stream.BACKEND_REQUEST, encode(BackendRequest.CONFIG_CHANGE_MSG))
    assert session.acknowledge(silent) == b""
    assert FrontendSession().acknowledge(asks) == b""


def test_messages_of_another_stream_are_not_taken(session: FrontendSession) -> None:
    request = decode_one(Stream.REQUEST, encode(Request.SET_OWNER))
    with pytest.raises(ValueError, match="not the stream"):
        session.receive(request)
    with pytest.raises(ValueError, match="not the stream"):
        session.acknowledge(request)
