"""The slot that a search fills beside the weights: what may fill it, what it loses and costs, what is left out."""

from __future__ import annotations

import dataclasses
import json
from functools import partial

import pytest
import torch
from tiny import tiny_directory
from transformers import AutoModelForCausalLM, AutoTokenizer, MistralConfig

from kompakt.cli.main import main
from kompakt.compress import LimitExceeded, Recipe, SearchOptions, plan, search, search_attention, searching
from kompakt.compress.calibration import calibration_tokens
from kompakt.compress.ceilings import works
from kompakt.compress.device_speed import Ceilings, Machine
from kompakt.compress.hf import meta_model
from kompakt.compress.search_attention import measured_seconds, slot_seconds, unmeasured
from kompakt.compress.search_slots import CACHES, NO_FP8, SlotChoice, SlotLosses, slot_space
from kompakt.compress.search_space import FLOAT
from kompakt.quant.method import KVCacheMethod

pytestmark = pytest.mark.usefixtures("one_thread")
LENGTH = 640
"""Two thirds of so many positions read codes: those of chunks at whose end a page of 128 is older than the 128 recent
tokens.
"""
OVERRIDES = {"calibration.samples": 3, "calibration.length": LENGTH, "weights.method": "rtn"}
SMALL = {"windows": 2, "loss_windows": 2, "group_sizes": (16,), "rounds": 2, "runs_on": "h200"}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    directory = tmp_path_factory.mktemp("base") / "tiny"
    return tiny_directory(directory, steps=60, max_position_embeddings=1024, num_hidden_layers=2)


@pytest.fixture(autouse=True)
def fresh_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("KOMPAKT_CACHE", str(tmp_path / "cache"))


def skeleton(base):
    return AutoModelForCausalLM.from_pretrained(base)


def space_of(base, target, recipe=None, **options):
    given = {"runs_on": None if target == "size" else "h200", **options}
    loaded = Recipe.load({"weights": "rtn", **(recipe or {})})
    return slot_space(skeleton(base), loaded, SearchOptions(limit=0.01, target=target, **given))


# What there is to choose


def test_what_a_target_leaves_to_choose(base):
    assert [choice.key for choice in space_of(base, "decode").choices] == ["none", *CACHES]
    assert [choice.key for choice in space_of(base, "size", context=1000).choices] == ["none", *CACHES]
    assert [choice.key for choice in space_of(base, "size").choices] == ["none"]
    for choice in space_of(base, "decode").choices[1:]:
        assert choice.recipe.kv_cache == Recipe.load({"kv_cache": CACHES[choice.key]}).kv_cache
        assert choice.recipe.weights == Recipe.load({"weights": "rtn"}).weights
    prefill = space_of(base, "prefill")
    assert [choice.recipe.attention and choice.recipe.attention.modes for choice in prefill.choices] == [
        None,
        ("int8_fp8",),
        ("fp8_fp8",),
    ]


def test_what_the_recipe_fills_is_kept(base):
    kept = space_of(base, "decode", {"kv_cache": "kv_int4"})
    assert [choice.key for choice in kept.choices] == ["kv_int4"] and not kept.left_out
    assert [choice.key for choice in space_of(base, "prefill", {"attention": "sage"}).choices] == ["sage"]
    sparse = {"sparsity": {"method": "triangle"}}
    assert [choice.key for choice in space_of(base, "prefill", sparse).choices] == ["none"]


def test_what_cannot_be_had_is_left_out_with_the_reason(base):
    old = space_of(base, "decode", runs_on="a100")
    assert [choice.key for choice in old.choices] == ["none"] and old.left_out == dict.fromkeys(CACHES, NO_FP8)
    short = space_of(base, "prefill", context=8191)
    assert len(short.choices) == 1 and "from 8,192 tokens on, and the context has 8,191" in str(short.left_out)


# Losses


