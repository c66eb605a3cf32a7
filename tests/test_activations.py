"""Per-token FP8 quantization: the reference against FP64, the Triton kernel against the reference, bit for bit."""

import functools
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch

from kompakt.kernels.activations import (
    E4M3_MAX,
    MIN_SCALE,
    cuda_refusal,
    quantize_fp8,
    quantize_fp8_op,
    quantize_fp8_per_token,
    quantize_fp8_ref,
    triton_refusal,
)

KERNEL = "kompakt.kernels.activations_triton"
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
SHAPES = [(1, 1), (5, 7), (3, 63), (0, 16), (2, 3, 100), (4, 128), (2, 1000)]


def make_rows(shape: tuple[int, ...], dtype: torch.dtype, device: str = "cpu") -> torch.Tensor:
    """Random rows; among them, where there is room, zeros, an outlier, large, tiny and subnormal values."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))
    rows = x.view(-1, shape[-1])
    for row, change in zip(
        rows[1:], (lambda r: r.mul_(0), lambda r: r[-1:].fill_(6e4), lambda r: r.mul_(1e4)), strict=False
    ):
        change(row)
    return x.to(dtype).to(device)


def hard_rows(dtype: torch.dtype, device: str = "cpu") -> torch.Tensor:
    """(10, 320): every midpoint between two e4m3 values, subnormals, and rows with inf and NaN."""
    grid = torch.arange(0, 127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    midpoints = (grid[1:] + grid[:-1]) / 2
    values = torch.cat((grid, midpoints, torch.zeros(320 - 253)))
    x = torch.stack((values, -values, values * 2**-6, *torch.randn(7, 320, generator=torch.Generator().manual_seed(0))))
    x[3], x[4] = x[3] * 1e-36, x[4] * 1e-40
    if dtype == torch.bfloat16 and device == "cpu":
        # The interpreter misreads bf16 subnormals.
        x[x.abs() < 2.0**-126] = 0.0
    x[5, 7], x[6, 319], x[7, 0] = torch.inf, -torch.inf, torch.nan
    x[8, 3:5] = torch.tensor([torch.nan, torch.inf])
    return x.to(dtype).to(device)


def poisoned(*args, real_empty=torch.empty, **kwargs) -> torch.Tensor:
    return real_empty(*args, **kwargs).fill_(torch.nan)


def check(x: torch.Tensor, *, interpret: bool) -> None:
    """The kernel must equal the reference in every bit; NaN equals NaN whatever its sign."""
    with mock.patch("torch.empty", poisoned):
        x8, scale = quantize_fp8(x, interpret=interpret)
    expected8, expected_scale = quantize_fp8_ref(x)
    assert x8.shape == x.shape and scale.shape == (*x.shape[:-1], 1)
    assert torch.equal(scale.nan_to_num(-1.0), expected_scale.nan_to_num(-1.0)), "scale"
    assert torch.equal(x8.float().isnan(), expected8.float().isnan()), "NaN codes"
    same = (x8.view(torch.uint8) == expected8.view(torch.uint8)) | x8.float().isnan()
    assert same.all(), f"{(~same).sum()} codes differ"


def strided_rows(dtype: torch.dtype, device: str = "cpu") -> torch.Tensor:
    """(6, 100) with a gap of large values between rows."""
    return torch.full((6, 164), 9e3, dtype=dtype, device=device)[:, :100].copy_(make_rows((6, 100), dtype))


def kernel_inputs(device: str = "cpu") -> dict[str, torch.Tensor]:
    cases = {}
    for name, dtype in DTYPES.items():
        for shape in SHAPES:
            cases[f"{name}-{'x'.join(map(str, shape))}"] = make_rows(shape, dtype, device)
        cases[f"{name}-hard"] = hard_rows(dtype, device)
        cases[f"{name}-strided"] = strided_rows(dtype, device)
        cases[f"{name}-transposed"] = make_rows((64, 9), dtype, device).t()
    return cases


INTERPRETER_CASES = {name: functools.partial(check, x, interpret=True) for name, x in kernel_inputs().items()}
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


@functools.cache
def interpreter_results() -> dict[str, str]:
    """All cases and mutations of this file, in one process: name → "" or what went wrong."""
    command = [sys.executable, str(Path(__file__).with_name("interpreter_cases.py")), __file__]
    # One thread: the tiles are far too small to share out.
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


@needs_triton
@pytest.mark.parametrize("name", INTERPRETER_CASES)
def test_kernel_in_interpreter(name):
    assert interpreter_results()[name] == ""


@needs_triton
@pytest.mark.parametrize("name", MUTATIONS)
def test_broken_kernel_is_caught(name):
    assert interpreter_results()[name] == ""


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
    # The quotient was rounded to FP32 before it was rounded to e4m3.
    assert ((x8.double() - exact).abs() <= best + exact.abs() * 2**-23).all()
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
    if triton_refusal("cuda", (8, 9)) is not None:
        pytest.skip(str(triton_refusal("cuda", (8, 9))))
    check(kernel_inputs("cuda")[name], interpret=False)
    torch.cuda.synchronize()


@pytest.mark.gpu
@pytest.mark.parametrize("in_features", [4096, 14336, 65536, 65537])
def test_long_rows_on_gpu(in_features):
    check(make_rows((9, in_features), torch.bfloat16, "cuda"), interpret=False)
