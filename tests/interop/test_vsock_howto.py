"""What docs/howto/vsock.md has its readers do, in a UML guest: a shell, a service of the host, a notification."""

from __future__ import annotations

import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from interop.conftest import Served, SocketDevice
from pyvhost.cli.guests import UmlGuest
from requirements import need_program

PATIENCE = 60.0


@pytest.fixture(scope="module")
def device(served: Served) -> SocketDevice:
    (device,) = served.start_vsock("howto", 42)
    served.wait()
    return device


@pytest.fixture(scope="module")
def guest(device: SocketDevice) -> Iterator[UmlGuest]:
    need_program("linux.uml", package="user-mode-linux")
    with UmlGuest(vsock=device.socket, memory_mib=128) as guest:
        guest.run("mkdir -p /dev/pts && mount -t devpts devpts /dev/pts")
        yield guest


def test_a_shell_of_the_guest(device: SocketDevice, guest: UmlGuest) -> None:
    need_program("socat")
    guest.run("socat VSOCK-LISTEN:1023,fork EXEC:/bin/sh,pty,stderr,setsid,ctty,echo=0 >/dev/null 2>&1 &")
    command = [sys.executable, "-m", "pyvhost.cli.main", "connect", str(device.uds), "1023"]
    pipe = subprocess.PIPE
    # In the background it need not listen yet.
    for _ in range(100):
        with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe) as child:
            assert child.stdin is not None
            assert child.stdout is not None
            assert child.stderr is not None
            child.stdin.write(b"cat /proc/sys/kernel/ostype /proc/$$/comm; tty; exit\n")
            child.stdin.flush()
            said = child.stdout.read()
            if child.wait(PATIENCE) == 0:
                break
            assert b"refused" in child.stderr.read()
    words = said.split()
    assert b"Linux" in words
    assert any(word.startswith(b"/dev/pts/") for word in words)


def test_a_service_of_the_host_for_the_guest(device: SocketDevice, guest: UmlGuest) -> None:
    path = Path(f"{device.uds}_80")
    command = [need_program("socat"), f"UNIX-LISTEN:{path}", "EXEC:'echo hello, guest'"]
    with subprocess.Popen(command) as child:
        while not path.exists():
            assert child.poll() is None
        said = guest.run("socat -u VSOCK-CONNECT:2:80,retry=50,interval=0.1 -", timeout=PATIENCE).output
        assert said.strip() == "hello, guest"
        assert child.wait(PATIENCE) == 0


@pytest.mark.parametrize(
    ("asked", "taken", "failed", "port"),
    [
        pytest.param("SOCK_DGRAM SOCK_SEQPACKET", socket.SOCK_SEQPACKET, ["SOCK_DGRAM"], 9999, id="vsock"),
        pytest.param("SOCK_STREAM", socket.SOCK_STREAM, [], 9998, id="vsock-stream"),
    ],
)
def test_a_notification_as_systemd_sends_it(
    device: SocketDevice, guest: UmlGuest, asked: str, taken: socket.SocketKind, failed: list[str], port: int
) -> None:
    """A datagram socket can't be had, and then SOCK_SEQPACKET is taken, or what was named; from a port below 1024."""
    program = f"""
import socket
for name in "{asked}".split():
    try:
        sock = socket.socket(socket.AF_VSOCK, getattr(socket, name))
        sock.bind((socket.VMADDR_CID_ANY, 1000))
        sock.connect((socket.VMADDR_CID_HOST, {port}))
        break
    except OSError as error:
        print(name)
sock.send(b"READY=1\\nSTATUS=up")
"""
    with device.listen(port, taken) as listener:
        listener.settimeout(PATIENCE)
        said = guest.run([sys.executable, "-I", "-c", program], timeout=PATIENCE).output
        assert said.split() == failed
        notified, _ = listener.accept()
        with notified:
            notified.settimeout(PATIENCE)
            assert notified.recv(4096) == b"READY=1\nSTATUS=up"
            assert notified.recv(4096) == b""
