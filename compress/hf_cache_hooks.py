"""How a compressed cache becomes the one that `generate()` and plain forward passes use, and how that is undone.

`generate` asks the model itself for a cache (`_prepare_cache_for_generation`), which is overridden on the instance; a
forward pass with `use_cache` and without a cache is given one by a hook of the base model. What the user passes wins: a
cache, an explicit `cache_implementation`, `use_cache=False`. The hook and the override find what to do on the module
that they are called with, so that a deep copy of a patched model is patched on its own.
"""

from __future__ import annotations

import inspect
import types
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..quant.method import AttentionPolicy, CachePolicy, KVCacheMethod
from .hf_attention import LayerAttention, attach, attention_modules, check_attention, detach, layer_kind, query_heads
from .hf_cache import CACHE, NAMES, CompressedCache, CompressedLayer
from .hf_capture import record_steps, run_steps_as_before
from .hf_eviction import begin_pass, end_prompt
from .kv_evict import KVEvict
from .layer_policies import sparsity_in

ATTRIBUTE = "kompakt_cache"
PREPARE = "_prepare_cache_for_generation"


@dataclass(frozen=True)
class CacheMaker:
    """Makes the caches of one model. config: of its text model. statics: layer number → static tensors. seen: what
    `cache_evaluation.py` counts.
    """

    config: Any
    method: KVCacheMethod
    statics: Mapping[int, Mapping[str, Tensor]]
    seen: Counter[str] = field(default_factory=Counter)

    def make(self, attention_mask: Any = None) -> CompressedCache:
        """A cache for one batch. attention_mask: (batch, tokens) of the batch, from which rows start; or None."""
        starts = None
        if isinstance(attention_mask, Tensor) and attention_mask.ndim == 2:
            starts = attention_mask.bool().int().argmax(dim=1).tolist()
        return CompressedCache(self.config, self.method, statics=self.statics, starts=starts)


def cacheable_modules(model: Any, method: KVCacheMethod | None = None) -> dict[str, nn.Module]:
    """Attention modules whose keys and values can be compressed, by name. ValueError, naming the model, if none can, or
    if `method` evicts and not all can do so.
    """
    name, text = type(model).__name__, model.config.get_text_config()
    check_attention(model)
    if getattr(text, "kv_lora_rank", None):
        raise ValueError(f"{name} caches a latent of its keys and values, which is not compressed further")
    supported = getattr(model, "_supports_default_dynamic_cache", None)
    if supported is None or not hasattr(model, PREPARE) or not supported():
        raise ValueError(f"{name} does not generate with a cache of transformers, so that it has none to compress")
    evicting = method if isinstance(method, KVEvict) else None
    layers = dict(enumerate(CompressedCache(text, evicting or KVCacheMethod()).layers))
    found = {}
    for module_name, module in attention_modules(model).items():
        known = isinstance(layers.get(getattr(module, "layer_idx", -1)), CompressedLayer)
        if known and layer_kind(module) in (None, "full_attention", "sliding_attention"):
            found[module_name] = module
    if not found:
        raise ValueError(f"{name} has no layer whose keys and values can be compressed")
    return found


def run_by(model: Any, attention: Mapping[str, AttentionPolicy], cache: CachePolicy | None = None) -> None:
    """Makes the model run by what was chosen, its attention and its cache; nothing changes where nothing was.

    ValueError, with the model as it was, if it cannot be patched, is patched, or lacks a module that a policy names.
    """
    if not attention and cache is None:
        return
    check_heads(model, attention)
    layers = {name: LayerAttention.of(policy) for name, policy in attention.items()}
    if cache is None:
        attach(model, layers)
        return
    modules = cacheable_modules(model, cache.method)
    unknown = [name for name in cache.layers if name not in modules]
    if unknown:
        raise ValueError(f"the model has no cache of a module {unknown[0]}; it has, e.g., {next(iter(modules))}")
    statics = {modules[name].layer_idx: beside(modules[name], tensors) for name, tensors in cache.layers.items()}
    attach(model, layers, cached=True)
    maker = CacheMaker(model.config.get_text_config(), cache.method, statics)  # pyright: ignore[reportArgumentType]
    setattr(model, ATTRIBUTE, maker)
    setattr(model, PREPARE, types.MethodType(prepare_cache, model))
    base = model.base_model
    setattr(base, ATTRIBUTE, maker)
    base.register_forward_pre_hook(give_cache, with_kwargs=True)
    if isinstance(cache.method, KVEvict):
        base.register_forward_hook(end_prompt, with_kwargs=True)
        if cache.method.decode_budget is not None:
            base.register_forward_pre_hook(begin_pass, with_kwargs=True)
    record_steps(model)


