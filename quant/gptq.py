"""GPTQ: round column by column and push each column's error into the columns not yet rounded.

Frantar et al., 2022. The mathematics, and where it departs from the paper, stand in `solver.py` and, for the moments,
`block.py`; this file is its options.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from pydantic import Field

from .block import Block
from .grid import storage_snap
from .method import QuantizedWeight, WeightMethod
from .solver import round_linears


@dataclass(frozen=True, kw_only=True)
class GPTQ(WeightMethod):
    """GPTQ INT4.

    dampening: share of mean diag(H) added to the diagonal; multiplied by 4 whenever the factorisation fails.
    activation_order: process columns by importance; group-aware, so it costs nothing at run time.
    search: search each group's scale by weighted error; otherwise the group's extreme lands on code −8.
    """

    dampening: Annotated[float, Field(gt=0, lt=1)] = 0.01
    activation_order: bool = True
    search: bool = True

    def quantize(self, block: Block) -> dict[str, QuantizedWeight]:
        """See `WeightMethod.quantize`."""
        return round_linears(
            block,
            "gptq",
            storage_snap(block.scale_dtype),
            dampening=self.dampening,
            activation_order=self.activation_order,
            search=self.search,
        )
