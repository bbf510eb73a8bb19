"""Latencies as they are counted: latency_0 of them lay below 1 us, latency_1 from there to 2, latency_2 to 4 ...

The last bucket has no end. Promises: a percentile lies in the bucket that the latency itself lay in. Never: does
input or output.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate, count, takewhile
from typing import Final

PREFIX: Final = "latency_"
#: All of them together, in nanoseconds.
TOTAL: Final = "latency_ns"


def buckets(values: Mapping[str, int]) -> list[int]:
    """The counts, by bucket; none if the values have no such fields."""
    return [values[name] for name in takewhile(values.__contains__, (f"{PREFIX}{i}" for i in count()))]


def bounds(bucket: int) -> tuple[float, float]:
    """Where a bucket begins and ends, in microseconds."""
    return (0.0 if bucket == 0 else 2.0 ** (bucket - 1)), 2.0**bucket


def percentile(counts: Sequence[int], part: float) -> float | None:
    """The latency in microseconds below which `part` (0 to 1) of all lie, as if evenly spread in their bucket."""
    total = sum(counts)
    if not total:
        return None
    wanted = part * total
    for bucket, (below, here) in enumerate(zip(accumulate(counts, initial=0), counts, strict=False)):
        if here and below + here >= wanted:
            low, high = bounds(bucket)
            return low + (high - low) * (wanted - below) / here
    raise AssertionError("part is more than 1")


def total_us(values: Mapping[str, int]) -> float:
    """All latencies together, in microseconds. If a file has no sum of them: each as its bucket's middle."""
    if TOTAL in values:
        return values[TOTAL] / 1000
    return sum(number * sum(bounds(bucket)) / 2 for bucket, number in enumerate(buckets(values)))
