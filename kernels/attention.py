"""Prefill attention in reduced arithmetic: one op, five modes, every mask that is a run of keys per query.

::

    S = scaling · Q·Kᵀ,  capped: cap · tanh(S / cap)      O = softmax(S) · V      lse = log Σ exp(S)

| mode        | Q·Kᵀ                             | P·V                                                        |
|-------------|----------------------------------|------------------------------------------------------------|
| `bf16`      | 16 bit                           | 16 bit                                                     |
| `int8_fp16` | INT8                             | 16 bit, in the dtype of the input                          |
| `int8_fp8`  | INT8                             | FP8                                                        |
| `fp8_fp8`   | FP8                              | FP8                                                        |
| `int4_fp8`  | INT4 values on the INT8 units    | FP8; half the bytes of keys, no faster arithmetic on Hopper |

Queries are rotated as the keys are and scaled per token, for which a kernel needs no extra instruction; keys and values
as in `attention_quant.py`. INT4 queries have the mean of every `QUERY_GROUP` of them taken off, whose product with the
keys is added to the logits. FP8 probabilities have the static scale 448, which is an offset in the exponent, and their
products are promoted to FP32 after each tile of keys: FP8 accumulators hold about 14 bits.

Causality is aligned to the **end**: the last query sits on the last key (of its segment, see `segments.py`). A query
that sees no key gets zeros and lse = −∞. A sink is one more logit per head that has no value; it takes part in the
softmax but not in lse. The reference quantizes as the kernels do and leaves only their sums and the rounding of P
unmodelled. Inference only: no gradient is registered.

Source: SageAttention (arXiv 2410.02367), SageAttention2 (2411.10958).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from .activations import FP8_CAPABILITY, launching_on, log_fallback, triton_refusal
from .attention_hopper import HEAD_DIMS
from .attention_quant import (
    LEVELS,
    dequantize_keys,
    dequantize_values,
    quantize_keys_ref,
    quantize_values_ref,
    rotate,
    round_codes,
    scale_of,
)
from .int4_linear import hopper_refusal
from .segments import Segments, visible, whole

Mode = Literal["bf16", "int8_fp16", "int8_fp8", "fp8_fp8", "int4_fp8"]
KEY_KINDS: dict[str, str | None] = {
    "bf16": None,
    "int8_fp16": "int8",
    "int8_fp8": "int8",
    "fp8_fp8": "fp8",
    "int4_fp8": "int4",
}
"""Mode → kind of keys and queries; None leaves them in 16 bit."""
MODES = tuple(KEY_KINDS)
FP8_VALUES = ("int8_fp8", "fp8_fp8", "int4_fp8")
QUERY_GROUP = 64
MAX_HEAD_DIM = 256
DTYPES = (torch.bfloat16, torch.float16)
REFERENCE_ROWS = 256


@dataclass(frozen=True)
class Call:
    """What an attention call is besides its tensors; all of it is part of the mathematics."""

    mode: str
    causal: bool
    window: int | None
    scaling: float
    softcap: float | None


def prefill_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    mode: Mode,
    causal: bool = True,
    window: int | None = None,
    scaling: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    segments: Segments | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of many queries.

    Args:
        query: (batch, num_heads, queries, head_dim) floating, any strides; kernels take bf16 and fp16.
        key: (batch, num_kv_heads, keys, head_dim), post-RoPE; num_kv_heads divides num_heads.
        value: (batch, num_kv_heads, keys, value_head_dim).
        mode: arithmetic, see the module.
        causal: a query sees no later key; queries are aligned to the end of the keys.
        window: a query sees only keys fewer than so many positions away.
        scaling: of the logits; default 1/√head_dim.
        softcap: bound of the logits.
        sinks: (num_heads,) one more logit per head.
        segments: padding or packed sequences; None is one segment per row of the batch.

    Returns:
        out: (batch, num_heads, queries, value_head_dim) in the dtype of query, a transposed view of a contiguous
            (batch, queries, num_heads, value_head_dim).
        lse: (batch, num_heads, queries) fp32, natural logarithm, sinks not included.

    Raises:
        ValueError: shapes, dtypes, devices or options that do not belong together.
    """
    call = Call(mode, causal, window, scaling if scaling is not None else query.shape[-1] ** -0.5, softcap)
    check_attention(query, key, value, call, sinks, segments)
    if window is not None and window >= query.shape[2] + key.shape[2]:
        # It hides nothing, and positions plus such a window might leave the range of 32 bit.
        call = replace(call, window=None)
    table = None if segments is None else segments.table
    out, lse = attention_op(
        query,
        key,
        value,
        sinks,
        table,
        query.shape[2] if segments is None else segments.max_queries,
        call.mode,
        call.causal,
        call.window,
        call.scaling,
        call.softcap,
    )
    return out.transpose(1, 2), lse


