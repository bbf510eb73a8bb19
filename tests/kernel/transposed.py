"""Net twins of cases that were recorded for scsi or vsock alone, where what is asked is generic.

The kernel's devices share the code that answers, so that a case about the memory table, the log or the rings says
the same of each. Starting a vsock device or setting a scsi endpoint becomes binding both rings to a tap.

Promises: a twin is made only of a case that net does not have itself. Never: a case of what differs by design
(features offered, the number of rings, ioctls of its own).
"""

from __future__ import annotations

import copy
from typing import Any

from kernel import replay

#: By the part of the name behind the device's, and from which device: vsock has two rings as net has.
_CASES = (
    ("scsi", "owner/every-ioctl-null-pointer-after-set-owner"),
    ("vsock", "features/access-platform"),
    ("vsock", "features/log-all-while-running-with-good-log-base"),
    ("vsock", "mem-table/shapes-while-running"),
    ("scsi", "mem-table/while-running-and-logging"),
    ("vsock", "vring/addr-while-stopped"),
    ("vsock", "vring/truncated-arguments"),
    ("scsi", "unknown/numbers"),
    ("vsock", "iotlb/without-the-feature"),
    ("vsock", "file/other-calls"),
)


def for_net() -> list[replay.Case]:
    """The twins."""
    have = {case["case"]: case for case in replay.recorded()}
    return [_twin(have[f"{device}/{name}"], name) for device, name in _CASES if f"net/{name}" not in have]


def _twin(case: replay.Case, name: str) -> replay.Case:
    steps: list[replay.Step] = []
    for step in copy.deepcopy(case["steps"]):
        what = step.get("ioctl", "")
        if step.get("setup") and what == "VHOST_VSOCK_SET_GUEST_CID":
            continue
        if step.get("setup") and what in ("VHOST_VSOCK_SET_RUNNING", "VHOST_SCSI_SET_ENDPOINT"):
            steps += [_bind(0), _bind(1)]
            continue
        if step["op"] == "fstat":
            # Each has a number of its own.
            step["result"]["minor"] = 238
        steps.append(step)
    return {"case": f"net/{name}", "device": "vhost-net", "steps": steps}


def _bind(index: int) -> dict[str, Any]:
    args = {"index": index, "fd": "tap0"}
    return {
        "op": "ioctl",
        "ioctl": "VHOST_NET_SET_BACKEND",
        "request": "0x4008af30",
        "args": args,
        "result": 0,
        "setup": True,
    }
