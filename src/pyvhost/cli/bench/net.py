"""The comparison itself: one front end program, two back ends, by turns.

Each row runs four processes: a testpmd virtio-user front end attached to `pyvhost net`, an identical one
attached to DPDK's own vhost back end, and the two back ends. Only one pair is awake at a time: the other is
stopped by SIGSTOP, so that each back end and each front end has a processor to itself while it runs. The
pairs change places every fraction of a second, and who goes first changes too.

What counts is what the *front end's* port statistics say (`Tx-pps` for guest to host, `Rx-pps` otherwise, by
testpmd's own clock between two looks within one slice), for both back ends alike.

Promises: the same command lines for both front ends; everything started is ended.
Never: takes a figure from a back end's own counters for a ratio.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pyvhost.cli.bench import profile, usage
from pyvhost.cli.bench.backend import BackEnd, net_arguments
from pyvhost.cli.bench.machine import CacheLine, favour, favoured
from pyvhost.cli.bench.stats import Spread, order_of_pair, pairwise_ratios, spread
from pyvhost.cli.bench.testpmd import (
    Cores,
    ForwardStats,
    Testpmd,
    back_end_arguments,
    front_end_arguments,
)
from pyvhost.observe import reader

OURS = "pyvhost"
THEIRS = "DPDK"
#: Bursts of 32 that the front end of a `loop` row sends before it only passes on: half a ring in flight.
LOOP_BURSTS = 16
#: The span that the account of a row is taken over.
ACCOUNT_SECONDS = 0.5


@dataclass(frozen=True)
class Case:
    """One row's kind: what each of the three programs is told to do."""

    key: str
    title: str
    backend: str
    front_mode: str
    peer_mode: str
    counts: str
    first_bursts: int = 0

    def backend_for(self, size: int) -> str:
        """The argument of our `--backend`, for frames of `size` bytes."""
        return self.backend.format(size=size)


CASES = (
    Case("guest-to-host", "guest to host", "null", "txonly", "rxonly", "tx"),
    Case("host-to-guest", "host to guest", "generate:{size}", "rxonly", "txonly", "rx"),
    Case("loop", "loop", "loop", "io", "io", "rx", first_bursts=LOOP_BURSTS),
)
SIZES = (64, 1518)


#: Below this many pairs a median says little.
FEWEST_PAIRS = 5


@dataclass(frozen=True)
class Pace:
    """How long a row takes: `pairs` pairs of two slices, each after a while to settle in (seconds).

    A row that has taken `row_seconds` ends with the pair it is at, though not before `FEWEST_PAIRS`.
    """

    pairs: int = 20
    row_seconds: float = 60.0
    slice_seconds: float = 0.2
    settle_seconds: float = 0.06

    def enough(self, pairs: int, seconds: float) -> bool:
        """Whether a row of so many pairs, which began so many seconds ago, is done."""
        return pairs >= self.pairs or (pairs >= FEWEST_PAIRS and seconds >= self.row_seconds)


def pace_for(total_seconds: float, rows: int) -> Pace:
    """As many pairs as fit, besides some seconds a row for starting and ending programs."""
    row_seconds = total_seconds / rows
    one_pair = 2 * (Pace.slice_seconds + Pace.settle_seconds + 0.01)
    pairs = int((row_seconds - 4.0) / one_pair)
    return Pace(pairs=min(max(pairs, FEWEST_PAIRS), 100), row_seconds=row_seconds - 2 * ACCOUNT_SECONDS)


@dataclass(frozen=True)
class Account:
    """Where the time goes, from a span of `ACCOUNT_SECONDS` after the slices, in which nothing was stopped.

    `cycles_per_packet`: all cycles of the back end's processor, empty polls included, over the packets that
    the front end saw. `busy_cycles_per_packet`: without the polls that found nothing, as testpmd counts them
    (None for a back end that does not). `waits`: the share of the front end's looks that found nothing to
    receive, or of its packets that found the ring full. `back_end_limits`: whether that says that the back
    end is what holds the pair up. `samples`: shares of the back end's time (perf), None without perf.
    `burst`: how many packets our back end takes at a time, by its counters; None for the peer's.
    """

    packets: int
    cycles_per_packet: float
    busy_cycles_per_packet: float | None
    waits: float
    back_end_limits: bool
    samples: dict[str, float] | None
    burst: float | None = None


