"""The README and the pages of docs/: commands run or parse, options, files and links exist, blocks of code are valid,
tables are what `kompakt bench table` makes of the committed measurements.

What stands in a block, to be typed, is run, on a tiny model under the page's names. What is named in a sentence is
parsed: the measurements among it take minutes or a GPU.
"""

from __future__ import annotations

import ast
import importlib
import json
import re
import shutil
import tomllib
from itertools import pairwise
from pathlib import Path

import pytest
import typer
import yaml
from pages import (
    MORE,
    PAGES,
    ROOT,
    TABLE,
    Command,
    anchors,
    blocks,
    broken_links,
    commands,
    kompakt_words,
    options_of,
    spans,
)
from tiny import tiny_directory, write_text

from kompakt.cli.main import app, dashed, main
from kompakt.cli.session import UsageError
from kompakt.compress.recipe import Recipe, recipe_names

pytestmark = pytest.mark.usefixtures("one_thread")
FILES = sorted(file.name for file in (ROOT / "benchmarks").glob("*.json"))
TEXTS = {file: file.read_text("utf-8") for file in PAGES}
CLI = typer.main.get_command(app)
ROOMS = "benchmarks|cli|compress|docs|kernels|quant|recipes|sparsify|tests"
MODELS, RUN_DIRECTORIES = ("MODEL", "BASE", "demo/base"), ("DIR", "OTHER")
CALIBRATION = ["--num-calibration-samples", "4", "--max-seq-length", "32"]
EVALUATION = ["--evaluation-window", "32", "--evaluation-windows", "2"]
LONG = {
    "--retrieval": ["--retrieval-length", "200", "--retrieval-samples", "1", "--retrieval-tests", "needle"],
    "--generation": ["--generation-prompts", "1", "--generation-tokens", "8"],
}
SMALL = {
    "compress": [*CALIBRATION, *EVALUATION, "--overwrite"],
    "evaluate": ["--window", "200", "--windows", "2", "--no-speed"],
    "search": [*CALIBRATION, "--windows", "2", "--loss-windows", "1", "--rounds", "1"],
    "bench": [*CALIBRATION, "--window", "32", "--windows", "2"],
}
"""Behind the page's own options, of which the last one counts."""

by_page = pytest.mark.parametrize("file", PAGES, ids=lambda file: file.relative_to(ROOT).as_posix())


def parse(command: Command) -> None:
    """UsageError unless the command line takes the command, and ValueError if it names no command. Up to what a page
    leaves out, and in a sentence also without arguments, options are compared by name alone.
    """
    words = dashed(kompakt_words(command) or [])
    found, name = CLI, "kompakt"
    while hasattr(found, "commands") and words and words[0] != MORE:
        name = words.pop(0)
        if name not in found.commands:
            raise ValueError(f"there is no command {name}")
        found = found.commands[name]
    unknown = {word.partition("=")[0] for word in words if word.startswith("--")} - options_of(found)
    if unknown:
        raise ValueError(f"{name} has no option {', '.join(unknown)}")
    if MORE not in words and not hasattr(found, "commands"):
        try:
            found.make_context(name, list(words))
        except Exception as error:
            if command.whole or type(error).__name__ != "MissingParameter":
                raise


def check_recipe_names(words: list[str]) -> None:
    """ValueError for a recipe that does not ship."""
    for before, word in pairwise(words):
        names = word.split(",") if before in ("--recipe", "-r", "--recipes") else []
        for name in names:
            if not name.endswith(".yaml") and name not in recipe_names():
                raise ValueError(f"there is no recipe {name}")


@by_page
def test_commands_are_those_of_the_command_line(file):
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for command in commands(TEXTS[file]):
        words = list(command.words)
        if kompakt_words(command) is not None:
            parse(command)
            check_recipe_names(words)
        elif words[0] == "make":
            assert set(words[1:]) <= set(targets), command
        elif words[0] == "pip":
            assert words[:2] == ["pip", "install"] and set(re.findall(r"\[(\w+)\]", words[2])) <= set(extras), command
        else:
            assert words[0] == "pytest", f"{command}: nothing checks commands of {words[0]}"
            assert all((ROOT / word).exists() for word in words if word.endswith(".py")), command


@by_page
def test_options_and_files_exist(file):
    names = options_of(CLI)
    for span in spans(TEXTS[file]):
        if span.startswith("--"):
            assert {word for word in span.split() if word.startswith("--")} <= names, span
        elif re.fullmatch(rf"({ROOMS})/[\w./*-]*", span):
            assert list(ROOT.glob(span)) or (ROOT / span).exists(), span


@by_page
def test_links_resolve(file):
    assert broken_links(file, TEXTS[file]) == []


def test_pages_are_linked_from_the_readme():
    linked = set(re.findall(r"\]\(docs/([\w-]+\.md)", TEXTS[ROOT / "README.md"]))
    assert linked == {file.name for file in PAGES[1:]}


