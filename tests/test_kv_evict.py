"""Scores of a prompt's keys against full attention maps, and budgets that turn them into pages and columns."""

from __future__ import annotations

import pytest
import torch
from pydantic import TypeAdapter
from torch.nn import functional

from kompakt.compress.kv_evict import KVEvict
from kompakt.kernels.kv_codec import PAGE
from kompakt.sparsify import kv_evict
from kompakt.sparsify.kv_evict import (
    Eviction,
    Seen,
    expected,
    kept_columns,
    page_counts,
    reread,
    snapkv,
    whole_pages,
)

pytestmark = pytest.mark.usefixtures("one_thread")
TOKENS, HEADS, GROUP, KEY_DIM, VALUE_DIM = 61, 3, 3, 8, 5
STARTS = [0, 17, 58]
"""The last row is shorter than a window."""


def seen(*, softcap: float | None = None, queries: int = TOKENS) -> Seen:
    generator = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(len(STARTS), heads, count, dim, generator=generator)
        for heads, count, dim in (
            (HEADS * GROUP, queries, KEY_DIM),
            (HEADS, TOKENS, KEY_DIM),
            (HEADS, TOKENS, VALUE_DIM),
        )
    )
    return Seen(query * 2, key, value, list(STARTS), 0.4, softcap)


def full_map(one: Seen) -> torch.Tensor:
    """All of the probabilities, (batch, num_kv_heads, group, tokens, tokens) fp64; zeros for queries of padding."""
    query, key = one.query.double().unflatten(1, (HEADS, GROUP)), one.key.double()[:, :, None]
    logits = query @ key.mT * one.scaling
    if one.softcap is not None:
        logits = one.softcap * torch.tanh(logits / one.softcap)
    place = torch.arange(TOKENS)
    visible = (place <= place[:, None]) & (place >= torch.tensor(one.starts)[:, None, None])
    return logits.masked_fill(~visible[:, None, None], -torch.inf).softmax(dim=-1).nan_to_num(0.0)


@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize(("window", "kernel_size"), [(1, 1), (16, 5), (64, 3)])
def test_snapkv_is_the_pooled_mean_of_the_full_map(window, kernel_size, softcap):
    one, candidates = seen(softcap=softcap), 50
    weights = full_map(one)[..., -window:, :candidates]
    counts = torch.tensor([min(window, TOKENS - start) for start in STARTS])[:, None, None]
    scores = weights.mean(dim=2).sum(dim=2) / counts
    side = kernel_size // 2
    wanted = functional.pad(scores, (side, side)).unfold(2, kernel_size, 1).mean(dim=3)
    got = snapkv(one, candidates, window=window, kernel_size=kernel_size)
    assert torch.allclose(got.double(), wanted, rtol=1e-4, atol=1e-6)
    assert bool((got[1, :, : 17 - side] == 0).all())


def test_snapkv_takes_no_more_queries_than_there_are():
    one, few = seen(), seen(queries=16)
    few = Seen(one.query[:, :, -16:], one.key, one.value, one.starts, one.scaling)
    assert torch.equal(snapkv(one, 40, window=16, kernel_size=5), snapkv(few, 40, window=64, kernel_size=5))


def test_expected_attention_is_what_gaussian_queries_give_in_the_mean():
    """By formula, in FP64; and by draws from the same Gaussian, within five standard errors of their mean."""
    one, candidates = seen(), 50
    got = expected(one, candidates, window=16)
    for row, start in enumerate(STARTS[:2]):
        query = one.query[row, :, max(start, TOKENS - 16) :].double().unflatten(0, (HEADS, GROUP))
        key = one.key[row, :, start:candidates].double()
        mean = query.mean(dim=2)
        centred = query - mean[:, :, None]
        covariance = centred.mT @ centred / query.shape[2]
        logits = one.scaling * torch.einsum("hgd,htd->hgt", mean, key)
        logits += one.scaling**2 / 2 * torch.einsum("htd,hgde,hte->hgt", key, covariance, key)
        wanted = logits.softmax(dim=-1).mean(dim=1) * one.value[row, :, start:candidates].double().norm(dim=-1)
        assert torch.allclose(got[row, :, start:].double(), wanted, rtol=1e-4, atol=1e-7)
        assert bool((got[row, :, :start] == 0).all())
        draws = torch.distributions.MultivariateNormal(
            mean[0, 0], covariance[0, 0] + 1e-9 * torch.eye(KEY_DIM, dtype=torch.float64)
        ).sample((20_000,))
        small = 0.3 * key[0]
        weights = torch.exp(one.scaling * draws @ small.T)
        exact = torch.exp(
            one.scaling * small @ mean[0, 0] + one.scaling**2 / 2 * ((small @ covariance[0, 0]) * small).sum(-1)
        )
        assert bool(((weights.mean(0) - exact).abs() <= 5 * weights.std(0) / 20_000**0.5).all())
    with pytest.raises(ValueError, match="scores expected is for attention without a softcap; take scores snapkv"):
        expected(seen(softcap=1.0), 40, window=16)


