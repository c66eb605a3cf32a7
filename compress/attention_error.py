"""What a mode of attention does to its output, beside FP8 attention with one scale for each tensor.

The baseline is what FP8 attention without smoothing does: queries, keys and values are cast to e4m3 with one scale for
all heads and tokens of each, and so is P, with the static scale 448::

    O = Σ_j e4m3(448 · p_j) / 448 · v8_j / Σ_j p_j,      p_j = exp(s_j − max s),      s = scaling · q8·k8ᵀ

The reference of kompakt's modes leaves P unrounded, so that on a CPU modes with FP8 values come out better than their
kernels are; the baseline is the same everywhere. Random inputs are normal, with offsets of
the keys' channels or without; `outliers` is the distribution
of FlashAttention-3 (arXiv 2407.08608, section 4.3): N(0, 1) + N(0, 100) · Bernoulli(0.001).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor

from ..kernels.attention import REFERENCE_ROWS, Call, Mode, attention_backend, prefill_attention
from ..kernels.attention_quant import E4M3_MAX, LEVELS, round_codes, scale_of
from ..kernels.segments import visible, whole
from ..quant.method import AttentionInputs, Figures
from ..quant.output_error import difference_sums, exact_output, figures, rows
from .runtime import refusal

BASELINE = "per-tensor FP8"
KINDS = ("normal", "channel offsets", "large channel offsets", "outliers", "channel offsets and outliers")
KEY_OFFSET, LARGE_KEY_OFFSET = 4.0, 16.0
"""Standard deviations of the keys' offsets, theirs around them being 1."""
OUTLIERS, OUTLIER_SIZE = 1e-3, 10.0
HEAD_DIMS = (64, 128)
HEADS, KV_HEADS = 8, 2


def per_tensor_fp8(inputs: AttentionInputs) -> Tensor:
    """The baseline: (batch, queries, num_heads, value_head_dim) FP32, of inputs of any kind that a layer is given."""
    batch, heads, queries, _ = inputs.query.shape
    kv_heads, keys = inputs.key.shape[1:3]
    options, device = inputs.options, inputs.query.device
    q, k, v = (one_scale(tensor) for tensor in (inputs.query, inputs.key, inputs.value))
    segments = options.get("segments")
    places = whole(batch, queries, keys, device) if segments is None else segments
    out = torch.zeros((batch, queries, heads, v.shape[-1]), device=device)
    for start in range(0, queries, REFERENCE_ROWS):
        run = slice(start, min(start + REFERENCE_ROWS, queries))
        mask = visible(places, batch, run, keys, causal=options["causal"], window=options["window"])[:, None, None]
        logits = q[:, :, run].reshape(batch, kv_heads, heads // kv_heads, -1, q.shape[-1]) @ k[:, :, None].mT
        logits *= options["scaling"]
        if options["softcap"] is not None:
            logits = options["softcap"] * torch.tanh(logits / options["softcap"])
        logits = logits.masked_fill(~mask, -torch.inf)
        # Where nothing is visible every p is 0, whatever is taken off.
        top = logits.amax(dim=-1, keepdim=True).nan_to_num(neginf=0.0)
        p = torch.exp(logits - top)
        total = p.sum(dim=-1, keepdim=True)
        if options.get("sinks") is not None:
            total = total + torch.exp(options["sinks"].float().view(1, kv_heads, -1, 1, 1) - top)
        p8 = (E4M3_MAX * p).to(torch.float8_e4m3fn).float() / E4M3_MAX
        result = p8 @ v[:, :, None] / torch.where(total > 0, total, 1.0)
        out[:, run] = result.reshape(batch, heads, -1, v.shape[-1]).transpose(1, 2)
    return out


def one_scale(tensor: Tensor) -> Tensor:
    """Rounded to e4m3 with one scale, FP32."""
    values = tensor.float()
    scale = scale_of(values.abs().amax(), LEVELS["fp8"])
    return round_codes(values, scale, "fp8").float() * scale


@torch.no_grad()
def compare_all(inputs: AttentionInputs, modes: Sequence[Mode]) -> dict[str, Figures]:
    """Figures of every mode and of the baseline against attention in FP32, by name.

    Raises ValueError if a mode has no kernel for the inputs: exact attention would run in its place.
    """
    for mode in modes:
        why = refusal(mode, inputs)
        if why is not None:
            raise ValueError(f"mode {mode} cannot be measured on this device: {why}; leave it out")
    sums: dict[str, Tensor] = {name: torch.zeros(6, dtype=torch.float64) for name in (*modes, BASELINE)}
    for part in rows(inputs):
        single = replace(part, query=part.query.float(), key=part.key.float(), value=part.value.float())
        exact = exact_output(single)
        for mode in modes:
            out, _ = prefill_attention(part.query, part.key, part.value, mode=mode, **part.options)
            sums[mode] += difference_sums(out.transpose(1, 2), exact).cpu()
        sums[BASELINE] += difference_sums(per_tensor_fp8(single), exact).cpu()
    return {name: figures(found) for name, found in sums.items()}


def relative(found: Figures) -> float:
    """‖difference‖ / ‖exact‖."""
    return 0.0 if found.sqnr_db is None else 10 ** (-found.sqnr_db / 20)


def described(found: dict[str, Figures]) -> dict[str, dict[str, Any]]:
    """By name: the figures, the relative `error`, and how many times the baseline's error is larger; JSON-able."""
    base = relative(found[BASELINE])
    return {
        name: {
            **asdict(item),
            "error": relative(item),
            "times_below": base / relative(item) if relative(item) else None,
        }
        for name, item in found.items()
    }


def synthetic_inputs(kind: str, head_dim: int, length: int, device: torch.device) -> AttentionInputs:
    """Causal inputs of `HEADS`/`KV_HEADS` heads, bf16, the same every time. kind: of `KINDS`."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device)

    tensors = [normal(1, heads, length, head_dim) for heads in (HEADS, KV_HEADS, KV_HEADS)]
    if "outliers" in kind:
        for tensor in tensors:
            chosen = torch.rand(tensor.shape, generator=generator, device=device) < OUTLIERS
            tensor += OUTLIER_SIZE * normal(*tensor.shape) * chosen
    if "offsets" in kind:
        size = LARGE_KEY_OFFSET if "large" in kind else KEY_OFFSET
        tensors[1] += size * normal(1, KV_HEADS, 1, head_dim)
    query, key, value = (tensor.bfloat16() for tensor in tensors)
    options = {"causal": True, "window": None, "segments": None, "scaling": head_dim**-0.5, "softcap": None}
    return AttentionInputs(query, key, value, options)


def backends(inputs: AttentionInputs, modes: Sequence[Mode]) -> dict[str, str]:
    """mode → what runs it for such inputs: "gluon", "triton" or "reference"."""
    options = inputs.options
    calls = {
        mode: Call(mode, options["causal"], options["window"], options["scaling"], options["softcap"]) for mode in modes
    }
    return {mode: attention_backend(inputs.query, inputs.value, call)[0] for mode, call in calls.items()}
