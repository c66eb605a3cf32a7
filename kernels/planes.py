"""Activations for INT4 weights: FP8 per token, even and odd channels apart, and what takes off the nibbles' offset.

The values and scales are those of :func:`~.activations.quantize_fp8_per_token`. Packed weights hold two neighbouring
channels in a byte, so a kernel that reads the low nibbles of a tile wants the even channels, and for the high nibbles
the odd ones: row t is stored as ``x8[t, 0::2]`` and then ``x8[t, 1::2]``, each padded with zeros to `row_bytes`.

A nibble is q + 8, so Σ x·(q + 8) has 8·Σx too much. Where sums of `sum_size` channels are scaled one by one, Σx of each
is given as six e4m3 *digits* with fixed weights, to be multiplied by the tensor cores beside the values::

    −2⁻⁶·Σx = −2·d₀ − 2⁻³·d₁ − 2⁻⁶·d₂ − 2⁻⁹·(d₃ + d₄ + d₅)

in units of 2⁻⁹·8, since the nibble's byte read as e4m3 is u·2⁻⁹. Each digit is the rest, scaled and rounded to e4m3. Σx
is a multiple of 2⁻⁹ and at most 128·448; every digit's rounding error leaves at most 2⁻⁴ of what it rounds, and after
the sixth nothing is left: the digits are exact, up to the rounding of Σx to FP32.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .activations import E4M3_MAX, quantize_fp8_ref

DIGITS = 32
"""Bytes per sum: six digits, zeros after them, because an FP8 product has at least 32 terms."""
DIGIT_STEPS = (
    (2.0**-7, 2.0**7),
    (2.0**-3, 2.0**3),
    (1.0, 1.0),
    (2.0**3, 2.0**-3),
    (2.0**3, 2.0**-3),
    (2.0**3, 2.0**-3),
)
"""(factor of the rest before rounding, value of one unit of the digit)."""
DIGIT_SUMS = 128
"""Channels per sum where digits pay: with shorter sums the nibbles are decoded instead."""
DIGIT_WEIGHTS = (-2.0, -(2.0**-3), -(2.0**-6), -(2.0**-9), -(2.0**-9), -(2.0**-9))
SUM_UNIT = 2.0**-6
COUNTERS = 512


class QuantizedInput(NamedTuple):
    """What `w4a8_linear.w4a8_matmul` multiplies, in planes or, for devices that do not want them, as it is.

    As it is: values (tokens, in_features) float8_e4m3fn, scale (tokens, 1) fp32, the rest empty. In planes:
    values: (tokens, 2, row_bytes) float8_e4m3fn. scale: (tokens,) fp32. correction: for sum_size > 0
    (tokens, sums·32) float8_e4m3fn digits, for 0 (tokens,) fp32 2⁻⁶·Σx of the row, for None (0,) fp32. counters: (512,)
    int32 zeros, for a kernel whose programs count arrivals; it leaves zeros.

    A row with an infinity or a NaN has scale NaN and NaN values; its correction is unspecified.
    """

    values: Tensor
    scale: Tensor
    correction: Tensor
    counters: Tensor


def empty_planes(x: Tensor, row_bytes: int, sum_size: int | None) -> QuantizedInput:
    """Uninitialised result for x: (tokens, in_features)."""
    tokens, in_features = x.shape
    fp8 = torch.float8_e4m3fn
    if sum_size:
        correction = torch.empty((tokens, in_features // sum_size * DIGITS), dtype=fp8, device=x.device)
    else:
        correction = torch.empty((0 if sum_size is None else tokens,), dtype=torch.float32, device=x.device)
    return QuantizedInput(
        torch.empty((tokens, 2, row_bytes), dtype=fp8, device=x.device),
        torch.empty((tokens,), dtype=torch.float32, device=x.device),
        correction,
        torch.empty((COUNTERS,), dtype=torch.int32, device=x.device),
    )


def quantize_planes_ref(x: Tensor, row_bytes: int, sum_size: int | None) -> QuantizedInput:
    """Torch specification of :func:`quantize_planes`, any device.

    Args:
        x: (tokens, in_features) bf16, fp16 or fp32.
        row_bytes: bytes of a packed weight row, at least in_features / 2.
        sum_size: 32, 64 or 128, dividing in_features: digits of every sum. 0: the sum of the row. None: neither.
    """
    tokens, in_features = x.shape
    x8, scale = quantize_fp8_ref(x)
    padded = torch.zeros((tokens, 2 * row_bytes), dtype=torch.float8_e4m3fn, device=x.device)
    padded[:, :in_features] = x8
    values = padded.view(tokens, row_bytes, 2).transpose(1, 2).contiguous()
    counters = torch.zeros((COUNTERS,), dtype=torch.int32, device=x.device)
    if sum_size is None:
        correction = x.new_zeros((0,), dtype=torch.float32)
    elif sum_size == 0:
        correction = x8.float().sum(-1) * SUM_UNIT
    else:
        correction = digits_ref(x8.float().view(tokens, in_features // sum_size, sum_size).sum(-1))
    return QuantizedInput(values, scale.view(tokens), correction, counters)


def digits_ref(sums: Tensor) -> Tensor:
    """(tokens, sums) fp32 → (tokens, sums·32) float8_e4m3fn digits."""
    digits = torch.zeros((*sums.shape, DIGITS), dtype=torch.float8_e4m3fn, device=sums.device)
    rest = sums
    for place, (factor, unit) in enumerate(DIGIT_STEPS):
        digit = (rest * factor).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)
        digits[..., place] = digit
        rest = rest - digit.float() * unit
    return digits.flatten(1)


def quantize_planes(x: Tensor, row_bytes: int, sum_size: int | None, *, interpret: bool = False) -> QuantizedInput:
    """Kernel launch without checks; arguments and result are those of :func:`quantize_planes_ref`."""
    from .planes_triton import quantize_planes_triton

    return quantize_planes_triton(x, row_bytes, sum_size, interpret=interpret)
