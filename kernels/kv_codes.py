"""Keys and values of a cache as codes, each token of each KV head on its own.

::

    fp8    e4m3(x / σ),  σ = max|x| / 448                                  σ in FP32
    int4   round((x − μ) / σ) in [0, 15],  σ = (max x − μ) / 15,  μ = min x    σ and μ in bf16
    bf16   x

μ is rounded down to bf16 and σ up, so that no value leaves the range. No token's codes depend on another token: a cache
may code tokens in any portions. A token that holds NaN or infinity has parameters NaN and codes 0, and comes back as
NaN; a reader that masks it sees zeros times nothing. Differences within a token below 15 · `MIN_SCALE` are lost.

Keys may be mapped before they are coded (`KeyMap`): a vector taken off, channels divided by factors, and the channels
of a block mixed by Hadamard's matrix. A reader does the same to the queries instead: with k̂ = (y·H) ∘ f + m,

    q·k̂ = ((q ∘ f)·H)·y + q·m

so that the map costs nothing per token.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from .activations import E4M3_MAX
from .attention_quant import BLOCK

Kind = Literal["fp8", "int4", "bf16"]
KINDS: tuple[Kind, ...] = ("fp8", "int4", "bf16")
MIN_SCALE = 2.0**-60
LEVELS = 15


def check_kind(kind: str, head_dim: int) -> None:
    """ValueError for a kind that is unknown or cannot store such heads."""
    if kind not in KINDS:
        raise ValueError(f"unknown kind of codes {kind!r}; known: {', '.join(KINDS)}")
    if kind == "int4" and head_dim % 2:
        raise ValueError(f"head_dim {head_dim} is odd, and int4 keeps two channels in a byte; use fp8")


def quantize_tokens(x: Tensor, kind: Kind) -> tuple[Tensor, Tensor]:
    """Torch specification, any device.

    Args:
        x: (..., tokens, head_dim) floating, any strides.
        kind: "fp8", "int4" or "bf16".

    Returns:
        codes: (..., tokens, head_dim) float8_e4m3fn, uint8 for int4, one code in each, or bf16.
        parameters: (..., tokens, n): σ fp32; σ and μ bf16 for int4; none for bf16.
    """
    check_kind(kind, x.shape[-1])
    values = x.float()

    def divided(numbers: Tensor, by: float) -> Tensor:
        # On CUDA torch divides by a Python number through its reciprocal, which may be off by one rounding.
        return numbers / torch.full_like(numbers, by)

    if kind == "bf16":
        return x.to(torch.bfloat16), values.new_empty((*x.shape[:-1], 0))
    if kind == "fp8":
        scale = divided(values.abs().amax(dim=-1), E4M3_MAX).clamp_min(MIN_SCALE)
        scale = torch.where(scale.isfinite(), scale, torch.nan)[..., None]
        codes = (values * scale.reciprocal()).clamp(-E4M3_MAX, E4M3_MAX)
        return torch.where(scale.isnan(), 0.0, codes).to(torch.float8_e4m3fn), scale
    low = outwards(values.amin(dim=-1), down=True)
    scale = outwards(divided(values.amax(dim=-1) - low, LEVELS).clamp_min(MIN_SCALE), down=False)
    damaged = ~(scale.isfinite() & low.isfinite())
    scale, low = (torch.where(damaged, torch.nan, part)[..., None] for part in (scale, low))
    codes = ((values - low) * scale.reciprocal()).round().clamp(0, LEVELS)
    codes = torch.where(damaged[..., None], 0.0, codes).to(torch.uint8)
    return codes, torch.cat((scale, low), dim=-1).to(torch.bfloat16)


def outwards(x: Tensor, *, down: bool) -> Tensor:
    """FP32 rounded to the next bf16 below, or above; still FP32."""
    cut = (x.view(torch.int32) & -65536).view(torch.float32)
    beyond = cut > x if down else cut < x
    # Cutting moves towards zero; one step of the last place away from it reaches the other neighbour.
    return torch.where(beyond, (cut.view(torch.int32) + 65536).view(torch.float32), cut)


def dequantize_tokens(codes: Tensor, parameters: Tensor, kind: Kind) -> Tensor:
    """(..., tokens, head_dim) fp32. codes, parameters: as `quantize_tokens` returns them."""
    if kind == "bf16":
        return codes.float()
    scale = parameters[..., :1].float()
    return codes.float() * scale if kind == "fp8" else codes.float() * scale + parameters[..., 1:].float()


@dataclass(frozen=True)
class KeyMap:
    """What is done to the keys of a layer before they are coded, the same for every token.

    mean: (num_kv_heads, head_dim) fp32, taken off; None for nothing. factors: (num_kv_heads, head_dim) fp32, positive,
    divide what is left; None for ones. rotated: whether channels are then mixed, block by block of `rotation_block`.
    """

    mean: Tensor | None = None
    factors: Tensor | None = None
    rotated: bool = False

    def encode(self, key: Tensor) -> Tensor:
        """(..., num_kv_heads, tokens, head_dim) floating → fp32, as it is coded."""
        y = key.float()
        if self.mean is not None:
            y = y - self.mean[:, None]
        if self.factors is not None:
            y = y / self.factors[:, None]
        return rotate_channels(y) if self.rotated else y

    def decode(self, y: Tensor) -> Tensor:
        """The inverse of `encode`."""
        key = rotate_channels(y) if self.rotated else y
        if self.factors is not None:
            key = key * self.factors[:, None]
        return key if self.mean is None else key + self.mean[:, None]

    def to(self, device: torch.device) -> KeyMap:
        """On another device."""
        move = [None if tensor is None else tensor.to(device) for tensor in (self.mean, self.factors)]
        return KeyMap(*move, rotated=self.rotated)

    def check(self, heads: int, head_dim: int) -> None:
        """ValueError unless it is of such keys."""
        for tensor in (self.mean, self.factors):
            if tensor is not None and tuple(tensor.shape) != (heads, head_dim):
                raise ValueError(
                    f"the cache was calibrated for {' KV heads of '.join(map(str, tensor.shape))} channels, and "
                    f"{heads} of {head_dim} come; it belongs to another model"
                )


def rotation_block(head_dim: int) -> int:
    """Channels that are mixed with one another: a power of two that divides head_dim, `BLOCK` at most."""
    return math.gcd(head_dim, BLOCK)


def rotate_channels(x: Tensor) -> Tensor:
    """(..., head_dim) fp32 times the orthogonal, symmetric matrix of Hadamard in blocks; its own inverse."""
    block = rotation_block(x.shape[-1])
    step = 1
    # Sums and differences of channels that differ in one bit, in an order that a kernel can keep to.
    while step < block:
        left, right = x.unflatten(-1, (-1, 2, step)).unbind(-2)
        x = torch.stack((left + right, left - right), dim=-2).flatten(-3)
        step *= 2
    return x * block**-0.5


def rounded(x: Tensor, kind: Kind, key_map: KeyMap | None = None) -> Tensor:
    """What comes back of tokens that were coded, fp32. key_map: for keys, of their layer."""
    y = x if key_map is None else key_map.encode(x)
    y = dequantize_tokens(*quantize_tokens(y, kind), kind)
    return y if key_map is None else key_map.decode(y)
