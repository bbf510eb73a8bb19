"""The blocks of the vsock loop: guests, their connections, and the queues between the loop and Python.

A *guest* (one vsock device) takes the place that a port has in the net loop. A *connection* is a record of a
worker's array; from OPEN until CLOSED is told it is the loop's, else Python's. Bytes that a guest has sent and its
other end has not taken lie in the connection's `out` buffer, as they are (STREAM), or as records (SEQPACKET): length
and flags, 4 bytes each, then the message.

Promises: sizes are checked at import. Never: has behaviour.
"""

from __future__ import annotations

from typing import Final

from pyvhost.abi.virtio_vsock import VsockHdr
from pyvhost.dataplane.blocks import SCRATCH_IOV, SCRATCH_WORDS, int64s

#: Bytes before every packet.
HEADER: Final = 44
assert VsockHdr.fwd_cnt.offset + VsockHdr.fwd_cnt.size == HEADER

#: A guest, in a worker's array of ports.
GUEST: Final = int64s(
    # Scheduling, as a net port has it; it has no descriptor of its own.
    "used",
    "active",
    "tx",
    "rx",
    "fd",
    "row",
    "idle_since",
    "busy_ns",
    "readable",
    # Who it is.
    "cid",
    # Its connections by key: address and mask of the buckets, and what the hash is mixed with.
    "table",
    "table_mask",
    "seed",
    # Queues from and to Python (`QUEUE_*`), their masks, and an eventfd of Python's for the latter. What is kept of
    # `todo` for what connections have to tell.
    "commands",
    "commands_mask",
    "todo",
    "todo_mask",
    "todo_kept",
    "python_fd",
    # What was asked for and waits for the guest's buffers: packets, and what begins behind them.
    "packets",
    "packets_mask",
    # Whether Python was told something in this turn.
    "news",
    # Connections that have something for the guest, in turn (-1: none); whether its receive ring had no buffer.
    "ready_first",
    "ready_last",
    "rx_dry",
)

CONNECTION: Final = int64s(
    # Whether it is in its guest's table, which of all connections it is, whether who was asked for it has accepted,
    # and whether data may flow.
    "open",
    "serial",
    "accepted",
    "started",
    # Whose it is, whether that guest has asked for it, and its key; the next one in its bucket (-1: none).
    "guest",
    "by_guest",
    "type",
    "guest_port",
    "peer_cid",
    "peer_port",
    "bucket_next",
    # The other end: a socket's descriptor, or another connection (-1: none).
    "fd",
    "other",
    # From the guest, in bytes modulo 2**32: what it may have under way, what came, what has gone on, and what of that
    # it was told.
    "buf_alloc",
    "rx_cnt",
    "fwd_cnt",
    "fwd_told",
    "alloc_told",
    # What the other end has not taken: address and size (a power of two), free-running positions of the end of what
    # is whole, of what was put, and of what was taken; where the record of an unfinished message begins (-1: none).
    "out",
    "out_size",
    "out_whole",
    "out_put",
    "out_taken",
    "out_open",
    # Whether the other end may take more, and whether epoll tells when.
    "writable",
    "watches_writable",
    # Nothing more goes to the other end: it has failed. The guest has said that it sends nothing more.
    "mute",
    "guest_done",
    # To the guest, in bytes modulo 2**32: what it may be sent, what it has got rid of, what it was sent.
    "peer_buf_alloc",
    "peer_fwd_cnt",
    "tx_cnt",
    # Whether the guest has made its room smaller than it once was.
    "shrunk",
    # Whether the other end may have something, whether reads of it end early (at an urgent byte), whether it has hung
    # up (GONE: both ways), whether that was told (nothing more is read), and whether the guest takes nothing more.
    "readable",
    "urgent",
    "hung_up",
    "ended",
    "hushed",
    # A message of a SEQPACKET socket on its way: address, room, its bytes and how many of them have gone.
    "message",
    "message_room",
    "message_bytes",
    "message_gone",
    # How many bytes of a joined connection's first whole record have gone.
    "record_gone",
    # The ready list; whether the guest is to be told of credit; whether it was asked for some.
    "queued",
    "next",
    "credit_due",
    "credit_asked",
    # Python wants to know when `out` is empty; that the connection was violated has been told.
    "drain",
    "violated",
    # How many of the guest's buffers the last read filled.
    "expect",
)

