"""INQUIRY with its vital product data, REPORT LUNS, REQUEST SENSE (SPC-4, 6.6, 6.33, 6.39, 7.8; SBC-3, 6.6)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from pyvhost.scsi.commands import compare, copy, provisioning
from pyvhost.scsi.commands.request import Request
from pyvhost.scsi.commands.table import command
from pyvhost.scsi.nexus import PROTOCOL_SAS, Nexus
from pyvhost.scsi.reservations import Access
from pyvhost.scsi.sense import NO_SENSE, Asc, Key, Sense, invalid_cdb

if TYPE_CHECKING:
    from pyvhost.scsi.unit import LogicalUnit

#: Direct access block device, as PERIPHERAL QUALIFIER 000b has it.
DIRECT_ACCESS = 0x00
#: No logical unit there, and none possible: PERIPHERAL QUALIFIER 011b, DEVICE TYPE 1Fh.
NOTHING_THERE = 0x7F
#: A well known logical unit.
WELL_KNOWN = 0x1E

#: SAM-5, SPC-4 and SBC-3, of no version in particular (SPC-4, 6.6.2).
_VERSION_DESCRIPTORS = bytes.fromhex("00a0 0460 04c0")

_CODE_BINARY, _CODE_ASCII, _CODE_UTF8 = 1, 2, 3
_OF_UNIT, _OF_PORT, _OF_TARGET = 0x00, 0x10, 0x20


def _text(text: str, size: int) -> bytes:
    return text.encode("ascii", "replace")[:size].ljust(size)


def standard_inquiry(
    device: int, vendor: str, product: str, *, removable: bool = False, copies: bool = False
) -> bytes:
    """Standard INQUIRY data, 74 bytes."""
    data = bytearray(58)
    data[0] = device
    data[1] = 0x80 if removable else 0
    data[2] = 0x06  # SPC-4
    data[3] = 0x32  # NORMACA, HISUP, RESPONSE DATA FORMAT 2
    data[5] = 0x08 if copies else 0  # 3PC
    data[7] = 0x02  # CMDQUE
    data[8:16] = _text(vendor, 8)
    data[16:32] = _text(product, 16)
    data[32:36] = b"1   "
    data += _VERSION_DESCRIPTORS
    data += bytes(74 - len(data))
    data[4] = len(data) - 5
    return bytes(data)


def inquiry_page(cdb: bytes) -> tuple[int | None, int]:
    """Which VPD page an INQUIRY asks for (None: none), and its allocation length. CheckCondition: it can't ask so."""
    evpd = cdb[1] & 1
    if not evpd and cdb[2]:
        raise invalid_cdb(2)
    return (cdb[2] if evpd else None), int.from_bytes(cdb[3:5], "big")


@command("INQUIRY", 0x12, "01ffffff", access=Access.FREE, before_attention=True)
async def inquiry(request: Request) -> None:
    """What the unit is."""
    page, allocation = inquiry_page(request.cdb)
    unit = request.unit
    if page is None:
        data = standard_inquiry(
            DIRECT_ACCESS, unit.vendor, unit.product, removable=unit.removable, copies=True
        )
        request.reply(data, allocation)
        return
    make = _PAGES.get(page)
    if make is None:
        raise invalid_cdb(2)
    request.reply(vital_page(DIRECT_ACCESS, page, make(unit)), allocation)


def vital_page(device: int, page: int, content: bytes) -> bytes:
    """A VPD page with its header."""
    return bytes([device, page]) + len(content).to_bytes(2, "big") + content


def _supported_pages(_unit: LogicalUnit) -> bytes:
    return bytes(sorted(_PAGES))


def _serial_number(unit: LogicalUnit) -> bytes:
    return unit.serial.encode("ascii", "replace")[:252]


