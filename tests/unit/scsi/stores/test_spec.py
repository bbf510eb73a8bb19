"""What --lun takes, and what it says to what it doesn't."""

from __future__ import annotations

import errno

import pytest

from pyvhost.scsi.stores.base import Store
from pyvhost.scsi.stores.file import FileStore
from pyvhost.scsi.stores.memory import MemoryStore
from pyvhost.scsi.stores.nbd import NbdStore
from pyvhost.scsi.stores.spec import SpecError, parse, parse_size
from pyvhost.scsi.stores.wrappers import Delay, ErrorRate, Limit, Wrapper, innermost


def chain(store: Store) -> list[type[Store]]:
    found: list[type[Store]] = []
    while isinstance(store, Wrapper):
        found.append(type(store))
        store = store.inner
    return [*found, type(store)]


@pytest.mark.parametrize(
    ("text", "path"),
    [
        ("/var/lib/disk.img", "/var/lib/disk.img"),
        ("disk.img,readonly", "disk.img"),
        ("./a:b", "./a:b"),
        ("file:a:b", "a:b"),
        ("/a,,b,shared", "/a,b"),
    ],
)
def test_paths(text: str, path: str) -> None:
    store = parse(text)
    assert isinstance(store, FileStore)
    assert store.path == path
    assert store.spec == text
    assert store.read_only == ("readonly" in text)


def test_other_kinds() -> None:
    memory = parse("memory:64M,serial=disk 1,block=4096,aptpl=/var/lib/a,,b")
    assert isinstance(memory, MemoryStore)
    assert (memory.serial, memory.block_size, memory.aptpl) == ("disk 1", 4096, "/var/lib/a,b")
    wrapped = parse("disk.img,aptpl=kept,delay=1,physical=4096")
    assert (wrapped.aptpl, wrapped.physical_block_size) == ("kept", 4096)
    for text in ("nbd:nbd://localhost/x,timeout=2.5", "nbd://localhost/x,tls=require"):
        nbd = parse(text)
        assert isinstance(nbd, NbdStore)
        assert nbd.uri == "nbd://localhost/x"
        assert not nbd.online
    unix = parse("nbd+unix:///export?socket=/run/a,,b")
    assert isinstance(unix, NbdStore)
    assert unix.uri == "nbd+unix:///export?socket=/run/a,b"


def test_wrappers_are_stacked_as_they_are_written() -> None:
    store = parse("memory:1M,delay=5,serial=s,limit=20M/s,error-rate=0.5:ENOSPC,limit=100iops,readonly")
    assert chain(store) == [Limit, ErrorRate, Limit, Delay, MemoryStore]
    assert store.serial == "s"
    assert innermost(store).read_only
    assert isinstance(store, Limit)
    assert store.operations == 100
    failing = store.inner
    assert isinstance(failing, ErrorRate)
    assert (failing.rate, failing.number) == (0.5, errno.ENOSPC)
    slow = failing.inner
    assert isinstance(slow, Limit)
    assert slow.data == 20 << 20
    assert isinstance(slow.inner, Delay)
    assert slow.inner.seconds == 0.005


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "PATH, memory:SIZE and nbd:URI"),
        ("memroy:1M", "did you mean 'memory'"),
        ("memory:", "after its colon"),
        ("memory:1X", "512M or 10G"),
        ("memory:100", "blocks of 512"),
        ("memory:1M,shared", "it has: readonly"),
        ("/x,readonyl", "did you mean 'readonly'"),
        ("/x,", "two commas"),
        ("/x,block=1024", "512 or 4096"),
        ("/x,readonly=maybe", "on or off"),
        ("/x,shared,shared", "twice"),
        ("/x,serial=", "needs a value"),
        ("/x,serial=\n", "printable"),
        ("/x,delay", "needs a value"),
        ("/x,delay=-1", "a number"),
        ("/x,error-rate=2", "from 0 to 1"),
        ("/x,error-rate=1:EHUH", "EIO, ENOSPC"),
        ("/x,limit=10", "500iops or 20M/s"),
        ("/x,limit=0iops", "nothing would"),
        ("nbd:/run/socket", "begins with nbd://"),
        ("nbd://h/,tls=yes", "off, allow, require"),
        ("nbd://h/,timeout=0", "more than 0"),
    ],
)
def test_what_is_wrong_is_explained(text: str, says: str) -> None:
    with pytest.raises(SpecError) as refused:
        parse(text)
    assert says in str(refused.value)


def test_sizes() -> None:
    sizes = {"512": 512, "4k": 4096, "512M": 512 << 20, "10G": 10 << 30, "1.5T": 3 << 39, "2GiB": 2 << 30}
    assert {text: parse_size(text) for text in sizes} == sizes
    for wrong in ("", "-1", "M", "1.M", "1e3", "0.3", "1iB", "10 G", "9" * 30):
        with pytest.raises(ValueError, match=r"wanted|whole"):
            parse_size(wrong)
