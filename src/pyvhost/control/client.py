"""The asking side of a control socket.

Promises: one request, one reply, and never longer than the timeout. Never: imports the data plane.
"""

from __future__ import annotations

import errno
import os
import socket
import stat
import struct
import time
from typing import Any

from pyvhost.control import protocol
from pyvhost.host import unix_socket


def find(path: str) -> str:
    """The control socket that belongs to `path`: that of the vhost socket there, or `path` itself."""
    beside = path + protocol.SUFFIX
    try:
        if stat.S_ISSOCK(os.stat(beside).st_mode):
            return beside
    except OSError:
        pass
    return path


def ask(path: str, command: str, arguments: list[str], timeout: float = 60.0) -> Any:
    """What the device's process answers. `path` may be its vhost socket's.

    RefusedError: it said no. OSError: it can't be reached, or said nothing for `timeout` seconds.
    """
    where = find(path)
    unix_socket.check_name(where)
    deadline = time.monotonic() + timeout
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        try:
            # Python's own timeout makes it a connect that does not wait for a place in the queue (EAGAIN).
            seconds, rest = divmod(max(timeout, 0.001), 1)
            limit = struct.pack("@ll", int(seconds), int(rest * 1e6))
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)
            sock.connect(where)
            sock.settimeout(max(0.001, deadline - time.monotonic()))
            sock.sendall(protocol.request(command, arguments))
            reply = bytearray()
            while not reply.endswith(b"\n") and len(reply) <= protocol.LINE_MAX:
                sock.settimeout(max(0.001, deadline - time.monotonic()))
                data = sock.recv(65536)
                if not data:
                    break
                reply += data
        except (TimeoutError, BlockingIOError):
            raise OSError(errno.ETIMEDOUT, f"{where}: no answer within {timeout:g} s") from None
        except OSError as error:
            nobody = error.errno in (errno.ENOENT, errno.ECONNREFUSED)
            why = f"{error.strerror}; is a device served there?" if nobody else error.strerror
            raise OSError(error.errno, f"{where}: {why}") from None
    try:
        return protocol.parse_reply(bytes(reply))
    except ValueError:
        raise OSError(
            errno.EPROTO, f"{where}: {'its end' if not reply else 'something else'} came instead of an answer"
        ) from None
