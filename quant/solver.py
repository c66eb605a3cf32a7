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

H is the largest matrix there is (0.8 GB for 14336 inputs), so everything that is made of it takes its place.
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
COPIED_ELEMENTS = 2**24

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
        if rounding == "gptq":
            hessian = block.take_statistics(name).hessian
            yield name, solve(block.weight(name), hessian, block.group_size(name), snap, **options)  # pyright: ignore
        else:
            diagonal = block.take_statistics(name).hessian.diagonal().clone()
            yield name, nearest(block.weight(name), diagonal, block.group_size(name), snap)


def nearest(weight: torch.Tensor, diagonal: torch.Tensor, group_size: int | None, snap: Snap) -> Rounded:
    """Codes to nearest under searched scales. weight: (out, in) float32. diagonal: (in,), what each column counts."""
    groups = grouped(weight, group_size)
    scale = search_scale(groups, grouped(diagonal.unsqueeze(0), group_size), snap)
    return Rounded(round_codes(groups, scale).view_as(weight).to(torch.int8), scale, weight)


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

    weight: (out, in) float32, overwritten and returned. hessian: (in, in) float32, E[x xᵀ], overwritten.
    """
    out, size = weight.shape
    width = group_size or size
    diagonal = hessian.diagonal().clone()
    order = column_order(diagonal, width) if activation_order else torch.arange(size, device=weight.device)
    permute_(weight.masked_fill_(diagonal == 0, 0), order, 1)
    upper = inverse_factor_(hessian, order, dampening)
    diagonal = upper.diagonal().clone()
    upper.div_(diagonal.unsqueeze(1))
    static = None if group_size else _scale(weight, diagonal, snap, search)
    codes = torch.empty(out, size, dtype=torch.int8, device=weight.device)
    scales = torch.empty(out, size // width, device=weight.device)
    chunk = width if group_size and width >= CHUNK else (CHUNK // width) * width if group_size else CHUNK
    for start in range(0, size, chunk):
        stop = min(start + chunk, size)
        block, factor = weight[:, start:stop], upper[start:stop, start:stop]
        rounded, errors = torch.empty(2, stop - start, out, device=weight.device).transpose(1, 2)
        scale = static
        for j in range(stop - start):
            if group_size and (start + j) % width == 0:
                scale = _scale(block[:, j : j + width], diagonal[start + j : start + j + width], snap, search)
                scales[:, (start + j) // width] = scale
            assert scale is not None
            column = block[:, j]
            code = torch.div(column, scale, out=rounded[:, j]).round_().clamp_(QMIN, QMAX)
            error = torch.addcmul(column, code, scale, value=-1, out=errors[:, j])
            block[:, j + 1 :].addr_(error, factor[j, j + 1 :], alpha=-1)
        codes[:, start:stop] = rounded
        weight[:, stop:].addmm_(errors, upper[start:stop, stop:], alpha=-1)
    inverse = torch.argsort(order)
    permute_(codes, inverse, 1)
    permute_(weight, inverse, 1)
    if static is not None:
        return Rounded(codes, static.unsqueeze(1), weight)
    return Rounded(codes, scales[:, torch.argsort(order[::width] // width)], weight)


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
    """1/U_jj² of every column in its own place: (in,) float32, what a unit of rounding error there costs GPTQ.

    hessian: (in, in) float32; worked on in place and then put back, made exactly symmetric by its lower triangle.
    """
    order = column_order(hessian.diagonal(), group_size or hessian.shape[0])
    inverse = torch.argsort(order)
    diagonal = upper_factor_(hessian, order, dampening)
    cost = hessian.diagonal().square().masked_fill(diagonal == 0, 0)
    restore_upper_(hessian, diagonal)
    reorder_(hessian, inverse)
    return cost[inverse]


def inverse_factor_(hessian: torch.Tensor, order: torch.Tensor, dampening: float) -> torch.Tensor:
    """Overwrites H with the upper U of UᵀU = H⁻¹, for the dampened, reordered H, and returns it.

    The inverse of H is never formed: with the upper R of R Rᵀ = H, U is R⁻¹.
    """
    upper_factor_(hessian, order, dampening)
    return invert_upper_(hessian.triu_())


def upper_factor_(hessian: torch.Tensor, order: torch.Tensor, dampening: float) -> torch.Tensor:
    """Overwrites the upper triangle with that R of R Rᵀ = H, for the dampened, reordered H.

    Below the diagonal the reordered H stays as it is; its diagonal is returned, (in,). The two give H back
    (`restore_upper_`), which is how dampening grows until the factor exists.
    """
    if not bool(torch.stack(hessian.aminmax()).isfinite().all()):
        raise ValueError("the second moments of a layer's input are not finite: its activations overflow on this text")
    reorder_(hessian, order)
    diagonal = hessian.diagonal().clone()
    alive = (diagonal != 0).sum()
    mean = torch.where(alive > 0, diagonal.sum() / alive.clamp_min(1), 1.0)
    share = dampening
    for attempt in range(MAX_DAMPENING_STEPS):
        hessian.diagonal().copy_(torch.where(diagonal == 0, mean, diagonal) + share * mean)
        if factor_upper_(hessian):
            if attempt:
                log.warning("second moments are close to singular: dampening raised to %g", share)
            return diagonal
        restore_upper_(hessian, diagonal)
        share *= 4
    raise ValueError(f"second moments stay singular with dampening {share:g}: use more or other calibration text")


def factor_upper_(matrix: torch.Tensor) -> bool:
    """Overwrites the upper triangle of a symmetric matrix with that R of R Rᵀ, last block first; False if it has none.

    Only the upper triangle is read, and what is below the diagonal stays.
    """
    size = matrix.shape[0]
    failures = []
    for stop in range(size, 0, -FACTOR_BLOCK):
        start = max(0, stop - FACTOR_BLOCK)
        panel, corner = matrix[:start, start:stop], matrix[start:stop, start:stop]
        right = matrix[start:stop, stop:]
        lower, failed = torch.linalg.cholesky_ex(torch.addmm(corner, right, right.T, alpha=-1).flip(0, 1))
        factor = lower.flip(0, 1)
        corner.tril_(-1).add_(factor)
        panel.addmm_(matrix[:start, stop:], right.T, alpha=-1)
        panel.copy_(torch.linalg.solve_triangular(factor.T, panel, upper=False, left=False))
        failures.append(failed)
    return bool((torch.stack(failures) == 0).all() & matrix.diagonal().isfinite().all())


def restore_upper_(matrix: torch.Tensor, diagonal: torch.Tensor) -> None:
    """Makes a matrix symmetric again from what is below its diagonal, and from its diagonal (in,)."""
    for start in range(0, matrix.shape[0], FACTOR_BLOCK):
        stop = start + FACTOR_BLOCK
        corner = matrix[start:stop, start:stop].tril_(-1)
        corner.copy_(corner + corner.T)
        matrix[start:stop, stop:] = matrix[stop:, start:stop].T
    matrix.diagonal().copy_(diagonal)


def reorder_(matrix: torch.Tensor, order: torch.Tensor) -> None:
    """Reorders rows and columns of a square matrix in place."""
    permute_(matrix, order, 0)
    permute_(matrix, order, 1)


def permute_(matrix: torch.Tensor, order: torch.Tensor, dim: int) -> None:
    """Takes the rows (dim 0) or columns (dim 1) of a matrix in another order, in place: a strip of it at a time."""
    for strip in matrix.split(max(1, COPIED_ELEMENTS // matrix.shape[dim]), 1 - dim):
        strip.copy_(strip.index_select(dim, order))


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
