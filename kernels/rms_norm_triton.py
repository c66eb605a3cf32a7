"""Triton kernel of `rms_norm.py`: one program per row, the row read once and held in registers."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .int4_linear_triton import round_to


@triton.jit
def norm_rows_kernel(
    x_ptr,
    weight_ptr,
    out_ptr,
    in_features,
    count,
    stride_row,
    eps,
    FORM: tl.constexpr,
    BLOCK: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """count: in_features in FP32."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < in_features
    x = tl.load(x_ptr + row * stride_row + column, mask=inside, other=0.0)
    weight = tl.load(weight_ptr + column, mask=inside, other=0.0).to(tl.float32)

    values = x.to(tl.float32)
    # div_rn: the default division is approximate.
    mean = tl.math.div_rn(tl.sum(values * values, axis=0), count)
    values = values * tl.math.rsqrt(mean + eps)
    if FORM == "rounded":
        values = round_to(values, x.dtype, INTERPRET).to(tl.float32)
    if FORM == "plus_one":
        weight = 1.0 + weight
    y = round_to(values * weight, out_ptr.dtype.element_ty, INTERPRET)
    tl.store(out_ptr + row * in_features + column, y, mask=inside)


def norm_rows(
    x: Tensor, weight: Tensor, dtype: torch.dtype, eps: float, form: str, *, interpret: bool = False
) -> Tensor:
    """x: (rows, K), weight: (K,) → (rows, K) of `dtype`, contiguous."""
    if x.stride(1) != 1:
        x = x.contiguous()
    rows, in_features = x.shape
    out = torch.empty((rows, in_features), dtype=dtype, device=x.device)
    if rows:
        block = triton.next_power_of_2(in_features)
        # Two 16-byte loads of 16-bit values per thread: steps of one token wait for loads, not for bandwidth.
        num_warps = min(16, max(1, block // 512))
        norm_rows_kernel[(rows,)](
            x, weight, out, in_features, float(in_features), x.stride(0), eps,
            FORM=form, BLOCK=block, INTERPRET=interpret, num_warps=num_warps, enable_fp_fusion=False,
        )  # fmt: skip
    return out
