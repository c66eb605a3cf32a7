"""AWQ: scale up the input channels that matter before rounding, and fold the inverse into what produces them.

Channels are scaled by s_j = (mean|x_j|)^r (Lin et al., 2023) with r from a small grid, chosen per fold by output error
(`folding.py`). Instead of AWQ's clipping search, group scales are searched with E[x_j²] as weight.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from pydantic import Field

from .block import Block
from .folding import choose_fold, consumer_mean, normalised
from .grid import Snap, storage_snap
from .method import QuantizedWeight, WeightMethod
from .solver import Rounding, round_linears


@dataclass(frozen=True, kw_only=True)
class AWQ(WeightMethod):
    """AWQ INT4. steps: ratios tried in [0, 1). rounding: what rounds the scaled weights, "rtn" or "gptq"."""

    steps: Annotated[int, Field(ge=1, le=100)] = 20
    rounding: Rounding = "rtn"

    def quantize(self, block: Block) -> dict[str, QuantizedWeight]:
        """See `WeightMethod.quantize`."""
        snap = storage_snap(block.scale_dtype)
        fold_activation_scales(block, self.steps, snap, self.rounding)
        return round_linears(block, self.rounding, snap)


def fold_activation_scales(block: Block, steps: int, snap: Snap, rounding: Rounding) -> None:
    """Folds (mean|x_j|)^r into every fold of the block, r chosen among `steps` values in [0, 1)."""
    ratios = [step / steps for step in range(steps)]
    for fold in block.folds:
        magnitude = consumer_mean(fold, block.statistics[fold.consumers[0]].abs_mean).clamp_min(1e-6)
        rule = lambda ratio, magnitude=magnitude: normalised(magnitude**ratio)  # noqa: E731
        choose_fold(block, fold, ratios, rule, snap, rounding)
