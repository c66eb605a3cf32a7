"""Gluon kernel of `decode_attention.py` over product-quantized pages on Hopper, for any number of queries;
`decode_pq_hopper.py` launches it.

A program holds the codebooks of one KV head in shared memory and walks a run of pages, one page at a time::

    Ŷ = codebook[codes]        S = Ŷ_K·Q'ᵀ        P = 2^(S − m)        A = A·α + Ŷ_Vᵀ·P

*Gathers without conflicts.* A codebook lies as 256 rows of `WORDS` words of two channels, the words of all sub-vectors
beside one another. The lanes of a warp are neighbouring words of one token: whatever their codes are, they read 32
different banks. So a multiprocessor looks up 32 words per clock, where gathers through L1 bring 1.4 to 1.8. Looked-up
words go to a tile in shared memory, from which the matrix units take them, tokens (keys) or channels (values) being the
rows.

*What bounds it.* Every word moves three times through shared memory, which at 128 bytes per clock would take 112 µs for
8 sequences of 32,768 tokens and 8 KV heads of 128 channels; issue slots are busy for two thirds of that. On an H200 the
call takes 301 µs at 4 bits and 272 at 2, which look up word by word all the same; cuDNN on dense bf16 takes 239. The
eight warps go through lookup, product, softmax and product together, and each waits for the last. Those of
`decode_pq_warps_triton.py` do not.

Gluon has no gather from shared memory. The codebooks are stored as Gluon stores them, and looked up by an assembly
load whose address is the beginning of the program's shared memory, where the allocator puts the largest buffer. Every
program compares what it so reads with what it stored, and if that is something else, its results are NaN.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, warpgroup_mma, warpgroup_mma_wait

from .kv_pages import PAGE
from .w4a8_hopper_triton import thread_barrier

PAGE_ = gl.constexpr(PAGE)
CENTROIDS_ = gl.constexpr(256)
DAMAGED_ = gl.constexpr(255)
CHUNK = gl.constexpr(32)
"""Rows of a codebook that are stored at a time."""
LOWEST = gl.constexpr(-1.0e38)
# Triton 3.6 and later ones name this differently.
NAMED = gl.constexpr(hasattr(gl.shared_memory_descriptor, "reinterpret"))


@gluon.jit
def channels_of(words, CHANNELS: gl.constexpr, layout: gl.constexpr):
    """Words of a tile as bf16 channels."""
    if NAMED:
        return words.reinterpret(gl.bfloat16, [PAGE_, CHANNELS], layout)
    else:
        return words._reinterpret(gl.bfloat16, [PAGE_, CHANNELS], layout)


@gluon.jit
def shared_base(like):
    """Address of the program's shared memory, in the form of `like`, int32."""
    return gl.inline_asm_elementwise(
        "mov.u32 $0, global_smem; add.u32 $0, $0, $1;", "=&r,r", [like], dtype=gl.int32, is_pure=True, pack=1
    )