def designator(kind: int, code: int, value: bytes, association: int = _OF_UNIT) -> bytes:
    """A designation descriptor; those of ports and targets name the protocol (PIV)."""
    of_port = association != _OF_UNIT
    first = (PROTOCOL_SAS << 4 if of_port else 0) | code
    return bytes([first, (0x80 if of_port else 0) | association | kind, 0, len(value)]) + value


def device_identification(unit: LogicalUnit) -> bytes:
    """The designators of VPD page 83h: of the unit, the target port and the target."""
    vendor_id = _text(unit.vendor, 8) + _text(unit.product, 16) + unit.serial.encode("ascii", "replace")[:200]
    data = designator(3, _CODE_BINARY, unit.name.to_bytes(8, "big"))
    data += designator(1, _CODE_ASCII, vendor_id)
    if unit.target is not None:
        wwn = unit.target.wwn
        data += designator(3, _CODE_BINARY, wwn.to_bytes(8, "big"), _OF_PORT)
        data += designator(4, _CODE_BINARY, (1).to_bytes(4, "big"), _OF_PORT)
        name = f"naa.{wwn:016X}".encode()
        data += designator(8, _CODE_UTF8, name + bytes(-len(name) % 4 or 4), _OF_TARGET)
    return data


def _extended_inquiry(_unit: LogicalUnit) -> bytes:
    data = bytearray(60)
    data[1] = 0x07  # HEADSUP, ORDSUP, SIMPSUP
    data[2] = 0x01  # V_SUP: there is a volatile cache, or may be
    return bytes(data)


def _mode_page_policy(_unit: LogicalUnit) -> bytes:
    return bytes([0x3F, 0xFF, 0x00, 0x00])  # all pages: shared


def _third_party_copy(unit: LogicalUnit) -> bytes:
    """What EXTENDED COPY(LID1) can do, in the descriptors that are mandatory with it (SPC-4, 7.8.17)."""
    commands = bytes([0x83, 1, 0x00]) + bytes([0x84, 3, 0x00, 0x03, 0x04])
    codes = bytes([copy.BLOCK_TO_BLOCK, copy.IDENTIFICATION])
    parameters = bytearray(28)
    parameters[4:6] = copy.MAX_TARGETS.to_bytes(2, "big")
    parameters[6:8] = copy.MAX_SEGMENTS.to_bytes(2, "big")
    parameters[8:12] = copy.MAX_DESCRIPTORS.to_bytes(4, "big")
    operations = bytearray(32)
    operations[0:4] = operations[4:8] = (1).to_bytes(
        4, "big"
    )  # TOTAL, and MAXIMUM IDENTIFIED CONCURRENT COPIES
    operations[8:12] = (copy.MAX_SEGMENT_BLOCKS * unit.block_size).to_bytes(4, "big")
    operations[12] = copy.GRANULARITY
    return b"".join(
        kind.to_bytes(2, "big") + len(content).to_bytes(2, "big") + content
        for kind, content in (
            (0x0001, _padded(bytes([len(commands)]) + commands)),
            (0x0004, bytes(parameters)),
            (0x0008, _padded(bytes([len(codes)]) + codes)),
            (0x8001, bytes(operations)),
        )
    )


def _padded(content: bytes) -> bytes:
    return content + bytes(-len(content) % 4)


