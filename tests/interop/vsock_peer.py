"""Both ends of a vsock connection, whatever sockets they have: a module for tests, a program for guests with Python.

    vsock_peer.py listen PORT              serve streams at PORT, SEQPACKET at the next; returns as soon as it listens
    vsock_peer.py exchange TYPE CID PORT THERE BACK SEED       as `exchange`, as client
    vsock_peer.py many TYPE CID PORT COUNT                     as `many`, as client
    vsock_peer.py load CID PORT CONNECTIONS BYTES SECONDS      exchanges on so many connections again and again
    vsock_peer.py errno TYPE CID PORT                          prints what connecting fails with
    vsock_peer.py notify CID PORT TEXT...                      as systemd's PID 1 does: a connection each

TYPE is stream or seqpacket. A server reads a line (of SEQPACKET: a message) that says what is wanted; see `serve`.
What is sent follows from a seed, so that each end knows what must come; it is compared byte by byte, by digest.
Only the standard library, and nothing of the package: the host's interpreter runs it in a guest.
"""

from __future__ import annotations

import ctypes
import errno
import hashlib
import os
import random
import resource
import selectors
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable, Iterator

TIMEOUT = 60.0
BLOCK = 1 << 18
#: Seeds from here on have some messages end a record (MSG_EOR), which Unix sockets don't know.
RECORDS = 1000
TYPES = {"stream": socket.SOCK_STREAM, "seqpacket": socket.SOCK_SEQPACKET}

_libc = ctypes.CDLL(None)
_released = threading.Event()


