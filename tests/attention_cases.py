"""What tests of prefill attention share: one call per `AttentionCase`, and the error that a kernel may add.

A kernel and the reference multiply the same quantized queries, keys and values (the kernels that quantize keys and
values have tests of their own). The kernel adds, for every output o = Σ p·v:

- the rounding of P, of relative size ε (e4m3 2⁻⁴, bf16 2⁻⁸, fp16 2⁻¹¹), and where P becomes a subnormal of e4m3, half
  of its step 2⁻⁹/448 of the largest p: ε·Σ p|v| + n·2⁻¹⁰/448·max|v|
- logits that are off by δ: (exp(2δ) − 1)·Σ p|v|, with δ from FP32 sums, 2⁻²⁰ of Σ|q·k|, or FP8 sums, 2⁻¹⁰ of it, and
  from those channels of a rotated query that lie within FP32 rounding of the border between two codes
- FP8 sums of P·V: 2⁻¹⁰·Σ p|v|
- the rounding of the result to the dtype of the query
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from unittest import mock

import torch
from kernel_cases import BF16, FP8_ACCUMULATOR, FP16
from torch import Tensor

from kompakt.kernels import attention
from kompakt.kernels.attention import FP8_VALUES, KEY_KINDS, Call, attention_ref, query_means
from kompakt.kernels.attention_quant import (
    LEVELS,
    dequantize_keys,
    dequantize_values,
    rotate,
    round_codes,
    scale_of,
)
from kompakt.kernels.segments import Segments, whole

Runner = Callable[..., tuple[Tensor, Tensor]]
P_ROUNDING = {BF16: 2.0**-8, FP16: 2.0**-11}


def left_and_right(queries: int, keys: int, device: str) -> Segments:
    """Two rows: a third of the first is padding on the left, a quarter of the second on the right."""
    mask = torch.ones((2, keys), dtype=torch.bool, device=device)
    mask[0, : keys // 3] = False
    mask[1, keys - keys // 4 :] = False
    segments = Segments.from_padding(mask, queries)
    assert segments is not None
    return segments


def packed(queries: int, keys: int, device: str) -> Segments:
    """A batch of one: four sequences, one of them empty, one of a single token."""
    assert queries == keys
    ends = torch.tensor([0, 1, 1, keys // 3, keys], device=device)
    return Segments.from_cu_seqlens(ends)


def uneven(queries: int, keys: int, device: str) -> Segments:
    """A batch of one: a sequence of fewer queries than keys, and one of more."""
    return Segments.from_cu_seqlens(
        torch.tensor([0, queries // 3, queries], device=device),
        torch.tensor([0, keys - keys // 4, keys], device=device),
    )


SEGMENTS = {"padding": left_and_right, "packed": packed, "uneven": uneven}


@dataclass(frozen=True)
class AttentionCase:
    """One call. heads: (num_heads, num_kv_heads); lengths: (queries, keys); dims: (head_dim, value_head_dim)."""

    heads: tuple[int, int] = (2, 1)
    lengths: tuple[int, int] = (70, 70)
    dims: tuple[int, int] = (64, 64)
    batch: int = 1
    causal: bool = True
    window: int | None = None
    softcap: float | None = None
    scaling: float | None = None
    sinks: bool = False
    segments: str | None = None
    dtype: torch.dtype = FP16
    hard: str = ""

    def call(self, mode: str) -> Call:
        scaling = self.dims[0] ** -0.5 if self.scaling is None else self.scaling
        return Call(mode, self.causal, self.window, scaling, self.softcap)

    def make(self, device: str = "cpu") -> tuple[Tensor, Tensor, Tensor, Tensor | None, Segments | None]:
        """query, key, value, sinks, segments: channel offsets in keys and values, an outlier in every operand."""
        generator = torch.Generator().manual_seed(sum(self.lengths) + 7 * self.dims[0] + self.heads[0])

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator)

        (heads, kv_heads), (queries, keys), (head_dim, value_dim) = self.heads, self.lengths, self.dims
        # Transposed, as a model hands them over.
        query = draw(self.batch, queries, heads, head_dim)
        key = draw(self.batch, keys, kv_heads, head_dim) + 3 * draw(1, 1, kv_heads, head_dim)
        value = draw(self.batch, keys, kv_heads, value_dim) + draw(1, 1, kv_heads, value_dim)
        query[0, -1, 0, 0], key[0, keys // 2, 0, -1], value[0, keys // 2, -1, 0] = 12.0, -15.0, 40.0
        if self.hard == "zeros":
            query[:, ::3], key[:, : keys // 2], value[:, : keys // 2] = 0.0, 0.0, 0.0
        if self.hard == "large":
            query, key, value = query * 30, key * 30, value * 300
        if self.hard == "tiny":
            query, key, value = query * 1e-3, key * 1e-3, value * 1e-3
        sinks = draw(heads) * 2 if self.sinks else None
        segments = None if self.segments is None else SEGMENTS[self.segments](queries, keys, device)
        if self.hard == "poisoned padding" and segments is not None:
            for row, (start, stop) in enumerate(segments.key_bounds(self.batch).tolist()):
                key[row, :start], key[row, stop:], value[row, :start], value[row, stop:] = (torch.nan,) * 4
        query, key, value = (t.transpose(1, 2).to(self.dtype).to(device) for t in (query, key, value))
        return query, key, value, None if sinks is None else sinks.to(device), segments


def operands_of(quantize: Callable[..., tuple]) -> Callable[..., tuple[Tensor, ...]]:
    """`operands_ref` over the codes that a quantizing kernel writes."""

    def operands(key: Tensor, value: Tensor, mode: str, bounds: Tensor | None) -> tuple[Tensor, ...]:
        k, v, key_mean, value_mean = attention_operands(key, value, mode, bounds)
        kind, tokens = KEY_KINDS[mode], key.shape[2]
        keys, values = quantize(key, value, kind, mode in FP8_VALUES, bounds)
        if keys is not None:
            k, key_mean = dequantize_keys(keys, tokens, kind), keys.mean
        if values is not None:
            v, value_mean = dequantize_values(values, tokens, value.shape[3]), values.mean
        return k, v, key_mean, value_mean

    return operands


attention_operands = attention.operands_ref


def check_kernel(
    run: Runner, quantize: Callable[..., tuple], case: AttentionCase, mode: str, *, device: str, fp8_sums: bool
) -> None:
    """`run` on poisoned memory, held to the bound of the module docstring; fp8_sums: FP8 products are summed in FP8."""
    query, key, value, sinks, segments = case.make(device)
    call = case.call(mode)
    out, lse = run(query, key, value, call, sinks, segments)
    operands = operands_of(quantize)
    with mock.patch.object(attention, "operands_ref", operands):
        expected, expected_lse = attention_ref(query.float(), key, value, call, sinks, segments, dtype=torch.float64)
    bounds = None if segments is None else segments.key_bounds(query.shape[0])
    k, v, _, value_mean = operands(key, value, mode, bounds)

    def sizes(*_: object) -> tuple[Tensor, ...]:
        return k, v.abs(), operands(key, value, mode, bounds)[2], value_mean.abs()

    with mock.patch.object(attention, "operands_ref", sizes):
        size, _ = attention_ref(query.float(), key, value, call, sinks, segments, dtype=torch.float64)
    group = query.shape[1] // key.shape[1]
    kind = KEY_KINDS[mode]
    wanted = query.float()
    if mode == "int4_fp8":
        wanted = wanted - query_means(query, segments or whole(query.shape[0], query.shape[2], key.shape[2], device))
    turned = wanted if kind is None else rotate(wanted)
    k_heads = k.abs().repeat_interleave(group, 1)
    reach = (turned.abs() @ k_heads.mT).amax(-1)
    delta = reach * call.scaling * (FP8_ACCUMULATOR if fp8_sums and mode == "fp8_fp8" else 2.0**-20) + 1e-6
    if kind is not None:
        scale = scale_of(turned.abs().amax(-1, keepdim=True), LEVELS[kind])
        slack = 2.0**-20 * (turned.abs() + turned.abs().amax(-1, keepdim=True))
        codes = [round_codes(turned + sign * slack, scale, kind).float() for sign in (1, -1)]
        flips = (codes[0] - codes[1]).abs() * scale
        delta = delta + (flips * k_heads.amax(2, keepdim=True)).sum(-1) * call.scaling
    fp8_values = mode in FP8_VALUES
    relative = 2.0**-4 if fp8_values else P_ROUNDING[case.dtype]
    relative += FP8_ACCUMULATOR if fp8_values and fp8_sums else 2.0**-20
    by_row = relative + torch.expm1(2 * delta.double()).transpose(1, 2)[..., None]
    subnormal = key.shape[2] * 2.0**-10 / 448 * v.abs().amax().item() if fp8_values else 0.0
    rounding = torch.finfo(case.dtype).eps * expected.abs()
    allowed = by_row * size + subnormal + rounding + torch.finfo(case.dtype).tiny
    excess = (out.double() - expected).abs() - allowed
    assert (excess <= 0).all(), f"exceeds the allowed error by {excess.nan_to_num(torch.inf).max():.3e}"
    seen = expected_lse.isfinite()
    assert torch.equal(seen, lse.isfinite()) and not lse.isnan().any()
    off = (lse - expected_lse)[seen].abs()
    assert (off <= 2 * delta[seen] + 2.0**-20 * (1 + expected_lse[seen].abs())).all(), f"lse is off by {off.max():.3e}"
