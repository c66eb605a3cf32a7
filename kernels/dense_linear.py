"""Linears with 16-bit weights on a CPU that multiplies float32 faster.

Without instructions for bf16 or fp16, torch multiplies matrices of these at some 8 GFLOP/s on a core that does 50 to 70
in float32. Converting what is multiplied, and rounding the result, is the same arithmetic: float32 holds every bf16 and
fp16 number, products are summed in float32 in both, and the sum is rounded once. Only its order differs. Weights are
converted a few rows at a time, so that no copy of a whole one is made.

Whether a CPU is slow is what torch itself goes by when it chooses how to multiply. Nothing is timed: two processes on
one machine decide alike, and give the same bits.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

MIN_ROWS = 8
"""Below, what it takes to convert the weight is not won back: 4 tokens take as long either way, one 4 times as long."""
CHUNK_ELEMENTS = 2**22
"""Of the float32 weight, and of the float32 result, at a time: 16 MiB each, which the allocator keeps for reuse."""


SLOW = frozenset(
    dtype
    for dtype, is_fast in (
        (torch.bfloat16, torch.ops.mkldnn._is_mkldnn_bf16_supported),
        (torch.float16, torch.ops.mkldnn._is_mkldnn_fp16_supported),
    )
    if not is_fast()
)
"""Found out once: torch.compile traces through what asks for it."""


def multiplies_slowly(dtype: torch.dtype) -> bool:
    """Whether this CPU multiplies float32 matrices faster than those of `dtype`."""
    return dtype in SLOW


def through_float32(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> bool:
    """Whether `dense_linear` multiplies these in float32."""
    operands = [operand for operand in (input, weight, bias) if operand is not None]
    return (
        multiplies_slowly(input.dtype)
        and all(operand.dtype == input.dtype and operand.device.type == "cpu" for operand in operands)
        and weight.dim() == 2
        and input.numel() >= MIN_ROWS * input.shape[-1] > 0
    )


def dense_linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`torch.nn.functional.linear`, in float32 inside where `through_float32` says so; differentiable.

    input: (…, in_features), weight: (out_features, in_features), bias: (out_features,) or None. Returns (…,
    out_features) in their dtype. Raises whatever `torch.nn.functional.linear` raises.
    """
    if not through_float32(input, weight, bias) or input.shape[-1] != weight.shape[1]:
        return functional.linear(input, weight, bias)
    if torch.is_grad_enabled() and any(
        operand is not None and operand.requires_grad for operand in (input, weight, bias)
    ):
        return _Float32Linear.apply(input, weight, bias)
    return _product(input, weight, bias)


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    rows = x.reshape(-1, x.shape[-1]).float()
    out = torch.empty((len(rows), len(weight)), dtype=x.dtype)
    step = max(1, CHUNK_ELEMENTS // max(weight.shape[1], len(rows)))
    for start in range(0, len(weight), step):
        part = slice(start, start + step)
        out[:, part] = functional.linear(rows, weight[part].float(), None if bias is None else bias[part].float())
    return out.view(*x.shape[:-1], len(weight))


class _Float32Linear(torch.autograd.Function):
    """`_product`, whose gradients are multiplied in float32 as well. What is kept for them is 16 bit."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight if ctx.needs_input_grad[0] else None)
        return _product(x, weight, bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor):
        x, weight = ctx.saved_tensors
        grad = grads[0]
        for_x = None if weight is None else _product(grad, weight.t(), None)
        for_weight = for_bias = None
        if x is not None:
            for_weight = _product(grad.reshape(-1, grad.shape[-1]).t(), x.reshape(-1, x.shape[-1]).t(), None)
        if ctx.needs_input_grad[2]:
            for_bias = grad.reshape(-1, grad.shape[-1]).sum(0)
        return for_x, for_weight, for_bias
