"""Models with a compressed cache: plain generate() and forward() use it and give what a dense cache of the same rounded
tokens gives; users' wishes win; unpatching leaves nothing behind.
"""

from __future__ import annotations

import copy
import logging
from typing import Any

import pytest
import torch
from attention_models import SIZES, TOKENS, padded, tiny
from cache_models import (
    FAMILIES,
    LONG,
    PADS,
    in_steps,
    is_compressed,
    left_padding,
    long_model,
    patched,
    policy_of,
    reference_cache,
)
from decode_cases import statics_of
from transformers import CONFIG_MAPPING, AutoModel, AutoModelForCausalLM, DynamicCache, StaticCache

from kompakt.compress import CompressedCache, patch
from kompakt.compress.hf_attention import FORMER, attached_layers
from kompakt.compress.hf_cache import CACHE, CachedTensor
from kompakt.compress.hf_cache_hooks import ATTRIBUTE, PREPARE, cacheable_modules, run_as_before, run_by
from kompakt.quant.kv_fp8 import KVFP8
from kompakt.quant.kv_int4 import KVINT4
from kompakt.quant.method import AttentionPolicy

pytestmark = pytest.mark.usefixtures("one_thread")
GREEDY = {"max_new_tokens": 12, "do_sample": False}
DENSE = KVFP8(recent_tokens=1000)
METHODS = {
    "fp8": KVFP8(recent_tokens=8, sink_tokens=2),
    "int4": KVINT4(recent_tokens=8, sink_tokens=2),
    "all": KVFP8(recent_tokens=0, sink_tokens=0),
}


def close(got: torch.Tensor, wanted: torch.Tensor, dense: torch.Tensor) -> None:
    """Sums in another order may move a token over the edge between two codes, which is less than the codes cost."""
    cost = (wanted - dense).square().mean()
    assert cost > 0
    assert (got - wanted).square().mean() <= 1e-3 * cost


@pytest.mark.parametrize("steps", [(400,), (300, 1, 1, 98), (130, 1, 140, 129), (1, 150, 249)], ids=str)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_the_same_tokens_rounded(family, method, steps):
    model, method = long_model(family), METHODS[method]
    dense = in_steps(model, DynamicCache(config=model.config), LONG, steps)
    wanted = in_steps(model, reference_cache(model, method), LONG, steps)
    cache = CompressedCache(model.config, method)
    patched(model, method)
    got = in_steps(model, cache, LONG, steps)
    if len(steps) == 1:
        assert torch.equal(got, dense)
    else:
        close(got, wanted, dense)
    assert cache.get_seq_length() == 400 and cache.coded_tokens > 200


@pytest.mark.parametrize("method", ["fp8", "int4"])
@pytest.mark.parametrize("family", FAMILIES)
def test_generate_gives_what_the_reference_gives(family, method):
    model, method, mask = long_model(family), METHODS[method], left_padding()
    options = {**GREEDY, "attention_mask": mask, "return_dict_in_generate": True, "output_logits": True}
    wanted = model.generate(LONG, **{CACHE: reference_cache(model, method, list(PADS))}, **options)
    dense = model.generate(LONG, **options)
    patched(model, method)
    got = model.generate(LONG, **options)
    assert is_compressed(got[CACHE]) and got[CACHE].coded_tokens == 384
    assert torch.equal(got.sequences, wanted.sequences)
    same = min(12, int((dense.sequences == wanted.sequences).all(0)[400:].int().cumprod(0).sum()) + 1)
    close(*(torch.stack(found.logits)[:same] for found in (got, wanted, dense)))


@pytest.mark.parametrize("family", FAMILIES)
def test_dense_enough_generates_bit_for_bit_what_a_dense_cache_generates(family):
    model, mask = tiny(family), padded("left")
    wanted = [model.generate(TOKENS, attention_mask=mask, **GREEDY, **more) for more in ({}, {"num_beams": 3})]
    patched(model, DENSE)
    got = [model.generate(TOKENS, attention_mask=mask, **GREEDY, **more) for more in ({}, {"num_beams": 3})]
    assert all(torch.equal(a, b) for a, b in zip(wanted, got, strict=True))


@pytest.mark.parametrize("family", FAMILIES)
def test_row_of_a_padded_batch_generates_what_it_generates_alone(family):
    model = patched(long_model(family), METHODS["int4"])
    together = model.generate(LONG, attention_mask=left_padding(), **GREEDY)[:, 400:]
    for row, pad in enumerate(PADS):
        assert torch.equal(model.generate(LONG[row : row + 1, pad:], **GREEDY)[0, 400 - pad :], together[row])


