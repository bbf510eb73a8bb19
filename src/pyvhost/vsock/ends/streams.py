"""A guest's ports in Python: asyncio streams, in the process that serves the guest.

    async with vsock.connect(3, 1234) as (reader, writer):
        writer.write(b"hello")

    async with vsock.listen(5000, handle) as server:      # handle(reader, writer), as for asyncio.start_server
        await server.serve_forever()

The loop runs in any thread but the one that serves. A socket pair lies between: one half is the connection's other
end, the other half is the loop's. SOCK_SEQPACKET is `connect_messages` and `listen_messages`, which give `Messages`.

Promises: the loop's thread and the control thread touch nothing of each other's but what is handed over; what is
given up on one side ends on the other. Never: copies what a stream carries, but for the socket pair.
"""

from __future__ import annotations

import asyncio
import errno
import inspect
import logging
import socket
import threading
from collections.abc import Awaitable, Callable, Generator
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, Generic, Self, TypeVar

from pyvhost.abi import virtio_vsock as abi
from pyvhost.vsock.ends.base import Guest, SocketEnd, enlarge, kind_of
from pyvhost.vsock.ends.groups import Groups

if TYPE_CHECKING:
    from pyvhost.vsock.connection import Connection, Request

_log = logging.getLogger(__name__)

#: What a reader holds before it lets the guest wait, bytes (asyncio's own default).
LIMIT: Final = 1 << 16
#: Connections of a listener that its loop has not begun with.
BACKLOG: Final = 128
#: The longest message of a guest's, bytes.
LONGEST: Final = 1 << 20
#: How long the control thread may take to look at what it was asked, seconds; the guest has two of its own.
PATIENCE: Final = 10.0

Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]
T = TypeVar("T")
#: CID and port.
Address = tuple[int, int]


# --- what a program sees ----------------------------------------------------------------------------------


def connect(cid: int, port: int, *, limit: int = LIMIT) -> Connecting[Streams]:
    """A stream to `port` of the guest `cid`, which this process serves: awaited, or by `async with`.

    `limit`: what the reader holds, bytes. ConnectionRefusedError: there is no such guest, or it has refused, or said
    nothing for two seconds. TimeoutError: the thread that serves it stands still.
    """

    async def made(sock: socket.socket, here: Address) -> Streams:
        return await _streams(sock, here, (cid, port), limit)

    async def over(streams: Streams) -> None:
        streams[1].close()
        try:
            await streams[1].wait_closed()
        except ConnectionError:
            pass  # the guest was faster

    return Connecting(cid, port, abi.TYPE_STREAM, made, over)


def connect_messages(cid: int, port: int) -> Connecting[Messages]:
    """As `connect`, SOCK_SEQPACKET."""

    async def made(sock: socket.socket, here: Address) -> Messages:
        return Messages(sock, here, (cid, port))

    async def over(messages: Messages) -> None:
        messages.close()

    return Connecting(cid, port, abi.TYPE_SEQPACKET, made, over)


def listen(
    port: int,
    handle: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None] | None],
    *,
    cid: int | None = None,
    limit: int = LIMIT,
    backlog: int = BACKLOG,
) -> Listener:
    """Takes what guests connect to `port` of CID 2, before forwarded ports and Unix sockets do; by `async with`.

    `handle(reader, writer)`: called for each, in the running loop; `writer.get_extra_info("peername")` is the guest's
    CID and port. `cid`: this guest's alone. OSError EADDRINUSE: the port is listened on. RuntimeError: no loop runs.
    """

    async def begin(sock: socket.socket, here: Address, peer: Address) -> None:
        reader, writer = await _streams(sock, here, peer, limit)
        try:
            await _called(handle(reader, writer))
        except BaseException:
            writer.close()
            raise

    return Listener(abi.TYPE_STREAM, port, cid, begin, backlog)


def listen_messages(
    port: int,
    handle: Callable[[Messages], Awaitable[None] | None],
    *,
    cid: int | None = None,
    backlog: int = BACKLOG,
) -> Listener:
    """As `listen`, SOCK_SEQPACKET: `handle(messages)`."""

    async def begin(sock: socket.socket, here: Address, peer: Address) -> None:
        messages = Messages(sock, here, peer)
        try:
            await _called(handle(messages))
        except BaseException:
            messages.close()
            raise

    return Listener(abi.TYPE_SEQPACKET, port, cid, begin, backlog)


