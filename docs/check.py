"""Checks what documentation can get wrong by itself: links that lead nowhere, commands that do not exist.

Promises: every relative link and anchor of every Markdown file of the project is looked up, and every `pyvhost`,
`pyvhost-*` and `./run` command in a fenced block is held against the program's own help. Exit status 1, and a line
for each fault, if there is one. Never opens a connection, never runs a shown command but for its `--help`.
"""

from __future__ import annotations

import functools
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote

ROOT = Path(__file__).resolve().parent.parent
SHELL = {"sh", "bash", "console", "shell"}
FENCE = re.compile(r"^ *```+ *([\w-]*)[^\n]*\n(.*?)^ *```+ *$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"!?\[(?:[^\[\]]|\[[^\]]*\])*\]\(\s*<?([^)\s>]+)>?(?:\s+\"[^\"]*\")?\s*\)")


def pages() -> list[Path]:
    """The Markdown files that are, or are about to be, the project's."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", "*.md"]
    try:
        listed = subprocess.run(command, check=True, cwd=ROOT, capture_output=True, text=True).stdout
        found = [ROOT / name for name in listed.split("\0") if name]
    except (FileNotFoundError, subprocess.CalledProcessError):  # no git, or an unpacked archive
        parts = (page.relative_to(ROOT).parts for page in ROOT.rglob("*.md"))
        found = [ROOT.joinpath(*each) for each in parts if not any(part.startswith(".") for part in each)]
    return sorted(path for path in found if path.is_file())


def without_code(text: str) -> str:
    """The text with code blanked, for what looks like a link there is none."""
    return re.sub(r"`[^`\n]*`", "", FENCE.sub("", text))


@functools.cache
def anchors(page: Path) -> frozenset[str]:
    """What `#...` may follow a link to the page: its headings, as the forges write them."""
    found: set[str] = set()
    for heading in re.findall(r"^#{1,6} +(.+?)(?: +#+)?$", FENCE.sub("", page.read_text()), re.MULTILINE):
        text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower()
        slug = re.sub(r"[^\w\- ]", "", text).replace(" ", "-")
        number = 0
        while (unique := f"{slug}-{number}" if number else slug) in found:
            number += 1
        found.add(unique)
    return frozenset(found)


def wrong_links(page: Path) -> Iterator[str]:
    """A line for each relative link of the page that leads nowhere."""
    for target in LINK.findall(without_code(page.read_text())):
        if re.match(r"[a-z][a-z0-9+.-]*:", target):
            continue
        path, _, anchor = unquote(target).partition("#")
        goal = page if not path else (ROOT / path[1:] if path.startswith("/") else page.parent / path)
        if not goal.exists():
            yield f"no such file: {target}"
        elif anchor and goal.suffix == ".md" and anchor not in anchors(goal.resolve()):
            yield f"no such heading: {target}"


def commands(page: Path) -> Iterator[list[str]]:
    """The words of each command of ours in the page's shell blocks."""
    for language, block in FENCE.findall(page.read_text()):
        if language not in SHELL:
            continue
        for line in block.replace("\\\n", " ").splitlines():
            line = re.sub(r"^\s*[$#] ", "", line)
            if not re.search(r"(?:^|\s)(?:\S*/)?(?:pyvhost|run)", line):
                continue
            for words in simple_commands(line):
                if words[0] == "./run" or re.fullmatch(r"pyvhost(-\w+)?", words[0]):
                    yield words


def simple_commands(line: str) -> Iterator[list[str]]:
    """A line's commands, each without redirections, `sudo`, and assignments before it."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
    lexer.whitespace_split = True
    command: list[str] = []
    for word in [*lexer, ";"]:
        if set(word) <= set("();<>|&"):
            while command and (command[0] == "sudo" or re.match(r"\w+=", command[0])):
                command.pop(0)
            if command:
                yield command
            command = []
        else:
            command.append(word)


@functools.cache
def help_of(*command: str) -> str:
    """What the command says of itself, or nothing if there is no such command."""
    if command[0] == "./run":
        argv = ["./run", "help"]
    else:
        argv = [str(Path(sys.executable).with_name(command[0])), *command[1:], "--help"]
    try:
        done = subprocess.run(argv, check=False, cwd=ROOT, capture_output=True, text=True, timeout=60)
    except FileNotFoundError:
        return ""
    return done.stdout if done.returncode == 0 else ""


def wrong_commands(page: Path) -> Iterator[str]:
    """A line for each command of the page that the program would not take."""
    for words in commands(page):
        shown = " ".join(words)
        if words[0] == "./run":
            if len(words) > 1 and not re.search(
                rf"^  {re.escape(words[1])}\b", help_of("./run"), re.MULTILINE
            ):
                yield f"no such verb: {shown}"
            continue
        command = words[:1]
        text = help_of(*command)
        for word in words[1:]:
            choices = re.findall(r"\{([\w,-]+)\}", text)
            if not any(word in each.split(",") for each in choices):
                break
            command.append(word)
            text = help_of(*command)
        if not text:
            yield f"no such command: {shown}"
            continue
        for word in words[len(command) :]:
            option = word.partition("=")[0]
            if re.fullmatch(r"--?[a-z][\w-]*", option) and not re.search(
                rf"(?<![\w-]){option}(?![\w-])", text
            ):
                yield f"no option {option}: {shown}"


def main() -> int:
    """Checks every page; the exit status."""
    faults = 0
    checked = pages()
    for page in checked:
        for fault in (*wrong_links(page), *wrong_commands(page)):
            faults += 1
            print(f"{page.relative_to(ROOT)}: {fault}")
    print(f"{len(checked)} pages, {faults} faults")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
