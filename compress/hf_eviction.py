"""Eviction in a patched model: what a cache is shown of attention, and what happens before and behind a pass.

Scores that the prompt's own attention gives (`snapkv`, `expected`) have been found by then, layer by layer. For `kvzip`
the model reads the prompt again behind itself, a part at a time, every part at the positions that follow the prompt's
last; nothing of that is stored, each layer keeps the scores of its keys (`evicting.py`). Both are part of the forward
pass that the prompt went in with, and of the time to the first token.

Caches with a `decode_budget` are shown every query, and evict again before the pass that would exceed it, since masks
are made for what is there when it begins.

Rows of a left-padded batch read their own parts: what is kept of a row does not depend on those beside it.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

from ..sparsify.kv_evict import OVERLAP
from .cache import TokenStore
from .evicting import EvictingStore, SecondReading, evict_together
from .hf_cache import CACHE, NAMES, CompressedCache
from .hf_masks import Layout


@torch.no_grad()
def show_prompt(
    store: EvictingStore,
    call: tuple[Tensor, Tensor, Tensor, Any, float | None, float],
    found: tuple[Layout, dict[str, Any]] | str,
    softcap: float | None,
) -> None:
    """Lets a store that waits for a prompt's scores look at a call. found: of `hf_attention.call_options`. ValueError
    if it cannot be scored.
    """
    query, key, _, mask, scaling, _ = call
    if store.pending is None:
        show_queries(store, query, found)
        return
    if store.reading is not None:
        scaling = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
        store.look(query, key, scaling=scaling, softcap=softcap, starts=[])
        return
    reason = found if isinstance(found, str) else None
    if not isinstance(found, str):
        layout, options = found
        starts = mask.key_starts(layout)
        if isinstance(starts, str) or not layout.causal or options["window"] is not None:
            reason = starts if isinstance(starts, str) else "its mask is not causal attention to all tokens"
        else:
            rows = [0] * query.shape[0] if starts is None else starts.tolist()
            store.look(query, key, scaling=options["scaling"], softcap=options["softcap"], starts=rows)
    if reason is not None:
        raise ValueError(f"the prompt cannot be scored for eviction: {reason}")


def show_queries(store: TokenStore, query: Tensor, found: tuple[Layout, dict[str, Any]] | str) -> None:
    """Lets a store that evicts while generating look at queries. found: of `hf_attention.call_options`."""
    if not isinstance(store, EvictingStore):
        return
    if isinstance(found, str):
        store.overlook(found)
    else:
        store.observe(query, found[1]["scaling"], found[1]["softcap"])


def begin_pass(base: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Forward pre-hook of the base model: a cache that holds more than its budget evicts. ValueError if it cannot."""
    cache = given_cache(base, args, kwargs)[0]
    if isinstance(cache, CompressedCache):
        for store in cache.evicting_layers:
            store.settle()


def given_cache(base: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The cache of a call, None if there is none, and all of its arguments by name."""
    given = {**dict(zip(inspect.signature(type(base).forward).parameters, (base, *args))), **kwargs}
    return next((given[name] for name in NAMES if given.get(name) is not None), None), given


def end_prompt(base: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
    """Forward hook of the base model: evicts from a prompt that waits for it. ValueError if it cannot."""
    cache, given = given_cache(base, args, kwargs)
    if not isinstance(cache, CompressedCache):
        return
    stores = [store for store in cache.evicting_layers if store.pending is not None]
    if not stores or stores[0].reading is not None:
        return
    if stores[0].method.scores != "kvzip" or len(stores) < len(cache.evicting_layers):
        raise ValueError("a prompt is to be evicted from, and the model did not show its attention to the cache")
    ids = given.get("input_ids")
    if not isinstance(ids, Tensor):
        raise ValueError("scores kvzip reads token ids again, and the model was given embeddings; take scores snapkv")
    with torch.no_grad():
        positions = given.get("position_ids")
        if isinstance(positions, Tensor) and positions.ndim != 2:
            raise ValueError(
                f"scores kvzip reads a prompt again at the positions behind it, and {type(base).__name__} has "
                f"{positions.ndim - 1} numbers for each; take scores snapkv"
            )
        behind = ids.shape[1] if positions is None else positions[:, -1:] + 1
        read_again(base, cache, stores, ids, behind)
        evict_together(stores)


def read_again(
    base: Any, cache: CompressedCache, stores: list[EvictingStore], ids: Tensor, behind: Tensor | int
) -> None:
    """Second reading of a prompt, ids (batch, tokens), part by part. behind: the position after its last, (batch or 1,
    1) or the same for all. ValueError if it goes beyond the positions that there are.
    """
    tokens, chunk, starts = ids.shape[1], stores[0].method.chunk, stores[0].starts
    assert starts is not None
    longest = tokens - min(starts)
    last = int(torch.as_tensor(behind).max()) + min(chunk + OVERLAP, longest)
    limit = getattr(base.config.get_text_config(), "max_position_embeddings", None)
    if limit is not None and last > limit:
        raise ValueError(
            f"scores kvzip reads a prompt of {longest} tokens again behind itself, up to position {last}, and "
            f"{type(base).__name__} has {limit}; set a smaller chunk, or take scores snapkv"
        )
    columns = torch.arange(tokens, device=ids.device)
    first = torch.tensor(starts, device=ids.device)[:, None]
    for number in range(-(-longest // chunk)):
        parts = [(min(start + number * chunk, tokens), min(start + (number + 1) * chunk, tokens)) for start in starts]
        begins = [max(start, low - OVERLAP) for start, (low, _) in zip(starts, parts, strict=True)]
        counts = [high - begin if low < high else 0 for begin, (low, high) in zip(begins, parts, strict=True)]
        place = torch.arange(max(counts), device=ids.device)
        valid = place < torch.tensor(counts, device=ids.device)[:, None]
        source = (torch.tensor(begins, device=ids.device)[:, None] + place).clamp_max(tokens - 1)
        part = torch.where(valid, ids.gather(1, source), 0)
        mask = torch.cat((columns >= first, valid), dim=1).long()
        try:
            for store in stores:
                store.reading = SecondReading(parts, counts)
            base(
                input_ids=part,
                attention_mask=mask,
                position_ids=behind + place if isinstance(behind, Tensor) else behind + place[None],
                use_cache=True,
                **{CACHE: cache},
            )
        finally:
            for store in stores:
                store.reading = None
