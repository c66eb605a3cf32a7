"""Caches pruned by magnitude: the specification against a plain loop, bytes, what scores and the search are for."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from attention_models import TOKENS, tiny
from kernel_cases import same_bits

from kompakt.compress.cache import TokenStore
from kompakt.compress.cache_calibration import measured_shares
from kompakt.compress.cache_methods import kv_cache_methods
from kompakt.compress.hf_cache_hooks import cacheable_modules
from kompakt.kernels.activations import E4M3_MAX
from kompakt.kernels.cache_method import AttentionInputs
from kompakt.kernels.kv_pages import PAGE
from kompakt.kernels.kv_prune import kept_channels, prune_tokens, restore_tokens
from kompakt.sparsify.kv_prune import KVPrune, Level, mean_sizes, output_of, pruning_errors, shared_out

pytestmark = pytest.mark.usefixtures("one_thread")
OPTIONS = {"causal": True, "window": None, "scaling": 0.25, "softcap": None}


def plain(**options) -> KVPrune:
    return KVPrune(**{"key_scores": "magnitude", **options})


def largest(x: torch.Tensor, kept: int, weight: torch.Tensor | None) -> torch.Tensor:
    """(tokens, channels) bool, by a loop: the largest scores, of equal ones the lower channel."""
    mask = torch.zeros_like(x, dtype=torch.bool)
    for row, token in enumerate(x.tolist()):
        weights = [1.0] * len(token) if weight is None else weight.tolist()
        scores = [abs(value) * one for value, one in zip(token, weights, strict=True)]
        # NaN compares with nothing.
        scores = [float("inf") if value != value else score for value, score in zip(token, scores, strict=True)]
        for channel in sorted(range(len(token)), key=lambda channel: (-scores[channel], channel))[:kept]:
            mask[row, channel] = True
    return mask


def hard_tokens(dim: int) -> torch.Tensor:
    """(9, dim): ties, zeros, one channel, large and small numbers, NaN, infinity, all of them damaged."""
    x = torch.randn(9, dim, generator=torch.Generator().manual_seed(dim))
    x[1] = x[1].sign()
    x[2] = 0
    x[3] = 0
    x[3, -1] = -2
    x[4], x[5] = x[4] * 1e30, x[5] * 1e-30
    x[6, dim // 2], x[7, 0] = torch.nan, -torch.inf
    x[8] = torch.nan
    return x


@pytest.mark.parametrize("values", ["bf16", "fp8", "int4"])
@pytest.mark.parametrize(("dim", "kept"), [(6, 4), (20, 8), (33, 12), (64, 20), (80, 80), (128, 64)])
def test_tokens_are_what_a_loop_makes_of_them(dim, kept, values):
    x = hard_tokens(dim)
    # Exactly representable, so that scores are exact and Python's product is FP32's.
    for weight in (None, 2.0 ** torch.randint(-3, 3, (dim,), generator=torch.Generator().manual_seed(1))):
        mask = largest(x, kept, weight)
        codes, parameters = prune_tokens(x, kept, values, weight)
        assert torch.equal(codes >= 0, mask) and (mask.sum(-1) == kept).all()
        got = restore_tokens(codes, parameters, values)
        assert (got[~mask] == 0).all()
        sound = x.isfinite().all(-1)
        assert not got[~sound].isfinite().all(-1).any()
        wanted = torch.where(mask, x, 0.0)
        if values == "bf16":
            assert same_bits(got[mask], x[mask].bfloat16().float())
        else:
            assert got[~sound][mask[~sound]].isnan().all()
            most = wanted[sound].abs().amax(-1, keepdim=True)
            # Half a step of INT4, σ rounded up by 2⁻⁷; of e4m3 2⁻⁴ of a number or half of its least, 2⁻¹⁰·σ.
            step = {"int4": most / 7 * (1 + 2**-7) / 2, "fp8": wanted[sound].abs() / 16 + most / E4M3_MAX * 2**-10}
            assert ((got - wanted)[sound].abs() <= step[values] * (1 + 1e-6) + 2.0**-60).all()


@pytest.mark.parametrize("values", ["bf16", "fp8", "int4"])
@pytest.mark.parametrize("dims", [(64, 64), (6, 20), (96, 40)], ids=str)
def test_pages_keep_tokens_written_in_any_portions(dims, values):
    codec = plain(key_sparsity=0.7, values=values).codec({})
    layout = codec.layout(*dims)
    key, value = torch.randn(3, 2, PAGE, dims[0]), torch.randn(3, 2, PAGE, dims[1])
    page = layout.page(torch.randint(0, 255, (3, 2, layout.record_bytes), dtype=torch.uint8))
    page.read()  # Of any bytes.
    for place in (slice(70, PAGE), slice(0, 3), slice(3, 70)):
        page.write(place, codec.encode_keys(key[:, :, place]), codec.encode_values(value[:, :, place]))
    keys, values_ = page.read()
    for got, wanted in zip((*keys, *values_), (*codec.encode_keys(key), *codec.encode_values(value)), strict=True):
        assert same_bits(got, wanted)


def test_bytes_of_a_page_are_where_they_are_said_to_be():
    """Channel c in bit c mod 32 of its word; kept values in the order of channels; two INT4 codes in a byte."""
    token = torch.zeros(1, 1, 1, 40)
    kept = [0, 5, 31, 32, 38, 39]
    token[..., kept] = torch.tensor([7.0, -7, 1, 2, -3, 4])
    for values in ("bf16", "int4"):
        layout = plain(key_sparsity=0.8, value_sparsity=0.0, values=values).codec({}).layout(40, 4)
        assert layout.keys.kept == 8
        record = torch.zeros(1, 1, layout.record_bytes, dtype=torch.uint8)
        codec = plain(key_sparsity=0.8, value_sparsity=0.0, values=values).codec({})
        layout.page(record).write(slice(9, 10), codec.encode_keys(token), codec.encode_values(torch.ones(1, 1, 1, 4)))
        words = record[0, 0, : PAGE * 8].view(torch.int32).view(PAGE, 2)[9].tolist()
        # Of the channels that are zero, 1 and 2 come first.
        assert [word & 0xFFFFFFFF for word in words] == [
            1 << 0 | 1 << 1 | 1 << 2 | 1 << 5 | 1 << 31,
            1 | 1 << 6 | 1 << 7,
        ]
        stored = record[0, 0, PAGE * 8 :]
        if values == "bf16":
            assert stored.view(torch.bfloat16)[9 * 8 : 10 * 8].tolist() == [7, 0, 0, -7, 1, 2, -3, 4]
        else:
            assert stored[9 * 4 : 10 * 4].tolist() == [15 | 8 << 4, 8 | 1 << 4, 9 | 10 << 4, 5 | 12 << 4]


@pytest.mark.parametrize(
    ("values", "sparsity", "share", "bytes_"),
    [
        *[("bf16", 0.5, 0.57, 144), ("bf16", 0.7, 0.38, 96), ("fp8", 0.5, 0.33, 84), ("fp8", 0.7, 0.24, 60)],
        *[("int4", 0.5, 0.24, 50), ("int4", 0.7, 0.19, 38)],
    ],
)
def test_bytes_of_dense_tokens(values, sparsity, share, bytes_):
    store = TokenStore(plain(key_sparsity=sparsity, value_sparsity=sparsity, values=values))
    x = torch.randn(2, 3, 1000, 128, dtype=torch.bfloat16)
    store.append(x, x)
    sizes, dense = store.nbytes(), 2 * x[:, :, :768].nbytes
    # 16 bytes of every page and KV head are room behind the last word.
    used = sizes.codes + sizes.scales
    assert used == 2 * 3 * (2 * 768 * bytes_ + 768 // PAGE * 16) <= share * dense
    assert store.pool is not None
    tensors = [*store.pool.blocks, store.key, store.value, store.sink_key, store.sink_value]
    assert sizes.total == sum(tensor.untyped_storage().nbytes() for tensor in tensors)


def test_numbers_kept():
    assert [kept_channels(s, 128) for s in (0, 0.3, 0.5, 0.7, 0.9, 0.99)] == [128, 88, 64, 40, 12, 4]
    assert [kept_channels(s, 6) for s in (0, 0.5, 0.9)] == [6, 4, 4] and kept_channels(0.5, 3) == 3
    with pytest.raises(ValueError, match=r"sparsity 1 is no share"):
        kept_channels(1, 8)


def inputs(seed: int = 0, *, tokens: int = 300, spread: float = 2.0) -> AttentionInputs:
    """Channels of queries of very different size; keys of two heads; a first token that is like no other."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.logspace(-spread / 2, spread / 2, 16)[torch.randperm(16, generator=torch.Generator().manual_seed(9))]
    query = torch.randn(2, 4, tokens, 16, generator=generator) * sizes
    key, value = (torch.randn(2, 2, tokens, 16, generator=generator) for _ in "kv")
    key[:, :, :4] *= 50
    return AttentionInputs(query, key, value, OPTIONS)


