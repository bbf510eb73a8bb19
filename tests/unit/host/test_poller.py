"""The control loop: what it calls, in which order, and what it survives."""

from __future__ import annotations

import os
import select
import socket
import threading
from collections.abc import Iterator

import pytest

from pyvhost.host import eventfd
from pyvhost.host.poller import Poller, Timer


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    reader, writer = os.pipe()
    try:
        yield reader, writer
    finally:
        for fd in (reader, writer):
            try:
                os.close(fd)
            except OSError:
                pass


def ready_eventfds(number: int) -> list[int]:
    return [eventfd.create(1) for _ in range(number)]


def test_a_callback_gets_the_mask_and_is_called_again_while_the_condition_holds(
    poller: Poller, pipe: tuple[int, int]
) -> None:
    masks: list[int] = []
    poller.register(pipe[0], select.EPOLLIN, masks.append)
    poller.run_once(0)
    assert masks == []

    os.write(pipe[1], b"x")
    poller.run_once()
    poller.run_once()
    assert masks == [select.EPOLLIN, select.EPOLLIN]

    os.read(pipe[0], 1)
    poller.run_once(0)
    assert len(masks) == 2


def test_the_other_sides_end_is_told_without_being_asked_for(poller: Poller, pipe: tuple[int, int]) -> None:
    masks: list[int] = []
    poller.register(pipe[0], 0, masks.append)
    os.close(pipe[1])
    poller.run_once()
    assert masks == [select.EPOLLHUP]


def test_modify_changes_events_and_callback(poller: Poller) -> None:
    here, there = socket.socketpair()
    with here, there:
        first: list[int] = []
        second: list[int] = []
        poller.register(here.fileno(), select.EPOLLIN, first.append)
        poller.run_once(0)
        poller.modify(here.fileno(), select.EPOLLOUT)
        poller.run_once()
        poller.modify(here.fileno(), select.EPOLLOUT, second.append)
        poller.run_once()
        assert (first, second) == ([select.EPOLLOUT], [select.EPOLLOUT])

        with pytest.raises(KeyError):
            poller.modify(there.fileno(), select.EPOLLIN)


