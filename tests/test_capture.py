"""Captured steps give the tokens of plain ones, whatever else happens to the cache between them."""

from __future__ import annotations

import copy
import gc
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext

import pytest
import torch
from cache_models import LONG, left_padding, long_model, patched, policy_of
from kernel_cases import skip_below

from kompakt.compress import hf_capture
from kompakt.compress.hf_cache import CACHE
from kompakt.compress.hf_cache_hooks import run_as_before
from kompakt.compress.hf_capture import COMPILED, CRITERIA, Steps, Unrecordable, everywhere, steps_of
from kompakt.kernels.activations import FP8_CAPABILITY
from kompakt.quant.kv_fp8 import KVFP8
from kompakt.quant.kv_int4 import KVINT4

pytestmark = pytest.mark.usefixtures("one_thread")
METHODS = {"int4": KVINT4(recent_tokens=20), "fp8": KVFP8(recent_tokens=0, sink_tokens=3)}
MANY = {"max_new_tokens": 90, "min_new_tokens": 90, "do_sample": False}


def both(model, ids, **options):
    """Generated with and without; the steps of the former."""
    wanted = model.generate(ids, **{**options, "disable_compile": True})
    with everywhere(model):
        got = model.generate(ids, **options)
        steps = steps_of(model)
    return got, wanted, steps


@pytest.mark.parametrize(
    ("kind", "family"),
    [*(("int4", name) for name in ("llama", "mistral", "gemma2", "qwen3", "gpt_oss")), ("fp8", "gemma2")],
)
def test_the_same_tokens_over_pages(kind, family):
    model = patched(long_model(family), METHODS[kind])
    options = {**MANY, "attention_mask": left_padding(), "return_dict_in_generate": True, "output_logits": True}
    got, wanted, steps = both(model, LONG, **options)
    assert torch.equal(got.sequences, wanted.sequences)
    for one, other in zip(got.logits, wanted.logits, strict=True):
        assert torch.allclose(one, other, atol=1e-5)
    assert steps.plain == 89
    for one, other in zip(got[CACHE].compressed_layers, wanted[CACHE].compressed_layers, strict=True):
        assert (one.tokens, one.coded) == (other.tokens, other.coded)
        assert one.following is not None and one.following.tolist() == [one.tokens, one.coded, 0, 0]


def test_a_window_that_fills_up_meanwhile():
    model = patched(long_model("mistral"), METHODS["int4"])
    got, wanted, steps = both(model, LONG[:, :120], **MANY)
    assert torch.equal(got, wanted) and steps.plain == 89


def test_second_turn_crop_and_another_batch():
    model = patched(long_model("llama"), METHODS["int4"])
    options = {"max_new_tokens": 8, "do_sample": False, "min_new_tokens": 8}
    with everywhere(model):
        cache = model.generate(LONG[:, :250], return_dict_in_generate=True, **options)[CACHE]
        plain = copy.deepcopy(cache)
        assert plain.compressed_layers[0].following is None
        cache.crop(-30)
        plain.crop(-30)
        first = model.generate(LONG[:, :300], **{CACHE: cache}, **options)
        assert torch.equal(
            model.generate(LONG[:1, :77], **options), model.generate(LONG[:1, :77], disable_compile=True, **options)
        )
    assert torch.equal(first, model.generate(LONG[:, :300], **{CACHE: plain}, **options))


@pytest.mark.parametrize(
    "more", [{"num_beams": 3}, {"prompt_lookup_num_tokens": 3}, {"cache_implementation": "static"}]
)
def test_what_is_not_captured_is_as_before(more):
    model = patched(long_model("llama"), METHODS["fp8"])
    got, wanted, steps = both(model, LONG[:1, :200], max_new_tokens=12, do_sample=False, disable_compile=False, **more)
    # Assisted decoding has steps of one token too.
    assert torch.equal(got, wanted) and (steps.plain > 0) == ("prompt_lookup_num_tokens" in more)


def test_a_mask_that_changes_is_not_ignored():
    """Inside, and of one token: what the caller says is padding is padding."""
    model = patched(long_model("llama"), METHODS["int4"])
    padded, whole = torch.ones(3, 401), torch.ones(3, 401)
    padded[1, :200] = 0
    with everywhere(model):
        cache = model.generate(LONG[:, :391], max_new_tokens=10, do_sample=False, return_dict_in_generate=True)[CACHE]
        plain, steps = copy.deepcopy(cache), steps_of(model)
        assert cache.compressed_layers[0].following is not None and cache.get_seq_length() == 400
        for mask in (padded, whole):
            one, other = copy.deepcopy(plain), copy.deepcopy(plain)
            for store in one.compressed_layers:
                store.follow(torch.zeros(4, dtype=torch.int32))
            got = model(LONG[:, :1], attention_mask=mask, **{CACHE: one}).logits
            assert torch.equal(got, model(LONG[:, :1], attention_mask=mask, **{CACHE: other}).logits)
        count = steps.plain
        # A second turn, after which the mask is looked at again.
        model(LONG[:, :2], **{CACHE: cache})
        mask = torch.cat((padded, torch.ones(3, 2)), dim=1)
        reason = steps.refusal({"input_ids": LONG[:, :1], "attention_mask": mask, CACHE: cache})
        assert "not the padding" in str(reason) and steps.plain == count


