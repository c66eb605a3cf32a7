"""Logits of text that goes in some tokens at a time, so that what is measured has read the cache a model has.

One pass over a whole text is a prefill, which attends to dense keys and values and would measure the dense cache. Two
protocols read codes instead. "chunks": a text is fed `CHUNK` tokens at a time; every chunk attends to the compressed
past, its own tokens and the recent ones before them dense, as if they came one by one, so that the past itself was
computed from codes. "decode": the first tokens of a text go in as one prompt, attended to exactly and then coded, as
`generate()` does it; the rest follows in chunks, and it alone is scored. Which share of the positions had coded tokens
to read is counted and reported, since sinks and recent tokens stay dense.

A cache that evicts does so from a prompt, which "chunks" has none of: it is measured by "decode" alone (`check_fed`).
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ..kernels.decode_attention import PAGE
from ..quant.method import AttentionPolicy, CachePolicy
from .hf_attention import at_least, attached_layers
from .hf_cache import CACHE, former_cache, holds_attention_alone
from .hf_cache_hooks import CacheMaker, cache_maker, running
from .kv_evict import KVEvict
from .recipe import Recipe

CHUNK = PAGE
"""Tokens that go in at a time."""
NO_PROMPT = (
    f"text that goes in {CHUNK} tokens at a time (cache_protocol chunks, tasks of lm-eval) has no prompt to evict "
    "from; measure a cache that evicts by cache_protocol decode"
)
PROBE_TOKENS, PROBE_CHUNK = 2 * PAGE, PAGE // 2


def input_device(model: Any) -> torch.device:
    """Where token ids have to be put, also when the model is spread over devices."""
    device = model.get_input_embeddings().weight.device
    # Offloaded weights rest on the meta device; their hook moves ids from anywhere.
    return torch.device("cpu") if device.type == "meta" else device


class Reader:
    """Feeds one batch to a model, some tokens at a time, through the cache it has: compressed, or of transformers.

    mask: (batch, tokens) of all that will go in, 0 for padding; or None. ValueError from `feed` for a model that keeps
    no cache of transformers.
    """

    def __init__(self, model: Any, mask: Tensor | None = None):
        self.model, self.mask, self.maker, self.fed = model, mask, cache_maker(model), 0
        self.cache: Any = former_cache(model.config) if self.maker is None else self.maker.make(mask)

    def feed(self, ids: Tensor, *, keep: int | None = None) -> Tensor:
        """Logits of the last `keep` of the next tokens: ids (batch, tokens) → (batch, keep, vocabulary), default all.

        With a compressed cache, these positions count as scored.
        """
        start, self.fed = self.fed, self.fed + ids.shape[1]
        keep = ids.shape[1] if keep is None else keep
        options: dict[str, Any] = {} if self.mask is None else {"attention_mask": self.mask[:, : self.fed]}
        if keep < ids.shape[1] and "logits_to_keep" in inspect.signature(self.model.forward).parameters:
            options["logits_to_keep"] = max(1, keep)
        logits = self.model(input_ids=ids, use_cache=True, **{CACHE: self.cache}, **options).logits
        if self.maker is not None:
            if start == 0:
                self.count_prompt(ids.shape[0])
            seen, count = self.maker.seen, ids.shape[0] * keep
            seen["positions"] += count
            if self.cache.reads_codes(start, self.fed):
                seen["reading_codes"] += count
            if self.cache.coded_tokens:
                seen["bits"] = self.cache.bits_per_element
        elif self.cache.get_seq_length() != self.fed:
            raise ValueError(
                f"{type(self.model).__name__} keeps no cache of transformers, so it cannot be fed in pieces"
            )
        return logits[:, logits.shape[1] - keep :]

    def count_prompt(self, rows: int) -> None:
        """Notes what is left of a first prompt, in a cache that evicts."""
        seen, layers = self.maker.seen, self.cache.evicting_layers  # pyright: ignore[reportOptionalMemberAccess]
        if not layers:
            return
        seen["prompts"] += rows
        shares = [share for layer in layers if (share := layer.kept_share) is not None]
        if shares:
            seen["evicted_prompts"] += rows
            seen["kept"] += rows * sum(shares) / len(shares)  # pyright: ignore[reportArgumentType]
            dense = sum(layer.dense_bytes for layer in layers)
            seen["allocated"] += rows * self.cache.nbytes().total / dense  # pyright: ignore[reportArgumentType]

    def holds_codes(self, start: int, stop: int) -> bool:
        """Whether the columns [start, stop) are all in codes, in the layer that has most; sinks stay dense."""
        if self.maker is None:
            return False
        return self.cache.method.sink_tokens <= start and stop <= self.cache.coded_tokens


def cached_logits(
    model: Any, ids: Tensor, *, mask: Tensor | None = None, keep: int | None = None, chunk: int = CHUNK, prompt: int = 0
) -> Tensor:
    """Logits for ids, (batch, tokens) → (batch, keep, vocabulary), of a model that `hf_cache_hooks.run_by` patched.

    mask: (batch, tokens), 0 for padding. keep: last positions whose logits are wanted, default all. chunk: tokens that
    go in at a time. prompt: tokens that go in before, at once.
    """
    assert cache_maker(model) is not None
    reader, count = Reader(model, mask), ids.shape[1]
    first = 0 if keep is None else count - keep
    parts = []
    stops = [*range(prompt, count, chunk), count]
    for start, stop in pairwise([0, *stops] if prompt else stops):
        logits = reader.feed(ids[:, start:stop], keep=min(stop - start, max(0, stop - first)))
        if stop > first:
            parts.append(logits)
    return torch.cat(parts, dim=1)


def check_fed(*models: Any, prompt: bool) -> None:
    """ValueError if the cache of a model evicts and nothing of a text goes in as a prompt. None is no model."""
    makers = [maker for model in models if model is not None and (maker := cache_maker(model)) is not None]
    if not prompt and any(isinstance(maker.method, KVEvict) for maker in makers):
        raise ValueError(NO_PROMPT)


def check_prompt(recipe: Recipe) -> None:
    """ValueError if a recipe evicts, and its evaluation would be one in which nothing is evicted."""
    method, prompt = recipe.kv_cache, recipe.evaluation.prompt
    if not isinstance(method, KVEvict) or not recipe.evaluation.windows:
        return
    if not prompt:
        raise ValueError(f"evaluation: {NO_PROMPT}")
    if prompt < method.shortest_prompt:
        raise ValueError(
            f"evaluation: a prompt of {prompt} tokens is too short for kv_evict, which evicts from "
            f"{method.shortest_prompt} on with these options, so that a cache of all tokens would be measured; set "
            "evaluation.prompt_tokens or evaluation.window higher, or evaluation.windows to 0"
        )


def eviction_in_use(maker: CacheMaker) -> dict[str, Any]:
    """How a cache that evicts did, JSON-able; nothing for another. query_agnostic: whether scores do not ask what a
    prompt ends with. kept: share of a prompt's tokens in the mean, and allocated: of the bytes of a dense cache of it,
    both over the prompts that were long enough, None if none was.
    """
    method, seen = maker.method, maker.seen
    if not isinstance(method, KVEvict):
        return {}
    evicted = seen["evicted_prompts"]
    asked = {"scores": method.scores, "budget": method.budget, "codes": method.codes}
    counted = {"prompts": seen["prompts"], "evicted_prompts": evicted}
    shares = {name: seen[name] / evicted if evicted else None for name in ("kept", "allocated")}
    return {"eviction": {**asked, "query_agnostic": method.query_agnostic, **counted, **shares}}


def fits_in_pieces(model: Any) -> bool:
    """Whether a text may go into a model in pieces of any length: its cache is compressed, or of attention alone.

    A recurrent state is continued by several tokens at a time in some versions of transformers only.
    """
    return cache_maker(model) is not None or holds_attention_alone(former_cache(model.config))


def count_anew(model: Any) -> None:
    """Forgets what was counted of the cache and of attention, so that the next figures are of what comes next."""
    if (maker := cache_maker(model)) is not None:
        maker.seen.clear()
    for layer in attached_layers(model).values():
        layer.ran.clear()


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


def cache_in_use(model: Any, *, prompt: int | None = 0) -> dict[str, Any] | None:
    """How an evaluation went through the compressed cache, JSON-able; None for a model without one.

    protocol: "chunks", "decode" (see the module), or "not read". prompt: tokens that went in before, at once; None
    where that differs from item to item. positions: that were scored; reading_codes: of them, had coded tokens to
    attend to. bits_per_element: of codes and scales as allocated, None where nothing was coded. eviction: of a cache
    that evicts, see `eviction_in_use`.
    """
    maker = cache_maker(model)
    if maker is None:
        return None
    seen = maker.seen
    protocol = "not read" if not seen["positions"] else "chunks" if prompt == 0 else "decode"
    return {
        "protocol": protocol,
        "chunk": CHUNK,
        **({"prompt_tokens": prompt} if protocol == "decode" else {}),
        "positions": seen["positions"],
        "reading_codes": seen["reading_codes"],
        "bits_per_element": seen.get("bits"),
        **eviction_in_use(maker),
    }
