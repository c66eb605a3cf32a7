"""What a search makes least: costs against the ceilings of `plan`, times of Linears on a machine, and whole searches
for speed.
"""

from __future__ import annotations

import json

import pytest
import torch
from tiny import tiny_directory
from transformers import AutoModelForCausalLM

from kompakt.cli.main import main
from kompakt.compress import Recipe, SearchOptions, plan, search, search_costs
from kompakt.compress.ceilings import DEVICES
from kompakt.compress.device_speed import Ceilings, Machine
from kompakt.compress.hf_decoder import decoder_layers
from kompakt.compress.search_costs import MEASURED_TOKENS, MeasuredLinears, costs_of, linear_of
from kompakt.compress.search_losses import parts_of
from kompakt.compress.search_slots import slot_space
from kompakt.compress.search_space import FLOAT, FP8, Choice, Part, offered, recipe_for
from kompakt.kernels.packing import unpack_int4

pytestmark = pytest.mark.usefixtures("one_thread")
SMALL = ["--num-calibration-samples", "4", "--max-seq-length", "48", "--windows", "6", "--loss-windows", "2"]
SMALL = [*SMALL, "--group-sizes", "16,channel", "--rounds", "2"]
PART = Part(("a.q", "a.k"), ((48, 64), (16, 64)), torch.bfloat16)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny_directory(tmp_path_factory.mktemp("base") / "tiny", steps=60)


def never(question, find):
    raise AssertionError(f"nothing is measured here: {question}")


def always(question, find):
    return find()


def costs(base, recipe, target, context, batch, runs_on="h200"):
    """Parts and costs of a model."""
    model = AutoModelForCausalLM.from_pretrained(base)
    parts = []
    for index, (_, layer) in enumerate(decoder_layers(model)):
        linears = {name: item for name, item in layer.named_modules() if isinstance(item, torch.nn.Linear)}
        parts += parts_of(model, index, linears, torch.arange(5, 13)[None])
    options = SearchOptions(limit=0.01, target=target, context=context, batch=batch, runs_on=runs_on)
    return parts, costs_of(model, slot_space(model, recipe, options), options, parts, never)


# Costs by ceilings


@pytest.mark.parametrize("cache", [None, "kv_int4", "kv_pq"])
@pytest.mark.parametrize("target", ["decode", "prefill"])
@pytest.mark.parametrize("choice", [FP8, Choice("int4", 16), Choice("int4", "channel")], ids=lambda item: item.key)
def test_costs_of_a_whole_model_are_the_ceilings_of_plan(choice, target, cache, base):
    """Where one bound holds for all of a model, bytes at one token and products in a prompt, sums of ceilings are the
    ceiling of the sum.
    """
    recipe = Recipe.load({"weights": "rtn", **({} if cache is None else {"kv_cache": cache})})
    context, batch = 3000, 2
    parts, found = costs(base, recipe, target, context, batch)
    for chosen, kind in ((choice, "compressed"), (FLOAT, "base")):
        if kind == "base" and cache is not None:
            continue
        total = found.rest + next(iter(found.slots.values())) + sum(found.part(part, chosen) for part in parts)
        mixed = recipe_for(recipe, dict.fromkeys(parts, choice), "x")
        planned = plan(base, mixed, contexts=(context,), batches=(batch,), runs_on="h200")
        assert planned.ceilings is not None
        expected = planned.ceilings["rows"][0][f"{kind}_{target}_ms"]
        # The head's one token is bound by bytes, which a ceiling of a whole prompt does not see.
        assert expected * (1 - 1e-9) <= 1e3 * total < expected * 1.002


