"""Linear layers with INT4 weights and FP8 activations (W4A8).

With codes q in [-8, 7], a scale σ per output row and group g of consecutive inputs, and activations x ≈ x8 · s_x::

    y = (Σ_g σ_g · Σ_{k∈g} x8_k · q_k) · s_x + bias        x8: e4m3fn, one s_x per token

Sums, scales and bias are FP32; y has the dtype of x. INT4 codes are exact in e4m3fn, so that the products have no
further rounding; 4 bits save bytes, never multiplications. Two steps, so that layers with the same input share the
first: `quantize_w4a8_input`, then `w4a8_matmul`. How they run:

| device | tokens | input | product |
|---|---|---|---|
| compute capability 9.0 | below `EXPAND_TOKENS`, or `exact` | `planes.py` | `w4a8_hopper.py` |
| | more | `planes.py` | weights expanded to FP8 (`int4_expand.py`), then ``torch._scaled_mm`` |
| 8.9 and from 10.0 | any | `activations.py` | `int4_linear_triton.py` |
| elsewhere | any | `activations.py` | reference |

Expanding rounds the weights of layers with groups once more (`int4_expand.py` has the error); with ``exact=True`` group
scales are applied in FP32 at any number of tokens. What a way does not take falls to the one below it in the table,
with one logged reason. Inference only: no gradient is registered.
"""

import functools

import torch
from torch import Tensor

from .activations import launching_on, log_fallback, quantize_fp8, quantize_fp8_ref
from .fp8_linear import SCALED_MM_MULTIPLE, scaled_matmul
from .int4_expand import expand_fp8
from .int4_linear import (
    check_int4_linear,
    check_int4_weight,
    check_same_layer,
    dequantize_int4,
    hopper_refusal,
    kernel_takes,
)
from .packing import CODES_PER_WORD
from .planes import DIGIT_SUMS, QuantizedInput, empty_planes, quantize_planes

EXPAND_TOKENS = {"row": 1536, "groups": 640}
"""Tokens from which expanding pays. µs on an H200 for 14336×4096, packed and expanded: one scale per row at 1024 tokens
118 and 127, at 2048 238 and 220; groups of 128 at 512 77 and 93, at 768 about 119 and 117."""
DIGIT_TOKENS = 64
TMA_ALIGNMENT = 16
SUM_SIZES = (128, 64, 32)


def w4a8_linear(
    x: Tensor, weight_packed: Tensor, weight_scale: Tensor, bias: Tensor | None = None, *, exact: bool = False
) -> Tensor:
    """INT4 weights times activations that are quantized to FP8 per token on the fly.

    Args:
        x: (..., in_features) bf16, fp16 or fp32, any strides, any number of tokens from 0.
        weight_packed: (out_features, ceil(in_features / 8)) int32, compressed-tensors layout.
        weight_scale: (out_features, groups) bf16, fp16 or fp32, any sign; groups divides in_features.
        bias: (out_features,) floating, or None.
        exact: never fold group scales into rounded FP8 weights, however many tokens there are.

    Returns:
        (..., out_features) in the dtype of ``x``, contiguous.

    Raises:
        ValueError: shapes, dtypes or devices that do not belong together.
    """
    quantized = quantize_w4a8_input(x, weight_packed, weight_scale, bias, exact=exact)
    return w4a8_matmul(quantized, weight_packed, weight_scale, bias, x.shape, x.dtype, exact=exact)


def quantize_w4a8_input(
    x: Tensor, weight_packed: Tensor, weight_scale: Tensor, bias: Tensor | None = None, *, exact: bool = False
) -> QuantizedInput:
    """First step of `w4a8_linear`, with its arguments and errors.

    The result serves every layer for which `input_key` is the same.
    """
    check_int4_linear(x, weight_packed, weight_scale, bias)
    rows = x.reshape(-1, x.shape[-1])
    groups, correction = input_key(rows.shape[0], weight_packed, weight_scale, exact=exact)
    return QuantizedInput(*quantize_op(rows, groups, correction))


