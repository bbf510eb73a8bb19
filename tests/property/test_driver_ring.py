"""The driver's half of a split ring against the stub device, in any order of steps: nothing is lost, made up,
given back twice or changed, and nobody who wants to be woken sleeps on.
"""

from __future__ import annotations

from collections import deque

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from pyvhost.driver.errors import GuestMemoryError, RingFullError
from pyvhost.driver.memory import GuestMemory, Span
from pyvhost.driver.split_ring import Buffer, RingLayout, SplitRing
from stub_device import StubDevice, Taken

REGION = 1 << 16
# Two that touch, and one apart.
SPANS = [Span(0x10000, REGION), Span(0x20000, REGION), Span(0x100000, REGION)]

sizes = st.lists(st.integers(1, 40), max_size=3)


class DriverAndDevice(RuleBasedStateMachine):
    """Every chain carries its number in its readable bytes, and gets it back in its writable ones."""

    @initialize(
        size=st.sampled_from([1, 4, 16]),
        event_idx=st.booleans(),
        byteorder=st.sampled_from(["little", "big"]),
        start=st.sampled_from([0, 1, 65533]),
        regions=st.tuples(*[st.integers(0, 2)] * 3),
    )
    def begin(
        self,
        size: int,
        event_idx: bool,
        byteorder: str,
        start: int,
        regions: tuple[int | None, int | None, int | None],
    ) -> None:
        self.memory = GuestMemory(SPANS)
        self.ring = SplitRing(
            self.memory,
            size,
            RingLayout.allocate(self.memory, size, regions),
            event_idx=event_idx,
            byteorder="big" if byteorder == "big" else "little",
            start=start,
        )
        self.device = StubDevice(self.ring)
        self.added: dict[int, tuple[list[Buffer], list[Buffer]]] = {}
        self.needs: dict[int, int] = {}
        self.held = 0
        self.number = 0
        self.unpublished = 0
        self.published: deque[int] = deque()
        self.taken: list[tuple[int, Taken]] = []
        self.used: deque[tuple[int, int, bytes]] = deque()
        self.driver_sleeps = False
        self.device_sleeps = False

    def teardown(self) -> None:
        if hasattr(self, "memory"):
            self.memory.close()

    def room(self, size: int) -> Buffer:
        if self.number % 5 == 0 and size > 1:
            try:
                return self.memory.allocate_across(size), size
            except GuestMemoryError:
                pass  # another buffer lies on the border
        return self.memory.allocate(size, 1, self.number % 3), size

    @rule(chains=st.lists(st.tuples(sizes, sizes, st.booleans()), min_size=1, max_size=4))
    def add_some(self, chains: list[tuple[list[int], list[int], bool]]) -> None:
        for readable, writable, indirect in chains:
            self.add(readable, writable, indirect)

    def add(self, readable: list[int], writable: list[int], indirect: bool) -> None:
        if not readable and not writable:
            writable = [1]
        need = 1 if indirect else len(readable) + len(writable)
        out = [self.room(size) for size in readable]
        into = [self.room(size) for size in writable]
        for address, size in out:
            self.memory.write(address, bytes([self.number & 0xFF]) * size)
        for address, size in into:
            self.memory.write(address, b"\xee" * size)
        free = self.ring.free_descriptors
        try:
            self.ring.add(out, into, indirect=indirect, token=self.number)
        except RingFullError:
            assert need > free
            for address, _ in out + into:
                self.memory.free(address)
            return
        assert self.ring.free_descriptors == free - need
        self.added[self.number] = (out, into)
        self.held += need
        self.needs[self.number] = need
        self.number += 1
        self.unpublished += 1

    @rule()
    def publish(self) -> None:
        assert self.ring.publish() == self.unpublished
        new = range(self.number - self.unpublished, self.number)
        self.published += new
        self.unpublished = 0
        if self.ring.needs_kick():
            assert new
            self.device_sleeps = False
        elif new:
            assert not self.device_sleeps, "the device asked for a kick, and there is something new"

    @rule()
    def device_goes_to_sleep(self) -> None:
        self.device.want_kicks(True)
        self.device_sleeps = not self.published

    @rule()
    def device_wants_no_kicks(self) -> None:
        self.device.want_kicks(False)
        self.device_sleeps = False

    @precondition(lambda self: not getattr(self, "device_sleeps", True))
    @rule(limit=st.integers(1, 20))
    def device_takes(self, limit: int) -> None:
        for chain in self.device.take(limit):
            number = self.published.popleft()
            out, into = self.added[number]
            assert [(address, size) for address, size, _ in chain.buffers] == out + into
            assert [flags & 2 for _, _, flags in chain.buffers] == [0] * len(out) + [2] * len(into)
            assert self.device.gather(chain) == bytes([number & 0xFF]) * sum(size for _, size in out)
            self.taken.append((number, chain))
        self.device_sleeps = False

    @precondition(lambda self: bool(getattr(self, "taken", None)))
    @rule(data=st.data(), count=st.integers(1, 5))
    def device_uses(self, data: st.DataObject, count: int) -> None:
        for _ in range(min(count, len(self.taken))):
            number, chain = self.taken.pop(data.draw(st.integers(0, len(self.taken) - 1)))
            room = sum(chain.sizes(2))
            answer = bytes([number & 0xFF]) * data.draw(st.integers(0, room))
            written = self.device.scatter(chain, answer)
            self.device.use(chain.head, written, publish=False)
            self.used.append((number, written, answer))
        before, now = self.device.signalled, self.device.used_idx
        self.device.publish()
        due = self.ring.call_is_due(before, now)
        assert self.device.call_due() is due
        if due:
            self.driver_sleeps = False
        assert not self.driver_sleeps, "the driver asked for a call, and there is something new"

    @rule()
    def driver_goes_to_sleep(self) -> None:
        self.driver_sleeps = self.ring.enable_calls()
        assert self.driver_sleeps is not bool(self.used)

    @rule()
    def driver_wants_no_calls(self) -> None:
        self.ring.disable_calls()
        self.driver_sleeps = False

    @precondition(lambda self: not getattr(self, "driver_sleeps", True))
    @rule(limit=st.integers(1, 20))
    def driver_pops(self, limit: int) -> None:
        for _ in range(limit):
            used = self.ring.pop_used()
            if used is None:
                assert not self.used
                return
            number, written, answer = self.used.popleft()
            assert (used.token, used.len) == (number, written)
            out, into = self.added.pop(number)
            self.held -= self.needs.pop(number)
            room = b"".join(self.memory.read(address, size) for address, size in into)
            assert room == answer + b"\xee" * (len(room) - written)
            for address, _ in out + into:
                self.memory.free(address)

    @invariant()
    def everything_is_somewhere(self) -> None:
        if not hasattr(self, "ring"):
            return
        assert self.ring.free_descriptors == self.ring.size - self.held
        assert self.ring.outstanding == len(self.added)
        assert self.ring.used_pending() == len(self.used)
        assert len(self.added) == self.unpublished + len(self.published) + len(self.taken) + len(self.used)


TestDriverAndDevice = DriverAndDevice.TestCase
TestDriverAndDevice.settings = settings(max_examples=80, stateful_step_count=80, deadline=None)
