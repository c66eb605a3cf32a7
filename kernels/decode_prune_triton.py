"""Triton kernel of `decode_attention.py` over pruned pages (`kv_prune.py`).

A program holds all queries of one KV head and a run of pages. Bitmaps and values are expanded once per KV head, into
operands of the matrix units, whose rows are all queries of the group. A lane has four channels side by side: a count of
bits below them says where its values begin, three words hold all it can need, and byte permutes, chosen by its four
bits out of tables in registers, put the values at their channels::

    r = popcount(bits below channel 4·j)        lane j of X = spread(values r … r + 3, bits of channels 4·j … 4·j + 3)
    S = Q·Xᵀ        A = Σ P·X

The expansion is bound by instructions, not by bytes. The unit that counts bits takes 16 lanes a clock: a count for
every channel of 8 sequences of 32K tokens is 145 µs of an H200 by itself, a quarter of them 36. Instructions of the
loop over tiles for each channel of a thread (sm_90, head_dim 128, ptxas of Triton 3.6), products and softmax included:

| bf16, words and permutes | bf16, a load for each channel | FP8 and INT4, a load for each channel |
|---|---|---|
| 12 | 16 | 20 and 26 |

What was left out: scattering kept values into shared memory, whose work grows with what is kept, needs addresses that
Triton has no words for; a fixed number kept in every 16 channels makes addresses static but is another, worse choice of
channels; an index for each value takes more bytes than the bitmap.

Scales of FP8 and INT4 go into logits and probabilities, once per token. Queries, probabilities and values are
multiplied in bf16. The dense tokens and the merging of parts are those of `decode_dense_triton.py` and
`decode_ends_triton.py`. On Hopper pages of bf16 are read by `decode_prune_warps_triton.py` where it takes a call. 8
sequences of 32K tokens on an H200 take, with 1 / 2 / 3 / 4 programs on a multiprocessor, half of bf16 kept 2,517 /
1,565 / 1,361 / 1,275 µs, 30 % in INT4 2,901 / 1,553 / 1,156 / 1,533.
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
from .decode_pq_triton import MAX_SPLITS, splits_of, two_channels
from .decode_prune_hopper import decode_prune_hopper, hopper_prune_refusal
from .decode_tiles_triton import (
    LOG2E,
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
from .kv_pages import PAGE
from .kv_prune_triton import layout_of, shapes

if TYPE_CHECKING:
    from .decode_attention import CompressedKV, Reading

TOKENS = tl.constexpr(32)
"""Of a tile."""
TILES = tl.constexpr(PAGE // 32)
"""Of a page."""
PROGRAMS = 3
"""On a multiprocessor: of 128 to 151 registers, 128 threads and 22 KB each."""
HALVES = (0x4444, 0x4410, 0x1044, 0x3210)
"""Byte permutes that put the next of two 16-bit numbers at the channels whose bits, 0 … 3, are set, and zeros else."""
RESTS = (0x3210, 0x5432, 0x5432, 0x7654)
"""That take the two numbers behind those, of four."""
TABLES = [sum(entry << 16 * index for index, entry in enumerate(table)) for table in (HALVES, RESTS)]
SPREAD = tl.constexpr(
    f"""{{
    .reg .b32 low, high, s, a, b, z;
    .reg .b64 t;
    shl.b32 s, $3, 4;
    shf.r.wrap.b32 low, $4, $5, s;
    shf.r.wrap.b32 high, $5, $6, s;
    shl.b32 a, $2, 4;
    and.b32 a, a, 48;
    shl.b32 b, $2, 2;
    and.b32 b, b, 48;
    shr.u64 t, {TABLES[0]}, a;
    cvt.u32.u64 z, t;
    prmt.b32 $0, low, 0, z;
    shr.u64 t, {TABLES[1]}, a;
    cvt.u32.u64 z, t;
    prmt.b32 low, low, high, z;
    shr.u64 t, {TABLES[0]}, b;
    cvt.u32.u64 z, t;
    prmt.b32 $1, low, 0, z;
    }}"""
)


@triton.jit
def ones_of(word, INTERPRET: tl.constexpr):
    """Bits of an int32 that are set."""
    if INTERPRET:
        x = word.to(tl.uint32, bitcast=True)
        x = x - ((x >> 1) & 0x55555555)
        x = (x & 0x33333333) + ((x >> 2) & 0x33333333)
        x = (x + (x >> 4)) & 0x0F0F0F0F
        result = ((x * 0x01010101) >> 24).to(tl.int32)
    else:
        result = tl.inline_asm_elementwise("popc.b32 $0, $1;", "=r,r", [word], tl.int32, is_pure=True, pack=1)
    return result


@triton.jit
def lanes_of(codes, token, valid, WORDS: tl.constexpr, WIDTH: tl.constexpr, INTERPRET: tl.constexpr):
    """Of each lane of a tile, (TOKENS, WIDTH // 4) int32: bits from its first channel on, and the place of that."""
    COUNT: tl.constexpr = WIDTH // 32
    word = tl.arange(0, COUNT)
    place = codes.to(tl.pointer_type(tl.int32)) + token[:, None] * WORDS + word[None, :]
    # Tokens that are not read have no bits, so that nothing of theirs is loaded.
    words = tl.load(place, mask=valid[:, None] & (word < WORDS)[None, :], other=0)
    ones = ones_of(words, INTERPRET)
    before = tl.cumsum(ones, axis=1) - ones
    shift = (tl.arange(0, 8) * 4)[None, None, :]
    wide = tl.broadcast_to(words[:, :, None], (TOKENS, COUNT, 8))
    first = before[:, :, None] + ones_of(wide & ((1 << shift) - 1), INTERPRET)
    LANES: tl.constexpr = WIDTH // 4
    return tl.reshape(wide >> shift, (TOKENS, LANES)), tl.reshape(first, (TOKENS, LANES))


@triton.jit
def channel_of(values, token, bits, place, index: tl.constexpr, KIND: tl.constexpr, KEPT: tl.constexpr):
    """(TOKENS, lanes) bf16: the lanes' channels `index`, without scale; and the places of the next ones."""
    bit = (bits >> index) & 1
    there = bit != 0
    if KIND == "fp8":
        source = values.to(tl.pointer_type(tl.float8e4nv)) + token[:, None] * KEPT + place
        x = tl.load(source, mask=there, other=0.0).to(tl.bfloat16)
    else:
        BYTES: tl.constexpr = (KEPT + 1) // 2
        both = tl.load(values + token[:, None] * BYTES + (place >> 1), mask=there, other=0x88).to(tl.int32)
        code = tl.where(there, ((both >> (place & 1) * 4) & 15) - 8, 0)
        x = code.to(tl.float32).to(tl.bfloat16)
    return x, place + bit


@triton.jit
def spread(bits, number, w0, w1, w2, INTERPRET: tl.constexpr):
    """Two words of two channels each, (TOKENS, lanes) int32: kept values from that number on, which three words hold,
    at the channels whose bit is set."""
    if INTERPRET:
        low, high = w0.to(tl.uint32, bitcast=True).to(tl.uint64), w1.to(tl.uint32, bitcast=True).to(tl.uint64)
        odd = (number & 1).to(tl.uint64)
        run = (low | (high << 32)) >> (odd * 16)
        last = w2.to(tl.uint32, bitcast=True).to(tl.uint64)
        run = tl.where(odd != 0, run | (last << 48), run)
        b0, b1, b2, b3 = bits & 1, (bits >> 1) & 1, (bits >> 2) & 1, (bits >> 3) & 1
        x0 = tl.where(b0 != 0, run & 0xFFFF, 0)
        x1 = tl.where(b1 != 0, (run >> (16 * b0).to(tl.uint64)) & 0xFFFF, 0)
        x2 = tl.where(b2 != 0, (run >> (16 * (b0 + b1)).to(tl.uint64)) & 0xFFFF, 0)
        x3 = tl.where(b3 != 0, (run >> (16 * (b0 + b1 + b2)).to(tl.uint64)) & 0xFFFF, 0)
        first = (x0 | (x1 << 16)).to(tl.uint32).to(tl.int32, bitcast=True)
        second = (x2 | (x3 << 16)).to(tl.uint32).to(tl.int32, bitcast=True)
    else:
        first, second = tl.inline_asm_elementwise(
            SPREAD, "=&r,=&r,r,r,r,r,r", [bits, number, w0, w1, w2], dtype=(tl.int32, tl.int32), is_pure=True, pack=1
        )
    return first, second


@triton.jit
def tile_of(values, token, bits, place, KIND: tl.constexpr, KEPT: tl.constexpr, WIDTH: tl.constexpr,
            INTERPRET: tl.constexpr):  # fmt: skip
    """(TOKENS, WIDTH) bf16, without scale."""
    if KIND == "bf16":
        number = token[:, None] * KEPT + place
        # A token without bits reads what it does not use; behind the last one of a record is room for that.
        source = values.to(tl.pointer_type(tl.int32)) + (number >> 1)
        first, second = spread(
            bits, number, tl.load(source), tl.load(source + 1), tl.load(source + 2), INTERPRET
        )  # fmt: skip
        even, odd = two_channels(tl.join(first, second), INTERPRET)
        x = tl.join(even, odd)
    else:
        x0, place = channel_of(values, token, bits, place, 0, KIND, KEPT)
        x1, place = channel_of(values, token, bits, place, 1, KIND, KEPT)
        x2, place = channel_of(values, token, bits, place, 2, KIND, KEPT)
        x3, place = channel_of(values, token, bits, place, 3, KIND, KEPT)
        x = tl.join(tl.join(x0, x2), tl.join(x1, x3))
    return tl.reshape(x, (TOKENS, WIDTH))


@triton.jit
def scale_of(scales, token, valid, KIND: tl.constexpr):
    """(TOKENS,) FP32."""
    if KIND == "fp8":
        scale = tl.load(scales.to(tl.pointer_type(tl.float32)) + token, mask=valid, other=0.0)
    else:
        # The interpreter reads bf16 that is subnormal wrongly; as integers it is read rightly everywhere.
        upper = tl.load(scales.to(tl.pointer_type(tl.uint16)) + token, mask=valid, other=0).to(tl.uint32)
        scale = (upper << 16).to(tl.float32, bitcast=True)
    return scale


@triton.jit(do_not_specialize=["tokens", "coded", "first", "splits", "window", "ring_length", "heads", "sink_tokens"])
def decode_prune_kernel(
    q_ptr, table_ptr, length_ptr, ring_key, ring_value, sink_key, sink_value, sink_start_ptr, start_ptr, part_ptr,
    state_ptr, qb, qh, qt, rkb, rkh, rkt, rvb, rvh, rvt, skb, skh, skt, svb, svh, svt, tokens, coded, first, splits,
    window, ring_length, heads, sink_tokens, scaling, softcap, KIND: tl.constexpr, HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr, KEY_KEPT: tl.constexpr, VALUE_KEPT: tl.constexpr, KEY_SCALES: tl.constexpr,
    VALUES: tl.constexpr, VALUE_SCALES: tl.constexpr, RECORD: tl.constexpr, WIDTH: tl.constexpr,
    VALUE_WIDTH: tl.constexpr, QUERIES: tl.constexpr, GROUP: tl.constexpr, WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr, STARTS: tl.constexpr, SINKS: tl.constexpr, LENGTHS_: tl.constexpr, ROWS: tl.constexpr,
    QUERY_ROWS: tl.constexpr, PAGES: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """Grid, parts and state: as of `decode_attention_triton.decode_kernel`. PAGES: whether programs read any; else the
    grid is (batch · KV heads, 1), and they read the dense tokens.
    """
    plane = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1) if PAGES else splits
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
    first_page = lowest // PAGE_
    pages = tl.maximum(tl.cdiv(coded, PAGE_) - first_page, 0)
    run = tl.cdiv(pages, splits)
    page_begin = first_page + split * run
    page_end = tl.minimum(page_begin + run, first_page + pages)
    part = plane * (splits + 1) + split
    q_base = q_ptr + batch * qb + kv_head * GROUP * qh
    if split == splits:
        dense_part(
            q_base, table_ptr, ring_key + batch * rkb + kv_head * rkh, ring_value + batch * rvb + kv_head * rvh,
            sink_key + batch * skb + kv_head * skh, sink_value + batch * svb + kv_head * svh, part_ptr, state_ptr, qh,
            qt, rkt, rvt, skt, svt, tokens, coded, lowest, 0, page_begin, page_end, True, part, plane * RECORD,
            sink_start, window, ring_length, sink_tokens, scaling * LOG2E, softcap, QUERIES, GROUP, "prune", HEAD_DIM,
            VALUE_DIM, 0, WINDOW, SOFTCAP, SINKS, ROWS, WIDTH, VALUE_WIDTH, 1, INTERPRET,
        )  # fmt: skip
    else:
        row = tl.arange(0, QUERY_ROWS)
        q = load_queries(q_base, qh, qt, QUERIES, GROUP, HEAD_DIM, QUERY_ROWS, WIDTH)
        q = q.to(tl.float32).to(tl.bfloat16)
        position = position_of(row, tokens, QUERIES, GROUP)
        m = tl.full((QUERY_ROWS,), LOWEST, tl.float32)
        total = tl.zeros((QUERY_ROWS,), tl.float32)
        acc = tl.zeros((QUERY_ROWS, VALUE_WIDTH), tl.float32)
        WORDS: tl.constexpr = (HEAD_DIM + 31) // 32
        VALUE_WORDS: tl.constexpr = (VALUE_DIM + 31) // 32
        for tile in tl.range(page_begin * TILES, page_end * TILES, num_stages=1):
            record = record_at(tl.load(table_ptr + tile // TILES), plane * RECORD)
            column = tile * TOKENS + tl.arange(0, TOKENS)
            token = column % PAGE_
            valid = readable(column, coded, lowest, sink_start, sink_tokens, SINKS)
            bits, place = lanes_of(record, token, valid, WORDS, WIDTH, INTERPRET)
            x = tile_of(record + PAGE_ * 4 * WORDS, token, bits, place, KIND, KEY_KEPT, WIDTH, INTERPRET)
            if QUERY_ROWS >= 64:
                x = tl.where(valid[:, None], x, 0.0)
            s = multiply(q, x.T, None, INTERPRET) * (scaling * LOG2E)
            if KIND != "bf16":
                s = s * scale_of(record + KEY_SCALES, token, valid, KIND)[None, :]
            if SOFTCAP:
                s = capped(s, softcap)
            # Coded tokens come before every query; rows that are no query have no position, and see nothing.
            seen = valid[None, :] & (position >= 0)[:, None]
            if WINDOW:
                seen = seen & (column[None, :] > position[:, None] - window)
            s = tl.where(seen, s, float("-inf"))
            new_m = tl.maximum(m, tl.max(s, axis=1))
            p = tl.math.exp2(s - new_m[:, None])
            alpha = tl.math.exp2(m - new_m)
            total = total * alpha + tl.sum(p, axis=1)
            m = new_m
            if KIND != "bf16":
                p = p * scale_of(record + VALUE_SCALES, token, valid, KIND)[None, :]
            p = p.to(tl.bfloat16)
            bits, place = lanes_of(record + VALUES, token, valid, VALUE_WORDS, VALUE_WIDTH, INTERPRET)
            values = record + VALUES + PAGE_ * 4 * VALUE_WORDS
            x = tile_of(values, token, bits, place, KIND, VALUE_KEPT, VALUE_WIDTH, INTERPRET)
            if QUERY_ROWS >= 64:
                # The compiler of Triton 3.6 fails on Hopper's products of a tile that was only put together.
                x = tl.where(valid[:, None], x, 0.0)
            acc = multiply(p, x, acc * alpha[:, None], INTERPRET)
        channel = tl.arange(0, VALUE_WIDTH)
        place = part_ptr + (part * ROWS + row)[:, None] * VALUE_DIM + channel[None, :]
        tl.store(place, acc, mask=(row < ROWS)[:, None] & (channel < VALUE_DIM)[None, :])
        store_state(state_ptr, part, row, m, total, ROWS)


def decode_pruned(
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
    query = query if query.stride(-1) == 1 else query.contiguous()
    batch, heads, queries, _ = query.shape
    kv_heads, value_dim = kv.sink_key.shape[1], kv.sink_value.shape[3]
    planes, group = batch * kv_heads, heads // kv_heads
    rows = max(8, triton.next_power_of_2(queries * group))
    layout = layout_of(kv.pages)
    refusal = hopper_prune_refusal(query, call, layout, queries * group)
    hopper = refusal is None
    if not hopper and not interpret:
        log_fallback("decode_prune_warps", refusal, "the plain kernel")
    multiprocessors = 1 if interpret else torch.cuda.get_device_properties(query.device).multi_processor_count
    # A launch that is to be that of later tokens too is made for many pages.
    pages = -(-kv.coded // PAGE) - kv.first // PAGE if kv.lengths is None else MAX_SPLITS
    splits = splits_of(planes, pages, multiprocessors * (1 if hopper else PROGRAMS))
    parts = splits + 1

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=query.device)

    part, state = empty(planes, parts, rows, value_dim), empty(planes, parts, 2, rows)
    out, lse = empty(batch, queries, heads, value_dim, dtype=query.dtype), empty(batch, heads, queries)
    marks = {
        "QUERIES": queries, "GROUP": group, "STARTS": key_starts is not None, "SINKS": kv.sink_key.shape[2] > 0,
        "LENGTHS_": kv.lengths is not None, "ROWS": rows,
    }  # fmt: skip
    if hopper:
        decode_prune_hopper((planes, splits), query, kv, call, key_starts, (part, state), layout, **marks)
    decode_prune_kernel[(planes, 1 if hopper else parts)](
        query, kv.pages.table(), kv.lengths, *kv.ring, kv.sink_key, kv.sink_value, kv.sink_starts, key_starts, part,
        state, *query.stride()[:3], *kv.ring[0].stride()[:3], *kv.ring[1].stride()[:3], *kv.sink_key.stride()[:3],
        *kv.sink_value.stride()[:3], kv.tokens, kv.coded, kv.first, splits, call.window or 0, kv.ring[0].shape[2],
        heads, kv.sink_key.shape[2], call.scaling, call.softcap or 0.0, WINDOW=call.window is not None,
        SOFTCAP=call.softcap is not None, QUERY_ROWS=max(16, rows), PAGES=not hopper, INTERPRET=interpret,
        num_warps=4, **marks, **shapes(layout),
    )  # fmt: skip
    merge_kernel[(batch * heads * queries,)](
        part, state, sinks, None, out, lse, parts, planes, heads, queries, group, value_dim,
        SINK_LOGITS=sinks is not None, KEPT=False, ROWS=rows, PARTS=min(16, triton.next_power_of_2(parts)),
        VALUE_WIDTH=padded_width(value_dim), PDL=False, num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip
    return out, lse
