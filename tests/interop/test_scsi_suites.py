"""SCSI suites of others in a User Mode Linux guest, against a disk of `pyvhost scsi` as the guest's /dev/sg0.

libiscsi's `iscsi-test-cu` with `--dataloss`: no test fails, and what is left out is left out for the reasons that
docs/reference/scsi.md names. sg3-utils: every page there is, read and decoded without complaint.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from pyvhost.cli.guests import UmlGuest
from pyvhost.cli.serving import Serving
from requirements import need_program

#: Why tests of libiscsi's are left out, and how often that is said, by what they are about.
LEFT_OUT = {
    "only supported for iSCSI backends": 32,
    "Logical unit is not removable": 8,
    "Media is not removable": 1,
    "Logical unit is not write-protected": 1,
    "--allow-sanitize flag is not set": 11,
    "LBPPB < 2": 5,
    "does not support 0-blocks": 2,
    "Multipath unavailable": 4,
}

#: Utilities and how they end: with 0, but for those that name another exit status.
COMMANDS = """\
sg_turs -n 3
sg_inq
sg_inq --id
sg_vpd -p sn
sg_vpd -p di
sg_vpd -p ei
sg_vpd -p bl
sg_vpd -p bdc
sg_vpd -p lbpv
sg_vpd -p tpc
sg_vpd -a
sg_vpd -a -ll
sg_modes -a
sg_modes -aa
sg_modes -6 -a
sg_modes -a -c 1
sg_modes -a -c 2
sg_readcap
sg_readcap -l
sg_opcodes
sg_opcodes -m
sg_opcodes -t
sg_persist -k
sg_persist -r
sg_persist -c
sg_persist -o -G -S 0xabc
sg_persist -o -R -K 0xabc -T 5
sg_persist -s
sg_persist -o -C -K 0xabc
sg_get_lba_status
sg_get_lba_status -m 4096
sg_luns -s 2
sg_logs -a
sg_logs -L
sg_verify -l 0 -c 64
sg_verify -S -l 0 -c 64
sg_write_same --lba 0 -n 64
sg_write_same -S -N -U --lba 64 -n 64
sg_unmap -l 0,100 -n 8,16 -f
sg_compare_and_write --lba=0 --num=1 -i /dev/zero --xferlen=1024
sg_write_verify -l 0 -n 8 --ilen=4096 -i /dev/zero
sg_sync
sg_sync -S
sg_requests
sg_requests -d
sg_start -S
sg_start -s
sg_prevent
sg_prevent -a
sg_senddiag -t
sg_senddiag -l
sg_copy_results -p
sg_read_buffer -m 3
sg_test_rwbuf -s 4096
sg_reset -d
sg_turs : 6
sg_turs
"""


@pytest.fixture(scope="module")
def guest(tmp_path_factory: pytest.TempPathFactory) -> Iterator[UmlGuest]:
    """A guest with one disk, of 64 MiB."""
    need_program("linux.uml", package="user-mode-linux")
    socket: Path = tmp_path_factory.mktemp("scsi") / "disk"
    arguments = ["scsi", "--lun", "memory:64M", "--socket-path", str(socket), "--no-control"]
    with Serving(arguments, [socket]) as serving:
        serving.wait_ready()
        # The suite has a buffer of 32 MiB, and the kernel another one.
        with UmlGuest(disks=[socket], memory_mib=192) as booted:
            booted.run("while ! [ -c /dev/sg0 ]; do sleep 0.1; done")
            yield booted
        assert "Traceback" not in "\n".join(serving.lines)


def test_libiscsi(guest: UmlGuest) -> None:
    program = need_program("iscsi-test-cu", package="libiscsi-bin")
    said = guest.run(
        f"{program} --dataloss --silent --normal --ignore --test ALL /dev/sg0", timeout=110, check=False
    ).output
    summary = re.search(r"tests +(\d+) +(\d+) +(\d+) +(\d+)", said)
    assert summary is not None, said[-4000:]
    total, ran, passed, failed = map(int, summary.groups())
    assert failed == 0, said
    assert passed == ran == total > 200
    reasons: Counter[str] = Counter()
    for line in re.findall(r"\[SKIPPED\] (.*)", said):
        reasons[next((reason for reason in LEFT_OUT if reason in line), line)] += 1
    assert dict(reasons) == LEFT_OUT


def test_sg3_utils(guest: UmlGuest) -> None:
    need_program("sg_vpd", package="sg3-utils")
    complaints = []
    for line in COMMANDS.splitlines():
        command, _, status = line.partition(" : ")
        name, *options = command.split()
        ended = guest.run(" ".join([name, *options, "/dev/sg0"]), check=False)
        if ended.status != int(status or 0):
            complaints.append(f"{line}: {ended.status}\n{ended.output}")
        elif not status and re.search(r"malformed|too short|truncated|unexpected|failed", ended.output, re.I):
            complaints.append(f"{line}:\n{ended.output}")
    assert not complaints, "\n".join(complaints)
