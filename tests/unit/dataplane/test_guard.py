"""The guard against SIGBUS: what fails in a case here ends the process it fails in, one of its own."""

from __future__ import annotations

import signal
import textwrap

import pytest

from guard_child import both_modes, child, succeeds


@both_modes
def test_a_shrunk_mapping_becomes_zeros_and_the_others_keep_their_bytes(plain: bool) -> None:
    succeeds(
        """
        event = guard.install()
        _, other, other_address = mapping(2)
        other[:5] = b"alive"
        fd, memory, address = mapping(4)
        memory[:] = b"x" * (4 * PAGE)
        other_slot = guard.protect(other_address, 2 * PAGE)
        slot = guard.protect(address, 4 * PAGE)
        os.ftruncate(fd, PAGE)
        assert not guard.lost(slot)
        view = memoryview(memory)
        assert view[3 * PAGE] == 0
        assert guard.lost(slot) and not guard.lost(other_slot)
        assert heard(event) == 1
        # The whole mapping, not only what was cut off: nothing of it is the guest's any more.
        assert view[0] == 0
        view[2 * PAGE] = 7
        assert view[2 * PAGE] == 7
        assert other[:5] == b"alive"
        assert os.fstat(fd).st_size == PAGE
        print("the end")
        """,
        plain,
    )


def test_a_compiled_loop_without_the_gil_goes_on_over_zeros() -> None:
    succeeds(
        """
        from pyvhost.dataplane.access import load64_acquire, store64_release
        import numba

        @numba.njit(nogil=True)
        def until_zero(address, started):
            rounds = 0
            while load64_acquire(address) != 0:
                store64_release(started, 1)
                rounds += 1
            return rounds

        event = guard.install()
        fd, memory, address = mapping(2)
        memory[PAGE] = 1
        started = ctypes.c_int64(0)
        slot = guard.protect(address, 2 * PAGE)
        ended = []
        def work():
            ended.append(until_zero(address + PAGE, ctypes.addressof(started)))
        workers = [threading.Thread(target=work) for _ in range(2)]
        for worker in workers:
            worker.start()
        while started.value == 0:
            os.sched_yield()
        os.ftruncate(fd, 0)
        # This thread hears of it while the workers are in machine code.
        assert heard(event) >= 1 and guard.lost(slot)
        for worker in workers:
            worker.join()
        assert len(ended) == 2 and min(ended) >= 0
        print("the end")
        """
    )


def test_a_system_call_into_a_shrunk_mapping_fails_and_marks_nothing() -> None:
    succeeds(
        """
        import errno
        guard.install()
        fd, memory, address = mapping(1)
        slot = guard.protect(address, PAGE)
        os.ftruncate(fd, 0)
        reader, writer = os.pipe()
        os.write(writer, b"frame")
        for call in (lambda: os.readv(reader, [memory]), lambda: os.writev(writer, [memory])):
            try:
                call()
            except OSError as error:
                assert error.errno == errno.EFAULT, error
            else:
                raise AssertionError("the kernel reached memory that is gone")
        assert not guard.lost(slot)
        # Whoever got EFAULT looks for himself, and the guard hears of it.
        assert memory[0] == 0 and guard.lost(slot)
        print("the end")
        """
    )


@both_modes
def test_errno_survives_the_handler(plain: bool) -> None:
    succeeds(
        """
        guard.install()
        fd, memory, address = mapping(1)
        guard.protect(address, PAGE)
        os.ftruncate(fd, 0)
        # A full eventfd: the handler's own write fails with EAGAIN.
        os.write(guard.install(), (2**64 - 2).to_bytes(8, "little"))
        libc = ctypes.CDLL(None, use_errno=True)
        memcpy = ctypes.CFUNCTYPE(
            ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, use_errno=True
        )(("memcpy", libc))
        ctypes.set_errno(4711)
        memcpy(address, ctypes.create_string_buffer(8), 8)
        assert ctypes.get_errno() == 4711
        print("the end")
        """,
        plain,
    )


def test_a_slot_is_used_again_and_forgets() -> None:
    succeeds(
        """
        guard.install()
        fd, memory, address = mapping(1)
        slot = guard.protect(address, PAGE)
        os.ftruncate(fd, 0)
        assert memory[0] == 0 and guard.lost(slot)
        guard.release(slot)
        _, second, second_address = mapping(1)
        assert guard.protect(second_address, PAGE) == slot
        assert not guard.lost(slot)
        print("the end")
        """
    )


def test_a_page_of_the_mapping_is_replaced_where_the_whole_cannot_be() -> None:
    succeeds(
        """
        import resource
        guard.install()
        fd, memory, address = mapping(4)
        # 2**40 bytes from there overlap the rest of the process: they are not to be replaced, and are
        # not, because the address space is at its limit.
        slot = guard.protect(address, 1 << 40)
        os.ftruncate(fd, 0)
        used = int(open("/proc/self/statm").read().split()[0]) * PAGE
        resource.setrlimit(resource.RLIMIT_AS, (used, used))
        assert memory[PAGE] == 0 and memory[3 * PAGE] == 0
        assert guard.lost(slot)
        print("the end")
        """
    )


