"""Operands of product-quantized pages for `decode_pq_warps_triton.py`, which says how they are turned: words of two
channels that lanes look up in codebooks in shared memory, and the products with them.

Of four queries at a time, a block, there are 16 rows (q, ρ) for each four rotations. A code holds PER words.
"""

from triton import constexpr_function
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from .decode_pq_hopper_triton import CENTROIDS_
from .lanes_triton import both, four_words, pairs_at, product, store_words, words_at

WARPS = 8
WARPS_ = gl.constexpr(WARPS)
HALF = gl.constexpr(32)
"""Tokens that are looked up at a time: four steps of eight."""
ROW = gl.constexpr(256)
"""Bytes from one code's words to the next one's."""


@constexpr_function
def books_bytes(words):
    """Of both codebooks; of 32 words each, they lie in the same rows."""
    return 256 * 256 * words // 32


@constexpr_function
def lookup_ptx(first, constant, offset, words):
    """Words of the codes in bytes `first` and the next of $n, $n + 1 being bytes of places in a row, $n + 2 the base.

    A place is less than 128, so that its sign is the zero of the upper bytes.
    """
    lines, inputs = [], 2 * words
    for index in range(2):
        place = 4 + constant
        selector = place | (first + index) << 4 | (8 | place) << 8 | (8 | place) << 12
        lines.append(f"prmt.b32 a, ${inputs}, ${inputs + 1}, {selector}; add.u32 a, a, ${inputs + 2};")
        if words == 1:
            lines.append(f"ld.shared.b32 ${index}, [a+{offset}];")
        else:
            lines.append(f"ld.shared.v2.b32 {{${2 * index}, ${2 * index + 1}}}, [a+{offset}];")
    return "{ .reg .u32 a; " + " ".join(lines) + " }"


@gluon.jit
def looked_up(codes, places, base, FIRST: gl.constexpr, CONSTANT: gl.constexpr, OFFSET: gl.constexpr,
              PER: gl.constexpr):  # fmt: skip
    """Words of two codes, PER each: those of bytes FIRST and FIRST + 1."""
    PTX: gl.constexpr = lookup_ptx(FIRST, CONSTANT, OFFSET, PER)
    if PER == 1:
        words = gl.inline_asm_elementwise(
            PTX, "=&r,=&r,r,r,r", [codes, places, base], dtype=(gl.int32, gl.int32), is_pure=False, pack=1
        )
        return ((words[0],), (words[1],))
    else:
        words = gl.inline_asm_elementwise(
            PTX, "=&r,=&r,=&r,=&r,r,r,r", [codes, places, base], dtype=(gl.int32, gl.int32, gl.int32, gl.int32),
            is_pure=False, pack=1,
        )  # fmt: skip
        return ((words[0], words[1]), (words[2], words[3]))


