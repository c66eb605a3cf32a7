"""Patterns: the keys that each one means, tile counts, what indices and static tables visit, JSON of ours and
others.
"""

from __future__ import annotations

import json

import pytest
import torch

from kompakt.kernels.line_scores import line_scores
from kompakt.kernels.segments import Segments
from kompakt.kernels.sparse_attention import sparse_attention
from kompakt.kernels.sparse_index import TILE, Extent, check_index, listed_keys
from kompakt.sparsify.formats import parse_published, published, qwen_config, read_published
from kompakt.sparsify.method import SparseFigures, SparsityPolicy
from kompakt.sparsify.online import index_of, visited
from kompakt.sparsify.patterns import (
    AShape,
    Block,
    Dense,
    Diagonal,
    MultiDiagonal,
    Pattern,
    Skip,
    TriShape,
    VerticalSlash,
    VerticalStripe,
    block_map,
    exact_mask,
    layer_index,
    pick_lines,
    read_pattern,
    static_pattern,
)

CPU = torch.device("cpu")
LINES: dict[str, Pattern] = {
    "dense": Dense(),
    "skip": Skip(),
    "a-shape": AShape(5, 100),
    "tri-shape": TriShape(3, 70, 40),
    "diagonal": Diagonal(50),
    "multi-diagonal": MultiDiagonal(90, 10),
    "stripe": VerticalStripe(50, 3),
}
LENGTHS = [(300, 300), (131, 333), (64, 64), (1, 70)]


