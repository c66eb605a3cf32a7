"""How much probability the last queries put on every key, and on every distance: what vertical lines and slashes are
picked by.

With P the probabilities of the last `LAST` queries of each row of a batch, i counting them, p_i their positions::

    vertical_j = Σ_i P_ij / n          slash_d = Σ_i P_{i, p_i − d} / n          n queries there are

Both sum to one. Memory is that of `LAST` rows of logits in torch, and of two numbers per key in the kernels, which take
two passes: log-sum-exps of pieces of the keys, then the sums, every number by one program in one order. Causal only.

Source: MInference (arXiv 2407.02490), section 3.2.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .activations import launching_on, triton_refusal
from .attention import DTYPES, MAX_HEAD_DIM
from .sparse_index import Extent

LAST = 64
"""Queries that lines are picked by, as in the paper."""


def last_queries(query: Tensor, extent: Extent) -> tuple[Tensor, Tensor]:
    """The last `LAST` queries of each row, (batch, heads, LAST, head_dim), zeros before its first, and (batch, 4)
    int32: the first of them that is a query, the position of number 0, and the bounds of the keys.
    """
    _, q_start, q_stop, k_start, k_stop = extent.table.long().unbind(dim=1)
    number = torch.arange(LAST, device=query.device)
    place = q_stop[:, None] - LAST + number
    valid = place >= q_start[:, None]
    rows = torch.arange(query.shape[0], device=query.device)[:, None]
    found = query.transpose(1, 2)[rows, place.clamp(0, query.shape[2] - 1)].transpose(1, 2)
    first = (LAST - (q_stop - q_start)).clamp(0, LAST)
    numbers = torch.stack((first, k_stop - LAST, k_start, k_stop), dim=1).int()
    return torch.where(valid[:, None, :, None], found, 0).contiguous(), numbers


def line_scores(query: Tensor, key: Tensor, extent: Extent, *, scaling: float) -> tuple[Tensor, Tensor]:
    """Scores of keys and of distances.

    Args:
        query: (batch, num_heads, queries, head_dim), key: (batch, num_kv_heads, keys, head_dim), post-RoPE.
        extent: of the call.
        scaling: of the logits.

    Returns:
        vertical: (batch, num_heads, keys) fp32 by key number, counted from the first key of each row.
        slash: (batch, num_heads, keys) fp32 by distance.
    """
    last, numbers = last_queries(query, extent)
    usable = query.dtype in DTYPES and key.dtype == query.dtype and query.shape[-1] <= MAX_HEAD_DIM
    if usable and triton_refusal(query.device, (8, 0)) is None:
        from .line_scores_triton import line_scores_triton

        with launching_on(query):
            return line_scores_triton(last, key, numbers, scaling)
    return line_scores_ref(last, key, numbers, scaling)


def line_scores_ref(last: Tensor, key: Tensor, numbers: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
    """Torch specification, any device. last, numbers: of `last_queries`."""
    batch, heads = last.shape[:2]
    kv_heads, keys = key.shape[1], key.shape[2]
    vertical = torch.zeros((batch, heads, keys), device=last.device)
    slash = torch.zeros((batch, heads, keys), device=last.device)
    j = torch.arange(keys, device=last.device)
    i = torch.arange(LAST, device=last.device)[:, None]
    for row, (first, position, k_start, k_stop) in enumerate(numbers.tolist()):
        if first >= LAST:
            continue
        distance = position + i - j
        seen = (i >= first) & (j >= k_start) & (j < k_stop) & (distance >= 0)
        target = torch.where(seen, distance, 0).flatten()
        for kv in range(kv_heads):
            share = slice(kv * heads // kv_heads, (kv + 1) * heads // kv_heads)
            valid = (j >= k_start) & (j < k_stop)
            k = torch.where(valid[:, None], key[row, kv].float(), 0)
            logits = (last[row, share].float() @ k.mT * scaling).masked_fill(~seen, -torch.inf)
            top = torch.logsumexp(logits, dim=-1, keepdim=True).nan_to_num(neginf=0.0)
            weights = torch.exp(logits - top).masked_fill(~seen, 0.0) / (LAST - first)
            vertical[row, share, : keys - k_start] = weights.sum(dim=1)[:, k_start:]
            slash[row, share] = slash[row, share].index_add(1, target, weights.flatten(1))
    return vertical, slash