def bare(choice: SlotChoice) -> SlotChoice:
    """With as few dense tokens as can be, so that codes weigh more than rounding."""
    method = choice.recipe.kv_cache
    assert isinstance(method, KVCacheMethod)
    method = dataclasses.replace(method, recent_tokens=0, sink_tokens=0)
    return dataclasses.replace(choice, recipe=choice.recipe.model_copy(update={"kv_cache": method}))


def test_losses_are_the_kl_of_the_cache_alone_without_rounding_of_sums(base):
    """In float32 sums in another order make no difference; in bf16 what they make is taken off, most of it."""
    found = {}
    for dtype in (torch.float32, torch.bfloat16):
        models = [AutoModelForCausalLM.from_pretrained(base, dtype=dtype).eval() for _ in range(2)]
        tokenizer = AutoTokenizer.from_pretrained(base)
        recipe = Recipe.load({"weights": "rtn"}, {"calibration.samples": 3, "calibration.length": LENGTH})
        windows = calibration_tokens(tokenizer, recipe.calibration).tokens[:2]
        losses = SlotLosses(*models, tokenizer, windows, lambda *_: None)
        rounding = losses.rounding()
        space = slot_space(models[0], recipe, SearchOptions(limit=0.01, target="decode", runs_on="h200"))
        taken_off = partial(float, rounding)
        row = {choice.key: losses.loss(bare(choice), "kv_cache", taken_off)["loss"] for choice in space.choices[1:]}
        found[dtype] = rounding, row
    rounding, exact = found[torch.float32]
    assert 10 * rounding < exact["kv_fp8"] < exact["kv_int4"], found
    rounding, rounded = found[torch.bfloat16]
    assert rounding > 2e-6
    assert exact["kv_int4"] / 3 < rounded["kv_int4"] < 3 * exact["kv_int4"]


def test_windows_in_which_few_codes_are_read_say_nothing(base):
    options = SearchOptions(limit=0.5, target="decode", **SMALL)
    result = search(base, options=options, overrides={**OVERRIDES, "calibration.length": 255})
    assert set(result["slot"]["left_out"]) == set(CACHES) and result["slot"]["choices"] == ["none"]
    assert "only 0 of 510 positions read codes" in result["slot"]["left_out"]["kv_fp8"]


# Whole searches


def test_decoding_of_many_sequences_takes_a_compressed_cache(base, tmp_path, capsys):
    flags = ["--num-calibration-samples", "3", "--max-seq-length", str(LENGTH), "--windows", "2", "--loss-windows", "2"]
    flags = [*flags, "--group-sizes", "16", "--rounds", "2", "-r", "w4a16-rtn", "--batch", "64", "--context", "900"]
    file = tmp_path / "mine.yaml"
    words = ["--target", "decode", "--runs-on", "h200", "--limit", "perplexity=+20%", "-o", str(file), *flags]
    assert main(["search", str(base), *words]) == 0
    assert "kv_cache" in capsys.readouterr().out
    result = json.loads(file.with_suffix(".json").read_text())
    best = next(row for row in result["rows"] if row["name"] == result["best"])
    assert best["slot"] != "none" and Recipe.load(file).kv_cache == Recipe.load(best["recipe"]).kv_cache is not None
    assert {row["slot"] for row in result["rows"] if row["kind"] == "uniform"} == {"none", *CACHES}
    for row in result["rows"]:
        planned = plan(base, row["recipe"], contexts=(900,), batches=(64,), runs_on="h200")
        assert planned.ceilings is not None
        # The floors of single Linears and of attention are those of the whole model where bytes bound all of it.
        assert 1e3 * row["cost"] == pytest.approx(planned.ceilings["rows"][0]["compressed_decode_ms"], rel=0.02)
    without = [row for row in result["rows"] if row["slot"] == "none"]
    assert best["cost"] < 0.7 * min(row["cost"] for row in without)


