"""FP8 linear layers: references against FP64, dispatch, and torch._scaled_mm held to the same bound on a GPU."""

import pytest
import torch
from kernel_cases import (
    FP8_ACCUMULATOR,
    FP16,
    FP32,
    Case,
    check_compiled_and_captured,
    check_error,
    check_reference,
    exact_product,
    quantized_rows,
)
from torch import Tensor

from kompakt.kernels.activations import cuda_refusal
from kompakt.kernels.fp8_linear import fp8_linear, fp8_op, fp8_ref, fp8_w8a16_linear
from kompakt.kernels.int4_linear import linear_backend

CASES = {
    "1 of everything": Case((1,), 1, 1, scale_dtype=FP32, bias=True),
    "no tokens": Case((2, 0), 64, 32, scale_dtype=FP32),
    "no batch dimension": Case((), 64, 48, scale_dtype=FP32),
    "odd everything": Case((3, 5), 65, 33, dtype=FP16, bias=True, layout="transposed"),
    "bf16": Case((17,), 576, 192, scale_dtype=FP32, bias=True),
    "fp16": Case((5,), 128, 64, dtype=FP16, scale_dtype=FP16, bias=True),
    "fp32": Case((2, 9), 1536, 80, dtype=FP32, scale_dtype=FP32, bias=True, layout="transposed"),
    "strided": Case((9,), 96, 16, scale_dtype=FP32, layout="strided"),
    "out no multiple of 16": Case((4,), 64, 72, scale_dtype=FP32),
}


def exact_result(inputs: tuple, quantized: bool) -> tuple[Tensor, Tensor]:
    """FP64 result over the operands that are multiplied, and Σ|terms|."""
    x, weight, scale, bias = inputs
    dequantized = weight.double() * scale.double()
    if quantized:
        return exact_product(quantized_rows(x), dequantized, bias)
    return exact_product(x.double(), dequantized.to(x.dtype).double(), bias)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("quantized", [True, False], ids=["w8a8", "w8a16"])
def test_reference_against_fp64(name, quantized):
    case = CASES[name]
    inputs = case.make_fp8()
    y = (fp8_linear if quantized else fp8_w8a16_linear)(*inputs)
    check_reference(case, y, *exact_result(inputs, quantized), inputs[3])


@pytest.mark.parametrize("name", ["odd everything", "bf16", "no tokens", "no batch dimension"])
def test_registered_op(name):
    inputs = CASES[name].make_fp8()
    # Not test_schema: to compare its inputs it needs FP8 arithmetic, which torch has not.
    torch.library.opcheck(
        fp8_op, inputs, test_utils=("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    )
    for linear in (fp8_linear, fp8_w8a16_linear):
        compiled = torch.compile(linear, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(*inputs), linear(*inputs))


def test_rows_with_inf_and_nan_come_out_nan():
    x, weight, scale, _ = CASES["bf16"].make_fp8()
    clean = fp8_linear(x, weight, scale)
    x[0, 5], x[3, 127] = torch.nan, torch.inf
    y = fp8_linear(x, weight, scale)
    assert y[[0, 3]].isnan().all() and torch.equal(y[4:], clean[4:])


def test_backend_on_cpu():
    backend = linear_backend("fp8_linear", "cpu")
    assert backend.name == "reference" and "cpu" in backend.reason


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 60)}, "60 features"),
        ({"x": torch.zeros(2, 64, dtype=torch.float64)}, "torch.float64"),
        ({"weight": torch.zeros(4, 64)}, "weight has dtype torch.float32"),
        ({"weight_scale": torch.ones(4)}, r"\(4, 1\)"),
        ({"weight_scale": torch.ones(1, 4)}, r"\(4, 1\)"),
        ({"bias": torch.zeros(4, dtype=torch.int32)}, "floating"),
        ({"weight_scale": torch.ones(4, 1, device="meta")}, "one device"),
    ],
)
@pytest.mark.parametrize("linear", [fp8_linear, fp8_w8a16_linear])
def test_wrong_arguments_are_refused(linear, change, message):
    good = {
        "x": torch.zeros(2, 64),
        "weight": torch.zeros(4, 64).to(torch.float8_e4m3fn),
        "weight_scale": torch.ones(4, 1),
    }
    linear(**good)
    with pytest.raises(ValueError, match=message):
        linear(**{**good, **change})


@pytest.mark.gpu
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("quantized", [True, False], ids=["w8a8", "w8a16"])
def test_on_gpu(name, quantized):
    if quantized and (refusal := cuda_refusal("cuda", (8, 9))) is not None:
        pytest.skip(refusal)
    inputs = CASES[name].make_fp8("cuda")
    exact, magnitude = exact_result(inputs, quantized)
    # _scaled_mm promotes its accumulator to FP32, but not after every instruction.
    accumulator = FP8_ACCUMULATOR * magnitude if quantized else 0.0
    y = (fp8_linear if quantized else fp8_w8a16_linear)(*inputs)
    check_error(y, (fp8_ref if quantized else fp8_w8a16_linear)(*inputs), exact, magnitude, accumulator)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["bf16", "fp32"])
def test_compiled_and_captured(name):
    check_compiled_and_captured(fp8_linear, CASES[name].make_fp8("cuda"))
