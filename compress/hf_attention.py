"""transformers' side of our attention: the function that every patched layer calls, how it gets there and away again.

A patched model's config names one of `NAMES`; transformers then calls `attention_forward` with the module, and the mask
is a `MaskInfo` (`hf_masks.py`). What a layer is to do hangs on its module as a `LayerAttention`. Everything that the
kernels do not do runs through the implementation that the model had before, with the mask that it would have got: the
result is that of the unpatched model, bit for bit.
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..kernels.activations import log_fallback
from ..kernels.attention import MODES, Mode
from ..quant.method import AttentionInputs, AttentionPolicy
from ..sparsify.method import SparsityPolicy
from ..sparsify.online import MIN_QUERIES
from .hf_cache import AWAITING, CachedTensor
from .hf_eviction import show_prompt, show_queries
from .hf_masks import Layout, MaskInfo, check_kept_mask, keep_arguments, keep_every_mask
from .layer_policies import sparsity_in
from .runtime import attend, attend_cached, attend_sparse, needs_gradient, refusal, sparse_refusal

NAMES = {"sdpa": "kompakt", "eager": "kompakt_eager"}
"""Implementation before patching → name under which ours is registered, which remembers it."""
CACHED_NAMES = {"sdpa": "kompakt_cached", "eager": "kompakt_cached_eager"}
"""The same for a model with a compressed cache, which needs to know the mask of one query as well."""
FORMER = {name: former for names in (NAMES, CACHED_NAMES) for former, name in names.items()}
ATTRIBUTE = "kompakt_attention"
UNDERSTOOD = frozenset(("softcap", "s_aux", "is_causal", "output_attentions"))
WITHOUT_EFFECT = frozenset(
    (
        "cache_position",
        "deterministic",
        "logits_to_keep",
        "num_items_in_batch",
        "output_hidden_states",
        "output_router_logits",
        "position_ids",
        "return_dict",
        "sliding_window",
        "use_cache",
    )
)
"""Keywords that sdpa and eager do not read: masks and positions have been worked in before."""


@dataclass
class LayerAttention:
    """What one attention module is to do.

    policy: what was chosen for the layer. mode: what a long enough call runs in, None for dense; "bf16" runs our op
    without quantization. min_tokens: queries of a long enough call. observe: is given the inputs of every call of more
    than one query. ran: how many calls went which way. sparsity: which keys a call over min_length keys and more
    visits. visited, dense: tiles that sparse calls visited, and those of dense attention.
    """

    policy: AttentionPolicy
    mode: Mode | None
    min_tokens: int
    observe: Callable[[AttentionInputs], None] | None = None
    ran: Counter[str] = field(default_factory=Counter)
    sparsity: SparsityPolicy | None = None
    min_length: int = 0
    visited: float | Tensor = 0.0
    dense: float | Tensor = 0.0

    def takes(self, queries: int) -> bool:
        """Whether a call of so many queries is long enough to run in `mode`."""
        return self.mode is not None and queries >= self.min_tokens

    def thins(self, queries: int, keys: int) -> bool:
        """Whether a call of so many queries and keys is long enough to visit fewer keys."""
        return self.sparsity is not None and queries >= MIN_QUERIES and keys >= self.min_length

    @classmethod
    def of(cls, policy: AttentionPolicy) -> LayerAttention:
        """A layer that follows its policy."""
        found = cls(policy, None if policy.mode == "bf16" else policy.mode, policy.min_tokens)
        chosen = sparsity_in(policy)
        if chosen is not None and chosen.sparse:
            found.sparsity, found.min_length = chosen, chosen.min_length
        return found


def attention_forward(
    former: str,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """The registered attention function. former: the implementation that runs what the kernels do not.

    query: (batch, num_heads, queries, head_dim), key and value: (batch, num_kv_heads, keys, head_dim). Returns
    (batch, queries, num_heads, value_head_dim) and attention weights or None.
    """
    layer: LayerAttention | None = vars(module).get(ATTRIBUTE)
    if (store := getattr(key, AWAITING, None)) is not None:
        call = (query, key, value, attention_mask, scaling, dropout)
        untraced(show_prompt)(store, call, untraced(call_options)(module, *call, kwargs), kwargs.get("softcap"))
        out = untraced(run_second_reading)(module, call, kwargs) if store.reading is not None else None
        if out is not None:
            return out, None
    if isinstance(key, CachedTensor):
        call = (query, key, value, attention_mask, scaling, dropout)
        out = untraced(run_cached)(layer, former, module, call, kwargs)
        if out is not None:
            return out, None
        key, value = key.dequantize(), value.dequantize()
    elif layer is not None:
        queries = query.shape[2]
        wanted = layer.observe is not None or layer.takes(queries) or layer.thins(queries, key.shape[2])
        if queries > 1 and wanted:
            call = (query, key, value, attention_mask, scaling, dropout)
            out = untraced(run_layer)(layer, former, module, call, kwargs)
            if out is not None:
                return out, None
        elif not torch.compiler.is_compiling():
            layer.ran["dense"] += 1
    mask = attention_mask.build(former, query.device) if isinstance(attention_mask, MaskInfo) else attention_mask
    return former_function(former, module)(module, query, key, value, mask, scaling=scaling, dropout=dropout, **kwargs)


def run_second_reading(
    module: nn.Module, call: tuple[Tensor, Tensor, Tensor, Any, float | None, float], kwargs: Mapping[str, Any]
) -> Tensor | None:
    """Attention of a part of a prompt that is read again, or None if the model's own is to run it.

    Few queries behind many keys need a mask, with which transformers repeats the KV heads of the whole prompt for every
    part; a kernel does neither.
    """
    if not on_cuda(call[0]):
        return None
    found = call_inputs(module, *call, kwargs)
    return None if isinstance(found, str) or refusal("bf16", found) is not None else attend("bf16", "prefill", found)


def on_cuda(x: Tensor) -> bool:
    """Whether kernels may run."""
    return x.is_cuda


def run_layer(
    layer: LayerAttention,
    former: str,
    module: nn.Module,
    call: tuple[Tensor, Tensor, Tensor, Any, float | None, float],
    kwargs: Mapping[str, Any],
) -> Tensor | None:
    """A call that is observed or long enough: its output, or None if `former` is to run it."""
    query, key, value, mask, scaling, dropout = call
    found = call_inputs(module, query, key, value, mask, scaling, dropout, kwargs)
    taken, sparse = layer.takes(query.shape[2]), layer.thins(query.shape[2], key.shape[2])
    reason = found if isinstance(found, str) else None
    if isinstance(found, AttentionInputs):
        if layer.observe is not None:
            layer.observe(found)
        sparse = layer.thins(query.shape[2], found.key.shape[2])
        mode = layer.mode if taken and layer.mode is not None else "bf16"
        if taken or sparse:
            reason = refusal(mode, found)
        if sparse and reason is None:
            why = sparse_refusal(found)
            if why is None:
                assert layer.sparsity is not None
                out, visited, dense = attend_sparse(mode, layer.sparsity, found)
                layer.visited, layer.dense = layer.visited + visited, layer.dense + dense
                layer.ran["sparse" if mode == "bf16" else f"sparse {mode}"] += 1
                return out
            log_fallback(f"sparse attention of {type(module).__name__}", why, "attention over all keys")
            reason = None if taken else why
        if taken and reason is None:
            layer.ran[mode] += 1
            return attend(mode, "prefill", found)
    if (taken or sparse) and reason is not None:
        log_fallback(f"attention of {type(module).__name__}", reason, f"transformers' {former} attention")
    layer.ran["dense" if reason is None else f"dense: {reason}"] += 1
    return None


def run_cached(
    layer: LayerAttention | None,
    former: str,
    module: nn.Module,
    call: tuple[Tensor, Tensor, Tensor, Any, float | None, float],
    kwargs: Mapping[str, Any],
) -> Tensor | None:
    """A call over a compressed cache: its output, or None if `former` is to run it on dequantized keys and values."""
    query, key, _, mask, _, _ = call
    assert isinstance(key, CachedTensor)
    found = call_options(module, *call, kwargs)
    show_queries(key.visible.store, query, found)
    if not isinstance(found, str) and isinstance(mask, MaskInfo):
        layout, options = found
        starts = mask.key_starts(layout)
        reason = starts if isinstance(starts, str) else cache_refusal(query, key, layout)
        if reason is None:
            if layer is not None:
                layer.ran["kv_cache"] += 1
            assert not isinstance(starts, str)
            kv = key.visible.compressed()
            if kv.kept is not None and kv.lengths is None:
                check_kept_mask(mask, kv)
            if kv.lengths is not None:
                # The same launch is to do for later tokens: what the mask does not show yet is asked of the cache.
                options, starts = {**options, "window": key.visible.store.window}, kv.sink_starts
            return attend_cached(query, kv, options, starts)
        found = reason
    if key.visible.compressed().kept is not None:
        raise ValueError(f"attention over a cache that has evicted tokens cannot run: {found}")
    log_fallback(
        f"attention of {type(module).__name__} over a compressed cache", str(found), f"{former} attention, dequantized"
    )
    if layer is not None:
        layer.ran[f"dense: {found}"] += 1
    return None


def cache_refusal(query: Tensor, key: CachedTensor, layout: Layout) -> str | None:
    """Why attention over codes cannot run a call that the mask allows; None if it can."""
    if not layout.causal:
        return "the mask is not causal"
    if layout.keys != key.shape[2]:
        return "the mask was made for another number of keys"
    return None if query.dtype == key.dtype else f"queries are {query.dtype} and the cache {key.dtype}"


def untraced(function: Any) -> Any:
    """The function, left out of what torch.compile traces: it reads values of masks."""
    return torch.compiler.disable(function)


def former_function(former: str, module: nn.Module) -> Callable[..., tuple[Tensor, Tensor | None]]:
    """What transformers calls for an implementation; eager attention stands in the model's own file."""
    eager = inspect.unwrap(type(module).forward).__globals__.get("eager_attention_forward")
    return ALL_ATTENTION_FUNCTIONS.get_interface(former, eager)


