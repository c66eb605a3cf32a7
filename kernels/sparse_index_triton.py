"""Triton kernels for `sparse_index.py`: lists are counted, and then filled into storage of exactly that size.

One program per row looks at its tiles `CHUNK` at a time: whether it wants a tile is one byte of a map, or one byte per
distance of tiles for lines. Nothing is written beyond what was counted, so a row without entries, or with all of them,
needs no special case.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import sparse_index
from .sparse_index import Extent, Lines, SparseIndex

BLOCK = tl.constexpr(sparse_index.TILE)
CHUNK = 256


@triton.jit
def wants(
    hits_ptr, dense_ptr, map_ptr, plane, row, m, t, key_tiles, query_tiles, valid, LINES: tl.constexpr
):  # fmt: skip
    """Whether row `m` asks for tiles `t`."""
    if LINES:
        width = query_tiles + key_tiles - 1
        found = tl.load(hits_ptr + plane.to(tl.int64) * width + (m - t + key_tiles - 1), mask=valid, other=0) != 0
        found = valid & (found | (m >= tl.load(dense_ptr + plane)))
    else:
        found = tl.load(map_ptr + row.to(tl.int64) * key_tiles + t, mask=valid, other=0) != 0
    return found


@triton.jit(do_not_specialize=["heads", "query_tiles", "key_tiles", "width", "keys"])
def rows_kernel(
    hits_ptr, dense_ptr, map_ptr, columns_in_ptr, table_ptr, whole_ptr, tile_ptr, column_ptr, tiles_ptr, columns_ptr,
    heads, query_tiles, key_tiles, width, keys,
    LINES: tl.constexpr, COLUMNS: tl.constexpr, CAUSAL: tl.constexpr, FILL: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Grid (rows,). Counting, `whole_ptr`, `tile_ptr` and `column_ptr` take how many; filling, they hold where each
    list's entirely visible tiles end, and where tiles and columns begin.
    """
    row = tl.program_id(0)
    m = row % query_tiles
    plane = row // query_tiles
    batch = plane // heads
    q_start = tl.load(table_ptr + batch * 5 + 1)
    q_stop = tl.load(table_ptr + batch * 5 + 2)
    k_start = tl.load(table_ptr + batch * 5 + 3)
    k_stop = tl.load(table_ptr + batch * 5 + 4)
    first = q_start + m * BLOCK
    exists = first < q_stop
    last = tl.minimum(first + BLOCK, q_stop) - 1 - q_stop + k_stop
    first = first - q_stop + k_stop
    whole_count = 0
    edge_count = 0
    column_count = 0
    if FILL:
        whole_count = tl.load(tile_ptr + row)
        edge_count = tl.load(whole_ptr + row)
        column_count = tl.load(column_ptr + row)
    if exists:
        limit = k_stop
        if CAUSAL:
            limit = tl.minimum(limit, last + 1)
        for chunk in range(k_start // BLOCK, tl.cdiv(limit, BLOCK), CHUNK):
            t = chunk + tl.arange(0, CHUNK)
            start = t * BLOCK
            seen = start < limit
            entire = (start >= k_start) & (start + BLOCK <= k_stop)
            if CAUSAL:
                entire = entire & (start + BLOCK - 1 <= first)
            seen = wants(
                hits_ptr, dense_ptr, map_ptr, plane, row, m, t, key_tiles, query_tiles, seen, LINES
            )  # fmt: skip
            whole = (seen & entire).to(tl.int32)
            edge = (seen & (entire == 0)).to(tl.int32)
            if FILL:
                tl.store(tiles_ptr + whole_count + tl.cumsum(whole, 0) - 1, t, mask=whole != 0)
                tl.store(tiles_ptr + edge_count + tl.cumsum(edge, 0) - 1, t, mask=edge != 0)
            whole_count += tl.sum(whole, 0)
            edge_count += tl.sum(edge, 0)
        if COLUMNS:
            for chunk in range(0, width, CHUNK):
                place = chunk + tl.arange(0, CHUNK)
                column = tl.load(
                    columns_in_ptr + plane.to(tl.int64) * width + place, mask=place < width, other=2147483647
                )
                seen = (column < limit) & (column >= k_start) & (column < keys)
                t = tl.where(seen, column, 0) // BLOCK
                taken = wants(
                    hits_ptr, dense_ptr, map_ptr, plane, row, m, t, key_tiles, query_tiles, seen, LINES
                )  # fmt: skip
                kept = (seen & (taken == 0)).to(tl.int32)
                if FILL:
                    tl.store(columns_ptr + column_count + tl.cumsum(kept, 0) - 1, column, mask=kept != 0)
                column_count += tl.sum(kept, 0)
    if not FILL:
        tl.store(whole_ptr + row, whole_count)
        tl.store(tile_ptr + row, whole_count + edge_count)
        tl.store(column_ptr + row, column_count)


def launch_rows(
    chosen: Lines | None,
    wanted: Tensor | None,
    extent: Extent,
    numbers: Tensor,
    lists: tuple[Tensor, Tensor] | None,
    *,
    causal: bool,
) -> None:
    """Counts into `numbers`, (3, rows): entirely visible tiles, tiles, columns; or, with `lists`, fills tiles and
    columns from the places in `numbers`.
    """
    source = chosen.hits if chosen is not None else wanted
    assert source is not None
    heads = source.shape[1]
    if chosen is None:
        inputs, width = (None, None, source.contiguous().view(torch.uint8), None), 0
    else:
        columns, hits = chosen.columns.contiguous(), source.contiguous().view(torch.uint8)
        inputs, width = (hits, chosen.dense_from.contiguous(), None, columns), columns.shape[2]
    tiles, listed = (None, None) if lists is None else lists
    rows_kernel[(numbers.shape[1],)](
        *inputs, extent.table.contiguous(), *numbers.unbind(0), tiles, listed,
        heads, extent.query_tiles, extent.key_tiles, width, extent.keys,
        LINES=chosen is not None, COLUMNS=width > 0, CAUSAL=causal, FILL=lists is not None, CHUNK=CHUNK, num_warps=4,
    )  # fmt: skip


def build_index(chosen: Lines | None, wanted: Tensor | None, extent: Extent, *, causal: bool) -> SparseIndex:
    """The index of lines, or of a tile map (batch, heads, query tiles, key tiles) bool, without checks. Waits for the
    device once, for the sizes.
    """
    source = chosen.hits if chosen is not None else wanted
    assert source is not None
    batch, heads = source.shape[:2]
    counts = torch.empty((3, batch * heads * extent.query_tiles), dtype=torch.int32, device=source.device)
    launch_rows(chosen, wanted, extent, counts, None, causal=causal)
    pointers = torch.nn.functional.pad(counts[1:].cumsum(dim=1), (1, 0)).int()
    whole_stop = pointers[0, :-1] + counts[0]
    sizes = pointers[:, -1].tolist()
    tiles, columns = (torch.empty((size,), dtype=torch.int32, device=source.device) for size in sizes)
    places = torch.stack((whole_stop, pointers[0, :-1], pointers[1, :-1]))
    launch_rows(chosen, wanted, extent, places, (tiles, columns), causal=causal)
    work = counts[1] + (counts[2] + sparse_index.TILE - 1) // sparse_index.TILE
    shape = (batch, heads, extent.query_tiles)
    order = sparse_index.turns(work, shape)
    return SparseIndex(pointers[0], whole_stop, tiles, pointers[1], columns, order, shape)
