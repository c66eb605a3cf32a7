"""What the Hopper attention kernel does to rows in registers: queries to codes, logits to probabilities.

64 queries belong to a warpgroup. Tensors are cut in halves and packed by renaming registers, which the layouts allow;
where they would not, compilation fails (`assert_trivial`).
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, warpgroup_mma, warpgroup_mma_wait

from .w4a8_hopper_triton import thread_barrier

LOG2_448 = gl.constexpr(8.807354922057604)
ROUND = gl.constexpr(12582912.0)
"""1.5 · 2²³: adding and subtracting it rounds to the nearest integer, ties to even."""
TILE = gl.constexpr(128)
ROWS = gl.constexpr(64)


@gluon.jit
def exp2(x):
    """MUFU alone: subnormal results become zero."""
    return gl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1)


@gluon.jit
def divide(a, b):
    """Correctly rounded, as the reference divides: one code more or less is 6 % of an e4m3 number."""
    return gl.inline_asm_elementwise("div.rn.f32 $0, $1, $2;", "=f,f,f", [a, b], dtype=gl.float32, is_pure=True, pack=1)


@gluon.jit
def pack(p):
    """FP32 operand (ROWS, TILE) → its e4m3 codes, four neighbours in a word: (ROWS, TILE / 4).

    Four bytes that a loop carries one by one are taken apart and put together again in every turn, words are not.
    """
    first, second = gl.split(p.reshape([ROWS, TILE // 4, 2, 2]))
    a, c = gl.split(first)
    b, d = gl.split(second)
    return gl.inline_asm_elementwise(
        "{ .reg .b16 x, y; cvt.rn.satfinite.e4m3x2.f32 x, $2, $1; cvt.rn.satfinite.e4m3x2.f32 y, $4, $3;"
        " mov.b32 $0, {x, y}; }",
        "=r,f,f,f,f",
        [a, b, c, d],
        dtype=gl.int32,
        is_pure=True,
        pack=1,
    )


@gluon.jit
def unpack(words, operand: gl.constexpr):
    """The reverse of `pack`: a left operand, in the same registers."""
    a = words.to(gl.uint8).to(gl.float8e4nv, bitcast=True)
    b = (words >> 8).to(gl.uint8).to(gl.float8e4nv, bitcast=True)
    c = (words >> 16).to(gl.uint8).to(gl.float8e4nv, bitcast=True)
    d = (words >> 24).to(gl.uint8).to(gl.float8e4nv, bitcast=True)
    p8 = gl.join(gl.join(a, c), gl.join(b, d)).reshape([ROWS, TILE])
    return gl.convert_layout(p8, operand, assert_trivial=True)


@gluon.jit
def halves(x):
    """(rows, 2n) → its left and right n columns, by renaming registers."""
    left, right = gl.split(x.reshape([ROWS, 2, x.shape[1] // 2]).permute([0, 2, 1]))
    return left, right


@gluon.jit
def row_max(s, row: gl.constexpr):
    """Maximum of each row, by a tree: the assembler would make one long chain of dependent steps of the other way."""
    a, b = halves(s)
    a, b = halves(gl.maximum(a, b))
    a, b = halves(gl.maximum(a, b))
    a, b = halves(gl.maximum(a, b))
    return gl.convert_layout(gl.max(gl.maximum(a, b), axis=1), row)


@gluon.jit
def partial_sums(p):
    """(ROWS, TILE) → (ROWS, 8): what is left to add lies in neighbouring threads, and is added once, at the end."""
    a, b = halves(p)
    a, b = halves(a + b)
    a, b = halves(a + b)
    a, b = halves(a + b)
    return a + b


@gluon.jit
def softmax(
    s, factor, m, total, start, position, k_start, k_stop, window,
    MASKED: gl.constexpr, CAUSAL: gl.constexpr, WINDOW: gl.constexpr, INT8: gl.constexpr, logits: gl.constexpr,
    operand: gl.constexpr, sums: gl.constexpr,
):  # fmt: skip
    """Logits of a tile → FP8 probabilities as a left operand, rescaling of what is summed so far, maximum and sum."""
    s = s.to(gl.float32)
    if MASKED:
        token = start + gl.arange(0, TILE, gl.SliceLayout(0, logits))
        seen = ((token >= k_start) & (token < k_stop))[None, :]
        if CAUSAL:
            seen = seen & (token[None, :] <= position[:, None])
        if WINDOW:
            seen = seen & (token[None, :] > (position - window)[:, None])
            if not CAUSAL:
                seen = seen & (token[None, :] < (position + window)[:, None])
        s = gl.where(seen, s, float("-inf"))
    new_m = gl.maximum(m, row_max(s, gl.SliceLayout(1, logits)) * factor)
    p = exp2(s * factor[:, None] - (new_m - LOG2_448)[:, None])
    alpha = exp2(m - new_m)
    part = gl.convert_layout(partial_sums(p), sums, assert_trivial=True)
    total = total * gl.convert_layout(alpha, gl.SliceLayout(1, sums))[:, None] + part
    p = p.reshape([ROWS, TILE // 16, 2, 4, 2]).permute([0, 1, 3, 2, 4]).reshape([ROWS, TILE])
    return gl.convert_layout(p, operand), alpha, new_m, total


@gluon.jit
def signs(layout: gl.constexpr):
    """Sylvester's Hadamard matrix, (ROWS, ROWS): −1 where row and column have an odd number of common one bits."""
    row = gl.arange(0, ROWS, gl.SliceLayout(1, layout))
    column = gl.arange(0, ROWS, gl.SliceLayout(0, layout))
    common = row[:, None] & column[None, :]
    common ^= common >> 4
    common ^= common >> 2
    common ^= common >> 1
    return 1 - 2 * (common & 1)


