"""The guard over memory that was lent and is unmapped (SIGSEGV): each case in a process of its own."""

from __future__ import annotations

import signal
import subprocess
import textwrap

import pytest

from guard_child import both_modes, child

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
