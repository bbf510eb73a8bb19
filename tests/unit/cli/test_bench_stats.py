"""The arithmetic of a comparison."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyvhost.cli.bench.net import Pace, judge_front_end, pace_for
from pyvhost.cli.bench.stats import nearness, order_of_pair, pairwise_ratios, percentile, spread
from pyvhost.cli.bench.testpmd import ForwardStats

rates = st.floats(min_value=1e-3, max_value=1e3)


def test_a_spread_is_the_median_and_the_range() -> None:
    found = spread([3.0, 1.0, 10.0, 2.0])
    assert (found.median, found.low, found.high, found.count) == (2.5, 1.0, 10.0, 4)
    assert found.as_dict() == {"median": 2.5, "min": 1.0, "max": 10.0, "count": 4}


def test_nothing_has_no_spread() -> None:
    with pytest.raises(ValueError, match="no values"):
        spread([])


def test_ratios_are_taken_pair_by_pair() -> None:
    # The machine halved its speed between the pairs: the ratio does not notice.
    assert pairwise_ratios([6.0, 3.0], [4.0, 2.0]) == [1.5, 1.5]


@given(st.lists(rates, min_size=1), rates)
def test_a_back_end_against_itself_is_one_however_the_machine_drifts(
    values: list[float], scale: float
) -> None:
    assert spread(pairwise_ratios(values, values)).median == 1.0
    both = [value * scale for value in values]
    assert pairwise_ratios(both, both) == [1.0] * len(values)


@pytest.mark.parametrize(
    ("ours", "theirs", "why"),
    [([1.0], [1.0, 2.0], "1 slices do not pair with 2"), ([1.0], [0.0], "saw no packets")],
)
def test_what_cannot_be_compared_is_refused(ours: list[float], theirs: list[float], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        pairwise_ratios(ours, theirs)


def test_who_goes_first_changes_with_every_pair() -> None:
    assert [order_of_pair(pair, ("a", "b")) for pair in range(3)] == [("a", "b"), ("b", "a"), ("a", "b")]


@given(st.lists(st.integers(), min_size=1), st.floats(min_value=0, max_value=1))
def test_a_percentile_is_a_value_that_was_seen_and_covers_its_share(values: list[int], share: float) -> None:
    found = percentile(values, share)
    assert found in values
    assert sum(value <= found for value in values) >= share * len(values) - 1e-6


def test_percentiles_at_the_ends() -> None:
    values = [float(number) for number in range(1, 101)]
    assert [percentile(values, share) for share in (0.0, 0.5, 0.99, 1.0)] == [1.0, 50.0, 99.0, 100.0]


def test_near_and_far() -> None:
    assert [nearness(60.0), nearness(130.0), nearness(400.0)] == ["near", "near", "far"]


def test_the_pace_keeps_to_its_time_but_never_below_five_pairs() -> None:
    pace = pace_for(90.0, 6)
    assert pace.pairs > 5
    assert pace.pairs * 2 * (pace.slice_seconds + pace.settle_seconds) < pace.row_seconds < 90.0 / 6
    assert pace_for(1.0, 6).pairs == 5
    assert pace_for(1e6, 1).pairs == 100


@pytest.mark.parametrize(
    ("pairs", "seconds", "enough"),
    [(4, 1000.0, False), (5, 1000.0, True), (5, 1.0, False), (20, 1.0, True)],
)
def test_a_row_ends_with_its_pairs_or_its_time(pairs: int, seconds: float, enough: bool) -> None:
    assert Pace(pairs=20, row_seconds=60.0).enough(pairs, seconds) is enough


def forwarded(**values: float) -> ForwardStats:
    empty: dict[str, Any] = {
        "rx_packets": 0,
        "rx_dropped": 0,
        "tx_packets": 0,
        "tx_dropped": 0,
        "clock_mhz": 2000.0,
    }
    return ForwardStats(**{**empty, **values})


def test_a_sending_front_end_that_finds_the_ring_full_waits_for_the_back_end() -> None:
    assert judge_front_end(forwarded(tx_packets=90, tx_dropped=10), "tx", 1.0) == (90, 0.1, True)
    assert judge_front_end(forwarded(tx_packets=100), "tx", 1.0) == (100, 0.0, False)
    assert judge_front_end(forwarded(), "tx", 1.0) == (0, 1.0, True)


def test_a_receiving_front_end_that_is_seldom_busy_waits_for_the_back_end() -> None:
    seldom = forwarded(rx_packets=5, busy_cycles=1_000_000_000, empty_bursts=0.7)
    assert judge_front_end(seldom, "rx", 1.0) == (5, 0.7, True)
    always = forwarded(rx_packets=5, busy_cycles=1_990_000_000, empty_bursts=0.0)
    assert judge_front_end(always, "rx", 1.0) == (5, 0.0, False)
