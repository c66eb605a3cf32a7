"""Rounding with error feedback, and rounding to nearest, behind one function. Shared by every method that rounds.

`solve` is GPTQ (Frantar et al., 2022). With H = E[x xᵀ] and U the upper Cholesky factor of H⁻¹, rounding column j costs
((w_j − ŵ_j)/U_jj)² and the best update of the rest is w_k −= (w_j − ŵ_j)·U_jk/U_jj. Columns are taken in blocks so that
most of the work is matrix products. Differences from the paper:

- H weighs each token by what an error there changes in the layer's output (`block.py`). With equal weights the first
  token's values are rounded badly: SmolLM2-135M in groups of 64 loses 22 % of perplexity that way, and 9 % this way.
- Column order is group-aware: whole groups by falling mean diag(H), and inside a group by falling diag(H). Undoing it
  needs no index at run time, because a group's columns stay together.
- A group's scale is searched when its turn comes, on the weights as already corrected, with the cost GPTQ itself
  charges (1/U_jj²) as the weight of each column.
- Dampening grows until the factorisation succeeds. Dead columns (no input ever) are set to zero.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch

from .block import Block
from .grid import QMAX, QMIN, Snap, grouped, round_codes, rounded_scale, search_scale, signed_scale
from .method import QuantizedWeight

log = logging.getLogger(__name__)
MAX_DAMPENING_STEPS = 8
CHUNK = 128
FACTOR_BLOCK = 1024

Rounding = Literal["rtn", "gptq"]


@dataclass(frozen=True)
class Rounded:
    """codes: (out, in) int8. scale: (out, groups) float32, as stored. weight: (out, in) float32, what was rounded."""

    codes: torch.Tensor
    scale: torch.Tensor
    weight: torch.Tensor


def round_linears(block: Block, rounding: Rounding, snap: Snap, **options: float | bool) -> dict[str, QuantizedWeight]:
    """`start_linears` without the weights that were rounded."""
    result = {}
    for name, rounded in start_linears(block, rounding, snap, **options):
        result[name] = QuantizedWeight(rounded.codes, rounded.scale.to(block.scale_dtype))
        del rounded
    return result


def start_linears(
    block: Block, rounding: Rounding, snap: Snap, **options: float | bool
) -> Iterator[tuple[str, Rounded]]:
    """Rounds every Linear of the block, folds applied, one at a time; its statistics are used up.

    rounding: "rtn" (nearest, scales searched with diag(H) as weight) or "gptq" (`solve`, which takes `options`).
    snap: rounds a scale to what can be stored.
    """
    for name in block.linears:
        hessian, group_size = block.take_statistics(name).hessian, block.scheme.group_size
        if rounding == "gptq":
            yield name, solve(block.weight(name), hessian, group_size, snap, **options)  # pyright: ignore
        else:
            weight = block.weight(name)
            groups = grouped(weight, group_size)
            scale = search_scale(groups, grouped(hessian.diagonal().unsqueeze(0), group_size), snap)
            yield name, Rounded(round_codes(groups, scale).view_as(weight).to(torch.int8), scale, weight)


def solve(
    weight: torch.Tensor,
    hessian: torch.Tensor,
    group_size: int | None,
    snap: Snap,
    *,
    dampening: float = 0.01,
    activation_order: bool = True,
    search: bool = True,
) -> Rounded:
    """Codes and scales with small E‖(W − Ŵ)x‖². The result's `weight` holds W with the error feedback.

    weight: (out, in) float32, overwritten. hessian: (in, in) float32, E[x xᵀ], not changed.
    """
    out, size = weight.shape
    width = group_size or size
    dead = hessian.diagonal() == 0
    weight.masked_fill_(dead, 0)
    order = column_order(hessian.diagonal(), width) if activation_order else torch.arange(size, device=weight.device)
    inverse = torch.argsort(order)
    upper = inverse_factor(hessian, dead, order, dampening)
    work = weight[:, order].contiguous()
    del weight
    static = None if group_size else _scale(work, upper.diagonal(), snap, search)
    codes = torch.empty(out, size, device=work.device)
    scales = torch.empty(out, size // width, device=work.device)
    chunk = width if group_size and width >= CHUNK else (CHUNK // width) * width if group_size else CHUNK
    for start in range(0, size, chunk):
        stop = min(start + chunk, size)
        block, errors = work[:, start:stop], torch.empty(out, stop - start, device=work.device)
        factor = upper[start:stop, start:stop]
        scale = static
        for j in range(stop - start):
            if group_size and (start + j) % width == 0:
                scale = _scale(block[:, j : j + width], factor.diagonal()[j : j + width], snap, search)
                scales[:, (start + j) // width] = scale
            assert scale is not None
            column = block[:, j]
            code = torch.div(column, scale, out=codes[:, start + j]).round_().clamp_(QMIN, QMAX)
            error = torch.addcmul(column, code, scale, value=-1).div_(factor[j, j])
            errors[:, j] = error
            block[:, j + 1 :].addr_(error, factor[j, j + 1 :], alpha=-1)
        work[:, stop:].addmm_(errors, upper[start:stop, stop:], alpha=-1)
    del upper, factor, block, errors
    codes = codes.to(torch.int8)
    if static is not None:
        scales[:, 0] = static
        return Rounded(codes[:, inverse], scales, work[:, inverse])
    group_order = torch.argsort(order[::width] // width)
    return Rounded(codes[:, inverse], scales[:, group_order], work[:, inverse])


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


def column_cost(hessian: torch.Tensor, group_size: int | None, dampening: float = 0.01) -> torch.Tensor:
    """1/U_jj² of every column in its own place: (in,) float32, what a unit of rounding error there costs GPTQ."""
    dead = hessian.diagonal() == 0
    order = column_order(hessian.diagonal(), group_size or hessian.shape[0])
    cost = upper_factor(hessian, dead, order, dampening).diagonal().square()
    return cost[torch.argsort(order)].masked_fill(dead, 0)


def inverse_factor(hessian: torch.Tensor, dead: torch.Tensor, order: torch.Tensor, dampening: float) -> torch.Tensor:
    """Upper U with UᵀU = H⁻¹, for the dampened, reordered H: (in, in) float32.

    The inverse of H is never formed: with the upper R of R Rᵀ = H, U is R⁻¹. Both steps work in the memory of one
    matrix.
    """
    return invert_upper_(upper_factor(hessian, dead, order, dampening))


def upper_factor(hessian: torch.Tensor, dead: torch.Tensor, order: torch.Tensor, dampening: float) -> torch.Tensor:
    """Upper R with R Rᵀ = H, for the dampened, reordered H: (in, in) float32. Dampening grows until it exists."""
    if not bool(hessian.isfinite().all()):
        raise ValueError("the second moments of a layer's input are not finite: its activations overflow on this text")
    mean = hessian.diagonal()[~dead].mean() if bool((~dead).any()) else torch.ones((), device=hessian.device)
    share = dampening
    for attempt in range(MAX_DAMPENING_STEPS):
        damped = hessian[order.unsqueeze(1), order]
        diagonal = damped.diagonal()
        diagonal[dead[order]] = mean
        diagonal += share * mean
        if factor_upper_(damped):
            if attempt:
                log.warning("second moments are close to singular: dampening raised to %g", share)
            return damped
        share *= 4
    raise ValueError(f"second moments stay singular with dampening {share:g}: use more or other calibration text")


def factor_upper_(matrix: torch.Tensor) -> bool:
    """Overwrites a symmetric matrix with the upper R of R Rᵀ, from the last block to the first; False if it has
    none.
    """
    size = matrix.shape[0]
    for stop in range(size, 0, -FACTOR_BLOCK):
        start = max(0, stop - FACTOR_BLOCK)
        lower, failed = torch.linalg.cholesky_ex(matrix[start:stop, start:stop].flip(0, 1))
        if int(failed) or not bool(lower.diagonal().isfinite().all()):
            return False
        corner = lower.flip(0, 1)
        panel = torch.linalg.solve_triangular(corner.T, matrix[:start, start:stop], upper=False, left=False)
        matrix[start:stop, start:stop] = corner
        matrix[:start, start:stop] = panel
        matrix[start:stop, :start] = 0
        matrix[:start, :start].addmm_(panel, panel.T, alpha=-1)
    return True


def invert_upper_(matrix: torch.Tensor) -> torch.Tensor:
    """Overwrites an upper triangular matrix with its inverse, from the first block to the last, and returns it."""
    for start in range(0, matrix.shape[0], FACTOR_BLOCK):
        stop = start + FACTOR_BLOCK
        corner = matrix[start:stop, start:stop]
        identity = torch.eye(corner.shape[0], device=matrix.device)
        inverse = torch.linalg.solve_triangular(corner, identity, upper=True)
        matrix[:start, start:stop] = -(matrix[:start, :start] @ matrix[:start, start:stop]) @ inverse
        matrix[start:stop, start:stop] = inverse
    return matrix
