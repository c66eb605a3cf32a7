"""When 16-bit Linears multiply in float32, what is said and kept of it; and that both models are run alike."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from tiny import tiny_directory, write_text
from torch import nn
from torch.nn import functional

from kompakt.compress import assess, cpu_arithmetic, load
from kompakt.compress.assess import evaluate
from kompakt.compress.cpu_arithmetic import float32_linears
from kompakt.compress.evaluation import GenerationSpeed
from kompakt.compress.pipeline import compress, environment
from kompakt.compress.recipe import EvaluationOptions
from kompakt.kernels import dense_linear

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return tiny_directory(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(params=["slow", "fast"])
def speed(request, monkeypatch) -> str:
    """A CPU that is slow in 16 bit, and one that is not."""
    slow = request.param == "slow"
    for module in (dense_linear, cpu_arithmetic):
        monkeypatch.setattr(module, "multiplies_slowly", lambda dtype: slow and dtype in cpu_arithmetic.HALVES)
    cpu_arithmetic.say.cache_clear()
    return request.param


@pytest.fixture
def products(monkeypatch) -> list[torch.dtype]:
    """Dtypes that Linears are multiplied in, while `dense_linear` runs."""
    seen, multiply = [], dense_linear._product

    def product(x, weight, bias):
        seen.append(x.dtype)
        return multiply(x, weight, bias)

    monkeypatch.setattr(dense_linear, "_product", product)
    return seen


def test_linears_are_multiplied_in_float32_only_where_that_is_faster_and_only_inside(speed, products):
    layer, x = nn.Linear(64, 32, dtype=torch.bfloat16).requires_grad_(False), torch.randn(2, 9, 64).bfloat16()
    layer(x)
    assert not products
    with float32_linears(), float32_linears():
        y = layer(x)
        functional.linear(input=x, weight=layer.weight)
        layer.float()(x.float())
    assert y.dtype == torch.bfloat16
    assert products == ([torch.bfloat16] * 2 if speed == "slow" else [])


def test_attention_is_float32_only_where_it_is_differentiated(speed, monkeypatch):
    seen, attend = [], functional.scaled_dot_product_attention
    q, k = torch.randn(1, 9, 7, 16).bfloat16(), torch.randn(1, 3, 7, 16).bfloat16()
    mask = torch.zeros(7, 7).bfloat16()

    def differentiated(dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
        query = q.to(dtype).clone().requires_grad_()
        out = attend(query, k.to(dtype), k.to(dtype), attn_mask=mask.to(dtype), enable_gqa=True)
        assert out.dtype == dtype
        seen.append("ToCopyBackward" in type(out.grad_fn).__name__)
        return out, *torch.autograd.grad(out.float().square().sum(), query)

    plain = attend(q, k, k, enable_gqa=True)
    exact, own = differentiated(torch.float64), differentiated(torch.bfloat16)
    with float32_linears():
        assert torch.equal(attend(q, k, k, enable_gqa=True), plain)
        found = differentiated(torch.bfloat16)
    assert seen == [False, False, speed == "slow"]
    for ours, theirs, right in zip(found, own, exact, strict=True):
        distance, allowed = (float((one - right).detach().abs().max()) for one in (ours, theirs))
        assert distance <= 2 * allowed + 1e-7


def test_it_is_said_once(speed, caplog):
    layer, x = nn.Linear(64, 32, dtype=torch.bfloat16).requires_grad_(False), torch.randn(9, 64).bfloat16()
    with caplog.at_level(logging.WARNING, "kompakt"), float32_linears():
        for _ in range(3):
            layer(x)
    said = [record.getMessage() for record in caplog.records]
    sentence = (
        "this CPU has no instructions that multiply bf16: Linears multiply in float32 and round their results to it"
    )
    assert said == ([sentence] if speed == "slow" else [])


def test_it_stands_in_the_environment_of_a_cpu(speed):
    recorded = "bf16, fp16" if speed == "slow" else None
    assert environment(CPU).get("multiplied_in_float32") == recorded


def stored(directory: Path) -> dict[str, torch.Tensor]:
    with safe_open(directory / "model.safetensors", framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def test_what_is_saved_keeps_dtype_and_bits(speed, base, products, tmp_path):
    recipe = {"name": "tiny", "weights": {"method": "rtn", "group_size": 32}}
    result = compress(base, recipe, tmp_path / "out", overrides={"evaluation.windows": 2, "evaluation.window": 64})
    assert bool(products) == (speed == "slow")
    assert result.report["environment"].get("multiplied_in_float32") == ("bf16, fp16" if speed == "slow" else None)
    before, after = stored(base), stored(tmp_path / "out")
    kept = before.keys() & after.keys()
    assert "model.embed_tokens.weight" in kept and "model.norm.weight" in kept
    assert all(after[name].dtype == torch.bfloat16 and torch.equal(after[name], before[name]) for name in kept)
    scales = [tensor.dtype for name, tensor in after.items() if name.endswith("_scale")]
    assert scales and set(scales) == {torch.bfloat16}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"
    products.clear()
    assert load(tmp_path / "out")(torch.zeros(1, 64, dtype=torch.long)).logits.dtype == torch.bfloat16
    assert not products


def test_both_models_are_evaluated_alike_and_speed_is_measured_as_they_are(
    speed, base, products, tmp_path, monkeypatch
):
    timed = []

    def generation_speed(model, tokenizer):
        before = len(products)
        model(torch.zeros(1, 16, dtype=torch.long))
        timed.append(len(products) - before)
        return GenerationSpeed("cpu", 1, 2, 1, 1.0, 1.0, 1.0, 1.0)

    monkeypatch.setattr(assess, "generation_speed", generation_speed)
    text = str(write_text(tmp_path / "text.txt"))
    found = evaluate(base, against=base, options=EvaluationOptions(text=text, window=64, windows=2))
    assert found["comparison"]["kl"] == 0 and found["comparison"]["top1_agreement"] == 1
    assert found.get("multiplied_in_float32") == ("bf16" if speed == "slow" else None)
    per_pass = 4 * 7 + 1
    assert len(products) == (2 * 2 * per_pass if speed == "slow" else 0)
    assert timed == [0, 0]
