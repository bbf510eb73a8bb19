"""The front end's side of a vhost-user conversation: requests as bytes, replies matched to them.

Promises: a request's bytes are right for what was negotiated so far; every reply is held against the oldest
request that waits for one, and a back end that answers out of turn, or to something else, is a
`FrontendError` that names both. Never: reads or writes a socket; keeps descriptors (they are the caller's, to
send along and to close).

    session = FrontendSession()
    sock.sendall(session.request(Request.GET_FEATURES))
    features = session.receive(message)          # what a Decoder(Stream.REPLY) made of the answer
"""

from __future__ import annotations

from collections import deque

from pyvhost.abi import vhost_user as abi
from pyvhost.abi.vhost_user import Request
from pyvhost.vhost_user.codec import Message, Stream, encode, request_name
from pyvhost.vhost_user.payloads import ALWAYS_ANSWERED, U64, Inflight, Payload


class FrontendError(Exception):
    """The back end broke the protocol."""


class RefusedError(FrontendError):
    """The back end answered that a request failed: a number other than 0, or nothing where something belongs."""


class FrontendSession:
    """What has been negotiated, and which requests wait for a reply."""

    def __init__(self) -> None:
        #: What the last SET_PROTOCOL_FEATURES asked for (bits).
        self.protocol_features = 0
        self._waiting: deque[int] = deque()

    @property
    def waiting(self) -> int:
        """How many requests wait for a reply."""
        return len(self._waiting)

    def has(self, bit: int) -> bool:
        """Whether a protocol feature (its bit number) has been negotiated."""
        return bool(self.protocol_features >> bit & 1)

    def request(
        self, request: int, payload: Payload | None = None, *, need_reply: bool | None = None
    ) -> bytes:
        """A request's bytes, to be sent with its descriptors on the first one.

        `need_reply` None asks for an acknowledgement wherever one can be had (REPLY_ACK negotiated, and no
        reply of the request's own). REPLY_ACK counts from the SET_PROTOCOL_FEATURES that sets it onwards,
        but there the flag is only set if asked for: not every back end answers it.
        """
        if need_reply is None:
            need_reply = self.has(abi.PROTOCOL_F_REPLY_ACK) and not self._answered_anyway(request)
        if request == Request.SET_PROTOCOL_FEATURES and isinstance(payload, U64):
            self.protocol_features = payload.value
        if self._answered_anyway(request) or (need_reply and self.has(abi.PROTOCOL_F_REPLY_ACK)):
            self._waiting.append(request)
        return encode(request, payload, flags=abi.FLAG_NEED_REPLY if need_reply else 0)

    def receive(self, message: Message) -> Payload | None:
        """What the back end answered to the oldest request that waits; its descriptors stay in `message`.

        FrontendError: nothing waits, or something else does. RefusedError: the answer says that it failed.
        """
        if message.stream is not Stream.REPLY:
            raise ValueError(f"{message.stream.value} is not the stream of replies")
        if not self._waiting:
            raise FrontendError(f"{message.name}: a reply that nobody waits for")
        request = self._waiting.popleft()
        if message.request != request:
            expected = request_name(Stream.REQUEST, request)
            raise FrontendError(f"the reply is to {message.name}, but {expected} waits for one")
        payload = message.payload
        if request == Request.GET_CONFIG and payload is None:
            raise RefusedError("GET_CONFIG: the back end refused (a reply without payload)")
        if request == Request.GET_INFLIGHT_FD:
            if not isinstance(payload, Inflight) or not payload.mmap_size:
                raise RefusedError("GET_INFLIGHT_FD: the back end has no memory to give (mmap_size is 0)")
            if len(message.fds) != 1:
                raise FrontendError(
                    f"GET_INFLIGHT_FD: {len(message.fds)} descriptors came with it, expected 1"
                )
        acknowledgement = isinstance(payload, U64) and request not in _NUMBERS
        if acknowledgement and isinstance(payload, U64) and payload.value != 0:
            raise RefusedError(f"{message.name}: the back end answered {payload.value}, which is failure")
        return payload

    def acknowledge(self, message: Message, result: int = 0) -> bytes:
        """The answer to a request of the back end's, 0 for success; no bytes if it wants none."""
        if message.stream is not Stream.BACKEND_REQUEST:
            raise ValueError(f"{message.stream.value} is not the stream of the back end's requests")
        if not (message.need_reply and self.has(abi.PROTOCOL_F_REPLY_ACK)):
            return b""
        return encode(message.request, U64(result), flags=abi.FLAG_REPLY)

    def _answered_anyway(self, request: int) -> bool:
        if request == Request.SET_LOG_BASE:
            return self.has(abi.PROTOCOL_F_LOG_SHMFD)
        return request in ALWAYS_ANSWERED


#: Requests whose u64 reply is an answer, not success or failure.
_NUMBERS = frozenset(
    {
        Request.GET_FEATURES,
        Request.GET_PROTOCOL_FEATURES,
        Request.GET_QUEUE_NUM,
        Request.GET_MAX_MEM_SLOTS,
        Request.GET_STATUS,
        Request.SET_DEVICE_STATE_FD,
        Request.SET_LOG_BASE,
    }
)
