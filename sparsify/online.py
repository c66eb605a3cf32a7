"""From a layer's policy and the tensors of one call to what the attention kernel visits."""

from __future__ import annotations

import torch
from torch import Tensor

from ..kernels.line_scores import LAST, line_scores
from ..kernels.sparse_attention import StaticPattern
from ..kernels.sparse_index import Extent, SparseIndex
from .method import SparsityPolicy
from .patterns import layer_index, static_pattern

MIN_QUERIES = LAST
"""Queries of a call from which it is sparse: lines are picked by so many."""


def index_of(
    policy: SparsityPolicy, query: Tensor, key: Tensor, extent: Extent, *, scaling: float
) -> SparseIndex | StaticPattern:
    """What a causal call visits: static patterns as they are, others by an index of this input. Waits for the device
    unless all heads are static.

    query: (batch, num_heads, queries, head_dim), key: (batch, num_kv_heads, keys, head_dim), post-RoPE.
    """
    heads = policy.patterns(extent.keys)
    found = static_pattern(heads, query.device)
    if found is not None:
        return found
    vertical = slash = None
    if any(head.scores for head in heads):
        vertical, slash = line_scores(query, key, extent, scaling=scaling)
    return layer_index(heads, extent, causal=True, query=query, key=key, vertical=vertical, slash=slash)


def visited(index: SparseIndex | StaticPattern, extent: Extent) -> tuple[Tensor, Tensor]:
    """Tiles that a causal call visits, and those of dense attention: numbers on the device."""
    first, last, inside = extent.positions()
    k_start = extent.table.long()[:, 3, None]
    dense = ((last // 64 - k_start // 64 + 1) * inside).sum()
    if isinstance(index, SparseIndex):
        return index.work().sum(dtype=torch.float64), dense.double() * index.extent[1]
    sink, window, tail = (item[:, None, None].long() for item in index.table.unbind(1))
    k_stop = extent.table.long()[:, 4, None]
    rows = last >= k_stop - tail
    begin = (first - window + 1).clamp_min(0).maximum(k_start) // 64
    begin = begin.where(window > 0, last // 64 + 1)
    begin = begin.where(~rows, k_start // 64)
    sinks = ((k_start + sink).minimum(last + 1) + 63) // 64
    sinks = (sinks.minimum(begin) - k_start // 64).clamp_min(0) * (sink > 0)
    tiles = ((last // 64 + 1 - begin).clamp_min(0) + sinks) * inside
    return tiles.sum().double(), dense.double() * len(index.table)