def _block_limits(unit: LogicalUnit) -> bytes:
    data = bytearray(60)

    def put(at: int, size: int, value: int) -> None:
        # Offsets as SBC-3's table 204 counts them, with the page's header.
        data[at - 4 : at - 4 + size] = value.to_bytes(size, "big")

    put(5, 1, compare.MAX_COMPARE)
    put(4, 1, 0x01)  # WSNZ: WRITE SAME of no blocks doesn't mean all
    put(6, 2, unit.physical_block_size // unit.block_size)
    if provisioning.unmaps(unit):
        put(20, 4, provisioning.MAX_UNMAP)
        put(24, 4, provisioning.MAX_UNMAP_DESCRIPTORS)
        granularity = max(unit.store.unmap_granularity, unit.physical_block_size) // unit.block_size
        put(28, 4, granularity)
        put(32, 4, 0x80000000)  # UGAVALID, alignment 0
    put(36, 8, provisioning.MAX_WRITE_SAME)
    atomic = compare.atomic_blocks(unit)
    if atomic:
        put(8, 4, 0x7FFFFFFF)  # MAXIMUM TRANSFER LENGTH may not be below that of atomic ones
        put(44, 4, atomic)
    return bytes(data)


def _block_device_characteristics(unit: LogicalUnit) -> bytes:
    data = bytearray(60)
    data[0:2] = (7200 if unit.rotational else 1).to_bytes(2, "big")
    data[4] = 0x02  # FUAB: SYNCHRONIZE CACHE and FUA are told apart from writes as SBC-3 has it
    return bytes(data)


def _provisioning(unit: LogicalUnit) -> bytes:
    if not provisioning.unmaps(unit):
        return bytes(4)
    # LBPU, LBPWS, LBPWS10, LBPRZ 001b; thin provisioned.
    return bytes([0, 0xE4, 0x02, 0])


_PAGES: dict[int, Callable[[LogicalUnit], bytes]] = {
    0x00: _supported_pages,
    0x80: _serial_number,
    0x83: device_identification,
    0x86: _extended_inquiry,
    0x87: _mode_page_policy,
    0x8F: _third_party_copy,
    0xB0: _block_limits,
    0xB1: _block_device_characteristics,
    0xB2: _provisioning,
}


def lun_list(luns: list[int], allocation: int, select: int) -> bytes:
    """REPORT LUNS' parameter data (SPC-4, 6.33). CheckCondition: a wrong SELECT REPORT or allocation length."""
    if select > 2:
        raise invalid_cdb(2)
    if allocation < 16:
        raise invalid_cdb(6)
    entries = b""
    if select in (0x00, 0x02):
        entries = b"".join(_lun(lun) for lun in luns)
    if select in (0x01, 0x02):
        entries += bytes([0xC1, 0x01]) + bytes(6)
    return len(entries).to_bytes(4, "big") + bytes(4) + entries


def _lun(lun: int) -> bytes:
    """Peripheral device addressing up to 255, flat space addressing above (SAM-5, 4.7.7)."""
    return (lun if lun < 256 else 0x4000 | lun).to_bytes(2, "big") + bytes(6)


@command(
    "REPORT LUNS", 0xA0, "00" + "ff" + "000000" + "ffffffff" + "00", access=Access.FREE, before_attention=True
)
async def report_luns(request: Request) -> None:
    """Which logical units the target has."""
    target = request.target
    luns = [request.unit.lun] if target is None else target.numbers
    allocation = request.number(6, 4)
    request.reply(lun_list(luns, allocation, request.cdb[2]), allocation)
    forget_change([request.unit] if target is None else target.units, request.task.nexus)


def forget_change(units: Iterable[LogicalUnit], nexus: Nexus) -> None:
    """Who has been told which units there are need not hear from any that they have changed (SPC-4, 6.33)."""
    for unit in units:
        unit.attentions.clear(nexus, Asc.REPORTED_LUNS_DATA_HAS_CHANGED)
        unit.refresh()


@command("REQUEST SENSE", 0x03, "010000ff", access=Access.FREE, before_attention=True)
async def request_sense(request: Request) -> None:
    """A unit attention that waits, why the unit isn't ready, or nothing; in the format that is asked for (DESC)."""
    unit = request.unit
    sense = unit.attentions.take(request.task.nexus)
    if sense is not None:
        unit.refresh()
    else:
        sense = unit.not_ready() or NO_SENSE
    request.reply(sense.encode(request.bit(1, 0)), request.cdb[4])


LOGICAL_UNIT_NOT_SUPPORTED = Sense(Key.ILLEGAL_REQUEST, Asc.LOGICAL_UNIT_NOT_SUPPORTED)
