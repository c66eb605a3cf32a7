"""Round to nearest: the baseline every other method must beat. No calibration data is used.

`scale` chooses the grid: "signed" puts each group's extreme on code −8, "amax" is the textbook amax/7, "mse" searches
the scale with the least squared error of the weights themselves.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from .block import Block
from .grid import amax_scale, grouped, round_codes, rounded_scale, search_scale, signed_scale, storage_snap
from .method import QuantizedWeight, WeightMethod


@dataclass(frozen=True, kw_only=True)
class RTN(WeightMethod):
    """Round-to-nearest INT4. scale: "mse" (default), "signed" or "amax"."""

    needs_data: ClassVar[bool] = False
    scale: Literal["mse", "signed", "amax"] = "mse"

    def quantize(self, block: Block) -> dict[str, QuantizedWeight]:
        """See `WeightMethod.quantize`."""
        return {
            name: self.round(block.weight(name), block.group_size(name), block.scale_dtype) for name in block.linears
        }

    def round(self, weight: torch.Tensor, group_size: int | None, scale_dtype: torch.dtype) -> QuantizedWeight:
        """weight: (out, in) float32."""
        groups, snap = grouped(weight, group_size), storage_snap(scale_dtype)
        if self.scale == "mse":
            scale = search_scale(groups, torch.ones((), device=weight.device), snap)
        else:
            scale = rounded_scale((signed_scale if self.scale == "signed" else amax_scale)(groups), snap)
        codes = round_codes(groups, scale)
        return QuantizedWeight(codes.view_as(weight).to(torch.int8), scale.to(scale_dtype))
