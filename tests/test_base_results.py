"""Results of a base model that are kept: read only where nothing that they depend on has changed, and said so."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from tiny import tiny_directory, write_text

from kompakt.cli.main import main
from kompakt.compress import RetrievalOptions, assess, base_results, evaluate, evaluation_retrieval
from kompakt.compress.base_results import BaseResults, results_folder
from kompakt.compress.recipe import EvaluationOptions

pytestmark = pytest.mark.usefixtures("one_thread")
ROWS = [
    {"question": "Which is a statement?", "choices": ["return", "yellow", "a + b"], "gold": 0},
    {"question": "What holds names?", "choices": ["a namespace", "spam"], "gold": 0},
    {"question": "What is raised?", "choices": ["a flag", "an exception", "dust"], "gold": 1},
]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny_directory(tmp_path_factory.mktemp("base") / "tiny", steps=5)


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    """Another model with the same tokenizer, which stands for a recipe of the base."""
    return tiny_directory(tmp_path_factory.mktemp("other") / "other", steps=2)


@pytest.fixture
def files(tmp_path, monkeypatch):
    monkeypatch.setenv("KOMPAKT_CACHE", str(tmp_path / "cache"))
    (tmp_path / "choices.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (tmp_path / "words.jsonl").write_text(json.dumps({"context": "The name of the", "target": "module"}) + "\n")
    return tmp_path


@pytest.fixture
def asked(monkeypatch):
    """How often each measure was run on a model."""
    counts = {"choices": 0, "last_word": 0, "cases": 0}

    def counted(name, original):
        def measure(*arguments, **options):
            counts[name] += 1
            return original(*arguments, **options)

        return measure

    tasks = {name: (counted(name, measure), kind) for name, (measure, kind) in assess.TASKS.items()}
    monkeypatch.setattr(assess, "TASKS", tasks)
    monkeypatch.setattr(evaluation_retrieval, "answer_cases", counted("cases", evaluation_retrieval.answer_cases))
    return counts


def run(model, base, files, **options):
    """An evaluation by tasks and retrieval alone."""
    given = {
        "choices": files / "choices.jsonl",
        "last_word": files / "words.jsonl",
        "retrieval": RetrievalOptions(text=str(write_text(files / "text.txt")), lengths=(200,), tests=("copy_text",)),
        "options": EvaluationOptions(windows=0),
        "speed": False,
    }
    return evaluate(model, against=base, **{**given, **options})


def test_a_second_evaluation_reads_what_the_first_kept(base, other, files, asked):
    first = run(other, base, files)
    assert asked == {"choices": 2, "last_word": 2, "cases": 2} and "kept_base" not in first
    second = run(other, base, files)
    assert asked == {"choices": 3, "last_word": 3, "cases": 3}
    assert second.pop("kept_base")["results"] == 3
    assert second == first
    refused = run(other, base, files, kept_base=False)
    assert asked == {"choices": 5, "last_word": 5, "cases": 5}
    assert refused == first


def test_nothing_is_kept_where_that_is_refused(base, other, files):
    run(other, base, files, kept_base=False)
    assert not results_folder().exists()


def change_weights(base, files, monkeypatch):
    copy = files / "copy"
    shutil.copytree(base, copy)
    content = bytearray((copy / "model.safetensors").read_bytes())
    content[-2] ^= 1
    (copy / "model.safetensors").write_bytes(content)
    return copy


def change_rows(base, files, monkeypatch):
    rows = [*ROWS[:2], {**ROWS[2], "gold": 0}]
    (files / "choices.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def change_threads(base, files, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 7)


def change_versions(base, files, monkeypatch):
    monkeypatch.setattr(base_results, "installed", lambda name: "0.0.1")


def change_kompakt(base, files, monkeypatch):
    monkeypatch.setattr(base_results, "sources_digest", lambda: "0" * 64)


def change_arithmetic(base, files, monkeypatch):
    monkeypatch.setattr(base_results, "slow_dtypes", lambda: ["another"])


CHANGES = [change_weights, change_rows, change_threads, change_versions, change_kompakt, change_arithmetic]


@pytest.mark.parametrize("change", CHANGES)
def test_whatever_changes_the_number_is_asked_again(base, other, files, asked, monkeypatch, change):
    run(other, base, files, last_word=None, retrieval=None)
    base = change(base, files, monkeypatch) or base
    assert "kept_base" not in run(other, base, files, last_word=None, retrieval=None)
    assert asked["choices"] == 4


@pytest.mark.parametrize("changed", [{"limit": 2}, {"device_map": "cpu"}, {"tokenizer": True}])
def test_other_options_are_another_question(base, other, files, asked, changed):
    run(other, base, files, last_word=None, retrieval=None)
    if changed.pop("tokenizer", False):
        other = shutil.copytree(other, files / "other")
        settings = json.loads((other / "tokenizer_config.json").read_text())
        (other / "tokenizer_config.json").write_text(json.dumps({**settings, "model_max_length": 77}))
    assert "kept_base" not in run(other, base, files, last_word=None, retrieval=None, **changed)
    assert asked["choices"] == 4


def test_a_damaged_or_exchanged_file_is_not_used(tmp_path, caplog):
    kept = BaseResults(tmp_path, {"model": 1})
    assert kept.recall({"task": "a"}, lambda: [1]) == [1]
    (file,) = tmp_path.iterdir()
    content = json.loads(file.read_text())
    file.write_text("{")
    assert kept.recall({"task": "a"}, lambda: [2]) == [2]
    file.write_text(json.dumps({**content, "facts": {"model": 2}}))
    assert kept.recall({"task": "a"}, lambda: [3]) == [3]
    assert kept.recall({"task": "a"}, lambda: [4]) == [3] and len(kept.used) == 1
    assert caplog.text.count("is not used") == 2


def test_a_folder_that_cannot_be_written_is_said_and_no_more(tmp_path, caplog):
    (tmp_path / "file").touch()
    assert BaseResults(tmp_path / "file", {}).recall({}, lambda: 5) == 5
    assert "cannot be kept in" in caplog.text


def test_the_command_says_what_was_kept(base, other, files, capsys):
    command = ["evaluate", str(other), "--against", str(base), "--windows", "0", "--no-speed"]
    command += ["--choices", str(files / "choices.jsonl")]
    assert main(command) == 0
    assert "kept since" not in capsys.readouterr().out
    assert main(command) == 0
    assert "1 result of the base (tasks, retrieval) kept since 20" in capsys.readouterr().out
    assert main([*command, "--no-kept-base"]) == 0
    assert "kept since" not in capsys.readouterr().out
