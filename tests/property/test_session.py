"""The back end's session under sequences of messages that hypothesis makes up, beside a model of ring states."""

from __future__ import annotations

import errno
import os
import socket
from dataclasses import dataclass

from hypothesis import given
from hypothesis import strategies as st

from pyvhost.abi import vhost_user as abi
from pyvhost.abi.vhost_user import Request
from pyvhost.vhost_user.backend import BackendSession, SessionError
from pyvhost.vhost_user.codec import Decoder, Stream, decode_one, encode
from pyvhost.vhost_user.payloads import (
    REQUESTS,
    U64,
    CodecError,
    MemReg,
    MemTable,
    Payload,
    Raw,
    Region,
    VringFile,
    VringState,
)
from recording_device import FEATURES, RecordingDevice, no_fd_leaks, spare_fd

RINGS = RecordingDevice.vring_count
BIT_30 = 1 << abi.F_PROTOCOL_FEATURES
REPLY_ACK = U64(1 << abi.PROTOCOL_F_REPLY_ACK)


@dataclass
class Step:
    """One message, and the device's method that refuses it, if one does."""

    request: Request
    payload: Payload | None = None
    fds: int = 0
    refused_by: str = ""


indices = st.integers(0, RINGS - 1)
refusals = st.sampled_from(["", "", "", "set_vring_running"])
steps = st.one_of(
    st.builds(
        lambda i, no_fd, by: Step(Request.SET_VRING_KICK, VringFile(i, no_fd), 0 if no_fd else 1, by),
        indices,
        st.booleans(),
        st.sampled_from(["", "", "set_vring_kick", "set_vring_running"]),
    ),
    st.builds(
        lambda i, on, by: Step(Request.SET_VRING_ENABLE, VringState(i, on), 0, by),
        indices,
        st.integers(0, 1),
        refusals,
    ),
    st.builds(lambda i: Step(Request.GET_VRING_BASE, VringState(i, 0)), indices),
    st.builds(
        lambda bit_30, bad: Step(
            Request.SET_FEATURES, U64(FEATURES | (BIT_30 if bit_30 else 0) | (1 << 60 if bad else 0))
        ),
        st.booleans(),
        st.booleans(),
    ),
    st.builds(lambda value: Step(Request.SET_STATUS, U64(value)), st.sampled_from([0, 1, 0xF, 0x100])),
    st.sampled_from([Step(Request.RESET_OWNER), Step(Request.RESET_DEVICE), Step(Request.SET_OWNER)]),
    st.builds(
        lambda i, by: Step(Request.SET_VRING_CALL, VringFile(i), 1, by),
        indices,
        st.sampled_from(["", "set_vring_call"]),
    ),
    st.builds(
        lambda n, by: Step(Request.SET_MEM_TABLE, MemTable((Region(0, 1, 0, 0),) * n), n, by),
        st.integers(0, 8),
        st.sampled_from(["", "set_mem_table"]),
    ),
    st.just(Step(Request.ADD_MEM_REG, MemReg(Region(0, 1, 0, 0)), 1)),
    st.just(Step(Request.REM_MEM_REG, MemReg(Region(0, 1, 0, 0)), 1)),
)


class Model:
    """The specification's two states a ring, in as few words as possible."""

    def __init__(self) -> None:
        self.started = [False] * RINGS
        self.enabled = [False] * RINGS

    def apply(self, step: Step) -> None:
        match step.request, step.payload:
            case Request.SET_VRING_KICK, VringFile(index):
                self.started[index] = True
            case Request.GET_VRING_BASE, VringState(index):
                self.started[index] = False
            case Request.SET_VRING_ENABLE, VringState(index, num):
                self.enabled[index] = bool(num)
            case Request.SET_FEATURES, U64(value) if not value & BIT_30:
                self.enabled = [True] * RINGS
            case Request.SET_STATUS, U64(0):
                self.started = [False] * RINGS
            case Request.RESET_OWNER, _:
                self.enabled = [False] * RINGS
            case Request.RESET_DEVICE, _:
                self.__init__()  # type: ignore[misc]

    def running(self) -> list[bool]:
        return [a and b for a, b in zip(self.started, self.enabled, strict=True)]


def deliver(session: BackendSession, data: bytes, fds: list[int]) -> list[bytes]:
    decoder = Decoder(Stream.REQUEST)
    message = decoder.feed(data[:12], fds) or decoder.feed(data[12:])
    assert message is not None
    replies = []
    for reply in session.receive(message):
        reply.fds.close()
        replies.append(reply.data)
    return replies


@given(st.lists(steps, max_size=40))
def test_rings_run_exactly_while_they_are_started_and_enabled(sequence: list[Step]) -> None:
    device = RecordingDevice()
    model = Model()
    with no_fd_leaks():
        session = BackendSession(device)
        deliver(session, encode(Request.SET_PROTOCOL_FEATURES, REPLY_ACK), [])
        for step in sequence:
            device.refusals.clear()
            if step.refused_by:
                device.refuse(step.refused_by, errno.EINVAL, "no")
            data = encode(step.request, step.payload, flags=abi.FLAG_NEED_REPLY)
            (reply,) = deliver(session, data, [spare_fd() for _ in range(step.fds)])
            answer = decode_one(Stream.REPLY, reply).payload
            if not isinstance(answer, U64) or answer == U64(0):
                model.apply(step)
            elif step.request == Request.SET_VRING_KICK or step.request == Request.SET_VRING_ENABLE:
                assert step.refused_by, "nothing was wrong with it"
            assert [ring.running for ring in session.rings] == model.running()
            assert [device.running.get(i, False) for i in range(RINGS)] == model.running()
            assert [(r.started, r.enabled) for r in session.rings] == list(
                zip(model.started, model.enabled, strict=True)
            )
        device.refusals.clear()
        session.close()
    assert device.resets == 1


@given(
    st.lists(
        st.tuples(st.sampled_from([*Request][1:]), st.binary(max_size=80), st.integers(0, 9)), max_size=20
    )
)
def test_whatever_is_said_ends_in_replies_or_in_one_fault(messages: list[tuple[Request, bytes, int]]) -> None:
    device = RecordingDevice()
    with no_fd_leaks():
        session = BackendSession(device)
        try:
            for request, body, count in messages:
                low, high = REQUESTS[request].low if request in REQUESTS else 0, 80
                body = body.ljust(low, b"\0")[:high]
                for reply in deliver(session, encode(request, Raw(body)), [spare_fd() for _ in range(count)]):
                    assert decode_one(Stream.REPLY, reply).request == request
        except (CodecError, SessionError):
            pass
        session.close()
    assert device.resets == 1


@given(st.lists(st.booleans(), max_size=6))
def test_every_socket_for_the_back_ends_requests_has_one_owner(taken: list[bool]) -> None:
    with no_fd_leaks():
        session = BackendSession(RecordingDevice())
        for take in taken:
            ours, theirs = socket.socketpair()
            ours.close()
            deliver(session, encode(Request.SET_BACKEND_REQ_FD), [theirs.detach()])
            if take:
                os.close(session.take_backend_fd())
                assert session.take_backend_fd() == -1
        session.close()