def brute(pattern: Pattern, queries: int, keys: int, causal: bool) -> torch.Tensor:
    """The table of `patterns.py`, key by key."""
    mask = torch.zeros((queries, keys), dtype=torch.bool)
    for i in range(queries):
        p = i + keys - queries
        for j in range(p + 1 if causal else keys):
            match pattern:
                case Dense():
                    mask[i, j] = True
                case TriShape(sink, window, tail):
                    mask[i, j] = j < sink or abs(p - j) < window or p >= keys - tail
                case AShape(sink, window):
                    mask[i, j] = j < sink or abs(p - j) < window
                case Diagonal(window):
                    mask[i, j] = abs(p - j) < window
                case MultiDiagonal(stride, window):
                    mask[i, j] = any(abs(abs(p - j) - k * stride) < window for k in range(keys // stride + 2))
                case VerticalStripe(stride, width):
                    mask[i, j] = j % stride < width
    return mask


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("name", LINES)
def test_exact_masks(name, causal):
    for queries, keys in ((150, 150), (33, 131)):
        found = exact_mask(LINES[name], queries, keys, causal=causal)
        assert torch.equal(found, brute(LINES[name], queries, keys, causal))


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("name", LINES)
def test_indices_hold_what_patterns_mean(name, lengths, causal):
    """Every key of the exact mask, whole tiles or single columns, and no tile that no distance of a full one
    touches.
    """
    queries, keys = lengths
    extent = Extent.of(1, queries, keys, None, CPU)
    index = layer_index([LINES[name]], extent, causal=causal)
    check_index(index, extent, causal=causal)
    exact = exact_mask(LINES[name], queries, keys, causal=causal)
    listed = listed_keys(index, extent)[0, 0].repeat_interleave(TILE, dim=0)[:queries]
    assert (listed | ~exact).all()
    expected = -(-torch.stack([row.any(0) for row in exact.split(TILE)]).sum(1) // TILE)
    assert (index.work()[0, 0] >= expected).all()
    if name == "dense":
        rows = torch.arange(extent.query_tiles)
        last = (rows * TILE + TILE).clamp_max(queries) - 1 + keys - queries
        expected = last // TILE + 1 if causal else torch.full_like(rows, extent.key_tiles)
        assert torch.equal(index.work()[0, 0].long(), expected)
    if name == "skip":
        assert index.work().sum() == 0


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("name", ["dense", "skip", "a-shape", "tri-shape", "diagonal"])
def test_static_tables_visit_exactly_that(name, lengths):
    queries, keys = lengths
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn((1, 1, n, 16), generator=generator) for n in (queries, keys))
    table = static_pattern([LINES[name]], CPU)
    assert table is not None
    # With the identity for values an output is the probabilities.
    out, _ = sparse_attention(q, k, torch.eye(keys)[None, None], table)
    assert torch.equal(out[0, 0] > 0, exact_mask(LINES[name], queries, keys, causal=True))


def test_static_tile_counts():
    """What a static pattern is said to visit is the tiles in which its mask has a key."""
    extent = Extent.of(1, 300, 333, None, CPU)
    for pattern in (AShape(5, 100), TriShape(70, 70, 40), Dense(), Skip(), AShape(0, 1), AShape(130, 0)):
        table = static_pattern([pattern], CPU)
        assert table is not None
        mask = torch.zeros((320, 384), dtype=torch.bool)
        mask[:300, :333] = exact_mask(pattern, 300, 333, causal=True)
        tiles = mask.view(5, TILE, 6, TILE).any(3).any(1)
        assert float(visited(table, extent)[0]) == tiles.sum(), pattern
    position = torch.arange(300) + 33
    assert float(visited(table, extent)[1]) == sum(int(row.max()) // TILE + 1 for row in position.split(TILE))


def planted(tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """One head whose queries look at key 7 and at the key 300 before them."""
    generator = torch.Generator().manual_seed(0)
    code = torch.randn((tokens + 300, 64), generator=generator)
    code /= code.norm(dim=1, keepdim=True)
    key = torch.cat((code[300:], torch.zeros(tokens, 1)), dim=1)
    query = torch.cat((code[:tokens], torch.ones(tokens, 1)), dim=1) * 20
    key[7, -1] = 1.0
    return query[None, None], key[None, None]


def test_vertical_slash_finds_its_lines():
    query, key = planted(700)
    extent = Extent.of(1, 700, 700, None, CPU)
    vertical, slash = line_scores(query, key, extent, scaling=1.0)
    assert 7 in vertical[0, 0].topk(1).indices and 300 in slash[0, 0].topk(1).indices
    columns = pick_lines(vertical, [31], 30)[0, 0]
    slashes = pick_lines(slash, [101], 100)[0, 0]
    assert set(range(30)) <= set(columns.tolist()) and set(range(100)) <= set(slashes.tolist())
    pattern = VerticalSlash(31, 101)
    index = layer_index([pattern], extent, causal=True, vertical=vertical, slash=slash)
    exact = exact_mask(pattern, 700, 700, causal=True, columns=columns, slashes=slashes)
    listed = listed_keys(index, extent)[0, 0].repeat_interleave(TILE, dim=0)[:700]
    assert (listed | ~exact).all()
    sparse, lse = sparse_attention(query, key, key, index, scaling=1.0)
    full, dense = sparse_attention(query, key, key, layer_index([Dense()], extent, causal=True), scaling=1.0)
    assert (torch.exp(lse - dense)).min() > 0.999 and torch.allclose(sparse, full, atol=1e-2)
    # Three tiles for the nearest distances, two for the other one, one of columns.
    assert index.work().max() == 6


def test_blocks_pick_the_largest_means():
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn((2, heads, 333, 16), generator=generator) for heads in (4, 2))
    extent = Extent.of(2, 333, 333, None, CPU)
    chosen = block_map(q, k, [3, 1, 0, 9], extent, causal=True)
    assert chosen[:, 2].sum() == 0 and torch.equal(chosen[:, 3], torch.ones(6, 6).tril().bool().expand(2, -1, -1))
    assert (chosen[:, 0].sum(-1) == torch.tensor([1, 2, 3, 3, 3, 3])).all()
    means = [torch.stack([part.mean(0) for part in item.split(TILE)]) for item in (q[1, 0], k[1, 0])]
    scores = means[0][4] @ means[1].T
    middle = int(scores[1:4].argmax()) + 1
    assert chosen[1, 0, 4].nonzero().flatten().tolist() == [0, middle, 4]


@pytest.mark.parametrize(
    "heads",
    [
        (AShape(4, 64), VerticalSlash(40, 120), Dense(), Skip()),
        (Block(2), VerticalSlash(40, 120), AShape(4, 64), Dense()),
        (TriShape(4, 64, 70),) * 4,
    ],
)
def test_padding_and_chunks(heads):
    """A padded row gives what it gives alone; a policy grows with the prompt; a chunk sees its own past."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn((2, n, 300, 16), generator=generator) for n in (4, 2, 2))
    policy = SparsityPolicy(heads, 1)

    def run(q, k, v, segments=None) -> torch.Tensor:
        extent = Extent.of(q.shape[0], q.shape[2], k.shape[2], segments, CPU)
        index = index_of(policy, q, k, extent, scaling=0.25)
        return sparse_attention(q, k, v, index, segments=segments)[0]

    mask = torch.ones((2, 300), dtype=torch.bool)
    # Padding in whole tiles leaves the tiles of keys where they were.
    mask[0, :128] = False
    segments = Segments.from_padding(mask, 300)
    together = run(q, k, v, segments)
    alone = run(q[:1, :, 128:], k[:1, :, 128:], v[:1, :, 128:])
    assert torch.allclose(together[:1, :, 128:], alone, atol=1e-5)
    assert torch.allclose(together[1:], run(q[1:], k[1:], v[1:]), atol=1e-5)
    chunk = run(q[1:, :, 200:], k[1:], v[1:])
    if heads[0] == TriShape(4, 64, 70):
        assert torch.allclose(chunk[:, :, 30:], run(q[1:], k[1:], v[1:])[:, :, 230:], atol=1e-5)
    assert chunk.shape[2] == 100 and chunk.isfinite().all()


def test_policies_scale_and_are_read_back():
    figures = SparseFigures(0.95, 0.1, 0.25, 4096, True)
    policy = SparsityPolicy(
        (VerticalSlash(100, 800), AShape(64, 512), TriShape(8, 512, 128)), 32768, 4096, figures, "x"
    )
    assert policy.patterns(4096) == policy.patterns(100) == list(policy.heads)
    assert policy.patterns(8192) == [VerticalSlash(200, 1600), AShape(64, 1024), TriShape(8, 512, 128)]
    content = json.loads(json.dumps(policy.as_dict()))
    assert SparsityPolicy.from_dict(content) == policy
    for change, message in (
        ({"min_length": "5"}, "min_length is '5'"),
        ({"heads": [{"pattern": "star"}]}, "pattern 'star' is unknown"),
        ({"heads": [{"pattern": "a_shape", "sink": 1}]}, "a_shape is damaged"),
        ({"heads": [{"pattern": "a_shape", "sink": 1, "window": -3}]}, "window of a_shape is -3"),
        ({"heads": 5}, "damaged"),
        ({"heads": []}, "no heads"),
        ({"more": 5}, "damaged"),
    ):
        with pytest.raises(ValueError, match=message):
            SparsityPolicy.from_dict({**content, **change})
    with pytest.raises(ValueError, match="stride of multi_diagonal is 0"):
        read_pattern({"pattern": "multi_diagonal", "stride": 0, "window": 1})


def test_published_formats(tmp_path):
    content = [
        {"0": ["vertical_and_slash", 1000, 6096, 0.9], "1": ["stream_llm", 128, 1024, 0.8]},
        {"0": ["block_sparse", 100, 0, 1.0], "1": ["vertical_and_slash", 30, 800, 1.0]},
    ]
    file = tmp_path / "patterns.json"
    file.write_text(json.dumps(content), "utf-8")
    layers = read_published(file)
    assert layers == [
        {0: VerticalSlash(1000, 6096), 1: AShape(128, 1024)},
        {0: Block(100), 1: VerticalSlash(30, 800)},
    ]
    rows = [list(layer.values()) for layer in layers]
    assert parse_published(published(rows)) == layers
    config = {"dual_chunk_attention_config": {"chunk_size": 5, **qwen_config(rows, min_length=32768)}}
    assert parse_published(json.loads(json.dumps(config))) == layers
    for broken, message in (
        ([], "no list of layers"),
        ([{"x": ["vertical_and_slash", 1, 2, 1.0]}], "names a head 'x'"),
        ([{"0": ["star", 1, 2, 1.0]}], "has pattern 'star'"),
        ([{"0": ["stream_llm", 1]}], "is no list"),
    ):
        with pytest.raises(ValueError, match=message):
            parse_published(broken)
    with pytest.raises(ValueError, match="no name for"):
        published([[Dense()]])
    file.write_text("[", "utf-8")
    with pytest.raises(ValueError, match="not valid JSON"):
        read_published(file)
    with pytest.raises(ValueError, match="does not exist"):
        read_published(tmp_path / "none.json")
