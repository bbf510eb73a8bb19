"""A real kernel's vhost devices, in the lab: they answer and do what was recorded, by the same code that is run in
process. Were the recordings or the replay wrong, this would tell.
"""

from __future__ import annotations

import json
from typing import Any

import pytest

from kernel import driver_cases, experiment, in_guest, receive, transmit
from kernel.lab import KernelLab

#: They put their experiments on the list.
EXPERIMENTS = (transmit, receive)

#: Cases in which a kernel asks for an address once or twice, as time has it: two kicks may be seen as one.
TIMED = ("net/iotlb/miss-protocol", "net/iotlb/update-answers-only-covering-misses")


def run(lab: KernelLab, what: str, *words: str) -> Any:
    """The findings of `in_guest`."""
    return json.loads(lab.python("kernel.in_guest", what, *words, timeout=300))


@pytest.mark.parametrize("device", ["vhost-net", "vhost-scsi", "vhost-vsock"])
def test_the_kernel_answers_ioctls_as_recorded(lab: KernelLab, device: str) -> None:
    cases = {case["case"]: case for case in in_guest.cases(device)}
    found = run(lab, "ioctls", device)
    assert found.keys() == cases.keys()
    told = [
        words
        for name, differences in found.items()
        for number, _, words in differences
        if not (name in TIMED and cases[name]["steps"][number]["op"] == "read")
    ]
    assert told == []


def test_the_kernel_moves_packets_as_recorded(lab: KernelLab) -> None:
    found = run(lab, "datapath")
    expected = {name: [list(fact) for fact in facts] for name, facts in experiment.recorded().items()}
    assert found == expected


def test_the_driver_works_with_the_kernel_s_device(lab: KernelLab) -> None:
    found = run(lab, "driver")
    assert found.keys() == driver_cases.CASES.keys()
    # Debian's kernel is built without the ioctl that tells it of a byte order.
    assert found.pop("frames/big-endian").startswith("unsupported")
    assert {name: told for name, told in found.items() if told} == {}
