"""Sparse-vDiT: fixed patterns for bidirectional attention (video and image transformers, encoders), searched offline.

Every head is shown its patterns on a few inputs and takes the one with the least

    loss = ‖O' − O‖² / ‖O‖²  +  λ · cost        cost = tiles visited / tiles of dense attention

of those whose error alone is at most `max_error`; with none it stays dense, whose loss is λ. Masks depend on the length
alone, so that an index is built once for a length and kept; heads of all patterns run in one launch.

Departures: the error is relative, so that one λ serves heads of any size (the paper adds a mean squared error to
λ = 0.5 times the share that is left); cost counts tiles of this kernel, single columns included, instead of the
pattern's nominal sparsity. Bands of a multi-diagonal are visited where they are, and tokens are not reordered: for
frames whose length is no multiple of 64 a band costs one tile more.

Nothing here knows a model: `search` takes queries, keys and values, and a `PatchedAttention` stands in for any function
of them.

Source: Sparse-vDiT (arXiv 2506.03065).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..kernels.attention import prefill_attention
from ..kernels.sparse_attention import StaticPattern, sparse_attention
from ..kernels.sparse_index import TILE, Extent, SparseIndex
from .patterns import (
    Dense,
    Diagonal,
    MultiDiagonal,
    Pattern,
    Skip,
    VerticalStripe,
    layer_index,
    read_pattern,
    static_pattern,
)

LAMBDA = 0.5
MAX_ERROR = 0.1
"""Largest relative squared error of a head's output; 0.1 is an SQNR of 10 dB."""
WINDOWS = (1 / 32, 1 / 16, 1 / 8)
"""Widths of diagonals, as shares of the tokens."""
VERSION = 1


@dataclass(frozen=True)
class HeadChoice:
    """What one head runs: the pattern, its relative squared error and cost on the inputs of the search, and loss."""

    pattern: Pattern
    error: float
    cost: float
    loss: float


@dataclass(frozen=True)
class LayerChoice:
    """What all heads of a layer run. tokens: of the inputs of the search."""

    heads: tuple[HeadChoice, ...]
    tokens: int

    @property
    def density(self) -> float:
        """Tiles visited over those of dense attention."""
        return sum(head.cost for head in self.heads) / len(self.heads)

    def as_dict(self) -> dict[str, Any]:
        """JSON-able."""
        heads = [
            {**head.pattern.as_dict(), "error": head.error, "cost": head.cost, "loss": head.loss} for head in self.heads
        ]
        return {"version": VERSION, "tokens": self.tokens, "heads": heads}

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> LayerChoice:
        """Reads `as_dict`. ValueError if it is something else."""
        try:
            if content["version"] != VERSION:
                raise ValueError(f"patterns have version {content['version']!r}; this kompakt reads version {VERSION}")
            numbers = ("error", "cost", "loss")
            heads = tuple(
                HeadChoice(
                    read_pattern({key: value for key, value in head.items() if key not in numbers}),
                    *(float(head[key]) for key in numbers),
                )
                for head in content["heads"]
            )
            return cls(heads, int(content["tokens"]))
        except (TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"patterns are damaged: {error}") from error


def candidates(tokens: int, frame: int | None = None) -> list[Pattern]:
    """Patterns to choose from. frame: tokens of a frame of a video, for the diagonals between frames and the first
    tokens of each; None leaves those out.
    """
    widths = sorted({max(round(share * tokens), TILE) for share in WINDOWS})
    found: list[Pattern] = [Skip(), *(Diagonal(width) for width in widths)]
    if frame is not None:
        if not 0 < frame <= tokens:
            raise ValueError(f"a frame has {frame} tokens; it must have at least 1 and at most the {tokens} there are")
        for share in WINDOWS:
            width = max(round(share * frame), 1)
            found += [MultiDiagonal(frame, width), VerticalStripe(frame, width)]
    return [*found, Dense()]


