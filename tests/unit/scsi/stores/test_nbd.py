"""Disks behind NBD servers that nobody here wrote: qemu-nbd with a qcow2 image, nbdkit with its plugins."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from pyvhost.host.poller import Poller
from pyvhost.scsi.stores import libnbd
from pyvhost.scsi.stores.base import ExtentState
from pyvhost.scsi.stores.nbd import NbdStore
from requirements import need, need_program
from stores import Disk, make_qcow2, nbdkit, qemu_nbd

MIB = 1 << 20


@pytest.fixture(autouse=True)
def _library() -> None:
    try:
        libnbd.library()
    except libnbd.NbdError:
        need(False, "apt-get install libnbd0")


def test_a_qcow2_image_by_qemu_nbd(tmp_path: Path, poller: Poller) -> None:
    image = make_qcow2(tmp_path / "disk.qcow2", 64 * MIB)
    data = os.urandom(MIB)
    with qemu_nbd(image, "qcow2") as server, Disk(NbdStore(server.uri), poller) as disk:
        assert (disk.sizes, disk.states) == ([64 * MIB], [True])
        assert disk.store.wce
        assert disk.store.can_unmap
        assert disk.write(8 * MIB, data, cuts=[512, 5120]) == 0
        assert disk.write(9 * MIB, b"f" * 4096, fua=True) == 0
        assert disk.flush() == 0
        assert disk.read(8 * MIB, MIB) == data
        assert disk.extents(0, 64 * MIB)[0] == (0, 8 * MIB, ExtentState.DEALLOCATED)
        assert disk.mapped(8 * MIB, MIB)
        assert disk.discard(8 * MIB, MIB // 2) == 0
        assert disk.read(8 * MIB, MIB) == bytes(MIB // 2) + data[MIB // 2 :]
        assert not disk.mapped(8 * MIB, MIB // 2)
        assert disk.zero(8 * MIB, 2 * MIB) == 0
        assert disk.read(8 * MIB, 2 * MIB) == bytes(2 * MIB)
        assert disk.write(0, b"q" * 512) == 0
    qemu_img = need_program("qemu-img", package="qemu-utils")
    command = [qemu_img, "check", "-q", str(image)]
    subprocess.run(command, check=True)
    raw = tmp_path / "disk.raw"
    subprocess.run([qemu_img, "convert", "-O", "raw", str(image), str(raw)], check=True)
    assert raw.stat().st_size == 64 * MIB


def test_nbdkit_in_memory(tmp_path: Path, poller: Poller) -> None:
    with nbdkit(tmp_path, "memory", "1G") as server, Disk(NbdStore(server.uri), poller) as disk:
        data = os.urandom(3 * MIB)
        assert disk.write(512, data, cuts=[4096, 4097, MIB]) == 0
        assert disk.read(512, len(data), cuts=[1, 2, 3]) == data
        assert disk.zero(0, 1 << 30, unmap=True) == 0
        assert not disk.mapped(0, 1 << 30)


def test_many_requests_at_a_time(tmp_path: Path, poller: Poller) -> None:
    with nbdkit(tmp_path, "memory", "64M") as server, Disk(NbdStore(server.uri), poller) as disk:
        ended: list[int] = []
        for number in range(500):
            disk.store.write(number * 4096, [memoryview(number.to_bytes(4, "little") * 1024)], ended.append)
        disk.until(lambda: len(ended) == 500)
        assert set(ended) == {0}
        memory = [memoryview(bytearray(4096)) for _ in range(500)]
        for number in range(500):
            disk.store.read(number * 4096, [memory[number]], ended.append)
        disk.until(lambda: len(ended) == 1000)
        assert [int.from_bytes(each[:4], "little") for each in memory] == list(range(500))


def test_a_server_that_can_do_little(tmp_path: Path, poller: Poller) -> None:
    image = tmp_path / "disk.raw"
    image.write_bytes(bytes(16 * MIB))
    flushed = tmp_path / "flushed"
    little = (
        "get_size=echo 16777216",
        f"pread=dd if={image} iflag=skip_bytes,count_bytes skip=$4 count=$3",
        f"pwrite=dd of={image} conv=notrunc oflag=seek_bytes seek=$4",
        f"flush=echo >>{flushed}",
        "can_fua=echo none",
    )
    with (
        nbdkit(tmp_path, "--filter=nozero", "--filter=noextents", "eval", *little) as server,
        Disk(NbdStore(server.uri), poller) as disk,
    ):
        assert disk.write(0, b"n" * (3 * MIB), fua=True) == 0
        assert flushed.read_text() == "\n", "it knows no FUA: a flush has to do"
        assert disk.zero(512, 2 * MIB) == 0
        assert disk.read(0, 3 * MIB) == b"n" * 512 + bytes(2 * MIB) + b"n" * (MIB - 512)
        assert not disk.store.can_unmap
        assert disk.extents(0, 16 * MIB) == [(0, 16 * MIB, ExtentState.MAPPED)]


def test_a_server_that_takes_no_writes(tmp_path: Path, poller: Poller) -> None:
    with (
        nbdkit(tmp_path, "--readonly", "memory", "16M") as server,
        Disk(NbdStore(server.uri), poller) as disk,
    ):
        assert disk.store.read_only
        assert disk.write(0, bytes(512)) == errno.EROFS
        assert disk.discard(0, 512) == errno.EROFS
        assert disk.read(0, 512) == bytes(512)


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC])
def test_the_servers_errors(tmp_path: Path, poller: Poller, number: int) -> None:
    name = errno.errorcode[number]
    switch = tmp_path / "fail"
    arguments = (
        "--filter=error",
        "memory",
        "16M",
        f"error={name}",
        "error-rate=100%",
        f"error-file={switch}",
    )
    with nbdkit(tmp_path, *arguments) as server, Disk(NbdStore(server.uri), poller) as disk:
        assert disk.write(0, b"e" * 512) == 0
        switch.touch()
        assert disk.write(0, b"E" * 512) == number
        assert disk.call(lambda done: disk.store.read(0, [memoryview(bytearray(512))], done)) == number
        switch.unlink()
        assert disk.read(0, 512) == b"e" * 512
        assert disk.states == [True]


def test_blocks_of_a_server_that_are_larger_than_ours(tmp_path: Path, poller: Poller) -> None:
    sizes = ("blocksize-minimum=4096", "blocksize-preferred=4096", "blocksize-maximum=1M")
    with nbdkit(
        tmp_path, "--filter=blocksize-policy", "memory", "16M", *sizes, "blocksize-error-policy=error"
    ) as server:
        store = NbdStore(server.uri)
        disk = Disk(store, poller)
        disk.until(lambda: "block=4096" in store.trouble)
        assert disk.call(lambda done: store.read(0, [memoryview(bytearray(512))], done)) == errno.ENODEV
        store.close()
        with Disk(NbdStore(server.uri, block_size=4096), poller) as disk:
            data = os.urandom(5 * MIB)
            # No cut is where a block ends: nothing of it could be sent as it lies there.
            assert disk.write(4096, data, cuts=[512, 4097, 3 * MIB + 1]) == 0
            assert disk.read(4096, len(data), cuts=[511, 2 * MIB + 7]) == data
            assert disk.read(4096, len(data)) == data


def test_a_server_that_is_killed_and_started_again(tmp_path: Path, poller: Poller) -> None:
    image = tmp_path / "disk.raw"
    image.write_bytes(bytes(16 * MIB))
    with nbdkit(tmp_path, "file", str(image)) as server, Disk(NbdStore(server.uri), poller) as disk:
        assert disk.write(0, b"1" * 512) == 0
        server.kill()
        ended: list[int] = []
        for number in range(10):
            disk.store.write(number * MIB, [memoryview(b"2" * 4096)], ended.append)
        disk.store.flush(ended.append)
        server.start()
        disk.until(lambda: len(ended) == 11)
        assert ended == [0] * 11
        assert disk.read(9 * MIB, 4096) == b"2" * 4096
        assert image.read_bytes()[9 * MIB : 9 * MIB + 4096] == b"2" * 4096
        assert disk.states == [True], "it was back before anybody's patience was over"


def test_requests_under_way_when_the_server_is_killed(tmp_path: Path, poller: Poller) -> None:
    image = tmp_path / "disk.raw"
    image.write_bytes(bytes(16 * MIB))
    slow = ("--filter=delay", "file", str(image), "wdelay=300ms")
    with nbdkit(tmp_path, *slow) as server, Disk(NbdStore(server.uri), poller) as disk:
        ended: list[int] = []
        for number in range(8):
            disk.store.write(number * 4096, [memoryview(b"u" * 4096)], ended.append)
        # Something asked after them and answered before them: they are with the server.
        assert disk.read(0, 512) == bytes(512)
        assert ended == []
        server.kill()
        server.start()
        disk.until(lambda: len(ended) == 8)
        assert ended == [0] * 8
        assert disk.read(0, 8 * 4096) == b"u" * 8 * 4096


def test_a_server_that_stays_away(tmp_path: Path, poller: Poller) -> None:
    with nbdkit(tmp_path, "memory", "16M") as server, Disk(NbdStore(server.uri, timeout=1), poller) as disk:
        server.kill()
        assert disk.write(0, bytes(512)) == errno.ENODEV
        disk.until(lambda: disk.states == [True, False])
        assert not disk.store.online
        server.start()
        disk.until(lambda: disk.states == [True, False, True])
        assert disk.read(0, 512) == bytes(512)


def test_a_server_that_stalls(tmp_path: Path, poller: Poller) -> None:
    with nbdkit(tmp_path, "memory", "16M") as server, Disk(NbdStore(server.uri, timeout=2), poller) as disk:
        assert disk.write(0, b"S" * 512) == 0
        os.kill(server.pid, signal.SIGSTOP)
        os.waitid(os.P_PID, server.pid, os.WSTOPPED)  # all of its threads
        memory = memoryview(bytearray(512))
        assert disk.call(lambda done: disk.store.read(0, [memory], done)) == errno.ETIMEDOUT
        os.kill(server.pid, signal.SIGCONT)
        assert disk.write(0, b"s" * 512) == 0
        assert memory == bytes(512), (
            "an answer that came too late went to memory that is somebody else's by now"
        )


def test_closing_with_requests_under_way(tmp_path: Path, poller: Poller) -> None:
    with nbdkit(tmp_path, "--filter=delay", "memory", "16M", "rdelay=60") as server:
        with Disk(NbdStore(server.uri), poller) as disk:
            ended: list[int] = []
            for _ in range(3):
                disk.store.read(0, [memoryview(bytearray(512))], ended.append)
            disk.poller.run_once()
        disk.until(lambda: len(ended) == 3)
        assert ended == [errno.ECANCELED] * 3
        assert disk.flush() == errno.ECANCELED


def test_an_export_that_is_larger_after_a_restart(tmp_path: Path, poller: Poller) -> None:
    image = tmp_path / "disk.raw"
    image.write_bytes(bytes(MIB))
    with nbdkit(tmp_path, "file", str(image)) as server, Disk(NbdStore(server.uri), poller) as disk:
        server.kill()
        os.truncate(image, 2 * MIB)
        server.start()
        disk.until(lambda: disk.sizes == [MIB, 2 * MIB])
        assert disk.write(2 * MIB - 512, b"g" * 512) == 0


def test_one_that_answers_nonsense_or_nothing(tmp_path: Path, poller: Poller) -> None:
    path = str(tmp_path / "nonsense.sock")
    with contextlib.closing(socket.socket(socket.AF_UNIX)) as listener:
        listener.bind(path)
        listener.listen()
        listener.setblocking(False)
        store = NbdStore(f"nbd+unix:///?socket={path}", timeout=1)
        disk = Disk(store, poller)
        clients: list[socket.socket] = []

        def accept(_mask: int) -> None:
            client, _ = listener.accept()
            if len(clients) % 2 == 0:
                client.send(b"HTTP/1.1 400 Bad Request\r\n\r\n")
            clients.append(client)

        poller.register(listener.fileno(), 1, accept)
        disk.until(lambda: len(clients) >= 2)
        disk.until(lambda: len(clients) >= 3)
        assert not store.online
        assert store.trouble
        store.close()
        poller.unregister(listener.fileno())
        for client in clients:
            client.close()


def test_tls_with_a_shared_key(tmp_path: Path, poller: Poller) -> None:
    keys = tmp_path / "keys.psk"
    keys.write_text("alice:" + os.urandom(32).hex() + "\n")
    arguments = ("--tls=require", f"--tls-psk={keys}", "memory", "16M")
    with nbdkit(tmp_path, *arguments) as server:
        path = server.socket
        with Disk(NbdStore(f"nbds+unix://alice@/?socket={path}&tls-psk-file={keys}"), poller) as disk:
            data = os.urandom(3 * MIB)
            assert disk.write(MIB, data) == 0
            assert disk.flush() == 0
            assert disk.read(MIB, 3 * MIB, cuts=[MIB]) == data
            server.kill()
            server.start()
            assert disk.read(0, 512) == bytes(512)
        plain = NbdStore(server.uri)
        without = Disk(plain, poller)
        without.until(lambda: plain.trouble not in ("", "connecting"))
        assert not plain.online
        plain.close()


def test_a_uri_that_means_nothing(poller: Poller) -> None:
    store = NbdStore("nbd+unix:///?sockte=/nowhere")
    disk = Disk(store, poller)
    disk.until(lambda: store.trouble not in ("", "connecting"))
    assert not store.online
    store.close()
    assert disk.flush() == errno.ECANCELED


def test_by_tcp_on_the_loopback(tmp_path: Path, poller: Poller) -> None:
    program = need_program("nbdkit")
    with socket.create_server(("127.0.0.1", 0)) as listener:
        # The socket is handed over open (systemd's way): the port is known, and is there before the server is.
        listener.set_inheritable(True)
        port = listener.getsockname()[1]
        hand_over = (
            "import os, sys; os.dup2(int(sys.argv[1]), 3);"
            "os.environ.update(LISTEN_FDS='1', LISTEN_PID=str(os.getpid())); os.execv(sys.argv[2], sys.argv[2:])"
        )
        command = [sys.executable, "-c", hand_over, str(listener.fileno()), program]
        server = subprocess.Popen([*command, "--foreground", "memory", "16M"], pass_fds=[listener.fileno()])
        try:
            with Disk(NbdStore(f"nbd://localhost:{port}/"), poller) as disk:
                assert disk.write(0, b"t" * MIB) == 0
                assert disk.read(0, MIB) == b"t" * MIB
        finally:
            server.kill()
            server.wait()