@pytest.fixture
def part_costs(monkeypatch):
    """A function that sets how much more than floats the choices for parts cost."""
    costs_of = searching.costs_of

    def use(factors):
        def changed(*given, **named):
            found = costs_of(*given, **named)
            part = found.part
            return dataclasses.replace(
                found, part=lambda one, choice: part(one, FLOAT) * {FLOAT.key: 1.0, **factors}[choice.key]
            )

        monkeypatch.setattr(searching, "costs_of", changed)

    return use


SLOWER = {"fp8": 3.0, "int4 g16": 3.0}


def test_weights_that_multiply_more_slowly_stay_as_they_are(base, part_costs):
    part_costs(SLOWER)
    options = SearchOptions(limit=0.5, target="decode", context=900, batch=64, **SMALL)
    result = search(base, options=options, overrides=OVERRIDES)
    best = next(row for row in result["rows"] if row["name"] == result["best"])
    assert best["shares"] == {"float": 1.0} and best["slot"] != "none" and best["cost"] < result["base_cost"]
    assert any(row["within"] and row["cost"] > result["base_cost"] for row in result["rows"])


def test_a_slot_that_is_kept_is_not_the_float_models(base, part_costs):
    """Floats with the recipe's own cache cost less than the float model, and more than nothing that is found."""
    part_costs(SLOWER)
    options = SearchOptions(limit=0.5, target="decode", context=900, batch=64, **SMALL)
    overrides = {**OVERRIDES, "kv_cache": {"method": "kv_int4"}}
    result = search(base, options=options, overrides=overrides)
    best = next(row for row in result["rows"] if row["name"] == result["best"])
    assert best["shares"] == {"float": 1.0} and best["slot"] == "kv_int4" and best["cost"] < 0.8 * result["base_cost"]
    planned = plan(base, {"weights": "rtn"}, contexts=(900,), batches=(64,), runs_on="h200")
    assert planned.ceilings is not None
    assert 1e3 * result["base_cost"] == pytest.approx(planned.ceilings["rows"][0]["base_decode_ms"], rel=0.02)


@pytest.mark.parametrize(("factor", "code"), [(3.0, None), (1.0, "fp8")])
def test_what_is_within_the_limit_and_costs_more_is_no_result(base, part_costs, monkeypatch, factor, code):
    """INT4 would be faster here and is outside the limit. What costs as much and takes fewer bytes is a result."""
    part_costs({"fp8": factor, "int4 g16": 0.5})

    def measure(self, recipe):
        increase = 0.9 if recipe is not None and recipe.weights.storage == "int4" else 0.01
        return {"perplexity_increase": increase, "perplexity_increase_stderr": 0.0, "kl": increase}

    monkeypatch.setattr(searching.Search, "measure", measure)
    options = SearchOptions(limit=0.5, target="prefill", context=900, **{**SMALL, "rounds": 1})
    if code is None:
        with pytest.raises(
            LimitExceeded, match=r"within 50\.00% costs less than the float model, .* as much: fp8 [12]\."
        ):
            search(base, options=options, overrides=OVERRIDES)
    else:
        result = search(base, options=options, overrides=OVERRIDES)
        assert result["best"] == code and result["less_than_uniform"] == 0


def test_size_counts_caches_where_a_context_is_given(base):
    options = SearchOptions(limit=0.2, target="size", context=900, batch=3, **{**SMALL, "runs_on": None})
    result = search(base, options=options, overrides=OVERRIDES)
    assert "and of the caches of 3 sequences of 900 tokens" in result["cost"]["words"]
    for row in result["rows"]:
        planned = plan(base, row["recipe"], contexts=(900,))
        cache = planned.compressed_cache
        caches = 3 * planned.kv_cache[900] if cache is None else 3 * cache.bytes[900] + cache.codebook_bytes
        assert row["bytes"] == planned.compressed_bytes and row["cost"] == row["bytes"] + caches
    seen = []
    again = search(base, options=options, overrides=OVERRIDES, progress=lambda *what: seen.append(what))
    assert {**again, "minutes": 0} == {**result, "minutes": 0}
    assert not any(stage in ("layers", "evaluate") for stage, *_ in seen)  # nothing was measured a second time


