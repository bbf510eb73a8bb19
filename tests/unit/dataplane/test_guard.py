"""The guard against SIGBUS and SIGSEGV: what fails in a case here ends the process it fails in, one of its own.

Promises: every child ends by itself or is told how it died. Never: raises either in the test process.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap

import pytest

# What each child starts with: a shared mapping of a memfd, as a front end hands one over.
PRELUDE = """
import ctypes, mmap, os, select, signal, threading
from pyvhost.dataplane import guard

PAGE = mmap.PAGESIZE

def mapping(pages):
    fd = os.memfd_create("guest")
    os.ftruncate(fd, pages * PAGE)
    memory = mmap.mmap(fd, pages * PAGE)
    return fd, memory, ctypes.addressof(ctypes.c_char.from_buffer(memory))

def heard(event):
    # Waits, without a limit: the test process has one.
    select.select([event], [], [])
    return int.from_bytes(os.read(event, 8), "little")
"""

both_modes = pytest.mark.parametrize("plain", [False, True], ids=["compiled", "plain"])


def child(script: str, plain: bool = False) -> subprocess.CompletedProcess[str]:
    environment = dict(os.environ)
    environment.pop("NUMBA_DISABLE_JIT", None)
    if plain:
        environment["NUMBA_DISABLE_JIT"] = "1"
    return subprocess.run(
        [sys.executable, "-c", PRELUDE + textwrap.dedent(script)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def succeeds(script: str, plain: bool = False) -> None:
    done = child(script, plain)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "the end\n"


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


# A worker's place: its rings, the first of which was lent `memory`, its control words, its list of pages.
SEATED = """
import numba, numpy as np
from pyvhost.dataplane import blocks
from pyvhost.dataplane.access import load64_acquire, store64

libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_void_p
NOREPLACE = 0x100022  # MAP_FIXED_NOREPLACE, MAP_ANONYMOUS, MAP_PRIVATE

def unmap(address, length):
    assert libc.munmap(ctypes.c_void_p(address), ctypes.c_size_t(length)) == 0

def remap(address, length, flags=NOREPLACE):
    return libc.mmap(
        ctypes.c_void_p(address), ctypes.c_size_t(length), 3, flags, -1, ctypes.c_long(0)
    ) == address

def anywhere(pages):
    # Between two holes, so that nobody's neighbour is unmapped with it.
    address = libc.mmap(None, ctypes.c_size_t((pages + 2) * PAGE), 3, 0x22, -1, ctypes.c_long(0))
    unmap(address, PAGE)
    unmap(address + (pages + 1) * PAGE, PAGE)
    return address + PAGE

class Seat:
    def __init__(self, address, length):
        self.rings = np.zeros(blocks.MAX_RINGS, blocks.RING)
        self.control = np.zeros(8, np.int64)
        self.pages = np.zeros(1 + guard.LOST_PAGES, np.int64)
        self.regions = np.array([[0, length, address, 0, 3]], np.int64)
        ring = self.rings[blocks.MAX_RINGS - 1]
        ring["own"] = ring["located"] = ring["region_count"] = 1
        ring["regions"] = self.regions.ctypes.data
        self.seat = guard.take_seat(*(x.ctypes.data for x in (self.rings, self.control, self.pages)))

    @property
    def stopped(self):
        return self.control[blocks.CONTROL_STOP] == 1

    @property
    def found(self):
        return self.pages[1 : 1 + self.pages[0]].tolist()

