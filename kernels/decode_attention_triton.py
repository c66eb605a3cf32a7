"""Triton kernels of `decode_attention.py`: queries prepared, pages and dense tokens read once per KV head, parts
merged.

A program of `decode_kernel` holds all queries of one KV head and a run of pages (`decode_codes_triton.py`); the last
run is shorter, since its program takes the dense tokens as well (`decode_dense_triton.py`).

Where tokens were evicted, more programs of the same launch read what the heads have kept: pages that lie elsewhere, as
many of each head as it has, in runs of a list that is made once (`kv_kept.Runs`). Of them every query sees every token.
Their parts come behind those of all KV heads.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_wait

from .attention_quant import padded_width
from .decode_codes_triton import code_part
from .decode_dense_triton import dense_part
from .decode_tiles_triton import LOG2E, PAGE_
from .kv_codes import rotation_block

if TYPE_CHECKING:
    from .decode_attention import CompressedKV, Reading

MAX_SPLITS = 128
LENGTHS = [
    *("tokens", "coded", "first", "splits", "window", "ring_length", "heads", "sink_tokens", "kept_pages", "runs")
]


@dataclass(frozen=True)
class LaunchConfig:
    """splits: runs of pages per KV head. kept: programs for pages that heads have kept of evicted tokens. dense_pages:
    pages that take as long as the dense tokens.
    """

    splits: int
    kept: int
    num_warps: int
    num_stages: int
    dense_pages: int


def launch_config(kind: str, planes: int, multiprocessors: int, *, kept: bool = False) -> LaunchConfig:
    """planes: KV heads of all rows. One wave of programs: of INT4 and bf16 pages of 128 channels three fit a
    multiprocessor of Hopper, which their registers bound, of FP8 ones two, which the buffers of three stages bound.

    How a cache is shared out does not depend on its length: with the lengths on the device nothing else is known.

    kept: tokens were evicted. What comes behind them is then less than what was kept, until it is long: half as many
    runs, of which those without a page end at once. One program of a wave for each KV head is left to the dense tokens.

    Microseconds on an H200, 8 rows of 32,768 tokens, 32 heads over 8 of 128: INT4 with 2, 3, 4 and 5 stages 89, 77, 80
    and 81; FP8 134, with three programs and two stages as well; bf16 244, with four programs and two stages 304.
    """
    wave = (2 if kind == "fp8" else 3) * multiprocessors
    splits = max(1, min((wave // 2 if kept else wave) // planes, MAX_SPLITS))
    runs = max(wave - planes, wave // 2, 1) if kept else 0
    return LaunchConfig(splits, runs, 4, 3, {"int4": 6, "fp8": 3, "bf16": 2}[kind])


@triton.jit
def run_of(run_ptr, number, runs):
    """Row and head of a run of kept pages, its first page and that after its last; no page beyond the last run."""
    there = (number >= 0) & (number < runs)
    run = run_ptr + 3 * number
    plane = tl.load(run, mask=there, other=0).to(tl.int64)
    return plane, tl.load(run + 1, mask=there, other=0), tl.load(run + 2, mask=there, other=0)


@triton.jit(do_not_specialize=LENGTHS)
def decode_kernel(
    q_ptr, codes_ptr, scale_ptr, table_ptr, length_ptr, ring_key, ring_value, sink_key, sink_value, sink_start_ptr,
    start_ptr, kept_ptr, kept_table_ptr, kept_count_ptr, run_ptr, part_ptr, state_ptr,
    qb, qh, qt, rkb, rkh, rkt, rvb, rvh, rvt, skb, skh, skt, svb, svh, svt,
    tokens, coded, first, splits, window, ring_length, heads, sink_tokens, kept_pages, runs, scaling, softcap,
    RECORD: tl.constexpr, QUERIES: tl.constexpr, GROUP: tl.constexpr, KIND: tl.constexpr, HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr, KEY_PARAMETERS: tl.constexpr, VALUES: tl.constexpr, VALUE_PARAMETERS: tl.constexpr,
    WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, STARTS: tl.constexpr, SINKS: tl.constexpr, LENGTHS_: tl.constexpr,
    KEPT: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, STAGES: tl.constexpr,
    DENSE: tl.constexpr, PDL: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """Grid (batch · KV heads, splits). part: (planes, parts, ROWS, VALUE_DIM), state: (…, 2, ROWS): sums of weighted
    values, and the maximum and the sum of weights that they belong to, FP32; with codes, of dense tokens as one part
    more than splits. DENSE: pages that the last split takes fewer, since it takes the dense tokens. KEPT: programs
    from splits on have runs of kept pages, one each, in the order of the list; kept is where their records begin.
    """
    plane = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    CODES: tl.constexpr = KIND != "bf16"
    part = plane * (splits + (1 if CODES else 0)) + split
    last = split == splits - 1
    if KEPT:
        number = (split - splits) * tl.num_programs(0) + tl.program_id(0)
        kept_plane, kept_begin, kept_end = run_of(run_ptr, number, runs)
        is_kept = split >= splits
        plane = tl.where(is_kept, kept_plane, plane)
        part = tl.where(is_kept, tl.num_programs(0) * (splits + (1 if CODES else 0)) + number, part)
    kv_heads = heads // GROUP
    batch, kv_head = plane // kv_heads, plane % kv_heads
    if LENGTHS_:
        tokens, coded = tl.load(length_ptr), tl.load(length_ptr + 1)
        if WINDOW:
            first = tl.maximum(tokens - QUERIES - window + 1, 0)
        if KEPT:
            first = tl.load(length_ptr + 3)
    lowest = first
    if STARTS:
        lowest = tl.maximum(lowest, tl.load(start_ptr + batch).to(tl.int32))
    sink_start = tl.load(sink_start_ptr + batch).to(tl.int32)
    first_page = lowest // PAGE_
    # Where the first column is not coded yet, its page may be absent.
    pages = tl.where(lowest < coded, tl.cdiv(coded, PAGE_) - first_page, 0)
    run = tl.cdiv(pages + DENSE, splits)
    page_begin = first_page + split * run
    page_end = tl.minimum(page_begin + run, first_page + pages)
    offset, evicted = plane * RECORD, 0
    if KEPT:
        evicted = first
        count = tl.load(kept_count_ptr + plane).to(tl.int32)
        # The same loops as over pages of columns: no window, no sinks among them, all before the queries.
        tokens, coded = tl.where(is_kept, count + QUERIES, tokens), tl.where(is_kept, count, coded)
        lowest, sink_start = tl.where(is_kept, 0, lowest), tl.where(is_kept, -sink_tokens, sink_start)
        page_begin = tl.where(is_kept, kept_begin, page_begin)
        page_end = tl.where(is_kept, kept_end, page_end)
        table_ptr = tl.where(is_kept, kept_table_ptr + plane * kept_pages, table_ptr)
        offset = tl.where(is_kept, kept_ptr.to(tl.int64), offset)
    if last or not CODES:
        dense_part(
            q_ptr + batch * qb + kv_head * GROUP * qh, table_ptr, ring_key + batch * rkb + kv_head * rkh,
            ring_value + batch * rvb + kv_head * rvh, sink_key + batch * skb + kv_head * skh,
            sink_value + batch * svb + kv_head * svh, part_ptr, state_ptr, qh, qt, rkt, rvt, skt, svt, tokens, coded,
            lowest, evicted, page_begin, page_end, last, part + (1 if CODES else 0), offset, sink_start, window,
            ring_length, sink_tokens, scaling * LOG2E, softcap, QUERIES, GROUP, KIND, HEAD_DIM, VALUE_DIM, VALUES,
            WINDOW, SOFTCAP, SINKS, ROWS, WIDTH, VALUE_WIDTH, STAGES, INTERPRET,
        )  # fmt: skip
    if CODES:
        if PDL:
            gdc_wait()
        code_part(
            codes_ptr + plane * 2 * ROWS * HEAD_DIM, scale_ptr + plane * 3 * ROWS, table_ptr, part_ptr, state_ptr,
            tokens, coded, lowest, page_begin, page_end, part, offset, sink_start, window, sink_tokens, softcap,
            QUERIES, GROUP, KIND, HEAD_DIM, VALUE_DIM, KEY_PARAMETERS, VALUES, VALUE_PARAMETERS, WINDOW, SOFTCAP,
            SINKS, ROWS, WIDTH, VALUE_WIDTH, STAGES, PDL, INTERPRET,
        )  # fmt: skip


def decode_triton(
    query: Tensor,
    kv: CompressedKV,
    call: Reading,
    sinks: Tensor | None,
    key_starts: Tensor | None,
    *,
    interpret: bool = False,
) -> tuple[Tensor, Tensor]:
    """Launch without checks: out (batch, queries, heads, value_head_dim), and lse."""
    assert kv.ring is not None
    from .decode_ends_triton import merge_kernel, prepare_kernel

    layout, key_map = kv.pages.layout, kv.pages.key_map
    query = query if query.stride(-1) == 1 else query.contiguous()
    batch, heads, queries, head_dim = query.shape
    kv_heads, value_dim = kv.sink_key.shape[1], kv.sink_value.shape[3]
    planes, group = batch * kv_heads, heads // kv_heads
    rows = max(8, triton.next_power_of_2(queries * group))
    width, value_width = padded_width(head_dim), padded_width(value_dim)
    device = None if interpret else torch.cuda.get_device_properties(query.device)
    multiprocessors = 1 if device is None else device.multi_processor_count
    pdl = device is not None and torch.version.hip is None and device.major >= 9
    config = launch_config(layout.kind, planes, multiprocessors, kept=kv.kept is not None)
    parts = config.splits + (layout.kind != "bf16")
    runs = None if kv.kept is None else kv.kept.runs(config.kept)
    more = 0 if runs is None else -(-len(runs.entries) // planes)

    # Each kernel starts while the one before it ends, and waits for what that one writes.
    early = {"launch_pdl": True} if pdl else {}

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=query.device)

    codes, scale = empty(planes, 2 * rows, head_dim, dtype=torch.float8_e4m3fn), empty(planes, 3, rows)
    part, state = empty(planes * (parts + more), rows, value_dim), empty(planes * (parts + more), 2, rows)
    out, lse = empty(batch, queries, heads, value_dim, dtype=query.dtype), empty(batch, heads, queries)
    mean = None if key_map is None else key_map.mean
    factors = None if key_map is None else key_map.factors
    rotate = rotation_block(head_dim) if key_map is not None and key_map.rotated else 0
    prepare_kernel[(planes,)](
        query, mean, factors, codes, scale, *query.stride()[:3], queries, heads, group, call.scaling, head_dim,
        MEAN=mean is not None, FACTORS=factors is not None, ROTATE=rotate, ROWS=rows, WIDTH=width, PDL=pdl,
        INTERPRET=interpret, num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip
    offsets = layout.offsets
    kept = (None,) * 4 if runs is None else (kv.kept.records, kv.kept.table, kv.kept.lengths, runs.entries)
    decode_kernel[(planes, config.splits + more)](
        query, codes, scale, kv.pages.table(), kv.lengths, *kv.ring, kv.sink_key, kv.sink_value, kv.sink_starts,
        key_starts, *kept, part, state, *query.stride()[:3], *kv.ring[0].stride()[:3], *kv.ring[1].stride()[:3],
        *kv.sink_key.stride()[:3], *kv.sink_value.stride()[:3], kv.tokens, kv.coded, kv.first,
        config.splits, call.window or 0, kv.ring[0].shape[2], heads, kv.sink_key.shape[2],
        0 if runs is None else kv.kept.pages, 0 if runs is None else len(runs.entries), call.scaling,
        call.softcap or 0.0, RECORD=layout.record_bytes, QUERIES=queries, GROUP=group, KIND=layout.kind,
        HEAD_DIM=head_dim, VALUE_DIM=value_dim, KEY_PARAMETERS=offsets[1], VALUES=offsets[2],
        VALUE_PARAMETERS=offsets[3], WINDOW=call.window is not None, SOFTCAP=call.softcap is not None,
        STARTS=key_starts is not None, SINKS=kv.sink_key.shape[2] > 0, LENGTHS_=kv.lengths is not None,
        KEPT=runs is not None, ROWS=rows, WIDTH=width, VALUE_WIDTH=value_width, STAGES=config.num_stages,
        DENSE=config.dense_pages, PDL=pdl, INTERPRET=interpret, num_warps=config.num_warps,
        num_stages=config.num_stages, enable_fp_fusion=True, **early,
    )  # fmt: skip
    merge_kernel[(batch * heads * queries,)](
        part, state, sinks, None if runs is None else runs.ends, out, lse, parts, planes, heads, queries, group,
        value_dim, SINK_LOGITS=sinks is not None, KEPT=runs is not None, ROWS=rows,
        PARTS=min(16, triton.next_power_of_2(parts + more)), VALUE_WIDTH=value_width, PDL=pdl, num_warps=4,
        enable_fp_fusion=True, **early,
    )  # fmt: skip
    return out, lse
