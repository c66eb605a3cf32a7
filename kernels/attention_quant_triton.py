"""Triton kernels for `attention_quant.py`: a small one for the means, and one that turns tiles into codes."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import attention_quant
from .activations import E4M3_MAX
from .activations_triton import e4m3_by_bits
from .attention_quant import (
    LEVELS,
    MIN_SCALE,
    MIN_VALUE_SCALE,
    TILE,
    QuantizedKeys,
    QuantizedValues,
    padded_tokens,
    padded_width,
    sampling_step,
)

CHANNELS = 16
"""Channels of a program that takes means: 32 bytes of a token, the least that memory moves."""
ROUND = tl.constexpr(12582912.0)
"""1.5 · 2²³: adding and subtracting it rounds to the nearest integer, ties to even."""
TOKENS = tl.constexpr(TILE)
BLOCK = tl.constexpr(attention_quant.BLOCK)


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


@triton.jit(do_not_specialize=["tokens", "heads", "step"])
def means_kernel(
    key_ptr, value_ptr, bounds_ptr, key_mean, value_mean, kb, kh, kt, vb, vh, vt, tokens, head_dim, value_dim, heads,
    step, HAS_BOUNDS: tl.constexpr, HAS_KEYS: tl.constexpr, HAS_VALUES: tl.constexpr, BLOCK: tl.constexpr,
    CHANNELS: tl.constexpr,
):  # fmt: skip
    """Grid (channels / CHANNELS, batch · heads, keys or values): mean of the tokens at multiples of `step`."""
    row = tl.program_id(1)
    batch, head = row // heads, row % heads
    first, last = row_bounds(bounds_ptr, batch, tokens, HAS_BOUNDS)
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    total = tl.zeros((BLOCK, CHANNELS), tl.float32)
    count = tl.maximum(tl.cdiv(last, step) - tl.cdiv(first, step), 1).to(tl.float32)
    begin = tl.cdiv(first, step) * step
    if HAS_KEYS and tl.program_id(2) == 0:
        base = key_ptr + batch.to(tl.int64) * kb + head.to(tl.int64) * kh
        for start in range(begin, last, BLOCK * step):
            token = start + tl.arange(0, BLOCK) * step
            total += load_tile(base, kt, token, channel, token < last, head_dim)
        tl.store(key_mean + row * head_dim + channel, tl.sum(total, axis=0) / count, mask=channel < head_dim)
    if HAS_VALUES and tl.program_id(2) == 1:
        base = value_ptr + batch.to(tl.int64) * vb + head.to(tl.int64) * vh
        for start in range(begin, last, BLOCK * step):
            token = start + tl.arange(0, BLOCK) * step
            total += load_tile(base, vt, token, channel, token < last, value_dim)
        tl.store(value_mean + row * value_dim + channel, tl.sum(total, axis=0) / count, mask=channel < value_dim)


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
def to_integers(values, inverse):
    """values · inverse to the nearest integers, ties to even, from the exact product; int8."""
    return (tl.fma(values, tl.broadcast_to(inverse, values.shape), ROUND) - ROUND).to(tl.int8)


@triton.jit
def to_e4m3(values, INTERPRET: tl.constexpr):
    """|values| < 464, or NaN."""
    if INTERPRET:
        codes = e4m3_by_bits(values)
    else:
        codes = values.to(tl.float8e4nv)
    return codes


@triton.jit
def signs(SIZE: tl.constexpr, dtype: tl.constexpr):
    """Sylvester's Hadamard matrix: −1 where row and column have an odd number of common one bits."""
    i = tl.arange(0, SIZE)
    common = i[:, None] & i[None, :]
    common ^= common >> 4
    common ^= common >> 2
    common ^= common >> 1
    return (1 - 2 * (common & 1)).to(dtype)


