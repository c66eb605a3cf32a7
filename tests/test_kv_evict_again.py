"""Scores of what a cache holds against softmax over lists of tokens, pages that are packed anew, and who gets them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch.nn import functional

from kompakt.compress.cache import TokenStore
from kompakt.compress.kv_evict import KVEvict
from kompakt.kernels.kv_codec import PAGE
from kompakt.kernels.kv_kept import KeptTokens
from kompakt.kernels.kv_repacked import HeldTokens
from kompakt.sparsify.kv_evict import Eviction, kept_columns, page_counts
from kompakt.sparsify.kv_evict_again import Beside, LastQueries, again_pages, again_scores

pytestmark = pytest.mark.usefixtures("one_thread")
SCALING = 0.4
METHODS = {
    "snapkv": {"scores": "snapkv", "kernel_size": 5},
    "kvzip": {"scores": "kvzip", "kernel_size": 3},
    "expected": {"scores": "expected"},
}


@dataclass
class Case:
    """A row of heads that have kept `counts` of 150 tokens each, behind which come `later` others, of which those from
    column 150 on up to the end of the second page are coded. lists: row → head → tokens held, then those beside.
    """

    held: HeldTokens
    last: LastQueries
    beside: Beside
    key: torch.Tensor
    value: torch.Tensor
    columns: list[list[list[int]]]
    sinks: int


def case(
    heads: tuple[int, int], codes: Any, *, softcap: float | None = None, queries: int = 21, kept: bool = True
) -> Case:
    """Left-padded rows; the second begins behind most of what was evicted from."""
    generator, kv_heads, starts, sinks = torch.Generator().manual_seed(7), heads[1], [0, 140], 3
    method, tokens, start = KVEvict(tokens=900, codes=codes, recent_tokens=0), 283, 150 if kept else 0
    key, value = (torch.randn(2, kv_heads, tokens, dim, generator=generator) for dim in (8, 6))
    query = 2 * torch.randn(2, heads[0], queries, 8, generator=generator)
    store = TokenStore(method, starts=starts)
    store.append(key, value)
    columns, packed = [], None
    first = [begin + sinks for begin in starts]
    if kept:
        counts = [[min((129, 0, 40)[head % 3], 150 - low) for head in range(kv_heads)] for low in first]
        scores = torch.rand(2, kv_heads, 150, generator=generator)
        chosen, _ = kept_columns(scores, first, [[2] * kv_heads] * 2)
        packed = KeptTokens.pack(key, value, chosen, counts, method.codec({}))
        columns = [[chosen[r, h, : counts[r][h]].tolist() for h in range(kv_heads)] for r in range(2)]
    coded = [[column for column in range(start, 256) if column >= low] for low in first]
    columns = [[(columns[r][h] if kept else []) + coded[r] for h in range(kv_heads)] for r in range(2)]
    held = HeldTokens.of(packed, store.where(), (start, 256), torch.tensor(first), kv_heads)
    last = LastQueries(query, torch.arange(tokens - queries, tokens), torch.tensor(starts), SCALING, softcap)
    stays = torch.tensor([[*range(begin, begin + sinks), *range(256, tokens)] for begin in starts])
    keys = key.gather(2, stays[:, None, :, None].expand(-1, kv_heads, -1, 8))
    return Case(held, last, Beside(keys, stays, torch.ones_like(stays, dtype=torch.bool)), key, value, columns, sinks)


def wanted_scores(one: Case, row: int, head: int, method: Eviction) -> torch.Tensor:
    """In FP64, from lists."""
    codec = one.held.pages.codec
    key, value = (x.double() for x in codec.rounded(one.key, one.value))
    columns = torch.tensor(one.columns[row][head], dtype=torch.long)
    query = one.last.query[row].double().unflatten(0, (one.key.shape[1], -1))[head]
    real = one.last.columns >= one.last.starts[row]
    query, places = query[:, real], one.last.columns[real]
    mine = key[row, head, columns]
    if method.scores == "expected":
        mean = query.mean(dim=1)
        centred = query - mean[:, None]
        covariance = centred.mT @ centred / query.shape[1]
        logits = SCALING * mean @ mine.mT + SCALING**2 / 2 * torch.einsum("td,gde,te->gt", mine, covariance, mine)
        return logits.softmax(dim=-1).mean(dim=0) * value[row, head, columns].norm(dim=-1)
    keys = torch.cat((mine, one.beside.key[row, head].double()))
    logits = query @ keys.mT * SCALING
    if one.last.softcap is not None:
        logits = one.last.softcap * torch.tanh(logits / one.last.softcap)
    hidden = torch.cat((columns, one.beside.columns[row])) > places[:, None]
    weights = logits.masked_fill(hidden, -torch.inf).softmax(dim=-1).mean(dim=(0, 1))[: len(columns)]
    side = method.kernel_size // 2
    return functional.pad(weights, (side, side)).unfold(0, method.kernel_size, 1).mean(dim=1)


@pytest.mark.parametrize("heads", [(9, 3), (14, 2)], ids=str)
@pytest.mark.parametrize(("codes", "kept"), [("none", True), ("fp8", True), ("int4", True), ("none", False)])
@pytest.mark.parametrize("name", METHODS)
def test_scores_are_those_of_lists_of_tokens(name, codes, kept, heads):
    """Heads that have kept different numbers, one of them nothing; queries that are younger than some coded tokens."""
    method = Eviction(ratio=2.0, **METHODS[name], **({"decode_budget": 900} if name == "kvzip" else {}))
    one = case(heads, codes, softcap=None if name == "expected" else 3.0, queries=60, kept=kept)
    places, counts = one.held.in_order()
    got = again_scores(one.last, one.held, one.beside, places, method)
    for row in range(2):
        for head in range(heads[1]):
            count = len(one.columns[row][head])
            assert counts[row][head] == count
            wanted = wanted_scores(one, row, head, method)
            assert torch.allclose(got[row, head, :count].double(), wanted, rtol=1e-4, atol=1e-7)


def test_queries_of_padding_count_for_nothing():
    one = case((9, 3), "none")
    late = replace(one.last, starts=torch.tensor([0, 270]))
    valid = one.held.valid.clone()
    valid[1] = False
    held, method = replace(one.held, valid=valid), Eviction(ratio=2.0, kernel_size=1)
    seen = replace(one.beside, there=one.beside.columns >= torch.tensor([[0], [270]]))
    places, counts = held.in_order()
    got = again_scores(late, held, seen, places, method)
    assert counts[1] == [0] * 3 and bool(got.isfinite().all()) and bool((got[1] == 0).all())


def test_expected_attention_has_no_softcap():
    one = case((9, 3), "none", softcap=2.0)
    with pytest.raises(ValueError, match="scores expected is for attention without a softcap"):
        again_scores(one.last, one.held, one.beside, one.held.in_order()[0], Eviction(ratio=2.0, scores="expected"))


@pytest.mark.parametrize("codes", ["none", "fp8", "int4"])
@pytest.mark.parametrize("heads", [(9, 3), (14, 2)], ids=str)
def test_codes_are_moved_as_they_are(codes, heads):
    """What comes back of every token that is chosen is what came back before, bit for bit."""
    one = case(heads, codes)
    places, counts = one.held.in_order()
    scores = torch.rand(places.shape, generator=torch.Generator().manual_seed(3))
    chosen, kept_counts = kept_columns(scores, [0, 0], [[1] * heads[1], [2] * heads[1]], counts)
    packed = one.held.pack(places.gather(2, chosen), kept_counts)
    codec, seen = one.held.pages.codec, 0
    rounded = codec.rounded(one.key, one.value)
    for row in range(2):
        for head in range(heads[1]):
            count = kept_counts[row][head]
            assert count == min((1 + row) * PAGE, counts[row][head])
            columns = [one.columns[row][head][place] for place in chosen[row, head, :count].tolist()]
            assert columns == sorted(columns)
            for number in range(-(-count // PAGE)):
                part = columns[number * PAGE : (number + 1) * PAGE]
                found = packed.read(number)
                assert found[2][row, head].sum() == len(part)
                for x, wanted in zip(found, rounded, strict=False):
                    assert torch.equal(x[row, head, : len(part)], wanted[row, head, part])
                seen += len(part)
    assert seen == sum(map(sum, kept_counts)) and seen > 3 * PAGE


def test_as_many_tokens_take_the_places_of_others():
    one = case((9, 3), "int4", kept=False)
    places, counts = one.held.in_order()
    first = one.held.pack(places[..., :PAGE], [[PAGE] * 3, [113] * 3])
    held = HeldTokens.of(first, one.held.pages, (0, 256), torch.tensor([200, 200]), 3)
    where, before = first.records.data_ptr(), first.read(0)
    places, counts = held.in_order()
    again = held.pack(places.flip(2)[..., :PAGE].sort(dim=2).values, [[PAGE] * 3, [113] * 3])
    assert again is first and again.records.data_ptr() == where and counts[0] == [PAGE + 56] * 3
    assert not torch.equal(again.read(0)[0], before[0])
    fewer = held.pack(places, [[PAGE] * 3, [PAGE, 112, 113]])
    assert fewer is not first and fewer.counts[1] == (PAGE, 112, 113)


def test_what_fills_a_page_up_is_numbers():
    """Places of the first page of columns that nobody wrote hold anything; none of that gets into a page."""
    one = case((9, 3), "fp8", kept=False)
    places, counts = one.held.in_order()
    one.held.pages.pages[0].key_codes.view(torch.uint8)[1, :, :143].fill_(0x7F)
    packed = one.held.pack(places, [[130] * 3, [counts[1][0]] * 3])
    assert counts[1][0] == 113
    for number in range(packed.pages):
        keys, _, _ = packed.read(number)
        assert bool(keys[0].isfinite().all()) and (number > 0 or bool(keys[1].isfinite().all()))


def test_heads_share_pages_until_they_fill_what_there_is():
    generator = torch.Generator().manual_seed(5)
    scores = torch.rand(2, 3, 500, generator=generator) * torch.tensor([1.0, 4.0, 0.5])[:, None]
    counts = [[500, 500, 100], [60, 40, 0]]
    method = Eviction(ratio=2.0)
    found = again_pages(scores, counts, None, 6, method)
    assert sum(found[0]) == 6 and found[0][1] == 4 and found[0][2] <= 1 and found[1] == [1, 1, 0]
    assert again_pages(scores, counts, [[1, 2, 3], [1, 0, 0]], 6, method) == [[1, 2, 3], [1, 1, 0]]
    assert again_pages(scores, counts, None, 6, replace(method, budget="uniform"))[0] == [3, 2, 1]


def test_pages_of_heads_with_different_numbers_of_candidates():
    scores = torch.rand(3, 5 * PAGE, generator=torch.Generator().manual_seed(6))
    there = [5 * PAGE, 10, 2 * PAGE + 1]
    hidden = torch.arange(5 * PAGE) >= torch.tensor(there)[:, None]
    for budget in ("uniform", "adakv"):
        for room in (1, 4, 7):
            found = page_counts(scores.masked_fill(hidden, -torch.inf), room, Eviction(ratio=2.0, budget=budget), there)
            assert sum(found) == room and all(count <= most for count, most in zip(found, (5, 1, 3), strict=True))
        assert page_counts(scores, 9, Eviction(ratio=2.0, budget=budget), there) == [5, 1, 3]
