"""What a guest did wrong in a ring, in words: the numbers that a kernel left in the ring's record.

Promises: names the queue, the field and the numbers, and the clause of virtio 1.2 that was broken.
Never: decides anything.
"""

from __future__ import annotations

from typing import Any, Final

from pyvhost.dataplane import blocks

_WORDS: Final[dict[int, str]] = {
    blocks.FAULT_AVAIL_INDEX: "avail idx {a} is more than the ring's {num} entries ahead of {b} (2.7.13.3)",
    blocks.FAULT_HEAD: "available entry {b}: head {descriptor} is not below the ring's {a} descriptors (2.7.6)",
    blocks.FAULT_NEXT: "descriptor chain {a}: next {descriptor} is not below {b} (2.7.5.1)",
    blocks.FAULT_LOOP: "descriptor chain {a} has more than its table's {b} descriptors: a loop (2.7.5.2)",
    blocks.FAULT_ADDRESS: "descriptor {descriptor}: addr {a:#x} + len {b} is not in guest memory (2.7.5)",
    blocks.FAULT_LENGTH: "descriptor chain {b}: there is no byte to write to in it (2.7.5)",
    blocks.FAULT_INDIRECT: "indirect descriptor {descriptor}: addr or flags {a:#x} ({b}) can't be (2.7.5.3.1)",
    blocks.FAULT_INDIRECT_SIZE: "indirect descriptor {descriptor}: len {a} is no table (2.7.5.3.1)",
    blocks.FAULT_TOO_LONG: "descriptor chain {a} has more than {b} pieces (2.7.5)",
    blocks.FAULT_DIRECTION: "descriptor {descriptor}: readable or writable where it can't be (2.7.4.2)",
    blocks.FAULT_HEADER: "descriptor chain {descriptor}: {a} bytes are less than a header of {b} (5.1.6)",
    blocks.FAULT_PERMISSION: "{a:#x}: the IOTLB allows {descriptor}, {b} is needed (1 reads, 2 writes)",
}


def describe(record: Any) -> str:
    """The fault that `record` (of `blocks.RING`) holds."""
    words = _WORDS[int(record["fault"])]
    return words.format(
        descriptor=int(record["fault_descriptor"]),
        a=int(record["fault_a"]) & 0xFFFFFFFFFFFFFFFF,
        b=int(record["fault_b"]) & 0xFFFFFFFFFFFFFFFF,
        num=int(record["num"]),
    )