@gluon.jit
def rotate_queries(q_ptr, sign_tile, key_mean_ptr, first, q_stop, stride, PART: gl.constexpr, turned: gl.constexpr):
    """Block number PART of 64 queries: rotated, in FP32, and its share of q·k̄."""
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    i = first + gl.arange(0, ROWS, gl.SliceLayout(1, layout))
    channel = PART * ROWS + gl.arange(0, ROWS, gl.SliceLayout(0, layout))
    place = q_ptr + i.to(gl.int64)[:, None] * stride + channel[None, :]
    q = gl.load(place, mask=(i < q_stop)[:, None], other=0.0)
    shift = gl.sum(q.to(gl.float32) * gl.load(key_mean_ptr + channel)[None, :], axis=1)
    zero = gl.zeros([ROWS, ROWS], gl.float32, turned)
    operand = gl.convert_layout(q, gl.DotOperandLayout(0, turned, 2))
    wide = warpgroup_mma(operand, sign_tile, zero, use_acc=False, is_async=True)
    wide = warpgroup_mma_wait(0, deps=[wide])
    return wide * ROWS**-0.5, gl.convert_layout(shift, gl.SliceLayout(1, turned))


@gluon.jit
def finite_amax(x):
    """max |x| of each row, infinite where a value is NaN, which a maximum would drop."""
    size = gl.abs(x)
    return gl.max(gl.where(size < float("inf"), size, float("inf")), axis=1)


@gluon.jit
def codes_of(x, inverse, INT8: gl.constexpr):
    if INT8:
        codes = (gl.fma(x, inverse, gl.full_like(x, ROUND)) - ROUND).to(gl.int8)
    else:
        codes = (x * inverse).to(gl.float8e4nv)
    return codes


@gluon.jit
def quantize_queries(
    q_ptr, q_tile, sign_tile, key_mean_ptr, first, q_stop, stride,
    LEVELS: gl.constexpr, MIN: gl.constexpr, INT8: gl.constexpr, HEAD_DIM: gl.constexpr, logits: gl.constexpr,
):  # fmt: skip
    """Reads 64 queries, leaves the codes of their rotation in shared memory; scale per row, and q·k̄."""
    turned: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    left, shift = rotate_queries(q_ptr, sign_tile, key_mean_ptr, first, q_stop, stride, 0, turned)
    amax = finite_amax(left)
    if HEAD_DIM == 128:
        right, more = rotate_queries(q_ptr, sign_tile, key_mean_ptr, first, q_stop, stride, 1, turned)
        amax = gl.maximum(amax, finite_amax(right))
        shift += more
    scale = gl.maximum(divide(amax, gl.full_like(amax, LEVELS)), MIN)
    scale = gl.where(amax == 0, 1.0, scale)
    scale = gl.where(amax < float("inf"), scale, float("nan"))
    inverse = divide(gl.full_like(scale, 1.0), scale)[:, None] + gl.zeros_like(left)
    q_tile.slice(0, ROWS, dim=1).store(codes_of(left, inverse, INT8))
    if HEAD_DIM == 128:
        q_tile.slice(ROWS, ROWS, dim=1).store(codes_of(right, inverse, INT8))
    fence_async_shared()
    thread_barrier()
    row: gl.constexpr = gl.SliceLayout(1, logits)
    return gl.convert_layout(scale, row), gl.convert_layout(shift, row)
