"""Fuzz target of the socket device: hostile guests, and host's ends that do as they like, beside some that behave.

    python fuzz/fuzz_vsock.py --seconds 60 --seed 1
    python fuzz/fuzz_vsock.py --seed 1 --case 4711        one case again

A case is a guest's life: packets and chains that are made up, of connections that there are and of others, to ends
that answer, wait, stall, hang up, or are a sibling's; its rings stop and start. After it the device has none of its
connections left. A connection of the same guest that is let alone, and one of a neighbour that outlives all cases,
carry their bytes through it.

Promises: ends after `--seconds` and the case that is under way; tells the case that failed, hung or killed the
process. Exit status 1 then.
"""

from __future__ import annotations

import logging
import random
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

from in_child import Cases, give_up, main

_CLOSES_WITHIN_SECONDS = 15
_STEPS = 150
_BUFFER = 16384
_STREAM, _SEQPACKET = 1, 2
#: Ports of the host: all accept, but for one that never answers, and one that refuses.
_ACCEPTS, _STALLS, _HOLDS, _REFUSES, _QUIET = 80, 81, 82, 83, 99
_CID, _SIBLING = 52, 53


class _Complaints(logging.Handler):
    """What the package logs of exceptions that nobody has expected."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.found: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if record.exc_info or "closed with" in record.getMessage():
            self.found.append(self.format(record))


class _Life:
    """One case."""

    def __init__(self, dice: random.Random, scene: Any, guest: Any, ends: list[Any], asked: Any) -> None:
        from pyvhost.abi import virtio_vsock as abi
        from pyvhost.driver.vsock_packet import Packet

        self.dice, self.scene, self.guest, self.ends, self.asked = dice, scene, guest, ends, asked
        self.abi, self.packet = abi, Packet
        #: A connection that nothing bad is sent on.
        self.quiet = guest.connect(_QUIET)
        self.whole = True
        #: How much each guest's port grants, once for ever; what the others grant changes.
        self.granted = {port: dice.choice((0, 1, 1000, 65_536)) for port in range(1, 9)}
        self.came: dict[tuple[int, int, int, int], int] = {}

    def step(self) -> None:
        what = self.dice.choices(
            (
                self.request,
                self.say,
                self.messages,
                self.chain,
                self.host_connects,
                self.host_does,
                self.answer,
                self.look,
                self.restart,
                self.stop_reading,
                self.talk,
                self.break_chain,
            ),
            (12, 40, 6, 8, 4, 15, 3, 6, 1, 2, 4, 0.05),
        )[0]
        what()

    # --- the guest --------------------------------------------------------------------------------------

    def _header(self, op: int, payload: bytes = b"", **fields: int) -> Any:
        dice = self.dice
        port = dice.randrange(1, 17)
        if port in self.granted:
            credit = {"buf_alloc": self.granted[port], "fwd_cnt": 0}
        else:
            credit = {
                "buf_alloc": dice.choice((0, 1, 4096, 1 << 18, 0xFFFFFFFF, dice.randrange(1 << 32))),
                "fwd_cnt": dice.choice((0, 1, 0x80000000, 0xFFFFFFFF, dice.randrange(1 << 32))),
            }
        return self.packet(
            op,
            fields.get("src_cid", _CID),
            fields.get("dst_cid", dice.choice((2, 2, 2, 2, 2, _SIBLING, _CID, dice.getrandbits(64)))),
            port,
            dice.choice((_ACCEPTS, _ACCEPTS, _STALLS, _STALLS, _HOLDS, _REFUSES, 1024 + dice.randrange(8))),
            payload,
            dice.choice((_STREAM, _SEQPACKET)),
            fields.get("flags", dice.choice((0, 1, 2, 3, 0xFFFFFFFF))),
            credit["buf_alloc"],
            credit["fwd_cnt"],
            fields.get("length"),
        )

    def _send(self, packet: Any) -> None:
        raw = packet.pack()
        cut = None
        if self.dice.random() < 0.3:
            cut = _cut(self.dice, len(raw), self.dice.choice((2, 5, 40)))
        if self.guest.running and self.whole:
            self.guest.send_raw(raw, cut, publish=self.dice.random() < 0.7)

    def request(self) -> None:
        self._send(self._header(self.abi.OP_REQUEST))

    def say(self) -> None:
        """Any packet."""
        dice = self.dice
        op = dice.choice((5, 5, 5, 5, 5, 2, 3, 4, 6, 7, 0, 8, dice.randrange(1 << 16)))
        payload = dice.randbytes(dice.choice((0, 0, 1, 7, 8, 100, 4096, 9000, 16384))) if op == 5 else b""
        fields = {}
        if dice.random() < 0.03:
            fields["length"] = dice.choice((0, 1, len(payload) + 1, 0xFFFFFFFF))
        if dice.random() < 0.03:
            fields["src_cid"] = dice.choice((0, 2, _SIBLING, dice.getrandbits(64)))
        self._send(self._header(op, payload, **fields))

    def messages(self) -> None:
        """Many small ones on one connection, as much as was granted at most."""
        packet = self._header(self.abi.OP_RW, bytes(self.dice.choice((0, 1, 9))), flags=1)
        for _ in range(self.dice.randrange(300)):
            if self.guest.running and self.whole:
                self.guest.send_raw(packet.pack(), publish=False)

    def chain(self) -> None:
        """A packet in as many descriptors as the ring takes, some of them of one byte."""
        packet = self._header(self.abi.OP_RW, bytes(self.dice.choice((100, 5000))))
        raw = packet.pack()
        if self.guest.running and self.whole:
            self.guest.send_raw(raw, _cut(self.dice, len(raw), self.guest.ring_size - 1))

    def break_chain(self) -> None:
        """One that is no packet: the transmit ring has ended then."""
        if self.guest.running and self.whole and self.guest.reads:
            self.guest.send_raw(bytes(43), [43])
            self.whole = False

    def restart(self) -> None:
        """The rings rest for a moment, and go on where they were."""
        if self.whole:
            bases = self.guest.stop()
            time.sleep(self.dice.choice((0, 0.002)))
            self.guest.resume(bases=bases)

    def stop_reading(self) -> None:
        self.guest.reads = not self.guest.reads

    def look(self) -> None:
        """Takes what has come, and holds it against what was granted."""
        if self.guest.running:
            self.guest.pump()
        while self.guest._stray:
            packet = self.guest._stray.popleft()
            key = packet.type, packet.dst_port, packet.src_cid, packet.src_port
            if packet.op in (self.abi.OP_REQUEST, self.abi.OP_RESPONSE):
                self.came[key] = 0
            if packet.op == self.abi.OP_REQUEST and self.dice.random() < 0.7 and self.whole:
                port = packet.dst_port
                answer = self.packet(
                    self.abi.OP_RESPONSE, _CID, packet.src_cid, port, packet.src_port, type=packet.type,
                    buf_alloc=self.granted.get(port, 1 << 16),
                )  # fmt: skip
                self.guest.send_packet(answer)
            elif packet.op == self.abi.OP_RW and packet.dst_port in self.granted:
                self.came[key] = self.came.get(key, 0) + len(packet.payload)
                assert self.came[key] <= self.granted[packet.dst_port], f"more than granted: {packet}"

    def talk(self) -> None:
        """The connection that is let alone carries what it should."""
        if not self.whole or not self.guest.reads:
            return
        data = self.dice.randbytes(self.dice.randrange(1, 5000))
        self.quiet.send(data)
        theirs = self.scene.quiet[-1].theirs
        assert _read(theirs, len(data)) == data
        theirs.sendall(data[::-1])
        assert self.quiet.recv_exactly(len(data)) == data[::-1]

    # --- the host ---------------------------------------------------------------------------------------

    def host_connects(self) -> None:
        from vsock_scene import PairEnd

        end = PairEnd(self.dice.choice((_STREAM, _SEQPACKET)), buffer=self.dice.choice((None, 4096)))
        self.ends.append(end)
        port = self.dice.randrange(1, 12)
        kind = end.theirs.type
        type_ = _STREAM if kind == 1 else _SEQPACKET
        self.scene.back_end.ask(lambda: self.scene.device.connections.connect(end, type_, port))

    def host_does(self) -> None:
        """One of the host's ends does something, or ends."""
        if not self.ends:
            return
        dice = self.dice
        sock = dice.choice(self.ends).theirs
        if sock.fileno() < 0:
            return
        sock.setblocking(False)
        with suppress(OSError):
            match dice.randrange(8):
                case 0 | 1 | 2:
                    for _ in range(dice.choice((1, 1, 30))):
                        sock.send(bytes(dice.choice((0, 1, 100, 16384, 16385, 60000))))
                case 3 | 4 | 5:
                    for _ in range(dice.choice((1, 500))):
                        sock.recv(dice.choice((1, 100, 1 << 17)))
                case 6:
                    sock.shutdown(dice.randrange(3))
                case _:
                    sock.close()

    def answer(self) -> None:
        """A request that has waited is accepted, perhaps too late."""
        from vsock_scene import PairEnd

        if not self.asked:
            return
        request = self.asked.pop(self.dice.randrange(len(self.asked)))
        end = PairEnd(request.key.type)
        self.ends.append(end)
        self.scene.back_end.ask(lambda: request.accept(end))


