"""Fuzz target of the split ring's kernels: hostile drivers, judged by the model in tests/model.

    python fuzz/fuzz_ring.py --seconds 60 --seed 1
    python fuzz/fuzz_ring.py --seed 1 --case 4711        one case again

Every part of a ring and of the guest's memory lies against pages that cannot be touched. Every eighth case lets
a second thread write descriptors while the kernels walk them; then only what no driver may bring about is
looked for (bytes outside the regions), as nothing else is certain.

Promises: ends after `--seconds` and the case that is under way; tells the case that failed, hung or killed the
process. Exit status 1 then.
"""

from __future__ import annotations

import ctypes
import random
import sys
import threading
from typing import Any

from in_child import Cases, main

_RACE_EVERY = 8
_RACE_ROUNDS = 200


def _scribbler() -> Any:
    """A compiled loop that writes descriptors' words at random, from words that make sense in their place."""
    import numba

    from pyvhost.dataplane.access import load64, load64_acquire, store64

    @numba.njit(nogil=True)  # type: ignore[untyped-decorator]
    def scribble(table: int, descriptors: int, pool: int, choices: int, stop: int, state: int) -> None:
        while load64_acquire(stop) == 0:
            state ^= (state << 13) & 0x7FFFFFFFFFFFFFFF
            state ^= state >> 7
            state ^= (state << 17) & 0x7FFFFFFFFFFFFFFF
            half = 8 * (state & 1)
            to = table + 16 * ((state >> 8) % descriptors) + half
            store64(to, load64(pool + 16 * ((state >> 32) % choices) + half))

    return scribble


def _race(dice: random.Random, scribble: Any) -> None:
    """A driver that changes its descriptors while they are walked."""
    from guarded import Guarded
    from model.ring_scene import WRITE, Scene
    from pyvhost.dataplane import blocks

    scene = Scene(dice)
    scene.wildness = 0.1
    scene.tables_left = 8
    tables = [scene.fill_table(64, allow_indirect=True)[0] for _ in range(4)]
    pool = Guarded.of(b"".join(tables))
    stop = ctypes.c_int64(0)
    scene.add()
    # The queue's table, and guest memory in which indirect tables lie.
    targets = [(scene.desc.address, scene.num)]
    targets += [(memory.address, min(memory.size, 4096) // 16) for memory in scene.memory[:1]]
    threads = [
        threading.Thread(
            target=scribble,
            args=(
                table,
                size,
                pool.address,
                pool.size // 16,
                ctypes.addressof(stop),
                dice.randrange(1, 1 << 60),
            ),
        )
        for table, size in targets
    ]
    for thread in threads:
        thread.start()
    try:
        for _ in range(_RACE_ROUNDS):
            scene.last = int(scene.ring["last_avail"])
            scene.offer(scene.num)
            plain = dice.choice((0, WRITE))
            made = int(scene.kernels.collect(scene.ring, scene.batch.address, 0, blocks.SLOTS, plain, 2))
            scene.check_ranges(max(made, 0))
            scene.kernels.use_batch(scene.ring, scene.batch.address, max(made, 0))
            scene.kernels.publish(scene.ring)
            if made <= 0:
                scene.kernels.take(scene.ring, 1)
    finally:
        stop.value = 1
        for thread in threads:
            thread.join()
        scene.close()
    scene.check_memory()


def _play(cases: Cases) -> None:
    from model.ring_scene import Scene
    from pyvhost.dataplane.policy import PLAIN

    scribble = None if PLAIN else _scribbler()
    for case, dice in cases:
        if scribble is not None and case % _RACE_EVERY == _RACE_EVERY - 1:
            _race(dice, scribble)
        else:
            scene = Scene(dice)
            try:
                scene.play()
            finally:
                scene.close()


if __name__ == "__main__":
    sys.exit(main("fuzz_ring", "Fuzz the split ring's kernels.", _play))
