"""A control socket: what is asked and answered, and clients that are rude."""

from __future__ import annotations

import json
import os
import socket
import stat
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pyvhost.control import client, protocol
from pyvhost.control.commands import Command
from pyvhost.control.protocol import RefusedError
from pyvhost.control.server import CLIENTS, ControlServer
from pyvhost.host.poller import Poller


def refuse(how: str) -> None:
    if how == "host":
        raise FileNotFoundError(2, "No such file or directory", "/a/disk")
    if how == "user":
        raise ValueError("that can't be")
    raise RuntimeError("a bug")


COMMANDS = {
    each.name: each
    for each in (
        Command("echo", "WORD [WORD]", "says it again", lambda *words: list(words), 1, 2),
        Command("none", "", "says nothing", lambda: None),
        Command("much", "", "says a lot", lambda: "x" * 900_000),
        Command("refuse", "HOW", "does not do it", refuse, 1, 1),
    )
}


class Loop:
    """A control loop in a thread, with a control socket."""

    def __init__(self, path: Path) -> None:
        self.poller = Poller()
        self.path = path
        self.server = ControlServer(self.poller, path, COMMANDS)
        self.thread = threading.Thread(target=self.poller.run)
        self.thread.start()

    def ask(self, *words: str) -> Any:
        return client.ask(str(self.path), words[0], list(words[1:]), 30)

    def raw(self) -> socket.socket:
        sock = socket.socket(socket.AF_UNIX)
        # With a timeout connect(2) would not wait for its turn.
        sock.connect(str(self.path))
        sock.settimeout(30)
        return sock

    def close(self) -> None:
        self.poller.stop()
        self.thread.join()
        self.server.close()
        self.poller.close()


@pytest.fixture
def loop(tmp_path: Path) -> Iterator[Loop]:
    loop = Loop(tmp_path / "vm0.sock.ctl")
    yield loop
    loop.close()
    assert not loop.path.exists()


def line(sock: socket.socket) -> Any:
    data = bytearray()
    while not data.endswith(b"\n"):
        more = sock.recv(65536)
        assert more, "the end came instead"
        data += more
    return json.loads(data)


def test_what_is_asked_is_answered(loop: Loop) -> None:
    assert loop.ask("echo", "héllo\n", "") == ["héllo\n", ""]
    assert loop.ask("none") is None
    assert len(loop.ask("much")) == 900_000


def test_the_vhost_sockets_name_does_as_well(loop: Loop) -> None:
    assert client.ask(str(loop.path).removesuffix(".ctl"), "echo", ["1"]) == ["1"]


def test_it_is_its_owners_alone(loop: Loop) -> None:
    assert stat.S_IMODE(loop.path.stat().st_mode) == 0o600


def test_refusals_say_why(loop: Loop) -> None:
    with pytest.raises(RefusedError, match=r"^/a/disk: No such file or directory$") as caught:
        loop.ask("refuse", "host")
    assert caught.value.errno == 2
    with pytest.raises(RefusedError, match=r"^that can't be$") as caught:
        loop.ask("refuse", "user")
    assert caught.value.errno == 0
    with pytest.raises(RefusedError, match="RuntimeError: a bug"):
        loop.ask("refuse", "bug")
    with pytest.raises(RefusedError, match=r"echo: 3 arguments; it is: echo WORD \[WORD\]"):
        loop.ask("echo", "1", "2", "3")
    with pytest.raises(RefusedError, match="no command 'fly'; there are echo, none, much, refuse"):
        loop.ask("fly")
    assert loop.ask("echo", "still there") == ["still there"]


@pytest.mark.parametrize(
    "said",
    [b"", b"hello", b"[]", b"7", b"{}", b'{"command": 1}', b'{"command": "echo", "arguments": "x"}',
     b'{"command": "echo", "arguments": [1]}', b"[" * 100_000, b"\xff\xfe"],
    ids=lambda said: said[:20].decode("latin-1"),
)  # fmt: skip
def test_lines_that_are_no_request(loop: Loop, said: bytes) -> None:
    with loop.raw() as sock:
        sock.sendall(said + b"\n")
        assert line(sock)["error"]["text"]
        sock.sendall(protocol.request("echo", ["next"]))
        assert line(sock) == {"result": ["next"]}