def test_scores_by_queries_lose_less_of_the_logits():
    train, test = inputs(), inputs(1)
    errors = {}
    for scores in ("magnitude", "output"):
        method = KVPrune(key_sparsity=0.75, key_scores=scores)
        codec = method.codec(method.statics(train))
        key = codec.rounded(test.key, test.value)[0]
        lost = test.query.unflatten(1, (2, 2)) @ (key - test.key)[:, :, None, 4:].mT
        errors[scores] = lost.square().mean().item()
    assert errors["output"] < 0.5 * errors["magnitude"]
    # Values do not look at queries.
    weights = KVPrune().statics(train)["query_weight"]
    assert torch.allclose(weights, train.query.view(2, 2, 2, 300, 16).abs().mean((0, 2, 3)))
    assert torch.equal(KVPrune().codec({"query_weight": weights}).encode_values(test.value)[0],
                       plain().codec({}).encode_values(test.value)[0])  # fmt: skip


def levels_of(generator: torch.Generator, convex: bool) -> list[Level]:
    errors = torch.rand(4, generator=generator)
    falls = errors.sort().values if convex else errors
    return [Level(4 * (4 - n), float(falls[: n + 1].sum()), n / 4) for n in range(4)]


@pytest.mark.parametrize("convex", [True, False])
def test_budget_is_kept_and_shared_out_well(convex):
    generator = torch.Generator().manual_seed(0)
    for _ in range(40):
        parts = [levels_of(generator, convex) for _ in range(4)]
        for budget in (16, 28, 40, 64):
            chosen = [levels[int(4 * s)] for levels, s in zip(parts, shared_out(parts, budget), strict=True)]
            assert sum(level.channels for level in chosen) <= budget
            best = min(
                sum(level.error for level in found)
                for found in itertools.product(*parts)
                if sum(level.channels for level in found) <= budget
            )
            # Steps along the hull are best for their own sum of channels; the last one may not fit.
            steps = [high.error - low.error for levels in parts for low, high in itertools.pairwise(levels)]
            assert sum(level.error for level in chosen) <= best + (1e-9 if convex else max(steps))


