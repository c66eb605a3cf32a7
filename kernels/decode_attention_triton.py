"""Triton kernels of `decode_attention.py`: queries prepared, pages and dense tokens read once per KV head, parts
merged.

A program of `decode_kernel` holds all queries of one KV head and a run of pages; one more program per KV head takes the
dense tokens. Over codes everything is transposed, Sᵀ = K·Qᵀ and Oᵀ = Vᵀ·Pᵀ, since Hopper's matrix units take only the
left operand from registers, where codes are unpacked; an INT4 code u as an e4m3 byte is u·2⁻⁹ exactly.

*Two terms.* Queries and probabilities are multiplied in FP8, each as x = hi + lo/16 with both terms in e4m3: eight bits
of mantissa instead of four. A tile has at least 16 columns, and the queries of one KV head are rarely more than 8: the
second terms go where padding would be, and cost nothing.

*Scales of values* go into the exponent. With σ_t and μ_t of token t and s_t its logit in units of log₂::

    w_t = exp2(s_t + log₂ σ_t − m),  m = max(s_t + log₂ σ_t)       O = (Σ w_t u_t + Σ w_t μ_t / σ_t) / Σ w_t / σ_t

so that w ≤ 1 whatever the scales are. Each page's product starts from zero and is added in FP32, since Hopper's FP8
accumulator has 14 bits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from .attention_quant import padded_width
from .attention_quant_triton import to_e4m3
from .decode_tiles_triton import (
    LOG2E,
    LOW,
    capped,
    doubled,
    fold,
    load_queries,
    multiply,
    nibbles,
    record_at,
    turned,
    two_terms,
)
from .kv_codes import rotation_block
from .kv_pages import PAGE

if TYPE_CHECKING:
    from .decode_attention import CompressedKV, Reading

LOG2_448 = tl.constexpr(8.807354922057604)
PAGE_ = tl.constexpr(PAGE)
LOWEST = tl.constexpr(-1.0e38)
"""Start of the running maximum; finite, so that a run without a visible token leaves no NaN."""
TINY = tl.constexpr(2.0**-100)
BLOCK = tl.constexpr(64)
"""Dense tokens of a tile."""
MAX_SPLITS = 128
LENGTHS = ["tokens", "coded", "first", "splits", "window", "ring_length", "heads", "sink_tokens"]


@dataclass(frozen=True)
class LaunchConfig:
    """splits: runs of pages per KV head."""

    splits: int
    num_warps: int
    num_stages: int


def launch_config(kind: str, planes: int, pages: int, multiprocessors: int) -> LaunchConfig:
    """planes: KV heads of all rows. One wave of programs: of INT4 pages of 128 channels three fit a multiprocessor of
    Hopper, which their registers bound, of wider ones two, which the buffers of three stages bound."""
    splits = max(1, min((3 if kind == "int4" else 2) * multiprocessors // planes, pages, MAX_SPLITS))
    return LaunchConfig(splits, 4, 3)


@triton.jit
def parameters(ptr, token, valid, KIND: tl.constexpr):
    """σ and μ of tokens; 1 and 0 where not valid, whatever is stored there."""
    if KIND == "int4":
        word = tl.load(ptr.to(tl.pointer_type(tl.uint32)) + token)
        scale = (word << 16).to(tl.float32, bitcast=True)
        low = (word & 0xFFFF0000).to(tl.float32, bitcast=True)
    else:
        scale = tl.load(ptr.to(tl.pointer_type(tl.float32)) + token)
        low = tl.zeros(scale.shape, tl.float32)
    return tl.where(valid, scale, 1.0), tl.where(valid, low, 0.0)


@triton.jit
def seen_by(column, valid, position, window, CAUSAL: tl.constexpr, WINDOW: tl.constexpr):
    """bool; column and valid along one axis, position along the other."""
    seen = valid & (position >= 0)
    if CAUSAL:
        seen = seen & (column <= position)
    if WINDOW:
        seen = seen & (column > position - window)
    return seen


@triton.jit(do_not_specialize=["queries"])
def prepare_kernel(
    q_ptr, mean_ptr, factor_ptr, codes_ptr, scale_ptr, qb, qh, qt, queries, heads, group, scaling, head_dim,
    MEAN: tl.constexpr, FACTORS: tl.constexpr, ROTATE: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
    INTERPRET: tl.constexpr,
):  # fmt: skip
    """Grid (batch · KV heads,): queries times scaling · log₂ e as two e4m3 terms, rows beyond ROWS being the second.

    codes: (planes, 2 · ROWS, head_dim) e4m3. scale: (planes, 3, ROWS) fp32: what a code is worth, the sum of a mapped
    query's channels, and its product with the mean of the keys. ROTATE: channels of a block, 0 for none.
    """
    plane = tl.program_id(0).to(tl.int64)
    kv_heads = heads // group
    batch, kv_head = plane // kv_heads, plane % kv_heads
    row, channel = tl.arange(0, ROWS), tl.arange(0, WIDTH)
    known = (row < queries * group)[:, None] & (channel < head_dim)[None, :]
    base = q_ptr + batch * qb + (kv_head * group + row % group)[:, None] * qh + (row // group)[:, None] * qt
    q = tl.load(base + channel[None, :], mask=known, other=0.0).to(tl.float32) * (scaling * LOG2E)
    inside = channel < head_dim
    shift = tl.zeros((ROWS,), tl.float32)
    if MEAN:
        mean = tl.load(mean_ptr + kv_head * head_dim + channel, mask=inside, other=0.0)
        shift += tl.sum(q * mean[None, :], axis=1)
    if FACTORS:
        q *= tl.load(factor_ptr + kv_head * head_dim + channel, mask=inside, other=0.0)[None, :]
    if ROTATE:
        q = turned(q, ROWS, WIDTH, ROTATE)
    amax = tl.max(tl.abs(q), axis=1)
    scale = tl.maximum(amax * (1.0 / 448.0), TINY)
    total = tl.sum(q, axis=1)
    q = q / scale[:, None]
    rest = (q - to_e4m3(q, INTERPRET).to(tl.float32)) * LOW
    place = codes_ptr + (plane * 2 * ROWS + row)[:, None] * head_dim + channel[None, :]
    tl.store(place, to_e4m3(q, INTERPRET), mask=inside[None, :])
    tl.store(place + ROWS * head_dim, to_e4m3(rest, INTERPRET), mask=inside[None, :])
    state = scale_ptr + plane * 3 * ROWS + row
    tl.store(state, scale)
    tl.store(state + ROWS, total)
    tl.store(state + 2 * ROWS, shift)


@triton.jit
def dense_tile(
    acc, m, total, q, key_base, value_base, key_stride, value_stride, place, column, valid, position, window, softcap,
    factor, head_dim, value_dim, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, WIDTH: tl.constexpr,
    VALUE_WIDTH: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """One tile of dense tokens, at `place` in their buffers. acc: (rows, VALUE_WIDTH)."""
    channel, value_channel = tl.arange(0, WIDTH), tl.arange(0, VALUE_WIDTH)
    k = tl.load(
        key_base + place[:, None] * key_stride + channel[None, :],
        mask=valid[:, None] & (channel < head_dim)[None, :],
        other=0.0,
    )
    v = tl.load(
        value_base + place[:, None] * value_stride + value_channel[None, :],
        mask=valid[:, None] & (value_channel < value_dim)[None, :],
        other=0.0,
    )
    s = multiply(q, k.T, INTERPRET) * factor
    if SOFTCAP:
        s = capped(s, softcap)
    seen = seen_by(column[None, :], valid[None, :], position[:, None], window, True, WINDOW)
    s = tl.where(seen, s, float("-inf"))
    new_m = tl.maximum(m, tl.max(s, axis=1))
    p = tl.math.exp2(s - new_m[:, None])
    alpha = tl.math.exp2(m - new_m)
    total = total * alpha + tl.sum(p, axis=1)
    return acc * alpha[:, None] + multiply(p.to(v.dtype), v, INTERPRET), new_m, total


@triton.jit
def store_state(ptr, part, row, m, total, ROWS: tl.constexpr):
    """Maximum and sum of weights of a part."""
    tl.store(ptr + part * 2 * ROWS + row, m, mask=row < ROWS)
    tl.store(ptr + part * 2 * ROWS + ROWS + row, total, mask=row < ROWS)


@triton.jit
def position_of(row, tokens, QUERIES: tl.constexpr, GROUP: tl.constexpr):
    """Columns of queries; rows that are no query have none."""
    return tl.where(row < QUERIES * GROUP, tokens - QUERIES + row // GROUP, -1)


@triton.jit
def readable(column, coded, lowest, sink_start, sink_tokens, SINKS: tl.constexpr):
    """Which columns of a page are read as codes."""
    valid = (column < coded) & (column >= lowest)
    if SINKS:
        valid = valid & ((column < sink_start) | (column >= sink_start + sink_tokens))
    return valid


@triton.jit
def dense_part(
    q_base, table_ptr, ring_key, ring_value, sink_key, sink_value, part_ptr, state_ptr, qh, qt, rkt, rvt, skt, svt,
    tokens, coded, lowest, page_begin, page_end, last, part, offset, sink_start, window, ring_length, sink_tokens,
    factor, softcap, QUERIES: tl.constexpr, GROUP: tl.constexpr, KIND: tl.constexpr, HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr, VALUES: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, SINKS: tl.constexpr,
    ROWS: tl.constexpr, WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, STAGES: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """One program of 16-bit tokens: the last one of a KV head takes sinks and recent tokens, the others bf16 pages.

    Pointers are those of its row and KV head; offset: of its bytes in a page. Rows of a tile are queries, of which the
    matrix units take no fewer than 16.
    """
    QUERY_ROWS: tl.constexpr = 16 if ROWS < 16 else ROWS
    row, value_channel = tl.arange(0, QUERY_ROWS), tl.arange(0, VALUE_WIDTH)
    position = position_of(row, tokens, QUERIES, GROUP)
    m = tl.full((QUERY_ROWS,), LOWEST, tl.float32)
    total = tl.zeros((QUERY_ROWS,), tl.float32)
    acc = tl.zeros((QUERY_ROWS, VALUE_WIDTH), tl.float32)
    q = load_queries(q_base, qh, qt, QUERIES, GROUP, HEAD_DIM, QUERY_ROWS, WIDTH)
    if last:
        if SINKS:
            for start in tl.range(0, sink_tokens, BLOCK, num_stages=1):
                place = start + tl.arange(0, BLOCK)
                column = sink_start + place
                valid = (place < sink_tokens) & (column < coded) & (column >= lowest)
                acc, m, total = dense_tile(
                    acc, m, total, q, sink_key, sink_value, skt, svt, place, column, valid, position, window, softcap,
                    factor, HEAD_DIM, VALUE_DIM, WINDOW, SOFTCAP, WIDTH, VALUE_WIDTH, INTERPRET,
                )  # fmt: skip
        # Few tiles: room for more programs is worth more than loads ahead.
        for start in tl.range(tl.maximum(coded, lowest), tokens, BLOCK, num_stages=1):
            column = start + tl.arange(0, BLOCK)
            acc, m, total = dense_tile(
                acc, m, total, q, ring_key, ring_value, rkt, rvt, column % ring_length, column, column < tokens,
                position, window, softcap, factor, HEAD_DIM, VALUE_DIM, WINDOW, SOFTCAP, WIDTH, VALUE_WIDTH, INTERPRET,
            )  # fmt: skip
    elif KIND == "bf16":
        for tile in tl.range(2 * page_begin, 2 * page_end, num_stages=STAGES):
            record = record_at(tl.load(table_ptr + tile // 2), offset).to(tl.pointer_type(tl.bfloat16))
            column = tile * BLOCK + tl.arange(0, BLOCK)
            valid = readable(column, coded, lowest, sink_start, sink_tokens, SINKS)
            acc, m, total = dense_tile(
                acc, m, total, q, record, record + VALUES // 2, HEAD_DIM, VALUE_DIM, column % PAGE_, column, valid,
                position, window, softcap, factor, HEAD_DIM, VALUE_DIM, WINDOW, SOFTCAP, WIDTH, VALUE_WIDTH, INTERPRET,
            )  # fmt: skip
    place = part_ptr + (part * ROWS + row)[:, None] * VALUE_DIM + value_channel[None, :]
    tl.store(place, acc, mask=(row < ROWS)[:, None] & (value_channel < VALUE_DIM)[None, :])
    store_state(state_ptr, part, row, m, total, ROWS)


@triton.jit
def page_logits(
    record, token, q_low, q_high, weight, sums, shift, valid, seen, softcap, head_dim, OFFSET: tl.constexpr,
    VALUE_OFFSET: tl.constexpr, KIND: tl.constexpr, SOFTCAP: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
    TOKENS: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """(TOKENS, ROWS) logits plus log₂ σ of the values, in units of log₂ and without what the mean of the keys adds; 1/σ
    and μ/σ of the values."""
    if KIND == "int4":
        channel = tl.arange(0, WIDTH // 2)
        half = head_dim // 2
        codes = tl.load(record + token[:, None] * half + channel[None, :], mask=(channel < half)[None, :], other=0)
        low, high = nibbles(codes, INTERPRET)
        s = multiply(low, q_low.T, INTERPRET) + multiply(high, q_high.T, INTERPRET)
    else:
        channel = tl.arange(0, WIDTH)
        codes = record.to(tl.pointer_type(tl.float8e4nv))
        k = tl.load(codes + token[:, None] * head_dim + channel[None, :], mask=(channel < head_dim)[None, :], other=0.0)
        s = multiply(k, q_low.T, INTERPRET)
    scale, least = parameters(record + OFFSET, token, valid, KIND)
    s = fold(s * weight[None, :], TOKENS, ROWS) * scale[:, None]
    if KIND == "int4":
        s += least[:, None] * sums[None, :]
    if SOFTCAP:
        s = capped(s + shift[None, :], softcap)
    scale, least = parameters(record + VALUE_OFFSET, token, valid, KIND)
    s = tl.where(seen, s + tl.math.log2(scale)[:, None], float("-inf"))
    over = 1.0 / scale
    return s, over, least * over


@triton.jit(do_not_specialize=LENGTHS)
def decode_kernel(
    q_ptr, codes_ptr, scale_ptr, table_ptr, length_ptr, ring_key, ring_value, sink_key, sink_value, sink_start_ptr,
    start_ptr, part_ptr, state_ptr, qb, qh, qt, rkb, rkh, rkt, rvb, rvh, rvt, skb, skh, skt, svb, svh, svt,
    tokens, coded, first, splits, window, ring_length, heads, sink_tokens, scaling, softcap,
    RECORD: tl.constexpr, QUERIES: tl.constexpr, GROUP: tl.constexpr, KIND: tl.constexpr, HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr, KEY_PARAMETERS: tl.constexpr, VALUES: tl.constexpr, VALUE_PARAMETERS: tl.constexpr,
    WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, STARTS: tl.constexpr, SINKS: tl.constexpr, LENGTHS_: tl.constexpr,
    ROWS: tl.constexpr, WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, STAGES: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """Grid (batch · KV heads, splits + 1). part: (planes, splits + 1, ROWS, VALUE_DIM), state: (…, 2, ROWS): sums of
    weighted values, and the maximum and the sum of weights that they belong to, FP32.
    """
    plane = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    kv_heads = heads // GROUP
    batch, kv_head = plane // kv_heads, plane % kv_heads
    if LENGTHS_:
        tokens, coded = tl.load(length_ptr), tl.load(length_ptr + 1)
        if WINDOW:
            first = tl.maximum(tokens - QUERIES - window + 1, 0)
    lowest = first
    if STARTS:
        lowest = tl.maximum(lowest, tl.load(start_ptr + batch).to(tl.int32))
    sink_start = tl.load(sink_start_ptr + batch).to(tl.int32)
    value_channel = tl.arange(0, VALUE_WIDTH)
    first_page = lowest // PAGE_
    pages = tl.maximum(tl.cdiv(coded, PAGE_) - first_page, 0)
    run = tl.cdiv(pages, splits)
    page_begin = first_page + split * run
    page_end = tl.minimum(page_begin + run, first_page + pages)
    part = plane * (splits + 1) + split
    if (KIND == "bf16") | (split == splits):
        dense_part(
            q_ptr + batch * qb + kv_head * GROUP * qh, table_ptr, ring_key + batch * rkb + kv_head * rkh,
            ring_value + batch * rvb + kv_head * rvh, sink_key + batch * skb + kv_head * skh,
            sink_value + batch * svb + kv_head * svh, part_ptr, state_ptr, qh, qt, rkt, rvt, skt, svt, tokens, coded,
            lowest, page_begin, page_end, split == splits, part, plane * RECORD, sink_start, window, ring_length,
            sink_tokens, scaling * LOG2E, softcap, QUERIES, GROUP, KIND, HEAD_DIM, VALUE_DIM, VALUES, WINDOW, SOFTCAP,
            SINKS, ROWS, WIDTH, VALUE_WIDTH, STAGES, INTERPRET,
        )  # fmt: skip
    elif KIND != "bf16":
        INT4: tl.constexpr = KIND == "int4"
        HALF: tl.constexpr = PAGE_ // 2
        TOKENS: tl.constexpr = HALF if INT4 else PAGE_
        KEYS: tl.constexpr = WIDTH // 2 if INT4 else WIDTH
        STORED: tl.constexpr = HEAD_DIM // 2 if INT4 else HEAD_DIM
        row = tl.arange(0, ROWS)
        position = position_of(row, tokens, QUERIES, GROUP)
        m = tl.full((ROWS,), LOWEST, tl.float32)
        acc = tl.zeros((VALUE_WIDTH, 2 * ROWS), tl.float32)
        q_row, channel = tl.arange(0, 2 * ROWS), tl.arange(0, KEYS)
        prepared = codes_ptr + (plane * 2 * ROWS + q_row)[:, None] * HEAD_DIM + channel[None, :]
        q_low = tl.load(prepared, mask=(channel < STORED)[None, :], other=0.0)
        q_high = q_low
        if INT4:
            q_high = tl.load(prepared + STORED, mask=(channel < STORED)[None, :], other=0.0)
        state = scale_ptr + plane * 3 * ROWS
        weight = tl.load(state + q_row % ROWS) * tl.where(q_row < ROWS, 1.0, 1.0 / LOW)
        if INT4:
            weight *= 512.0
        sums = tl.load(state + ROWS + row)
        shift = tl.load(state + 2 * ROWS + row)
        # Sums over tokens that no product makes are kept per thread until the end.
        sum_tile = tl.zeros((TOKENS, ROWS), tl.float32)
        least_tile = tl.zeros((TOKENS, ROWS), tl.float32)
        address = tl.load(table_ptr + page_begin, mask=page_begin < page_end, other=0)
        for page in tl.range(page_begin, page_end, num_stages=STAGES):
            record = record_at(address, plane * RECORD)
            # Asked for a page ahead, so that nothing waits for it.
            address = tl.load(table_ptr + page + 1, mask=page + 1 < page_end, other=0)
            token = tl.arange(0, TOKENS)
            column = page * PAGE_ + token
            valid = readable(column, coded, lowest, sink_start, sink_tokens, SINKS)
            seen = seen_by(column[:, None], valid[:, None], position[None, :], window, False, WINDOW)
            s, over, least = page_logits(
                record, token, q_low, q_high, weight, sums, shift, valid, seen, softcap, HEAD_DIM, KEY_PARAMETERS,
                VALUE_PARAMETERS, KIND, SOFTCAP, ROWS, WIDTH, TOKENS, INTERPRET,
            )  # fmt: skip
            if INT4:
                token_b = HALF + token
                column = page * PAGE_ + token_b
                valid = readable(column, coded, lowest, sink_start, sink_tokens, SINKS)
                seen = seen_by(column[:, None], valid[:, None], position[None, :], window, False, WINDOW)
                s_b, over_b, least_b = page_logits(
                    record, token_b, q_low, q_high, weight, sums, shift, valid, seen, softcap, HEAD_DIM, KEY_PARAMETERS,
                    VALUE_PARAMETERS, KIND, SOFTCAP, ROWS, WIDTH, TOKENS, INTERPRET,
                )  # fmt: skip
                new_m = tl.maximum(m, tl.max(tl.maximum(s, s_b), axis=0))
                alpha = tl.math.exp2(m - new_m)
                w = tl.math.exp2(s - (new_m - LOG2_448)[None, :])
                w_b = tl.math.exp2(s_b - (new_m - LOG2_448)[None, :])
                sum_tile = sum_tile * alpha[None, :] + w * over[:, None] + w_b * over_b[:, None]
                least_tile = least_tile * alpha[None, :] + w * least[:, None] + w_b * least_b[:, None]
                place = record + VALUES + value_channel[:, None] * HALF + tl.arange(0, HALF)[None, :]
                v_low, v_high = nibbles(tl.load(place, mask=(value_channel < VALUE_DIM)[:, None], other=0), INTERPRET)
                o = multiply(v_low, two_terms(w, TOKENS, ROWS, INTERPRET), INTERPRET)
                o += multiply(v_high, two_terms(w_b, TOKENS, ROWS, INTERPRET), INTERPRET)
            else:
                new_m = tl.maximum(m, tl.max(s, axis=0))
                alpha = tl.math.exp2(m - new_m)
                w = tl.math.exp2(s - (new_m - LOG2_448)[None, :])
                sum_tile = sum_tile * alpha[None, :] + w * over[:, None]
                place = (record + VALUES).to(tl.pointer_type(tl.float8e4nv)) + value_channel[:, None] * PAGE_
                v = tl.load(place + token[None, :], mask=(value_channel < VALUE_DIM)[:, None], other=0.0)
                o = multiply(v, two_terms(w, TOKENS, ROWS, INTERPRET), INTERPRET)
            acc = acc * doubled(alpha, ROWS)[None, :] + o
            m = new_m
        total = tl.sum(sum_tile, axis=0) * (1.0 / 448.0)
        UNIT: tl.constexpr = 512.0 / 448.0 if INT4 else 1.0 / 448.0
        second = tl.where(tl.arange(0, 2 * ROWS) < ROWS, UNIT, UNIT / LOW)
        values = fold(acc * second[None, :], VALUE_WIDTH, ROWS)
        values += tl.sum(least_tile, axis=0)[None, :] * (1.0 / 448.0)
        if not SOFTCAP:
            m = tl.where(total == 0.0, m, m + shift)
        place = part_ptr + (part * ROWS + row)[None, :] * VALUE_DIM + value_channel[:, None]
        tl.store(place, values, mask=(value_channel < VALUE_DIM)[:, None])
        store_state(state_ptr, part, row, m, total, ROWS)


@triton.jit(do_not_specialize=["parts", "heads", "queries"])
def merge_kernel(
    part_ptr, state_ptr, sink_ptr, out_ptr, lse_ptr, parts, heads, queries, group, value_dim,
    SINK_LOGITS: tl.constexpr, ROWS: tl.constexpr, PARTS: tl.constexpr, VALUE_WIDTH: tl.constexpr,
):  # fmt: skip
    """Grid (batch · heads · queries,). out: (batch, queries, heads, value_dim). PARTS: taken at a time."""
    query = tl.program_id(0) % queries
    head = tl.program_id(0) // queries % heads
    batch = (tl.program_id(0) // (queries * heads)).to(tl.int64)
    plane = batch * (heads // group) + head // group
    row = query * group + head % group
    channel = tl.arange(0, VALUE_WIDTH)
    m = tl.full((PARTS,), LOWEST, tl.float32)
    totals = tl.zeros((PARTS,), tl.float32)
    acc = tl.zeros((PARTS, VALUE_WIDTH), tl.float32)
    for start in range(0, parts, PARTS):
        part = start + tl.arange(0, PARTS)
        inside = part < parts
        state = state_ptr + (plane * parts + part) * 2 * ROWS + row
        part_m = tl.load(state, mask=inside, other=-1.0e38)
        new_m = tl.maximum(m, part_m)
        weight, alpha = tl.math.exp2(part_m - new_m), tl.math.exp2(m - new_m)
        totals = totals * alpha + tl.load(state + ROWS, mask=inside, other=0.0) * weight
        values = tl.load(
            part_ptr + ((plane * parts + part) * ROWS + row)[:, None] * value_dim + channel[None, :],
            mask=inside[:, None] & (channel < value_dim)[None, :],
            other=0.0,
        )
        acc = acc * alpha[:, None] + values * weight[:, None]
        m = new_m
    top = tl.max(m, axis=0)
    weight = tl.math.exp2(m - top)
    total = tl.sum(totals * weight, axis=0)
    values = tl.sum(acc * weight[:, None], axis=0)
    blind = total == 0.0
    denominator = total
    if SINK_LOGITS:
        denominator += tl.math.exp2(tl.load(sink_ptr + head).to(tl.float32) * LOG2E - top)
    result = tl.where(blind, 0.0, values / tl.where(blind, 1.0, denominator))
    place = (batch * queries + query) * heads + head
    tl.store(out_ptr + place * value_dim + channel, result.to(out_ptr.dtype.element_ty), mask=channel < value_dim)
    lse = tl.where(blind, float("-inf"), (top + tl.math.log2(tl.where(blind, 1.0, total))) / LOG2E)
    tl.store(lse_ptr + (batch * heads + head) * queries + query, lse)


def decode_triton(
    query: Tensor,
    kv: CompressedKV,
    call: Reading,
    sinks: Tensor | None,
    key_starts: Tensor | None,
    *,
    interpret: bool = False,
) -> tuple[Tensor, Tensor]:
    """Launch without checks: out (batch, queries, heads, value_head_dim), and lse."""
    assert kv.ring is not None
    layout, key_map = kv.pages.layout, kv.pages.key_map
    query = query if query.stride(-1) == 1 else query.contiguous()
    batch, heads, queries, head_dim = query.shape
    kv_heads, value_dim = kv.sink_key.shape[1], kv.sink_value.shape[3]
    planes, group = batch * kv_heads, heads // kv_heads
    rows = max(8, triton.next_power_of_2(queries * group))
    # An e4m3 product takes at least 32 channels, and two INT4 codes share a byte.
    width = max({"int4": 64, "fp8": 32, "bf16": 16}[layout.kind], padded_width(head_dim))
    value_width = padded_width(value_dim)
    multiprocessors = 1 if interpret else torch.cuda.get_device_properties(query.device).multi_processor_count
    # A launch that is to be that of later tokens too is made for many pages.
    pages = -(-kv.coded // PAGE) - kv.first // PAGE if kv.lengths is None else MAX_SPLITS
    config = launch_config(layout.kind, planes, pages, multiprocessors)
    parts = config.splits + 1

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=query.device)

    codes, scale = empty(planes, 2 * rows, head_dim, dtype=torch.float8_e4m3fn), empty(planes, 3, rows)
    part, state = empty(planes, parts, rows, value_dim), empty(planes, parts, 2, rows)
    out, lse = empty(batch, queries, heads, value_dim, dtype=query.dtype), empty(batch, heads, queries)
    mean = None if key_map is None else key_map.mean
    factors = None if key_map is None else key_map.factors
    rotate = rotation_block(head_dim) if key_map is not None and key_map.rotated else 0
    prepare_kernel[(planes,)](
        query, mean, factors, codes, scale, *query.stride()[:3], queries, heads, group, call.scaling, head_dim,
        MEAN=mean is not None, FACTORS=factors is not None, ROTATE=rotate, ROWS=rows, WIDTH=width, INTERPRET=interpret,
        num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip
    offsets = layout.offsets
    decode_kernel[(planes, parts)](
        query, codes, scale, kv.pages.table(), kv.lengths, *kv.ring, kv.sink_key, kv.sink_value, kv.sink_starts,
        key_starts, part, state, *query.stride()[:3], *kv.ring[0].stride()[:3], *kv.ring[1].stride()[:3],
        *kv.sink_key.stride()[:3], *kv.sink_value.stride()[:3], kv.tokens, kv.coded, kv.first,
        config.splits, call.window or 0, kv.ring[0].shape[2], heads, kv.sink_key.shape[2], call.scaling,
        call.softcap or 0.0, RECORD=layout.record_bytes, QUERIES=queries, GROUP=group, KIND=layout.kind,
        HEAD_DIM=head_dim, VALUE_DIM=value_dim, KEY_PARAMETERS=offsets[1], VALUES=offsets[2],
        VALUE_PARAMETERS=offsets[3], WINDOW=call.window is not None, SOFTCAP=call.softcap is not None,
        STARTS=key_starts is not None, SINKS=kv.sink_key.shape[2] > 0, LENGTHS_=kv.lengths is not None, ROWS=rows,
        WIDTH=width, VALUE_WIDTH=value_width, STAGES=config.num_stages, INTERPRET=interpret,
        num_warps=config.num_warps, num_stages=config.num_stages, enable_fp_fusion=True,
    )  # fmt: skip
    merge_kernel[(batch * heads * queries,)](
        part, state, sinks, out, lse, parts, heads, queries, group, value_dim, SINK_LOGITS=sinks is not None,
        ROWS=rows, PARTS=min(16, triton.next_power_of_2(parts)), VALUE_WIDTH=value_width, num_warps=4,
        enable_fp_fusion=True,
    )  # fmt: skip
    return out, lse