def call_inputs(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Any,
    scaling: float | None,
    dropout: float,
    kwargs: Mapping[str, Any],
) -> AttentionInputs | str:
    """A call as the op takes it, or the reason why the op cannot run it."""
    found = call_options(module, query, key, value, mask, scaling, dropout, kwargs)
    if isinstance(found, str):
        return found
    layout, options = found
    options = {"causal": layout.causal, "segments": layout.segments, **options}
    return AttentionInputs(query, key[:, :, : layout.keys], value[:, :, : layout.keys], options)


def call_options(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Any,
    scaling: float | None,
    dropout: float,
    kwargs: Mapping[str, Any],
) -> tuple[Layout, dict[str, Any]] | str:
    """What a call's mask means and its window, scaling, softcap and sinks, or why no op of ours can run it."""
    sinks = kwargs.get("s_aux")
    if needs_gradient(query, key, value, *(() if sinks is None else (sinks,))):
        return "gradients are needed"
    if dropout:
        return "attention has dropout"
    if kwargs.get("output_attentions"):
        return "attention weights are asked for"
    for name, given in kwargs.items():
        if given is not None and name not in UNDERSTOOD and name not in WITHOUT_EFFECT:
            return f"the keyword {name} is unknown to it"
    if not isinstance(mask, MaskInfo):
        return "the model gives no mask" if mask is None else "the caller gives a mask of its own"
    layout = mask.layout(query.shape[0], query.shape[2], key.shape[2], query.device)
    if isinstance(layout, str):
        return layout
    causal = kwargs.get("is_causal")
    causal = getattr(module, "is_causal", layout.causal) if causal is None else causal
    if causal != layout.causal:
        return "the module and its mask do not agree on causality"
    return layout, {
        "window": layout.window,
        "scaling": query.shape[-1] ** -0.5 if scaling is None else float(scaling),
        "softcap": kwargs.get("softcap"),
        "sinks": sinks,
    }


