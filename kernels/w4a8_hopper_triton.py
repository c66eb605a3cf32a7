"""Gluon kernel for INT4 weights × FP8 activations on Hopper; `w4a8_hopper.py` launches it.

A program computes Yᵀ = W·Xᵀ for 64·CONSUMERS outputs and BLOCK_M tokens. One warp loads with TMA: the weights' tiles do
not wait for the kernel that quantizes the activations, the activations' tiles do. Each consumer warpgroup owns 64
outputs: its packed weights go from shared memory to registers, become FP8 there, and are the left operand of WGMMA.

*Unpacking costs three instructions per eight weights.* The stored nibble is u = q + 8, and the byte u read as e4m3 is
exactly u·2⁻⁹ for every u in 0…15. The low nibbles of a row's bytes are the even input channels, the high nibbles the
odd ones, so the activations come in two planes, even and odd channels, and nothing is interleaved. What u has too much,
8·Σx, is taken off again: with one scale per row from the finished sum, with groups by one more matrix product per
group, of constants and the digits that `planes.py` made of the group's Σx. Decoding to
q in registers instead (eleven instructions per eight weights) took 1.1 to 1.2 times as long at 64 to 256 tokens.

*Promotion.* Hopper's FP8 accumulator keeps about 14 bits, so no more than 256 products are summed in it; the sum of a
group is scaled and added in FP32.

*Split K.* Where there are fewer tiles than multiprocessors, several programs share a tile's K. They leave partial sums
in a workspace; the last one to arrive adds them in order, so results do not depend on timing, and resets the tile's
counter.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.language.extra.cuda import gdc_wait

from .int4_linear_triton import DECODE_PTX

# Triton 3.6 and later ones name these differently.
async_load = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
thread_barrier = getattr(gl, "barrier", None) or gl.thread_barrier


@gluon.jit
def unpack(packed):
    """Bytes of two nibbles → their low and high nibbles as e4m3 values u·2⁻⁹."""
    low, high = gl.inline_asm_elementwise(
        "{ .reg .b32 t; and.b32 $0, $2, 0x0F0F0F0F; shr.u32 t, $2, 4; and.b32 $1, t, 0x0F0F0F0F; }",
        "=r,=r,r",
        [packed],
        dtype=(gl.uint8, gl.uint8),
        is_pure=True,
        pack=4,
    )
    return low, high


@gluon.jit
def digit_weights(layout: gl.constexpr):
    """The constants that multiply the digits of Σx, e4m3: −2, −2⁻³, −2⁻⁶, −2⁻⁹ three times, then zeros. (64, 32)."""
    k = gl.arange(0, 32, gl.SliceLayout(0, layout))
    code = gl.where(k == 0, 0xC0, gl.where(k == 1, 0xA0, gl.where(k == 2, 0x88, gl.where(k < 6, 0x81, 0))))
    rows = gl.zeros([64, 32], gl.uint8, layout)
    return (rows + code.to(gl.uint8)[None, :]).to(gl.float8e4nv, bitcast=True)


@gluon.jit
def decode(packed):
    """Bytes of two nibbles → the codes q = u − 8 of the low and the high ones, as e4m3 values q·2⁻⁹."""
    low, high = gl.inline_asm_elementwise(
        DECODE_PTX, "=r,=r,r", [packed], dtype=(gl.uint8, gl.uint8), is_pure=True, pack=4
    )
    return low, high


@gluon.jit
def load_weights(w_desc, w_tiles, full, slot, n0, block, CONSUMERS: gl.constexpr):
    for c in gl.static_range(CONSUMERS):
        tile = w_tiles.index(slot * CONSUMERS + c)
        async_load(w_desc, [n0 + 64 * c, block * 128], full.index(slot), tile)


@gluon.jit
def load_activations(
    x_desc, digit_desc, x_tiles, digit_tiles, full, slot, m0, block, plane, SUMS: gl.constexpr, DIGITS: gl.constexpr
):
    async_load(x_desc, [m0, block * 128], full.index(slot), x_tiles.index(slot * 2))
    async_load(x_desc, [m0, plane + block * 128], full.index(slot), x_tiles.index(slot * 2 + 1))
    if DIGITS:
        for s in gl.static_range(SUMS):
            tile = digit_tiles.index(slot * SUMS + s)
            async_load(digit_desc, [m0, (block * SUMS + s) * 32], full.index(slot), tile)


@gluon.jit
def load_partition(
    x_desc, w_desc, digit_desc, x_tiles, w_tiles, digit_tiles, full, empty, n0, m0, first, count, plane,
    STAGES: gl.constexpr, SUMS: gl.constexpr, DIGITS: gl.constexpr, CONSUMERS: gl.constexpr, STAGE_BYTES: gl.constexpr,
):  # fmt: skip
    ahead = gl.minimum(count, STAGES)
    for i in range(ahead):
        mbarrier.expect(full.index(i), STAGE_BYTES)
        load_weights(w_desc, w_tiles, full, i, n0, first + i, CONSUMERS)
    # Everything before this line runs beside the kernel that quantizes the activations.
    gdc_wait()
    for i in range(ahead):
        load_activations(x_desc, digit_desc, x_tiles, digit_tiles, full, i, m0, first + i, plane, SUMS, DIGITS)
    slot = 0
    phase = 0
    for i in range(STAGES, count):
        mbarrier.wait(empty.index(slot), phase)
        mbarrier.expect(full.index(slot), STAGE_BYTES)
        load_weights(w_desc, w_tiles, full, slot, n0, first + i, CONSUMERS)
        load_activations(x_desc, digit_desc, x_tiles, digit_tiles, full, slot, m0, first + i, plane, SUMS, DIGITS)
        slot += 1
        if slot == STAGES:
            slot = 0
            phase ^= 1


@gluon.jit
def operands(
    w_tiles, slot, SUM: gl.constexpr, SUMS: gl.constexpr, DIGITS: gl.constexpr, CONSUMERS: gl.constexpr,
    PART: gl.constexpr, layout: gl.constexpr,
):  # fmt: skip
    """Left operands, even and odd channels, of sum number SUM of a stage: its share of the tile's 128 bytes."""
    WIDTH: gl.constexpr = 128 // SUMS if SUMS < 4 else 32
    START: gl.constexpr = SUM * 128 // SUMS // WIDTH * WIDTH
    packed = w_tiles.index(slot * CONSUMERS + PART).slice(START, WIDTH, dim=1).load(layout)
    if SUMS == 1 or DIGITS:
        low, high = unpack(packed)
    else:
        low, high = decode(packed)
    if SUMS == 8:
        # A product has at least 32 bytes of K, two groups' worth: the other group's bytes become zeros.
        mine = (gl.arange(0, WIDTH, gl.SliceLayout(0, layout)) // 16 == SUM % 2)[None, :]
        low = gl.where(mine, low, gl.zeros_like(low))
        high = gl.where(mine, high, gl.zeros_like(high))
    return low.to(gl.float8e4nv, bitcast=True), high.to(gl.float8e4nv, bitcast=True)


@gluon.jit
def multiply(
    low, high, x_tiles, digit_tiles, slot, weights_of_digits, zero,
    SUM: gl.constexpr, SUMS: gl.constexpr, DIGITS: gl.constexpr,
):  # fmt: skip
    """Starts the products of one sum into a fresh accumulator."""
    WIDTH: gl.constexpr = 128 // SUMS if SUMS < 4 else 32
    START: gl.constexpr = SUM * 128 // SUMS // WIDTH * WIDTH
    even = x_tiles.index(2 * slot).slice(START, WIDTH, dim=1).permute((1, 0))
    odd = x_tiles.index(2 * slot + 1).slice(START, WIDTH, dim=1).permute((1, 0))
    total = warpgroup_mma(low, even, zero, use_acc=False, is_async=True)
    if DIGITS:
        digits = digit_tiles.index(slot * SUMS + SUM).permute((1, 0))
        total = warpgroup_mma(weights_of_digits, digits, total, is_async=True)
    return warpgroup_mma(high, odd, total, is_async=True)


@gluon.jit
def group_scale(row, inside_n, index, groups, sums_per_group):
    """Scale of the group that sum number `index` of a row belongs to; past the row's end, where all sums are 0, 0."""
    group = index // sums_per_group
    return gl.load(row + group, mask=inside_n & (group < groups), other=0.0).to(gl.float32)


@gluon.jit
def add_partials(accumulator, partial_ptr, counter_ptr, tile, part, inner, SPLIT: gl.constexpr, SIZE: gl.constexpr):
    """Leaves this program's sums in the workspace; the last program of the tile gets the sum of all, and True."""
    base = partial_ptr + tile.to(gl.int64) * (SPLIT * SIZE)
    gl.store(base + part * SIZE + inner, accumulator)
    thread_barrier()
    last = gl.atomic_add(counter_ptr + tile, 1, sem="acq_rel", scope="gpu") == SPLIT - 1
    if last:
        gl.store(counter_ptr + tile, 0)
        accumulator = gl.zeros_like(accumulator)
        for s in gl.static_range(SPLIT):
            accumulator += gl.load(base + s * SIZE + inner, cache_modifier=".cg")
    return accumulator, last


@gluon.jit
def consume_partition(
    x_tiles, w_tiles, digit_tiles, full, empty, x_scale_ptr, x_sum_ptr, scale_ptr, bias_ptr, y_ptr, partial_ptr,
    counter_ptr, n0, m0, first, count, tokens, out_features, groups, sums_per_group, tile,
    BLOCK_M: gl.constexpr, STAGES: gl.constexpr, SUMS: gl.constexpr, DIGITS: gl.constexpr, SPLIT: gl.constexpr,
    HAS_BIAS: gl.constexpr, CONSUMERS: gl.constexpr, PART: gl.constexpr,
):  # fmt: skip
    GROUPED: gl.constexpr = SUMS > 1
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_M, 32])
    operand: gl.constexpr = gl.DotOperandLayout(0, mma, 4)
    n = n0 + 64 * PART + gl.arange(0, 64, gl.SliceLayout(1, mma))
    m = m0 + gl.arange(0, BLOCK_M, gl.SliceLayout(0, mma))
    inside_n = n < out_features
    inside_m = m < tokens
    row = scale_ptr + n.to(gl.int64) * groups
    # What the end needs is asked for here where registers allow, so that its latency is not added to the loop's.
    EARLY: gl.constexpr = BLOCK_M <= 16
    gdc_wait()
    if EARLY:
        token_scale = gl.load(x_scale_ptr + m, mask=inside_m, other=0.0)
        if not GROUPED:
            token_sum = gl.load(x_sum_ptr + m, mask=inside_m, other=0.0)
            channel_scale = gl.load(row, mask=inside_n, other=0.0)
    accumulator = gl.zeros([64, BLOCK_M], gl.float32, mma)
    zero = gl.zeros([64, BLOCK_M], gl.float32, mma)
    weights_of_digits = digit_weights(operand)
    if GROUPED:
        # Scales are fetched two sums ahead.
        scale0 = group_scale(row, inside_n, first * SUMS, groups, sums_per_group)
        scale1 = group_scale(row, inside_n, first * SUMS + 1, groups, sums_per_group)
    slot = 0
    phase = 0
    for i in range(count):
        mbarrier.wait(full.index(slot), phase)
        low, high = operands(w_tiles, slot, 0, SUMS, DIGITS, CONSUMERS, PART, operand)
        if DIGITS:
            gl.static_assert(SUMS == 2)
            total0 = multiply(low, high, x_tiles, digit_tiles, slot, weights_of_digits, zero, 0, SUMS, DIGITS)
            low, high = operands(w_tiles, slot, 1, SUMS, DIGITS, CONSUMERS, PART, operand)
            total1 = multiply(low, high, x_tiles, digit_tiles, slot, weights_of_digits, zero, 1, SUMS, DIGITS)
            next0 = group_scale(row, inside_n, (first + i) * 2 + 2, groups, sums_per_group)
            next1 = group_scale(row, inside_n, (first + i) * 2 + 3, groups, sums_per_group)
            total0 = warpgroup_mma_wait(3, deps=[total0])
            accumulator += total0 * scale0[:, None]
            total1 = warpgroup_mma_wait(0, deps=[total1])
            mbarrier.arrive(empty.index(slot), count=1)
            accumulator += total1 * scale1[:, None]
            scale0 = next0
            scale1 = next1
        else:
            for s in gl.static_range(SUMS):
                total = multiply(low, high, x_tiles, digit_tiles, slot, weights_of_digits, zero, s, SUMS, DIGITS)
                if s + 1 < SUMS:
                    low, high = operands(w_tiles, slot, s + 1, SUMS, DIGITS, CONSUMERS, PART, operand)
                total = warpgroup_mma_wait(0, deps=[total])
                if s == SUMS - 1:
                    mbarrier.arrive(empty.index(slot), count=1)
                if GROUPED:
                    accumulator += total * scale0[:, None]
                    scale0 = scale1
                    scale1 = group_scale(row, inside_n, (first + i) * SUMS + s + 2, groups, sums_per_group)
                else:
                    accumulator += total
        slot += 1
        if slot == STAGES:
            slot = 0
            phase ^= 1
    last = True
    if SPLIT > 1:
        inner_n = gl.arange(0, 64, gl.SliceLayout(1, mma))
        inner = inner_n[:, None] * BLOCK_M + gl.arange(0, BLOCK_M, gl.SliceLayout(0, mma))[None, :]
        accumulator, last = add_partials(
            accumulator, partial_ptr, counter_ptr, tile * CONSUMERS + PART, gl.program_id(2), inner, SPLIT, 64 * BLOCK_M
        )
    if last:
        if not EARLY:
            token_scale = gl.load(x_scale_ptr + m, mask=inside_m, other=0.0)
            if not GROUPED:
                token_sum = gl.load(x_sum_ptr + m, mask=inside_m, other=0.0)
                channel_scale = gl.load(row, mask=inside_n, other=0.0)
        if not GROUPED:
            accumulator = (accumulator - token_sum[None, :]) * channel_scale.to(gl.float32)[:, None]
        # Products are in units of the subnormal step 2⁻⁹.
        accumulator *= (token_scale * 512.0)[None, :]
        if HAS_BIAS:
            accumulator += gl.load(bias_ptr + n, mask=inside_n, other=0.0).to(gl.float32)[:, None]
        store(accumulator, y_ptr, n0 + 64 * PART, m0, tokens, out_features, BLOCK_M)


