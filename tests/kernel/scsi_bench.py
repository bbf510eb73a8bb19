"""A vhost-scsi device and three rings laid out by hand: what the experiments with SCSI are done with.

A fact has until `PATIENCE` to come true, and is recorded as it was found. Its values are told in words that do not
depend on whose disk it is: heads and not lengths of used elements, sense key and code and not sense data's format.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from types import TracebackType
from typing import Any, Self

import pyvhost
from kernel.counted import CountedRing
from pyvhost.abi import virtio
from pyvhost.abi import virtio_scsi as abi
from pyvhost.driver.memory import MIB, GuestMemory
from pyvhost.driver.scsi_command import Format, address
from pyvhost.driver.split_ring import SplitRing
from pyvhost.driver.vhost_ioctl import VhostScsiFrontend
from pyvhost.scsi import endpoints

Fact = tuple[str, Any]

PATIENCE = 3.0
TICK = 0.002
WWPN = "naa.600140554cf3a18e"
TARGET = 1
SIZE = 8192 * 512
CONTROL, EVENT, REQUEST = 0, 1, 2
#: What lies in a response before the device writes it.
FILL = 0xEE
#: Where the experiments have things, in the guest's addresses.
HEADER, RESPONSE, DATA = 0x300000, 0x301000, 0x310000
NEXT, WRITE = virtio.VRING_DESC_F_NEXT, virtio.VRING_DESC_F_WRITE


class Ring(CountedRing):
    """A ring of the device's three."""

    def __init__(self, bench: ScsiBench, index: int) -> None:
        super().__init__(bench, index, SplitRing(bench.memory, 16), str(index))
        #: Calls of all facts before.
        self._told = 0

    def chain(self, *pieces: tuple[int, int, int], head: int | None = None, at: int = 0) -> None:
        """Offers a chain of (address, length, flags) from descriptor `at` on, and kicks; `head` is a lie about it."""
        for number, (where, length, flags) in enumerate(pieces, at):
            last = number == at + len(pieces) - 1
            self.ring.desc.set(number, where, length, flags | (0 if last else NEXT), number + 1)
        self.ring.offer(at if head is None else head)
        self.ring.publish()
        self.queue.kick()

    def used(self) -> list[int]:
        """Heads that no fact was told of."""
        count = (self.ring.used_idx - self._seen) & 0xFFFF
        return [self.ring.used_element((self._seen + at) & 0xFFFF)[0] for at in range(count)]

    def told(self) -> None:
        """A fact was told: the next one begins here."""
        self._told += self._calls
        self._calls = self._errs = 0
        self._seen = self.ring.used_idx


class ScsiBench:
    """A device with one disk at 1:0. `expected` are the facts that are to be found, in order."""

    def __init__(self, expected: Sequence[Fact]) -> None:
        self.expected = list(expected)
        self.facts: list[Fact] = []
        self.format = Format()
        self._stack = ExitStack()
        self._device = ExitStack()

    def __enter__(self) -> Self:
        self.endpoint = endpoints.register(WWPN, [f"{TARGET}:0=memory:{SIZE}"])
        self._stack.callback(self.endpoint.unregister)
        self.memory = self._stack.enter_context(GuestMemory(4 * MIB, anonymous=True))
        self.set_up()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._device.close()
        self._stack.close()

    def set_up(self, features: int = 1 << virtio.F_VERSION_1) -> None:
        """A device afresh, all three rings running."""
        self._device.close()
        self.handle = self._device.enter_context(pyvhost.open("/dev/vhost-scsi"))
        self.front = VhostScsiFrontend(self.handle, WWPN)
        self.front.negotiate(features)
        self.front.set_mem_table(self.memory.regions)
        self.rings = [Ring(self, index) for index in range(3)]
        self.control, self.event, self.request = self.rings
        for ring in self.rings:
            self._device.callback(ring.queue.close)
            self.front.start_ring(ring.index, ring.queue)
        self.front.set_endpoint()

    def fact(self, name: str, value: Callable[[], object]) -> None:
        """Finds the next fact."""
        wanted = dict(self.expected[len(self.facts) :]).get(name)
        end = time.monotonic() + PATIENCE
        while (found := value()) != wanted and time.monotonic() < end:
            time.sleep(TICK)
        self.facts.append((name, found))

    # --- requests ---------------------------------------------------------------------------------------------

    def lay(self, cdb: bytes, data: bytes = b"", *, lun: bytes = address(TARGET, 0)) -> int:
        """A request's header and data in memory, and an untouched response; bytes of the header."""
        header = self.format.command(lun, 1, cdb)
        self.memory.write(HEADER, header)
        self.memory.write(RESPONSE, bytes([FILL]) * self.format.response_size)
        self.memory.write(DATA, data)
        return len(header)

    def command(
        self,
        name: str,
        cdb: bytes,
        data: bytes = b"",
        room: int = 0,
        *,
        lun: bytes = address(TARGET, 0),
        counted: bool = False,
    ) -> None:
        """One command, and the fact of what came of it; `counted`: calls and errs as well."""
        header = self.lay(cdb, data or bytes(room), lun=lun)
        pieces = [(HEADER, header, 0)]
        pieces += [(DATA, len(data), 0)] if data else []
        pieces += [(RESPONSE, self.format.response_size, WRITE)]
        pieces += [(DATA, room, WRITE)] if room else []
        self.request.chain(*pieces)
        self.fact(name, lambda: self.answer(room, counted=counted))
        self.request.told()

    def answer(self, room: int, *, counted: bool) -> dict[str, object]:
        """What came of a command."""
        raw = self.memory.read(RESPONSE, self.format.response_size)
        sense = raw[12 : 12 + int.from_bytes(raw[:4], "little")]
        found: dict[str, object] = {
            "used": self.request.used(),
            "resid": int.from_bytes(raw[4:8], "little"),
            "status": raw[10],
            "response": raw[11],
            "sense": told_sense(sense),
            "data": "",
        }
        if found["status"] == found["response"] == 0:
            found["data"] = self.memory.read(DATA, min(room, 64)).hex()
        if counted:
            found |= {"errs": self.request.errs(), "calls": self.request.calls()}
        return found

    def ask(self, name: str, request: bytes, room: int) -> None:
        """A request for the control queue, and the fact of its answer."""
        self.memory.write(HEADER, request)
        self.memory.write(RESPONSE, bytes([FILL]) * room)
        self.control.chain((HEADER, len(request), 0), (RESPONSE, room, WRITE))
        self.fact(
            name,
            lambda: {
                "used": self.control.used(),
                "response": self.memory.read(RESPONSE, room).hex(),
                "errs": self.control.errs(),
                "calls": self.control.calls(),
            },
        )
        self.control.told()

    def tmf(self, name: str, subtype: int, lun: bytes = address(TARGET, 0)) -> None:
        """A task management function, for a task that is not there."""
        self.ask(name, self.format.tmf(subtype, lun, 99), 1)

    def an(self, name: str, kind: int) -> None:
        """An asynchronous notification request."""
        self.ask(name, self.format.query(kind, address(TARGET, 0), abi.EVT_ASYNC_POWER_MGMT), 5)


def told_sense(sense: bytes) -> list[int]:
    """Key, code and qualifier; nothing for no sense data."""
    return [sense[2] & 15, sense[12], sense[13]] if sense else []
