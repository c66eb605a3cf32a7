"""Triton kernel for linear layers with INT4 weights: one M-tiled kernel for FP8 and for 16 or 32 bit activations.

A program computes the transposed tile Yᵀ = W·Xᵀ of BLOCK_N outputs × BLOCK_M tokens, with the unpacked weight as the
left operand, the one that WGMMA can read from registers. A K block never crosses a group: it is multiplied into a fresh
accumulator, which is then scaled and added in FP32. That is also what bounds the error of Hopper's FP8 accumulator,
which keeps about 14 bits: it never sums more than 128 products.

A word is broadcast against its eight shifts, nibble index last, so that a reshape restores the K order.
"""

from dataclasses import dataclass
from math import gcd

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def round_to(values, dtype: tl.constexpr, INTERPRET: tl.constexpr):
    """FP32 → dtype to nearest even. The interpreter truncates to bf16, so there the bits are rounded beforehand."""
    if INTERPRET and dtype == tl.bfloat16:
        bits = values.to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
        values = bits.to(tl.float32, bitcast=True)
    return values.to(dtype)


@triton.jit
def int4_matmul_kernel(
    x_ptr,
    x_scale_ptr,
    weight_ptr,
    weight_scale_ptr,
    bias_ptr,
    y_ptr,
    tokens,
    out_features,
    in_features,
    blocks_per_group,
    stride_x,
    stride_weight,
    stride_scale,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    FP8: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    output = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    token = tl.program_id(1).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside_n = output < out_features
    inside_m = token < tokens
    weight_rows = weight_ptr + output[:, None] * stride_weight
    x_columns = x_ptr + token[None, :] * stride_x
    offset_k = tl.arange(0, BLOCK_K)
    offset_word = tl.arange(0, BLOCK_K // 8)
    shift = tl.arange(0, 8) * 4

    accumulator = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
    for block in range(0, tl.cdiv(in_features, BLOCK_K)):
        k = block * BLOCK_K + offset_k
        inside_k = k < in_features
        word = block * (BLOCK_K // 8) + offset_word
        inside_word = word * 8 < in_features
        words = tl.load(weight_rows + word[None, :], mask=inside_n[:, None] & inside_word[None, :], other=0)
        # Masked activations are zero, so whatever code stands in a masked weight adds nothing.
        x = tl.load(x_columns + k[:, None], mask=inside_k[:, None] & inside_m[None, :], other=0.0)
        nibbles = (words[:, :, None] >> shift[None, None, :]) & 0xF
        codes = (tl.reshape(nibbles, (BLOCK_N, BLOCK_K)) - 8).to(tl.float32)
        scale_ptrs = weight_scale_ptr + output * stride_scale + block // blocks_per_group
        scale = tl.load(scale_ptrs, mask=inside_n, other=0.0).to(tl.float32)
        if FP8:
            weight = codes.to(tl.float8e4nv)
        else:
            weight = round_to(codes * scale[:, None], x.dtype, INTERPRET)
            if INTERPRET:
                # bf16 products are garbage in the interpreter; in FP32 the same products are exact.
                weight = weight.to(tl.float32)
                x = x.to(tl.float32)
        product = tl.dot(weight, x, input_precision="ieee", out_dtype=tl.float32)
        if FP8:
            accumulator += product * scale[:, None]
        else:
            accumulator += product

    if FP8:
        x_scale = tl.load(x_scale_ptr + token, mask=inside_m, other=0.0)
        accumulator *= x_scale[None, :]
    if HAS_BIAS:
        bias = tl.load(bias_ptr + output, mask=inside_n, other=0.0).to(tl.float32)
        accumulator += bias[:, None]
    y_ptrs = y_ptr + token[None, :] * out_features + output[:, None]
    y = round_to(accumulator, y_ptr.dtype.element_ty, INTERPRET)
    tl.store(y_ptrs, y, mask=inside_n[:, None] & inside_m[None, :])


@dataclass(frozen=True)
class LaunchConfig:
    """Tile sizes and launch options of one call."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int


def launch_config(tokens: int, in_features: int, groups: int, element_size: int) -> LaunchConfig:
    """Tiles for a (tokens, in_features) call: the token tile follows the number of tokens, the K block the group."""
    block_m = min(128, max(16, triton.next_power_of_2(tokens)))
    block_k = 128 if groups == 1 else gcd(in_features // groups, 128)
    if element_size > 1:
        # 16 and 32 bit tiles are smaller: the scaled FP32 weights must stay in registers without spills.
        block_m, block_k = min(64, block_m), min(block_k, 128 // element_size)
    return LaunchConfig(block_m, 64, block_k, num_warps=4, num_stages=3)


def int4_matmul(
    x: Tensor,
    weight_packed: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    *,
    x_scale: Tensor | None,
    out_dtype: torch.dtype,
    interpret: bool = False,
) -> Tensor:
    """x: (tokens, in) float8_e4m3fn with x_scale: (tokens, 1) fp32, or bf16, fp16, fp32 without; y: (tokens, out)."""
    tokens, in_features = x.shape
    out_features, groups = weight_scale.shape
    y = torch.empty((tokens, out_features), dtype=out_dtype, device=x.device)
    if y.numel() == 0:
        return y
    x = x if x.stride(1) == 1 else x.contiguous()
    weight_packed = weight_packed if weight_packed.stride(1) == 1 else weight_packed.contiguous()
    weight_scale = weight_scale if weight_scale.stride(1) == 1 else weight_scale.contiguous()
    config = launch_config(tokens, in_features, groups, x.element_size())
    group_size = in_features // groups
    grid = (triton.cdiv(out_features, config.block_n), triton.cdiv(tokens, config.block_m))
    int4_matmul_kernel[grid](
        x,
        x_scale,
        weight_packed,
        weight_scale,
        None if bias is None else bias.contiguous(),
        y,
        tokens,
        out_features,
        in_features,
        triton.cdiv(group_size, config.block_k),
        x.stride(0),
        weight_packed.stride(0),
        weight_scale.stride(0),
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        FP8=x_scale is not None,
        HAS_BIAS=bias is not None,
        INTERPRET=interpret,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    return y
