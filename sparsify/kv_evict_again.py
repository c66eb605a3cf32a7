"""Which tokens every KV head keeps while it generates: scores of all that a cache holds, from its last queries.

Let q be the queries of the last `window` tokens, post-RoPE, G the query heads of a KV head, and N what is held and may
go: tokens kept before, and those that were coded since. Beside them a query sees tokens that stay, sinks and recent
ones (D)::

    snapkv, kvzip    mean over G and q of p,  p = softmax(scaling · q·Kᵀ) over all of N and D that q sees, then the mean
                     of `kernel_size` neighbours among those of N that are left
    expected         exp(scaling · μ·k + scaling² · kᵀΣk / 2) ‖v‖, normalized over N, mean over G; μ and Σ of q

the scores of a prompt (`kv_evict.py`), but for two things: neighbours are the tokens that are left, and K is what comes
back of codes. A second reading as of `kvzip` would need the text, of which most is gone; it is followed by the
attention of the last queries.

The tokens are read a few pages at a time, twice: once for the sum that each softmax is divided by, once for p. What
exists of a map is `window` queries by those pages. Pages are shared out among heads as those of a prompt are
(`page_counts`), until they fill what a layer may have; from then on every head keeps its number of them, so that
storage stays where it is.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from ..kernels.kv_repacked import HeldTokens
from .kv_evict import Eviction, capped, page_counts


@dataclass(frozen=True)
class Beside:
    """Tokens that stay: keys, (batch, num_kv_heads, n, head_dim), and columns, (batch or 1, n), which are anything
    where there, (batch or 1, n) bool, is False.
    """

    key: Tensor
    columns: Tensor
    there: Tensor


@dataclass(frozen=True)
class LastQueries:
    """query: (batch, num_heads, queries, head_dim). columns: (queries,) int64. starts: (batch,) int64, the first column
    of each row, before which a query is padding.
    """

    query: Tensor
    columns: Tensor
    starts: Tensor
    scaling: float
    softcap: float | None = None

    @property
    def valid(self) -> Tensor:
        """(batch, queries) bool: which of them are tokens."""
        return self.columns >= self.starts[:, None]

    def grouped(self, heads: int) -> Tensor:
        """(batch, num_kv_heads, group, queries, head_dim) fp32."""
        return self.query.float().unflatten(1, (heads, -1))


def again_scores(last: LastQueries, held: HeldTokens, beside: Beside, places: Tensor, eviction: Eviction) -> Tensor:
    """Scores of the held tokens, (batch, num_kv_heads, n) fp32, in the order of `places` (`HeldTokens.in_order`).

    ValueError for scores that softcaps do not go with.
    """
    if eviction.scores == "expected":
        return expected_again(last, held).gather(2, places)
    scores = attention_again(last, held, beside).gather(2, places)
    size = eviction.kernel_size
    return functional.avg_pool1d(scores, size, stride=1, padding=size // 2)


def attention_again(last: LastQueries, held: HeldTokens, beside: Beside) -> Tensor:
    """Mean attention, (batch, num_kv_heads, places) fp32; 0 for places that are not valid."""
    batch, heads, places = held.valid.shape
    query = last.grouped(heads)
    group, count = query.shape[2:4]
    rows = query.flatten(2, 3)

    def logits(key: Tensor, visible: Tensor) -> Tensor:
        """visible: (batch, num_kv_heads or 1, queries, n) → (batch, num_kv_heads, group · queries, n)."""
        found = capped(rows @ key.float().mT * last.scaling, last.softcap)
        return found.masked_fill(~visible.repeat(1, 1, group, 1), -torch.inf)

    seen = beside.there[:, None] & (beside.columns[:, None] <= last.columns[:, None])
    seen = seen & (beside.columns[:, None] >= last.starts[:, None, None])
    total = logits(beside.key, seen[:, None].expand(batch, -1, -1, -1)).logsumexp(dim=-1)

    def blocks() -> Iterator[tuple[slice, Tensor]]:
        for part, key, _ in held.decoded():
            visible = held.valid[:, :, None, part] & (held.columns[part] <= last.columns[:, None])
            yield part, logits(key, visible)

    for _, found in blocks():
        total = torch.logaddexp(total, found.logsumexp(dim=-1))
    # A query that is padding counts for nothing, whatever it sees.
    real = last.valid.repeat(1, group)[:, None, :, None]
    number = (last.valid.sum(dim=1).clamp_min(1) * group)[:, None, None]
    scores = query.new_zeros((batch, heads, places))
    for part, found in blocks():
        weights = torch.where(real, torch.exp(found - total[..., None]), 0.0)
        scores[:, :, part] = weights.sum(dim=2) / number
    assert count == last.columns.shape[0]
    return scores


def expected_again(last: LastQueries, held: HeldTokens) -> Tensor:
    """Expected attention times ‖v‖, (batch, num_kv_heads, places) fp32; 0 for places that are not valid."""
    if last.softcap is not None:
        raise ValueError("scores expected is for attention without a softcap; take scores snapkv or kvzip")
    heads = held.valid.shape[1]
    query = last.grouped(heads)
    weight = last.valid / last.valid.sum(dim=1, keepdim=True).clamp_min(1)
    weight = weight[:, None, None, :, None]
    mean = (query * weight).sum(dim=3)
    centred = (query - mean[..., None, :]) * weight.sqrt()
    covariance = centred.mT @ centred
    logits, lengths = [], []
    for _, key, value in held.decoded():
        found = torch.einsum("bhgd,bhtd->bhgt", mean, key) * last.scaling
        for group in range(query.shape[2]):
            found[:, :, group] += ((key @ covariance[:, :, group]) * key).sum(dim=-1) * (last.scaling**2 / 2)
        logits.append(found)
        lengths.append(value.norm(dim=-1))
    hidden = ~held.valid[:, :, None]
    weights = torch.cat(logits, dim=3).masked_fill(hidden, -torch.inf).softmax(dim=-1).nan_to_num(0.0)
    return weights.mean(dim=2) * torch.cat(lengths, dim=2)


def again_pages(
    scores: Tensor, counts: list[list[int]], held: list[list[int]] | None, room: int, eviction: Eviction
) -> list[list[int]]:
    """Row → head → pages. scores: (batch, num_kv_heads, n), of which `counts` of each head are tokens. held: pages of
    what each head had kept before; None for nothing. room: pages of all heads of a row.
    """
    found = []
    for row, there in enumerate(counts):
        if held is not None and sum(held[row]) == room:
            found.append(held[row])
            continue
        behind = torch.arange(scores.shape[2], device=scores.device)
        hidden = behind >= torch.tensor(there, device=scores.device)[:, None]
        found.append(page_counts(scores[row].masked_fill(hidden, -torch.inf), room, eviction, there))
    return found