def test_requests_in_pieces_and_in_heaps(loop: Loop) -> None:
    with loop.raw() as sock:
        for byte in protocol.request("echo", ["slow"]):
            sock.sendall(bytes([byte]))
        assert line(sock) == {"result": ["slow"]}
        sock.sendall(protocol.request("none", []) * 50)
        got = bytearray()
        while got.count(b"\n") < 50:
            got += sock.recv(65536)
        assert got == b'{"result": null}\n' * 50


def test_a_line_without_end_is_the_end(loop: Loop) -> None:
    with loop.raw() as sock:
        try:
            sock.sendall(b"x" * (protocol.LINE_MAX + 200_000))
        except ConnectionError:
            pass
        got = b""
        try:
            while more := sock.recv(65536):
                got += more
        except ConnectionError:
            return  # closed with our bytes unread
        assert b"longer than 1 MiB" in got


def test_who_does_not_read_holds_nobody_up(loop: Loop) -> None:
    with loop.raw() as deaf:
        deaf.sendall(protocol.request("much", []) * 20)
        assert loop.ask("echo", "x") == ["x"]
        for _ in range(20):
            assert len(line_of(deaf)) == 900_000


def line_of(sock: socket.socket) -> str:
    """The next result, read a byte's worth of politeness at a time: lines may come in heaps."""
    data = bytearray()
    while not data.endswith(b"}\n"):
        data += sock.recv(min(65536, max(1, 900_015 - len(data))))
    return str(json.loads(data)["result"])


def test_more_clients_than_places_wait_their_turn(loop: Loop) -> None:
    socks = [loop.raw() for _ in range(CLIENTS + 3)]
    for sock in socks:
        sock.sendall(protocol.request("none", []))
    for sock in socks:
        assert line(sock) == {"result": None}
        sock.close()
    assert loop.ask("none") is None


def test_asking_waits_for_a_place_in_the_queue(tmp_path: Path) -> None:
    path = str(tmp_path / "x")
    with socket.socket(socket.AF_UNIX) as listener, socket.socket(socket.AF_UNIX) as first:
        listener.bind(path)
        listener.listen(0)
        first.connect(path)
        with pytest.raises(OSError, match=r"no answer within 0\.05 s"):
            client.ask(path, "status", [], 0.05)

        def serve() -> None:
            for _ in range(2):
                sock, _ = listener.accept()
                with sock:
                    if sock.recv(100):
                        sock.sendall(protocol.result(7))

        thread = threading.Thread(target=serve)
        asked = threading.Thread(target=lambda: answers.append(client.ask(path, "status", [], 30)))
        answers: list[Any] = []
        asked.start()
        first.shutdown(socket.SHUT_RDWR)
        thread.start()
        asked.join()
        thread.join()
        assert answers == [7]


def test_nobody_there(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="absent: No such file"):
        client.ask(str(tmp_path / "absent"), "status", [])


@pytest.mark.parametrize("said", [b"", b"hello\n", b"{}\n", b'{"error": 7}\n', b"[" * 99_999 + b"\n"])
def test_something_else_answers(tmp_path: Path, said: bytes) -> None:
    path = str(tmp_path / "x")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()

        def serve() -> None:
            sock, _ = listener.accept()
            with sock:
                sock.recv(100)
                sock.sendall(said)

        thread = threading.Thread(target=serve)
        thread.start()
        with pytest.raises(OSError, match="instead of an answer"):
            client.ask(path, "status", [], 30)
        thread.join()


def test_no_answer_is_a_timeout(tmp_path: Path) -> None:
    path = str(tmp_path / "x")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()
        with pytest.raises(OSError, match=r"no answer within 0\.01 s"):
            client.ask(path, "status", [], 0.01)


def test_the_file_stays_if_it_is_another_processs(tmp_path: Path) -> None:
    with Poller() as poller:
        server = ControlServer(poller, tmp_path / "a", COMMANDS)
        os.unlink(tmp_path / "a")
        with ControlServer(poller, tmp_path / "a", COMMANDS):
            server.close()
            assert (tmp_path / "a").exists()
