"""Codes of cached keys and values: error bounds, layout of the bytes, what damaged inputs give, and the map of keys."""

from __future__ import annotations

import pytest
import torch

from kompakt.kernels.kv_codes import (
    KINDS,
    MIN_SCALE,
    KeyMap,
    dequantize_tokens,
    outwards,
    quantize_tokens,
    rotate_channels,
    rotation_block,
    rounded,
)
from kompakt.kernels.kv_pages import PAGE, PageLayout
from kompakt.quant.kv_fp8 import KVFP8
from kompakt.quant.kv_int4 import KVINT4, mean_and_factors, output_error
from kompakt.quant.kv_pq import KVPQ
from kompakt.quant.method import AttentionInputs, kv_cache_methods

EPS = torch.finfo(torch.float32).eps


def tokens(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    """Tokens of very different size, with an outlier channel, a constant token and a token of zeros."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    x = x * torch.logspace(-12, 6, shape[-2])[:, None]
    x[..., 1] *= 50
    x[..., shape[-2] // 2, :] = 0.3
    x[..., -1, :] = 0
    return x.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 1, 2), (2, 3, 17, 64), (1, 2, 5, 96), (3, 1, 130, 18)], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_error_is_that_of_rounding(kind, shape, dtype):
    x = tokens(*shape, dtype=dtype).nan_to_num(posinf=6e4, neginf=-6e4)
    codes, parameters = quantize_tokens(x, kind)
    assert codes.shape == shape and parameters.shape[:-1] == shape[:-1]
    got, exact = dequantize_tokens(codes, parameters, kind).double(), x.double()
    if kind == "bf16":
        assert torch.equal(got, x.bfloat16().double())
        return
    # Half a step; e4m3 has three bits of mantissa and below 2⁻⁶ the step 2⁻⁹. Roundings of quotient and product on top.
    sigma = parameters[..., :1].double()
    bound = sigma / 2 if kind == "int4" else torch.maximum(exact.abs() * 2.0**-4, sigma * 2.0**-10)
    largest = exact.abs().amax(dim=-1, keepdim=True)
    assert ((got - exact).abs() <= bound + 16 * EPS * largest).all()
    if kind == "int4":
        # The step exceeds that of exact ends by the two roundings to bf16, of 2⁻⁷ at most each.
        spread = exact.amax(dim=-1, keepdim=True) - exact.amin(dim=-1, keepdim=True)
        assert (sigma <= (spread + largest * 2.0**-7) / 15 * (1 + 2.0**-7) + MIN_SCALE).all()
    assert (dequantize_tokens(*quantize_tokens(torch.zeros(shape), kind), kind) == 0).all()


def test_ends_round_away_from_each_other():
    x = torch.tensor([1.0, 1.001, -1.001, 0.0, 3e38, -1e-30])
    low, high = outwards(x, down=True), outwards(x, down=False)
    assert (low <= x).all() and (x <= high).all()
    assert torch.equal(low, low.bfloat16().float()) and torch.equal(high, high.bfloat16().float())
    assert torch.equal((high - low)[[0, 3]], torch.zeros(2))
    assert ((high - low) <= x.abs() * 2.0**-7).all()


def test_bytes_of_int4():
    keys = torch.tensor([[15.0, 1.0, 0.0, 3.0, 7.0, 2.0, 0.2, 13.0]])
    codes, parameters = quantize_tokens(keys, "int4")
    assert codes.tolist() == [[15, 1, 0, 3, 7, 2, 0, 13]] and parameters.tolist() == [[1.0, 0.0]]
    page = PageLayout("int4", 8, 8).page(torch.zeros(1, 1, 2048, dtype=torch.uint8))
    page.write(slice(5, 6), (codes[None, None], parameters[None, None]), (codes[None, None], parameters[None, None]))
    # Channel c in the low half, c + 4 in the high one; of values token 5 in the low half, and 69 in the high one.
    assert [f"{byte:02x}" for byte in page.key_codes[0, 0, 5].tolist()] == ["7f", "21", "00", "d3"]
    assert page.value_codes[0, 0, :, 5].tolist() == codes[0].tolist()
    page.write(slice(69, 70), (codes[None, None], parameters[None, None]), (codes[None, None], parameters[None, None]))
    assert page.value_codes[0, 0, :, 5].tolist() == [17 * code for code in codes[0].tolist()]


@pytest.mark.parametrize(("kind", "expected"), [("fp8", 64 + 4), ("int4", 32 + 4), ("bf16", 128)])
def test_bytes_per_token(kind, expected):
    assert PageLayout(kind, 64, 64).record_bytes == PAGE * 2 * expected


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dims", [(64, 64), (6, 10), (96, 2)], ids=str)
def test_pages_give_back_what_was_written_into_them(dims, kind):
    layout = PageLayout(kind, *dims)
    records = torch.randint(0, 255, (3, 2, layout.record_bytes), dtype=torch.uint8)
    page = layout.page(records)
    key, value = torch.randn(3, 2, PAGE, dims[0]), torch.randn(3, 2, PAGE, dims[1])
    for place in (slice(0, 3), slice(3, 70), slice(70, PAGE)):
        page.write(place, *(quantize_tokens(x[:, :, place], kind) for x in (key, value)))
    for x, part in zip((key, value), page.read(), strict=True):
        assert torch.equal(dequantize_tokens(*part, kind), rounded(x, kind))
    again = layout.page(records.clone()).read()
    assert torch.equal(again[1][0].float(), page.read()[1][0].float())


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("kind", ["fp8", "int4"])
def test_damaged_token_comes_back_as_nan_and_alone(kind, bad):
    x = torch.randn(1, 1, 4, 8)
    clean = rounded(x, kind)
    x[0, 0, 2, 5] = bad
    codes, parameters = quantize_tokens(x, kind)
    got = dequantize_tokens(codes, parameters, kind)
    assert got[0, 0, 2].isnan().all() and (codes[0, 0, 2].float() == 0).all()
    keep = [0, 1, 3]
    assert torch.equal(got[:, :, keep], clean[:, :, keep])


def test_mistakes_are_named():
    with pytest.raises(ValueError, match="unknown kind of codes 'int3'; known: fp8, int4, bf16"):
        quantize_tokens(torch.zeros(1, 2), "int3")
    with pytest.raises(ValueError, match="head_dim 7 is odd, and int4 keeps two channels in a byte"):
        PageLayout("int4", 8, 7)
    with pytest.raises(ValueError, match="calibrated for 2 KV heads of 8 channels, and 2 of 6 come"):
        KeyMap(torch.zeros(2, 8)).check(2, 6)


def test_methods_are_found():
    assert kv_cache_methods() == {"kv_fp8": KVFP8, "kv_int4": KVINT4, "kv_pq": KVPQ}
    assert (KVFP8().kind, KVINT4().kind) == ("fp8", "int4")
    assert not KVFP8().needs_data and KVINT4().needs_data and not KVINT4(key_transform="none").needs_data


@pytest.mark.parametrize("head_dim", [6, 64, 80, 96, 128, 192])
def test_map_of_keys_is_undone_and_can_be_given_to_the_queries(head_dim):
    assert head_dim % rotation_block(head_dim) == 0
    key_map = KeyMap(torch.randn(3, head_dim), torch.rand(3, head_dim) + 0.5, rotated=True)
    key, query = torch.randn(2, 3, 5, head_dim), torch.randn(2, 3, 4, head_dim)
    y = key_map.encode(key)
    assert torch.allclose(key_map.decode(y), key, atol=1e-5)
    assert key_map.mean is not None and key_map.factors is not None
    logits = rotate_channels(query * key_map.factors[:, None]) @ y.mT + (query * key_map.mean[:, None]).sum(-1, True)
    assert torch.allclose(logits, query @ key.mT, atol=1e-4)


def inputs(seed: int = 0) -> AttentionInputs:
    """Grouped queries, keys with offsets and channels of different size."""
    torch.manual_seed(seed)
    query = torch.randn(2, 4, 90, 32) * torch.logspace(0.5, -0.5, 32)
    key = torch.randn(2, 2, 90, 32) * torch.logspace(-1, 1, 32)[torch.randperm(32)] + torch.randn(2, 1, 32) * 4
    options = {"causal": True, "window": None, "scaling": 32**-0.5, "softcap": None}
    return AttentionInputs(query, key, torch.randn(2, 2, 90, 32), options)


def test_factors_make_the_error_of_rotated_logits_least():
    given = inputs()
    mean, factors = mean_and_factors(given.query, given.key)
    assert torch.allclose(mean, given.key.mean(dim=(0, 2)), atol=1e-5)
    assert torch.allclose(factors.log().mean(dim=-1), torch.zeros(2), atol=1e-5)
    spread = (given.key - mean[:, None]).square().mean(dim=(0, 2))
    looks = given.query.view(2, 2, 2, 90, 32).square().mean(dim=(0, 2, 3))

    def error(f: torch.Tensor) -> torch.Tensor:
        return (looks * f**2).sum(-1) * (spread / f**2).sum(-1)

    least = error(factors)
    for other in (torch.ones(2, 32), spread.sqrt(), looks.rsqrt(), factors * (1 + 0.1 * torch.rand(2, 32))):
        assert (error(other) > least).all()


def test_what_no_text_reached_has_factors_all_the_same():
    given = inputs()
    given.key[:, 1] = 0
    given.query[:, :, :, 3] = 0
    _, factors = mean_and_factors(given.query, given.key)
    assert (factors.isfinite() & (factors > 0)).all()
    with pytest.raises(ValueError, match="NaN or infinite on the calibration text"):
        mean_and_factors(given.query, given.key * torch.nan)


def test_auto_takes_what_leaves_the_least_error():
    for seed in (0, 1):
        given = inputs(seed)
        errors = {}
        for transform in ("none", "scale", "scale_rotate"):
            method = KVINT4(key_transform=transform)
            statics = method.statics(given)
            errors[transform] = output_error(given, method.key_map(statics))
        chosen = KVINT4().statics(given)
        assert output_error(given, KVINT4().key_map(chosen)) == min(errors.values())
        assert errors["scale_rotate"] < errors["scale"] < errors["none"] / 2
        assert chosen["key_rotated"].tolist() == [1]
    flat = AttentionInputs(given.query, torch.randn(2, 2, 90, 32).round(), given.value, given.options)
    flat.key[:] = torch.randint(0, 15, flat.key.shape)
    flat.key[..., 0], flat.key[..., 1] = 0, 15
    # Integers are coded exactly as they are, and only so.
    assert KVINT4().statics(flat) == {}


def rotary(x: torch.Tensor) -> torch.Tensor:
    """Rotary embedding of (..., tokens, channels)."""
    tokens, dim = x.shape[-2:]
    angle = torch.arange(tokens)[:, None] * 1e6 ** -(torch.arange(0, dim, 2) / dim)
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()), dim=-1)


@pytest.mark.parametrize("pairs", [[5, 30, 50, 62], [10], [62]], ids=str)
def test_a_large_bias_of_the_keys_costs_little(pairs):
    """As Qwen2 has it: a vector of hundreds under keys of 2, turned by the rotary embedding. Taking the turned bias off
    exactly, which asks a reader for its angle at every token, would leave little less error."""
    torch.manual_seed(0)
    bias = torch.zeros(128)
    bias[pairs], bias[[pair + 64 for pair in pairs]] = 300.0, -300.0
    query, key = torch.randn(1, 4, 1024, 128), torch.randn(1, 1, 1024, 128) * 2
    query[..., [*pairs, *(pair + 64 for pair in pairs)]] *= 0.1
    options = {"causal": True, "window": None, "scaling": 128**-0.5, "softcap": None}
    value = torch.randn(1, 1, 1024, 128)
    given = AttentionInputs(rotary(query), rotary(key + bias), value, options)
    plain = AttentionInputs(rotary(query), rotary(key), value, options)
    method = KVINT4()
    error = output_error(given, method.key_map(method.statics(given)))
    assert error < 2 * output_error(plain, method.key_map(method.statics(plain)))
    assert output_error(given, None) > 20 * error