def judge_front_end(stats: ForwardStats, counts: str, seconds: float) -> tuple[int, float, bool]:
    """Packets, waits and back_end_limits of `Account`, from a front end's forward statistics over `seconds`.

    A sending front end is held up when it finds the ring full. A receiving one is when it spends less than
    nine tenths of its time on rounds that moved something.
    """
    if counts == "tx":
        offered = stats.tx_packets + stats.tx_dropped
        waits = stats.tx_dropped / offered if offered else 1.0
        return stats.tx_packets, waits, waits > 0.05
    waits = stats.empty_bursts if stats.empty_bursts is not None else 0.0
    cycles = (stats.clock_mhz or 0.0) * 1e6 * seconds
    busy = (stats.busy_cycles or 0) / cycles if cycles else 0.0
    return stats.rx_packets, waits, busy < 0.9


@dataclass
class Measured:
    """One back end's part of a row."""

    mpps: list[float] = field(default_factory=list)
    cpu: usage.CpuTime = field(default_factory=lambda: usage.CpuTime(0.0, 0.0))
    awake_seconds: float = 0.0
    account: Account | None = None


@dataclass
class Row:
    """One case and size, both back ends."""

    case: Case
    size: int
    ours: Measured = field(default_factory=Measured)
    theirs: Measured = field(default_factory=Measured)
    round_trips_ns: list[float] = field(default_factory=list)
    clock_mhz: float | None = None

    def ratio(self) -> Spread:
        """Ours over theirs, slice by slice."""
        return spread(pairwise_ratios(self.ours.mpps, self.theirs.mpps))


class Pair:
    """A back end and the front end attached to it."""

    def __init__(self, name: str, back: Testpmd | BackEnd, front: Testpmd, counts: str) -> None:
        self.name = name
        self.back = back
        self.front = front
        self.counts = counts
        self.measured = Measured()

    def pause(self) -> None:
        """Both off their processors."""
        self.front.pause()
        self.back.pause()

    def resume(self) -> None:
        """Both back."""
        self.back.resume()
        self.front.resume()

    def slice(self, pace: Pace) -> None:
        """Wakes the pair for one slice and notes what the front end saw in it."""
        woken = time.monotonic()
        before = usage.cpu_time(self.back.pid)
        self.resume()
        # Sleeps here are the measurement itself: a span of time, not the waiting for an event.
        time.sleep(pace.settle_seconds)
        self.front.port_stats()
        time.sleep(pace.slice_seconds)
        seen = self.front.port_stats()
        self.pause()
        used = usage.cpu_time(self.back.pid).since(before)
        self.measured.cpu = usage.CpuTime(
            self.measured.cpu.user + used.user, self.measured.cpu.system + used.system
        )
        self.measured.awake_seconds += time.monotonic() - woken
        self.measured.mpps.append((seen.tx_pps if self.counts == "tx" else seen.rx_pps) / 1e6)


def mean_burst(pid: int) -> float | None:
    """Packets a burst, over all rings of a process of ours since it started; None if it counts nothing."""
    rows = [row for process in reader.snapshot().processes if process.pid == pid for row in process.rows]
    bursts = sum(row.get("bursts") for row in rows)
    return sum(row.get("packets") for row in rows) / bursts if bursts else None


def record(testpmd: Testpmd) -> None:
    """Has it count cycles and bursts; both back ends' front ends pay for that alike."""
    testpmd.tell("set record-core-cycles on")
    testpmd.tell("set record-burst-stats on")


