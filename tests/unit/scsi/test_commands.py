"""Commands, as an initiator sees them: what comes back, what the store was asked for, what the residual is."""

from __future__ import annotations

import errno
from collections.abc import Iterator

import pytest

from pyvhost.scsi.sense import Asc, Key
from pyvhost.scsi.target import REPORT_LUNS_WLUN
from pyvhost.scsi.task import Status
from pyvhost.scsi.unit import Fast, LogicalUnit
from scsi_scene import RamStore, Scene, data, told


@pytest.fixture
def scene() -> Iterator[Scene]:
    made = Scene()
    yield made
    made.close()


def pages(scene: Scene) -> bytes:
    return data(scene.do("12 01 00 00ff 00"))[4:]


def test_inquiry(scene: Scene) -> None:
    standard = data(scene.do("12 00 00 00ff 00"))
    assert standard[0] == 0
    assert standard[4] == len(standard) - 5
    assert standard[8:16] == b"PYVHOST "
    assert list(pages(scene)) == [0x00, 0x80, 0x83, 0x86, 0x87, 0x8F, 0xB0, 0xB1, 0xB2]
    for page in pages(scene):
        content = data(scene.do(bytes([0x12, 1, page, 0x10, 0, 0])))
        assert content[1] == page
        assert int.from_bytes(content[2:4], "big") == len(content) - 4
    assert told(scene.do("12 01 99 00ff 00")) == (Key.ILLEGAL_REQUEST, Asc.INVALID_FIELD_IN_CDB)
    assert told(scene.do("12 00 80 00ff 00")) == (Key.ILLEGAL_REQUEST, Asc.INVALID_FIELD_IN_CDB)


def test_scsi_2_has_the_lun_in_the_cdb(scene: Scene) -> None:
    """Linux' first INQUIRY to a target has it, whatever the target is."""
    assert data(scene.do("12 a0 00 0024 00"))[8:16] == b"PYVHOST "
    assert told(scene.do("12 02 00 0024 00")) == (Key.ILLEGAL_REQUEST, Asc.INVALID_FIELD_IN_CDB)


def test_allocation_length_is_no_overflow(scene: Scene) -> None:
    task = scene.do("12 00 00 0010 00", into=64)
    assert task.transferred_in == 16
    assert (task.residual, task.overflow) == (48, False)
    task = scene.do("12 00 00 0040 00", into=20)
    assert (task.residual, task.overflow) == (44, True)


def test_a_bit_without_meaning_is_pointed_at(scene: Scene) -> None:
    task = scene.do("28 00 00000000 00 0001 80")
    assert told(task) == (Key.ILLEGAL_REQUEST, Asc.INVALID_FIELD_IN_CDB)
    assert task.sense[15:18].hex() == "cf0009"


def test_read_and_write(scene: Scene) -> None:
    scene.do("2a 00 00000005 00 0002 00", out=b"a" * 1024)
    assert scene.store.data[5 * 512 : 7 * 512] == b"a" * 1024
    assert data(scene.do("88 00 0000000000000006 00000001 00 00", into=512)) == b"a" * 512
    assert scene.do("28 00 00000040 00 0000 00").status is Status.GOOD
    beyond = scene.do("28 00 0000003f 00 0002 00")
    assert told(beyond) == (Key.ILLEGAL_REQUEST, Asc.LOGICAL_BLOCK_ADDRESS_OUT_OF_RANGE)


def test_fua_and_flush(scene: Scene) -> None:
    scene.do("2a 08 00000000 00 0001 00", out=bytes(512))
    scene.do("35 00 00000000 00 0000 00")
    assert scene.store.log == ["write fua", "flush"]


def test_without_wce_every_write_is_safe(scene: Scene) -> None:
    caching = "08 12" + "00" * 18
    assert scene.do("15 10 0000 18 00", out=bytes.fromhex("00000000" + caching)).status is Status.GOOD
    assert scene.unit.write_through
    scene.do("2a 00 00000000 00 0001 00", out=bytes(512))
    assert scene.store.log == ["flush", "write fua"]


