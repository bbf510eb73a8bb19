"""The demo without a guest: two drivers of this package, in this process, with a NIC each, and one for the disk.

Promises: every frame and every block goes through rings in memory shared with the serving process, as a guest's
would. Never: pretends to be a guest.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from pyvhost.cli.demo_guests import Ends, Say
from pyvhost.cli.guests import GuestError
from pyvhost.driver import cdb
from pyvhost.driver.errors import DriverError
from pyvhost.driver.memory import MIB, GuestMemory
from pyvhost.driver.net import NetDriver
from pyvhost.driver.scsi import ScsiDriver
from pyvhost.driver.vhost_user import VhostUserFrontend

# Local experimental, as IEEE 802 sets it aside.
_ETHERTYPE = b"\x88\xb5"
_PAYLOAD = 1500
# Frames in flight: fewer than a ring has room for, so that none is dropped.
_BATCH = 128
_ANSWER_SECONDS = 10.0
# What is written to the disk: commands of so many blocks of 512 bytes.
_BLOCKS = 128
_COMMANDS = 64


class DriverEnds(Ends):
    """Two drivers, one sending to the other."""

    description = (
        "There is no guest: this package's own driver side plays both, in Python. Rings and messages are "
        "real, speed is not."
    )

    def __init__(self, sockets: Sequence[Path], disks: Path) -> None:
        self._sockets = sockets
        self._disks = disks
        self._stack = ExitStack()
        self._drivers: list[NetDriver] = []
        self._sent = self._received = ""
        self.shows = (
            ("The first driver's own view of its card", self._show_link),
            ("A third driver's disk, the file disk.img", self._show_disk),
            ("The first sends the second a frame and has it back", self._show_echo),
        )

    def start(self) -> None:
        for path in self._sockets:
            frontend = self._stack.enter_context(VhostUserFrontend.connect(path))
            memory = GuestMemory(16 * MIB)
            self._stack.callback(memory.close)
            driver = self._stack.enter_context(NetDriver(frontend, memory))
            driver.start()
            self._drivers.append(driver)

    def _show_link(self, say: Say) -> None:
        driver = self._drivers[0]
        say(f"MAC {driver.mac().hex(':')}, MTU {driver.mtu()}, features {driver.features:#x}")

    def _show_disk(self, say: Say) -> None:
        """Anything but a file system: its first blocks."""
        memory = GuestMemory(4 * MIB)
        written, read = hashlib.sha256(), hashlib.sha256()
        with ExitStack() as closing:
            closing.callback(memory.close)
            frontend = closing.enter_context(VhostUserFrontend.connect(self._disks))
            driver = closing.enter_context(ScsiDriver(frontend, memory))
            driver.start()
            # The first command hears that the disk was powered on.
            driver.command(0, 0, cdb.test_unit_ready())
            inquiry = driver.command(0, 0, cdb.inquiry(), data_in_length=96).data
            say(inquiry[8:32].decode("ascii", "replace"))
            for number in range(_COMMANDS):
                blocks = os.urandom(512 * _BLOCKS)
                written.update(blocks)
                driver.command(0, 0, cdb.write10(number * _BLOCKS, _BLOCKS), blocks)
            driver.command(0, 0, cdb.synchronize_cache10())
            for number in range(_COMMANDS):
                wanted = cdb.read10(number * _BLOCKS, _BLOCKS)
                read.update(driver.command(0, 0, wanted, data_in_length=512 * _BLOCKS).data)
        say(f"SHA-256 written {written.hexdigest()}")
        say(f"SHA-256 read    {read.hexdigest()}")
        if read.digest() != written.digest():
            raise GuestError("what was read from the disk is not what was written")
        self.disk_result = f"Disk: {_COMMANDS * _BLOCKS // 2048} MiB written and read again, the same SHA-256"

    def _show_echo(self, say: Say) -> None:
        first, second = self._drivers
        for _ in range(4):
            payload = os.urandom(64)
            start = time.perf_counter()
            first.send(_frame(first, second, payload))
            (there,) = second.receive(timeout=_ANSWER_SECONDS)
            second.send(_frame(second, first, there.frame[14:]))
            (back,) = first.receive(timeout=_ANSWER_SECONDS)
            spent = time.perf_counter() - start
            if back.frame[14:] != payload:
                raise GuestError("the frame that came back is another one")
            say(f"{len(back.frame)} bytes there and back in {1e6 * spent:.0f} µs")

    def transfer(self, seconds: float) -> None:
        first, second = self._drivers
        sent, received = hashlib.sha256(), hashlib.sha256()
        block = os.urandom(1 << 20)
        amount = number = 0
        start = time.monotonic()
        try:
            while (spent := time.monotonic() - start) < seconds:
                frames = []
                for _ in range(_BATCH):
                    at = number * 4099 % (len(block) - _PAYLOAD)
                    number += 1
                    payload = block[at : at + _PAYLOAD]
                    sent.update(payload)
                    frames.append(_frame(first, second, payload))
                first.send_many(frames)
                got = 0
                while got < len(frames):
                    for one in second.receive(timeout=_ANSWER_SECONDS):
                        received.update(one.frame[14:])
                        amount += len(one.frame)
                        got += 1
        except (DriverError, TimeoutError) as problem:
            raise GuestError(f"the transfer failed: {problem}") from problem
        self._sent, self._received = sent.hexdigest(), received.hexdigest()
        self.result = (
            f"Frames: {amount / 2**20:.0f} MiB in {spent:.1f} s, "
            f"{'the same' if self._sent == self._received else 'ANOTHER'} SHA-256 at the far end"
        )

    def check(self) -> None:
        if self._sent != self._received:
            raise GuestError(f"sent SHA-256 {self._sent}, received {self._received}")

    def stop(self) -> None:
        self._stack.close()


def _frame(source: NetDriver, target: NetDriver, payload: bytes) -> bytes:
    return target.mac() + source.mac() + _ETHERTYPE + payload
