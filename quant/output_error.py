"""How far an attention layer's output is from exact attention.

With O exact attention and Ô another, on the same queries, keys and values::

    cosine = ⟨O, Ô⟩ / (‖O‖·‖Ô‖)      relative L1 = Σ|O − Ô| / Σ|O|      SQNR = 10·log₁₀(‖O‖² / ‖O − Ô‖²)
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..kernels.attention import Call, exact_attention
from .method import AttentionInputs, Figures


def rows(inputs: AttentionInputs) -> list[AttentionInputs]:
    """The sequences of a batch one by one, which bounds memory. Segments belong to a whole batch, which stays one."""
    if inputs.options.get("segments") is not None:
        return [inputs]
    parts = zip(*(tensor.split(1) for tensor in (inputs.query, inputs.key, inputs.value)), strict=True)
    return [AttentionInputs(query, key, value, inputs.options) for query, key, value in parts]


def exact_output(inputs: AttentionInputs) -> Tensor:
    """Attention in FP32: (batch, queries, num_heads, head_dim) in the dtype of the query."""
    options = dict(inputs.options)
    sinks, segments = options.pop("sinks", None), options.pop("segments", None)
    call = Call("bf16", options["causal"], options["window"], options["scaling"], options["softcap"])
    return exact_attention(inputs.query, inputs.key, inputs.value, call, sinks, segments)[0]


def difference_sums(output: Tensor, exact: Tensor) -> Tensor:
    """(6,) float64: ⟨O, Ô⟩, ‖O‖², ‖Ô‖², ‖O − Ô‖², Σ|O − Ô|, Σ|O|. Any shape, equal for both."""
    output, exact = output.double(), exact.double()
    difference = output - exact
    squares = [(output * exact).sum(), exact.square().sum(), output.square().sum(), difference.square().sum()]
    return torch.stack([*squares, difference.abs().sum(), exact.abs().sum()])


def figures(sums: Tensor) -> Figures:
    """From `difference_sums`, which may be added up over calls. ValueError if attention gave NaN or infinite values."""
    dot, signal, energy, noise, difference, magnitude = (float(value) for value in sums)
    if not math.isfinite(signal + energy):
        raise ValueError("attention gave NaN or infinite values on the calibration text; the model is damaged")
    cosine = dot / math.sqrt(signal * energy) if signal and energy else float(signal == energy)
    sqnr = 10 * math.log10(signal / noise) if noise > 0 and signal > 0 else None
    return Figures(cosine, difference / magnitude if magnitude else 0.0, sqnr)
