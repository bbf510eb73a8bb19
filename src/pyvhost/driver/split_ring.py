"""A split virtqueue from the driver's side, in plain Python (virtio 1.3, 2.7).

The driver's own state (which descriptors are free, which chain a head stands for) is never read back from
shared memory. Everything that lies in guest memory can also be read and written raw, so that a test can lie
to the device: a wild index, a loop, an address from nowhere.

Addresses are guest physical, lengths bytes, indices count modulo 2**16. Ring parts are read and written by
single aligned accesses; the barriers between them, and the device's that each pairs with, are named where
they stand.

Promises: what the device writes is judged before it is used, and DeviceError names what was wrong. Never:
kicks or waits (see `queue`), nor touches the contents of a buffer. Not thread-safe.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from pyvhost.abi import vhost, virtio
from pyvhost.driver import barrier
from pyvhost.driver.errors import DeviceError, RingFullError
from pyvhost.driver.memory import GuestMemory
from pyvhost.driver.ring_parts import Buffer as Buffer
from pyvhost.driver.ring_parts import ByteOrder as ByteOrder
from pyvhost.driver.ring_parts import Descriptor as Descriptor
from pyvhost.driver.ring_parts import DescriptorTable as DescriptorTable
from pyvhost.driver.ring_parts import RingLayout as RingLayout
from pyvhost.driver.ring_parts import swappers

_WRAP = 0xFFFF
# Of descriptor table, available and used ring. The device also reads the used index, when it starts.
_PERMISSIONS = (vhost.ACCESS_RO, vhost.ACCESS_RO, vhost.ACCESS_RW)


def _permission(flags: int) -> int:
    return vhost.ACCESS_WO if flags & virtio.VRING_DESC_F_WRITE else vhost.ACCESS_RO


class Used(NamedTuple):
    """A chain that the device gave back: its head, the bytes written, and what `add` was given with it."""

    head: int
    len: int
    token: object


@dataclass(frozen=True, slots=True)
class Chain:
    """A chain in the device's hands: the descriptors it holds, its indirect table, its writable bytes, and
    what was mapped for it.
    """

    descriptors: tuple[int, ...]
    table: int | None
    writable: int
    token: object
    mapped: tuple[int, ...] = ()


class Dma(Protocol):
    """What makes a guest address one that the device uses, where the two differ (see `iommu`)."""

    def map(self, address: int, length: int, perm: int) -> int:
        """The device's address of `length` bytes at a guest address; `perm` is one of vhost's ACCESS_*."""
        ...

    def unmap(self, iova: int) -> None:
        """Take back what `map` gave: when this returns the device uses it no more."""
        ...


class SplitRing:
    """One split virtqueue of `size` entries.

    `layout` None allocates one. `event_idx` says that VIRTIO_RING_F_EVENT_IDX was negotiated. `byteorder` is
    "little", or a legacy guest's own. A ring starts cleared; `start` other than 0 begins its indices there,
    as after a ring that was stopped and taken up again. With `dma` the device is told mapped addresses only:
    the ring's parts stay mapped until `close`, each buffer and indirect table from `add` to `pop_used`.
    """

    def __init__(
        self,
        memory: GuestMemory,
        size: int = 256,
        layout: RingLayout | None = None,
        *,
        event_idx: bool = False,
        byteorder: ByteOrder = "little",
        start: int = 0,
        dma: Dma | None = None,
    ) -> None:
        if not 0 < size <= virtio.QUEUE_SIZE_MAX or size & (size - 1):
            raise ValueError(f"a split ring has a power of two of entries up to 32768, not {size}")
        self.memory = memory
        self.size = size
        self.layout = layout or RingLayout.allocate(memory, size)
        self.event_idx = event_idx
        self.byteorder: ByteOrder = byteorder
        self.dma = dma
        self._room = self.layout if layout is None else None
        self._u16, self._u32, _ = swappers(byteorder)
        self._bus: RingLayout | None = None
        self._map()
        self.reset(start)

    def _map(self) -> None:
        self.desc = DescriptorTable(self.memory, self.layout.desc, self.size, self.byteorder)
        self._avail = self.memory.words(self.layout.avail, self.size + 3, "H")
        self._used = self.memory.words(self.layout.used, 4 * self.size + 3, "H")
        # The used ring's elements begin on a boundary of 4; the odd last u16 is not part of this view.
        self._elements = self.memory.words(self.layout.used, 2 * self.size + 1, "I")
        if self.dma is not None:
            parts = zip(self.layout, RingLayout.sizes(self.size), _PERMISSIONS, strict=True)
            self._bus = RingLayout(*(self.dma.map(at, size, perm) for at, size, perm in parts))

    @property
    def addresses(self) -> RingLayout:
        """Where the parts lie for SET_VRING_ADDR: mapped addresses, or without `dma` user addresses."""
        if self._bus is not None:
            return self._bus
        return RingLayout(*(self.memory.user_address(part) for part in self.layout))

    def move(self, layout: RingLayout, tell: Callable[[], object], *, copy: bool = True) -> RingLayout:
        """Use the parts at `layout` from now on, `tell` the device (SET_VRING_ADDR); returns where they were.

        `copy` takes the bytes along: only while the device writes none. Not `copy`: both are the same memory,
        seen at two addresses. What was there before is the caller's, but for room that `close` gives back.
        """
        old, bus = self.layout, self._bus
        if copy:
            for there, here, size in zip(layout, old, RingLayout.sizes(self.size), strict=True):
                self.memory.write(there, self.memory.read(here, size))
        self.layout = layout
        self._map()
        tell()
        self._unmap(bus or ())
        return old

    def _unmap(self, iovas: Iterable[int]) -> None:
        if self.dma is not None:
            for iova in iovas:
                self.dma.unmap(iova)

    def reset(self, start: int = 0) -> None:
        """Clear the shared parts and forget every chain. Only while the device does not use the ring.

        Indirect tables of chains still out are given back to memory.
        """
        for chain in getattr(self, "_chains", {}).values():
            self._unmap(chain.mapped)
            if chain.table is not None:
                self.memory.free(chain.table)
        for address, length in zip(self.layout, RingLayout.sizes(self.size), strict=True):
            self.memory.write(address, bytes(length))
        self._free = list(range(self.size - 1, -1, -1))
        self._chains: dict[int, Chain] = {}
        self._next_avail = start & _WRAP
        self._published = start & _WRAP
        self._unkicked = 0
        self._next_used = start & _WRAP
        if start:
            self.avail_idx = start & _WRAP
            self.used_idx = start & _WRAP

    def close(self) -> None:
        """Give the ring's room back to guest memory, if it was allocated here."""
        self._unmap(self._bus or ())
        self._bus = None
        if self._room is not None:
            for address in self._room:
                self.memory.free(address)
            self._room = None

    # --- giving buffers to the device ------------------------------------------------------------------

    @property
    def free_descriptors(self) -> int:
        """Descriptors not part of any chain that is out."""
        return len(self._free)

    @property
    def outstanding(self) -> int:
        """Chains added and not yet popped."""
        return len(self._chains)

    @property
    def next_used(self) -> int:
        """The used index up to which chains were popped."""
        return self._next_used

    def add(
        self,
        readable: Iterable[Buffer] = (),
        writable: Iterable[Buffer] = (),
        *,
        indirect: bool = False,
        token: object = None,
    ) -> int:
        """Make a chain and put its head into the available ring; the device sees it after `publish`.

        `readable` buffers are the device's to read (out), `writable` ones to write (in). `indirect` puts them
        into a table of their own. Returns the head; `token` comes back with it in `pop_used`. Raises
        RingFullError when descriptors are short, ValueError for a chain of nothing.
        """
        buffers = [(addr, length, 0) for addr, length in readable]
        writable = list(writable)
        buffers += [(addr, length, virtio.VRING_DESC_F_WRITE) for addr, length in writable]
        if not buffers:
            raise ValueError("a chain has at least one buffer")
        needed = 1 if indirect else len(buffers)
        if needed > len(self._free):
            raise RingFullError(f"{needed} descriptors wanted, {len(self._free)} of {self.size} are free")
        indices = [self._free.pop() for _ in range(needed)]
        mapped: list[int] = []
        if self.dma is not None:
            mapped = [self.dma.map(addr, length, _permission(flags)) for addr, length, flags in buffers]
            buffers = [(iova, size, flags) for iova, (_, size, flags) in zip(mapped, buffers, strict=True)]
        table = None
        if indirect:
            table = self._indirect_table(buffers)
            size = 16 * len(buffers)
            told = table
            if self.dma is not None:
                told = self.dma.map(table, size, vhost.ACCESS_RO)
                mapped.append(told)
            self.desc.set(indices[0], told, size, virtio.VRING_DESC_F_INDIRECT)
        else:
            self._write_chain(self.desc, indices, buffers)
        total = sum(length for _, length in writable)
        self._chains[indices[0]] = Chain(tuple(indices), table, total, token, tuple(mapped))
        self.offer(indices[0])
        return indices[0]

    def _indirect_table(self, buffers: Sequence[tuple[int, int, int]]) -> int:
        address = self.memory.allocate(16 * len(buffers), 16)
        table = DescriptorTable(self.memory, address, len(buffers), self.byteorder)
        self._write_chain(table, range(len(buffers)), buffers)
        return address

    @staticmethod
    def _write_chain(
        table: DescriptorTable, indices: Sequence[int], buffers: Sequence[tuple[int, int, int]]
    ) -> None:
        last = len(buffers) - 1
        for at, (addr, length, flags) in enumerate(buffers):
            if at < last:
                table.set(indices[at], addr, length, flags | virtio.VRING_DESC_F_NEXT, indices[at + 1])
            else:
                table.set(indices[at], addr, length, flags)

    def offer(self, head: int) -> None:
        """Put any number into the next slot of the available ring: `add` does it with honest heads."""
        self._avail[2 + self._next_avail % self.size] = self._u16(head)
        self._next_avail = (self._next_avail + 1) & _WRAP

    def publish(self) -> int:
        """Let the device see all that was added since the last time, in one store; returns how many."""
        count = (self._next_avail - self._published) & _WRAP
        if count:
            # Pairs with the device's acquire load of avail.idx: whoever sees the index sees the entries, the
            # descriptors and the buffers (virtio 1.3, 2.7.13.3).
            barrier.release()
            self.avail_idx = self._next_avail
            self._published = self._next_avail
            self._unkicked += count
        return count

    def needs_kick(self) -> bool:
        """Whether the device asked to be kicked for what was published since this was last asked."""
        count = min(self._unkicked, _WRAP)
        self._unkicked = 0
        if not count:
            return False
        # Pairs with the device's full fence between asking for kicks (its store to used.flags or avail_event)
        # and its last look at avail.idx: either it sees our index, or we see that it asked (2.7.13.4).
        barrier.full()
        if self.event_idx:
            return (self._published - self.avail_event - 1) & _WRAP < count
        return not self.used_flags & virtio.VRING_USED_F_NO_NOTIFY

    # --- taking them back ------------------------------------------------------------------------------

    def used_pending(self) -> int:
        """How many chains the device gave back and nobody popped.

        Raises DeviceError when the used index is further ahead than chains are out.
        """
        used_idx = self.used_idx
        pending = (used_idx - self._next_used) & _WRAP
        if pending > len(self._chains):
            raise DeviceError(
                f"used.idx went from {self._next_used} to {used_idx}: {pending} chains, where "
                f"{len(self._chains)} are out"
            )
        return pending

    def pop_used(self) -> Used | None:
        """The next chain that the device gave back, or None. Its descriptors are free again.

        Raises DeviceError for an id that is no head of a chain in the device's hands, and for more bytes
        written than the chain had room for.
        """
        if not self.used_pending():
            return None
        # Pairs with the device's release store of used.idx: behind it lie the element and the buffer.
        barrier.acquire()
        head, length = self.used_element(self._next_used)
        chain = self._chains.get(head)
        if chain is None:
            raise DeviceError(
                f"used element {self._next_used} names {head}, which is no head of a chain that is out"
            )
        if length > chain.writable:
            raise DeviceError(
                f"used element {self._next_used} (head {head}) says {length} bytes were written where "
                f"{chain.writable} were writable"
            )
        self._next_used = (self._next_used + 1) & _WRAP
        del self._chains[head]
        self._free.extend(reversed(chain.descriptors))
        self._unmap(chain.mapped)
        if chain.table is not None:
            self.memory.free(chain.table)
        return Used(head, length, chain.token)

    # --- calls -----------------------------------------------------------------------------------------

    def enable_calls(self, after: int = 0) -> bool:
        """Ask for a call when more than `after` further chains are used; False when that is so already.

        Without the event index `after` means nothing to the device, which then calls for the first one.
        """
        if self.event_idx:
            self.used_event = (self._next_used + after) & _WRAP
        else:
            self.avail_flags = 0
        # Pairs with the device's full fence between its store of used.idx and its look at avail.flags or
        # used_event: either it sees that we ask, or we see its index (2.7.7.2, 2.7.10).
        barrier.full()
        return self.used_pending() <= after

    def disable_calls(self) -> None:
        """Ask not to be called. A hint: a call may still come."""
        if self.event_idx:
            # As far ahead as can be. The flags stay 0 with the event index (2.7.7.1).
            self.used_event = (self._next_used - 1) & _WRAP
        else:
            self.avail_flags = virtio.VRING_AVAIL_F_NO_INTERRUPT

    def call_is_due(self, before: int, now: int, *, emptied: bool = False) -> bool:
        """Whether a device that moved used.idx from `before` to `now` owes a call, as the words stand now.

        `emptied`: VIRTIO_F_NOTIFY_ON_EMPTY was negotiated and the device has used every chain it was given,
        which asks for a call whatever the words say (virtio 1.3, 6.3 legacy; 2.7.7.2).
        """
        if before == now:
            return False
        if emptied:
            return True
        if self.event_idx:
            return (now - self.used_event - 1) & _WRAP < (now - before) & _WRAP
        return not self.avail_flags & virtio.VRING_AVAIL_F_NO_INTERRUPT

    # --- the words themselves ----------------------------------------------------------------------------

    @property
    def avail_flags(self) -> int:
        return self._u16(self._avail[0])

    @avail_flags.setter
    def avail_flags(self, value: int) -> None:
        self._avail[0] = self._u16(value)

    @property
    def avail_idx(self) -> int:
        return self._u16(self._avail[1])

    @avail_idx.setter
    def avail_idx(self, value: int) -> None:
        self._avail[1] = self._u16(value)

    def avail_entry(self, index: int) -> int:
        """The head in slot `index` modulo the ring's size."""
        return self._u16(self._avail[2 + index % self.size])

    def set_avail_entry(self, index: int, head: int) -> None:
        self._avail[2 + index % self.size] = self._u16(head)

    @property
    def used_event(self) -> int:
        return self._u16(self._avail[2 + self.size])

    @used_event.setter
    def used_event(self, value: int) -> None:
        self._avail[2 + self.size] = self._u16(value)

    @property
    def used_flags(self) -> int:
        return self._u16(self._used[0])

    @used_flags.setter
    def used_flags(self, value: int) -> None:
        self._used[0] = self._u16(value)

    @property
    def used_idx(self) -> int:
        return self._u16(self._used[1])

    @used_idx.setter
    def used_idx(self, value: int) -> None:
        self._used[1] = self._u16(value)

    def used_element(self, index: int) -> tuple[int, int]:
        """The id and the length in slot `index` modulo the ring's size."""
        at = 1 + 2 * (index % self.size)
        return self._u32(self._elements[at]), self._u32(self._elements[at + 1])

    def set_used_element(self, index: int, head: int, length: int) -> None:
        at = 1 + 2 * (index % self.size)
        self._elements[at] = self._u32(head)
        self._elements[at + 1] = self._u32(length)

    @property
    def avail_event(self) -> int:
        return self._u16(self._used[2 + 4 * self.size])

    @avail_event.setter
    def avail_event(self, value: int) -> None:
        self._used[2 + 4 * self.size] = self._u16(value)
