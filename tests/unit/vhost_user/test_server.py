"""The server: who is let in, who is turned away, where it listens and dials, and how it ends."""

from __future__ import annotations

import errno
import logging
import os
import signal
import socket
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from fronts import BIT_30, Front, hello, until, until_resets
from pyvhost.abi.vhost_user import Request
from pyvhost.host.poller import Poller
from pyvhost.vhost_user import server as server_module
from pyvhost.vhost_user.codec import Message, encode
from pyvhost.vhost_user.payloads import (
    U64,
    Config,
    VringState,
)
from pyvhost.vhost_user.server import Server
from recording_device import FEATURES, RecordingDevice, is_open, no_fd_leaks, spare_fd

# --- one at a time ---------------------------------------------------------------------------------


def test_a_second_front_end_is_turned_away_with_a_line_that_names_both(
    server: Server, device: RecordingDevice, path: str, front: Front, caplog: pytest.LogCaptureFixture
) -> None:
    child = subprocess.Popen(
        [sys.executable, "-c", f"import socket; s = socket.socket(1); s.connect({path!r}); s.recv(1)"]
    )
    until(server, lambda: child.poll() is not None)
    (record,) = [r for r in caplog.records if "turned away" in r.getMessage()]
    assert f"(pid {child.pid}) turned away" in record.getMessage()
    assert f"(pid {os.getpid()}) has net0" in record.getMessage()
    assert front.ask(Request.GET_QUEUE_NUM) == U64(4)


def test_the_end_of_one_that_leaves_is_dealt_with_before_the_next_is_judged(
    server: Server, device: RecordingDevice, path: str
) -> None:
    """Detach and attach again before the loop has looked: both have happened when it does."""
    server.listen(path, device)
    for _ in range(20):
        before = device.resets
        leaving = hello(server, path)
        leaving.send(encode(Request.SET_VRING_NUM, VringState(0, 256)) * 100)
        leaving.close()
        coming = Front.at(server, path)
        assert coming.ask(Request.GET_FEATURES) == U64(FEATURES | BIT_30)
        assert device.resets == before + 1
        coming.close()
        until_resets(server, device, before + 2)


def test_a_front_end_that_reads_nothing_is_not_read_from_and_others_are_served(
    server: Server, device: RecordingDevice, path: str, tmp_path: Path
) -> None:
    other_path = str(tmp_path / "vm1.sock")
    server.listen(path, device)
    server.listen(other_path, RecordingDevice("net1"))
    deaf, other = hello(server, path), hello(server, other_path)
    asked = encode(Request.GET_CONFIG, Config(0, 0, bytes(256)))
    sent = 0
    stuck = False
    while not stuck:
        try:
            sent += deaf.sock.send(asked)
        except BlockingIOError:
            # Full: if the loop takes no more of it either, the back end waits for its replies to be read.
            before = len(device.called("get_config"))
            for _ in range(5):
                server.poller.run_once(0)
            stuck = len(device.called("get_config")) == before
        server.poller.run_once(0)
    assert other.ask(Request.GET_QUEUE_NUM) == U64(4)
    # It reads after all: all that it asked is answered, in order.
    answered: list[Message] = []

    def all_answered() -> bool:
        while (message := deaf.reply()) is not None:
            answered.append(message)
        return len(answered) == sent // len(asked)

    until(server, all_answered)
    deaf.close()
    other.close()
    until_resets(server, device, 1)


def test_a_front_end_that_leaves_with_its_replies_unread_is_let_go(
    server: Server, device: RecordingDevice, path: str
) -> None:
    server.listen(path, device)
    deaf = hello(server, path)
    asked = encode(Request.GET_CONFIG, Config(0, 0, bytes(256)))
    try:
        while True:
            deaf.sock.send(asked)
    except BlockingIOError:
        pass
    for _ in range(50):
        server.poller.run_once(0)
    deaf.close()
    until_resets(server, device, 1)


# --- socket files ----------------------------------------------------------------------------------


def test_a_socket_file_that_nobody_listens_on_is_replaced(
    server: Server, device: RecordingDevice, path: str
) -> None:
    stale = socket.socket(socket.AF_UNIX)
    stale.bind(path)
    stale.close()
    server.listen(path, device)
    hello(server, path).close()


