"""Tasks that lm-eval runs: the same items right as with the built-in tasks, paired figures, and what is refused.

Where lm-eval is not installed, its recorded verdicts hold the normalisation of the built-in tasks.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import math

import numpy as np
import pytest
from tiny import tiny_directory

from kompakt.cli.main import main
from kompakt.compress import HarnessOptions, evaluate, evaluation_harness, evaluation_tasks, patch
from kompakt.compress.cache_evaluation import cache_in_use, count_anew
from kompakt.compress.evaluation_harness import Harness, compared_tasks, item_values, language_model, rows_task
from kompakt.compress.evaluation_tasks import last_word, multiple_choice
from kompakt.compress.hf import load_base, load_tokenizer
from kompakt.compress.recipe import EvaluationOptions

pytestmark = pytest.mark.usefixtures("one_thread")
needs_harness = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None, reason="lm-eval is not installed (extra eval)"
)
VERDICTS = [
    (["日本語の答え", "naïve choice", "two words"], 2, [-8.39, -26.5, -7.64], True, True),
    (["two words", "abc", "a longer plain answer"], 0, [-9.01, -5.43, -28.74], False, True),
    (["two words", "a longer plain answer", "coordonnées géographiques"], 0, [-8.86, -21.34, -24.85], True, True),
    (["日本語の答え", "two words", "a longer plain answer"], 2, [-11.51, -19.66, -31.41], False, True),
    (["two words", "Ünï", "x"], 0, [-10.62, -5.53, -1.83], False, True),
    (["日本語の答え", "naïve choice", "Ünï"], 2, [-11.34, -27.01, -4.59], True, True),
    (["Ünï", "été", "x"], 0, [-7.46, -7.72, -2.36], False, False),
    (["naïve choice", "été", "coordonnées géographiques"], 0, [-17.24, -4.58, -49.97], False, True),
]
"""Choices, right one, log-likelihoods, and what lm-eval 0.4.13 makes of them: acc, acc_norm."""
QUESTIONS = [
    {"question": f"What is {word}?", "choices": choices, "gold": index % 3}
    for index, word in enumerate(["a name", "été", "x = {{1}}", "a loop", "an import", "the end", "日本", "50 %"])
    for choices in [[f"{word} itself", "nothing at all", "raise"], ["a", "bb {c}", "an expression statement"]]
]
TEXTS = [
    {"context": f"The {noun} statement is used to {verb} the", "target": target}
    for noun, verb in [("for", "iterate over"), ("import", "find"), ("return", "leave"), ("del", "forget")]
    for target in ["elements", "function", "name"]
]
YAML = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "Question: {{{{question}}}}\\nAnswer:"
doc_to_target: gold
doc_to_choice: choices
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
  - {{metric: acc_norm, aggregation: mean, higher_is_better: true}}
metadata: {{version: 1.0}}
"""


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return tiny_directory(tmp_path_factory.mktemp("base") / "tiny", steps=20)


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    return tiny_directory(tmp_path_factory.mktemp("other") / "tiny", steps=4)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rows")
    for name, rows in (("questions", QUESTIONS), ("texts", TEXTS)):
        (folder / f"{name}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows), "utf-8")
    (folder / "own.yaml").write_text(YAML.format(name="own", file=folder / "questions.jsonl"))
    return folder


@pytest.fixture
def own_datasets(tmp_path, monkeypatch):
    """The library `datasets` keeps what it reads in a folder of the test."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")


def test_built_in_choices_are_judged_as_the_harness_judges(monkeypatch):
    likelihoods = [evaluation_tasks.Score(value, False) for verdict in VERDICTS for value in verdict[2]]
    monkeypatch.setattr(evaluation_tasks, "encode_pair", lambda *args, **kwargs: None)
    monkeypatch.setattr(evaluation_tasks, "score_continuations", lambda *args, **kwargs: likelihoods)
    rows = [{"question": "?", "choices": choices, "gold": gold} for choices, gold, *_ in VERDICTS]
    found = multiple_choice(None, None, rows)
    assert found.correct == tuple(verdict[3] for verdict in VERDICTS)
    assert found.correct_norm == tuple(verdict[4] for verdict in VERDICTS)


def recorded(acc, perplexity, nll):
    """What `lm_eval.evaluator.evaluate` returns, as far as it is read."""
    samples = [
        {"doc_id": index, "filter": "none", "acc": hit, "perplexity": value}
        for index, (hit, value) in enumerate(zip(acc, nll))
    ]
    return {
        "results": {
            "words": {
                **{"name": "words", "alias": "words", "sample_len": len(acc)},
                **{"acc,none": sum(acc) / len(acc), "acc_stderr,none": "N/A", "perplexity,none": perplexity},
            }
        },
        "samples": {"words": samples[::-1]},
        "versions": {"words": 1.0},
        "n-shot": {"words": 2},
        "higher_is_better": {"words": {"acc": True, "perplexity": False}},
        "n-samples": {"words": {"original": 9, "effective": len(acc)}},
    }


def test_figures_are_paired_where_a_metric_is_the_mean_of_its_items():
    new, old = [1, 0, 1, 0, 1], [1, 1, 1, 0, 0]
    rows = compared_tasks(recorded(new, 9.0, [-1.0] * 5), recorded(old, 8.0, [-2.0] * 5))
    acc, perplexity = rows
    assert {key: acc[key] for key in ("task", "metric", "filter", "items", "num_fewshot")} == {
        **{"task": "words", "metric": "acc", "filter": "none", "items": 5, "num_fewshot": 2}
    }
    difference = np.array(new, float) - old
    assert acc["difference"] == pytest.approx([difference.mean(), difference.std(ddof=1) / math.sqrt(5)])
    assert acc["recovery"][0] == pytest.approx(1.0)
    assert acc["model"] == pytest.approx([0.6, np.std(new, ddof=1) / math.sqrt(5)])
    assert perplexity["model"] == [9.0, None] and perplexity["base"] == [8.0, None]
    assert "difference" not in perplexity and "recovery" not in perplexity


def test_without_the_harness_one_sentence_says_what_to_install(monkeypatch):
    monkeypatch.setattr(evaluation_harness.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"lm-eval, which is not installed: pip install 'kompakt\[eval\]'"):
        Harness(HarnessOptions(tasks=("arc_easy",)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tasks": ()}, "names no task"),
        ({"tasks": ("a", "")}, "names no task"),
        ({"tasks": ("a", "a")}, "one twice: a, a"),
        ({"tasks": ("a",), "limit": 0}, "limit is 0"),
        ({"tasks": ("a",), "num_fewshot": -1}, "num_fewshot is -1"),
    ],
)
def test_options_that_cannot_be_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        HarnessOptions(**options)


def test_examples_without_tasks_are_refused(directory, capsys):
    assert main(["evaluate", str(directory), "--num-fewshot", "2"]) == 2
    assert "--num-fewshot needs --tasks" in capsys.readouterr().err
    assert main(["evaluate", str(directory), "--limit", "2"]) == 2
    assert "the limit of 2 is on rows of tasks, and none is named" in capsys.readouterr().err


def test_rows_that_are_neither_kind_are_refused(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"text": "x"}\n')
    with pytest.raises(ValueError, match=r"rows\.jsonl line 1: the field 'context' is missing"):
        rows_task(tmp_path / "rows.jsonl")


@needs_harness
def test_built_in_tasks_agree_with_the_harness_to_the_last_item(directory, files, own_datasets):
    model, tokenizer = load_base(directory), load_tokenizer(directory)
    names = tuple(str(files / name) for name in ("questions.jsonl", "texts.jsonl", "own.yaml"))
    found = Harness(HarnessOptions(tasks=names))._run(model, tokenizer, None)
    own = multiple_choice(model, tokenizer, files / "questions.jsonl")
    assert 0 < sum(own.correct) < own.items and own.correct != own.correct_norm
    for task in ("questions", "own"):
        for metric, correct in (("acc", own.correct), ("acc_norm", own.correct_norm)):
            value = found["results"][task][f"{metric},none"]
            assert item_values(found, task, metric, "none", value) == list(map(float, correct))
    words = last_word(model, tokenizer, files / "texts.jsonl")
    value = found["results"]["texts"]["acc,none"]
    assert item_values(found, "texts", "acc", "none", value) == list(map(float, words.correct))
    assert found["results"]["texts"]["perplexity,none"] == pytest.approx(words.target_perplexity, rel=1e-3)


@needs_harness
def test_a_compressed_cache_is_read(directory, files):
    recipe = {"kv_cache": {"method": "kv_fp8", "sink_tokens": 0, "recent_tokens": 0}}
    tokenizer = load_tokenizer(directory)
    long = [{**row, "question": "Say it. " * 40 + row["question"]} for row in QUESTIONS[:4]]
    (files / "long.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in long), "utf-8")
    harness = Harness(HarnessOptions(tasks=(str(files / "long.jsonl"),)))
    model = load_base(directory)
    with patch(model, recipe):
        count_anew(model)
        coded = harness.measure(model, None, tokenizer)
        used = cache_in_use(model)
        assert used is not None and used["reading_codes"] > 0
        own = multiple_choice(model, tokenizer, files / "long.jsonl")
    assert coded["results"][0]["model"][0] == own.accuracy


@needs_harness
def test_the_command_measures_pairs_and_keeps_the_base(directory, other, files, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("KOMPAKT_CACHE", str(tmp_path / "cache"))
    command = ["evaluate", str(other), "--against", str(directory), "--windows", "0", "--no-speed", "--limit", "12"]
    command += ["--tasks", f"{files / 'questions.jsonl'},{files / 'texts.jsonl'}"]
    assert main([*command, "-o", str(tmp_path / "first.json")]) == 0
    out = capsys.readouterr().out
    assert "lm-eval 0." in out and "questions acc_norm" in out and "of the base" in out and "12 items" in out
    assert main([*command, "-o", str(tmp_path / "second.json")]) == 0
    assert "2 results of the base (tasks, retrieval) kept since" in capsys.readouterr().out
    first, second = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("first", "second"))
    assert second.pop("kept_base")["results"] == 2 and first == second
    rows = {(row["task"], row["metric"]): row for row in first["harness"]["results"]}
    assert rows["questions", "acc"]["items"] == 12
    alone = evaluate(
        directory,
        harness=HarnessOptions(tasks=(str(files / "texts.jsonl"),)),
        options=EvaluationOptions(windows=0),
        speed=False,
    )
    assert sorted(row["metric"] for row in alone["harness"]["results"]) == ["acc", "perplexity"]


@needs_harness
@pytest.mark.parametrize(
    ("task", "message"),
    [
        ("arc_eazy", r"lm-eval has no task 'arc_eazy', nor is it a .yaml or .jsonl file; did you mean 'arc_easy'\?"),
        ("/nowhere/x.yaml", "'/nowhere/x.yaml' is not a file"),
        ("{folder}/bad.yaml", "lm-eval cannot load the task '.*bad.yaml': "),
        ("{folder}/gone.yaml", "lm-eval cannot load the task '.*gone.yaml': "),
    ],
)
def test_tasks_that_cannot_be_loaded_are_one_sentence(task, message, tmp_path, own_datasets, monkeypatch):
    if not task.endswith(".yaml"):
        manager = importlib.import_module("lm_eval.tasks").TaskManager
        # The registry has thousands of files, which take seconds to read.
        monkeypatch.setattr(manager, "all_tasks", ["arc_easy", "arc_challenge"])
        monkeypatch.setattr(manager, "__init__", lambda self, **options: None)
    (tmp_path / "bad.yaml").write_text("output_type: multiple_choice\n")
    (tmp_path / "gone.yaml").write_text(YAML.format(name="gone", file=tmp_path / "nothing.jsonl"))
    with pytest.raises(ValueError, match=message):
        Harness(HarnessOptions(tasks=(task.format(folder=tmp_path),)))


@needs_harness
def test_sampled_text_is_never_kept(directory):
    instance = importlib.import_module("lm_eval.api.instance").Instance

    def refuse(question, find):
        raise AssertionError(question)

    lm = language_model(load_base(directory), load_tokenizer(directory), refuse)
    options = {"until": ["."], "max_gen_toks": 2, "do_sample": True, "temperature": 1.0}
    request = instance(request_type="generate_until", doc={}, arguments=("The name", options), idx=0)
    assert len(lm.generate_until([request])) == 1


def test_a_report_shows_what_the_harness_measured(tmp_path):
    from kompakt.compress.report_evaluations import harness_tasks

    content = {"harness": "lm-eval 0.4.13", "results": compared_tasks(recorded([1, 0], 9.0, [-1.0, -1.0]), None)}
    assert harness_tasks(content) == [
        {
            **{"task": "acc, lm-eval 0.4.13, 2-shot", "file": "words", "items": 2},
            **{"model": (0.5, 0.5), "base": None, "difference": None},
        }
    ]
