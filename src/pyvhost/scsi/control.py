"""The control queue: task management functions and asynchronous notification (virtio 1.2, 5.6.6.2).

Promises: a function is answered when the tasks that it stopped have stopped, those in the compiled loop as well.
Never: aborts what came after it.
"""

from __future__ import annotations

import ctypes
import logging
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from pyvhost.abi import virtio_scsi as abi
from pyvhost.host.poller import Poller
from pyvhost.scsi.endings import Endings
from pyvhost.scsi.requests import REPORT_LUNS_WLUN, Address, parse_lun
from pyvhost.scsi.target import Response, Target
from pyvhost.vhost.chains import Chain, PythonRing
from pyvhost.vhost.worker import Int64s

if TYPE_CHECKING:
    from pyvhost.scsi.device import ScsiDevice

_log = logging.getLogger(__name__)

_TMF_BYTES: Final = ctypes.sizeof(abi.ScsiCtrlTmfReq)
_AN_BYTES: Final = ctypes.sizeof(abi.ScsiCtrlAnReq)
_ANSWERS: Final = {
    Response.FUNCTION_COMPLETE: abi.S_OK,
    Response.FUNCTION_SUCCEEDED: abi.S_FUNCTION_SUCCEEDED,
    Response.FUNCTION_REJECTED: abi.S_FUNCTION_REJECTED,
    Response.INCORRECT_LOGICAL_UNIT_NUMBER: abi.S_INCORRECT_LUN,
}


class ControlQueue:
    """`device`'s control queue; `ring` is its place."""

    def __init__(self, device: ScsiDevice, name: str, poller: Poller, row: Int64s) -> None:
        self._device = device
        self.ring = PythonRing(name, self._handle, poller, row)
        #: Functions that are not answered, whether anybody waits for that or not.
        self.asked: list[Chain] = []

    def _handle(self, chain: Chain) -> int | None:
        raw = chain.read(_TMF_BYTES)
        if len(raw) < 4:
            _log.error("%s: a request of %d bytes", self.ring.name, len(raw))
            return 0
        kind = int.from_bytes(raw[:4], chain.byteorder)
        if kind == abi.T_TMF and len(raw) == _TMF_BYTES:
            return self._manage(chain, raw)
        if kind in (abi.T_AN_QUERY, abi.T_AN_SUBSCRIBE) and len(raw) >= _AN_BYTES:
            # No event of these is ever sent, so none is there to subscribe to.
            address = parse_lun(raw[4:12])
            known = address is not None and self._device.entry(address)
            return chain.write(bytes(4) + bytes([abi.S_OK if known else abi.S_BAD_TARGET]))
        _log.error("%s: a request of type %d and %d bytes", self.ring.name, kind, len(raw))
        return chain.write(bytes([abi.S_FUNCTION_REJECTED]))

    def _manage(self, chain: Chain, raw: bytes) -> int | None:
        function = int.from_bytes(raw[4:8], chain.byteorder)
        tag = int.from_bytes(raw[16:24], chain.byteorder)
        address = parse_lun(raw[8:16])
        target = self._device.target_of(address) if address is not None else None
        if address is None or target is None:
            return chain.write(bytes([abi.S_BAD_TARGET]))
        # A driver that aborts a request has made it available before: it is to be found.
        self.asked.append(chain)

        def answer(response: Response) -> None:
            if self.ring.alive(chain):
                self.ring.finish(chain, chain.write(bytes([_ANSWERS[response]])))
            self.asked.remove(chain)
            self._device.chain_ended(chain)

        raw_tag = int.from_bytes(raw[16:24], sys.byteorder)
        # What comes from now on is none of its business.
        with self._device.paused():
            self._device.sweep()
            self._function(function, target, address, (tag, raw_tag), answer)
        return None

    def _function(
        self,
        function: int,
        target: Target,
        address: Address,
        tags: tuple[int, int],
        answer: Callable[[Response], None],
    ) -> None:
        device = self._device
        tag, raw_tag = tags
        nexus, entry, lun = device.nexus, device.entry(address), address.lun

        def of_task(unit: int, of: int) -> bool:
            return unit == entry and of == raw_tag

        def of_unit(unit: int, of: int) -> bool:
            return unit == entry

        def of_target(unit: int, of: int) -> bool:
            return unit in {device.entry(Address(address.target, number)) for number in target.numbers}

        def both(chosen: Callable[[int, int], bool], code: int) -> Callable[[Response], None]:
            """Aborts what the loop has; what answers when that has ended and the target has said its response."""
            responses: list[Response] = []
            over = Endings()
            over.wait((1, 2), lambda: answered(responses[0]))

            def said(response: Response) -> None:
                responses.append(response)
                over.ended(1)

            device.abort_loop(chosen, code, lambda: over.ended(2))
            return said

        answered = answer
        if function == abi.T_TMF_QUERY_TASK:
            if device.in_loop(of_task):
                answer(Response.FUNCTION_SUCCEEDED)
            else:
                target.query_task(nexus, lun, tag, answer)
        elif function == abi.T_TMF_QUERY_TASK_SET:
            if device.in_loop(of_unit):
                answer(Response.FUNCTION_SUCCEEDED)
            else:
                target.query_task_set(nexus, lun, answer)
        elif function == abi.T_TMF_CLEAR_ACA:
            target.clear_aca(nexus, lun, answer)
        elif function == abi.T_TMF_ABORT_TASK:
            answer = both(of_task, abi.S_ABORTED)
            target.abort_task(nexus, lun, tag, answer)
        elif function == abi.T_TMF_ABORT_TASK_SET:
            answer = both(of_unit, abi.S_ABORTED)
            target.abort_task_set(nexus, lun, answer)
        elif function == abi.T_TMF_CLEAR_TASK_SET:
            answer = both(of_unit, abi.S_ABORTED)
            target.clear_task_set(nexus, lun, answer)
        elif function == abi.T_TMF_LOGICAL_UNIT_RESET and lun != REPORT_LUNS_WLUN:
            answer = both(of_unit, abi.S_RESET)
            target.lun_reset(lun, answer)
        elif function == abi.T_TMF_I_T_NEXUS_RESET:
            answer = both(of_target, abi.S_RESET)
            target.nexus_reset(nexus, answer)
        else:
            answer(Response.FUNCTION_REJECTED)
