"""A table of chains in flight, as a back end leaves it, read by the front end's side."""

from __future__ import annotations

import os
import struct

import pytest

from pyvhost.driver.errors import DeviceError
from pyvhost.driver.inflight import Inflight
from pyvhost.host import memfd


def table(queues: int = 2, size: int = 8, offset: int = 0, length: int = 4096) -> Inflight:
    return Inflight(memfd.create("inflight", length), length - offset, offset, queues, size)


def test_heads_come_in_the_order_in_which_they_were_taken() -> None:
    # 16 bytes of head, 16 a descriptor, each queue on a boundary of 64: vhost-user, "Inflight I/O tracking".
    with table(offset=64) as inflight:
        second = 64 + 192
        os.pwrite(inflight.fd, struct.pack("=QHHHH", 0, 1, 8, 3, 17), second)
        for head, counter in [(5, 1), (0, 3), (7, 2)]:
            os.pwrite(inflight.fd, struct.pack("=B5xHQ", 1, 0, counter), second + 16 + 16 * head)
        os.pwrite(inflight.fd, struct.pack("=B5xHQ", 0, 0, 9), second + 16 + 16 * 2)
        assert inflight.heads(1) == [5, 7, 0]
        assert inflight.heads(0) == []
        header = inflight.header(1)
        assert (header.version, header.desc_num, header.last_batch_head, header.used_idx) == (1, 8, 3, 17)
        with pytest.raises(ValueError, match="queue 2 of 2"):
            inflight.heads(2)


def test_a_table_that_is_too_small_for_what_it_says() -> None:
    with table(queues=8, size=256) as inflight, pytest.raises(DeviceError, match="need 33280 bytes"):
        inflight.heads(0)


def test_a_file_that_ends_early() -> None:
    inflight = table()
    inflight.mmap_offset = 4000
    with inflight, pytest.raises(DeviceError, match="ends before queue 0"):
        inflight.heads(0)
    inflight.close()
