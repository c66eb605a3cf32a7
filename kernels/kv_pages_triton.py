"""Triton kernels of `kv_pages.py`: tokens quantized and written into pages, and read again, one program per page and
KV head.

Codes and parameters are those of `kv_codes.quantize_tokens` bit for bit: the same operations in the same order, none
fused, divisions rounded correctly. Tokens of a page that are not to be written keep what they have.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .attention_quant import padded_width
from .attention_quant_triton import to_e4m3
from .decode_tiles_triton import turned
from .kv_codes import LEVELS, MIN_SCALE, KeyMap, rotation_block
from .kv_pages import PAGE, PageLayout, Pages

PAGE_ = tl.constexpr(PAGE)
MIN_SCALE_ = tl.constexpr(MIN_SCALE)
LEVELS_ = tl.constexpr(float(LEVELS))
ROUND = tl.constexpr(12582912.0)
"""1.5 · 2²³: a sum with it has no bits behind the point, rounded to the nearest, ties to even."""
LENGTHS = ["start", "stop", "length", "heads"]


@triton.jit
def outwards(x, DOWN: tl.constexpr):
    """FP32 rounded to the next bf16 below, or above; still FP32."""
    bits = x.to(tl.int32, bitcast=True) & -65536
    cut = bits.to(tl.float32, bitcast=True)
    further = (bits + 65536).to(tl.float32, bitcast=True)
    return tl.where(cut > x, further, cut) if DOWN else tl.where(cut < x, further, cut)


@triton.jit
def codes_of(x, inside, KIND: tl.constexpr, INTERPRET: tl.constexpr):
    """(tokens, channels) FP32 → codes FP32, and two parameters (tokens,); inside: which channels there are."""
    infinite: tl.constexpr = float("inf")
    finite = (tl.max(tl.where(tl.abs(x) < infinite, 0, 1), axis=1) == 0)[:, None]
    if KIND == "fp8":
        amax = tl.max(tl.abs(x), axis=1)
        scale = tl.maximum(tl.div_rn(amax, tl.full(amax.shape, 448.0, tl.float32)), MIN_SCALE_)
        least = scale
        codes = x * tl.div_rn(tl.full(scale.shape, 1.0, tl.float32), scale)[:, None]
        codes = tl.minimum(tl.maximum(codes, -448.0), 448.0)
    else:
        least = outwards(tl.min(tl.where(inside, x, infinite), axis=1), True)
        high = tl.max(tl.where(inside, x, -infinite), axis=1)
        scale = tl.maximum(tl.div_rn(high - least, tl.full(high.shape, LEVELS_, tl.float32)), MIN_SCALE_)
        scale = outwards(scale, False)
        finite = finite & (scale < infinite)[:, None]
        codes = (x - least[:, None]) * tl.div_rn(tl.full(scale.shape, 1.0, tl.float32), scale)[:, None]
        codes = tl.minimum(tl.maximum((codes + ROUND) - ROUND, 0.0), LEVELS_)
    keep = tl.reshape(finite, (x.shape[0],))
    scale = tl.where(keep, scale, float("nan"))
    least = tl.where(keep, least, float("nan"))
    return tl.where(finite & inside, codes, 0.0), scale, least


@triton.jit
def write_parameters(record, token, write, scale, least, KIND: tl.constexpr):
    """Parameters of tokens."""
    if KIND == "fp8":
        tl.store(record.to(tl.pointer_type(tl.float32)) + token, scale, mask=write)
    else:
        # NaN cut to its upper half is still NaN, and numbers of bf16 lose nothing.
        low = scale.to(tl.uint32, bitcast=True) >> 16
        high = least.to(tl.uint32, bitcast=True) & 0xFFFF0000
        tl.store(record.to(tl.pointer_type(tl.uint32)) + token, low | high, mask=write)


@triton.jit
def mapped(
    x, mean_ptr, factor_ptr, kv_head, channel, inside, head_dim,
    MEAN: tl.constexpr, FACTORS: tl.constexpr, ROTATE: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Keys as they are coded."""
    if MEAN:
        x -= tl.load(mean_ptr + kv_head * head_dim + channel, mask=channel < head_dim, other=0.0)[None, :]
    if FACTORS:
        factor = tl.load(factor_ptr + kv_head * head_dim + channel, mask=channel < head_dim, other=1.0)[None, :]
        x = tl.div_rn(x, tl.broadcast_to(factor, x.shape))
    x = tl.where(inside, x, 0.0)
    if ROTATE:
        x = turned(x, PAGE_, WIDTH, ROTATE)
    return x


