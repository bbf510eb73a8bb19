"""What the experiments are to find with `pyvhost.open`: the kernel's facts, but for the differences that are meant.

Each change has the name of its difference in `differences.DIFFERENCES`, the experiment, and what is found there
instead, by the fact's place. A dictionary changes some entries of a state.
"""

from __future__ import annotations

from kernel.bench import Fact

State = dict[str, object]
Change = tuple[str, str, dict[int, object]]


class Any:
    """Equal to everything: a fact that depends on time, or on how a worker works."""

    def __eq__(self, other: object) -> bool:
        return True

    def __hash__(self) -> int:
        return 0

    def __repr__(self) -> str:
        return "(any)"


class Some(int):
    """Equal to every number but zero: a signal that may have come once more, for a kick that was seen late."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, int) and other > 0

    def __hash__(self) -> int:
        return 0


class PerhapsMore(list[str]):
    """Equal to these pages, and to these with the last one less: the worker spared two rings their kicks, or one."""

    def __eq__(self, other: object) -> bool:
        return other in (list(self), list(self[:-1]))

    __hash__ = None


ANY = Any()
#: The transmit ring's flags are written if the port was at rest.
RX_AND_PERHAPS_TX = PerhapsMore(["0x3f0000", "0x3f8000"])
SOME = Some(1)
_STOPPED: State = {"base": 0, "errs": 1, "used_flags": ANY}
_MENDED: State = {"used_idx": 1, "calls": 1}
_DRY: State = {"used_flags": 0}


def _either(*chains: str, places: tuple[int, ...] = (2,)) -> list[Change]:
    return [
        ("stopped-flags", f"net/tx-errors/{name}", {place: {"used_flags": ANY} for place in places})
        for name in chains
    ]


CHANGES: list[Change] = [
    ("num_buffers", "net/rx/plain", {5: "000000000000000000000100"}),
    ("no-spin", "net/tx-errors/half-a-header", {2: _STOPPED, 3: _STOPPED}),
    ("no-spin", "net/tx-errors/half-a-header-spins", {0: ANY, 1: ANY}),
    ("no-lost-chain", "net/tx-errors/writable", {2: _STOPPED, 3: _STOPPED}),
    ("no-lost-chain", "net/tx-errors/readable-then-writable", {2: _STOPPED, 3: _STOPPED}),
    ("no-lost-chain", "net/tx-errors/zero-length", {2: _STOPPED, 3: _STOPPED}),
    (
        "no-lost-chain",
        "net/tx-errors/good-after-bad",
        {2: _STOPPED, 3: {**_STOPPED, "used_idx": 0, "calls": 0}},
    ),
    (
        "no-lost-chain",
        "net/tx-errors/mend-and-kick",
        {3: _STOPPED, 4: [[0, 0]], 5: _MENDED, 6: _STOPPED, 7: [[0, 0]], 8: _MENDED},
    ),
    ("unreadable", "net/tx-errors/unreadable-memory", {1: _STOPPED, 3: _STOPPED}),
    ("one-err", "net/tx-errors/indirect-empty", {2: _STOPPED, 3: _STOPPED}),
    ("one-err", "net/tx-errors/indirect-nested", {2: _STOPPED, 3: _STOPPED}),
    ("one-err", "net/tx-errors/indirect-next-out", {2: _STOPPED, 3: _STOPPED}),
    ("one-err", "net/tx-errors/indirect-outside", {2: _STOPPED, 3: _STOPPED}),
    *_either("head-out-of-range", "next-out-of-range", "loop", "address-wraps", places=(2, 3)),
    *_either("writable-then-readable", "avail-jumps", places=(2, 3)),
    *_either("mend-and-kick", places=(0,)),
    ("dry-at-once", "net/tx/notification-flags", {6: 0}),
    ("dry-at-once", "net/rx/plain", {3: _DRY, 7: _DRY, 11: _DRY, 15: _DRY}),
    ("dry-at-once", "net/rx/mergeable", {6: _DRY}),
    ("dry-at-once", "net/rx/too-small", {4: _DRY}),
    ("dry-at-once", "net/rx/no-buffers-then-kick", {2: _DRY}),
    ("dry-at-once", "net/log/base-missing", {1: _DRY, 3: _DRY}),
    ("calls", "net/tx/batch", {1: ANY}),
    ("calls", "net/tx/weight", {1: ANY}),
    ("dropped-bytes", "net/rx/too-small", {1: "00000000000000000000ffffffffffff"}),
    ("interface-down", "net/tx/interface-down", {2: {"rx_packets": 0}}),
    (
        "log-signals",
        "net/log/rx",
        {
            0: [["0x3f0000", "0x3f8000"], ANY],
            1: [RX_AND_PERHAPS_TX, ANY],
            3: [["0x180000", "0x181000", "0x190000", "0x191000", "0x3f0000"], ANY],
            4: [["0x1a0000", "0x3f0000"], ANY],
            5: [["0x3f8000"], ANY],
        },
    ),
]


def meant(experiment: str, facts: list[Fact]) -> list[Fact]:
    """The facts that are expected here, where Linux's are these."""
    found = list(facts)
    for _, where, changes in CHANGES:
        for place, change in changes.items() if where == experiment else ():
            name, value = found[place]
            changed = {**value, **change} if isinstance(value, dict) and isinstance(change, dict) else change
            found[place] = (name, changed)
    return found
