"""What candidate patterns do to the heads of a layer, measured in one pass over the queries and O(tokens) memory.

A tile of 64 queries at a time has its exact probabilities P, over n keys, and for every key tile t the product P_t·V_t.
A candidate that lists the tiles T and the columns C then has, without any further product of queries and keys,

    recall = Σ_{t ∈ T} ΣP_t + Σ_{j ∈ C} P_j          O' = (Σ_{t ∈ T} P_t·V_t + Σ_{j ∈ C} P_j·v_j) / recall

which is attention over the listed keys alone, and recall = exp(lse' − lse). Lines that are picked per input are picked
on the same document from its last 64 queries, as they will be in use.

*Equal cost.* Candidates of one level visit the same share of the causal tiles, 64 columns counting as `COLUMN_COST`
tiles. Slashes are added in the order of their scores, and what the next one costs is the tiles that it opens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..kernels.line_scores import line_scores
from ..kernels.segments import whole
from ..kernels.sparse_index import TILE, Extent, Lines
from .method import SparseInputs
from .patterns import (
    FORCED_DISTANCES,
    FORCED_KEYS,
    AShape,
    Block,
    Dense,
    Pattern,
    VerticalSlash,
    block_map,
    head_lines,
    pick_lines,
)

LEVELS = (1 / 32, 1 / 16, 3 / 32, 1 / 8, 3 / 16, 1 / 4, 3 / 8, 1 / 2, 3 / 4)
"""Shares of the causal tiles that candidates are given."""
COLUMN_SHARES = (0.1, 0.4)
"""Of the tiles of a vertical-slash candidate, what goes to columns."""
COLUMN_COST = 1.0
"""Tiles that 64 gathered columns cost. Counted, not measured on a device."""
SINK = 64
QUERY_TILES = 32
"""Tiles of queries of a document that are looked at, evenly spaced; a pass costs as many tokens times this."""
FAMILIES = ("a_shape", "vertical_slash", "block")


@dataclass
class Sums:
    """Over queries: recall, squared error, cost in tiles, (heads, candidates) float64; squared norm of the exact
    output, (heads,); queries, and tiles of dense attention.
    """

    recall: Tensor
    error: Tensor
    cost: Tensor
    norm: Tensor
    queries: int = 0
    tiles: int = 0

    @classmethod
    def zero(cls, heads: int, candidates: int) -> Sums:
        """Nothing seen yet."""
        recall, error, cost = (torch.zeros((heads, candidates), dtype=torch.float64) for _ in range(3))
        return cls(recall, error, cost, torch.zeros(heads, dtype=torch.float64))


@dataclass
class Profile:
    """One layer: candidates[head], in the same order for all heads, levels[candidate], and what they did on the
    documents that they are chosen on (fit) and on others (check).
    """

    candidates: list[list[Pattern]]
    levels: list[float]
    fit: Sums
    check: Sums
    tokens: int
    documents: int = field(default=0)


def causal_tiles(tokens: int) -> int:
    """Tiles of dense causal attention."""
    tiles = -(-tokens // TILE)
    return tiles * (tiles + 1) // 2


def whole_extent(tokens: int, device: torch.device) -> Extent:
    """Of one document attended to at once."""
    return Extent(whole(1, tokens, tokens, device).table, tokens, tokens)


def slash_budgets(scores: Tensor, budgets: Sequence[float]) -> list[list[int]]:
    """For every head and budget in tiles, how many of the best distances open no more tiles. scores: (heads,
    tokens).
    """
    heads, tokens = scores.shape
    tiles = -(-tokens // TILE)
    order = pick_lines(scores[None], [tokens] * heads, FORCED_DISTANCES)[0]
    rank = torch.empty_like(order).scatter_(1, order, torch.arange(tokens, device=order.device).expand(heads, -1))
    distance = torch.arange(tokens, device=order.device)
    first = torch.full((heads, tiles + 1), tokens, device=order.device)
    for place in (distance // TILE, (distance + TILE - 1) // TILE):
        first.scatter_reduce_(1, place.expand(heads, -1), rank, "amin")
    first, by_rank = first[:, :tiles].sort(dim=1)
    opened = (tiles - by_rank).cumsum(dim=1)
    found = []
    for head in range(heads):
        row = []
        for budget in budgets:
            count = int((opened[head] <= budget).sum())
            limit = int(first[head, count]) if count < tiles else tokens
            row.append(max(limit, min(FORCED_DISTANCES, tokens)))
        found.append(row)
    return found


def window_of(tokens: int, budget: float) -> int:
    """The widest window, in whole tiles, that visits no more tiles."""
    tiles = -(-tokens // TILE)
    window, spent = 0, tiles
    while window < tiles - 1 and spent + tiles - window - 1 <= budget:
        window += 1
        spent += tiles - window
    return max(window, 1) * TILE


def candidates(
    slash: Tensor, families: Sequence[str], levels: Sequence[float] = LEVELS
) -> tuple[list[list[Pattern]], list[float]]:
    """Candidates of every head, and the level of each; the last is dense. slash: (heads, tokens) scores of
    distances.
    """
    heads, tokens = slash.shape
    total, tiles = causal_tiles(tokens), -(-tokens // TILE)
    shared: list[Pattern] = []
    order: list[float] = []
    if "a_shape" in families:
        shared += [AShape(SINK, window_of(tokens, level * total - tiles)) for level in levels]
        order += levels
    if "block" in families:
        for level in levels:
            # Σ min(k, m + 1) over the rows m is what k tiles a row come to.
            rows = [min(k, tiles) * tiles - min(k, tiles) * (min(k, tiles) - 1) // 2 for k in range(1, tiles + 1)]
            shared.append(Block(max(sum(cost <= level * total for cost in rows), 2)))
            order.append(level)
    found: list[list[Pattern]] = [list(shared) for _ in range(heads)]
    if "vertical_slash" in families:
        for share in COLUMN_SHARES:
            budgets = slash_budgets(slash, [(1 - share) * level * total for level in levels])
            for place, level in enumerate(levels):
                vertical = max(round(share * level * tokens / COLUMN_COST), FORCED_KEYS)
                order.append(level)
                for head in range(heads):
                    found[head].append(VerticalSlash(vertical, budgets[head][place]))
    for head in found:
        head.append(Dense())
    return found, [*order, 1.0]


@torch.no_grad()
def measure(inputs: SparseInputs, chosen: Sequence[Sequence[Pattern]], into: Sums, *, step: int | None = None) -> None:
    """Adds up what candidates, chosen[head], do to one document. step: looks at every so many tiles of queries, the
    last one included; default for about `QUERY_TILES` of them.
    """
    heads, tokens = inputs.query.shape[1:3]
    extent = whole_extent(tokens, inputs.query.device)
    vertical, slash = line_scores(inputs.query, inputs.key, extent, scaling=inputs.scaling)
    flat = [pattern for head in chosen for pattern in head]
    count = len(chosen[0])
    repeated = [item.repeat_interleave(count, dim=1) for item in (vertical, slash)]
    lines = head_lines(flat, extent, causal=True, vertical=repeated[0], slash=repeated[1])
    blocks = _block_maps(inputs, chosen, extent)
    step = step or max(extent.query_tiles // QUERY_TILES, 1)
    places = range((extent.query_tiles - 1) % step, extent.query_tiles, step)
    for m in places:
        into.queries += min(TILE, tokens - TILE * m)
        wanted = _wanted(lines, blocks, m, extent).view(heads, count, m + 1)
        _measure_rows(inputs, lines, wanted, m, into)
        into.tiles += m + 1


def _block_maps(inputs: SparseInputs, chosen: Sequence[Sequence[Pattern]], extent: Extent) -> dict[int, Tensor]:
    """Tile maps of candidates that pick blocks, by number."""
    found = {}
    for place, patterns in enumerate(zip(*chosen, strict=True)):
        budgets = [pattern.tiles if isinstance(pattern, Block) else 0 for pattern in patterns]
        if any(budgets):
            found[place] = block_map(inputs.query, inputs.key, budgets, extent, causal=True)[0]
    return found


def _wanted(lines: Lines, blocks: dict[int, Tensor], m: int, extent: Extent) -> Tensor:
    """(heads · candidates, m + 1) bool: the tiles that row m lists."""
    t = torch.arange(m + 1, device=lines.hits.device)
    found = lines.hits[0][:, m - t + extent.key_tiles - 1] | (m >= lines.dense_from[0])[:, None]
    if blocks:
        heads = next(iter(blocks.values())).shape[0]
        view = found.view(heads, -1, m + 1)
        for place, chosen in blocks.items():
            view[:, place] |= chosen[:, m, : m + 1]
    return found


def probabilities(inputs: SparseInputs, m: int) -> Tensor:
    """(heads, queries, (m + 1) · 64) fp32: exact attention probabilities of a tile of queries, zeros where nothing
    is.
    """
    heads, tokens, head_dim = inputs.query.shape[1:]
    kv_heads = inputs.key.shape[1]
    stop = min(TILE * (m + 1), tokens)
    q = inputs.query[0, :, TILE * m : stop].float()
    rows = q.shape[1]
    logits = q.reshape(kv_heads, -1, head_dim) @ inputs.key[0, :, :stop].float().mT * inputs.scaling
    if inputs.softcap is not None:
        logits = inputs.softcap * torch.tanh(logits / inputs.softcap)
    logits = logits.view(heads, rows, stop)
    place = torch.arange(stop, device=q.device)
    logits.masked_fill_(place > place[TILE * m :, None], -torch.inf)
    return torch.nn.functional.pad(torch.softmax(logits, dim=-1), (0, TILE * (m + 1) - stop))


def _measure_rows(inputs: SparseInputs, lines: Lines, wanted: Tensor, m: int, into: Sums) -> None:
    heads, count, tiles = wanted.shape
    kv_heads, tokens = inputs.key.shape[1:3]
    p = probabilities(inputs, m)
    rows = p.shape[1]
    stop = min(TILE * tiles, tokens)
    v = torch.nn.functional.pad(inputs.value[0, :, :stop].float(), (0, 0, 0, TILE * tiles - stop))
    by_tile = p.view(kv_heads, -1, tiles, TILE).transpose(1, 2) @ v.view(kv_heads, tiles, TILE, -1)
    width = v.shape[-1]
    by_tile = by_tile.view(kv_heads, tiles, heads // kv_heads, rows * width).transpose(1, 2).reshape(heads, tiles, -1)
    listed = wanted.to(p.dtype)
    output = (listed @ by_tile).view(heads, count, rows, width)
    recall = listed @ p.view(heads, rows, tiles, TILE).sum(-1).mT
    exact = by_tile.sum(dim=1).view(heads, 1, rows, width)
    cost = wanted.sum(-1).double()
    columns = lines.columns[0].view(heads, count, -1)
    kv = torch.arange(heads, device=p.device) * kv_heads // heads
    for place in range(count):
        keys = columns[:, place].long()
        seen = keys < stop
        if not bool(seen.any()):
            continue
        keys = keys[:, : int(seen.sum(1).max())]
        seen = seen[:, : keys.shape[1]]
        keys = torch.where(seen, keys, 0)
        kept = seen & ~wanted[:, place].gather(1, keys // TILE)
        part = p.gather(2, keys[:, None].expand(-1, rows, -1)) * kept[:, None]
        output[:, place] += part @ v[kv[:, None], keys]
        recall[:, place] += part.sum(-1)
        cost[:, place] += (kept.sum(1) / TILE).ceil() * COLUMN_COST
    # A query that sees nothing gives zeros.
    output = torch.where(recall[..., None] > 0, output / recall.clamp_min(1e-30)[..., None], 0.0)
    into.recall += recall.sum(-1).double().cpu()
    into.error += (output - exact).square().sum((-1, -2)).double().cpu()
    into.norm += exact.square().sum((-1, -2, -3)).double().cpu()
    into.cost += cost.cpu()
