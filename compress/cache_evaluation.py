"""Logits of a model with a compressed cache: a text goes in some tokens at a time, so that what is measured has read
codes.

One pass over a whole text is a prefill, which attends to dense keys and values and would measure the dense cache. Here
a text is fed in chunks of `CHUNK` tokens: every chunk attends to the compressed past, its own tokens dense. Which share
of the positions had coded tokens to read is counted and reported, since sinks and recent tokens stay dense.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..kernels.decode_attention import PAGE
from ..quant.method import AttentionPolicy, CachePolicy
from .hf_attention import at_least
from .hf_cache import CACHE
from .hf_cache_hooks import cache_maker, running

CHUNK = PAGE
"""Tokens that go in at a time."""
PROBE_TOKENS, PROBE_CHUNK = 2 * PAGE, PAGE // 2


def input_device(model: Any) -> torch.device:
    """Where token ids have to be put, also when the model is spread over devices."""
    device = model.get_input_embeddings().weight.device
    # Offloaded weights rest on the meta device; their hook moves ids from anywhere.
    return torch.device("cpu") if device.type == "meta" else device


def cached_logits(
    model: Any, ids: Tensor, *, mask: Tensor | None = None, keep: int | None = None, chunk: int = CHUNK
) -> Tensor:
    """Logits for ids, (batch, tokens) → (batch, keep, vocabulary), of a model that `hf_cache_hooks.run_by` patched.

    mask: (batch, tokens), 0 for padding. keep: last positions whose logits are wanted, default all. chunk: tokens that
    go in at a time.
    """
    maker = cache_maker(model)
    assert maker is not None
    cache, count = maker.make(mask), ids.shape[1]
    first = 0 if keep is None else count - keep
    parts = []
    for start in range(0, count, chunk):
        stop = min(start + chunk, count)
        options = {} if mask is None else {"attention_mask": mask[:, :stop]}
        logits = model(input_ids=ids[:, start:stop], use_cache=True, **{CACHE: cache}, **options).logits
        if stop > first:
            parts.append(logits[:, max(0, first - start) :])
        maker.seen["positions"] += stop - start
        if cache.reads_codes(start, stop):
            maker.seen["reading_codes"] += stop - start
    if cache.coded_tokens:
        maker.seen["bits"] = cache.bits_per_element  # pyright: ignore[reportArgumentType]
    return torch.cat(parts, dim=1)


@torch.no_grad()
def probe_logits(model: Any, attention: Mapping[str, AttentionPolicy], cache: CachePolicy, ids: Tensor) -> Tensor:
    """Logits, (1, `PROBE_TOKENS`, vocabulary), of an unpatched model run by its policies, that have read codes.

    ids: (1, tokens), repeated to that length. Sinks and recent tokens are as few as can be.
    """
    count = -(-PROBE_TOKENS // ids.shape[1])
    ids = ids.repeat(1, count)[:, :PROBE_TOKENS]
    exposed = replace(cache.method, sink_tokens=min(cache.method.sink_tokens, 1), recent_tokens=0, max_tokens=None)
    with running(model, attention, replace(cache, method=exposed)), at_least(model, 1):
        return cached_logits(model, ids.to(input_device(model)), chunk=PROBE_CHUNK)


def cache_in_use(model: Any) -> dict[str, Any] | None:
    """How an evaluation went through the compressed cache, JSON-able; None for a model without one.

    protocol: "chunks", see the module, or "not read". positions: that were fed; reading_codes: of them, had coded
    tokens to attend to. bits_per_element: of codes and scales as allocated, None where nothing was coded.
    """
    maker = cache_maker(model)
    if maker is None:
        return None
    seen = maker.seen
    return {
        "protocol": "chunks" if seen["positions"] else "not read",
        "chunk": CHUNK,
        "positions": seen["positions"],
        "reading_codes": seen["reading_codes"],
        "bits_per_element": seen.get("bits"),
    }