def test_buffers_that_are_too_short(scene: Scene) -> None:
    scene.store.data[:1024] = b"x" * 1024
    task = scene.do("28 00 00000000 00 0002 00", into=700)
    assert (data(task), task.residual, task.overflow) == (b"x" * 700, 324, True)
    task = scene.do("2a 00 00000000 00 0002 00", out=b"y" * 700)
    assert (task.residual, task.overflow) == (324, True)
    assert scene.store.data[:1024] == b"y" * 700 + b"x" * 324


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (errno.EIO, (Key.MEDIUM_ERROR, Asc.WRITE_ERROR)),
        (errno.ENOSPC, (Key.DATA_PROTECT, Asc.SPACE_ALLOCATION_FAILED_WRITE_PROTECT)),
        (errno.ENODEV, (Key.NOT_READY, Asc.NOT_READY_CAUSE_NOT_REPORTABLE)),
    ],
)
def test_a_store_that_fails(scene: Scene, error: int, expected: tuple[int, int]) -> None:
    scene.store.failures["write"] = error
    assert told(scene.do("2a 00 00000003 00 0001 00", out=bytes(512))) == expected
    assert data(scene.do("28 00 00000003 00 0001 00")) == bytes(512)


def test_compare_and_write(scene: Scene) -> None:
    scene.do("2a 00 00000000 00 0001 00", out=b"a" * 512)
    wrong = b"a" * 100 + b"b" * 412
    task = scene.do("89 00 0000000000000000 000000 01 00 00", out=wrong + b"c" * 512)
    assert told(task) == (Key.MISCOMPARE, Asc.MISCOMPARE_DURING_VERIFY_OPERATION)
    assert task.sense[3:7] == (100).to_bytes(4, "big")
    scene.do("89 00 0000000000000000 000000 01 00 00", out=b"a" * 512 + b"c" * 512)
    assert scene.store.data[:512] == b"c" * 512


@pytest.mark.parametrize(
    ("cdb", "asc"),
    [
        ("89 00 0000000000000000 000000 02 00 00", Asc.INVALID_FIELD_IN_COMMAND_INFORMATION_UNIT),
        ("41 00 00000000 00 0002 00", Asc.INVALID_FIELD_IN_COMMAND_INFORMATION_UNIT),
        ("42 00 00000000 00 0200 00", Asc.PARAMETER_LIST_LENGTH_ERROR),
        ("55 10 0000000000 0200 00", Asc.PARAMETER_LIST_LENGTH_ERROR),
        ("5f 06 00 0000 00000200 00", Asc.PARAMETER_LIST_LENGTH_ERROR),
    ],
)
def test_a_command_that_is_refused_for_its_data_moves_nothing(scene: Scene, cdb: str, asc: Asc) -> None:
    """Sense data say so, and no overflow: a driver would take that for a transport's failure, and try again."""
    task = scene.do(cdb, out=bytes(100))
    assert told(task) == (Key.ILLEGAL_REQUEST, asc)
    assert (task.residual, task.overflow) == (100, False)


def test_nothing_comes_between_compare_and_write(scene: Scene) -> None:
    swap = "89 00 0000000000000000 000000 01 00 00"
    first = scene.begin(swap, out=bytes(512) + b"a" * 512)
    second = scene.begin(swap, out=bytes(512) + b"b" * 512)
    write = scene.begin("2a 00 00000000 00 0001 00", out=b"c" * 512)
    assert scene.unit.fast(scene.nexus) is Fast.NONE
    scene.store.settle()
    assert first.status is Status.GOOD
    assert told(second)[0] == Key.MISCOMPARE
    assert write.status is Status.GOOD
    assert scene.store.data[:512] == b"c" * 512
    assert scene.unit.fast(scene.nexus) == Fast.READ | Fast.WRITE


def test_unmap_and_lba_status(scene: Scene) -> None:
    scene.do("2a 00 00000000 00 0040 00", out=b"a" * 64 * 512)
    descriptor = (8).to_bytes(8, "big") + (4).to_bytes(4, "big") + bytes(4)
    scene.do("42 00 00000000 00 0018 00", out=bytes.fromhex("0016 0010 00000000") + descriptor)
    assert scene.store.data[8 * 512 : 12 * 512] == bytes(4 * 512)
    status = data(scene.do("9e 12 0000000000000006 00000400 00 00"))
    extents = [status[at : at + 13] for at in range(8, len(status), 16)]
    found = [(int.from_bytes(e[:8], "big"), int.from_bytes(e[8:12], "big"), e[12]) for e in extents]
    assert found == [(6, 2, 0), (8, 4, 1), (12, 52, 0)]


def test_write_same(scene: Scene) -> None:
    scene.do("41 00 00000002 00 0003 00", out=b"z" * 512)
    assert scene.store.data[1024 : 1024 + 1536] == b"z" * 1536
    scene.do("93 09 0000000000000002 00000003 00 00")  # UNMAP and NDOB
    assert scene.store.log[-1] == "zero unmap"
    assert not any(scene.store.data)


