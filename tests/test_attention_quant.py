"""Quantized keys and values: codes against the values they stand for, layout, bounds, and the kernels.

Tolerance: a code is within half a step of its value: of integers σ/2; of e4m3 2⁻⁴ of the value or half its smallest
step, 2⁻¹⁰·σ. FP32 roundings of mean and product add 2⁻²⁰ of the largest value of the tensor.
"""

import functools

import pytest
import scipy.linalg
import torch
from interpreter_cases import interpreter_results, needs_triton
from kernel_cases import BF16, FP16, poisoned, skip_below
from torch import Tensor

from kompakt.kernels.attention_quant import (
    SAMPLED,
    TILE,
    TOKEN_ORDER,
    QuantizedKeys,
    QuantizedValues,
    dequantize_keys,
    dequantize_values,
    padded_tokens,
    padded_width,
    quantize_keys_ref,
    quantize_values_ref,
)

KERNEL = "kompakt.kernels.attention_quant_triton"
KINDS = ("int8", "fp8", "int4")
# tokens, head_dim, value_head_dim, bounds
SHAPES: dict[str, tuple[int, int, int, tuple[tuple[int, int], ...] | None]] = {
    "one token": (1, 16, 32, None),
    "less than a tile": (70, 64, 64, None),
    "odd widths": (133, 80, 96, None),
    "sampled": (SAMPLED * 2 + 77, 64, 128, None),
    "bounds": (300, 64, 64, ((40, 300), (0, 201), (128, 128))),
}


