"""Keys and values of a cache as codes: one scale per token and KV head.

::

    fp8    e4m3(x / σ),  σ = max|x| / 448
    int4   round(x / σ) in [−7, 7],  σ = max|x| / 7; sign and magnitude, 1 + 3 bits

Channels c and c + head_dim/2 share a byte, c in the low half: a reader gets the two halves of a head side by side
without shuffling, and a sign and a magnitude are placed into a float's bits without arithmetic. Scales are FP32, so
that no magnitude of keys or values over- or underflows them. A token that holds NaN or infinity gets the scale NaN and
comes back as NaN. No token's codes depend on another token, so that a cache may code tokens in any portions.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from .attention_quant import LEVELS, round_codes, scale_of

Kind = Literal["fp8", "int4"]
KINDS: tuple[Kind, ...] = ("fp8", "int4")
CODE_DTYPES = {"fp8": torch.float8_e4m3fn, "int4": torch.uint8}


def code_width(head_dim: int, kind: Kind) -> int:
    """Elements of storage per token and head. ValueError for a kind that is unknown or cannot store such heads."""
    if kind not in KINDS:
        raise ValueError(f"unknown kind of codes {kind!r}; known: {', '.join(KINDS)}")
    if kind == "int4" and head_dim % 2:
        raise ValueError(f"head_dim {head_dim} is odd, and int4 keeps two channels in a byte; use fp8")
    return head_dim // 2 if kind == "int4" else head_dim


def quantize_tokens(x: Tensor, kind: Kind) -> tuple[Tensor, Tensor]:
    """Torch specification, any device.

    Args:
        x: (..., tokens, head_dim) floating, any strides.
        kind: "fp8" or "int4".

    Returns:
        codes: (..., tokens, code_width) float8_e4m3fn, or uint8 for int4.
        scale: (..., tokens) fp32.
    """
    code_width(x.shape[-1], kind)
    values = x.float()
    scale = scale_of(values.abs().amax(dim=-1), LEVELS[kind])
    codes = round_codes(values, scale[..., None], kind)
    if kind == "fp8":
        return codes, scale
    nibbles = (codes.abs() | ((codes < 0).to(torch.int8) << 3)).to(torch.uint8)
    low, high = nibbles.chunk(2, dim=-1)
    return low | (high << 4), scale


def dequantize_tokens(codes: Tensor, scale: Tensor, kind: Kind) -> Tensor:
    """(..., tokens, head_dim) fp32. codes, scale: as `quantize_tokens` returns them."""
    if kind == "fp8":
        return codes.float() * scale[..., None]
    nibbles = torch.cat((codes & 15, codes >> 4), dim=-1)
    magnitude = (nibbles & 7).float()
    return torch.where(nibbles >= 8, -magnitude, magnitude) * scale[..., None]
