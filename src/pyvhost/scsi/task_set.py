"""A logical unit's task set: which task may run, ACA, and aborting (SAM-5, clauses 5.10, 7 and 8).

Promises: an ORDERED task runs after every older task and before every younger SIMPLE one; a HEAD OF QUEUE task runs
at once; while there is an auto contingent allegiance only its nexus's ACA tasks do. Whoever aborts tasks is told
when the last of them has really stopped.
Never: knows what a task's command does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from pyvhost.scsi.nexus import Nexus
from pyvhost.scsi.task import Attribute, Outcome, Status, Task

Done = Callable[[], object]

#: NACA, in the CONTROL byte (SAM-5, 5.2).
NACA = 0x04
#: Where the CONTROL byte is.
_CONTROL = {0: 5, 1: 9, 2: 9, 4: 15, 5: 11}


def control_byte(cdb: bytes) -> int:
    """The CDB's CONTROL byte; 0 if it has none."""
    if not cdb:
        return 0
    at = 1 if cdb[0] in (0x7E, 0x7F) else _CONTROL.get(cdb[0] >> 5)
    return cdb[at] if at is not None and at < len(cdb) else 0


def _preempts(task: Task) -> bool:
    """PERSISTENT RESERVE OUT with PREEMPT AND ABORT gets through an ACA (SAM-5, 5.10.5.2)."""
    return len(task.cdb) > 1 and task.cdb[0] == 0x5F and task.cdb[1] & 0x1F == 5


class TaskSet:
    """The tasks of one logical unit, oldest first."""

    def __init__(self, begin: Callable[[Task], object]) -> None:
        #: Carries out a task that has become enabled.
        self._begin = begin
        self._tasks: dict[Task, None] = {}
        #: The nexus for which there is an auto contingent allegiance (ACA).
        self.faulted: Nexus | None = None
        #: Asks the compiled loop to let what it has under way come to its end; None: there is none.
        self.drain: Callable[[Done], object] | None = None
        #: What QERR and TAS of the Control mode page say.
        self.qerr = 0
        self.tas = False
        #: Called whenever a task comes or goes, or ACA does.
        self.on_change: Callable[[], object] = lambda: None
        #: Told a nexus whose tasks were aborted by another, with no status for them.
        self.on_cleared: Callable[[Nexus], object] = lambda nexus: None
        self._drained: Task | None = None
        self._scheduling = False
        self._again = False

    def __len__(self) -> int:
        return len(self._tasks)

    def __iter__(self) -> Iterator[Task]:
        return iter(list(self._tasks))

    @property
    def restrictive(self) -> bool:
        """Whether a SIMPLE task that came now could not simply run beside the others."""
        if self.faulted is not None:
            return True
        return any(task.attribute is not Attribute.SIMPLE for task in self._tasks)

    def add(self, task: Task) -> None:
        """Take a task in, or refuse it for ACA (SAM-5, 5.10.4)."""
        refusal = self._aca_refusal(task)
        if refusal is not None:
            task.finish(refusal)
            return
        self._tasks[task] = None
        task.on_end.append(self._ended)
        self.on_change()
        self.schedule()

    def find(self, nexus: Nexus, tag: int) -> list[Task]:
        """The tasks that bear that tag; there should be one at most."""
        return [task for task in self._tasks if task.nexus is nexus and task.tag == tag]

    def of(self, nexus: Nexus | None) -> list[Task]:
        """The tasks of one nexus, or of all."""
        return [task for task in self._tasks if nexus is None or task.nexus is nexus]

    def abort(
        self, tasks: list[Task], done: Done, outcome: Outcome = Outcome.ABORTED, by: Nexus | None = None
    ) -> None:
        """Abort `tasks`; `done` when all of them have stopped, the compiled loop's included.

        `by`: the nexus that wants it. Tasks of others end with TASK ABORTED if TAS says so; if not, their
        initiators get a unit attention.
        """
        left = 1

        def one(_task: Task | None = None) -> None:
            nonlocal left
            left -= 1
            if left == 0:
                done()

        others: dict[Nexus, None] = {}
        for task in tasks:
            if task.ended:
                continue
            status = None
            if by is not None and task.nexus is not by and outcome is Outcome.ABORTED:
                if self.tas:
                    status = Status.TASK_ABORTED
                else:
                    others[task.nexus] = None
            left += 1
            task.on_end.append(one)
            task.abort(outcome, status)
        for nexus in others:
            self.on_cleared(nexus)
        if self.drain is not None:
            left += 1
            self.drain(one)
        one()

    def clear_aca(self) -> None:
        """End the auto contingent allegiance; what was blocked goes on."""
        if self.faulted is not None:
            self.faulted = None
            self.on_change()
            self.schedule()

    def schedule(self) -> None:
        """Begin every task that may be enabled now (SAM-5, 8.6)."""
        if self._scheduling:
            self._again = True
            return
        self._scheduling = True
        try:
            self._again = True
            while self._again:
                self._again = False
                self._schedule_once()
        finally:
            self._scheduling = False

    def _schedule_once(self) -> None:
        ordered = head = older = False
        for task in list(self._tasks):
            if task.ended:
                continue
            kind = task.attribute
            if not task.started:
                if kind is Attribute.HEAD_OF_QUEUE:
                    may = self.faulted is None
                elif kind is Attribute.ACA:
                    # Without the condition an ACA task is refused by whoever begins it.
                    may = self.faulted is None or self.faulted is task.nexus
                elif self.faulted is not None:
                    may = _preempts(task)
                elif kind is Attribute.ORDERED:
                    may = not older and self._idle(task)
                else:
                    may = not ordered and not head
                if may:
                    self._begin(task)
            if task.ended:
                continue
            older = True
            ordered |= kind is Attribute.ORDERED
            head |= kind is Attribute.HEAD_OF_QUEUE

    def _idle(self, task: Task) -> bool:
        """Whether the compiled loop has nothing older than the ordered `task`; if not yet, come again then."""
        if self.drain is None or self._drained is task:
            return True
        if self._drained is None or self._drained.ended:
            self._drained = None

            def drained() -> None:
                self._drained = task
                self.schedule()

            self.drain(drained)
        return self._drained is task

    def _ended(self, task: Task) -> None:
        self._tasks.pop(task, None)
        if task.outcome is Outcome.STATUS and task.status is Status.CHECK_CONDITION:
            self._check_condition(task)
        self.on_change()
        self.schedule()

    def _check_condition(self, task: Task) -> None:
        if control_byte(task.cdb) & NACA and self.faulted is None:
            self.faulted = task.nexus
        # QERR (SPC-4, 7.5.8): 01b aborts all, 11b those of the faulted nexus.
        if self.qerr == 1:
            self.abort(self.of(None), lambda: None, by=task.nexus)
        elif self.qerr == 3:
            self.abort(self.of(task.nexus), lambda: None, by=task.nexus)

    def _aca_refusal(self, task: Task) -> Status | None:
        if self.faulted is None:
            return None
        if task.nexus is self.faulted:
            if task.attribute is Attribute.ACA and not any(t.attribute is Attribute.ACA for t in self._tasks):
                return None
            return Status.ACA_ACTIVE
        if _preempts(task):
            return None
        return Status.ACA_ACTIVE if control_byte(task.cdb) & NACA else Status.BUSY
