"""Recordings as others read them: scapy and tcpdump; what happens on a full disk, with a pipe, with two devices."""

from __future__ import annotations

import errno
import os
import resource
import signal
import stat
import subprocess
import sys
import threading
import time
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scapy.utils import RawPcapNgReader

from pyvhost.dataplane import tap_ring
from pyvhost.net import pcap
from pyvhost.net.pcap import Recorder, TapRing
from requirements import need_program

IN, OUT = tap_ring.INBOUND, tap_ring.OUTBOUND
FRAME = bytes.fromhex("52540000000252540000000108004500001c00010000401166ce0a0000010a00000204d2162e00080000")


def put(address: int, frame: bytes = FRAME, direction: int = OUT) -> bool:
    data = np.frombuffer(frame, np.uint8)
    iov = np.array([data.ctypes.data, len(frame)], np.int64)
    return bool(tap_ring.record(address, iov.ctypes.data, 1, len(frame), 0, direction))


def packets(path: Path) -> list[tuple[bytes, Any]]:
    with RawPcapNgReader(str(path)) as reader:
        return list(reader)


def test_scapy_reads_it(tmp_path: Path) -> None:
    path = tmp_path / "a.pcap"
    recorder = Recorder(path, "vm0")
    before = Decimal(time.time_ns()) / 10**9
    assert put(recorder.address)
    assert put(recorder.address, FRAME + bytes(1000), IN)
    after = Decimal(time.time_ns()) / 10**9
    recorder.close()
    (first, about), (second, also) = packets(path)
    assert (first, second) == (FRAME, FRAME + bytes(1000))
    assert about.linktype == 1
    assert about.ifname == b"vm0"
    assert (about.direction, also.direction) == (2, 1)
    assert also.wirelen == len(FRAME) + 1000
    times = [Decimal(m.tshigh << 32 | m.tslow) / m.tsresol for m in (about, also)]
    assert about.tsresol == 10**9
    assert before - Decimal("0.01") <= times[0] <= times[1] <= after + Decimal("0.01")


