"""vhost-user messages from bytes and descriptors, and back: all four streams, no input or output of its own.

Promises: a `Decoder` takes what arrives in pieces of any length and never keeps more than one message; a
descriptor handed to it is closed once, by it or by whoever takes it from the `Message`; a bad message is a
`CodecError` that names request, field and numbers, raised before a byte of an oversized payload is read.
Never: reads or writes a socket; decides what a message does.

A front end sends descriptors with a header's first byte [Header, Communication]. The kernel hands out bytes
that were sent without descriptors together with the ones after them: a reader that asks for more than one
message can't tell whose the descriptors are. So the reader asks for `Decoder.wanted` bytes and no more.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import Enum

from pyvhost.abi import vhost_user as abi
from pyvhost.abi.vhost_user import BackendRequest, Request
from pyvhost.host.fds import close, close_all
from pyvhost.vhost_user.payloads import (
    ACKNOWLEDGEMENT,
    BACKEND_REPLIES,
    BACKEND_REQUESTS,
    REPLIES,
    REQUESTS,
    UNKNOWN,
    CodecError,
    MemTable,
    Payload,
    Shape,
    VringFile,
)

HEADER_SIZE = ctypes.sizeof(abi.Header)


class Stream(Enum):
    """Who says what to whom; the value reads as a sentence's subject."""

    REQUEST = "front end"
    REPLY = "back end"
    BACKEND_REQUEST = "back end's request"
    BACKEND_REPLY = "front end's reply"

    @property
    def is_reply(self) -> bool:
        """Whether messages of this stream must carry the reply flag (else: must not)."""
        return self in (Stream.REPLY, Stream.BACKEND_REPLY)

    @property
    def is_backend_channel(self) -> bool:
        """Whether this is the socket of SET_BACKEND_REQ_FD."""
        return self in (Stream.BACKEND_REQUEST, Stream.BACKEND_REPLY)


class Fds:
    """The descriptors of a message: taken one by one by whoever keeps them, the rest closed once."""

    __slots__ = ("_fds",)

    def __init__(self, fds: Iterable[int] = ()) -> None:
        self._fds = list(fds)

    def __len__(self) -> int:
        return len(self._fds)

    def __iter__(self) -> Iterator[int]:
        """The numbers (-1 once taken or closed), still owned here."""
        return iter(self._fds)

    def take(self, index: int = 0) -> int:
        """One descriptor, now the caller's to close. IndexError: there is none; ValueError: taken already."""
        fd, self._fds[index] = self._fds[index], -1
        if fd < 0:
            raise ValueError(f"descriptor {index} of the message was taken already")
        return fd

    def close(self) -> None:
        """Close what nobody took; nothing happens the second time."""
        for index, fd in enumerate(self._fds):
            self._fds[index] = -1
            close(fd)

    def __enter__(self) -> Fds:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


@dataclass(slots=True, eq=False)
class Message:
    """One message. Whoever holds it owns its descriptors: `with message.fds:` closes what wasn't taken."""

    stream: Stream
    request: int
    flags: int
    payload: Payload | None
    fds: Fds

    @property
    def name(self) -> str:
        """The request's name as the specification has it, without VHOST_USER_."""
        return request_name(self.stream, self.request)

    @property
    def need_reply(self) -> bool:
        """The sender wants an answer [REPLY_ACK]."""
        return bool(self.flags & abi.FLAG_NEED_REPLY)

    def __repr__(self) -> str:
        return f"<{self.name} flags={self.flags:#x} {self.payload} fds={list(self.fds)}>"


def request_name(stream: Stream, request: int) -> str:
    """ "SET_VRING_NUM", or "request 77" for one that the specification doesn't have."""
    try:
        return (BackendRequest if stream.is_backend_channel else Request)(request or -1).name
    except ValueError:
        return f"request {request}"


def shape_of(stream: Stream, request: int) -> Shape:
    """What a message of this stream may look like; `UNKNOWN` for a request nobody knows."""
    known = BACKEND_REQUESTS if stream.is_backend_channel else REQUESTS
    if not stream.is_reply:
        return known.get(request, UNKNOWN)
    replies = BACKEND_REPLIES if stream.is_backend_channel else REPLIES
    return replies.get(request, ACKNOWLEDGEMENT)


def encode(request: int, payload: Payload | None = None, *, flags: int = 0) -> bytes:
    """A message's bytes; `flags` are added to the version."""
    body = b"" if payload is None else payload.pack()
    return bytes(abi.Header(request, abi.VERSION | flags, len(body))) + body


def decode_one(stream: Stream, data: bytes) -> Message:
    """One whole message without descriptors, for a trace or a test. CodecError: it is none."""
    decoder = Decoder(stream)
    message = decoder.feed(data[:HEADER_SIZE])
    if message is None and decoder.under_way and len(data) > HEADER_SIZE:
        message = decoder.feed(data[HEADER_SIZE:])
    if message is None:
        decoder.end()
        raise CodecError("no bytes, no message")
    return message


