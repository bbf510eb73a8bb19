"""How soon control messages are answered while a worker of the same process is flooded.

testpmd floods one device of the process; a front end of the driver side's is attached to another one, and times
what a hypervisor would send it: questions, and changes to its rings.

Promises: each answer is timed from the first byte sent to the answer read, on this side of the socket, so the
time this side waits for a processor is in it; the same is measured without the flood.
Never: judges; the report does.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from pathlib import Path

from pyvhost.cli.bench.backend import BackEnd, net_arguments
from pyvhost.cli.bench.results import ControlResult
from pyvhost.cli.bench.stats import percentile, spread
from pyvhost.cli.bench.testpmd import Cores, Testpmd, front_end_arguments
from pyvhost.driver.memory import GuestMemory
from pyvhost.driver.net import NetDriver
from pyvhost.driver.vhost_user import VhostUserFrontend

_FLOODED = 1.0


def _messages(front: VhostUserFrontend, driver: NetDriver) -> list[Callable[[], object]]:
    """One of each kind; every one has an answer to wait for, an acknowledgement where it has no other."""
    call = driver.tx[0].call_fd
    return [
        front.get_features,
        front.get_queue_num,
        lambda: front.get_config(0, 6),
        lambda: front.set_vring_enable(1, False),
        lambda: front.set_vring_enable(1, True),
        lambda: front.set_vring_call(1, call),
        lambda: front.set_mem_table(driver.memory.regions),
        front.get_protocol_features,
    ]


def answer_times(front: VhostUserFrontend, driver: NetDriver, count: int) -> list[float]:
    """Sends `count` messages one by one, and returns how long each answer took, in ms."""
    kinds = _messages(front, driver)
    times = []
    for number in range(count):
        ask = kinds[number % len(kinds)]
        started = time.perf_counter_ns()
        ask()
        times.append((time.perf_counter_ns() - started) / 1e6)
    return times


def measure(
    scratch: Path, huge: Path, cores: Cores, transcripts: Path, *, messages: int = 400
) -> ControlResult:
    """Floods a `null` device and asks another one of the same process `messages` times."""
    flooded, asked = scratch / "control-a", scratch / "control-b"
    with contextlib.ExitStack() as stack:
        # Not pinned: a control thread that may go wherever there is room is what a user has.
        back = stack.enter_context(
            BackEnd(
                "control back",
                net_arguments([flooded, asked], "null", busyloop=True),
                transcript=transcripts / "control-back.log",
            )
        )
        back.wait_ready([flooded, asked])
        memory = stack.enter_context(contextlib.closing(GuestMemory(4 << 20)))
        front = stack.enter_context(VhostUserFrontend.connect(asked))
        driver = NetDriver(front, memory)
        stack.callback(driver.close)
        driver.start()
        quiet = answer_times(front, driver, messages)
        flood = stack.enter_context(
            Testpmd(
                "control front",
                front_end_arguments(flooded, "control-front", "txonly", cores, huge),
                transcripts / "control-front.log",
            )
        )
        flood.wait_ready()
        flood.start()
        time.sleep(_FLOODED / 2)
        flood.port_stats()
        started = time.monotonic()
        times = answer_times(front, driver, messages)
        # At least a while, so that the flood's own rate means something.
        time.sleep(max(0.0, _FLOODED / 2 - (time.monotonic() - started)))
        rate = flood.port_stats().tx_pps
    if rate == 0:
        raise RuntimeError("the flood did not flow: nothing was measured under load")
    return ControlResult(
        messages=messages,
        median_ms=spread(times).median,
        p99_ms=percentile(times, 0.99),
        max_ms=max(times),
        idle_median_ms=spread(quiet).median,
        flood_mpps=rate / 1e6,
    )