def beside(module: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Static tensors on the device of a module, once for all caches; where they are if its weights are offloaded."""
    device = next((parameter.device for parameter in module.parameters()), torch.device("meta"))
    return {name: tensor if device.type == "meta" else tensor.to(device) for name, tensor in tensors.items()}


def check_heads(model: Any, attention: Mapping[str, AttentionPolicy]) -> None:
    """ValueError if a policy has patterns for another number of heads than its module has."""
    modules = attention_modules(model)
    for name, policy in attention.items():
        chosen = sparsity_in(policy)
        if chosen is not None and name in modules and len(chosen.heads) != query_heads(modules[name]):
            raise ValueError(
                f"the policy of {name} has {len(chosen.heads)} heads, and {name} has {query_heads(modules[name])}"
            )


def run_as_before(model: Any) -> None:
    """Undoes `run_by`. A second call does nothing."""
    detach(model)
    run_steps_as_before(model)
    base = model.base_model
    for item in (model, base):
        vars(item).pop(ATTRIBUTE, None)
        vars(item).pop(PREPARE, None)
    for key in [key for key, hook in base._forward_pre_hooks.items() if hook in (give_cache, begin_pass)]:
        del base._forward_pre_hooks[key]
        base._forward_pre_hooks_with_kwargs.pop(key, None)
    for key in [key for key, hook in base._forward_hooks.items() if hook is end_prompt]:
        del base._forward_hooks[key]
        base._forward_hooks_with_kwargs.pop(key, None)


@contextmanager
def running(model: Any, attention: Mapping[str, AttentionPolicy], cache: CachePolicy | None = None) -> Iterator[None]:
    """`run_by` for a while."""
    run_by(model, attention, cache)
    try:
        yield
    finally:
        if attention or cache is not None:
            run_as_before(model)


def cache_maker(model: Any) -> CacheMaker | None:
    """What makes the caches of a patched model; None if transformers does."""
    return vars(model).get(ATTRIBUTE)


def prepare_cache(model: Any, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
    """In place of the model's `_prepare_cache_for_generation`."""
    wanted = generation_config.use_cache is not False and generation_config.cache_implementation is None
    if model_kwargs.get(CACHE) is not None or not wanted:
        return getattr(type(model), PREPARE)(model, generation_config, model_kwargs, *args, **kwargs)
    cache = vars(model)[ATTRIBUTE].make(model_kwargs.get("attention_mask"))
    if cache.evicting_layers:
        check_prompt_alone(generation_config, args)
    if getattr(generation_config, "is_assistant", False):
        cache.activate_past_recording()
    model_kwargs[CACHE] = cache
    return None


def check_prompt_alone(generation_config: Any, modes: Iterable[Any]) -> None:
    """ValueError if a first pass is not the prompt, the whole prompt and nothing but that. modes: of generation."""
    if size := getattr(generation_config, "prefill_chunk_size", None):
        raise ValueError(
            f"prefill_chunk_size is {size}, and a cache that evicts scores a prompt as a whole; leave it out"
        )
    if any(getattr(mode, "value", mode) == "assisted_generation" for mode in modes):
        raise ValueError(
            "assisted decoding puts candidates behind the prompt before it is evicted from; generate without an "
            "assistant or prompt lookup"
        )


def give_cache(base: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Forward pre-hook: a cache for a pass that wants one and has none."""
    parameters = inspect.signature(type(base).forward).parameters
    given = {**dict(zip(parameters, (base, *args))), **kwargs}
    wanted = given.get("use_cache")
    wanted = getattr(base.config.get_text_config(), "use_cache", False) if wanted is None else wanted
    if wanted and all(given.get(name) is None for name in NAMES) and not base.training:
        # A model of the user's own code may keep the earlier name.
        name = next((name for name in NAMES if name in parameters), CACHE)
        kwargs = {key: value for key, value in kwargs.items() if key not in NAMES}
        kwargs[name] = vars(base)[ATTRIBUTE].make(given.get("attention_mask"))
    return args, kwargs