def test_a_thick_store_has_no_unmap() -> None:
    scene = Scene(RamStore(thin=False))
    assert told(scene.do("42 00 00000000 00 0000 00")) == (
        Key.ILLEGAL_REQUEST,
        Asc.INVALID_COMMAND_OPERATION_CODE,
    )
    assert data(scene.do("9e 10 0000000000000000 00000020 00 00"))[14] == 0
    supported = data(scene.do("a3 0c 03 42 0000 00001000 00 00"))
    assert supported[1] & 7 == 1
    scene.close()


def test_write_protection(scene: Scene) -> None:
    control = data(scene.do("1a 08 0a 00 ff 00"))
    control = bytes([0, *control[1:]])
    protected = bytearray(control)
    protected[4 + 4] |= 0x08
    scene.do(bytes([0x15, 0x10, 0, 0, len(protected), 0]), out=bytes(protected[:2]) + b"\0\0" + protected[4:])
    task = scene.do("2a 00 00000000 00 0001 00", out=bytes(512))
    assert told(task) == (Key.DATA_PROTECT, Asc.LOGICAL_UNIT_SOFTWARE_WRITE_PROTECTED)
    assert scene.unit.fast(scene.nexus) == Fast.READ


def test_mode_pages_tell_what_can_be_changed(scene: Scene) -> None:
    everything = data(scene.do("5a 08 3f ff 000000 0400 00"))
    assert int.from_bytes(everything[:2], "big") == len(everything) - 2
    assert told(scene.do("1a 00 c8 00 ff 00")) == (Key.ILLEGAL_REQUEST, Asc.SAVING_PARAMETERS_NOT_SUPPORTED)
    bad = bytes.fromhex(
        "00000000" + "0a0a" + "02" + "00" + "00" * 8
    )  # QUEUE ALGORITHM MODIFIER isn't changeable
    assert told(scene.do("15 10 0000 10 00", out=bad)) == (
        Key.ILLEGAL_REQUEST,
        Asc.INVALID_FIELD_IN_PARAMETER_LIST,
    )


def test_descriptor_sense(scene: Scene) -> None:
    page = bytearray(data(scene.do("1a 08 0a 00 ff 00"))[4:])
    page[2] |= 0x04
    scene.do("15 10 0000 10 00", out=bytes(4) + page)
    task = scene.do("28 00 ffffffff 00 0001 00")
    assert task.sense[0] == 0x72
    assert told(task) == (Key.ILLEGAL_REQUEST, Asc.LOGICAL_BLOCK_ADDRESS_OUT_OF_RANGE)


def test_others_hear_of_changed_mode_parameters(scene: Scene) -> None:
    other = scene.initiator("other")
    scene.do("15 10 0000 18 00", out=bytes.fromhex("00000000 0812" + "00" * 18))
    assert told(scene.do("00 00000000 00", nexus=other)) == (Key.UNIT_ATTENTION, Asc.MODE_PARAMETERS_CHANGED)
    assert scene.do("00 00000000 00", nexus=other).status is Status.GOOD
    assert scene.do("00 00000000 00").status is Status.GOOD


def test_a_new_size_is_told(scene: Scene) -> None:
    assert scene.store.on_resize is not None
    scene.store.on_resize(32 * 512)
    assert scene.unit.fast(scene.nexus) is Fast.NONE
    assert told(scene.do("00 00000000 00")) == (Key.UNIT_ATTENTION, Asc.CAPACITY_DATA_HAS_CHANGED)
    assert data(scene.do("25 00 00000000 0000 00 00"))[:4] == (31).to_bytes(4, "big")


def test_what_was_begun_when_a_store_went_away(scene: Scene) -> None:
    scene.store.failures["read"] = errno.ENODEV
    task = scene.begin("28 00 00000000 00 0001 00", into=512)
    assert scene.store.on_state is not None
    scene.store.on_state(False)
    scene.store.settle()
    assert told(task) == (Key.NOT_READY, Asc.NOT_READY_BECOMING_READY)


@pytest.mark.parametrize(("block", "physical", "says"), [(512, 0, 1), (512, 4096, 8), (4096, 0, 1)])
def test_what_a_guest_aligns_to_is_said_the_same_everywhere(block: int, physical: int, says: int) -> None:
    store = RamStore()
    store.block_size, store.physical_block_size, store.unmap_granularity = block, physical, 512
    scene = Scene(store)
    limits = data(scene.do("12 01 b0 0040 00"))
    assert int.from_bytes(limits[6:8]) == says, "OPTIMAL TRANSFER LENGTH GRANULARITY"
    assert int.from_bytes(limits[28:32]) == says, "OPTIMAL UNMAP GRANULARITY"
    capacity = data(scene.do("9e 10 0000000000000000 00000020 00 00"))
    assert 1 << (capacity[13] & 0xF) == says, "LOGICAL BLOCKS PER PHYSICAL BLOCK EXPONENT"
    scene.close()


