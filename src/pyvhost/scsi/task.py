"""A task: one command of one initiator, from its arrival to its status (SAM-5, clauses 5 and 8).

Promises: `on_done` is called exactly once, when nothing uses the task's memory any more, whether the command came
to its status or was aborted. Never: knows a command; looks into the data.
"""

from __future__ import annotations

import enum
import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from pyvhost.scsi import sense as sensing
from pyvhost.scsi.operation import Runner, Stopped, Work

if TYPE_CHECKING:
    from pyvhost.scsi.nexus import Nexus

_log = logging.getLogger(__name__)


class Status(enum.IntEnum):
    """Status codes (SAM-5, table 33)."""

    GOOD = 0x00
    CHECK_CONDITION = 0x02
    CONDITION_MET = 0x04
    BUSY = 0x08
    RESERVATION_CONFLICT = 0x18
    TASK_SET_FULL = 0x28
    ACA_ACTIVE = 0x30
    TASK_ABORTED = 0x40


class Attribute(enum.IntEnum):
    """Task attributes (SAM-5, 8.6); the numbers are virtio's."""

    SIMPLE = 0
    ORDERED = 1
    HEAD_OF_QUEUE = 2
    ACA = 3


class Outcome(enum.Enum):
    """How a task ended."""

    #: With a status.
    STATUS = "status"
    #: Aborted by a task management function or by another command; there is no status.
    ABORTED = "aborted"
    #: As ABORTED, by a reset.
    RESET = "reset"


class Refused(Exception):  # noqa: N818
    """A command that ends with a status other than GOOD and CHECK CONDITION."""

    def __init__(self, status: Status) -> None:
        super().__init__(status.name)
        self.status = status


class Task:
    """A command. `data_out` and `data_in` are the initiator's buffers, and their total sizes its buffer lengths."""

    def __init__(
        self,
        cdb: bytes,
        nexus: Nexus,
        on_done: Callable[[Task], object],
        *,
        tag: int = 0,
        attribute: Attribute = Attribute.SIMPLE,
        data_out: Sequence[memoryview] = (),
        data_in: Sequence[memoryview] = (),
        crn: int = 0,
        priority: int = 0,
    ) -> None:
        self.cdb = bytes(cdb)
        self.nexus = nexus
        self.tag = tag
        self.attribute = attribute
        self.crn = crn
        self.priority = priority
        self.data_out = [view.cast("B") for view in data_out if view.nbytes]
        self.data_in = [view.cast("B") for view in data_in if view.nbytes]
        self.out_length = sum(map(len, self.data_out))
        self.in_length = sum(map(len, self.data_in))
        self.on_done = on_done

        # What the end is, valid from `on_done` on.
        self.outcome: Outcome | None = None
        self.status = Status.GOOD
        self.sense = b""
        #: The sense key, if the status is CHECK CONDITION.
        self.key: sensing.Key | None = None
        #: Bytes that were really moved.
        self.transferred_out = 0
        self.transferred_in = 0

        #: What the command would move if the buffers were long enough; None: it never came so far.
        self.wanted_out: int | None = None
        self.wanted_in: int | None = None
        #: How sense data is to look: set by the logical unit (D_SENSE).
        self.encode: Callable[[sensing.Sense], bytes] = lambda sense: sense.encode()
        #: Called once when the task ends, before `on_done`: the task set, and whoever aborted the task.
        self.on_end: list[Callable[[Task], object]] = []
        self._runner: Runner | None = None
        self._abort_as: tuple[Outcome, Status | None] | None = None

    @property
    def ended(self) -> bool:
        """Whether it has come to its end."""
        return self.outcome is not None

    @property
    def started(self) -> bool:
        """Whether it is, or was, in the enabled state (SAM-5, 8.5)."""
        return self._runner is not None

    @property
    def aborting(self) -> bool:
        """Whether it is being aborted, and waits only for what it began to come back."""
        return self._abort_as is not None and not self.ended

    @property
    def overflow(self) -> bool:
        """Whether the command had more to move than a buffer took: the residual is what didn't fit.

        One that was refused, or failed, had nothing to move in the end: its sense data say why.
        """
        return self._excess() > 0

    @property
    def residual(self) -> int:
        """Bytes that weren't moved (underflow), or that had no room (overflow)."""
        excess = self._excess()
        if excess:
            return excess
        return self.out_length + self.in_length - self.transferred_out - self.transferred_in

    def _excess(self) -> int:
        if self.status is Status.CHECK_CONDITION:
            return 0
        out = max(0, (self.wanted_out or 0) - self.out_length)
        return out + max(0, (self.wanted_in or 0) - self.in_length)

    def run(self, work: Work) -> None:
        """Carry the command out; it ends with GOOD unless it raises CheckCondition or Refused, or finishes itself."""
        self._runner = Runner(work, self._ended)
        self._runner.start()

    def finish(
        self,
        status: Status,
        sense: bytes = b"",
        transferred: int | None = None,
        outcome: Outcome = Outcome.STATUS,
    ) -> None:
        """End the task. `transferred`: bytes moved into or out of the one buffer it has, if not told before."""
        if self.outcome is not None:
            _log.error("task %#x ended twice: %s, then %s", self.tag, self.status.name, status.name)
            return
        self.outcome = outcome
        self.status = status
        self.sense = sense
        if transferred is not None:
            if self.out_length:
                self.transferred_out = transferred
            else:
                self.transferred_in = transferred
        listeners, self.on_end = self.on_end, []
        for listener in listeners:
            listener(self)
        self.on_done(self)

    def check(self, sense: sensing.Sense) -> None:
        """End with CHECK CONDITION."""
        self.key = sense.key
        self.finish(Status.CHECK_CONDITION, self.encode(sense))

    def abort(self, outcome: Outcome = Outcome.ABORTED, status: Status | None = None) -> None:
        """Have it stop, as soon as nothing that it began uses its memory. With `status`, that is delivered (TAS).

        The first to abort it decides how it ends.
        """
        if self.ended or self._abort_as is not None:
            return
        self._abort_as = (outcome, status)
        if self._runner is None:
            self._finish_aborted()
        else:
            self._runner.stop()

    def _finish_aborted(self) -> None:
        outcome, status = self._abort_as or (Outcome.ABORTED, None)
        if status is not None:
            self.finish(status)
        else:
            self.finish(Status.TASK_ABORTED, outcome=outcome)

    def _ended(self, error: BaseException | None) -> None:
        if self.ended:
            return
        if isinstance(error, Stopped) or self._abort_as is not None:
            # Also one that came to its end before it noticed: no status after an abort.
            self._finish_aborted()
        elif error is None:
            self.finish(Status.GOOD)
        elif isinstance(error, sensing.CheckCondition):
            self.check(error.sense)
        elif isinstance(error, Refused):
            self.finish(error.status)
        else:
            _log.error("command %s failed", self.cdb.hex(), exc_info=error)
            self.check(sensing.Sense(sensing.Key.HARDWARE_ERROR, sensing.Asc.INTERNAL_TARGET_FAILURE))

    def __repr__(self) -> str:
        return f"<Task {self.tag:#x} {self.cdb.hex()} {self.attribute.name}>"