class Messages:
    """A SOCK_SEQPACKET connection. `address`, `peer`: CID and port of its two ends."""

    def __init__(self, sock: socket.socket, address: Address, peer: Address) -> None:
        self.address = address
        self.peer = peer
        self._sock = sock
        self._room = bytearray(LONGEST)
        self._loop = asyncio.get_running_loop()

    async def send(self, message: bytes | bytearray | memoryview) -> None:
        """One message; an empty one can't be sent. OSError EMSGSIZE: too long; BrokenPipeError: nobody reads."""
        if not len(message):
            raise ValueError("an empty message can't be sent")
        await self._loop.sock_sendall(self._sock, message)

    async def receive(self) -> bytes:
        """The next message; b"": the end, or an empty one. ConnectionResetError."""
        length = await self._loop.sock_recv_into(self._sock, self._room)
        return bytes(memoryview(self._room)[:length])

    def send_eof(self) -> None:
        """Nothing more is sent."""
        self._sock.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        """Ends it."""
        self._sock.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> bytes:
        message = await self.receive()
        if not message:
            raise StopAsyncIteration
        return message


class Connecting(Generic[T]):
    """A connection to be: `await` it, or `async with` it, which closes it at the end."""

    def __init__(
        self,
        cid: int,
        port: int,
        type: int,
        made: Callable[[socket.socket, Address], Awaitable[T]],
        over: Callable[[T], Awaitable[None]],
    ) -> None:
        self._cid = cid
        self._port = port
        self._type = type
        self._made = made
        self._over = over
        self._it: T | None = None

    def __await__(self) -> Generator[Any, None, T]:
        return self._connect().__await__()

    async def __aenter__(self) -> T:
        self._it = await self._connect()
        return self._it

    async def __aexit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        assert self._it is not None
        await self._over(self._it)

    async def _connect(self) -> T:
        guest = Groups.of_process().find(self._cid)
        if guest is None:
            raise ConnectionRefusedError(f"no guest with CID {self._cid} is served by this process")
        asked = _Asked(self._type)
        # Who is cancelled closes the loop's half, and thereby the connection, however far that has come.
        try:
            guest.poller.call_soon_threadsafe(lambda: asked.begin(guest, self._port))
            async with asyncio.timeout(PATIENCE):
                here = await asked.answer
            return await self._made(asked.theirs, here)
        except BaseException:
            asked.theirs.close()
            raise


class Listener:
    """A port of CID 2 that is Python's; `close` it, or use `async with`."""

    def __init__(
        self,
        type: int,
        port: int,
        cid: int | None,
        begin: Callable[[socket.socket, Address, Address], Awaitable[None]],
        backlog: int,
    ) -> None:
        self.port = port
        self.type = type
        self.cid = cid
        self._begin = begin
        self._backlog = backlog
        self._loop = asyncio.get_running_loop()
        #: Handed over to the loop, and not seen there.
        self._waiting = 0
        self._lock = threading.Lock()
        self._tasks: set[asyncio.Task[None]] = set()
        self._closed = self._loop.create_future()
        _Ports.add(self)

    def close(self) -> None:
        """Takes no more; what was taken goes on."""
        _Ports.remove(self)
        if not self._closed.done():
            self._closed.set_result(None)

    async def serve_forever(self) -> None:
        """Returns when it is closed."""
        await asyncio.shield(self._closed)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def take(self, guest: Guest, request: Request) -> None:
        """A guest wants to connect; on the control thread."""
        with self._lock:
            room = self._waiting < self._backlog and not self._loop.is_closed()
            self._waiting += room
        if not room:
            request.refuse()
            return
        handed_over = False
        try:
            end, theirs = _pair(self.type)
            peer = (guest.cid, request.key.guest_port)
            if request.accept(end) is not None:
                handed_over = _tell(self._loop, lambda: self._take(theirs, peer))
            if not handed_over:
                theirs.close()
        finally:
            if not handed_over:
                with self._lock:
                    self._waiting -= 1

    def _take(self, theirs: socket.socket, peer: Address) -> None:
        with self._lock:
            self._waiting -= 1
        task = self._loop.create_task(self._handle(theirs, peer))
        # The loop itself keeps no hold on a task.
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _handle(self, theirs: socket.socket, peer: Address) -> None:
        try:
            await self._begin(theirs, (abi.VMADDR_CID_HOST, self.port), peer)
        except Exception:
            _log.exception("vsock port %d: what was called for CID %d, port %d", self.port, *peer)


# --- between the two threads ------------------------------------------------------------------------------