def test_a_store_that_goes_and_comes_back(scene: Scene) -> None:
    assert scene.store.on_state is not None
    scene.store.on_state(False)
    # Linux goes on trying for a while when it hears this, and gives up at once for other reasons.
    assert told(scene.do("00 00000000 00")) == (Key.NOT_READY, Asc.NOT_READY_BECOMING_READY)
    scene.store.on_state(True)
    assert told(scene.do("00 00000000 00")) == (Key.UNIT_ATTENTION, Asc.NOT_READY_TO_READY_CHANGE)
    assert scene.do("00 00000000 00").status is Status.GOOD


def test_report_luns_and_the_luns_that_are_not_there(scene: Scene) -> None:
    unit = LogicalUnit(RamStore())
    unit.open(scene.poller)
    scene.target.add(300, unit)
    assert told(scene.do("00 00000000 00")) == (Key.UNIT_ATTENTION, Asc.REPORTED_LUNS_DATA_HAS_CHANGED)
    luns = data(scene.do("a0 00 00 000000 00001000 00 00"))
    assert luns.hex() == "0000001000000000" + "0000000000000000" + "412c000000000000"
    wlun = data(scene.do("a0 00 02 000000 00001000 00 00", lun=REPORT_LUNS_WLUN))
    assert wlun[-8:].hex() == "c101000000000000"
    assert data(scene.do("12 00 00 00ff 00", lun=7))[0] == 0x7F
    assert told(scene.do("00 00000000 00", lun=7)) == (Key.ILLEGAL_REQUEST, Asc.LOGICAL_UNIT_NOT_SUPPORTED)


def test_every_supported_command_tells_of_its_cdb(scene: Scene) -> None:
    listed = data(scene.do("a3 0c 00 00 0000 00004000 00 00", into=16384))
    count = 0
    for at in range(4, len(listed), 8):
        opcode, action, has_action = listed[at], listed[at + 2 : at + 4], listed[at + 5] & 1
        option = 2 if has_action else 1
        one = data(scene.do(bytes([0xA3, 0x0C, option, opcode, *action, 0, 0, 1, 0, 0, 0])))
        assert one[1] & 7 == 3
        assert one[4] == opcode
        assert len(one) == 4 + int.from_bytes(listed[at + 6 : at + 8], "big")
        count += 1
    assert count > 60


def test_copy_between_units(scene: Scene) -> None:
    store = RamStore()
    unit = LogicalUnit(store, serial="S2")
    unit.open(scene.poller)
    scene.target.add(1, unit)
    scene.do("00 00000000 00")
    scene.store.data[512:1024] = b"q" * 512
    targets = b"".join(
        bytes.fromhex("e4000000 01030008")
        + one.name.to_bytes(8, "big")
        + bytes(12)
        + bytes.fromhex("00000200")
        for one in (scene.unit, unit)
    )
    segment = bytes.fromhex("02000018 0000 0001 0000 0001") + (1).to_bytes(8, "big") + (3).to_bytes(8, "big")
    header = bytes.fromhex("01 00 0040 00000000 0000001c 00000000")
    task = scene.begin(
        bytes.fromhex("8300 0000000000000000") + (108).to_bytes(4, "big") + bytes(2),
        out=header + targets + segment,
    )
    while not task.ended:
        scene.store.settle()
        store.settle()
    assert task.status is Status.GOOD
    assert store.data[3 * 512 : 4 * 512] == b"q" * 512
    status = data(scene.do("84 00 01 00000000000000 00000100 00 00"))
    assert status[4:7] == bytes([1, 0, 1])


def copy_list(scene: Scene, blocks: int) -> bytes:
    """A parameter list with list identifier 7: blocks from 0 on, to 32 on."""
    target = bytes.fromhex("e4000000 01030008") + scene.unit.name.to_bytes(8, "big") + bytes(12)
    segment = bytes.fromhex("02000018 0000 0000 0000") + blocks.to_bytes(2, "big")
    segment += (0).to_bytes(8, "big") + (32).to_bytes(8, "big")
    return (
        bytes.fromhex("07 00 0020 00000000 0000001c 00000000") + target + bytes.fromhex("00000200") + segment
    )


