"""FireQ: INT4 weights under FP8 scales, with channel-wise scaling folded into the model.

Scales are e4m3 numbers under one power of two per decoder layer: σ = e4m3(s·p)/p, p = 2^k, so that a kernel may keep
them in FP8; both fit a bf16 exactly, so the stored checkpoint is an ordinary INT4 one. Channel-wise scaling multiplies
input channel j by s_j = mean|x_j|^a · mean_i|W_ij|^−b and folds 1/s_j upstream: into the norm, from o into v, from down
into up. The paper (arXiv 2505.20839) uses a = 0, b = 1 with hand-set constants and rounds to nearest; here (a, b) is
chosen per fold from calibration data by output error (`folding.py`), and rounding is GPTQ by default.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from pydantic import Field

from .block import Block, Fold
from .folding import choose_fold, consumer_mean, normalised
from .grid import E4M3_MAX, Snap, grouped, signed_scale
from .learning import learn_rounding
from .method import QuantizedWeight, WeightMethod
from .solver import Rounding, round_linears, start_linears

MAX_EXPONENT = 14
E4M3_TINY = 2.0**-9
CANDIDATES = tuple((a, b) for a in (0.0, 0.2, 0.4, 0.6) for b in (0.0, 0.3, 0.6, 1.0))


@dataclass(frozen=True, kw_only=True)
class FireQ(WeightMethod):
    """FireQ INT4.

    rounding: "gptq", "rtn" or "learned" (`learning.py`, from GPTQ's solution). steps: updates per layer if learned.
    channel_scaling: fold channel scales chosen on calibration data.
    """

    rounding: Rounding | Literal["learned"] = "gptq"
    steps: Annotated[int, Field(ge=1)] = 200
    channel_scaling: bool = True

    @property
    def needs_reference(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Only learned rounding looks at the float model's outputs."""
        return self.rounding == "learned"

    def quantize(self, block: Block) -> dict[str, QuantizedWeight]:
        """See `WeightMethod.quantize`. The exponents k are kept in `block.tensors`."""
        exponent = block_exponent(block)
        if self.channel_scaling:
            snap = e4m3_snap(exponent)
            rounding = "rtn" if self.rounding == "rtn" else "gptq"
            for fold in block.folds:
                choose_fold(block, fold, CANDIDATES, channel_scale(block, fold), snap, rounding)
            exponent = block_exponent(block)
        block.tensors["scale_exponent"] = torch.tensor(exponent, dtype=torch.int32)
        snap = e4m3_snap(exponent)
        if self.rounding != "learned":
            return round_linears(block, self.rounding, snap)
        start = dict(start_linears(block, "gptq", snap))
        return learn_rounding(block, start, snap, steps=self.steps, samples_per_step=8, learning_rate=1 / self.steps)


def channel_scale(block: Block, fold: Fold):
    """The rule (a, b) → (size,) scale mean|x|^a · mean|W|^−b of a fold."""
    activation = consumer_mean(fold, block.statistics[fold.consumers[0]].abs_mean).clamp_min(1e-6)
    weights = torch.stack([block.weight(name).abs().mean(0) for name in fold.consumers]).mean(0)
    magnitude = consumer_mean(fold, weights).clamp_min(1e-8)
    return lambda powers: normalised(activation ** powers[0] * magnitude ** -powers[1])


def block_exponent(block: Block) -> int:
    """`tensor_exponent` of all weights of a block, folds applied."""
    return min(tensor_exponent([block.weight(name)], block.group_size(name)) for name in block.linears)


def tensor_exponent(weights: Iterable[torch.Tensor], group_size: int | None) -> int:
    """Largest k in [0, 14] such that no group scale times 2^k exceeds half the e4m3 range.

    Half, because error feedback may grow a group before its scale is taken. weights: (out, in) float32 each.
    """
    largest = float(torch.stack([signed_scale(grouped(weight, group_size)).abs().max() for weight in weights]).max())
    exponent = MAX_EXPONENT
    while exponent > 0 and largest * 2.0**exponent > E4M3_MAX / 2:
        exponent -= 1
    return exponent


def e4m3_snap(exponent: int) -> Snap:
    """Rounds a float32 scale to e4m3(scale·2^k)/2^k, never to zero."""
    power = 2.0**exponent

    def snap(scale: torch.Tensor) -> torch.Tensor:
        scaled = (scale * power).clamp(-E4M3_MAX, E4M3_MAX)
        rounded = scaled.to(torch.float8_e4m3fn).float()
        return torch.where(rounded == 0, torch.copysign(torch.full_like(scaled, E4M3_TINY), scaled), rounded) / power

    return snap
