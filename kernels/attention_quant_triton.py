"""Triton kernels for `attention_quant.py`: one pass for means and ranges, one that writes codes.

The second pass follows at once, so what the first read is still in L2 where it fits there. A program of the first pass
reads a chunk of the values, all tokens, and of the keys those that are sampled; a program of the second adds up the
chunks' sums on its own, which costs less than a third launch.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .activations import E4M3_MAX, MIN_SCALE
from .activations_triton import e4m3_by_bits
from .attention_quant import (
    LEVELS,
    TILE,
    QuantizedKeys,
    QuantizedValues,
    padded_tokens,
    padded_width,
    sampling_step,
)

CHUNKS = 16
"""At most so many partial sums per head: 32 KB for a program of the second pass to read, beside 64 KB of tokens."""
ROUND = tl.constexpr(12582912.0)
"""1.5 · 2²³: adding and subtracting it rounds to the nearest integer, ties to even."""
TOKENS = tl.constexpr(TILE)


@triton.jit
def row_bounds(bounds_ptr, batch, tokens, HAS_BOUNDS: tl.constexpr):
    """First and last + 1 key that counts."""
    first, last = 0, tokens
    if HAS_BOUNDS:
        first = tl.load(bounds_ptr + 2 * batch)
        last = tl.load(bounds_ptr + 2 * batch + 1)
    return first, last


@triton.jit
def load_tile(ptr, stride_t, token, channel, valid, channels):
    """(tokens, channels) in FP32, zeros where not valid."""
    place = ptr + token.to(tl.int64)[:, None] * stride_t + channel[None, :]
    return tl.load(place, mask=valid[:, None] & (channel < channels)[None, :], other=0.0).to(tl.float32)


@triton.jit
def sums_kernel(
    key_ptr, value_ptr, bounds_ptr, sums_ptr, kb, kh, kt, vb, vh, vt, tokens, head_dim, value_dim, heads, chunk, step,
    HAS_BOUNDS: tl.constexpr, HAS_KEYS: tl.constexpr, HAS_VALUES: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid (chunks, batch · heads) → sums: (batch · heads, chunks, 4, WIDTH): Σk sampled, Σv, min v, max v."""
    row = tl.program_id(1)
    batch, head = row // heads, row % heads
    first, last = row_bounds(bounds_ptr, batch, tokens, HAS_BOUNDS)
    begin = tl.maximum(tl.program_id(0) * chunk, first)
    end = tl.minimum((tl.program_id(0) + 1) * chunk, last)
    channel = tl.arange(0, WIDTH)
    out = sums_ptr + ((row * tl.num_programs(0) + tl.program_id(0)).to(tl.int64)) * (4 * WIDTH) + channel
    lane = tl.arange(0, BLOCK)
    if HAS_KEYS:
        base = key_ptr + batch.to(tl.int64) * kb + head.to(tl.int64) * kh
        total = tl.zeros((WIDTH,), tl.float32)
        for start in range(tl.cdiv(begin, step) * step, end, BLOCK * step):
            token = start + lane * step
            total += tl.sum(load_tile(base, kt, token, channel, token < end, head_dim), axis=0)
        tl.store(out, total)
    if HAS_VALUES:
        base = value_ptr + batch.to(tl.int64) * vb + head.to(tl.int64) * vh
        total = tl.zeros((WIDTH,), tl.float32)
        low = tl.full((WIDTH,), float("inf"), tl.float32)
        high = tl.full((WIDTH,), float("-inf"), tl.float32)
        for start in range(begin, end, BLOCK):
            token = start + lane
            values = load_tile(base, vt, token, channel, token < end, value_dim)
            total += tl.sum(values, axis=0)
            seen = (token < end)[:, None]
            low = tl.minimum(low, tl.min(tl.where(seen, values, float("inf")), axis=0))
            high = tl.maximum(high, tl.max(tl.where(seen, values, float("-inf")), axis=0))
        tl.store(out + WIDTH, total)
        tl.store(out + 2 * WIDTH, low)
        tl.store(out + 3 * WIDTH, high)


@triton.jit
def scale_for(amax, LEVELS_: tl.constexpr, MIN: tl.constexpr):
    """amax / levels; 1 where all is zero; NaN where amax is no finite number."""
    scale = tl.maximum(tl.div_rn(amax, tl.full(amax.shape, LEVELS_, tl.float32)), MIN)
    scale = tl.where(amax == 0, 1.0, scale)
    return tl.where(amax < float("inf"), scale, float("nan"))


@triton.jit
def row_amax(values):
    """max |values| of each row, infinite where a value is NaN, which tl.max would drop."""
    size = tl.abs(values)
    return tl.max(tl.where(size < float("inf"), size, float("inf")), axis=1)


@triton.jit
def to_integers(values):
    """Nearest integers, ties to even; int8."""
    return ((values + ROUND) - ROUND).to(tl.int8)


