"""Data over TCP or UDP between two ends, hashed at both: a module for tests, a program for guests that have Python.

    exchange.py connect ADDRESS PORT BYTES    send so much, receive until the other end is done
    exchange.py listen PORT BYTES             the same for the one who called; returns as soon as it listens,
                                              and leaves what came of it in $TMPDIR/exchanged, a pipe
    exchange.py udp ADDRESS PORT SIZE...      send datagrams of these sizes, and have each back

What it prints: the SHA-256 of what was sent, and of what was received. Only the standard library, and nothing of
the package: the host's interpreter runs it in a guest.
"""

from __future__ import annotations

import hashlib
import os
import socket
import sys
import threading
from dataclasses import dataclass

TIMEOUT = 60.0


@dataclass(frozen=True)
class Digests:
    """Of what went each way, as this end has it."""

    sent: str
    received: str

    @classmethod
    def parse(cls, text: str) -> Digests:
        """From what the program prints."""
        sent, received = text.split()
        return cls(sent, received)

    def matches(self, other: Digests) -> bool:
        """Whether the other end has the same, the other way round."""
        return (self.sent, self.received) == (other.received, other.sent)


def exchange(sock: socket.socket, size: int) -> Digests:
    """Send `size` random bytes while receiving whatever comes, to the end of both.

    With nothing to send this side ends last: nc leaves when the other side is done.
    """
    data = os.urandom(size)

    def send() -> None:
        if data:
            sock.sendall(data)
            sock.shutdown(socket.SHUT_WR)

    sock.settimeout(TIMEOUT)
    sender = threading.Thread(target=send)
    sender.start()
    received = hashlib.sha256()
    while chunk := sock.recv(1 << 18):
        received.update(chunk)
    sender.join(TIMEOUT)
    return Digests(hashlib.sha256(data).hexdigest(), received.hexdigest())


class Listener:
    """A server on the host for one exchange; `port` is where, `digests` waits for what came of it."""

    def __init__(self, address: str, size: int) -> None:
        self._server = socket.create_server((address, 0))
        self._server.settimeout(TIMEOUT)
        self.port: int = self._server.getsockname()[1]
        self._found: Digests | None = None
        self._thread = threading.Thread(target=self._serve, args=(size,), daemon=True)
        self._thread.start()

    def digests(self) -> Digests:
        """This end's, once it is over."""
        self._thread.join(TIMEOUT)
        self._server.close()
        assert self._found is not None, "nobody came, or the exchange did not end"
        return self._found

    def _serve(self, size: int) -> None:
        connection, _ = self._server.accept()
        with connection:
            self._found = exchange(connection, size)


def connect(address: str, port: int, size: int) -> Digests:
    """One exchange with whoever listens there."""
    with socket.create_connection((address, port), TIMEOUT) as sock:
        return exchange(sock, size)


def echo_udp(address: str) -> int:
    """Sends datagrams back to where they came from, on a thread, for as long as the process lives; its port."""
    server = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    server.bind((address, 0))

    def serve() -> None:
        while True:
            data, sender = server.recvfrom(65536)
            server.sendto(data, sender)

    threading.Thread(target=serve, daemon=True).start()
    return int(server.getsockname()[1])


def udp(address: str, port: int, sizes: list[int]) -> Digests:
    """Send a datagram of each size and wait for it to come back. TimeoutError: one did not."""
    sent, received = hashlib.sha256(), hashlib.sha256()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.settimeout(TIMEOUT)
        for size in sizes:
            data = os.urandom(size)
            sock.sendto(data, (address, port))
            sent.update(data)
            received.update(sock.recvfrom(65536)[0])
    return Digests(sent.hexdigest(), received.hexdigest())


def listen_in_background(port: int, size: int) -> None:
    """Returns when it listens; a child goes on."""
    result = os.environ["TMPDIR"] + "/exchanged"
    if os.path.exists(result):
        os.unlink(result)
    os.mkfifo(result)
    server = socket.create_server(("", port))
    if os.fork():
        return
    os.setsid()
    null = os.open("/dev/null", os.O_RDWR)
    for fd in (0, 1, 2):
        os.dup2(null, fd)
    connection, _ = server.accept()
    with connection:
        found = exchange(connection, size)
    with open(result, "w") as pipe:
        pipe.write(f"{found.sent} {found.received}")
    os._exit(0)


def main(words: list[str]) -> None:
    match words:
        case ["connect", address, port, size]:
            found = connect(address, int(port), int(size))
            print(found.sent, found.received)
        case ["listen", port, size]:
            listen_in_background(int(port), int(size))
        case ["udp", address, port, *sizes]:
            found = udp(address, int(port), [int(size) for size in sizes])
            print(found.sent, found.received)
        case _:
            sys.exit(__doc__)


if __name__ == "__main__":
    main(sys.argv[1:])
