"""Ring states as the specification has them, with a test for each of the mistakes that are usual."""

from __future__ import annotations

import errno
import os

import pytest

from fronts import BIT_30, Talk
from pyvhost.abi import vhost_user as abi
from pyvhost.abi.vhost_user import Request
from pyvhost.vhost_user.payloads import (
    U64,
    VringFile,
    VringState,
)
from recording_device import (
    FEATURES,
    RecordingDevice,
    spare_fd,
)

REPLY_ACK = 1 << abi.PROTOCOL_F_REPLY_ACK


def test_a_ring_runs_once_it_is_both_started_and_enabled_in_either_order(
    talk: Talk, device: RecordingDevice
) -> None:
    talk.say(Request.SET_FEATURES, U64(BIT_30))
    talk.kick(0)
    assert not device.running
    talk.enable(0)
    assert device.running == {0: True}
    talk.enable(1)
    assert device.running == {0: True}
    talk.kick(1)
    assert device.running == {0: True, 1: True}


def test_a_ring_starts_with_set_vring_kick_not_with_the_first_kick(
    talk: Talk, device: RecordingDevice
) -> None:
    talk.enable(0)
    fd = spare_fd()
    talk.say(Request.SET_VRING_KICK, VringFile(0), fds=[fd])
    assert device.running == {0: True}
    os.set_blocking(fd, False)
    with pytest.raises(BlockingIOError):
        os.eventfd_read(fd)


def test_a_ring_starts_without_a_kick_descriptor_too_and_is_polled(
    talk: Talk, device: RecordingDevice
) -> None:
    talk.enable(0)
    talk.say(Request.SET_VRING_KICK, VringFile(0, no_fd=True))
    assert device.called("set_vring_kick") == [(0, -1)]
    assert device.running == {0: True}


def test_without_bit_30_set_features_enables_all_rings(talk: Talk, device: RecordingDevice) -> None:
    talk.say(Request.SET_FEATURES, U64(FEATURES))
    for index in (0, 7):
        talk.kick(index)
    assert device.running == {0: True, 7: True}


def test_without_bit_30_rings_that_started_before_set_features_run_from_then_on(
    talk: Talk, device: RecordingDevice
) -> None:
    talk.kick(3)
    assert not device.running
    talk.say(Request.SET_FEATURES, U64(FEATURES))
    assert device.running == {3: True}


def test_a_repeated_set_features_disables_no_ring(talk: Talk, device: RecordingDevice) -> None:
    talk.say(Request.SET_FEATURES, U64(FEATURES | BIT_30))
    talk.kick(0)
    talk.enable(0)
    talk.say(Request.SET_FEATURES, U64(FEATURES | BIT_30))
    assert device.called("set_vring_running") == [(0, True)]


def test_set_vring_kick_neither_disables_nor_enables(talk: Talk, device: RecordingDevice) -> None:
    talk.enable(0)
    talk.kick(0)
    talk.kick(0)
    talk.kick(1)
    assert device.called("set_vring_running") == [(0, True)]


def test_get_vring_base_stops_the_ring_and_does_not_reset_it(talk: Talk, device: RecordingDevice) -> None:
    talk.say(Request.SET_VRING_BASE, VringState(0, 100))
    talk.kick(0)
    talk.enable(0)
    device.bases[0] = 123
    assert talk.say(Request.GET_VRING_BASE, VringState(0, 0)) == VringState(0, 123)
    assert device.running == {0: False}
    assert talk.say(Request.GET_VRING_BASE, VringState(0, 0)) == VringState(0, 123)
    names = [call[0] for call in device.calls]
    stop = device.calls.index(("set_vring_running", 0, False))
    assert stop < names.index("get_vring_base")
    assert not device.called("set_vring_num")


def test_a_stopped_ring_stays_enabled_and_runs_again_with_the_next_kick(
    talk: Talk, device: RecordingDevice
) -> None:
    talk.enable(0)
    talk.kick(0)
    talk.say(Request.GET_VRING_BASE, VringState(0, 0))
    talk.kick(0)
    assert device.called("set_vring_running") == [(0, True), (0, False), (0, True)]


def test_qemu_disables_before_it_reads_the_base(talk: Talk, device: RecordingDevice) -> None:
    talk.enable(0)
    talk.kick(0)
    talk.enable(0, on=False)
    assert device.running == {0: False}
    assert talk.say(Request.GET_VRING_BASE, VringState(0, 0)) == VringState(0, 0)
    talk.enable(0)
    assert device.running == {0: False}


def test_the_kick_descriptor_that_came_before_enable_is_the_one_that_is_used(
    talk: Talk, device: RecordingDevice
) -> None:
    """A kick before SET_VRING_ENABLE stays in its eventfd: nobody has read it when the ring begins to run."""
    fd = spare_fd()
    talk.say(Request.SET_VRING_KICK, VringFile(0), fds=[fd])
    os.eventfd_write(fd, 1)
    talk.enable(0)
    assert device.called("set_vring_kick") == [(0, fd)]
    assert os.eventfd_read(fd) == 1


def test_set_status_0_stops_the_rings_and_forgets_nothing(talk: Talk, device: RecordingDevice) -> None:
    """QEMU 7.2 sends it before GET_VRING_BASE, and afterwards not its memory again."""
    talk.enable(0)
    talk.kick(0)
    device.bases[0] = 5
    talk.say(Request.SET_STATUS, U64(0xF))
    before = len(device.calls)
    talk.say(Request.SET_STATUS, U64(0))
    assert device.calls[before:] == [("set_vring_running", 0, False)]
    assert talk.say(Request.GET_VRING_BASE, VringState(0, 0)) == VringState(0, 5)
    talk.kick(0)
    assert device.running == {0: True}


def test_reset_owner_disables_all_rings_and_forgets_nothing(talk: Talk, device: RecordingDevice) -> None:
    for index in (0, 1):
        talk.enable(index)
        talk.kick(index)
    talk.say(Request.RESET_OWNER)
    assert device.running == {0: False, 1: False}
    assert device.resets == 0
    talk.enable(0)
    assert device.running == {0: True, 1: False}


def test_reset_device_stops_and_disables_and_keeps_owner_memory_and_connection(
    talk: Talk, device: RecordingDevice
) -> None:
    talk.negotiate(REPLY_ACK)
    talk.say(Request.SET_FEATURES, U64(FEATURES | BIT_30))
    talk.enable(0)
    talk.kick(0)
    talk.say(Request.SET_STATUS, U64(0xF))
    assert talk.say(Request.RESET_DEVICE, need_reply=True) == U64(0)
    assert device.running == {0: False}
    assert device.called("set_features")[-1] == (0,)
    assert device.called("set_vring_base") == [(i, 0) for i in range(8)]
    assert talk.say(Request.GET_STATUS) == U64(0)
    talk.kick(0)
    assert device.running == {0: False}, "it was disabled"
    talk.enable(0)
    assert device.running == {0: True}
    assert device.resets == 0
    assert device.called("set_owner") == [()]


def test_a_ring_that_the_device_cant_run_stays_as_it_was(talk: Talk, device: RecordingDevice) -> None:
    talk.negotiate(REPLY_ACK)
    talk.enable(0)
    device.refuse("set_vring_running", errno.EFAULT, "vring 0: it has no addresses")
    kick = spare_fd()
    assert talk.say(Request.SET_VRING_KICK, VringFile(0), fds=[kick], need_reply=True) == U64(errno.EFAULT)
    assert (talk.session.rings[0].started, talk.session.rings[0].enabled) == (False, True)
    device.refusals.clear()
    talk.kick(0)
    assert device.running == {0: True}
