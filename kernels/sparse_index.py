"""Which keys sparse prefill attention visits: for every batch row, head and tile of queries, tiles of keys and columns.

Queries and keys are cut into tiles of `TILE`. *Row* r = (b · heads + h) · query_tiles + m owns two lists:

    tiles     numbers t of key tiles [64t, 64t + 64), first those that all its queries see entirely, then the others
    columns   single keys, in no listed tile

A query sees a key that its row lists and that the mask of the call allows (`segments.py`; causality by the keys' own
positions): lists never make a key visible. Query tiles count from the first query of the batch row, key tiles from key
0, so that a tile of quantized keys has one scale. Rows of one KV head may share an index (fewer heads in it than in the
queries).

Two things turn into an index. A *tile map* says it outright. *Lines* are what most patterns are made of:

    slashes   distances d: a query at position p and the keys at p − d; widened to the tiles that they touch, so a
              tile (m, t) depends on m − t alone
    columns   keys that every query sees
    rows      from query tile `dense_from` on everything is listed, the end of a prompt or a whole dense head

Tiles start at multiples of 64 here, where MInference's start anywhere: a lone slash costs two tiles instead of one, and
in return rows are compacted from one bit per tile, and quantized keys and values are read as they lie.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .activations import launching_on, triton_refusal
from .segments import Segments, whole

TILE = 64
"""Queries and keys of a tile: what one program of the attention kernels holds and multiplies at once."""
NOTHING = 2**30
"""Fills lists of columns up; no such key exists."""


@dataclass(frozen=True)
class SparseIndex:
    """Lists of all rows, int32, end to end.

    tile_ptr, column_ptr: (rows + 1,) where each row's list begins. whole_stop: (rows,) where its entirely visible tiles
    end. tiles, columns: entries, columns ascending. order: (rows,) in which rows are taken up: head after head, so that
    those that run at once read the same keys, which the L2 cache then holds; heads, and rows of a head, by descending
    work. extent: batch, heads of the index, query tiles.
    """

    tile_ptr: Tensor
    whole_stop: Tensor
    tiles: Tensor
    column_ptr: Tensor
    columns: Tensor
    order: Tensor
    extent: tuple[int, int, int]

    def work(self) -> Tensor:
        """(batch, heads, query tiles) float32: tiles that a row multiplies, 64 columns counting as one."""
        tiles, columns = (pointer.diff().float() for pointer in (self.tile_ptr, self.column_ptr))
        return (tiles + (columns / TILE).ceil()).view(self.extent)

    def nbytes(self) -> int:
        """Bytes of storage."""
        tensors = (self.tile_ptr, self.whole_stop, self.tiles, self.column_ptr, self.columns, self.order)
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


@dataclass(frozen=True)
class Lines:
    """What a batch of heads visits, as lines.

    hits: (batch, heads, query tiles + key tiles − 1) bool, entry m − t + key tiles − 1 for tile (m, t). columns:
    (batch, heads, any) int32 ascending key numbers, filled up with `NOTHING`. dense_from: (batch, heads) int32 query
    tile.
    """

    hits: Tensor
    columns: Tensor
    dense_from: Tensor


@dataclass(frozen=True)
class Extent:
    """Where the queries and keys of a call stand. table: (batch, 5) int32 as in `Segments`, one segment per batch row.
    queries, keys: of the tensors.
    """

    table: Tensor
    queries: int
    keys: int

    @classmethod
    def of(cls, batch: int, queries: int, keys: int, segments: Segments | None, device: torch.device) -> Extent:
        """ValueError for packed sequences: rows would have several beginnings."""
        places = whole(batch, queries, keys, device) if segments is None else segments
        if len(places.table) != batch:
            raise ValueError(
                f"{len(places.table)} segments in a batch of {batch}: packed sequences have no sparse index"
            )
        return cls(places.table, queries, keys)

    @property
    def query_tiles(self) -> int:
        """Tiles of queries of the longest row."""
        return -(-self.queries // TILE)

    @property
    def key_tiles(self) -> int:
        """Tiles of all keys."""
        return -(-self.keys // TILE)

    def positions(self) -> tuple[Tensor, Tensor, Tensor]:
        """first and last position (a column of the keys) of the queries of each tile, and whether it has any: (batch,
        query tiles).
        """
        _, q_start, q_stop, _, k_stop = self.table.long()[:, :, None].unbind(dim=1)
        first = q_start + TILE * torch.arange(self.query_tiles, device=self.table.device)
        last = torch.minimum(first + TILE, q_stop) - 1
        shift = k_stop - q_stop
        return first + shift, last + shift, first < q_stop


def lines(slashes: Tensor, columns: Tensor, extent: Extent, *, heads: int, dense_rows: Tensor | None = None) -> Lines:
    """`Lines` from distances and keys.

    Args:
        slashes: (batch, heads, any) integers, distances of query and key; may repeat, `NOTHING` fills up.
        columns: (batch, heads, any) integers, key numbers counted from the first key of each batch row; likewise.
        extent: of the call.
        heads: of the index.
        dense_rows: (batch, heads) or (heads,) integers: so many of the last queries see everything; whole tiles.
    """
    batch, device = len(extent.table), extent.table.device
    _, q_start, q_stop, k_start, k_stop = extent.table.long()[:, :, None, None].unbind(dim=1)
    shift = k_stop - q_stop + q_start
    width = extent.query_tiles + extent.key_tiles - 1
    hits = torch.zeros((batch, heads, width), dtype=torch.bool, device=device)
    distances = slashes.long()
    # Tile (m, t) holds the distances 64(m − t) + shift ± 63: a distance lies in two such spans, or in the middle of
    # one.
    for rounding in (torch.floor, torch.ceil):
        place = rounding((distances - shift).double() / TILE).long() + extent.key_tiles - 1
        _mark(hits, place, distances < NOTHING)
    chosen = torch.where(columns < NOTHING, columns.long() + k_start, NOTHING)
    chosen = torch.where(chosen < k_stop, chosen, NOTHING).sort(dim=-1).values
    repeated = torch.zeros_like(chosen, dtype=torch.bool)
    repeated[..., 1:] = chosen[..., 1:] == chosen[..., :-1]
    chosen = chosen.masked_fill(repeated, NOTHING).sort(dim=-1).values
    count = (q_stop - q_start)[..., 0]
    if dense_rows is None:
        dense_from = torch.full((batch, heads), extent.query_tiles, device=device)
    else:
        from_row = (count - dense_rows.to(device).long()).clamp_min(0) // TILE
        dense_from = torch.where(dense_rows.to(device) > 0, from_row, extent.query_tiles)
    return Lines(hits, chosen.int(), dense_from.expand(batch, heads).int().contiguous())


def _mark(hits: Tensor, places: Tensor, valid: Tensor) -> None:
    """Sets `hits` at `places`, which may lie outside."""
    valid = valid & (places >= 0) & (places < hits.shape[-1])
    spare = torch.zeros((*hits.shape[:-1], hits.shape[-1] + 1), dtype=torch.bool, device=hits.device)
    spare.scatter_(-1, torch.where(valid, places, hits.shape[-1]), True)
    hits |= spare[..., :-1]


def tile_map(chosen: Lines, extent: Extent) -> Tensor:
    """(batch, heads, query tiles, key tiles) bool: the tiles that lines ask for, whether visible or not."""
    m = torch.arange(extent.query_tiles, device=chosen.hits.device)
    t = torch.arange(extent.key_tiles, device=chosen.hits.device)
    found = chosen.hits[:, :, m[:, None] - t[None, :] + extent.key_tiles - 1]
    return found | (m >= chosen.dense_from[..., None])[..., None]


def visible_tiles(extent: Extent, *, causal: bool) -> tuple[Tensor, Tensor]:
    """(batch, 1, query tiles, key tiles) bool, twice: tiles of which a query sees a key, and those entirely visible."""
    first, last, inside = (item[:, None, :, None] for item in extent.positions())
    k_start, k_stop = (extent.table.long()[:, column, None, None, None] for column in (3, 4))
    start = TILE * torch.arange(extent.key_tiles, device=extent.table.device)
    seen = inside & (start < k_stop) & (start + TILE > k_start)
    entire = inside & (start >= k_start) & (start + TILE <= k_stop)
    if causal:
        seen, entire = seen & (torch.maximum(start, k_start) <= last), entire & (start + TILE - 1 <= first)
    return seen, entire


def index_from_map(wanted: Tensor, extent: Extent, *, causal: bool, columns: Tensor | None = None) -> SparseIndex:
    """The index of a tile map, (batch, heads, query tiles, key tiles) bool, and columns, see `Lines`. Any device.

    Holds the map and, for every row, every column: memory is that of (queries · keys) / 4096 bits and bytes. Waits for
    the device.
    """
    batch, heads = wanted.shape[:2]
    seen, entire = visible_tiles(extent, causal=causal)
    wanted = wanted & seen
    places = torch.cat((wanted & entire, wanted & ~entire), dim=-1).flatten(0, 2)
    place = places.nonzero(as_tuple=True)[1]
    tile_ptr = _pointer(places.sum(dim=1))
    whole_stop = tile_ptr[:-1] + places[:, : extent.key_tiles].sum(dim=1).int()
    if columns is None:
        columns = torch.zeros((batch, heads, 0), dtype=torch.int32, device=wanted.device)
    _, last, inside = (item[:, None, :, None] for item in extent.positions())
    keys = columns.long()[:, :, None]
    kept = inside & (keys < extent.table.long()[:, 4, None, None, None])
    if causal:
        kept = kept & (keys <= last)
    owner = (keys.clamp_max(extent.keys - 1) // TILE).expand(-1, -1, wanted.shape[2], -1)
    kept = (kept & ~wanted.gather(3, owner)).flatten(0, 2)
    single_row, single = kept.nonzero(as_tuple=True)
    listed = columns.flatten(0, 1)[single_row // extent.query_tiles, single]
    column_ptr = _pointer(kept.sum(dim=1))
    work = tile_ptr.diff() + (column_ptr.diff() + TILE - 1) // TILE
    shape = (batch, heads, extent.query_tiles)
    tiles = (place % extent.key_tiles).int()
    return SparseIndex(tile_ptr, whole_stop, tiles, column_ptr, listed.int(), turns(work, shape), shape)


def turns(work: Tensor, extent: tuple[int, int, int]) -> Tensor:
    """`SparseIndex.order`. work: (rows,) tiles that each multiplies. extent: as of an index.

    Of 131,072 tokens in 32/8 heads of 128 (bf16, H200), a quarter of the tiles at random takes 80 ms so and 98 ms with
    all rows by work alone, all tiles 318 and 356. Short lists gain nothing: 30 keys and 800 distances of a head, other
    ones in each, take 9.3 ms and 7.8.
    """
    heads = work.view(extent[0] * extent[1], extent[2])
    within = heads.argsort(dim=1, descending=True, stable=True)
    begin = extent[2] * torch.arange(len(heads), device=work.device)
    return (begin[:, None] + within)[heads.sum(dim=1).argsort(descending=True, stable=True)].flatten().int()


def _pointer(counts: Tensor) -> Tensor:
    return torch.nn.functional.pad(counts.cumsum(dim=0), (1, 0)).int()


def index_from_lines(chosen: Lines, extent: Extent, *, causal: bool) -> SparseIndex:
    """The index of lines: on a GPU by a kernel, elsewhere in torch. Waits for the device."""
    if triton_refusal(chosen.hits.device, (8, 0)) is None:
        from .sparse_index_triton import build_index

        with launching_on(chosen.hits):
            return build_index(chosen, None, extent, causal=causal)
    return index_from_map(tile_map(chosen, extent), extent, causal=causal, columns=chosen.columns)


def index_from_tiles(wanted: Tensor, extent: Extent, *, causal: bool) -> SparseIndex:
    """The index of a tile map, (batch, heads, query tiles, key tiles) bool: on a GPU by a kernel. Waits for the
    device.
    """
    if triton_refusal(wanted.device, (8, 0)) is None:
        from .sparse_index_triton import build_index

        with launching_on(wanted):
            return build_index(None, wanted, extent, causal=causal)
    return index_from_map(wanted, extent, causal=causal)


def listed_keys(index: SparseIndex, extent: Extent) -> Tensor:
    """(batch, heads, query tiles, keys) bool: the keys that each row lists. For small calls."""
    rows, device = len(index.whole_stop), index.tiles.device
    found = torch.zeros((rows, extent.key_tiles * TILE + 1), dtype=torch.bool, device=device)
    row = torch.arange(rows, device=device)
    owner = row.repeat_interleave(index.tile_ptr.diff().long())
    tiles = found[:, :-1].view(rows, extent.key_tiles, TILE)
    tiles[owner, index.tiles.long()] = True
    found[row.repeat_interleave(index.column_ptr.diff().long()), index.columns.long()] = True
    return found[:, : extent.keys].view(*index.extent, extent.keys)


def check_index(index: SparseIndex, extent: Extent, *, causal: bool) -> None:
    """ValueError unless an index fits a call: rows, ranges, no key twice, the flags of entirely visible tiles. Reads
    the device; for indices that come from elsewhere.
    """
    rows = len(extent.table) * index.extent[1] * extent.query_tiles
    if index.extent[0] != len(extent.table) or index.extent[2] != extent.query_tiles or len(index.whole_stop) != rows:
        raise ValueError(f"the index is for (batch, heads, query tiles) = {index.extent}, the call has other lengths")
    for name, pointer, entries in (
        ("tiles", index.tile_ptr, index.tiles),
        ("columns", index.column_ptr, index.columns),
    ):
        limit = extent.key_tiles if name == "tiles" else extent.keys
        if (
            len(pointer) != rows + 1
            or pointer[0] != 0
            or pointer[-1] != len(entries)
            or bool((pointer.diff() < 0).any())
        ):
            raise ValueError(f"the index has rows of {name} that are not end to end")
        if bool(((entries < 0) | (entries >= limit)).any()):
            raise ValueError(f"the index lists {name} that do not exist; there are {limit}")
    row = torch.arange(rows, device=index.tiles.device)
    owner = row.repeat_interleave(index.tile_ptr.diff().long())
    counts = torch.zeros((rows, extent.key_tiles), dtype=torch.int32, device=row.device)
    counts.index_put_((owner, index.tiles.long()), torch.ones_like(index.tiles), accumulate=True)
    single = row.repeat_interleave(index.column_ptr.diff().long())
    pairs = torch.stack((single, index.columns.long()))
    if (
        bool((counts > 1).any())
        or bool(counts[single, index.columns.long() // TILE].any())
        or pairs.unique(dim=1).shape[1] != pairs.shape[1]
    ):
        raise ValueError("the index lists a key twice in one row")
    entire = visible_tiles(extent, causal=causal)[1].expand(-1, index.extent[1], -1, -1).flatten(0, 2)
    flagged = torch.arange(len(index.tiles), device=row.device) < index.whole_stop[owner]
    if bool((flagged & ~entire[owner, index.tiles.long()]).any()):
        raise ValueError("the index calls a tile entirely visible that is not")
