"""What a `kv_cache` recipe chooses for a model: which layers' caches are compressed, and the static tensors of each.

A pass over the model, its attention dense, gives queries, keys and values of every attention layer on calibration text.
Where weights are quantized too, that has happened before, so that they are those of the model as it will run.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..quant.method import AttentionInputs, CachePolicy, KVCacheMethod
from .attention_calibration import observe_attention
from .hf_cache_hooks import cacheable_modules

log = logging.getLogger(__name__)
Progress = Callable[[str, int, int, str], None]
STATIC_ROPE = {"default", "linear", "llama3", "yarn"}
"""Rotary embeddings whose frequencies do not depend on how long a sequence is."""


def choose_cache(
    model: object,
    method: KVCacheMethod,
    tokens: Tensor | None,
    *,
    device: torch.device,
    progress: Progress = lambda stage, done, total, text: None,
) -> CachePolicy:
    """The policy of an unpatched model. tokens: (sequences, length) ids, None for a method that needs no data.

    Raises ValueError if none of the model's layers can be compressed. A layer whose attention works on something that
    cannot be looked at stays dense, with a warning.
    """
    modules = cacheable_modules(model)
    if not method.needs_data:
        return CachePolicy(method, {name: {} for name in modules})
    assert tokens is not None
    found: dict[str, dict[str, Tensor]] = {}

    def visit(name: str, inputs: AttentionInputs) -> None:
        if name in modules and name not in found:
            found[name] = {key: tensor.cpu() for key, tensor in method.statics(inputs).items()}
            progress("kv_cache", len(found), len(modules), name)

    tokens = tokens[: method.sequences]
    positions = None if method.spread_over is None else spread_positions(model, tokens, method.spread_over)
    with measured_shares(model, modules) as shares:
        reasons = observe_attention(model, tokens, visit, device=device, positions=positions)
    for name in modules:
        if name not in found:
            log.warning("the cache of %s stays dense: %s", name, reasons.get(name, "it was not called"))
    if not found:
        raise ValueError(f"no layer of {type(model).__name__} could be calibrated for a compressed cache")
    return CachePolicy(method, method.settled({name: found[name] for name in modules if name in found}, shares))


def spread_positions(model: Any, tokens: Tensor, count: int) -> Tensor | None:
    """Positions of calibration text, (sequences, length), whose sequences stand evenly in the first `count` positions,
    or in those that the model has. Attention with rotary embeddings looks at distances, so that only its keys and
    queries know where a sequence stands. None where that is not so, or there is no room.
    """
    config = model.config.get_text_config()
    sequences, length = tokens.shape
    room = min(count, getattr(config, "max_position_embeddings", None) or count) - length
    if room < 1 or not rotary_types(getattr(config, "rope_parameters", None)) <= STATIC_ROPE:
        return None
    starts = torch.linspace(0, room, sequences).long() if sequences > 1 else torch.tensor([room // 2])
    return starts[:, None] + torch.arange(length)


def rotary_types(parameters: Any) -> set[str]:
    """Kinds of rotary embeddings in a config's `rope_parameters`, which may be by type of layer; "none" without any."""
    if not isinstance(parameters, Mapping):
        return {"none"}
    if "rope_type" in parameters:
        return {str(parameters["rope_type"])}
    return set().union(*(rotary_types(value) for value in parameters.values())) or {"none"}


@contextmanager
def measured_shares(model: Any, names: Iterable[str]) -> Iterator[dict[str, float]]:
    """By attention module, the mean over tokens of ‖its output‖² / ‖what the module it is in was given‖², filled as the
    model runs; without modules where these are no tensors of the same tokens."""
    sizes: dict[str, Tensor] = {}
    shares: dict[str, float] = {}

    def inner(name: str, module: Any, args: Any, output: Any) -> None:
        if (size := token_sizes(output)) is not None:
            sizes[name] = size

    def outer(name: str, module: Any, args: Any, named: dict[str, Any], output: Any) -> None:
        added, size = sizes.pop(name, None), token_sizes(args or named.get("hidden_states"))
        if added is not None and size is not None and added.shape == size.shape:
            # Of each token, since norms make its hidden states one size, and a first token's may be a thousand others'.
            shares[name] = float((added / size.clamp_min(torch.finfo(size.dtype).tiny)).mean())

    hooks = []
    for name in names:
        layer = model.get_submodule(name.rpartition(".")[0])
        hooks.append(model.get_submodule(name).register_forward_hook(partial(inner, name)))
        hooks.append(layer.register_forward_hook(partial(outer, name), with_kwargs=True))
    try:
        yield shares
    finally:
        for hook in hooks:
            hook.remove()


def token_sizes(x: Any) -> Tensor | None:
    """(batch, tokens) ‖x‖² of hidden states, or of the first of several things; None if that is no tensor."""
    x = x[0] if isinstance(x, tuple) else x
    return x.detach().float().square().sum(dim=-1) if isinstance(x, Tensor) else None
