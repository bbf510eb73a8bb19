"""Memory that was lent to `/dev/vhost-scsi` in process and is unmapped while its rings run.

Each case is a process of its own: what fails here ends the process it fails in.
"""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

PRELUDE = """
import ctypes, faulthandler, os, select
faulthandler.enable()
import pyvhost
from pyvhost.driver import cdb
from pyvhost.driver.memory import MIB, GuestMemory
from pyvhost.driver.scsi import ScsiDriver
from pyvhost.driver.vhost_ioctl import VhostScsiFrontend
from pyvhost.scsi import endpoints

libc = ctypes.CDLL(None, use_errno=True)

class Lent:
    def __init__(self, wwpn, spec):
        self.endpoint = endpoints.register(wwpn, [spec])
        self.memory = GuestMemory(8 * MIB, anonymous=True)
        self.handle = pyvhost.open("/dev/vhost-scsi")
        self.driver = ScsiDriver(VhostScsiFrontend(self.handle, wwpn), self.memory, timeout=20.0)
        self.driver.start()
        self.works()
        self.driver.command(0, 0, cdb.test_unit_ready())

    def works(self):
        self.driver.command(0, 0, cdb.test_unit_ready())
        assert self.driver.command(0, 0, cdb.inquiry(36), data_in_length=36).data[8:15] == b"PYVHOST"

    def unmap(self):
        (region,) = self.memory.regions
        assert libc.munmap(ctypes.c_void_p(region.userspace_addr), ctypes.c_size_t(region.memory_size)) == 0

    def err(self, *queues):
        for queue in queues:
            select.select([queue.err_fd], [], [])

one, other = Lent("naa.1", "memory:1M"), Lent("naa.2", "memory:1M{option}")
driver = one.driver
"""
CASES = {
    "a kick of the control queue": "one.unmap(); driver.control.kick(); one.err(driver.control, driver.event)",
    "an event": "one.unmap(); one.endpoint.add_lun(0, 1, 'memory:1M'); one.err(driver.event, driver.control)",
    "all of them": """
one.unmap()
for queue in (driver.control, driver.event, *driver.requests):
    queue.kick()
one.endpoint.add_lun(0, 1, 'memory:1M')
one.err(driver.control, driver.event, driver.requests[0])
""",
    "a command of Python's under way": """
pending = driver.submit(0, 0, cdb.read10(0, 8), data_in_length=4096)
one.unmap()
one.err(driver.requests[0])
""",
}
#: The device can be given up, and its neighbour goes on.
AFTER = """
other.works()
os.write(1, b"it lives\\n")
one.handle.close()
other.works()
other.handle.close()
os.write(1, b"it ends\\n")
os._exit(0)
"""


@pytest.mark.parametrize("name", CASES)
def test_the_process_survives(name: str) -> None:
    slow = "under way" in name
    prelude = PRELUDE.replace("{option}", "")
    if slow:
        prelude = prelude.replace('Lent("naa.1", "memory:1M")', 'Lent("naa.1", "memory:1M,delay=300")')
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(prelude) + CASES[name] + AFTER],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        cwd=Path(__file__).parents[1],
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout == "it lives\nit ends\n"