@both_modes
def test_a_bus_error_elsewhere_still_kills(plain: bool) -> None:
    done = child(
        """
        guard.install()
        fd, memory, address = mapping(2)
        guard.protect(address, PAGE)
        os.ftruncate(fd, 0)
        assert memory[0] == 0
        print("guarded", flush=True)
        memory[PAGE]
        print("survived")
        """,
        plain,
    )
    assert done.stdout == "guarded\n"
    assert done.returncode == -signal.SIGBUS


def test_released_memory_is_not_guarded() -> None:
    done = child(
        """
        guard.install()
        fd, memory, address = mapping(1)
        guard.release(guard.protect(address, PAGE))
        os.ftruncate(fd, 0)
        memory[0]
        """
    )
    assert done.returncode == -signal.SIGBUS


@pytest.mark.parametrize("order", ["before", "after", "between"])
def test_an_earlier_handler_has_its_say_when_the_process_dies(order: str) -> None:
    enable = "import faulthandler; faulthandler.enable()\n"
    install = "guard.install()\n"
    steps = {"before": enable + install, "after": install + enable, "between": install + enable + install}
    done = child(
        steps[order]
        + textwrap.dedent(
            """
            fd, memory, address = mapping(1)
            os.ftruncate(fd, 0)
            memory[0]
            """
        )
    )
    assert done.returncode == -signal.SIGBUS
    assert "Fatal Python error: Bus error" in done.stderr


def test_faulthandler_enabled_afterwards_is_covered_by_a_second_install() -> None:
    succeeds(
        """
        import faulthandler
        event = guard.install()
        faulthandler.enable()
        assert guard.install() == event
        fd, memory, address = mapping(1)
        slot = guard.protect(address, PAGE)
        os.ftruncate(fd, 0)
        assert memory[0] == 0 and guard.lost(slot)
        print("the end")
        """
    )


def test_a_signal_that_was_sent_kills_as_it_would_have() -> None:
    done = child(
        """
        guard.install()
        os.kill(os.getpid(), signal.SIGBUS)
        signal.pause()
        """
    )
    assert done.returncode == -signal.SIGBUS


def test_what_cannot_be_guarded_is_refused() -> None:
    succeeds(
        """
        import errno
        def refused(error, call, *arguments):
            try:
                call(*arguments)
            except error as caught:
                return caught
            raise AssertionError(arguments)

        refused(RuntimeError, guard.protect, PAGE, PAGE)
        guard.install()
        base = 1 << 40
        slot = guard.protect(base, 4 * PAGE - 1)
        for address, length in (
            (base + 1, PAGE), (base, 0), (base, -PAGE), (0, PAGE), (-PAGE, PAGE), (base, 1 << 63),
            (base, PAGE), (base - PAGE, 2 * PAGE), (base + 3 * PAGE, PAGE), (base - PAGE, 8 * PAGE),
        ):
            refused(ValueError, guard.protect, address, length)
        for bad in (-1, slot + 1, 1 << 70):
            refused(KeyError, guard.release, bad)
            refused(KeyError, guard.lost, bad)
        guard.protect(base - PAGE, PAGE)
        guard.protect(base + 4 * PAGE, PAGE)
        guard.release(slot)
        refused(KeyError, guard.release, slot)

        taken = [guard.protect((2 << 40) + i * PAGE, PAGE) for i in range(guard.CAPACITY - 2)]
        assert refused(OSError, guard.protect, 3 << 40, PAGE).errno == errno.ENOSPC
        # A full table is searched to its end.
        guard.release(taken.pop())
        fd, memory, address = mapping(1)
        last = guard.protect(address, PAGE)
        os.ftruncate(fd, 0)
        assert memory[0] == 0 and guard.lost(last)
        print("the end")
        """
    )


def test_threads_that_lose_their_memory_at_once_all_go_on() -> None:
    succeeds(
        """
        event = guard.install()
        guests = [mapping(8) for _ in range(16)]
        slots = [guard.protect(address, 8 * PAGE) for _, _, address in guests]
        gate = threading.Barrier(4 * len(guests))
        wrong = []
        def touch(memory, page):
            gate.wait()
            # memmove holds the GIL; the signal comes all the same.
            if memory[page * PAGE : page * PAGE + 8] != bytes(8):
                wrong.append(page)
        workers = [
            threading.Thread(target=touch, args=(guest[1], page)) for guest in guests for page in range(4)
        ]
        for fd, _, _ in guests:
            os.ftruncate(fd, 0)
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        assert not wrong and all(map(guard.lost, slots))
        assert heard(event) >= len(guests)
        print("the end")
        """
    )
