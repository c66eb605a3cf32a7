"""KV cache in INT4, one dynamic scale per token and KV head, channels evened out by static factors.

A few channels of keys are large in every token, above all where keys have a bias, and would take the scale of a token
to themselves. With a_c the largest magnitude of channel c of a KV head on calibration text, keys and values are divided
by

    f_c = a_c^alpha / (geometric mean over the head of a^alpha)

before they are coded, and multiplied again by the reader: q·(f ∘ k̂) = (q ∘ f)·k̂, so for keys the queries take the
factors, and for values the output. alpha 0 is no factor, 1 makes all channels equally large. Keys are cached after
RoPE, so that the two channels of a rotated pair need not share a factor as they must where factors are folded into
weights.

For head_dim 128 a token takes 68 bytes per KV head and for keys or values each: 4.25 bits per element. Sources:
SmoothAttention of QServe (arXiv 2405.04532), which folds factors of key pairs into the weights; per-channel keys of
KIVI (2402.02750).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from ..kernels.kv_codes import Kind
from .method import KVCacheMethod

ALPHA = 0.5


@dataclass(frozen=True, kw_only=True)
class KVINT4(KVCacheMethod):
    """INT4 codes of past keys and values. channel_scales: calibrate factors per channel. alpha: see the module."""

    kind: ClassVar[Kind] = "int4"

    channel_scales: bool = True
    alpha: Annotated[float, Field(gt=0, le=1)] = ALPHA

    def __post_init__(self) -> None:
        """ValueError for an option that nothing would read."""
        if not self.channel_scales and self.alpha != ALPHA:
            raise ValueError(f"alpha {self.alpha} has no effect with channel_scales false")

    @property
    def needs_data(self) -> bool:
        """Channel factors are those of calibration text."""
        return self.channel_scales

    def factors(self, key: Tensor, value: Tensor) -> dict[str, Tensor]:
        """See `KVCacheMethod.factors`."""
        return {"key_factors": channel_factors(key, self.alpha), "value_factors": channel_factors(value, self.alpha)}


def channel_factors(x: Tensor, alpha: float) -> Tensor:
    """(num_kv_heads, head_dim) fp32, positive. x: (batch, num_kv_heads, tokens, head_dim).

    A channel that is zero on all of the text counts as the smallest that is not. ValueError for NaN or infinite values.
    """
    amax = x.abs().amax(dim=(0, 2)).float()
    if not bool(amax.isfinite().all()):
        raise ValueError("keys or values are NaN or infinite on the calibration text; the model is damaged")
    least = torch.where(amax == 0, torch.inf, amax).amin(dim=-1, keepdim=True)
    amax = torch.maximum(amax, least.masked_fill(least.isinf(), 1.0))
    logs = alpha * amax.log()
    return (logs - logs.mean(dim=-1, keepdim=True)).exp()