@torch.no_grad()
def search(
    inputs: Iterable[tuple[Tensor, Tensor, Tensor]],
    patterns: Sequence[Pattern],
    *,
    scaling: float | None = None,
    weight: float = LAMBDA,
    max_error: float = MAX_ERROR,
    costs: Sequence[float] | None = None,
) -> LayerChoice:
    """Chooses a pattern for every head.

    Args:
        inputs: query (batch, num_heads, tokens, head_dim), key and value (batch, num_kv_heads, tokens, head_dim), a few
            of them, all of one length.
        patterns: to choose from, dense among them; `candidates` makes a list.
        scaling: of the logits; default 1/√head_dim.
        weight: λ.
        max_error: largest relative squared error.
        costs: measured time of each pattern over that of dense attention; default the share of tiles.

    Raises:
        ValueError: no inputs, different lengths, patterns without dense, or one that picks by the input.
    """
    if Dense() not in patterns:
        raise ValueError("the patterns lack dense, which a head takes where no other is good enough")
    if any(pattern.scores or pattern.key == "block" for pattern in patterns):
        raise ValueError("vertical_slash and block are picked for every input; these patterns are fixed")
    errors = norms = None
    tokens, found_costs = 0, list(costs or ())
    for query, key, value in inputs:
        if tokens not in (0, query.shape[2]):
            raise ValueError(f"inputs have {tokens} and {query.shape[2]} tokens; search one length at a time")
        tokens = query.shape[2]
        exact, _ = prefill_attention(query, key, value, mode="bf16", causal=False, scaling=scaling)
        exact = exact.float()
        rows = []
        for place, pattern in enumerate(patterns):
            if pattern == Dense():
                rows.append(torch.zeros(query.shape[1], dtype=torch.float64))
                share = 1.0
            else:
                index, share = build([pattern] * key.shape[1], query.shape[0], tokens, key.shape[2], query.device)
                out, _ = sparse_attention(query, key, value, index, causal=False, scaling=scaling)
                rows.append((out.float() - exact).double().square().sum((0, 2, 3)).cpu())
            if len(found_costs) <= place:
                found_costs.append(share)
        norm = exact.double().square().sum((0, 2, 3)).cpu()
        errors = torch.stack(rows) if errors is None else errors + torch.stack(rows)
        norms = norm if norms is None else norms + norm
    if errors is None or norms is None:
        raise ValueError("no inputs were given to search on")
    relative = errors / norms.clamp_min(1e-30)
    loss = relative + weight * torch.tensor(found_costs, dtype=torch.float64)[:, None]
    allowed = loss.masked_fill(relative > max_error, torch.inf)
    return LayerChoice(
        tuple(
            HeadChoice(patterns[place], float(relative[place, head]), found_costs[place], float(loss[place, head]))
            for head, place in enumerate(allowed.argmin(dim=0).tolist())
        ),
        tokens,
    )


def build(
    heads: Sequence[Pattern], batch: int, queries: int, keys: int, device: torch.device
) -> tuple[SparseIndex | StaticPattern, float]:
    """What heads visit in bidirectional attention, and the share of tiles that is. Static where no index is needed."""
    extent = Extent.of(batch, queries, keys, None, device)
    index = layer_index(heads, extent, causal=False)
    share = float(index.work().mean()) / extent.key_tiles
    return static_pattern(heads, device) or index, share


@dataclass
class PatchedAttention:
    """An attention function that visits what was chosen, in place of one that visits everything.

    former: called with (query, key, value, **options) where this one may not be used: with options that it does not
    know, such as masks, and for lengths that the patterns were not searched on. scaling: default 1/√head_dim.
    """

    choice: LayerChoice
    former: Callable[..., Tensor]
    scaling: float | None = None
    kept: dict[tuple[int, int, torch.device], SparseIndex | StaticPattern] = field(default_factory=dict)
    ran: dict[str, int] = field(default_factory=lambda: {"sparse": 0, "dense": 0})

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
        """query, key, value: as in `search`. Returns (batch, num_heads, tokens, head_dim)."""
        given = {name: option for name, option in options.items() if option is not None and option is not False}
        lengths = {query.shape[2], key.shape[2], self.choice.tokens}
        if given or len(lengths) > 1 or query.shape[1] != len(self.choice.heads):
            self.ran["dense"] += 1
            return self.former(query, key, value, **options)
        place = (query.shape[0], query.shape[2], query.device)
        if place not in self.kept:
            heads = [head.pattern for head in self.choice.heads]
            self.kept[place], _ = build(heads, query.shape[0], query.shape[2], key.shape[2], query.device)
        self.ran["sparse"] += 1
        return sparse_attention(query, key, value, self.kept[place], causal=False, scaling=self.scaling)[0]
