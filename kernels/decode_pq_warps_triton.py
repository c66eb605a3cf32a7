"""Gluon kernel of `decode_attention.py` over product-quantized pages on Hopper, for few queries of a KV head;
`decode_pq_hopper.py` launches it.

A program holds the codebooks of one KV head in shared memory; each of its warps reads tiles of 64 tokens of its own and
waits for no other one. Looked-up words go straight into the operands of the matrix units, B of m16n8k16, and are not
stored again::

    S = Q'·Ŷ_Kᵀ        P = 2^(S − m)        A = A·α + P·Ŷ_V

*Rotation.* Lane 4·g + t of such an operand holds token g and word t of a step (keys), or token t and word g (values):
lanes that hold the same word of several tokens would look it up in one bank. So every token takes the words in an order
of its own: what a lane looks up for slot r is group r ⊕ g of words, and for values r ⊕ t. All 32 lanes then read
different banks, whatever their codes are. The order is undone by the other operand, whose 16 rows four queries leave
empty anyway: row (q, ρ) holds query q in the order of tokens with rotation ρ. For keys it has Q' in that order, and of
the products with a token, the row of its rotation is taken. For values it has zeros for tokens of other rotations, and
each row sums the words of its rotation, which are put in place once, behind the loop.

Codes lie in a record sub-vector by sub-vector. Each warp copies those of its next tile to shared memory meanwhile.

*What it costs.* Warp-wide instructions of the loop for a page of 128 tokens and a KV head (sm_90, one query of each of
four heads of 128 channels, ptxas of Triton 3.6), beside those of `decode_pq_hopper_triton.py`. A multiprocessor issues
four a clock. What they take of shared memory is 512 clocks of lookups and about 130 of codes, there 1,536:

| | all | lookups | byte permutes | matrix products | stores | barriers of the program |
|---|---|---|---|---|---|---|
| 4 bits | 2,606 | 512 | 800 | 384 of 16·8·16 | 0 | 0 |
| 2 bits | 1,872 | 256 of two words | 544 | 256 of 16·8·16 | 0 | 0 |
| the other kernel, 4 or 2 bits | 3,824 | 512 | 680 | 16 of 64·8·16 each warpgroup | 160 | 32 |

With five to eight queries of a KV head, keys and values are multiplied twice, and registers are spilled.

On an H200 that is, at 4 / 2 bits for 32 / 8 heads of 128 channels, 119 / 99 µs for 8 sequences of 32K tokens and 69 /
59 for one of 128K, where the other kernel takes 279 / 245 and 149 / 132. What prepares queries and maps sums back, in
launches of their own, takes 24 to 29 µs more.

Gluon has no gather from shared memory and no product of such operands; both are assembly, as are the stores behind
them. The one buffer of the program lies at the beginning of its shared memory, which a test looks at.
"""

from triton import constexpr_function
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from .decode_pq_hopper_triton import CENTROIDS_, LOWEST, PAGE_, exp2
from .decode_pq_lookup_triton import HALF, WARPS, WARPS_, add_values, books_bytes, half_logits, query_words, store_book
from .lanes_triton import (
    across,
    base_of,
    both,
    copy_codes,
    largest,
    pairs_at,
    permuted,
    rounded,
    store_words,
    summed,
    wait_copies,
    words_at,
)
from .w4a8_hopper_triton import thread_barrier

SLOTS = gl.constexpr(3)
"""Places of codes of a warp: keys or values of a tile each."""
TOKENS = gl.constexpr(64)
"""Of a tile: two halves."""
UNIT = 16384
"""Bytes that shared memory is counted in."""
CHUNK = gl.constexpr(16)
"""Bytes of an asynchronous copy."""


