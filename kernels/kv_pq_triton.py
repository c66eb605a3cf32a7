"""Triton kernels of `kv_pq.py`: tokens of a page coded and written, one token appended, pages read again.

Coding is split over pages, KV heads and runs of `RUN` sub-vectors. A program maps a page's tokens onto the channels of
its sub-vectors, by a matrix product of FP32's precision, and takes the least of 256 scores |c|²/2 − y·c, `TILE`
centroids at a time: a thread has all of them for its tokens, so that none are exchanged. Sums are in another order than
the reference's: where two centroids are about as near, the other one may be taken. An appended token is coded from
where it came, so that no program waits for the one that puts it into the ring.

A page of 8 sequences and 8 KV heads of 128 channels takes 115 µs on an H200 at 4 bits, 93 at 2; INT4 takes 18. For a
generated token that is less than 1 µs in every layer.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import triton
import triton.language as tl
from torch import Tensor

from .attention_quant import padded_width
from .kv_append_triton import put
from .kv_pages import PAGE, Pages
from .kv_pq import CENTROIDS, DAMAGED, PQCodec, ProductQuantizer

if TYPE_CHECKING:
    from .kv_append import Appendable

PAGE_ = tl.constexpr(PAGE)
CENTROIDS_ = tl.constexpr(CENTROIDS)
DAMAGED_ = tl.constexpr(DAMAGED)
TILE = tl.constexpr(8)
"""Centroids that a program compares at a time: fewer numbers than threads, so that each loads what it needs itself."""
HALF = tl.constexpr(PAGE // 2)
"""Tokens that a program reads."""
CHANNELS = tl.constexpr(32)
"""That a program takes at a time."""
RUN = 8
"""Sub-vectors of a program."""
INFINITE = tl.constexpr(float("inf"))


@triton.jit
def with_channels(y, damaged, x, mean_ptr, map_ptr, head, first, channel, DIM: tl.constexpr, VECTORS: tl.constexpr,
                  SUB: tl.constexpr, RUN_: tl.constexpr):  # fmt: skip
    """y: (PAGE, RUN_ · SUB) FP32, channels of sub-vectors from `first` on, and damaged: (PAGE,), with what some more
    channels x of the tokens add. x: (PAGE, CHANNELS) as it came."""
    inside = channel < DIM
    column = first * SUB + tl.arange(0, RUN_ * SUB)
    place = map_ptr + (head * DIM + channel)[:, None] * (VECTORS * SUB) + column[None, :]
    maps = tl.load(place, mask=inside[:, None] & (column < VECTORS * SUB)[None, :], other=0.0)
    x = tl.where(inside[None, :], x.to(tl.float32), 0.0)
    damaged = damaged | (tl.max(tl.where(tl.abs(x) < INFINITE, 0, 1), axis=1) != 0)
    x -= tl.load(mean_ptr + head * DIM + channel, mask=inside, other=0.0)[None, :]
    return y + tl.dot(x, maps, input_precision="tf32x3"), damaged


@triton.jit
def pair(place):
    """Two neighbours of bf16, where a pair begins, as FP32."""
    both = tl.load(place.to(tl.pointer_type(tl.int32)))
    return (both << 16).to(tl.float32, bitcast=True), (both & -65536).to(tl.float32, bitcast=True)


@triton.jit
def nearest(y, cent_ptr, head, first, VECTORS: tl.constexpr, SUB: tl.constexpr, RUN_: tl.constexpr):
    """(PAGE, RUN_) int32, the numbers of the nearest centroids. y: of `with_channels`."""
    if SUB == 4:
        even, odd = tl.split(tl.reshape(y, (PAGE_, RUN_, 2, 2)))
        y0, y2 = tl.split(even)
        y1, y3 = tl.split(odd)
    else:
        y0, y1 = tl.split(tl.reshape(y, (PAGE_, RUN_, 2)))
    vector = first + tl.arange(0, RUN_)
    # A sub-vector that is not there is coded as the last one, and not stored.
    row = cent_ptr + (head * VECTORS + tl.minimum(vector, VECTORS - 1)) * (CENTROIDS_ * SUB)
    best = tl.full((PAGE_, RUN_), INFINITE, tl.float32)
    code = tl.zeros((PAGE_, RUN_), tl.int32)
    for start in tl.range(0, CENTROIDS_, TILE, num_stages=1):
        number = start + tl.arange(0, TILE)
        centroid = row[None, :] + number[:, None] * SUB
        c0, c1 = pair(centroid)
        half = 0.5 * (c0 * c0 + c1 * c1)
        if SUB == 4:
            c2, c3 = pair(centroid + 2)
            half += 0.5 * (c2 * c2 + c3 * c3)
        half = tl.where((vector == 0)[None, :] & (number == DAMAGED_)[:, None], INFINITE, half)
        score = half[:, None, :] - y0[None, :, :] * c0[:, None, :]
        score -= y1[None, :, :] * c1[:, None, :]
        if SUB == 4:
            score -= y2[None, :, :] * c2[:, None, :]
            score -= y3[None, :, :] * c3[:, None, :]
        least, index = tl.min(score, axis=0, return_indices=True)
        code = tl.where(least < best, start + index, code)
        best = tl.minimum(best, least)
    return code


@triton.jit
def write_codes(
    y, damaged, write, token, target, cent_ptr, head, first, VECTORS: tl.constexpr, SUB: tl.constexpr,
    RUN_: tl.constexpr,
):  # fmt: skip
    """Codes of sub-vectors [first, first + RUN_). y, damaged: of `with_channels`."""
    code = nearest(tl.where(damaged[:, None], 0.0, y), cent_ptr, head, first, VECTORS, SUB, RUN_)
    vector = first + tl.arange(0, RUN_)
    code = tl.where(damaged[:, None], tl.where(vector == 0, DAMAGED_, 0)[None, :], code)
    place = target + vector[None, :] * PAGE_ + token[:, None]
    tl.store(place, code.to(tl.uint8), mask=write[:, None] & (vector < VECTORS)[None, :])


@triton.jit
def record_of(table_ptr, page, offset):
    """Pointer to the bytes of one row and KV head of a page."""
    return tl.multiple_of((tl.load(table_ptr + page) + offset).to(tl.pointer_type(tl.uint8)), 16)


@triton.jit(do_not_specialize=["start", "stop", "length", "heads"])
def write_pq_kernel(
    key_ptr, value_ptr, table_ptr, key_mean, key_map, key_cent, value_mean, value_map, value_cent, kb, kh, kt, vb, vh,
    vt, start, stop, length, heads, HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, KEY_VECTORS: tl.constexpr,
    VALUE_VECTORS: tl.constexpr, SUB: tl.constexpr, RECORD: tl.constexpr, RUN_: tl.constexpr,
):  # fmt: skip
    """Grid (pages, batch · KV heads, runs of keys and then of values): see `kv_pages_triton.write_kernel`."""
    plane = tl.program_id(1).to(tl.int64)
    batch, head = plane // heads, plane % heads
    page = start // PAGE_ + tl.program_id(0)
    record = record_of(table_ptr, page, plane * RECORD)
    token = tl.arange(0, PAGE_)
    column = page * PAGE_ + token
    write = (column >= start) & (column < stop)
    source = column - start
    if length > 0:
        source = column % length
    KEY_RUNS: tl.constexpr = (KEY_VECTORS + RUN_ - 1) // RUN_
    y = tl.zeros((PAGE_, RUN_ * SUB), tl.float32)
    damaged = tl.zeros((PAGE_,), tl.int1)
    if tl.program_id(2) < KEY_RUNS:
        first = tl.program_id(2) * RUN_
        for start_channel in tl.range(0, HEAD_DIM, CHANNELS, num_stages=1):
            channel = start_channel + tl.arange(0, CHANNELS)
            place = key_ptr + batch * kb + head * kh + source[:, None] * kt + channel[None, :]
            x = tl.load(place, mask=write[:, None] & (channel < HEAD_DIM)[None, :], other=0.0)
            y, damaged = with_channels(
                y, damaged, x, key_mean, key_map, head, first, channel, HEAD_DIM, KEY_VECTORS, SUB, RUN_
            )  # fmt: skip
        write_codes(y, damaged, write, token, record, key_cent, head, first, KEY_VECTORS, SUB, RUN_)
    else:
        first = (tl.program_id(2) - KEY_RUNS) * RUN_
        for start_channel in tl.range(0, VALUE_DIM, CHANNELS, num_stages=1):
            channel = start_channel + tl.arange(0, CHANNELS)
            place = value_ptr + batch * vb + head * vh + source[:, None] * vt + channel[None, :]
            x = tl.load(place, mask=write[:, None] & (channel < VALUE_DIM)[None, :], other=0.0)
            y, damaged = with_channels(
                y, damaged, x, value_mean, value_map, head, first, channel, VALUE_DIM, VALUE_VECTORS, SUB, RUN_
            )  # fmt: skip
        write_codes(
            y, damaged, write, token, record + PAGE_ * KEY_VECTORS, value_cent, head, first, VALUE_VECTORS, SUB, RUN_
        )  # fmt: skip


@triton.jit
def latest(new, ring, stride, column, tokens, ring_length, write, channel, DIM: tl.constexpr):
    """(PAGE, channels): tokens of columns from the ring, and the newest from where it came."""
    inside = channel < DIM
    place = ring + (column % ring_length)[:, None] * stride + channel[None, :]
    x = tl.load(place, mask=(write & (column != tokens))[:, None] & inside[None, :], other=0.0)
    token = tl.load(new + channel, mask=inside, other=0.0)
    return tl.where((column == tokens)[:, None], token[None, :], x)


@triton.jit(do_not_specialize=["heads", "ring_length", "sink_tokens", "recent_tokens"])
def append_pq_kernel(
    key_ptr, value_ptr, ring_key, ring_value, sink_key, sink_value, sink_start_ptr, table_ptr, key_mean, key_map,
    key_cent, value_mean, value_map, value_cent, length_ptr, kb, kh, vb, vh, rkb, rkh, rkt, rvb, rvh, rvt, skb, skh,
    skt, svb, svh, svt, heads, ring_length, sink_tokens, recent_tokens, HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr, KEY_VECTORS: tl.constexpr, VALUE_VECTORS: tl.constexpr, SUB: tl.constexpr,
    RECORD: tl.constexpr, WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, RUN_: tl.constexpr,
):  # fmt: skip
    """Grid (batch · KV heads, runs of keys and then of values); the first run of a KV head puts its token."""
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
        token = tl.arange(0, PAGE_)
        column = page * PAGE_ + token
        write = column >= coded
        KEY_RUNS: tl.constexpr = (KEY_VECTORS + RUN_ - 1) // RUN_
        y = tl.zeros((PAGE_, RUN_ * SUB), tl.float32)
        damaged = tl.zeros((PAGE_,), tl.int1)
        if tl.program_id(1) < KEY_RUNS:
            first = tl.program_id(1) * RUN_
            for start in tl.range(0, HEAD_DIM, CHANNELS, num_stages=1):
                channel = start + tl.arange(0, CHANNELS)
                x = latest(key_new, keys, rkt, column, tokens, ring_length, write, channel, HEAD_DIM)
                y, damaged = with_channels(
                    y, damaged, x, key_mean, key_map, head, first, channel, HEAD_DIM, KEY_VECTORS, SUB, RUN_
                )  # fmt: skip
            write_codes(y, damaged, write, token, record, key_cent, head, first, KEY_VECTORS, SUB, RUN_)
        else:
            first = (tl.program_id(1) - KEY_RUNS) * RUN_
            for start in tl.range(0, VALUE_DIM, CHANNELS, num_stages=1):
                channel = start + tl.arange(0, CHANNELS)
                x = latest(value_new, values, rvt, column, tokens, ring_length, write, channel, VALUE_DIM)
                y, damaged = with_channels(
                    y, damaged, x, value_mean, value_map, head, first, channel, VALUE_DIM, VALUE_VECTORS, SUB, RUN_
                )  # fmt: skip
            write_codes(
                y, damaged, write, token, record + PAGE_ * KEY_VECTORS, value_cent, head, first, VALUE_VECTORS, SUB,
                RUN_,
            )  # fmt: skip
        coded = end
    # All threads have read the lengths before this program counts as done.
    tl.debug_barrier()
    if tl.atomic_add(length_ptr + 2, 1) == tl.num_programs(0) * tl.num_programs(1) - 1:
        tl.store(length_ptr, tokens + 1)
        tl.store(length_ptr + 1, coded)
        tl.store(length_ptr + 2, 0)


@triton.jit
def numbers(
    target, rows, wanted, token, codes_ptr, mean_ptr, map_ptr, cent_ptr, head, DIM: tl.constexpr,
    VECTORS: tl.constexpr, SUB: tl.constexpr, VECTOR_WIDTH: tl.constexpr,
):  # fmt: skip
    """Tokens of a page as numbers, stored at target, (…, DIM)."""
    vector = tl.arange(0, VECTOR_WIDTH)
    known = vector < VECTORS
    # A sub-vector that is not there has no channel in the map; any centroid will do.
    vector = tl.minimum(vector, VECTORS - 1)
    codes = tl.load(codes_ptr + vector[None, :] * PAGE_ + token[:, None]).to(tl.int32)
    damaged = tl.max(tl.where((vector == 0)[None, :] & (codes == DAMAGED_), 1, 0), axis=1) != 0
    centroid = cent_ptr + ((head * VECTORS + vector)[None, :] * CENTROIDS_ + codes) * SUB
    for start in tl.range(0, DIM, CHANNELS, num_stages=1):
        channel = start + tl.arange(0, CHANNELS)
        inside = channel < DIM
        maps = map_ptr + (head * DIM + channel)[None, :] * (VECTORS * SUB) + vector[:, None] * SUB
        x = tl.zeros((HALF, CHANNELS), tl.float32)
        for index in tl.static_range(SUB):
            y = tl.load(centroid + index).to(tl.float32)
            map_ = tl.load(maps + index, mask=known[:, None] & inside[None, :], other=0.0)
            x += tl.dot(y, map_, input_precision="tf32x3")
        x += tl.load(mean_ptr + head * DIM + channel, mask=inside, other=0.0)[None, :]
        x = tl.where(damaged[:, None], float("nan"), x)
        goal = target + rows[:, None] * DIM + channel[None, :]
        tl.store(goal, x.to(target.dtype.element_ty), mask=wanted[:, None] & inside[None, :])


@triton.jit(do_not_specialize=["start", "stop", "length", "heads"])
def read_pq_kernel(
    key_ptr, value_ptr, table_ptr, key_mean, key_map, key_cent, value_mean, value_map, value_cent, start, stop, length,
    heads, HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, KEY_VECTORS: tl.constexpr, VALUE_VECTORS: tl.constexpr,
    SUB: tl.constexpr, RECORD: tl.constexpr, KEY_WIDTH: tl.constexpr, CODE_WIDTH: tl.constexpr,
):  # fmt: skip
    """Grid (half pages, batch · KV heads, keys or values). key, value: (batch · KV heads, length, channels)."""
    plane = tl.program_id(1).to(tl.int64)
    head = plane % heads
    page = start // PAGE_ + tl.program_id(0) // 2
    record = record_of(table_ptr, page, plane * RECORD)
    token = tl.program_id(0) % 2 * HALF + tl.arange(0, HALF)
    column = page * PAGE_ + token
    wanted = (column >= start) & (column < stop)
    rows = plane * length + column - start
    if tl.program_id(2) == 0:
        numbers(
            key_ptr, rows, wanted, token, record, key_mean, key_map, key_cent, head, HEAD_DIM, KEY_VECTORS, SUB,
            KEY_WIDTH,
        )  # fmt: skip
    else:
        numbers(
            value_ptr, rows, wanted, token, record + PAGE_ * KEY_VECTORS, value_mean, value_map, value_cent,
            head, VALUE_DIM, VALUE_VECTORS, SUB, CODE_WIDTH,
        )  # fmt: skip


def vector_width(quantizer: ProductQuantizer) -> int:
    """Sub-vectors of a tile: a power of two, at least what a matrix unit takes."""
    return max(16, triton.next_power_of_2(quantizer.centroids.shape[1]))


def shapes(codec: PQCodec) -> dict[str, int]:
    """What all kernels are compiled for."""
    keys, values = codec.keys, codec.values
    head_dim, value_dim = keys.mean.shape[1], values.mean.shape[1]
    return {
        "HEAD_DIM": head_dim,
        "VALUE_DIM": value_dim,
        "KEY_VECTORS": keys.centroids.shape[1],
        "VALUE_VECTORS": values.centroids.shape[1],
        "SUB": keys.centroids.shape[3],
        "RECORD": codec.layout(head_dim, value_dim).record_bytes,
    }


def encoders(codec: PQCodec) -> tuple[Tensor, ...]:
    """Mean, map and centroids of keys and then of values, as coding needs them."""
    return tuple(x for part in (codec.keys, codec.values) for x in (part.mean, part.encode, part.centroids))


def runs(codec: PQCodec) -> int:
    """Programs that share out the sub-vectors of a page."""
    return sum(-(-part.centroids.shape[1] // RUN) for part in (codec.keys, codec.values))


def write_pq(key: Tensor, value: Tensor, columns: tuple[int, int], pages: Pages, codec: PQCodec, *, ring: bool) -> None:
    """Launch without checks of `kv_pages.write_tokens`."""
    key, value = (x if x.stride(-1) == 1 else x.contiguous() for x in (key, value))
    batch, heads, length, _ = key.shape
    start, stop = columns
    write_pq_kernel[(-(-stop // PAGE) - start // PAGE, batch * heads, runs(codec))](
        key, value, pages.table(), *encoders(codec), *key.stride()[:3], *value.stride()[:3], start, stop,
        length if ring else 0, heads, RUN_=RUN, num_warps=8, **shapes(codec),
    )  # fmt: skip


def append_pq(key: Tensor, value: Tensor, to: Appendable, codec: PQCodec) -> None:
    """Launch without checks of `kv_append.append_token`."""
    key, value = (x if x.stride(-1) == 1 else x.contiguous() for x in (key, value))
    batch, heads = key.shape[:2]
    strides = [tensor.stride()[:3] for tensor in (*to.ring, *to.sinks)]
    append_pq_kernel[(batch * heads, runs(codec))](
        key, value, *to.ring, *to.sinks, to.sink_starts, to.pages.table(), *encoders(codec), to.lengths,
        *key.stride()[:2], *value.stride()[:2], *(stride for three in strides for stride in three), heads,
        to.ring[0].shape[2], to.sinks[0].shape[2], to.recent_tokens, WIDTH=padded_width(key.shape[-1]),
        VALUE_WIDTH=padded_width(value.shape[-1]), RUN_=RUN, num_warps=8, **shapes(codec),
    )  # fmt: skip


def read_pq(key: Tensor, value: Tensor, columns: tuple[int, int], pages: Pages, codec: PQCodec) -> None:
    """Launch without checks of `kv_pages.read_tokens`. key, value: contiguous, to be filled."""
    batch, heads = key.shape[:2]
    start, stop = columns
    decoders = [x for part in (codec.keys, codec.values) for x in (part.mean, part.decode, part.centroids)]
    read_pq_kernel[(2 * (-(-stop // PAGE) - start // PAGE), batch * heads, 2)](
        key, value, pages.table(), *decoders, start, stop, key.shape[2], heads, KEY_WIDTH=vector_width(codec.keys),
        CODE_WIDTH=vector_width(codec.values), num_warps=8, **shapes(codec),
    )  # fmt: skip
