"""Mode pages: their default, current and changeable values (SPC-4, 7.5; SBC-3, 6.5).

Promises: a current value only ever differs from the default one in changeable bits. Saved values are not kept:
PS is 0 everywhere and SP is refused. Never: knows MODE SENSE's or MODE SELECT's CDB.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

RECOVERY = (0x01, 0)
CACHING = (0x08, 0)
CONTROL = (0x0A, 0)
CONTROL_EXTENSION = (0x0A, 1)
INFORMATIONAL_EXCEPTIONS = (0x1C, 0)

ALL_PAGES = 0x3F
ALL_SUBPAGES = 0xFF

#: Page control field (SPC-4, table 142).
CURRENT, CHANGEABLE, DEFAULT, SAVED = range(4)


@dataclass(frozen=True, slots=True)
class _Page:
    default: bytes
    changeable: bytes


def _page(code: int, subcode: int, length: int, **bits: tuple[int, int, int]) -> _Page:
    """A page of `length` bytes in all; each of `bits` is (byte, default value, mask of what can be changed)."""
    default = bytearray(length)
    changeable = bytearray(length)
    if subcode:
        head = bytes([0x40 | code, subcode]) + (length - 4).to_bytes(2, "big")
    else:
        head = bytes([code, length - 2])
    default[: len(head)] = changeable[: len(head)] = head
    for byte, value, mask in bits.values():
        default[byte] |= value
        changeable[byte] |= mask
    return _Page(bytes(default), bytes(changeable))


def _pages(volatile_cache: bool) -> dict[tuple[int, int], _Page]:
    pages = [
        # AWRE and ARRE: what must be moved on the medium is the store's business, and it does that.
        _page(*RECOVERY, 12, awre_arre=(2, 0xC0, 0)),
        _page(*CACHING, 20, wce=(2, 0x04 if volatile_cache else 0, 0x04 if volatile_cache else 0)),
        _page(
            *CONTROL,
            12,
            # GLTSD: nothing is saved implicitly, there being no log parameter to save.
            gltsd=(2, 0x02, 0),
            d_sense=(2, 0, 0x04),
            # QUEUE ALGORITHM MODIFIER 1: SIMPLE tasks in any order.
            queue=(3, 0x10, 0),
            qerr=(3, 0, 0x06),
            swp=(4, 0, 0x08),
            tas=(5, 0, 0x40),
            # BUSY TIMEOUT PERIOD: no limit.
            busy_high=(8, 0xFF, 0),
            busy_low=(9, 0xFF, 0),
        ),
        _page(*CONTROL_EXTENSION, 32),
        _page(*INFORMATIONAL_EXCEPTIONS, 12, mrie=(3, 0, 0)),
    ]
    keys = [RECOVERY, CACHING, CONTROL, CONTROL_EXTENSION, INFORMATIONAL_EXCEPTIONS]
    return dict(zip(keys, pages, strict=True))


class ModePages:
    """The mode pages of one logical unit, shared by all nexuses. Keys are (page code, subpage code)."""

    def __init__(self, volatile_cache: bool) -> None:
        self._pages = _pages(volatile_cache)
        self._current = {key: bytearray(page.default) for key, page in self._pages.items()}
        #: Called when a current value has changed.
        self.on_change: Callable[[], object] = lambda: None

    def set_volatile_cache(self, there_is: bool) -> None:
        """The store turned out to have a volatile cache, or none."""
        self._pages = _pages(there_is)
        self._current[CACHING] = bytearray(self._pages[CACHING].default)

    def keys(self, code: int, subcode: int) -> list[tuple[int, int]]:
        """Which pages such a request means, in order; none: there is no such page."""
        found = [
            key
            for key in self._pages
            if (code in (ALL_PAGES, key[0])) and (subcode == ALL_SUBPAGES or subcode == key[1])
        ]
        return sorted(found)

    def value(self, key: tuple[int, int], control: int) -> bytes:
        """A page as MODE SENSE shows it."""
        page = self._pages[key]
        if control == CHANGEABLE:
            return page.changeable
        return bytes(self._current[key]) if control == CURRENT else page.default

    def mistake(self, key: tuple[int, int], value: bytes) -> tuple[int, int] | None:
        """The first byte and leftmost bit in which `value` asks for what can't be changed; None: it may be set."""
        page = self._pages[key]
        head = 4 if key[1] else 2
        for at in range(head, len(page.default)):
            wrong = (value[at] ^ self._current[key][at]) & ~page.changeable[at] & 0xFF
            if wrong:
                return at, wrong.bit_length() - 1
        if key == CONTROL and value[3] >> 1 & 3 == 2:
            return 3, 2  # QERR 10b is reserved
        return None

    def set(self, values: dict[tuple[int, int], bytes]) -> bool:
        """Set pages that are without a mistake; whether anything became different."""
        changed = False
        for key, value in values.items():
            head = 4 if key[1] else 2
            mine = self._current[key]
            if mine[head:] != value[head:]:
                mine[head:] = value[head:]
                changed = True
        if changed:
            self.on_change()
        return changed

    def length(self, key: tuple[int, int]) -> int:
        """Bytes of a page, its header included."""
        return len(self._pages[key].default)

    def reset(self) -> None:
        """Back to the default values."""
        self.set({key: page.default for key, page in self._pages.items()})

    @property
    def wce(self) -> bool:
        """Writes may stay in the volatile cache."""
        return bool(self._current[CACHING][2] & 0x04)

    @property
    def descriptor_sense(self) -> bool:
        """D_SENSE."""
        return bool(self._current[CONTROL][2] & 0x04)

    @property
    def qerr(self) -> int:
        """QERR."""
        return self._current[CONTROL][3] >> 1 & 3

    @property
    def software_write_protect(self) -> bool:
        """SWP."""
        return bool(self._current[CONTROL][4] & 0x08)

    @property
    def task_aborted_status(self) -> bool:
        """TAS."""
        return bool(self._current[CONTROL][5] & 0x40)