def make(name: str, dtype: torch.dtype = FP16, device: str = "cpu") -> tuple[Tensor, Tensor, Tensor | None]:
    """key, value, bounds: offsets per channel, an outlier, a tile of zeros, NaN outside the bounds."""
    tokens, head_dim, value_dim, bounds = SHAPES[name]
    batch = 1 if bounds is None else len(bounds)
    generator = torch.Generator().manual_seed(tokens)
    key = torch.randn((batch, tokens, 3, head_dim), generator=generator) + 4 * torch.randn(
        (1, 1, 3, head_dim), generator=generator
    )
    value = torch.randn((batch, tokens, 3, value_dim), generator=generator) + 1
    key[0, tokens // 2, 1, 3], value[0, tokens // 2, 1, 3] = 60.0, -70.0
    key[:, TILE : 2 * TILE, 2], value[:, TILE : 2 * TILE, 2] = 0.0, 0.0
    for row, (start, stop) in enumerate(bounds or ()):
        for x in (key, value):
            x[row, :start], x[row, stop:] = torch.nan, torch.nan
    limits = None if bounds is None else torch.tensor(bounds, dtype=torch.int32, device=device)
    return key.transpose(1, 2).to(dtype).to(device), value.transpose(1, 2).to(dtype).to(device), limits


def inside(x: Tensor, bounds: Tensor | None) -> Tensor:
    """(batch, 1, tokens, 1): which tokens count."""
    position = torch.arange(x.shape[2], device=x.device)
    if bounds is None:
        return torch.ones((x.shape[0], 1, x.shape[2], 1), dtype=torch.bool, device=x.device)
    return ((position >= bounds[:, :1]) & (position < bounds[:, 1:]))[:, None, :, None]


def check_mean(x: Tensor, mean: Tensor, valid: Tensor) -> None:
    step = -(-x.shape[2] // SAMPLED)
    sampled = valid & (torch.arange(x.shape[2], device=x.device) % step == 0)[None, None, :, None]
    expected = torch.where(sampled, x.double(), 0).sum(2) / sampled.sum(2).clamp_min(1)
    torch.testing.assert_close(mean.double(), expected, rtol=1e-5, atol=1e-5)


def turned(x: Tensor) -> Tensor:
    """(…, head_dim) FP64 → (…, padded width): scipy's Hadamard matrix in blocks of 64 channels."""
    width = padded_width(x.shape[-1])
    block = min(width, 64)
    matrix = torch.from_numpy(scipy.linalg.hadamard(block)).double().to(x.device) / block**0.5
    return (torch.nn.functional.pad(x, (0, width - x.shape[-1])).unflatten(-1, (-1, block)) @ matrix).flatten(-2)


def check_codes(target: Tensor, decoded: Tensor, scale: Tensor, valid: Tensor, kind: str) -> None:
    """target: what is to be quantized, zeros where not valid; scale: of every token, (batch, heads, tokens)."""
    step = scale.double()[..., None]
    half = 2.0**-4 * target.abs() + 2.0**-10 * step if kind == "fp8" else step / 2
    error = (decoded.double() - target).abs()
    assert (error <= half + 2.0**-20 * target.abs().amax()).all()
    assert not torch.where(valid, 0.0, decoded).any()


def check_keys(key: Tensor, keys: QuantizedKeys, bounds: Tensor | None, kind: str) -> None:
    batch, heads, tokens, head_dim = key.shape
    valid = inside(key, bounds)
    check_mean(key, keys.mean, valid)
    scale = keys.scale if kind == "int4" else keys.scale.repeat_interleave(TILE, dim=2)
    levels = {"int8": 127, "int4": 7, "fp8": 448}[kind]
    target = turned(torch.where(valid, key.double() - keys.mean.double()[:, :, None], 0.0))
    reach = torch.zeros((batch, heads, padded_tokens(tokens)), dtype=torch.float64, device=key.device)
    reach[:, :, :tokens] = target.abs().amax(3)
    if kind != "int4":
        reach = reach.unflatten(2, (-1, TILE)).amax(3).repeat_interleave(TILE, dim=2)
    expected = torch.where(reach == 0, 1.0, reach / levels)
    torch.testing.assert_close(scale.double(), expected, rtol=1e-5, atol=1e-9)
    check_codes(target, dequantize_keys(keys, tokens, kind), scale[:, :, :tokens], valid, kind)
    width = padded_width(head_dim) // (2 if kind == "int4" else 1)
    assert keys.codes.shape == (batch, heads, padded_tokens(tokens), width)
    assert not dequantize_keys(keys, padded_tokens(tokens), kind)[:, :, tokens:].any()


def check_values(value: Tensor, values: QuantizedValues, bounds: Tensor | None) -> None:
    batch, heads, tokens, value_dim = value.shape
    valid = inside(value, bounds)
    check_mean(value, values.mean, valid)
    scale = values.scale.repeat_interleave(TILE, dim=2)[:, :, :tokens]
    target = torch.where(valid, value.double() - values.mean.double()[:, :, None], 0.0)
    check_codes(target, dequantize_values(values, tokens, value_dim), scale, valid, "fp8")
    assert values.codes.shape == (batch, heads, padded_width(value_dim), padded_tokens(tokens))
    assert not dequantize_values(values, padded_tokens(tokens), padded_width(value_dim))[:, :, tokens:].any()


def check_kernel(name: str, kind: str, *, dtype: torch.dtype = FP16, device: str = "cpu", interpret: bool) -> None:
    from kompakt.kernels.attention_quant_triton import quantize_keys_values

    key, value, bounds = make(name, dtype, device)
    with poisoned():
        keys, values = quantize_keys_values(key, value, kind, True, bounds, interpret=interpret)
    assert keys is not None and values is not None
    check_keys(key, keys, bounds, kind)
    check_values(value, values, bounds)


def check_left_out(*, interpret: bool, device: str = "cpu") -> None:
    """What a mode does not quantize is not there."""
    from kompakt.kernels.attention_quant_triton import quantize_keys_values

    key, value, bounds = make("bounds", device=device)
    keys, nothing = quantize_keys_values(key, value, "int8", False, bounds, interpret=interpret)
    assert nothing is None and keys is not None
    check_keys(key, keys, bounds, "int8")
    nothing, values = quantize_keys_values(key, value, None, True, bounds, interpret=interpret)
    assert nothing is None and values is not None
    check_values(value, values, bounds)
    assert quantize_keys_values(key, value, None, False, bounds, interpret=interpret) == (None, None)


def check_not_finite(*, interpret: bool, device: str = "cpu") -> None:
    """A NaN or an infinity makes the scale of its tile NaN, and leaves the other tiles alone."""
    from kompakt.kernels.attention_quant_triton import quantize_keys_values

    for bad in (torch.nan, torch.inf):
        key, value, _ = make("odd widths", device=device)
        # Not among the sampled tokens when there are many; here all are, so the mean of its channel is lost too.
        key[0, 0, 3, 5], value[0, 0, 3, 5] = bad, bad
        keys, values = quantize_keys_values(key, value, "int8", True, None, interpret=interpret)
        assert keys is not None and values is not None
        assert keys.scale[0, 0, 0].isnan() and values.scale[0, 0, 0].isnan()
        assert keys.scale[0, 1:].isfinite().all() and values.scale[0, 1:].isfinite().all()


INTERPRETER_CASES = {
    **{
        f"{kind}, {name}": functools.partial(check_kernel, name, kind, interpret=True)
        for kind in KINDS
        for name in SHAPES
    },
    "left out": functools.partial(check_left_out, interpret=True),
    "not finite": functools.partial(check_not_finite, interpret=True),
}
MUTATIONS = {
    "sampling": ("token = start + tl.arange(0, BLOCK) * step", "token = start + tl.arange(0, BLOCK)", "int8, sampled"),
    "count": ("tl.cdiv(last, step) - tl.cdiv(first, step)", "tl.cdiv(last, step)", "int8, bounds"),
    "mean of another head": ("mean_ptr + place * head_dim + channel", "mean_ptr + channel", "int8, less than a tile"),
    "masked tokens": ("(token >= first) & (token < last)", "(token >= 0) & (token < last)", "int8, bounds"),
    "scale of another tile": (
        "tl.num_programs(0) + tl.program_id(0), scale)",
        "tl.num_programs(0), scale)",
        "fp8, sampled",
    ),
    "halves": ("low | (high << 4)", "high | (low << 4)", "int4, odd widths"),
    "signs": ("common ^= common >> 2", "common ^= common >> 3", "int8, odd widths"),
    "rotation of the mean": ("- rotated_mean(mean, STORED)", "- mean", "int8, less than a tile"),
    "rounding": ("ROUND) - ROUND)", "0.0))", "int8, odd widths"),
    "token order": ("permute(0, 2, 1, 3, 4)", "permute(0, 1, 2, 3, 4)", "int8, odd widths"),
    "NaN": ('tl.where(amax < float("inf"), scale, float("nan"))', "scale", "not finite"),
}


@needs_triton
@pytest.mark.parametrize("name", [*INTERPRETER_CASES, *MUTATIONS])
def test_kernels_in_interpreter(name):
    assert interpreter_results(__file__)[name] == ""


@pytest.mark.parametrize("name", SHAPES)
def test_reference(name):
    key, value, bounds = make(name, BF16)
    for kind in KINDS:
        check_keys(key, quantize_keys_ref(key, kind, bounds), bounds, kind)
    check_values(value, quantize_values_ref(value, bounds), bounds)


def test_token_order_is_that_of_a_thread():
    """Lane q of a quad holds logits 8·a + 2·q + c of every 16; as an FP8 operand it holds four neighbours."""
    held = [[8 * a + 2 * lane + c for a in range(2) for c in range(2)] for lane in range(4)]
    assert [list(TOKEN_ORDER[4 * lane : 4 * lane + 4]) for lane in range(4)] == held


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_kernels_on_gpu(kind, dtype):
    skip_below((8, 9))
    for name in SHAPES:
        check_kernel(name, kind, dtype=dtype, device="cuda", interpret=False)
    check_left_out(interpret=False, device="cuda")
    check_not_finite(interpret=False, device="cuda")