def test_a_socket_that_somebody_listens_on_is_left_alone_and_named(
    server: Server, device: RecordingDevice, path: str
) -> None:
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(path)
        other.listen()
        with pytest.raises(OSError, match=rf"pid {os.getpid()}\) listens there already") as caught:
            server.listen(path, device)
        assert caught.value.errno == errno.EADDRINUSE
        assert os.path.exists(path)


def test_a_file_that_is_no_socket_is_left_alone(server: Server, device: RecordingDevice, path: str) -> None:
    Path(path).write_text("precious")
    with pytest.raises(OSError, match="exists, and is not a socket") as caught:
        server.listen(path, device)
    assert caught.value.errno == errno.EEXIST
    assert Path(path).read_text() == "precious"


def test_a_name_that_is_too_long_is_refused_with_the_limit(server: Server, device: RecordingDevice) -> None:
    for way in (server.listen, server.connect):
        with pytest.raises(OSError, match="107 bytes at most, this one 200") as caught:
            way("/" + "x" * 199, device)
        assert caught.value.errno == errno.ENAMETOOLONG


def test_a_folder_that_isnt_there_is_named(server: Server, device: RecordingDevice, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere/vm0\.sock"):
        server.listen(tmp_path / "nowhere" / "vm0.sock", device)


def test_the_socket_file_goes_with_the_server(device: RecordingDevice, path: str) -> None:
    with Server() as server:
        server.listen(path, device)
        assert os.path.exists(path)
    assert not os.path.exists(path)


def test_a_socket_file_that_has_become_somebody_elses_stays(device: RecordingDevice, path: str) -> None:
    with Server() as server:
        server.listen(path, device)
        os.unlink(path)
        with socket.socket(socket.AF_UNIX) as other:
            other.bind(path)
    assert os.path.exists(path)


# --- dialling, and sockets handed over -------------------------------------------------------------


def test_a_front_end_that_listens_is_dialled_and_dialled_again_when_it_comes_back(
    server: Server, device: RecordingDevice, path: str
) -> None:
    server.connect(path, device)
    server.poller.run_once(1.0)
    for count in range(2):
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(path)
            listener.listen()
            listener.setblocking(False)
            accepted: list[socket.socket] = []

            def arrived(listener: socket.socket = listener, accepted: list[socket.socket] = accepted) -> bool:
                try:
                    accepted.append(listener.accept()[0])
                except BlockingIOError:
                    return False
                return True

            until(server, arrived)
            front = Front(server, accepted[0])
            assert front.ask(Request.GET_FEATURES) == U64(FEATURES | BIT_30)
            front.close()
        until_resets(server, device, count + 1)
        os.unlink(path)


def test_why_nobody_is_reached_is_said_once_not_with_each_attempt(
    server: Server,
    device: RecordingDevice,
    path: str,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(server_module, "DIAL_LONGEST", 0.0)
    server.connect(path, device)
    for _ in range(10):
        server.poller.run_once(1.0)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        for _ in range(10):
            server.poller.run_once(1.0)
    assert [r.getMessage().split(path)[1] for r in caplog.records] == [
        ": no front end listens (No such file or directory); dialling until one does",
        ": no front end listens (Connection refused); dialling until one does",
    ]


def test_a_connected_socket_that_was_handed_over_is_served_and_its_end_is_the_servers(
    device: RecordingDevice,
) -> None:
    with no_fd_leaks():
        ours, theirs = socket.socketpair()
        server = Server()
        server.serve_fd(ours.detach(), device)
        front = Front(server, theirs)
        assert front.ask(Request.GET_QUEUE_NUM) == U64(4)
        front.close()
        server.run()
    assert device.resets == 1


def test_a_listening_socket_that_was_handed_over_serves_one_after_another_and_keeps_its_file(
    device: RecordingDevice, path: str
) -> None:
    with no_fd_leaks(), Server() as server:
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(path)
        listener.listen()
        server.serve_fd(listener.detach(), device)
        for count in (1, 2):
            hello(server, path).close()
            until_resets(server, device, count)
    assert os.path.exists(path)


def test_a_folder_that_is_not_there_is_named(server: Server, device: RecordingDevice, tmp_path: Path) -> None:
    path = tmp_path / "absent" / "vm0.sock"
    with pytest.raises(FileNotFoundError, match=f"{path}: there is no folder {path.parent}$"):
        server.listen(str(path), device)


def test_a_descriptor_that_is_not_open_is_named(server: Server, device: RecordingDevice) -> None:
    # No limit on open files lets a number be so high.
    with pytest.raises(OSError, match="descriptor 2147483647: ") as caught:
        server.serve_fd(2**31 - 1, device)
    assert caught.value.errno == errno.EBADF


def test_a_descriptor_that_is_no_unix_socket_is_refused_and_stays_the_callers(
    server: Server, device: RecordingDevice
) -> None:
    with socket.socket(socket.AF_INET) as inet:
        with pytest.raises(OSError, match="is not a Unix stream socket"):
            server.serve_fd(inet.fileno(), device)
        assert is_open(inet.fileno())
    fd = spare_fd()
    with pytest.raises(OSError, match=f"descriptor {fd}: .*socket"):
        server.serve_fd(fd, device)
    assert is_open(fd)
    os.close(fd)


# --- the end ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_server_with_a_front_end_attached(number: signal.Signals, path: str) -> None:
    program = textwrap.dedent(
        f"""
        import sys
        sys.path[:0] = {sys.path!r}
        from recording_device import RecordingDevice
        from pyvhost.vhost_user.server import Server
        device = RecordingDevice()
        server = Server()
        server.listen({path!r}, device)
        print("ready", flush=True)
        server.run()
        print("resets", device.resets, flush=True)
        """
    )
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n"
        with socket.socket(socket.AF_UNIX) as front:
            front.connect(path)
            front.sendall(encode(Request.GET_FEATURES))
            assert len(front.recv(100)) == 20
            child.send_signal(number)
            assert child.stdout.readline() == "resets 1\n"
    assert child.returncode == 0
    assert not os.path.exists(path)


def test_a_shortage_of_descriptors_pauses_the_listening_socket_and_ends_nothing(path: str) -> None:
    """In a process of its own: the limit is the process's."""
    program = textwrap.dedent(
        f"""
        import resource, socket, sys, logging
        sys.path[:0] = {sys.path!r}
        logging.basicConfig(stream=sys.stdout, format="%(message)s")
        from recording_device import RecordingDevice
        from pyvhost.vhost_user import server as server_module
        server_module.SHORTAGE_PAUSE = 0.0
        server = server_module.Server()
        server.listen({path!r}, RecordingDevice())
        front = socket.socket(socket.AF_UNIX)
        front.connect({path!r})
        limit = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (front.fileno() + 1, limit[1]))
        server.poller.run_once(1)
        resource.setrlimit(resource.RLIMIT_NOFILE, limit)
        front.sendall(bytes.fromhex("010000000100000000000000"))
        front.settimeout(0)
        answer = b""
        while not answer:
            server.poller.run_once(1)
            try:
                answer = front.recv(100)
            except BlockingIOError:
                pass
        print("answered", len(answer))
        """
    )
    done = subprocess.run([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, check=True)
    assert [line.split(": ", 1)[1] for line in done.stdout.splitlines()[:-1]] == [
        "a front end can't be let in: Too many open files"
    ]
    assert done.stdout.endswith("answered 20\n")


def test_more_descriptors_than_may_be_open_end_the_connection(path: str) -> None:
    program = textwrap.dedent(
        f"""
        import os, resource, socket, sys, logging
        sys.path[:0] = {sys.path!r}
        logging.basicConfig(stream=sys.stdout, format="%(message)s")
        from recording_device import RecordingDevice
        from pyvhost.vhost_user.server import Server
        device = RecordingDevice()
        server = Server()
        server.listen({path!r}, device)
        front = socket.socket(socket.AF_UNIX)
        front.connect({path!r})
        server.poller.run_once(1)
        socket.send_fds(front, [bytes.fromhex("010000000100000000000000")], [1] * 8)
        open_now = max(int(fd) for fd in os.listdir("/proc/self/fd"))
        hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (open_now + 2, hard))
        while not device.resets:
            server.poller.run_once(1)
        """
    )
    done = subprocess.run([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, check=True)
    assert "more descriptors came than" in done.stdout


def test_a_device_that_can_not_be_had_leaves_no_socket(server: Server, path: str) -> None:
    class Absent(RecordingDevice):
        def attach(self, poller: Poller, /) -> None:
            raise FileNotFoundError(errno.ENOENT, "no such backend")

    with pytest.raises(FileNotFoundError, match="no such backend"):
        server.listen(path, Absent("net0"))
    assert not os.path.exists(path)
