"""Sense data, byte by byte (SPC-4, 4.5)."""

from __future__ import annotations

import errno

import pytest

from pyvhost.scsi.sense import Asc, Field, Key, Sense, store_failed


def test_fixed_format() -> None:
    sense = Sense(Key.ILLEGAL_REQUEST, Asc.INVALID_FIELD_IN_CDB, information=0x01020304, field=Field(2, 5))
    data = sense.encode()
    assert len(data) == 18
    assert data[0] == 0xF0
    assert data[2] == 5
    assert data[3:7].hex() == "01020304"
    assert data[7] == 10
    assert data[12:14].hex() == "2400"
    assert data[15:18].hex() == "cd0002"


def test_descriptor_format() -> None:
    data = Sense(Key.MISCOMPARE, Asc.MISCOMPARE_DURING_VERIFY_OPERATION, information=7).encode(
        descriptor=True
    )
    assert data.hex() == "720e1d000000000c" + "000a8000" + "0000000000000007"


def test_what_does_not_fit_fixed_format_is_left_out() -> None:
    sense = Sense(Key.MEDIUM_ERROR, Asc.WRITE_ERROR, information=1 << 32)
    assert sense.encode()[0] == 0x70
    assert sense.encode(descriptor=True)[12:20] == (1 << 32).to_bytes(8, "big")


@pytest.mark.parametrize(
    ("error", "key", "asc"),
    [
        (errno.EIO, Key.MEDIUM_ERROR, Asc.WRITE_ERROR),
        (errno.ENOSPC, Key.DATA_PROTECT, Asc.SPACE_ALLOCATION_FAILED_WRITE_PROTECT),
        (errno.ENODEV, Key.NOT_READY, Asc.NOT_READY_CAUSE_NOT_REPORTABLE),
        (errno.EROFS, Key.DATA_PROTECT, Asc.WRITE_PROTECTED),
        (errno.ETIMEDOUT, Key.ABORTED_COMMAND, Asc.COMMAND_TIMEOUT_DURING_PROCESSING),
        (errno.EINVAL, Key.MEDIUM_ERROR, Asc.WRITE_ERROR),
    ],
)
def test_what_an_errno_of_the_store_means(error: int, key: Key, asc: Asc) -> None:
    sense = store_failed(error, 5, writing=True).sense
    assert (sense.key, sense.asc) == (key, asc)
    if key is Key.MEDIUM_ERROR:
        assert sense.information == 5
