"""Models whose attention is patched: exact arithmetic equals eager attention, quantized arithmetic runs and is close,
and everything else is the unpatched model bit for bit.
"""

from __future__ import annotations

import copy
import logging
from collections import Counter
from typing import Any

import pytest
import torch
from attention_models import (
    DECODER_RUNS,
    DECODERS,
    ENCODERS,
    EPS,
    SIZES,
    TOKENS,
    capture_attention,
    encoded,
    encoded_right,
    follow_one,
    left,
    multimodal,
    output,
    packed,
    padded,
    plain,
    right,
    tiny,
    ways,
    with_padded_past,
    with_past,
    with_static_cache,
)
from transformers import CONFIG_MAPPING, AutoModel, AutoModelForCausalLM, StaticCache

from kompakt.compress import patch
from kompakt.compress.attention_calibration import choose_policies
from kompakt.compress.hf_attention import (
    ATTRIBUTE,
    NAMES,
    LayerAttention,
    attach,
    attention_in_use,
    attention_modules,
    check_attention,
    detach,
)
from kompakt.compress.hf_cache import CACHE
from kompakt.kernels.attention import MODES, prefill_attention
from kompakt.quant.method import AttentionPolicy
from kompakt.quant.sage import Sage

pytestmark = pytest.mark.usefixtures("one_thread")


def compare_with_eager(model: Any, run: Any) -> None:
    """The op's exact arithmetic is as far from eager attention as two roundings of one computation may be.

    How far eager attention in float32 is from itself in float64, without padding, where float64 masks give no NaN, says
    what rounding does to this model; both ways of computing may be off by it, in either direction. Beside it, 64
    roundings of the largest output, where that error happens to vanish.
    """
    exact = copy.deepcopy(model).double()
    if hasattr(exact, "set_experts_implementation"):
        exact.set_experts_implementation("eager")
    whole = plain if run in DECODER_RUNS else encoded
    rounding = (whole(exact) - whole(model)).abs().max()
    eager = run(model)
    follow_one(model, "bf16")
    got = run(model)
    found = ways(model)
    detach(model)
    assert set(found) == {"bf16"}, found
    assert (got - eager).abs().max() <= 2 * rounding + 64 * EPS * eager.abs().max()
    assert torch.equal(run(model), eager)


@pytest.mark.parametrize("run", DECODER_RUNS, ids=lambda run: run.__name__)
@pytest.mark.parametrize("family", DECODERS)
def test_exact_arithmetic_equals_eager_attention(family, run):
    compare_with_eager(tiny(family), run)


@pytest.mark.parametrize("run", [encoded, encoded_right], ids=lambda run: run.__name__)
@pytest.mark.parametrize("family", ENCODERS)
def test_exact_arithmetic_equals_eager_attention_in_encoders(family, run):
    compare_with_eager(tiny(family), run)


@pytest.mark.parametrize("mode", [mode for mode in MODES if mode != "bf16"])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "gpt_oss", "deepseek_v3"])
def test_layers_give_what_the_op_gives(family, mode):
    model = tiny(family)
    inputs = capture_attention(model, TOKENS)
    follow_one(model, mode)
    seen: dict[str, torch.Tensor] = {}
    hooks = []
    for name, module in attention_modules(model).items():
        projection = module.o_proj
        hooks.append(projection.register_forward_pre_hook(lambda _, args, name=name: seen.update({name: args[0]})))
    dense = plain(copy.deepcopy(tiny(family)))
    got = plain(model)
    for hook in hooks:
        hook.remove()
    first = next(iter(inputs))
    call = inputs[first]
    expected, _ = prefill_attention(call.query, call.key, call.value, mode=mode, **call.options)
    assert torch.equal(seen[first], expected.transpose(1, 2).flatten(2))
    assert ways(model) == Counter({mode: 2})
    assert not torch.equal(got, dense)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3_text"])
def test_padding_changes_no_quantized_row(family, side):
    model, mask = tiny(family), padded(side)
    follow_one(model, "int8_fp8")
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    together = output(model, attention_mask=mask, position_ids=positions, use_cache=False)
    assert set(ways(model)) == {"int8_fp8"}
    dense_model = tiny(family)
    for row, tokens in enumerate(TOKENS):
        alone = output(model, tokens[mask[row].bool()][None], use_cache=False)
        dense = output(dense_model, tokens[mask[row].bool()][None], use_cache=False)
        # Sums in another order may move a value over the edge between two codes, which is less than the codes cost.
        difference = (together[row, mask[row].bool()] - alone[0]).square().mean()
        assert difference <= 0.1 * (alone - dense).square().mean() + 1e-10


