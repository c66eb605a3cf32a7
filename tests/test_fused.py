"""Norms and rotary embeddings replaced for a while: what is found, that numbers stay, that nothing is left behind.

On a CPU the ops run their references.
"""

from __future__ import annotations

import gc
import logging
import sys
import weakref
from unittest import mock

import pytest
import torch
from attention_models import TOKENS, tiny
from cache_models import LONG, long_model, patched
from kernel_cases import skip_below
from torch import nn

from kompakt.compress import hf_fused
from kompakt.compress.hf_capture import everywhere, steps_of
from kompakt.compress.hf_fused import FOUND, ROTARY, fused, fused_on
from kompakt.kernels.activations import FP8_CAPABILITY, log_fallback
from kompakt.quant.kv_int4 import KVINT4

pytestmark = pytest.mark.usefixtures("one_thread")
# Norms of two layers, and that before the head.
NORMS = {"llama": 5, "qwen3": 9, "mistral": 5, "gemma2": 9, "gpt_oss": 5, "phi3": 5, "phi": 0}
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def counted(name: str):
    return mock.patch.object(hf_fused, name, wraps=getattr(hf_fused, name))


def state(model) -> list:
    """What `fused` changes."""
    owners = [vars(module).get("forward") for module in model.modules()]
    return [*owners, vars(sys.modules[type(model).__module__])[ROTARY]]


@pytest.mark.parametrize("dtype", list(DTYPES))
@pytest.mark.parametrize("family", list(NORMS))
@torch.no_grad()
def test_the_same_numbers(family, dtype):
    """The references run torch's operations in the models' order, so every bit is the same."""
    model = tiny(family, dtype=DTYPES[dtype])
    before, wanted = state(model), model(TOKENS).logits
    with counted("rms_norm") as norm, counted("apply_rotary") as rotary:
        assert torch.equal(model(TOKENS).logits, wanted) and not norm.called
        with fused(model):
            assert torch.equal(model(TOKENS).logits, wanted)
        assert norm.call_count == NORMS[family]
        # gpt-oss has cos and sin of half a head.
        assert rotary.call_count == (0 if family == "gpt_oss" else 2)
    assert state(model) == before
    wrong = mock.patch.object(hf_fused, "rms_norm", lambda x, weight, **_: x)
    with wrong, fused(model):
        assert NORMS[family] == 0 or not torch.allclose(model(TOKENS).logits, wanted, atol=0.1)


@torch.no_grad()
def test_everything_is_put_back():
    model = tiny("llama")
    before = state(model)
    with pytest.raises(RuntimeError, match="in the middle"), fused(model):
        assert state(model) != before
        raise RuntimeError("in the middle")
    assert state(model) == before
    with fused(model):
        inner = state(model)
        with fused(model), fused(tiny("llama")):
            pass
        assert state(model) == inner
    assert state(model) == before


def test_one_search_per_model_which_is_not_kept():
    model = tiny("mistral")
    with mock.patch.object(hf_fused, "search", wraps=hf_fused.search) as search:
        for _ in range(3):
            with fused(model):
                pass
        assert search.call_count == 1
    assert model in FOUND
    gone = weakref.ref(model)
    del model, search
    gc.collect()
    assert gone() is None


@torch.no_grad()
def test_searching_leaves_torch_and_the_model_as_they_are():
    model = tiny("gemma2")
    kept, random = {name: value.clone() for name, value in model.state_dict().items()}, torch.get_rng_state()
    calls = []
    for module in model.modules():
        module.register_forward_hook(lambda *_: calls.append(1))
    with fused(model):
        pass
    assert not calls and torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(value, kept[name]) for name, value in model.state_dict().items())


class Strange(nn.Module):
    """Modules that have a weight and an eps."""

    def __init__(self, kind: str):
        super().__init__()
        self.weight, self.eps, self.kind = nn.Parameter(torch.ones(16)), 1e-6, kind

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.kind == "raises":
            raise KeyError("gate")
        eps = 2 * self.eps if self.kind == "eps" else self.eps
        mean = x.float().abs().mean(-1, keepdim=True) if self.kind == "mean" else x.float().square().mean(-1, True)
        n = x.float() * torch.rsqrt(mean + eps)
        if self.kind == "rounding":
            return n.bfloat16().to(x.dtype) * self.weight
        # With weights of one these give what a norm gives.
        return (n * self.weight * self.weight).to(x.dtype) if self.kind == "square" else n.to(x.dtype)