def test_search_beats_the_uniform_setting_at_equal_channels():
    """One layer whose queries look at few channels, one whose look at all; values that are all alike."""
    layers = {"uneven": inputs(spread=4.0), "even": inputs(spread=0.0)}
    method = KVPrune(key_sparsity=0.5, value_sparsity=0.5, search="loss")
    settled = method.settled(
        {name: method.statics(given) for name, given in layers.items()}, dict.fromkeys(layers, 0.1)
    )
    kept = 0
    errors = {"uniform": 0.0, "searched": 0.0}
    for index, (name, statics) in enumerate(settled.items()):
        assert sorted(statics) == ["key_sparsity", "query_weight", "value_sparsity"]
        test = inputs(5 + index, spread={"uneven": 4.0, "even": 0.0}[name])
        for how, codec in {
            "uniform": replace(method, search="off").codec(statics),
            "searched": method.codec(statics),
        }.items():
            key, value = codec.rounded(test.key, test.value)
            key[:, :, :4], value[:, :, :4] = test.key[:, :, :4], test.value[:, :, :4]
            exact = output_of(test)
            lost = output_of(replace(test, key=key, value=value)) - exact
            errors[how] += float(lost.square().sum() / exact.square().sum())
        layout = method.codec(statics).layout(16, 16)
        kept += layout.keys.kept + layout.values.kept
    assert kept <= 4 * 8
    assert errors["searched"] < 0.9 * errors["uniform"], errors
    assert settled["uneven"]["key_sparsity"] != settled["even"]["key_sparsity"]