def attention_modules(model: Any) -> dict[str, nn.Module]:
    """Attention modules of the text model that go through transformers' attention interface, by name, in order."""
    text = model.config.get_text_config()
    found = {}
    for name, module in model.named_modules():
        code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
        if code is None or "ALL_ATTENTION_FUNCTIONS" not in code.co_names:
            continue
        if getattr(module, "config", None) is text and "cross" not in type(module).__name__.lower():
            found[name] = module
    return found


def check_attention(model: Any) -> dict[str, nn.Module]:
    """`attention_modules`. ValueError, naming the model, if its attention cannot be patched."""
    name = type(model).__name__
    if getattr(model.config, "is_encoder_decoder", False):
        raise ValueError(f"{name} is an encoder-decoder; attention is patched in decoders and in encoders alone")
    modules = attention_modules(model)
    if not modules or not hasattr(model, "set_attn_implementation"):
        raise ValueError(f"{name} does not compute its attention through transformers' attention interface")
    kinds = {kind for module in modules.values() if (kind := layer_kind(module)) is not None}
    choosing = sorted(kind for kind in kinds if any(word in kind for word in ("indexed", "sparse", "compressed")))
    if choosing:
        raise ValueError(f"{name} has {choosing[0]}, which works on the mask itself; it is not patched")
    former = model.config.get_text_config()._attn_implementation
    if former not in NAMES and former not in FORMER:
        raise ValueError(f"{name} runs attention {former!r}; load it with attn_implementation {' or '.join(NAMES)}")
    return modules