def test_many_sequences_are_bound_by_products_linear_by_linear(base):
    """And the cost says so where `plan`, which takes the model as one, does not."""
    recipe = Recipe.load({"weights": {"method": "rtn", "activations": "none"}})
    _, few = costs(base, recipe, "decode", 100, 1)
    parts, many = costs(base, recipe, "decode", 100, 4000)
    int4 = Choice("int4", 16)
    assert few.part(parts[0], int4) < few.part(parts[0], FP8) < few.part(parts[0], FLOAT)
    flops = 2 * 4000 * sum(rows * columns for rows, columns in parts[0].shapes)
    for choice in (int4, FP8, FLOAT):
        assert many.part(parts[0], choice) == pytest.approx(flops / DEVICES["h200"].bf16)
    recipe = Recipe.load({"weights": {"method": "rtn", "activations": "fp8"}})
    _, fast = costs(base, recipe, "decode", 100, 4000)
    assert fast.part(parts[0], int4) == pytest.approx(flops / 1979e12)
    assert fast.part(parts[0], FLOAT) == pytest.approx(flops / DEVICES["h200"].bf16)
    _, without = costs(base, recipe, "decode", 100, 4000, runs_on="a100")
    assert without.part(parts[0], int4) == pytest.approx(flops / DEVICES["a100"].bf16)


# Times on a machine


def machine(seconds=lambda call: 1.0):
    """A CPU that takes as long as `seconds` says."""

    def timer(calls):
        for call in calls:
            call()
        return seconds(calls[0])

    return Machine(torch.device("cpu"), timer, cache_bytes=1, ceilings=Ceilings(1.0, 1.0, 1.0, 1.0))


@pytest.mark.parametrize("activations", ["none", "fp8"])
def test_every_shape_and_choice_is_timed_once(activations):
    asked = []

    def recall(question, find):
        asked.append(json.dumps(question, sort_keys=True))
        return find()

    rows = lambda call: float(call.args[1].out_features)  # noqa: E731
    linears = MeasuredLinears(machine(rows), activations, recall)
    for choice in offered((16, "channel")):
        together = activations == "fp8" and choice.weights == "int4"
        assert linears.seconds(PART, choice, 3) == 64.0
        assert len(asked) == (1 if together else 2), choice  # at once what a model multiplies at once
        asked.clear()
        linears.seconds(PART, choice, 65)
        assert len(asked) == len(set(asked)) == 2
        asked.clear()


def test_more_tokens_than_are_timed_take_as_many_times_as_long():
    asked = []

    def recall(question, find):
        asked.append(question["tokens"])
        return 1.0

    assert MeasuredLinears(machine(), "none", recall).seconds(PART, FP8, 3 * MEASURED_TOKENS) == 6.0
    assert asked == [MEASURED_TOKENS] * 2


@pytest.mark.parametrize("choice", offered((16, "channel")), ids=lambda choice: choice.key)
@pytest.mark.parametrize("activations", ["none", "fp8"])
def test_linears_that_are_timed_hold_the_weight(choice, activations):
    weight = torch.randn(24, 64).bfloat16()
    linear = linear_of(weight, choice, activations)
    if choice.weights == "int4":
        codes = unpack_int4(linear.weight_packed, 64).float().unflatten(1, (linear.weight_scale.shape[1], -1))
        stored = (codes * linear.weight_scale.float()[..., None]).flatten(1)
    else:
        scale = 1.0 if choice is FLOAT else linear.get_parameter("weight_scale").float()
        stored = linear.get_parameter("weight").float() * scale
    # Half a step of the largest of 64 normal numbers, over their root mean square, at the worst.
    assert (stored - weight.float()).norm() / weight.float().norm() < 0.2


def test_a_wrong_result_is_not_timed(monkeypatch):
    broken = lambda weight, choice, activations: linear_of(weight.roll(1, 1), choice, activations)  # noqa: E731
    monkeypatch.setattr(search_costs, "linear_of", broken)
    with pytest.raises(RuntimeError, match="a Linear of 48×64 stored as fp8 gives wrong results"):
        MeasuredLinears(machine(), "none", always).seconds(PART, FP8, 3)


# Whole searches


