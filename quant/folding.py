"""Choosing a channel scale to fold, by the error of the layer's own outputs.

Scaling input channels before rounding changes which of them are rounded well. The error of a candidate follows from the
second moments, so no forward pass is repeated. With E = W − Ŵ it is tr(E H Eᵀ) for rounding to nearest. For GPTQ it is
Σ_j E_j²/U_jj², E still of rounding to nearest: what GPTQ pays for a column, without running GPTQ (on a layer of
SmolLM2-135M within 30 % of what a run gives, and ranking the candidates alike). Scales that serve plain rounding are
too steep for GPTQ, which spreads the error of loud channels already.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

from .block import Block, Fold
from .grid import SEARCH_ELEMENTS, Snap, grouped, round_codes, search_scale
from .solver import Rounding, column_cost

Candidate = TypeVar("Candidate")
TRIAL_STEPS = 5
"""Shrink steps of the scale search while candidates are compared; the final rounding searches in full."""


def consumer_mean(fold: Fold, values: torch.Tensor) -> torch.Tensor:
    """Mean over the input channels that share a scale. values: (in,) → (size,)."""
    expand = fold.expand.to(values.device)
    total = torch.zeros(fold.size, device=values.device).index_add_(0, expand, values)
    return total / torch.bincount(expand, minlength=fold.size).clamp_min(1)


def normalised(scale: torch.Tensor) -> torch.Tensor:
    """Scale divided by √(max·min), kept within 2^±10. scale: (size,), positive."""
    return (scale / (scale.max() * scale.min()).sqrt()).clamp(2.0**-10, 2.0**10)


def choose_fold(
    block: Block,
    fold: Fold,
    candidates: Sequence[Candidate],
    rule: Callable[[Candidate], torch.Tensor],
    snap: Snap,
    rounding: Rounding,
) -> Candidate:
    """Folds the scale of the candidate with the least output error and returns that candidate.

    rule: candidate → (size,) positive scale. The first candidate must be the identity: it wins ties and is not folded.
    rounding: what will round the scaled weights. The choice is noted in `block.notes`.
    """
    expand = fold.expand.to(block.device)
    scales = [rule(candidate)[expand] for candidate in candidates]
    total = torch.zeros(len(candidates), device=block.device)
    for name in fold.consumers:
        statistics, group_size = block.statistics[name], block.group_size(name)
        hessian = statistics.hessian
        cost = column_cost(hessian, group_size) if rounding == "gptq" else hessian.diagonal()
        moments = None if rounding == "gptq" else hessian
        for rows in block.weight(name).split(max(1, SEARCH_ELEMENTS // hessian.shape[0])):
            errors = [scaling_error(rows, columns, cost, moments, group_size, snap) for columns in scales]
            total += torch.stack(errors) / statistics.energy.clamp_min(1e-30)
    errors = total.tolist()
    best = min(range(len(candidates)), key=errors.__getitem__)
    if best != 0:
        block.fold(fold, rule(candidates[best]))
    block.notes[f"fold.{fold.name}"] = candidates[best]
    return candidates[best]


def scaling_error(
    weight: torch.Tensor,
    columns: torch.Tensor,
    cost: torch.Tensor,
    hessian: torch.Tensor | None,
    group_size: int | None,
    snap: Snap,
) -> torch.Tensor:
    """Error of rounding W·s to nearest, with s divided out again: Σ cost·E², or tr(E H Eᵀ) where H is given.

    weight: (out, in) float32. columns: (in,), s. cost: (in,). hessian: (in, in). Returns a scalar.
    """
    importance = grouped((cost / columns.square()).unsqueeze(0), group_size)
    scaled = grouped(weight * columns, group_size)
    scale = search_scale(scaled, importance, snap, steps=TRIAL_STEPS)
    rounded = (round_codes(scaled, scale) * scale.unsqueeze(-1)).view_as(weight) / columns
    error = rounded - weight
    return (error.square() * cost).sum() if hessian is None else output_error(error, hessian)


def output_error(difference: torch.Tensor, hessian: torch.Tensor) -> torch.Tensor:
    """E‖D x‖² = tr(D H Dᵀ). difference: (out, in); hessian: (in, in)."""
    return ((difference @ hessian) * difference).sum()
