"""The back end's own requests: what the session has to say, and when it may."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Iterator

import pytest

from fronts import Talk
from pyvhost.abi import vhost_user as abi
from pyvhost.abi.vhost_user import BackendRequest, Request
from pyvhost.vhost_user.backend import SessionError
from pyvhost.vhost_user.codec import Message, Stream, decode_one, encode
from pyvhost.vhost_user.payloads import (
    U64,
    VringState,
)
from recording_device import (
    RecordingDevice,
    no_fd_leaks,
    spare_fd,
)

REPLY_ACK = 1 << abi.PROTOCOL_F_REPLY_ACK
CONFIG = 1 << abi.PROTOCOL_F_CONFIG
BACKEND_REQ = 1 << abi.PROTOCOL_F_BACKEND_REQ


# --- the back end's own requests -------------------------------------------------------------------


class Channel:
    """A session with a socket of SET_BACKEND_REQ_FD, and what is told on it."""

    def __init__(self, talk: Talk, bits: int) -> None:
        self.talk = talk
        talk.negotiate(bits)
        self.theirs, ours = socket.socketpair()
        talk.say(Request.SET_BACKEND_REQ_FD, fds=[ours.detach()])
        self.fd = talk.session.take_backend_fd()
        self.roused = 0
        talk.session.on_backend_output = self.rouse

    def rouse(self) -> None:
        self.roused += 1

    def told(self) -> list[Message]:
        """Take what the session has to say, as whoever sends it does."""
        messages = []
        while self.talk.session.backend_output:
            data = bytes(self.talk.session.backend_output)
            self.talk.session.backend_output.clear()
            messages.append(decode_one(Stream.BACKEND_REQUEST, data))
            self.talk.session.announce()
        return messages

    def acknowledge(self, value: int = 0) -> None:
        data = encode(BackendRequest.CONFIG_CHANGE_MSG, U64(value), flags=abi.FLAG_REPLY)
        self.talk.session.receive_backend_reply(decode_one(Stream.BACKEND_REPLY, data))

    def close(self) -> None:
        self.theirs.close()
        os.close(self.fd)


@pytest.fixture
def channel(talk: Talk) -> Iterator[Channel]:
    channel = Channel(talk, CONFIG | BACKEND_REQ | REPLY_ACK)
    yield channel
    channel.close()


def change(device: RecordingDevice) -> None:
    assert device.config_changed is not None
    device.config_changed()


def test_a_change_of_the_configuration_is_told_and_its_answer_awaited(
    talk: Talk, device: RecordingDevice, channel: Channel
) -> None:
    talk.kick(0)
    change(device)
    assert channel.roused == 1
    (message,) = channel.told()
    assert (message.name, message.need_reply) == ("CONFIG_CHANGE_MSG", True)
    change(device)
    change(device)
    assert channel.told() == []
    channel.acknowledge()
    assert len(channel.told()) == 1
    channel.acknowledge()
    assert channel.told() == []


def test_a_suspended_front_end_is_told_when_a_ring_starts(
    talk: Talk, device: RecordingDevice, channel: Channel
) -> None:
    change(device)
    assert channel.told() == []
    talk.kick(0)
    assert len(channel.told()) == 1
    channel.acknowledge()
    talk.say(Request.GET_VRING_BASE, VringState(0, 0))
    change(device)
    assert channel.told() == []


def test_without_reply_ack_no_answer_is_awaited(talk: Talk, device: RecordingDevice) -> None:
    channel = Channel(talk, CONFIG | BACKEND_REQ)
    talk.kick(0)
    for _ in range(2):
        change(device)
        (message,) = channel.told()
        assert not message.need_reply
    channel.close()


def test_what_was_not_sent_yet_is_not_said_twice(talk: Talk, device: RecordingDevice) -> None:
    channel = Channel(talk, CONFIG | BACKEND_REQ)
    talk.kick(0)
    for _ in range(1000):
        change(device)
    assert len(talk.session.backend_output) == 12
    channel.close()


def test_without_config_or_without_the_socket_nothing_is_told(talk: Talk, device: RecordingDevice) -> None:
    talk.negotiate(CONFIG | BACKEND_REQ)
    talk.kick(0)
    change(device)
    assert not talk.session.backend_output
    channel = Channel(talk, BACKEND_REQ)
    change(device)
    assert channel.told() == []
    channel.close()


def test_nothing_is_told_once_nobody_listens(talk: Talk, device: RecordingDevice, channel: Channel) -> None:
    talk.kick(0)
    talk.session.backend_channel_closed()
    change(device)
    assert channel.told() == []


def test_a_refused_announcement_is_logged(
    talk: Talk, device: RecordingDevice, channel: Channel, caplog: pytest.LogCaptureFixture
) -> None:
    talk.kick(0)
    change(device)
    channel.told()
    with caplog.at_level(logging.WARNING):
        channel.acknowledge(1)
    assert "refused CONFIG_CHANGE_MSG (1)" in caplog.text


def test_the_back_ends_socket_must_be_one(talk: Talk) -> None:
    with pytest.raises(SessionError, match=r"SET_BACKEND_REQ_FD.*is not a socket"):
        talk.say(Request.SET_BACKEND_REQ_FD, fds=[spare_fd()])


def test_a_socket_that_nobody_took_is_closed_with_its_successor_and_with_the_session(
    device: RecordingDevice,
) -> None:
    with no_fd_leaks():
        talk = Talk(device)
        for _ in range(2):
            ours, theirs = socket.socketpair()
            ours.close()
            talk.say(Request.SET_BACKEND_REQ_FD, fds=[theirs.detach()])
        talk.session.close()