def test_first_tokens_of_a_padded_row_stay_dense():
    model = patched(long_model("llama"), METHODS["int4"])
    cache = model.generate(LONG, attention_mask=left_padding(), return_dict_in_generate=True, **GREEDY)[CACHE]
    store = cache.compressed_layers[0]
    assert store.starts == list(PADS)
    alone = model.generate(LONG[2:, 256:], return_dict_in_generate=True, **GREEDY)[CACHE].compressed_layers[0]
    assert torch.allclose(store.sink_key[2], alone.sink_key[0], atol=1e-5)


@pytest.mark.parametrize("more", [{"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}], ids=str)
@pytest.mark.parametrize("family", ["llama", "qwen2", "mistral", "gemma3_text"])
def test_beams_are_those_of_the_reference(family, more):
    model, method = long_model(family), METHODS["fp8"]
    wanted = model.generate(LONG, **{CACHE: reference_cache(model, method)}, **GREEDY, **more)
    patched(model, method)
    assert torch.equal(model.generate(LONG, **GREEDY, **more), wanted)


def test_samples_are_those_of_the_reference():
    model, method = long_model("llama"), METHODS["fp8"]
    options = {"max_new_tokens": 12, "do_sample": True, "num_return_sequences": 2}
    torch.manual_seed(5)
    wanted = model.generate(LONG, **{CACHE: reference_cache(model, method)}, **options)
    patched(model, method)
    torch.manual_seed(5)
    assert torch.equal(model.generate(LONG, **options), wanted)


@pytest.mark.parametrize("helper", ["lookup", "model", "patched model"])
@pytest.mark.parametrize("family", ["llama", "qwen2", "mistral"])
def test_assisted_decoding_gives_the_greedy_tokens(family, helper):
    model, tokens = tiny(family), TOKENS[:1, :12].repeat(1, 4)
    wanted = model.generate(tokens, max_new_tokens=30, do_sample=False)
    options: dict[str, Any] = {"prompt_lookup_num_tokens": 3}
    if helper != "lookup":
        options = {"assistant_model": copy.deepcopy(model)}
        # A helper that is sometimes wrong, so that tokens are taken back.
        options["assistant_model"].lm_head.weight.data += 0.3 * torch.randn_like(model.lm_head.weight)
        if helper == "patched model":
            patched(options["assistant_model"], DENSE)
    patched(model, DENSE)
    crops = []
    original = CompressedCache.crop
    CompressedCache.crop = lambda self, count: (crops.append(int(count)), original(self, count))[1]
    try:
        got = model.generate(tokens, max_new_tokens=30, do_sample=False, **options)
    finally:
        CompressedCache.crop = original
    assert torch.equal(got, wanted)
    assert min(crops) < 0


def test_assisted_decoding_takes_coded_tokens_back():
    model = patched(long_model("llama"), KVFP8(recent_tokens=0))
    out = model.generate(LONG[:1], prompt_lookup_num_tokens=5, max_new_tokens=20, return_dict_in_generate=True)
    assert out[CACHE].get_seq_length() == out.sequences.shape[1] - 1


def test_second_turn_reads_the_first_from_the_cache():
    model, method = long_model("llama"), METHODS["int4"]
    cache = reference_cache(model, method)
    first = model.generate(LONG[:, :250], **{CACHE: cache}, **GREEDY)
    longer = torch.cat((first, LONG[:, :100]), dim=1)
    wanted = model.generate(longer, **{CACHE: cache}, **GREEDY)
    patched(model, method)
    mine = CompressedCache(model.config, method)
    assert torch.equal(model.generate(LONG[:, :250], **{CACHE: mine}, **GREEDY), first)
    assert torch.equal(model.generate(longer, **{CACHE: mine}, **GREEDY), wanted)
    assert mine.get_seq_length() == longer.shape[1] + 11


def test_forward_makes_a_cache_when_it_is_asked_for_one():
    model = patched(tiny("llama"), DENSE)
    assert is_compressed(model(TOKENS)[CACHE])
    assert is_compressed(model(TOKENS, use_cache=True)[CACHE])
    assert is_compressed(model.model(TOKENS)[CACHE])
    assert model(TOKENS, use_cache=False).get(CACHE) is None
    positions = torch.arange(TOKENS.shape[1])[None]
    cache = DynamicCache(config=model.config)
    assert model.model(TOKENS, None, positions, cache)[CACHE] is cache
    starts = model(TOKENS, attention_mask=padded("left"))[CACHE].compressed_layers[0].starts
    assert starts == [0, 9, 20]
    model.train()
    assert not is_compressed(model(TOKENS)[CACHE])


@pytest.mark.parametrize("kind", ["static", "dynamic"])
def test_what_the_user_asks_for_wins(kind):
    model = tiny("llama")
    wanted = model.generate(TOKENS, **GREEDY)
    patched(model, METHODS["int4"])
    options = {**GREEDY, "return_dict_in_generate": True}
    got = model.generate(TOKENS, cache_implementation=kind, **options)
    assert type(got[CACHE]) is {"static": StaticCache, "dynamic": DynamicCache}[kind]
    assert torch.equal(got.sequences, wanted)
    mine = DynamicCache(config=model.config)
    assert model.generate(TOKENS, **{CACHE: mine}, **options)[CACHE] is mine
    assert model.generate(TOKENS, use_cache=False, **options).get(CACHE) is None


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_that_is_not_patched_reads_a_compressed_cache_dequantized(family):
    model, method = long_model(family), METHODS["fp8"]
    steps = (300, 1, 99)
    unpatched = in_steps(model, CompressedCache(model.config, method), LONG, steps)
    dense = in_steps(model, DynamicCache(config=model.config), LONG, steps)
    patched(model, method)
    close(in_steps(model, CompressedCache(model.config, method), LONG, steps), unpatched, dense)


def test_rows_that_end_in_padding_run_dequantized_and_say_so(caplog):
    model, method = long_model("llama"), METHODS["fp8"]
    mask = torch.ones(3, 400, dtype=torch.long)
    mask[1, 350:] = 0
    steps = (300, 100)
    dense = in_steps(model, DynamicCache(config=model.config), LONG, steps, mask)[mask.bool()]
    wanted = in_steps(model, reference_cache(model, method), LONG, steps, mask)[mask.bool()]
    patched(model, method)
    with caplog.at_level(logging.WARNING):
        got = in_steps(model, CompressedCache(model.config, method), LONG, steps, mask)[mask.bool()]
    close(got, wanted, dense)
    assert "rows are packed, or end in padding" in caplog.text


def test_decoding_never_makes_dense_keys_and_values(monkeypatch):
    model = patched(long_model("gemma2"), METHODS["int4"])
    monkeypatch.setattr(CachedTensor, "dequantize", lambda self: pytest.fail("keys or values were dequantized"))
    model.generate(LONG, attention_mask=left_padding(), **GREEDY)
    in_steps(model, CompressedCache(model.config, METHODS["int4"]), LONG, (300, 60, 40))


def test_static_tensors_reach_every_layer():
    model, method = long_model("qwen2"), METHODS["int4"]
    torch.manual_seed(0)
    statics = statics_of(2, 32)
    options = {**GREEDY, "return_dict_in_generate": True, "output_logits": True}
    dense = model.generate(LONG, **options)
    wanted = model.generate(LONG, **{CACHE: reference_cache(model, method, statics=statics)}, **options)
    patched(model, method, statics)
    got = model.generate(LONG, **options)
    close(*(torch.stack(found.logits)[:2] for found in (got, wanted, dense)))
    assert torch.equal(got.sequences, wanted.sequences)


def test_prefill_runs_in_the_attention_of_its_own_slot():
    model, method = long_model("llama"), METHODS["fp8"]
    policies = {name: AttentionPolicy("int8_fp8", 50) for name in cacheable_modules(model)}
    run_by(model, policies, policy_of(model, method))
    model.generate(LONG, **GREEDY)
    for layer in attached_layers(model).values():
        assert dict(layer.ran) == {"int8_fp8": 1, "kv_cache": 11}


def test_patch_and_unpatch_by_a_recipe():
    model = long_model("llama")
    expected = model.generate(LONG, **GREEDY)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    keys = set(vars(model)), set(vars(model.model))
    done = patch(model, {"kv_cache": {"method": "kv_fp8", "recent_tokens": 8}})
    assert done.kv_cache is not None and done.kv_cache.method == KVFP8(recent_tokens=8)
    cache = model.generate(LONG, return_dict_in_generate=True, **GREEDY)[CACHE]
    assert is_compressed(cache)
    for again in ("kv-fp8", "sage", "w4a16-rtn"):
        with pytest.raises(ValueError, match="patched already; unpatch it first"):
            patch(model, again)
    assert is_compressed(model(LONG)[CACHE])
    done.unpatch()
    done.unpatch()
    assert (set(vars(model)), set(vars(model.model))) == keys
    assert not model.model._forward_pre_hooks and not model.model._forward_pre_hooks_with_kwargs
    assert model.config._attn_implementation == "eager"
    assert type(model(LONG)[CACHE]) is DynamicCache
    assert torch.equal(model.generate(LONG, **GREEDY), expected)
    assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())
    with patch(model, {"kv_cache": "kv_fp8"}):
        assert model.config._attn_implementation in FORMER
    assert not any(name in vars(model) for name in (ATTRIBUTE, PREPARE))


def test_copy_of_a_patched_model_is_patched_on_its_own():
    model = patched(long_model("llama"), METHODS["int4"])
    twin = copy.deepcopy(model)
    run_as_before(model)
    assert not is_compressed(model(LONG)[CACHE])
    got = twin.generate(LONG, return_dict_in_generate=True, **GREEDY)
    assert is_compressed(got[CACHE])
    with torch.no_grad():
        twin.lm_head.weight.zero_()
    assert twin.generate(LONG, **GREEDY)[0, 400:].tolist() == [0] * 12


def test_copied_cache_goes_its_own_way():
    model = patched(long_model("mistral"), METHODS["int4"])
    cache = CompressedCache(model.config, METHODS["int4"])
    model(LONG, **{CACHE: cache})
    twin = copy.deepcopy(cache)
    wanted = model(LONG[:, :5], **{CACHE: twin}).logits
    model(LONG[:, 50:200], **{CACHE: cache})
    assert (cache.get_seq_length(), twin.get_seq_length()) == (550, 405)
    other = CompressedCache(model.config, METHODS["int4"])
    model(LONG, **{CACHE: other})
    assert torch.equal(model(LONG[:, :5], **{CACHE: other}).logits, wanted)


@torch.no_grad()
def test_mistakes_are_named_and_corrupt_nothing():
    model, other = long_model("llama"), long_model("llama", num_key_value_heads=9)
    for item in (model, other):
        patched(item, KVFP8(recent_tokens=8, max_tokens=405))
    cache = model(LONG)[CACHE]
    expected = model(LONG[:, :3], **{CACHE: copy.deepcopy(cache)}).logits
    for mistake, says in (
        (lambda: other(LONG[:, :1], **{CACHE: cache}), "3 rows of 3 KV heads"),
        (lambda: model(LONG[:2, :1], **{CACHE: cache}), "made for a batch of 3, and 2 rows come"),
        (lambda: model(LONG[:, :6], **{CACHE: cache}), "406 tokens exceed the cache's max_tokens of 405"),
        (lambda: model.generate(LONG, max_new_tokens=20), "406 tokens exceed the cache's max_tokens of 405"),
        (lambda: cache.update(*torch.zeros(2, 3, 3, 1, 32), 7), "the cache has 2 layers, and layer 7 asks for it"),
        (lambda: cache.offload(0), "a compressed cache stays on its device"),
        (lambda: cache.layers[0].prefetch(), "a compressed cache stays on its device"),
        (lambda: cache.crop(3), "crop got 3; give a negative number"),
        (lambda: cache.crop(-401), "401 tokens cannot be taken from a cache of 400"),
    ):
        with pytest.raises(ValueError) as caught:
            mistake()
        assert says in str(caught.value) and "\n" not in str(caught.value)
    assert cache.get_seq_length() == 400
    assert torch.equal(model(LONG[:, :3], **{CACHE: cache}).logits, expected)


def test_keys_that_are_kept_too_long_are_refused():
    cache = CompressedCache(tiny("llama").config, DENSE)
    x = torch.randn(1, 3, 4, 32)
    cache.update(x, x, 0)
    key, _ = cache.update(x, x, 0)
    assert key.shape == (1, 3, 8, 32) and torch.equal(key + 0, torch.cat((x, x), 2))
    cache.update(x, x, 0)
    with pytest.raises(RuntimeError, match="kept beyond the forward pass"):
        _ = key + 0


def test_models_whose_cache_cannot_be_compressed_are_named():
    with pytest.raises(ValueError, match="DeepseekV3ForCausalLM caches a latent of its keys and values"):
        patch(tiny("deepseek_v3"), "kv-fp8")
    bert = AutoModel.from_config(CONFIG_MAPPING["bert"](hidden_size=32, num_attention_heads=2, num_hidden_layers=1))
    with pytest.raises(ValueError, match="BertModel does not generate with a cache of transformers"):
        patch(bert, "kv-fp8")
    falcon = AutoModelForCausalLM.from_config(CONFIG_MAPPING["falcon"](**SIZES))
    with pytest.raises(ValueError, match="FalconForCausalLM does not compute its attention through"):
        patch(falcon, "kv-fp8")
    model = tiny("llama")
    policy = policy_of(model, DENSE)
    policy.layers["model.layers.9.self_attn"] = {}
    with pytest.raises(ValueError, match=r"has no cache of a module model\.layers\.9\.self_attn"):
        run_by(model, {}, policy)
    assert model.config._attn_implementation == "eager" and ATTRIBUTE not in vars(model)
