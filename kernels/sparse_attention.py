"""Prefill attention over a sparse index, or over static patterns that need none: the same arithmetics as
`attention.py`, fewer keys.

::

    O_i = Σ_{j ∈ K_i} exp(s_ij − lse_i) · v_j        lse_i = log Σ_{j ∈ K_i} exp(s_ij)

K_i are the keys that the row of query i lists (`sparse_index.py`) and that the mask allows. With all tiles listed this
is dense attention; a query without a key gives zeros and lse = −∞. exp(lse − lse of dense attention) is the share of
the dense probabilities that was visited, the *recall*.

`StaticPattern` is worked out by the kernel from three integers per head, key by key rather than in whole tiles:

    K_i = { j : j < sink }  ∪  { j : |p_i − j| < window }  ∪  { all, if p_i is among the last `tail` positions }

Keys and values are quantized as for dense attention, over all of them. Values of single columns stay in 16 bit: FP8
values lie transposed, and a column would be read byte by byte.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from .activations import launching_on, log_fallback
from .attention import Call, Mode, attention_backend, check_attention, code_queries, operands_ref, query_means
from .attention_quant import rotate
from .segments import Segments, whole
from .sparse_index import TILE, Extent, SparseIndex, check_index

EVERYTHING = 2**30
"""A window that hides nothing."""


@dataclass(frozen=True)
class StaticPattern:
    """table: (heads of the pattern, 3) int32 on the device of the call: sink, window and tail of each head, tokens from
    0. Window 0, sink 0 and tail 0 is a head that is skipped; window `EVERYTHING` a dense one.
    """

    table: Tensor


def sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    index: SparseIndex | StaticPattern,
    *,
    mode: Mode = "bf16",
    causal: bool = True,
    scaling: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    segments: Segments | None = None,
    check: bool = False,
) -> tuple[Tensor, Tensor]:
    """Attention of many queries over the keys of an index.

    Args:
        query, key, value, mode, causal, scaling, softcap, sinks: as in `attention.prefill_attention`.
        index: of such a call, of as many heads as the queries have or fewer: any multiple of the KV heads.
        segments: padding; one segment for each row of the batch. None: no padding.
        check: look at every entry of the index first, which waits for the device.

    Returns:
        out and lse as `prefill_attention` does, over the listed keys alone.

    Raises:
        ValueError: arguments that do not belong together.
    """
    call = Call(mode, causal, None, scaling if scaling is not None else query.shape[-1] ** -0.5, softcap)
    check_attention(query, key, value, call, sinks, segments)
    extent = Extent.of(query.shape[0], query.shape[2], key.shape[2], segments, query.device)
    check_heads(query, key, index, extent)
    if check and isinstance(index, SparseIndex):
        check_index(index, extent, causal=causal)
    with launching_on(query):
        out, lse = run_sparse(query, key, value, index, call, sinks, segments)
    return out.transpose(1, 2), lse


def check_heads(query: Tensor, key: Tensor, index: SparseIndex | StaticPattern, extent: Extent) -> None:
    """ValueError unless the heads and tiles of an index fit a call."""
    heads, kv_heads = query.shape[1], key.shape[1]
    if isinstance(index, StaticPattern):
        listed, device = index.table.shape[0], index.table.device
        if index.table.dim() != 2 or index.table.shape[1] != 3 or index.table.dtype != torch.int32:
            raise ValueError(
                f"a static pattern has a table {tuple(index.table.shape)} {index.table.dtype}; expected (heads, 3)"
                " int32"
            )
    else:
        listed, device = index.extent[1], index.tiles.device
        wanted = (len(extent.table), listed, extent.query_tiles)
        if index.extent != wanted:
            raise ValueError(f"the index is for (batch, heads, query tiles) = {index.extent}; the call has {wanted}")
    if listed == 0 or heads % listed or listed % kv_heads:
        raise ValueError(
            f"an index of {listed} heads does not fit {heads} heads over {kv_heads} KV heads: it needs a multiple of"
            " the KV heads that divides the heads"
        )
    if device != query.device:
        raise ValueError(f"the index is on {device}, query on {query.device}")


def sparse_backend(query: Tensor, value: Tensor, call: Call) -> tuple[Literal["triton", "exact", "reference"], str]:
    """What a call runs on, and why; see `attention.attention_backend`. There is no kernel for Hopper alone."""
    name, reason = attention_backend(query, value, call)
    return ("triton", reason) if name == "gluon" else (name, reason)


def run_sparse(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    index: SparseIndex | StaticPattern,
    call: Call,
    sinks: Tensor | None,
    segments: Segments | None,
) -> tuple[Tensor, Tensor]:
    """Dispatch without checks: out (batch, queries, heads, value_head_dim) contiguous, and lse."""
    if query.numel() and key.numel():
        backend, reason = sparse_backend(query, value, call)
        if backend == "triton":
            from .sparse_attention_triton import sparse_attention_triton

            sinks = None if sinks is None else sinks.contiguous()
            return sparse_attention_triton(query, key, value, index, call, sinks, segments)
        if backend == "exact":
            log_fallback(f"sparse_attention ({call.mode})", reason, "exact sparse attention in torch")
            call = replace(call, mode="bf16")
        else:
            log_fallback(f"sparse_attention ({call.mode})", reason)
    return sparse_attention_ref(query, key, value, index, call, sinks, segments)


def sparse_attention_ref(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    index: SparseIndex | StaticPattern,
    call: Call,
    sinks: Tensor | None = None,
    segments: Segments | None = None,
    *,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """Torch specification, any device: row by row, the keys that it lists and no others. Work is that of the index."""
    batch, heads, queries, _ = query.shape
    kv_heads, keys, value_dim = key.shape[1], key.shape[2], value.shape[-1]
    out = torch.zeros((batch, queries, heads, value_dim), dtype=query.dtype, device=query.device)
    lse = torch.full((batch, heads, queries), -torch.inf, device=query.device)
    if query.numel() == 0 or keys == 0:
        return out, lse
    places = whole(batch, queries, keys, query.device) if segments is None else segments
    bounds = None if segments is None else segments.key_bounds(batch)
    k, v, key_mean, value_mean = (t.to(dtype) for t in operands_ref(key, value, call.mode, bounds))
    means = query_means(query, places) if call.mode == "int4_fp8" else None
    centered = query.float() if means is None else query.float() - means
    coded = code_queries(centered, call.mode).to(dtype)
    if means is not None:
        coded += rotate(means).to(dtype)
    full_values = torch.where(torch.isfinite(value), value, 0).to(dtype)
    lists = row_lists(index) if isinstance(index, SparseIndex) else None
    listed_heads = index.table.shape[0] if isinstance(index, StaticPattern) else index.extent[1]
    share = heads // listed_heads
    for row, q_start, q_stop, k_start, k_stop in places.table.tolist():
        for number, first in enumerate(range(q_start, q_stop, TILE)):
            run = slice(first, min(first + TILE, q_stop))
            position = torch.arange(run.start, run.stop, device=query.device) - q_stop + k_stop
            for head in range(listed_heads):
                kv, group = head * kv_heads // listed_heads, slice(head * share, (head + 1) * share)
                if lists is None or isinstance(index, StaticPattern):
                    listed, single = torch.arange(k_start, k_stop, device=query.device), None
                else:
                    listed, single = lists((row * listed_heads + head) * index.extent[2] + number)
                mask = (listed >= k_start) & (listed < k_stop) & (listed < keys)
                listed = listed.clamp_max(keys - 1)
                mask = mask & (listed <= position[:, None]) if call.causal else mask.expand(len(position), -1)
                if isinstance(index, StaticPattern):
                    mask = mask & static_mask(index.table[head].tolist(), listed, position, k_start, k_stop)
                logits = coded[row, group, run] @ k[row, kv, listed].mT
                shift = (query[row, group, run].to(dtype) * key_mean[row, kv]).sum(dim=-1, keepdim=True)
                logits = (logits + shift) * call.scaling
                if call.softcap is not None:
                    logits = call.softcap * torch.tanh(logits / call.softcap)
                logits = logits.masked_fill(~mask, -torch.inf)
                sums = torch.logsumexp(logits, dim=-1, keepdim=True)
                total = sums
                if sinks is not None:
                    sink = sinks[group].to(dtype)[:, None, None]
                    total = torch.where(sums.isneginf(), sums, torch.logaddexp(sums, sink))
                weights = torch.exp(logits - total).masked_fill(~mask, 0.0)
                values = v[row, kv, listed] + value_mean[row, kv]
                if single is not None and single < len(listed):
                    values[single:] = full_values[row, kv, listed[single:]]
                out[row, run, group] = (weights @ values).transpose(0, 1).to(query.dtype)
                lse[row, group, run] = sums[..., 0].float()
    return out, lse


def row_lists(index: SparseIndex) -> Callable[[int], tuple[Tensor, int]]:
    """row → the keys that it lists, (any,) int64 with its columns last, and at which place those begin."""
    tile_ptr, column_ptr = index.tile_ptr.tolist(), index.column_ptr.tolist()
    inside = torch.arange(TILE, device=index.tiles.device)

    def keys_of(row: int) -> tuple[Tensor, int]:
        tiles = index.tiles[tile_ptr[row] : tile_ptr[row + 1]].long()
        columns = index.columns[column_ptr[row] : column_ptr[row + 1]].long()
        return torch.cat(((tiles[:, None] * TILE + inside).flatten(), columns)), len(tiles) * TILE

    return keys_of


def static_mask(numbers: list[int], keys: Tensor, position: Tensor, k_start: int, k_stop: int) -> Tensor:
    """(queries, keys) bool: what a head of a `StaticPattern` sees, causality apart."""
    sink, window, tail = numbers
    distance = (position[:, None] - keys).abs()
    return (keys < k_start + sink) | (distance < window) | (position >= k_stop - tail)[:, None]
