"""Per-token FP8 quantization: the reference against FP64, the Triton kernel against the reference, bit for bit."""

import functools
import importlib.util
from unittest import mock

import pytest
import torch
from interpreter_cases import interpreter_results, needs_triton
from kernel_cases import DTYPES, hard_rows, kernel_rows, make_rows, poisoned, same_bits, skip_below

from kompakt.kernels.activations import (
    E4M3_MAX,
    FP8_CAPABILITY,
    MIN_SCALE,
    cuda_refusal,
    quantize_fp8,
    quantize_fp8_op,
    quantize_fp8_per_token,
    quantize_fp8_ref,
    triton_refusal,
)

KERNEL = "kompakt.kernels.activations_triton"
SHAPES = [(1, 1), (5, 7), (3, 63), (0, 16), (2, 3, 100), (4, 128), (2, 1000)]


def check(x: torch.Tensor, *, interpret: bool) -> None:
    """The kernel must equal the reference in every bit."""
    with poisoned():
        x8, scale = quantize_fp8(x, interpret=interpret)
    expected8, expected_scale = quantize_fp8_ref(x)
    assert same_bits(scale, expected_scale), "scale"
    assert same_bits(x8, expected8), "codes"


INTERPRETER_CASES = {name: functools.partial(check, x, interpret=True) for name, x in kernel_rows(SHAPES).items()}
MUTATIONS = {
    "mask of the row's tail": ("mask=inside, other=0.0", "mask=column < BLOCK", "bf16-strided"),
    "last value left out": ("column < in_features", "column < in_features - 1", "fp16-4x128"),
    "row stride": ("row * stride_row", "row * in_features", "fp32-strided"),
    "scale": ("constexpr(448.0)", "constexpr(240.0)", "bf16-4x128"),
    "zero rows": ("tl.where(amax == 0.0, 1.0, scale)", "scale", "fp32-5x7"),
    "smallest scale": ("constexpr(2.0**-126)", "constexpr(0.0)", "fp32-hard"),
    "NaN rows": ("tl.where(broken,", "tl.where(amax < 0.0,", "fp16-hard"),
    "ties to even": ("0x7FFFF + ((magnitude >> 20) & 1)", "0x80000", "fp32-hard"),
}


@needs_triton
@pytest.mark.parametrize("name", [*INTERPRETER_CASES, *MUTATIONS])
def test_kernel_in_interpreter(name):
    assert interpreter_results(__file__)[name] == ""


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_reference_rounds_to_nearest(shape, dtype):
    x = make_rows(shape, dtype)
    x8, scale = quantize_fp8_per_token(x)
    assert x8.dtype == torch.float8_e4m3fn and scale.dtype == torch.float32
    exact = x.double() / scale.double()
    grid = torch.arange(0, 127, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
    grid = torch.cat((-grid, grid))
    best = (exact.unsqueeze(-1) - grid).abs().amin(dim=-1)
    # x · (1 / scale) has two FP32 roundings, 2⁻²³ of it; rounding it to the nearest e4m3 value can cost that twice.
    assert ((x8.double() - exact).abs() <= best + exact.abs() * 2**-22).all()
    if x.numel():
        amax = x.double().abs().amax(dim=-1, keepdim=True)
        assert torch.where(amax > 0, (scale.double() * E4M3_MAX / amax - 1).abs() <= 2**-23, scale == 1).all()


def test_reference_hits_both_limits_and_ties_to_even():
    x = torch.tensor([[448.0, -448.0, 1.0625, 1.1875, 2**-10, 3 * 2**-10]])
    x8, scale = quantize_fp8_per_token(x)
    assert scale.item() == 1.0
    assert x8.float().tolist() == [[448.0, -448.0, 1.0, 1.25, 0.0, 2**-8]]


def test_broken_rows_are_nan_and_others_are_untouched():
    x = hard_rows(torch.float32)
    x8, scale = quantize_fp8_per_token(x)
    assert x8[5:9].float().isnan().all() and scale[5:9].isnan().all()
    clean = torch.tensor([0, 1, 2, 3, 4, 9])
    assert x8[clean].float().isfinite().all() and scale[clean].isfinite().all()
    assert (scale[clean] >= MIN_SCALE).all()


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.zeros(2, 8, dtype=torch.int8), "torch.int8"),
        (torch.zeros(2, 8, dtype=torch.float64), "torch.float64"),
        (torch.zeros(2, 0), "K ≥ 1"),
        (torch.tensor(1.0), "K ≥ 1"),
    ],
)
def test_wrong_arguments_are_refused(x, message):
    with pytest.raises(ValueError, match=message):
        quantize_fp8_per_token(x)


def test_refusals_name_their_reason():
    assert "cpu" in str(triton_refusal("cpu", (8, 0)) or "") or importlib.util.find_spec("triton") is None
    with (
        mock.patch("torch.cuda.is_available", return_value=True),
        mock.patch("torch.cuda.device_count", return_value=1),
        mock.patch("torch.version.hip", None),
        mock.patch("torch.cuda.get_device_capability", return_value=(8, 0)),
    ):
        assert "8.0, the kernel needs 8.9" in str(cuda_refusal.__wrapped__("cuda:0", (8, 9)))
        assert cuda_refusal.__wrapped__("cuda:0", (8, 0)) is None
        assert "no cuda:1, 1 CUDA" in str(cuda_refusal.__wrapped__("cuda:1", (8, 0)))


@pytest.mark.parametrize(
    "x", [make_rows((3, 40), torch.bfloat16), make_rows((2, 3, 17), torch.float32).transpose(0, 1)]
)
def test_registered_op(x):
    torch.library.opcheck(quantize_fp8_op, (x,))
    compiled = torch.compile(quantize_fp8_per_token, fullgraph=True, backend="aot_eager")
    for got, expected in zip(compiled(x), quantize_fp8_ref(x), strict=True):
        assert torch.equal(got.float(), expected.float())


@pytest.mark.gpu
@pytest.mark.parametrize("name", INTERPRETER_CASES)
def test_kernel_on_gpu(name):
    skip_below(FP8_CAPABILITY)
    check(kernel_rows(SHAPES, "cuda")[name], interpret=False)
    torch.cuda.synchronize()


@pytest.mark.gpu
@pytest.mark.parametrize("in_features", [4096, 14336, 65536, 65537])
def test_long_rows_on_gpu(in_features):
    check(make_rows((9, in_features), torch.bfloat16, "cuda"), interpret=False)