@gluon.jit
def looked_up(address):
    """Words at addresses in shared memory."""
    return gl.inline_asm_elementwise(
        "ld.shared.b32 $0, [$1];", "=r,r", [address], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def store_codebook(books, source, ROW: gl.constexpr, VECTORS: gl.constexpr, WORDS: gl.constexpr, layout: gl.constexpr):
    """Rows from ROW on. source: (VECTORS, 256, WORDS // VECTORS) int32 of a KV head."""
    PER: gl.constexpr = WORDS // VECTORS
    word = gl.arange(0, WORDS, gl.SliceLayout(0, layout))
    for chunk in gl.static_range(CENTROIDS_ // CHUNK):
        number = chunk * CHUNK + gl.arange(0, CHUNK, gl.SliceLayout(1, layout))
        place = (word // PER)[None, :] * (CENTROIDS_ * PER) + number[:, None] * PER + (word % PER)[None, :]
        books.slice(ROW + chunk * CHUNK, CHUNK, dim=0).store(gl.load(source + place))


@gluon.jit
def wrong_words(source, base, ROW: gl.constexpr, VECTORS: gl.constexpr, WORDS: gl.constexpr, layout: gl.constexpr):
    """How many of some words of a codebook are not where they are looked up."""
    PER: gl.constexpr = WORDS // VECTORS
    word = gl.arange(0, WORDS, gl.SliceLayout(0, layout))
    number = 7 * gl.arange(0, CHUNK, gl.SliceLayout(1, layout))
    place = (word // PER)[None, :] * (CENTROIDS_ * PER) + number[:, None] * PER + (word % PER)[None, :]
    there = looked_up(base + 4 * ((ROW + number[:, None]) * WORDS + word[None, :]))
    return gl.sum(gl.sum((there != gl.load(source + place)).to(gl.int32), axis=1), axis=0)


@gluon.jit
def codes_of(record, VECTORS: gl.constexpr, WORDS: gl.constexpr, layout: gl.constexpr):
    """(WORDS, PAGE) uint8: the code that each word of each token belongs to."""
    vector = gl.arange(0, WORDS, gl.SliceLayout(1, layout)) // (WORDS // VECTORS)
    token = gl.arange(0, PAGE_, gl.SliceLayout(0, layout))
    return gl.load(record + vector[:, None] * PAGE_ + token[None, :])


@gluon.jit
def record_at(table_ptr, page, offset):
    """Bytes of a plane in a page."""
    return gl.multiple_of((gl.load(table_ptr + page) + offset).to(gl.pointer_type(gl.uint8), bitcast=True), 16)


@gluon.jit
def exp2(x):
    return gl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1)


LENGTHS = ["coded", "first", "splits", "heads", "sink_tokens"]


@gluon.jit(do_not_specialize=LENGTHS)
def decode_pq_hopper_kernel(
    mapped_ptr, shift_ptr, table_ptr, length_ptr, sink_start_ptr, start_ptr, key_cent, value_cent, sum_ptr, state_ptr,
    coded, first, splits, heads, sink_tokens,
    RECORD: gl.constexpr, QUERIES: gl.constexpr, GROUP: gl.constexpr, VECTORS: gl.constexpr, SUB: gl.constexpr,
    VALUES: gl.constexpr, STARTS: gl.constexpr, SINKS: gl.constexpr, LENGTHS_: gl.constexpr, ROWS: gl.constexpr,
    QUERY_ROWS: gl.constexpr, VECTOR_WIDTH: gl.constexpr, WARPS: gl.constexpr,
):  # fmt: skip
    """Grid (batch · KV heads, splits). mapped, shift: of `decode_pq_triton.prepare_pq_kernel`.

    sums: (planes, splits, ROWS, VECTORS · SUB) fp32, Σ P·Ŷ. state: as of `decode_attention_triton.decode_kernel`, with
    a part more for each plane.
    """
    WORDS: gl.constexpr = VECTORS * SUB // 2
    CHANNELS: gl.constexpr = VECTORS * SUB
    lanes: gl.constexpr = gl.BlockedLayout([1, 16], [32, 1], [WORDS // 32, WARPS * 32 // WORDS], [1, 0])
    book: gl.constexpr = gl.BlockedLayout([4, 1], [1, 32], [WARPS * 32 // WORDS, WORDS // 32], [0, 1])
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, ROWS, 16])
    words_layout: gl.constexpr = gl.NVMMASharedLayout(128, 32, 2)
    tile_layout: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)

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

    books = gl.allocate_shared_memory(gl.int32, [2 * CENTROIDS_, WORDS], gl.SwizzledSharedLayout(1, 1, 1, order=[1, 0]))
    key_words = gl.allocate_shared_memory(gl.int32, [PAGE_, WORDS], words_layout)
    value_words = gl.allocate_shared_memory(gl.int32, [PAGE_, WORDS], words_layout)
    key_tile = channels_of(key_words, CHANNELS, tile_layout)
    value_tile = channels_of(value_words, CHANNELS, tile_layout)
    query_tile = gl.allocate_shared_memory(gl.bfloat16, [ROWS, CHANNELS], tile_layout)
    p_tile = gl.allocate_shared_memory(gl.bfloat16, [ROWS, PAGE_], tile_layout)

    HEAD: gl.constexpr = VECTORS * CENTROIDS_ * (SUB // 2)
    store_codebook(books, key_cent + kv_head * HEAD, 0, VECTORS, WORDS, book)
    store_codebook(books, value_cent + kv_head * HEAD, CENTROIDS_, VECTORS, WORDS, book)
    spread: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [WARPS, 1], [1, 0])
    row = gl.arange(0, ROWS, gl.SliceLayout(1, spread))
    channel = gl.arange(0, CHANNELS, gl.SliceLayout(0, spread))
    place = (plane * SUB + channel % SUB)[None, :] * QUERY_ROWS + row[:, None]
    query_tile.store(gl.load(mapped_ptr + place * VECTOR_WIDTH + (channel // SUB)[None, :]))
    thread_barrier()
    # Both codebooks are there, or nothing is.
    some = shared_base(gl.zeros([CHUNK, WORDS], gl.int32, book))
    wrong = wrong_words(key_cent + kv_head * HEAD, some, 0, VECTORS, WORDS, book)
    wrong += wrong_words(value_cent + kv_head * HEAD, some, CENTROIDS_, VECTORS, WORDS, book)

    word = gl.arange(0, WORDS, gl.SliceLayout(1, lanes))
    base = shared_base(4 * word)[:, None]
    query = gl.arange(0, ROWS, gl.SliceLayout(0, mma))
    token = gl.arange(0, PAGE_, gl.SliceLayout(1, mma))
    shift = gl.load(shift_ptr + plane * QUERY_ROWS + query)
    known = query < QUERIES * GROUP
    m = gl.full([ROWS], LOWEST, gl.float32, gl.SliceLayout(0, mma))
    total = gl.zeros([PAGE_, ROWS], gl.float32, mma)
    acc = gl.zeros([CHANNELS, ROWS], gl.float32, mma)
    zero = gl.zeros([PAGE_, ROWS], gl.float32, mma)
    if page_begin < page_end:
        record = record_at(table_ptr, page_begin, plane * RECORD)
        key_codes = codes_of(record, VECTORS, WORDS, lanes)
        value_codes = codes_of(record + VALUES, VECTORS, WORDS, lanes)
        for page in range(page_begin, page_end):
            k = looked_up(base + key_codes.to(gl.int32) * (4 * WORDS))
            key_words.store(k.permute([1, 0]))
            damaged = (gl.load(record + token) == DAMAGED_) | (gl.load(record + VALUES + token) == DAMAGED_)
            column = page * PAGE_ + token
            valid = (column < coded) & (column >= lowest)
            if SINKS:
                valid = valid & ((column < sink_start) | (column >= sink_start + sink_tokens))
            fence_async_shared()
            s = warpgroup_mma(key_tile, query_tile.permute((1, 0)), zero, use_acc=False, is_async=True)
            v = looked_up(base + value_codes.to(gl.int32) * (4 * WORDS) + 4 * WORDS * CENTROIDS_)
            # The next page's codes are on their way while this one's softmax runs.
            record = record_at(table_ptr, gl.minimum(page + 1, page_end - 1), plane * RECORD)
            key_codes = codes_of(record, VECTORS, WORDS, lanes)
            value_codes = codes_of(record + VALUES, VECTORS, WORDS, lanes)
            s = warpgroup_mma_wait(0, deps=[s])
            s += shift[None, :]
            s = gl.where(damaged[:, None], float("nan"), s)
            s = gl.where(valid[:, None] & known[None, :], s, float("-inf"))
            new_m = gl.maximum(m, gl.max(s, axis=0))
            p = exp2(s - new_m[None, :]).to(gl.bfloat16)
            alpha = exp2(m - new_m)
            m = new_m
            # Of the rounded ones, so that rounding to one side cancels.
            total = total * alpha[None, :] + p.to(gl.float32)
            acc = acc * alpha[None, :]
            value_words.store(v.permute([1, 0]))
            p_tile.store(p.permute([1, 0]))
            fence_async_shared()
            acc = warpgroup_mma(value_tile.permute((1, 0)), p_tile.permute((1, 0)), acc, is_async=True)
            acc = warpgroup_mma_wait(0, deps=[acc])
    # Until here nothing else may lie where the codebooks are.
    books._keep_alive()
    part = plane * (splits + 1) + split
    sums = gl.sum(total, axis=0)
    sums = gl.where(wrong > 0, float("nan"), sums)
    state = state_ptr + part * (2 * ROWS) + query
    gl.store(state, m)
    gl.store(state + ROWS, sums)
    channel = gl.arange(0, CHANNELS, gl.SliceLayout(1, mma))
    place = ((plane * splits + split) * ROWS + query)[None, :] * CHANNELS + channel[:, None]
    gl.store(sum_ptr + place, acc)
