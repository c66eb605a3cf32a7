"""Triton kernel of `planes.py`: one program per token. A row stays in registers; with many tokens, a long one is read
twice instead, the second time from L1 or L2, unless its sums are wanted.

On an H200, 8192 bf16 rows of 4096 held whole (4 warps) run at 82 % of the bandwidth, 8192 rows of 14336 in chunks of
2048 (8 warps) at 78 %, held whole at 50 %. For few tokens latency counts: whole rows with 16 warps take 1.8 µs (4096)
and 3.1 µs (14336).
"""

import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents

from .activations_triton import E4M3_MAX, MIN_SCALE, e4m3_by_bits
from .planes import COUNTERS, DIGITS, QuantizedInput, empty_planes

FEW_TOKENS = 512
LONG_ROW = 8192
CHUNK = 2048


@triton.jit
def to_e4m3(values, INTERPRET: tl.constexpr):
    """FP32 → e4m3fn to nearest even; |values| < 464 or NaN."""
    if INTERPRET:
        return e4m3_by_bits(values)
    return values.to(tl.float8e4nv)


@triton.jit
def magnitude_bits(values):
    """Bits of |values| as int32: they order like the values, infinity and NaN above all."""
    return values.to(tl.float32).to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def digit(rest, factor: tl.constexpr, unit: tl.constexpr, INTERPRET: tl.constexpr):
    """The rest's next digit, and what it leaves."""
    code = to_e4m3(tl.minimum(tl.maximum(rest * factor, -448.0), 448.0), INTERPRET)
    return code, rest - code.to(tl.float32) * unit


@triton.jit
def store_digits(pointer, sums, count, BLOCK: tl.constexpr, INTERPRET: tl.constexpr):
    """Writes 32 bytes for each of the first `count` of `sums`: (BLOCK,) fp32."""
    d0, rest = digit(sums, 0.0078125, 128.0, INTERPRET)
    d1, rest = digit(rest, 0.125, 8.0, INTERPRET)
    d2, rest = digit(rest, 1.0, 1.0, INTERPRET)
    d3, rest = digit(rest, 8.0, 0.125, INTERPRET)
    d4, rest = digit(rest, 8.0, 0.125, INTERPRET)
    d5, rest = digit(rest, 8.0, 0.125, INTERPRET)
    place = tl.arange(0, 32)[None, :]
    zero = tl.zeros((BLOCK, 32), tl.uint8)
    codes = tl.where(place == 0, d0.to(tl.uint8, bitcast=True)[:, None], zero)
    codes = tl.where(place == 1, d1.to(tl.uint8, bitcast=True)[:, None], codes)
    codes = tl.where(place == 2, d2.to(tl.uint8, bitcast=True)[:, None], codes)
    codes = tl.where(place == 3, d3.to(tl.uint8, bitcast=True)[:, None], codes)
    codes = tl.where(place == 4, d4.to(tl.uint8, bitcast=True)[:, None], codes)
    codes = tl.where(place == 5, d5.to(tl.uint8, bitcast=True)[:, None], codes)
    index = tl.arange(0, BLOCK)[:, None]
    tl.store(pointer + index * 32 + place, codes.to(tl.float8e4nv, bitcast=True), mask=index < count)


