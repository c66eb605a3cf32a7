"""Recipes that evict: plan, compress, load, patch, evaluate, the benches, and what says how it went."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from tiny import tiny_directory, write_text
from transformers import AutoModelForCausalLM

from kompakt.cli.main import main
from kompakt.compress import RetrievalOptions, compress, evaluate, load, patch, plan
from kompakt.compress.artifact import read_cache, read_sidecar
from kompakt.compress.generation_bench import Way, generation_bench, shapes_of
from kompakt.compress.hf_cache import CACHE
from kompakt.compress.hf_generation import ModelSource
from kompakt.compress.kv_evict import KVEvict
from kompakt.compress.recipe import EvaluationOptions, Recipe

pytestmark = pytest.mark.usefixtures("one_thread")
RECIPES = ("kv-evict4x", "kv-evict2x-int4")
TOKENS = torch.randint(3, 200, (1, 1200), generator=torch.Generator().manual_seed(3))
SMALL = {"kv_cache.recent_tokens": 16, "kv_cache.ratio": 3}
FAST = {"calibration.samples": 2, "calibration.length": 64, "evaluation.window": 1300, "evaluation.windows": 1}
FAST |= {"evaluation.prompt_tokens": 1200}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny_directory(tmp_path_factory.mktemp("base") / "tiny", steps=20, max_position_embeddings=4096)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("text") / "text.txt")


@pytest.fixture(scope="module")
def overrides(text):
    return {**FAST, **SMALL, "calibration.source": str(text), "evaluation.text": str(text)}


@pytest.fixture(scope="module")
def made(base, overrides, tmp_path_factory):
    """Recipe → what `compress` returned."""
    folder = tmp_path_factory.mktemp("made")
    found = {name: compress(base, name, folder / name, overrides=overrides) for name in RECIPES}
    asked = {"kv_cache": {"method": "kv_evict", "scores": "snapkv", "ratio": 3, "recent_tokens": 16}}
    asked["kv_cache"]["decode_budget"] = 660
    decoding = {"evaluation.cache_protocol": "decode", **overrides}
    found["snapkv"] = compress(base, asked, folder / "snapkv", overrides=decoding)
    return found


@torch.no_grad()
def logits(model):
    first = model(TOKENS)
    return model(TOKENS[:, :7], **{CACHE: first[CACHE]}).logits, first[CACHE]


@pytest.mark.parametrize("name", RECIPES)
def test_loaded_equals_patched(name, base, overrides, made):
    expected, cache = logits(load(made[name].output))
    assert all(store.kept is not None for store in cache.evicting_layers) and len(cache.evicting_layers) == 4
    assert cache.method == replace(Recipe.load(name).kv_cache, recent_tokens=16, ratio=3)
    model = AutoModelForCausalLM.from_pretrained(base, dtype="auto").requires_grad_(False)
    before, _ = logits_of_dense(model)
    for source, more in ((name, {"overrides": overrides}), (made[name].output, {})):
        with patch(model, source, **more) as patched:
            assert torch.equal(logits(patched)[0], expected)
    assert torch.equal(logits_of_dense(model)[0], before) and not torch.equal(before, expected)


@torch.no_grad()
def logits_of_dense(model):
    first = model(TOKENS)
    return model(TOKENS[:, :7], **{CACHE: first[CACHE]}).logits, first[CACHE]


@pytest.mark.parametrize("name", [*RECIPES, "snapkv"])
def test_what_is_written_says_how_it_was_measured(name, made):
    directory = made[name].output
    policy = read_cache(read_sidecar(directory), directory)
    assert policy is not None and isinstance(policy.method, KVEvict) and len(policy.layers) == 4
    assert any(policy.layers.values()) == (name == "kv-evict2x-int4")
    used = made[name].evaluation["kv_cache"]
    assert used["protocol"] == "decode" and used["reading_codes"] == used["positions"] == 100
    eviction = used["eviction"]
    assert (eviction["prompts"], eviction["evicted_prompts"]) == (1, 1)
    assert eviction["query_agnostic"] == (name != "snapkv")
    share = 0.2 if name == "kv-evict2x-int4" else 1 / 3
    # The queries that a bounded cache remembers are beside its tokens.
    assert 0.1 < eviction["allocated"] <= share * (1.02 if name == "snapkv" else 1.01)
    assert 0.1 < eviction["kept"] <= 1 / 3
    card = (directory / "README.md").read_text("utf-8")
    later = "generated ones too, 660 tokens per head in all" if name == "snapkv" else "later tokens all stay"
    assert "every KV head keeps its own, chosen by" in card and later in card
    assert "of 1 of 1 prompts" in card and "of a dense cache's bytes, all that is allocated counted" in card


def test_plan_counts_what_is_allocated(base):
    for name in RECIPES:
        found = plan(base, name, overrides=SMALL, contexts=(300, 1200)).compressed_cache
        assert found is not None and (found.compressed_layers, found.dense_layers) == (4, 0)
        model = AutoModelForCausalLM.from_pretrained(base, dtype="auto").requires_grad_(False)
        with patch(model, Recipe.load(name, SMALL)) as patched, torch.no_grad():
            for tokens in (300, 1200):
                cache = patched(TOKENS[:, :tokens])[CACHE]
                tables = sum(s.kept.table.nbytes for s in cache.evicting_layers if s.kept is not None)
                # A table has room for the head that has most, which only a prompt tells.
                assert abs(found.bytes[tokens] - cache.nbytes().total) <= tables + 4 * 2 * 8 * 8
    assert found.bytes[1200] < plan(base, "kv-int4", contexts=(1200,)).compressed_cache.bytes[1200]
    bounded = {"kv_cache": {"method": "kv_evict", "ratio": 2, "recent_tokens": 16, "decode_budget": 660}}
    found = plan(base, bounded, contexts=(1200,)).compressed_cache
    model = AutoModelForCausalLM.from_pretrained(base, dtype="auto").requires_grad_(False)
    with patch(model, Recipe.load(bounded)) as patched, torch.no_grad():
        cache = patched(TOKENS[:, :1200])[CACHE]
        assert found is not None and all(store.queries is not None for store in cache.evicting_layers)
        assert abs(found.bytes[1200] - cache.nbytes().total) <= 4 * (2 * 8 * 8 + 3 * 8 * 8)
    unknown = {"kv_cache": {"method": "kv_evict", "budget": "threshold", "threshold": 0.1}}
    whole = plan(base, unknown, contexts=(1200,)).compressed_cache
    assert whole is not None and whole.bytes[1200] > 1200 * 4 * 2 * 32 * 2


def test_text_without_a_prompt_is_refused(base, made, text, tmp_path):
    with pytest.raises(ValueError, match="has no prompt to evict from; measure a cache that evicts by"):
        compress(base, {"kv_cache": {"method": "kv_evict", "ratio": 2}}, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ValueError, match="has no prompt to evict from"):
        evaluate(made["kv-evict4x"].output, options=EvaluationOptions(text=str(text), window=400), speed=False)


def test_prompts_that_nothing_is_evicted_from_are_refused(base, tmp_path):
    for name in RECIPES:
        recipe = Recipe.load(name)
        assert recipe.evaluation.prompt >= recipe.kv_cache.shortest_prompt
    with pytest.raises(
        ValueError, match="a prompt of 1024 tokens is too short for kv_evict, which evicts from 1552 on"
    ):
        compress(base, "kv-evict4x", tmp_path / "out", overrides={"evaluation.window": 2048})
    assert list(tmp_path.iterdir()) == []


def test_query_aware_and_query_agnostic_are_told_apart(base, made, text, capsys, tmp_path):
    found = {}
    for aware in (False, True):
        asked = RetrievalOptions(
            text=str(text), lengths=(1200,), tests=("copy_words", "needle"), depths=1, samples=1, query_aware=aware
        )
        options = EvaluationOptions(windows=0)
        found[aware] = evaluate(made["snapkv"].output, against=base, options=options, retrieval=asked, speed=False)[
            "retrieval"
        ]
        assert found[aware]["query_aware"] is aware
        use = found[aware]["results"]["needle"]["kv_cache"]["eviction"]
        assert (use["prompts"], use["evicted_prompts"]) == (1, 1)
    answers = {aware: result["results"]["needle"]["answers"] for aware, result in found.items()}
    assert answers[True]["model"] != answers[False]["model"]
    assert (
        abs(answers[True]["base"][0]["nll"] - answers[False]["base"][0]["nll"]) < 0.02 * answers[True]["base"][0]["nll"]
    )
    command = ["evaluate", str(made["kv-evict2x-int4"].output), "--windows", "0", "--no-speed"]
    options = ["--retrieval", str(text), "--retrieval-length", "1200", "--retrieval-samples", "1"]
    assert main([*command, *options, "--retrieval-tests", "needle", "--retrieval-query-aware"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "Query-aware: context and question of a case went in as one prompt" in said
    assert "Eviction by kvzip (query-agnostic), budget global: of 5 of 5 prompts" in said
    assert main([*command, "--retrieval-query-aware"]) == 2
    assert "need --retrieval" in " ".join(capsys.readouterr().err.split())


def test_bench_cache_has_no_chunks_and_says_why(base, text, tmp_path, capsys):
    out = tmp_path / "cache.json"
    options = ["--dataset", str(text), "--num-calibration-samples", "2", "--max-seq-length", "64", "--text", str(text)]
    options += ["--window", "1300", "--windows", "1", "-o", str(out)]
    options += ["--retrieval", str(text), "--retrieval-samples", "1", "--retrieval-tests", "needle"]
    evict = ["--methods", "kv_evict", "--set", "ratio=2", "--set", "recent_tokens=8", "--label", "evicted"]
    assert main(["bench", "cache", str(base), *options, *evict]) == 0
    assert main(["bench", "cache", str(base), *options, "--methods", "kv_fp8", "--append"]) == 0
    shown = capsys.readouterr().out
    result = json.loads(out.read_text())
    assert result["rows"][0]["chunks"] is None and "no prompt to evict from" in result["rows"][0]["absent"]["chunks"]
    assert result["rows"][0]["decode"]["kv_cache"]["eviction"]["evicted_prompts"] == 1
    (row,) = {line for line in shown.splitlines() if line.startswith("| evicted | ")}
    kept, absent = row.split(" | ")[1:3]
    assert kept.startswith("16.0") and kept.endswith("% of bytes") and absent == "–"
    assert "Contexts went in before their questions (query-agnostic)." in shown
    assert main(["bench", "cache", str(base), *options, *evict, "--append", "--retrieval-query-aware"]) == 2
    assert "was measured with another retrieval" in " ".join(capsys.readouterr().err.split())


def test_bench_generate_times_the_scoring_before_the_first_token(base):
    """The forward pass of a prompt returns when its tokens have been evicted."""
    source = ModelSource.of(str(base), None)
    ways = [way for way in Way.all(["kv-evict4x"]) if way.recipe is not None]
    assert [way.name for way in ways] == ["kv-evict4x", "kv-evict4x, launch by launch"]
    ways = [replace(ways[0], recipe=Recipe.load("kv-evict4x", SMALL))]
    shapes = shapes_of([(1, 1200)], 3, source)
    result = generation_bench(source, torch.device("cpu"), shapes, ways, bandwidth=None, repeats=1)
    (row,) = result["rows"]
    assert "absent" not in row, row
    assert row["coded_tokens"] == 1200 - 16
    assert row["allocated_cache_bytes"] <= 1200 * 4 * 2 * 32 * 2 / 3 * 1.01
    model = source.open(torch.device("cpu"))
    with patch(model, Recipe.load("kv-evict2x-int4", {**SMALL, "kv_cache.codes": "none"})) as patched, torch.no_grad():
        cache = patched(TOKENS)[CACHE]
        assert all(store.kept is not None and store.pending is None for store in cache.evicting_layers)
