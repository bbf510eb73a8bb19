"""The kernels' cache: kept, found again, thrown away when it is damaged, and never older than the sources.

Each process here is a child with a cache of its own and a set of kernels that compiles in a moment.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import llvmlite
import numba
import pytest
from llvmlite import binding as llvm

import pyvhost
from pyvhost.dataplane import policy

compiling = pytest.mark.skipif(policy.PLAIN, reason="nothing is compiled; the pass with the compiler has it")

KERNELS = """
from pyvhost.dataplane import policy

@policy.inline
def add(a, b):
    return a + b

@policy.kernel
def total(n):
    done = 0
    for i in range(n):
        done = add(done, i)
    return done

@policy.kernel
def twice(n):
    return add(n, n)
"""

RUN = """
import kernels
from pyvhost.dataplane import policy

policy.prepare("a small set", [(kernels.total, (1,)), (kernels.twice, (1,))])
hits = sum(sum(kernel.stats.cache_hits.values()) for kernel in (kernels.total, kernels.twice))
print(kernels.total(10), kernels.twice(4), hits, policy.CACHE)
"""


@dataclass
class Answer:
    """What a child said: the kernels' results, how many came from the cache, where that is, and standard error."""

    results: tuple[int, int]
    hits: int
    cache: str
    said: str

    @property
    def compiled(self) -> bool:
        return "compiling a small set for this machine, once ..." in self.said


@dataclass
class Child:
    """Runs of the same program, with the same cache."""

    folder: Path
    cache: Path
    environment: dict[str, str]

    def run(self, program: str = RUN) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-c", program],
            cwd=self.folder,
            env=os.environ | self.environment,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )

    def __call__(self) -> Answer:
        done = self.run()
        assert done.returncode == 0, done.stderr
        total, twice, hits, cache = done.stdout.split()
        return Answer((int(total), int(twice)), int(hits), cache, done.stderr)

    def files(self, suffix: str) -> list[Path]:
        """The cache's files: an index (.nbi) and machine code (.nbc) for each kernel."""
        return sorted(self.cache.rglob(f"*{suffix}"))


def new_child(folder: Path, cache: Path) -> Child:
    (folder / "kernels.py").write_text(KERNELS)
    return Child(folder, cache, {"PYVHOST_CACHE_DIR": str(cache), "NUMBA_DISABLE_JIT": "0"})


@pytest.fixture
def child(tmp_path: Path) -> Child:
    """One that was never run."""
    return new_child(tmp_path, tmp_path / "cache")


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> tuple[Child, Answer]:
    """One that was run once; its cache is to be copied, not touched."""
    folder = tmp_path_factory.mktemp("first")
    child = new_child(folder, folder / "cache")
    return child, child()


@pytest.fixture
def warm(first: tuple[Child, Answer], tmp_path: Path) -> Child:
    """The same program, with a copy of what the first run left."""
    origin, _ = first
    cache = tmp_path / "cache"
    shutil.copytree(origin.cache, cache)
    return Child(origin.folder, cache, origin.environment | {"PYVHOST_CACHE_DIR": str(cache)})


RIGHT = (45, 8)


@compiling
def test_the_first_start_compiles_and_says_so(first: tuple[Child, Answer]) -> None:
    child, answer = first
    assert (answer.results, answer.hits, answer.compiled) == (RIGHT, 0, True)
    assert answer.said.rstrip().endswith(" s")
    cache = Path(answer.cache)
    assert cache.parent == child.cache
    assert cache.stat().st_mode & 0o777 == 0o700
    assert all(path.is_relative_to(cache) for path in child.files(".nbc"))


@compiling
def test_the_second_start_loads_and_says_nothing(warm: Child) -> None:
    second = warm()
    assert (second.results, second.hits, second.said) == (RIGHT, 2, "")


@compiling
@pytest.mark.parametrize(
    ("suffix", "keep"),
    [(".nbc", 0.5), (".nbc", 0.0), (".nbi", 0.5)],
    ids=["code cut", "code empty", "index cut"],
)
def test_a_damaged_cache_is_thrown_away_and_made_again(warm: Child, suffix: str, keep: float) -> None:
    for path in warm.files(suffix):
        whole = path.read_bytes()
        path.write_bytes(whole[: int(len(whole) * keep)])
    assert warm().results == RIGHT


@compiling
def test_a_repaired_cache_ends_up_whole_and_silent(warm: Child) -> None:
    # One of two: what was good of the old cache is not in the new one.
    warm.files(".nbc")[-1].write_bytes(b"nonsense")
    assert warm().results == RIGHT
    assert warm().results == RIGHT
    last = warm()
    assert (last.results, last.hits, last.said) == (RIGHT, 2, "")


@compiling
def test_a_cache_that_was_never_finished_is_no_reason_to_fail(warm: Child) -> None:
    """A full disk cut a file before the set was marked as complete."""
    for path in warm.files(".ready"):
        path.unlink()
    for path in warm.files(".nbc"):
        path.write_bytes(path.read_bytes()[:100])
    assert warm().results == RIGHT


