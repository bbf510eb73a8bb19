"""Latencies in buckets."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyvhost.observe.latency import bounds, buckets, percentile, total_us


def test_buckets_of_a_row() -> None:
    assert buckets({"latency_0": 1, "latency_1": 2, "latency_10": 9, "reads": 4}) == [1, 2]
    assert buckets({"reads": 4}) == []


def test_bounds_are_microseconds() -> None:
    assert [bounds(i) for i in range(4)] == [(0, 1), (1, 2), (2, 4), (4, 8)]


def test_percentiles() -> None:
    assert percentile([], 0.5) is None
    assert percentile([0, 0], 0.5) is None
    assert percentile([0, 0, 10], 0.5) == 3
    assert percentile([90, 0, 0, 10], 0.9) == 1
    assert percentile([90, 0, 0, 10], 0.95) == 6
    assert percentile([1], 1) == 1


@given(st.lists(st.integers(0, 10**6), min_size=1, max_size=24), st.floats(0.001, 1))
def test_a_percentile_lies_where_the_operation_lay(counts: list[int], part: float) -> None:
    found = percentile(counts, part)
    if found is None:
        assert not any(counts)
        return
    # With each operation at its bucket's end there are enough below, at its beginning not too many.
    assert sum(n for i, n in enumerate(counts) if bounds(i)[0] <= found) >= part * sum(counts) * (1 - 1e-9)
    assert sum(n for i, n in enumerate(counts) if bounds(i)[1] < found) <= part * sum(counts) * (1 + 1e-9)


def test_all_together() -> None:
    assert total_us({"latency_0": 2, "latency_1": 0, "latency_2": 4}) == pytest.approx(2 * 0.5 + 4 * 3)
    assert total_us({"latency_0": 2, "latency_ns": 1234}) == pytest.approx(1.234), "as it was counted"
