"""Gluon kernel for prefill attention with FP8 probabilities on Hopper; `attention_hopper.py` launches it.

A program has one warp that loads tiles of 128 keys and values with TMA, and CONSUMERS warpgroups of 64 queries each. It
is persistent: the loader runs ahead into the next item of work while the consumers still finish the last one. Items
with the most keys come first, and every other round of programs is dealt in reverse, so that all end together.

*Overlap.* A consumer starts the logits of tile t + 1, then the product P·V of tile t, and computes the softmax of
tile t + 1 while that product runs. P stays in registers: the token order of the values is the one in which a thread
holds its logits. Three things keep the assembler from taking this apart, each seen in its output: P is carried from one
tile to the next in words of four codes, not in bytes; it becomes an operand only after the wait for the product before;
and a branch stands between the softmax and that wait. Without the branch the kernel takes 1.09 times as long.

*What bounds it*, per tile of 2 × 64 × 128 logits at head_dim 128, of 2650 cycles: the tensor cores are busy for 40 %,
exp2 for 40 %, issue slots for 41 %; the softmax of a warpgroup waits for its own results, and only one other warpgroup
is there to fill in. A turn barrier between the two (ping-pong), five stages instead of four, or releasing the tile of
keys before the softmax change less than 2 %; three warpgroups at head_dim 64 spill registers and lose 10 to 15 %; a
quarter of the exp2 by polynomials instead of MUFU loses 5 to 9 %.

*Promotion.* Each tile's P·V starts from zero and is added to the FP32 result together with the rescaling of that
result, one multiply-add. The result is kept in units of the last tile's scale, which costs nothing more.

Tiles are walked from the last to the first, so that those with a mask come first and the long run without one after.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from .attention_hopper_rows_triton import (
    LOG2_448,
    ROWS,
    TILE,
    exp2,
    pack,
    quantize_queries,
    signs,
    softmax,
    unpack,
)
from .w4a8_hopper_triton import async_load

LOG2E = gl.constexpr(1.4426950408889634)
LOWEST = gl.constexpr(-1.0e38)


@gluon.jit
def item_of(index, table_ptr, queries, keys, tiles, heads, segments, SEGMENTS: gl.constexpr, BLOCK_M: gl.constexpr):
    """Item → batch row, head, first query, and the ends of its segment; the items with the most keys come first."""
    per_tile = heads * segments
    tile = tiles - 1 - index // per_tile
    head = index % per_tile % heads
    segment = index % per_tile // heads
    if SEGMENTS:
        batch = gl.load(table_ptr + segment * 5)
        q_start = gl.load(table_ptr + segment * 5 + 1)
        q_stop = gl.load(table_ptr + segment * 5 + 2)
        k_start = gl.load(table_ptr + segment * 5 + 3)
        k_stop = gl.load(table_ptr + segment * 5 + 4)
    else:
        batch = segment
        q_start = 0
        k_start = 0
        q_stop = queries
        k_stop = keys
    return batch, head, q_start + tile * BLOCK_M, q_stop, k_start, k_stop


@gluon.jit
def key_range(
    first, q_stop, k_start, k_stop, window, CAUSAL: gl.constexpr, WINDOW: gl.constexpr, BLOCK_M: gl.constexpr
):
    """Tiles of an item: end of the last one, and how many are masked, whole, and masked again, from last to first."""
    low = first - q_stop + k_stop
    high = gl.minimum(low + BLOCK_M, k_stop) - 1
    end = k_stop
    whole_end = k_stop
    begin = k_start
    whole_begin = k_start
    if CAUSAL:
        end = gl.minimum(high + 1, k_stop)
        whole_end = gl.minimum(low + 1, k_stop)
    if WINDOW:
        begin = gl.maximum(low - window + 1, k_start)
        whole_begin = gl.maximum(high - window + 1, k_start)
        if not CAUSAL:
            end = gl.minimum(high + window, k_stop)
            whole_end = gl.minimum(low + window, k_stop)
    begin = begin // TILE
    if (first >= q_stop) | (end <= begin * TILE):
        end = begin * TILE
    end = gl.cdiv(end, TILE)
    whole_begin = gl.minimum(gl.maximum(gl.cdiv(whole_begin, TILE), begin), end)
    whole_end = gl.minimum(gl.maximum(gl.maximum(whole_end, 0) // TILE, whole_begin), end)
    return end, end - whole_end, whole_end - whole_begin, whole_begin - begin


@gluon.jit
def load_partition(
    k_desc, v_desc, k_tiles, v_tiles, k_full, v_full, empty, table_ptr,
    queries, keys, rows, tiles, heads, group, segments, items, window,
    CAUSAL: gl.constexpr, WINDOW: gl.constexpr, SEGMENTS: gl.constexpr, BLOCK_M: gl.constexpr, HEAD_DIM: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    slot = 0
    phase = 1
    programs = gl.num_programs(0)
    for turn in range(gl.cdiv(items, programs)):
        index = turn * programs + snake(turn, programs)
        if index < items:
            batch, head, first, q_stop, k_start, k_stop = item_of(
                index, table_ptr, queries, keys, tiles, heads, segments, SEGMENTS, BLOCK_M
            )
            end, masked, whole, low = key_range(first, q_stop, k_start, k_stop, window, CAUSAL, WINDOW, BLOCK_M)
            plane = batch * (heads // group) + head // group
            for t in range(masked + whole + low):
                start = (end - 1 - t) * TILE
                mbarrier.wait(empty.index(slot), phase)
                mbarrier.expect(k_full.index(slot), TILE * HEAD_DIM)
                async_load(k_desc, [plane * rows + start, 0], k_full.index(slot), k_tiles.index(slot))
                mbarrier.expect(v_full.index(slot), TILE * HEAD_DIM)
                async_load(v_desc, [plane * HEAD_DIM, start], v_full.index(slot), v_tiles.index(slot))
                slot += 1
                if slot == STAGES:
                    slot = 0
                    phase ^= 1


@gluon.jit
def snake(turn, programs):
    """Place of this program in a round: forwards in even ones, backwards in odd ones."""
    place = gl.program_id(0)
    if turn % 2 == 1:
        place = programs - 1 - place
    return place


@gluon.jit
def start_logits(q_tile, k_tiles, slot, INT8: gl.constexpr, logits: gl.constexpr):
    k = k_tiles.index(slot).permute((1, 0))
    zero = gl.zeros([ROWS, TILE], gl.int32 if INT8 else gl.float32, logits)
    return warpgroup_mma(q_tile, k, zero, use_acc=False, is_async=True)


@gluon.jit
def start_values(p8, v_tiles, slot, HEAD_DIM: gl.constexpr, result: gl.constexpr):
    v = v_tiles.index(slot).permute((1, 0))
    return warpgroup_mma(p8, v, gl.zeros([ROWS, HEAD_DIM], gl.float32, result), use_acc=False, is_async=True)


@gluon.jit
def consume_partition(
    q_ptr, key_scale_ptr, key_mean_ptr, value_scale_ptr, value_mean_ptr, sink_ptr, table_ptr, out_ptr, lse_ptr,
    q_tiles, k_tiles, v_tiles, sign_tile, k_full, v_full, empty,
    qb, qh, qt, queries, keys, rows, tiles, heads, group, segments, items, window, scaling,
    INT8: gl.constexpr, CAUSAL: gl.constexpr, WINDOW: gl.constexpr, SINKS: gl.constexpr, SEGMENTS: gl.constexpr,
    HEAD_DIM: gl.constexpr, LEVELS: gl.constexpr, MIN: gl.constexpr, STAGES: gl.constexpr, CONSUMERS: gl.constexpr,
    PART: gl.constexpr,
):  # fmt: skip
    BLOCK_M: gl.constexpr = ROWS * CONSUMERS
    logits: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 32])
    result: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HEAD_DIM, 32])
    operand: gl.constexpr = gl.DotOperandLayout(0, result, 4)
    acc_row: gl.constexpr = gl.SliceLayout(1, result)
    sums: gl.constexpr = gl.DistributedLinearLayout(
        reg_bases=[[0, 1], [8, 0]], lane_bases=[[0, 2], [0, 4], [1, 0], [2, 0], [4, 0]],
        warp_bases=[[16, 0], [32, 0]], block_bases=[], shape=[ROWS, 8],
    )  # fmt: skip
    q_tile = q_tiles.index(PART)
    slot = 0
    phase = 0
    programs = gl.num_programs(0)
    for turn in range(gl.cdiv(items, programs)):
        index = turn * programs + snake(turn, programs)
        if index < items:
            batch, head, first, q_stop, k_start, k_stop = item_of(
                index, table_ptr, queries, keys, tiles, heads, segments, SEGMENTS, BLOCK_M
            )
            end, masked, whole, low = key_range(first, q_stop, k_start, k_stop, window, CAUSAL, WINDOW, BLOCK_M)
            count = masked + whole + low
            if count > 0:
                plane = batch * (heads // group) + head // group
                q_base = q_ptr + batch.to(gl.int64) * qb + head.to(gl.int64) * qh
                mine = first + ROWS * PART
                scale, shift = quantize_queries(
                    q_base, q_tile, sign_tile, key_mean_ptr + plane * HEAD_DIM, mine, q_stop, qt,
                    LEVELS, MIN, INT8, HEAD_DIM, logits,
                )  # fmt: skip
                scale *= scaling * LOG2E
                shift *= scaling * LOG2E
                position = mine - q_stop + k_stop + gl.arange(0, ROWS, gl.SliceLayout(1, logits))
                key_scales = key_scale_ptr + plane * (rows // TILE)
                value_scales = value_scale_ptr + plane * (rows // TILE)
                m = gl.full([ROWS], LOWEST, gl.float32, gl.SliceLayout(1, logits))
                total = gl.zeros([ROWS, 8], gl.float32, sums)
                acc = gl.zeros([ROWS, HEAD_DIM], gl.float32, result)
                # The first tile, with a mask whether it needs one or not.
                key_scale = gl.load(key_scales + end - 1)
                next_scale = gl.load(key_scales + gl.maximum(end - 2, 0))
                # The sum is kept in units of the last tile's scale.
                unit = gl.load(value_scales + end - 1)
                next_unit = gl.load(value_scales + gl.maximum(end - 2, 0))
                mbarrier.wait(k_full.index(slot), phase)
                s = start_logits(q_tile, k_tiles, slot, INT8, logits)
                s = warpgroup_mma_wait(0, deps=[s])
                p, alpha, m, total = softmax(
                    s, scale * key_scale, m, total, (end - 1) * TILE, position, k_start, k_stop, window,
                    True, CAUSAL, WINDOW, INT8, logits, operand, sums,
                )  # fmt: skip
                words = pack(p)
                for run in gl.static_range(3):
                    if run == 0:
                        lo = 1
                        hi = masked
                    elif run == 1:
                        lo = gl.maximum(masked, 1)
                        hi = masked + whole
                    else:
                        lo = gl.maximum(masked + whole, 1)
                        hi = count
                    for t in range(lo, hi):
                        v_slot = slot
                        v_phase = phase
                        slot += 1
                        if slot == STAGES:
                            slot = 0
                            phase ^= 1
                        key_scale = next_scale
                        p8 = unpack(words, operand)
                        next_scale = gl.load(key_scales + gl.maximum(end - 2 - t, 0))
                        ratio = unit / next_unit
                        unit = next_unit
                        next_unit = gl.load(value_scales + gl.maximum(end - 2 - t, 0))
                        mbarrier.wait(k_full.index(slot), phase)
                        s = start_logits(q_tile, k_tiles, slot, INT8, logits)
                        mbarrier.wait(v_full.index(v_slot), v_phase)
                        part = start_values(p8, v_tiles, v_slot, HEAD_DIM, result)
                        s = warpgroup_mma_wait(1, deps=[s])
                        p, next_alpha, m, total = softmax(
                            s, scale * key_scale, m, total, (end - 1 - t) * TILE, position, k_start, k_stop, window,
                            run != 1, CAUSAL, WINDOW, INT8, logits, operand, sums,
                        )  # fmt: skip
                        # A barrier that has been passed: its branch keeps the assembler from moving the softmax behind
                        # the wait for P·V.
                        mbarrier.wait(v_full.index(v_slot), v_phase)
                        part = warpgroup_mma_wait(0, deps=[part])
                        # Not earlier: what defines the operand of a product while another runs serializes the two.
                        words = pack(p)
                        mbarrier.arrive(empty.index(v_slot), count=1)
                        acc = acc * gl.convert_layout(alpha, acc_row)[:, None] + part
                        alpha = next_alpha * ratio
                mbarrier.wait(v_full.index(slot), phase)
                part = start_values(unpack(words, operand), v_tiles, slot, HEAD_DIM, result)
                part = warpgroup_mma_wait(0, deps=[part])
                mbarrier.arrive(empty.index(slot), count=1)
                acc = acc * gl.convert_layout(alpha, acc_row)[:, None] + part
                slot += 1
                if slot == STAGES:
                    slot = 0
                    phase ^= 1
                total = gl.convert_layout(gl.sum(total, axis=1), gl.SliceLayout(1, logits))
                finish(
                    acc, m, total, shift, unit, value_mean_ptr + plane * HEAD_DIM,
                    sink_ptr, out_ptr, lse_ptr, batch, head, mine, q_stop, queries, heads, HEAD_DIM, SINKS, logits,
                    result,
                )  # fmt: skip


@gluon.jit
def finish(
    acc, m, total, shift, unit, value_mean_ptr, sink_ptr, out_ptr, lse_ptr, batch, head, first, q_stop,
    queries, heads, HEAD_DIM: gl.constexpr, SINKS: gl.constexpr, logits: gl.constexpr, result: gl.constexpr,
):  # fmt: skip
    """Divides by the sum, scales, adds the mean of the values, and writes 64 rows."""
    row: gl.constexpr = gl.SliceLayout(1, logits)
    true_m = m + shift
    denominator = total
    if SINKS:
        sink = gl.load(sink_ptr + head).to(gl.float32) * LOG2E
        denominator += exp2(sink - true_m + LOG2_448)
    blind = total == 0.0
    inverse = gl.where(blind, 0.0, 1.0 / gl.where(blind, 1.0, denominator))
    lse = gl.where(blind, float("-inf"), (true_m + gl.log2(gl.where(blind, 1.0, total)) - LOG2_448) / LOG2E)
    i = first + gl.arange(0, ROWS, row)
    gl.store(lse_ptr + (batch.to(gl.int64) * heads + head) * queries + i, lse, mask=i < q_stop)
    acc_row: gl.constexpr = gl.SliceLayout(1, result)
    channel = gl.arange(0, HEAD_DIM, gl.SliceLayout(0, result))
    share = gl.convert_layout(total * inverse, acc_row)
    acc = acc * gl.convert_layout(inverse * unit, acc_row)[:, None]
    acc += share[:, None] * gl.load(value_mean_ptr + channel)[None, :]
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // HEAD_DIM, HEAD_DIM // 8], [4, 1], [1, 0])
    out = gl.convert_layout(acc.to(out_ptr.dtype.element_ty), layout)
    i = first + gl.arange(0, ROWS, gl.SliceLayout(1, layout))
    channel = gl.arange(0, HEAD_DIM, gl.SliceLayout(0, layout))
    place = ((batch.to(gl.int64) * queries + i)[:, None] * heads + head) * HEAD_DIM + channel[None, :]
    gl.store(out_ptr + place, out, mask=(i < q_stop)[:, None])


@gluon.jit(do_not_specialize=["queries", "keys", "tiles", "heads", "group", "segments", "items", "window"])
def attention_hopper_kernel(
    k_desc, v_desc, q_ptr, key_scale_ptr, key_mean_ptr, value_scale_ptr, value_mean_ptr, sink_ptr, table_ptr, out_ptr,
    lse_ptr, qb, qh, qt, queries, keys, rows, tiles, heads, group, segments, items, window, scaling,
    INT8: gl.constexpr, CAUSAL: gl.constexpr, WINDOW: gl.constexpr, SINKS: gl.constexpr, SEGMENTS: gl.constexpr,
    HEAD_DIM: gl.constexpr, LEVELS: gl.constexpr, MIN: gl.constexpr, STAGES: gl.constexpr,
    CONSUMER_REGISTERS: gl.constexpr, LOADER: gl.constexpr,
):  # fmt: skip
    """Grid (programs,). An item is 128 queries of one head; HEAD_DIM is 64 or 128."""
    CONSUMERS: gl.constexpr = 2
    BLOCK_M: gl.constexpr = ROWS * CONSUMERS
    CODE: gl.constexpr = k_desc.dtype
    q_layout: gl.constexpr = gl.NVMMASharedLayout(HEAD_DIM, 8, 2)
    q_tiles = gl.allocate_shared_memory(CODE, [CONSUMERS, ROWS, HEAD_DIM], q_layout)
    k_tiles = gl.allocate_shared_memory(CODE, [STAGES, TILE, HEAD_DIM], k_desc.layout)
    v_tiles = gl.allocate_shared_memory(gl.float8e4nv, [STAGES, HEAD_DIM, TILE], v_desc.layout)
    sign_tile = gl.allocate_shared_memory(q_ptr.dtype.element_ty, [ROWS, ROWS], gl.NVMMASharedLayout(128, 16, 2))
    sign_tile.store(signs(gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])).to(q_ptr.dtype.element_ty))
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(k_full.index(i), count=1)
        mbarrier.init(v_full.index(i), count=1)
        mbarrier.init(empty.index(i), count=CONSUMERS)
    fence_async_shared()
    # Written out, because a tuple that is given a name loses its constants and its None.
    gl.warp_specialize(
        [
            (
                consume_partition,
                (
                    q_ptr, key_scale_ptr, key_mean_ptr, value_scale_ptr, value_mean_ptr, sink_ptr, table_ptr, out_ptr,
                    lse_ptr, q_tiles, k_tiles, v_tiles, sign_tile, k_full, v_full, empty, qb, qh, qt, queries, keys,
                    rows, tiles, heads, group, segments, items, window, scaling, INT8, CAUSAL, WINDOW, SINKS, SEGMENTS,
                    HEAD_DIM, LEVELS, MIN, STAGES, CONSUMERS, 0,
                ),
            ),
            (
                consume_partition,
                (
                    q_ptr, key_scale_ptr, key_mean_ptr, value_scale_ptr, value_mean_ptr, sink_ptr, table_ptr, out_ptr,
                    lse_ptr, q_tiles, k_tiles, v_tiles, sign_tile, k_full, v_full, empty, qb, qh, qt, queries, keys,
                    rows, tiles, heads, group, segments, items, window, scaling, INT8, CAUSAL, WINDOW, SINKS, SEGMENTS,
                    HEAD_DIM, LEVELS, MIN, STAGES, CONSUMERS, 1,
                ),
            ),
            (
                load_partition,
                (
                    k_desc, v_desc, k_tiles, v_tiles, k_full, v_full, empty, table_ptr, queries, keys, rows,
                    tiles, heads, group, segments, items, window, CAUSAL, WINDOW, SEGMENTS, BLOCK_M, HEAD_DIM, STAGES,
                ),
            ),
        ],
        [4, 1],
        [CONSUMER_REGISTERS, LOADER],
    )  # fmt: skip
