"""Triton kernel for per-token FP8 quantization: one program per row, the row read once and held in registers."""

import torch
import triton
import triton.language as tl
from torch import Tensor

E4M3_MAX = tl.constexpr(448.0)
MIN_SCALE = tl.constexpr(2.0**-126)


@triton.jit
def e4m3_by_bits(values):
    """FP32 (|v| < 464 or NaN) → e4m3fn, to nearest even, in integer arithmetic: the interpreter's cast is inexact."""
    bits = values.to(tl.int32, bitcast=True)
    sign = (bits >> 24) & 0x80
    magnitude = bits & 0x7FFFFFFF
    # Exponent and the top 3 mantissa bits, rebiased from 127 to 7.
    normal = ((magnitude + 0x7FFFF + ((magnitude >> 20) & 1)) >> 20) - (120 << 3)
    # Adding 2¹⁴ makes the FP32 unit 2⁻⁹, the e4m3 subnormal step; 0x46800000 is 2¹⁴.
    subnormal = (tl.abs(values) + 16384.0).to(tl.int32, bitcast=True) - 0x46800000
    code = tl.where(tl.abs(values) < 0.015625, subnormal, normal)
    code = tl.where(values != values, 0x7F, code)
    return (sign | code).to(tl.uint8).to(tl.float8e4nv, bitcast=True)


@triton.jit
def quantize_rows_kernel(
    x_ptr,
    x8_ptr,
    scale_ptr,
    in_features,
    stride_row,
    BLOCK: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < in_features
    values = tl.load(x_ptr + row * stride_row + column, mask=inside, other=0.0).to(tl.float32)

    amax = tl.max(tl.abs(values), axis=0)
    # tl.max drops NaN, so non-finite values are looked for by a comparison that NaN fails.
    broken = tl.max(tl.where(tl.abs(values) < float("inf"), 0, 1), axis=0) > 0
    # div_rn: the default division is approximate and would differ from torch in the last bit.
    scale = tl.maximum(tl.math.div_rn(amax, E4M3_MAX), MIN_SCALE)
    scale = tl.where(amax == 0.0, 1.0, scale)
    scale = tl.where(broken, float("nan"), scale)

    quotient = values * tl.math.div_rn(1.0, scale)
    if INTERPRET:
        x8 = e4m3_by_bits(quotient)
    else:
        x8 = quotient.to(tl.float8e4nv)
    tl.store(x8_ptr + row * in_features + column, x8, mask=inside)
    tl.store(scale_ptr + row, scale)


def quantize_rows(x: Tensor, *, interpret: bool = False) -> tuple[Tensor, Tensor]:
    """x: (rows, K) → x8: (rows, K) float8_e4m3fn, scale: (rows,) fp32."""
    if x.stride(1) != 1:
        x = x.contiguous()
    rows, in_features = x.shape
    x8 = torch.empty((rows, in_features), dtype=torch.float8_e4m3fn, device=x.device)
    scale = torch.empty((rows,), dtype=torch.float32, device=x.device)
    if rows:
        block = triton.next_power_of_2(in_features)
        # 32 to 64 values per thread keep a row in registers.
        num_warps = min(32, max(1, block // 1024))
        quantize_rows_kernel[(rows,)](
            x, x8, scale, in_features, x.stride(0), BLOCK=block, INTERPRET=interpret, num_warps=num_warps
        )
    return x8, scale
