"""The cache line's game: it is played to the end, and ends by itself when nobody plays along."""

from __future__ import annotations

import threading

import numpy as np
import pytest

from pyvhost.dataplane import pingpong, policy


def room() -> tuple[np.ndarray, int]:
    memory = np.zeros(pingpong.ROOM + 128, dtype=np.uint8)
    return memory, -(-memory.ctypes.data // 128) * 128


def test_both_sides_play_all_rounds() -> None:
    rounds = 20 if policy.PLAIN else 1000
    memory, address = room()
    elapsed: dict[int, int] = {}

    def play(side: int) -> None:
        elapsed[side] = pingpong.play(address, side, rounds)

    players = [threading.Thread(target=play, args=(side,)) for side in (0, 1)]
    for player in players:
        player.start()
    for player in players:
        player.join()
    assert all(ns > 0 for ns in elapsed.values())
    # Round 0 is not counted: the word ends where round `rounds` left it.
    assert memory[address - memory.ctypes.data :][:8].view(np.int64)[0] == 2 * rounds + 2


@pytest.mark.skipif(policy.PLAIN, reason="a thousand million looks take plain Python minutes")
def test_a_player_alone_gives_up() -> None:
    _memory, address = room()
    assert pingpong.play(address, 1, 5) == -1
