"""What comes before and after the pages in `decode_attention.py`: queries are prepared, parts are merged."""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .attention_quant_triton import to_e4m3
from .decode_tiles_triton import LOG2E, LOW, LOWEST, first_term, turned

TINY = tl.constexpr(2.0**-100)


@triton.jit(do_not_specialize=["queries"])
def prepare_kernel(
    q_ptr, mean_ptr, factor_ptr, codes_ptr, scale_ptr, qb, qh, qt, queries, heads, group, scaling, head_dim,
    MEAN: tl.constexpr, FACTORS: tl.constexpr, ROTATE: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
    PDL: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """Grid (batch · KV heads,): queries times scaling · log₂ e as two e4m3 terms, rows beyond ROWS being the second.

    codes: (planes, 2 · ROWS, head_dim) e4m3. scale: (planes, 3, ROWS) fp32: what a code is worth, the sum of a mapped
    query's channels, and its product with the mean of the keys. ROTATE: channels of a block, 0 for none.
    """
    if PDL:
        gdc_launch_dependents()
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
    first = first_term(q)
    rest = (q - first) * LOW
    place = codes_ptr + (plane * 2 * ROWS + row)[:, None] * head_dim + channel[None, :]
    tl.store(place, to_e4m3(first, INTERPRET), mask=inside[None, :])
    tl.store(place + ROWS * head_dim, to_e4m3(rest, INTERPRET), mask=inside[None, :])
    state = scale_ptr + plane * 3 * ROWS + row
    tl.store(state, scale)
    tl.store(state + ROWS, total)
    tl.store(state + 2 * ROWS, shift)


@triton.jit(do_not_specialize=["parts", "planes", "heads", "queries"])
def merge_kernel(
    part_ptr, state_ptr, sink_ptr, ends_ptr, out_ptr, lse_ptr, parts, planes, heads, queries, group, value_dim,
    SINK_LOGITS: tl.constexpr, KEPT: tl.constexpr, ROWS: tl.constexpr, PARTS: tl.constexpr,
    VALUE_WIDTH: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Grid (batch · heads · queries,). out: (batch, queries, heads, value_dim). PARTS: taken at a time. ends: of
    `kv_kept.Runs`, with KEPT; parts of runs stand behind those of all planes.
    """
    query = tl.program_id(0) % queries
    head = tl.program_id(0) // queries % heads
    batch = (tl.program_id(0) // (queries * heads)).to(tl.int64)
    plane = batch * (heads // group) + head // group
    row = query * group + head % group
    channel = tl.arange(0, VALUE_WIDTH)
    if PDL:
        gdc_wait()
    m = tl.full((PARTS,), LOWEST, tl.float32)
    totals = tl.zeros((PARTS,), tl.float32)
    acc = tl.zeros((PARTS, VALUE_WIDTH), tl.float32)
    count, own = parts, plane * parts
    if KEPT:
        begin = tl.load(ends_ptr + plane)
        count += tl.load(ends_ptr + plane + 1) - begin
    for start in range(0, count, PARTS):
        part = start + tl.arange(0, PARTS)
        inside = part < count
        place = own + part
        if KEPT:
            place = tl.where(part < parts, place, planes * parts + begin + part - parts)
        state = state_ptr + place * 2 * ROWS + row
        part_m = tl.load(state, mask=inside, other=-1.0e38)
        new_m = tl.maximum(m, part_m)
        weight, alpha = tl.math.exp2(part_m - new_m), tl.math.exp2(m - new_m)
        totals = totals * alpha + tl.load(state + ROWS, mask=inside, other=0.0) * weight
        values = tl.load(
            part_ptr + (place * ROWS + row)[:, None] * value_dim + channel[None, :],
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
