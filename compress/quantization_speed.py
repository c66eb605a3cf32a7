"""How fast activations are quantized: the part of a W4A8 layer that is no product."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..kernels.activations import quantize_fp8_per_token, quantize_fp8_ref
from ..kernels.w4a8_linear import quantize_w4a8_input
from .device_speed import Machine, byte_count
from .linear_contenders import Variant
from .pipeline import Progress, quiet

OUTPUTS = 16
"""Rows of the weight that an input is quantized for; their number does not matter."""


@torch.no_grad()
def quantization_speed(
    machine: Machine,
    in_features: Sequence[int],
    tokens: Sequence[int],
    variants: Sequence[Variant],
    *,
    progress: Progress = quiet,
) -> list[dict[str, Any]]:
    """Rows of every in_features × tokens × layout: FP8 per token as it is, and as each w4a8 variant wants it.

    `bytes` are x and everything that is written; `linear_speed.with_shares` adds the share of the bandwidth. A row
    whose values are not those of the reference is not `correct` and has no time.
    """
    ops: dict[str, Callable[[Tensor], Sequence[Tensor]]] = {"per token": quantize_fp8_per_token}
    ops |= {f"for {item.label}": partial(quantize_for, item) for item in variants if item.method == "w4a8"}
    rows, total = [], len(in_features) * len(tokens)
    for step, (features, count) in enumerate(itertools.product(in_features, tokens)):
        progress("quantization", step, total, f"{count}×{features}")
        x = torch.randn((count, features), device=machine.device).bfloat16()
        rows += [{"layout": name, **time_quantization(op, x, machine)} for name, op in ops.items()]
    progress("quantization", total, total, "done")
    return rows


def time_quantization(op: Callable[[Tensor], Sequence[Tensor]], x: Tensor, machine: Machine) -> dict[str, Any]:
    """A row of `quantization_speed` but for its layout. x: (tokens, in_features) bf16."""
    found = op(x)
    row: dict[str, Any] = {"tokens": x.shape[0], "in_features": x.shape[1], "bytes": x.nbytes + byte_count(found)}
    same = all(torch.equal(part.float(), other.float()) for part, other in zip(in_order(found, x), quantize_fp8_ref(x)))
    if not same:
        return {**row, "correct": False}
    seconds = machine.timer([partial(op, each) for (each,) in machine.rotated((x,))])
    rate = row["bytes"] / seconds / 1e9
    speed = {"microseconds": round(1e6 * seconds, 3), "gb_per_second": round(rate, 1)}
    return {**row, "correct": True, **speed}


def quantize_for(variant: Variant, x: Tensor) -> Sequence[Tensor]:
    """The first step of `w4a8_linear`. x: (tokens, in_features)."""
    packed = x.new_empty((OUTPUTS, -(-x.shape[1] // 8)), dtype=torch.int32)
    scale = x.new_empty((OUTPUTS, variant.groups(x.shape[1])))
    return quantize_w4a8_input(x, packed, scale, exact=variant.exact)


def in_order(found: Sequence[Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    """Values (tokens, in_features) in the order of channels, and scales (tokens, 1), of either layout."""
    values, scale = found[0], found[1]
    if values.dim() == 3:
        values = values.transpose(1, 2).flatten(1)[:, : x.shape[1]]
    return values, scale.reshape(-1, 1)
