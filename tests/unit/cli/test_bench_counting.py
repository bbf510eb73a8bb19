"""What perf, strace and /proc say, read back; and a real count of a process whose calls are known."""

import subprocess
import sys
from pathlib import Path

import pytest

from pyvhost.cli.bench import counting, profile, usage
from pyvhost.cli.bench.backend import net_arguments
from pyvhost.cli.bench.syscalls import frame_from_host, stream_block
from requirements import need_program, need_root

PERF = """# started on Thu Jan  1 00:00:00 1970

12,,raw_syscalls:sys_enter,1190951,100.00,,
1,,syscalls:sys_enter_write,1190951,100.00,,
7,,syscalls:sys_enter_read,1190951,100.00,,
0,,syscalls:sys_enter_futex,1190951,100.00,,
<not supported>,,syscalls:sys_enter_ioctl,0,100.00,,
"""

STRACE = """% time     seconds  usecs/call     calls    errors syscall
------ ----------- ----------- --------- --------- ----------------
 60.10    0.003102           1      1678           read
 39.90    0.002059           2       830        15 epoll_wait
------ ----------- ----------- --------- --------- ----------------
100.00    0.005161           2      2508        15 total
"""

SCRIPT = """    7eff0001 [unknown] ([JIT] tid 14505)
    7eff0002 [unknown] ([JIT] tid 14505)
    7eff0003 __memmove_evex_unaligned_erms (/usr/lib/x86_64-linux-gnu/libc.so.6)
ffffffff8220 _raw_spin_unlock_irqrestore ([kernel.kallsyms])
    7eff0004 _PyEval_EvalFrameDefault (/usr/lib/libpython3.11.so.1.0)
    7eff0005 rte_vhost_dequeue_burst (/usr/lib/x86_64-linux-gnu/librte_vhost.so.23.0)
    7eff0006 pkt_burst_receive (/usr/bin/dpdk-testpmd)
    7eff0007 [unknown] ([unknown])
    7eff0008 __vdso_clock_gettime ([vdso])
    7eff0009 [unknown] (/tmp/perf-28769.map)
a line that is no sample
"""


def test_perf_counts_by_name_and_the_rest_together() -> None:
    calls, total = counting.parse_perf_stat(PERF)
    assert total == 12
    assert calls == {"write": 1, "read": 7, "other": 4}


def test_strace_counts_with_and_without_errors() -> None:
    assert counting.parse_strace_summary(STRACE) == ({"read": 1678, "epoll_wait": 830}, 2508)


def test_samples_are_sorted_into_kinds() -> None:
    shares = profile.parse_samples(SCRIPT)
    assert shares[profile.COMPILED] == pytest.approx(3 / 10)
    assert shares[profile.COPIES] == pytest.approx(1 / 10)
    assert shares[profile.KERNEL] == pytest.approx(1 / 10)
    assert shares[profile.PYTHON] == pytest.approx(1 / 10)
    assert shares["librte_vhost"] == pytest.approx(1 / 10)
    assert shares["dpdk-testpmd"] == pytest.approx(1 / 10)
    assert shares[profile.CLOCK] == pytest.approx(1 / 10)
    assert sum(shares.values()) == pytest.approx(1.0)


def test_no_samples_are_no_shares() -> None:
    assert profile.parse_samples("") == {}


def test_processor_time_is_read_past_a_name_with_blanks_and_parentheses() -> None:
    fields = "R 1 2 3 4 5 6 7 8 9 10 150 50 0 0 20 0 1 0 1"
    time = usage.parse_cpu_time(f"42 (odd) name) {fields}")
    assert (time.user, time.system) == (150 / usage._TICKS, 50 / usage._TICKS)
    assert time.since(usage.CpuTime(0.5, 0.25)).total == pytest.approx(time.total - 0.75)


def test_memory_is_read_from_a_rollup() -> None:
    text = "5581-7ffc ---p 0000 00:00 0  [rollup]\nRss:  100 kB\nPss:  60 kB\nPss_Anon:  1 kB\n"
    memory = usage.parse_memory(text + "Private_Clean:  3 kB\nPrivate_Dirty:  4 kB\n")
    assert (memory.rss, memory.pss, memory.private) == (100, 60, 7)


def test_a_living_process_has_used_time_and_memory() -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        assert usage.memory(process.pid).rss > 0
        assert usage.cpu_seconds_exact(process.pid) >= 0
        assert process.stdin is not None
        process.stdin.write(b"\n")


# Reads one byte of /dev/zero at a time, as often as it is told.
READER = """
import os, sys
zero = os.open("/dev/zero", os.O_RDONLY)
print("ready", flush=True)
for line in sys.stdin:
    for _ in range(int(line)):
        os.read(zero, 1)
    print("done", flush=True)
"""


@pytest.mark.parametrize("by", ["perf", "strace"])
def test_what_is_counted_is_what_was_called_in_between(by: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if by == "perf":
        need_root()
        need_program("perf", package="linux-perf")
        if not counting._perf_usable():
            pytest.skip("perf can't count system calls here: is tracefs there?")
    else:
        need_program("strace", package="strace")
        monkeypatch.setattr(counting, "_perf_usable", lambda: False)
    with subprocess.Popen(
        [sys.executable, "-c", READER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdout.readline()
        with counting.system_calls(process.pid) as count:
            process.stdin.write("5000\n")
            process.stdout.readline()
        process.stdin.close()
    assert 5000 <= count.calls["read"] < 5010
    assert count.total >= count.calls["read"]


def test_frames_from_the_host_are_whole_and_addressed_to_everyone() -> None:
    frame = frame_from_host(64)
    assert len(frame) == 64
    assert frame[:6] == b"\xff" * 6
    assert stream_block(frame, 3) == (b"\0\0\0\x40" + frame) * 3


def test_one_process_serves_many_sockets() -> None:
    assert net_arguments([Path("/a"), Path("/b")], "null") == [
        *("net", "--backend", "null"),
        *("--socket-path", "/a", "--socket-path", "/b"),
    ]
