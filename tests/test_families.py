"""One generic walk over decoder families: layers, folds, walk, undo, reload, on tiny random models."""

from __future__ import annotations

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from kompakt.compress.coverage import cover, resolve_group_size
from kompakt.compress.hf_decoder import LayerCalls, decoder_layers, layerwise_logits, refuse_experts
from kompakt.compress.hf_folds import find_folds
from kompakt.compress.linear import CompressedLinear
from kompakt.compress.walk import Undo, quantize_layers
from kompakt.quant.block import Block
from kompakt.quant.fireq import FireQ
from kompakt.quant.method import weight_methods
from kompakt.quant.rtn import RTN

pytestmark = pytest.mark.usefixtures("one_thread")
SIZES = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GATED = {"norm:mlp", "norm:attn", "up", "value"}
FAMILIES = {
    "llama": ({}, 4),
    "llama-bias": ({"attention_bias": True, "mlp_bias": True}, 4),
    "llama-9-3": ({"hidden_size": 288, "num_attention_heads": 9, "num_key_value_heads": 3}, 4),
    "qwen2": ({}, 4),
    "qwen2-14-2": ({"hidden_size": 448, "num_attention_heads": 14, "num_key_value_heads": 2}, 4),
    "qwen3": ({"head_dim": 32}, 4),
    "mistral": ({"sliding_window": 8}, 4),
    "gemma": ({"head_dim": 16}, 4),
    "gemma2": ({"head_dim": 16, "sliding_window": 8}, 4),
    "gemma3_text": ({"head_dim": 16, "sliding_window": 8}, 4),
    "phi": ({"hidden_size": 64}, 2),
    "phi3": ({}, 4),
}
TOKENS = torch.randint(3, 128, (2, 24), generator=torch.Generator().manual_seed(1))


def tiny(family: str, dtype: torch.dtype = torch.float32):
    """A tiny random model whose weights are large enough for an error to show."""
    kind = family.partition("-")[0]
    config = CONFIG_MAPPING[kind](**{**SIZES, **FAMILIES[family][0]})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).to(dtype).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2:
            parameter.normal_(0, parameter.shape[-1] ** -0.5)
        elif "norm" in name and name.endswith("weight"):
            parameter.add_(torch.randn_like(parameter) * 0.2)
        else:
            parameter.normal_(0, 0.2)
    return model