def layer_kind(module: nn.Module) -> str | None:
    """What transformers calls the attention of a layer, such as "sliding_attention", where the config says it."""
    kinds, index = getattr(module.config, "layer_types", None), getattr(module, "layer_idx", None)
    return kinds[index] if kinds and isinstance(index, int) and index < len(kinds) else None


def full_attention(module: nn.Module) -> str | None:
    """Why a layer has no full attention, which alone can be sparse, as far as its config says; None if it has."""
    kind = layer_kind(module)
    return None if kind in (None, "full_attention") else f"it has {kind.replace('_', ' ')}"


def query_heads(module: nn.Module) -> int:
    """Query heads of an attention module."""
    return int(getattr(module, "num_heads", 0) or module.config.num_attention_heads)  # pyright: ignore


def is_attached(model: Any) -> bool:
    """Whether the model runs our attention."""
    return model.config.get_text_config()._attn_implementation in FORMER


def attach(model: Any, layers: Mapping[str, LayerAttention], *, cached: bool = False) -> None:
    """Puts our attention into the model; modules that `layers` does not name run as before. cached: the model is going
    to have a compressed cache.

    ValueError, with the model as it was, if it cannot be patched, is patched, or lacks a module of that name.
    """
    if is_attached(model):
        raise ValueError("the model's attention is patched already; unpatch it first")
    modules = check_attention(model)
    unknown = [name for name in layers if name not in modules]
    if unknown:
        raise ValueError(f"the model has no attention module {unknown[0]}; it has, e.g., {next(iter(modules))}")
    former = model.config.get_text_config()._attn_implementation
    register()
    switch(model, (CACHED_NAMES if cached else NAMES)[former])
    if not is_attached(model):
        switch(model, former)
        raise ValueError(f"{type(model).__name__} ignores its attention implementation, so it cannot be patched")
    for name, layer in layers.items():
        setattr(modules[name], ATTRIBUTE, layer)


