"""Rounding with error feedback, and rounding to nearest, behind one function. Shared by every method that rounds.

`solve` is GPTQ (Frantar et al., 2022). With H = E[x xᵀ] and U the upper Cholesky factor of H⁻¹, rounding column j costs
((w_j − ŵ_j)/U_jj)² and the best update of the rest is w_k −= (w_j − ŵ_j)·U_jk/U_jj. Columns are taken in blocks so that
most of the work is matrix products. Differences from the paper:

- Column order is group-aware: whole groups by falling mean diag(H), and inside a group by falling diag(H). Undoing it needs
  no index at run time, because a group's columns stay together.
- A group's scale is searched when its turn comes, on the weights as already corrected, with the cost GPTQ itself charges
  (1/U_jj²) as the weight of each column.
- Dampening grows until the factorisation succeeds. Dead columns (no input ever) are set to zero.
"""

from __future__ import annotations

import logging
from typing import Literal

import torch

from .block import Block
from .grid import QMAX, QMIN, Snap, grouped, round_codes, rounded_scale, search_scale, signed_scale
from .method import QuantizedWeight

log = logging.getLogger(__name__)
MAX_DAMPENING_STEPS = 8
CHUNK = 128

Rounding = Literal["rtn", "gptq"]


def round_linears(block: Block, rounding: Rounding, snap: Snap, **options: float | bool) -> dict[str, QuantizedWeight]:
    """Rounds every Linear of the block, folds applied. Linears with a common input are rounded together.

    rounding: "rtn" (nearest, scales searched with E[x_j²] as weight) or "gptq" (`solve`, which takes `options`).
    snap: rounds a scale to what can be stored.
    """
    result = {}
    for names in block.input_groups:
        hessian = block.statistics[names[0]].hessian
        parts = [block.weight(name) for name in names]
        weights, sizes = torch.cat(parts), [part.shape[0] for part in parts]
        del parts
        if rounding == "gptq":
            codes, scale = solve(weights, hessian, block.scheme.group_size, snap, **options)  # pyright: ignore[reportArgumentType]
        else:
            groups = grouped(weights, block.scheme.group_size)
            scale = search_scale(groups, grouped(hessian.diagonal().unsqueeze(0), block.scheme.group_size), snap)
            codes = round_codes(groups, scale).view_as(weights).to(torch.int8)
        for name, part, part_scale in zip(names, codes.split(sizes), scale.split(sizes), strict=True):
            result[name] = QuantizedWeight(part.contiguous(), part_scale.to(block.scale_dtype).contiguous())
    return result


def solve(
    weight: torch.Tensor,
    hessian: torch.Tensor,
    group_size: int | None,
    snap: Snap,
    *,
    dampening: float = 0.01,
    activation_order: bool = True,
    search: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes (out, in) int8 and scales (out, groups) float32 with small Σ ‖(W − Ŵ)x‖².

    weight: (out, in) float32, not changed. hessian: (in, in) float32, E[x xᵀ], not changed.
    """
    out, size = weight.shape
    width = group_size or size
    dead = hessian.diagonal() == 0
    weight = weight.masked_fill(dead, 0)
    order = column_order(hessian.diagonal(), width) if activation_order else torch.arange(size, device=weight.device)
    inverse = torch.argsort(order)
    upper = inverse_factor(hessian, dead, order, dampening)
    work = weight[:, order].contiguous()
    static = None if group_size else _scale(work, upper.diagonal(), snap, search)
    codes = torch.empty(out, size, dtype=torch.int8, device=weight.device)
    scales = torch.empty(out, size // width, device=weight.device)
    chunk = width if group_size and width >= CHUNK else (CHUNK // width) * width if group_size else CHUNK
    for start in range(0, size, chunk):
        stop = min(start + chunk, size)
        block, errors = work[:, start:stop], torch.empty(out, stop - start, device=weight.device)
        factor = upper[start:stop, start:stop]
        scale = static
        for j in range(stop - start):
            if group_size and (start + j) % width == 0:
                scale = _scale(block[:, j : j + width], factor.diagonal()[j : j + width], snap, search)
                scales[:, (start + j) // width] = scale
            assert scale is not None
            column, pivot = block[:, j], factor[j, j]
            code = torch.round(column / scale).clamp_(QMIN, QMAX)
            codes[:, start + j] = code.to(torch.int8)
            error = (column - code * scale) / pivot
            errors[:, j] = error
            block[:, j + 1 :].addr_(error, factor[j, j + 1 :], alpha=-1)
        work[:, stop:].addmm_(errors, upper[start:stop, stop:], alpha=-1)
    if static is not None:
        scales[:, 0] = static
        return codes[:, inverse], scales
    group_order = torch.argsort(order[::width] // width)
    return codes[:, inverse], scales[:, group_order]


def _scale(block: torch.Tensor, diagonal: torch.Tensor, snap: Snap, search: bool) -> torch.Tensor:
    groups = grouped(block.contiguous(), None)
    if not search:
        return rounded_scale(signed_scale(groups), snap)[:, 0]
    return search_scale(groups, diagonal.square().reciprocal(), snap)[:, 0]


def column_order(diagonal: torch.Tensor, width: int) -> torch.Tensor:
    """Order of columns, (in,) long: groups of `width` by falling mean, columns inside a group by falling value."""
    groups = diagonal.view(-1, width)
    inside = torch.argsort(groups, dim=1, descending=True)
    outside = torch.argsort(groups.mean(1), descending=True)
    return (inside + torch.arange(groups.shape[0], device=diagonal.device).unsqueeze(1) * width)[outside].flatten()


def inverse_factor(hessian: torch.Tensor, dead: torch.Tensor, order: torch.Tensor, dampening: float) -> torch.Tensor:
    """Upper Cholesky factor of the inverse of the dampened, reordered Hessian: (in, in) float32."""
    if not bool(hessian.isfinite().all()):
        raise ValueError("the second moments of a layer's input are not finite: its activations overflow on this text")
    mean = hessian.diagonal()[~dead].mean() if bool((~dead).any()) else torch.ones((), device=hessian.device)
    share = dampening
    for attempt in range(MAX_DAMPENING_STEPS):
        damped = hessian[order][:, order]
        diagonal = damped.diagonal()
        diagonal[dead[order]] = mean
        diagonal += share * mean
        lower, failed = torch.linalg.cholesky_ex(damped)
        if int(failed) == 0:
            inverse = torch.cholesky_inverse(lower, out=damped)
            upper, failed = torch.linalg.cholesky_ex(inverse, upper=True)
            if int(failed) == 0 and bool(upper.isfinite().all()):
                if attempt:
                    log.warning("second moments are close to singular: dampening raised to %g", share)
                return upper
        share *= 4
    raise ValueError(f"second moments stay singular with dampening {share:g}: use more or other calibration text")
