"""Sparse indices for tests: random lists over calls of odd lengths, and the mask that a call with them means."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from attention_cases import AttentionCase
from torch import Tensor

from kompakt.kernels.segments import Segments, visible, whole
from kompakt.kernels.sparse_index import (
    NOTHING,
    TILE,
    Extent,
    Lines,
    SparseIndex,
    index_from_map,
    lines,
    listed_keys,
    tile_map,
)


@dataclass(frozen=True)
class SparseCase:
    """attention: the call. heads: of the index. slashes, columns: how many per head. tail: last queries that see all of
    the second half of the heads. diagonal: with the slash of distance 0. kind: "lines", "map", "dense" or "skip".
    """

    attention: AttentionCase
    heads: int
    slashes: int = 2
    columns: int = 20
    tail: int = 0
    diagonal: bool = True
    kind: str = "lines"

    def extent(self, segments: Segments | None) -> Extent:
        queries, keys = self.attention.lengths
        return Extent.of(self.attention.batch, queries, keys, segments, torch.device("cpu"))

    def lines(self, extent: Extent) -> Lines:
        generator = torch.Generator().manual_seed(self.heads + extent.keys)
        shape = (len(extent.table), self.heads)

        def draw(count: int) -> Tensor:
            found = torch.randint(0, extent.keys, (*shape, count), generator=generator)
            found[:, 0, count // 2 :] = NOTHING
            return found

        diagonal = torch.zeros((*shape, int(self.diagonal)), dtype=torch.long)
        slashes = torch.cat((diagonal, draw(self.slashes)), dim=-1)
        tail = torch.zeros(self.heads, dtype=torch.long)
        tail[self.heads // 2 :] = self.tail
        return lines(slashes, draw(self.columns), extent, heads=self.heads, dense_rows=tail)

    def wanted(self, extent: Extent) -> Tensor:
        shape = (len(extent.table), self.heads, extent.query_tiles, extent.key_tiles)
        if self.kind == "map":
            return torch.rand(shape, generator=torch.Generator().manual_seed(self.heads)) < 0.4
        if self.kind == "lines":
            return tile_map(self.lines(extent), extent)
        return torch.full(shape, self.kind == "dense")

    def index(self, segments: Segments | None) -> SparseIndex:
        extent = self.extent(segments)
        columns = self.lines(extent).columns if self.kind == "lines" else None
        return index_from_map(self.wanted(extent), extent, causal=self.attention.causal, columns=columns)


def oracle_mask(case: SparseCase, segments: Segments | None) -> Tensor:
    """(batch, heads of the index, queries, keys) bool, worked out from the lines and maps key by key."""
    call, extent = case.attention, case.extent(segments)
    places = whole(call.batch, *call.lengths, "cpu") if segments is None else segments
    mask = visible(places, call.batch, slice(0, extent.queries), extent.keys, causal=call.causal, window=None)
    found = torch.zeros((call.batch, case.heads, extent.queries, extent.keys), dtype=torch.bool)
    wanted = case.wanted(extent)
    chosen = case.lines(extent) if case.kind == "lines" else None
    for row, q_start, q_stop, _, _ in places.table.tolist():
        for i in range(q_start, q_stop):
            tiles = wanted[row, :, (i - q_start) // TILE]
            found[row, :, i] = tiles.repeat_interleave(TILE, dim=-1)[:, : extent.keys]
        if chosen is not None:
            for head, keys in enumerate(chosen.columns[row]):
                found[row, head, q_start:q_stop, keys[keys < extent.keys].long()] = True
    return found & mask[:, None]


def listed_mask(case: SparseCase, index: SparseIndex, segments: Segments | None) -> Tensor:
    """The same from the lists of an index."""
    call, extent = case.attention, case.extent(segments)
    places = whole(call.batch, *call.lengths, "cpu") if segments is None else segments
    mask = visible(places, call.batch, slice(0, extent.queries), extent.keys, causal=call.causal, window=None)
    found = torch.zeros((call.batch, case.heads, extent.queries, extent.keys), dtype=torch.bool)
    listed = listed_keys(index, extent)
    for row, q_start, q_stop, _, _ in places.table.tolist():
        for i in range(q_start, q_stop):
            found[row, :, i] = listed[row, :, (i - q_start) // TILE]
    return found & mask[:, None]


def masked_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scaling: float, softcap: float | None, sinks: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Attention in FP64 over a dense mask (batch, heads, queries, keys): out (batch, heads, queries, dim) and lse."""
    heads, kv_heads = query.shape[1], key.shape[1]
    q, k, v = (t.double() for t in (query, key, value))
    k, v = (t.repeat_interleave(heads // kv_heads, dim=1) for t in (k, v))
    mask = mask.repeat_interleave(heads // mask.shape[1], dim=1)
    k, v = (torch.where(mask.any(2)[..., None], t, 0) for t in (k, v))
    logits = q @ k.mT * scaling
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    logits = logits.masked_fill(~mask, -torch.inf)
    lse = torch.logsumexp(logits, dim=-1)
    total = lse if sinks is None else torch.where(lse.isneginf(), lse, torch.logaddexp(lse, sinks.double()[:, None]))
    weights = torch.exp(logits - total[..., None]).masked_fill(~mask, 0.0)
    return weights @ v, lse
