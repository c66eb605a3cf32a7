"""INT4 weights expanded once, for products with so many tokens that the expansion costs little.

::

    expand_fp8       ŵ = e4m3(q · σ_g / r) · r        r: one scale per output row; even and odd channels apart
    expand_16bit     ŵ = q · σ_g rounded to bf16 or fp16

With one scale per output row, r = σ and the FP8 codes are q, exactly. With groups, r is 8/448 of the row's largest |σ|,
and q·σ_g/r is rounded to e4m3: a relative error of at most 2⁻⁴ per weight, 2.7 % in the root mean square, which adds
about 0.3 dB to the noise of INT4 rounding itself (SQNR 20 dB: 10 %).
"""

import torch
from torch import Tensor

from .activations import E4M3_MAX
from .packing import unpack_int4


def fold_ref(weight_packed: Tensor, weight_scale: Tensor, in_features: int) -> tuple[Tensor, Tensor]:
    """Torch specification of :func:`expand_fp8`, any device.

    Args:
        weight_packed: (out_features, words) int32.
        weight_scale: (out_features, groups) bf16, fp16 or fp32, any sign.
        in_features: a multiple of groups.

    Returns:
        codes: (out_features, 8·words) float8_e4m3fn: the even channels padded to 4·words, then the odd ones.
        row_scale: (out_features, 1) fp32.
    """
    out_features, groups = weight_scale.shape
    scale = weight_scale.float()
    codes = unpack_int4(weight_packed, in_features).view(out_features, groups, -1).float()
    if groups == 1:
        row_scale = scale
    else:
        amax = scale.abs().amax(dim=1, keepdim=True)
        row_scale = torch.where(amax == 0, torch.ones_like(amax), amax * (8 / E4M3_MAX))
        codes = codes * (scale / row_scale).unsqueeze(-1)
    padded = torch.zeros((out_features, 8 * weight_packed.shape[1]), device=weight_packed.device)
    padded[:, :in_features] = codes.flatten(1)
    planes = padded.view(out_features, -1, 2).transpose(1, 2).flatten(1)
    return planes.to(torch.float8_e4m3fn), row_scale


def expand_fp8(
    weight_packed: Tensor, weight_scale: Tensor, in_features: int, *, interpret: bool = False
) -> tuple[Tensor, Tensor]:
    """Kernel launch without checks; arguments and results are those of :func:`fold_ref`."""
    from .int4_expand_triton import expand_fp8_triton

    return expand_fp8_triton(weight_packed, weight_scale, in_features, interpret=interpret)


def expand_16bit(
    weight_packed: Tensor, weight_scale: Tensor, in_features: int, dtype: torch.dtype, *, interpret: bool = False
) -> Tensor:
    """Kernel for :func:`~.int4_linear.dequantize_int4` (its specification) to bf16 or fp16, without checks."""
    from .int4_expand_triton import expand_16bit_triton

    return expand_16bit_triton(weight_packed, weight_scale, in_features, dtype, interpret=interpret)