def pattern(size: int, seed: int) -> Iterator[bytes]:
    """`size` bytes, in blocks of which no two are the same."""
    base = random.Random(seed).randbytes(BLOCK)
    for number in range(-(-size // BLOCK)):
        left = size - number * BLOCK
        yield (number.to_bytes(8, "big") + base[8:])[:left]


def messages(count: int, seed: int) -> Iterator[tuple[bytes, bool]]:
    """So many messages of 1 to 100,000 bytes, and which of them end a record: none, unless the seed says so."""
    chance = random.Random(seed)
    base = chance.randbytes(100_000)
    for number in range(count):
        size = chance.choice((1, 2, 100, 4096, 4097, 65_536, 65_537, 100_000, chance.randrange(1, 100_000)))
        yield (number.to_bytes(8, "little") + base)[:size], seed >= RECORDS and chance.random() < 0.3


def patient(sock: socket.socket) -> None:
    """Each call ends after TIMEOUT, by the kernel.

    Not by polling: Linux's SEQPACKET, asked not to wait, may send a part of a message, and say that it sent none.
    """
    for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
        # Python takes nothing but an integer for a socket of AF_VSOCK.
        value = struct.pack("@ll", int(TIMEOUT), 0)
        assert _libc.setsockopt(sock.fileno(), socket.SOL_SOCKET, option, value, len(value)) == 0
    sock.setblocking(True)


def kind(sock: socket.socket) -> int:
    """SOCK_STREAM or SOCK_SEQPACKET."""
    return sock.getsockopt(socket.SOL_SOCKET, socket.SO_TYPE)


def give(sock: socket.socket, size: int, seed: int) -> None:
    """Send `size` bytes, or of SEQPACKET so many messages."""
    if kind(sock) == socket.SOCK_STREAM:
        for block in pattern(size, seed):
            sock.sendall(block)
    else:
        for data, eor in messages(size, seed):
            assert sock.sendmsg([data], [], socket.MSG_EOR if eor else 0) == len(data)


def take(sock: socket.socket, size: int, seed: int) -> str:
    """Receive so much; "ok", or what was wrong with it."""
    if kind(sock) != socket.SOCK_STREAM:
        return _take_messages(sock, size, seed)
    expected, received, left = hashlib.sha256(), hashlib.sha256(), size
    for block in pattern(size, seed):
        expected.update(block)
    while left:
        data = sock.recv(min(left, BLOCK))
        if not data:
            return f"{left} of {size} bytes are missing"
        received.update(data)
        left -= len(data)
    return "ok" if expected.digest() == received.digest() else "other bytes"


def _take_messages(sock: socket.socket, count: int, seed: int) -> str:
    for number, (expected, eor) in enumerate(messages(count, seed)):
        data, _, flags, _ = sock.recvmsg(1 << 18)
        if data != expected:
            return f"message {number}: {len(data)} bytes, not the {len(expected)} expected"
        if bool(flags & socket.MSG_EOR) != eor:
            return f"message {number}: MSG_EOR is {bool(flags & socket.MSG_EOR)}, not {eor}"
    return "ok"


def rest(sock: socket.socket) -> bytes:
    """All that comes up to the end."""
    data = b""
    while part := sock.recv(BLOCK):
        data += part
    return data


def exchange(sock: socket.socket, there: int, back: int, seed: int) -> str:
    """As client: send `there` while `back` comes, shut down, and hear the server out; "ok", or what went wrong."""
    patient(sock)
    sock.sendall(b"exchange %d %d %d\n" % (there, back, seed))
    failures: list[str] = []

    def send() -> None:
        try:
            give(sock, there, seed)
            sock.shutdown(socket.SHUT_WR)
        except OSError as error:
            failures.append(f"sending: {error}")

    sender = threading.Thread(target=send)
    sender.start()
    taken = take(sock, back, seed + 1)
    sender.join()
    told = rest(sock).decode()
    if failures or taken != "ok" or told != "ok":
        return f"received: {taken}; sent: {told}; {failures}"
    return "ok"


def serve(sock: socket.socket, name: str, *words: str) -> None:
    """As server: what the first line asks for.

    exchange A B S   send B, receive A up to the end, then say whether that was right, and end
    hold A S         do not read until someone asks for `release`; then receive A, and say whether that was right
    release          as said

    Who asks for `echo` gets back what he sends.
    """
    with sock:
        numbers = [int(word) for word in words]
        if name == "release":
            _released.set()
        elif name == "hold":
            assert _released.wait(TIMEOUT)
            sock.sendall(take(sock, *numbers).encode())
        elif name == "exchange":
            there, back, seed = numbers
            found: list[str] = []
            taker = threading.Thread(target=lambda: found.append(_take_all(sock, there, seed)))
            taker.start()
            give(sock, back, seed + 1)
            taker.join()
            sock.sendall(found[0].encode())
        sock.shutdown(socket.SHUT_WR)
        # Not before the other side has read: a close with data on its way may be a reset.
        rest(sock)


def _take_all(sock: socket.socket, size: int, seed: int) -> str:
    try:
        found = take(sock, size, seed)
        return found if not sock.recv(1) else f"{found}; and there is more than {size}"
    except OSError as error:
        return str(error)


def _first_line(sock: socket.socket) -> str:
    if kind(sock) != socket.SOCK_STREAM:
        return sock.recv(BLOCK).decode()
    line = b""
    while not line.endswith(b"\n"):
        byte = sock.recv(1)
        if not byte:
            return "nothing"
        line += byte
    return line.decode()


class Servers:
    """Serves whoever comes to these listening sockets: echoes on one thread, all else on threads of its own."""

    def __init__(self, *servers: socket.socket) -> None:
        self._selector = selectors.DefaultSelector()
        for server in servers:
            self._selector.register(server, selectors.EVENT_READ, self._accept)
        self._wake, woken = socket.socketpair()
        self._selector.register(woken, selectors.EVENT_READ)

    def run(self) -> None:
        """Until `stop`."""
        while True:
            for key, _ in self._selector.select():
                if key.data is None:
                    return
                key.data(key.fileobj)

    def stop(self) -> None:
        """End `run`; from any thread."""
        self._wake.close()

    def _accept(self, server: socket.socket) -> None:
        sock, _ = server.accept()
        patient(sock)
        self._selector.register(sock, selectors.EVENT_READ, self._begin)

    def _begin(self, sock: socket.socket) -> None:
        self._selector.unregister(sock)
        name, *words = _first_line(sock).split()
        if name == "echo":
            self._selector.register(sock, selectors.EVENT_READ, self._echo)
        else:
            threading.Thread(target=serve, args=(sock, name, *words), daemon=True).start()

    def _echo(self, sock: socket.socket) -> None:
        try:
            if data := sock.recv(BLOCK):
                sock.sendall(data)
                return
        except OSError:
            pass
        self._selector.unregister(sock)
        sock.close()


def many(connect: Callable[[], socket.socket], count: int) -> str:
    """So many connections at once, each with an echo of its own; "ok", or what went wrong."""
    socks = []
    try:
        for _ in range(count):
            socks.append(connect())
            patient(socks[-1])
            socks[-1].sendall(b"echo\n")
        texts = [f"this is {number}".encode() for number in range(count)]
        for sock, text in zip(socks, texts, strict=True):
            sock.sendall(text)
        for sock, text in zip(socks, texts, strict=True):
            if (found := sock.recv(len(text), socket.MSG_WAITALL)) != text:
                return f"{found!r} where {text!r} was sent"
        for sock in socks:
            sock.shutdown(socket.SHUT_WR)
        for sock in socks:
            if rest(sock):
                return "more than was sent"
    finally:
        for sock in socks:
            sock.close()
    return "ok"


def load(connect: Callable[[], socket.socket], connections: int, size: int, seconds: float) -> str:
    """Exchanges both ways on so many connections, again and again; "ok" and how many bytes, or what failed."""
    end = time.monotonic() + seconds
    failures: list[str] = []
    rounds = [0] * connections

    def run(number: int) -> None:
        while time.monotonic() < end and not failures:
            try:
                with connect() as sock:
                    found = exchange(sock, size, size, number + rounds[number])
            except OSError as error:
                found = str(error)
            if found != "ok":
                failures.append(found)
            rounds[number] += 1

    threads = [threading.Thread(target=run, args=(number,)) for number in range(connections)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return "; ".join(failures) or f"ok {2 * size * sum(rounds)}"


def more_files() -> None:
    """As many descriptors as this process may have."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def call(name: str, cid: int, port: int) -> socket.socket:
    """A connection, from inside a guest."""
    sock = socket.socket(socket.AF_VSOCK, TYPES[name])
    patient(sock)
    try:
        sock.connect((cid, port))
    except BaseException:
        sock.close()
        raise
    return sock


def main(command: str, *words: str) -> None:
    more_files()
    if command == "listen":
        servers = []
        for name in TYPES:
            server = socket.socket(socket.AF_VSOCK, TYPES[name])
            server.bind((socket.VMADDR_CID_ANY, int(words[0]) + (name == "seqpacket")))
            server.listen(4096)
            servers.append(server)
        if os.fork():
            return
        os.setsid()
        for fd in range(3):
            os.dup2(os.open(os.devnull, os.O_RDWR), fd)
        Servers(*servers).run()
    elif command == "load":
        cid, port, connections, size = map(int, words[:4])
        print(load(lambda: call("stream", cid, port), connections, size, float(words[4])))
    elif command == "notify":
        for text in words[2:]:
            with call("seqpacket", int(words[0]), int(words[1])) as sock:
                sock.sendall(text.encode())
    else:
        name, cid, port = words[0], int(words[1]), int(words[2])
        numbers = [int(word) for word in words[3:]]
        if command == "errno":
            try:
                call(name, cid, port).close()
            except OSError as error:
                print(errno.errorcode.get(error.errno or 0, error))
            else:
                print("connected")
        elif command == "many":
            print(many(lambda: call(name, cid, port), *numbers))
        elif command == "exchange":
            with call(name, cid, port) as sock:
                print(exchange(sock, *numbers))
        else:
            raise SystemExit(f"no command: {command}")


if __name__ == "__main__":
    main(*sys.argv[1:])