@triton.jit
def rotated(x, ROWS: tl.constexpr, WIDTH: tl.constexpr, INTERPRET: tl.constexpr):
    """(ROWS, WIDTH) of 16 bit → x·H / √block in FP32: exact products, added in FP32."""
    SIZE: tl.constexpr = min(WIDTH, BLOCK)
    rows = x.reshape(ROWS * WIDTH // SIZE, SIZE)
    if INTERPRET:
        turned = tl.dot(rows.to(tl.float32), signs(SIZE, tl.float32), input_precision="ieee")
    else:
        turned = tl.dot(rows, signs(SIZE, x.dtype))
    return turned.reshape(ROWS, WIDTH) * SIZE**-0.5


@triton.jit
def halves(x, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """(ROWS, WIDTH) → its left and right columns."""
    left, right = tl.split(x.reshape(ROWS, 2, WIDTH // 2).permute(0, 2, 1))
    return left, right


@triton.jit
def rotated_mean(mean, WIDTH: tl.constexpr):
    """(WIDTH,) FP32 → mean·H / √block."""
    SIZE: tl.constexpr = min(WIDTH, BLOCK)
    blocks = mean.reshape(WIDTH // SIZE, SIZE)
    turned = tl.sum(blocks[:, :, None] * signs(SIZE, tl.float32)[None, :, :], axis=1)
    return turned.reshape(WIDTH) * SIZE**-0.5


@triton.jit
def smoothed(base, stride_t, mean_ptr, token, channel, valid, channels):
    """(tokens, channels) FP32 without their mean; zeros where there is no token or channel."""
    values = load_tile(base, stride_t, token, channel, valid, channels)
    mean = tl.load(mean_ptr + channel, mask=channel < channels, other=0.0)
    return tl.where(valid[:, None], values - mean[None, :], 0.0)


@triton.jit
def write_keys(
    base, kt, codes_ptr, scale_ptr, mean_ptr, token, valid, rows, head_dim, place,
    STORED: tl.constexpr, KIND: tl.constexpr, LEVELS_: tl.constexpr, MIN: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """Codes and scales of a tile of rotated keys; INT4 in halves of the channels, which go into one byte."""
    channel = tl.arange(0, STORED)
    seen = valid[:, None] & (channel < head_dim)[None, :]
    keys = tl.load(base + token.to(tl.int64)[:, None] * kt + channel[None, :], mask=seen, other=0.0)
    mean = tl.load(mean_ptr + place * head_dim + channel, mask=channel < head_dim, other=0.0)
    values = rotated(keys, TOKENS, STORED, INTERPRET) - rotated_mean(mean, STORED)[None, :]
    values = tl.where(valid[:, None], values, 0.0)
    if KIND == "int4":
        HALF: tl.constexpr = STORED // 2
        scale = scale_for(row_amax(values), LEVELS_, MIN)
        tl.store(scale_ptr + place * rows + token, scale)
        inverse = tl.div_rn(tl.full(scale.shape, 1.0, tl.float32), scale)[:, None]
        low, high = halves(to_integers(values, inverse) + 8, TOKENS, STORED)
        out = codes_ptr + (place * rows + token)[:, None] * HALF + tl.arange(0, HALF)[None, :]
        tl.store(out, (low | (high << 4)).to(tl.uint8, bitcast=True))
    else:
        scale = scale_for(tl.max(row_amax(values), axis=0), LEVELS_, MIN)
        tl.store(scale_ptr + place * tl.num_programs(0) + tl.program_id(0), scale)
        inverse = tl.div_rn(1.0, scale)
        out = codes_ptr + (place * rows + token)[:, None] * STORED + channel[None, :]
        if KIND == "int8":
            tl.store(out, to_integers(values, inverse))
        else:
            tl.store(out, to_e4m3(values * inverse, INTERPRET))


@triton.jit
def write_values(
    base, vt, codes_ptr, scale_ptr, mean_ptr, token, valid, rows, value_dim, place,
    STORED: tl.constexpr, LEVELS_: tl.constexpr, MIN: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """Codes of a tile of values, transposed, tokens in the order of `TOKEN_ORDER`."""
    channel = tl.arange(0, STORED)
    values = smoothed(base, vt, mean_ptr + place * value_dim, token, channel, valid, value_dim)
    scale = scale_for(tl.max(row_amax(values), axis=0), LEVELS_, MIN)
    tl.store(scale_ptr + place * tl.num_programs(0) + tl.program_id(0), scale)
    codes = to_e4m3(values * tl.div_rn(1.0, scale), INTERPRET)
    codes = codes.reshape(TOKENS // 16, 2, 4, 2, STORED).permute(0, 2, 1, 3, 4).reshape(TOKENS, STORED)
    tl.store(codes_ptr + (place * STORED + channel)[:, None] * rows + token[None, :], tl.trans(codes))


@triton.jit(do_not_specialize=["tokens", "heads"])
def codes_kernel(
    key_ptr, value_ptr, bounds_ptr, key_codes, key_scale, key_mean, value_codes, value_scale, value_mean,
    kb, kh, kt, vb, vh, vt, tokens, rows, head_dim, value_dim, heads,
    HAS_BOUNDS: tl.constexpr, KIND: tl.constexpr, HAS_VALUES: tl.constexpr, KEY_WIDTH: tl.constexpr,
    VALUE_WIDTH: tl.constexpr, KEY_LEVELS: tl.constexpr, VALUE_LEVELS: tl.constexpr, MIN: tl.constexpr,
    MIN_VALUE: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """Grid (padded tokens / TILE, batch · heads, keys or values)."""
    row = tl.program_id(1)
    batch, head = row // heads, row % heads
    place = row.to(tl.int64)
    first, last = row_bounds(bounds_ptr, batch, tokens, HAS_BOUNDS)
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    valid = (token >= first) & (token < last)
    if KIND is not None and tl.program_id(2) == 0:
        base = key_ptr + batch.to(tl.int64) * kb + head.to(tl.int64) * kh
        write_keys(
            base, kt, key_codes, key_scale, key_mean, token, valid, rows, head_dim, place, KEY_WIDTH, KIND, KEY_LEVELS,
            MIN, INTERPRET,
        )  # fmt: skip
    if HAS_VALUES and tl.program_id(2) == 1:
        base = value_ptr + batch.to(tl.int64) * vb + head.to(tl.int64) * vh
        write_values(
            base, vt, value_codes, value_scale, value_mean, token, valid, rows, value_dim, place, VALUE_WIDTH,
            VALUE_LEVELS, MIN_VALUE, INTERPRET,
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

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=key.device)

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
            empty(batch, heads, rows // TILE),
            empty(batch, heads, value_dim),
        )
    strides = (*key.stride()[:3], *value.stride()[:3])
    means_kernel[(max(key_width, value_width) // CHANNELS, batch * heads, 2)](
        key, value, bounds, None if keys is None else keys.mean, None if values is None else values.mean, *strides,
        tokens, head_dim, value_dim, heads, sampling_step(tokens), HAS_BOUNDS=bounds is not None,
        HAS_KEYS=keys is not None, HAS_VALUES=values is not None, BLOCK=128, CHANNELS=CHANNELS, num_warps=4,
    )  # fmt: skip
    codes_kernel[(rows // TILE, batch * heads, 2)](
        key, value, bounds,
        *((keys.codes, keys.scale, keys.mean) if keys is not None else (None, None, None)),
        *((values.codes, values.scale, values.mean) if values is not None else (None, None, None)),
        *strides, tokens, rows, head_dim, value_dim, heads,
        HAS_BOUNDS=bounds is not None, KIND=kind, HAS_VALUES=values is not None,
        KEY_WIDTH=key_width, VALUE_WIDTH=value_width, KEY_LEVELS=LEVELS[kind or "int8"], VALUE_LEVELS=E4M3_MAX,
        MIN=MIN_SCALE, MIN_VALUE=MIN_VALUE_SCALE, INTERPRET=interpret, num_warps=8,
    )  # fmt: skip
    return keys, values
