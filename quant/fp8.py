"""FP8 weights: e4m3, one scale per output channel, s = amax/448. The safe first step below 16 bits; needs no data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from .block import Block
from .grid import E4M3_MAX
from .method import QuantizedWeight, WeightMethod


@dataclass(frozen=True, kw_only=True)
class FP8(WeightMethod):
    """FP8 e4m3 weights per output channel; `group_size` must stay "channel"."""

    storage: ClassVar[Literal["int4", "fp8"]] = "fp8"
    needs_data: ClassVar[bool] = False
    group_size: Literal["channel"] = "channel"

    def __post_init__(self) -> None:
        if self.overrides:
            raise ValueError("overrides need a method that rounds to int4; fp8 stores every Linear in 8 bits")

    def quantize(self, block: Block) -> dict[str, QuantizedWeight]:
        """See `WeightMethod.quantize`."""
        return {name: round_fp8(block.weight(name), block.scale_dtype) for name in block.linears}


def round_fp8(weight: torch.Tensor, scale_dtype: torch.dtype) -> QuantizedWeight:
    """A weight, (out, in) float32, to the nearest e4m3 numbers under one scale per output channel."""
    amax = weight.abs().amax(1, keepdim=True)
    scale = torch.where(amax == 0, torch.ones_like(amax), amax / E4M3_MAX).to(scale_dtype)
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    codes = (weight / scale.float()).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)
    return QuantizedWeight(codes, scale)
