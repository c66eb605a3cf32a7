"""What the pages of the documentation say that can be checked: commands, options, blocks of code, links, tables.

A command is a line of a code block without a language, or a span of code that begins with a program's name.
"""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PROGRAMS = ("kompakt", "make", "pip", "pytest", "torchrun")
MORE = "…"
"""Stands for what a page leaves out of a command."""
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
TABLE = re.compile(r"<!-- (\S+\.json) -->\n.*?<!-- end -->", re.DOTALL)


@dataclass(frozen=True)
class Command:
    """Words of one command. whole: it stands in a block of its own, to be typed as it is."""

    words: tuple[str, ...]
    whole: bool

    def __str__(self) -> str:
        return shlex.join(self.words)


def blocks(page: str, language: str) -> list[str]:
    """Code blocks of one language; "" is what is typed into a shell."""
    return [body for found, body in FENCE.findall(page) if found == language]


def spans(page: str) -> list[str]:
    """Code inside sentences and tables, on one line each."""
    return [" ".join(span.split()) for span in re.findall(r"(?<!`)`([^`]+)`(?!`)", FENCE.sub("", page))]


def commands(page: str) -> list[Command]:
    """All of a page, in the order of their kind: blocks first."""
    typed = [line for body in blocks(page, "") for line in body.replace("\\\n", " ").splitlines()]
    found = [Command(tuple(words), True) for line in typed if (words := shlex.split(line, comments=True))]
    named = [shlex.split(span) for span in spans(page) if span.split()[0] in PROGRAMS]
    return found + [Command(tuple(words), False) for words in named]


def kompakt_words(command: Command) -> list[str] | None:
    """What follows `kompakt`, or its module under another launcher; None if the command is of another program."""
    words = list(command.words)
    if words[0] == "kompakt":
        return words[1:]
    return words[words.index("kompakt.cli.main") + 1 :] if "kompakt.cli.main" in words else None


def options_of(command: Any) -> set[str]:
    """Names of all options of a command of the command line, and of those below it."""
    written = [name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)]
    names = {name for name in written if name.startswith("-")} | {"--help"}
    return names.union(*(options_of(below) for below in getattr(command, "commands", {}).values()))


def anchors(page: str) -> set[str]:
    """What links into a page may name, as GitHub makes it from headings."""
    headings = re.findall(r"^#+ (.+)$", FENCE.sub("", page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def broken_links(file: Path, page: str) -> list[str]:
    """Relative links of a page that lead nowhere."""
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", FENCE.sub("", page)):
        if re.match(r"https?:", target):
            continue
        path, _, anchor = target.partition("#")
        there = (file.parent / path).resolve() if path else file
        if not there.exists() or (anchor and anchor not in anchors(there.read_text("utf-8"))):
            broken.append(target)
    return broken
