"""A peer on a Unix stream socket, one at a time, that may come and go: what QEMU calls `-netdev stream`.

What travels is frames, each behind its length as 4 bytes, big endian; that is the business of whoever reads and
writes the descriptor. Here the connection is made, watched and made again.

Promises: a peer that leaves is noticed without reading from it, unless there are bytes of its left to read; then
`drop` says when they have been read. The descriptor is non-blocking and closed on exec.
Never: reads or writes the peer's bytes; blocks.
"""

from __future__ import annotations

import array
import enum
import errno
import fcntl
import logging
import os
import select
import socket
import stat
import termios
from collections.abc import Callable

from pyvhost.host.poller import Poller, Timer

#: Seconds between attempts to reach a peer that doesn't listen: from, to, doubling.
RETRY_FIRST = 0.1
RETRY_MOST = 2.0

_log = logging.getLogger(__name__)


class Role(enum.Enum):
    """Who dials whom."""

    #: Connect if somebody listens at the path by then, listen there if not.
    AUTO = "auto"
    CONNECT = "connect"
    LISTEN = "listen"


class StreamPeer:
    """The one peer at `path`. All on the poller's thread.

    `on_change` is called whenever `fd` has changed, but not by `open` and `close`. The former descriptor is
    closed when it returns.
    """

    def __init__(self, path: str, role: Role, poller: Poller, on_change: Callable[[], object]) -> None:
        self.path = path
        self.role = role
        self._poller = poller
        self._on_change = on_change
        self._peer: socket.socket | None = None
        self._listener: socket.socket | None = None
        self._bound: tuple[int, int] | None = None
        self._timer: Timer | None = None
        self._delay = RETRY_FIRST
        self._open = False

    @property
    def fd(self) -> int:
        """The connection to the peer; -1 while there is none."""
        return self._peer.fileno() if self._peer is not None else -1

    def open(self) -> None:
        """Connect, or listen. A peer that doesn't listen yet is no error: it is tried again.

        OSError: EADDRINUSE somebody else listens there; ENAMETOOLONG; EACCES, ENOENT and so on, of the path.
        """
        _check_path(self.path)
        if self._open:
            return
        self._open = True
        try:
            if self.role is not Role.LISTEN:
                try:
                    self._peer = _dial(self.path)
                except BlockingIOError:
                    self.role = Role.CONNECT  # it listens, and has its hands full
            if self._peer is not None:
                self.role = Role.CONNECT
                self._watch()
            elif self.role is Role.CONNECT:
                self._dial_later()
            else:
                self._listen()
                self.role = Role.LISTEN
        except BaseException:
            self.close()
            raise

    def drop(self) -> None:
        """Give the peer up: it was found to be gone, or to talk nonsense. The next one is looked for."""
        if self._peer is not None:
            self._replace(None)

    def close(self) -> None:
        """Let the peer go and look for no other. A socket that was made at the path is removed."""
        self._open = False
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._peer is not None:
            self._poller.unregister(self._peer.fileno())
            self._peer.close()
            self._peer = None
        if self._listener is not None:
            self._poller.unregister(self._listener.fileno())
            self._listener.close()
            self._listener = None
        if self._bound is not None and self._bound == _identity(self.path):
            os.unlink(self.path)
        self._bound = None

    def _watch(self) -> None:
        assert self._peer is not None
        # Only its end is of interest here, not what it sends.
        self._poller.register(self._peer.fileno(), select.EPOLLRDHUP, self._hung_up)

    def _hung_up(self, mask: int) -> None:
        assert self._peer is not None
        if _unread(self._peer):
            # The reader gets to the end by itself, and says `drop`. A new peer needs not wait for that.
            self._poller.unregister(self._peer.fileno())
            self._await_peer(True)
        else:
            self._replace(None)

    def _replace(self, peer: socket.socket | None) -> None:
        former, self._peer = self._peer, peer
        if former is not None:
            self._poller.unregister(former.fileno())
        if peer is not None:
            self._delay = RETRY_FIRST
            self._watch()
            _log.info("stream %s: a peer is connected", self.path)
        else:
            _log.info("stream %s: the peer has gone", self.path)
        if self.role is Role.LISTEN:
            self._await_peer(peer is None)
        elif peer is None:
            self._dial_later()
        try:
            self._on_change()
        finally:
            if former is not None:
                former.close()

    def _dial_later(self) -> None:
        self._timer = self._poller.call_later(self._delay, self._dial_again)
        self._delay = min(2 * self._delay, RETRY_MOST)

    def _dial_again(self) -> None:
        self._timer = None
        peer = None
        try:
            peer = _dial(self.path)
        except BlockingIOError:
            pass
        except OSError as error:
            _log.warning("stream %s: %s", self.path, error)
        if peer is not None:
            self._replace(peer)
        else:
            self._dial_later()

    def _listen(self) -> None:
        listener = socket.socket(
            socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK
        )
        try:
            _remove_stale(self.path)
            listener.bind(self.path)
            self._bound = _identity(self.path)
            listener.listen(1)
        except OSError as error:
            listener.close()
            raise OSError(error.errno or 0, f"listening at {self.path}: {error.strerror}") from None
        self._listener = listener
        self._await_peer(True)

    def _await_peer(self, wanted: bool) -> None:
        """Whether the next peer is accepted. Meanwhile it waits in the backlog."""
        if self._listener is None:
            return
        if not wanted:
            self._poller.unregister(self._listener.fileno())
        elif not self._poller.registered(self._listener.fileno()):
            self._poller.register(self._listener.fileno(), select.EPOLLIN, self._accept)

    def _accept(self, mask: int) -> None:
        assert self._listener is not None
        try:
            peer, _ = self._listener.accept()
        except (BlockingIOError, ConnectionAbortedError):
            return
        peer.setblocking(False)
        self._replace(peer)


def _check_path(path: str) -> None:
    if not path or "\0" in path:
        raise ValueError(f"{path!r} is no path of a socket")
    if len(os.fsencode(path)) > 107:
        raise OSError(errno.ENAMETOOLONG, f"a socket's path is 107 bytes at most: {path}")


def _dial(path: str) -> socket.socket | None:
    """A connection; None if nobody listens there now. BlockingIOError: somebody does, whose backlog is full."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
    try:
        sock.connect(path)
    except (FileNotFoundError, ConnectionRefusedError):
        sock.close()
        return None
    except BlockingIOError:
        sock.close()
        raise
    except OSError as error:
        sock.close()
        raise OSError(error.errno or 0, f"connecting to {path}: {error.strerror}") from None
    return sock


def _remove_stale(path: str) -> None:
    """Remove a socket that nobody listens at any more: a process that was killed leaves one."""
    try:
        if not stat.S_ISSOCK(os.lstat(path).st_mode):
            return
    except FileNotFoundError:
        return
    with socket.socket(
        socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK
    ) as probe:
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            os.unlink(path)
        except OSError:
            pass  # bind says what is wrong


def _identity(path: str) -> tuple[int, int] | None:
    try:
        found = os.lstat(path)
    except OSError:
        return None
    return found.st_dev, found.st_ino


def _unread(sock: socket.socket) -> int:
    number = array.array("i", [0])
    fcntl.ioctl(sock, termios.FIONREAD, number)
    return number[0]
