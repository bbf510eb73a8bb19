"""Fuzzes the vhost-user decoder and the back end's session: recorded conversations, mutated, and two made up
that log, translate and come back.

    python fuzz/fuzz_vhost_user.py --seconds 60 --seed 1            stops by itself; 1 on a finding
    python fuzz/fuzz_vhost_user.py --seed 1 --only 4711             one run again, with every message shown

Each run is a function of seed and number. What counts as a finding: an exception that is neither `CodecError`
nor `SessionError`, a descriptor or a mapping left over after the session's end, a ring that runs without being
started and enabled, a run that takes ten seconds, a process that grows.
"""

from __future__ import annotations

import argparse
import logging
import os
import random
import resource
import signal
import socket
import struct
import sys
import time
import traceback
from pathlib import Path
from types import FrameType
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from pyvhost.abi import vhost_user as abi
from pyvhost.abi.vhost_user import BackendRequest, Request
from pyvhost.host import fds as host_fds
from pyvhost.host.poller import Poller
from pyvhost.vhost_user.backend import BackendSession, SessionError
from pyvhost.vhost_user.codec import Decoder, Message, Stream, decode_one, encode
from pyvhost.vhost_user.describe import describe
from pyvhost.vhost_user.offer import PROTOCOL_FEATURES
from pyvhost.vhost_user.payloads import (
    U64,
    CodecError,
    Inflight,
    Iotlb,
    Log,
    MemReg,
    MemTable,
    VringState,
)
from recording_device import FEATURES, InertDevice, RecordingDevice, conversation, conversations, open_fds

HANG_SECONDS = 10
GROWTH_LIMIT = 64 << 20
ODD = (0, 1, 2, 3, 7, 8, 255, 256, 509, 0x7FFF, 0x8000, 0xFFFF, 1 << 31, (1 << 32) - 1)
ODD64 = (*ODD, 4096, 1 << 40, 1 << 63, (1 << 64) - 4096, (1 << 64) - 1)

LOG_ALL, ACCESS_PLATFORM = 1 << 26, 1 << 33

Said = tuple[bytes, int]

#: Never run: devices only want to know whose they are.
POLLER = Poller()


class Hang(BaseException):
    """A run took too long; BaseException, so that nothing under test swallows it."""


def alarm(number: int, frame: FrameType | None) -> None:
    raise Hang


def seeds() -> list[list[Said]]:
    """What each recorded front end said on the main socket, with no protocol feature but those offered here."""
    recorded = [
        [(offered(m.data), m.fds) for m in conversation(name) if m.front and not m.backend_channel]
        for name in conversations()
    ]
    return [*recorded, *made_up(recorded)]


def made_up(recorded: list[list[Said]]) -> list[list[Said]]:
    """What no recorded front end says: a migration with inflight memory, and an IOMMU."""
    setup = recorded[conversations().index("qemu-7.2")]
    addresses = [said for said in setup if request_of(said[0]) == Request.SET_VRING_ADDR]
    logged = [(with_flag(data), fds) for data, fds in addresses]
    features = next(said for said in setup if request_of(said[0]) == Request.SET_FEATURES)
    with_log = (encode(Request.SET_FEATURES, U64(number_of(features[0]) | LOG_ALL)), 0)
    translated = (encode(Request.SET_FEATURES, U64(number_of(features[0]) | ACCESS_PLATFORM)), 0)
    migration: list[Said] = [
        (encode(Request.SET_PROTOCOL_FEATURES, U64(PROTOCOL_FEATURES)), 0),
        (encode(Request.GET_INFLIGHT_FD, Inflight(0, 0, 2, 256)), 0),
        (encode(Request.SET_INFLIGHT_FD, Inflight(1 << 14, 0, 2, 256)), 1),
        *((encode(Request.SET_VRING_ENDIAN, VringState(index, index)), 0) for index in (0, 1)),
        *setup,
        (encode(Request.SET_LOG_BASE, Log(1 << 16, 0)), 1),
        (encode(Request.SET_LOG_FD), 1),
        with_log,
        *logged,
        features,
        *addresses,
        *((encode(Request.GET_VRING_BASE_SKIP_DRAIN, VringState(index, 0)), 0) for index in (0, 1)),
    ]
    update = Iotlb(0x1000, 0x10000, 0x7F0000000000, 3, 2)
    iommu: list[Said] = [
        (encode(Request.SET_PROTOCOL_FEATURES, U64(PROTOCOL_FEATURES)), 0),
        (encode(Request.SET_BACKEND_REQ_FD), 1),
        *setup,
        translated,
        *addresses,
        (encode(Request.IOTLB_MSG, update), 0),
        (encode(Request.IOTLB_MSG, Iotlb(0x1000, 0x1000, 0, 0, 3)), 0),
        (encode(Request.IOTLB_MSG, Iotlb(0, (1 << 64) - 1, 0, 0, 3)), 0),
    ]
    return [migration, iommu]


