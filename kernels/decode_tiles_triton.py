"""Pieces of the kernels of a compressed cache: codes into operands, two e4m3 terms side by side, rotation."""

import triton
import triton.language as tl

from .attention_quant_triton import to_e4m3
from .kv_pages import PAGE

LOG2E = tl.constexpr(1.4426950408889634)
LOW = tl.constexpr(16.0)
"""A second term is kept so many times as large."""
LOWEST = tl.constexpr(-1.0e38)
"""Start of the running maximum; finite, so that a run without a visible token leaves no NaN."""
BLOCK = tl.constexpr(64)
"""Dense tokens of a tile."""
PAGE_ = tl.constexpr(PAGE)


@triton.jit
def nibbles(x, ROWS: tl.constexpr, COLUMNS: tl.constexpr, INTERPRET: tl.constexpr):
    """(ROWS, COLUMNS) uint8 with two codes → (ROWS, 2 · COLUMNS) e4m3 of u·2⁻⁹: the low ones, then the high ones."""
    if INTERPRET:
        low, high = x & 15, x >> 4
    else:
        low, high = tl.inline_asm_elementwise(
            "and.b32 $0, $2, 0x0f0f0f0f; shr.u32 $1, $2, 4; and.b32 $1, $1, 0x0f0f0f0f;",
            "=&r,=r,r",
            [x],
            dtype=(tl.uint8, tl.uint8),
            is_pure=True,
            pack=4,
        )
    return beside(low.to(tl.float8e4nv, bitcast=True), high.to(tl.float8e4nv, bitcast=True), ROWS, COLUMNS)


@triton.jit
def multiply(a, b, to, INTERPRET: tl.constexpr):
    """a · b, FP32, added to `to` unless that is None: in the matrix unit's accumulator."""
    if INTERPRET:
        result = tl.dot(a.to(tl.float32), b.to(tl.float32), to, input_precision="ieee")
    else:
        result = tl.dot(a, b, to)
    return result


@triton.jit
def second_added(x, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """(ROWS, 2 · COLUMNS) → (ROWS, COLUMNS): first terms, and second ones at what they are worth."""
    first, second = tl.split(x.reshape(ROWS, 2, COLUMNS).permute(0, 2, 1))
    return first + second * (1.0 / LOW)


@triton.jit
def fast_exp2(x, INTERPRET: tl.constexpr):
    """2ˣ, zero below 2⁻¹²⁶: without the instructions that keep smaller ones."""
    if INTERPRET:
        result = tl.math.exp2(x)
    else:
        result = tl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, is_pure=True, pack=1)
    return result


@triton.jit
def fast_log2(x, INTERPRET: tl.constexpr):
    """log₂ x of x from 2⁻¹²⁶."""
    if INTERPRET:
        result = tl.math.log2(x)
    else:
        result = tl.inline_asm_elementwise("lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, is_pure=True, pack=1)
    return result


@triton.jit
def fast_reciprocal(x, INTERPRET: tl.constexpr):
    """1 / x of x from 2⁻¹²⁶ to 2¹²⁶."""
    if INTERPRET:
        result = 1.0 / x
    else:
        result = tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, is_pure=True, pack=1)
    return result


@triton.jit
def fold(x, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """(ROWS, 2 · COLUMNS) → (ROWS, COLUMNS): first and second terms together."""
    return tl.sum(x.reshape(ROWS, 2, COLUMNS), axis=1)


@triton.jit
def beside(high, low, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Two (ROWS, COLUMNS) as one (ROWS, 2 · COLUMNS)."""
    return tl.join(high, low).permute(0, 2, 1).reshape(ROWS, 2 * COLUMNS)


@triton.jit
def doubled(x, COLUMNS: tl.constexpr):
    """(COLUMNS,) → (2 · COLUMNS,): x behind x."""
    return tl.join(x, x).permute(1, 0).reshape(2 * COLUMNS)


@triton.jit
def first_term(x):
    """FP32 rounded to the four bits of mantissa of e4m3; in integers, since the assembler of CUDA 12.8 takes codes that
    are also read back out of a register that holds none. Below 2⁻⁶ it is finer than e4m3, by less than 2⁻¹⁰."""
    bits = x.to(tl.int32, bitcast=True)
    return ((bits + 0x80000) & -1048576).to(tl.float32, bitcast=True)


@triton.jit
def two_terms(p, ROWS: tl.constexpr, COLUMNS: tl.constexpr, INTERPRET: tl.constexpr):
    """p, no more than 448, as an e4m3 operand: first and second terms beside each other."""
    first = first_term(p)
    return to_e4m3(beside(first, (p - first) * LOW, ROWS, COLUMNS), INTERPRET)


@triton.jit
def capped(s, softcap):
    """softcap · tanh(s / softcap), all in units of log₂."""
    bound = softcap * LOG2E
    return bound * (1.0 - 2.0 / (tl.math.exp2(s / bound * (2.0 * LOG2E)) + 1.0))


@triton.jit
def record_at(address, offset):
    """Pointer to the bytes of one row and KV head of a page; both arguments are multiples of 16."""
    return tl.multiple_of((address + offset).to(tl.pointer_type(tl.uint8)), 16)


@triton.jit
def load_queries(base, qh, qt, QUERIES, GROUP, HEAD_DIM, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """(ROWS, WIDTH) in 16 bit, zeros where no query is."""
    row, channel = tl.arange(0, ROWS), tl.arange(0, WIDTH)
    known = (row < QUERIES * GROUP)[:, None] & (channel < HEAD_DIM)[None, :]
    place = (row % GROUP)[:, None] * qh + (row // GROUP)[:, None] * qt + channel[None, :]
    return tl.load(base + place, mask=known, other=0.0)


@triton.jit
def crossed(x, ROWS: tl.constexpr, WIDTH: tl.constexpr, STEP: tl.constexpr):
    """(ROWS, WIDTH): sums and differences of channels that differ in the bit STEP."""
    left, right = tl.split(x.reshape(ROWS, WIDTH // (2 * STEP), 2, STEP).permute(0, 1, 3, 2))
    return tl.join(left + right, left - right).permute(0, 1, 3, 2).reshape(ROWS, WIDTH)


@triton.jit
def turned(x, ROWS: tl.constexpr, WIDTH: tl.constexpr, SIZE: tl.constexpr):
    """(ROWS, WIDTH) times Hadamard's matrix in blocks of SIZE channels, 64 at most, one bit of a channel at a time."""
    for bit in tl.static_range(6):
        if (1 << bit) < SIZE:
            x = crossed(x, ROWS, WIDTH, 1 << bit)
    return x * SIZE**-0.5


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
def store_state(ptr, part, row, m, total, ROWS: tl.constexpr):
    """Maximum and sum of weights of a part."""
    tl.store(ptr + part * 2 * ROWS + row, m, mask=row < ROWS)
    tl.store(ptr + part * 2 * ROWS + ROWS + row, total, mask=row < ROWS)
