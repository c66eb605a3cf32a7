"""SageAttention: prefill in INT8 or FP8, the arithmetic chosen layer by layer by what it does to the layer's output
(`output_error.py`).

"auto" takes the first of `CANDIDATES` whose cosine reaches `min_cosine`; where none does, the layer stays dense. Modes
that are slower than dense attention run only where a recipe names them: INT4 keys, and values in 16 bit, whose kernel
takes 1.3 times as long as cuDNN's on an H200 (8,192 tokens, heads of 128). The papers pick between two modes by a
cosine of 0.998 on random inputs or video; here on the recipe's text.

Source: SageAttention (arXiv 2410.02367), SageAttention2 (2411.10958).
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from ..kernels.attention import Mode, prefill_attention
from .method import AttentionInputs, AttentionMethod, AttentionPolicy, Figures
from .output_error import difference_sums, exact_output, figures, rows

CANDIDATES: tuple[Mode, ...] = ("int8_fp8", "fp8_fp8")
"""Modes that "auto" picks from. INT8 logits are several times as exact as FP8 ones, except where few tokens are far
larger than the others of their tile; at 8,192 tokens on an H200 they take 16 % longer with heads of 64 and 10 % with
heads of 128, at 131,072 10 % and 2 %."""
MIN_COSINE = 0.998
MIN_TOKENS = 8192
"""Queries of a call from which quantized attention is used. Times as fast as what transformers runs on an H200, causal,
32 heads over 8, INT8 keys, heads of 64 and of 128: 0.90 and 1.03 at 4,096 tokens, 0.99 and 1.16 at 8,192, 1.09 and 1.28
at 32,768.
"""


@dataclass(frozen=True, kw_only=True)
class Sage(AttentionMethod):
    """SageAttention.

    mode: "auto" judges every layer on calibration text; a mode's name puts every layer into it, unjudged. min_cosine:
    what "auto" asks of a mode. min_tokens: calls of fewer queries run dense.
    """

    mode: Literal["auto", "bf16", "int8_fp16", "int8_fp8", "fp8_fp8", "int4_fp8"] = "auto"
    min_cosine: Annotated[float, Field(gt=0, le=1)] = MIN_COSINE
    min_tokens: Annotated[int, Field(ge=1)] = MIN_TOKENS

    def __post_init__(self) -> None:
        """ValueError for a threshold that nothing would be held to."""
        if self.mode != "auto" and self.min_cosine != MIN_COSINE:
            raise ValueError(f"min_cosine {self.min_cosine} has no effect with mode {self.mode}; only auto picks by it")

    @property
    def needs_data(self) -> bool:
        """Only "auto" looks at the layers."""
        return self.mode == "auto"

    @property
    def modes(self) -> tuple[Mode, ...]:
        """See `AttentionMethod.modes`."""
        if self.mode == "auto":
            return CANDIDATES
        return () if self.mode == "bf16" else (self.mode,)

    def choose(self, inputs: AttentionInputs | None, usable: Collection[Mode] = CANDIDATES) -> AttentionPolicy:
        """See `AttentionMethod.choose`."""
        if self.mode != "auto":
            return AttentionPolicy(self.mode, self.min_tokens, reason="named in the recipe")
        assert inputs is not None
        tokens, tried = inputs.query.shape[0] * inputs.query.shape[2], {}
        exact = [exact_output(row) for row in rows(inputs)]
        for mode in CANDIDATES:
            if mode not in usable:
                continue
            tried[mode] = compare_mode(inputs, mode, exact)
            if tried[mode].cosine >= self.min_cosine:
                reason = f"the first with a cosine of at least {self.min_cosine}"
                return AttentionPolicy(mode, self.min_tokens, tokens, tried, reason)
        reason = f"no mode has a cosine of at least {self.min_cosine}"
        return AttentionPolicy("bf16", self.min_tokens, tokens, tried, reason)


@torch.no_grad()
def compare_mode(inputs: AttentionInputs, mode: Mode, exact: list[Tensor] | None = None) -> Figures:
    """Figures of one mode. exact: `exact_output` of each of `rows(inputs)`, if it is known."""
    parts = rows(inputs)
    exact = [exact_output(part) for part in parts] if exact is None else exact
    sums = torch.zeros(6, dtype=torch.float64)
    for part, expected in zip(parts, exact, strict=True):
        out, _ = prefill_attention(part.query, part.key, part.value, mode=mode, **part.options)
        sums += difference_sums(out.transpose(1, 2), expected).cpu()
    return figures(sums)
