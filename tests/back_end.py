"""A real back end in the test's own process: devices on Unix sockets, served by a control thread.

Promises: when the `with` ends, the control thread has ended, the devices are closed, and what went wrong in the
thread is raised. Never: looks into a device but on its own thread (`ask`).
"""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

from pyvhost.driver.vhost_user import PROTOCOL_FEATURES, VhostUserFrontend
from pyvhost.vhost_user.server import Server

T = TypeVar("T")

#: How long a step may take before a test gives up on it, in seconds. No test waits so long unless it fails.
PATIENCE = 30.0


class BackEnd:
    """`devices`, each at a socket of its own in `directory`."""

    def __init__(
        self,
        directory: Path | None,
        *devices: Any,
        dial: Path | None = None,
        handed_over: socket.socket | None = None,
    ) -> None:
        """`dial`: the first device's front end listens there; `handed_over`: it has this socket already."""
        self.devices = devices
        self.paths: list[Path] = []
        self._server = Server()
        try:
            if dial is not None:
                self._server.connect(dial, self.device)
            elif handed_over is not None:
                self._server.serve_fd(handed_over.detach(), self.device)
            else:
                assert directory is not None
                self.paths = [directory / f"device{at}" for at in range(len(devices))]
                for path, device in zip(self.paths, devices, strict=True):
                    self._server.listen(path, device)
        except BaseException:
            self._server.close()
            for device in devices:
                device.close()
            raise
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="control")
        self._thread.start()

    def _run(self) -> None:
        try:
            self._server.run()
        except BaseException as error:
            self._failure = error

    @property
    def device(self) -> Any:
        """The first device."""
        return self.devices[0]

    def connect(self, at: int = 0, protocol_features: int = PROTOCOL_FEATURES) -> VhostUserFrontend:
        """A front end, connected to the socket of device `at`."""
        return VhostUserFrontend.connect(
            self.paths[at], timeout=PATIENCE, protocol_features=protocol_features
        )

    def open_descriptors(self) -> int:
        """How many this process has with one front end at the first device, which has been served nothing yet.

        That one is let in only when its predecessor's end has been dealt with.
        """
        with self.connect() as frontend:
            frontend.sync()
            return len(os.listdir("/proc/self/fd"))

    def ask(self, function: Callable[[], T]) -> T:
        """What `function` returns on the control thread."""
        answers: list[T] = []
        asked = threading.Event()

        def answer() -> None:
            try:
                answers.append(function())
            finally:
                asked.set()

        self._server.poller.call_soon_threadsafe(answer)
        assert asked.wait(PATIENCE), "the control thread does not answer"
        assert answers, "the control thread raised; see the log"
        return answers[0]

    def close(self) -> None:
        """Ends the control thread, then the devices."""
        self._server.stop()
        self._thread.join(PATIENCE)
        assert not self._thread.is_alive(), "the control thread does not end"
        for device in self.devices:
            device.close()
        if self._failure is not None:
            raise self._failure

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
