"""The host's own services, dialled by a stand-in: nothing here touches the AF_VSOCK of the machine."""

from __future__ import annotations

import errno
import logging
import os
import socket
from collections.abc import Callable, Iterator

import pytest

from pyvhost.abi import virtio_vsock as abi
from pyvhost.vsock.ends.forward import ForwardEnds
from vsock_host import PATIENCE, PlainHost, shut

RESPONSE = (abi.OP_RESPONSE, 0)
RST = (abi.OP_RST, 0)


@pytest.fixture
def service() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(PATIENCE)
        yield listener


def dialling(to: tuple[str, int], asked: list[tuple[int, int]]) -> Callable[[int, int], socket.socket]:
    """Dials a TCP port, whatever is asked for: a connection that takes its time, as that of AF_VSOCK."""

    def dial(type_: int, port: int) -> socket.socket:
        asked.append((type_, port))
        sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        assert sock.connect_ex(to) in (0, errno.EINPROGRESS)
        return sock

    return dial


def test_a_forwarded_port_is_the_hosts(service: socket.socket) -> None:
    asked: list[tuple[int, int]] = []
    with PlainHost(ForwardEnds([22, 80], dial=dialling(service.getsockname(), asked))) as host:
        key = host.connected(80)
        assert asked == [(abi.TYPE_STREAM, 80)]
        sock, _ = service.accept()
        with sock:
            os.write(host.fd_of(key), b"hello")
            assert sock.recv(100) == b"hello"
            shut(host, [key])
            assert sock.recv(100) == b""


def test_other_ports_and_other_cids_are_not_dialled(service: socket.socket) -> None:
    asked: list[tuple[int, int]] = []
    with PlainHost(ForwardEnds([22], dial=dialling(service.getsockname(), asked))) as host:
        assert host.answer(host.request(23)) == RST
        assert host.answer(host.request(22, cid=1)) == RST
    assert asked == []


def test_a_port_that_nobody_listens_on(service: socket.socket) -> None:
    nowhere = service.getsockname()
    service.close()
    with PlainHost(ForwardEnds([22], dial=dialling(nowhere, []))) as host:
        assert host.answer(host.request(22)) == RST


@pytest.mark.parametrize("code", [errno.ENODEV, errno.EAFNOSUPPORT, errno.ECONNREFUSED, errno.EMFILE])
def test_a_host_that_has_none_says_so_once(code: int, caplog: pytest.LogCaptureFixture) -> None:
    def dial(type_: int, port: int) -> socket.socket:
        raise OSError(code, os.strerror(code))

    with caplog.at_level(logging.WARNING), PlainHost(ForwardEnds([22], dial=dial)) as host:
        for _ in range(3):
            assert host.answer(host.request(22)) == RST
    said = [record for record in caplog.records if os.strerror(code) in record.message]
    assert len(said) == (code != errno.ECONNREFUSED)


def test_who_gives_up_leaves_nothing() -> None:
    left: list[socket.socket] = []

    def dial(type_: int, port: int) -> socket.socket:
        # Full, so that it never becomes writable: a connection that is not made.
        ours, theirs = socket.socketpair()
        left.append(theirs)
        ours.setblocking(False)
        try:
            while True:
                ours.send(bytes(4096))
        except BlockingIOError:
            return ours

    with PlainHost(ForwardEnds([22], dial=dial)) as host:
        for how in ("time", "RST"):
            key = host.request(22)
            if how == "time":
                host.now += 3
                host.connections.tick()
                assert host.answer(key) == RST
            else:
                host.says(key, abi.OP_RST)
        host.request(22)
    for sock in left:
        while sock.recv(1 << 20):
            pass
        sock.close()
    assert len(left) == 3
