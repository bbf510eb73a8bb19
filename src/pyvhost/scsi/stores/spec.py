"""A store as --lun has it: `PATH[,OPTION...]`, `memory:SIZE[,OPTION...]`, `nbd:URI[,OPTION...]`.

Two commas stand for one. Options that wrap a store do so in the order in which they are written.

Promises: a spec that is wrong says so before anything is opened, with what would be right (SpecError).
Never: opens anything.
"""

from __future__ import annotations

import difflib
import errno
import re
from collections.abc import Callable, Iterable
from typing import Final, TypeVar

from pyvhost.scsi.stores.base import Store
from pyvhost.scsi.stores.file import FileStore
from pyvhost.scsi.stores.libnbd import TLS_MODES
from pyvhost.scsi.stores.memory import MemoryStore
from pyvhost.scsi.stores.nbd import TIMEOUT, NbdStore
from pyvhost.scsi.stores.wrappers import Delay, ErrorRate, Limit

T = TypeVar("T")

#: What libnbd takes as a URI.
_URI: Final = re.compile(r"nbds?(\+(unix|vsock|ssh))?://")
_SUFFIXES: Final = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40, "P": 1 << 50}
_ERRORS: Final = {name: getattr(errno, name) for name in ("EIO", "ENOSPC", "ENODEV", "EROFS", "ETIMEDOUT")}
_WRAPPERS: Final = ("delay", "error-rate", "limit")
_COMMON: Final = ("readonly", "serial", "block", "physical", "aptpl", *_WRAPPERS)
_OPTIONS: Final = {
    "file": (*_COMMON, "shared", "direct"),
    "memory": _COMMON,
    "nbd": (*_COMMON, "tls", "timeout"),
}


class SpecError(ValueError):
    """What was written can't be meant; the text says what can."""


def parse(text: str) -> Store:
    """The store that a spec means, not open yet. SpecError: none."""
    first, *rest = (part.replace("\0", ",") for part in text.replace(",,", "\0").split(","))
    options = [_option(text, part) for part in rest]
    kind, argument = _kind(text, first)
    for name, _ in options:
        if name not in _OPTIONS[kind]:
            raise SpecError(
                f"{text!r}: {kind} has no option {name!r}{_perhaps(name, _OPTIONS[kind])};"
                f" it has: {', '.join(_OPTIONS[kind])}"
            )
    given = _Given(text, [each for each in options if each[0] not in _WRAPPERS])
    try:
        store = _make(kind, argument, given, text)
    except ValueError as error:
        raise error if isinstance(error, SpecError) else SpecError(f"{text!r}: {error}") from None
    store.serial = given.value("serial", _serial)
    store.physical_block_size = given.value("physical", _block) or 0
    store.aptpl = given.value("aptpl", str)
    for name, value in options:
        if name in _WRAPPERS:
            store = _wrap(store, _Given(text, [(name, value)]), name)
    return store


def parse_size(text: str) -> int:
    """Bytes: `512`, `64K`, `512M`, `10G`, `1.5T` (powers of 1024; KiB and the like are the same). ValueError."""
    match = re.fullmatch(r"([0-9]{1,19})(\.[0-9]{1,9})?([KMGTP]?)(iB)?", text, re.IGNORECASE)
    if match is None or (match[4] and not match[3]):
        raise ValueError(f"a size like 512M or 10G is wanted, not {text!r}")
    unit = _SUFFIXES[match[3].upper()]
    digits = match[2][1:] if match[2] else ""
    scale = int("1" + "0" * len(digits))
    size, remainder = divmod(int(match[1] + digits) * unit, scale)
    if remainder:
        raise ValueError(f"{text} is no whole number of bytes")
    return size


def _kind(text: str, first: str) -> tuple[str, str]:
    if _URI.match(first):
        return "nbd", first
    kind, colon, argument = first.partition(":")
    if colon and kind in _OPTIONS:
        if not argument:
            raise SpecError(f"{text!r}: {kind} needs something after its colon")
        return kind, argument
    # A path with a colon in it is one if it looks like one.
    if not first or (colon and "/" not in kind):
        raise SpecError(
            f"{text!r} is no disk: there are PATH, memory:SIZE and nbd:URI{_perhaps(kind, _OPTIONS)};"
            " a path that has a colon can be written file:PATH"
        )
    return "file", first


