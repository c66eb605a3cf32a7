"""Triton kernels of `decode_attention.py` over product-quantized pages (`kv_pq.py`).

Queries are mapped by D of the keys, once. A program holds all queries of one KV head and a run of pages. Every code is
read once per KV head; its centroid comes from memory as words of two channels each, so that a gather brings `SUB`
channels, and the channels of one place in all sub-vectors are an operand of the matrix units::

    S = Σ_i Q'_i·Ŷ_iᵀ        A_i = Σ P·Ŷ_i        O = (Σ_i A_i·D_iᵀ) + m·Σ P

D of the values is applied to the sums of each run, beside the dense tokens. Queries, probabilities and centroids are
multiplied in bf16. On Hopper the pages are read by the kernels of `decode_pq_hopper.py` where they take a call.

What gathers cost here is known from sketches: through L1 they run at 1.4 to 1.8 per clock and multiprocessor, 0.3 to
0.6 of the speed of dense bf16.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from .activations import log_fallback
from .attention_quant import padded_width
from .decode_dense_triton import dense_part
from .decode_ends_triton import merge_kernel
from .decode_pq_hopper import decode_pq_hopper, hopper_pq_refusal
from .decode_tiles_triton import LOG2E, LOWEST, PAGE_, capped, multiply, position_of, readable, record_at, store_state
from .kv_pages import PAGE
from .kv_pq_triton import CENTROIDS_, DAMAGED_, shapes, vector_width

if TYPE_CHECKING:
    from .decode_attention import CompressedKV, Reading
    from .kv_pq import PQCodec

TOKENS = tl.constexpr(32)
"""Of a tile."""
TILES = tl.constexpr(PAGE // 32)
"""Of a page."""
MAX_SPLITS = 128


@triton.jit(do_not_specialize=["queries"])
def prepare_pq_kernel(
    q_ptr, mean_ptr, map_ptr, mapped_ptr, shift_ptr, qb, qh, qt, queries, heads, group, scaling,
    HEAD_DIM: tl.constexpr, VECTORS: tl.constexpr, SUB: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
    VECTOR_WIDTH: tl.constexpr,
):  # fmt: skip
    """Grid (batch · KV heads,): queries times scaling · log₂ e, mapped. mapped: (planes, SUB, ROWS, VECTOR_WIDTH) bf16,
    shift: (planes, ROWS) fp32, the product with the mean of the keys.
    """
    plane = tl.program_id(0).to(tl.int64)
    kv_heads = heads // group
    batch, kv_head = plane // kv_heads, plane % kv_heads
    row, channel, vector = tl.arange(0, ROWS), tl.arange(0, WIDTH), tl.arange(0, VECTOR_WIDTH)
    inside = channel < HEAD_DIM
    known = (row < queries * group)[:, None] & inside[None, :]
    base = q_ptr + batch * qb + (kv_head * group + row % group)[:, None] * qh + (row // group)[:, None] * qt
    q = tl.load(base + channel[None, :], mask=known, other=0.0).to(tl.float32) * (scaling * LOG2E)
    mean = tl.load(mean_ptr + kv_head * HEAD_DIM + channel, mask=inside, other=0.0)
    tl.store(shift_ptr + plane * ROWS + row, tl.sum(q * mean[None, :], axis=1))
    maps = map_ptr + (kv_head * HEAD_DIM + channel)[:, None] * (VECTORS * SUB) + vector[None, :] * SUB
    there = inside[:, None] & (vector < VECTORS)[None, :]
    for index in tl.static_range(SUB):
        mapped = tl.dot(q, tl.load(maps + index, mask=there, other=0.0), input_precision="tf32x3")
        place = mapped_ptr + ((plane * SUB + index) * ROWS + row)[:, None] * VECTOR_WIDTH + vector[None, :]
        tl.store(place, mapped.to(tl.bfloat16))


@triton.jit
def two_channels(word, INTERPRET: tl.constexpr):
    """int32 of two bf16 numbers → the first and the second."""
    if INTERPRET:
        first = (word << 16).to(tl.float32, bitcast=True)
        second = (word & -65536).to(tl.float32, bitcast=True)
    else:
        first = (word & 0xFFFF).to(tl.int16).to(tl.bfloat16, bitcast=True)
        second = (word >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)
    return first, second


@triton.jit
def centroid_words(cent_ptr, head, vector, codes, index: tl.constexpr, VECTORS: tl.constexpr, SUB: tl.constexpr):
    """int32, two channels of the centroids of codes; vector: the sub-vector of each, of the same shape or broadcast."""
    WORDS: tl.constexpr = SUB // 2
    return tl.load(cent_ptr + ((head * VECTORS + vector) * CENTROIDS_ + codes) * WORDS + index)


@triton.jit
def added(acc, codes, p, cent_ptr, head, vector, index: tl.constexpr, VECTORS: tl.constexpr, SUB: tl.constexpr,
          INTERPRET: tl.constexpr):  # fmt: skip
    """Two accumulators (rows, sub-vectors) and weighted values of a tile. p: bf16."""
    word = centroid_words(cent_ptr, head, vector, codes, index, VECTORS, SUB)
    first, second = two_channels(word, INTERPRET)
    return multiply(p, first, acc[0], INTERPRET), multiply(p, second, acc[1], INTERPRET)


@triton.jit
def back(acc, map_ptr, head, index: tl.constexpr, DIM: tl.constexpr, VECTORS: tl.constexpr, SUB: tl.constexpr,
         WIDTH: tl.constexpr, VECTOR_WIDTH: tl.constexpr):  # fmt: skip
    """(rows, WIDTH): what one channel of every sub-vector adds to values."""
    channel, vector = tl.arange(0, WIDTH), tl.arange(0, VECTOR_WIDTH)
    place = map_ptr + (head * DIM + channel)[None, :] * (VECTORS * SUB) + vector[:, None] * SUB + index
    known = (channel < DIM)[None, :] & (vector < VECTORS)[:, None]
    return tl.dot(acc, tl.load(place, mask=known, other=0.0), input_precision="tf32x3")


LENGTHS = ["tokens", "coded", "first", "splits", "window", "ring_length", "heads", "sink_tokens"]


@triton.jit
def first_visible(first, start_ptr, batch, tokens, window, QUERIES: tl.constexpr, WINDOW: tl.constexpr,
                  STARTS: tl.constexpr, LENGTHS_: tl.constexpr):  # fmt: skip
    """First column that a row reads."""
    lowest = first
    if LENGTHS_ and WINDOW:
        lowest = tl.maximum(tokens - QUERIES - window + 1, 0)
    if STARTS:
        lowest = tl.maximum(lowest, tl.load(start_ptr + batch).to(tl.int32))
    return lowest


@triton.jit(do_not_specialize=LENGTHS)
def decode_pq_kernel(
    mapped_ptr, shift_ptr, table_ptr, length_ptr, sink_start_ptr, start_ptr, key_cent, value_cent, sum_ptr, state_ptr,
    coded, first, splits, tokens, window, heads, sink_tokens, softcap, RECORD: tl.constexpr, QUERIES: tl.constexpr,
    GROUP: tl.constexpr, KEY_VECTORS: tl.constexpr, VALUE_VECTORS: tl.constexpr, SUB: tl.constexpr,
    WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, STARTS: tl.constexpr, SINKS: tl.constexpr, LENGTHS_: tl.constexpr,
    ROWS: tl.constexpr, QUERY_ROWS: tl.constexpr, KEY_WIDTH: tl.constexpr, CODE_WIDTH: tl.constexpr,
    INTERPRET: tl.constexpr,
):  # fmt: skip
    """Grid (batch · KV heads, splits). Centroids: as int32. sums: (planes, splits, ROWS, VALUE_VECTORS · SUB) fp32,
    ΣP·Ŷ. State: as of `decode_attention_triton.decode_kernel`, with one part more for each plane.
    """
    plane = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    kv_heads = heads // GROUP
    batch, kv_head = plane // kv_heads, plane % kv_heads
    if LENGTHS_:
        tokens, coded = tl.load(length_ptr), tl.load(length_ptr + 1)
    lowest = first_visible(first, start_ptr, batch, tokens, window, QUERIES, WINDOW, STARTS, LENGTHS_)
    sink_start = tl.load(sink_start_ptr + batch).to(tl.int32)
    first_page = lowest // PAGE_
    pages = tl.maximum(tl.cdiv(coded, PAGE_) - first_page, 0)
    run = tl.cdiv(pages, splits)
    page_begin = first_page + split * run
    page_end = tl.minimum(page_begin + run, first_page + pages)
    row, key_vector, vector = tl.arange(0, QUERY_ROWS), tl.arange(0, KEY_WIDTH), tl.arange(0, CODE_WIDTH)
    mapped = mapped_ptr + (plane * SUB * QUERY_ROWS + row)[:, None] * KEY_WIDTH + key_vector[None, :]
    STEP: tl.constexpr = QUERY_ROWS * KEY_WIDTH
    q0, q1 = tl.load(mapped), tl.load(mapped + STEP)
    if SUB == 4:
        q2, q3 = tl.load(mapped + 2 * STEP), tl.load(mapped + 3 * STEP)
    place = sum_ptr + ((plane * splits + split) * ROWS + row)[:, None] * (VALUE_VECTORS * SUB) + vector[None, :] * SUB
    there = (row < ROWS)[:, None] & (vector < VALUE_VECTORS)[None, :]
    # A sub-vector that is not there is zero in the queries and has no sums; any code will do.
    key_vector, vector = tl.minimum(key_vector, KEY_VECTORS - 1), tl.minimum(vector, VALUE_VECTORS - 1)
    shift = tl.load(shift_ptr + plane * QUERY_ROWS + row)
    position = position_of(row, tokens, QUERIES, GROUP)
    m = tl.full((QUERY_ROWS,), LOWEST, tl.float32)
    total = tl.zeros((QUERY_ROWS,), tl.float32)
    low = (tl.zeros((QUERY_ROWS, CODE_WIDTH), tl.float32), tl.zeros((QUERY_ROWS, CODE_WIDTH), tl.float32))
    high = low
    for tile in tl.range(page_begin * TILES, page_end * TILES, num_stages=2):
        record = record_at(tl.load(table_ptr + tile // TILES), plane * RECORD)
        column = tile * TOKENS + tl.arange(0, TOKENS)
        token = column % PAGE_
        valid = readable(column, coded, lowest, sink_start, sink_tokens, SINKS)
        codes = tl.load(record + key_vector[None, :] * PAGE_ + token[:, None]).to(tl.int32)
        values = record + PAGE_ * KEY_VECTORS
        damaged = (tl.load(record + token) == DAMAGED_) | (tl.load(values + token) == DAMAGED_)
        word = centroid_words(key_cent, kv_head, key_vector[None, :], codes, 0, KEY_VECTORS, SUB)
        k0, k1 = two_channels(word, INTERPRET)
        s = multiply(q1, k1.T, multiply(q0, k0.T, None, INTERPRET), INTERPRET)
        if SUB == 4:
            word = centroid_words(key_cent, kv_head, key_vector[None, :], codes, 1, KEY_VECTORS, SUB)
            k2, k3 = two_channels(word, INTERPRET)
            s = multiply(q3, k3.T, multiply(q2, k2.T, s, INTERPRET), INTERPRET)
        s += shift[:, None]
        if SOFTCAP:
            s = capped(s, softcap)
        s = tl.where(damaged[None, :], float("nan"), s)
        # Coded tokens come before every query; rows that are no query have no position, and see nothing.
        seen = valid[None, :] & (position >= 0)[:, None]
        if WINDOW:
            seen = seen & (column[None, :] > position[:, None] - window)
        s = tl.where(seen, s, float("-inf"))
        new_m = tl.maximum(m, tl.max(s, axis=1))
        p = tl.math.exp2(s - new_m[:, None])
        alpha = tl.math.exp2(m - new_m)
        p = p.to(tl.bfloat16)
        # Of the rounded ones, so that rounding to one side cancels.
        total = total * alpha + tl.sum(p.to(tl.float32), axis=1)
        m = new_m
        codes = tl.load(values + vector[None, :] * PAGE_ + token[:, None]).to(tl.int32)
        scaled = (low[0] * alpha[:, None], low[1] * alpha[:, None])
        low = added(scaled, codes, p, value_cent, kv_head, vector[None, :], 0, VALUE_VECTORS, SUB, INTERPRET)
        if SUB == 4:
            scaled = (high[0] * alpha[:, None], high[1] * alpha[:, None])
            high = added(scaled, codes, p, value_cent, kv_head, vector[None, :], 1, VALUE_VECTORS, SUB, INTERPRET)
    tl.store(place, low[0], mask=there)
    tl.store(place + 1, low[1], mask=there)
    if SUB == 4:
        tl.store(place + 2, high[0], mask=there)
        tl.store(place + 3, high[1], mask=there)
    store_state(state_ptr, plane * (splits + 1) + split, row, m, total, ROWS)


@triton.jit(do_not_specialize=LENGTHS)
def finish_pq_kernel(
    q_ptr, table_ptr, length_ptr, ring_key, ring_value, sink_key, sink_value, sink_start_ptr, start_ptr, value_mean,
    value_map, sum_ptr, part_ptr, state_ptr, qb, qh, qt, rkb, rkh, rkt, rvb, rvh, rvt, skb, skh, skt, svb, svh, svt,
    tokens, coded, first, splits, window, ring_length, heads, sink_tokens, scaling, softcap, RECORD: tl.constexpr,
    QUERIES: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    VALUE_VECTORS: tl.constexpr, SUB: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, STARTS: tl.constexpr,
    SINKS: tl.constexpr, LENGTHS_: tl.constexpr, ROWS: tl.constexpr, QUERY_ROWS: tl.constexpr, WIDTH: tl.constexpr,
    VALUE_WIDTH: tl.constexpr, CODE_WIDTH: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """Grid (batch · KV heads, splits + 1): the sums of a run of pages as values, and last the dense tokens.

    parts: (planes, splits + 1, ROWS, VALUE_DIM) fp32.
    """
    plane = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    kv_heads = heads // GROUP
    batch, kv_head = plane // kv_heads, plane % kv_heads
    part = plane * (splits + 1) + split
    if split == splits:
        if LENGTHS_:
            tokens, coded = tl.load(length_ptr), tl.load(length_ptr + 1)
        lowest = first_visible(first, start_ptr, batch, tokens, window, QUERIES, WINDOW, STARTS, LENGTHS_)
        sink_start = tl.load(sink_start_ptr + batch).to(tl.int32)
        dense_part(
            q_ptr + batch * qb + kv_head * GROUP * qh, table_ptr, ring_key + batch * rkb + kv_head * rkh,
            ring_value + batch * rvb + kv_head * rvh, sink_key + batch * skb + kv_head * skh,
            sink_value + batch * svb + kv_head * svh, part_ptr, state_ptr, qh, qt, rkt, rvt, skt, svt, tokens, coded,
            lowest, 0, 0, 0, True, part, plane * RECORD, sink_start, window, ring_length,
            sink_tokens, scaling * LOG2E, softcap, QUERIES, GROUP, "pq", HEAD_DIM, VALUE_DIM, 0, WINDOW, SOFTCAP,
            SINKS, ROWS, WIDTH, VALUE_WIDTH, 1, INTERPRET,
        )  # fmt: skip
    else:
        row, vector, channel = tl.arange(0, QUERY_ROWS), tl.arange(0, CODE_WIDTH), tl.arange(0, VALUE_WIDTH)
        place = ((plane * splits + split) * ROWS + row)[:, None] * (VALUE_VECTORS * SUB) + vector[None, :] * SUB
        there = (row < ROWS)[:, None] & (vector < VALUE_VECTORS)[None, :]
        inside = channel < VALUE_DIM
        mean = tl.load(value_mean + kv_head * VALUE_DIM + channel, mask=inside, other=0.0)
        total = tl.load(state_ptr + part * 2 * ROWS + ROWS + row, mask=row < ROWS, other=0.0)
        out = total[:, None] * mean[None, :]
        for index in tl.static_range(SUB):
            acc = tl.load(sum_ptr + place + index, mask=there, other=0.0)
            out += back(acc, value_map, kv_head, index, VALUE_DIM, VALUE_VECTORS, SUB, VALUE_WIDTH, CODE_WIDTH)
        place = part_ptr + (part * ROWS + row)[:, None] * VALUE_DIM + channel[None, :]
        tl.store(place, out, mask=(row < ROWS)[:, None] & inside[None, :])


def splits_of(planes: int, pages: int, programs: int) -> int:
    """Runs of pages per KV head: one wave of `programs`."""
    return max(1, min(programs // planes, pages, MAX_SPLITS))


def decode_pq(
    query: Tensor,
    kv: CompressedKV,
    call: Reading,
    sinks: Tensor | None,
    key_starts: Tensor | None,
    codec: PQCodec,
    *,
    interpret: bool = False,
) -> tuple[Tensor, Tensor]:
    """Launch without checks: out (batch, queries, heads, value_head_dim), and lse."""
    assert kv.ring is not None
    query = query if query.stride(-1) == 1 else query.contiguous()
    batch, heads, queries, head_dim = query.shape
    kv_heads, value_dim = kv.sink_key.shape[1], kv.sink_value.shape[3]
    planes, group = batch * kv_heads, heads // kv_heads
    rows = max(8, triton.next_power_of_2(queries * group))
    query_rows, sub = max(16, rows), codec.keys.centroids.shape[3]
    multiprocessors = 1 if interpret else torch.cuda.get_device_properties(query.device).multi_processor_count
    # A launch that is to be that of later tokens too is made for many pages.
    pages = -(-kv.coded // PAGE) - kv.first // PAGE if kv.lengths is None else MAX_SPLITS
    refusal = hopper_pq_refusal(query, call, codec)
    hopper = refusal is None
    if not hopper and not interpret:
        log_fallback("decode_pq_hopper", refusal, "the plain kernel")
    splits = splits_of(planes, pages, multiprocessors * (1 if hopper else 2))
    parts, code_width = splits + 1, vector_width(codec.values)
    key_width = vector_width(codec.keys)

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=query.device)

    mapped, shift = empty(planes, sub, query_rows, key_width, dtype=torch.bfloat16), empty(planes, query_rows)
    sums = empty(planes, splits, rows, codec.values.centroids.shape[1] * sub)
    part, state = empty(planes, parts, rows, value_dim), empty(planes, parts, 2, rows)
    out, lse = empty(batch, queries, heads, value_dim, dtype=query.dtype), empty(batch, heads, queries)
    prepare_pq_kernel[(planes,)](
        query, codec.keys.mean, codec.keys.decode, mapped, shift, *query.stride()[:3], queries, heads, group,
        call.scaling, HEAD_DIM=head_dim, VECTORS=codec.keys.centroids.shape[1], SUB=sub, ROWS=query_rows,
        WIDTH=max(16, padded_width(head_dim)), VECTOR_WIDTH=key_width, num_warps=8,
    )  # fmt: skip
    words = [part.centroids.view(torch.int32) for part in (codec.keys, codec.values)]
    shape = shapes(codec)
    marks = {
        "QUERIES": queries, "GROUP": group, "STARTS": key_starts is not None, "SINKS": kv.sink_key.shape[2] > 0,
        "LENGTHS_": kv.lengths is not None, "ROWS": rows, "QUERY_ROWS": query_rows, "RECORD": shape["RECORD"],
        "SUB": sub,
    }  # fmt: skip
    beginning = (
        mapped, shift, kv.pages.table(), kv.lengths, kv.sink_starts, key_starts, *words, sums, state, kv.coded,
        kv.first, splits,
    )  # fmt: skip
    sink_tokens, options = (
        kv.sink_key.shape[2],
        {"WINDOW": call.window is not None, "SOFTCAP": call.softcap is not None},
    )
    if hopper:
        decode_pq_hopper((planes, splits), beginning, heads, sink_tokens, codec, VECTOR_WIDTH=key_width, **marks)
    else:
        decode_pq_kernel[(planes, splits)](
            *beginning, kv.tokens, call.window or 0, heads, sink_tokens, call.softcap or 0.0,
            KEY_VECTORS=shape["KEY_VECTORS"], VALUE_VECTORS=shape["VALUE_VECTORS"], KEY_WIDTH=key_width,
            CODE_WIDTH=code_width, INTERPRET=interpret, num_warps=4, **marks, **options,
        )  # fmt: skip
    finish_pq_kernel[(planes, parts)](
        query, kv.pages.table(), kv.lengths, *kv.ring, kv.sink_key, kv.sink_value, kv.sink_starts, key_starts,
        codec.values.mean, codec.values.decode, sums, part, state, *query.stride()[:3], *kv.ring[0].stride()[:3],
        *kv.ring[1].stride()[:3], *kv.sink_key.stride()[:3], *kv.sink_value.stride()[:3], kv.tokens, kv.coded, kv.first,
        splits, call.window or 0, kv.ring[0].shape[2], heads, sink_tokens, call.scaling, call.softcap or 0.0,
        HEAD_DIM=head_dim, VALUE_DIM=value_dim, VALUE_VECTORS=shape["VALUE_VECTORS"], WIDTH=padded_width(head_dim),
        VALUE_WIDTH=padded_width(value_dim), CODE_WIDTH=code_width, INTERPRET=interpret, num_warps=4, **marks,
        **options,
    )  # fmt: skip
    merge_kernel[(batch * heads * queries,)](
        part, state, sinks, None, out, lse, parts, planes, heads, queries, group, value_dim,
        SINK_LOGITS=sinks is not None, KEPT=False, ROWS=rows, PARTS=min(16, triton.next_power_of_2(parts)),
        VALUE_WIDTH=padded_width(value_dim), PDL=False, num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip
    return out, lse
