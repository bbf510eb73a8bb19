"""Eventfds: told from everything else, as the kernel's vhost tells them."""

from __future__ import annotations

import errno
import os
import select
import socket
import tempfile

import pytest

from pyvhost.host import eventfd


def test_signals_add_up_and_draining_takes_them_all() -> None:
    fd = eventfd.create()
    try:
        assert eventfd.drain(fd) == 0
        eventfd.signal(fd)
        eventfd.signal(fd)
        assert eventfd.drain(fd) == 2
        assert eventfd.drain(fd) == 0
    finally:
        os.close(fd)


def test_a_full_counter_takes_another_signal_without_blocking() -> None:
    fd = eventfd.create()
    try:
        os.eventfd_write(fd, 2**64 - 2)
        eventfd.signal(fd)
        assert eventfd.drain(fd) == 2**64 - 2
    finally:
        os.close(fd)


def test_an_eventfd_passes_and_becomes_non_blocking() -> None:
    fd = os.eventfd(0, os.EFD_CLOEXEC)
    try:
        assert os.get_blocking(fd)
        eventfd.require(fd)
        assert not os.get_blocking(fd)
    finally:
        os.close(fd)


def test_a_closed_descriptor_is_ebadf() -> None:
    fd = eventfd.create()
    os.close(fd)
    for bad in (fd, -1):
        with pytest.raises(OSError, match=f"descriptor {bad}") as caught:
            eventfd.require(bad)
        assert caught.value.errno == errno.EBADF


def test_everything_else_is_einval_and_left_as_it_was() -> None:
    reader, writer = os.pipe()
    memory = os.memfd_create("not an eventfd")
    epoll = select.epoll()
    with socket.socket() as sock, tempfile.TemporaryFile() as file:
        for fd in (reader, writer, memory, epoll.fileno(), sock.fileno(), file.fileno()):
            with pytest.raises(OSError, match="is not an eventfd") as caught:
                eventfd.require(fd)
            assert caught.value.errno == errno.EINVAL
            assert os.get_blocking(fd)
    epoll.close()
    for fd in (reader, writer, memory):
        os.close(fd)
