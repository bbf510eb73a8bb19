"""Unix sockets that have a file, and who is at their other end.

Promises: a socket file that nobody listens on is replaced, any other is left alone; only a file that is still
one's own is removed. Never: accepts, dials or reads.
"""

from __future__ import annotations

import errno
import os
import socket
import stat
import struct

BACKLOG = 16
#: The longest name a Unix socket can have, in bytes (unix(7)).
NAME_MAX = 107

#: Device and inode number: which file it is, whatever its name.
Identity = tuple[int, int]


def peer_pid(sock: socket.socket) -> int:
    """The process that connected or listened at the other end; 0 for one of another pid namespace."""
    raw = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("iII"))
    return int(struct.unpack("iII", raw)[0])


def peer_uid(sock: socket.socket) -> int:
    """The user that connected or listened at the other end."""
    raw = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("iII"))
    return int(struct.unpack("iII", raw)[1])


def peer_of(sock: socket.socket) -> str:
    """Who is at the other end, for a person: "qemu-system-x86 (pid 4711)"."""
    pid = peer_pid(sock)
    if pid <= 0:
        return "front end (of another pid namespace)"
    try:
        with open(f"/proc/{pid}/comm", encoding="utf-8", errors="replace") as comm:
            return f"{comm.read().strip()} (pid {pid})"
    except OSError:
        return f"pid {pid}"


def check_name(path: str) -> None:
    """OSError ENAMETOOLONG: no socket can have that name."""
    length = len(os.fsencode(path))
    if length > NAME_MAX:
        raise OSError(
            errno.ENAMETOOLONG,
            f"{path}: a Unix socket's name has {NAME_MAX} bytes at most, this one {length}",
        )


def listen(
    path: str, mode: int | None = None, *, kind: int = socket.SOCK_STREAM, backlog: int = BACKLOG
) -> tuple[socket.socket, Identity]:
    """A socket that listens at `path`, in the place of one that nobody listens on any more, and whose file it is.

    `mode`: the file's permissions, from its first moment; None: what the umask leaves. `kind`: SOCK_STREAM or
    SOCK_SEQPACKET. OSError EADDRINUSE: a process listens there (the text names it); EEXIST: something else than a
    socket lies there; ENOENT: its folder is absent; otherwise as bind(2).
    """
    check_name(path)
    sock = socket.socket(socket.AF_UNIX, kind)
    try:
        if mode is not None:
            # bind(2) makes the file with the socket's own mode.
            os.fchmod(sock.fileno(), mode)
        try:
            sock.bind(path)
        except OSError as error:
            if error.errno == errno.ENOENT:
                raise OSError(errno.ENOENT, f"{path}: there is no folder {os.path.dirname(path)}") from None
            if error.errno != errno.EADDRINUSE:
                raise OSError(error.errno, f"{path}: {error.strerror}") from None
            _clear(path, kind)
            sock.bind(path)
        sock.listen(backlog)
        found = os.stat(path)
    except BaseException:
        sock.close()
        raise
    return sock, (found.st_dev, found.st_ino)


def _clear(path: str, kind: int) -> None:
    """Remove the socket file that is in the way, if it is one that nobody listens on."""
    found = os.lstat(path)
    if not stat.S_ISSOCK(found.st_mode):
        raise OSError(errno.EEXIST, f"{path}: exists, and is not a socket")
    with socket.socket(socket.AF_UNIX, kind) as probe:
        probe.setblocking(False)
        try:
            probe.connect(path)
        except OSError as error:
            if error.errno == errno.ECONNREFUSED:
                remove(path, (found.st_dev, found.st_ino))
                return
            if error.errno not in (errno.EAGAIN, errno.EINTR, errno.EPROTOTYPE):
                raise OSError(error.errno, f"{path}: {error.strerror}") from None
            raise OSError(errno.EADDRINUSE, f"{path}: a process listens there already") from None
        raise OSError(errno.EADDRINUSE, f"{path}: {peer_of(probe)} listens there already")


def remove(path: str, own: Identity) -> None:
    """Unlink `path` if it is still the file of that device and inode number."""
    try:
        found = os.lstat(path)
        if (found.st_dev, found.st_ino) == own:
            os.unlink(path)
    except FileNotFoundError:
        pass