#: `hung_up`: the other side has closed, and not only shut down its sending one.
GONE: Final = 2

#: A queue between the loop and Python: how many were put, how many taken (a cache line each), the entries.
QUEUE_PUT: Final = 0
QUEUE_TAKEN: Final = 64
QUEUE_ENTRIES: Final = 128
#: An entry: its kind, the connection (-1: none), then six words; of a command the last one is a serial number.
ENTRY_BYTES: Final = 64
ENTRY_KIND: Final = 0
ENTRY_SLOT: Final = 8
ENTRY_A: Final = 16
ENTRY_B: Final = 24
ENTRY_TYPE: Final = 16
ENTRY_GUEST_PORT: Final = 24
ENTRY_PEER_CID: Final = 32
ENTRY_PEER_PORT: Final = 40
ENTRY_OP: Final = 48
ENTRY_FLAGS: Final = 56
ENTRY_SERIAL: Final = 56

#: Python to loop. `OPEN`: it is in the table from now on; `SEND`: a packet without data: its key, and op (above it:
#: flags); `START`: data may flow; `DRAIN`: tell when `out` is empty; `HUSH`: the guest takes nothing more; `MESSAGE`:
#: an empty message, and go on reading; `JOIN`: A is the other end, if it has serial number B still; `CLOSE`. SEND,
#: START and MESSAGE may have to wait until the guest has a buffer, and CLOSE does not wait for them: they come with
#: the connection's serial number.
CMD_OPEN: Final = 1
CMD_SEND: Final = 2
CMD_START: Final = 3
CMD_DRAIN: Final = 4
CMD_HUSH: Final = 5
CMD_MESSAGE: Final = 6
CMD_JOIN: Final = 7
CMD_CLOSE: Final = 8

#: Loop to Python. `PACKET`: one that is not the loop's, its key, op (above it: buf_alloc) and flags (fwd_cnt); `EOF`,
#: `FAILED` (A: errno): of the other end; `VIOLATED` (A: one of the below); `DRAINED`; `CLOSED`: it is Python's again.
TODO_PACKET: Final = 1
TODO_EOF: Final = 2
TODO_FAILED: Final = 3
TODO_VIOLATED: Final = 4
TODO_DRAINED: Final = 5
TODO_CLOSED: Final = 6

#: How a guest broke the rules: more than it was granted; more messages than there is room for; a length beyond the
#: chain's.
VIOLATED_CREDIT: Final = 1
VIOLATED_RECORDS: Final = 2
VIOLATED_LENGTH: Final = 3

#: Entries a connection has at most between OPEN and CLOSED.
TOLD_AT_MOST: Final = 8

#: Bytes before a message in `out`.
RECORD: Final = 8
#: Epoll's kind of event for a connection (`blocks.EVENT_*` has the others).
EVENT_CONNECTION: Final = 3

#: Connections of a worker, and of a guest, which has a place for each of its own from the beginning. What nobody uses
#: of the worker's array has no memory.
MAX_CONNECTIONS: Final = 1 << 18
MAX_OF_GUEST: Final = 1 << 14

#: A worker's scratch memory, before what the net loop builds there: a header read, one written.
SCRATCH_READ: Final = 64
SCRATCH_WRITTEN: Final = 128
assert SCRATCH_WRITTEN + 64 <= SCRATCH_WORDS
#: And a struct msghdr, behind what lies in SCRATCH_WORDS.
SCRATCH_MESSAGE: Final = SCRATCH_WORDS + 64
MESSAGE_IOV: Final = 16
MESSAGE_IOV_COUNT: Final = 24
MESSAGE_FLAGS: Final = 48
MESSAGE_BYTES: Final = 56
assert SCRATCH_MESSAGE + MESSAGE_BYTES <= SCRATCH_IOV
#: The most that a connection gets in its turn, and the longest packet (as Linux's VIRTIO_VSOCK_MAX_PKT_BUF_SIZE).
QUANTUM: Final = 65536
#: About what a guest sends in a turn: half the credit of a connection, so that it hears of that, and sends more,
#: while the other half is on its way.
TURN: Final = 2 * QUANTUM
