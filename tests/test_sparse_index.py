"""Sparse indices: what lines and maps list, exactly, on odd lengths, padding and queries shorter than the keys."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from attention_cases import AttentionCase
from interpreter_cases import interpreter_results, needs_triton
from kernel_cases import poisoned, skip_below
from sparse_cases import SparseCase, listed_mask, oracle_mask

from kompakt.kernels.segments import Segments
from kompakt.kernels.sparse_index import (
    NOTHING,
    TILE,
    Extent,
    Lines,
    SparseIndex,
    check_index,
    index_from_lines,
    index_from_tiles,
    lines,
    tile_map,
)

KERNEL = "kompakt.kernels.sparse_index_triton"
CASES = {
    "causal": SparseCase(AttentionCase(lengths=(70, 70)), 1),
    "one token": SparseCase(AttentionCase(lengths=(1, 1)), 1),
    "one query": SparseCase(AttentionCase(lengths=(1, 133)), 2),
    "past": SparseCase(AttentionCase(lengths=(150, 333), batch=2), 3, slashes=3, columns=40, tail=70),
    "aligned": SparseCase(AttentionCase(lengths=(128, 256)), 2, tail=64),
    "full": SparseCase(AttentionCase(lengths=(140, 330), causal=False), 2, columns=70),
    "more queries than keys": SparseCase(AttentionCase(lengths=(200, 65), causal=False), 1),
    "padding": SparseCase(AttentionCase(lengths=(200, 290), batch=2, segments="padding"), 2, tail=5),
    "padding, full": SparseCase(AttentionCase(lengths=(200, 200), batch=2, segments="padding", causal=False), 2),
    "map": SparseCase(AttentionCase(lengths=(150, 333), batch=2), 3, kind="map"),
    "map, padding": SparseCase(AttentionCase(lengths=(200, 290), batch=2, segments="padding"), 2, kind="map"),
    "dense": SparseCase(AttentionCase(lengths=(130, 333)), 2, kind="dense"),
    "skip": SparseCase(AttentionCase(lengths=(130, 333)), 2, kind="skip"),
    "many columns": SparseCase(AttentionCase(lengths=(70, 1700)), 1, slashes=1, columns=900),
    "many tiles": SparseCase(AttentionCase(lengths=(64, 64 * 300)), 1, slashes=200, columns=3),
}


LISTS = ("tile_ptr", "whole_stop", "tiles", "column_ptr", "columns", "order")


def same_index(one: SparseIndex, other: SparseIndex) -> None:
    assert one.extent == other.extent
    for name in LISTS:
        left, right = getattr(one, name), getattr(other, name)
        assert left.dtype == right.dtype == torch.int32 and torch.equal(left, right), name


def check(case: SparseCase, device: str = "cpu") -> None:
    from kompakt.kernels.sparse_index_triton import build_index

    *_, segments = replace(case.attention, heads=(case.heads, case.heads), dims=(16, 16)).make()
    extent = case.extent(segments)
    expected = case.index(segments)
    chosen = case.lines(extent) if case.kind == "lines" else None
    wanted = None if chosen is not None else case.wanted(extent)
    if device != "cpu":
        extent = replace(extent, table=extent.table.to(device))
        wanted = None if wanted is None else wanted.to(device)
        if chosen is not None:
            chosen = Lines(*(getattr(chosen, name).to(device) for name in ("hits", "columns", "dense_from")))
    with poisoned():
        found = build_index(chosen, wanted, extent, causal=case.attention.causal)
    lists = {name: getattr(found, name).cpu() for name in LISTS}
    same_index(replace(found, **lists), expected)


INTERPRETER_CASES = {name: lambda case=case: check(case) for name, case in CASES.items()}
MUTATIONS = {
    "distance of the next tile": ("m - t + key_tiles - 1", "m - t + key_tiles - 2", "past"),
    "dense rows forgotten": ("found | (m >= tl.load(dense_ptr + plane))", "found", "past"),
    "tiles behind the queries": ("limit = tl.minimum(limit, last + 1)", "limit = limit", "past"),
    "edges called whole": ("start + BLOCK - 1 <= first", "start <= first", "past"),
    "tail of the keys called whole": ("& (start + BLOCK <= k_stop)", "", "full"),
    "padding called whole": ("entire = (start >= k_start) &", "entire =", "map, padding"),
    "columns of listed tiles": ("seen & (taken == 0)", "seen", "past"),
    "second chunk of tiles": (
        "tl.cdiv(limit, BLOCK), CHUNK)",
        "tl.minimum(tl.cdiv(limit, BLOCK), CHUNK), CHUNK)",
        "many tiles",
    ),
    "second chunk of columns": ("range(0, width, CHUNK)", "range(0, CHUNK, CHUNK)", "many columns"),
}


@needs_triton
@pytest.mark.parametrize("name", [*INTERPRETER_CASES, *MUTATIONS])
def test_kernel(name):
    assert interpreter_results(__file__)[name] == ""


@pytest.mark.gpu
@pytest.mark.parametrize("name", CASES)
def test_kernel_on_gpu(name):
    skip_below((8, 0))
    check(CASES[name], "cuda")


def check_turns(index: SparseIndex) -> None:
    """Every row once; head after head, the one with most work first, and so its rows."""
    assert torch.equal(index.order.sort().values.long(), torch.arange(len(index.whole_stop)))
    heads = index.order.view(-1, index.extent[2]) // index.extent[2]
    assert (heads == heads[:, :1]).all()
    work = index.work().flatten()[index.order.long()].view(heads.shape)
    assert (work.diff(dim=1) <= 0).all() and (work.sum(dim=1).diff() <= 0).all()


@pytest.mark.parametrize("name", CASES)
def test_lists(name):
    """An index lists what its lines and maps say, no key twice."""
    case = CASES[name]
    *_, segments = replace(case.attention, heads=(case.heads, case.heads), dims=(16, 16)).make()
    index, extent = case.index(segments), case.extent(segments)
    check_index(index, extent, causal=case.attention.causal)
    assert torch.equal(listed_mask(case, index, segments), oracle_mask(case, segments))
    check_turns(index)
    if case.kind == "dense":
        assert oracle_mask(case, segments).any(-1).all()
    if case.kind == "skip":
        assert len(index.tiles) == len(index.columns) == 0


@pytest.mark.parametrize(("batch", "heads", "queries"), [(1, 2, 0), (0, 2, 64), (1, 0, 64)])
def test_nothing_has_an_empty_index(batch, heads, queries):
    extent = Extent.of(batch, queries, 128, None, torch.device("cpu"))
    index = index_from_tiles(torch.ones((batch, heads, -(-queries // 64), 2), dtype=torch.bool), extent, causal=True)
    assert len(index.order) == len(index.tiles) == 0 and index.order.dtype == torch.int32


@pytest.mark.parametrize("distance", [0, 1, 63, 64, 65, 100, 199])
@pytest.mark.parametrize("lengths", [(200, 200), (137, 251), (64, 128)])
def test_slashes_reach_their_keys(distance, lengths):
    """Of every query, and with the fewest tiles: each holds a key of the slash."""
    queries, keys = lengths
    extent = Extent.of(1, queries, keys, None, torch.device("cpu"))
    slash = torch.tensor([[[distance]]])
    chosen = lines(slash, torch.empty((1, 1, 0), dtype=torch.long), extent, heads=1)
    wanted = tile_map(chosen, extent)[0, 0]
    position = torch.arange(queries) + keys - queries
    exact = torch.zeros((queries, keys), dtype=torch.bool)
    target = position - distance
    inside = target >= 0
    exact[inside, target[inside]] = True
    padded = torch.zeros((extent.query_tiles * TILE, extent.key_tiles * TILE), dtype=torch.bool)
    padded[:queries, :keys] = exact
    needed = padded.view(extent.query_tiles, TILE, extent.key_tiles, TILE).any(3).any(1)
    assert (wanted | ~needed).all()
    # A short last tile of queries, or what would lie before the first key, may not need what its full size would.
    complete = queries // TILE
    inner = torch.zeros_like(needed)
    inner[:complete, 1:-1] = True
    assert torch.equal(wanted & inner, needed & inner)


def test_padding_is_as_if_alone():
    """A row with a multiple of 64 tokens of padding visits what it would without."""
    slashes, columns = torch.tensor([[[0, 130]]]), torch.tensor([[[3, 5, NOTHING]]])
    alone = Extent.of(1, 150, 150, None, torch.device("cpu"))
    index = index_from_lines(lines(slashes, columns, alone, heads=1), alone, causal=True)
    mask = torch.arange(278)[None] >= 128
    segments = Segments.from_padding(mask, 278)
    padded = Extent.of(1, 278, 278, segments, torch.device("cpu"))
    other = index_from_lines(lines(slashes, columns, padded, heads=1), padded, causal=True)
    assert torch.equal(index.tiles + 2, other.tiles) and torch.equal(index.columns + 128, other.columns)


def test_refusals():
    extent = Extent.of(1, 130, 130, None, torch.device("cpu"))
    index = index_from_tiles(torch.ones((1, 1, 3, 3), dtype=torch.bool), extent, causal=True)
    check_index(index, extent, causal=True)
    packed = Segments.from_cu_seqlens(torch.tensor([0, 3, 9]))
    with pytest.raises(ValueError, match="packed sequences have no sparse index"):
        Extent.of(1, 9, 9, packed, torch.device("cpu"))
    for change, message in (
        ({"tiles": index.tiles + 1}, "tiles that do not exist"),
        ({"tiles": torch.zeros_like(index.tiles)}, "a key twice"),
        ({"tile_ptr": index.tile_ptr + 1}, "not end to end"),
        ({"whole_stop": index.tile_ptr[1:].clone()}, "entirely visible that is not"),
        ({"extent": (1, 1, 2)}, "other lengths"),
    ):
        with pytest.raises(ValueError, match=message):
            check_index(replace(index, **change), extent, causal=True)
    assert index.nbytes() == 4 * (4 + 3 + 6 + 4 + 0 + 3)
