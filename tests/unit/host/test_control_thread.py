"""The process's own control thread: what it is asked to do is done there, once and in order."""

from __future__ import annotations

import os
import threading

import pytest

from pyvhost.host.control_thread import ControlThread


def test_it_answers_from_its_own_thread() -> None:
    control = ControlThread.get()
    assert control is ControlThread.get()
    assert control.call(threading.current_thread) is not threading.current_thread()


def test_what_goes_wrong_there_is_raised_here() -> None:
    def wrong() -> None:
        raise KeyError("it")

    with pytest.raises(KeyError, match="it"):
        ControlThread.get().call(wrong)


def test_it_may_ask_itself() -> None:
    control = ControlThread.get()
    assert control.call(lambda: control.call(lambda: 7)) == 7


def test_what_is_posted_comes_before_what_is_asked_later() -> None:
    control = ControlThread.get()
    done: list[int] = []
    for number in range(100):
        control.post(lambda number=number: done.append(number))  # type: ignore[misc]
    assert control.call(lambda: list(done)) == list(range(100))


def test_something_is_looked_at_after_each_round() -> None:
    control = ControlThread.get()
    looked = threading.Event()
    control.call(lambda: control.after_round.append(looked.set))
    try:
        control.post(lambda: None)
        assert looked.wait(30)
    finally:
        control.call(lambda: control.after_round.remove(looked.set))


def test_a_child_has_one_of_its_own() -> None:
    control = ControlThread.get()
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            own = ControlThread.get()
            status = 0 if own is not control and own.call(lambda: 7) == 7 else 2
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