@pytest.mark.parametrize("mode", ["int8_fp16", "int8_fp8", "fp8_fp8"])
@pytest.mark.parametrize("family", ["llama", "qwen2", "mistral"])
def test_padded_batch_generates_what_single_rows_generate(family, mode):
    model, mask = tiny(family), padded("left")
    follow_one(model, mode)
    options = {"max_new_tokens": 6, "do_sample": False}
    together = model.generate(TOKENS, attention_mask=mask, **options)[:, 23:]
    assert ways(model)[mode] == 2
    for row, tokens in enumerate(TOKENS):
        alone = model.generate(tokens[mask[row].bool()][None], **options)
        assert torch.equal(together[row], alone[0, -6:])


@pytest.mark.parametrize("eager", [True, False], ids=["eager", "sdpa"])
@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3_text", "phi3"])
def test_short_calls_are_the_unpatched_model_bit_for_bit(family, eager):
    model = tiny(family, eager=eager)
    runs = (plain, left, right, packed, with_past, with_padded_past, with_static_cache)
    expected = [run(model) for run in runs]
    options: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False, "attention_mask": padded("left")}
    texts = [model.generate(TOKENS, **options, **extra) for extra in ({}, {"cache_implementation": "static"})]
    follow_one(model, "int8_fp8", min_tokens=24)
    for run, before in zip(runs, expected, strict=True):
        assert torch.equal(run(model), before), run.__name__
    for extra, before in zip(({}, {"cache_implementation": "static"}), texts, strict=True):
        assert torch.equal(model.generate(TOKENS, **options, **extra), before)
    assert set(ways(model)) == {"dense"}


@pytest.mark.parametrize("eager", [True, False], ids=["eager", "sdpa"])
@pytest.mark.parametrize("family", ENCODERS)
def test_short_calls_are_the_unpatched_encoder(family, eager):
    model = tiny(family, eager=eager)
    expected = [run(model) for run in (encoded, encoded_right)]
    follow_one(model, "int8_fp8", min_tokens=24)
    assert all(torch.equal(run(model), before) for run, before in zip((encoded, encoded_right), expected, strict=True))


def test_generation_with_static_cache_runs_the_prefill_quantized():
    model = tiny("llama")
    follow_one(model, "fp8_fp8")
    options: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False, "attention_mask": padded("left")}
    expected = model.generate(TOKENS, **options)
    assert torch.equal(model.generate(TOKENS, **options, cache_implementation="static"), expected)
    assert ways(model) == Counter({"fp8_fp8": 4, "dense": 16})


@pytest.mark.skipif("gemma4_text" not in CONFIG_MAPPING, reason="this transformers has no gemma4")
@pytest.mark.parametrize("eager", [True, False], ids=["eager", "sdpa"])
def test_layers_that_run_the_last_query_alone(eager):
    kinds = ["sliding_attention", "full_attention"] * 2
    shared = {"num_hidden_layers": 4, "num_kv_shared_layers": 2, "layer_types": kinds}
    sizes = {"head_dim": 16, "global_head_dim": 16, "sliding_window": 7, "vocab_size_per_layer_input": 128}
    model = tiny("gemma4_text", eager=eager, hidden_size_per_layer_input=8, **sizes, **shared)
    options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "attention_mask": padded("left")}
    expected = model.generate(TOKENS, **options)
    follow_one(model, "bf16")
    assert torch.equal(model.generate(TOKENS, **options), expected)
    # Older transformers runs them for every query.
    assert ways(model)["bf16"] in (2, 4)
    assert set(ways(model)) == {"bf16", "dense"}


def custom_mask() -> torch.Tensor:
    """A causal mask of the caller's own in which every third key is hidden."""
    mask = torch.ones(23, 23, dtype=torch.bool).tril()
    mask[:, 1::3] &= torch.eye(23, dtype=torch.bool)[:, 1::3]
    return torch.where(mask, 0.0, torch.finfo(torch.float32).min).expand(3, 1, 23, 23)


def holes() -> torch.Tensor:
    mask = torch.ones_like(TOKENS)
    mask[1, 5] = 0
    return mask


DENSE = {
    "gives a mask of its own": {"attention_mask": custom_mask()},
    "the padding mask has holes": {"attention_mask": holes()},
    "attention weights are asked for": {"output_attentions": True},
    "keyword cu_seq_lens_q is unknown": {"cu_seq_lens_q": torch.tensor([0, 23])},
}


