"""What goes over a control socket: a line of JSON each way.

    {"command": "add-lun", "arguments": ["0:3=memory:1G"]}
    {"result": {"lun": "0:3"}}        or        {"error": {"errno": "EEXIST", "text": "LUN 0:3 is there already"}}

Promises: whatever comes is either a request or ValueError. Never: does input or output.
"""

from __future__ import annotations

import errno
import json
from typing import Any, Final

from pyvhost.host.errors import words

#: The longest line either way, in bytes.
LINE_MAX: Final = 1 << 20
#: Behind a vhost socket's name, for its control socket's.
SUFFIX: Final = ".ctl"


class RefusedError(Exception):
    """The device's process said no. `errno` is 0 where that was not for a reason of the host's."""

    def __init__(self, text: str, number: int = 0) -> None:
        super().__init__(text)
        self.errno = number


def request(command: str, arguments: list[str]) -> bytes:
    """A request's line."""
    return _line({"command": command, "arguments": arguments})


def parse_request(line: bytes) -> tuple[str, list[str]]:
    """Command and arguments. ValueError: it is no request."""
    try:
        said = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not JSON: {error}") from None
    command = said.get("command") if isinstance(said, dict) else None
    arguments = said.get("arguments", []) if isinstance(said, dict) else None
    if not isinstance(command, str) or not isinstance(arguments, list):
        raise ValueError('a request is {"command": NAME, "arguments": [WORD, ...]}')
    if not all(isinstance(word, str) for word in arguments):
        raise ValueError("arguments are strings")
    return command, arguments


def result(value: Any) -> bytes:
    """The line of a reply that brings something."""
    return _line({"result": value})


def refusal(error: Exception) -> bytes:
    """The line of a reply that says no: of an OSError its errno by name, and its text."""
    number = error.errno if isinstance(error, OSError) else None
    return _line({"error": {"errno": errno.errorcode.get(number or 0), "text": words(error)}})


def parse_reply(line: bytes) -> Any:
    """The result. RefusedError: it is a refusal. ValueError: it is no reply."""
    try:
        said = json.loads(line)
        if "result" in said:
            return said["result"]
        failed = said["error"]
        text, name = str(failed["text"]), failed["errno"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"no reply: {error!r}") from None
    number = getattr(errno, name, 0) if isinstance(name, str) and name.startswith("E") else 0
    raise RefusedError(text, number)


def _line(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False).encode("utf-8", "replace") + b"\n"
