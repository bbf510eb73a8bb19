"""`pyvhost connect`: a guest's vsock port on standard input and output, for ssh's ProxyCommand and for scripts.

Promises: nothing is on standard output but what the guest sends; the guest's end is the command's end.
Never: imports what serves.
"""

from __future__ import annotations

import argparse
import errno
import os
import socket
import threading
from typing import Final

#: How long the guest may take to answer, seconds; who serves it gives it two.
PATIENCE: Final = 30.0
_CHUNK: Final = 1 << 16
_LINE: Final = 32
_NOBODY: Final = "does `pyvhost vsock --uds-path` serve it?"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `pyvhost connect`."""
    parser.add_argument("path", metavar="PATH", help="what `pyvhost vsock` has as --uds-path")
    parser.add_argument("port", metavar="PORT", type=int, help="a port of the guest")


def run(args: argparse.Namespace) -> int:
    """Connects, and is in between until the guest has ended; the exit status."""
    with reach(args.path, args.port) as sock:
        # What is typed and not sent yet need not keep the command from ending.
        threading.Thread(target=_send, args=(sock,), daemon=True).start()
        try:
            while data := sock.recv(_CHUNK):
                _write(data)
        except ConnectionResetError:
            pass  # the guest has closed with something unread
        except BrokenPipeError:
            # Nobody reads standard output any more; the interpreter must not try again.
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            return 1
    return 0


def reach(path: str, port: int) -> socket.socket:
    """A socket that is the guest's port. OSError: nobody serves there; ConnectionRefusedError: the guest does not."""
    sock = socket.socket(socket.AF_UNIX)
    try:
        sock.settimeout(PATIENCE)
        try:
            sock.connect(path)
        except OSError as error:
            raise OSError(error.errno, f"{error.strerror}; {_NOBODY}", path) from None
        sock.sendall(f"CONNECT {port}\n".encode())
        line = b""
        # What is behind the line is the guest's.
        while not line.endswith(b"\n"):
            more = sock.recv(1)
            if not more or len(line) == _LINE:
                raise OSError(errno.ECONNREFUSED, f"port {port} of the guest: connection refused")
            line += more
        sock.settimeout(None)
    except BaseException:
        sock.close()
        raise
    return sock


def _send(sock: socket.socket) -> None:
    try:
        while data := os.read(0, _CHUNK):
            sock.sendall(data)
        sock.shutdown(socket.SHUT_WR)
    except OSError:
        pass  # what it ended with is read from it


def _write(data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(1, view) :]