@gluon.jit
def store(accumulator, y_ptr, n0, m0, tokens, out_features, BLOCK_M: gl.constexpr):
    """(64, BLOCK_M) → y: (tokens, out_features); neighbouring lanes write neighbouring outputs."""
    layout: gl.constexpr = gl.BlockedLayout([8, 1], [8, 4], [1, 4], [0, 1])
    y = gl.convert_layout(accumulator.to(y_ptr.dtype.element_ty), layout)
    n = n0 + gl.arange(0, 64, gl.SliceLayout(1, layout))
    m = m0 + gl.arange(0, BLOCK_M, gl.SliceLayout(0, layout))
    inside = (n < out_features)[:, None] & (m < tokens)[None, :]
    gl.store(y_ptr + m.to(gl.int64)[None, :] * out_features + n[:, None], y, mask=inside)


# One token runs what four do: compiled for a constant 1 and with groups, it took 2 to 15 % longer than four.
@gluon.jit(do_not_specialize=["tokens"])
def w4a8_hopper_kernel(
    x_desc, w_desc, digit_desc, x_scale_ptr, x_sum_ptr, scale_ptr, bias_ptr, y_ptr, partial_ptr, counter_ptr,
    tokens, out_features, row_bytes, groups, sums_per_group,
    BLOCK_M: gl.constexpr, CONSUMERS: gl.constexpr, SUMS: gl.constexpr, STAGES: gl.constexpr, SPLIT: gl.constexpr,
    DIGITS: gl.constexpr, HAS_BIAS: gl.constexpr,
    CONSUMER_REGISTERS: gl.constexpr, LOADER: gl.constexpr,
):  # fmt: skip
    """Grid (outputs, tokens, SPLIT). A stage is 128 bytes of each weight row, 256 channels.

    SUMS: sums in a stage that are scaled on their own; 1 for one scale per row. What u has too much is taken off at the
    end for SUMS = 1, and with DIGITS by their product, both sums of a stage in the tensor cores at a time; else nibbles
    are decoded to q.
    """
    n0 = gl.program_id(0) * (64 * CONSUMERS)
    m0 = gl.program_id(1) * BLOCK_M
    tile = gl.program_id(1) * gl.num_programs(0) + gl.program_id(0)
    blocks = gl.cdiv(row_bytes, 128)
    share = gl.cdiv(blocks, SPLIT)
    first = gl.program_id(2) * share
    count = gl.minimum(first + share, blocks) - first

    x_tiles = gl.allocate_shared_memory(gl.float8e4nv, [STAGES * 2, BLOCK_M, 128], x_desc.layout)
    w_tiles = gl.allocate_shared_memory(gl.uint8, [STAGES * CONSUMERS, 64, 128], w_desc.layout)
    digit_tiles = gl.allocate_shared_memory(
        gl.float8e4nv, [STAGES * SUMS if DIGITS else 1, BLOCK_M, 32], digit_desc.layout
    )
    STAGE_BYTES: gl.constexpr = 128 * (64 * CONSUMERS + 2 * BLOCK_M) + (SUMS * BLOCK_M * 32 if DIGITS else 0)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=CONSUMERS)
    fence_async_shared()
    # Written out, because a tuple that is given a name loses its constants and its None.
    if CONSUMERS == 1:
        gl.warp_specialize(
            [
                (
                    consume_partition,
                    (
                        x_tiles, w_tiles, digit_tiles, full, empty, x_scale_ptr, x_sum_ptr, scale_ptr, bias_ptr, y_ptr,
                        partial_ptr, counter_ptr, n0, m0, first, count, tokens, out_features, groups, sums_per_group,
                        tile, BLOCK_M, STAGES, SUMS, DIGITS, SPLIT, HAS_BIAS, CONSUMERS, 0,
                    ),
                ),
                (
                    load_partition,
                    (
                        x_desc, w_desc, digit_desc, x_tiles, w_tiles, digit_tiles, full, empty, n0, m0, first, count,
                        row_bytes, STAGES, SUMS, DIGITS, CONSUMERS, STAGE_BYTES,
                    ),
                ),
            ],
            [1],
            [LOADER],
        )  # fmt: skip
    else:
        gl.warp_specialize(
            [
                (
                    consume_partition,
                    (
                        x_tiles, w_tiles, digit_tiles, full, empty, x_scale_ptr, x_sum_ptr, scale_ptr, bias_ptr, y_ptr,
                        partial_ptr, counter_ptr, n0, m0, first, count, tokens, out_features, groups, sums_per_group,
                        tile, BLOCK_M, STAGES, SUMS, DIGITS, SPLIT, HAS_BIAS, CONSUMERS, 0,
                    ),
                ),
                (
                    consume_partition,
                    (
                        x_tiles, w_tiles, digit_tiles, full, empty, x_scale_ptr, x_sum_ptr, scale_ptr, bias_ptr, y_ptr,
                        partial_ptr, counter_ptr, n0, m0, first, count, tokens, out_features, groups, sums_per_group,
                        tile, BLOCK_M, STAGES, SUMS, DIGITS, SPLIT, HAS_BIAS, CONSUMERS, 1,
                    ),
                ),
                (
                    load_partition,
                    (
                        x_desc, w_desc, digit_desc, x_tiles, w_tiles, digit_tiles, full, empty, n0, m0, first, count,
                        row_bytes, STAGES, SUMS, DIGITS, CONSUMERS, STAGE_BYTES,
                    ),
                ),
            ],
            [4, 1],
            [CONSUMER_REGISTERS, LOADER],
        )  # fmt: skip
