"""FP8 linear layers: references against FP64, dispatch, and torch._scaled_mm held to the same bound on a GPU."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from kompakt.kernels.activations import cuda_refusal, quantize_fp8_ref
from kompakt.kernels.fp8_linear import fp8_linear, fp8_op, fp8_ref, fp8_w8a16_linear
from kompakt.kernels.int4_linear import linear_backend

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
# _scaled_mm promotes its accumulator to FP32, but not after every instruction: see the bound in test_int4_linear.py.
FP8_ACCUMULATOR = 2.0**-10


@dataclass(frozen=True)
class Case:
    """One FP8 linear layer."""

    tokens: tuple[int, ...]
    in_features: int
    out_features: int
    dtype: torch.dtype = BF16
    scale_dtype: torch.dtype = FP32
    bias: bool = False
    transposed: bool = False

    def make(self, device: str = "cpu") -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """x, weight, weight_scale, bias, with a zero row, an outlier, large rows and negative scales."""
        generator = torch.Generator().manual_seed(self.in_features + 7 * self.out_features)
        x = torch.randn((*self.tokens, self.in_features), generator=generator)
        rows = x.view(-1, self.in_features)
        if len(rows) > 3:
            rows[1], rows[2, -1], rows[3] = 0.0, 3e3, rows[3] * 100
        x = x.to(self.dtype).to(device)
        if self.transposed:
            x = x.transpose(0, -2).contiguous().transpose(0, -2)
        weight = (torch.randn((self.out_features, self.in_features), generator=generator) * 60).clamp(-448, 448)
        scale = (torch.randn((self.out_features, 1), generator=generator) * 1e-3).to(self.scale_dtype)
        bias = torch.randn(self.out_features, generator=generator).to(self.dtype).to(device) if self.bias else None
        return x, weight.to(torch.float8_e4m3fn).to(device), scale.to(device), bias


CASES = {
    "1 of everything": Case((1,), 1, 1, bias=True),
    "no tokens": Case((2, 0), 64, 32),
    "no batch dimension": Case((), 64, 48),
    "odd everything": Case((3, 5), 65, 33, FP16, BF16, bias=True, transposed=True),
    "bf16": Case((17,), 576, 192, bias=True),
    "fp16": Case((5,), 128, 64, FP16, FP16, bias=True),
    "fp32": Case((2, 9), 1536, 80, FP32, bias=True, transposed=True),
    "out no multiple of 16": Case((4,), 64, 72),
}


def check(case: Case, inputs: tuple, y: Tensor, *, quantized: bool) -> None:
    """At most twice the error of the reference, plus eight FP32 roundings of Σ|terms|; on a GPU its sum too."""
    assert y.shape == (*case.tokens, case.out_features) and y.dtype == case.dtype
    exact, magnitude = exact_result(inputs, quantized)
    reference = fp8_ref(*inputs) if quantized else fp8_w8a16_linear(*inputs)
    accumulator = FP8_ACCUMULATOR if quantized and y.is_cuda else 0.0
    if y.numel():
        allowed = 2 * (reference.double() - exact).abs().amax(dim=-1, keepdim=True)
        allowed = allowed + (8 * 2.0**-24 + accumulator) * magnitude
        assert ((y.double() - exact).abs() <= allowed).all()


def exact_result(inputs: tuple, quantized: bool) -> tuple[Tensor, Tensor]:
    """FP64 result over the operands that are multiplied, and Σ|terms|."""
    x, weight, scale, bias = inputs
    dequantized = weight.double() * scale.double()
    if quantized:
        x8, x_scale = quantize_fp8_ref(x)
        left = x8.double() * x_scale.double()
    else:
        left, dequantized = x.double(), dequantized.to(x.dtype).double()
    offset = torch.zeros((), dtype=torch.float64, device=x.device) if bias is None else bias.double()
    return left @ dequantized.t() + offset, left.abs() @ dequantized.abs().t() + offset.abs()


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("quantized", [True, False], ids=["w8a8", "w8a16"])
def test_reference_against_fp64(name, quantized):
    case = CASES[name]
    inputs = case.make()
    y = (fp8_linear if quantized else fp8_w8a16_linear)(*inputs)
    assert y.shape == (*case.tokens, case.out_features) and y.dtype == case.dtype
    exact, magnitude = exact_result(inputs, quantized)
    eps = torch.finfo(case.dtype).eps
    bias = 0.0 if inputs[3] is None else inputs[3].double().abs() * eps
    allowed = 3 * eps * exact.abs() + bias + (case.in_features + 4) * 2.0**-24 * magnitude
    assert ((y.double() - exact).abs() <= allowed + torch.finfo(case.dtype).tiny).all()


@pytest.mark.parametrize("name", ["odd everything", "bf16", "no tokens", "no batch dimension"])
def test_registered_op(name):
    inputs = CASES[name].make()
    # Not test_schema: to compare its inputs it needs FP8 arithmetic, which torch has not.
    torch.library.opcheck(
        fp8_op, inputs, test_utils=("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    )
    for linear in (fp8_linear, fp8_w8a16_linear):
        compiled = torch.compile(linear, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(*inputs), linear(*inputs))


def test_rows_with_inf_and_nan_come_out_nan():
    x, weight, scale, _ = CASES["bf16"].make()
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
    inputs = CASES[name].make("cuda")
    check(CASES[name], inputs, (fp8_linear if quantized else fp8_w8a16_linear)(*inputs), quantized=quantized)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["bf16", "fp32"])
def test_compiled_and_captured(name):
    inputs = CASES[name].make("cuda")
    expected = fp8_linear(*inputs)
    assert torch.equal(torch.compile(fp8_linear, fullgraph=True)(*inputs), expected)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = fp8_linear(*inputs)
    y.fill_(torch.nan)
    graph.replay()
    assert torch.equal(y, expected)