def test_prompts_are_read_with_fused_norms(monkeypatch):
    """Once per call, where steps would be recorded, and never once the model is as it was."""
    read = []

    @contextmanager
    def noted(device, model):
        read.append(device.type)
        yield

    monkeypatch.setattr(hf_capture, "fused_on", noted)
    model = patched(long_model("llama"), METHODS["fp8"])
    for options in ({}, {"num_beams": 2}):
        model.generate(LONG[:, :150], max_new_tokens=2, **options)
    assert read == ["cpu", "cpu"]
    for options in ({"disable_compile": True}, {"cache_implementation": "static"}):
        model.generate(LONG[:, :150], max_new_tokens=2, **options)
    run_as_before(model)
    model.generate(LONG[:, :150], max_new_tokens=2)
    assert read == ["cpu", "cpu"]


def test_caches_are_not_kept():
    model = patched(long_model("llama"), METHODS["fp8"])
    with everywhere(model):
        model.generate(LONG[:, :140], max_new_tokens=3, min_new_tokens=3, do_sample=False)
        gc.collect()
        assert steps_of(model).known() is None


def test_refusals_are_named():
    model = patched(long_model("llama"), METHODS["fp8"])
    steps = Steps(model)
    cache = model(LONG)[CACHE]
    token = LONG[:, :1]
    assert steps.refusal({"input_ids": token, CACHE: cache}) is None
    assert "not compressed" in str(steps.refusal({"input_ids": token}))
    assert "no token ids" in str(steps.refusal({CACHE: cache}))
    assert "output_attentions" in str(steps.refusal({"input_ids": token, CACHE: cache, "output_attentions": True}))
    assert "return_dict is False" in str(steps.refusal({"input_ids": token, CACHE: cache, "return_dict": False}))
    holes = torch.ones(3, 401)
    holes[0, 5] = 0
    assert "not the padding" in str(steps.refusal({"input_ids": token, CACHE: cache, "attention_mask": holes}))


def test_the_budget_holds():
    method = KVFP8(recent_tokens=0, max_tokens=410)
    model = patched(long_model("llama"), method)
    with everywhere(model), pytest.raises(ValueError, match="411 tokens exceed the cache's max_tokens of 410"):
        model.generate(LONG, max_new_tokens=20, min_new_tokens=20, do_sample=False)


def test_nothing_is_left_behind():
    model = patched(long_model("llama"), METHODS["fp8"])
    assert COMPILED in vars(model) and CRITERIA in vars(model)
    run_as_before(model)
    assert COMPILED not in vars(model) and CRITERIA not in vars(model)
    steps = steps_of(model)
    owner = steps.owner
    del model
    gc.collect()
    assert owner() is None


def test_a_copy_has_steps_of_its_own():
    model = patched(long_model("llama"), METHODS["fp8"])
    other = copy.deepcopy(model)
    for parameter in other.parameters():
        parameter.data.mul_(0.5)
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    with everywhere(model), everywhere(other):
        first, second = model.generate(LONG, **options), other.generate(LONG, **options)
        assert steps_of(model) is not steps_of(other) and steps_of(other).model is other
    assert torch.equal(first, model.generate(LONG, **options))
    assert torch.equal(second, other.generate(LONG, **options)) and not torch.equal(first, second)


def test_positions_hooks_and_prompts_in_parts(caplog):
    model = patched(long_model("llama"), METHODS["fp8"])
    steps = Steps(model)
    cache = model(LONG)[CACHE]
    step = {"input_ids": LONG[:, :1], CACHE: cache}
    three = torch.full((3, 3, 1), 400)
    assert "not one number" in str(steps.refusal({**step, "position_ids": three}))
    assert steps.refusal({**step, "position_ids": three[0]}) is None
    handle = model.model.layers[0].register_forward_hook(lambda *args: None)
    assert steps.refusal(step) == "model.layers.0 has a hook"
    handle.remove()
    assert steps.refusal(step) is None
    options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    with everywhere(model):
        model.generate(LONG[:1, :200], prefill_chunk_size=64, **options)
        assert steps_of(model).plain == 7 and "more than one token" not in caplog.text


def test_threads_take_turns():
    model = patched(long_model("llama"), METHODS["int4"])
    options = {"max_new_tokens": 25, "min_new_tokens": 25, "do_sample": False, "output_logits": True}
    options |= {"return_dict_in_generate": True}
    prompts = [LONG[:1, :180], LONG[1:2, :210]]
    wanted = [model.generate(prompt, disable_compile=True, **options) for prompt in prompts]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with everywhere(model), ThreadPoolExecutor(2) as pool:
            found = list(pool.map(lambda prompt: model.generate(prompt, **options), prompts))
    finally:
        sys.setswitchinterval(interval)
    for got, expected in zip(found, wanted, strict=True):
        assert torch.allclose(torch.stack(got.logits), torch.stack(expected.logits), atol=1e-5)


