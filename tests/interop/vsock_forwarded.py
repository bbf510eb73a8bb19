"""Run in a guest with AF_VSOCK's loopback: services there, `pyvhost vsock --forward`, a driver that asks for them.

The guest is the host here: `pyvhost vsock` runs in it, and so does what stands for a guest of its own. Prints one
JSON object: what came of each port. Never: asks for AF_VSOCK where it was not told to run.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from pyvhost.abi import virtio_vsock as abi
from pyvhost.driver.memory import MIB, GuestMemory
from pyvhost.driver.vhost_user import VhostUserFrontend
from pyvhost.driver.vsock import VsockDriver

STREAM, SEQPACKET, NOBODY, APART = 5000, 5001, 5002, 6000
PATIENCE = 60.0
LENGTH = 300_000


def serve(port: int, kind: int, peers: dict[int, object]) -> None:
    """A service that sends back what it gets until there is no more, then what it has counted, to its one client."""
    listener = socket.socket(socket.AF_VSOCK, kind)
    listener.bind((socket.VMADDR_CID_ANY, port))
    listener.listen(1)

    def run() -> None:
        sock, peer = listener.accept()
        peers[port] = peer[0]
        total = 0
        with sock:
            while part := sock.recv(1 << 16):
                total += len(part)
                sock.sendall(part)
            sock.sendall(b"%d" % total)

    threading.Thread(target=run, daemon=True).start()


def wait_for(path: Path) -> None:
    end = time.monotonic() + PATIENCE
    while not path.exists():
        assert time.monotonic() < end, "the back end is not there"
        time.sleep(0.05)


def stream(driver: VsockDriver) -> str:
    """There and back, and to the end: the client's half is closed first."""
    sock = driver.connect(STREAM)
    data = os.urandom(LENGTH)
    back = b""
    for at in range(0, LENGTH, 50_000):
        sock.send(data[at : at + 50_000])
        back += sock.recv_exactly(50_000)
    sock.shutdown(abi.SHUTDOWN_SEND)
    count = b""
    while part := sock.recv(100):
        count += part
    return "whole" if back == data and count == b"%d" % LENGTH else f"{back == data}, {count!r}"


def messages(driver: VsockDriver) -> list[int]:
    """The lengths of messages that came back."""
    sock = driver.connect(SEQPACKET, type=abi.TYPE_SEQPACKET)
    lengths = []
    for length in (1, 4096, 60_000):
        sock.send(bytes(length))
        message = sock.recv_message()
        lengths.append(len(message.data) if message is not None else -1)
    sock.shutdown(abi.SHUTDOWN_SEND)
    return lengths


def refused(driver: VsockDriver, port: int) -> str:
    try:
        driver.connect(port)
    except ConnectionRefusedError:
        return "refused"
    return "connected"


def main() -> None:
    """Does all of it."""
    peers: dict[int, object] = {}
    serve(STREAM, socket.SOCK_STREAM, peers)
    serve(SEQPACKET, socket.SOCK_SEQPACKET, peers)
    serve(APART, socket.SOCK_STREAM, peers)
    path = Path(tempfile.mkdtemp()) / "vsock"
    command = [
        sys.executable,
        "-m",
        "pyvhost.cli.main",
        "vsock",
        "--socket-path",
        str(path),
        "--guest-cid",
        "42",
    ]
    with subprocess.Popen([*command, "--forward", f"{STREAM}-{NOBODY}"]) as child:
        try:
            wait_for(path)
            with (
                VhostUserFrontend.connect(path, timeout=PATIENCE) as front,
                GuestMemory(16 * MIB) as memory,
                VsockDriver(front, memory, timeout=PATIENCE) as driver,
            ):
                driver.start()
                found = {
                    "stream": stream(driver),
                    "messages": messages(driver),
                    "nobody": refused(driver, NOBODY),
                    "apart": refused(driver, APART),
                    "clients": sorted(set(map(str, peers.values()))),
                }
        finally:
            child.send_signal(signal.SIGTERM)
    print(json.dumps({**found, "status": child.returncode}))


if __name__ == "__main__":
    main()