class StreamEnds:
    """What a guest asks of Python in this process."""

    def __init__(self) -> None:
        self._guest: Guest | None = None

    def open(self, guest: Guest) -> None:
        """Says whose they are."""
        self._guest = guest

    def take(self, request: Request) -> bool:
        """Hands it to who listens; False: nobody does."""
        key, guest = request.key, self._guest
        if guest is None or key.peer_cid != abi.VMADDR_CID_HOST:
            return False
        listener = _Ports.find(key.type, key.peer_port, guest.cid)
        if listener is None:
            return False
        listener.take(guest, request)
        return True

    def close(self) -> None:
        """No more of them."""
        self._guest = None


class _Ports:
    """Who listens, in this process. Any thread."""

    _lock: Final = threading.Lock()
    _listeners: Final[dict[tuple[int, int, int | None], Listener]] = {}

    @classmethod
    def add(cls, listener: Listener) -> None:
        key = (listener.type, listener.port, listener.cid)
        with cls._lock:
            if key in cls._listeners:
                raise OSError(errno.EADDRINUSE, f"vsock port {listener.port} is listened on already")
            cls._listeners[key] = listener

    @classmethod
    def remove(cls, listener: Listener) -> None:
        key = (listener.type, listener.port, listener.cid)
        with cls._lock:
            if cls._listeners.get(key) is listener:
                del cls._listeners[key]

    @classmethod
    def find(cls, type: int, port: int, cid: int) -> Listener | None:
        with cls._lock:
            return cls._listeners.get((type, port, cid)) or cls._listeners.get((type, port, None))


class _Asked:
    """A connection that the loop has asked for; `theirs` is the loop's half, `answer` its own address."""

    def __init__(self, type: int) -> None:
        self._type = type
        self._loop = asyncio.get_running_loop()
        self.answer: asyncio.Future[Address] = self._loop.create_future()
        self._end, self.theirs = _pair(type)

    def begin(self, guest: Guest, port: int) -> None:
        """On the control thread."""
        self._end.asked = self
        try:
            if Groups.of_process().find(guest.cid) is not guest:
                self._end.refused(f"{guest.name} is gone")
                return
            self._end.connection = guest.connections.connect(self._end, self._type, port)
        except Exception:
            _log.exception("%s: connecting to port %d", guest.name, port)
            self._end.refused("it can't be asked")

    def accepted(self, here: Address) -> None:
        """The guest has."""

        def told() -> None:
            if not self.answer.done():
                self.answer.set_result(here)

        _tell(self._loop, told)

    def refused(self, reason: str) -> None:
        """The guest has not."""

        def told() -> None:
            if not self.answer.done():
                self.answer.set_exception(ConnectionRefusedError(errno.ECONNREFUSED, reason))

        _tell(self._loop, told)


class _Half(SocketEnd):
    """The connection's half of a socket pair."""

    def __init__(self, sock: socket.socket) -> None:
        super().__init__(sock)
        self.asked: _Asked | None = None
        self.connection: Connection | None = None

    def accepted(self) -> None:
        """The guest has accepted what the loop asked for."""
        if self.asked is not None and self.connection is not None:
            self.asked.accepted((abi.VMADDR_CID_HOST, self.connection.key.peer_port))

    def refused(self, reason: str) -> None:
        """The guest has not."""
        super().refused(reason)
        if self.asked is not None:
            self.asked.refused(reason)


class _Writer(asyncio.StreamWriter):
    """A writer that knows who it writes to: "peername" and "sockname" are CID and port."""

    def __init__(
        self,
        transport: asyncio.Transport,
        protocol: asyncio.StreamReaderProtocol,
        reader: asyncio.StreamReader,
        here: Address,
        peer: Address,
    ) -> None:
        super().__init__(transport, protocol, reader, asyncio.get_running_loop())
        self._names = {"peername": peer, "sockname": here}

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return self._names[name] if name in self._names else super().get_extra_info(name, default)


async def _streams(sock: socket.socket, here: Address, peer: Address, limit: int) -> Streams:
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader(limit=limit, loop=loop)
    protocol = asyncio.StreamReaderProtocol(reader, loop=loop)
    transport, _ = await loop.create_unix_connection(lambda: protocol, sock=sock)
    return reader, _Writer(transport, protocol, reader, here, peer)


async def _called(answer: Awaitable[None] | None) -> None:
    if inspect.isawaitable(answer):
        await answer


def _pair(type: int) -> tuple[_Half, socket.socket]:
    """The connection's half, and the loop's."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, kind_of(type))
    theirs.setblocking(False)
    enlarge(theirs)
    return _Half(ours), theirs


def _tell(loop: asyncio.AbstractEventLoop, what: Callable[[], object]) -> bool:
    """Has the loop call something; False: it is closed."""
    try:
        loop.call_soon_threadsafe(what)
    except RuntimeError:
        return False
    return True
