"""One front end's connection: pieces, faults, hints, the back end's own socket, the trace."""

from __future__ import annotations

import logging
import mmap
import os
import socket
from pathlib import Path

import pytest

from fronts import BIT_30, Front, hello, until, until_resets
from pyvhost.abi import vhost_user as abi
from pyvhost.abi.vhost_user import BackendRequest, Request
from pyvhost.dataplane.plain import load16
from pyvhost.host import memfd
from pyvhost.vhost_user.codec import Stream, decode_one, encode
from pyvhost.vhost_user.describe import TRACE
from pyvhost.vhost_user.hints import private_memory
from pyvhost.vhost_user.payloads import (
    U64,
    MemReg,
    MemTable,
    Region,
    VringAddr,
    VringFile,
    VringState,
)
from pyvhost.vhost_user.server import Server
from recording_device import InertDevice, RecordingDevice, no_fd_leaks, spare_fd

# --- coming and going ------------------------------------------------------------------------------


def test_many_front_ends_come_and_go_and_each_finds_the_device_as_new(
    server: Server, device: RecordingDevice, path: str
) -> None:
    server.listen(path, device)
    for count in range(1, 6):
        front = hello(server, path)
        front.send(encode(Request.SET_VRING_KICK, VringFile(0)), [spare_fd()])
        front.close()
        until_resets(server, device, count)
    assert len(device.called("set_owner")) == 5
    assert device.poller is server.poller


def test_a_message_in_pieces_is_put_together(server: Server, device: RecordingDevice, front: Front) -> None:
    data = encode(Request.SET_VRING_NUM, VringState(1, 256)) + encode(Request.GET_QUEUE_NUM)
    for byte in data[:-1]:
        front.send(bytes([byte]))
        server.poller.run_once(1.0)
    front.send(data[-1:])
    until(server, lambda: front.reply() is not None)
    assert device.called("set_vring_num") == [(1, 256)]


def test_messages_in_one_piece_with_the_descriptors_of_the_last_are_told_apart(
    server: Server, device: RecordingDevice, front: Front
) -> None:
    """The kernel hands out what came without descriptors together with what came after."""
    front.send(
        encode(Request.SET_VRING_NUM, VringState(0, 64)) + encode(Request.SET_VRING_BASE, VringState(0, 0))
    )
    front.send(encode(Request.SET_VRING_CALL, VringFile(0)), [spare_fd()])
    front.send(encode(Request.SET_VRING_ERR, VringFile(0)), [spare_fd()])
    assert front.ask(Request.GET_QUEUE_NUM) == U64(4)
    assert [c[0] for c in device.calls[-4:]] == [
        "set_vring_num",
        "set_vring_base",
        "set_vring_call",
        "set_vring_err",
    ]