@triton.jit
def to_e4m3(values, INTERPRET: tl.constexpr):
    """|values| < 464, or NaN."""
    if INTERPRET:
        codes = e4m3_by_bits(values)
    else:
        codes = values.to(tl.float8e4nv)
    return codes


@triton.jit
def write_keys(
    base, sums, kt, codes_ptr, scale_ptr, mean_ptr, token, valid, rows, head_dim, step, first, last, chunks, place,
    WIDTH: tl.constexpr, STORED: tl.constexpr, KIND: tl.constexpr, LEVELS_: tl.constexpr, MIN: tl.constexpr,
    CHUNKS_: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """Codes and scales of a tile of keys, in halves of their channels, which INT4 puts into one byte."""
    HALF: tl.constexpr = STORED // 2
    channel = tl.arange(0, HALF)
    part = tl.arange(0, CHUNKS_)
    count = tl.maximum(tl.cdiv(last, step) - tl.cdiv(first, step), 1).to(tl.float32)
    partial = sums + part[:, None] * (4 * WIDTH) + channel[None, :]
    inside = (part < chunks)[:, None]
    low_mean = tl.sum(tl.load(partial, mask=inside, other=0.0), axis=0) / count
    high_mean = tl.sum(tl.load(partial + HALF, mask=inside, other=0.0), axis=0) / count
    seen = valid[:, None]
    low = load_tile(base, kt, token, channel, valid, head_dim) - low_mean[None, :]
    low = tl.where(seen & (channel < head_dim)[None, :], low, 0.0)
    high = load_tile(base, kt, token, channel + HALF, valid, head_dim) - high_mean[None, :]
    high = tl.where(seen & (channel + HALF < head_dim)[None, :], high, 0.0)
    amax = tl.maximum(row_amax(low), row_amax(high))
    if KIND == "int4":
        scale = scale_for(amax, LEVELS_, MIN)
        tl.store(scale_ptr + place * rows + token, scale)
        inverse = tl.div_rn(tl.full(scale.shape, 1.0, tl.float32), scale)[:, None]
    else:
        scale = scale_for(tl.max(amax, axis=0), LEVELS_, MIN)
        tl.store(scale_ptr + place * tl.num_programs(0) + tl.program_id(0), scale)
        inverse = tl.div_rn(1.0, scale)
    out = codes_ptr + (place * rows + token)[:, None] * (HALF if KIND == "int4" else STORED) + channel[None, :]
    if KIND == "int4":
        nibbles = (to_integers(low * inverse) + 8) | ((to_integers(high * inverse) + 8) << 4)
        tl.store(out, nibbles.to(tl.uint8, bitcast=True))
    elif KIND == "int8":
        tl.store(out, to_integers(low * inverse))
        tl.store(out + HALF, to_integers(high * inverse))
    else:
        tl.store(out, to_e4m3(low * inverse, INTERPRET))
        tl.store(out + HALF, to_e4m3(high * inverse, INTERPRET))
    if tl.program_id(0) == 0:
        means = mean_ptr + place * head_dim + channel
        tl.store(means, low_mean, mask=channel < head_dim)
        tl.store(means + HALF, high_mean, mask=channel + HALF < head_dim)


@triton.jit
def write_values(
    base, sums, vt, codes_ptr, scale_ptr, mean_ptr, token, valid, rows, value_dim, first, last, chunks, place,
    WIDTH: tl.constexpr, STORED: tl.constexpr, LEVELS_: tl.constexpr, MIN: tl.constexpr, CHUNKS_: tl.constexpr,
    INTERPRET: tl.constexpr,
):  # fmt: skip
    """Codes of a tile of values, transposed, tokens in the order of `TOKEN_ORDER`."""
    channel = tl.arange(0, STORED)
    part = tl.arange(0, CHUNKS_)
    partial = sums + part[:, None] * (4 * WIDTH) + channel[None, :]
    inside = (part < chunks)[:, None]
    count = tl.maximum(last - first, 1).to(tl.float32)
    mean = tl.sum(tl.load(partial + WIDTH, mask=inside, other=0.0), axis=0) / count
    low = tl.min(tl.load(partial + 2 * WIDTH, mask=inside, other=float("inf")), axis=0)
    high = tl.max(tl.load(partial + 3 * WIDTH, mask=inside, other=float("-inf")), axis=0)
    mean = tl.where(last > first, mean, 0.0)
    amax = tl.where(last > first, tl.maximum(high - mean, mean - low), 0.0)
    scale = scale_for(amax, LEVELS_, MIN)
    inverse = tl.div_rn(tl.full(scale.shape, 1.0, tl.float32), scale)
    values = load_tile(base, vt, token, channel, valid, value_dim)
    values = tl.where(valid[:, None] & (channel < value_dim)[None, :], (values - mean[None, :]) * inverse[None, :], 0.0)
    codes = to_e4m3(values, INTERPRET)
    codes = codes.reshape(TOKENS // 16, 2, 4, 2, STORED).permute(0, 2, 1, 3, 4).reshape(TOKENS, STORED)
    tl.store(codes_ptr + (place * STORED + channel)[:, None] * rows + token[None, :], tl.trans(codes))
    if tl.program_id(0) == 0:
        tl.store(scale_ptr + place * value_dim + channel, scale, mask=channel < value_dim)
        tl.store(mean_ptr + place * value_dim + channel, mean, mask=channel < value_dim)


@triton.jit
def codes_kernel(
    key_ptr, value_ptr, bounds_ptr, sums_ptr, key_codes, key_scale, key_mean, value_codes, value_scale, value_mean,
    kb, kh, kt, vb, vh, vt, tokens, rows, head_dim, value_dim, heads, chunks, step,
    HAS_BOUNDS: tl.constexpr, KIND: tl.constexpr, HAS_VALUES: tl.constexpr, WIDTH: tl.constexpr,
    KEY_WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, KEY_LEVELS: tl.constexpr, VALUE_LEVELS: tl.constexpr,
    MIN: tl.constexpr, CHUNKS_: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """Grid (padded tokens / TILE, batch · heads)."""
    row = tl.program_id(1)
    batch, head = row // heads, row % heads
    place = row.to(tl.int64)
    first, last = row_bounds(bounds_ptr, batch, tokens, HAS_BOUNDS)
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    valid = (token >= first) & (token < last)
    sums = sums_ptr + place * chunks * (4 * WIDTH)
    if KIND is not None:
        base = key_ptr + batch.to(tl.int64) * kb + head.to(tl.int64) * kh
        write_keys(
            base, sums, kt, key_codes, key_scale, key_mean, token, valid, rows, head_dim, step, first, last, chunks,
            place, WIDTH, KEY_WIDTH, KIND, KEY_LEVELS, MIN, CHUNKS_, INTERPRET,
        )  # fmt: skip
    if HAS_VALUES:
        base = value_ptr + batch.to(tl.int64) * vb + head.to(tl.int64) * vh
        write_values(
            base, sums, vt, value_codes, value_scale, value_mean, token, valid, rows, value_dim, first, last, chunks,
            place, WIDTH, VALUE_WIDTH, VALUE_LEVELS, MIN, CHUNKS_, INTERPRET,
        )  # fmt: skip


def quantize_keys_values(
    key: Tensor, value: Tensor, kind: str | None, fp8_values: bool, bounds: Tensor | None, *, interpret: bool = False
) -> tuple[QuantizedKeys | None, QuantizedValues | None]:
    """Kernels for `quantize_keys_ref` and `quantize_values_ref`, without checks; head_dim is contiguous in both.

    kind: of the keys, None leaves them out. fp8_values: whether the values are wanted.
    """
    if kind is None and not fp8_values:
        return None, None
    batch, heads, tokens, head_dim = key.shape
    value_dim = value.shape[-1]
    rows, key_width, value_width = padded_tokens(tokens), padded_width(head_dim), padded_width(value_dim)
    step = sampling_step(tokens)
    chunk = max(512, -(-tokens // CHUNKS))
    chunks, width = -(-tokens // chunk), max(key_width, value_width)

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=key.device)

    sums = empty(batch * heads, chunks, 4, width)
    keys = values = None
    if kind is not None:
        stored = key_width // 2 if kind == "int4" else key_width
        dtype = {"int8": torch.int8, "int4": torch.uint8, "fp8": torch.float8_e4m3fn}[kind]
        keys = QuantizedKeys(
            empty(batch, heads, rows, stored, dtype=dtype),
            empty(batch, heads, rows if kind == "int4" else rows // TILE),
            empty(batch, heads, head_dim),
        )
    if fp8_values:
        values = QuantizedValues(
            empty(batch, heads, value_width, rows, dtype=torch.float8_e4m3fn),
            empty(batch, heads, value_dim),
            empty(batch, heads, value_dim),
        )
    strides = (*key.stride()[:3], *value.stride()[:3])
    sums_kernel[(chunks, batch * heads)](
        key, value, bounds, sums, *strides, tokens, head_dim, value_dim, heads, chunk, step,
        HAS_BOUNDS=bounds is not None, HAS_KEYS=keys is not None, HAS_VALUES=values is not None, WIDTH=width,
        BLOCK=64, num_warps=8,
    )  # fmt: skip
    codes_kernel[(rows // TILE, batch * heads)](
        key, value, bounds, sums,
        *((keys.codes, keys.scale, keys.mean) if keys is not None else (None, None, None)),
        *((values.codes, values.scale, values.mean) if values is not None else (None, None, None)),
        *strides, tokens, rows, head_dim, value_dim, heads, chunks, step,
        HAS_BOUNDS=bounds is not None, KIND=kind, HAS_VALUES=values is not None, WIDTH=width,
        KEY_WIDTH=key_width, VALUE_WIDTH=value_width, KEY_LEVELS=LEVELS[kind or "int8"], VALUE_LEVELS=E4M3_MAX,
        MIN=MIN_SCALE, CHUNKS_=CHUNKS, INTERPRET=interpret, num_warps=8,
    )  # fmt: skip
    return keys, values
