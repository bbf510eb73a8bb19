"""The demo's vsock: a guest answers on a port, and the host asks it by the device's Unix socket.

Promises: the question is one that only the guest could have answered. Never: needs a network between the two.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

from pyvhost.cli.connect import reach
from pyvhost.cli.guests import Guest, GuestError

CID = 3
PORT = 1234


def show_vsock(guest: Guest, path: Path, say: Callable[[str], None]) -> None:
    """Has the guest listen, and asks who is there. GuestError: not the guest."""
    guest.run([sys.executable, "-I", "-c", _ANSWER, str(PORT)])
    say(f"$ pyvhost connect {path.name} {PORT}")
    said = b""
    with reach(str(path), PORT) as sock:
        while data := sock.recv(4096):
            said += data
    for line in said.decode().splitlines():
        say(line)
    if guest.boot_id not in said.decode():
        raise GuestError(f"it is not {guest.name} that answers on port {PORT}, but {said!r}")


# Listens, and when it does, ends: a child goes on.
_ANSWER = """
import os, socket, sys
server = socket.socket(socket.AF_VSOCK)
server.bind((socket.VMADDR_CID_ANY, int(sys.argv[1])))
server.listen()
if os.fork():
    os._exit(0)
os.setsid()
null = os.open("/dev/null", os.O_RDWR)
for fd in (0, 1, 2):
    os.dup2(null, fd)
while True:
    connection, (cid, port) = server.accept()
    with connection, open("/proc/sys/kernel/random/boot_id") as boot_id:
        text = f"{os.uname().sysname} {os.uname().release}, boot {boot_id.read().strip()}, called by CID {cid}"
        connection.sendall(text.encode() + b"\\n")
"""