@torch.library.custom_op("kompakt::prefill_attention", mutates_args=())
def attention_op(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sinks: Tensor | None,
    table: Tensor | None,
    max_queries: int,
    mode: str,
    causal: bool,
    window: int | None,
    scaling: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    """Registered op behind :func:`prefill_attention`, opaque to torch.compile; out is (batch, queries, heads, dim)."""
    extent = (query.shape[0], query.shape[2], key.shape[2])
    segments = None if table is None else Segments(table, max_queries, extent)
    with launching_on(query):
        return run_attention(query, key, value, Call(mode, causal, window, scaling, softcap), sinks, segments)


@attention_op.register_fake
def _(query, key, value, sinks, table, max_queries, mode, causal, window, scaling, softcap):
    batch, heads, queries, _ = query.shape
    lse = query.new_empty((batch, heads, queries), dtype=torch.float32)
    return query.new_empty((batch, queries, heads, value.shape[-1])), lse


def attention_backend(
    query: Tensor, value: Tensor, call: Call, *, interpret: bool = False
) -> tuple[Literal["gluon", "triton", "exact", "reference"], str]:
    """What a call runs on, and why: a kernel, exact attention on a GPU without one, or the reference on a CPU."""
    head_dim, value_dim = query.shape[-1], value.shape[-1]
    if interpret:
        return "triton", "Triton's interpreter was asked for"
    if query.device.type == "cpu":
        return "reference", "device is cpu, the kernel needs cuda"
    refusal = triton_refusal(query.device, FP8_CAPABILITY if "fp8" in call.mode else (8, 0))
    if refusal is None and query.dtype not in DTYPES:
        refusal = f"the kernel takes bf16 and fp16, not {query.dtype}"
    if refusal is None and max(head_dim, value_dim) > MAX_HEAD_DIM:
        refusal = f"head_dim {max(head_dim, value_dim)} exceeds the kernel's {MAX_HEAD_DIM}"
    if refusal is not None:
        return "exact", refusal
    fast = (
        call.mode in ("int8_fp8", "fp8_fp8")
        and call.softcap is None
        and head_dim == value_dim
        and head_dim in HEAD_DIMS
    )
    if fast and hopper_refusal(query.device) is None:
        return "gluon", "compute capability is 9.0"
    return "triton", "a CUDA device with Triton"


def run_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    call: Call,
    sinks: Tensor | None,
    segments: Segments | None,
    *,
    interpret: bool = False,
) -> tuple[Tensor, Tensor]:
    """Dispatch without checks: out (batch, queries, heads, value_head_dim) contiguous, and lse."""
    sinks = None if sinks is None else sinks.contiguous()
    segments = None if segments is None else replace(segments, table=segments.table.contiguous())
    if query.numel() == 0 or key.numel() == 0:
        return attention_ref(query, key, value, call, sinks, segments)
    backend, reason = attention_backend(query, value, call, interpret=interpret)
    if backend == "reference":
        log_fallback(f"prefill_attention ({call.mode})", reason)
        return attention_ref(query, key, value, call, sinks, segments)
    if backend == "exact":
        log_fallback(f"prefill_attention ({call.mode})", reason, "exact attention in torch")
        return exact_attention(query, key, value, call, sinks, segments)
    if backend == "gluon":
        from .attention_hopper import attention_hopper

        return attention_hopper(query, key, value, call, sinks, segments)
    from .attention_triton import attention_triton

    return attention_triton(query, key, value, call, sinks, segments, interpret=interpret)


def exact_attention(
    query: Tensor, key: Tensor, value: Tensor, call: Call, sinks: Tensor | None, segments: Segments | None
) -> tuple[Tensor, Tensor]:
    """The same mask and softmax, nothing quantized, in torch on any device. Waits for the device."""
    plain = Call("bf16", call.causal, call.window, call.scaling, call.softcap)
    return attention_ref(query, key, value, plain, sinks, segments)


