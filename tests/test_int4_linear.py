"""INT4 linear layers: references against FP64, the Triton kernel against the same bound, and its dispatch.

Tolerance, for every token: the largest error of the kernel is at most twice that of the reference, both against FP64,
plus eight FP32 roundings of Σ|terms|, since the two sum in different orders. On a GPU the FP8 accumulator comes on top.
"""

import functools
import importlib.util
import json
import logging
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch import Tensor

from kompakt.kernels import int4_linear as int4
from kompakt.kernels.activations import log_fallback, quantize_fp8_ref, triton_refusal
from kompakt.kernels.int4_linear import dequantize_int4, linear_backend, w4a8_linear, w4a16_linear
from kompakt.kernels.packing import pack_int4

KERNEL = "kompakt.kernels.int4_linear_triton"
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
# A Hopper FP8 accumulator truncates each of 33 addends at 2⁻¹³ of the largest: 33/8 · 2⁻¹³ of Σ|terms| where terms are
# alike, and twice that for rows with outliers.
FP8_ACCUMULATOR = 2.0**-10


@dataclass(frozen=True)
class Case:
    """One linear layer; group 0 is one scale per output row."""

    tokens: tuple[int, ...]
    in_features: int
    out_features: int
    group: int = 0
    dtype: torch.dtype = BF16
    scale_dtype: torch.dtype = BF16
    bias: bool = False
    strided: bool = False

    def make(self, device: str = "cpu") -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """x, weight_packed, weight_scale, bias: half the scales negative, code -8 everywhere, hard rows in x."""
        generator = torch.Generator().manual_seed(self.in_features + 7 * self.out_features + self.group)
        x = torch.randn((*self.tokens, self.in_features), generator=generator)
        rows = x.view(-1, self.in_features)
        if len(rows) > 3:
            rows[1], rows[2, -1], rows[3] = 0.0, 3e3, rows[3] * 100
        x = x.to(self.dtype)
        if self.strided:
            x = torch.full((*self.tokens, self.in_features + 64), 6e4, dtype=self.dtype)[..., : self.in_features].copy_(
                x
            )
        codes = torch.randint(-8, 8, (self.out_features, self.in_features), generator=generator, dtype=torch.int8)
        codes[:, -1] = -8
        groups = self.in_features // self.group if self.group else 1
        scale = torch.randn((self.out_features, groups), generator=generator) * 0.1
        bias = torch.randn(self.out_features, generator=generator).to(self.dtype) if self.bias else None
        scale = scale.to(self.scale_dtype).to(device)
        # copy_ keeps the strides, which .to() would drop.
        x = (
            torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=device).copy_(x)
            if self.strided
            else x.to(device)
        )
        return x, pack_int4(codes).to(device), scale, None if bias is None else bias.to(device)


CASES = {
    "1 of everything": Case((1,), 1, 1, bias=True),
    "no tokens": Case((2, 0), 64, 32, 32),
    "one token": Case((1,), 256, 64, 128, bias=True),
    "no batch dimension": Case((), 64, 33, 32),
    "odd everything": Case((3, 5), 65, 65, bias=True, strided=True),
    "in no multiple of 8": Case((5,), 100, 66, strided=True),
    "group 32": Case((17,), 160, 65, 32, FP16, FP16, bias=True),
    "group 64": Case((4,), 192, 70, 64, FP32, FP32, bias=True),
    "group 128": Case((5,), 384, 129, 128, BF16, FP32),
    "group 96": Case((5,), 288, 40, 96, FP16),
    "group 256": Case((5,), 768, 65, 256, FP32),
    "model width": Case((33,), 576, 192, 64, bias=True),
    "long rows": Case((9,), 1536, 65, 0, FP32, FP16, strided=True),
    "many tokens": Case((130,), 64, 72, 32, FP16),
}
GPU_CASES = {
    **CASES,
    "prefill": Case((2, 1025), 1536, 576, 128, bias=True),
    "decode": Case((16,), 4096, 14336, 128),
    "wide": Case((300,), 8192, 1000, 0, FP16, strided=True),
}


def exact_result(case_inputs: tuple, w4a8: bool) -> tuple[Tensor, Tensor]:
    """FP64 result over the operands that both kernel and reference multiply, and Σ|terms|."""
    x, packed, scale, bias = case_inputs
    if w4a8:
        x8, x_scale = quantize_fp8_ref(x)
        left, dtype = x8.double() * x_scale.double(), FP32
    else:
        left, dtype = x.double(), x.dtype
    weight = dequantize_int4(packed, scale, x.shape[-1], dtype).double()
    offset = torch.zeros((), dtype=torch.float64, device=x.device) if bias is None else bias.double()
    return left @ weight.t() + offset, left.abs() @ weight.abs().t() + offset.abs()