def block_of(model, index: int = 0) -> Block:
    layers = decoder_layers(model)
    calls = LayerCalls(model, layers, [TOKENS])
    name, layer = layers[index]
    linears = {child: m for child, m in layer.named_modules() if isinstance(m, torch.nn.Linear)}
    hidden = calls.hidden
    return Block(
        name=name,
        module=layer,
        linears=linears,
        folds=[],
        inputs=hidden,
        arguments=calls.of_layer(index, torch.device("cpu")),
        schemes=dict.fromkeys(linears, RTN(group_size="channel").scheme()),
        scale_dtype=torch.bfloat16,
        device=torch.device("cpu"),
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_layerwise_run_equals_the_whole_model(family):
    model = tiny(family)
    expected = model(TOKENS, use_cache=False).logits
    assert torch.equal(layerwise_logits(model, decoder_layers(model), TOKENS, torch.device("cpu")), expected)
    assert torch.equal(model(TOKENS, use_cache=False).logits, expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_folds_are_found_and_exact(family):
    block = block_of(tiny(family))
    folds = find_folds(block)
    assert len(folds) == FAMILIES[family][1], [fold.name for fold in folds]
    expected = block.run(block.inputs[0], 0)
    _ = block.statistics
    generator = torch.Generator().manual_seed(5)
    for fold in folds:
        block.fold(fold, torch.rand(fold.size, generator=generator) * 3 + 0.2)
    replacements = {}
    for name, linear in block.linears.items():
        replacement = torch.nn.Linear(linear.in_features, linear.out_features, bias=linear.bias is not None)
        replacement.weight = torch.nn.Parameter(block.weight(name))
        replacement.bias = None if linear.bias is None else torch.nn.Parameter(block.bias(name))
        replacements[name] = replacement
    with block.replaced(replacements):
        got = block.run(block.inputs[0], 0)
        block_statistics = {name: item.hessian.clone() for name, item in block.statistics.items()}
        fresh = block_of_same(block, replacements)
    torch.testing.assert_close(got, expected, rtol=2e-4, atol=2e-4)
    rescaled = {fold.source for fold in folds}  # their outputs change, and with them what a token's error counts
    for name, hessian in block_statistics.items():
        if name in rescaled:
            continue
        torch.testing.assert_close(hessian, fresh[name], rtol=2e-3, atol=1e-4)
    assert torch.equal(block.run(block.inputs[0], 0), expected)


def block_of_same(block: Block, linears) -> dict[str, torch.Tensor]:
    """Second moments measured anew on the folded layer."""
    fresh = Block(
        name=block.name,
        module=block.module,
        linears=linears,
        folds=[],
        inputs=block.inputs,
        arguments=block.arguments,
        schemes=block.schemes,
        scale_dtype=block.scale_dtype,
        device=block.device,
    )
    return {name: item.hessian for name, item in fresh.statistics.items()}


def test_a_wrong_fold_is_dropped(monkeypatch, caplog):
    from kompakt.compress import hf_folds

    monkeypatch.setattr(hf_folds, "_value_channels", lambda size, kv, head_dim: torch.arange(size) % kv)
    folds = find_folds(block_of(tiny("llama-9-3")))
    assert "self_attn.v_proj" not in [fold.name for fold in folds]
    assert len(folds) == 3
    assert "v_proj" in caplog.text


@pytest.mark.parametrize("family", FAMILIES)
def test_walk_quantizes_everything_it_says_and_undo_restores_it(family):
    model = tiny(family, torch.bfloat16)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    expected = model(TOKENS, use_cache=False).logits
    names = [name for name, _ in decoder_layers(model)]
    method = FireQ(group_size=32)
    coverage = cover(model, names, method)
    method = resolve_group_size(method, coverage)
    undo = Undo()
    result = quantize_layers(model, method, [TOKENS], coverage, device=torch.device("cpu"), undo=undo)
    quantized = [line.name for line in coverage if line.status == "quantized"]
    assert quantized == [name for name, module in model.named_modules() if isinstance(module, CompressedLinear)]
    assert all(0 < report.error < 0.2 for report in result.reports), [report.error for report in result.reports]
    logits = model(TOKENS, use_cache=False).logits
    assert not torch.equal(logits, expected)
    undo.restore()
    assert {name: parameter.shape for name, parameter in model.named_parameters()} == {
        n: p.shape for n, p in before.items()
    }
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
    assert torch.equal(model(TOKENS, use_cache=False).logits, expected)


@pytest.mark.parametrize("key", sorted(weight_methods()))
def test_every_method_runs_and_beats_nothing_at_all(key):
    model = tiny("llama")
    options = {"group_size": "channel"} if key == "fp8" else {"group_size": 32}
    options |= {"steps": 3} if key == "signround" else {}
    method = weight_methods()[key](**options)
    coverage = cover(model, [name for name, _ in decoder_layers(model)], method)
    result = quantize_layers(model, method, [TOKENS, TOKENS.flip(0)], coverage, device=torch.device("cpu"))
    limit = {"fp8": 0.01, "signround": 0.3}.get(key, 0.1)
    assert all(0 < report.error < limit for report in result.reports), [report.error for report in result.reports]


def test_experts_are_refused_by_name():
    config = CONFIG_MAPPING["mixtral"](**SIZES, num_local_experts=4)
    model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(ValueError, match=r"model\.layers\.0\.mlp\.experts"):
        refuse_experts(decoder_layers(model))


def test_encoder_has_no_decoder_layers():
    with pytest.raises(ValueError, match="no decoder layers"):
        decoder_layers(torch.nn.Sequential(torch.nn.Linear(4, 4)))