def attention_ref(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    call: Call,
    sinks: Tensor | None = None,
    segments: Segments | None = None,
    *,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """Torch specification of every kernel, any device: quantized operands, products and softmax in ``dtype``.

    Memory is that of `REFERENCE_ROWS` rows of logits. Returns out (batch, queries, heads, value_head_dim) in the dtype
    of query, and lse.
    """
    batch, heads, queries, head_dim = query.shape
    kv_heads, keys, value_dim = key.shape[1], key.shape[2], value.shape[-1]
    out = torch.zeros((batch, queries, heads, value_dim), dtype=query.dtype, device=query.device)
    lse = torch.full((batch, heads, queries), -torch.inf, device=query.device)
    if query.numel() == 0 or keys == 0:
        return out, lse
    bounds = None if segments is None else segments.key_bounds(batch)
    places = whole(batch, queries, keys, query.device) if segments is None else segments
    k, v, key_mean, value_mean = operands_ref(key, value, call.mode, bounds)
    k, v, key_mean, value_mean = (t.to(dtype) for t in (k, v, key_mean, value_mean))
    means = query_means(query, places) if call.mode == "int4_fp8" else None
    for start in range(0, queries, REFERENCE_ROWS):
        rows = slice(start, min(start + REFERENCE_ROWS, queries))
        mask = visible(places, batch, rows, keys, causal=call.causal, window=call.window)[:, None, None]
        q = query[:, :, rows].float()
        centered = q if means is None else q - means[:, :, rows]
        grouped = (batch, kv_heads, heads // kv_heads, -1)
        coded = code_queries(centered, call.mode).to(dtype)
        logits = coded.view(*grouped, k.shape[-1]) @ k[:, :, None].mT
        if means is not None:
            logits += rotate(means[:, :, rows]).to(dtype).view(*grouped, k.shape[-1]) @ k[:, :, None].mT
        # The logits' part that softmax does not see.
        shift = (q.to(dtype).view(*grouped, head_dim) * key_mean[:, :, None, None]).sum(dim=-1, keepdim=True)
        logits = (logits + shift) * call.scaling
        if call.softcap is not None:
            logits = call.softcap * torch.tanh(logits / call.softcap)
        logits = logits.masked_fill(~mask, -torch.inf)
        sums = torch.logsumexp(logits, dim=-1, keepdim=True)
        total = sums
        if sinks is not None:
            sink = sinks.to(dtype).view(1, kv_heads, -1, 1, 1)
            # A query that sees no key gives nothing to its sink either.
            total = torch.where(sums.isneginf(), sums, torch.logaddexp(sums, sink))
        weights = torch.exp(logits - total).masked_fill(~mask, 0.0)
        result = weights @ v[:, :, None] + weights.sum(dim=-1, keepdim=True) * value_mean[:, :, None, None]
        out[:, rows] = result.view(batch, heads, -1, value_dim).transpose(1, 2).to(query.dtype)
        lse[:, :, rows] = sums.view(batch, heads, -1).float()
    return out, lse


def operands_ref(key: Tensor, value: Tensor, mode: str, bounds: Tensor | None) -> tuple[Tensor, ...]:
    """Keys and values as a mode multiplies them, without their means, quantized keys rotated; and the means. Masked
    tokens are finite.
    """
    batch, kv_heads, keys, head_dim = key.shape
    kind = KEY_KINDS[mode]
    positions = torch.arange(keys, device=key.device)
    if bounds is not None:
        # Whatever stands outside a segment meets a probability of zero; NaN · 0 would be NaN.
        valid = ((positions >= bounds[:, :1]) & (positions < bounds[:, 1:]))[:, None, :, None]
        key, value = torch.where(valid, key, 0), torch.where(valid, value, 0)
    if kind is None:
        k, key_mean = key.float(), key.new_zeros((batch, kv_heads, head_dim), dtype=torch.float32)
    else:
        coded = quantize_keys_ref(key, kind, bounds)
        k, key_mean = dequantize_keys(coded, keys, kind), coded.mean
    if mode in FP8_VALUES:
        coded_values = quantize_values_ref(value, bounds)
        return k, dequantize_values(coded_values, keys, value.shape[-1]), key_mean, coded_values.mean
    return k, value.float(), key_mean, value.new_zeros((batch, kv_heads, value.shape[-1]), dtype=torch.float32)


def code_queries(query: Tensor, mode: str) -> Tensor:
    """Queries as a mode multiplies them, fp32: rotated, one scale per token."""
    kind = KEY_KINDS[mode]
    if kind is None:
        return query
    query = rotate(query)
    scale = scale_of(query.abs().amax(dim=-1, keepdim=True), LEVELS[kind])
    return round_codes(query, scale, kind).float() * scale


def query_means(query: Tensor, segments: Segments) -> Tensor:
    """(batch, heads, queries, head_dim) fp32: for every query the mean of its group of `QUERY_GROUP` in its segment."""
    means = torch.zeros(query.shape, device=query.device)
    for row, q_start, q_stop, _, _ in segments.table.tolist():
        for start in range(q_start, q_stop, QUERY_GROUP):
            group = slice(start, min(start + QUERY_GROUP, q_stop))
            means[row, :, group] = query[row, :, group].float().mean(dim=1, keepdim=True)
    return means


def check_attention(
    query: Tensor, key: Tensor, value: Tensor, call: Call, sinks: Tensor | None, segments: Segments | None
) -> None:
    """Raise ValueError unless the arguments of :func:`prefill_attention` describe one call."""
    if call.mode not in MODES:
        raise ValueError(f"unknown mode {call.mode!r}; known: {', '.join(MODES)}")
    if query.dim() != 4 or key.dim() != 4 or value.dim() != 4:
        raise ValueError(
            f"query, key and value have shapes {tuple(query.shape)}, {tuple(key.shape)} and {tuple(value.shape)};"
            " expected (batch, heads, tokens, head_dim)"
        )
    batch, heads, queries, head_dim = query.shape
    if key.shape[:3] != value.shape[:3] or key.shape[0] != batch or key.shape[3] != head_dim or head_dim == 0:
        raise ValueError(f"key {tuple(key.shape)} and value {tuple(value.shape)} do not fit query {tuple(query.shape)}")
    if key.shape[1] == 0 or heads % key.shape[1]:
        raise ValueError(f"{key.shape[1]} KV heads do not divide {heads} heads")
    if not query.dtype == key.dtype == value.dtype or not query.dtype.is_floating_point:
        raise ValueError(f"query, key, value have dtypes {query.dtype}, {key.dtype}, {value.dtype}; use one floating")
    if call.causal and segments is None and queries > key.shape[2] > 0:
        raise ValueError(
            f"{queries} queries for {key.shape[2]} keys cannot be causal: queries are the last of the keys"
        )
    check_logits(heads, call.scaling, call.window, call.softcap, sinks)
    if segments is not None:
        check_segments(segments, (batch, queries, key.shape[2]))
    tensors = {"key": key, "value": value, "sinks": sinks, "segments": None if segments is None else segments.table}
    for name, tensor in tensors.items():
        if tensor is not None and tensor.device != query.device:
            raise ValueError(f"{name} is on {tensor.device}, query on {query.device}")


def check_logits(heads: int, scaling: float, window: int | None, softcap: float | None, sinks: Tensor | None) -> None:
    """Raise ValueError unless these describe the logits of an attention call."""
    if window is not None and window < 1:
        raise ValueError(f"window is {window}; it counts tokens, from 1")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap is {softcap}; it bounds the logits, above 0")
    if not (math.isfinite(scaling) and scaling > 0):
        raise ValueError(f"scaling is {scaling}; it must be finite and above 0")
    if sinks is not None and (tuple(sinks.shape) != (heads,) or not sinks.dtype.is_floating_point):
        raise ValueError(f"sinks have shape {tuple(sinks.shape)} and dtype {sinks.dtype}; expected ({heads},) floating")


def check_segments(segments: Segments, extent: tuple[int, int, int]) -> None:
    """Raise ValueError unless segments speak of a batch of this extent: rows, queries, keys."""
    table = segments.table
    if table.dtype != torch.int32 or table.dim() != 2 or table.shape[1] != 5:
        raise ValueError(
            f"segments have a table {tuple(table.shape)} {table.dtype}; expected (segments, 5) torch.int32"
        )
    if segments.extent[0] != extent[0] or segments.extent[1] > extent[1] or segments.extent[2] > extent[2]:
        raise ValueError(
            f"segments speak of (rows, queries, keys) = {segments.extent}, which the tensors' {extent} do not hold"
        )