@pytest.mark.parametrize("logits", [1, 5000, kv_evict.LOGITS])
@pytest.mark.parametrize("softcap", [None, 1.5])
def test_second_reading_takes_the_greatest_probability(softcap, logits, monkeypatch):
    """Over its part's keys and its own, of all queries; what is padding behind `count` plays no part."""
    monkeypatch.setattr(kv_evict, "LOGITS", logits)
    count, (start, stop) = 73, (7, 40)
    generator = torch.Generator().manual_seed(1)
    one = seen(softcap=softcap)
    query = torch.randn(1, HEADS * GROUP, count + 4, KEY_DIM, generator=generator)
    own = torch.randn(1, HEADS, count + 4, KEY_DIM, generator=generator)
    row = Seen(query, one.key[:1], one.value[:1], [0], one.scaling, softcap)
    got = reread(row, own, (start, stop), count)
    keys = torch.cat((one.key[0, :, start:stop], own[0, :, :count]), dim=1).double()
    logits = query[0, :, :count].double().unflatten(0, (HEADS, GROUP)) @ keys[:, None].mT * one.scaling
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    hidden = torch.ones(count, count).triu(1).bool()
    logits[..., stop - start :] = logits[..., stop - start :].masked_fill(hidden, -torch.inf)
    wanted = logits.softmax(dim=-1)[..., : stop - start].amax(dim=(1, 2))
    assert torch.allclose(got.double(), wanted, rtol=1e-4, atol=1e-6)


def test_budgets_fill_what_there_is_room_for():
    generator = torch.Generator().manual_seed(2)
    scores = torch.rand(5, 10 * PAGE + 3, generator=generator) * torch.tensor([[1.0], [3.0], [1.0], [0.1], [1.0]])
    for room in (5, 13, 30):
        uniform = page_counts(scores, room, Eviction(ratio=2.0, budget="uniform"))
        assert sum(uniform) == room and max(uniform) - min(uniform) <= 1
        shared = page_counts(scores, room, Eviction(ratio=2.0))
        assert sum(shared) == room and max(shared) <= 11
        assert shared[1] == max(shared) and shared[3] == min(shared)
        assert min(shared) >= int(0.2 * room / 5)
    greedy = page_counts(scores, 5, Eviction(ratio=2.0, floor=0.0))
    assert greedy == [0, 5, 0, 0, 0]
    assert page_counts(scores, 5, Eviction(ratio=2.0, floor=1.0)) == [1] * 5
    assert page_counts(scores, 1000, Eviction(ratio=2.0)) == [11] * 5
    found = page_counts(scores, None, Eviction(budget="threshold", threshold=0.5))
    assert found == [-(-int((row >= 0.5).sum()) // PAGE) for row in scores] and found[3] == 0


def test_whole_pages_come_to_the_room():
    assert whole_pages([0.5, 0.5, 2.0], 3, [9] * 3) == [1, 0, 2]
    assert whole_pages([0.1, 3.9], 4, [9, 9]) == [0, 4]
    assert whole_pages([0.0, 6.0], 6, [4, 4]) == [2, 4]


def test_kept_columns_are_the_best_of_each_head_in_order():
    generator = torch.Generator().manual_seed(3)
    scores = torch.rand(2, 3, 700, generator=generator)
    scores[0, 0, :] = 1.0
    first, pages = [4, 300], [[1, 2, 0], [4, 1, 3]]
    columns, counts = kept_columns(scores, first, pages)
    assert counts == [[128, 256, 0], [400, 128, 384]]
    for row in range(2):
        for head in range(3):
            found = columns[row, head, : counts[row][head]].tolist()
            assert found == sorted(set(found)) and all(column >= first[row] for column in found)
            rest = [column for column in range(first[row], 700) if column not in set(found)]
            if found and rest:
                assert scores[row, head, found].min() >= scores[row, head, rest].max()
    assert columns[0, 0, :128].tolist() == list(range(4, 132))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({}, "budget adakv needs ratio or tokens, and nothing beside it; given: none"),
        ({"ratio": 2, "tokens": 900}, "given: ratio and tokens"),
        ({"ratio": 1}, "greater than 1"),
        ({"budget": "threshold", "ratio": 2}, "budget threshold needs threshold"),
        ({"budget": "global", "ratio": 2}, "which scores kvzip has; snapkv evicts layer by layer: take budget adakv"),
        ({"ratio": 2, "kernel_size": 4}, "kernel_size is 4; it must be odd"),
        ({"ratio": 2, "scores": "kvzip", "window": 32}, "window is for scores snapkv or expected; scores is kvzip"),
        ({"ratio": 2, "chunk": 512}, "chunk is for scores kvzip; scores is snapkv"),
        ({"ratio": 2, "scores": "h2o"}, "'snapkv', 'expected' or 'kvzip'"),
        ({"ratio": 2, "codes": "int2"}, "'none', 'fp8' or 'int4'"),
    ],
)
def test_options_that_do_not_go_together_are_named(options, says):
    with pytest.raises(ValueError, match=says):
        TypeAdapter(KVEvict).validate_python(options)


def test_room_counts_what_is_stored_beside_the_pages():
    method = KVEvict(ratio=4.0, sink_tokens=4, recent_tokens=128)
    assert method.dense_tokens == 260 and method.shortest_prompt == 4 * 388
    assert method.room(4 * 388, 3, 260) == 3 and method.room(4 * 388 - 1, 3, 260) == 2
    assert KVEvict(tokens=1000).room(9999, 2, 260) == 11
    assert KVEvict(budget="threshold", threshold=0.1).room(9999, 2, 260) is None
    assert KVEvict(scores="kvzip", ratio=2.0).query_agnostic and not method.query_agnostic
