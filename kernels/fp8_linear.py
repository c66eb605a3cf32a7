"""Linear layers with FP8 (e4m3fn) weights, one scale per output channel.

::

    fp8_linear         y = (Σ_k x8_k · w8_k) · s_x · s_w + bias     x8, s_x: per token, quantized on the fly
    fp8_w8a16_linear   y = Σ_k x_k · ŵ_k + bias                     ŵ = w8 · s_w rounded to the dtype of x

On compute capability 8.9 and up ``fp8_linear`` runs ``torch._scaled_mm``: with row-wise scales where x and bias are
bf16, the only output dtype that mode has, else with unit scales and FP32 output, scaled and cast afterwards. Dimensions
that are no multiple of 16 run through the reference. Inference only: no gradient is registered for ``fp8_linear``.
"""

import torch
from torch import Tensor

from .activations import FLOAT_DTYPES, launching_on, log_fallback, quantize_fp8, quantize_fp8_ref
from .dense_linear import dense_linear
from .int4_linear import check_linear_operands, linear_backend

SCALED_MM_MULTIPLE = 16
_scaled_mm = torch._scaled_mm  # pyright: ignore[reportPrivateImportUsage]


def fp8_linear(x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """FP8 weights times activations that are quantized to FP8 per token on the fly.

    Args:
        x: (..., in_features) bf16, fp16 or fp32, any strides, any number of tokens from 0.
        weight: (out_features, in_features) float8_e4m3fn.
        weight_scale: (out_features, 1) bf16, fp16 or fp32.
        bias: (out_features,) floating, or None.

    Returns:
        (..., out_features) in the dtype of ``x``, contiguous.

    Raises:
        ValueError: shapes, dtypes or devices that do not belong together.
    """
    check_fp8_linear(x, weight, weight_scale, bias)
    return fp8_op(x, weight, weight_scale, bias)


def fp8_w8a16_linear(x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """FP8 weights, rounded to the dtype of ``x`` after scaling, times unquantized activations.

    Plain torch on every device. Arguments, result and errors are those of :func:`fp8_linear`.
    """
    check_fp8_linear(x, weight, weight_scale, bias)
    dequantized = (weight.float() * weight_scale.float()).to(x.dtype)
    return dense_linear(x, dequantized, None if bias is None else bias.to(x.dtype))


def fp8_ref(x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """Torch specification of :func:`fp8_linear`, any device."""
    x8, scale = quantize_fp8_ref(x)
    y = (x8.float() @ weight.float().t()) * scale * weight_scale.float().squeeze(1)
    return (y if bias is None else y + bias.float()).to(x.dtype)


def run_fp8(x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """Dispatch of :func:`fp8_linear` without checks."""
    out_features, in_features = weight.shape
    backend = linear_backend("fp8_linear", x.device)
    refusal = backend.reason if backend.name == "reference" else None
    if refusal is None and (in_features % SCALED_MM_MULTIPLE or out_features % SCALED_MM_MULTIPLE):
        refusal = (
            f"a ({out_features}, {in_features}) weight has a dimension that is no multiple of {SCALED_MM_MULTIPLE}"
        )
    if refusal is not None:
        log_fallback("fp8_linear", refusal)
        return fp8_ref(x, weight, weight_scale, bias)
    y_shape = (*x.shape[:-1], out_features)
    if x.numel() == 0:
        return x.new_empty(y_shape)
    x8, scale = quantize_fp8(x.reshape(-1, in_features))
    return scaled_matmul(x8, scale, weight, weight_scale.float(), bias, x.dtype).view(y_shape)


def scaled_matmul(
    x8: Tensor, x_scale: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, out_dtype: torch.dtype
) -> Tensor:
    """x8: (tokens, in), x_scale: (tokens, 1), weight: (out, in), weight_scale: (out, 1) fp32 → (tokens, out)."""
    # _scaled_mm wants the right operand column-major, which is the transpose of a row-major weight.
    columns = weight.contiguous().t()
    if out_dtype == torch.bfloat16 and (bias is None or bias.dtype == torch.bfloat16):
        row_scale = weight_scale.t().contiguous()
        return _scaled_mm(x8, columns, scale_a=x_scale, scale_b=row_scale, bias=bias, out_dtype=out_dtype)
    one = torch.ones((), dtype=torch.float32, device=x8.device)
    y = _scaled_mm(x8, columns, scale_a=one, scale_b=one, out_dtype=torch.float32)
    y = y * x_scale * weight_scale.squeeze(1)
    return (y if bias is None else y + bias.float()).to(out_dtype)


@torch.library.custom_op("kompakt::fp8_linear", mutates_args=())
def fp8_op(x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None) -> Tensor:
    """Registered op behind :func:`fp8_linear`; opaque to torch.compile."""
    with launching_on(x):
        return run_fp8(x, weight, weight_scale, bias)


@fp8_op.register_fake
def _(x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def check_fp8_linear(x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None) -> None:
    """Raise ValueError unless the arguments form one FP8 linear layer."""
    if weight.dtype != torch.float8_e4m3fn:
        raise ValueError(f"weight has dtype {weight.dtype}; FP8 linear layers take torch.float8_e4m3fn")
    check_linear_operands(x, weight.shape[0], bias, weight=weight, weight_scale=weight_scale)
    if weight.dim() != 2 or weight.shape[1] != x.shape[-1]:
        raise ValueError(
            f"weight has shape {tuple(weight.shape)}; x of {x.shape[-1]} features needs (out, {x.shape[-1]})"
        )
    if tuple(weight_scale.shape) != (weight.shape[0], 1) or weight_scale.dtype not in FLOAT_DTYPES:
        raise ValueError(
            f"weight_scale has shape {tuple(weight_scale.shape)} and dtype {weight_scale.dtype}; expected"
            f" ({weight.shape[0]}, 1) in torch.bfloat16, float16 or float32"
        )
