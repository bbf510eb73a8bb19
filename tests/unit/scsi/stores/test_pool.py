"""Threads that may wait: how many, in which order, and their end."""

from __future__ import annotations

import logging
import threading

import pytest

from pyvhost.scsi.stores.pool import Pool


def test_jobs_run_beside_each_other_up_to_the_number_of_threads() -> None:
    pool = Pool("test", 3)
    meeting = threading.Barrier(4)
    for _ in range(3):
        pool.submit(lambda: meeting.wait(30))
    meeting.wait(30)
    assert pool.close(30)
    with pytest.raises(RuntimeError, match="no more"):
        pool.submit(lambda: None)


def test_a_job_that_hangs_does_not_hold_the_one_who_closes() -> None:
    pool = Pool("test", 1)
    go_on, done, closed = threading.Event(), threading.Event(), threading.Event()
    pool.submit(lambda: go_on.wait(30))
    pool.submit(done.set)
    assert not pool.close(0, closed.set)
    assert not closed.is_set()
    go_on.set()
    assert closed.wait(30)
    assert done.is_set(), "what comes last came before a job"


def test_a_job_that_fails_is_logged_and_the_next_runs(caplog: pytest.LogCaptureFixture) -> None:
    pool = Pool("test", 1)
    done = threading.Event()
    with caplog.at_level(logging.ERROR):
        pool.submit(lambda: 1 // 0)
        pool.submit(done.set)
        assert done.wait(30)
        assert pool.close(30)
    assert "ZeroDivisionError" in caplog.text