def test_a_copy_that_goes_on(scene: Scene) -> None:
    """Its status can be asked for, and its list identifier is taken."""
    cdb = bytes.fromhex("8300 0000000000000000") + (76).to_bytes(4, "big") + bytes(2)
    status = "84 00 07 00000000000000 00000100 00 00"
    task = scene.begin(cdb, out=copy_list(scene, 4))
    scene.store.step()
    assert not task.ended
    going = scene.begin(status, into=64)
    assert data(going)[4] == 0
    for identifier in range(8, 8 + 20):
        scene.begin(cdb, out=bytes([identifier]) + copy_list(scene, 4)[1:])
    again = scene.begin(cdb, out=copy_list(scene, 4))
    assert told(again) == (Key.ILLEGAL_REQUEST, Asc.OPERATION_IN_PROGRESS), "however many came after it"
    scene.store.settle()
    assert task.status is Status.GOOD
    assert data(scene.do(status))[4:7] == bytes([1, 0, 1])
    assert told(scene.do(status)) == (Key.ILLEGAL_REQUEST, Asc.INVALID_FIELD_IN_CDB), "it is told once"
    assert scene.do(cdb, out=copy_list(scene, 4)).status is Status.GOOD


def test_what_a_copy_may_ask_for_is_said_twice_the_same(scene: Scene) -> None:
    page = data(scene.do("12 01 8f 1000 00"))[4:]
    descriptors = {}
    while page:
        size = 4 + int.from_bytes(page[2:4], "big")
        assert size % 4 == 0
        descriptors[int.from_bytes(page[:2], "big")], page = page[4:size], page[size:]
    assert sorted(descriptors) == [0x0001, 0x0004, 0x0008, 0x8001], "those that are mandatory"
    parameters = data(scene.do("84 03 00 00000000000000 00000100 00 00"))
    # CSCD descriptors, segments, bytes of descriptors; the longest segment; which descriptors; the granularity.
    assert descriptors[0x0004][4:12] == parameters[8:16]
    assert descriptors[0x8001][8:12] == parameters[16:20]
    assert descriptors[0x0008][: 1 + parameters[43]] == parameters[43:]
    assert descriptors[0x8001][12] == parameters[37]


def test_who_has_asked_for_the_luns_knows_them(scene: Scene) -> None:
    """Also of the well known unit, or of one that is not there, as a driver does that finds no LUN 0."""
    for number, asked in ((1, REPORT_LUNS_WLUN), (2, 9)):
        unit = LogicalUnit(RamStore())
        unit.open(scene.poller)
        scene.target.add(number, unit)
        data(scene.do("a0 00 00 000000 00001000 00 00", lun=asked))
        assert scene.do("00 00000000 00").status is Status.GOOD


def test_log_parameters_that_are_not_there(scene: Scene) -> None:
    assert data(scene.do("4d 00 2f 00 00 0000 00ff 00"))[0] == 0x2F
    assert told(scene.do("4d 00 2f 00 00 0001 00ff 00")) == (Key.ILLEGAL_REQUEST, Asc.INVALID_FIELD_IN_CDB)


def test_without_wce_unmapped_blocks_stay_so(scene: Scene) -> None:
    unmap = bytes.fromhex("0016 0010 00000000") + (4).to_bytes(8, "big") + bytes.fromhex("00000002 00000000")
    scene.do("42 00 00000000 00 0018 00", out=unmap)
    assert scene.store.log == ["discard"]
    scene.store.log.clear()
    select = bytes.fromhex("00000000 08 12") + bytes(18)
    assert scene.do("15 10 00 00 18 00", out=select).status is Status.GOOD
    scene.store.log.clear()
    scene.do("42 00 00000000 00 0018 00", out=unmap)
    assert scene.store.log == ["discard", "flush"]


def test_eject() -> None:
    scene = Scene(removable=True)
    scene.do("1e 000000 01 00")
    assert told(scene.do("1b 000000 02 00"))[1] == Asc.MEDIUM_REMOVAL_PREVENTED
    scene.do("1e 000000 00 00")
    assert scene.do("1b 000000 02 00").status is Status.GOOD
    assert told(scene.do("00 00000000 00")) == (Key.NOT_READY, Asc.MEDIUM_NOT_PRESENT)
    assert scene.do("1b 000000 03 00").status is Status.GOOD
    assert scene.do("00 00000000 00").status is Status.GOOD
    scene.close()