@pytest.mark.parametrize("kind", ["raises", "eps", "mean", "rounding", "square", "no weight"])
def test_other_modules_are_left_alone(kind, caplog):
    log_fallback.cache_clear()
    model = nn.Sequential(Strange(kind), nn.LayerNorm(16), nn.LayerNorm(16, bias=False), nn.Linear(16, 16))
    with caplog.at_level(logging.WARNING), fused(model):
        assert not any("forward" in vars(module) for module in model.modules())
    assert "a Strange runs through transformers' own launches: it " in caplog.text
    assert "a LayerNorm runs through" in caplog.text and "no apply_rotary_pos_emb" in caplog.text


@torch.no_grad()
def test_forwards_of_others_and_other_calls_are_left_alone():
    model = tiny("llama")
    norm = model.model.norm
    replaced = lambda x: x + 1.0  # noqa: E731
    norm.forward = replaced
    with fused(model):
        assert norm.forward is replaced
    assert norm.forward is replaced
    del norm.forward
    x = torch.randn(2, 288)
    wanted = norm(x)
    with counted("rms_norm") as called, fused(model):
        assert torch.equal(norm(hidden_states=x), wanted)
        assert norm(x.double()).dtype == torch.float64 and not called.called
        with torch.enable_grad():
            assert norm(x.requires_grad_()).requires_grad
        assert not called.called


@torch.no_grad()
def test_rotary_calls_of_other_kinds_are_left_alone():
    from transformers.models.llama import modeling_llama

    query, cos, sin = torch.randn(1, 3, 4, 32), torch.randn(1, 3, 32), torch.randn(1, 3, 32)
    wanted = modeling_llama.apply_rotary_pos_emb(query, query, cos, sin, unsqueeze_dim=2)
    with fused(tiny("llama")), counted("apply_rotary") as called:
        got = modeling_llama.apply_rotary_pos_emb(query, query, cos, sin, unsqueeze_dim=2)
        assert torch.equal(got[0], wanted[0]) and torch.equal(got[1], wanted[1])
        mixed = modeling_llama.apply_rotary_pos_emb(query.transpose(1, 2).bfloat16(), query.transpose(1, 2), cos, sin)
        assert mixed[0].dtype == torch.float32 and not called.called


def test_prompts_and_steps_are_fused_where_kernels_run():
    """And nowhere else: not on a CPU."""
    model = patched(long_model("qwen3"), KVINT4(recent_tokens=20))
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    with counted("rms_norm") as norm, counted("apply_rotary") as rotary, everywhere(model):
        wanted = model.generate(LONG[:, :140], **options)
        assert not norm.called and not rotary.called
        with mock.patch.object(hf_fused, "triton_refusal", return_value=None):
            assert torch.equal(model.generate(LONG[:, :140], **options), wanted)
        assert (norm.call_count, rotary.call_count, steps_of(model).plain) == (4 * 9, 4 * 2, 6)


def test_a_gpu_without_the_kernels_is_named(caplog):
    log_fallback.cache_clear()
    model = nn.Sequential()
    with (
        mock.patch.object(hf_fused, "triton_refusal", return_value="triton is not installed"),
        caplog.at_level(logging.WARNING),
    ):
        with fused_on(torch.device("cpu"), model):
            pass
        assert not caplog.records
        with fused_on(torch.device("cuda"), model):
            pass
    assert "triton is not installed" in caplog.text and model not in FOUND


@pytest.mark.gpu
@pytest.mark.parametrize("family", ["llama", "qwen3", "mistral", "gemma2"])
@pytest.mark.parametrize("dtype", list(DTYPES))
@torch.no_grad()
def test_kernels_in_models_on_gpu(family, dtype):
    skip_below(FP8_CAPABILITY)
    model = tiny(family).to("cuda", DTYPES[dtype])
    exact = tiny(family, dtype=torch.float64).to("cuda")(TOKENS.cuda()).logits
    wanted = model(TOKENS.cuda()).logits.double()
    with fused(model):
        got = model(TOKENS.cuda()).logits.double()
    assert len(FOUND[model].forwards) == NORMS[family]
    # Norms that are rounded elsewhere cost what any rounding of a model in this dtype costs.
    assert (got - exact).norm() <= 1.5 * (wanted - exact).norm()