@triton.jit
def quantize_planes_kernel(
    x_ptr, values_ptr, scale_ptr, correction_ptr, counter_ptr, in_features, row_bytes, stride_row,
    BLOCK: tl.constexpr, WHOLE: tl.constexpr, SUM_SIZE: tl.constexpr, COUNT: tl.constexpr,
    PDL: tl.constexpr, EARLY: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """One token. SUM_SIZE: 0 for the row's sum, −1 for none. EARLY: let the next kernel start beside this one."""
    if PDL and EARLY:
        gdc_launch_dependents()
    row = tl.program_id(0).to(tl.int64)
    if row == 0:
        tl.store(counter_ptr + tl.arange(0, COUNT), tl.zeros((COUNT,), tl.int32))
    x_row = x_ptr + row * stride_row
    column = tl.arange(0, BLOCK)
    half = tl.arange(0, BLOCK // 2)
    out = values_ptr + row * (2 * row_bytes) + half
    if WHOLE:
        x = tl.load(x_row + column, mask=column < in_features, other=0.0)
        top = magnitude_bits(x)
    else:
        top = tl.zeros((BLOCK,), tl.int32)
        for start in tl.range(0, in_features, BLOCK, num_stages=2):
            x = tl.load(x_row + start + column, mask=start + column < in_features, other=0.0)
            top = tl.maximum(top, magnitude_bits(x))
    bits = tl.max(top, axis=0)
    scale = tl.maximum(tl.math.div_rn(bits.to(tl.float32, bitcast=True), E4M3_MAX), MIN_SCALE)
    scale = tl.where(bits == 0, 1.0, scale)
    scale = tl.where(bits >= 0x7F800000, float("nan"), scale)
    inverse = tl.math.div_rn(1.0, scale)
    tl.store(scale_ptr + row, scale)
    if WHOLE:
        x8 = to_e4m3(x.to(tl.float32) * inverse, INTERPRET)
        even, odd = tl.split(tl.reshape(x8, (BLOCK // 2, 2)))
        tl.store(out, even, mask=half < row_bytes)
        tl.store(out + row_bytes, odd, mask=half < row_bytes)
        if SUM_SIZE == 0:
            tl.store(correction_ptr + row, tl.sum(x8.to(tl.float32), axis=0) * 0.015625)
        elif SUM_SIZE > 0:
            sums = tl.sum(tl.reshape(x8.to(tl.float32), (BLOCK // SUM_SIZE, SUM_SIZE)), axis=1)
            count = in_features // SUM_SIZE
            store_digits(correction_ptr + row * (count * 32), sums, count, BLOCK // SUM_SIZE, INTERPRET)
    else:
        for start in range(0, 2 * row_bytes, BLOCK):
            x = tl.load(x_row + start + column, mask=start + column < in_features, other=0.0)
            x8 = to_e4m3(x.to(tl.float32) * inverse, INTERPRET)
            even, odd = tl.split(tl.reshape(x8, (BLOCK // 2, 2)))
            inside = start // 2 + half < row_bytes
            tl.store(out + start // 2, even, mask=inside)
            tl.store(out + start // 2 + row_bytes, odd, mask=inside)
    if PDL and not EARLY:
        gdc_launch_dependents()


def quantize_planes_triton(
    x: Tensor, row_bytes: int, sum_size: int | None, *, interpret: bool = False
) -> QuantizedInput:
    """See `quantize_planes_ref`."""
    assert DIGITS == 32
    x = x if x.stride(1) == 1 else x.contiguous()
    tokens, in_features = x.shape
    planes = empty_planes(x, row_bytes, sum_size)
    if tokens == 0:
        planes.counters.zero_()
        return planes
    block = max(triton.next_power_of_2(2 * row_bytes), sum_size or 0)
    whole = sum_size is not None or tokens < FEW_TOKENS or block <= LONG_ROW
    if not whole:
        block = CHUNK
    few = tokens < FEW_TOKENS
    num_warps = max(1, min(16, block // 256)) if few else max(1, min(8, block // 1024)) if whole else 8
    quantize_planes_kernel[(tokens,)](
        x,
        planes.values,
        planes.scale,
        planes.correction,
        planes.counters,
        in_features,
        row_bytes,
        x.stride(0),
        BLOCK=block,
        WHOLE=whole,
        SUM_SIZE=-1 if sum_size is None else sum_size,
        COUNT=COUNTERS,
        PDL=not interpret,
        # With many tokens the next kernel's programs would crowd onto the multiprocessors that this one leaves free.
        EARLY=tokens <= 16,
        INTERPRET=interpret,
        num_warps=num_warps,
    )
    return planes
