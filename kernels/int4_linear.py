"""INT4 weights in the compressed-tensors layout, and linear layers of them with unquantized activations (W4A16).

With codes q in [-8, 7], a scale σ per output row and group g of consecutive inputs, and activations x::

    y = Σ_k x_k · q_k · σ + bias

Sums are FP32; the kernel adds the bias in FP32, the other ways in the dtype of x, which is that of y. Scales may be
negative. 4 bits save bytes, never multiplications. The layout on disk is the one the kernels read: nothing is repacked
at load, and nothing has to be undone to save.

The reference is one ``F.linear`` in the dtype of x over ŵ = q·σ rounded to that dtype, as a dequantized layer would
run; the kernel multiplies by q and scales sums in FP32, which is more exact. It needs a group size that is a multiple
of 32, or one group per row; from `EXPAND_TOKENS` tokens the weights are expanded, half of the outputs at a time, and
multiplied by the library's product. Whatever these do not take runs through the reference, with one logged reason.
Inference only: no gradient is registered.
"""

import functools
import importlib.util
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from .activations import (
    FLOAT_DTYPES,
    FP8_CAPABILITY,
    check_activations,
    cuda_refusal,
    launching_on,
    log_fallback,
    triton_refusal,
)
from .dense_linear import dense_linear
from .int4_expand import expand_16bit
from .packing import packed_width, unpack_int4

TRITON_OPS = {
    "quantize_fp8_per_token": FP8_CAPABILITY,
    # Triton has no e4m3fn below 8.9, neither as an operand nor as a conversion.
    "w4a8_linear": FP8_CAPABILITY,
    "w4a16_linear": (8, 0),
}
SCALED_MM_OPS = {"fp8_linear": FP8_CAPABILITY}
HOPPER = (9, 0)
EXPAND_TOKENS = 192
"""Tokens from which W4A16 expands its weights. µs on an H200 for 14336×4096 with groups of 128: kernel 64 and expanded
84 at 128 tokens, 129 and 90 at 256."""


@functools.cache
def hopper_refusal(device: torch.device) -> str | None:
    """Why the kernels for compute capability 9.0 cannot run on ``device``; None if they can."""
    refusal = triton_refusal(device, HOPPER)
    if refusal is None and torch.cuda.get_device_capability(device) >= (10, 0):
        refusal = "the kernel needs the matrix instructions of compute capability 9.0"
    if refusal is None and importlib.util.find_spec("triton.experimental.gluon") is None:
        refusal = "this Triton has no Gluon"
    return refusal


@dataclass(frozen=True)
class Backend:
    """What an op runs on for some device, and why."""

    name: Literal["gluon", "triton", "scaled_mm", "reference"]
    reason: str


def linear_backend(op: str, device: torch.device | str, *, interpret: bool = False) -> Backend:
    """Choose the backend of ``op`` on ``device``.

    Args:
        op: a key of :func:`available_backends`.
        device: such as ``"cuda:0"`` or ``"cpu"``.
        interpret: the caller runs under Triton's interpreter (TRITON_INTERPRET=1) and wants the kernel on CPU tensors.

    Raises:
        ValueError: unknown op.
    """
    if op == "w4a8_linear" and not interpret and hopper_refusal(torch.device(device)) is None:
        return Backend("gluon", "compute capability is 9.0; many tokens go through weights expanded to FP8")
    if op in TRITON_OPS:
        name, capability = "triton", TRITON_OPS[op]
        refusal = None if interpret else triton_refusal(torch.device(device), capability)
    elif op in SCALED_MM_OPS:
        name, capability = "scaled_mm", SCALED_MM_OPS[op]
        refusal = cuda_refusal(torch.device(device), capability)
    else:
        raise ValueError(f"unknown op {op!r}; known: {', '.join([*TRITON_OPS, *SCALED_MM_OPS])}")
    if refusal is not None:
        return Backend("reference", refusal)
    if interpret:
        return Backend(name, "Triton's interpreter was asked for")
    return Backend(name, f"compute capability is at least {capability[0]}.{capability[1]}")