def test_a_search_killed_while_the_slot_is_measured_goes_on_and_ends_alike(base, tmp_path, monkeypatch):
    options = SearchOptions(limit=0.2, target="decode", batch=16, **SMALL)
    whole = search(base, options=options, overrides=OVERRIDES)
    monkeypatch.setenv("KOMPAKT_CACHE", str(tmp_path / "killed"))

    def dying(stage, done, total, text):
        if text == "kv_int4":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        search(base, options=options, overrides=OVERRIDES, progress=dying)
    ended = search(base, options=options, overrides=OVERRIDES)
    assert {**ended, "minutes": 0} == {**whole, "minutes": 0}


# Times of attention


def machine():
    """A CPU on which every call takes a microsecond."""

    def timer(calls):
        calls[0]()
        return 1e-6

    return Machine(torch.device("cpu"), timer, cache_bytes=1, ceilings=Ceilings(1.0, 1.0, 1.0, 1.0))


@pytest.mark.parametrize(("target", "context"), [("decode", 520), ("prefill", 8192)])
def test_attention_is_timed_for_every_choice(target, context, base, monkeypatch):
    space = space_of(base, target, context=context)
    model = skeleton(base)
    if target == "prefill":  # 8,192 tokens on a CPU take minutes; a shorter case is timed in their place
        short = lambda machine, cases, *rest: search_speed(machine, [type(cases[0])("causal", 64, 16, 4, 2, 1)], *rest)  # noqa: E731
        search_speed = search_attention.attention_speed
        monkeypatch.setattr(search_attention, "attention_speed", short)
    found = measured_seconds(model, space, 2, 1, context, machine())
    assert found == pytest.approx(dict.fromkeys([choice.key for choice in space.choices], 2e-6))
    assert slot_seconds(space, lambda choice: 1.0, found) == (found, None)


def test_what_has_no_time_is_left_out_and_without_any_all_is_reckoned(base):
    space = space_of(base, "decode")
    found = {"none": 3.0, "kv_fp8": "it is wrong", "kv_int4": 1.0, "kv_pq 4 bits": 2.0}
    assert slot_seconds(space, lambda choice: 9.0, found)[0] == {"none": 3.0, "kv_int4": 1.0, "kv_pq 4 bits": 2.0}
    assert space.left_out == {"kv_fp8": "it is wrong"}
    seconds, why = slot_seconds(space, lambda choice: 9.0, {**found, "none": "out of memory"})
    assert set(seconds.values()) == {9.0} and why is not None and why.endswith("out of memory")


def test_attention_of_another_kind_is_not_timed_as_if_it_were_dense(base):
    small = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    config = MistralConfig(**small, num_attention_heads=4, num_key_value_heads=2, sliding_window=50)
    model = meta_model(config)
    recipe = Recipe.load({"weights": "rtn"})
    work = works(model, recipe, {}, (1, 1), ({600: 1}, {600: 1}))["base"]
    space = space_of(base, "decode")
    assert unmeasured(work, space, 600) == "some layers have a window"
    plain = works(skeleton(base), recipe, {}, (1, 1), ({600: 1}, {600: 1}))["base"]
    assert unmeasured(plain, space, 600) is None
    assert "most is dense" in str(unmeasured(plain, space, 511))
    sparse = {"sparsity": {"method": "triangle"}}
    visits = works(skeleton(base), Recipe.load(sparse), {}, (1, 1), ({600: 1}, {600: 1}))["compressed"]
    assert "is sparse" in str(unmeasured(visits, space_of(base, "prefill", sparse), 600))
    assert unmeasured(visits, space_of(base, "decode", sparse), 600) is None
    assert "fills kv_cache itself" in str(unmeasured(plain, space_of(base, "decode", {"kv_cache": "kv_fp8"}), 600))
