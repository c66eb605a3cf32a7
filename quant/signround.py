"""SignRound (AutoRound): signed gradient descent on the rounding of every weight, layer by layer.

The mathematics stand in `learning.py` (Cheng et al., 2023); this file is the method's options. Differences from
AutoRound:

- The start is GPTQ's solution, error feedback included, rather than the weights as they are with the full range.
- Each token's error is divided by the token's own energy.
- The last iterate is compared with the start on all samples, where AutoRound keeps the best mini-batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

from pydantic import Field

from .awq import fold_activation_scales
from .block import Block
from .grid import storage_snap
from .learning import learn_rounding
from .method import QuantizedWeight, WeightMethod
from .solver import Rounding, start_linears


@dataclass(frozen=True, kw_only=True)
class SignRound(WeightMethod):
    """SignRound INT4.

    steps: updates per decoder layer. samples_per_step: sequences whose gradients are added up in one update.
    learning_rate: first step of offsets and ranges; None is 1/steps. start: "gptq" or "rtn".
    channel_scaling: fold AWQ's channel scales first.
    """

    needs_reference: ClassVar[bool] = True
    steps: Annotated[int, Field(ge=1)] = 200
    samples_per_step: Annotated[int, Field(ge=1)] = 8
    learning_rate: Annotated[float, Field(gt=0)] | None = None
    start: Rounding = "gptq"
    channel_scaling: bool = False

    def quantize(self, block: Block) -> dict[str, QuantizedWeight]:
        """See `WeightMethod.quantize`."""
        snap = storage_snap(block.scale_dtype)
        if self.channel_scaling:
            fold_activation_scales(block, 10, snap, self.start)
        return learn_rounding(
            block,
            dict(start_linears(block, self.start, snap)),
            snap,
            steps=self.steps,
            samples_per_step=self.samples_per_step,
            learning_rate=self.learning_rate or 1 / self.steps,
        )