def takes_packed(tokens: int, weight_packed: Tensor, weight_scale: Tensor, *, exact: bool) -> bool:
    """Whether the packed weights are multiplied, rather than weights expanded to FP8."""
    grouped = weight_scale.shape[1] > 1
    expandable = weight_packed.shape[0] % SCALED_MM_MULTIPLE == 0 and not (exact and grouped)
    return not expandable or tokens < EXPAND_TOKENS["groups" if grouped else "row"]


def input_key(tokens: int, weight_packed: Tensor, weight_scale: Tensor, *, exact: bool) -> tuple[int, int | None]:
    """(groups, sum_size of `planes.quantize_planes_ref`): what the quantized input depends on besides x.

    Products with one scale per row take off the row's sum, those with groups take digits for few tokens and decode the
    weights for more, expanded weights need neither.
    """
    groups = weight_scale.shape[1]
    if not takes_packed(tokens, weight_packed, weight_scale, exact=exact):
        return groups, None
    size = sum_size(weight_packed.shape[1] * CODES_PER_WORD, groups)
    return groups, size if size == 0 or (size == DIGIT_SUMS and tokens <= DIGIT_TOKENS) else None


def w4a8_matmul(
    quantized: QuantizedInput,
    weight_packed: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    shape: torch.Size,
    dtype: torch.dtype,
    *,
    exact: bool = False,
) -> Tensor:
    """Second step of `w4a8_linear`, with its errors. shape, dtype: those of x."""
    check_int4_weight(weight_packed, weight_scale, shape[-1])
    weights = {"weight_packed": weight_packed, "weight_scale": weight_scale}
    check_same_layer(quantized.values.device, weight_packed.shape[0], bias, **weights)
    packed = takes_packed(quantized.values.shape[0], weight_packed, weight_scale, exact=exact)
    y = matmul_op(*quantized, weight_packed, weight_scale, bias, shape[-1], dtype, packed)
    return y.view(*shape[:-1], weight_packed.shape[0])