def _read(sock: Any, size: int) -> bytes:
    data = b""
    while len(data) < size and (more := sock.recv(size - len(data))):
        data += more
    return data


def _cut(dice: random.Random, size: int, most: int) -> list[int]:
    cuts = sorted(dice.sample(range(1, size), min(most - 1, size - 1)))
    return [b - a for a, b in zip([0, *cuts], [*cuts, size], strict=True)]


class _Host:
    """The devices, and what their guests may connect to. The neighbour's connection outlives the cases."""

    def __init__(self, folder: Path) -> None:
        from vsock_scene import PairEnd, VsockScene

        self.scene = VsockScene(folder, _CID, _SIBLING, group="fuzz", buffer=_BUFFER, max_connections=40)
        self.scene.quiet = []  # type: ignore[attr-defined]
        self.ends: list[Any] = []
        self.asked: list[Any] = []
        self.dice = random.Random(0)
        own: dict[Any, Any] = {device: device._host for device in self.scene.devices}

        def requested(device: Any, request: Any) -> None:
            port, cid = request.key.peer_port, request.key.peer_cid
            if cid != 2:
                # Siblings are the package's own business.
                own[device].request(request)
            elif port == _QUIET:
                end = PairEnd(request.key.type)
                self.scene.quiet.append(end)  # type: ignore[attr-defined]
                request.accept(end)
            elif port in (_ACCEPTS, _STALLS):
                end = PairEnd(request.key.type, buffer=4096 if port == _STALLS else None)
                self.ends.append(end)
                request.accept(end)
            elif port == _HOLDS:
                self.asked.append(request)
            else:
                request.refuse()

        for device in self.scene.devices:
            self.scene.back_end.ask(partial(self._take_over, device, requested))

    @staticmethod
    def _take_over(device: Any, requested: Any) -> None:
        device.connections.on_request = lambda request: requested(device, request)

    def check(self) -> None:
        """No connection holds more than its buffer, or than its guest was granted."""
        for device in self.scene.devices:
            self.scene.back_end.ask(partial(self._check, device))

    @staticmethod
    def _check(device: Any) -> None:
        link = device.link
        with link.worker.paused():
            for slot in link._held:
                row = link.worker.connections[slot]
                kept = int(row["out_put"] - row["out_taken"])
                under_way = int(row["rx_cnt"] - row["fwd_cnt"]) & 0xFFFFFFFF
                assert 0 <= kept <= row["out_size"], row
                assert under_way <= row["buf_alloc"], row

    def end_case(self, neighbour: Any) -> None:
        """The guest is gone, and all of it: the neighbour has nothing left but what it began with."""
        for end in self.ends:
            end.theirs.close()
        for end in self.scene.quiet[1:]:  # type: ignore[attr-defined]
            end.theirs.close()
        self.scene.wait_closed()
        deadline = time.monotonic() + _CLOSES_WITHIN_SECONDS
        while (left := self.scene.open_connections(1)) > 1:
            assert time.monotonic() < deadline, f"the neighbour has {left} connections"
            neighbour.pump()
        self.ends.clear()
        self.asked.clear()
        del self.scene.quiet[1:]  # type: ignore[attr-defined]


