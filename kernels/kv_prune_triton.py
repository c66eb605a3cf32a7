"""Triton kernels of `kv_prune.py`: tokens of a page pruned and written, one token appended, pages read again.

What is kept is found without sorting: the bits of scores, which are not negative, order as integers do, and the
`kept`-th largest is found bit by bit, in 31 counts. Of scores equal to it the first are taken, by a running sum over
channels, and another one gives each kept channel its place. A program takes `TOKENS` tokens of a page, keys or values.
An appended token is pruned where it came from, so that no program waits for the one that puts it into the ring.

Bitmaps and values are those of the reference bit for bit. A page of 8 sequences and 8 KV heads of 128 channels takes
31 µs on an H200 with 30 % kept, 47 with half.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import triton
import triton.language as tl
from torch import Tensor

from .attention_quant import padded_width
from .attention_quant_triton import to_e4m3
from .kv_append_triton import put
from .kv_codes import MIN_SCALE
from .kv_pages import PAGE, Pages
from .kv_pages_triton import ROUND, codes_of, outwards
from .kv_prune import LEVELS, PruneCodec, PruneLayout

if TYPE_CHECKING:
    from .kv_append import Appendable

PAGE_ = tl.constexpr(PAGE)
TOKENS = tl.constexpr(32)
"""Of a page, that a program takes."""
PARTS = PAGE // 32
"""Programs that share the keys of a page, and the values."""
LEVELS_ = tl.constexpr(float(LEVELS))
MIN_SCALE_ = tl.constexpr(MIN_SCALE)
INFINITE_BITS = tl.constexpr(0x7F800000)


@triton.jit
def kept_of(x, weight_ptr, head, KEPT: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr, WEIGHTS: tl.constexpr):
    """(TOKENS, WIDTH) bool. x: FP32, zeros behind the channels that there are, which are kept after all that are there.
    WEIGHTS: whether scores have any."""
    infinite: tl.constexpr = float("inf")
    size = tl.abs(x)
    score = size
    if WEIGHTS:
        channel = tl.arange(0, WIDTH)
        score = size * tl.load(weight_ptr + head * DIM + channel, mask=channel < DIM, other=0.0)[None, :]
    # NaN is not below infinity either.
    finite = (size < infinite) & (score < infinite)
    bits = tl.where(finite, score.to(tl.int32, bitcast=True), INFINITE_BITS)
    least = tl.zeros((TOKENS,), tl.int32)
    for step in tl.range(31):
        higher = least | (1 << (30 - step))
        count = tl.sum(tl.where(bits >= higher[:, None], 1, 0), axis=1)
        least = tl.where(count >= KEPT, higher, least)
    more, equal = bits > least[:, None], bits == least[:, None]
    room = KEPT - tl.sum(tl.where(more, 1, 0), axis=1)
    number = tl.cumsum(tl.where(equal, 1, 0), axis=1)
    return more | (equal & (number <= room[:, None]))


@triton.jit
def bf16_bits(x):
    """FP32 rounded to bf16, ties to even, as int16; in integers, since the interpreter cuts."""
    bits = x.to(tl.int32, bitcast=True)
    bits = tl.where(x == x, bits + 0x7FFF + ((bits >> 16) & 1), 0x7FC00000)
    return (bits >> 16).to(tl.int16)


@triton.jit
def store_values(x, keep, write, token, values, scales, KIND: tl.constexpr, KEPT: tl.constexpr,
                 INTERPRET: tl.constexpr):  # fmt: skip
    """Kept channels of tokens, at their places, and their scale. values, scales: pointers to bytes of a page."""
    place = tl.cumsum(tl.where(keep, 1, 0), axis=1) - 1
    there = keep & write[:, None]
    x = tl.where(keep, x, 0.0)
    if KIND == "bf16":
        target = values.to(tl.pointer_type(tl.int16)) + token[:, None] * KEPT + place
        tl.store(target, bf16_bits(x), mask=there)
    elif KIND == "fp8":
        codes, scale, _ = codes_of(x, keep, KIND, INTERPRET)
        target = values.to(tl.pointer_type(tl.float8e4nv)) + token[:, None] * KEPT + place
        tl.store(target, to_e4m3(codes, INTERPRET), mask=there)
        tl.store(scales.to(tl.pointer_type(tl.float32)) + token, scale, mask=write)
    else:
        infinite: tl.constexpr = float("inf")
        damaged = tl.max(tl.where(tl.abs(x) < infinite, 0, 1), axis=1) != 0
        most = tl.max(tl.abs(x), axis=1)
        scale = tl.maximum(tl.div_rn(most, tl.full(most.shape, LEVELS_, tl.float32)), MIN_SCALE_)
        scale = outwards(scale, False)
        damaged = damaged | (scale == infinite)
        codes = x * tl.div_rn(tl.full(scale.shape, 1.0, tl.float32), scale)[:, None]
        codes = tl.minimum(tl.maximum((codes + ROUND) - ROUND, -LEVELS_), LEVELS_)
        codes = tl.where(damaged[:, None], 0.0, codes).to(tl.int32) + 8
        half = tl.where(keep, codes << (place & 1) * 4, 0)
        BYTES: tl.constexpr = (KEPT + 1) // 2
        for index in tl.range(BYTES):
            both = tl.sum(tl.where((place >> 1) == index, half, 0), axis=1)
            tl.store(values + token * BYTES + index, both.to(tl.uint8), mask=write)
        scale = tl.where(damaged, float("nan"), scale)
        upper = (scale.to(tl.uint32, bitcast=True) >> 16).to(tl.uint16)
        tl.store(scales.to(tl.pointer_type(tl.uint16)) + token, upper, mask=write)


@triton.jit
def write_tile(
    x, write, token, codes, scales, weight_ptr, head, KIND: tl.constexpr, KEPT: tl.constexpr, DIM: tl.constexpr,
    WIDTH: tl.constexpr, WEIGHTS: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """Tokens as they came, (TOKENS, WIDTH), into a page: bitmaps at `codes`, values behind those of the page."""
    channel = tl.arange(0, WIDTH)
    inside = (channel < DIM)[None, :]
    x = tl.where(inside, x.to(tl.float32), 0.0)
    keep = kept_of(x, weight_ptr, head, KEPT, DIM, WIDTH, WEIGHTS)
    COUNT: tl.constexpr = WIDTH // 32
    WORDS: tl.constexpr = (DIM + 31) // 32
    bits = tl.where(keep, 1 << (channel % 32)[None, :], 0)
    words = tl.sum(tl.reshape(bits, (TOKENS, COUNT, 32)), axis=2)
    word = tl.arange(0, COUNT)
    place = codes.to(tl.pointer_type(tl.int32)) + token[:, None] * WORDS + word[None, :]
    tl.store(place, words, mask=write[:, None] & (word < WORDS)[None, :])
    store_values(x, keep, write, token, codes + PAGE_ * 4 * WORDS, scales, KIND, KEPT, INTERPRET)


@triton.jit
def record_of(table_ptr, page, offset):
    """Pointer to the bytes of one row and KV head of a page."""
    return tl.multiple_of((tl.load(table_ptr + page) + offset).to(tl.pointer_type(tl.uint8)), 16)


@triton.jit(do_not_specialize=["start", "stop", "length", "heads"])
def write_prune_kernel(
    key_ptr, value_ptr, table_ptr, weight_ptr, kb, kh, kt, vb, vh, vt, start, stop, length, heads,
    KIND: tl.constexpr, HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, KEY_KEPT: tl.constexpr,
    VALUE_KEPT: tl.constexpr, KEY_SCALES: tl.constexpr, VALUES: tl.constexpr, VALUE_SCALES: tl.constexpr,
    RECORD: tl.constexpr, WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, WEIGHTS: tl.constexpr,
    PARTS_: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """Grid (pages, batch · KV heads, parts of keys and then of values): see `kv_pages_triton.write_kernel`."""
    plane = tl.program_id(1).to(tl.int64)
    batch, head = plane // heads, plane % heads
    page = start // PAGE_ + tl.program_id(0)
    record = record_of(table_ptr, page, plane * RECORD)
    token = tl.program_id(2) % PARTS_ * TOKENS + tl.arange(0, TOKENS)
    column = page * PAGE_ + token
    write = (column >= start) & (column < stop)
    source = column - start
    if length > 0:
        source = column % length
    if tl.program_id(2) < PARTS_:
        channel = tl.arange(0, WIDTH)
        place = key_ptr + batch * kb + head * kh + source[:, None] * kt + channel[None, :]
        x = tl.load(place, mask=write[:, None] & (channel < HEAD_DIM)[None, :], other=0.0)
        write_tile(
            x, write, token, record, record + KEY_SCALES, weight_ptr, head, KIND, KEY_KEPT, HEAD_DIM, WIDTH, WEIGHTS,
            INTERPRET,
        )  # fmt: skip
    else:
        value_channel = tl.arange(0, VALUE_WIDTH)
        value_place = value_ptr + batch * vb + head * vh + source[:, None] * vt + value_channel[None, :]
        y = tl.load(value_place, mask=write[:, None] & (value_channel < VALUE_DIM)[None, :], other=0.0)
        write_tile(
            y, write, token, record + VALUES, record + VALUE_SCALES, weight_ptr, head, KIND, VALUE_KEPT, VALUE_DIM,
            VALUE_WIDTH, False, INTERPRET,
        )  # fmt: skip


@triton.jit
def latest(new, ring, stride, column, tokens, ring_length, write, DIM: tl.constexpr, WIDTH: tl.constexpr):
    """(TOKENS, WIDTH): tokens of columns from the ring, and the newest from where it came."""
    channel = tl.arange(0, WIDTH)
    inside = channel < DIM
    place = ring + (column % ring_length)[:, None] * stride + channel[None, :]
    x = tl.load(place, mask=(write & (column != tokens))[:, None] & inside[None, :], other=0.0)
    token = tl.load(new + channel, mask=inside, other=0.0)
    return tl.where((column == tokens)[:, None], token[None, :], x)


@triton.jit(do_not_specialize=["heads", "ring_length", "sink_tokens", "recent_tokens"])
def append_prune_kernel(
    key_ptr, value_ptr, ring_key, ring_value, sink_key, sink_value, sink_start_ptr, table_ptr, weight_ptr, length_ptr,
    kb, kh, vb, vh, rkb, rkh, rkt, rvb, rvh, rvt, skb, skh, skt, svb, svh, svt, heads, ring_length, sink_tokens,
    recent_tokens, KIND: tl.constexpr, HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, KEY_KEPT: tl.constexpr,
    VALUE_KEPT: tl.constexpr, KEY_SCALES: tl.constexpr, VALUES: tl.constexpr, VALUE_SCALES: tl.constexpr,
    RECORD: tl.constexpr, WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, WEIGHTS: tl.constexpr,
    PARTS_: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """Grid (batch · KV heads, parts of keys and then of values); the first part of a KV head puts its token."""
    plane = tl.program_id(0).to(tl.int64)
    batch, head = plane // heads, plane % heads
    tokens, coded = tl.load(length_ptr), tl.load(length_ptr + 1)
    key_new, value_new = key_ptr + batch * kb + head * kh, value_ptr + batch * vb + head * vh
    keys, values = ring_key + batch * rkb + head * rkh, ring_value + batch * rvb + head * rvh
    if tl.program_id(1) == 0:
        sink = tokens - tl.load(sink_start_ptr + batch).to(tl.int32)
        is_sink = (sink >= 0) & (sink < sink_tokens)
        slot = tokens % ring_length
        put(
            key_new, keys, sink_key + batch * skb + head * skh, slot, sink, is_sink, rkt, skt, HEAD_DIM, WIDTH
        )  # fmt: skip
        put(
            value_new, values, sink_value + batch * svb + head * svh, slot, sink, is_sink, rvt, svt, VALUE_DIM,
            VALUE_WIDTH,
        )  # fmt: skip
    page = coded // PAGE_
    end = page * PAGE_ + PAGE_
    if tokens + 1 - end >= recent_tokens:
        record = record_of(table_ptr, page, plane * RECORD)
        token = tl.program_id(1) % PARTS_ * TOKENS + tl.arange(0, TOKENS)
        column = page * PAGE_ + token
        write = column >= coded
        if tl.program_id(1) < PARTS_:
            x = latest(key_new, keys, rkt, column, tokens, ring_length, write, HEAD_DIM, WIDTH)
            write_tile(
                x, write, token, record, record + KEY_SCALES, weight_ptr, head, KIND, KEY_KEPT, HEAD_DIM, WIDTH,
                WEIGHTS, INTERPRET,
            )  # fmt: skip
        else:
            y = latest(value_new, values, rvt, column, tokens, ring_length, write, VALUE_DIM, VALUE_WIDTH)
            write_tile(
                y, write, token, record + VALUES, record + VALUE_SCALES, weight_ptr, head, KIND, VALUE_KEPT,
                VALUE_DIM, VALUE_WIDTH, False, INTERPRET,
            )  # fmt: skip
        coded = end
    # All threads have read the lengths before this program counts as done.
    tl.debug_barrier()
    if tl.atomic_add(length_ptr + 2, 1) == tl.num_programs(0) * tl.num_programs(1) - 1:
        tl.store(length_ptr, tokens + 1)
        tl.store(length_ptr + 1, coded)
        tl.store(length_ptr + 2, 0)


@triton.jit
def read_tile(target, rows, wanted, token, codes, scales, KIND: tl.constexpr, KEPT: tl.constexpr, DIM: tl.constexpr,
              WIDTH: tl.constexpr):  # fmt: skip
    """Tokens of a page as numbers, stored at target, (…, DIM)."""
    channel = tl.arange(0, WIDTH)
    inside = channel < DIM
    WORDS: tl.constexpr = (DIM + 31) // 32
    place = codes.to(tl.pointer_type(tl.int32)) + token[:, None] * WORDS + (channel // 32)[None, :]
    words = tl.load(place, mask=wanted[:, None] & inside[None, :], other=0)
    bit = (words >> (channel % 32)[None, :]) & 1
    place = tl.cumsum(bit, axis=1) - 1
    there = bit != 0
    values = codes + PAGE_ * 4 * WORDS
    if KIND == "bf16":
        source = values.to(tl.pointer_type(tl.bfloat16)) + token[:, None] * KEPT + place
        x = tl.load(source, mask=there, other=0.0).to(tl.float32)
    elif KIND == "fp8":
        source = values.to(tl.pointer_type(tl.float8e4nv)) + token[:, None] * KEPT + place
        scale = tl.load(scales.to(tl.pointer_type(tl.float32)) + token, mask=wanted, other=0.0)
        x = tl.load(source, mask=there, other=0.0).to(tl.float32) * scale[:, None]
    else:
        BYTES: tl.constexpr = (KEPT + 1) // 2
        both = tl.load(values + token[:, None] * BYTES + (place >> 1), mask=there, other=0).to(tl.int32)
        code = ((both >> (place & 1) * 4) & 15) - 8
        scale = tl.load(scales.to(tl.pointer_type(tl.bfloat16)) + token, mask=wanted, other=0.0).to(tl.float32)
        x = code.to(tl.float32) * scale[:, None]
    x = tl.where(there, x, 0.0)
    goal = target + rows[:, None] * DIM + channel[None, :]
    tl.store(goal, x.to(target.dtype.element_ty), mask=wanted[:, None] & inside[None, :])


@triton.jit(do_not_specialize=["start", "stop", "length"])
def read_prune_kernel(
    key_ptr, value_ptr, table_ptr, start, stop, length, KIND: tl.constexpr, HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr, KEY_KEPT: tl.constexpr, VALUE_KEPT: tl.constexpr, KEY_SCALES: tl.constexpr,
    VALUES: tl.constexpr, VALUE_SCALES: tl.constexpr, RECORD: tl.constexpr, WIDTH: tl.constexpr,
    VALUE_WIDTH: tl.constexpr, PARTS_: tl.constexpr,
):  # fmt: skip
    """Grid (pages, batch · KV heads, parts of keys and then of values). key, value: (batch · KV heads, length,
    channels)."""
    plane = tl.program_id(1).to(tl.int64)
    page = start // PAGE_ + tl.program_id(0)
    record = record_of(table_ptr, page, plane * RECORD)
    token = tl.program_id(2) % PARTS_ * TOKENS + tl.arange(0, TOKENS)
    column = page * PAGE_ + token
    wanted = (column >= start) & (column < stop)
    rows = plane * length + column - start
    if tl.program_id(2) < PARTS_:
        read_tile(key_ptr, rows, wanted, token, record, record + KEY_SCALES, KIND, KEY_KEPT, HEAD_DIM, WIDTH)
    else:
        read_tile(
            value_ptr, rows, wanted, token, record + VALUES, record + VALUE_SCALES, KIND, VALUE_KEPT, VALUE_DIM,
            VALUE_WIDTH,
        )  # fmt: skip


def shapes(layout: PruneLayout) -> dict[str, int | str | bool]:
    """What all kernels are compiled for, and how."""
    _, key_scales, values, value_scales = layout.offsets
    return {
        "KIND": layout.keys.values,
        "HEAD_DIM": layout.key_dim,
        "VALUE_DIM": layout.value_dim,
        "KEY_KEPT": layout.keys.kept,
        "VALUE_KEPT": layout.values.kept,
        "KEY_SCALES": key_scales,
        "VALUES": values,
        "VALUE_SCALES": value_scales,
        "RECORD": layout.record_bytes,
        "WIDTH": padded_width(layout.key_dim),
        "VALUE_WIDTH": padded_width(layout.value_dim),
        # A fused multiplication and addition rounds ties of INT4 codes another way than the reference.
        "enable_fp_fusion": False,
    }


def write_pruned(
    key: Tensor,
    value: Tensor,
    columns: tuple[int, int],
    pages: Pages,
    codec: PruneCodec,
    *,
    ring: bool,
    interpret: bool,
) -> None:
    """Launch without checks of `kv_pages.write_tokens`."""
    key, value = (x if x.stride(-1) == 1 else x.contiguous() for x in (key, value))
    batch, heads, length, _ = key.shape
    start, stop = columns
    weight, layout = codec.query_weight, layout_of(pages)
    write_prune_kernel[(-(-stop // PAGE) - start // PAGE, batch * heads, 2 * PARTS)](
        key, value, pages.table(), weight, *key.stride()[:3], *value.stride()[:3], start, stop, length if ring else 0,
        heads, WEIGHTS=weight is not None, PARTS_=PARTS, INTERPRET=interpret, num_warps=4, **shapes(layout),
    )  # fmt: skip


def append_pruned(key: Tensor, value: Tensor, to: Appendable, codec: PruneCodec, *, interpret: bool) -> None:
    """Launch without checks of `kv_append.append_token`."""
    key, value = (x if x.stride(-1) == 1 else x.contiguous() for x in (key, value))
    batch, heads = key.shape[:2]
    strides = [tensor.stride()[:3] for tensor in (*to.ring, *to.sinks)]
    weight, layout = codec.query_weight, layout_of(to.pages)
    append_prune_kernel[(batch * heads, 2 * PARTS)](
        key, value, *to.ring, *to.sinks, to.sink_starts, to.pages.table(), weight, to.lengths, *key.stride()[:2],
        *value.stride()[:2], *(stride for three in strides for stride in three), heads, to.ring[0].shape[2],
        to.sinks[0].shape[2], to.recent_tokens, WEIGHTS=weight is not None, PARTS_=PARTS, INTERPRET=interpret,
        num_warps=4, **shapes(layout),
    )  # fmt: skip


def read_pruned(key: Tensor, value: Tensor, columns: tuple[int, int], pages: Pages) -> None:
    """Launch without checks of `kv_pages.read_tokens`. key, value: contiguous, to be filled."""
    batch, heads = key.shape[:2]
    start, stop = columns
    assert key.shape[2] == value.shape[2]
    read_prune_kernel[(-(-stop // PAGE) - start // PAGE, batch * heads, 2 * PARTS)](
        key, value, pages.table(), start, stop, key.shape[2], PARTS_=PARTS, num_warps=4, **shapes(layout_of(pages)),
    )  # fmt: skip


def layout_of(pages: Pages) -> PruneLayout:
    """Of pages that a `PruneCodec` fills."""
    assert isinstance(pages.layout, PruneLayout)
    return pages.layout