def poisoned(*args, real_empty=torch.empty, **kwargs) -> Tensor:
    return real_empty(*args, **kwargs).fill_(torch.nan)


def check(case: Case, w4a8: bool, *, interpret: bool, device: str = "cpu") -> None:
    """Run the kernel on poisoned outputs and hold it to the tolerance in the module docstring."""
    inputs = case.make(device)
    with mock.patch("torch.empty", poisoned):
        y = (int4.run_w4a8 if w4a8 else int4.run_w4a16)(*inputs, interpret=interpret)
    reference = (int4.w4a8_ref if w4a8 else int4.w4a16_ref)(*inputs)
    assert y.shape == reference.shape == (*case.tokens, case.out_features) and y.dtype == case.dtype
    if y.numel() == 0:
        return
    exact, magnitude = exact_result(inputs, w4a8)
    allowed = 2 * (reference.double() - exact).abs().amax(dim=-1, keepdim=True)
    roundings = 8 * 2.0**-24 + (FP8_ACCUMULATOR if w4a8 and device == "cuda" else 0.0)
    allowed = allowed + roundings * magnitude
    excess = (y.double() - exact).abs() - allowed
    # A NaN left in the output fails the comparison as well.
    assert (excess <= 0).all(), f"exceeds the allowed error by {excess.nan_to_num(torch.inf).max():.3e}"


def check_broken_rows(*, interpret: bool, device: str = "cpu") -> None:
    """Rows with inf or NaN come out NaN, their neighbours as without them."""
    x, packed, scale, _ = Case((5,), 128, 64, 32).make(device)
    clean = int4.run_w4a8(x, packed, scale, interpret=interpret)
    x[0, 5], x[3, 127] = torch.nan, torch.inf
    y = int4.run_w4a8(x, packed, scale, interpret=interpret)
    assert y[[0, 3]].isnan().all() and torch.equal(y[[1, 2, 4]], clean[[1, 2, 4]])


INTERPRETER_CASES = {
    **{f"w4a8, {name}": functools.partial(check, case, True, interpret=True) for name, case in CASES.items()},
    **{f"w4a16, {name}": functools.partial(check, case, False, interpret=True) for name, case in CASES.items()},
    "w4a8, rows with inf and NaN": functools.partial(check_broken_rows, interpret=True),
}
K_TAIL = ("inside_k[:, None] & inside_m", "(k >= 0)[:, None] & inside_m")
MUTATIONS = {
    "tail of K": (*K_TAIL, "w4a8, odd everything"),
    "tail of K, w4a16": (*K_TAIL, "w4a16, in no multiple of 8"),
    "last token": ("inside_m = token < tokens", "inside_m = token < tokens - 1", "w4a8, model width"),
    "last output": ("output < out_features", "output < out_features - 1", "w4a8, group 128"),
    "group ignored": ("block // blocks_per_group", "0 * block", "w4a8, group 64"),
    "group ignored, w4a16": ("block // blocks_per_group", "0 * block", "w4a16, group 64"),
    "blocks of a group": ("triton.cdiv(group_size, config.block_k)", "2", "w4a8, group 96"),
    "missing promote": ("accumulator += product *", "accumulator = (accumulator + product) *", "w4a8, group 32"),
    "scale's sign": ("product * scale[:, None]", "product * tl.abs(scale)[:, None]", "w4a8, long rows"),
    "nibble order": ("tl.arange(0, 8) * 4", "28 - tl.arange(0, 8) * 4", "w4a8, one token"),
    "code offset": ("(BLOCK_N, BLOCK_K)) - 8)", "(BLOCK_N, BLOCK_K)) - 7)", "w4a8, one token"),
    "token scale": ("x_scale_ptr + token,", "x_scale_ptr + 0 * token,", "w4a8, model width"),
    "bias": ("bias_ptr + output,", "bias_ptr + 0 * output,", "w4a16, group 32"),
    "row stride": ("token[None, :] * stride_x", "token[None, :] * in_features", "w4a16, long rows"),
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


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if 0 not in case.tokens])
@pytest.mark.parametrize("w4a8", [True, False], ids=["w4a8", "w4a16"])
def test_reference_against_fp64(name, w4a8):
    case = CASES[name]
    inputs = case.make()
    y = (w4a8_linear if w4a8 else w4a16_linear)(*inputs)
    exact, magnitude = exact_result(inputs, w4a8)
    # One rounding of the result, bias and result roundings of a 16 bit F.linear, and an FP32 sum of in_features terms.
    roundings = 3 * torch.finfo(case.dtype).eps * exact.abs().clamp_min(torch.finfo(case.dtype).tiny)
    bias = 0.0 if inputs[3] is None else inputs[3].double().abs() * torch.finfo(case.dtype).eps
    assert ((y.double() - exact).abs() <= roundings + bias + case.in_features * 2.0**-24 * magnitude).all()


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
def test_dequantize(dtype):
    codes = torch.arange(-8, 8, dtype=torch.int8).repeat(3, 2)
    scale = torch.tensor([[0.1, -0.3], [2.0, 1e-3], [-5.0, 0.0]], dtype=BF16)
    weight = dequantize_int4(pack_int4(codes), scale, 32, dtype)
    expected = (codes.double().view(3, 2, 16) * scale.double().unsqueeze(-1)).view(3, 32)
    assert weight.dtype == dtype and torch.equal(weight, expected.to(dtype))


