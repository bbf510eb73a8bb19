"""What runs in the kernel's lab: `python -m kernel.in_guest WHAT [DEVICE]`, which prints its findings as JSON.

ioctls      each recorded case of DEVICE (of net: and each twin of one), and in what the kernel answered otherwise
datapath    each experiment's facts
"""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Callable

from kernel import driver_cases, experiment, receive, replay, target, transmit, transposed
from kernel.bench import Fact
from kernel.rests import kernel_rests
from pyvhost.driver.vhost_ioctl import open_kernel

#: They put their experiments on the list.
EXPERIMENTS = (transmit, receive)
#: The target that scsi's cases were recorded with.
ENDPOINT = "naa.600140554cf3a18e"


def ioctls(device: str) -> dict[str, list[list[object]]]:
    """By case: where the kernel answered otherwise, as step, answer, and both in words."""
    if device == "vhost-scsi":
        target.set_up(ENDPOINT)
    return {
        case["case"]: [
            [found.number, found.got, str(found)]
            for found in replay.replay(case, replay.KernelFile, kicked=kernel_rests, host=True)
        ]
        for case in cases(device)
    }


def cases(device: str) -> list[replay.Case]:
    """What is asked of a device."""
    return replay.cases(device) + (transposed.for_net() if device == "vhost-net" else [])


def datapath() -> dict[str, list[Fact]]:
    """By experiment: the facts, as they were found."""
    return {name: experiment.run(name, open_kernel, facts) for name, facts in experiment.recorded().items()}


def driver() -> dict[str, str]:
    """By case: nothing, or how it ended."""
    found = {}
    for name, case in driver_cases.CASES.items():
        try:
            with driver_cases.Tapped("vhosttap") as tap:
                case(lambda: open_kernel("/dev/vhost-net"), tap)
            found[name] = ""
        except driver_cases.UnsupportedError as lacking:
            found[name] = f"unsupported: {lacking}"
        except Exception:
            found[name] = traceback.format_exc()
    return found


WHAT: dict[str, Callable[..., object]] = {"ioctls": ioctls, "datapath": datapath, "driver": driver}

if __name__ == "__main__":
    print(json.dumps(WHAT[sys.argv[1]](*sys.argv[2:])))
