"""QMP, as much of it as tells a QEMU what to do: one command at a time, events kept until they are waited for.

Source: QEMU's docs/interop/qmp-spec.rst. Promises: every wait has a limit; what QEMU refuses raises with its own
words. Never: reconnects, or reads on when nobody waits.
"""

from __future__ import annotations

import json
import select
import socket
import time
from collections.abc import Callable
from typing import Any

Message = dict[str, Any]


class QmpError(RuntimeError):
    """QEMU refused a command, sent what is no QMP, or went away."""


class Qmp:
    """QEMU's monitor at the other end of `sock`, which this object owns."""

    def __init__(self, sock: socket.socket, *, timeout: float = 20.0) -> None:
        self._sock = sock
        self._timeout = timeout
        self._buffer = b""
        self.events: list[Message] = []
        greeting = self._next(time.monotonic() + timeout)
        if "QMP" not in greeting:
            raise QmpError(f"no greeting but {greeting}")
        self.execute("qmp_capabilities")

    def execute(self, command: str, **arguments: Any) -> Any:
        """Run a command; what it returns. Underscores in arguments' names stand for dashes."""
        plain = {name.replace("_", "-"): value for name, value in arguments.items()}
        try:
            self._sock.sendall(json.dumps({"execute": command, "arguments": plain}).encode() + b"\n")
        except OSError as problem:
            raise QmpError(f"{command}: QEMU went away: {problem}") from problem
        deadline = time.monotonic() + self._timeout
        while True:
            message = self._next(deadline)
            if "event" in message:
                self.events.append(message)
            elif "error" in message:
                raise QmpError(f"{command}: {message['error'].get('desc', message['error'])}")
            elif "return" in message:
                return message["return"]

    def wait_event(
        self, name: str, *, matching: Callable[[Message], bool] = lambda data: True, timeout: float = 30.0
    ) -> Message:
        """The data of the first event of that name since the last wait for it, now or within `timeout` seconds."""
        deadline = time.monotonic() + timeout
        while True:
            for index, event in enumerate(self.events):
                data: Message = event.get("data", {})
                if event["event"] == name and matching(data):
                    del self.events[index]
                    return data
            message = self._next(deadline, f"event {name}")
            if "event" in message:
                self.events.append(message)

    def forget_events(self, *names: str) -> None:
        """Those of these names that have come are waited for by nobody."""
        self.events = [event for event in self.events if event["event"] not in names]

    def close(self) -> None:
        """Let go of the socket."""
        self._sock.close()

    def _next(self, deadline: float, what: str = "an answer") -> Message:
        while b"\n" not in self._buffer:
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([self._sock], [], [], left)[0]:
                raise QmpError(f"QEMU's monitor did not send {what} in time")
            try:
                data = self._sock.recv(65536)
            except OSError as problem:
                raise QmpError(f"QEMU's monitor: {problem}") from problem
            if not data:
                raise QmpError(f"QEMU went away before it sent {what}")
            self._buffer += data
        line, _, self._buffer = self._buffer.partition(b"\n")
        try:
            message = json.loads(line)
        except ValueError as problem:
            raise QmpError(f"no JSON from QEMU's monitor: {line!r}") from problem
        if not isinstance(message, dict):
            raise QmpError(f"no object from QEMU's monitor: {message!r}")
        return message
