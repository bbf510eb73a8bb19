"""The device's side of a split virtqueue as virtio 1.2, 2.7 has it, in the plainest Python: the kernels' judge.

What Linux's vhost adds to it is here as well: an IOTLB, the dirty log, the byte order of legacy guests.

Promises: written from the standard, with Python's own unbounded integers and bytes; shares no code with the
data plane. Where a chain is wrong in more ways than one, every fault that may be named is allowed.
Never: fast, and never touches memory: it is given bytes and answers with places in them.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

NEXT, WRITE, INDIRECT = 1, 2, 4
NO_INTERRUPT, NO_NOTIFY = 1, 1
#: What a device does with memory, and may: vhost's ACCESS_*.
RO, WO, RW = 1, 2, 3
DESCRIPTOR = struct.Struct("<QIHH")
#: By byte order: "<" or, a legacy guest's, ">".
DESCRIPTORS = {order: struct.Struct(order + "QIHH") for order in "<>"}
PAGE = 4096
#: An indirect table has no more descriptors than a queue can have entries of 16 bits (2.7.5.3.1).
LONGEST_TABLE = 65536


class Fault(Exception):  # noqa: N818 - the word that everybody has for it
    """What a driver did wrong: the words that fit."""

    def __init__(self, *words: str, miss: tuple[int, int] | None = None) -> None:
        super().__init__(" or ".join(words))
        self.words = frozenset(words)
        #: For "MISS": the address without an entry, and what it is wanted for.
        self.miss = miss


@dataclass(frozen=True)
class Region:
    """Guest memory from `guest` on: a guest physical address, or with an IOTLB an I/O virtual one.

    `log`: its guest physical address, for the dirty log; `perm`: what may be done there.
    """

    guest: int
    content: bytes | bytearray | memoryview
    size: int
    log: int
    perm: int = RW


@dataclass(frozen=True)
class Piece:
    """Bytes of one region, by the region's place in the table."""

    region: int
    offset: int
    length: int


@dataclass
class Chain:
    head: int
    readable: list[Piece] = field(default_factory=list)
    writable: list[Piece] = field(default_factory=list)

    @property
    def readable_bytes(self) -> int:
        return sum(piece.length for piece in self.readable)

    @property
    def writable_bytes(self) -> int:
        return sum(piece.length for piece in self.writable)


@dataclass(frozen=True)
class Descriptor:
    addr: int
    len: int
    flags: int
    next: int


class Memory:
    """Regions, in any order; addresses are modulo 2**64, as the fields that hold them.

    `iotlb`: they are its entries, and what has none is not wrong but missed.
    """

    def __init__(self, regions: Sequence[Region], iotlb: bool = False) -> None:
        self.regions = regions
        self.iotlb = iotlb

    def _holder(self, address: int) -> tuple[int, Region] | None:
        address %= 1 << 64
        for place, region in enumerate(self.regions):
            if region.guest <= address < region.guest + region.size:
                return place, region
        return None

    def pieces(self, address: int, length: int, access: int = RO) -> Iterator[Piece]:
        """The pieces of a range in order; KeyError at the first byte that is no memory, or if it wraps.

        Fault at the first byte that the IOTLB has no entry for, or none for this.
        """
        if address % (1 << 64) + length > 1 << 64:
            raise KeyError(address)
        while length:
            held = self._holder(address)
            if held is None:
                if self.iotlb:
                    raise Fault("MISS", miss=(address % (1 << 64), access))
                raise KeyError(address)
            place, region = held
            if region.perm & access != access:
                raise Fault("PERMISSION")
            offset = address % (1 << 64) - region.guest
            run = min(length, region.size - offset)
            yield Piece(place, offset, run)
            address += run
            length -= run

    def read(self, address: int, length: int) -> bytes:
        return b"".join(
            bytes(self.regions[piece.region].content[piece.offset : piece.offset + piece.length])
            for piece in self.pieces(address, length)
        )


class Table:
    """A descriptor table: the queue's own, or an indirect one."""

    def __init__(
        self, size: int, content: bytes | None, memory: Memory, order: str, address: int = 0
    ) -> None:
        self.size = size
        self._layout = DESCRIPTORS[order]
        self._content = content
        self._memory = memory
        self._address = address

    def __getitem__(self, index: int) -> Descriptor:
        if self._content is not None:
            raw = self._content[16 * index : 16 * index + 16]
        else:
            raw = self._memory.read(self._address + 16 * index, 16)
        return Descriptor(*self._layout.unpack(raw))