def _make(kind: str, argument: str, given: _Given, text: str) -> Store:
    read_only = given.flag("readonly") or False
    block = given.value("block", _block)
    if kind == "memory":
        return MemoryStore(parse_size(argument), block_size=block or 512, read_only=read_only, spec=text)
    if kind == "nbd":
        if not _URI.match(argument):
            raise SpecError(f"{text!r}: an NBD URI begins with nbd://, nbds://, nbd+unix:// or nbds+unix://")
        return NbdStore(
            argument,
            tls=given.value("tls", _one_of(TLS_MODES)),
            timeout=given.value("timeout", _seconds) or TIMEOUT,
            block_size=block or 512,
            read_only=read_only,
            spec=text,
        )
    return FileStore(
        argument,
        read_only=read_only,
        shared=given.flag("shared") or False,
        direct=given.flag("direct"),
        block_size=block,
        spec=text,
    )


def _wrap(store: Store, given: _Given, name: str) -> Store:
    if name == "delay":
        milliseconds = given.value(name, _number)
        assert milliseconds is not None
        return Delay(store, milliseconds / 1000)
    if name == "error-rate":
        rate = given.value(name, _error_rate)
        assert rate is not None
        return ErrorRate(store, *rate)
    limit = given.value(name, _limit)
    assert limit is not None
    return Limit(store, **limit)


class _Given:
    """Options as they were written, by name."""

    def __init__(self, text: str, options: list[tuple[str, str | None]]) -> None:
        self._text = text
        self._options: dict[str, str | None] = {}
        for name, value in options:
            if name in self._options:
                raise SpecError(f"{text!r}: {name} is there twice")
            self._options[name] = value

    def flag(self, name: str) -> bool | None:
        """NAME or NAME=on, or NAME=off; None where it isn't there."""
        if name not in self._options:
            return None
        value = self._options[name]
        if value not in (None, "on", "off"):
            raise SpecError(f"{self._text!r}: {name} is on or off, not {value!r}")
        return value != "off"

    def value(self, name: str, read: Callable[[str], T]) -> T | None:
        """NAME=VALUE as `read` understands it; None where it isn't there."""
        if name not in self._options:
            return None
        value = self._options[name]
        if not value:
            raise SpecError(f"{self._text!r}: {name} needs a value: {name}=...")
        try:
            return read(value)
        except ValueError as error:
            raise SpecError(f"{self._text!r}: {name}: {error}") from None


def _option(text: str, part: str) -> tuple[str, str | None]:
    name, equals, value = part.partition("=")
    if not name:
        raise SpecError(f"{text!r}: there is no option after a comma (two commas stand for one)")
    return name, value if equals else None


def _block(text: str) -> int:
    if text not in ("512", "4096"):
        raise ValueError(f"a block has 512 or 4096 bytes, not {text!r}")
    return int(text)


def _serial(text: str) -> str:
    # What INQUIRY can carry: printable ASCII (SPC-4, 4.4.1).
    if not re.fullmatch(r"[ -~]{1,64}", text):
        raise ValueError(f"a serial number has 1 to 64 printable ASCII characters, not {text!r}")
    return text


def _number(text: str) -> float:
    if not re.fullmatch(r"[0-9]{1,9}(\.[0-9]{1,9})?", text):
        raise ValueError(f"a number is wanted, not {text!r}")
    return float(text)


def _seconds(text: str) -> float:
    number = _number(text)
    if number <= 0:
        raise ValueError("a time in seconds, and more than 0, is wanted")
    return number


def _one_of(words: Iterable[str]) -> Callable[[str], str]:
    def read(text: str) -> str:
        if text not in words:
            raise ValueError(f"it is {', '.join(words)}, not {text!r}")
        return text

    return read


def _error_rate(text: str) -> tuple[float, int]:
    rate, colon, name = text.partition(":")
    number = _number(rate)
    if number > 1:
        raise ValueError(f"a probability from 0 to 1 is wanted, not {rate}")
    if colon and name not in _ERRORS:
        raise ValueError(f"{name!r} is none of {', '.join(_ERRORS)}")
    return number, _ERRORS[name or "EIO"]


def _limit(text: str) -> dict[str, float]:
    try:
        if text.endswith("iops"):
            limit, what = _number(text.removesuffix("iops")), "operations"
        elif text.endswith("/s"):
            limit, what = float(parse_size(text.removesuffix("/s"))), "data"
        else:
            raise ValueError
    except ValueError:
        raise ValueError(f"a limit like 500iops or 20M/s is wanted, not {text!r}") from None
    if not limit:
        raise ValueError("nothing would ever get through")
    return {what: limit}


def _perhaps(word: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(word, list(known), 1)
    return f" (did you mean {close[0]!r}?)" if close else ""
