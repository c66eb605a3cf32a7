"""Expanded INT4 weights: folding against FP64 and its bound; the Triton kernel equals its references bit for bit."""

import functools

import pytest
import torch
from interpreter_cases import interpreter_results, needs_triton
from kernel_cases import BF16, FP16, FP32, INT4_GPU_CASES, Case, poisoned, same_bits, skip_below
from torch import Tensor

from kompakt.kernels.activations import E4M3_MAX, FP8_CAPABILITY
from kompakt.kernels.int4_expand import expand_16bit, expand_fp8, fold_ref
from kompakt.kernels.int4_linear import dequantize_int4
from kompakt.kernels.packing import unpack_int4

KERNEL = "kompakt.kernels.int4_expand_triton"
CASES = {
    "1 of everything": Case((), 1, 1),
    "group 2": Case((), 100, 9, 50),
    "three groups": Case((), 288, 10, 96, FP16),
    "group 32, fp16": Case((), 160, 17, 32, FP16, FP16),
    "group 128, fp32": Case((), 384, 8, 128, BF16, FP32),
    "group 256": Case((), 1536, 3, 256),
    "in no multiple of 8": Case((), 1158, 11, 0, BF16, FP32),
    "two blocks of 1024": Case((), 1160, 9, 290),
    "many groups": Case((), 2080, 2, 32),
}


def make(case: Case, device: str = "cpu", *, strided: bool = False) -> tuple[Tensor, Tensor]:
    """weight_packed and weight_scale; where there is room, one row of zero scales and one with a single scale left."""
    _, packed, scale, _ = case.make(device)
    if len(scale) > 2:
        scale[1] = 0.0
        scale[2, 1:] = 0.0
    if strided:
        packed = torch.cat((packed, torch.full_like(packed, 0x12345678)), dim=1)[:, : packed.shape[1]]
        scale = torch.cat((scale, torch.full_like(scale, 9.0)), dim=1)[:, : scale.shape[1]]
    return packed, scale


def channels(codes: Tensor, in_features: int) -> Tensor:
    """(out, 2·bytes) even and odd planes → (out, in_features) in order; what is left over must be zero."""
    ordered = codes.unflatten(1, (2, -1)).transpose(1, 2).flatten(1)
    assert (ordered.view(torch.uint8)[:, in_features:] == 0).all()
    return ordered[:, :in_features]


