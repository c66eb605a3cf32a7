"""Peak memory of the solver, and of the device while a layer of the size of an 8B model's is calibrated."""

from __future__ import annotations

import pytest
import torch
from live_bytes import LiveBytes
from transformers import AutoModelForCausalLM, LlamaConfig

from kompakt.compress.coverage import cover, resolve_group_size
from kompakt.compress.hf_decoder import decoder_layers
from kompakt.compress.walk import quantize_layers
from kompakt.quant import grid, solver
from kompakt.quant.fireq import FireQ
from kompakt.quant.gptq import GPTQ
from kompakt.quant.grid import storage_snap


@pytest.mark.gpu
@pytest.mark.parametrize("method", [GPTQ(), FireQ()], ids=["gptq", "fireq"])
def test_one_layer_at_a_time_stays_within_its_budget(method, capsys):
    config = LlamaConfig(
        vocab_size=1024,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=2,
        num_attention_heads=32,
        num_key_value_heads=8,
    )
    torch.manual_seed(0)
    with torch.device("cuda"):  # which draws the weights in a moment
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model = model.cpu().eval().requires_grad_(False)
    torch.cuda.empty_cache()
    samples, length = 32, 2048
    tokens = torch.randint(0, 1024, (samples, length))
    coverage = cover(model, [name for name, _ in decoder_layers(model)], method)
    method = resolve_group_size(method, coverage)
    device = torch.device("cuda")
    result = quantize_layers(model, method, list(tokens.split(1)), coverage, device=device)
    layer = 2 * (2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14336)
    hessians = 4 * (3 * 4096**2 + 14336**2)
    hidden = 2 * samples * length * 4096
    activations = 3 * hidden
    budget = 1.5 * (layer + hessians + activations)
    with capsys.disabled():
        print(
            f"\npeak {result.peak_bytes / 1e9:.2f} GB, layer {layer / 1e9:.2f} + second moments {hessians / 1e9:.2f} "
            f"+ hidden states {activations / 1e9:.2f}; 1.5x is {budget / 1e9:.2f} GB; "
            f"{[round(report.seconds, 1) for report in result.reports]} s per layer"
        )
    assert result.peak_bytes < budget


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("method", [GPTQ(group_size=32), FireQ(group_size=32)], ids=["gptq", "fireq"])
def test_walk_holds_every_matrix_of_moments_once(method, monkeypatch):
    """All else that this layer needs takes less than half of down_proj's matrix; a second one would take all of it."""
    monkeypatch.setattr(solver, "FACTOR_BLOCK", 64)
    monkeypatch.setattr(solver, "COPIED_ELEMENTS", 2**14)
    monkeypatch.setattr(grid, "CPU_SEARCH_ELEMENTS", 2**14)
    config = LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=2048, num_hidden_layers=2, num_attention_heads=2
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval().requires_grad_(False)
    coverage = cover(model, [name for name, _ in decoder_layers(model)], method)
    batches = list(torch.randint(0, 64, (3, 16)).split(1))
    with LiveBytes() as held:
        quantize_layers(model, method, batches, coverage, device=torch.device("cpu"))
    assert held.peak < 1.5 * 4 * 2048**2


@pytest.mark.usefixtures("one_thread")
def test_solver_copies_neither_the_moments_nor_the_weights(monkeypatch):
    out, size, block, copied = 512, 2048, 64, 2**16
    monkeypatch.setattr(solver, "FACTOR_BLOCK", block)
    monkeypatch.setattr(solver, "COPIED_ELEMENTS", copied)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(size, size, generator=generator)
    weight, hessian = torch.randn(out, size, generator=generator), x.T @ x / size
    with LiveBytes() as held:
        cost = solver.column_cost(hessian, 128)
    strips = 4 * (3 * size * block + copied)
    assert held.peak - hessian.nbytes < strips
    with LiveBytes() as held:
        found = solver.solve(weight, hessian, 128, storage_snap(torch.bfloat16), search=False)
    extra = held.peak - hessian.nbytes - weight.nbytes
    assert extra < strips + found.codes.nbytes + found.scale.nbytes < weight.nbytes < hessian.nbytes
    assert found.weight.data_ptr() == weight.data_ptr() and cost.shape == (size,)
