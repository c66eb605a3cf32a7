"""What attention is measured on: families of masks, random inputs of a shape, and what is right at some queries.

| mask | queries and keys |
|---|---|
| causal | as many queries as keys, each sees itself and what is before it |
| full | all see all |
| window | causal, and no further back than 1024 keys, 4096 beyond 8192 tokens; at most half the length |
| padding | causal, at least two rows, a third of every second row is padding on its left |
| packed | causal within five documents of uneven length |
| chunk | causal; the queries are the last quarter of the keys, as in a chunked prefill |

Inputs are (batch, heads, tokens, head_dim) views of contiguous (batch, tokens, heads, head_dim), as a model gives them.
Keys have an offset per channel, which is what smoothing is for, and some tokens of all three are larger than others.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..kernels.attention import MAX_HEAD_DIM, code_queries, operands_ref, query_means
from ..kernels.attention_quant import rotate
from ..kernels.segments import Segments, visible, whole

MASKS = ("causal", "full", "window", "padding", "packed", "chunk")
DOCUMENT_ENDS = (7, 41, 46, 73)
"""Where packed documents end, in percent of the length."""
MIN_LENGTH = 16
"""Shorter sequences have no five documents."""
SHORT_WINDOW, LONG_WINDOW, LONG = 1024, 4096, 8192
KEY_OFFSET, OUTLIER = 4.0, 3.0
OUTLIER_STEP = 61
BLOCKS, BLOCK_ROWS = 5, 16


@dataclass(frozen=True)
class Case:
    """One shape of attention. mask: of `MASKS`. length: number of keys."""

    mask: str
    length: int
    head_dim: int
    heads: int
    kv_heads: int
    batch: int

    @property
    def name(self) -> str:
        """``causal 32/8 heads of 128, 4096 tokens``."""
        return f"{self.mask} {self.heads}/{self.kv_heads} heads of {self.head_dim}, {self.length} tokens"


@dataclass(frozen=True)
class Layout:
    """A mask as `kernels.attention.prefill_attention` takes it, and the numbers of queries and keys it is for."""

    batch: int
    queries: int
    keys: int
    causal: bool
    window: int | None
    segments: Segments | None

    @classmethod
    def of(cls, case: Case, device: torch.device) -> Layout:
        """The mask of a case."""
        batch, length, causal = case.batch, case.length, case.mask != "full"
        queries, window, segments = length, None, None
        if case.mask == "window":
            window = min(LONG_WINDOW if length > LONG else SHORT_WINDOW, length // 2)
        elif case.mask == "padding":
            tokens = torch.ones((batch, length), dtype=torch.bool, device=device)
            tokens[1::2, : length // 3] = False
            segments = Segments.from_padding(tokens, length)
        elif case.mask == "packed":
            documents = torch.zeros((batch, length), dtype=torch.int32, device=device)
            for end in DOCUMENT_ENDS:
                documents[:, -(-length * end // 100) :] += 1
            segments = Segments.from_documents(documents)
        elif case.mask == "chunk":
            queries = math.ceil(length / 4)
        return cls(batch, queries, length, causal, window, segments)

    @property
    def places(self) -> Segments:
        """The segments, also where everything is one."""
        return whole(self.batch, self.queries, self.keys, "cpu") if self.segments is None else self.segments

    def visible(self, rows: slice, device: torch.device) -> Tensor:
        """(batch, queries of the slice, keys) bool."""
        places = replace(self.places, table=self.places.table.to(device))
        return visible(places, self.batch, rows, self.keys, causal=self.causal, window=self.window)

    def pairs(self) -> int:
        """Query-key pairs that are visible, over the whole batch."""
        total = 0
        for _, q_start, q_stop, k_start, k_stop in self.places.table.tolist():
            queries, keys = q_stop - q_start, k_stop - k_start
            position = torch.arange(keys - queries, keys)
            first, last = torch.zeros_like(position), torch.full_like(position, keys - 1)
            if self.causal:
                last = position
            if self.window is not None:
                first = torch.maximum(first, position - self.window + 1)
                last = torch.minimum(last, position + self.window - 1)
            total += int((last - first + 1).clamp_min(0).sum())
        return total


def parse_lengths(text: str) -> list[int]:
    """Whole numbers, comma-separated, ascending and each once. Raises ValueError for anything else."""
    for item in text.split(","):
        if not re.fullmatch(r"\s*[1-9]\d*\s*", item) or int(item) < MIN_LENGTH:
            raise ValueError(f"length {item!r} is no whole number of at least {MIN_LENGTH}; use e.g. 1024,4096,32768")
    return sorted({int(item) for item in text.split(",")})


def parse_head_dims(text: str) -> list[int]:
    """Whole numbers, comma-separated, ascending and each once. Raises ValueError for anything else."""
    for item in text.split(","):
        if not re.fullmatch(r"\s*[1-9]\d*\s*", item) or int(item) > MAX_HEAD_DIM:
            raise ValueError(f"head_dim {item!r} is no whole number up to {MAX_HEAD_DIM}; use e.g. 64,128")
    return sorted({int(item) for item in text.split(",")})


def parse_heads(text: str) -> list[tuple[int, int]]:
    """Query heads / KV heads, comma-separated, each once. Raises ValueError for anything else."""
    found = []
    for item in text.split(","):
        pair = re.fullmatch(r"\s*([1-9]\d*)/([1-9]\d*)\s*", item)
        if pair is None:
            raise ValueError(f"heads {item!r} are no numbers of query and KV heads; use e.g. 32/8")
        heads, kv_heads = map(int, pair.groups())
        if heads % kv_heads:
            raise ValueError(f"heads {item!r}: {kv_heads} KV heads do not divide {heads} query heads")
        found.append((heads, kv_heads))
    return list(dict.fromkeys(found))


def draw(case: Case, layout: Layout, device: torch.device, dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, ...]:
    """Queries, keys and values, the same every time."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(tokens: int, heads: int) -> Tensor:
        values = torch.randn((case.batch, tokens, heads, case.head_dim), generator=generator, device=device)
        values[:, OUTLIER_STEP // 2 :: OUTLIER_STEP] *= OUTLIER
        return values

    query, key, value = normal(layout.queries, case.heads), *(normal(layout.keys, case.kv_heads) for _ in range(2))
    key += KEY_OFFSET * torch.randn((case.kv_heads, case.head_dim), generator=generator, device=device)
    return tuple(tensor.to(dtype).transpose(1, 2) for tensor in (query, key, value))


def blocks(queries: int) -> list[slice]:
    """`BLOCKS` runs of `BLOCK_ROWS` queries, evenly spaced with both ends, or all queries where there are few."""
    if queries <= BLOCKS * BLOCK_ROWS:
        return [slice(0, queries)]
    starts = [(queries - BLOCK_ROWS) * index // (BLOCKS - 1) for index in range(BLOCKS)]
    return [slice(start, start + BLOCK_ROWS) for start in starts]


def attend_rows(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: Layout,
    rows: slice,
    dtype: torch.dtype = torch.float32,
    *,
    scaling: float | None = None,
) -> Tensor:
    """Attention of some queries with nothing rounded: (batch, heads, rows, head_dim) in `dtype`.

    query: (batch, heads, rows, head_dim), those of `rows` alone; key, value: (batch, KV heads, keys, head_dim).
    scaling: of the logits, default 1/√head_dim.
    """
    batch, heads, _, head_dim = query.shape
    kv_heads = key.shape[1]
    q = query.to(dtype).reshape(batch, kv_heads, heads // kv_heads, -1, head_dim)
    k, v = key.to(dtype)[:, :, None], value.to(dtype)[:, :, None]
    mask = layout.visible(rows, query.device)[:, None, None]
    logits = (q @ k.mT * (head_dim**-0.5 if scaling is None else scaling)).masked_fill(~mask, -torch.inf)
    weights = torch.softmax(logits, dim=-1).masked_fill(~mask, 0.0)
    return (weights @ v).reshape(batch, heads, -1, value.shape[-1])


def reference_rows(
    query: Tensor, key: Tensor, value: Tensor, layout: Layout, mode: str, rows: Sequence[slice]
) -> list[Tensor]:
    """What `attention_ref` gives for runs of queries, each (batch, heads, rows, head_dim) FP32, without its other rows.

    query: (batch, heads, queries, head_dim), all of them. Softmax does not see what keys had taken off.
    """
    bounds = None if layout.segments is None else layout.segments.key_bounds(layout.batch)
    k, v, _, value_mean = operands_ref(key, value, mode, bounds)
    means = query_means(query, layout.places) if mode == "int4_fp8" else None
    found = []
    for run in rows:
        wanted = query[:, :, run].float()
        if means is None:
            coded = code_queries(wanted, mode)
        else:
            coded = code_queries(wanted - means[:, :, run], mode) + rotate(means[:, :, run])
        seen = layout.visible(run, query.device).any(dim=-1)[:, None, :, None]
        added = value_mean.repeat_interleave(query.shape[1] // key.shape[1], dim=1)[:, :, None]
        found.append(attend_rows(coded, k, v, layout, run, scaling=query.shape[3] ** -0.5) + added * seen)
    return found


def worst_error(found: Tensor, expected: Tensor) -> float:
    """Largest ‖found − expected‖ / ‖expected‖ of a query, over its heads; both (batch, heads, queries, head_dim).

    0 for a query that is zero in both, infinite where only the expected is; NaN if anything is.
    """
    difference, size = (part.double().square().sum(dim=(1, 3)) for part in (found.double() - expected, expected))
    return float(torch.where((difference == 0) & (size == 0), 0.0, difference / size).sqrt().max())
