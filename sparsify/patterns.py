"""The vocabulary of sparse attention: which keys the queries of one head visit.

| pattern           | keys of the query at position p, of n                                                |
|-------------------|--------------------------------------------------------------------------------------|
| `dense`, `skip`   | all; none                                                                            |
| `a_shape`         | the first `sink`, and those fewer than `window` away: a sliding window with sinks    |
| `tri_shape`       | the same, and all for the last `tail` queries                                        |
| `diagonal`        | those fewer than `window` away, to both sides                                        |
| `multi_diagonal`  | those fewer than `window` from a multiple of `stride` away                           |
| `vertical_stripe` | the first `width` of every `stride`                                                  |
| `vertical_slash`  | `vertical` keys and `slash` distances, picked by the last 64 queries of each input   |
| `block`           | `tiles` tiles of 64 keys for every 64 queries, picked by products of means           |

All but `block` are *lines*: distances, keys and last rows (`kernels/sparse_index.py`). `exact_mask` is what lines say
key by key; an index visits the tiles that distances touch, which holds those keys and more. `StaticPattern` visits
exactly the keys of the first four, and needs no index.

Source: MInference (arXiv 2407.02490): A-shape, vertical-slash, block; TriangleMix (2507.21526): tri-shape; Sparse-vDiT
(2506.03065): the diagonals and stripes. Of vertical-slash the first 30 keys and nearest 100 distances are always there,
as in the authors' code.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..kernels.sparse_attention import EVERYTHING, StaticPattern
from ..kernels.sparse_index import (
    NOTHING,
    TILE,
    Extent,
    Lines,
    SparseIndex,
    index_from_lines,
    index_from_map,
    lines,
    tile_map,
)

FORCED_KEYS, FORCED_DISTANCES = 30, 100
"""Of vertical-slash, always there; budgets count them."""
LARGEST = 2**30


@dataclass(frozen=True)
class Pattern:
    """Base of all patterns; fields are numbers of tokens, or of tiles where they say so."""

    key: ClassVar[str]
    scores: ClassVar[bool] = False
    """Whether it picks by the scores of keys and distances."""
    growing: ClassVar[tuple[str, ...]] = ()
    """Budgets that grow with the length of a prompt."""

    def __post_init__(self) -> None:
        for item in fields(self):
            value = getattr(self, item.name)
            if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= LARGEST:
                raise ValueError(f"{item.name} of {self.key} is {value!r}; it counts tokens, from 0")

    def distances(self, queries: int, keys: int, causal: bool) -> range | list[int]:
        """Distances of query and key that it visits whatever the input."""
        return []

    def columns(self, keys: int) -> range | list[int]:
        """Keys that it visits whatever the input."""
        return []

    def rows(self) -> int:
        """How many of the last queries see everything."""
        return 0

    def static(self) -> tuple[int, int, int] | None:
        """sink, window and tail of a `StaticPattern`, or None if it is none."""
        return None

    def scaled(self, factor: float) -> Pattern:
        """With budgets for a prompt that is so many times as long; no less than they are."""
        if factor <= 1 or not self.growing:
            return self
        values = asdict(self)
        values |= {name: min(math.ceil(values[name] * factor), LARGEST) for name in self.growing}
        return type(self)(**values)

    def as_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return {"pattern": self.key, **asdict(self)}


@dataclass(frozen=True)
class Dense(Pattern):
    """All keys."""

    key: ClassVar[str] = "dense"

    def rows(self) -> int:
        return LARGEST

    def static(self) -> tuple[int, int, int]:
        return 0, EVERYTHING, 0


@dataclass(frozen=True)
class Skip(Pattern):
    """No key: the head gives zeros."""

    key: ClassVar[str] = "skip"

    def static(self) -> tuple[int, int, int]:
        return 0, 0, 0


@dataclass(frozen=True)
class AShape(Pattern):
    """Sinks and a window."""

    key: ClassVar[str] = "a_shape"
    growing: ClassVar[tuple[str, ...]] = ("window",)
    sink: int
    window: int

    def distances(self, queries: int, keys: int, causal: bool) -> range:
        stop = min(self.window, keys + queries)
        return range(0 if causal else 1 - stop, stop)

    def columns(self, keys: int) -> range:
        return range(min(self.sink, keys))

    def static(self) -> tuple[int, int, int]:
        return self.sink, self.window, 0


@dataclass(frozen=True)
class TriShape(AShape):
    """Sinks, a window, and last queries that see all."""

    key: ClassVar[str] = "tri_shape"
    growing: ClassVar[tuple[str, ...]] = ()
    tail: int

    def rows(self) -> int:
        return self.tail

    def static(self) -> tuple[int, int, int]:
        return self.sink, self.window, self.tail


@dataclass(frozen=True)
class Diagonal(Pattern):
    """A band around the diagonal."""

    key: ClassVar[str] = "diagonal"
    window: int

    def distances(self, queries: int, keys: int, causal: bool) -> range:
        stop = min(self.window, keys + queries)
        return range(0 if causal else 1 - stop, stop)

    def static(self) -> tuple[int, int, int]:
        return 0, self.window, 0


@dataclass(frozen=True)
class MultiDiagonal(Pattern):
    """Bands at every multiple of a distance, as between the frames of a video."""

    key: ClassVar[str] = "multi_diagonal"
    stride: int
    window: int

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.stride < 1:
            raise ValueError(f"stride of {self.key} is {self.stride}; it counts tokens, from 1")

    def distances(self, queries: int, keys: int, causal: bool) -> list[int]:
        last, window = queries + keys, self.window
        found = {
            center + offset
            for center in range(0 if causal else -(last // self.stride) * self.stride, last, self.stride)
            for offset in range(1 - window, window)
        }
        return sorted(distance for distance in found if not causal or distance >= 0)


@dataclass(frozen=True)
class VerticalStripe(Pattern):
    """The first keys of every stretch, as the first tokens of every frame."""

    key: ClassVar[str] = "vertical_stripe"
    stride: int
    width: int

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.stride < 1:
            raise ValueError(f"stride of {self.key} is {self.stride}; it counts tokens, from 1")

    def columns(self, keys: int) -> list[int]:
        return [key for key in range(keys) if key % self.stride < self.width]


@dataclass(frozen=True)
class VerticalSlash(Pattern):
    """Keys and distances picked for every input."""

    key: ClassVar[str] = "vertical_slash"
    scores: ClassVar[bool] = True
    growing: ClassVar[tuple[str, ...]] = ("vertical", "slash")
    vertical: int
    slash: int


@dataclass(frozen=True)
class Block(Pattern):
    """Tiles picked for every input."""

    key: ClassVar[str] = "block"
    growing: ClassVar[tuple[str, ...]] = ("tiles",)
    tiles: int


PATTERNS: dict[str, type[Pattern]] = {
    kind.key: kind
    for kind in (Dense, Skip, AShape, TriShape, Diagonal, MultiDiagonal, VerticalStripe, VerticalSlash, Block)
}


def read_pattern(content: Any) -> Pattern:
    """Reads `Pattern.as_dict`. ValueError if it is something else."""
    if not isinstance(content, dict) or content.get("pattern") not in PATTERNS:
        named = content.get("pattern") if isinstance(content, dict) else content
        raise ValueError(f"pattern {str(named)[:80]!r} is unknown to this kompakt; known: {', '.join(PATTERNS)}")
    try:
        return PATTERNS[content["pattern"]](**{name: value for name, value in content.items() if name != "pattern"})
    except TypeError as error:
        raise ValueError(f"a pattern {content['pattern']} is damaged: {error}") from error


def static_pattern(heads: Sequence[Pattern], device: torch.device | str) -> StaticPattern | None:
    """The table of a layer whose heads need no index; None if one does."""
    rows = [head.static() for head in heads]
    if any(row is None for row in rows):
        return None
    return StaticPattern(torch.tensor(rows, dtype=torch.int32, device=device))


def pick_lines(scores: Tensor, budgets: Sequence[int], forced: int) -> Tensor:
    """(batch, heads, largest budget) int64: the entries with the highest scores of each head, `forced` first ones among
    them; `NOTHING` beyond the head's budget. scores: (batch, heads, entries) fp32, from 0 to 1.
    """
    limit = min(max(budgets), scores.shape[-1])
    if limit == 0:
        return torch.zeros((*scores.shape[:2], 0), dtype=torch.long, device=scores.device)
    raised = scores.clone()
    raised[..., :forced] += 2.0
    found = raised.topk(limit, dim=-1).indices
    beyond = torch.arange(limit, device=scores.device) >= torch.tensor(budgets, device=scores.device)[:, None]
    return torch.where(beyond, NOTHING, found)


def head_lines(
    heads: Sequence[Pattern],
    extent: Extent,
    *,
    causal: bool,
    vertical: Tensor | None = None,
    slash: Tensor | None = None,
) -> Lines:
    """`Lines` of a layer. vertical, slash: (batch, heads, keys), see `kernels/line_scores.py`; needed by some
    patterns.
    """
    batch, device = len(extent.table), extent.table.device
    sets = [head.distances(extent.queries, extent.keys, causal) for head in heads]
    keys = [head.columns(extent.keys) for head in heads]
    slashes, columns = (_padded(item, device).expand(batch, -1, -1) for item in (sets, keys))
    if any(head.scores for head in heads):
        if vertical is None or slash is None:
            raise ValueError("vertical_slash picks by scores, and none were given")
        budgets = [(head.vertical, head.slash) if isinstance(head, VerticalSlash) else (0, 0) for head in heads]
        picked = pick_lines(slash, [budget[1] for budget in budgets], FORCED_DISTANCES)
        slashes = torch.cat((slashes, picked), dim=-1)
        columns = torch.cat((columns, pick_lines(vertical, [budget[0] for budget in budgets], FORCED_KEYS)), dim=-1)
    rows = torch.tensor([head.rows() for head in heads])
    return lines(slashes, columns, extent, heads=len(heads), dense_rows=rows)


def _padded(sets: Sequence[range | list[int]], device: torch.device) -> Tensor:
    """(sets, most entries) int64, filled up with `NOTHING`."""
    padded = torch.full((len(sets), max((len(item) for item in sets), default=0)), NOTHING)
    for row, item in zip(padded, sets, strict=True):
        if isinstance(item, range):
            # Ranges hold up to a prompt's tokens, of every candidate of a search: made at once, not number by number.
            row[: len(item)] = torch.arange(item.start, item.stop, item.step)
        else:
            row[: len(item)] = torch.tensor(item, dtype=torch.long)
    return padded.to(device)


def block_map(query: Tensor, key: Tensor, tiles: Sequence[int], extent: Extent, *, causal: bool) -> Tensor:
    """(batch, heads, query tiles, key tiles) bool: per row the tiles with the largest products of means, its first and
    its last ones among them. tiles: of each head.
    """
    from ..kernels.sparse_index import visible_tiles

    batch, heads = query.shape[:2]
    seen, _ = visible_tiles(extent, causal=causal)
    pooled_keys = tile_means(key, extent.table[:, 3], extent.table[:, 4], torch.zeros_like(extent.table[:, 3]))
    pooled_queries = tile_means(query, extent.table[:, 1], extent.table[:, 2], extent.table[:, 1])
    chosen = torch.zeros((batch, heads, extent.query_tiles, extent.key_tiles), dtype=torch.bool, device=query.device)
    limit = min(max(tiles), extent.key_tiles)
    if limit == 0:
        return chosen
    order = torch.arange(extent.key_tiles, device=query.device)
    first = seen.int().argmax(-1, keepdim=True)
    last = torch.where(seen, order, -1).amax(-1, keepdim=True)
    group = heads // key.shape[1]
    for head, budget in enumerate(tiles):
        logits = pooled_queries[:, head] @ pooled_keys[:, head // group].mT
        allowed = seen[:, 0]
        logits = logits.masked_fill((order == first[:, 0]) | (order == last[:, 0]), torch.inf)
        logits = logits.masked_fill(~allowed, -torch.inf)
        best = logits.topk(min(max(budget, 1), extent.key_tiles), dim=-1).indices
        chosen[:, head].scatter_(-1, best, budget > 0)
    return chosen & seen


def tile_means(tokens: Tensor, start: Tensor, stop: Tensor, origin: Tensor) -> Tensor:
    """(batch, heads, tiles, channels) fp32: means of 64 tokens each. start, stop: bounds of each row's tokens. origin:
    (batch,) where its tile 0 begins.
    """
    batch, heads, count, channels = tokens.shape
    place = torch.arange(count, device=tokens.device)
    inside = (place >= start[:, None]) & (place < stop[:, None])
    tile = ((place - origin[:, None]).clamp_min(0) // TILE).long()
    sums = torch.zeros((batch, heads, -(-count // TILE), channels), device=tokens.device)
    values = torch.where(inside[:, None, :, None], tokens.float(), 0.0)
    sums.scatter_add_(2, tile[:, None, :, None].expand_as(values), values)
    counts = torch.zeros((batch, sums.shape[2]), device=tokens.device).scatter_add_(1, tile, inside.float())
    return sums / counts.clamp_min(1)[:, None, :, None]


def layer_index(
    heads: Sequence[Pattern],
    extent: Extent,
    *,
    causal: bool,
    query: Tensor | None = None,
    key: Tensor | None = None,
    vertical: Tensor | None = None,
    slash: Tensor | None = None,
) -> SparseIndex:
    """The index of a layer. query, key: for `block`, as the attention takes them. Waits for the device."""
    chosen = head_lines(heads, extent, causal=causal, vertical=vertical, slash=slash)
    blocks = [head.tiles if isinstance(head, Block) else 0 for head in heads]
    if not any(blocks):
        return index_from_lines(chosen, extent, causal=causal)
    if query is None or key is None:
        raise ValueError("block picks by queries and keys, and none were given")
    wanted = tile_map(chosen, extent) | block_map(query, key, blocks, extent, causal=causal)
    return index_from_map(wanted, extent, causal=causal, columns=chosen.columns)


def exact_mask(
    pattern: Pattern,
    queries: int,
    keys: int,
    *,
    causal: bool,
    columns: Tensor | None = None,
    slashes: Tensor | None = None,
) -> Tensor:
    """(queries, keys) bool, key by key, of queries at the end of the keys. columns, slashes: what was picked, of
    `vertical_slash`. Holds the whole mask. ValueError for `block`, which has tiles alone.
    """
    if isinstance(pattern, Block):
        raise ValueError("block visits tiles; its mask is that of its index")
    position = torch.arange(queries)[:, None] + keys - queries
    j = torch.arange(keys)[None, :]
    distances = torch.tensor([*pattern.distances(queries, keys, causal)], dtype=torch.long)
    listed = torch.tensor([*pattern.columns(keys)], dtype=torch.long)
    if slashes is not None and columns is not None:
        distances, listed = torch.cat((distances, slashes.long())), torch.cat((listed, columns.long()))
    mask = torch.isin(position - j, distances) | torch.isin(j, listed) | (position >= keys - pattern.rows())
    return mask & (j <= position) if causal else mask
