"""Rotary position embedding of queries and keys in halves, as Llama, Qwen and Mistral have it.

For both, with x = (x1, x2) the two halves of a head and likewise for cos and sin::

    y1 = x1 · cos1 − x2 · sin1
    y2 = x2 · cos2 + x1 · sin2

Products and sums are each rounded to the dtype, so that the result is transformers' own bit for bit.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .activations import FLOAT_DTYPES, launching_on, log_fallback, triton_refusal

ROTARY_CAPABILITY = (8, 0)


def apply_rotary(
    query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, *, interpret: bool = False
) -> tuple[Tensor, Tensor]:
    """Rotates queries and keys, without gradients.

    Args:
        query: (batch, num_heads, tokens, head_dim) bf16, fp16 or fp32, any strides.
        key: (batch, num_kv_heads, tokens, head_dim) of the same dtype.
        cos, sin: (batch or 1, tokens, head_dim) of the same dtype.
        interpret: run the kernel in Triton's interpreter, on CPU tensors.

    Returns:
        Both rotated, dense, dimensions in memory in the order that the argument has.

    Raises:
        ValueError: unsupported dtypes or shapes.
    """
    reason = rotary_refusal(query, key, cos, sin)
    if reason is not None:
        raise ValueError(reason)
    refusal = None if interpret else triton_refusal(query.device, ROTARY_CAPABILITY)
    if refusal is None and any(tensor.stride(-1) != 1 for tensor in (query, key, cos, sin)):
        refusal = "the values of a head are not adjacent"
    if refusal is not None:
        log_fallback("apply_rotary", refusal)
        return apply_rotary_ref(query, key, cos, sin)
    from .rotary_triton import rotate

    with launching_on(query):
        return rotate(query, key, cos, sin, interpret=interpret)


def rotary_refusal(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> str | None:
    """Why `apply_rotary` does not take these tensors; None if it does."""
    tensors = {"query": query, "key": key, "cos": cos, "sin": sin}
    if query.dtype not in FLOAT_DTYPES or any(tensor.dtype != query.dtype for tensor in tensors.values()):
        found = ", ".join(f"{name} {tensor.dtype}" for name, tensor in tensors.items())
        return f"dtypes are {found}; expected one of torch.bfloat16, torch.float16 or torch.float32"
    if any(tensor.device != query.device for tensor in tensors.values()):
        return f"devices are {', '.join(str(tensor.device) for tensor in tensors.values())}; expected one"
    shapes = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in tensors.items())
    expected = "(batch, heads, tokens, head_dim) twice and (batch or 1, tokens, head_dim) twice, head_dim even"
    if query.ndim != 4 or key.ndim != 4 or query.shape[::2] != key.shape[::2] or query.shape[3] != key.shape[3]:
        return f"shapes are {shapes}; expected {expected}"
    batch, _, tokens, head_dim = query.shape
    if (
        head_dim == 0
        or head_dim % 2
        or any(part.shape not in ((batch, tokens, head_dim), (1, tokens, head_dim)) for part in (cos, sin))
    ):
        return f"shapes are {shapes}; expected {expected}"
    return None


def apply_rotary_ref(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Torch specification of `apply_rotary`, any device."""
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)

    def rotated(x: Tensor) -> Tensor:
        first, second = x.chunk(2, dim=-1)
        return x * cos + torch.cat((-second, first), dim=-1) * sin

    return rotated(query), rotated(key)