class Bench:
    """What the rows share: the folder of sockets, huge pages, the processors, where transcripts go."""

    def __init__(self, scratch: Path, huge: Path, cores: Cores, transcripts: Path, self_check: bool) -> None:
        self._scratch = scratch
        self._huge = huge
        self._cores = cores
        self._transcripts = transcripts
        self._self_check = self_check
        self._line = CacheLine(cores)

    def testpmd(self, name: str, arguments: Sequence[str]) -> Testpmd:
        """Starts one, its transcript under `name`."""
        return Testpmd(name, arguments, self._transcripts / f"{name.replace(' ', '-')}.log")

    @contextlib.contextmanager
    def pairs(self, case: Case, size: int) -> Iterator[tuple[Pair, Pair]]:
        """Both pairs, forwarding, and asleep."""
        row = f"{case.key}-{size}"
        our_socket, their_socket = self._scratch / f"{row}-a", self._scratch / f"{row}-b"
        with contextlib.ExitStack() as stack:
            ours: Testpmd | BackEnd
            if self._self_check:
                ours = stack.enter_context(self._dpdk(f"{row} {OURS} back", our_socket, case))
            else:
                ours = stack.enter_context(self._pyvhost(f"{row} {OURS} back", our_socket, case, size))
            theirs = stack.enter_context(self._dpdk(f"{row} {THEIRS} back", their_socket, case))
            for back, socket in ((ours, our_socket), (theirs, their_socket)):
                if isinstance(back, Testpmd):
                    back.wait_ready()
                    record(back)
                    back.tell(f"set txpkts {size}")
                    back.start()
                    back.pause()
                else:
                    back.wait_ready([socket])
            pairs = []
            for name, back, socket in ((OURS, ours, our_socket), (THEIRS, theirs, their_socket)):
                back.resume()
                front = stack.enter_context(self._front(f"{row} {name} front", socket, case))
                front.wait_ready()
                record(front)
                front.tell(f"set txpkts {size}")
                front.start(case.first_bursts)
                # What else runs on the machine blurs a comparison less when all four go before it.
                for program in (back, front):
                    favour(program.pid)
                pair = Pair(name, back, front, case.counts)
                pair.pause()
                pairs.append(pair)
            yield pairs[0], pairs[1]

    def run(self, case: Case, size: int, pace: Pace, tick: Callable[[], None]) -> Row:
        """Measures one row. `tick` is called after each pair of slices."""
        row = Row(case, size)
        started = time.monotonic()
        with favoured(), self.pairs(case, size) as (ours, theirs):
            by_name = {ours.name: ours, theirs.name: theirs}
            number = 0
            while not pace.enough(number, time.monotonic() - started):
                distance = self._line.round_trip_ns()
                if distance is not None:
                    row.round_trips_ns.append(distance)
                for name in order_of_pair(number, (OURS, THEIRS)):
                    by_name[name].slice(pace)
                number += 1
                tick()
            row.ours, row.theirs = ours.measured, theirs.measured
            for pair in (ours, theirs):
                self._close_account(pair, row)
        return row

    def _close_account(self, pair: Pair, row: Row) -> None:
        """Lets the pair run undisturbed for a while and notes what its halves count."""
        pair.resume()
        time.sleep(ACCOUNT_SECONDS / 10)
        back, front = pair.back, pair.front
        if isinstance(back, Testpmd):
            back.clear_forward_stats()
        cpu = usage.cpu_seconds_exact(back.pid)
        front.clear_forward_stats()
        started = time.monotonic()
        time.sleep(ACCOUNT_SECONDS)
        seen = front.forward_stats()
        seconds = time.monotonic() - started
        cpu = usage.cpu_seconds_exact(back.pid) - cpu
        row.clock_mhz = row.clock_mhz or seen.clock_mhz
        packets, waits, back_end_limits = judge_front_end(seen, pair.counts, seconds)
        pair.measured.account = Account(
            packets=packets,
            cycles_per_packet=cpu * (row.clock_mhz or 0.0) * 1e6 / max(packets, 1),
            busy_cycles_per_packet=back.forward_stats().cycles_per_packet
            if isinstance(back, Testpmd)
            else None,
            waits=waits,
            back_end_limits=back_end_limits,
            samples=profile.samples(back.pid, ACCOUNT_SECONDS),
            burst=None if isinstance(back, Testpmd) else mean_burst(back.pid),
        )
        pair.pause()

    def _front(self, name: str, socket: Path, case: Case) -> Testpmd:
        prefix = name.replace(" ", "-")
        return self.testpmd(
            name, front_end_arguments(socket, prefix, case.front_mode, self._cores, self._huge)
        )

    def _dpdk(self, name: str, socket: Path, case: Case) -> Testpmd:
        prefix = name.replace(" ", "-")
        return self.testpmd(name, back_end_arguments(socket, prefix, case.peer_mode, self._cores, self._huge))

    def _pyvhost(self, name: str, socket: Path, case: Case, size: int) -> BackEnd:
        return BackEnd(
            name,
            net_arguments([socket], case.backend_for(size), busyloop=True),
            core=self._cores.back_end,
            transcript=self._transcripts / f"{name.replace(' ', '-')}.log",
        )
