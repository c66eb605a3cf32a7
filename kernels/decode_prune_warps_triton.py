"""Gluon kernel of `decode_attention.py` over pruned pages of bf16 values on Hopper, for up to 16 queries of a KV head;
`decode_prune_hopper.py` launches it.

Each warp of a program reads tiles of 32 tokens of its own, and waits for no other one. Bitmaps and kept values come to
shared memory as they are, while the tiles before are at work. A lane takes four channels of a token at a time, as
`decode_prune_triton.spread` does, and has them where the matrix units take them: two words of B of m16n8k16 for keys,
whose columns are tokens; for values, whose columns are channels, with those of the next token put beside them::

    S = Q·Xᵀ        P = 2^(S − m)        A = A·α + P·X

The lane 4·g + t has the channels 4·(4·step + t) … + 3 of token g of keys, and of values 4·(8·step + g) … + 3 of the
tokens 2·t and 2·t + 1. Probabilities come out of the products as the next ones take them.

Of the loop, a thread takes 7.9 instructions for each channel, where the plain kernel takes 12 (sm_90, at most eight
queries, head_dim 128, ptxas of Triton 3.6). On an H200 8 sequences of 32K tokens take 259 µs with 30 % of the channels
of 32 / 8 heads kept and 381 with half of them, where the plain kernel takes three times as long and more.
"""

from triton import constexpr_function
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from .decode_pq_hopper_triton import LOWEST, PAGE_, exp2
from .decode_prune_triton import TABLES
from .lanes_triton import (
    across_float,
    base_of,
    both,
    copy_rows,
    pairs_at,
    product,
    rounded,
    store_words,
    wait_copies,
    words_at,
)
from .w4a8_hopper_triton import thread_barrier

WARPS = 8
WARPS_ = gl.constexpr(WARPS)
SLOTS = gl.constexpr(3)
"""Places of tokens of a warp: keys or values of a tile each."""
TOKENS = gl.constexpr(32)
"""Of a tile: four steps of eight."""
UNIT = 16384
"""Bytes that shared memory is counted in."""
LOG2E = gl.constexpr(1.4426950408889634)
SUMS = gl.constexpr(1024)
"""Where warps' sums lie in the end, behind their maxima."""


