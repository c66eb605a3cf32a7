"""Triton kernel for prefill attention in every mode, on any card; `attention_hopper.py` has a faster one for Hopper.

A program holds BLOCK_M queries and walks over the keys they may see in blocks of 64, half of what has one scale.
Queries are quantized by the program that reads them, so they are written nowhere. Blocks that all queries see entirely
are multiplied without a mask.

FP8 probabilities are scaled by 448 through the exponent, exp2(s − m + log₂ 448), and turned into an operand in the
token order in which they lie in registers; the product of each block starts from zero and is added in FP32.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from .attention_quant import LEVELS, MIN_SCALE, TILE, padded_tokens, padded_width
from .attention_quant_triton import (
    halves,
    quantize_keys_values,
    rotated,
    row_amax,
    scale_for,
    to_e4m3,
    to_integers,
)
from .segments import Segments

if TYPE_CHECKING:
    from .attention import Call

LOG2E = tl.constexpr(1.4426950408889634)
LOG2_448 = tl.constexpr(8.807354922057604)
SCALED = tl.constexpr(TILE)
LOWEST = tl.constexpr(-1.0e38)
"""Start of the running maximum; finite, so that a tile without a visible key leaves no NaN."""


BLOCK_N = tl.constexpr(64)
LENGTHS = ["queries", "keys", "heads", "group", "tiles", "window"]
"""Arguments for whose values nothing is compiled anew: they change from call to call."""


@dataclass(frozen=True)
class LaunchConfig:
    """Options of one launch."""

    block_m: int
    num_warps: int
    num_stages: int


def launch_config(mode: str, width: int, device: torch.device, *, listed: bool = False) -> LaunchConfig:
    """width: padded head_dim. listed: keys come from lists, which are of 64 queries.

    64 queries and 4 warps leave room for two programs on a multiprocessor of Hopper, whose softmaxes and products
    overlap; INT4 queries have their mean taken in groups of 64. In 16 bit keys are twice as large, and read once for
    128 queries: 18.0 ms on an H200 for 32,768 tokens in 32/8 heads of 128, 19.1 with 64 queries, 20.3 with two stages,
    which is what smaller cards have room for, 18.4 with keys in blocks of 128; cuDNN 14.5.
    """
    if width > 128:
        return LaunchConfig(64, 8, 2)
    if mode != "bf16":
        return LaunchConfig(64, 4, 3)
    if not has_room(device):
        return LaunchConfig(64, 4, 2)
    return LaunchConfig(64, 4, 3) if listed else LaunchConfig(128, 8, 3)


def has_room(device: torch.device) -> bool:
    """Whether a program may have the 128 KiB of shared memory that three stages of 16-bit tiles take."""
    if device.type != "cuda":
        return True
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin >= 132 * 1024


@triton.jit
def key_range(
    position, rows_last, k_start, k_stop, window, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, BLOCK: tl.constexpr
):
    """Ends of three runs of tiles for queries at `position` … `rows_last`: begin, whole_begin, whole_end, end.

    Tiles in [whole_begin, whole_end) are seen entirely by all queries.
    """
    end = k_stop
    whole_end = k_stop
    if CAUSAL:
        end = tl.minimum(rows_last + 1, k_stop)
        whole_end = tl.minimum(position + 1, k_stop)
    begin = k_start
    whole_begin = k_start
    if WINDOW:
        begin = tl.maximum(position - window + 1, k_start)
        whole_begin = tl.maximum(rows_last - window + 1, k_start)
        if not CAUSAL:
            end = tl.minimum(rows_last + window, k_stop)
            whole_end = tl.minimum(position + window, k_stop)
    begin = begin // BLOCK * BLOCK
    end = tl.maximum(end, begin)
    last = tl.cdiv(end, BLOCK) * BLOCK
    whole_begin = tl.minimum(tl.maximum(tl.cdiv(whole_begin, BLOCK) * BLOCK, begin), last)
    whole_end = tl.maximum(whole_end, 0) // BLOCK * BLOCK
    whole_end = tl.minimum(tl.maximum(whole_end, whole_begin), last)
    return begin, whole_begin, whole_end, last


@triton.jit
def product(a, b, EXACT: tl.constexpr, INTEGER: tl.constexpr, INTERPRET: tl.constexpr):
    """a · b from zero, FP32; in the interpreter, which knows neither bf16 nor FP8, over operands made FP32."""
    if INTERPRET:
        result = tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    elif INTEGER:
        result = tl.dot(a, b, out_dtype=tl.int32).to(tl.float32)
    elif EXACT:
        result = tl.dot(a, b)
    else:
        # Hopper's FP8 accumulator is promoted by the caller, once per tile.
        result = tl.dot(a, b, max_num_imprecise_acc=a.shape[1])
    return result


@triton.jit
def load_16bit(ptr, stride, token, channel, valid, channels):
    return tl.load(
        ptr + token.to(tl.int64)[:, None] * stride + channel[None, :],
        mask=valid[:, None] & (channel < channels)[None, :],
        other=0.0,
    )


@triton.jit
def quantize_queries(q, scale, KIND: tl.constexpr, INTERPRET: tl.constexpr):
    inverse = tl.div_rn(tl.full(scale.shape, 1.0, tl.float32), scale)[:, None]
    if KIND == "fp8":
        codes = to_e4m3(q * inverse, INTERPRET)
    else:
        codes = to_integers(q, inverse)
    return codes


@triton.jit
def load_tile(ptr, stride, start, token, channel, k_start, k_stop, channels, ROWS: tl.constexpr, WHOLE: tl.constexpr):
    """16-bit rows `start` … of keys or values, zeros where there is none. WHOLE: all are there, and all channels."""
    # One address for the tile and offsets that do not change from tile to tile.
    here = ptr + (tl.full((), 0, tl.int64) + start) * stride
    offsets = tl.arange(0, ROWS)[:, None] * stride + channel[None, :]
    if WHOLE:
        found = tl.load(here + offsets)
    else:
        valid = (token >= k_start) & (token < k_stop)
        found = tl.load(here + offsets, mask=valid[:, None] & (channel < channels)[None, :], other=0.0)
    return found


@triton.jit
def scores(
    q, q_high, q_scale, t_low, t_high, key_base, key_scale_base, kt, start, token, k_start, k_stop, head_dim, factor,
    KIND: tl.constexpr, WIDTH: tl.constexpr, WHOLE: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """Logits of a tile and a unit of each row: their product is in units of log₂, softcap and the part that softmax
    does not see apart.
    """
    unit = q_scale * factor
    if KIND is None:
        k = load_tile(key_base, kt, start, token, tl.arange(0, WIDTH), k_start, k_stop, head_dim, token.shape[0], WHOLE)
        s = product(q, k.T, True, False, INTERPRET)
    elif KIND == "int4":
        channel = tl.arange(0, WIDTH // 2)
        packed = tl.load(key_base + token.to(tl.int64)[:, None] * (WIDTH // 2) + channel[None, :])
        low = (packed & 15).to(tl.int8) - 8
        high = (packed >> 4).to(tl.int8) - 8
        s = product(q, low.T, False, True, INTERPRET) + product(q_high, high.T, False, True, INTERPRET)
        mean = tl.sum(low.to(tl.float32) * t_low[None, :], axis=1) + tl.sum(
            high.to(tl.float32) * t_high[None, :], axis=1
        )
        k_scale = tl.load(key_scale_base + token) * factor
        s = (s * q_scale[:, None] + mean[None, :]) * k_scale[None, :]
        unit = tl.full(q_scale.shape, 1.0, tl.float32)
    else:
        here = key_base + (tl.full((), 0, tl.int64) + start) * WIDTH
        k = tl.load(here + tl.arange(0, token.shape[0])[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :])
        s = product(q, k.T, False, KIND == "int8", INTERPRET)
        unit *= tl.load(key_scale_base + start // SCALED)
    return s, unit


@triton.jit
def capped(s, shift, softcap):
    bound = softcap * LOG2E
    x = (s + shift[:, None]) / bound
    # tanh(x) = 1 − 2 / (exp(2x) + 1)
    return bound * (1.0 - 2.0 / (tl.math.exp2(x * (2.0 * LOG2E)) + 1.0))


@triton.jit
def softmax_step(s, unit, m, total, FP8_VALUES: tl.constexpr):
    """Probabilities of a tile, the factor of what is summed so far, maximum and sum. One multiply-add a logit."""
    new_m = tl.maximum(m, tl.max(s, axis=1) * unit)
    if FP8_VALUES:
        p = tl.math.exp2(s * unit[:, None] - (new_m - LOG2_448)[:, None])
    else:
        p = tl.math.exp2(s * unit[:, None] - new_m[:, None])
    alpha = tl.math.exp2(m - new_m)
    return p, alpha, new_m, total * alpha + tl.sum(p, axis=1)


@triton.jit
def weigh(
    p, value_base, vt, start, token, k_start, k_stop, value_dim, rows,
    FP8_VALUES: tl.constexpr, VALUE_WIDTH: tl.constexpr, WHOLE: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """Probabilities times values of a tile, FP32."""
    channel = tl.arange(0, VALUE_WIDTH)
    M: tl.constexpr = p.shape[0]
    N: tl.constexpr = p.shape[1]
    if FP8_VALUES:
        v = tl.load(value_base + start + (channel.to(tl.int64)[:, None] * rows + tl.arange(0, N)[None, :]))
        p8 = to_e4m3(p, INTERPRET)
        p8 = p8.reshape(M, N // 16, 2, 4, 2).permute(0, 1, 3, 2, 4).reshape(M, N)
        result = product(p8, v.T, False, False, INTERPRET)
    else:
        v = load_tile(value_base, vt, start, token, channel, k_start, k_stop, value_dim, N, WHOLE)
        result = product(p.to(v.dtype), v, True, False, INTERPRET)
    return result


@triton.jit(do_not_specialize=LENGTHS)
def attention_kernel(
    q_ptr, key_ptr, key_scale_ptr, key_mean_ptr, value_ptr, value_scale_ptr, value_mean_ptr, sink_ptr, table_ptr,
    out_ptr, lse_ptr, qb, qh, qt, kb, kh, kt, vb, vh, vt,
    queries, keys, rows, heads, group, head_dim, value_dim, tiles, window, scaling, softcap,
    KIND: tl.constexpr, FP8_VALUES: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr,
    SINKS: tl.constexpr, SEGMENTS: tl.constexpr, WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr,
    Q_LEVELS: tl.constexpr, MIN: tl.constexpr, BLOCK_M: tl.constexpr, WHOLE: tl.constexpr,
    INTERPRET: tl.constexpr,
):  # fmt: skip
    """Grid (tiles · heads · segments,), tiles with most keys first."""
    tile = tiles - 1 - tl.program_id(0) % tiles
    head = tl.program_id(0) // tiles % heads
    segment = tl.program_id(0) // (tiles * heads)
    if SEGMENTS:
        batch = tl.load(table_ptr + segment * 5)
        q_start = tl.load(table_ptr + segment * 5 + 1)
        q_stop = tl.load(table_ptr + segment * 5 + 2)
        k_start = tl.load(table_ptr + segment * 5 + 3)
        k_stop = tl.load(table_ptr + segment * 5 + 4)
    else:
        batch = segment
        q_start, k_start = 0, 0
        q_stop, k_stop = queries, keys
    first = q_start + tile * BLOCK_M
    if first < q_stop:
        QUANTIZED: tl.constexpr = KIND is not None
        kv_head = head // group
        plane = (batch * (heads // group) + kv_head).to(tl.int64)
        i = first + tl.arange(0, BLOCK_M)
        inside = i < q_stop
        position = i - q_stop + k_stop
        # Queries: scaled, quantized, and their product with what was taken off the keys.
        q_base = q_ptr + batch.to(tl.int64) * qb + head.to(tl.int64) * qh
        shift = tl.zeros((BLOCK_M,), tl.float32)
        q_scale = tl.full((BLOCK_M,), 1.0, tl.float32)
        q_high = 0
        t_low = 0
        t_high = 0
        channel = tl.arange(0, WIDTH)
        q = load_16bit(q_base, qt, i, channel, inside, head_dim)
        if QUANTIZED:
            mean = tl.load(key_mean_ptr + plane * head_dim + channel, mask=channel < head_dim, other=0.0)
            shift += tl.sum(q.to(tl.float32) * mean[None, :], axis=1)
            wide = rotated(q, BLOCK_M, WIDTH, INTERPRET)
            if KIND == "int4":
                average = tl.sum(wide, axis=0) / tl.minimum(q_stop - first, BLOCK_M).to(tl.float32)
                wide = tl.where(inside[:, None], wide - average[None, :], 0.0)
                q_scale = scale_for(row_amax(wide), Q_LEVELS, MIN)
                q, q_high = halves(quantize_queries(wide, q_scale, KIND, INTERPRET), BLOCK_M, WIDTH)
                t_low, t_high = tl.split(average.reshape(2, WIDTH // 2).permute(1, 0))
            else:
                q_scale = scale_for(row_amax(wide), Q_LEVELS, MIN)
                q = quantize_queries(wide, q_scale, KIND, INTERPRET)
        shift *= scaling * LOG2E
        factor = scaling * LOG2E
        if QUANTIZED:
            key_base = key_ptr + plane * rows * (WIDTH // 2 if KIND == "int4" else WIDTH)
            key_scale_base = key_scale_ptr + plane * (rows if KIND == "int4" else rows // SCALED)
        else:
            key_base = key_ptr + batch.to(tl.int64) * kb + kv_head.to(tl.int64) * kh
            key_scale_base = key_scale_ptr
        if FP8_VALUES:
            value_base = value_ptr + plane * VALUE_WIDTH * rows
        else:
            value_base = value_ptr + batch.to(tl.int64) * vb + kv_head.to(tl.int64) * vh
        m = tl.full((BLOCK_M,), LOWEST, tl.float32)
        total = tl.zeros((BLOCK_M,), tl.float32)
        acc = tl.zeros((BLOCK_M, VALUE_WIDTH), tl.float32)
        # The sum is kept in units of the last tile's scale.
        unit = 1.0
        first_position = first - q_stop + k_stop
        begin, whole_begin, whole_end, end = key_range(
            first_position,
            tl.minimum(first_position + BLOCK_M, k_stop) - 1,
            k_start,
            k_stop,
            window,
            CAUSAL,
            WINDOW,
            BLOCK_N,
        )
        for run in tl.static_range(3):
            if run == 0:
                lo, hi = begin, whole_begin
            elif run == 1:
                lo, hi = whole_begin, whole_end
            else:
                lo, hi = whole_end, end
            for start in range(lo, hi, BLOCK_N):
                token = start + tl.arange(0, BLOCK_N)
                s, row_unit = scores(
                    q, q_high, q_scale, t_low, t_high, key_base, key_scale_base, kt, start, token, k_start, k_stop,
                    head_dim, factor, KIND, WIDTH, WHOLE and run == 1, INTERPRET,
                )  # fmt: skip
                if SOFTCAP:
                    s = capped(s * row_unit[:, None], shift, softcap)
                    row_unit = tl.full((BLOCK_M,), 1.0, tl.float32)
                if run != 1:
                    seen = (token >= k_start)[None, :] & (token < k_stop)[None, :]
                    if CAUSAL:
                        seen = seen & (token[None, :] <= position[:, None])
                    if WINDOW:
                        seen = seen & (token[None, :] > position[:, None] - window)
                        seen = seen & (token[None, :] < position[:, None] + window)
                    s = tl.where(seen, s, float("-inf"))
                p, alpha, m, total = softmax_step(s, row_unit, m, total, FP8_VALUES)
                if FP8_VALUES:
                    next_unit = tl.load(value_scale_ptr + plane * (rows // SCALED) + start // SCALED)
                    alpha *= unit / next_unit
                    unit = next_unit
                acc = acc * alpha[:, None] + weigh(
                    p, value_base, vt, start, token, k_start, k_stop, value_dim, rows, FP8_VALUES, VALUE_WIDTH,
                    WHOLE and run == 1, INTERPRET,
                )  # fmt: skip
        channel = tl.arange(0, VALUE_WIDTH)
        if FP8_VALUES:
            values = plane * value_dim + channel
            acc *= unit
            acc += tl.load(value_mean_ptr + values, mask=channel < value_dim, other=0.0)[None, :] * total[:, None]
        true_m = m
        if not SOFTCAP:
            true_m = m + shift
        bias: tl.constexpr = LOG2_448 if FP8_VALUES else 0.0
        denominator = total
        if SINKS:
            sink = tl.load(sink_ptr + head).to(tl.float32) * LOG2E
            denominator += tl.math.exp2(sink - true_m + bias)
        blind = total == 0.0
        result = acc / tl.where(blind, 1.0, denominator)[:, None]
        result = tl.where(blind[:, None], 0.0, result)
        lse = tl.where(blind, float("-inf"), (true_m + tl.math.log2(tl.where(blind, 1.0, total)) - bias) / LOG2E)
        out = out_ptr + ((batch.to(tl.int64) * queries + i)[:, None] * heads + head) * value_dim + channel[None, :]
        tl.store(out, result.to(out_ptr.dtype.element_ty), mask=inside[:, None] & (channel < value_dim)[None, :])
        tl.store(lse_ptr + (batch.to(tl.int64) * heads + head) * queries + i, lse, mask=inside)


def attention_triton(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    call: Call,
    sinks: Tensor | None,
    segments: Segments | None,
    *,
    interpret: bool = False,
) -> tuple[Tensor, Tensor]:
    """Launch without checks: out (batch, queries, heads, value_head_dim), and lse."""
    from .attention import FP8_VALUES, KEY_KINDS

    query, key, value = (t if t.stride(-1) == 1 else t.contiguous() for t in (query, key, value))
    batch, heads, queries, head_dim = query.shape
    kv_heads, keys, value_dim = key.shape[1], key.shape[2], value.shape[-1]
    kind, fp8_values = KEY_KINDS[call.mode], call.mode in FP8_VALUES
    bounds = None if segments is None else segments.key_bounds(batch)
    coded, coded_values = quantize_keys_values(key, value, kind, fp8_values, bounds, interpret=interpret)
    out, lse = outputs(query, value_dim, filled=segments is not None)
    width = padded_width(head_dim)
    config = launch_config(call.mode, max(width, padded_width(value_dim)), query.device)
    longest = queries if segments is None else segments.max_queries
    tiles = -(-longest // config.block_m)
    programs = tiles * heads * (batch if segments is None else len(segments.table))
    if programs == 0:
        return out, lse
    attention_kernel[(programs,)](
        query,
        key if coded is None else coded.codes,
        None if coded is None else coded.scale,
        None if coded is None else coded.mean,
        value if coded_values is None else coded_values.codes,
        None if coded_values is None else coded_values.scale,
        None if coded_values is None else coded_values.mean,
        sinks, None if segments is None else segments.table, out, lse,
        *query.stride()[:3], *key.stride()[:3], *value.stride()[:3],
        queries, keys, padded_tokens(keys), heads, heads // kv_heads, head_dim, value_dim, tiles,
        call.window or 0, call.scaling, call.softcap or 0.0,
        KIND=kind, FP8_VALUES=fp8_values, CAUSAL=call.causal, WINDOW=call.window is not None,
        SOFTCAP=call.softcap is not None, SINKS=sinks is not None, SEGMENTS=segments is not None, WIDTH=width,
        VALUE_WIDTH=padded_width(value_dim), Q_LEVELS=LEVELS[kind or "int8"], MIN=MIN_SCALE, BLOCK_M=config.block_m,
        WHOLE=head_dim == width and value_dim == padded_width(value_dim),
        # A multiply-add is one instruction; a later Triton leaves that to be asked for.
        INTERPRET=interpret, enable_fp_fusion=True, num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    return out, lse


def outputs(query: Tensor, value_dim: int, *, filled: bool) -> tuple[Tensor, Tensor]:
    """out (batch, queries, heads, value_dim) and lse; filled: for queries that no program writes."""
    batch, heads, queries, _ = query.shape
    shape, lse_shape = (batch, queries, heads, value_dim), (batch, heads, queries)
    out = torch.empty(shape, dtype=query.dtype, device=query.device)
    lse = torch.empty(lse_shape, dtype=torch.float32, device=query.device)
    return (out.zero_(), lse.fill_(-torch.inf)) if filled else (out, lse)