def test_the_readme_names_every_recipe():
    table = TEXTS[ROOT / "README.md"].partition("| recipe |")[2].partition("\n\n")[0]
    assert sorted(re.findall(r"`([\w-]+)`", "".join(re.findall(r"^\|(.+?)\|", table, re.MULTILINE)))) == recipe_names()


@by_page
def test_blocks_of_code_are_valid(file):
    for body in blocks(TEXTS[file], "yaml"):
        Recipe.load(yaml.safe_load(body))
    for body in blocks(TEXTS[file], "python"):
        for node in ast.walk(ast.parse(body)):
            if isinstance(node, ast.ImportFrom) and (node.level or (node.module or "").startswith("kompakt")):
                module = importlib.import_module(f"kompakt.quant.{node.module}" if node.level else str(node.module))
                assert all(hasattr(module, alias.name) for alias in node.names), ast.unparse(node)


@by_page
def test_tables_are_the_committed_measurements(file, tmp_path):
    page = tmp_path / file.relative_to(ROOT)
    page.parent.mkdir(exist_ok=True)
    page.write_text(TEXTS[file], "utf-8")
    shutil.copytree(ROOT / "benchmarks", tmp_path / "benchmarks")
    for name in TABLE.findall(TEXTS[file]):
        assert main(["bench", "table", str(page.parent / name), "--into", str(page)]) == 0
    assert page.read_text("utf-8") == TEXTS[file]


def test_every_measurement_is_shown():
    shown = {Path(name).name for text in TEXTS.values() for name in TABLE.findall(text)}
    assert shown == set(FILES)


@pytest.mark.parametrize("name", FILES)
def test_measurement_says_where_and_when(name):
    result = json.loads((ROOT / "benchmarks" / name).read_text("utf-8"))
    assert {"device", "torch", "transformers", "python"} <= set(result["environment"])
    assert result["kompakt"] and result["date"] and result["rows"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder that holds what the pages' commands name."""
    folder = tmp_path_factory.mktemp("pages")
    base = tiny_directory(folder / "MODEL", steps=20)
    for name in MODELS[1:]:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).symlink_to(base)
    for name in ("TEST.txt", "TEXT.txt", "TRAIN.txt"):
        write_text(folder / name)
    question = {"question": "Two and two?", "choices": ["four", "five"], "gold": 0}
    (folder / "questions.jsonl").write_text(3 * (json.dumps(question) + "\n"))
    (folder / "texts.jsonl").write_text(3 * (json.dumps({"context": "One, two,", "target": " three"}) + "\n"))
    cache = ["--recipe", "w4a8-kv4", "--set", "kv_cache.recent_tokens=8"]
    assert main(["compress", str(base), *cache, "-o", str(folder / "DIR"), *CALIBRATION, *EVALUATION]) == 0
    shutil.copytree(folder / "DIR", folder / "OTHER")
    return folder


@by_page
def test_typed_commands_run(file, folder, tmp_path, monkeypatch):
    monkeypatch.chdir(shutil.copytree(folder, tmp_path / "work", symlinks=True))
    for command in commands(TEXTS[file]):
        words = [word.removesuffix("...") for word in command.words]
        if not command.whole or words[0] != "kompakt":
            continue
        if "--tasks" in words:  # the harness, and data of the hub
            continue
        small = [*SMALL.get(words[1], []), *(item for name in LONG if name in words for item in LONG[name])]
        assert main([*words[1:], *small]) == 0, command


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("kompakt evaluat DIR", "no command evaluat"),
        ("kompakt evaluate DIR --agianst BASE", "no option --agianst"),
        ("kompakt bench weights --mehtods rtn", "no option --mehtods"),
        ("kompakt plan MODEL --batch", "requires an argument"),
        ("kompakt plan", "Missing parameter: model"),
        ("kompakt plan MODEL OTHER", "unexpected extra argument"),
        ("torchrun -m kompakt.cli.main compress --resum …", "no option --resum"),
    ],
)
def test_wrong_commands_are_found(text, error):
    (command,) = commands(f"```\n{text}\n```")
    with pytest.raises((ValueError, UsageError)) as found:
        parse(command)
    assert error in str(found.value)


def test_what_is_read_from_a_page(tmp_path):
    page = "# A `b` c, d\n\n`kompakt\nlist` and `--set`\n```\nkompakt plan X \\\n  --json # why\n```\n"
    page += "[x](y.md) [z](#a-b-c-d) [w](page.md#elsewhere) [v](https://example.org)"
    (tmp_path / "page.md").write_text(page)
    assert [str(item) for item in commands(page)] == ["kompakt plan X --json", "kompakt list"]
    assert spans(page) == ["b", "kompakt list", "--set"] and anchors(page) == {"a-b-c-d"}
    assert broken_links(tmp_path / "page.md", page) == ["y.md", "page.md#elsewhere"]
