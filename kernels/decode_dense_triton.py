"""Parts of 16-bit tokens in `decode_attention.py`: sinks, recent tokens, pages of bf16."""

from __future__ import annotations

import triton
import triton.language as tl

from .decode_tiles_triton import (
    BLOCK,
    LOWEST,
    PAGE_,
    capped,
    load_queries,
    multiply,
    position_of,
    readable,
    record_at,
    store_state,
)


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
    s = multiply(q, k.T, None, INTERPRET) * factor
    if SOFTCAP:
        s = capped(s, softcap)
    # Rows that are no query have no position, and see nothing.
    seen = valid[None, :] & (column[None, :] <= position[:, None])
    if WINDOW:
        seen = seen & (column[None, :] > position[:, None] - window)
    s = tl.where(seen, s, float("-inf"))
    new_m = tl.maximum(m, tl.max(s, axis=1))
    p = tl.math.exp2(s - new_m[:, None])
    alpha = tl.math.exp2(m - new_m)
    total = total * alpha + tl.sum(p, axis=1)
    return acc * alpha[:, None] + multiply(p.to(v.dtype), v, None, INTERPRET), new_m, total


@triton.jit
def dense_part(
    q_base, table_ptr, ring_key, ring_value, sink_key, sink_value, part_ptr, state_ptr, qh, qt, rkt, rvt, skt, svt,
    tokens, coded, lowest, evicted, page_begin, page_end, last, part, offset, sink_start, window, ring_length,
    sink_tokens, factor, softcap, QUERIES: tl.constexpr, GROUP: tl.constexpr, KIND: tl.constexpr,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, VALUES: tl.constexpr, WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr, SINKS: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr,
    STAGES: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """A part of 16-bit tokens: sinks and recent tokens, if it is the last of a KV head, and bf16 pages.

    Pointers are those of its row and KV head; offset: of its bytes in a page. evicted: tokens before that column were
    evicted, and sinks among them are read whatever `lowest` is. Rows of a tile are queries, of which the matrix units
    take no fewer than 16.
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
                valid = (place < sink_tokens) & (column < coded) & ((column >= lowest) | (column < evicted))
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
    if KIND == "bf16":
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