def test_layers_count_by_the_root_of_their_share():
    """Of two layers that lose alike, the choice is the best one by roots of shares, and not the best by shares."""
    method = plain(search="loss", key_sparsity=0.6, value_sparsity=0.6)
    shares, shape = {"much": 1.0, "little": 0.04}, torch.tensor([[1, 40], [1, 40]])
    errors = torch.tensor([[level**3 for level in method.levels]] * 2, dtype=torch.float64)
    settled = method.settled({name: {"shape": shape, "errors": errors} for name in shares}, shares)
    found = [float(settled[name][part]) for name in shares for part in ("key_sparsity", "value_sparsity")]
    budget = 4 * kept_channels(0.6, 40)

    def best(weights: list[float]) -> float:
        known = [
            sum(weight * level**3 for weight, level in zip(weights, levels, strict=True))
            for levels in itertools.product(method.levels, repeat=4)
            if sum(kept_channels(level, 40) for level in levels) <= budget
        ]
        return min(known)

    for power, is_best in ((0.5, True), (1.0, False)):
        weights = [share**power for share in shares.values() for _ in range(2)]
        reached = sum(weight * level**3 for weight, level in zip(weights, found, strict=True))
        assert (reached <= best(weights) * (1 + 1e-9)) is is_best


def test_layers_that_add_little_give_most():
    method = KVPrune(search="loss")
    measured = {name: method.statics(inputs()) for name in ("much", "little")}
    settled = method.settled(measured, {"much": 0.5, "little": 0.01})
    for part in ("key_sparsity", "value_sparsity"):
        assert settled["much"][part] < settled["little"][part]
    with pytest.raises(ValueError, match="little is given no hidden states"):
        method.settled(measured, {"much": 0.5})


def test_shares_are_those_of_tokens_beside_what_they_are_added_to():
    model = tiny("llama")
    given, added = [], []
    layer = model.model.layers[1]
    hooks = [
        layer.register_forward_hook(lambda module, args, output: given.append(args[0])),
        layer.self_attn.register_forward_hook(lambda module, args, output: added.append(output[0])),
    ]
    with measured_shares(model, cacheable_modules(model)) as shares:
        model(TOKENS)
    assert list(shares) == list(cacheable_modules(model))
    wanted = (added[0].square().sum(-1) / given[0].square().sum(-1)).mean()
    assert shares["model.layers.1.self_attn"] == pytest.approx(float(wanted), rel=1e-5)
    for hook in hooks:
        hook.remove()
    assert not layer._forward_hooks and not layer.self_attn._forward_hooks


def test_errors_are_those_of_one_part_alone_without_the_sinks():
    given = inputs()
    method = KVPrune(search="loss", key_sparsity=0.0, value_sparsity=0.75)
    weight = mean_sizes(given.query, 2)
    errors = pruning_errors(given, method, weight)
    assert errors.shape == (2, len(method.levels)) and method.levels[0] == 0.0
    # Nothing is left out at 0, and only rounded to bf16: some 2⁻⁹ of every number.
    assert (errors[:, 0] < 1e-4).all() and (errors.diff(dim=1) >= 0).all()
    louder = replace(given, key=given.key.clone())
    louder.key[:, :, 0] = torch.randn(16) * 300
    dense = pruning_errors(louder, replace(method, sink_tokens=1), weight)
    coded = pruning_errors(louder, replace(method, sink_tokens=0), weight)
    assert dense[0, -1] < coded[0, -1]


def test_mistakes_are_named():
    given = inputs()
    store = TokenStore(KVPrune(), statics={"query_weight": torch.ones(3, 6)})
    x = torch.randn(2, 3, 10, 8)
    with pytest.raises(ValueError, match="calibrated for 3 KV heads of 6 channels, and 3 of 8 come"):
        store.append(x, x)
    for method in (KVPrune(), plain(search="loss")):
        with pytest.raises(KeyError):
            method.codec({})
    with pytest.raises(ValueError, match=r"sparsity 1\.5 is no share of channels"):
        codec = plain(search="loss").codec({part: torch.tensor([1.5]) for part in ("key_sparsity", "value_sparsity")})
        codec.check(1, 8, 8)
    given.value[0, 0, 20, 3] = torch.nan
    with pytest.raises(ValueError, match="NaN or infinite on the calibration text"):
        KVPrune().statics(given)


def test_rooms_share_the_slot():
    found = kv_cache_methods()
    assert found["kv_prune"] is KVPrune and {"kv_fp8", "kv_int4", "kv_pq"} < set(found)