@pytest.mark.parametrize(
    ("op", "linear"), [(int4.w4a8_op, w4a8_linear), (int4.w4a16_op, w4a16_linear)], ids=["w4a8", "w4a16"]
)
@pytest.mark.parametrize("name", ["odd everything", "group 64", "no tokens", "no batch dimension"])
def test_registered_op(op, linear, name):
    inputs = CASES[name].make()
    torch.library.opcheck(op, inputs)
    compiled = torch.compile(linear, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*inputs), linear(*inputs))


def test_backends_name_their_reason():
    backends = int4.available_backends("cpu")
    assert set(backends) == {"quantize_fp8_per_token", "w4a8_linear", "w4a16_linear", "fp8_linear"}
    assert all(backend.name == "reference" and backend.reason for backend in backends.values())
    assert linear_backend("w4a8_linear", "cpu", interpret=True).name == "triton"
    with pytest.raises(ValueError, match=r"w4a4_linear.*w4a16_linear"):
        linear_backend("w4a4_linear", "cpu")


def test_odd_group_sizes_fall_back_with_one_logged_reason(caplog):
    inputs = Case((2,), 80, 8, 16).make()
    log_fallback.cache_clear()
    with (
        mock.patch.object(int4, "linear_backend", lambda *_, **__: int4.Backend("triton", "pretended")),
        caplog.at_level(logging.WARNING),
    ):
        for _ in range(2):
            assert torch.equal(int4.run_w4a8(*inputs), int4.w4a8_ref(*inputs))
    assert [record.getMessage() for record in caplog.records if "group size 16" in record.getMessage()] != []
    assert len(caplog.records) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 48, dtype=BF16)}, "in_features=48"),
        ({"x": torch.zeros(2, 64, dtype=torch.int32)}, "torch.int32"),
        ({"weight_packed": torch.zeros(4, 8)}, "weight_packed has dtype torch.float32"),
        ({"weight_packed": torch.zeros(4, 9, dtype=torch.int32)}, r"\(4, 9\)"),
        ({"weight_scale": torch.zeros(4, 3)}, "3 groups"),
        ({"weight_scale": torch.zeros(5, 2)}, r"\(5, 2\)"),
        ({"weight_scale": torch.zeros(4)}, "groups = 1"),
        ({"weight_scale": torch.zeros(4, 2, dtype=torch.float64)}, "torch.float64"),
        ({"bias": torch.zeros(3)}, r"\(4,\) floating"),
        ({"bias": torch.zeros(4, device="meta")}, "one device"),
    ],
)
@pytest.mark.parametrize("linear", [w4a8_linear, w4a16_linear])
def test_wrong_arguments_are_refused(linear, change, message):
    good = {
        "x": torch.zeros(2, 64),
        "weight_packed": torch.zeros(4, 8, dtype=torch.int32),
        "weight_scale": torch.ones(4, 2),
    }
    linear(**good)
    with pytest.raises(ValueError, match=message):
        linear(**{**good, **change})


@pytest.mark.gpu
@pytest.mark.parametrize("name", GPU_CASES)
@pytest.mark.parametrize("w4a8", [True, False], ids=["w4a8", "w4a16"])
def test_kernel_on_gpu(name, w4a8):
    refusal = triton_refusal("cuda", (8, 9) if w4a8 else (8, 0))
    if refusal is not None:
        pytest.skip(refusal)
    check(GPU_CASES[name], w4a8, interpret=False, device="cuda")


@pytest.mark.gpu
def test_broken_rows_on_gpu():
    check_broken_rows(interpret=False, device="cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("linear", [w4a8_linear, w4a16_linear])
def test_compiled_and_captured(linear):
    x, *weights = GPU_CASES["prefill"].make("cuda")
    expected = linear(x, *weights)
    assert torch.equal(torch.compile(linear, fullgraph=True)(x, *weights), expected)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = linear(x, *weights)
    y.fill_(torch.nan)
    graph.replay()
    assert torch.equal(y, expected)
