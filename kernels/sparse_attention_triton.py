"""Triton kernel for attention over a sparse index, in every mode, on any card; see `attention_triton.py`, whose tiles
it takes over.

A program holds a tile of 64 queries of one head and walks over its list: tiles that all its queries see, without a
mask, tiles at an edge, and at last its single columns, gathered 64 at a time. For a static pattern it works out three
runs of tiles instead. Rows are taken up head after head, those of a head with most work first.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .attention_quant import LEVELS, MIN_SCALE, TILE, padded_tokens, padded_width
from .attention_quant_triton import halves, quantize_keys_values, rotated, row_amax, scale_for
from .attention_triton import (
    LOG2_448,
    LOG2E,
    LOWEST,
    capped,
    launch_config,
    load_16bit,
    outputs,
    product,
    quantize_queries,
    scores,
    softmax_step,
    weigh,
)
from .segments import Segments
from .sparse_index import TILE as INDEX_TILE
from .sparse_index import SparseIndex

SCALED = tl.constexpr(TILE)
BLOCK = tl.constexpr(INDEX_TILE)
LENGTHS = ["queries", "keys", "heads", "group", "tiles", "listed_heads"]
"""Arguments for whose values nothing is compiled anew: they change from call to call. Not `rows`, which is whole tiles:
unless that is known, FP8 values are read byte by byte."""


@triton.jit
def column_scores(
    q, q_high, q_scale, t_low, t_high, key_base, key_scale_base, kt, token, valid, head_dim, factor,
    KIND: tl.constexpr, WIDTH: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """`scores` of keys that stand anywhere: every one brings the scale of its own tile."""
    unit = q_scale * factor
    if KIND == "int8" or KIND == "fp8":
        channel = tl.arange(0, WIDTH)
        k = tl.load(key_base + token.to(tl.int64)[:, None] * WIDTH + channel[None, :])
        s = product(q, k.T, False, KIND == "int8", INTERPRET) * tl.load(key_scale_base + token // SCALED)[None, :]
    elif KIND == "int4":
        s, unit = scores(
            q, q_high, q_scale, t_low, t_high, key_base, key_scale_base, kt, 0, token, 0, 0, head_dim, factor, KIND,
            WIDTH, False, INTERPRET,
        )  # fmt: skip
    else:
        channel = tl.arange(0, WIDTH)
        k = load_16bit(key_base, kt, token, channel, valid, head_dim)
        s = product(q, k.T, True, False, INTERPRET)
    return s, unit


@triton.jit
def static_runs(first, last, k_start, k_stop, sink, window, tail, CAUSAL: tl.constexpr, BLOCK: tl.constexpr):
    """Ends of the runs of a static pattern for queries at positions `first` … `last`, in keys: sink tiles [s0, s1),
    then the window's [begin, whole), [whole, whole_stop), [whole_stop, stop), the middle one entirely visible.
    """
    limit = k_stop
    if CAUSAL:
        limit = tl.minimum(last + 1, k_stop)
    some_tail = last >= k_stop - tail
    all_tail = first >= k_stop - tail
    begin = tl.where(some_tail, k_start, tl.maximum(first - window + 1, k_start))
    whole = tl.where(all_tail, k_start, tl.maximum(last - window + 1, k_start))
    stop = limit
    whole_stop = limit
    if CAUSAL:
        whole_stop = tl.minimum(first + 1, k_stop)
    else:
        stop = tl.where(some_tail, k_stop, tl.minimum(last + window, k_stop))
        whole_stop = tl.where(all_tail, k_stop, tl.minimum(first + window, k_stop))
    empty = (window <= 0) & (some_tail == 0)
    begin = begin // BLOCK * BLOCK
    stop = tl.where(empty, begin, tl.cdiv(tl.maximum(stop, begin), BLOCK) * BLOCK)
    whole = tl.minimum(tl.maximum(tl.cdiv(whole, BLOCK) * BLOCK, begin), stop)
    whole_stop = tl.minimum(tl.maximum(tl.maximum(whole_stop, 0) // BLOCK * BLOCK, whole), stop)
    s0 = k_start // BLOCK * BLOCK
    s1 = tl.cdiv(tl.minimum(k_start + sink, limit), BLOCK) * BLOCK
    s1 = tl.where(sink > 0, tl.maximum(s1, s0), s0)
    # Where the two meet, the window's runs go on to the end of the sinks and visit what is left of them.
    stop = tl.where(empty, stop, tl.maximum(stop, s1))
    s1 = tl.where(empty, s1, tl.minimum(s1, begin))
    return s0, s1, begin, whole, whole_stop, stop


@triton.jit(do_not_specialize=LENGTHS)
def sparse_attention_kernel(
    q_ptr, key_ptr, key_scale_ptr, key_mean_ptr, value_ptr, value_scale_ptr, value_mean_ptr, values_ptr, sink_ptr,
    table_ptr, order_ptr, tile_ptr, whole_ptr, tiles_ptr, column_ptr, columns_ptr, pattern_ptr,
    out_ptr, lse_ptr, qb, qh, qt, kb, kh, kt, vb, vh, vt,
    queries, keys, rows, heads, group, head_dim, value_dim, tiles, listed_heads, scaling, softcap,
    KIND: tl.constexpr, FP8_VALUES: tl.constexpr, CAUSAL: tl.constexpr, SOFTCAP: tl.constexpr,
    SINKS: tl.constexpr, SEGMENTS: tl.constexpr, STATIC: tl.constexpr, WIDTH: tl.constexpr,
    VALUE_WIDTH: tl.constexpr, Q_LEVELS: tl.constexpr, MIN: tl.constexpr, WHOLE: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """Grid (rows of the index · heads that share one,). rows: padded keys."""
    share = heads // listed_heads
    if STATIC:
        row = tl.program_id(0) // share
        number = tiles - 1 - row % tiles
    else:
        row = tl.load(order_ptr + tl.program_id(0) // share)
        number = row % tiles
    listed_head = row // tiles % listed_heads
    head = listed_head * share + tl.program_id(0) % share
    batch = row // (tiles * listed_heads)
    if SEGMENTS:
        q_start = tl.load(table_ptr + batch * 5 + 1)
        q_stop = tl.load(table_ptr + batch * 5 + 2)
        k_start = tl.load(table_ptr + batch * 5 + 3)
        k_stop = tl.load(table_ptr + batch * 5 + 4)
    else:
        q_start, k_start = 0, 0
        q_stop, k_stop = queries, keys
    first = q_start + number * BLOCK
    if first < q_stop:
        QUANTIZED: tl.constexpr = KIND is not None
        kv_head = head // group
        plane = (batch * (heads // group) + kv_head).to(tl.int64)
        i = first + tl.arange(0, BLOCK)
        inside = i < q_stop
        position = i - q_stop + k_stop
        q_base = q_ptr + batch.to(tl.int64) * qb + head.to(tl.int64) * qh
        shift = tl.zeros((BLOCK,), tl.float32)
        q_scale = tl.full((BLOCK,), 1.0, tl.float32)
        q_high = 0
        t_low = 0
        t_high = 0
        channel = tl.arange(0, WIDTH)
        q = load_16bit(q_base, qt, i, channel, inside, head_dim)
        if QUANTIZED:
            mean = tl.load(key_mean_ptr + plane * head_dim + channel, mask=channel < head_dim, other=0.0)
            shift += tl.sum(q.to(tl.float32) * mean[None, :], axis=1)
            wide = rotated(q, BLOCK, WIDTH, INTERPRET)
            if KIND == "int4":
                average = tl.sum(wide, axis=0) / tl.minimum(q_stop - first, BLOCK).to(tl.float32)
                wide = tl.where(inside[:, None], wide - average[None, :], 0.0)
                q_scale = scale_for(row_amax(wide), Q_LEVELS, MIN)
                q, q_high = halves(quantize_queries(wide, q_scale, KIND, INTERPRET), BLOCK, WIDTH)
                t_low, t_high = tl.split(average.reshape(2, WIDTH // 2).permute(1, 0))
            else:
                q_scale = scale_for(row_amax(wide), Q_LEVELS, MIN)
                q = quantize_queries(wide, q_scale, KIND, INTERPRET)
        factor = scaling * LOG2E
        shift *= factor
        if QUANTIZED:
            key_base = key_ptr + plane * rows * (WIDTH // 2 if KIND == "int4" else WIDTH)
            key_scale_base = key_scale_ptr + plane * (rows if KIND == "int4" else rows // SCALED)
        else:
            key_base = key_ptr + batch.to(tl.int64) * kb + kv_head.to(tl.int64) * kh
            key_scale_base = key_scale_ptr
        values_base = values_ptr + batch.to(tl.int64) * vb + kv_head.to(tl.int64) * vh
        if FP8_VALUES:
            value_base = value_ptr + plane * VALUE_WIDTH * rows
        else:
            value_base = values_base
        m = tl.full((BLOCK,), LOWEST, tl.float32)
        total = tl.zeros((BLOCK,), tl.float32)
        acc = tl.zeros((BLOCK, VALUE_WIDTH), tl.float32)
        unit = 1.0
        if STATIC:
            sink = tl.load(pattern_ptr + listed_head * 3)
            window = tl.load(pattern_ptr + listed_head * 3 + 1)
            tail = tl.load(pattern_ptr + listed_head * 3 + 2)
            first_position = first - q_stop + k_stop
            last_position = tl.minimum(first_position + BLOCK, k_stop) - 1
            s0, s1, begin, whole, whole_stop, stop = static_runs(
                first_position, last_position, k_start, k_stop, sink, window, tail, CAUSAL, BLOCK
            )
        else:
            begin = tl.load(tile_ptr + row)
            whole_stop = tl.load(whole_ptr + row)
            stop = tl.load(tile_ptr + row + 1)
        # Runs of tiles; entirely visible are the tiles of run 2 of a static pattern, of run 0 of a list.
        for run in tl.static_range(4 if STATIC else 2):
            if STATIC:
                if run == 0:
                    lo, hi = s0, s1
                elif run == 1:
                    lo, hi = begin, whole
                elif run == 2:
                    lo, hi = whole, whole_stop
                else:
                    lo, hi = whole_stop, stop
            elif run == 0:
                lo, hi = begin, whole_stop
            else:
                lo, hi = whole_stop, stop
            following = 0
            if not STATIC:
                # One tile ahead of the keys that are read ahead. A load that is not always there would have the
                # assembler wait for every product; an empty run looks at a number that is.
                following = tl.load(tl.where(lo < hi, tiles_ptr + lo, whole_ptr + row)) * BLOCK
            for entry in range(lo, hi, BLOCK if STATIC else 1):
                start = entry
                if not STATIC:
                    start = following
                    following = tl.load(tiles_ptr + tl.minimum(entry + 1, hi - 1)) * BLOCK
                token = start + tl.arange(0, BLOCK)
                s, row_unit = scores(
                    q, q_high, q_scale, t_low, t_high, key_base, key_scale_base, kt, start, token, k_start, k_stop,
                    head_dim, factor, KIND, WIDTH, WHOLE and run == (2 if STATIC else 0), INTERPRET,
                )  # fmt: skip
                if SOFTCAP:
                    s = capped(s * row_unit[:, None], shift, softcap)
                    row_unit = tl.full((BLOCK,), 1.0, tl.float32)
                if run != (2 if STATIC else 0):
                    seen = (token >= k_start)[None, :] & (token < k_stop)[None, :]
                    if CAUSAL:
                        seen = seen & (token[None, :] <= position[:, None])
                    if STATIC:
                        near = (token[None, :] > position[:, None] - window) & (
                            token[None, :] < position[:, None] + window
                        )
                        near = near | (position >= k_stop - tail)[:, None]
                        seen = seen & (near | (token < k_start + sink)[None, :])
                    s = tl.where(seen, s, float("-inf"))
                p, alpha, m, total = softmax_step(s, row_unit, m, total, FP8_VALUES)
                if FP8_VALUES:
                    next_unit = tl.load(value_scale_ptr + plane * (rows // SCALED) + start // SCALED)
                    alpha *= unit / next_unit
                    unit = next_unit
                acc = acc * alpha[:, None] + weigh(
                    p, value_base, vt, start, token, k_start, k_stop, value_dim, rows, FP8_VALUES, VALUE_WIDTH,
                    WHOLE and run == (2 if STATIC else 0), INTERPRET,
                )  # fmt: skip
        channel = tl.arange(0, VALUE_WIDTH)
        if FP8_VALUES:
            # True values from here on; those of columns are in 16 bit and have kept their mean.
            mean = tl.load(value_mean_ptr + plane * value_dim + channel, mask=channel < value_dim, other=0.0)
            acc = acc * unit + mean[None, :] * total[:, None]
        if not STATIC:
            column_stop = tl.load(column_ptr + row + 1)
            for entry in range(tl.load(column_ptr + row), column_stop, BLOCK):
                place = entry + tl.arange(0, BLOCK)
                valid = place < column_stop
                token = tl.load(columns_ptr + place, mask=valid, other=0)
                s, row_unit = column_scores(
                    q, q_high, q_scale, t_low, t_high, key_base, key_scale_base, kt, token, valid, head_dim, factor,
                    KIND, WIDTH, INTERPRET,
                )  # fmt: skip
                if SOFTCAP:
                    s = capped(s * row_unit[:, None], shift, softcap)
                    row_unit = tl.full((BLOCK,), 1.0, tl.float32)
                seen = (valid & (token >= k_start) & (token < k_stop))[None, :]
                if CAUSAL:
                    seen = seen & (token[None, :] <= position[:, None])
                s = tl.where(seen, s, float("-inf"))
                p, alpha, m, total = softmax_step(s, row_unit, m, total, FP8_VALUES)
                v = load_16bit(values_base, vt, token, channel, valid, value_dim)
                acc = acc * alpha[:, None] + product(p.to(v.dtype), v, True, False, INTERPRET)
        true_m = m
        if not SOFTCAP:
            true_m = m + shift
        bias: tl.constexpr = LOG2_448 if FP8_VALUES else 0.0
        denominator = total
        if SINKS:
            denominator += tl.math.exp2(tl.load(sink_ptr + head).to(tl.float32) * LOG2E - true_m + bias)
        blind = total == 0.0
        result = tl.where(blind[:, None], 0.0, acc / tl.where(blind, 1.0, denominator)[:, None])
        lse = tl.where(blind, float("-inf"), (true_m + tl.math.log2(tl.where(blind, 1.0, total)) - bias) / LOG2E)
        out = out_ptr + ((batch.to(tl.int64) * queries + i)[:, None] * heads + head) * value_dim + channel[None, :]
        tl.store(out, result.to(out_ptr.dtype.element_ty), mask=inside[:, None] & (channel < value_dim)[None, :])
        tl.store(lse_ptr + (batch.to(tl.int64) * heads + head) * queries + i, lse, mask=inside)


def sparse_attention_triton(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    index,
    call,
    sinks: Tensor | None,
    segments: Segments | None,
    *,
    interpret: bool = False,
) -> tuple[Tensor, Tensor]:
    """Launch without checks: out (batch, queries, heads, value_head_dim), and lse. index, call: see
    `sparse_attention.py`.
    """
    from .attention import FP8_VALUES, KEY_KINDS

    query, key, value = (t if t.stride(-1) == 1 else t.contiguous() for t in (query, key, value))
    batch, heads, queries, head_dim = query.shape
    kv_heads, keys, value_dim = key.shape[1], key.shape[2], value.shape[-1]
    kind, fp8_values = KEY_KINDS[call.mode], call.mode in FP8_VALUES
    bounds = None if segments is None else segments.key_bounds(batch)
    coded, coded_values = quantize_keys_values(key, value, kind, fp8_values, bounds, interpret=interpret)
    out, lse = outputs(query, value_dim, filled=segments is not None)
    width, value_width = padded_width(head_dim), padded_width(value_dim)
    config = launch_config(call.mode, max(width, value_width), query.device, listed=True)
    listed = isinstance(index, SparseIndex)
    listed_heads = index.extent[1] if listed else index.table.shape[0]
    tiles = -(-queries // INDEX_TILE)
    sparse_attention_kernel[(batch * tiles * heads,)](
        query,
        key if coded is None else coded.codes,
        None if coded is None else coded.scale,
        None if coded is None else coded.mean,
        value if coded_values is None else coded_values.codes,
        None if coded_values is None else coded_values.scale,
        None if coded_values is None else coded_values.mean,
        value, sinks, None if segments is None else segments.table.contiguous(),
        *((index.order, index.tile_ptr, index.whole_stop, index.tiles, index.column_ptr, index.columns, None)
          if listed else (None, None, None, None, None, None, index.table)),
        out, lse, *query.stride()[:3], *key.stride()[:3], *value.stride()[:3],
        queries, keys, padded_tokens(keys), heads, heads // kv_heads, head_dim, value_dim, tiles, listed_heads,
        call.scaling, call.softcap or 0.0,
        KIND=kind, FP8_VALUES=fp8_values, CAUSAL=call.causal, SOFTCAP=call.softcap is not None,
        SINKS=sinks is not None, SEGMENTS=segments is not None, STATIC=not listed, WIDTH=width,
        VALUE_WIDTH=value_width, Q_LEVELS=LEVELS[kind or "int8"], MIN=MIN_SCALE,
        WHOLE=head_dim == width and value_dim == value_width,
        # A multiply-add is one instruction; a later Triton leaves that to be asked for.
        INTERPRET=interpret, enable_fp_fusion=True, num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    return out, lse