@constexpr_function
def part_bytes(kept, dim):
    """Of a tile's keys or values."""
    return 32 * (dim // 8 + 2 * kept)


@constexpr_function
def units_of(key_kept, value_kept, dim):
    """Shared memory of a program. A token that was never written may have any bits, and values in the 512 bytes behind
    those of a tile."""
    tokens = 3 * WARPS * part_bytes(max(key_kept, value_kept), dim) + 512
    sums = 1024 + WARPS * 16 * dim * 4
    return -(-max(tokens, sums) // UNIT)


@gluon.jit
def count(x):
    """Bits that are set."""
    return gl.inline_asm_elementwise("popc.b32 $0, $1;", "=r,r", [x], dtype=gl.int32, is_pure=True, pack=1)


@constexpr_function
def spread_ptx():
    """`decode_prune_triton.SPREAD` on a bitmap's word, $2, which $7 and $8 turn so that the bits of the first two
    channels, and of the others, choose an entry of 16 bits."""
    halves, rests = TABLES
    return f"""{{
    .reg .b32 low, high, s, a, b, z;
    .reg .b64 t;
    shl.b32 s, $3, 4;
    shf.r.wrap.b32 low, $4, $5, s;
    shf.r.wrap.b32 high, $5, $6, s;
    shf.r.wrap.b32 a, $2, $2, $7;
    and.b32 a, a, 48;
    shf.r.wrap.b32 b, $2, $2, $8;
    and.b32 b, b, 48;
    shr.u64 t, {halves}, a;
    cvt.u32.u64 z, t;
    prmt.b32 $0, low, 0, z;
    shr.u64 t, {rests}, a;
    cvt.u32.u64 z, t;
    prmt.b32 low, low, high, z;
    shr.u64 t, {halves}, b;
    cvt.u32.u64 z, t;
    prmt.b32 $1, low, 0, z;
    }}"""


@gluon.jit
def spread(word, number, w0, w1, w2, shift):
    """Two words of two channels each: kept values from that number on, which three words hold, at the four channels
    from bit `shift` of a bitmap's word on."""
    PTX: gl.constexpr = spread_ptx()
    return gl.inline_asm_elementwise(
        PTX, "=&r,=&r,r,r,r,r,r,r,r", [word, number, w0, w1, w2, shift + 28, shift + 30],
        dtype=(gl.int32, gl.int32), is_pure=True, pack=1,
    )  # fmt: skip


@gluon.jit
def bitmap_at(offset, base, WORDS: gl.constexpr):
    """Words of a token's bitmap, each with the number of bits that are set before it."""
    words, before = (), ()
    total = gl.zeros_like(base)
    for pair in gl.static_range(WORDS // 2):
        x, y = pairs_at(offset + 8 * pair, base)
        words += (x, y)
    for index in gl.static_range(WORDS):
        before += (total,)
        if index < WORDS - 1:
            total += count(words[index])
    return words, before


@gluon.jit
def four_channels(words, before, values, low, shift, base, INDEX: gl.constexpr):
    """Two words of two channels, whose bits begin at `shift` of a bitmap's word INDEX. low: the bits below there.
    values: where the token's begin."""
    number = before[INDEX] + count(words[INDEX] & low)
    place = values + (number >> 1) * 4
    w0, w1, w2 = words_at(place, base), words_at(place + 4, base), words_at(place + 8, base)
    return spread(words[INDEX], number, w0, w1, w2, shift)


@gluon.jit
def logits(query, offset, g, t, base, KEPT: gl.constexpr, DIM: gl.constexpr):
    """Of a tile: for each step of eight tokens four, as m16n8k16 has them. offset: of the tile's keys."""
    WORDS: gl.constexpr = DIM // 32
    zero = gl.zeros_like(base).to(gl.float32)
    found = ()
    for step in gl.static_range(4):
        token = 8 * step + g
        words, before = bitmap_at(offset + token * (DIM // 8), base, WORDS)
        values = offset + TOKENS * (DIM // 8) + token * (2 * KEPT)
        s = (zero, zero, zero, zero)
        for index in gl.static_range(DIM // 16):
            shift = 4 * t + index % 2 * 16
            low = (gl.zeros_like(t) + 1 << shift) - 1
            b = four_channels(words, before, values, low, shift, base, index // 2)
            s = product(s, query[index], b)
        found += (s,)
    return found


@gluon.jit
def add_values(acc, alphas, operands, valid, offset, g, t, base, KEPT: gl.constexpr, DIM: gl.constexpr,
               HALVES: gl.constexpr):  # fmt: skip
    """Sums and a tile's values, for each step of eight groups of channels, and each channel of a group.
    valid: (step, token of two) → whether it is read."""
    WORDS: gl.constexpr = DIM // 32
    shift = 4 * g
    low = (gl.zeros_like(g) + 1 << shift) - 1
    new = ()
    for index in gl.static_range(4 * WORDS):
        d = acc[index]
        if HALVES == 2:
            new += ((d[0] * alphas[0], d[1] * alphas[0], d[2] * alphas[1], d[3] * alphas[1]),)
        else:
            new += ((d[0] * alphas[0], d[1] * alphas[0], d[2], d[3]),)
    for pair in gl.static_range(2):
        bitmaps = ()
        for number in gl.static_range(4):
            token = 8 * (2 * pair + number // 2) + 2 * t + number % 2
            words, before = bitmap_at(offset + token * (DIM // 8), base, WORDS)
            read = ()
            for index in gl.static_range(WORDS):
                # What is not read may be no number, which a probability of zero would not take away.
                read += (gl.where(valid[2 * (2 * pair + number // 2) + number % 2], words[index], 0),)
            bitmaps += ((read, before, offset + TOKENS * (DIM // 8) + token * (2 * KEPT)),)
        done = ()
        for index in gl.static_range(WORDS):
            x = ()
            for number in gl.static_range(4):
                words, before, values = bitmaps[number]
                x += (four_channels(words, before, values, low, shift, base, index),)
            for channel in gl.static_range(4):
                b = (
                    both(x[0][channel // 2], x[1][channel // 2], 0x7632 if channel % 2 else 0x5410),
                    both(x[2][channel // 2], x[3][channel // 2], 0x7632 if channel % 2 else 0x5410),
                )
                done += (product(new[4 * index + channel], operands[pair], b),)
        new = done
    return new


@gluon.jit
def row_max(x):
    """Over the lanes of a row."""
    x = gl.maximum(x, across_float(x, 1))
    return gl.maximum(x, across_float(x, 2))


@gluon.jit
def row_sum(x):
    """Over the lanes of a row."""
    x += across_float(x, 1)
    return x + across_float(x, 2)


@gluon.jit
def pair_sum(pair):
    """Of two bf16 in an int32, FP32."""
    return (pair << 16).to(gl.float32, bitcast=True) + (pair & -65536).to(gl.float32, bitcast=True)


@gluon.jit
def weights(s, m, total, HALVES: gl.constexpr):
    """Probabilities as A of two products of 16 tokens; maxima, sums and what came before is worth, of each row."""
    rows, alphas, new_m, new_total = (), (), (), ()
    for row in gl.static_range(HALVES):
        highest = gl.maximum(s[0][2 * row], s[0][2 * row + 1])
        for step in gl.static_range(1, 4):
            highest = gl.maximum(highest, gl.maximum(s[step][2 * row], s[step][2 * row + 1]))
        top = gl.maximum(m[row], row_max(highest))
        alpha = exp2(m[row] - top)
        whole = total[row] * alpha
        pairs = ()
        for step in gl.static_range(4):
            pair = rounded(exp2(s[step][2 * row] - top), exp2(s[step][2 * row + 1] - top))
            # Of the rounded ones, so that rounding to one side cancels.
            whole += pair_sum(pair)
            pairs += (pair,)
        rows += (pairs,)
        alphas += (alpha,)
        new_m += (top,)
        new_total += (whole,)
    other = rows[HALVES - 1]
    if HALVES == 1:
        none = gl.zeros_like(rows[0][0])
        other = (none, none, none, none)
    operands = (
        (rows[0][0], other[0], rows[0][1], other[1]),
        (rows[0][2], other[2], rows[0][3], other[3]),
    )
    return operands, alphas, new_m, new_total


@gluon.jit
def query_words(base, row, t, qh, qt, known, GROUP: gl.constexpr, DIM: gl.constexpr):
    """Of a row, for each step of 16 channels two words of bf16; zeros where no query is."""
    there = row < known
    row = gl.where(there, row, 0)
    source = base + row % GROUP * qh + row // GROUP * qt
    found = ()
    for step in gl.static_range(DIM // 16):
        of_step = ()
        for word in gl.static_range(2):
            channel = 4 * (4 * step + t) + 2 * word
            low, high = gl.load(source + channel).to(gl.float32), gl.load(source + channel + 1).to(gl.float32)
            of_step += (gl.where(there, rounded(low, high), 0),)
        found += (of_step,)
    return found


@gluon.jit
def store_results(acc, m, total, part_ptr, state_ptr, thread, base, known, DIM: gl.constexpr, ROWS: gl.constexpr,
                  HALVES: gl.constexpr):  # fmt: skip
    """All warps' sums together. parts: of the run, (ROWS, DIM); state: (2, ROWS)."""
    lane, warp = thread % 32, thread // 32
    g, t = lane // 4, lane % 4
    # Nobody reads tokens any more.
    thread_barrier()
    for half in gl.static_range(HALVES):
        place = 8 * (warp * 16 + 8 * half + g)
        store_words(m[half].to(gl.int32, bitcast=True), place, base)
        store_words(row_sum(total[half]).to(gl.int32, bitcast=True), place + 4, base)
    thread_barrier()
    for half in gl.static_range(HALVES):
        row = 8 * half + g
        top = m[half]
        for index in gl.static_range(WARPS_):
            top = gl.maximum(top, words_at(8 * (index * 16 + row), base).to(gl.float32, bitcast=True))
        whole = gl.zeros_like(top)
        for index in gl.static_range(WARPS_):
            x, y = pairs_at(8 * (index * 16 + row), base)
            whole += y.to(gl.float32, bitcast=True) * exp2(x.to(gl.float32, bitcast=True) - top)
        mine = (warp == 0) & (t == 0) & (row < known)
        gl.store(state_ptr + row, top, mask=mine)
        gl.store(state_ptr + ROWS + row, whole, mask=mine)
        factor = exp2(m[half] - top)
        for index in gl.static_range(DIM // 8):
            for side in gl.static_range(2):
                channel = 4 * (index // 4 * 8 + 2 * t + side) + index % 4
                place = SUMS + 4 * ((warp * 16 + row) * DIM + channel)
                store_words((acc[index][2 * half + side] * factor).to(gl.int32, bitcast=True), place, base)
    thread_barrier()
    for start in gl.static_range(0, 8 * HALVES * DIM, WARPS_ * 32):
        place = start + thread
        value = gl.zeros_like(thread).to(gl.float32)
        for index in gl.static_range(WARPS_):
            value += words_at(SUMS + 4 * (index * (16 * DIM) + place), base).to(gl.float32, bitcast=True)
        gl.store(part_ptr + place, value, mask=place // DIM < known)


@gluon.jit
def copy_tile(record, tile, into, lane, base, KEPT: gl.constexpr, DIM: gl.constexpr):
    """Keys or values of a tile, as a group. record: where the page's begin, int64."""
    BITMAPS: gl.constexpr = TOKENS * (DIM // 8)
    quarter = tile % (PAGE_ // TOKENS)
    values = record + PAGE_ * (DIM // 8) + quarter * (TOKENS * 2 * KEPT)
    copy_rows(record + quarter * BITMAPS, into, lane, base, BITMAPS // 16, False)
    copy_rows(values, into + BITMAPS, lane, base, TOKENS * 2 * KEPT // 16, True)


LENGTHS = ["coded", "first", "splits", "heads", "sink_tokens"]


@gluon.jit(do_not_specialize=LENGTHS)
def decode_prune_warps_kernel(
    q_ptr, table_ptr, length_ptr, sink_start_ptr, start_ptr, part_ptr, state_ptr, qb, qh, qt, coded, first, splits,
    heads, sink_tokens, scaling, RECORD: gl.constexpr, QUERIES: gl.constexpr, GROUP: gl.constexpr,
    KEY_KEPT: gl.constexpr, VALUE_KEPT: gl.constexpr, VALUES: gl.constexpr, DIM: gl.constexpr, STARTS: gl.constexpr,
    SINKS: gl.constexpr, LENGTHS_: gl.constexpr, ROWS: gl.constexpr,
):  # fmt: skip
    """Grid (batch · KV heads, splits). parts, state: as of `decode_prune_triton.decode_prune_kernel`; rows that are no
    query are left out."""
    HALVES: gl.constexpr = (QUERIES * GROUP + 7) // 8
    PART: gl.constexpr = part_bytes(max(KEY_KEPT, VALUE_KEPT), DIM)
    threads: gl.constexpr = gl.BlockedLayout([1], [32], [WARPS_], [0])
    plane = gl.program_id(0).to(gl.int64)
    split = gl.program_id(1)
    kv_heads = heads // GROUP
    batch = plane // kv_heads
    kv_head = plane % kv_heads
    if LENGTHS_:
        coded = gl.load(length_ptr + 1)
    lowest = first
    if STARTS:
        lowest = gl.maximum(lowest, gl.load(start_ptr + batch).to(gl.int32))
    sink_start = gl.load(sink_start_ptr + batch).to(gl.int32)
    first_page = lowest // PAGE_
    pages = gl.maximum((coded + PAGE_ - 1) // PAGE_ - first_page, 0)
    run = (pages + splits - 1) // splits
    page_begin = first_page + split * run
    page_end = gl.minimum(page_begin + run, first_page + pages)
    tile_begin, tile_end = page_begin * (PAGE_ // TOKENS), page_end * (PAGE_ // TOKENS)

    UNITS: gl.constexpr = units_of(KEY_KEPT, VALUE_KEPT, DIM)
    memory = gl.allocate_shared_memory(gl.int32, [UNITS, 64, 64], gl.SwizzledSharedLayout(1, 1, 1, order=[1, 0]))
    # Memory that nothing is stored in by Gluon itself would not be there.
    memory.index(0).store(gl.zeros([64, 64], gl.int32, gl.BlockedLayout([1, 2], [1, 32], [WARPS_, 1], [1, 0])))
    thread_barrier()
    thread = gl.arange(0, WARPS_ * 32, threads)
    lane, warp = thread % 32, thread // 32
    g, t = lane // 4, lane % 4
    base = base_of(thread)
    zero = gl.zeros([WARPS_ * 32], gl.float32, threads)
    m, total, acc, query = (), (), (), ()
    for _ in gl.static_range(HALVES):
        m += (zero + LOWEST,)
        total += (zero,)
    for _ in gl.static_range(DIM // 8):
        acc += ((zero, zero, zero, zero),)
    q_base = q_ptr + batch * qb + kv_head * GROUP * qh
    upper = query_words(q_base, g, t, qh, qt, QUERIES * GROUP, GROUP, DIM)
    lower = query_words(q_base, g + 8, t, qh, qt, QUERIES * GROUP, GROUP, DIM)
    for step in gl.static_range(DIM // 16):
        query += ((upper[step][0], lower[step][0], upper[step][1], lower[step][1]),)
    if page_begin < page_end:
        last = tile_end - 1
        places = warp * (SLOTS * PART)
        tile = gl.minimum(tile_begin + warp, last)
        record = gl.load(table_ptr + tile // (PAGE_ // TOKENS)) + plane * RECORD
        copy_tile(record, tile, places, lane, base, KEY_KEPT, DIM)
        copy_tile(record + VALUES, tile, places + PART, lane, base, VALUE_KEPT, DIM)
        coming = gl.minimum(tile_begin + warp + WARPS_, last)
        coming_record = gl.load(table_ptr + coming // (PAGE_ // TOKENS)) + plane * RECORD
        copy_tile(coming_record, coming, places + 2 * PART, lane, base, KEY_KEPT, DIM)
        place = 0
        for begin in range(tile_begin, tile_end, WARPS_):
            tile = begin + warp
            after = gl.minimum(tile + 2 * WARPS_, last)
            after_record = gl.load(table_ptr + after // (PAGE_ // TOKENS)) + plane * RECORD
            here = places + place * PART
            place = (place + 1) % SLOTS
            there = places + place * PART
            place = (place + 1) % SLOTS
            wait_copies(thread, 2)
            products = logits(query, here, g, t, base, KEY_KEPT, DIM)
            wait_copies(thread, 1)
            copy_tile(coming_record + VALUES, coming, here, lane, base, VALUE_KEPT, DIM)
            s, valid = (), ()
            for step in gl.static_range(4):
                of_step = ()
                for side in gl.static_range(2):
                    at = tile * TOKENS + 8 * step + 2 * t + side
                    seen = (at < coded) & (at >= lowest) & (tile < tile_end)
                    if SINKS:
                        seen = seen & ((at < sink_start) | (at >= sink_start + sink_tokens))
                    valid += (seen,)
                for index in gl.static_range(2 * HALVES):
                    value = products[step][index] * (scaling * LOG2E)
                    of_step += (gl.where(valid[2 * step + index % 2], value, float("-inf")),)
                s += (of_step,)
            operands, alphas, m, total = weights(s, m, total, HALVES)
            acc = add_values(acc, alphas, operands, valid, there, g, t, base, VALUE_KEPT, DIM, HALVES)
            wait_copies(thread, 2)
            copy_tile(after_record, after, there, lane, base, KEY_KEPT, DIM)
            coming, coming_record = after, after_record
        wait_copies(thread, 0)
    part = plane * (splits + 1) + split
    store_results(
        acc, m, total, part_ptr + part * (ROWS * DIM), state_ptr + part * (2 * ROWS), thread, base, QUERIES * GROUP,
        DIM, ROWS, HALVES,
    )  # fmt: skip
    memory._keep_alive()