@compiling
def test_an_error_in_a_kernel_is_said_and_not_retried_for_ever(child: Child) -> None:
    (child.folder / "kernels.py").write_text(
        KERNELS.replace("return add(n, n)", "return n.nothing_of_the_sort")
    )
    done = child.run()
    assert done.returncode != 0
    assert "nothing_of_the_sort" in done.stderr


@compiling
def test_where_nothing_can_be_kept_it_works_all_the_same(child: Child) -> None:
    child.environment["PYVHOST_CACHE_DIR"] = "/dev/null/nowhere"
    answer = child()
    assert (answer.results, answer.hits, answer.cache) == (RIGHT, 0, "None")


@compiling
def test_two_at_once_both_get_there(child: Child) -> None:
    programs = [
        subprocess.Popen(
            [sys.executable, "-c", RUN],
            cwd=child.folder,
            env=os.environ | child.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    for program in programs:
        out, said = program.communicate(timeout=300)
        assert out.split()[:2] == ["45", "8"], said
    assert child().hits == 2


@compiling
def test_a_changed_helper_is_never_met_by_an_old_caller(child: Child) -> None:
    """Numba looks at the caller's own file alone; here the whole room's sources name the cache."""
    package = child.folder / "pyvhost"
    shutil.copytree(Path(pyvhost.__file__).parent, package, ignore=shutil.ignore_patterns("__pycache__"))
    room = package / "dataplane"
    helper = room / "helper.py"
    (room / "caller.py").write_text(
        "from pyvhost.dataplane import policy\n"
        "from pyvhost.dataplane.helper import number\n\n"
        "@policy.kernel\n"
        "def ask(n):\n"
        "    return number(n)\n"
    )
    program = "from pyvhost.dataplane.caller import ask\nprint(ask(1))"
    for number in (1, 2, 1):
        helper.write_text(
            "from pyvhost.dataplane import policy\n\n"
            "@policy.inline\n"
            "def number(n):\n"
            f"    return n * {number}\n"
        )
        done = child.run(program)
        assert done.stdout.strip() == str(number), done.stderr
    assert len(list(child.cache.iterdir())) == 2


# The key, in this process


@pytest.fixture
def room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the kernels' sources that the key is made of."""
    package = tmp_path / "package"
    for name in ("dataplane", "abi"):
        shutil.copytree(Path(pyvhost.__file__).parent / name, package / name)
    monkeypatch.setattr(policy, "_ROOM", package / "dataplane")
    return package


def test_the_key_changes_with_every_source(room: Path) -> None:
    keys = {policy._key()}
    for path in ("dataplane/access.py", "dataplane/split_ring.py", "abi/virtio.py"):
        source = room / path
        source.write_text(source.read_text() + "\n# a comment\n")
        keys.add(policy._key())
    (room / "dataplane/split_ring.py").rename(room / "dataplane/other_ring.py")
    keys.add(policy._key())
    (room / "dataplane/new.py").touch()
    keys.add(policy._key())
    assert len(keys) == 6
    assert policy._key() in keys
    # What is compiled or written beside them is no source.
    (room / "dataplane/notes.txt").write_text("notes")
    assert policy._key() in keys


def test_the_key_changes_with_what_compiles_and_for_what(monkeypatch: pytest.MonkeyPatch) -> None:
    keys = {policy._key()}
    for where, name, value in (
        (numba, "__version__", "99.0"),
        (llvmlite, "__version__", "99.0"),
        (sys, "version", "4.0"),
        (platform, "machine", lambda: "pdp11"),
        (llvm, "get_host_cpu_name", lambda: "a new one"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(where, name, value)
            keys.add(policy._key())
    assert len(keys) == 6
    assert policy._key() in keys


def test_where_the_cache_lies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYVHOST_CACHE_DIR", "/somewhere")
    assert policy.cache_directory().parent == Path("/somewhere")
    monkeypatch.delenv("PYVHOST_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", "/else/where")
    assert policy.cache_directory().parent == Path("/else/where/pyvhost")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/somebody")
    assert policy.cache_directory().parent == Path("/home/somebody/.cache/pyvhost")


def test_caches_that_nobody_used_for_long_are_retired(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYVHOST_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(numba.config, "CACHE_DIR", "")
    days = {"kernels-old": 31, "kernels-young": 29, "something-else": 300}
    for name, age in days.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").touch()
        then = time.time() - age * 86400
        os.utime(tmp_path / name, (then, then))
    here = policy._claim_cache()
    assert here == policy.cache_directory()
    assert {path.name for path in tmp_path.iterdir()} == {"kernels-young", "something-else", here.name}
    # One's own is in use.
    long_ago = time.time() - 100 * 86400
    os.utime(here, (long_ago, long_ago))
    assert policy._claim_cache() == here
    assert here.stat().st_mtime > long_ago