guard.install(lent=True)
"""


def seated(script: str, plain: bool = False) -> subprocess.CompletedProcess[str]:
    return child(SEATED + textwrap.dedent(script), plain)


def goes_on(script: str, plain: bool = False) -> None:
    done = seated(script, plain)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "the end\n"


@both_modes
def test_lent_memory_that_is_unmapped_becomes_a_page_of_zeros(plain: bool) -> None:
    goes_on(
        """
        address = anywhere(8)
        ctypes.memset(address, 0xAA, 8 * PAGE)
        # It needs no alignment: what counts is pages that have any of it.
        seat = Seat(address + 100, 6 * PAGE)
        unmap(address, 8 * PAGE)
        guard.enter(seat.seat)
        found = ctypes.string_at(address + 2 * PAGE + 4090, 12)
        guard.leave(seat.seat)
        assert found == bytes(12)
        assert seat.stopped and seat.found == [address + 2 * PAGE, address + 3 * PAGE]
        # No more than was touched: all the rest is free.
        assert remap(address, 2 * PAGE) and remap(address + 4 * PAGE, 4 * PAGE)
        # Its owner may put something else there, and has it.
        assert remap(address + 2 * PAGE, PAGE, 0x32)
        print("the end")
        """,
        plain,
    )


@pytest.mark.parametrize("what", ["desc", "avail", "used", "log_data", "log_used"])
def test_a_rings_parts_and_its_log_are_lent_as_well(what: str) -> None:
    goes_on(
        f"""
        address = anywhere(1)
        seat = Seat(0, 0)
        ring = seat.rings[-1]
        ring["region_count"] = 0
        ring["num"], ring["log_bytes"] = 16, 100
        ring[{what!r}] = address + 8
        unmap(address, PAGE)
        guard.enter(seat.seat)
        assert ctypes.string_at(address + 50, 1) == bytes(1)
        guard.leave(seat.seat)
        assert seat.stopped and seat.found == [address]
        print("the end")
        """
    )


@pytest.mark.parametrize(
    "change",
    [
        "guard.leave(seat.seat)",
        "guard.leave_seat(seat.seat)",
        "seat.rings[-1]['own'] = 0",
        "seat.rings[-1]['located'] = 0",
        "seat.regions[0][1] = 0",
        "seat.regions[0][4] = 0",
        "address += PAGE",
    ],
)
def test_what_was_not_lent_still_kills(change: str) -> None:
    done = seated(
        f"""
        address = anywhere(2)
        seat = Seat(address, PAGE)
        guard.enter(seat.seat)
        {change}
        unmap(address // PAGE * PAGE, PAGE)
        ctypes.string_at(address, 1)
        """
    )
    assert done.returncode == -signal.SIGSEGV


@pytest.mark.parametrize("rights", ["mmap.PROT_READ", "0"])
def test_what_is_mapped_and_may_not_be_written_still_kills(rights: str) -> None:
    done = seated(
        f"""
        address = anywhere(1)
        seat = Seat(address, PAGE)
        guard.enter(seat.seat)
        libc.mprotect(ctypes.c_void_p(address), ctypes.c_size_t(PAGE), {rights})
        ctypes.memset(address, 1, 1)
        """
    )
    assert done.returncode == -signal.SIGSEGV


def test_another_threads_fault_in_lent_memory_is_its_own() -> None:
    """While a worker is in its loop: faulthandler, which was there before, names the thread that it was."""
    done = child(
        "import faulthandler; faulthandler.enable()\n"
        + SEATED
        + textwrap.dedent(
            """
            address = anywhere(1)
            seat = Seat(address, PAGE)
            inside, out = threading.Event(), threading.Event()
            def work():
                guard.enter(seat.seat)
                inside.set()
                out.wait()
            threading.Thread(target=work, daemon=True).start()
            inside.wait()
            # Not before: what is mapped for the thread might come to lie there.
            unmap(address, PAGE)
            ctypes.string_at(address, 1)
            """
        )
    )
    assert done.returncode == -signal.SIGSEGV
    assert "Fatal Python error: Segmentation fault" in done.stderr


def test_a_forked_childs_fault_is_its_own() -> None:
    """Its only thread has the number that a worker's had, if it was the worker's that forked."""
    goes_on(
        """
        address = anywhere(1)
        seat = Seat(address, PAGE)
        unmap(address, PAGE)
        guard.enter(seat.seat)
        child = os.fork()
        if child == 0:
            ctypes.string_at(address, 1)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGSEGV
        print("the end")
        """
    )


def test_what_somebody_maps_meanwhile_is_never_replaced() -> None:
    goes_on(
        """
        @numba.njit(nogil=True)
        def look(address, ended):
            looked = 0
            while load64_acquire(ended) == 0:
                load64_acquire(address)
                looked += 1
            return looked

        address = anywhere(1)
        seat = Seat(address, PAGE)
        ended = ctypes.c_int64(1)
        look(address, ctypes.addressof(ended))
        ended.value = 0
        def work():
            guard.enter(seat.seat)
            look(address, ctypes.addressof(ended))
            guard.leave(seat.seat)
        worker = threading.Thread(target=work)
        worker.start()
        mine = guards = 0
        while mine < 300 or guards < 300:
            unmap(address, PAGE)
            if remap(address, PAGE):
                ctypes.memset(address, 0x5A, 8)
                os.sched_yield()
                assert ctypes.string_at(address, 8) == b"Z" * 8
                mine += 1
            else:
                # The guard was faster.
                guards += 1
            if guards < 300:
                unmap(address, PAGE)
                while not seat.pages[0]:
                    os.sched_yield()
                guards += 1
            seat.pages[0] = 0
        ended.value = 1
        worker.join()
        print("the end")
        """
    )


def test_seats_are_given_back_and_run_out() -> None:
    goes_on(
        """
        import errno
        taken = [guard.take_seat(0, 0, 0) for _ in range(guard.SEATS)]
        try:
            guard.take_seat(0, 0, 0)
        except OSError as error:
            assert error.errno == errno.ENOSPC
        else:
            raise AssertionError
        guard.leave_seat(taken.pop())
        # A full house is searched to its end.
        address = anywhere(1)
        seat = Seat(address, PAGE)
        unmap(address, PAGE)
        guard.enter(seat.seat)
        assert ctypes.string_at(address, 1) == bytes(1)
        print("the end")
        """
    )


def test_more_pages_than_can_be_listed() -> None:
    goes_on(
        """
        pages = guard.LOST_PAGES + 20
        address = anywhere(pages)
        seat = Seat(address, pages * PAGE)
        unmap(address, pages * PAGE)
        guard.enter(seat.seat)
        assert not any(ctypes.c_char.from_address(address + i * PAGE).value != bytes(1) for i in range(pages))
        guard.leave(seat.seat)
        assert seat.found == [address + i * PAGE for i in range(guard.LOST_PAGES)]
        print("the end")
        """
    )
