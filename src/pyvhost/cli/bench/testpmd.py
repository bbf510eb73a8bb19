"""DPDK's testpmd as a program to drive: started, told things over its prompt, its counters read.

Promises: what a command printed comes back whole, up to the next prompt; a testpmd that hangs, dies or
refuses raises TestpmdError with what it said; nothing is left behind when the object is closed, paused or not.
Never: decides what to measure.

The commands and what they print are DPDK 22.11's (`app/test-pmd/cmdline.c`, `config.c`, `testpmd.c`).
"""

from __future__ import annotations

import contextlib
import os
import pty
import re
import select
import shutil
import signal
import subprocess
import time
import tty
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

PROGRAM = "dpdk-testpmd"
PACKAGE = "dpdk-dev"
_PROMPT = b"testpmd> "
_ANSWER_SECONDS = 20.0


class TestpmdError(RuntimeError):
    """testpmd did not do as told; the message carries the end of what it printed."""

    __test__ = False


@dataclass(frozen=True)
class PortStats:
    """`show port stats`: totals since the port started, rates since the statistics were last shown."""

    rx_packets: int
    tx_packets: int
    rx_missed: int
    tx_errors: int
    rx_bytes: int
    tx_bytes: int
    rx_pps: int
    tx_pps: int


@dataclass(frozen=True)
class ForwardStats:
    """What `show fwd stats all` and `stop` print: this run of forwarding, over all ports.

    `cycles_per_packet` counts only the rounds of the loop that moved something, and is None where testpmd was
    not told to record cycles or moved nothing; `clock_mhz` is the clock those cycles are of. `empty_bursts`
    and `bursts` are None unless testpmd was told to record burst statistics.
    """

    rx_packets: int
    rx_dropped: int
    tx_packets: int
    tx_dropped: int
    busy_cycles: int | None = None
    cycles_per_packet: float | None = None
    clock_mhz: float | None = None
    bursts: int | None = None
    empty_bursts: float | None = None


def _field(name: str, text: str) -> int:
    found = re.search(rf"{re.escape(name)}:\s*(\d+)", text)
    if found is None:
        raise TestpmdError(f"no {name} in what testpmd printed: {text[-400:]!r}")
    return int(found[1])


def parse_port_stats(text: str) -> PortStats:
    """Reads `show port stats N`. Raises TestpmdError where a field is missing."""
    return PortStats(
        rx_packets=_field("RX-packets", text),
        tx_packets=_field("TX-packets", text),
        rx_missed=_field("RX-missed", text),
        tx_errors=_field("TX-errors", text),
        rx_bytes=_field("RX-bytes", text),
        tx_bytes=_field("TX-bytes", text),
        rx_pps=_field("Rx-pps", text),
        tx_pps=_field("Tx-pps", text),
    )


_CYCLES = re.compile(r"CPU cycles/packet=([\d.]+) \(total cycles=(\d+) /.*?\) at ([\d.]+) MHz Clock")

# Shares are printed in whole per cent; an absent "0 pkts" means that none was empty.
_BURSTS = re.compile(r"([RT]X)-bursts : (\d+) \[(.*?)\]")
_EMPTY = re.compile(r"(\d+)% of 0 pkts")


def parse_forward_stats(text: str) -> ForwardStats:
    """Reads the accumulated part of `show fwd stats all` or of `stop`. Raises TestpmdError without one."""
    _, found, total = text.partition("Accumulated forward statistics")
    if not found:
        raise TestpmdError(f"no forward statistics in what testpmd printed: {text[-400:]!r}")
    cycles = _CYCLES.search(total)
    bursts = _BURSTS.search(text)
    empty = _EMPTY.search(bursts[3]) if bursts else None
    return ForwardStats(
        rx_packets=_field("RX-packets", total),
        rx_dropped=_field("RX-dropped", total),
        tx_packets=_field("TX-packets", total),
        tx_dropped=_field("TX-dropped", total),
        busy_cycles=int(cycles[2]) if cycles else None,
        cycles_per_packet=float(cycles[1]) if cycles else None,
        clock_mhz=float(cycles[3]) if cycles else None,
        bursts=int(bursts[2]) if bursts else None,
        empty_bursts=int(empty[1]) / 100 if empty else 0.0 if bursts else None,
    )