@gluon.jit
def store_book(source, thread, base, OFFSET: gl.constexpr, VECTORS: gl.constexpr, PER: gl.constexpr):
    """A codebook to where it is looked up. source: (VECTORS, 256, PER) int32 of a KV head.

    A warp takes 32 bytes each of 16 sub-vectors at a time: whole sectors of memory, and no bank more than twice.
    """
    GROUPS: gl.constexpr = VECTORS // 16
    CODES: gl.constexpr = 4 // PER
    lane, warp = thread % 32, thread // 32
    for start in range(0, GROUPS * CENTROIDS_ // (2 * CODES), 4 * WARPS_):
        found = ()
        for part in gl.static_range(4):
            number = start + part * WARPS_ + warp
            vector = number % GROUPS * 16 + lane // 2
            code = (number // GROUPS * 2 + lane % 2) * CODES
            found += ((four_words(source + (vector * CENTROIDS_ + code) * PER), vector, code),)
        for part in gl.static_range(4):
            words, vector, code = found[part]
            for word in gl.static_range(4):
                place = (code + word // PER) * ROW + (vector * PER + word % PER) * 4
                store_words(words[word], OFFSET + place, base)


@gluon.jit
def query_words(mapped, g, t, BLOCK: gl.constexpr, VECTORS: gl.constexpr, PER: gl.constexpr,
                QUERY_ROWS: gl.constexpr, VECTOR_WIDTH: gl.constexpr):  # fmt: skip
    """VECTORS // 4 · PER words of a query, in the order of the rows that this lane holds. mapped: of a plane."""
    words = ()
    CHANNEL: gl.constexpr = QUERY_ROWS * VECTOR_WIDTH
    for slot in gl.static_range(VECTORS // 4):
        source = mapped + (4 * BLOCK + g % 4) * VECTOR_WIDTH + 4 * (slot ^ (g // 4)) + t
        for word in gl.static_range(PER):
            # Twice from memory, so that the other order's registers are not moved for every product instead.
            low = gl.load(source + 2 * word * CHANNEL, volatile=True).to(gl.int16, bitcast=True).to(gl.int32)
            high = gl.load(source + (2 * word + 1) * CHANNEL, volatile=True).to(gl.int16, bitcast=True).to(gl.int32)
            words += ((low & 0xFFFF) | (high << 16),)
    return words


@gluon.jit
def chosen(d, t, g, INDEX: gl.constexpr, TILES: gl.constexpr):
    """Of the products with eight tokens, those of the lane's query with token 2·t + g // 4. INDEX: of the first."""
    upper, odd = g >= 4, t % 2 == 1
    found = gl.where(odd, gl.where(upper, d[INDEX][3], d[INDEX][2]), gl.where(upper, d[INDEX][1], d[INDEX][0]))
    if TILES == 2:
        other = gl.where(
            odd, gl.where(upper, d[INDEX + 1][3], d[INDEX + 1][2]), gl.where(upper, d[INDEX + 1][1], d[INDEX + 1][0])
        )
        found = gl.where(t >= 2, other, found)
    return found


@gluon.jit
def key_words(codes, places, base, FIRST: gl.constexpr, STEP: gl.constexpr, PER: gl.constexpr):
    """B of m16n8k16 for two steps of eight tokens, FIRST and the next, and the words that a lane takes at STEP."""
    if PER == 1:
        R: gl.constexpr = 2 * STEP
        OFFSET: gl.constexpr = 128 * (R // 8)
        x = looked_up(codes[R], places[R % 8 // 4], base, FIRST, R % 4, OFFSET, 1)
        y = looked_up(codes[R + 1], places[(R + 1) % 8 // 4], base, FIRST, (R + 1) % 4, OFFSET, 1)
        return ((x[0][0], y[0][0]), (x[1][0], y[1][0]))
    else:
        return looked_up(codes[STEP], places[0], base, FIRST, STEP % 4, 128 * (STEP // 4), 2)


@gluon.jit
def query_rows(words, STEP: gl.constexpr, TILE: gl.constexpr, PER: gl.constexpr):
    """A of m16n8k16 for the words of a step: rows of four rotations."""
    if PER == 1:
        R: gl.constexpr = (2 * STEP) ^ (4 * TILE)
        w = words[R // 2 % 2]
        return w[R], w[R ^ 2], w[R ^ 1], w[R ^ 3]
    else:
        w = words[STEP // 2 % 2]
        return w[2 * STEP], w[2 * (STEP ^ 2)], w[2 * STEP + 1], w[2 * (STEP ^ 2) + 1]


@gluon.jit
def logits(queries, codes, places, base, t, g, FIRST: gl.constexpr, PAIRS: gl.constexpr, BLOCKS: gl.constexpr,
           WORDS: gl.constexpr, PER: gl.constexpr):  # fmt: skip
    """Of steps FIRST and the 2 · PAIRS − 1 next ones, a tuple for each block of queries."""
    TILES: gl.constexpr = 2 // PER
    PRODUCTS: gl.constexpr = BLOCKS * TILES
    zero = gl.zeros_like(base).to(gl.float32)
    sums = ()
    for _ in gl.static_range(2 * PAIRS * PRODUCTS):
        sums += ((zero, zero, zero, zero),)
    for step in gl.static_range(WORDS // 8):
        new = ()
        for pair in gl.static_range(PAIRS):
            b = key_words(codes, places, base, FIRST + 2 * pair, step, PER)
            for side in gl.static_range(2):
                for index in gl.static_range(PRODUCTS):
                    a = query_rows(queries[index // TILES], step, index % TILES, PER)
                    new += (product(sums[(2 * pair + side) * PRODUCTS + index], a, b[side]),)
        sums = new
    found = ()
    for block in gl.static_range(BLOCKS):
        of_block = ()
        for number in gl.static_range(2 * PAIRS):
            of_block += (chosen(sums, t, g, number * PRODUCTS + block * TILES, TILES),)
        found += (of_block,)
    return found


@gluon.jit
def half_logits(queries, offset, places, base, t, g, BLOCKS: gl.constexpr, VECTORS: gl.constexpr,
                PER: gl.constexpr):  # fmt: skip
    """Of the four tokens that a lane has of 32, for each block of queries. offset: of the lane's codes."""
    codes = ()
    for slot in gl.static_range(VECTORS // 4):
        codes += (words_at(offset ^ (128 * slot), base),)
    WORDS: gl.constexpr = VECTORS * PER
    if BLOCKS == 1:
        return logits(queries, codes, places, base, t, g, 0, 2, 1, WORDS, PER)
    else:
        x = logits(queries, codes, places, base, t, g, 0, 1, BLOCKS, WORDS, PER)
        y = logits(queries, codes, places, base, t, g, 2, 1, BLOCKS, WORDS, PER)
        found = ()
        for block in gl.static_range(BLOCKS):
            found += (x[block] + y[block],)
        return found


@gluon.jit
def value_words(even_codes, odd_codes, places, base, FIRST: gl.constexpr, CONSTANT: gl.constexpr, OFFSET: gl.constexpr,
                PER: gl.constexpr):  # fmt: skip
    """B of m16n8k16 for sixteen tokens and a slot, for each channel of its words."""
    even = looked_up(even_codes, places, base, FIRST, CONSTANT, OFFSET, PER)
    odd = looked_up(odd_codes, places, base, FIRST, CONSTANT, OFFSET, PER)
    found = ()
    for word in gl.static_range(PER):
        x0, y0, x1, y1 = even[0][word], odd[0][word], even[1][word], odd[1][word]
        found += ((both(x0, y0, 0x5410), both(x1, y1, 0x5410)), (both(x0, y0, 0x7632), both(x1, y1, 0x7632)))
    return found


@gluon.jit
def add_values(acc, alphas, operands, places, offset, base, BLOCKS: gl.constexpr, VECTORS: gl.constexpr,
               PER: gl.constexpr, BOOK: gl.constexpr):  # fmt: skip
    """Sums of rotations and a tile's values: for each slot, block and channel of a sub-vector four of m16n8k16."""
    SUB: gl.constexpr = 2 * PER
    CONSTANTS: gl.constexpr = 4 // PER
    new = ()
    for slot in gl.static_range(VECTORS // 8):
        sums = ()
        for index in gl.static_range(BLOCKS * SUB):
            d, alpha = acc[slot * BLOCKS * SUB + index], alphas[index // SUB]
            sums += ((d[0] * alpha, d[1] * alpha, d[2] * alpha, d[3] * alpha),)
        for half in gl.static_range(2):
            even, odd = pairs_at((offset + half * (VECTORS * HALF)) ^ (256 * slot), base)
            for part in gl.static_range(2):
                b = value_words(
                    even, odd, places, base, 2 * part, slot % CONSTANTS, BOOK + 128 * (slot // CONSTANTS), PER
                )
                done = ()
                for index in gl.static_range(BLOCKS * SUB):
                    done += (product(sums[index], operands[index // SUB][2 * half + part], b[index % SUB]),)
                sums = done
        new += sums
    return new