def test_what_cannot_be_recorded_runs_as_it_is(monkeypatch, caplog):
    """Once, and without a token that is counted twice."""
    model = patched(long_model("llama"), METHODS["int4"])
    wanted = model.generate(LONG, **MANY)
    step = Steps.step

    def broken(self, cache):
        if self.plain == 3:
            raise Unrecordable("a host reads the device")
        return step(self, cache)

    monkeypatch.setattr(Steps, "step", broken)
    with everywhere(model):
        assert torch.equal(model.generate(LONG, **MANY), wanted)
        assert "a host reads the device" in str(steps_of(model).failure)
    assert caplog.text.count("a host reads the device") == 1


@pytest.mark.gpu
@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2"])
@pytest.mark.parametrize("kind", list(METHODS))
def test_graphs_give_the_same_tokens(kind, family, monkeypatch):
    """Without the norms that are rounded in another order."""
    skip_below(FP8_CAPABILITY)
    monkeypatch.setattr(hf_capture, "fused_on", lambda device, model: nullcontext())
    model = long_model(family).to("cuda", torch.bfloat16)
    patched(model, METHODS[kind])
    assert policy_of(model, METHODS[kind]).layers
    options = {**MANY, "attention_mask": left_padding().cuda(), "return_dict_in_generate": True, "output_logits": True}
    got, wanted, steps = both(model, LONG.cuda(), **options)
    assert torch.equal(got.sequences, wanted.sequences)
    assert (steps.plain, steps.recorded, steps.replayed) == (1, 1, 87)
    for one, other in zip(got.logits, wanted.logits, strict=True):
        assert torch.allclose(one, other, atol=2e-2)


def on_device(kind: str):
    """A small model on the CUDA device that records its steps."""
    skip_below(FP8_CAPABILITY)
    model = long_model("llama").to("cuda", torch.bfloat16)
    return patched(model, METHODS[kind])


@pytest.mark.gpu
def test_a_recording_that_fails_leaves_sampling_as_it_was(monkeypatch, caplog):
    """The host reads the device in a layer, which nothing can record; sampling and later calls do not notice."""
    model = on_device("int4")
    options = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": True}
    prompt, mlp = LONG.cuda(), model.model.layers[1].mlp
    torch.manual_seed(5)
    wanted = model.generate(prompt, disable_compile=True, **options)
    forward = mlp.forward
    reading = {"on": True}

    def read(hidden):
        if reading["on"]:
            float(hidden.sum())
        return forward(hidden)

    monkeypatch.setattr(mlp, "forward", read)
    monkeypatch.setattr(hf_capture, "fused_on", lambda device, model: nullcontext())
    for _ in range(2):
        torch.manual_seed(5)
        assert torch.equal(model.generate(prompt, **options), wanted)
    steps = steps_of(model)
    assert steps.recorded == 0 and "cannot be recorded" in caplog.text
    reading["on"] = False
    torch.manual_seed(5)
    assert torch.equal(model.generate(prompt, **options), wanted)
    assert steps.recorded == 1 and steps.replayed > 0


@pytest.mark.gpu
def test_memory_of_recordings_comes_back():
    model = on_device("fp8")
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    used = []
    for _ in range(160):
        model.generate(LONG.cuda(), **options)
        gc.collect()
        used.append((torch.cuda.memory_allocated(), torch.cuda.memory_reserved()))
    assert steps_of(model).recorded == 160
    allocated, reserved = (max(column[80:]) - max(column[40:80]) for column in zip(*used, strict=True))
    assert allocated <= 0 and reserved <= 0, used


@pytest.mark.gpu
def test_another_turn_on_a_device(monkeypatch):
    monkeypatch.setattr(hf_capture, "fused_on", lambda device, model: nullcontext())
    model, prompt = on_device("int4"), LONG.cuda()
    options = {"max_new_tokens": 40, "min_new_tokens": 40, "do_sample": False}
    cache = model.generate(prompt[:, :250], return_dict_in_generate=True, **options)[CACHE]
    plain = copy.deepcopy(cache)
    for one in (cache, plain):
        one.crop(-30)
    first = model.generate(prompt[:, :300], **{CACHE: cache}, **options)
    assert steps_of(model).recorded == 2
    second = model.generate(prompt[:, :300], **{CACHE: plain}, disable_compile=True, **options)
    assert torch.equal(first, second)


@pytest.mark.gpu
def test_threads_on_a_device(monkeypatch):
    monkeypatch.setattr(hf_capture, "fused_on", lambda device, model: nullcontext())
    model = on_device("int4")
    options = {"max_new_tokens": 25, "min_new_tokens": 25, "do_sample": False}
    prompts = [LONG[:1, :180].cuda(), LONG[1:2, :210].cuda()]
    wanted = [model.generate(prompt, disable_compile=True, **options) for prompt in prompts]
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda prompt: model.generate(prompt, **options), prompts))
    for got, expected in zip(found, wanted, strict=True):
        assert torch.equal(got, expected)
