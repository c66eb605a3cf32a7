"""Attention layers judged on calibration text: queries, keys and values as they arrive, one layer at a time.

A pass over the model, its attention dense, gives every attention layer the inputs that it will have; what is visited is
dropped before the next layer runs. Where weights are quantized too, that has happened before, so that attention is
judged on the model as it will run. Prefill kernels work on one sequence as on many, so a few long ones are enough.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn

from ..kernels.attention import Mode
from ..quant.method import AttentionInputs, AttentionMethod, AttentionPolicy
from .hf_attention import LayerAttention, attach, check_attention, detach
from .hf_decoder import LayerCalls, decoder_layers, resident
from .runtime import refusal

SEQUENCES = 2
"""Windows of calibration text that a layer is judged on."""
Progress = Callable[[str, int, int, str], None]
DENSE = AttentionPolicy("bf16", 1)


def choose_policies(
    model: Any,
    method: AttentionMethod,
    tokens: torch.Tensor | None,
    *,
    device: torch.device,
    progress: Progress = lambda stage, done, total, text: None,
) -> dict[str, AttentionPolicy]:
    """Policy by name of attention module. tokens: (sequences, length) ids, None for a method that needs no data.

    Raises ValueError if the model's attention cannot be patched, or is patched.
    """
    modules = check_attention(model)
    if not method.needs_data:
        return {name: method.choose(None, method.modes) for name in modules}
    assert tokens is not None
    found: dict[str, AttentionPolicy] = {}

    def visit(name: str, inputs: AttentionInputs) -> None:
        if name not in found:
            refused: dict[Mode, str | None] = {mode: refusal(mode, inputs) for mode in method.modes}
            usable: list[Mode] = [mode for mode, reason in refused.items() if reason is None]
            found[name] = method.choose(inputs, usable)
            if not usable and refused:
                found[name] = replace(found[name], reason=str(next(iter(refused.values()))))
            progress("attention", len(found), len(modules), found[name].mode)

    reasons = observe_attention(model, tokens[:SEQUENCES], visit, device=device)
    min_tokens = next((policy.min_tokens for policy in found.values()), 1)
    for name, reason in reasons.items():
        if name not in found:
            found[name] = replace(DENSE, min_tokens=min_tokens, reason=reason)
    return {name: found[name] for name in modules}


@torch.no_grad()
def observe_attention(
    model: Any,
    tokens: torch.Tensor,
    visit: Callable[[str, AttentionInputs], None],
    *,
    device: torch.device | None = None,
    positions: torch.Tensor | None = None,
) -> dict[str, str]:
    """Runs an unpatched model once over `tokens`, (batch, length) ids, and calls `visit` at every attention layer.

    positions: of the tokens, likewise; from 0 on by default. device: where one decoder layer at a time runs, default
    where its weights are. Returns, for layers whose calls the op could not have run, the reason by name.
    """
    layers = {name: LayerAttention(DENSE, None, 1, observe=partial(visit, name)) for name in check_attention(model)}
    training = [module for module in model.modules() if module.training]
    attach(model, layers)
    try:
        model.eval()
        run_layers(model, tokens, device, positions)
    finally:
        detach(model)
        for module in training:
            module.training = True
    reasons = {}
    for name, layer in layers.items():
        refused = [way.removeprefix("dense: ") for way in layer.ran if way.startswith("dense: ")]
        if refused or not layer.ran:
            reasons[name] = refused[0] if refused else "it did not run on the calibration text"
    return reasons


def run_layers(
    model: Any, tokens: torch.Tensor, device: torch.device | None, positions: torch.Tensor | None = None
) -> None:
    """One pass without a head: decoder layer by decoder layer, or the whole model where there are none to be found, or
    where the first ones found may be those of another tower.
    """
    try:
        layers = decoder_layers(model) if model.config.get_text_config() is model.config else []
    except ValueError:
        layers = []
    if not layers:
        place = next(model.parameters()).device
        model(tokens.to(place), **({} if positions is None else {"position_ids": positions.to(place)}))
        return
    calls = LayerCalls(model, layers, [tokens], positions)
    hidden = calls.hidden[0]
    for index, (_, layer) in enumerate(layers):
        place = device or home_of(layer)
        args, kwargs = calls.of_layer(index, place)[0]
        with resident(layer, place):
            output = layer(hidden.to(place), *args, **kwargs)
        hidden = output[0] if isinstance(output, tuple) else output


def home_of(layer: nn.Module) -> torch.device:
    """Where a layer's weights are; offloaded ones are worked on by the CPU."""
    device = next(layer.parameters()).device
    return torch.device("cpu") if device.type == "meta" else device
