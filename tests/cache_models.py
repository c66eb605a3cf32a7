"""Tiny models with a compressed cache, and a reference cache: dense tensors of the same tokens, rounded alike."""

from __future__ import annotations

from typing import Any

import torch
from attention_models import tiny
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer

from kompakt.compress.hf_cache import CACHE, CompressedCache
from kompakt.compress.hf_cache_hooks import cacheable_modules, run_by
from kompakt.kernels.kv_pages import PAGE
from kompakt.quant.method import CachePolicy, KVCacheMethod

FAMILIES = ("llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3_text", "phi3", "gpt_oss")
LONG = torch.randint(3, 128, (3, 400), generator=torch.Generator().manual_seed(2))
PADS = (0, 128, 256)
"""Left padding of the rows of `LONG` in whole pages, so that a row alone is coded up to the same token."""


def long_model(family: str, **settings: Any) -> Any:
    """A tiny model for some hundred tokens, where it has one with a window of 150."""
    window = {"sliding_window": 150} if family in ("mistral", "gemma2", "gemma3_text", "phi3", "gpt_oss") else {}
    return tiny(family, max_position_embeddings=1024, **window, **settings)


def left_padding() -> torch.Tensor:
    return (torch.arange(LONG.shape[1]) >= torch.tensor(PADS)[:, None]).long()


def policy_of(model: Any, method: KVCacheMethod, statics: Any = None) -> CachePolicy:
    """A policy for every layer; statics: static tensors, the same for all."""
    return CachePolicy(method, {name: dict(statics or {}) for name in cacheable_modules(model)})


def patched(model: Any, method: KVCacheMethod, statics: Any = None) -> Any:
    run_by(model, {}, policy_of(model, method, statics))
    return model


class ReferenceLayer(DynamicLayer):
    """Keeps every token as it came, and rounds what is coded whenever it is asked for it."""

    def __init__(self, method: KVCacheMethod, window: int | None, starts: list[int] | None, statics: Any = None):
        super().__init__()
        self.method, self.window, self.starts, self.coded = method, window, starts, 0
        self.codec = method.codec(statics or {})
        self.is_sliding = window is not None
        self.sliding_window = window

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        past, before = self.get_seq_length(), self.coded
        super().update(key_states, value_states)
        while self.keys.shape[2] - (self.coded // PAGE + 1) * PAGE >= self.method.recent_tokens:
            self.coded = (self.coded // PAGE + 1) * PAGE
        if past == 0:
            return key_states, value_states
        limit = self.coded if key_states.shape[2] == 1 else before
        first = self.get_mask_sizes_of(past, 0)[1]
        coded = self.codec.rounded(self.keys, self.values)
        return tuple(
            self.kept(found.to(dense.dtype), dense, limit)[:, :, first:]
            for found, dense in zip(coded, (self.keys, self.values), strict=True)
        )

    def kept(self, found: torch.Tensor, dense: torch.Tensor, limit: int) -> torch.Tensor:
        found[:, :, limit:] = dense[:, :, limit:]
        for row in range(dense.shape[0]):
            start = 0 if self.starts is None else self.starts[row % len(self.starts)]
            place = slice(start, start + self.method.sink_tokens)
            found[row, :, place] = dense[row, :, place]
        return found

    def get_mask_sizes_of(self, past: int, query_length: int) -> tuple[int, int]:
        first = 0 if self.window is None else max(0, past - self.window + 1)
        return past - first + query_length, first

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_mask_sizes_of(self.get_seq_length(), query_length)


def reference_cache(model: Any, method: KVCacheMethod, starts: list[int] | None = None, statics: Any = None) -> Cache:
    """For an unpatched model: what `CompressedCache` should come to."""
    layers = DynamicCache(config=model.config).layers
    return Cache(
        layers=[ReferenceLayer(method, getattr(layer, "sliding_window", None), starts, statics) for layer in layers]
    )


def in_steps(model: Any, cache: Any, tokens: torch.Tensor, steps: tuple[int, ...], mask: Any = None) -> torch.Tensor:
    """Logits of tokens that go in so many at a time."""
    parts, start = [], 0
    for count in steps:
        stop = start + count
        options = {} if mask is None else {"attention_mask": mask[:, :stop]}
        parts.append(model(tokens[:, start:stop], **{CACHE: cache}, use_cache=True, **options).logits)
        start = stop
    assert start == tokens.shape[1]
    return torch.cat(parts, dim=1)


def is_compressed(cache: Any) -> bool:
    return isinstance(cache, CompressedCache)
