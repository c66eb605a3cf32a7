"""W4A16 linear layers: the reference against FP64, the Triton kernel against the same bound, and its dispatch.

The tolerance is that of `kernel_cases.py`.
"""

import functools
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import pytest
import torch
from interpreter_cases import interpreter_results, needs_triton
from kernel_cases import (
    BF16,
    DTYPES,
    FP32,
    GOOD_INT4_ARGUMENTS,
    INT4_CASES,
    INT4_GPU_CASES,
    WRONG_INT4_ARGUMENTS,
    Case,
    check_compiled_and_captured,
    check_error,
    check_reference,
    exact_product,
    poisoned,
    skip_below,
)
from torch import Tensor

from kompakt.kernels import int4_linear as int4
from kompakt.kernels.activations import log_fallback
from kompakt.kernels.int4_linear import dequantize_int4, linear_backend, w4a16_linear
from kompakt.kernels.packing import pack_int4, unpack_int4

KERNEL = "kompakt.kernels.int4_linear_triton"
GPU_CASES = {
    **INT4_GPU_CASES,
    "expanded, odd outputs": Case((128,), 1160, 1001, 0, bias=True, layout="strided"),
    "expanded, groups": Case((3, 700), 1536, 24, 96, torch.float16, bias=True),
    "expanded, one output": Case((129,), 64, 1, 32),
}


def exact_result(x: Tensor, packed: Tensor, scale: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """FP64 result over the weights q·σ, and Σ|terms|."""
    codes = unpack_int4(packed, x.shape[-1]).double()
    return exact_product(x.double(), codes * scale.double().repeat_interleave(x.shape[-1] // scale.shape[1], 1), bias)


@contextmanager
def sums_in_fp32() -> Iterator[None]:
    """cuBLAS may add the parts of a split sum in 16 bit; what is tested is what it is given."""
    matmul = torch.backends.cuda.matmul
    switches = ("allow_bf16_reduced_precision_reduction", "allow_fp16_reduced_precision_reduction")
    before = [getattr(matmul, switch) for switch in switches]
    for switch in switches:
        setattr(matmul, switch, False)
    try:
        yield
    finally:
        for switch, value in zip(switches, before):
            setattr(matmul, switch, value)


def check(case: Case, *, interpret: bool, device: str = "cpu") -> None:
    """Run the kernel on poisoned outputs and hold it to the tolerance, against the product with unrounded q·σ.

    The reference's error then includes the rounding of ŵ, which the kernel does not have; expanded weights have it.
    """
    inputs = case.make(device)
    with poisoned(), sums_in_fp32():
        y = int4.run_w4a16(*inputs, interpret=interpret)
    assert y.shape == (*case.tokens, case.out_features) and y.is_contiguous()
    x, packed, scale, bias = inputs
    unrounded = dequantize_int4(packed, scale, x.shape[-1], FP32).double()
    with sums_in_fp32():
        reference = int4.w4a16_ref(*inputs)
    check_error(y, reference, *exact_product(x.double(), unrounded, bias))


def check_odd_offset(*, interpret: bool, device: str = "cpu") -> None:
    """Rows that start at an odd element: as many, and one, which torch takes for contiguous."""
    for tokens in (4, 1):
        x, packed, scale, bias = Case((tokens,), 64, 33, 32).make(device)
        shifted = torch.cat((x[:, :1], x), dim=1)[:, 1:]
        expected = int4.run_w4a16(x, packed, scale, bias, interpret=interpret)
        assert torch.equal(int4.run_w4a16(shifted, packed, scale, bias, interpret=interpret), expected)


INTERPRETER_CASES = {
    **{name: functools.partial(check, case, interpret=True) for name, case in INT4_CASES.items()},
    "odd offset": functools.partial(check_odd_offset, interpret=True),
}
MUTATIONS = {
    "tail of K": ("inside_k[:, None] & inside_m", "(pair >= 0)[:, None] & inside_m", "in no multiple of 8"),
    "group ignored": ("block // blocks_per_group", "0 * block", "group 64"),
    "bias": ("bias_ptr + output,", "bias_ptr + 0 * output,", "odd everything"),
    "row stride": ("token[None, :] * stride_x", "token[None, :] * in_pairs", "long rows"),
    "scale's sign": ("accumulator *= scale[:, None]", "accumulator *= tl.abs(scale)[:, None]", "long rows"),
    "code offset": ("nibbles.to(tl.float32) - 8.0", "nibbles.to(tl.float32) - 7.0", "group 96"),
    "channels swapped": ("low, high = decode(", "high, low = decode(", "one token"),
    "share of K": ("tl.program_id(2) * share", "0 * share", "long rows"),
}


@needs_triton
@pytest.mark.parametrize("name", [*INTERPRETER_CASES, *MUTATIONS])
def test_kernel_in_interpreter(name):
    assert interpreter_results(__file__)[name] == ""


@pytest.mark.parametrize("name", [name for name, case in INT4_CASES.items() if 0 not in case.tokens])
def test_reference_against_fp64(name):
    inputs = INT4_CASES[name].make()
    x, packed, scale, bias = inputs
    rounded = dequantize_int4(packed, scale, x.shape[-1], x.dtype).double()
    check_reference(INT4_CASES[name], w4a16_linear(*inputs), *exact_product(x.double(), rounded, bias), bias)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_dequantize(dtype):
    codes = torch.arange(-8, 8, dtype=torch.int8).repeat(3, 2)
    scale = torch.tensor([[0.1, -0.3], [2.0, 1e-3], [-5.0, 0.0]], dtype=BF16)
    weight = dequantize_int4(pack_int4(codes), scale, 32, dtype)
    expected = (codes.double().view(3, 2, 16) * scale.double().unsqueeze(-1)).view(3, 32)
    assert weight.dtype == dtype and torch.equal(weight, expected.to(dtype))


@pytest.mark.parametrize("name", ["odd everything", "group 64", "no tokens", "no batch dimension"])
def test_registered_op(name):
    inputs = INT4_CASES[name].make()
    torch.library.opcheck(int4.w4a16_op, inputs)
    compiled = torch.compile(w4a16_linear, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*inputs), w4a16_linear(*inputs))


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
            assert torch.equal(int4.run_w4a16(*inputs), int4.w4a16_ref(*inputs))
    assert [record.getMessage() for record in caplog.records if "group size 16" in record.getMessage()] != []
    assert len(caplog.records) == 1


@pytest.mark.parametrize(("change", "message"), WRONG_INT4_ARGUMENTS)
def test_wrong_arguments_are_refused(change, message):
    w4a16_linear(**GOOD_INT4_ARGUMENTS)
    with pytest.raises(ValueError, match=message):
        w4a16_linear(**{**GOOD_INT4_ARGUMENTS, **change})


@pytest.mark.gpu
@pytest.mark.parametrize("name", GPU_CASES)
def test_kernel_on_gpu(name):
    skip_below((8, 0))
    check(GPU_CASES[name], interpret=False, device="cuda")


@pytest.mark.gpu
def test_odd_offset_on_gpu():
    check_odd_offset(interpret=False, device="cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["prefill", "decode"])
def test_compiled_and_captured(name):
    check_compiled_and_captured(w4a16_linear, GPU_CASES[name].make("cuda"))
