"""SageAttention: how an arithmetic is judged and chosen, and a recipe with it from `compress` to a loaded model."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny import tiny_directory
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from kompakt.compress import compress, evaluate, load, patch, plan
from kompakt.compress.artifact import read_policies, read_sidecar
from kompakt.compress.attention_calibration import SEQUENCES, choose_policies
from kompakt.compress.hf_attention import attached_layers, attention_in_use, attention_modules
from kompakt.compress.recipe import EvaluationOptions, Recipe
from kompakt.compress.restore import LimitExceeded, worst_attention
from kompakt.compress.runtime import AttentionBackend
from kompakt.quant.method import AttentionInputs, AttentionPolicy, Figures
from kompakt.quant.output_error import difference_sums, exact_output, figures
from kompakt.quant.sage import CANDIDATES, Sage, compare_mode

pytestmark = pytest.mark.usefixtures("one_thread")
WINDOW = 96
SHORT = {
    "calibration.samples": 4,
    "calibration.length": WINDOW,
    "evaluation.windows": 2,
    "evaluation.window": WINDOW,
}
OPTIONS: dict[str, Any] = {"causal": True, "window": None, "segments": None, "scaling": 0.25, "softcap": None}


def inputs_of(seed: int = 0, *, outlier: float = 1.0, shape: tuple[int, ...] = (2, 9, 3, 37, 16)) -> AttentionInputs:
    """Random inputs. outlier: factor of one channel of queries and keys. shape: batch, heads, KV heads, tokens, dim."""
    batch, heads, kv_heads, tokens, dim = shape
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(batch, heads, tokens, dim, generator=generator)
    key, value = (torch.randn(batch, kv_heads, tokens, dim, generator=generator) for _ in range(2))
    query[..., 3] *= outlier
    key[..., 3] *= outlier
    return AttentionInputs(query, key, value, {**OPTIONS, "sinks": None})


def test_figures_are_their_formulas():
    exact = torch.randn(3, 5, dtype=torch.float64)
    got = exact + 0.1 * torch.randn(3, 5, dtype=torch.float64)
    found = figures(difference_sums(got[:1], exact[:1]) + difference_sums(got[1:], exact[1:]))
    cosine = torch.nn.functional.cosine_similarity(got.flatten(), exact.flatten(), dim=0)
    assert found.cosine == pytest.approx(float(cosine), rel=1e-12)
    assert found.relative_l1 == pytest.approx(float((got - exact).abs().sum() / exact.abs().sum()), rel=1e-12)
    noise = (got - exact).square().mean()
    assert found.sqnr_db == pytest.approx(10 * math.log10(exact.square().mean() / noise), rel=1e-12)


def test_figures_of_nothing_and_of_garbage():
    zeros = torch.zeros(4)
    assert figures(difference_sums(zeros, zeros)) == Figures(1.0, 0.0, None)
    assert figures(difference_sums(torch.ones(4), zeros)).cosine == 0.0
    same = figures(difference_sums(torch.ones(4), torch.ones(4)))
    assert (same.relative_l1, same.sqnr_db) == (0.0, None)
    with pytest.raises(ValueError, match="NaN or infinite"):
        figures(difference_sums(torch.tensor([math.nan]), torch.ones(1)))


@pytest.mark.parametrize("mode", CANDIDATES)
def test_a_mode_is_compared_on_all_sequences(mode):
    inputs = inputs_of()
    found = compare_mode(inputs, mode)
    # Outputs lie on a sphere of radius ‖O‖ up to their noise: cos ≈ 1 − noise / (2·signal).
    assert found.sqnr_db is not None
    assert found.cosine == pytest.approx(1 - 10 ** (-found.sqnr_db / 10) / 2, abs=2e-4)
    # 7 bits of Q·Kᵀ, 3 bits of mantissa in P·V: between 20 and 60 dB, and never exact.
    assert 20 < found.sqnr_db < 60
    rows = [
        AttentionInputs(*(t[i : i + 1] for t in (inputs.query, inputs.key, inputs.value)), inputs.options)
        for i in (0, 1)
    ]
    alone = [compare_mode(row, mode).relative_l1 for row in rows]
    assert min(alone) < found.relative_l1 < max(alone)


def test_exact_output_is_softmax_attention():
    inputs = inputs_of()
    expected = torch.nn.functional.scaled_dot_product_attention(
        *(tensor.double() for tensor in (inputs.query, inputs.key, inputs.value)),
        is_causal=True,
        scale=0.25,
        enable_gqa=True,
    )
    torch.testing.assert_close(exact_output(inputs).double(), expected.transpose(1, 2), rtol=1e-5, atol=1e-6)


def test_the_first_arithmetic_within_the_threshold_is_taken():
    inputs = inputs_of(outlier=4.0)
    cosines = {mode: compare_mode(inputs, mode).cosine for mode in CANDIDATES}
    assert cosines["fp8_fp8"] < cosines["int8_fp8"] < 1
    policy = Sage(min_cosine=cosines["int8_fp8"], min_tokens=7).choose(inputs)
    assert (policy.mode, policy.min_tokens, policy.tokens) == ("int8_fp8", 7, 74)
    assert list(policy.tried) == ["int8_fp8"]
    assert policy.tried["int8_fp8"].cosine == cosines["int8_fp8"]
    strict = Sage(min_cosine=1.0).choose(inputs)
    assert strict.mode == "bf16"
    assert list(strict.tried) == list(CANDIDATES)
    assert "no mode has a cosine of at least 1.0" in strict.reason
    assert Sage(min_cosine=0.1).choose(inputs, ["fp8_fp8"]).mode == "fp8_fp8"
    assert Sage(min_cosine=0.1).choose(inputs, []).mode == "bf16"


def test_fp8_is_taken_where_one_token_outweighs_its_tile():
    """One key far larger than the others leaves them no levels in INT8; FP8 has an exponent for each."""
    inputs = inputs_of()
    inputs.key[:, :, 5] *= 100
    cosines = {mode: compare_mode(inputs, mode).cosine for mode in CANDIDATES}
    assert cosines["int8_fp8"] < cosines["fp8_fp8"]
    policy = Sage(min_cosine=cosines["fp8_fp8"]).choose(inputs)
    assert policy.mode == "fp8_fp8" and list(policy.tried) == list(CANDIDATES)


@pytest.mark.parametrize("mode", ["bf16", "int8_fp16", "int4_fp8"])
def test_a_named_mode_needs_no_data(mode):
    method = Sage(mode=mode)
    assert not method.needs_data
    policy = method.choose(None)
    assert (policy.mode, policy.tokens, policy.tried) == (mode, 0, {})
    assert method.modes == (() if mode == "bf16" else (mode,))


def test_policy_survives_json():
    policy = Sage().choose(inputs_of())
    assert AttentionPolicy.from_dict(json.loads(json.dumps(policy.as_dict(), allow_nan=False))) == policy


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"mode": "int2"}, "attention mode 'int2' is unknown to this kompakt; known: bf16, int8_fp16"),
        ({"min_tokens": 0}, "min_tokens is 0"),
        ({"tried": None}, "damaged"),
        ({"tried": {"int8_fp8": {"cosin": 1}}}, "damaged"),
        ({"patterns": []}, "damaged"),
    ],
    ids=str,
)
def test_damaged_policy_is_refused(change, says):
    content = {**AttentionPolicy("int8_fp8", 4).as_dict(), **change}
    with pytest.raises(ValueError, match=says):
        read_policies({"attention": {"layers": {"a": content}}})


def test_sidecar_without_attention_has_no_policies():
    assert read_policies({"version": 1}) == {}
    with pytest.raises(ValueError, match="holds no layers"):
        read_policies({"attention": []})


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny_directory(tmp_path_factory.mktemp("sage") / "base")


@pytest.fixture(scope="module")
def made(base, tmp_path_factory):
    """recipe → result of `compress`, made once."""
    kept: dict[str, Any] = {}

    def make(name: str):
        if name not in kept:
            output = tmp_path_factory.mktemp("made") / name
            kept[name] = compress(base, name, output, overrides=SHORT)
        return kept[name]

    return make


def ids_of(model: Any, tokens: int = WINDOW) -> torch.Tensor:
    return torch.randint(3, model.config.vocab_size, (2, tokens), generator=torch.Generator().manual_seed(3))


def test_attention_alone_keeps_every_bit_of_the_weights(base, made):
    output = made("sage").output
    stored = load_file(output / "model.safetensors")
    original = load_file(base / "model.safetensors")
    assert stored.keys() == original.keys()
    assert all(torch.equal(stored[name], original[name]) for name in stored)
    config = json.loads((output / "config.json").read_text("utf-8"))
    assert "quantization_config" not in config
    stock = AutoModelForCausalLM.from_pretrained(output)
    expected = AutoModelForCausalLM.from_pretrained(base)
    ids = ids_of(stock)
    with torch.no_grad():
        assert torch.equal(stock(ids).logits, expected(ids).logits)
    assert set(read_sidecar(output)["checksums"]) == {"model.safetensors", "kompakt.safetensors"}


@pytest.mark.parametrize("name", ["sage", "w4a8-sage"])
def test_result_says_what_each_layer_runs_in(made, name):
    result = made(name)
    layers = result.report["attention"]["layers"]
    assert list(layers) == [f"model.layers.{index}.self_attn" for index in range(4)]
    for policy in layers.values():
        assert policy["tokens"] == SEQUENCES * WINDOW
        assert policy["tried"][policy["mode"]]["cosine"] >= 0.998
        assert policy["min_tokens"] == 8192
    used = result.evaluation["attention"]
    # Two windows and four layers; windows are shorter than min_tokens, and quantized all the same.
    assert (used["ran"], sum(used["calls"].values())) == ("quantized", 8)
    assert (used["min_tokens"], used["window"]) == (8192, WINDOW)
    card = (result.output / "README.md").read_text("utf-8")
    assert "Calls of at least 8,192 queries" in card
    assert "Attention ran quantized in this evaluation (4 layers" in card
    assert "in use, windows this short run dense, below 8,192 queries" in card
    assert f"judged on {SEQUENCES * WINDOW} tokens" in card
    assert ("compressed-tensors" in card) == (name == "w4a8-sage")
    stored = Recipe.load(result.output / "recipe.yaml")
    assert stored.attention == Sage()


@pytest.mark.parametrize("name", ["sage", "w4a8-sage"])
def test_loaded_and_patched_models_are_the_same(base, made, name):
    output = made(name).output
    loaded, plain = load(output), AutoModelForCausalLM.from_pretrained(base)
    ids = ids_of(loaded)
    with torch.no_grad():
        before = plain(ids).logits
    patched = patch(plain, output)
    assert patched.attention == read_policies(read_sidecar(output))
    for model in (loaded, plain):
        for layer in attached_layers(model).values():
            layer.min_tokens = WINDOW
    with torch.no_grad():
        quantized = loaded(ids).logits
        assert torch.equal(plain(ids).logits, quantized)
        used = attention_in_use(loaded)
        assert used is not None
        assert (used["ran"], used["layers"]) == ("quantized", 4)
        patched.unpatch()
        assert torch.equal(plain(ids).logits, before)
    assert not torch.equal(quantized, before)


def test_loaded_model_is_dense_below_min_tokens(base, made):
    loaded, plain = load(made("sage").output), AutoModelForCausalLM.from_pretrained(base)
    ids = ids_of(loaded)
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, plain(ids).logits)


def test_directory_is_patched_only_into_its_model(base, made):
    model = AutoModelForCausalLM.from_pretrained(base)
    model.model.layers[1].mlp.up_proj.weight.data[3, 5] += 1
    with pytest.raises(ValueError, match=r"up_proj\.weight differs from that in .*; it was made from another model"):
        patch(model, made("sage").output)
    assert model.config._attn_implementation == "sdpa"


def test_older_directory_loads_dense(made, tmp_path):
    import shutil

    copy = tmp_path / "older"
    shutil.copytree(made("w4a8-sage").output, copy)
    file = copy / "kompakt.json"
    content = json.loads(file.read_text("utf-8"))
    del content["attention"]
    del content["recipe"]["attention"]
    file.write_text(json.dumps(content), "utf-8")
    assert attention_in_use(load(copy)) is None


def test_evaluation_reaches_quantized_attention_or_says_so(base, made, tmp_path):
    options = EvaluationOptions(window=WINDOW, windows=2)
    found = evaluate(made("sage").output, against=base, options=options, speed=False)
    assert found["attention"]["ran"] == "quantized"
    assert found["comparison"]["kl"] > 0
    dense = compress(base, "sage", tmp_path / "dense", overrides={**SHORT, "attention.min_cosine": 1.0})
    assert dense.evaluation is not None
    assert dense.evaluation["attention"]["ran"] == "dense"
    assert dense.evaluation["comparison"]["kl"] == 0
    assert "attention" not in evaluate(base, options=options, speed=False)


def test_damage_to_attention_is_noticed_on_reloading(base, tmp_path, monkeypatch):
    """The comparison runs quantized attention in both models, however short its probe is."""
    from kompakt.compress import read_back

    honest = read_back.read_policies

    def damaged(sidecar):
        return {name: AttentionPolicy("int4_fp8", 4096) for name in honest(sidecar)}

    monkeypatch.setattr(read_back, "read_policies", damaged)
    with pytest.raises(RuntimeError, match="the reloaded model differs"):
        compress(base, "sage", tmp_path / "out", overrides=SHORT)
    assert not (tmp_path / "out").exists()


def test_named_mode_is_compressed_without_calibration(base, tmp_path):
    result = compress(base, "sage", tmp_path / "named", overrides={**SHORT, "attention.mode": "int8_fp8"})
    assert result.report["calibration"] is None
    assert {policy["mode"] for policy in result.report["attention"]["layers"].values()} == {"int8_fp8"}
    assert "layers were not judged" in (tmp_path / "named" / "README.md").read_text("utf-8")


def test_weights_without_data_beside_attention_with_data(base, tmp_path):
    recipe = {"weights": "rtn", "attention": "sage"}
    result = compress(base, recipe, tmp_path / "mixed", overrides=SHORT)
    assert result.report["calibration"]["samples"] == SEQUENCES
    assert all(policy["tried"] for policy in result.report["attention"]["layers"].values())
    assert result.evaluation is not None
    assert result.evaluation["attention"]["ran"] == "quantized"


def test_disk_placement_gives_the_same_policies(base, made, tmp_path):
    result = compress(base, "w4a8-sage", tmp_path / "disk", overrides=SHORT, device_map="disk")
    assert result.report["attention"] == made("w4a8-sage").report["attention"]


def test_attention_is_judged_with_quantized_weights(base, made):
    """What stands in the sidecar is what the quantized model gives, not what the float model would."""
    from kompakt.compress.calibration import calibration_tokens
    from kompakt.compress.hf import load_tokenizer, load_written

    recipe = Recipe.load(made("w4a8-sage").report["recipe"])
    tokens = calibration_tokens(load_tokenizer(base), recipe.calibration).tokens
    stored = read_policies(made("w4a8-sage").report)
    for path, same in ((made("w4a8-sage").output, True), (base, False)):
        found = choose_policies(load_written(path), recipe.attention or Sage(), tokens, device=torch.device("cpu"))
        assert (found == stored) is same


def test_what_cannot_be_is_refused_in_one_sentence(base, tmp_path):
    with pytest.raises(ValueError, match=r"prefill_attention \(int8_fp8\) has no kernel on this device"):
        compress(base, "sage", tmp_path / "strict", overrides=SHORT, strict=True, device="cpu")
    with pytest.raises(ValueError, match="--resume keeps quantized layers"):
        compress(base, "sage", tmp_path / "resume", overrides=SHORT, resume=True)
    with pytest.raises(ValueError, match="weights needs a `method`"):
        compress(base, "sage", tmp_path / "flag", overrides={**SHORT, "weights.group_size": 64})
    assert not list(tmp_path.iterdir())


def test_a_kernel_for_one_arithmetic_is_enough_until_one_is_chosen(made, monkeypatch, caplog):
    from kompakt.compress import pipeline

    def backends(modes, device):
        return {
            mode: AttentionBackend("triton" if mode == "fp8_fp8" else "dense", "compute capability is 8.0")
            for mode in modes
        }

    monkeypatch.setattr(pipeline, "attention_backends", backends)
    cpu, recipe = torch.device("cpu"), Recipe.load("sage")
    pipeline.check_kernels(recipe, cpu, strict=True)
    pipeline.check_kernels(recipe, cpu, strict=True, policies={"a": AttentionPolicy("fp8_fp8", 4)})
    pipeline.check_kernels(recipe, cpu, strict=True, policies={"a": AttentionPolicy("bf16", 4)})
    assert not caplog.records
    chosen = {"a": AttentionPolicy("int8_fp8", 4), "b": AttentionPolicy("fp8_fp8", 4)}
    pipeline.check_kernels(recipe, cpu, strict=False, policies=chosen)
    assert "int8_fp8 runs through the attention that the model had before: compute capability is 8.0" in caplog.text
    with pytest.raises(ValueError, match="forbids the attention that the model had before"):
        load(made("sage").output, strict=True)


def test_limit_gives_attention_layers_back(base, tmp_path, monkeypatch):
    from kompakt.compress import pipeline

    increases = iter((0.5, 0.5, 0.0))
    honest = pipeline.verify_quality

    def measured(*arguments):
        found: Any = honest(*arguments)
        found["comparison"]["perplexity_increase"] = next(increases)
        return found

    monkeypatch.setattr(pipeline, "verify_quality", measured)
    limits = {**SHORT, "limits.perplexity_increase": "3%"}
    result = compress(base, "sage", tmp_path / "limited", overrides=limits)
    layers = result.report["attention"]["layers"]
    restored = [name for name, policy in layers.items() if policy["reason"].startswith("restored")]
    assert len(restored) == 2
    assert all(layers[name]["mode"] == "bf16" for name in restored)
    assert result.evaluation is not None
    assert result.evaluation["attention"]["ran"] == "partly quantized"
    ranked = sorted(layers, key=lambda name: layers[name]["tried"]["int8_fp8"]["cosine"])
    assert sorted(restored) == sorted(ranked[:2])


def test_restored_layers_are_dense_as_well(base, tmp_path, monkeypatch):
    from kompakt.compress import pipeline

    increases = iter((0.5, 0.0))
    honest = pipeline.verify_quality

    def measured(*arguments):
        found: Any = honest(*arguments)
        found["comparison"]["perplexity_increase"] = next(increases)
        return found

    monkeypatch.setattr(pipeline, "verify_quality", measured)
    recipe = {"weights": "rtn", "attention": "sage", "limits": {"perplexity_increase": "3%"}}
    report = compress(base, recipe, tmp_path / "out", overrides=SHORT).report
    kept = [line["name"] for line in report["coverage"] if line["status"] == "kept"]
    restored = {name.removesuffix(".self_attn.q_proj") for name in kept if name.endswith("q_proj")}
    assert len(restored) == 1
    layers = report["attention"]["layers"]
    assert {name.removesuffix(".self_attn") for name, policy in layers.items() if policy["mode"] == "bf16"} == restored


def test_limit_that_cannot_be_met_fails_with_numbers():
    policies = {name: AttentionPolicy("int8_fp8", 4) for name in "abcd"}
    limits = Recipe.load({"attention": "sage", "limits": {"perplexity_increase": "1%", "max_restored": 0.25}}).limits
    evaluation = {"comparison": {"perplexity_increase": 0.5}}
    assert worst_attention(policies, evaluation, limits) == ("a",)
    from kompakt.compress.restore import given_back

    policies["a"] = given_back(policies["a"])
    with pytest.raises(LimitExceeded, match=r"grew by 50.00%, the limit is 1.00%; 1 of 4 attention layers"):
        worst_attention(policies, evaluation, limits)


def test_plan_says_what_is_covered_and_what_is_not(base):
    found = plan(base, "sage", device="cpu").as_dict()
    assert found["scheme"] is None
    assert found["sizes"]["compressed_bytes"] == found["sizes"]["base_bytes"]
    assert [line["status"] for line in found["attention"]] == ["covered"] * 4
    assert {line["reason"] for line in found["coverage"]} >= {"the recipe leaves weights as they are"}
    assert [stage["name"] for stage in found["stages"]] == ["loading", "attention", "reading back", "evaluation"]
    used = [op for op, kernel in found["kernels"].items() if kernel["used"]]
    assert used == [f"prefill_attention ({mode})" for mode in CANDIDATES]
    named = plan(base, "sage", overrides={"attention.mode": "bf16"}, device="cpu").as_dict()
    assert {line["status"] for line in named["attention"]} == {"dense"}
    assert "attention" not in [stage["name"] for stage in named["stages"]]
    both = plan(base, "w4a8-sage", device="cpu").as_dict()
    assert [stage["name"] for stage in both["stages"]][1:3] == ["calibration", "attention"]
    wide = tiny_config(base, head_dim=320)
    assert {line["reason"] for line in plan(wide, "sage", device="cpu").as_dict()["attention"]} == {
        "head_dim 320 exceeds the kernel's 256"
    }


def test_plan_knows_chunks(tmp_path):
    config = CONFIG_MAPPING["llama4_text"](
        num_hidden_layers=4, hidden_size=64, head_dim=16, num_attention_heads=4, num_key_value_heads=2, vocab_size=64
    )
    config.architectures = ["Llama4ForCausalLM"]
    config.save_pretrained(tmp_path)
    lines = plan(tmp_path, "sage", device="cpu").as_dict()["attention"]
    assert [line["status"] for line in lines] == ["dense", "dense", "dense", "covered"]
    assert lines[0]["reason"] == "its mask is made of chunks"


def tiny_config(base, **changes):
    """A copy of a directory's config.json with other values, beside it."""
    target = base.parent / "-".join(f"{key}-{value}" for key, value in changes.items())
    target.mkdir(exist_ok=True)
    config = json.loads((base / "config.json").read_text("utf-8"))
    (target / "config.json").write_text(json.dumps({**config, **changes}), "utf-8")
    return target


def test_recipe_patches_a_model_with_its_tokenizer(base):
    model = AutoModelForCausalLM.from_pretrained(base)
    overrides = {"calibration.length": WINDOW, "attention.min_tokens": 8}
    with patch(model, "sage", overrides=overrides) as patched:
        assert len(attached_layers(patched)) == len(attention_modules(model))
        assert all(layer.mode == "int8_fp8" for layer in attached_layers(patched).values())
    assert attention_in_use(model) is None