@pytest.mark.parametrize("reason", DENSE)
def test_what_the_op_does_not_do_runs_as_before_and_says_why(reason, caplog):
    model = tiny("llama")
    expected = model(TOKENS, use_cache=False, **DENSE[reason])
    follow_one(model, "int8_fp8")
    with caplog.at_level(logging.WARNING):
        got = model(TOKENS, use_cache=False, **DENSE[reason])
    assert torch.equal(got.logits, expected.logits)
    (way,) = ways(model)
    assert way.startswith("dense: ")
    assert reason in way
    if "output_attentions" in DENSE[reason]:
        assert all(torch.equal(mine, theirs) for mine, theirs in zip(got.attentions, expected.attentions, strict=True))


def test_gradients_and_dropout_run_as_before():
    model = tiny("llama", attention_dropout=0.1).requires_grad_(True)
    model(TOKENS, use_cache=False).logits.square().mean().backward()
    expected = model.model.layers[0].self_attn.q_proj.weight.grad.clone()
    model.zero_grad()
    follow_one(model, "int8_fp8")
    model(TOKENS, use_cache=False).logits.square().mean().backward()
    assert torch.equal(model.model.layers[0].self_attn.q_proj.weight.grad, expected)
    assert ways(model) == Counter({"dense: gradients are needed": 2})
    with torch.no_grad():
        model.train()(TOKENS, use_cache=False)
        assert ways(model)["dense: attention has dropout"] == 2
        model.eval()(TOKENS, use_cache=False)
    assert ways(model)["int8_fp8"] == 2


def test_module_that_disagrees_with_its_mask_runs_as_before():
    model = tiny("llama", eager=False)
    follow_one(model, "int8_fp8")
    for module in attention_modules(model).values():
        module.is_causal = False
    plain(model)
    assert set(ways(model)) == {"dense: the module and its mask do not agree on causality"}


def test_every_layer_has_its_own_arithmetic():
    model = tiny("llama")
    first, second = attention_modules(model)
    attach(model, {first: LayerAttention.of(AttentionPolicy("fp8_fp8", 2)), second: LayerAttention.of(DENSE_POLICY)})
    one = plain(model)
    detach(model)
    follow_one(model, "fp8_fp8")
    assert not torch.equal(plain(model), one)
    detach(model)
    attach(model, {first: LayerAttention.of(AttentionPolicy("fp8_fp8", 2))})
    assert torch.equal(plain(model), one)
    used = attention_in_use(model)
    assert used is not None
    assert (used["ran"], used["layers"]) == ("quantized", 1)


DENSE_POLICY = AttentionPolicy("bf16", 2)


def test_patch_by_recipe_and_unpatch():
    model = tiny("llama", eager=False)
    expected = plain(model)
    recipe = {"attention": {"method": "sage", "mode": "int8_fp16", "min_tokens": 23}}
    patched = patch(model, recipe)
    assert {policy.mode for policy in patched.attention.values()} == {"int8_fp16"}
    assert not torch.equal(plain(model), expected)
    with pytest.raises(ValueError, match="patched already; unpatch it first"):
        patch(model, recipe)
    with pytest.raises(ValueError, match="patched already; unpatch it first"):
        patch(model, "w4a16-rtn")
    assert ways(model) == Counter({"int8_fp16": 2})
    patched.unpatch()
    patched.unpatch()
    assert torch.equal(plain(model), expected)
    assert model.config._attn_implementation == "sdpa"
    assert not any(ATTRIBUTE in vars(module) for module in model.modules())
    with patch(model, recipe):
        assert model.config._attn_implementation in NAMES.values()
    assert torch.equal(plain(model), expected)


@pytest.mark.parametrize("family", ENCODERS)
def test_encoder_is_patched_by_a_recipe(family):
    model, mask = tiny(family, eager=False), padded("right")
    expected = encoded_right(model)
    with patch(model, {"attention": {"method": "sage", "mode": "int8_fp8", "min_tokens": 8}}):
        together = output(model, attention_mask=mask)
        assert set(ways(model)) == {"int8_fp8"}
        alone = output(model, TOKENS[1:2, :14])
        error = (together[mask.bool()] - expected).square().mean()
        assert 0 < error < 0.01 * expected.square().mean()
        assert (together[1, :14] - alone[0]).square().mean() <= 0.1 * error
    assert torch.equal(encoded_right(model), expected)


