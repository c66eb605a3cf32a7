"""What a `sparsity` recipe chooses for a model: a pattern for every head of every full attention layer.

A pass over the model, its attention dense, gives queries, keys and values of every attention layer on calibration text,
where weights are quantized those of the quantized model. Layers with a sliding window, chunks, or no causal mask are
left alone, which is said once.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..quant.method import AttentionInputs
from ..sparsify.method import SparseInputs, SparsityMethod, SparsityPolicy
from ..sparsify.patterns import Dense
from .attention_calibration import observe_attention
from .hf_attention import check_attention, full_attention, query_heads

log = logging.getLogger(__name__)
Progress = Callable[[str, int, int, str], None]


@dataclass(frozen=True)
class Observed:
    """What a method keeps of each layer. heads: query heads of all, by attention module, in order. profiles: of the
    layers that may be sparse, None for a method that needs no data. reasons: why others may not be.
    """

    heads: dict[str, int]
    profiles: dict[str, Any]
    reasons: dict[str, str]


def choose_sparsity(
    model: Any,
    method: SparsityMethod,
    tokens: Tensor | None,
    *,
    device: torch.device,
    progress: Progress = lambda stage, done, total, text: None,
) -> dict[str, SparsityPolicy]:
    """Policies of an unpatched model by attention module. tokens: (sequences, length) ids, None for a method that needs
    no data.

    Raises ValueError if the model has no layer that could be sparse.
    """
    return chosen_from(observed(model, method, tokens, device=device, progress=progress), method)


def chosen_from(seen: Observed, method: SparsityMethod) -> dict[str, SparsityPolicy]:
    """Policies of all layers; those that may not be sparse are dense, with their reason."""
    found = method.choose(seen.profiles, {name: seen.heads[name] for name in seen.profiles})
    for name, why in seen.reasons.items():
        found[name] = SparsityPolicy((Dense(),) * seen.heads[name], method.min_length, reason=why)
    return {name: found[name] for name in seen.heads}


def observed(
    model: Any,
    method: SparsityMethod,
    tokens: Tensor | None,
    *,
    device: torch.device,
    progress: Progress = lambda stage, done, total, text: None,
) -> Observed:
    """One pass over the model, see the module. Raises ValueError if it has no layer that could be sparse."""
    modules = check_attention(model)
    heads = {name: query_heads(module) for name, module in modules.items()}
    reasons = {name: why for name, module in modules.items() if (why := full_attention(module)) is not None}
    profiles: dict[str, Any] = {name: None for name in modules if name not in reasons}
    if method.needs_data:
        assert tokens is not None

        def visit(name: str, inputs: AttentionInputs) -> None:
            if name in reasons or profiles.get(name) is not None:
                return
            why = unusable(inputs)
            if why is not None:
                reasons[name] = why
                return
            options = inputs.options
            usable = SparseInputs(inputs.query, inputs.key, inputs.value, options["scaling"], options["softcap"])
            profiles[name] = method.profile(usable)
            done = sum(profile is not None for profile in profiles.values())
            progress("sparsity", done, len(modules), name)

        refused = observe_attention(model, tokens[: method.sequences], visit, device=device)
        for name, profile in profiles.items():
            if profile is None:
                reasons.setdefault(name, refused.get(name, "it did not run on the calibration text"))
    usable = [name for name in modules if name not in reasons]
    if not usable:
        raise ValueError(f"no attention layer of {type(model).__name__} can be sparse: {next(iter(reasons.values()))}")
    tell(model, len(usable), reasons)
    return Observed(heads, {name: profiles[name] for name in usable}, reasons)


def unusable(inputs: AttentionInputs) -> str | None:
    """Why a layer cannot be sparse, or judged; None if it can."""
    options = inputs.options
    if not options["causal"]:
        return "its mask is not causal"
    if options["window"] is not None:
        return "it has a sliding window"
    return None if options["segments"] is None else "its calibration text is padded"


def tell(model: Any, usable: int, reasons: dict[str, str]) -> None:
    """Warns where much of a model is not full attention."""
    layers = getattr(model.config.get_text_config(), "num_hidden_layers", usable)
    if usable < layers:
        why = next(iter(reasons.values()), "others have no attention of transformers' interface")
        log.warning(
            "sparse prefill applies to %d of %d layers and gains little on such a model; others stay as they are: %s",
            usable,
            layers,
            why,
        )