def available_backends(device: torch.device | str) -> dict[str, Backend]:
    """Backend and reason of every linear op on ``device``; shapes may still send a call to the reference."""
    return {op: linear_backend(op, device) for op in (*TRITON_OPS, *SCALED_MM_OPS)}


def dequantize_int4(weight_packed: Tensor, weight_scale: Tensor, in_features: int, dtype: torch.dtype) -> Tensor:
    """Expand packed INT4 weights: q · σ in FP32, rounded once to ``dtype``.

    Args:
        weight_packed: (out_features, ceil(in_features / 8)) int32.
        weight_scale: (out_features, groups) bf16, fp16 or fp32; groups = 1 is one scale per output channel.
        in_features: a multiple of groups.
        dtype: of the result.

    Returns:
        (out_features, in_features) in ``dtype``. Exact in FP32 for bf16 and fp16 scales.

    Raises:
        ValueError: shapes or dtypes that do not belong together.
    """
    check_int4_weight(weight_packed, weight_scale, in_features)
    out_features, groups = weight_scale.shape
    weight = unpack_int4(weight_packed, in_features).float().view(out_features, groups, in_features // groups)
    return weight.mul_(weight_scale.float().unsqueeze(-1)).to(dtype).view(out_features, in_features)


def w4a16_linear(x: Tensor, weight_packed: Tensor, weight_scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """INT4 weights times unquantized activations.

    Args:
        x: (..., in_features) bf16, fp16 or fp32, any strides, any number of tokens from 0.
        weight_packed: (out_features, ceil(in_features / 8)) int32, compressed-tensors layout.
        weight_scale: (out_features, groups) bf16, fp16 or fp32, any sign; groups divides in_features.
        bias: (out_features,) floating, or None.

    Returns:
        (..., out_features) in the dtype of ``x``, contiguous.

    Raises:
        ValueError: shapes, dtypes or devices that do not belong together.
    """
    check_int4_linear(x, weight_packed, weight_scale, bias)
    return w4a16_op(x, weight_packed, weight_scale, bias)


def w4a16_ref(x: Tensor, weight_packed: Tensor, weight_scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """Torch specification of :func:`w4a16_linear`, any device."""
    weight = dequantize_int4(weight_packed, weight_scale, x.shape[-1], x.dtype)
    return dense_linear(x.contiguous(), weight, None if bias is None else bias.to(x.dtype))


def run_w4a16(
    x: Tensor, weight_packed: Tensor, weight_scale: Tensor, bias: Tensor | None = None, *, interpret: bool = False
) -> Tensor:
    """Dispatch of :func:`w4a16_linear` without checks."""
    if not kernel_takes("w4a16_linear", x, weight_scale, interpret=interpret):
        return w4a16_ref(x, weight_packed, weight_scale, bias)
    from .int4_linear_triton import int4_matmul

    rows = x.reshape(-1, x.shape[-1])
    if rows.shape[0] >= EXPAND_TOKENS and x.element_size() == 2 and not interpret:
        y = multiply_expanded(rows, weight_packed, weight_scale, bias)
    else:
        y = int4_matmul(rows, weight_packed, weight_scale, bias, x_scale=None, out_dtype=x.dtype, interpret=interpret)
    return y.view(*x.shape[:-1], weight_packed.shape[0])


def multiply_expanded(rows: Tensor, weight_packed: Tensor, weight_scale: Tensor, bias: Tensor | None) -> Tensor:
    """rows: (tokens, in_features) bf16 or fp16 → (tokens, out_features), over weights expanded half by half.

    The workspace is as large as the weight in FP8.
    """
    out_features = weight_packed.shape[0]
    y = rows.new_empty((rows.shape[0], out_features))
    half = -(-out_features // 16) * 8
    for part in (slice(0, half), slice(half, out_features)):
        weight = expand_16bit(weight_packed[part], weight_scale[part], rows.shape[1], rows.dtype).t()
        if bias is None:
            torch.mm(rows, weight, out=y[:, part])
        else:
            # A product that adds a bias into a part of y rounds twice; one with a result of its own rounds once.
            y[:, part] = torch.addmm(bias[part].to(rows.dtype), rows, weight)
    return y


def kernel_takes(op: str, x: Tensor, weight_scale: Tensor, *, interpret: bool) -> bool:
    """Whether the Triton kernel takes this call; if not, the reason is logged once."""
    backend = linear_backend(op, x.device, interpret=interpret)
    groups = weight_scale.shape[1]
    group_size = x.shape[-1] // groups
    if backend.name == "reference":
        log_fallback(op, backend.reason)
        return False
    if groups > 1 and group_size % 32:
        log_fallback(op, f"group size {group_size} is neither a multiple of 32 nor the whole row")
        return False
    return True


@torch.library.custom_op("kompakt::w4a16_linear", mutates_args=())
def w4a16_op(x: Tensor, weight_packed: Tensor, weight_scale: Tensor, bias: Tensor | None) -> Tensor:
    """Registered op behind :func:`w4a16_linear`; opaque to torch.compile."""
    with launching_on(x):
        return run_w4a16(x, weight_packed, weight_scale, bias)


@w4a16_op.register_fake
def _(x: Tensor, weight_packed: Tensor, weight_scale: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight_packed.shape[0]))


def check_int4_weight(weight_packed: Tensor, weight_scale: Tensor, in_features: int) -> None:
    """Raise ValueError unless weight and scale describe one (out_features, in_features) matrix."""
    if weight_packed.dtype != torch.int32:
        raise ValueError(f"weight_packed has dtype {weight_packed.dtype}; the pack-quantized layout uses torch.int32")
    if weight_packed.dim() != 2 or weight_packed.shape[1] != packed_width(in_features):
        raise ValueError(
            f"weight_packed has shape {tuple(weight_packed.shape)}; in_features={in_features} needs"
            f" (out_features, {packed_width(in_features)}), eight codes to a word"
        )
    if weight_scale.dtype not in FLOAT_DTYPES:
        raise ValueError(f"weight_scale has dtype {weight_scale.dtype}; use torch.bfloat16, float16 or float32")
    if weight_scale.dim() != 2 or weight_scale.shape[0] != weight_packed.shape[0] or weight_scale.shape[1] == 0:
        raise ValueError(
            f"weight_scale has shape {tuple(weight_scale.shape)}; expected ({weight_packed.shape[0]}, groups),"
            " with groups = 1 for one scale per output channel"
        )
    if in_features % weight_scale.shape[1]:
        raise ValueError(
            f"weight_scale has {weight_scale.shape[1]} groups, which does not divide in_features={in_features};"
            " every group must have the same whole size"
        )


def check_linear_operands(x: Tensor, out_features: int, bias: Tensor | None, **weights: Tensor) -> None:
    """Raise ValueError unless x, bias and the named weights fit one linear layer on one device."""
    check_activations(x)
    check_same_layer(x.device, out_features, bias, **weights)


def check_same_layer(device: torch.device, out_features: int, bias: Tensor | None, **weights: Tensor) -> None:
    """Raise ValueError unless bias and the named weights fit one linear layer on ``device``."""
    if bias is not None and (tuple(bias.shape) != (out_features,) or not bias.dtype.is_floating_point):
        raise ValueError(
            f"bias has shape {tuple(bias.shape)} and dtype {bias.dtype}; expected ({out_features},) floating, or None"
        )
    for name, tensor in (*weights.items(), *([] if bias is None else [("bias", bias)])):
        if tensor.device != device:
            raise ValueError(f"{name} is on {tensor.device}, x on {device}; a linear layer lives on one device")


def check_int4_linear(x: Tensor, weight_packed: Tensor, weight_scale: Tensor, bias: Tensor | None) -> None:
    """Raise ValueError unless the arguments form one INT4 linear layer."""
    check_linear_operands(x, weight_packed.shape[0], bias, weight_packed=weight_packed, weight_scale=weight_scale)
    check_int4_weight(weight_packed, weight_scale, x.shape[-1])
