"""Pieces of the kernels of a compressed cache: codes into operands, two e4m3 terms side by side, rotation."""

import triton
import triton.language as tl

from .attention_quant_triton import to_e4m3

LOG2E = tl.constexpr(1.4426950408889634)
LOW = tl.constexpr(16.0)
"""A second term is kept so many times as large."""


@triton.jit
def nibbles(x, INTERPRET: tl.constexpr):
    """uint8 with two codes → e4m3 of u·2⁻⁹ for the low one and the high one."""
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
    return low.to(tl.float8e4nv, bitcast=True), high.to(tl.float8e4nv, bitcast=True)


@triton.jit
def multiply(a, b, INTERPRET: tl.constexpr):
    """a · b from zero, FP32."""
    if INTERPRET:
        result = tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    else:
        result = tl.dot(a, b, max_num_imprecise_acc=a.shape[1])
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
def two_terms(p, ROWS: tl.constexpr, COLUMNS: tl.constexpr, INTERPRET: tl.constexpr):
    """p, no more than 448, as an e4m3 operand: first and second terms beside each other."""
    rest = (p - to_e4m3(p, INTERPRET).to(tl.float32)) * LOW
    return to_e4m3(beside(p, rest, ROWS, COLUMNS), INTERPRET)


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
