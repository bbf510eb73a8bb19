"""`pyvhost top` as a command: tables, JSON lines, the terminal, Prometheus."""

from __future__ import annotations

import argparse
import json
import os
import pty
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from pyvhost.cli import top
from pyvhost.vhost.counters import CounterFile

COMMAND = (
    "import argparse, sys; from pyvhost.cli import top; p = argparse.ArgumentParser();"
    "top.add_arguments(p); sys.exit(top.run(p.parse_args()))"
)


@pytest.fixture
def counters(tmp_path: Path) -> Iterator[CounterFile]:
    with CounterFile(("packets", "bytes", "drops"), tmp_path / "counters") as file:
        file.row({"device": "vm0", "kind": "net", "queue": "rx0", "backend": "null"})[:] = 5, 300, 1
        yield file


def arguments(counters: CounterFile, *more: str) -> list[str]:
    assert counters.path is not None
    return ["--interval", "0.05", "--directory", str(counters.path.parent), *more]


def parsed(*text: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    top.add_arguments(parser)
    return parser.parse_args(text)


def environment(**more: str) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **more}


def test_one_look(counters: CounterFile, capsys: pytest.CaptureFixture[str]) -> None:
    assert top.run(parsed(*arguments(counters, "--once"))) == 0
    out = capsys.readouterr().out
    assert "vm0" in out
    assert "1 process, 1 device: 0 packets/s" in out


def test_one_look_as_json(counters: CounterFile, capsys: pytest.CaptureFixture[str]) -> None:
    assert top.run(parsed(*arguments(counters, "--once", "--json"))) == 0
    data = json.loads(capsys.readouterr().out)
    (queue,) = data["processes"][0]["queues"]
    assert queue["counters"] == {"packets": 5, "bytes": 300, "drops": 1}
    assert queue["rates"]["packets"] == 0


def test_json_lines_until_the_reader_has_enough(counters: CounterFile) -> None:
    command = [sys.executable, "-c", COMMAND, *arguments(counters, "--json")]
    with subprocess.Popen(
        command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        lines = [json.loads(process.stdout.readline()) for _ in range(3)]
        process.stdout.close()
        assert process.wait(30) == 0
        assert process.stderr.read() == ""
    assert lines[0]["interval"] is None
    assert lines[1]["interval"] > 0
    assert lines[2]["time"] > lines[1]["time"]


def test_live_on_a_terminal_until_interrupted(counters: CounterFile) -> None:
    ours, theirs = pty.openpty()
    command = [sys.executable, "-c", COMMAND, *arguments(counters)]
    terminal = environment(TERM="xterm", COLUMNS="100", LINES="30")
    with subprocess.Popen(command, env=terminal, stdin=theirs, stdout=theirs, stderr=theirs) as process:
        os.close(theirs)
        shown = b""
        interrupted = False
        while True:
            try:
                data = os.read(ours, 65536)
            except OSError:  # EIO: the other side has closed
                break
            if not data:
                break
            shown += data
            if shown.count(b"vm0") >= 3 and not interrupted:
                process.send_signal(signal.SIGINT)
                interrupted = True
        assert process.wait(30) == 0
    os.close(ours)
    assert b"\x1b[?1049h" in shown, "it has its own screen"
    assert b"vm0" in shown.rpartition(b"\x1b[?1049l")[2], "and leaves the last table behind"
    assert b"Traceback" not in shown


def test_prometheus_on_loopback(counters: CounterFile) -> None:
    command = [sys.executable, "-c", COMMAND, *arguments(counters, "--prometheus", "0")]
    with subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        said = process.stdout.readline()
        url = said.split()[-1]
        assert url.startswith("http://127.0.0.1:")
        with urllib.request.urlopen(url, timeout=30) as answer:
            text = answer.read().decode()
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 0
    assert f'pyvhost_packets_total{{backend="null",device="vm0",kind="net",pid="{os.getpid()}"' in text


def test_prometheus_where_one_can_not_listen(capsys: pytest.CaptureFixture[str]) -> None:
    assert top.run(parsed("--prometheus", "203.0.113.1:9")) == 1
    assert "can't listen at 203.0.113.1 port 9" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "means"),
    [
        ("9100", ("127.0.0.1", 9100)),
        ("0.0.0.0:9100", ("0.0.0.0", 9100)),
        ("[::1]:9100", ("::1", 9100)),
    ],
)
def test_endpoints(text: str, means: tuple[str, int]) -> None:
    assert parsed("--prometheus", text).prometheus == means


@pytest.mark.parametrize(
    "wrong",
    [
        ("--prometheus", "host"),
        ("--prometheus", ":9100"),
        ("--prometheus", "65536"),
        ("--prometheus", "::"),
        ("--interval", "0"),
        ("--interval", "nan"),
        ("--interval", "often"),
    ],
)
def test_wrong_options_are_refused(wrong: tuple[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        parsed(*wrong)
    assert end.value.code == 2
    assert wrong[0] in capsys.readouterr().err