@pytest.mark.parametrize(
    ("target", "extra"),
    [("decode", ["--batch", "2", "--context", "500"]), ("prefill", ["--set", "weights.activations=fp8"])],
)
def test_a_search_for_speed_says_what_its_times_are(target, extra, base, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("KOMPAKT_CACHE", str(tmp_path / "cache"))
    file = tmp_path / "mine.yaml"
    words = ["--limit", "perplexity=+0.2%", "--target", target, "--runs-on", "h200", *extra, "-r", "w4a16-rtn"]
    assert main(["search", str(base), *words, "-o", str(file), *SMALL]) == 0
    out = " ".join(capsys.readouterr()[0].split())
    of = "a decoding step of 2 sequences of 500 tokens" if target == "decode" else "prefill of 1 sequence of 8,192"
    assert f"{target} ms: least time of {of}" in out and "not measured" in out and f"{target} ms" in out
    result = json.loads(file.with_suffix(".json").read_text())
    assert result["cost"]["basis"] == "ceilings" and result["target"] == target
    within = [row for row in result["rows"] if row["within"]]
    best = next(row for row in result["rows"] if row["name"] == result["best"])
    assert best["cost"] == min(row["cost"] for row in within) < result["base_cost"]
    context, batch = result["conditions"]["context"], result["conditions"]["batch"]
    for row in result["rows"]:
        planned = plan(base, row["recipe"], contexts=(context,), batches=(batch,), runs_on="h200")
        assert planned.ceilings is not None
        assert planned.ceilings["rows"][0][f"compressed_{target}_ms"] <= 1e3 * row["cost"] * (1 + 1e-9)
        assert row["bytes"] == planned.compressed_bytes
    fastest = {"decode": "the fastest decoding", "prefill": "the fastest prefill"}[target]
    assert fastest in Recipe.load(file).description


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--target", "decode"], "no CUDA device here to measure; name one by --runs-on"),
        (["--target", "decode", "--runs-on", "h300"], "unknown device 'h300'; did you mean 'h200'?"),
        (["--target", "decode", "--runs-on", "h200", "--batch", "0"], "batch is 0; it must be at least 1"),
        (["--target", "prefill", "--runs-on", "h200", "--context", "0"], "context is 0; it must be at least 1"),
        (["--target", "prefill", "--runs-on", "h200", "--context", "4096"], "nothing makes prefill faster"),
        (["--target", "prefill", "--runs-on", "h200", "--context", "4096"], "it runs from 8,192 tokens on"),
        (["--target", "prefill", "--runs-on", "a100", "--set", "weights.activations=fp8"], "nothing makes prefill"),
        (["--runs-on", "h200"], "runs_on is h200, and target size counts bytes, which are"),
        (["--budget-minutes", "nan"], "the budget is nan minutes; it must be more than 0"),
        (["--evaluation-window", "32"], "--evaluation-window is for windows of --text"),
        (["--batch", "4"], "batch is 4, and target size counts caches only of"),
    ],
)
def test_what_cannot_be_searched_for_is_refused_in_one_sentence(arguments, says, base, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("KOMPAKT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    words = ["search", str(base), "--limit", "perplexity=1%", "-r", "w4a16-rtn", *SMALL, *arguments]
    assert main([*words, "-o", str(tmp_path / "recipe.yaml")]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("warning: ")]
    assert len(lines) == 1 and lines[0].startswith("error: ") and says in lines[0], lines
    assert not list(tmp_path.glob("*.yaml"))


@pytest.mark.gpu
@pytest.mark.parametrize("target", ["decode", "prefill"])
def test_times_are_measured_where_there_is_a_cuda_device(target, tmp_path, monkeypatch):
    monkeypatch.setenv("KOMPAKT_CACHE", str(tmp_path / "cache"))
    sizes = {"hidden_size": 512, "intermediate_size": 1024, "num_attention_heads": 8, "num_key_value_heads": 2}
    directory = tiny_directory(tmp_path / "base", steps=20, **sizes)
    options = SearchOptions(limit=0.5, target=target, group_sizes=(128,), rounds=2, windows=6, loss_windows=2)
    overrides = {"calibration.samples": 4, "calibration.length": 64, "weights.method": "rtn"}
    result = search(directory, options=options, overrides={**overrides, "weights.activations": "fp8"})
    assert result["cost"]["basis"] == "measured" and all(row["cost"] > 0 for row in result["rows"])
    again = search(directory, options=options, overrides={**overrides, "weights.activations": "fp8"})
    assert [row["cost"] for row in again["rows"]] == [row["cost"] for row in result["rows"]]