def test_a_failing_callback_is_logged_and_the_loop_goes_on(
    poller: Poller, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(_: int) -> None:
        raise RuntimeError("the device is on fire")

    served: list[int] = []
    bad, good = ready_eventfds(2)
    poller.register(bad, select.EPOLLIN, fail)
    poller.register(good, select.EPOLLIN, served.append)
    poller.call_soon_threadsafe(lambda: fail(0))
    poller.call_later(0, lambda: fail(0))
    poller.call_later(0, poller.stop)
    poller.run()
    assert caplog.text.count("the device is on fire") >= 2
    assert served
    os.close(bad)
    os.close(good)


def test_an_interrupt_is_not_swallowed(poller: Poller) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    poller.call_soon_threadsafe(interrupt)
    with pytest.raises(KeyboardInterrupt):
        poller.run()


def test_a_descriptor_unregistered_by_an_earlier_callback_of_the_batch_is_not_called(poller: Poller) -> None:
    """Both are ready at once; whichever comes first unregisters the other."""
    one, two = ready_eventfds(2)
    called: list[int] = []

    def serve(me: int, other: int) -> None:
        called.append(me)
        poller.unregister(other)

    poller.register(one, select.EPOLLIN, lambda _: serve(one, two))
    poller.register(two, select.EPOLLIN, lambda _: serve(two, one))
    poller.run_once()
    assert len(called) == 1
    os.close(one)
    os.close(two)


def test_a_number_that_is_used_again_within_a_batch_is_not_told_of_its_former_files_event(
    poller: Poller,
) -> None:
    first, second = ready_eventfds(2)
    called: list[str] = []
    reused: list[int] = []

    def serve(me: int, other: int) -> None:
        called.append("old")
        poller.unregister(other)
        # The same number, a file on which nothing has happened.
        silent = eventfd.create(0)
        os.dup2(silent, other, inheritable=False)
        os.close(silent)
        poller.register(other, select.EPOLLIN, lambda _: called.append("new"))
        poller.unregister(me)
        reused.append(other)

    poller.register(first, select.EPOLLIN, lambda _: serve(first, second))
    poller.register(second, select.EPOLLIN, lambda _: serve(second, first))
    poller.run_once()
    poller.run_once(0)
    assert called == ["old"]

    eventfd.signal(reused[0])
    poller.run_once()
    assert called == ["old", "new"]
    os.close(first)
    os.close(second)


def test_a_callback_may_unregister_and_register_itself(poller: Poller) -> None:
    (fd,) = ready_eventfds(1)
    called: list[str] = []

    def first(_: int) -> None:
        called.append("first")
        poller.unregister(fd)
        poller.register(fd, select.EPOLLIN, lambda _: called.append("second"))

    poller.register(fd, select.EPOLLIN, first)
    poller.run_once()
    poller.run_once()
    assert called == ["first", "second"]
    os.close(fd)


def test_registering_twice_is_refused_and_unregistering_twice_is_not(poller: Poller) -> None:
    (fd,) = ready_eventfds(1)
    poller.register(fd, select.EPOLLIN, lambda _: None)
    with pytest.raises(ValueError, match=f"descriptor {fd}"):
        poller.register(fd, select.EPOLLIN, lambda _: None)
    poller.unregister(fd)
    poller.unregister(fd)
    assert not poller.registered(fd)
    os.close(fd)


def test_a_descriptor_closed_too_early_does_not_haunt_the_loop(poller: Poller) -> None:
    """Its file lives on under another number: epoll would report it for ever, whatever anyone did."""
    (fd,) = ready_eventfds(1)
    other = eventfd.create(0)
    called: list[str] = []
    poller.register(fd, select.EPOLLIN, lambda _: called.append("haunted"))
    poller.register(other, select.EPOLLIN, lambda _: called.append("other"))
    kept = os.dup(fd)
    os.close(fd)
    poller.unregister(fd)

    poller.run_once(0)
    assert called == []
    assert select.select([poller._epoll], [], [], 0) == ([], [], []), "the loop would spin"
    eventfd.signal(other)
    poller.run_once()
    assert called == ["other"]
    os.close(kept)
    os.close(other)


def test_another_thread_can_call_in_and_the_order_is_kept(poller: Poller) -> None:
    here = threading.get_ident()
    seen: list[int] = []
    threads: set[int] = set()

    def note(number: int) -> None:
        seen.append(number)
        threads.add(threading.get_ident())
        if number == 99:
            poller.stop()

    def call() -> None:
        for number in range(100):
            poller.call_soon_threadsafe(lambda number=number: note(number))  # type: ignore[misc]

    thread = threading.Thread(target=call)
    thread.start()
    poller.run()
    thread.join()
    assert seen == list(range(100))
    assert threads == {here}


def test_a_call_that_calls_itself_again_leaves_descriptors_their_turn(poller: Poller) -> None:
    (fd,) = ready_eventfds(1)

    def again() -> None:
        poller.call_soon_threadsafe(again)

    again()
    poller.register(fd, select.EPOLLIN, lambda _: poller.stop())
    poller.run()
    os.close(fd)


def test_timers_run_in_order_of_time_and_a_cancelled_one_not_at_all(poller: Poller) -> None:
    called: list[str] = []
    poller.call_later(0.02, lambda: called.append("late"))
    poller.call_later(0.0, lambda: called.append("first"))
    poller.call_later(0.0, lambda: called.append("second"))
    cancelled = poller.call_later(0.01, lambda: called.append("cancelled"))
    cancelled.cancel()
    assert not cancelled.pending
    poller.call_later(0.03, poller.stop)
    poller.run()
    assert called == ["first", "second", "late"]


def test_a_timer_can_be_cancelled_by_one_that_is_due_with_it(poller: Poller) -> None:
    called: list[str] = []
    timers: list[Timer] = []

    def cancel() -> None:
        timers[0].cancel()

    poller.call_later(0, cancel)
    timers.append(poller.call_later(0, lambda: called.append("second")))
    poller.call_later(0, poller.stop)
    poller.run()
    assert called == []


def test_stop_before_run_returns_at_once_and_is_then_forgotten(poller: Poller) -> None:
    called: list[str] = []
    poller.stop()
    poller.call_soon_threadsafe(lambda: called.append("served"))
    poller.run()
    assert called == []
    poller.call_soon_threadsafe(poller.stop)
    poller.run()
    assert called == ["served"]


def test_stop_from_another_thread_wakes_a_loop_that_sleeps(poller: Poller) -> None:
    asleep = threading.Event()
    poller.call_soon_threadsafe(asleep.set)

    def stop() -> None:
        asleep.wait()
        poller.stop()

    thread = threading.Thread(target=stop)
    thread.start()
    poller.run()
    thread.join()


def test_calls_into_a_closed_loop_are_lost_quietly() -> None:
    poller = Poller()
    poller.close()
    poller.close()
    poller.call_soon_threadsafe(lambda: None)
    poller.stop()


def test_a_call_that_waits_makes_the_calls_behind_it() -> None:
    """And the round that it was in does not look for them."""
    with Poller() as poller:
        done: list[str] = []

        def waits() -> None:
            assert poller.run_inner(lambda: "second" in done, 5.0)
            done.append("first")

        poller.call_soon_threadsafe(waits)
        poller.call_soon_threadsafe(lambda: done.append("second"))
        poller.call_soon_threadsafe(lambda: done.append("third"))
        poller.run_once(0)
        assert done == ["second", "third", "first"]