def w4a8_ref(x: Tensor, weight_packed: Tensor, weight_scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """Torch specification of :func:`w4a8_linear`, any device."""
    x8, scale = quantize_fp8_ref(x)
    return matmul_ref(x8, scale, weight_packed, weight_scale, bias, x.dtype)


def matmul_ref(
    x8: Tensor, scale: Tensor, weight_packed: Tensor, weight_scale: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """x8: (..., in_features) float8_e4m3fn, scale: (..., 1) → (..., out_features)."""
    weight = dequantize_int4(weight_packed, weight_scale, x8.shape[-1], torch.float32)
    y = (x8.float() @ weight.t()) * scale
    return (y if bias is None else y + bias.float()).to(dtype)


@functools.cache
def planes_refusal(device: torch.device, in_features: int, groups: int) -> str | None:
    """Why the input of such a layer is not quantized into planes on ``device``; None if it is."""
    refusal = hopper_refusal(device)
    if refusal is None and in_features % 32:
        refusal = f"{in_features} input channels are no multiple of 32"
    if refusal is None and sum_size(in_features, groups) < 0:
        refusal = f"group size {in_features // groups} is no multiple of 32"
    return refusal


def sum_size(in_features: int, groups: int) -> int:
    """Channels summed before a scale is applied: 0 for a whole row, else the largest of 128, 64 and 32 that divides a
    group, −1 if none does.
    """
    if groups == 1:
        return 0
    group_size = in_features // groups
    return next((size for size in SUM_SIZES if group_size % size == 0), -1)


def in_planes(x: Tensor, groups: int) -> bool:
    """Whether x is quantized into planes; if not on Hopper, where that is the fast way, the reason is logged once."""
    # int: under torch.compile a width may be symbolic, which cannot be a key.
    refusal = planes_refusal(x.device, int(x.shape[-1]), int(groups))
    if refusal is not None and hopper_refusal(x.device) is None:
        log_fallback("w4a8_linear", refusal, "the portable Triton kernel")
    return refusal is None


def run_quantize(x: Tensor, groups: int, correction: int | None, *, interpret: bool = False) -> QuantizedInput:
    """x: (tokens, in_features). Dispatch of `quantize_w4a8_input` without checks."""
    if in_planes(x, groups):
        return quantize_planes(x, x.shape[-1] // 2, correction)
    x8, scale = quantize_fp8(x, interpret=interpret)
    return QuantizedInput(x8, scale, x.new_empty(0), x.new_empty(0))


def run_matmul(
    quantized: QuantizedInput,
    weight_packed: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    in_features: int,
    dtype: torch.dtype,
    packed: bool,
    *,
    interpret: bool = False,
) -> Tensor:
    """Dispatch of `w4a8_matmul` without checks: (tokens, out_features). packed: see `takes_packed`."""
    values, scale = quantized.values, quantized.scale
    tokens, groups = values.shape[0], weight_scale.shape[1]
    if values.dim() == 3:
        if tokens == 0:
            return values.new_empty((0, weight_packed.shape[0]), dtype=dtype)
        weight_scale, bias = weight_scale.contiguous(), None if bias is None else bias.contiguous()
        if not packed:
            codes, row_scale = expand_fp8(weight_packed, weight_scale, in_features)
            return scaled_matmul(values.flatten(1), scale.unsqueeze(1), codes, row_scale, bias, dtype)
        from .w4a8_hopper import w4a8_hopper

        size = sum_size(in_features, groups)
        as_stored = weight_packed.is_contiguous() and weight_packed.data_ptr() % TMA_ALIGNMENT == 0
        if not as_stored:
            weight_packed = weight_packed.clone(memory_format=torch.contiguous_format)
        return w4a8_hopper(quantized, weight_packed, weight_scale, bias, size, dtype, weights_ready=as_stored)
    if not kernel_takes("w4a8_linear", values, weight_scale, interpret=interpret):
        return matmul_ref(values, scale, weight_packed, weight_scale, bias, dtype)
    from .int4_linear_triton import int4_matmul

    return int4_matmul(values, weight_packed, weight_scale, bias, x_scale=scale, out_dtype=dtype, interpret=interpret)


@torch.library.custom_op("kompakt::w4a8_quantize", mutates_args=())
def quantize_op(x: Tensor, groups: int, correction: int | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Registered op behind `quantize_w4a8_input`; x: (tokens, in_features). Opaque to torch.compile."""
    with launching_on(x):
        values, scale, taken_off, counters = run_quantize(x, groups, correction)
    return values, scale, taken_off, counters


@quantize_op.register_fake
def _(x: Tensor, groups: int, correction: int | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if in_planes(x, groups):
        values, scale, taken_off, counters = empty_planes(x, x.shape[-1] // 2, correction)
        return values, scale, taken_off, counters
    scale = x.new_empty((x.shape[0], 1), dtype=torch.float32)
    return x.new_empty(x.shape, dtype=torch.float8_e4m3fn), scale, x.new_empty(0), x.new_empty(0)


@torch.library.custom_op("kompakt::w4a8_matmul", mutates_args=())
def matmul_op(
    values: Tensor,
    scale: Tensor,
    correction: Tensor,
    counters: Tensor,
    weight_packed: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    in_features: int,
    dtype: torch.dtype,
    packed: bool,
) -> Tensor:
    """Registered op behind `w4a8_matmul`; (tokens, out_features). packed: see `takes_packed`, only looked at on Hopper.
    Opaque to torch.compile.
    """
    quantized = QuantizedInput(values, scale, correction, counters)
    with launching_on(values):
        return run_matmul(quantized, weight_packed, weight_scale, bias, in_features, dtype, packed)


@matmul_op.register_fake
def _(values, scale, correction, counters, weight_packed, weight_scale, bias, in_features, dtype, packed) -> Tensor:
    return values.new_empty((values.shape[0], weight_packed.shape[0]), dtype=dtype)