@triton.jit
def write_keys(
    base, stride, source, token, write, record, mean_ptr, factor_ptr, kv_head,
    KIND: tl.constexpr, HEAD_DIM: tl.constexpr, KEY_PARAMETERS: tl.constexpr, MEAN: tl.constexpr,
    FACTORS: tl.constexpr, ROTATE: tl.constexpr, WIDTH: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """Keys of a page. source: where each of its tokens lies; write: which are written."""
    channel = tl.arange(0, WIDTH)
    inside = (channel < HEAD_DIM)[None, :]
    x = tl.load(base + source[:, None] * stride + channel[None, :], mask=write[:, None] & inside, other=0.0)
    if KIND == "bf16":
        place = record.to(tl.pointer_type(tl.bfloat16)) + token[:, None] * HEAD_DIM + channel[None, :]
        tl.store(place, x.to(tl.bfloat16), mask=write[:, None] & inside)
    else:
        x = mapped(
            x.to(tl.float32), mean_ptr, factor_ptr, kv_head, channel, inside, HEAD_DIM, MEAN, FACTORS, ROTATE, WIDTH
        )
        codes, scale, least = codes_of(x, inside, KIND, INTERPRET)
        write_parameters(record + KEY_PARAMETERS, token, write, scale, least, KIND)
        if KIND == "fp8":
            place = record.to(tl.pointer_type(tl.float8e4nv)) + token[:, None] * HEAD_DIM + channel[None, :]
            tl.store(place, to_e4m3(codes, INTERPRET), mask=write[:, None] & inside)
        else:
            HALF: tl.constexpr = HEAD_DIM // 2
            whole = codes.to(tl.int32)
            index = tl.broadcast_to(tl.minimum(channel + HALF, WIDTH - 1)[None, :], (PAGE_, WIDTH))
            both = (whole | (tl.gather(whole, index, axis=1) << 4)).to(tl.uint8)
            tl.store(
                record + token[:, None] * HALF + channel[None, :], both,
                mask=write[:, None] & (channel < HALF)[None, :],
            )  # fmt: skip


@triton.jit
def write_values(
    base, stride, source, token, write, page, start, stop, record,
    KIND: tl.constexpr, VALUE_DIM: tl.constexpr, VALUES: tl.constexpr, VALUE_PARAMETERS: tl.constexpr,
    VALUE_WIDTH: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """Values of a page, as `write_keys`; write is [start, stop)."""
    channel = tl.arange(0, VALUE_WIDTH)
    inside = (channel < VALUE_DIM)[None, :]
    x = tl.load(base + source[:, None] * stride + channel[None, :], mask=write[:, None] & inside, other=0.0)
    if KIND == "bf16":
        place = (record + VALUES).to(tl.pointer_type(tl.bfloat16)) + token[:, None] * VALUE_DIM + channel[None, :]
        tl.store(place, x.to(tl.bfloat16), mask=write[:, None] & inside)
    else:
        codes, scale, least = codes_of(x.to(tl.float32), inside, KIND, INTERPRET)
        write_parameters(record + VALUE_PARAMETERS, token, write, scale, least, KIND)
        if KIND == "fp8":
            place = (record + VALUES).to(tl.pointer_type(tl.float8e4nv)) + channel[:, None] * PAGE_ + token[None, :]
            tl.store(place, tl.trans(to_e4m3(codes, INTERPRET)), mask=tl.trans(write[:, None] & inside))
        else:
            LATER: tl.constexpr = PAGE_ // 2
            early = tl.arange(0, LATER)
            low, high = tl.split(tl.trans(codes.to(tl.int32)).reshape(VALUE_WIDTH, 2, LATER).permute(0, 2, 1))
            place = record + VALUES + channel[:, None] * LATER + early[None, :]
            there = (channel < VALUE_DIM)[:, None]
            # The other token of a byte may have been written before.
            old = tl.load(place, mask=there, other=0).to(tl.int32)
            column = page * PAGE_ + early
            low = tl.where(((column >= start) & (column < stop))[None, :], low, old & 15)
            column += LATER
            high = tl.where(((column >= start) & (column < stop))[None, :], high, old >> 4)
            tl.store(place, (low | (high << 4)).to(tl.uint8), mask=there)


@triton.jit(do_not_specialize=LENGTHS)
def write_kernel(
    key_ptr, value_ptr, table_ptr, mean_ptr, factor_ptr, kb, kh, kt, vb, vh, vt, start, stop, length, heads,
    KIND: tl.constexpr, HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, KEY_PARAMETERS: tl.constexpr,
    VALUES: tl.constexpr, VALUE_PARAMETERS: tl.constexpr, RECORD: tl.constexpr, MEAN: tl.constexpr,
    FACTORS: tl.constexpr, ROTATE: tl.constexpr, WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr,
    INTERPRET: tl.constexpr,
):  # fmt: skip
    """Grid (pages, batch · KV heads, keys or values): columns [start, stop), whose tokens lie at the column modulo
    length, or in order where length is 0.
    """
    plane = tl.program_id(1).to(tl.int64)
    batch, kv_head = plane // heads, plane % heads
    page = start // PAGE_ + tl.program_id(0)
    address = tl.load(table_ptr + page) + plane * RECORD
    record = tl.multiple_of(address.to(tl.pointer_type(tl.uint8)), 16)
    token = tl.arange(0, PAGE_)
    column = page * PAGE_ + token
    write = (column >= start) & (column < stop)
    source = column - start
    if length > 0:
        source = column % length
    if tl.program_id(2) == 0:
        write_keys(
            key_ptr + batch * kb + kv_head * kh, kt, source, token, write, record, mean_ptr, factor_ptr, kv_head,
            KIND, HEAD_DIM, KEY_PARAMETERS, MEAN, FACTORS, ROTATE, WIDTH, INTERPRET,
        )  # fmt: skip
    else:
        write_values(
            value_ptr + batch * vb + kv_head * vh, vt, source, token, write, page, start, stop, record,
            KIND, VALUE_DIM, VALUES, VALUE_PARAMETERS, VALUE_WIDTH, INTERPRET,
        )  # fmt: skip


@triton.jit
def numbers_of(record, token, codes, KIND: tl.constexpr):
    """Codes of tokens as numbers. record: of their parameters. codes: (tokens, channels) FP32."""
    if KIND == "fp8":
        x = codes * tl.load(record.to(tl.pointer_type(tl.float32)) + token)[:, None]
    else:
        word = tl.load(record.to(tl.pointer_type(tl.uint32)) + token)
        scale = (word << 16).to(tl.float32, bitcast=True)
        x = codes * scale[:, None] + (word & 0xFFFF0000).to(tl.float32, bitcast=True)[:, None]
    return x


@triton.jit
def stored_keys(
    record, token, channel, inside, KIND: tl.constexpr, HEAD_DIM: tl.constexpr, KEY_PARAMETERS: tl.constexpr
):
    """(tokens, channels) FP32 of a page, as they were coded."""
    if KIND == "bf16":
        numbers = record.to(tl.pointer_type(tl.bfloat16)) + token[:, None] * HEAD_DIM + channel[None, :]
        x = tl.load(numbers, mask=inside, other=0.0).to(tl.float32)
    elif KIND == "fp8":
        place = record.to(tl.pointer_type(tl.float8e4nv)) + token[:, None] * HEAD_DIM + channel[None, :]
        codes = tl.load(place, mask=inside, other=0.0).to(tl.float32)
        x = numbers_of(record + KEY_PARAMETERS, token, codes, KIND)
    else:
        HALF: tl.constexpr = HEAD_DIM // 2
        upper = channel >= HALF
        bytes_ = record + token[:, None] * HALF + tl.where(upper, channel - HALF, channel)[None, :]
        byte = tl.load(bytes_, mask=inside, other=0)
        halves = tl.where(upper[None, :], byte >> 4, byte & 15).to(tl.float32)
        x = numbers_of(record + KEY_PARAMETERS, token, halves, KIND)
    return x


@triton.jit
def stored_values(
    record, token, channel, inside, KIND: tl.constexpr, VALUE_DIM: tl.constexpr, VALUES: tl.constexpr,
    VALUE_PARAMETERS: tl.constexpr,
):  # fmt: skip
    """(tokens, channels) FP32 of a page."""
    if KIND == "bf16":
        numbers = (record + VALUES).to(tl.pointer_type(tl.bfloat16)) + token[:, None] * VALUE_DIM + channel[None, :]
        x = tl.load(numbers, mask=inside, other=0.0).to(tl.float32)
    elif KIND == "fp8":
        place = (record + VALUES).to(tl.pointer_type(tl.float8e4nv)) + channel[:, None] * PAGE_ + token[None, :]
        codes = tl.trans(tl.load(place, mask=tl.trans(inside), other=0.0).to(tl.float32))
        x = numbers_of(record + VALUE_PARAMETERS, token, codes, KIND)
    else:
        LATER: tl.constexpr = PAGE_ // 2
        bytes_ = record + VALUES + channel[:, None] * LATER + (token % LATER)[None, :]
        byte = tl.load(bytes_, mask=tl.trans(inside), other=0)
        halves = tl.trans(tl.where((token >= LATER)[None, :], byte >> 4, byte & 15).to(tl.float32))
        x = numbers_of(record + VALUE_PARAMETERS, token, halves, KIND)
    return x


@triton.jit(do_not_specialize=["start", "stop", "length", "heads"])
def read_kernel(
    key_ptr, value_ptr, table_ptr, mean_ptr, factor_ptr, start, stop, length, heads,
    KIND: tl.constexpr, HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, KEY_PARAMETERS: tl.constexpr,
    VALUES: tl.constexpr, VALUE_PARAMETERS: tl.constexpr, RECORD: tl.constexpr, MEAN: tl.constexpr,
    FACTORS: tl.constexpr, ROTATE: tl.constexpr, WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr,
):  # fmt: skip
    """Grid (pages, batch · KV heads, keys or values). key, value: (batch · KV heads, length, channels)."""
    plane = tl.program_id(1).to(tl.int64)
    kv_head = plane % heads
    page = start // PAGE_ + tl.program_id(0)
    address = tl.load(table_ptr + page) + plane * RECORD
    record = tl.multiple_of(address.to(tl.pointer_type(tl.uint8)), 16)
    token = tl.arange(0, PAGE_)
    column = page * PAGE_ + token
    wanted = ((column >= start) & (column < stop))[:, None]
    row = (plane * length + column - start)[:, None]
    if tl.program_id(2) == 0:
        channel = tl.arange(0, WIDTH)
        inside = (channel < HEAD_DIM)[None, :]
        x = stored_keys(record, token, channel, inside, KIND, HEAD_DIM, KEY_PARAMETERS)
        x = tl.where(inside, x, 0.0)
        if ROTATE:
            x = turned(x, PAGE_, WIDTH, ROTATE)
        if FACTORS:
            x *= tl.load(factor_ptr + kv_head * HEAD_DIM + channel, mask=channel < HEAD_DIM, other=0.0)[None, :]
        if MEAN:
            x += tl.load(mean_ptr + kv_head * HEAD_DIM + channel, mask=channel < HEAD_DIM, other=0.0)[None, :]
        tl.store(key_ptr + row * HEAD_DIM + channel[None, :], x.to(key_ptr.dtype.element_ty), mask=wanted & inside)
    else:
        value_channel = tl.arange(0, VALUE_WIDTH)
        there = (value_channel < VALUE_DIM)[None, :]
        y = stored_values(record, token, value_channel, there, KIND, VALUE_DIM, VALUES, VALUE_PARAMETERS)
        target = value_ptr + row * VALUE_DIM + value_channel[None, :]
        tl.store(target, y.to(value_ptr.dtype.element_ty), mask=wanted & there)


def constants(layout: PageLayout, key_map: KeyMap | None) -> dict[str, object]:
    """What both kernels are compiled for."""
    _, key_parameters, values, value_parameters = layout.offsets
    rotated = key_map is not None and key_map.rotated
    return {
        "KIND": layout.kind,
        "HEAD_DIM": layout.key_dim,
        "VALUE_DIM": layout.value_dim,
        "KEY_PARAMETERS": key_parameters,
        "VALUES": values,
        "VALUE_PARAMETERS": value_parameters,
        "RECORD": layout.record_bytes,
        "MEAN": key_map is not None and key_map.mean is not None,
        "FACTORS": key_map is not None and key_map.factors is not None,
        "ROTATE": rotation_block(layout.key_dim) if rotated else 0,
        "WIDTH": padded_width(layout.key_dim),
        "VALUE_WIDTH": padded_width(layout.value_dim),
        # Codes are to be those of the reference, bit for bit.
        "enable_fp_fusion": False,
        "num_warps": 8,
    }


def write_triton(
    key: Tensor, value: Tensor, columns: tuple[int, int], pages: Pages, *, ring: bool, interpret: bool = False
) -> None:
    """Launch without checks of `kv_pages.write_tokens`."""
    key, value = (x if x.stride(-1) == 1 else x.contiguous() for x in (key, value))
    batch, heads, length, _ = key.shape
    start, stop = columns
    mean, factors = (None, None) if pages.key_map is None else (pages.key_map.mean, pages.key_map.factors)
    write_kernel[(-(-stop // PAGE) - start // PAGE, batch * heads, 2)](
        key, value, pages.table(), mean, factors, *key.stride()[:3], *value.stride()[:3], start, stop,
        length if ring else 0, heads, INTERPRET=interpret, **constants(pages.layout, pages.key_map),
    )  # fmt: skip


def read_triton(key: Tensor, value: Tensor, columns: tuple[int, int], pages: Pages) -> None:
    """Launch without checks of `kv_pages.read_tokens`. key, value: contiguous, to be filled."""
    batch, heads = key.shape[:2]
    start, stop = columns
    mean, factors = (None, None) if pages.key_map is None else (pages.key_map.mean, pages.key_map.factors)
    read_kernel[(-(-stop // PAGE) - start // PAGE, batch * heads, 2)](
        key, value, pages.table(), mean, factors, start, stop, key.shape[2], heads,
        **constants(pages.layout, pages.key_map),
    )  # fmt: skip
