"""The search: figures against attention over the index itself, budgets, and what is chosen where the answer is
known.
"""

from __future__ import annotations

from unittest import mock

import pytest
import torch

from kompakt.kernels.attention import prefill_attention
from kompakt.kernels.line_scores import line_scores
from kompakt.kernels.sparse_attention import sparse_attention
from kompakt.sparsify.method import SparseInputs, sparsity_methods
from kompakt.sparsify.minference import MInference, by_density, by_recall
from kompakt.sparsify.patterns import AShape, Block, Dense, Pattern, Skip, TriShape, VerticalSlash, layer_index
from kompakt.sparsify.search import LEVELS, Sums, candidates, causal_tiles, measure, slash_budgets, whole_extent
from kompakt.sparsify.triangle import Triangle

pytestmark = pytest.mark.usefixtures("one_thread")
TOKENS = 1000


def draw(seed: int = 0, heads: int = 4, tokens: int = TOKENS) -> SparseInputs:
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn((1, n, tokens, 16), generator=generator) for n in (heads, 2, 2))
    return SparseInputs(q * 2, k, v, 0.25, softcap=20.0)


def planted(seed: int, tokens: int = TOKENS) -> SparseInputs:
    """Three heads of their own keys: one looks 400 back, one at its neighbours, one everywhere."""
    generator = torch.Generator().manual_seed(seed)
    code = torch.randn((tokens + 400, 32), generator=generator)
    code /= code.norm(dim=1, keepdim=True)
    place = torch.arange(tokens)[:, None] * 0.002
    around = torch.cat((place.cos(), place.sin(), torch.zeros(tokens, 30)), dim=1) * 12
    key = torch.stack((code[400:], around, torch.zeros(tokens, 32)))[None]
    query = torch.stack((code[:tokens] * 40, around, torch.zeros(tokens, 32)))[None]
    return SparseInputs(query, key, torch.randn(key.shape, generator=generator), 1.0)


@pytest.mark.parametrize("step", [1, 3])
def test_figures_are_those_of_the_index(step):
    """Recall, error and cost of every candidate equal what attention over its index gives."""
    inputs = draw()
    shapes: list[Pattern] = [
        AShape(70, 200), TriShape(5, 64, 100), VerticalSlash(90, 150), Block(3), Skip(), Dense(), VerticalSlash(5, 0)
    ]  # fmt: skip
    sums = Sums.zero(4, len(shapes))
    measure(inputs, [shapes] * 4, sums, step=step)
    extent = whole_extent(TOKENS, inputs.query.device)
    options = {"scaling": inputs.scaling, "softcap": inputs.softcap}
    exact, dense = prefill_attention(inputs.query, inputs.key, inputs.value, mode="bf16", **options)
    vertical, slash = line_scores(inputs.query, inputs.key, extent, scaling=inputs.scaling)
    rows = torch.arange(TOKENS) // 64
    looked_at = (extent.query_tiles - 1 - rows) % step == 0
    assert sums.queries == looked_at.sum()
    for place, pattern in enumerate(shapes):
        index = layer_index(
            [pattern] * 4, extent, causal=True, query=inputs.query, key=inputs.key, vertical=vertical, slash=slash
        )
        out, lse = sparse_attention(inputs.query, inputs.key, inputs.value, index, **options)
        recall = torch.exp(lse - dense)[0, :, looked_at].sum(-1)
        error = (out - exact)[0, :, looked_at].double().square().sum((1, 2))
        tiles = index.work()[0, :, range((extent.query_tiles - 1) % step, extent.query_tiles, step)]
        assert torch.allclose(sums.recall[:, place], recall.double(), rtol=1e-4), pattern
        assert torch.allclose(sums.error[:, place], error, rtol=1e-3, atol=1e-6), pattern
        assert torch.equal(sums.cost[:, place].float(), tiles.sum(-1)), pattern
    assert torch.allclose(sums.norm, exact[0, :, looked_at].double().square().sum((1, 2)), rtol=1e-5)


def test_memory_is_that_of_a_tile_of_queries():
    inputs, sizes = draw(tokens=2000), []
    softmax = torch.softmax

    def recorded(x, dim):
        sizes.append(x.numel())
        return softmax(x, dim=dim)

    with mock.patch("torch.softmax", recorded):
        MInference().profile(inputs)
    assert 0 < len(sizes) <= 33 and max(sizes) <= 4 * 64 * 2000


