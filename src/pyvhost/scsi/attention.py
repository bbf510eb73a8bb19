"""Unit attention conditions: one queue for each I_T nexus of a logical unit (SAM-5, 5.14).

Promises: the same condition waits once only; a reset stands before everything else and takes away what it covers.
"""

from __future__ import annotations

from pyvhost.scsi.nexus import Nexus
from pyvhost.scsi.sense import Asc, Sense, attention

#: Conditions of clause 6.2's table, from the most to the least important; others come after them.
_RANK = {
    Asc.POWER_ON_RESET_OR_BUS_DEVICE_RESET_OCCURRED: 0,
    Asc.BUS_DEVICE_RESET_FUNCTION_OCCURRED: 1,
    Asc.I_T_NEXUS_LOSS_OCCURRED: 2,
    Asc.COMMANDS_CLEARED_BY_ANOTHER_INITIATOR: 3,
}
_OTHERS = 4
#: Not told to who is still to hear of a reset: all of it is asked for then. One by one they were more than Linux' sd
#: takes of a disk that is ready: it would wait a second.
_COVERED = {
    Asc.CAPACITY_DATA_HAS_CHANGED,
    Asc.MODE_PARAMETERS_CHANGED,
    Asc.NOT_READY_TO_READY_CHANGE,
}


def _rank(sense: Sense) -> int:
    return _RANK.get(Asc(sense.asc), _OTHERS)


class Attentions:
    """What every nexus is still to be told."""

    def __init__(self) -> None:
        self._waiting: dict[Nexus, list[Sense]] = {}

    def attach(self, nexus: Nexus) -> None:
        """A nexus has come: it learns that the unit was powered on."""
        if nexus not in self._waiting:
            self._waiting[nexus] = [attention(Asc.POWER_ON_RESET_OR_BUS_DEVICE_RESET_OCCURRED)]

    def detach(self, nexus: Nexus) -> None:
        """A nexus has gone."""
        self._waiting.pop(nexus, None)

    @property
    def nexuses(self) -> list[Nexus]:
        """All that are attached."""
        return list(self._waiting)

    def establish(self, asc: Asc, nexus: Nexus) -> None:
        """Have `nexus` told. Nothing happens if it isn't attached."""
        waiting = self._waiting.get(nexus)
        if waiting is None:
            return
        rank = _RANK.get(asc, _OTHERS)
        if any(sense.asc == asc for sense in waiting):
            return
        if asc in _COVERED and any(_rank(sense) <= 1 for sense in waiting):
            return
        if rank <= 1:
            if any(_rank(sense) <= rank for sense in waiting):
                return
            # A reset is news enough: whoever hears of it looks at everything again.
            waiting.clear()
        waiting.append(attention(asc))
        waiting.sort(key=_rank)

    def establish_all(self, asc: Asc, but: Nexus | None = None) -> None:
        """Have all nexuses told, except one."""
        for nexus in self.nexuses:
            if nexus is not but:
                self.establish(asc, nexus)

    def pending(self, nexus: Nexus) -> bool:
        """Whether something waits for `nexus`."""
        return bool(self._waiting.get(nexus))

    def take(self, nexus: Nexus) -> Sense | None:
        """The most important of what waits for `nexus`, which it is told now."""
        waiting = self._waiting.get(nexus)
        return waiting.pop(0) if waiting else None

    def clear(self, nexus: Nexus, asc: Asc) -> None:
        """`nexus` has learnt it in another way."""
        waiting = self._waiting.get(nexus)
        if waiting:
            waiting[:] = [sense for sense in waiting if sense.asc != asc]
