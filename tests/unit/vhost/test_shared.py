"""What the devices of one kind share in a process: one of each kind, made once, however many ask for it at a time."""

from __future__ import annotations

import threading

import numpy as np
import pytest

from pyvhost.dataplane import blocks
from pyvhost.net.process import Process
from pyvhost.vhost.shared import Shared, called_by_python


class One(Shared):
    made = 0

    def __init__(self) -> None:
        super().__init__()
        type(self).made += 1


class Other(Shared):
    pass


@pytest.fixture(autouse=True)
def none_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Shared, "_made", {})


def test_there_is_one_of_each_kind() -> None:
    got: list[One] = []
    threads = [threading.Thread(target=lambda: got.append(One.get())) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(got) == 8
    assert len(set(map(id, got))) == 1
    assert One.made == 1
    assert type(Other.get()) is Other


def test_a_row_says_whose_it_is() -> None:
    shared = Other.get()
    row = shared.row("vm0", "net", "rx0", "null")
    try:
        row[blocks.C_PACKETS // 8] = 7
        assert shared.counters is One.get().counters, "all are in the process's one file"
    finally:
        shared.counters.release(row)


def test_the_number_of_workers_is_said_before_the_first_device() -> None:
    Process.configure(workers=1)
    assert Process.get() is Process.get()
    with pytest.raises(RuntimeError, match="once there is a device"):
        Process.configure(workers=2)


def test_what_python_calls_takes_a_ring() -> None:
    ring = np.zeros(1, blocks.RING)[0]
    assert all(arguments[0] is ring for _, arguments in called_by_python(ring))