def test_candidates_of_a_level_cost_the_same():
    """What tiles allow: a window, or slashes and columns, of no more than the level and near it."""
    inputs = draw(tokens=4096)
    extent = whole_extent(4096, inputs.query.device)
    _, slash = line_scores(inputs.query, inputs.key, extent, scaling=inputs.scaling)
    found, levels = candidates(slash[0], ("a_shape", "block", "vertical_slash"))
    assert all(len(head) == len(levels) for head in found) and found[0][-1] == Dense()
    sums = Sums.zero(4, len(levels))
    measure(inputs, found, sums, step=1)
    share = sums.cost / sums.tiles
    assert sums.tiles == causal_tiles(4096)
    for place, level in enumerate(levels):
        if level >= 3 / 16:
            # The last tile of columns of each row is partly filled.
            assert (share[:, place] <= level + 64 / sums.tiles + 1e-9).all() and (
                share[:, place] >= level * 0.8 - 0.02
            ).all()


def test_slash_budgets_are_the_largest():
    generator = torch.Generator().manual_seed(0)
    scores = torch.rand((2, 1000), generator=generator)
    extent = whole_extent(1000, torch.device("cpu"))
    vertical = torch.zeros((1, 2, 1000))
    for budget in (60, 90, 130):
        for head, (count,) in enumerate(slash_budgets(scores, [budget])):
            costs = []
            for number in (count, count + 1):
                heads = [VerticalSlash(0, number if other == head else 0) for other in range(2)]
                index = layer_index(heads, extent, causal=True, vertical=vertical, slash=scores[None])
                costs.append(float(index.work()[0, head].sum()))
            assert costs[0] <= budget < costs[1]


def test_heads_get_the_patterns_that_they_have():
    inputs = planted(0)
    both = SparseInputs(
        *(torch.cat((getattr(inputs, n), getattr(planted(1), n))) for n in ("query", "key", "value")), 1.0
    )
    method = MInference(recall=0.9)
    profile = method.profile(both)
    (policy,) = method.choose({"a": profile}, {"a": 3}).values()
    assert policy.heads[0].key == "vertical_slash" and policy.heads[2] == Dense()
    assert policy.heads[1].key in ("vertical_slash", "a_shape")
    figures = policy.figures
    assert figures is not None and figures.held_out and figures.tokens == TOKENS
    assert figures.recall > 0.9 and figures.density < 0.8 and policy.calibrated_length == TOKENS
    assert by_recall(profile, 0.9)[2] == len(profile.levels) - 1


def test_density_is_kept_and_beats_the_same_for_all():
    """All heads share one budget; no single candidate for all of them has less error at its cost."""
    profile = MInference().profile(planted(0))
    with pytest.raises(ValueError, match=r"density 0.1 cannot be met: on 1,000 tokens"):
        by_density({"a": profile}, 0.1)
    for density in (0.4, 0.5, 0.7):
        picked = by_density({"a": profile}, density)["a"]
        cost = sum(float(profile.fit.cost[head, place]) for head, place in enumerate(picked)) / profile.fit.tiles / 3
        error = sum(float(profile.fit.error[head, place]) for head, place in enumerate(picked))
        assert cost <= density
        for place in range(len(profile.levels)):
            if float(profile.fit.cost[:, place].mean()) / profile.fit.tiles <= cost:
                assert error <= float(profile.fit.error[:, place].sum())


def test_triangle():
    method = Triangle(sink=8, window=256, tail=64, max_error=0.3)
    local, everywhere = planted(0), planted(0)
    local.query[:, 0], local.query[:, 2] = local.query[:, 1], local.query[:, 1]
    local.key[:, 0], local.key[:, 2] = local.key[:, 1], local.key[:, 1]
    profiles = {str(place): method.profile(inputs) for place, inputs in enumerate((local, everywhere, local, local))}
    heads = dict.fromkeys(profiles, 3)
    found = method.choose(profiles, heads)
    assert [policy.sparse for policy in found.values()] == [False, False, True, True]
    assert found["3"].heads == (TriShape(8, 256, 64),) * 3 and found["3"].figures is not None
    assert "from layer 2 on" in found["3"].reason
    none = method.choose({**profiles, "3": profiles["1"]}, heads)
    assert not any(policy.sparse for policy in none.values())
    named = Triangle(first_layer=1)
    assert not named.needs_data
    assert [item.sparse for item in named.choose(dict.fromkeys(heads), heads).values()] == [False, True, True, True]
    with pytest.raises(ValueError, match="first_layer is 4; the model has 4"):
        Triangle(first_layer=4).choose(dict.fromkeys(heads), heads)


def test_methods_are_found():
    assert sparsity_methods() == {"minference": MInference, "triangle": Triangle}
    assert tuple(sorted(LEVELS)) == LEVELS
