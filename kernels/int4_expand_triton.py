"""Triton kernels of `int4_expand.py`: bound by memory, 85 % of the copy bandwidth on an H200 for 14336×4096.

A program expands 8 rows of 512 bytes, 1024 channels. The fp16 number with the bits 0x6400 | u is 1024 + u exactly: that
spares the slow conversion from integers, and asks for no FP8, which compute capability 8.0 lacks.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .int4_linear_triton import round_to
from .planes_triton import to_e4m3

BLOCK_N = 8
BLOCK_BYTES = 512


@triton.jit
def codes_of(nibbles):
    """Stored nibbles u = q + 8, uint8 → q, fp32."""
    return (nibbles.to(tl.uint16) | 0x6400).to(tl.float16, bitcast=True).to(tl.float32) - 1032.0


@triton.jit
def expand_kernel(
    packed_ptr, scale_ptr, out_ptr, row_scale_ptr, out_features, row_bytes, in_features, groups, group_size,
    stride_packed, stride_scale,
    BLOCK_N: tl.constexpr, BLOCK_BYTES: tl.constexpr, PART: tl.constexpr, GROUPS: tl.constexpr, FP8: tl.constexpr,
    INTERPRET: tl.constexpr,
):  # fmt: skip
    """PART: channels, a power of two, that divides the group; GROUPS: power of two ≥ groups, 1 for a scale per row."""
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    byte = tl.program_id(1) * BLOCK_BYTES + tl.arange(0, BLOCK_BYTES)
    inside_n = n < out_features
    inside = inside_n[:, None] & (byte < row_bytes)[None, :]
    packed = tl.load(packed_ptr + n[:, None] * stride_packed + byte[None, :], mask=inside, other=0)
    low, high = codes_of(packed & 0xF), codes_of(packed >> 4)

    PARTS: tl.constexpr = 2 * BLOCK_BYTES // PART
    part = tl.program_id(1) * PARTS + tl.arange(0, PARTS)
    group = part * PART // group_size
    scale_rows = scale_ptr + n[:, None] * stride_scale
    known = inside_n[:, None] & (group < groups)[None, :]
    factor = tl.load(scale_rows + group[None, :], mask=known, other=0.0).to(tl.float32)
    if FP8:
        if GROUPS == 1:
            row_scale = tl.load(scale_ptr + n * stride_scale, mask=inside_n, other=0.0).to(tl.float32)
            factor = tl.full((BLOCK_N, PARTS), 1.0, tl.float32)
        else:
            index = tl.arange(0, GROUPS)[None, :]
            scales = tl.load(scale_rows + index, mask=inside_n[:, None] & (index < groups), other=0.0).to(tl.float32)
            amax = tl.max(tl.abs(scales), axis=1)
            row_scale = tl.where(amax == 0.0, 1.0, amax * (8.0 / 448.0))
            factor = tl.math.div_rn(factor, tl.broadcast_to(row_scale[:, None], (BLOCK_N, PARTS)))
        tl.store(row_scale_ptr + n, row_scale, mask=inside_n)
    low = tl.reshape(tl.reshape(low, (BLOCK_N, PARTS, PART // 2)) * factor[:, :, None], (BLOCK_N, BLOCK_BYTES))
    high = tl.reshape(tl.reshape(high, (BLOCK_N, PARTS, PART // 2)) * factor[:, :, None], (BLOCK_N, BLOCK_BYTES))
    if FP8:
        # The fill of a row's last word stands for code −8; its activations are zero, but NaN must not arise.
        low = tl.where((2 * byte < in_features)[None, :], low, 0.0)
        high = tl.where((2 * byte + 1 < in_features)[None, :], high, 0.0)
        out = out_ptr + n[:, None] * (2 * row_bytes) + byte[None, :]
        tl.store(out, to_e4m3(low, INTERPRET), mask=inside)
        tl.store(out + row_bytes, to_e4m3(high, INTERPRET), mask=inside)
    else:
        k = tl.program_id(1) * (2 * BLOCK_BYTES) + tl.arange(0, 2 * BLOCK_BYTES)
        out = out_ptr + n[:, None] * in_features + k[None, :]
        values = round_to(tl.interleave(low, high), out_ptr.dtype.element_ty, INTERPRET)
        tl.store(out, values, mask=inside_n[:, None] & (k < in_features)[None, :])


def launch(
    packed: Tensor, scale: Tensor, in_features: int, out: Tensor, row_scale: Tensor | None, *, interpret: bool
) -> None:
    """Expands packed: (out_features, words) int32 with scale: (out_features, groups) into `out`."""
    packed = (packed if packed.stride(1) == 1 else packed.contiguous()).view(torch.uint8)
    scale = scale if scale.stride(1) == 1 else scale.contiguous()
    out_features, row_bytes = packed.shape
    groups = scale.shape[1]
    group_size = in_features // groups
    part = 2 * BLOCK_BYTES if groups == 1 else min(2 * BLOCK_BYTES, group_size & -group_size)
    grid = (triton.cdiv(out_features, BLOCK_N), triton.cdiv(row_bytes, BLOCK_BYTES))
    expand_kernel[grid](
        packed,
        scale,
        out,
        row_scale,
        out_features,
        row_bytes,
        in_features,
        groups,
        max(group_size, part) if groups == 1 else group_size,
        packed.stride(0),
        scale.stride(0),
        BLOCK_N=BLOCK_N,
        BLOCK_BYTES=BLOCK_BYTES,
        PART=part,
        GROUPS=triton.next_power_of_2(groups),
        FP8=row_scale is not None,
        INTERPRET=interpret,
        num_warps=4,
    )


def expand_fp8_triton(
    weight_packed: Tensor, weight_scale: Tensor, in_features: int, *, interpret: bool = False
) -> tuple[Tensor, Tensor]:
    """See `fold_ref`."""
    out_features, words = weight_packed.shape
    device = weight_packed.device
    codes = torch.empty((out_features, 8 * words), dtype=torch.float8_e4m3fn, device=device)
    row_scale = torch.empty((out_features, 1), dtype=torch.float32, device=device)
    launch(weight_packed, weight_scale, in_features, codes, row_scale, interpret=interpret)
    return codes, row_scale


def expand_16bit_triton(
    weight_packed: Tensor, weight_scale: Tensor, in_features: int, dtype: torch.dtype, *, interpret: bool = False
) -> Tensor:
    """See `dequantize_int4`."""
    weight = torch.empty((weight_packed.shape[0], in_features), dtype=dtype, device=weight_packed.device)
    launch(weight_packed, weight_scale, in_features, weight, None, interpret=interpret)
    return weight