def test_a_front_ends_fault_ends_its_connection_alone_and_is_logged_with_its_numbers(
    server: Server, path: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    one, two = RecordingDevice("net0"), RecordingDevice("net1")
    other_path = str(tmp_path / "vm1.sock")
    server.listen(path, one)
    server.listen(other_path, two)
    bad, good = hello(server, path), hello(server, other_path)
    bad.send(encode(Request.SET_VRING_NUM, VringState(99, 256)))
    until(server, bad.gone)
    assert (one.resets, two.resets) == (1, 0)
    assert good.ask(Request.GET_QUEUE_NUM) == U64(4)
    (record,) = [r for r in caplog.records if r.levelno >= logging.ERROR]
    assert "SET_VRING_NUM index=99 num=256: there is no vring 99" in record.getMessage()
    assert "vm0.sock" in record.getMessage()
    assert f"pid {os.getpid()}" in record.getMessage()
    for front in (bad, good):
        front.close()
    # The device that lost its front end serves the next one.
    hello(server, path).close()


@pytest.mark.parametrize(
    ("data", "count", "words"),
    [
        (b"GET / HTTP/1.1\r\n\r\n", 0, "expected 1"),
        (encode(Request.SET_OWNER), 1, "SET_OWNER: 1 descriptors came with it, expected 0"),
        (encode(Request.SET_MEM_TABLE), 9, "SET_MEM_TABLE: size is 0 bytes, expected 8 to 264"),
        (encode(Request.SET_VRING_KICK, VringFile(0)), 200, "200 descriptors came with it, expected 0 to 1"),
    ],
)
def test_garbage_ends_the_connection_and_leaks_nothing(
    server: Server,
    device: RecordingDevice,
    path: str,
    data: bytes,
    count: int,
    words: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    server.listen(path, device)
    front = Front.at(server, path)
    front.send(data, [spare_fd() for _ in range(count)])
    until(server, front.gone)
    front.close()
    assert words in caplog.text
    assert device.resets == 1


def test_a_front_end_that_leaves_within_a_message_is_a_fault_that_says_so(
    server: Server, device: RecordingDevice, path: str, caplog: pytest.LogCaptureFixture
) -> None:
    server.listen(path, device)
    front = hello(server, path)
    front.send(encode(Request.SET_VRING_CALL, VringFile(0))[:13], [spare_fd()])
    front.close()
    until_resets(server, device, 1)
    assert "SET_VRING_CALL: the connection ended after 13 bytes of it, 7 bytes short" in caplog.text


def test_a_fault_of_this_program_ends_the_connection_and_not_the_process(
    server: Server, device: RecordingDevice, path: str, caplog: pytest.LogCaptureFixture
) -> None:
    server.listen(path, device)
    front = hello(server, path)
    device.refusals["set_vring_num"] = ZeroDivisionError("a bug")  # type: ignore[assignment]
    front.send(encode(Request.SET_VRING_NUM, VringState(0, 1)))
    until(server, front.gone)
    front.close()
    assert "ZeroDivisionError" in caplog.text
    hello(server, path).close()


def test_memory_that_is_lost_ends_the_connection_without_another_word(
    server: Server, device: RecordingDevice, path: str, caplog: pytest.LogCaptureFixture
) -> None:
    server.listen(path, device)
    front = hello(server, path)
    device.lost_memory = True
    assert device.memory_lost is not None
    device.memory_lost()
    until(server, front.gone)
    front.close()
    (record,) = [r for r in caplog.records if r.levelno == logging.ERROR]
    assert "memory file became smaller" in record.getMessage()
    device.lost_memory = False
    hello(server, path).close()


def test_a_front_end_that_shrinks_its_memory_loses_its_connection_and_nobody_else_does(
    server: Server, path: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The real device model: what reads the ring next finds zeros, and the loop is told."""
    one, two = InertDevice(), InertDevice()
    other_path = str(tmp_path / "vm1.sock")
    server.listen(path, one)
    server.listen(other_path, two)
    shrinks, stays = Front.at(server, path), Front.at(server, other_path)
    files = [memfd.create("guest", 1 << 20, seals=0) for _ in range(2)]
    for front, file in zip((shrinks, stays), files, strict=True):
        table = MemTable((Region(0, 1 << 20, 0x10000, 0),))
        front.send(encode(Request.SET_FEATURES, U64(1 << 32 | BIT_30)))
        front.send(encode(Request.SET_MEM_TABLE, table), [os.dup(file)])
        front.send(encode(Request.SET_VRING_NUM, VringState(0, 64)))
        front.send(encode(Request.SET_VRING_ADDR, VringAddr(0, 0, 0x10000, 0x12000, 0x11000)))
        front.send(encode(Request.SET_VRING_KICK, VringFile(0)), [spare_fd()])
        front.send(encode(Request.SET_VRING_ENABLE, VringState(0, 1)))
        front.ask(Request.GET_QUEUE_NUM)
    os.ftruncate(files[0], 0)
    assert load16(int(one.places[0].record["avail"]) + 2) == 0
    until(server, shrinks.gone)
    assert "memory file became smaller" in caplog.text
    assert one.vrings[0].place is None
    assert two.vrings[0].place is not None
    assert stays.ask(Request.GET_VRING_BASE, VringState(0, 0)) == VringState(0, 0)
    for front, file in zip((shrinks, stays), files, strict=True):
        front.close()
        os.close(file)
    until(server, lambda: not two.owned)
    for device in (one, two):
        device.close()


def test_a_device_that_cant_be_reset_does_not_keep_the_next_front_end_out(
    server: Server, device: RecordingDevice, path: str, caplog: pytest.LogCaptureFixture
) -> None:
    server.listen(path, device)
    device.refuse("reset")
    hello(server, path).close()
    until(server, lambda: device.called("reset"))
    device.refusals.clear()
    hello(server, path).close()


@pytest.mark.parametrize(
    ("last", "words"),
    [
        (None, "it left without a word"),
        (encode(Request.SET_OWNER), "it left before SET_FEATURES"),
        (encode(Request.SET_FEATURES, U64(BIT_30)), "memory-backend-memfd"),
    ],
)
def test_a_front_end_that_leaves_early_draws_a_hint(
    server: Server,
    device: RecordingDevice,
    path: str,
    last: bytes | None,
    words: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    server.listen(path, device)
    front = Front.at(server, path)
    if last:
        front.send(last)
    front.close()
    until_resets(server, device, 1)
    (record,) = [r for r in caplog.records if r.levelno == logging.WARNING]
    assert words in record.getMessage()


@pytest.mark.parametrize("private", [True, False])
def test_memory_that_the_front_end_maps_privately_draws_a_hint(
    server: Server, front: Front, private: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """The front end is this very process; QEMU does so with share=off."""
    fd = memfd.create("guest", 8192)
    with mmap.mmap(fd, 8192, flags=mmap.MAP_PRIVATE if private else mmap.MAP_SHARED):
        for start in (0, 4096):
            front.send(encode(Request.ADD_MEM_REG, MemReg(Region(start, 4096, start, start))), [os.dup(fd)])
        front.ask(Request.GET_QUEUE_NUM)
    os.close(fd)
    hints = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert len(hints) == int(private)
    assert all("share=on" in hint for hint in hints)


def test_a_front_end_that_cant_be_looked_at_draws_no_hint() -> None:
    fd = memfd.create("guest", 4096)
    assert private_memory(0, [fd]) == ""
    assert private_memory(os.getpid(), [fd]) == ""
    os.close(fd)


# --- the back end's own socket ---------------------------------------------------------------------


def test_a_change_of_the_configuration_reaches_the_front_end_from_any_thread(
    server: Server, device: RecordingDevice, front: Front
) -> None:
    bits = 1 << abi.PROTOCOL_F_CONFIG | 1 << abi.PROTOCOL_F_BACKEND_REQ | 1 << abi.PROTOCOL_F_REPLY_ACK
    theirs, ours = socket.socketpair()
    theirs.setblocking(False)
    front.send(encode(Request.SET_PROTOCOL_FEATURES, U64(bits)))
    front.send(encode(Request.SET_BACKEND_REQ_FD), [ours.detach()])
    front.send(encode(Request.SET_VRING_KICK, VringFile(0)), [spare_fd()])
    front.ask(Request.GET_QUEUE_NUM)

    news: list[bytes] = []

    def told() -> bool:
        try:
            news.append(theirs.recv(100))
        except BlockingIOError:
            return False
        return True

    for _ in range(3):
        assert device.config_changed is not None
        device.config_changed()
        until(server, told)
        message = decode_one(Stream.BACKEND_REQUEST, news[-1])
        assert (message.name, message.need_reply) == ("CONFIG_CHANGE_MSG", True)
        theirs.sendall(encode(BackendRequest.CONFIG_CHANGE_MSG, U64(0), flags=abi.FLAG_REPLY))
    theirs.close()
    assert front.ask(Request.GET_QUEUE_NUM) == U64(4)
    change = device.config_changed
    assert change is not None
    change()
    assert front.ask(Request.GET_QUEUE_NUM) == U64(4)


def test_nonsense_on_the_back_ends_own_socket_closes_it_alone(
    server: Server, device: RecordingDevice, front: Front, caplog: pytest.LogCaptureFixture
) -> None:
    theirs, ours = socket.socketpair()
    front.send(encode(Request.SET_BACKEND_REQ_FD), [ours.detach()])
    front.ask(Request.GET_QUEUE_NUM)
    theirs.sendall(b"x" * 12)
    until(server, lambda: "SET_BACKEND_REQ_FD" in caplog.text)
    assert front.ask(Request.GET_QUEUE_NUM) == U64(4)
    assert theirs.recv(1) == b""
    theirs.close()


def test_the_back_ends_own_socket_is_closed_with_the_connection(
    server: Server, device: RecordingDevice, path: str
) -> None:
    server.listen(path, device)
    front = hello(server, path)
    theirs, ours = socket.socketpair()
    theirs.setblocking(False)
    front.send(encode(Request.SET_BACKEND_REQ_FD), [ours.detach()])
    front.ask(Request.GET_QUEUE_NUM)
    front.close()
    until_resets(server, device, 1)
    assert theirs.recv(1) == b""
    theirs.close()


def test_a_message_under_way_when_the_server_ends_leaves_nothing_open(
    device: RecordingDevice, path: str
) -> None:
    with no_fd_leaks():
        with Server() as server:
            server.listen(path, device)
            front = hello(server, path)
            front.send(encode(Request.SET_VRING_CALL, VringFile(0))[:15], [spare_fd()])
            server.poller.run_once(1.0)
        front.close()
    assert device.resets == 1


def test_the_trace_has_both_sides(
    server: Server, device: RecordingDevice, path: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(TRACE)
    server.listen(path, device)
    hello(server, path).close()
    lines = [r.getMessage() for r in caplog.records if r.levelno == TRACE]
    assert [line.split("): ", 1)[1].split(" 0x")[0] for line in lines] == [
        "front end: GET_FEATURES",
        "back end: GET_FEATURES",
    ]