@contextmanager
def _neighbour(host: _Host) -> Iterator[tuple[Any, Any]]:
    with host.scene.guest(1) as neighbour:
        sock = neighbour.connect(_QUIET)
        for type_ in (_STREAM, _SEQPACKET):
            neighbour.listen(_ACCEPTS, type=type_)
        yield neighbour, sock


def _case(dice: random.Random, host: _Host, neighbour: Any, sock: Any) -> None:
    sizes = dice.choice(((44, 4096), (44, 4096), (65_580,), (45,), (20, 30, 700), (1,) * 44 + (1, 2, 3)))
    with host.scene.guest(
        0,
        ring_size=dice.choice((64, 128, 256)),
        rx_buffers=sizes,
        rx_depth=dice.choice((None, None, 1, 3)),
        answers=dice.random() < 0.2,
        indirect=dice.random() < 0.3,
    ) as guest:
        life = _Life(dice, host.scene, guest, host.ends, host.asked)
        for step in range(_STEPS):
            life.step()
            if step % 50 == 49:
                host.check()
                neighbour.pump()
        guest.reads = True
        life.look()
        life.talk()
        life.look()
    host.end_case(neighbour)
    data = dice.randbytes(30_000)
    sock.send(data[:10_000])
    theirs = host.scene.quiet[0].theirs  # type: ignore[attr-defined]
    assert _read(theirs, 10_000) == data[:10_000]
    theirs.sendall(data)
    assert sock.recv_exactly(len(data)) == data


def _play(cases: Cases) -> None:
    complaints = _Complaints()
    logging.getLogger("pyvhost").addHandler(complaints)
    logging.getLogger("pyvhost").propagate = False
    with tempfile.TemporaryDirectory() as folder:
        host = _Host(Path(folder))
        with host.scene, _neighbour(host) as (neighbour, sock):
            for _, dice in cases:
                try:
                    _case(dice, host, neighbour, sock)
                    assert not complaints.found, complaints.found[0]
                except Exception:
                    # What a broken device has of the scene might never be given back.
                    give_up()


if __name__ == "__main__":
    sys.exit(main("fuzz_vsock", "Fuzz the socket device.", _play))