@pytest.mark.parametrize("family", ENCODERS)
def test_encoder_layers_are_judged(family):
    model = tiny(family)
    policies = choose_policies(model, Sage(), TOKENS, device=torch.device("cpu"))
    assert list(policies) == list(attention_modules(model))
    assert all(policy.tokens == 46 for policy in policies.values())
    assert not any(ATTRIBUTE in vars(module) for module in model.modules())


def test_capture_gives_the_inputs_of_every_layer_and_leaves_the_model_alone():
    model = tiny("gemma2")
    expected = plain(model)
    found = capture_attention(model, TOKENS)
    assert list(found) == list(attention_modules(model))
    windows = [call.options["window"] for call in found.values()]
    assert sorted(windows, key=str) == [7, None]
    for call in found.values():
        assert call.query.shape == (3, 4, 23, 16)
        assert call.key.shape == call.value.shape == (3, 2, 23, 16)
        assert call.options["softcap"] == 3.0
    only = capture_attention(model, TOKENS, names=[next(iter(found))])
    assert list(only) == [next(iter(found))]
    assert torch.equal(plain(model), expected)
    assert model.config._attn_implementation == "eager"


def test_layer_whose_mask_is_not_understood_stays_dense():
    model = tiny("llama4_text") if "llama4_text" in CONFIG_MAPPING else pytest.skip("no llama4")
    policies = choose_policies(model, Sage(), TOKENS, device=torch.device("cpu"))
    reasons = {policy.reason for policy in policies.values() if policy.mode == "bf16"}
    assert any("chunked_overlay" in reason for reason in reasons), policies


def test_models_that_cannot_be_patched_are_named():
    falcon = AutoModelForCausalLM.from_config(CONFIG_MAPPING["falcon"](**SIZES))
    with pytest.raises(ValueError, match="FalconForCausalLM does not compute its attention through"):
        check_attention(falcon)
    t5 = AutoModel.from_config(CONFIG_MAPPING["t5"](d_model=32, num_layers=1, num_heads=2, d_kv=16, vocab_size=64))
    with pytest.raises(ValueError, match="T5Model is an encoder-decoder"):
        patch(t5, "sage")
    indexed = tiny("deepseek_v3")
    indexed.config.layer_types = ["full_attention", "indexed_attention"]
    with pytest.raises(ValueError, match="has indexed_attention, which works on the mask itself"):
        check_attention(indexed)
    llama = tiny("llama")
    llama.config._attn_implementation_internal = "flash_attention_2"
    with pytest.raises(ValueError, match="runs attention 'flash_attention_2'; load it with attn_implementation sdpa"):
        patch(llama, {"attention": {"method": "sage", "mode": "int8_fp8"}})
    with pytest.raises(ValueError, match="no attention module model"):
        attach(tiny("llama"), {"model.layers.7": LayerAttention.of(DENSE_POLICY)})


def test_text_tower_alone_is_judged():
    model = multimodal()
    policies = choose_policies(model, Sage(), TOKENS, device=torch.device("cpu"))
    assert len(policies) == 2
    assert all("language_model" in name and policy.tried for name, policy in policies.items())


def test_text_tower_alone_is_patched():
    model = multimodal()
    before = model.config.vision_config._attn_implementation
    expected = output(model)
    follow_one(model, "int8_fp8")
    assert model.config.vision_config._attn_implementation == before
    assert not torch.equal(output(model), expected)
    assert set(ways(model)) == {"int8_fp8"}
    detach(model)
    assert torch.equal(output(model), expected)


def test_compiled_prefill_is_the_same():
    model = tiny("llama")
    follow_one(model, "int8_fp8")
    expected = left(model)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager")
    got = compiled(TOKENS, attention_mask=padded("left"), use_cache=False).logits[padded("left").bool()]
    assert torch.equal(got, expected)
    assert set(ways(model)) == {"int8_fp8"}


def compiled_steps(model: Any) -> torch.Tensor:
    """Logits of three tokens decoded from a static cache by one compiled graph."""
    torch._dynamo.reset()
    step = torch.compile(model, backend="eager", fullgraph=True)
    cache = StaticCache(config=model.config, max_cache_len=40)
    with torch.no_grad():
        model(TOKENS, **{CACHE: cache}, use_cache=True)
        found = [step(TOKENS[:, i : i + 1], **{CACHE: cache}, use_cache=True).logits for i in range(3)]
    return torch.cat(found, dim=1)


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_decoding_compiles_into_one_graph_and_is_unchanged(family):
    model = tiny(family, eager=False)
    expected = compiled_steps(model)
    follow_one(model, "int8_fp8", min_tokens=24)
    assert torch.equal(compiled_steps(model), expected)