def request_of(data: bytes) -> int:
    return int.from_bytes(data[:4], "little")


def number_of(data: bytes) -> int:
    return int.from_bytes(data[12:20], "little")


def with_flag(data: bytes) -> bytes:
    """SET_VRING_ADDR with VRING_F_LOG."""
    return data[:16] + b"\1" + data[17:]


def offered(data: bytes) -> bytes:
    if int.from_bytes(data[:4], "little") != Request.SET_PROTOCOL_FEATURES:
        return data
    return data[:12] + struct.pack("=Q", int.from_bytes(data[12:], "little") & PROTOCOL_FEATURES)


def mutate(rng: random.Random, said: list[Said], others: list[list[Said]]) -> list[Said]:
    """The conversation with a few things wrong, or none."""
    said = list(said)
    for _ in range(rng.choice((0, 1, 1, 2, 3, 5, 10, 30))):
        if not said:
            break
        i = rng.randrange(len(said))
        data, fds = said[i]
        match rng.randrange(10):
            case 0:
                del said[i]
            case 1:
                said.insert(rng.randrange(len(said) + 1), said[i])
            case 2:
                j = rng.randrange(len(said))
                said[i], said[j] = said[j], said[i]
            case 3:
                said.insert(i, rng.choice(rng.choice(others)))
            case 4:
                said[i] = (data, rng.choice((0, 1, 2, 8, 9, 40)))
            case 5:
                said[i] = (data[: rng.randrange(len(data) + 1)], fds)
            case 6:
                said[i] = (data + rng.randbytes(rng.randrange(20)), fds)
            case 7:
                request = rng.choice([*Request, 46, 1000])
                body = rng.randbytes(rng.choice((0, 8, 8, 12, 24, 32, 40)))
                said.insert(i, (struct.pack("=III", request, rng.choice((1, 9)), len(body)) + body, fds))
            case 8 if len(data) > 12:
                at = rng.randrange(12, len(data), 4)
                wide = rng.random() < 0.5 and at + 8 <= len(data)
                word = struct.pack("=Q", rng.choice(ODD64)) if wide else struct.pack("=I", rng.choice(ODD))
                said[i] = (data[:at] + word + data[at + len(word) :], fds)
            case _:
                changed = bytearray(data)
                if changed:
                    changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
                said[i] = (bytes(changed), fds)
    return said


def descriptor(rng: random.Random, data: bytes) -> int:
    """What a front end may hand over: the right kind mostly, a memory file of a fitting size among them."""
    request = int.from_bytes(data[:4], "little")
    kind = rng.randrange(60)
    if request in (Request.SET_MEM_TABLE, Request.ADD_MEM_REG) and kind < 58:
        fd = os.memfd_create("fuzz", os.MFD_CLOEXEC)
        fits = rng.random() < 0.9
        os.ftruncate(fd, file_size(data) if fits else rng.choice((0, 4096, 1 << 20, 1 << 27)))
        return fd
    if request in (Request.SET_LOG_BASE, Request.SET_INFLIGHT_FD) and kind < 58:
        fd = os.memfd_create("fuzz", os.MFD_CLOEXEC)
        os.ftruncate(fd, rng.choice((0, 4096, 1 << 14, 1 << 16, 1 << 20, 1 << 20, 1 << 20)))
        os.pwrite(fd, rng.randbytes(64), 0)
        return fd
    if request == Request.SET_BACKEND_REQ_FD and kind < 58:
        ours, theirs = socket.socketpair()
        ours.close()
        return theirs.detach()
    if kind == 59:
        reader, writer = os.pipe()
        os.close(reader)
        return writer
    return os.open("/dev/null", os.O_RDWR) if kind == 58 else os.eventfd(0, os.EFD_CLOEXEC)


def file_size(data: bytes) -> int:
    """How large a file must be for the regions that a message names, if it is to be had."""
    decoder = Decoder(Stream.REQUEST)
    regions: tuple[Any, ...] = ()
    try:
        payload = decode_one(Stream.REPLY, data[:4] + b"\5\0\0\0" + data[8:]).payload
        if isinstance(payload, MemTable):
            regions = payload.regions
        elif isinstance(payload, MemReg):
            regions = (payload.region,)
    except (CodecError, ValueError):
        pass
    decoder.close()
    ends = [region.mmap_offset + region.memory_size for region in regions]
    return max((end for end in ends if end <= 1 << 34), default=4096)