def detach(model: Any) -> None:
    """Undoes `attach`. A second call does nothing."""
    if not is_attached(model):
        return
    current = model.config.get_text_config()._attn_implementation
    switch(model, FORMER[current])
    for module in model.modules():
        vars(module).pop(ATTRIBUTE, None)


def switch(model: Any, implementation: str) -> None:
    """Sets the attention implementation of the text model and of nothing beside it."""
    text = model.config.get_text_config()
    if text is model.config:
        model.set_attn_implementation(implementation)
        return
    key = next((name for name in model.config.sub_configs if getattr(model.config, name, None) is text), None)
    if key is None:
        raise ValueError(f"{type(model).__name__} hides its text model; patch the text model itself")
    model.set_attn_implementation({key: implementation})


def register() -> None:
    """Makes our functions known to transformers under their names, once per process; nothing else changes."""
    for name, former in FORMER.items():
        if name not in ALL_ATTENTION_FUNCTIONS:
            AttentionInterface.register(name, partial(attention_forward, former))
            mask = keep_every_mask if name in CACHED_NAMES.values() else keep_arguments
            AttentionMaskInterface.register(name, partial(mask, former))


def attached_layers(model: Any) -> dict[str, LayerAttention]:
    """What hangs on the attention modules of a patched model, by name."""
    return {name: vars(module)[ATTRIBUTE] for name, module in model.named_modules() if ATTRIBUTE in vars(module)}


def attention_in_use(model: Any) -> dict[str, Any] | None:
    """How the attention layers of a patched model ran, JSON-able; None if it is not patched.

    layers: of all; calls: how many went which way; ran: "dense", or "quantized", "sparse", "quantized and sparse", and
    "partly" before it where some calls were dense. sparsity, where any layer has it: the length from which it runs, and
    the share of tiles that its calls visited.
    """
    layers = attached_layers(model)
    if not layers:
        return None
    calls = sum((layer.ran for layer in layers.values()), Counter())
    dense = sum(count for way, count in calls.items() if way.startswith("dense"))
    quantized = any(way.removeprefix("sparse ") in MODES and way != "bf16" for way in calls)
    kinds = [
        word
        for word, some in (("quantized", quantized), ("sparse", any("sparse" in way.split()[0] for way in calls)))
        if some
    ]
    ran = "dense" if dense == calls.total() else ("partly " if dense else "") + (" and ".join(kinds) or "quantized")
    thinned = [layer for layer in layers.values() if layer.sparsity is not None]
    return {
        "ran": ran,
        "layers": len(layers),
        "calls": dict(sorted(calls.items())),
        "min_tokens": min(layer.policy.min_tokens for layer in layers.values()),
        **({"sparsity": sparsity_in_use(thinned)} if thinned else {}),
    }


def sparsity_in_use(layers: list[LayerAttention]) -> dict[str, Any]:
    """How layers that have a sparsity visited keys, JSON-able. density: None before any call was sparse."""
    visited, dense = (float(sum(getattr(layer, name) for layer in layers)) for name in ("visited", "dense"))
    return {
        "layers": len(layers),
        "min_length": min(layer.sparsity.min_length for layer in layers if layer.sparsity is not None),
        "density": visited / dense if dense else None,
    }


@contextmanager
def at_least(model: Any, tokens: int) -> Iterator[None]:
    """For a while, calls of `tokens` queries or keys and more count as long enough in every patched layer."""
    layers = list(attached_layers(model).values())
    before = [(layer.min_tokens, layer.min_length) for layer in layers]
    try:
        for layer in layers:
            layer.min_tokens, layer.min_length = min(layer.min_tokens, tokens), min(layer.min_length, tokens)
        yield
    finally:
        for layer, values in zip(layers, before, strict=True):
            layer.min_tokens, layer.min_length = values