class Testpmd:
    """One running testpmd. Not for two threads at once."""

    __test__ = False

    def __init__(self, name: str, arguments: Sequence[str], transcript: Path | None = None) -> None:
        """Starts testpmd; it is not ready before `wait_ready`.

        `name` goes into messages. What it prints is also appended to `transcript`.
        Raises FileNotFoundError when there is no testpmd.
        """
        program = shutil.which(PROGRAM)
        if program is None:
            raise FileNotFoundError(f"{PROGRAM} is not installed: apt-get install {PACKAGE}")
        self.name = name
        self._transcript = transcript
        self._pending = b""
        # A terminal for its output: to a pipe, testpmd's own lines would wait in stdio's buffer.
        self._terminal, other_end = pty.openpty()
        tty.setraw(other_end)
        try:
            self.process = subprocess.Popen(
                ["setpriv", "--pdeathsig", "KILL", program, *arguments],
                stdin=subprocess.PIPE,
                stdout=other_end,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        finally:
            os.close(other_end)

    @property
    def pid(self) -> int:
        """The process's id."""
        return self.process.pid

    def __enter__(self) -> Testpmd:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def wait_ready(self, seconds: float = 60.0) -> str:
        """Waits for the first prompt, and returns all that was printed before it."""
        return self._until_prompt(seconds)

    def tell(self, command: str, seconds: float = _ANSWER_SECONDS) -> str:
        """Types one command and returns what it printed, up to the next prompt.

        Raises TestpmdError when testpmd refuses the command, ends or does not answer in time.
        """
        assert self.process.stdin is not None
        # What came in by itself since (vhost's log lines) is no part of the answer.
        self._drain()
        try:
            self.process.stdin.write(command.encode() + b"\n")
            self.process.stdin.flush()
        except OSError as error:
            raise TestpmdError(f"{self.name} is gone: {error}") from error
        text = self._until_prompt(seconds)
        if "Bad arguments" in text or "Command not found" in text:
            raise TestpmdError(f"{self.name} refused {command!r}: {text[-400:]!r}")
        return text

    def port_stats(self, port: int = 0) -> PortStats:
        """The port's counters; the rates are those since the last time they were shown."""
        return parse_port_stats(self.tell(f"show port stats {port}"))

    def forward_stats(self) -> ForwardStats:
        """What this run of forwarding did so far, or since `clear_forward_stats`."""
        return parse_forward_stats(self.tell("show fwd stats all"))

    def clear_forward_stats(self) -> None:
        """Counts from now on."""
        self.tell("clear fwd stats all")

    def start(self, first_bursts: int = 0) -> None:
        """Starts forwarding; with `first_bursts`, sends that many bursts of 32 packets first."""
        self.tell(f"start tx_first {first_bursts}" if first_bursts else "start")

    def stop(self) -> ForwardStats:
        """Stops forwarding and returns what this run of it did."""
        return parse_forward_stats(self.tell("stop"))

    def pause(self) -> None:
        """Takes the whole process off its processors."""
        os.kill(self.pid, signal.SIGSTOP)

    def resume(self) -> None:
        """Puts it back."""
        os.kill(self.pid, signal.SIGCONT)

    def close(self) -> None:
        """Ends the process, paused or not, and waits until it is gone."""
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        if self._terminal >= 0:
            with contextlib.suppress(OSError):
                self._drain()
            os.close(self._terminal)
            self._terminal = -1
        if self.process.stdin is not None:
            with contextlib.suppress(OSError):
                self.process.stdin.close()

    def _note(self, chunk: bytes) -> None:
        if self._transcript is not None:
            with self._transcript.open("ab") as file:
                file.write(chunk)

    def _drain(self) -> None:
        self._pending = b""
        while select.select([self._terminal], [], [], 0)[0]:
            self._note(os.read(self._terminal, 65536))

    def _until_prompt(self, seconds: float) -> str:
        deadline = time.monotonic() + seconds
        while True:
            before, prompt, after = self._pending.partition(_PROMPT)
            if prompt:
                self._pending = after
                return before.decode(errors="replace")
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([self._terminal], [], [], left)[0]:
                raise TestpmdError(f"{self.name} did not answer within {seconds:g} s: {self._end()}")
            try:
                chunk = os.read(self._terminal, 65536)
            except OSError:
                chunk = b""
            if not chunk:
                status = self.process.wait()
                raise TestpmdError(f"{self.name} ended with status {status}: {self._end()}")
            self._note(chunk)
            self._pending += chunk

    def _end(self) -> str:
        return repr(self._pending[-600:].decode(errors="replace"))


@dataclass(frozen=True)
class Cores:
    """Which processor each half of a pair polls on."""

    back_end: int
    front_end: int


def _common(lcores: str, prefix: str, huge_directory: Path) -> list[str]:
    return [
        *("--lcores", lcores, "--no-pci", "--no-telemetry", "--in-memory", "--single-file-segments"),
        *("-m", "256", "--huge-dir", str(huge_directory), f"--file-prefix={prefix}"),
    ]


# A larger pool of packets would measure testpmd's own cache misses.
_PORT = ["-i", "--txd=1024", "--rxd=1024", "--total-num-mbufs=16384"]


def front_end_arguments(
    socket: Path, prefix: str, mode: str, cores: Cores, huge_directory: Path
) -> list[str]:
    """A virtio-user front end that forwards on its own processor; its prompt shares the back end's."""
    device = f"net_virtio_user0,path={socket},queues=1,queue_size=1024,mrg_rxbuf=1,in_order=1,packed_vq=0"
    return [
        *_common(f"0@{cores.back_end},1@{cores.front_end}", prefix, huge_directory),
        *(f"--vdev={device}", "--", *_PORT, f"--forward-mode={mode}"),
    ]


def back_end_arguments(socket: Path, prefix: str, mode: str, cores: Cores, huge_directory: Path) -> list[str]:
    """DPDK's own vhost back end, forwarding on the back end's processor."""
    return [
        *_common(f"0@{cores.front_end},1@{cores.back_end}", prefix, huge_directory),
        *(f"--vdev=net_vhost0,iface={socket},queues=1", "--", *_PORT, f"--forward-mode={mode}"),
    ]
