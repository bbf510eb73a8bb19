"""The list of experiments, by the names under which the kernel's answers were recorded."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from kernel.bench import Bench, Fact, OpenDevice

RECORDED = Path(__file__).with_name("recorded") / "kernel-datapath.json"

#: Facts that depend on time, or on how a device's worker is made, and are no expectation.
UNTIMED = {
    ("net/tx-errors/half-a-header-spins", "worker's CPU ticks (10 ms) in 0.5 s, idle"),
    ("net/tx-errors/half-a-header-spins", "worker's CPU ticks in 0.5 s after the bad packet"),
}

EXPERIMENTS: dict[str, Callable[[Bench], None]] = {}


def experiment(name: str) -> Callable[[Callable[[Bench], None]], Callable[[Bench], None]]:
    """Put a function on the list."""

    def put(function: Callable[[Bench], None]) -> Callable[[Bench], None]:
        EXPERIMENTS[name] = function
        return function

    return put


def recorded() -> dict[str, list[Fact]]:
    """What Linux does, of the experiments that are on the list."""
    found = json.loads(RECORDED.read_text())["experiments"]
    return {
        entry["name"]: [
            (name, value) for name, value in entry["facts"] if (entry["name"], name) not in UNTIMED
        ]
        for entry in found
        if entry["name"] in EXPERIMENTS
    }


def names(device: str) -> set[str]:
    """What was recorded of a device."""
    found = json.loads(RECORDED.read_text())["experiments"]
    return {entry["name"] for entry in found if entry["device"] == device}


def run(name: str, device: OpenDevice, expected: list[Fact]) -> list[Fact]:
    """The facts as they are found with a device, where these are expected."""
    with Bench(device, expected) as bench:
        EXPERIMENTS[name](bench)
        return bench.facts