class Decoder:
    """One stream's messages, from what arrives piece by piece."""

    def __init__(self, stream: Stream) -> None:
        self.stream = stream
        self._buffer = bytearray()
        self._fds: list[int] = []
        self._header: abi.Header | None = None
        self._dead = False

    @property
    def wanted(self) -> int:
        """How many bytes to read next, at most: what the message under way lacks; never 0."""
        end = HEADER_SIZE if self._header is None else HEADER_SIZE + int(self._header.size)
        return end - len(self._buffer)

    @property
    def under_way(self) -> bool:
        """Whether a message has begun and not ended."""
        return bool(self._buffer)

    def feed(self, data: bytes, fds: Iterable[int] = ()) -> Message | None:
        """Take what one read brought; the message, if that completes it.

        The descriptors are this decoder's from here on, also when it raises. CodecError: the stream can't be
        read any further. ValueError: more than `wanted` was read, a fault of the caller.
        """
        new = list(fds)
        try:
            if self._dead:
                raise ValueError("the decoder has failed, or is closed")
            if len(data) > self.wanted:
                raise ValueError(f"{len(data)} bytes were read where {self.wanted} were wanted")
            return self._feed(data, new)
        except BaseException:
            close_all(new)
            self.close()
            raise

    def _feed(self, data: bytes, new: list[int]) -> Message | None:
        if new and self._buffer:
            raise CodecError(
                f"{self._doing()}: {len(new)} descriptors came {len(self._buffer)} bytes into it;"
                " they belong to its first byte"
            )
        self._fds += new
        new.clear()
        self._buffer += data
        if self._header is None and len(self._buffer) == HEADER_SIZE:
            self._header = self._judge_header()
        if self._header is None or self.wanted:
            return None
        return self._finish(self._header)

    def _judge_header(self) -> abi.Header:
        header = abi.Header.from_buffer_copy(self._buffer)
        name = request_name(self.stream, header.request)
        version = header.flags & abi.VERSION_MASK
        if version != abi.VERSION:
            raise CodecError(
                f"{name}: flags {header.flags:#x} have version {version}, expected {abi.VERSION}"
            )
        if bool(header.flags & abi.FLAG_REPLY) != self.stream.is_reply:
            fault = (
                "lack the reply flag" if self.stream.is_reply else "have the reply flag, but it is a request"
            )
            raise CodecError(f"{name}: flags {header.flags:#x} {fault}")
        shape = shape_of(self.stream, header.request)
        if not shape.low <= header.size <= shape.high:
            raise CodecError(f"{name}: size is {header.size} bytes, expected {shape.sizes}")
        low, high = shape.fds
        if not low <= len(self._fds) <= high:
            expected = f"{low}" if low == high else f"{low} to {high}"
            raise CodecError(f"{name}: {len(self._fds)} descriptors came with it, expected {expected}")
        return header

    def _finish(self, header: abi.Header) -> Message:
        name = request_name(self.stream, header.request)
        shape = shape_of(self.stream, header.request)
        body = bytes(self._buffer[HEADER_SIZE:])
        payload = shape.parse(name, body) if shape.parse and (body or shape.low) else None
        self._judge_fds(name, payload)
        message = Message(self.stream, header.request, header.flags, payload, Fds(self._fds))
        self._fds = []
        self._buffer.clear()
        self._header = None
        return message

    def _judge_fds(self, name: str, payload: Payload | None) -> None:
        """How many descriptors these two payloads need is in them."""
        if self.stream.is_reply:
            return
        if isinstance(payload, MemTable):
            expected = len(payload.regions)
        elif isinstance(payload, VringFile):
            expected = 0 if payload.no_fd else 1
        else:
            return
        if len(self._fds) != expected:
            why = f"{expected} regions" if isinstance(payload, MemTable) else f"no_fd = {payload.no_fd:d}"
            raise CodecError(
                f"{name}: {len(self._fds)} descriptors came with it, expected {expected} ({why})"
            )

    def end(self) -> None:
        """The peer has closed its end. CodecError: in the middle of a message."""
        doing, got, lacking = self._doing(), len(self._buffer), self.wanted
        under_way = self.under_way
        self.close()
        if under_way:
            raise CodecError(f"{doing}: the connection ended after {got} bytes of it, {lacking} bytes short")

    def close(self) -> None:
        """Give up: what was begun is forgotten and its descriptors closed. It takes nothing more."""
        self._dead = True
        fds, self._fds = self._fds, []
        close_all(fds)
        self._buffer.clear()
        self._header = None

    def _doing(self) -> str:
        if self._header is None:
            return "a message's header"
        return request_name(self.stream, self._header.request)
