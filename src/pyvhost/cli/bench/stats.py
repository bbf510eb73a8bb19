"""The arithmetic of a comparison: pairs of slices become ratios, ratios become a median with its range.

Promises: every figure that compares two back ends comes from slices that ran next to each other, so that a
machine that is slow for a second is slow for both.
Never: starts anything, reads a clock.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Spread:
    """A median and the range it lies in."""

    median: float
    low: float
    high: float
    count: int

    def as_dict(self) -> dict[str, float | int]:
        """For JSON."""
        return {"median": self.median, "min": self.low, "max": self.high, "count": self.count}


def spread(values: Iterable[float]) -> Spread:
    """The median, least and greatest of `values`. Raises ValueError when there are none."""
    numbers = sorted(values)
    if not numbers:
        raise ValueError("no values to summarise")
    return Spread(statistics.median(numbers), numbers[0], numbers[-1], len(numbers))


def pairwise_ratios(ours: Sequence[float], theirs: Sequence[float]) -> list[float]:
    """Each of our slices over the slice of theirs that ran beside it.

    Raises ValueError when the two do not pair up, or when a slice of theirs saw no packet: a ratio to nothing
    would say anything.
    """
    if len(ours) != len(theirs):
        raise ValueError(f"{len(ours)} slices do not pair with {len(theirs)}")
    if any(value <= 0 for value in theirs):
        raise ValueError("a slice of the peer saw no packets")
    return [own / other for own, other in zip(ours, theirs, strict=True)]


def order_of_pair(pair: int, names: tuple[str, str]) -> tuple[str, str]:
    """Who goes first in this pair: A B, B A, A B ..., so that a drift favours nobody."""
    return names if pair % 2 == 0 else (names[1], names[0])


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that `share` (0 to 1) of all values do not exceed."""
    if not values:
        raise ValueError("no values to rank")
    if not 0.0 <= share <= 1.0:
        raise ValueError(f"share {share} is not between 0 and 1")
    ranked = sorted(values)
    # Nearest rank: no value is invented between two that were seen.
    rank = max(1, -(-int(share * len(ranked) * 1_000_000) // 1_000_000))
    return ranked[min(rank, len(ranked)) - 1]


#: A cache line's round trip below this many ns is called near; seen were 60 to 130, and 370 to 450.
NEAR_NS = 200.0


def nearness(round_trip_ns: float) -> str:
    """`near` or `far`: how the two processors' caches stood to each other when it was measured."""
    return "near" if round_trip_ns < NEAR_NS else "far"