@constexpr_function
def units_of(vectors, words):
    """Shared memory of a program."""
    return -(-(books_bytes(words) + 3 * WARPS * 64 * vectors) // UNIT)


@gluon.jit
def damaged_flags(key, value):
    """0x80 in the bytes in which one of both is 255."""
    k, v = ~key, ~value
    fine = (((k & 0x7F7F7F7F) + 0x7F7F7F7F) | k) & (((v & 0x7F7F7F7F) + 0x7F7F7F7F) | v)
    return ~fine & (-0x7F7F7F80)


@gluon.jit
def weights(s, m, total):
    """Probabilities of a query's eight tokens of a lane as bf16 pairs, maximum, sum, and what came before is worth."""
    highest = s[0]
    for index in gl.static_range(1, 8):
        highest = gl.maximum(highest, s[index])
    new_m = gl.maximum(m, largest(highest))
    alpha = exp2(m - new_m)
    total = total * alpha
    pairs = ()
    for index in gl.static_range(4):
        pair = rounded(exp2(s[2 * index] - new_m), exp2(s[2 * index + 1] - new_m))
        # Of the rounded ones, so that rounding to one side cancels.
        total += (pair << 16).to(gl.float32, bitcast=True) + (pair & -65536).to(gl.float32, bitcast=True)
        pairs += (pair,)
    return pairs, new_m, total, alpha


@gluon.jit
def operand(p, t, g):
    """A of m16n8k16 for the values of two steps: rows of the lanes' rotation, zeros else."""
    other = across(p, 16)
    upper = g >= 4
    low = permuted(p, other, gl.where(upper, 0x1054, 0x5410))
    high = permuted(p, other, gl.where(upper, 0x3276, 0x7632))
    mine = t % 2 == g // 4
    a0, a1 = mine & (t < 2), mine & (t >= 2)
    return gl.where(a0, low, 0), gl.where(a1, low, 0), gl.where(a0, high, 0), gl.where(a1, high, 0)


@gluon.jit
def store_results(acc, m, total, sum_ptr, state_ptr, thread, base, known, BLOCKS: gl.constexpr,
                  VECTORS: gl.constexpr, PER: gl.constexpr, ROWS: gl.constexpr):  # fmt: skip
    """All warps' sums together. sums: of the run, (ROWS, VECTORS · 2 · PER); state: (2, ROWS)."""
    SUB: gl.constexpr = 2 * PER
    CHANNELS: gl.constexpr = VECTORS * SUB
    LINE: gl.constexpr = 4 * BLOCKS
    SUMS: gl.constexpr = 4096
    lane, warp = thread % 32, thread // 32
    g, t = lane // 4, lane % 4
    # Nobody looks anything up any more.
    thread_barrier()
    for block in gl.static_range(BLOCKS):
        place = 8 * (warp * LINE + 4 * block + g % 4)
        store_words(m[block].to(gl.int32, bitcast=True), place, base)
        store_words(summed(total[block]).to(gl.int32, bitcast=True), place + 4, base)
    thread_barrier()
    for block in gl.static_range(BLOCKS):
        row = 4 * block + g % 4
        top = m[block]
        for index in gl.static_range(WARPS_):
            there = words_at(8 * (index * LINE + row), base)
            top = gl.maximum(top, there.to(gl.float32, bitcast=True))
        whole = gl.zeros_like(top)
        for index in gl.static_range(WARPS_):
            state = pairs_at(8 * (index * LINE + row), base)
            whole += state[1].to(gl.float32, bitcast=True) * exp2(state[0].to(gl.float32, bitcast=True) - top)
        mine = (warp == 0) & (t == 0) & (g < 4) & (row < known)
        gl.store(state_ptr + row, top, mask=mine)
        gl.store(state_ptr + ROWS + row, whole, mask=mine)
        factor = exp2(m[block] - top)
        for slot in gl.static_range(VECTORS // 8):
            for channel in gl.static_range(SUB):
                d = acc[(slot * BLOCKS + block) * SUB + channel]
                for index in gl.static_range(4):
                    rotation, word = 2 * (index // 2) + g // 4, 2 * t + index % 2
                    if PER == 1:
                        vector = 8 * (slot ^ rotation) + word
                    else:
                        vector = 4 * ((2 * slot + word // 4) ^ rotation) + word % 4
                    place = ((warp * 4 + rotation) * LINE + row) * CHANNELS + vector * SUB + channel
                    store_words((d[index] * factor).to(gl.int32, bitcast=True), SUMS + 4 * place, base)
    thread_barrier()
    COUNT: gl.constexpr = LINE * CHANNELS
    for start in gl.static_range(0, COUNT, WARPS_ * 32):
        place = start + thread
        value = gl.zeros_like(thread).to(gl.float32)
        for index in gl.static_range(4 * WARPS_):
            value += words_at(SUMS + 4 * (index * COUNT + place), base).to(gl.float32, bitcast=True)
        gl.store(sum_ptr + place, value, mask=place // CHANNELS < known)


@gluon.jit
def address_of(table_ptr, tile, last, plane_offset):
    """Of a tile's codes: its page's record and the place in there, int64. Tiles behind the last are read as that."""
    tile = gl.minimum(tile, last)
    return gl.load(table_ptr + tile // (PAGE_ // TOKENS)) + plane_offset + tile % (PAGE_ // TOKENS) * TOKENS


LENGTHS = ["coded", "first", "splits", "heads", "sink_tokens"]


@gluon.jit(do_not_specialize=LENGTHS)
def decode_pq_warps_kernel(
    mapped_ptr, shift_ptr, table_ptr, length_ptr, sink_start_ptr, start_ptr, key_cent, value_cent, sum_ptr, state_ptr,
    coded, first, splits, heads, sink_tokens,
    RECORD: gl.constexpr, QUERIES: gl.constexpr, GROUP: gl.constexpr, VECTORS: gl.constexpr, SUB: gl.constexpr,
    VALUES: gl.constexpr, STARTS: gl.constexpr, SINKS: gl.constexpr, LENGTHS_: gl.constexpr, ROWS: gl.constexpr,
    QUERY_ROWS: gl.constexpr, VECTOR_WIDTH: gl.constexpr,
):  # fmt: skip
    """Grid (batch · KV heads, splits). Arguments and results: as of `decode_pq_hopper_triton.decode_pq_hopper_kernel`;
    rows that are no query are left out.
    """
    PER: gl.constexpr = SUB // 2
    WORDS: gl.constexpr = VECTORS * PER
    BLOCKS: gl.constexpr = (QUERIES * GROUP + 3) // 4
    BOOK: gl.constexpr = 128 if WORDS == 32 else 65536
    CODES: gl.constexpr = VECTORS * TOKENS
    BOOKS: gl.constexpr = books_bytes(WORDS)
    COPIES: gl.constexpr = CODES // (32 * CHUNK)
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

    UNITS: gl.constexpr = units_of(VECTORS, WORDS)
    memory = gl.allocate_shared_memory(gl.int32, [UNITS, 64, 64], gl.SwizzledSharedLayout(1, 1, 1, order=[1, 0]))
    # Memory that nothing is stored in by Gluon itself would not be there.
    memory.index(0).store(gl.zeros([64, 64], gl.int32, gl.BlockedLayout([1, 2], [1, 32], [WARPS_, 1], [1, 0])))
    thread_barrier()
    thread = gl.arange(0, WARPS_ * 32, threads)
    lane, warp = thread % 32, thread // 32
    g, t = lane // 4, lane % 4
    base = base_of(thread)

    # Where a lane's words lie in a row of the codebooks, a byte for each rotation.
    STRIDE: gl.constexpr = 16 * PER
    near = (STRIDE * (g % (8 // PER)) + 4 * PER * t) * 0x01010101
    if PER == 1:
        far = near ^ 0x70605040
        near = near ^ 0x30201000
        value_places = (32 * t + 4 * g) * 0x01010101 ^ 0x60402000
    else:
        near = near ^ 0x60402000
        far = near
        value_places = (32 * ((g // 4) ^ t) + 8 * (g % 4)) * 0x01010101 ^ 0x40004000
    # Where its codes lie: rows of 32 tokens, first those of the first half of a tile.
    codes = BOOKS + warp * (SLOTS * CODES)
    key_offset = 128 * (g % (8 // PER)) + HALF * t + 4 * g
    if PER == 1:
        value_offset = 256 * t + HALF * g + 8 * t
    else:
        value_offset = 128 * ((g // 4) ^ t) + HALF * (g % 4) + 8 * t
    flag_offset = 4 * (2 * t + g // 4)
    copy_offset = lane % 4 // 2 * (VECTORS * HALF) + lane // 4 * HALF + lane % 2 * CHUNK
    copied = plane * RECORD + lane // 4 * PAGE_ + lane % 4 * CHUNK

    zero = gl.zeros([WARPS_ * 32], gl.float32, threads)
    acc, m, total, shift, queries = (), (), (), (), ()
    for _ in gl.static_range(VECTORS // 8 * SUB * BLOCKS):
        acc += ((zero, zero, zero, zero),)
    for block in gl.static_range(BLOCKS):
        m += (zero + LOWEST,)
        total += (zero,)
        shift += (gl.load(shift_ptr + plane * QUERY_ROWS + 4 * block + g % 4),)
        mapped = mapped_ptr + plane * (SUB * QUERY_ROWS * VECTOR_WIDTH)
        words = query_words(mapped, g, t, block, VECTORS, PER, QUERY_ROWS, VECTOR_WIDTH)
        again = words
        # Eight queries have no registers for that.
        if BLOCKS == 1:
            again = query_words(mapped, g, t, block, VECTORS, PER, QUERY_ROWS, VECTOR_WIDTH)
        queries += ((words, again),)
    if page_begin < page_end:
        last = tile_end - 1
        tile = tile_begin + warp
        now = address_of(table_ptr, tile, last, copied)
        coming = address_of(table_ptr, tile + WARPS_, last, copied)
        copy_codes(now, codes + copy_offset, base, COPIES)
        copy_codes(now + VALUES, codes + CODES + copy_offset, base, COPIES)
        copy_codes(coming, codes + 2 * CODES + copy_offset, base, COPIES)
        place = 0
        HEAD: gl.constexpr = VECTORS * CENTROIDS_ * PER
        store_book(key_cent + kv_head * HEAD, thread, base, 0, VECTORS, PER)
        store_book(value_cent + kv_head * HEAD, thread, base, BOOK, VECTORS, PER)
        thread_barrier()
        for begin in range(tile_begin, tile_end, WARPS_):
            tile = begin + warp
            after = address_of(table_ptr, tile + 2 * WARPS_, last, copied)
            here = codes + place * CODES
            place = (place + 1) % SLOTS
            there = codes + place * CODES
            place = (place + 1) % SLOTS
            wait_copies(thread, 2)
            x = half_logits(queries, here + key_offset, (near, far), base, t, g, BLOCKS, VECTORS, PER)
            y = half_logits(queries, here + VECTORS * HALF + key_offset, (near, far), base, t, g, BLOCKS, VECTORS, PER)
            key_first = words_at(here + flag_offset, base), words_at(here + VECTORS * HALF + flag_offset, base)
            wait_copies(thread, 1)
            copy_codes(coming + VALUES, here + copy_offset, base, COPIES)
            column = tile * TOKENS + 4 * (2 * t + g // 4)
            flags = (
                damaged_flags(key_first[0], words_at(there + flag_offset, base)),
                damaged_flags(key_first[1], words_at(there + VECTORS * HALF + flag_offset, base)),
            )
            operands, alphas, new_m, new_total = (), (), (), ()
            for block in gl.static_range(BLOCKS):
                s = ()
                for index in gl.static_range(8):
                    value = (x[block] + y[block])[index] + shift[block]
                    flag = both(flags[index // 4], flags[index // 4], 0x8888 + 0x1111 * (index % 4))
                    value = (value.to(gl.int32, bitcast=True) | flag).to(gl.float32, bitcast=True)
                    at = column + index // 4 * HALF + index % 4
                    valid = (at < coded) & (at >= lowest) & (tile < tile_end)
                    if SINKS:
                        valid = valid & ((at < sink_start) | (at >= sink_start + sink_tokens))
                    s += (gl.where(valid, value, float("-inf")),)
                pairs, mm, tt, alpha = weights(s, m[block], total[block])
                a = ()
                for index in gl.static_range(4):
                    a += (operand(pairs[index], t, g),)
                operands += (a,)
                alphas += (alpha,)
                new_m += (mm,)
                new_total += (tt,)
            m, total = new_m, new_total
            acc = add_values(
                acc, alphas, operands, value_places, there + value_offset, base, BLOCKS, VECTORS, PER, BOOK
            )
            wait_copies(thread, 2)
            copy_codes(after, there + copy_offset, base, COPIES)
            coming = after
        wait_copies(thread, 0)
    part = plane * (splits + 1) + split
    store_results(
        acc, m, total, sum_ptr + (plane * splits + split) * (ROWS * VECTORS * SUB), state_ptr + part * (2 * ROWS),
        thread, base, QUERIES * GROUP, BLOCKS, VECTORS, PER, ROWS,
    )  # fmt: skip
    memory._keep_alive()