def exact_weight(packed: Tensor, scale: Tensor, in_features: int) -> Tensor:
    codes = unpack_int4(packed, in_features).double()
    return codes * scale.double().repeat_interleave(in_features // scale.shape[1], dim=1)


@pytest.mark.parametrize("name", CASES)
def test_folding_against_fp64(name):
    case = CASES[name]
    packed, scale = make(case)
    codes, row_scale = fold_ref(packed, scale, case.in_features)
    assert codes.shape == (case.out_features, 8 * packed.shape[1]) and codes.dtype == torch.float8_e4m3fn
    assert row_scale.shape == (case.out_features, 1) and row_scale.dtype == torch.float32
    folded = channels(codes, case.in_features).double() * row_scale.double()
    exact = exact_weight(packed, scale, case.in_features)
    if case.groups == 1:
        assert torch.equal(folded, exact) and torch.equal(row_scale, scale.float())
        return
    # Half a step of e4m3, which is 2⁻⁴ of a normal value and 2⁻¹⁰ among subnormals; three FP32 roundings before it.
    half_step = torch.maximum(exact.abs() * 2**-4, 2**-10 * row_scale.double())
    assert ((folded - exact).abs() <= half_step * (1 + 2**-10)).all()
    assert (codes.float().abs() <= E4M3_MAX).all()
    largest = scale.double().abs().amax(dim=1)
    expected = torch.where(largest == 0, 1.0, largest * 8 / E4M3_MAX)
    assert ((row_scale.double().squeeze(1) - expected).abs() <= expected * 2**-23).all()


def test_rms_error_of_folding():
    """2.7 % of the weights' root mean square, for scales that differ as those of real layers do."""
    generator = torch.Generator().manual_seed(0)
    case = Case((), 4096, 64, 128)
    packed, _ = make(case)
    scale = (0.2 * torch.randn((64, 32), generator=generator)).exp() * 0.01
    codes, row_scale = fold_ref(packed, scale, 4096)
    exact = exact_weight(packed, scale, 4096)
    error = channels(codes, 4096).double() * row_scale.double() - exact
    relative = (error.square().mean() / exact.square().mean()).sqrt().item()
    assert 0.022 < relative < 0.030, relative


def check_fp8(case: Case, *, strided: bool = False, interpret: bool, device: str = "cpu") -> None:
    packed, scale = make(case, device, strided=strided)
    with poisoned():
        codes, row_scale = expand_fp8(packed, scale, case.in_features, interpret=interpret)
    expected, expected_scale = fold_ref(packed, scale, case.in_features)
    assert same_bits(row_scale, expected_scale), "row scale"
    assert same_bits(codes, expected), "codes"


def check_16bit(case: Case, dtype: torch.dtype, *, strided: bool = False, interpret: bool, device: str = "cpu") -> None:
    packed, scale = make(case, device, strided=strided)
    with poisoned():
        weight = expand_16bit(packed, scale, case.in_features, dtype, interpret=interpret)
    assert same_bits(weight, dequantize_int4(packed, scale, case.in_features, dtype))


INTERPRETER_CASES = {
    **{f"fp8, {name}": functools.partial(check_fp8, case, interpret=True) for name, case in CASES.items()},
    **{f"bf16, {name}": functools.partial(check_16bit, case, BF16, interpret=True) for name, case in CASES.items()},
    "fp16, three groups": functools.partial(check_16bit, CASES["three groups"], FP16, interpret=True),
    "fp16, in no multiple of 8": functools.partial(check_16bit, CASES["in no multiple of 8"], FP16, interpret=True),
    "fp8, strided": functools.partial(check_fp8, CASES["three groups"], strided=True, interpret=True),
    "bf16, strided": functools.partial(check_16bit, CASES["three groups"], BF16, strided=True, interpret=True),
}
MUTATIONS = {
    "code offset": ("- 1032.0", "- 1031.0", "fp8, group 256"),
    "planes swapped": ("low, high = codes_of", "high, low = codes_of", "fp8, group 256"),
    "channels swapped": ("tl.interleave(low, high)", "tl.interleave(high, low)", "bf16, group 2"),
    "group ignored": ("part * PART // group_size", "0 * part", "fp8, group 128, fp32"),
    "second block's groups": ("tl.program_id(1) * PARTS + tl.arange", "tl.arange", "bf16, many groups"),
    "largest scale's sign": ("tl.max(tl.abs(scales), axis=1)", "tl.max(scales, axis=1)", "fp8, group 32, fp16"),
    "zero rows": ("tl.where(amax == 0.0, 1.0, ", "tl.where(amax < 0.0, 1.0, ", "fp8, three groups"),
    "row scale": ("8.0 / 448.0", "7.0 / 448.0", "fp8, group 256"),
    "fill of the last word, even": ("tl.where((2 * byte < in_features)[None, :], low, 0.0)", "low", "fp8, group 2"),
    "fill of the last word, odd": ("2 * byte + 1 < in_features", "2 * byte < in_features + 9", "fp8, group 2"),
    "row stride": ("n[:, None] * stride_packed", "n[:, None] * row_bytes", "fp8, strided"),
    "scale stride": ("n[:, None] * stride_scale", "n[:, None] * groups", "bf16, strided"),
    "last row": ("inside_n = n < out_features", "inside_n = n < out_features - 1", "fp8, group 2"),
    "last byte": ("byte < row_bytes", "byte < row_bytes - 1", "fp8, in no multiple of 8"),
}


@needs_triton
@pytest.mark.parametrize("name", [*INTERPRETER_CASES, *MUTATIONS])
def test_kernel_in_interpreter(name):
    assert interpreter_results(__file__)[name] == ""


GPU_CASES = {**CASES, **{f"linear, {name}": case for name, case in INT4_GPU_CASES.items()}}


@pytest.mark.gpu
@pytest.mark.parametrize("strided", [False, True], ids=["contiguous", "strided"])
@pytest.mark.parametrize("name", GPU_CASES)
def test_kernels_on_gpu(name, strided):
    skip_below(FP8_CAPABILITY)
    case = GPU_CASES[name]
    check_fp8(case, strided=strided, interpret=False, device="cuda")
    for dtype in (BF16, FP16):
        check_16bit(case, dtype, strided=strided, interpret=False, device="cuda")
