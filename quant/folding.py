"""Choosing a channel scale to fold, by the error of the layer's own outputs.

Scaling input channels before rounding changes which of them are rounded well. The error of a candidate is exact in the
second moments, E‖(W − Ŵ)x‖² = tr((W − Ŵ) H (W − Ŵ)ᵀ), so no forward pass is repeated; each Linear's error is divided by
its own output energy, so that query, key and value count alike.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

from .block import Block, Fold
from .grid import Snap, grouped, round_codes, search_scale

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
) -> Candidate:
    """Folds the scale of the candidate with the least relative output error and returns that candidate.

    rule: candidate → (size,) positive scale. The first candidate must be the identity: it wins ties and is not folded.
    The choice is noted in `block.notes`.
    """
    hessian = block.statistics[fold.consumers[0]].hessian
    expand, group_size = fold.expand.to(hessian.device), block.scheme.group_size
    weights = [block.weight(name) for name in fold.consumers]
    energies = [output_error(weight, hessian).clamp_min(1e-30) for weight in weights]

    def error_of(candidate: Candidate) -> float:
        columns = rule(candidate)[expand]
        importance = grouped((hessian.diagonal() / columns.square()).unsqueeze(0), group_size)
        total = 0.0
        for weight, energy in zip(weights, energies, strict=True):
            scaled = grouped(weight * columns, group_size)
            scale = search_scale(scaled, importance, snap, steps=TRIAL_STEPS)
            rounded = (round_codes(scaled, scale) * scale.unsqueeze(-1)).view_as(weight) / columns
            total += float(output_error(rounded - weight, hessian) / energy)
        return total

    best = min(candidates, key=error_of)
    if best != candidates[0]:
        block.fold(fold, rule(best))
    block.notes[f"fold.{fold.name}"] = best
    return best


def output_error(difference: torch.Tensor, hessian: torch.Tensor) -> torch.Tensor:
    """E‖D x‖² = tr(D H Dᵀ). difference: (out, in); hessian: (in, in)."""
    return ((difference @ hessian) * difference).sum()
