"""Parts of coded tokens in `decode_attention.py`: a run of pages, whose codes are unpacked in registers.

Everything is transposed, Sᵀ = K·Qᵀ and Oᵀ = Vᵀ·Pᵀ, since Hopper's matrix units take only the left operand from
registers; an INT4 code u as an e4m3 byte is u·2⁻⁹ exactly.

*Two terms.* Queries and probabilities are multiplied in FP8, each as x = hi + lo/16 with both terms in e4m3: eight bits
of mantissa instead of four. A tile has at least 16 columns, and the queries of one KV head are rarely more than 8: the
second terms go where padding would be, and cost nothing.

*Scales of values* go into the exponent. With σ_t and μ_t of token t and s_t its logit in units of log₂::

    w_t = exp2(s_t + log₂ σ_t − m),  m = max(s_t + log₂ σ_t)       O = (Σ w_t u_t + Σ w_t μ_t / σ_t) / Σ w_t / σ_t

so that w ≤ 1 whatever the scales are. Each page's product starts from zero and is added in FP32, since Hopper's FP8
accumulator has 14 bits.

*Whole pages*, of which every query sees every token, are most of a long cache and need no masks. The others, of which
there are few, come first: a loop of their own.

A warp issues 451 instructions for a whole INT4 page of 128 channels on Hopper, of which 96 unpack codes. On an H200 8
rows of 32,768 tokens with 8 KV heads take 77 µs, their bytes at full bandwidth 65; with two products for each half of a
page and masks everywhere it was 749 instructions and 98 µs.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents

from .decode_tiles_triton import (
    LOW,
    LOWEST,
    PAGE_,
    capped,
    doubled,
    fold,
    multiply,
    nibbles,
    position_of,
    readable,
    record_at,
    second_added,
    store_state,
    two_terms,
)
from .decode_tiles_triton import fast_exp2 as exp2
from .decode_tiles_triton import fast_log2 as log2
from .decode_tiles_triton import fast_reciprocal as reciprocal

LOG2_448 = tl.constexpr(8.807354922057604)


@triton.jit
def parameters(ptr, token, valid, KIND: tl.constexpr, MASKED: tl.constexpr):
    """σ and μ of tokens; with MASKED 1 and 0 where not valid, whatever is stored there."""
    if KIND == "int4":
        word = tl.load(ptr.to(tl.pointer_type(tl.uint32)) + token)
        if MASKED:
            word = tl.where(valid, word, 0x3F80)
        scale = (word << 16).to(tl.float32, bitcast=True)
        low = (word & 0xFFFF0000).to(tl.float32, bitcast=True)
    else:
        scale = tl.load(ptr.to(tl.pointer_type(tl.float32)) + token)
        if MASKED:
            scale = tl.where(valid, scale, 1.0)
        low = tl.zeros(scale.shape, tl.float32)
    return scale, low


@triton.jit
def page_logits(
    record, token, column, valid, position, q, weight, sums, shift, window, softcap, head_dim,
    OFFSET: tl.constexpr, VALUE_OFFSET: tl.constexpr, KIND: tl.constexpr, WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr, MASKED: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """(PAGE, ROWS) logits plus log₂ σ of the values, in units of log₂ and without what the mean of the keys adds; 1/σ
    and μ/σ of the values. sums: of a query's channels, in units of weight."""
    if KIND == "int4":
        channel = tl.arange(0, WIDTH // 2)
        half = head_dim // 2
        codes = tl.load(record + token[:, None] * half + channel[None, :], mask=(channel < half)[None, :], other=0)
        k = nibbles(codes, PAGE_, WIDTH // 2, INTERPRET)
    else:
        channel = tl.arange(0, WIDTH)
        codes = record.to(tl.pointer_type(tl.float8e4nv))
        k = tl.load(codes + token[:, None] * head_dim + channel[None, :], mask=(channel < head_dim)[None, :], other=0.0)
    s = multiply(k, q.T, None, INTERPRET)
    scale, least = parameters(record + OFFSET, token, valid, KIND, MASKED)
    s = second_added(s, PAGE_, ROWS) * scale[:, None]
    if KIND == "int4":
        s += least[:, None] * sums[None, :]
    scale, least = parameters(record + VALUE_OFFSET, token, valid, KIND, MASKED)
    bias = log2(scale, INTERPRET)
    if MASKED:
        bias = tl.where(valid, bias, float("-inf"))
    if SOFTCAP:
        s = capped(s * weight[None, :] + shift[None, :], softcap) + bias[:, None]
    else:
        s = s * weight[None, :] + bias[:, None]
    if MASKED and WINDOW:
        s = tl.where(column[:, None] > position[None, :] - window, s, float("-inf"))
    over = reciprocal(scale, INTERPRET)
    return s, over, least * over


@triton.jit
def code_pages(
    m, acc, sum_tile, least_tile, q, weight, sums, shift, table_ptr, offset, position, begin, skipped, gap,
    count, coded, lowest, sink_start, window, sink_tokens, softcap, KIND: tl.constexpr, HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr, KEY_PARAMETERS: tl.constexpr, VALUES: tl.constexpr, VALUE_PARAMETERS: tl.constexpr,
    WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, SINKS: tl.constexpr, MASKED: tl.constexpr, ROWS: tl.constexpr,
    WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, STAGES: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """`count` pages from `begin` on; after `skipped` of them, `gap` are left out."""
    value_channel = tl.arange(0, VALUE_WIDTH)
    token = tl.arange(0, PAGE_)
    first = begin + (gap if skipped == 0 else 0)
    address = tl.load(table_ptr + first, mask=count > 0, other=0)
    for index in tl.range(0, count, num_stages=STAGES):
        page, later = begin + index, begin + index + 1
        if MASKED:
            page += tl.where(index >= skipped, gap, 0)
            later += tl.where(index + 1 >= skipped, gap, 0)
        record = record_at(address, offset)
        # Asked for a page ahead, so that nothing waits for it.
        address = tl.load(table_ptr + later, mask=index + 1 < count, other=0)
        column = page * PAGE_ + token
        valid = readable(column, coded, lowest, sink_start, sink_tokens, SINKS)
        s, over, least = page_logits(
            record, token, column, valid, position, q, weight, sums, shift, window, softcap, HEAD_DIM, KEY_PARAMETERS,
            VALUE_PARAMETERS, KIND, WINDOW, SOFTCAP, MASKED, ROWS, WIDTH, INTERPRET,
        )  # fmt: skip
        new_m = tl.maximum(m, tl.max(s, axis=0))
        alpha = exp2(m - new_m, INTERPRET)
        w = exp2(s - (new_m - LOG2_448)[None, :], INTERPRET)
        sum_tile = sum_tile * alpha[None, :] + w * over[:, None]
        there = (value_channel < VALUE_DIM)[:, None]
        if KIND == "int4":
            least_tile = least_tile * alpha[None, :] + w * least[:, None]
            LATER: tl.constexpr = PAGE_ // 2
            place = record + VALUES + value_channel[:, None] * LATER + tl.arange(0, LATER)[None, :]
            v = nibbles(tl.load(place, mask=there, other=0), VALUE_WIDTH, LATER, INTERPRET)
        else:
            place = (record + VALUES).to(tl.pointer_type(tl.float8e4nv)) + value_channel[:, None] * PAGE_
            v = tl.load(place + token[None, :], mask=there, other=0.0)
        o = multiply(v, two_terms(w, PAGE_, ROWS, INTERPRET), None, INTERPRET)
        acc = acc * doubled(alpha, ROWS)[None, :] + o
        m = new_m
    return m, acc, sum_tile, least_tile


@triton.jit
def code_part(
    codes_ptr, scale_ptr, table_ptr, part_ptr, state_ptr, tokens, coded, lowest, page_begin, page_end, part, offset,
    sink_start, window, sink_tokens, softcap, QUERIES: tl.constexpr, GROUP: tl.constexpr, KIND: tl.constexpr,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, KEY_PARAMETERS: tl.constexpr, VALUES: tl.constexpr,
    VALUE_PARAMETERS: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, SINKS: tl.constexpr,
    ROWS: tl.constexpr, WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, STAGES: tl.constexpr, PDL: tl.constexpr,
    INTERPRET: tl.constexpr,
):  # fmt: skip
    """Pages [page_begin, page_end). codes, scale: what `prepare_kernel` wrote for this row and KV head."""
    INT4: tl.constexpr = KIND == "int4"
    row, value_channel = tl.arange(0, ROWS), tl.arange(0, VALUE_WIDTH)
    # Channels of one half of a head are those of the low codes, of the other those of the high ones.
    HALF: tl.constexpr = HEAD_DIM // 2 if INT4 else HEAD_DIM
    q_row, channel = tl.arange(0, 2 * ROWS)[:, None], tl.arange(0, WIDTH)[None, :]
    upper = channel >= (WIDTH // 2 if INT4 else WIDTH)
    channel = tl.where(upper, channel - WIDTH // 2, channel)
    q = tl.load(codes_ptr + q_row * HEAD_DIM + channel + tl.where(upper, HALF, 0), mask=channel < HALF, other=0.0)
    weight = tl.load(scale_ptr + row) * (512.0 if INT4 else 1.0)
    sums = tl.load(scale_ptr + ROWS + row) / weight
    shift = tl.load(scale_ptr + 2 * ROWS + row)
    position = position_of(row, tokens, QUERIES, GROUP)
    m = tl.full((ROWS,), LOWEST, tl.float32)
    acc = tl.zeros((VALUE_WIDTH, 2 * ROWS), tl.float32)
    # Sums over tokens that no product makes are kept per thread until the end.
    sum_tile = tl.zeros((PAGE_, ROWS), tl.float32)
    least_tile = tl.zeros((PAGE_, ROWS), tl.float32)
    unmasked = lowest
    if SINKS:
        unmasked = tl.maximum(unmasked, sink_start + sink_tokens)
    if WINDOW:
        unmasked = tl.maximum(unmasked, tokens - window)
    whole_begin = tl.minimum(tl.maximum(tl.cdiv(unmasked, PAGE_), page_begin), page_end)
    whole_end = tl.minimum(tl.maximum(coded // PAGE_, whole_begin), page_end)
    before, whole = tl.maximum(whole_begin - page_begin, 0), tl.maximum(whole_end - whole_begin, 0)
    others = tl.maximum(page_end - page_begin, 0) - whole
    m, acc, sum_tile, least_tile = code_pages(
        m, acc, sum_tile, least_tile, q, weight, sums, shift, table_ptr, offset, position, page_begin,
        before, whole, others, coded, lowest, sink_start, window, sink_tokens, softcap, KIND, HEAD_DIM, VALUE_DIM,
        KEY_PARAMETERS, VALUES, VALUE_PARAMETERS, WINDOW, SOFTCAP, SINKS, True, ROWS, WIDTH, VALUE_WIDTH, 1, INTERPRET,
    )  # fmt: skip
    m, acc, sum_tile, least_tile = code_pages(
        m, acc, sum_tile, least_tile, q, weight, sums, shift, table_ptr, offset, position, whole_begin,
        whole, 0, whole, coded, lowest, sink_start, window, sink_tokens, softcap, KIND, HEAD_DIM, VALUE_DIM,
        KEY_PARAMETERS, VALUES, VALUE_PARAMETERS, WINDOW, SOFTCAP, SINKS, False, ROWS, WIDTH, VALUE_WIDTH, STAGES,
        INTERPRET,
    )  # fmt: skip
    if PDL:
        gdc_launch_dependents()
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
