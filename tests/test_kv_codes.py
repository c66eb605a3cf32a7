"""Codes of cached keys and values: error bounds, layout of the bytes, what damaged inputs give, and channel factors."""

from __future__ import annotations

import pytest
import torch

from kompakt.kernels.kv_codes import KINDS, code_width, dequantize_tokens, quantize_tokens
from kompakt.quant.kv_fp8 import KVFP8
from kompakt.quant.kv_int4 import KVINT4, channel_factors
from kompakt.quant.method import kv_cache_methods

EPS = torch.finfo(torch.float32).eps


def tokens(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    """Tokens of very different size, with an outlier channel and a token of zeros."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    x = x * torch.logspace(-12, 6, shape[-2])[:, None]
    x[..., 1] *= 50
    x[..., -1, :] = 0
    return x.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 1, 2), (2, 3, 17, 64), (1, 2, 5, 96), (3, 1, 130, 18)], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_error_is_that_of_rounding(kind, shape, dtype):
    x = tokens(*shape, dtype=dtype).nan_to_num(posinf=6e4, neginf=-6e4)
    codes, scale = quantize_tokens(x, kind)
    assert codes.shape == (*shape[:-1], code_width(shape[-1], kind))
    assert scale.shape == shape[:-1] and scale.dtype == torch.float32
    got, exact = dequantize_tokens(codes, scale, kind).double(), x.double()
    sigma = scale.double()[..., None]
    # Half a step; e4m3 has three bits of mantissa and below 2⁻⁶ the step 2⁻⁹. Roundings of quotient and product on top.
    bound = sigma / 2 if kind == "int4" else torch.maximum(exact.abs() * 2.0**-4, sigma * 2.0**-10)
    assert ((got - exact).abs() <= bound + 8 * EPS * exact.abs()).all()
    assert (dequantize_tokens(*quantize_tokens(torch.zeros(shape), kind), kind) == 0).all()


@pytest.mark.parametrize("kind", KINDS)
def test_largest_value_keeps_its_size(kind):
    x = tokens(2, 3, 40, 32)
    got = dequantize_tokens(*quantize_tokens(x, kind), kind)
    most, kept = x.abs().amax(dim=-1), got.abs().amax(dim=-1)
    assert torch.allclose(most, kept, rtol=4 * EPS, atol=0)


def test_bytes_of_int4():
    x = torch.tensor([[7.0, -1.0, 0.0, 3.0, -7.0, 2.0, -0.2, -3.0]])
    codes, scale = quantize_tokens(x, "int4")
    assert scale.tolist() == [1.0]
    # Channel c in the low half, c + 4 in the high one; sign in the upper bit of a half, no negative zero.
    assert [f"{byte:02x}" for byte in codes[0].tolist()] == ["f7", "29", "00", "b3"]
    assert dequantize_tokens(codes, scale, "int4").tolist() == [[7.0, -1.0, 0.0, 3.0, -7.0, 2.0, 0.0, -3.0]]


@pytest.mark.parametrize(("kind", "expected"), [("fp8", 64 + 4), ("int4", 32 + 4)])
def test_bytes_per_token(kind, expected):
    codes, scale = quantize_tokens(torch.randn(1, 1, 10, 64), kind)
    assert (codes.nbytes + scale.nbytes) / 10 == expected


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("kind", KINDS)
def test_damaged_token_comes_back_as_nan_and_alone(kind, bad):
    x = torch.randn(1, 1, 4, 8)
    clean = dequantize_tokens(*quantize_tokens(x, kind), kind)
    x[0, 0, 2, 5] = bad
    got = dequantize_tokens(*quantize_tokens(x, kind), kind)
    assert got[0, 0, 2].isnan().all()
    keep = [0, 1, 3]
    assert torch.equal(got[:, :, keep], clean[:, :, keep])


def test_mistakes_are_named():
    with pytest.raises(ValueError, match="unknown kind of codes 'int3'; known: fp8, int4"):
        quantize_tokens(torch.zeros(1, 2), "int3")
    with pytest.raises(ValueError, match="head_dim 7 is odd, and int4 keeps two channels in a byte"):
        quantize_tokens(torch.zeros(1, 7), "int4")
    with pytest.raises(ValueError, match=r"alpha 0\.9 has no effect with channel_scales false"):
        KVINT4(channel_scales=False, alpha=0.9)


def test_methods_are_found():
    assert kv_cache_methods() == {"kv_fp8": KVFP8, "kv_int4": KVINT4}
    assert (KVFP8().kind, KVINT4().kind) == ("fp8", "int4")
    assert not KVFP8().needs_data and KVINT4().needs_data and not KVINT4(channel_scales=False).needs_data


def test_factors_even_channels_out():
    x = torch.randn(2, 3, 50, 16) * torch.logspace(-2, 2, 16)
    x[:, 1, :, 4] = 0
    factors = channel_factors(x, 1.0)
    assert factors.shape == (3, 16)
    assert torch.allclose(factors.log().mean(dim=-1), torch.zeros(3), atol=1e-5)
    even = (x / factors[:, None]).abs().amax(dim=(0, 2))
    even[1, 4] = even[1, 5]
    assert torch.allclose(even, even[:, :1].expand_as(even), rtol=1e-4)
    assert torch.allclose(channel_factors(x, 0.5) ** 2, factors, rtol=1e-4)
    assert torch.equal(channel_factors(torch.zeros(1, 2, 3, 4), 0.5), torch.ones(2, 4))
    with pytest.raises(ValueError, match="NaN or infinite on the calibration text"):
        channel_factors(torch.full((1, 1, 2, 4), torch.nan), 0.5)


@pytest.mark.parametrize(("alpha", "times"), [(0.5, 2), (1.0, 20)])
def test_factors_help_where_a_channel_is_large_in_every_token(alpha, times):
    key = torch.randn(1, 2, 400, 64, generator=torch.Generator().manual_seed(1))
    key[..., 5] += 60
    query = torch.randn(1, 2, 64, 64, generator=torch.Generator().manual_seed(2))
    factors = KVINT4(alpha=alpha).factors(key, key)["key_factors"][:, None]
    exact = query @ key.mT
    errors = []
    for scales in (torch.ones_like(factors), factors):
        coded = dequantize_tokens(*quantize_tokens(key / scales, "int4"), "int4") * scales
        difference = query @ coded.mT - exact
        # A shift of all logits of a query is none.
        errors.append(float((difference - difference.mean(dim=-1, keepdim=True)).square().mean()))
    assert errors[1] < errors[0] / times
