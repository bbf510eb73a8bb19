"""Socket devices: what their queues counted, put together a guest each.

Promises: as `rates`: what is unknown of one queue is unknown of the guest. Never: does input or output.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final

from pyvhost.observe.rates import VSOCK, Queue
from pyvhost.observe.reader import Row

#: What a guest has besides the sums of its queues' counters: the bytes of its receive queue, and of its other one.
RECEIVED: Final = "received_bytes"
SENT: Final = "sent_bytes"
_BYTES_OF: Final = {"rx": RECEIVED, "tx": SENT}


def is_socket(queue: Queue) -> bool:
    """Whether a queue is a socket device's."""
    return queue.row.label("kind") == VSOCK


def guests(queues: Iterable[Queue]) -> list[Queue]:
    """For each socket device among them one that stands for all of its queues."""
    devices: dict[tuple[str, str], list[Queue]] = {}
    for queue in queues:
        if is_socket(queue):
            devices.setdefault((str(queue.process.path), queue.row.label("device")), []).append(queue)
    return [_together(of_device) for of_device in devices.values()]


def _together(queues: Sequence[Queue]) -> Queue:
    first = queues[0]
    growth: dict[str, int] | None = {}
    values: dict[str, int] = {}
    for queue in queues:
        _add(values, queue.row.values, queue)
        if queue.growth is None or growth is None:
            growth = None
        else:
            _add(growth, queue.growth, queue)
    labels = {**first.row.labels, "queue": ""}
    generation = max(queue.row.generation for queue in queues)
    return Queue(first.process, Row(labels, generation, values), growth, first.seconds)


def _add(sums: dict[str, int], values: dict[str, int], queue: Queue) -> None:
    for name, value in values.items():
        sums[name] = sums.get(name, 0) + value
    which = _BYTES_OF.get(queue.row.label("queue"))
    if which is not None:
        sums[which] = sums.get(which, 0) + values.get("bytes", 0)
