"""Product-quantized codes: k-means against scikit-learn, what the maps are for, bytes, and damaged or wrong inputs."""

from __future__ import annotations

from dataclasses import replace
from itertools import chain, pairwise

import pytest
import torch
from pq_cases import pq_statics
from sklearn.cluster import KMeans

from kompakt.compress.cache import TokenStore
from kompakt.kernels.kv_codes import KeyMap
from kompakt.kernels.kv_pages import PAGE
from kompakt.kernels.kv_pq import DAMAGED, PQCodec
from kompakt.quant import kmeans as clustering
from kompakt.quant.kmeans import kmeans, nearest
from kompakt.quant.kv_int4 import mean_and_factors
from kompakt.quant.kv_pq import KVPQ, balanced, maps, second_moments
from kompakt.quant.method import AttentionInputs

pytestmark = pytest.mark.usefixtures("one_thread")


def points(problems: int, count: int, dim: int, seed: int = 0) -> torch.Tensor:
    """Uneven clouds, with a few points far away."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(problems, 12, dim, generator=generator) * 3
    chosen = torch.randint(12, (problems, count), generator=generator)
    x = centres[torch.arange(problems)[:, None], chosen] + 0.4 * torch.randn(problems, count, dim, generator=generator)
    x[:, ::97] *= 5
    return x


def inertia(x: torch.Tensor, centroids: torch.Tensor) -> torch.Tensor:
    """(problems,): squared distances to the nearest centroid, summed."""
    return torch.cdist(x.double(), centroids.double()).amin(dim=-1).square().sum(dim=-1)


@pytest.mark.parametrize(("count", "dim"), [(16, 1), (60, 2), (32, 4)])
def test_as_good_as_scikit_learn(count, dim):
    x = points(3, 1500, dim)
    ours = inertia(x, kmeans(x, count))
    for problem in range(3):
        theirs = [
            KMeans(count, init="k-means++", n_init=1, random_state=seed).fit(x[problem].numpy()).inertia_
            for seed in range(4)
        ]
        # Lloyd's iterations end in some local optimum; ours is to be among those that other seeds lead to.
        assert ours[problem] <= max(theirs) + (max(theirs) - min(theirs))


def test_more_points_than_the_sample(monkeypatch):
    x = torch.randn(2, 1500, 2, generator=torch.Generator().manual_seed(0))
    whole = inertia(x, kmeans(x, 40))
    monkeypatch.setattr(clustering, "SAMPLE", 500)
    assert (inertia(x, kmeans(x, 40)) < 1.2 * whole).all()


def test_blocks_of_other_devices_give_the_same(monkeypatch):
    x, centroids = points(3, 999, 2), points(3, 40, 2, seed=1)
    monkeypatch.setattr(clustering, "DEVICE_SCORES", 10000)
    chosen = clustering.nearest_in_blocks(x, centroids)
    assert torch.equal(chosen, torch.cdist(x.double(), centroids.double()).argmin(dim=-1))
    sums, members = clustering.totals_in_blocks(x, chosen, 40)
    wanted, counts = clustering.totals(x, chosen, 40)
    assert torch.allclose(sums, wanted, rtol=1e-5, atol=1e-3) and torch.equal(members.long(), counts)


def test_same_seed_same_centroids():
    x = points(2, 700, 2)
    assert torch.equal(kmeans(x, 30), kmeans(x, 30))
    assert not torch.equal(kmeans(x, 30), kmeans(x, 30, seed=1))


def test_few_points_and_equal_points():
    x = points(2, 5, 3)
    assert inertia(x, kmeans(x, 20)).max() < 1e-9 * x.square().sum()
    assert torch.equal(kmeans(torch.ones(1, 9, 2), 4), torch.ones(1, 4, 2))
    with pytest.raises(ValueError, match="9 centroids of 0 points"):
        kmeans(torch.zeros(1, 0, 2), 9)
    with pytest.raises(ValueError, match="257 centroids of 5 points"):
        kmeans(x, 257)


def test_nearest_is_the_nearest_up_to_the_bits_that_hold_its_number():
    x, centroids = points(3, 999, 2), points(3, 256, 2, seed=1)
    chosen = nearest(x, centroids)
    distances = torch.cdist(x.double(), centroids.double()).square() / 2
    taken = distances.gather(-1, chosen[..., None])[..., 0]
    scores = (x.double().square().sum(-1) / 2)[..., None] - distances
    # 2⁻¹⁵ of a score is what its last eight bits are worth; the product's own rounding is far less.
    assert (taken - distances.amin(-1) <= 2.0**-14 * scores.abs().amax(-1)).all()
    assert (chosen == distances.argmin(-1)).float().mean() > 0.99


def inputs(tokens: int = 600, seed: int = 0, head_dim: int = 32) -> AttentionInputs:
    """Keys and queries each with a covariance of its own, keys with a mean; first tokens a hundred times as large."""
    generator = torch.Generator().manual_seed(7)
    mixing = torch.randn(2, head_dim, head_dim, generator=generator) * torch.logspace(0.7, -0.7, head_dim)
    looking = torch.randn(2, head_dim, head_dim, generator=generator) * torch.logspace(0.5, -0.5, head_dim)
    mean = torch.randn(2, 1, head_dim, generator=generator) * 3
    generator.manual_seed(seed)
    key = torch.randn(2, 2, tokens, head_dim, generator=generator) @ mixing + mean
    query = torch.randn(2, 2, 2, tokens, head_dim, generator=generator) @ looking[:, None]
    value = torch.randn(2, 2, tokens, head_dim, generator=generator) @ mixing.flip(0)
    key[:, :, :4], value[:, :, :4] = 100 * key[:, :, :4], 100 * value[:, :, :4]
    return AttentionInputs(query.flatten(1, 2), key, value, {})


def logit_error(given: AttentionInputs, key: torch.Tensor) -> float:
    """Mean square error of logits beside their variance, tokens that stay dense left out."""
    query = given.query.unflatten(1, (2, 2))[:, :, :, ::7]
    exact, got = (query @ x[:, :, None, 4:].mT for x in (given.key, key))
    return ((got - exact).square().mean() / (exact - exact.mean(dim=-1, keepdim=True)).square().mean()).item()


def test_maps_make_logits_more_exact_than_anything_per_channel():
    train, test = inputs(3000), inputs(seed=1)
    method = KVPQ()
    codec = method.codec(method.statics(train))
    error = logit_error(test, codec.rounded(test.key, test.value)[0])
    mean, factors = mean_and_factors(train.query, train.key[:, :, 4:])
    for key_map in (KeyMap(mean), KeyMap(mean, factors), KeyMap(mean, factors, rotated=True)):
        mapped = replace(train, query=torch.randn_like(train.query), key=key_map.encode(train.key))
        other = method.codec(method.statics(mapped)).keys
        identity = replace(other, encode=eye_like(other.encode), decode=eye_like(other.decode))
        y = mapped.key[:, :, 4:].transpose(0, 1).flatten(1, 2) - identity.mean[:, None]
        blocks = y.unflatten(-1, (16, 2)).transpose(1, 2).flatten(0, 1)
        identity = replace(identity, centroids=kmeans(blocks, 256).view(2, 16, 256, 2).bfloat16())
        key = key_map.decode(identity.numbers(identity.codes(key_map.encode(test.key))))
        assert error < 0.7 * logit_error(test, key)


def eye_like(x: torch.Tensor) -> torch.Tensor:
    return torch.eye(x.shape[-1]).expand_as(x).contiguous()


def test_error_grows_as_bits_shrink():
    train, test = inputs(3000), inputs(seed=1)
    errors = []
    for bits in (4, 3, 2):
        method = KVPQ(bits=bits)
        key, value = method.codec(method.statics(train)).rounded(test.key, test.value)
        relative = (value - test.value)[:, :, 4:].square().sum() / test.value[:, :, 4:].square().sum()
        errors.append((logit_error(test, key), relative.item()))
    for more, less in pairwise(errors):
        # A bit is worth 6 dB, a factor of 4, at a high rate, and less where codebooks of 256 meet few tokens.
        assert all(2 < b / a < 6 for a, b in zip(more, less, strict=True)), errors


def test_sink_tokens_do_not_enter():
    method, given = KVPQ(), inputs()
    found = method.statics(given)
    for tensor in (given.key, given.value):
        tensor[:, :, :4] *= 7
    assert all(torch.equal(tensor, found[name]) for name, tensor in method.statics(given).items())
    assert not torch.equal(KVPQ(sink_tokens=0).statics(given)["key_mean"], found["key_mean"])
    assert torch.equal(method.statics(given)["key_centroids"], KVPQ(seed=0).statics(given)["key_centroids"])
    assert not torch.equal(KVPQ(seed=1).statics(given)["key_centroids"], found["key_centroids"])


@pytest.mark.parametrize("looks", [True, False])
def test_maps_undo_each_other(looks):
    given = inputs()
    key = given.key.transpose(0, 1).flatten(1, 2)[:, 4:]
    seen = second_moments(given.query.unflatten(1, (2, 2)).permute(1, 0, 2, 3, 4).flatten(1, 3)) if looks else None
    encode, decode = maps(second_moments(key - key.mean(dim=1, keepdim=True)), seen, 12, 4)
    assert encode.shape == decode.shape == (2, 32, 48)
    assert torch.allclose(encode @ decode.mT, torch.eye(32), atol=1e-5)
    # Channels that no head channel fills are zero in both.
    unused = (encode == 0).all(dim=1)
    assert unused.sum(dim=-1).tolist() == [16, 16] and torch.equal(unused, (decode == 0).all(dim=1))
    y = (key - key.mean(dim=1, keepdim=True)) @ encode
    correlation = torch.stack([torch.corrcoef(part[:, ~empty].T) for part, empty in zip(y, unused, strict=True)])
    assert (correlation - torch.eye(32)).abs().max() < 0.02


def test_variances_are_balanced():
    variances = torch.logspace(3, -3, 32)[torch.randperm(32, generator=torch.Generator().manual_seed(0))]
    for groups, sizes in ((16, [2] * 16), (8, [4] * 8), (12, [3] * 8 + [2] * 4)):
        found = balanced(variances, groups)
        assert sorted(chain(*found)) == list(range(32)) and [len(group) for group in found] == sizes
        if 32 % groups == 0:
            products = torch.tensor([variances[group].log().sum() for group in found])
            assert products.std() < 0.15 * variances.log().std()


@pytest.mark.parametrize(("bits", "times"), [(4, 4.0), (3, 16 / 3), (2, 8.0)])
def test_bytes_are_exactly_those_bits(bits, times):
    store = TokenStore(KVPQ(bits=bits), statics=pq_statics(3, 64, 64, bits=bits))
    x = torch.randn(2, 3, 1000, 64, dtype=torch.bfloat16)
    store.append(x, x)
    sizes, pages = store.nbytes(), 768 // PAGE
    assert sizes.codes == pages * PAGE * 2 * 2 * 3 * 64 * bits // 8 and sizes.scales == 0
    assert 2 * x[:, :, :768].nbytes / sizes.codes == times
    assert 8 * sizes.codes / store.page_elements == bits
    assert store.pool is not None
    tensors = [*store.pool.blocks, store.key, store.value, store.sink_key, store.sink_value]
    assert sizes.total == sum(tensor.untyped_storage().nbytes() for tensor in tensors)


@pytest.mark.parametrize("bits", [4, 3, 2])
@pytest.mark.parametrize("dims", [(64, 64), (8, 16), (96, 80)], ids=str)
def test_codes_are_the_nearest_and_pages_give_them_back(bits, dims):
    codec = KVPQ(bits=bits).codec(pq_statics(2, *dims, bits=bits))
    key, value = torch.randn(3, 2, PAGE, dims[0]), torch.randn(3, 2, PAGE, dims[1])
    page = codec.layout(*dims).page(torch.randint(0, 255, (3, 2, codec.layout(*dims).record_bytes), dtype=torch.uint8))
    for place in (slice(0, 3), slice(3, 70), slice(70, PAGE)):
        page.write(place, codec.encode_keys(key[:, :, place]), codec.encode_values(value[:, :, place]))
    for (codes, nothing), x, quantizer in zip(page.read(), (key, value), (codec.keys, codec.values), strict=True):
        assert torch.equal(codes, quantizer.codes(x)) and nothing.numel() == 0
        y = quantizer.mapped(x).unflatten(-1, (-1, quantizer.centroids.shape[-1]))
        centroids = quantizer.centroids.float()
        centroids[:, 0, DAMAGED] = 1e9
        distances = (y[..., None, :] - centroids[:, None]).square().sum(-1)
        taken = distances.gather(-1, codes.long()[..., None])[..., 0]
        assert (taken <= distances.amin(-1) + 1e-4).all()
    expected = codec.rounded(key, value)
    assert torch.equal(codec.decode_keys(page.read()[0]), expected[0])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_damaged_token_comes_back_as_nan_and_alone(bad):
    codec = KVPQ().codec(pq_statics(1, 8, 8))
    x = torch.randn(1, 1, 4, 8)
    clean = codec.decode_keys(codec.encode_keys(x))
    x[0, 0, 2, 5] = bad
    got = codec.decode_keys(codec.encode_keys(x))
    assert got[0, 0, 2].isnan().all()
    assert torch.equal(got[:, :, [0, 1, 3]], clean[:, :, [0, 1, 3]]) and clean.isfinite().all()


def test_mistakes_are_named():
    with pytest.raises(ValueError, match="head_dim 6 at 2 bits is no whole number of bytes"):
        KVPQ(bits=2).blank_statics(1, 6)
    store = TokenStore(KVPQ(), statics=pq_statics(3, 6, 6))
    x = torch.randn(2, 3, 10, 8)
    with pytest.raises(ValueError, match="calibrated for keys of 3 KV heads of 6 channels, and 3 of 8 come"):
        store.append(x, x)
    with pytest.raises(ValueError, match="32 sub-vectors of 64 channels are no codes of 2 bits"):
        KVPQ(bits=2).codec(pq_statics(1, 64, 64, bits=4))
    with pytest.raises(ValueError, match="do not go with a mean of 1 KV heads"):
        PQCodec(4, *(replace(part, decode=part.decode[:, 1:]) for part in [KVPQ().codec(pq_statics(1, 8, 8)).keys] * 2))
    with pytest.raises(KeyError):
        KVPQ().codec({})
    given = inputs(50)
    given.value[0, 0, 20, 3] = torch.nan
    with pytest.raises(ValueError, match="NaN or infinite on the calibration text"):
        KVPQ().statics(given)


@pytest.mark.gpu
def test_gpu_trains_as_a_cpu_does():
    x = points(3, 9000, 2)
    here, there = kmeans(x, 64), kmeans(x.cuda(), 64)
    assert torch.equal(there, kmeans(x.cuda(), 64))
    assert (inertia(x, there.cpu()) < 1.1 * inertia(x, here)).all()