def check(session: BackendSession) -> None:
    """What holds after every message."""
    for ring in session.rings:
        assert ring.running == (ring.started and ring.enabled), f"{ring}"
    assert len(session.backend_output) in (0, 12, 44)


def one_run(seed: int, number: int, conversations: list[list[Said]], show: bool) -> None:
    """One conversation, from its connection to its end."""
    rng = random.Random(f"{seed}:{number}")
    said = mutate(rng, rng.choice(conversations), conversations)
    device: Any = (
        InertDevice() if number % 2 else RecordingDevice(features=FEATURES | LOG_ALL | ACCESS_PLATFORM)
    )
    device.attach(POLLER)
    session = BackendSession(device)
    decoder = Decoder(Stream.REQUEST)
    memory_files: list[int] = []
    try:
        for data, count in said:
            fds = [descriptor(rng, data) for _ in range(count)]
            # One of the files stays in the front end's hands, which may shrink it.
            if fds and rng.random() < 0.2:
                memory_files.append(os.dup(rng.choice(fds)))
            feed(rng, session, decoder, data, fds, show)
            if rng.random() < 0.1 and device.config_changed is not None:
                device.config_changed()
            if memory_files and rng.random() < 0.05:
                shrink(rng.choice(memory_files))
            if rng.random() < 0.1 and isinstance(device, RecordingDevice):
                device.miss(rng.randrange(8), rng.choice(ODD64), rng.choice((1, 2)))
            if rng.random() < 0.2:
                session.backend_output.clear()
                session.announce()
            if rng.random() < 0.1:
                request = rng.choice([*BackendRequest][1:3])
                answer = encode(request, U64(rng.choice(ODD64)), flags=abi.FLAG_REPLY)
                session.receive_backend_reply(decode_one(Stream.BACKEND_REPLY, answer))
        decoder.end()
    except (CodecError, SessionError) as fault:
        if show:
            print(f"ends: {fault}")
    finally:
        decoder.close()
        session.close()
        host_fds.close_all(memory_files)
    if isinstance(device, InertDevice):
        assert not device.lost_memory
        assert not any(vring.place for vring in device.vrings)
        device.close()
    else:
        assert device.resets == 1


def feed(
    rng: random.Random, session: BackendSession, decoder: Decoder, data: bytes, fds: list[int], show: bool
) -> None:
    """Bytes as they might arrive: cut anywhere, the descriptors with the first."""
    while data:
        size = min(decoder.wanted, rng.choice((1, 7, len(data), len(data))))
        given, fds = fds, []
        message: Message | None = decoder.feed(data[:size], given)
        data = data[size:]
        if message is None:
            continue
        text = describe(message, 1)
        if show:
            print(text)
        for reply in session.receive(message):
            answer = decode_one(Stream.REPLY, reply.data)
            reply.fds.close()
            assert answer.flags == abi.VERSION | abi.FLAG_REPLY
            if show:
                print(describe(answer, 1))
        check(session)
    host_fds.close_all(fds)


def shrink(fd: int) -> None:
    try:
        os.ftruncate(fd, 0)
    except OSError:
        pass


def mappings() -> int:
    """Memory files that are mapped."""
    with open("/proc/self/maps", encoding="utf-8") as maps:
        return sum("memfd:fuzz" in line for line in maps)


def main() -> int:
    """The command; its exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=60.0, help="how long (60)")
    parser.add_argument("--seed", type=int, default=0, help="repeats a run (0)")
    parser.add_argument("--only", type=int, help="run this number alone, and show it")
    options = parser.parse_args()
    logging.disable(logging.CRITICAL)
    signal.signal(signal.SIGALRM, alarm)
    front_ends = seeds()
    one_run(options.seed, 0, front_ends, False)
    one_run(options.seed, 1, front_ends, False)
    before, grown = open_fds(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    number = 0 if options.only is None else options.only
    end = time.monotonic() + options.seconds
    while True:
        signal.alarm(HANG_SECONDS)
        try:
            one_run(options.seed, number, front_ends, options.only is not None)
            assert open_fds() == before, f"descriptors left over: {sorted(open_fds() - before)}"
            assert mappings() == 0, f"{mappings()} mappings left over"
        except (Exception, Hang):
            traceback.print_exc()
            print(f"a finding: --seed {options.seed} --only {number}", file=sys.stderr)
            return 1
        finally:
            signal.alarm(0)
        number += 1
        if options.only is not None or time.monotonic() >= end:
            break
    growth = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - grown) << 10
    if growth > GROWTH_LIMIT:
        print(f"a finding: the process grew by {growth >> 20} MiB in {number} runs", file=sys.stderr)
        return 1
    print(f"vhost-user: {number} conversations, no finding (seed {options.seed})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