def test_tcpdump_reads_it(tmp_path: Path) -> None:
    tcpdump = need_program("tcpdump")
    path = tmp_path / "a.pcap"
    recorder = Recorder(path, "vm0", 2, snaplen=100)
    first, second = recorder.addresses
    put(first)
    put(second, FRAME + bytes(1000), IN)
    recorder.close()
    done = subprocess.run([tcpdump, "-nn", "-e", "-r", str(path)], capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert len(lines) == 2
    assert all("52:54:00:00:00:01 > 52:54:00:00:00:02" in line for line in lines)
    assert all("10.0.0.1.1234 > 10.0.0.2.5678: UDP" in line for line in lines)
    assert "length 42:" in lines[0]
    assert "length 1042:" in lines[1]
    assert "snapshot length 100" in done.stderr


def test_a_ring_for_each_queue_pair(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path / "a.pcap", "vm0", 3)
    assert len(set(recorder.addresses)) == 3
    for address in reversed(recorder.addresses):
        put(address)
    recorder.close()
    names = [about.ifname for _, about in packets(tmp_path / "a.pcap")]
    assert sorted(names) == [b"vm0, queue pair 0", b"vm0, queue pair 1", b"vm0, queue pair 2"]


def test_devices_share_a_file_and_end_at_different_times(tmp_path: Path) -> None:
    path = tmp_path / "a.pcap"
    one = Recorder(path, "vm0")
    put(one.address)
    two = Recorder(tmp_path / "." / "a.pcap", "vm1")
    put(two.address)
    one.close()
    put(two.address)
    three = Recorder(path, "vm2")
    put(three.address)
    two.close()
    three.close()
    three.close()
    assert sorted(about.ifname for _, about in packets(path)) == [b"vm0", b"vm1", b"vm1", b"vm2"]


def test_a_recording_that_begins_again_begins_anew(tmp_path: Path) -> None:
    path = tmp_path / "a.pcap"
    for _ in range(2):
        recorder = Recorder(path)
        put(recorder.address)
        recorder.close()
    assert len(packets(path)) == 1


def test_many_frames_through_a_small_ring(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path / "a.pcap", ring_size=4096)
    sent = []
    for number in range(2000):
        frame = FRAME + number.to_bytes(4, "big") * (number % 50)
        if put(recorder.address, frame):
            sent.append(frame)
    recorder.close()
    assert [frame for frame, _ in packets(tmp_path / "a.pcap")] == sent
    assert recorder.frames == len(sent)
    assert recorder.lost == 2000 - len(sent)


def test_what_was_lost_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    recorder = Recorder(tmp_path / "a.pcap", ring_size=4096)
    put(recorder.address)
    assert not put(recorder.address, bytes(5000))
    recorder.close()
    assert "1 of 2 frames are missing" in caplog.text
    # The Interface Statistics Block: received 2, dropped 1.
    data = (tmp_path / "a.pcap").read_bytes()
    assert data.endswith(
        pcap._option(4, (2).to_bytes(8, sys.byteorder))
        + pcap._option(5, (1).to_bytes(8, sys.byteorder))
        + bytes(4)
        + data[-4:]
    )


def test_nobody_else_may_read_it(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path / "a.pcap")
    recorder.close()
    assert stat.S_IMODE((tmp_path / "a.pcap").stat().st_mode) == 0o600


def test_the_file_is_whole_while_it_is_written(tmp_path: Path) -> None:
    path = tmp_path / "a.fifo"
    os.mkfifo(path)
    reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    recorder = Recorder(path, "vm0")
    os.set_blocking(reader, True)
    put(recorder.address)
    seen = b""
    while FRAME not in seen or len(seen) % 4:
        seen += os.read(reader, 65536)
    (tmp_path / "so far").write_bytes(seen)
    assert [frame for frame, _ in packets(tmp_path / "so far")] == [FRAME]
    recorder.close()
    os.close(reader)


def test_a_pipe_without_a_reader(tmp_path: Path) -> None:
    path = tmp_path / "a.fifo"
    os.mkfifo(path)
    with pytest.raises(OSError, match="nobody reads from this pipe") as refusal:
        Recorder(path)
    assert refusal.value.errno == errno.ENXIO
    assert str(path) in str(refusal.value)


def test_a_reader_that_goes_away_ends_the_recording(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "a.fifo"
    os.mkfifo(path)
    reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    recorder = Recorder(path)
    os.set_blocking(reader, True)
    os.read(reader, 1)
    os.close(reader)
    for _ in range(200_000):
        if not put(recorder.address):
            break
    assert recorder.lost
    recorder.close()
    assert "the recording ends here: Broken pipe" in caplog.text


def test_a_reader_that_sleeps_keeps_nobody_for_ever(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pcap, "_PATIENCE", 0.05)
    path = tmp_path / "a.fifo"
    os.mkfifo(path)
    reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    recorder = Recorder(path, ring_size=1 << 20)
    for _ in range(100):
        put(recorder.address, bytes(4000))
    recorder.close()
    os.close(reader)
    assert "its reader does not take the rest" in caplog.text


def test_a_file_that_can_not_be_made(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="absent"):
        Recorder(tmp_path / "absent" / "a.pcap")
    with pytest.raises(IsADirectoryError):
        Recorder(tmp_path)
    assert [thread for thread in threading.enumerate() if thread.name.startswith("pcap")] == []


def test_a_full_disk_ends_the_recording_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (8192, limits[1]))
        recorder = Recorder(tmp_path / "a.pcap")
        for _ in range(500):
            put(recorder.address)
        recorder.close()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, ignored)
    assert "the recording ends here: File too large" in caplog.text


def test_it_leaves_no_thread_and_no_descriptor(tmp_path: Path) -> None:
    Recorder(tmp_path / "a.pcap").close()
    before = set(os.listdir("/proc/self/fd"))
    for _ in range(5):
        Recorder(tmp_path / "a.pcap", "vm0", 2).close()
    assert set(os.listdir("/proc/self/fd")) == before
    assert [thread for thread in threading.enumerate() if thread.name.startswith("pcap")] == []


@pytest.mark.parametrize("size", [0, 100, 5000])
def test_impossible_rings(size: int) -> None:
    with pytest.raises(ValueError, match="power of two"):
        TapRing("x", size=size)


@pytest.mark.parametrize("snaplen", [0, -1, pcap.SNAPLEN + 1])
def test_impossible_snaplen(snaplen: int) -> None:
    with pytest.raises(ValueError, match="snaplen"):
        TapRing("x", snaplen=snaplen)
