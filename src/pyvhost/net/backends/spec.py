"""A backend as --backend has it: `KIND[:ARGUMENT][,OPTION[=VALUE]...]`. Two commas stand for one.

Promises: a spec that is wrong says so before anything is opened, with what would be right (SpecError).
Never: knows which backends there are.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable
from typing import TypeVar

T = TypeVar("T")

KIND = re.compile(r"[a-z][a-z0-9_-]*")


class SpecError(ValueError):
    """What was written can't be meant; the text says what can."""


class Spec:
    """A spec in its parts. Whoever reads it takes the options it has, and says `done` at the end.

    SpecError: `text` has no such parts.
    """

    def __init__(self, text: str) -> None:
        self.text = text
        first, *rest = (part.replace("\0", ",") for part in text.replace(",,", "\0").split(","))
        self.kind, colon, argument = first.partition(":")
        self.argument = argument if colon else None
        if not KIND.fullmatch(self.kind):
            raise SpecError(
                f"{text!r} is no backend: they read KIND[:ARGUMENT][,OPTION[=VALUE]...], as in tap:vm0"
            )
        self._options: list[tuple[str, str | None]] = []
        self._asked: list[str] = []
        for part in rest:
            name, equals, value = part.partition("=")
            if not name:
                raise SpecError(f"{text!r}: there is no option after a comma (two commas stand for one)")
            self._options.append((name, value if equals else None))

    def required(self, what: str, read: Callable[[str], T]) -> T:
        """The argument as `read` understands it, of which there must be one; `what` is what it is."""
        if not self.argument:
            raise SpecError(f"{self.text!r}: {self.kind} needs its {what}, as in {self.kind}:{what.upper()}")
        try:
            return read(self.argument)
        except ValueError as error:
            raise SpecError(f"{self.text!r}: the {what}: {error}") from None

    def optional(self, what: str, read: Callable[[str], T]) -> T | None:
        """The argument if there is one."""
        return None if self.argument is None else self.required(what, read)

    def no_argument(self) -> None:
        """There must be none."""
        if self.argument is not None:
            raise SpecError(
                f"{self.text!r}: {self.kind} takes no argument after a colon, only options after commas"
            )

    def flag(self, name: str, default: bool = False) -> bool:
        """An option that is NAME or NAME=on, or NAME=off."""
        found = self._once(name)
        if not found:
            return default
        if found[0] not in (None, "on", "off"):
            raise SpecError(f"{self.text!r}: {name} is on or off, not {found[0]!r}")
        return found[0] != "off"

    def value(self, name: str, read: Callable[[str], T]) -> T | None:
        """An option as `read` understands it, None without it. A ValueError from `read` becomes a SpecError."""
        found = self._once(name)
        return self._read(name, found[0], read) if found else None

    def values(self, name: str) -> list[str]:
        """The values of an option that may come several times."""
        return [self._read(name, value, str) for value in self._all(name)]

    def done(self) -> None:
        """Whatever option was not asked for is unknown."""
        for name, _ in self._options:
            if name not in self._asked:
                has = f"it has: {', '.join(self._asked)}" if self._asked else "it has none"
                raise SpecError(
                    f"{self.text!r}: {self.kind} has no option {name!r}{perhaps(name, self._asked)}; {has}"
                )

    def wrong(self, text: str) -> SpecError:
        """An error about this spec, to be raised."""
        return SpecError(f"{self.text!r}: {text}")

    def _all(self, name: str) -> list[str | None]:
        self._asked.append(name)
        return [value for option, value in self._options if option == name]

    def _once(self, name: str) -> list[str | None]:
        found = self._all(name)
        if len(found) > 1:
            raise SpecError(f"{self.text!r}: {name} is there {len(found)} times")
        return found

    def _read(self, name: str, value: str | None, read: Callable[[str], T]) -> T:
        if not value:
            raise SpecError(f"{self.text!r}: {name} needs a value: {name}=...")
        try:
            return read(value)
        except ValueError as error:
            raise SpecError(f"{self.text!r}: {name}: {error}") from None


def integer(least: int, most: int) -> Callable[[str], int]:
    """A reader of decimal numbers from `least` to `most`."""

    def read(text: str) -> int:
        if not re.fullmatch(r"[0-9]{1,20}", text) or not least <= int(text) <= most:
            raise ValueError(f"a number from {least} to {most} is wanted, not {text!r}")
        return int(text)

    return read


def mac_address(text: str) -> bytes:
    """Reads an Ethernet address: six bytes in hexadecimal, colons or dashes between them."""
    if not re.fullmatch(r"[0-9a-fA-F]{2}([:-][0-9a-fA-F]{2}){5}", text):
        raise ValueError(f"an address like 52:54:00:12:34:56 is wanted, not {text!r}")
    return bytes.fromhex(re.sub("[:-]", "", text))


def perhaps(word: str, known: Iterable[str]) -> str:
    """' (did you mean ...?)' where one of `known` is like `word`."""
    close = difflib.get_close_matches(word, list(known), 1)
    return f" (did you mean {close[0]!r}?)" if close else ""
