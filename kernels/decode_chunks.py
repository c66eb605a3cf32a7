"""Attention of many queries over a compressed cache: chunks of a prefill, a second turn.

The coded columns are made dense `COLUMNS` at a time, attention over each part is that of `attention.py`, and parts are
merged by their log-sum-exp::

    O = Σ_b exp(lse_b − lse) · O_b        lse = log Σ_b exp(lse_b)

so that memory is that of one part however long the past is. Queries see all of a part that lies in pages, since their
own tokens are dense; the last part holds the dense columns, the queries' own among them, and is causal. A layer with a
window has kept little more than the window, and is one part.
"""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .attention import attention_op
from .decode_attention import dequantized
from .segments import Segments

if TYPE_CHECKING:
    from .decode_attention import CompressedKV, Reading

COLUMNS = 4096


def decode_chunks(
    query: Tensor,
    kv: CompressedKV,
    call: Reading,
    sinks: Tensor | None,
    key_starts: Tensor | None,
    *,
    columns: int = COLUMNS,
) -> tuple[Tensor, Tensor]:
    """As `decode_attention.decode_ref`, on any device and in the arithmetic of `attention.attention_op`'s bf16 mode.

    Keys and values are made dense in the dtype of query, which rounds them.
    """
    edges = [kv.first, kv.tokens]
    if call.window is None:
        # Tokens that came with the queries and were coded at once are read as they came.
        stop = min(kv.coded, kv.tokens - query.shape[2])
        edges = [*range(kv.first, stop, columns), stop, kv.tokens]
    parts = []
    for start, stop in pairwise(edges):
        if start < stop:
            parts.append(part_attention(query, kv, call, (start, stop), key_starts, causal=stop == kv.tokens))
    lse = torch.logsumexp(torch.stack([part[1] for part in parts]), dim=0)
    whole = lse if sinks is None else torch.logaddexp(lse, sinks.float().view(1, -1, 1))
    # A query that sees no token has −∞ in every part.
    whole = torch.where(lse.isneginf(), 0.0, whole)
    out = torch.zeros_like(parts[0][0], dtype=torch.float32)
    for part, part_lse in parts:
        out += part * torch.exp(part_lse - whole).transpose(1, 2)[..., None]
    return out.to(query.dtype).transpose(1, 2), lse


def part_attention(
    query: Tensor,
    kv: CompressedKV,
    call: Reading,
    columns: tuple[int, int],
    key_starts: Tensor | None,
    *,
    causal: bool,
) -> tuple[Tensor, Tensor]:
    """out (batch, queries, num_heads, value_head_dim) and lse over some columns."""
    start, stop = columns
    key, value = dequantized(kv, query.dtype, start, stop)
    segments = None if key_starts is None else padded(query, key_starts - start, stop - start, causal=causal)
    return attention_op(
        query,
        key,
        value,
        None,
        None if segments is None else segments.table,
        query.shape[2],
        "bf16",
        causal,
        call.window,
        call.scaling,
        call.softcap,
    )


def padded(query: Tensor, first: Tensor, keys: int, *, causal: bool) -> Segments:
    """Segments of rows whose first key that is no padding is `first`, (batch,) int64, and may lie before or behind all.

    A causal part ends with the queries themselves, of which those that are padding are in no segment.
    """
    batch, queries = query.shape[0], query.shape[2]
    rows = torch.arange(batch, device=query.device)
    first = first.to(query.device).clamp(0, keys)
    q_start = (first - (keys - queries)).clamp(0, queries) if causal else torch.where(first == keys, queries, 0)
    full = torch.full_like(rows, queries)
    table = torch.stack((rows, q_start, full, first, torch.full_like(rows, keys)), dim=1).to(torch.int32)
    return Segments(table, queries, (batch, queries, keys))
