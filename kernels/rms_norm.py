"""RMS norm of rows, in the rounding order of one of the three forms that transformers' models have.

For every row x of K values, in FP32 up to the first rounding; "→" rounds to the dtype of x::

    n = x · rsqrt(mean(x²) + eps)
    y = weight · (→ n)             "rounded": Llama, Qwen, Mistral; of the dtype that weight and x promote to
    y = → (weight · n)             "unrounded": OLMo 2, gpt-oss
    y = → ((1 + weight) · n)       "plus_one": Gemma

Kernel and reference sum x² in different orders; everything else is the same operation on the same numbers.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from .activations import FLOAT_DTYPES, launching_on, log_fallback, triton_refusal

NormForm = Literal["rounded", "unrounded", "plus_one"]
NORM_FORMS: tuple[NormForm, ...] = get_args(NormForm)
NORM_CAPABILITY = (8, 0)
MAX_NORM_ROW = 16384


def rms_norm(x: Tensor, weight: Tensor, *, eps: float, form: NormForm = "rounded", interpret: bool = False) -> Tensor:
    """Normalizes each row of the last dimension, without gradients.

    Args:
        x: (..., K) bf16, fp16 or fp32, any strides, any number of rows from 0.
        weight: (K,) bf16, fp16 or fp32.
        interpret: run the kernel in Triton's interpreter, on CPU tensors.

    Returns:
        (..., K), contiguous from the kernel.

    Raises:
        ValueError: unsupported dtype, shape or form.
    """
    reason = rms_norm_refusal(x, weight)
    if reason is not None:
        raise ValueError(reason)
    if form not in NORM_FORMS:
        raise ValueError(f"form is {form!r}; forms are {', '.join(NORM_FORMS)}")
    refusal = None if interpret else triton_refusal(x.device, NORM_CAPABILITY)
    if refusal is None and x.shape[-1] > MAX_NORM_ROW:
        refusal = f"rows of {x.shape[-1]} values exceed the kernel's {MAX_NORM_ROW}"
    if refusal is not None:
        log_fallback("rms_norm", refusal)
        return rms_norm_ref(x, weight, eps=eps, form=form)
    from .rms_norm_triton import norm_rows

    with launching_on(x):
        dtype = result_dtype(x, weight, form)
        rows = norm_rows(x.reshape(-1, x.shape[-1]), weight.contiguous(), dtype, eps, form, interpret=interpret)
    return rows.view(x.shape)


def rms_norm_refusal(x: Tensor, weight: Tensor) -> str | None:
    """Why `rms_norm` does not take these tensors; None if it does."""
    for name, tensor in (("x", x), ("weight", weight)):
        if tensor.dtype not in FLOAT_DTYPES:
            return f"{name} has dtype {tensor.dtype}; it must be torch.bfloat16, torch.float16 or torch.float32"
    if x.ndim == 0 or x.shape[-1] == 0 or weight.shape != x.shape[-1:]:
        return f"x has shape {tuple(x.shape)} and weight {tuple(weight.shape)}; expected (..., K) and (K,) with K ≥ 1"
    if x.device != weight.device:
        return f"x is on {x.device} and weight on {weight.device}; expected one device"
    return None


def result_dtype(x: Tensor, weight: Tensor, form: NormForm) -> torch.dtype:
    """Of what `rms_norm` gives."""
    return torch.promote_types(x.dtype, weight.dtype) if form == "rounded" else x.dtype


def rms_norm_ref(x: Tensor, weight: Tensor, *, eps: float, form: NormForm = "rounded") -> Tensor:
    """Torch specification of `rms_norm`, any device."""
    values = x.float()
    values = values * torch.rsqrt(values.pow(2).mean(-1, keepdim=True) + eps)
    if form == "rounded":
        return weight * values.to(x.dtype)
    factor = weight.float() if form == "unrounded" else 1.0 + weight.float()
    return (values * factor).to(x.dtype)
