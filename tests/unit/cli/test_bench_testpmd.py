"""What testpmd prints, read back: the text below is what DPDK 22.11 printed."""

import pytest

from pyvhost.cli.bench.testpmd import TestpmdError, parse_forward_stats, parse_port_stats

PORT = """show port stats 0

  ######################## NIC statistics for port 0  ########################
  RX-packets: 12         RX-missed: 3          RX-bytes:  768
  RX-errors: 0
  RX-nombuf:  0
  TX-packets: 6165600    TX-errors: 1          TX-bytes:  394598400

  Throughput (since last show)
  Rx-pps:            7          Rx-bps:          448
  Tx-pps:      6696370          Tx-bps:   3428522096
  ############################################################################
"""

FORWARD = """show fwd stats all

  ---------------------- Forward statistics for port 0  ----------------------
  RX-packets: 1              RX-dropped: 1             RX-total: 2
  TX-packets: 1              TX-dropped: 1             TX-total: 2
  TX-bursts : 356037 [29% of 0 pkts + 71% of 32 pkts]
  ----------------------------------------------------------------------------

  +++++++++++++++ Accumulated forward statistics for all ports+++++++++++++++
  RX-packets: 0              RX-dropped: 0             RX-total: 0
  TX-packets: 7993440        TX-dropped: 3399680       TX-total: 11393120
  ++++++++++++++++++++++++++++++++++++++++++++++++++++++++++++++++++++++++++++

  CPU cycles/packet=529.07 (total cycles=4229075285 / total txonly packets=7993440) at 2790 MHz Clock
"""


def test_port_statistics_are_read_with_their_rates() -> None:
    stats = parse_port_stats(PORT)
    assert (stats.rx_packets, stats.tx_packets) == (12, 6165600)
    assert (stats.rx_missed, stats.tx_errors) == (3, 1)
    assert (stats.rx_bytes, stats.tx_bytes) == (768, 394598400)
    assert (stats.rx_pps, stats.tx_pps) == (7, 6696370)


def test_an_answer_without_statistics_is_an_error_that_shows_the_answer() -> None:
    with pytest.raises(TestpmdError, match="Invalid port 7"):
        parse_port_stats("show port stats 7\nInvalid port 7\n")
    with pytest.raises(TestpmdError, match="not started"):
        parse_forward_stats("stop\nPacket forwarding not started\n")


def test_forward_statistics_are_the_accumulated_ones() -> None:
    stats = parse_forward_stats(FORWARD)
    assert (stats.tx_packets, stats.tx_dropped) == (7993440, 3399680)
    assert (stats.rx_packets, stats.rx_dropped) == (0, 0)


def test_cycles_and_bursts_are_read_where_they_were_recorded() -> None:
    stats = parse_forward_stats(FORWARD)
    assert (stats.busy_cycles, stats.cycles_per_packet, stats.clock_mhz) == (4229075285, 529.07, 2790.0)
    assert (stats.bursts, stats.empty_bursts) == (356037, 0.29)


def test_bursts_of_which_none_was_empty_are_not_bursts_that_were_not_recorded() -> None:
    full = parse_forward_stats(FORWARD.replace("29% of 0 pkts + 71%", "100%"))
    assert (full.bursts, full.empty_bursts) == (356037, 0.0)
    plain = parse_forward_stats("\n".join(line for line in FORWARD.splitlines() if "bursts" not in line))
    assert (plain.bursts, plain.empty_bursts) == (None, None)


def test_nothing_moved_leaves_no_cycles() -> None:
    idle = parse_forward_stats(FORWARD.partition("  CPU cycles")[0])
    assert (idle.busy_cycles, idle.cycles_per_packet, idle.clock_mhz) == (None, None, None)
