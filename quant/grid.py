"""The symmetric INT4 grid: scales, rounding and the search for the scale with the least weighted error.

A group of `group_size` consecutive input channels of one output channel shares a scale s; a weight is s·q with q in
[−8, 7]. The scale is signed: its sign is chosen so that the group's extreme value lands on −8, which uses all sixteen
codes where amax/7 uses fifteen. Measured on Gaussian / Student-t5 weights, groups of 128: amax/7 18.6 / 15.3 dB,
amax/7.5 19.1 / 15.8, signed 19.7 / 16.4, signed with this search 20.3 / 17.1; on SmolLM2-135M, groups of 64: 18.9,
19.3, 20.0, 20.6.

Scales are rounded to the dtype they are stored in before any weight is rounded against them.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

QMIN, QMAX = -8, 7
E4M3_MAX = 448.0
SHRINK_STEPS = 20
REFITS = 2
SEARCH_ELEMENTS, CPU_SEARCH_ELEMENTS = 2**22, 2**18
"""Of a tensor that is searched at once. A CPU is fastest while they stay in its caches: searching a 1536×576 weight
takes a core 81 ms with 2²², 56 ms with 2¹⁸ and 72 ms with 2¹⁷."""
SHRINK_MIN, SHRINK_MAX = 0.62, 1.08

Snap = Callable[[torch.Tensor], torch.Tensor]


def storage_snap(dtype: torch.dtype) -> Snap:
    """Rounds a float32 scale to what `dtype` can hold (still float32)."""
    return lambda scale: scale.to(dtype).float()


def grouped(weight: torch.Tensor, group_size: int | None) -> torch.Tensor:
    """(out, in) → (out, groups, group_size), a view."""
    return weight.view(weight.shape[0], -1, group_size or weight.shape[1])


def signed_scale(groups: torch.Tensor) -> torch.Tensor:
    """Scale that puts each group's extreme on code −8. groups: (…, group_size) float32 → (…,); 1 where all are zero."""
    low, high = groups.aminmax(dim=-1)
    extreme = torch.where(high > -low, high, low)
    return torch.where(extreme == 0, torch.ones_like(extreme), extreme / QMIN)


def amax_scale(groups: torch.Tensor) -> torch.Tensor:
    """The textbook scale amax/7, for comparison. groups: (…, group_size) float32 → (…,); 1 where all are zero."""
    amax = groups.abs().amax(-1)
    return torch.where(amax == 0, torch.ones_like(amax), amax / QMAX)


def round_codes(groups: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Nearest codes, float32, clamped to [−8, 7]. groups: (…, group_size); scale: (…,), not zero."""
    return torch.div(groups, scale.unsqueeze(-1)).round_().clamp_(QMIN, QMAX)


def _weighted_error(groups: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor, importance: torch.Tensor):
    """codes: overwritten."""
    return codes.mul_(scale.unsqueeze(-1)).sub_(groups).square_().mul_(importance).sum(-1)


def rounded_scale(scale: torch.Tensor, snap: Snap) -> torch.Tensor:
    """`snap(scale)`, and 1 where that is zero: that group is smaller than any scale that can be stored."""
    rounded = snap(scale)
    return torch.where(rounded == 0, torch.ones_like(rounded), rounded)


def search_scale(
    groups: torch.Tensor, importance: torch.Tensor, snap: Snap, *, steps: int = SHRINK_STEPS
) -> torch.Tensor:
    """Scales with the least Σ importance·(w − s·q)², over shrunken ranges and then least-squares refits of the best.

    groups: (…, group_size) float32. importance: broadcastable to groups, ≥ 0: the mean square of each input channel, or
    any other curvature; the same for every index of the first dimension. Returns (…,) float32 values already rounded by
    `snap`. Large tensors are searched some rows at a time.
    """
    rows = max(1, _search_elements(groups) // groups[0].numel())
    return torch.cat([_search_rows(part, importance, snap, steps) for part in groups.split(rows)])


def _search_elements(groups: torch.Tensor) -> int:
    return SEARCH_ELEMENTS if groups.is_cuda else CPU_SEARCH_ELEMENTS


def _search_rows(groups: torch.Tensor, importance: torch.Tensor, snap: Snap, steps: int) -> torch.Tensor:
    start = signed_scale(groups)
    best = rounded_scale(start, snap)
    best_error = _weighted_error(groups, round_codes(groups, best), best, importance)
    ratios = torch.linspace(SHRINK_MIN, SHRINK_MAX, steps, device=groups.device).view(-1, *[1] * start.ndim)
    # Small tensors try many ratios at once, so that a GPU is not kept waiting for launches.
    for part in ratios.split(max(1, _search_elements(groups) // groups.numel())):
        scales = rounded_scale(start * part, snap)
        errors = _weighted_error(groups, round_codes(groups, scales), scales, importance)
        error, index = errors.min(0)
        better, scale = error < best_error, scales.gather(0, index.unsqueeze(0))[0]
        best, best_error = torch.where(better, scale, best), torch.where(better, error, best_error)
    for _ in range(REFITS):
        scale = rounded_scale(_refit(groups, round_codes(groups, best), importance, best), snap)
        error = _weighted_error(groups, round_codes(groups, scale), scale, importance)
        better = error < best_error
        best, best_error = torch.where(better, scale, best), torch.where(better, error, best_error)
    return best


def _refit(groups: torch.Tensor, codes: torch.Tensor, importance: torch.Tensor, fallback: torch.Tensor) -> torch.Tensor:
    weighted = codes * importance
    bottom = (weighted * codes).sum(-1)
    return torch.where(bottom > 0, (weighted * groups).sum(-1) / bottom.clamp_min(1e-30), fallback)


def sqnr_db(weight: torch.Tensor, approximation: torch.Tensor) -> float:
    """Signal to quantization noise, in dB."""
    noise = (weight.float() - approximation.float()).square().sum().clamp_min(1e-30)
    return float(10 * torch.log10(weight.float().square().sum() / noise))