def walk(memory: Memory, content: bytes, num: int, head: int, longest: int, order: str = "<") -> Chain:
    """The chain at `head` of the descriptor table `content` (2.7.5); Fault."""
    chain = Chain(head)
    table = Table(num, content, memory, order)
    if head >= num:
        raise Fault("HEAD")
    descriptors = 0
    indirect = False
    behind: tuple[int, int] | None = None
    index = head
    while True:
        # 2.7.5.2: no loops, so no more descriptors than the table has.
        descriptors += 1
        if descriptors > table.size:
            raise Fault("LOOP")
        try:
            descriptor = table[index]
        except KeyError:
            raise Fault("INDIRECT") from None
        if descriptor.flags & INDIRECT:
            # 2.7.5.3.1: not in an indirect table; WRITE is ignored. A driver must not set NEXT; as on Linux the
            # chain goes on behind the table then.
            wrong = set()
            if indirect:
                wrong.add("INDIRECT")
            count, odd = divmod(descriptor.len, 16)
            if odd or not 0 < count <= LONGEST_TABLE:
                wrong.add("INDIRECT_SIZE")
            if wrong:
                raise Fault(*wrong)
            if len(chain.readable) + len(chain.writable) == longest:
                raise Fault("TOO_LONG")
            # Part of the table may be no memory: a fault at once where its first region ends and no other
            # follows; further on only if the chain comes there.
            try:
                first = next(memory.pieces(descriptor.addr, descriptor.len))
                if first.length < descriptor.len:
                    memory.read(descriptor.addr + first.length, 1)
            except KeyError:
                raise Fault("INDIRECT") from None
            behind = (descriptor.next, descriptors) if descriptor.flags & NEXT else None
            table = Table(count, None, memory, order, descriptor.addr)
            indirect = True
            descriptors = index = 0
            continue
        _add(memory, chain, descriptor, longest)
        if descriptor.flags & NEXT:
            index = descriptor.next
        elif behind is not None:
            table = Table(num, content, memory, order)
            (index, descriptors), behind, indirect = behind, None, False
        else:
            return chain
        if index >= table.size:
            raise Fault("NEXT")


def _add(memory: Memory, chain: Chain, descriptor: Descriptor, longest: int) -> None:
    wrong = set()
    miss = None
    pieces: list[Piece] = []
    room = longest - len(chain.readable) - len(chain.writable)
    try:
        for piece in memory.pieces(descriptor.addr, descriptor.len, WO if descriptor.flags & WRITE else RO):
            pieces.append(piece)
    except KeyError:
        wrong.add("ADDRESS")
    except Fault as fault:
        # Nobody looks further than a chain may be long.
        if len(pieces) <= room:
            wrong |= fault.words
            miss = fault.miss
        if len(pieces) == room:
            wrong.add("TOO_LONG")
    if len(pieces) > room:
        wrong.add("TOO_LONG")
    # 2.7.4.2: everything that is read comes before everything that is written.
    if not descriptor.flags & WRITE and chain.writable:
        wrong.add("DIRECTION")
    if wrong:
        raise Fault(*wrong, miss=miss)
    (chain.writable if descriptor.flags & WRITE else chain.readable).extend(pieces)


def waiting(avail_idx: int, last: int, num: int) -> int:
    """How many entries the driver has added since entry `last` (2.7.6); Fault."""
    ahead = (avail_idx - last) % 65536
    if ahead > num:
        raise Fault("AVAIL_INDEX")
    return ahead


def head_at(avail: bytes, num: int, entry: int, order: str = "<") -> int:
    """The head in available entry `entry`, a free-running number."""
    (head,) = struct.unpack_from(order + "H", avail, 4 + 2 * (entry % num))
    return int(head)


class Log:
    """The dirty log as it has to be: page N is bit N % 8 of byte N / 8; what lies outside has no bit."""

    def __init__(self, content: bytes) -> None:
        self.content = bytearray(content)

    def mark(self, address: int, length: int) -> bool:
        """Bytes of guest memory that were written; whether there were any."""
        if length > 0:
            last = min((address + length - 1) // PAGE, 8 * len(self.content) - 1)
            for page in range(address // PAGE, last + 1):
                self.content[page // 8] |= 1 << page % 8
        return length > 0


@dataclass
class Device:
    """What the device has written and remembers: its used ring, and when it called."""

    num: int
    event_idx: bool
    notify_on_empty: bool
    used: bytearray
    idx: int
    shown: int
    last_avail: int
    order: str = "<"
    asked: bool = False
    #: What was written to the used ring since somebody looked: offset and bytes.
    written: list[tuple[int, int]] = field(default_factory=list)

    def _put(self, offset: int, layout: str, *values: int) -> None:
        struct.pack_into(self.order + layout, self.used, offset, *values)
        self.written.append((offset, struct.calcsize("<" + layout)))

    def use(self, head: int, length: int) -> None:
        self._put(4 + 8 * (self.idx % self.num), "II", head, length)
        self.idx = (self.idx + 1) % 65536

    def publish(self, avail: bytes) -> bool:
        """Shows what was used; whether the driver wants a call (2.7.7.2, and 6.3 for NOTIFY_ON_EMPTY)."""
        if self.idx == self.shown:
            return False
        before, self.shown = self.shown, self.idx
        asked, self.asked = self.asked, True
        self._put(2, "H", self.idx)
        flags, idx = struct.unpack_from(self.order + "HH", avail, 0)
        if self.notify_on_empty and idx == self.last_avail:
            return True
        if not self.event_idx:
            return not flags & NO_INTERRUPT
        (event,) = struct.unpack_from(self.order + "H", avail, 4 + 2 * self.num)
        # Nothing is known of what the driver has seen before; then, whether the entry that it waits for, number
        # `event`, is among those just shown.
        return not asked or (event - before) % 65536 < (self.idx - before) % 65536

    def ask_for_kicks(self, wanted: bool, seen: int) -> None:
        if self.event_idx:
            if wanted:
                self._put(4 + 8 * self.num, "H", seen)
        else:
            self._put(0, "H", 0 if wanted else NO_NOTIFY)
