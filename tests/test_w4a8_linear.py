"""W4A8 linear layers: the reference against FP64, dispatch, the two registered ops, and the portable Triton kernel.

The tolerance is that of `kernel_cases.py`; on a GPU the FP8 accumulator comes on top. `test_w4a8_hopper.py` has the
kernel for compute capability 9.0.
"""

import functools
import logging
from unittest import mock

import pytest
import torch
from interpreter_cases import interpreter_results, needs_triton
from kernel_cases import (
    BF16,
    FP8_ACCUMULATOR,
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
    quantized_rows,
    skip_below,
)
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from kompakt.kernels import int4_linear as int4
from kompakt.kernels import w4a8_linear as w4a8
from kompakt.kernels.activations import FP8_CAPABILITY, log_fallback, quantize_fp8_ref
from kompakt.kernels.int4_linear import dequantize_int4
from kompakt.kernels.planes import quantize_planes_ref
from kompakt.kernels.w4a8_linear import DIGIT_TOKENS, EXPAND_TOKENS, w4a8_linear

KERNEL = "kompakt.kernels.int4_linear_triton"


def exact_result(x: Tensor, packed: Tensor, scale: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """FP64 result over the operands that both kernel and reference multiply, and Σ|terms|."""
    return exact_product(quantized_rows(x), dequantize_int4(packed, scale, x.shape[-1], FP32).double(), bias)


def run_portable(
    x: Tensor, packed: Tensor, scale: Tensor, bias: Tensor | None = None, *, interpret: bool = False
) -> Tensor:
    """Both steps through the kernel that every GPU from 8.9 on runs."""
    rows = x.reshape(-1, x.shape[-1])
    with mock.patch.object(w4a8, "in_planes", lambda *_: False):
        quantized = w4a8.run_quantize(rows, scale.shape[1], None, interpret=interpret)
        y = w4a8.run_matmul(quantized, packed, scale, bias, x.shape[-1], x.dtype, True, interpret=interpret)
    return y.view(*x.shape[:-1], packed.shape[0])


def check(case: Case, *, interpret: bool, device: str = "cpu") -> None:
    """Run the kernel on poisoned outputs and hold it to the tolerance."""
    inputs = case.make(device)
    with poisoned():
        y = run_portable(*inputs, interpret=interpret)
    exact, magnitude = exact_result(*inputs)
    check_error(y, w4a8.w4a8_ref(*inputs), exact, magnitude, FP8_ACCUMULATOR * magnitude if device == "cuda" else 0.0)


def check_broken_rows(*, interpret: bool, device: str = "cpu") -> None:
    """Rows with inf or NaN come out NaN, their neighbours as without them."""
    x, packed, scale, _ = Case((5,), 128, 64, 32).make(device)
    clean = run_portable(x, packed, scale, interpret=interpret)
    x[0, 5], x[3, 127] = torch.nan, torch.inf
    y = run_portable(x, packed, scale, interpret=interpret)
    assert y[[0, 3]].isnan().all() and torch.equal(y[[1, 2, 4]], clean[[1, 2, 4]])


INTERPRETER_CASES = {
    **{name: functools.partial(check, case, interpret=True) for name, case in INT4_CASES.items()},
    "rows with inf and NaN": functools.partial(check_broken_rows, interpret=True),
}
PROMOTED = "accumulator += product * scale[:, None]"
MUTATIONS = {
    "tail of K": ("inside_k[:, None] & inside_m", "(pair >= 0)[:, None] & inside_m", "odd everything"),
    "last token": ("inside_m = token < tokens", "inside_m = token < tokens - 1", "model width"),
    "last output": ("output < out_features", "output < out_features - 1", "group 128"),
    "group ignored": ("block // blocks_per_group", "0 * block", "group 64"),
    "blocks of a group": ("triton.cdiv(in_features // groups, 2 * config.block_pairs)", "2", "group 96"),
    "missing promote": (PROMOTED, "accumulator = (accumulator + product) * scale[:, None]", "group 32"),
    "scale's sign": (PROMOTED, "accumulator += product * tl.abs(scale)[:, None]", "group 64"),
    "channels swapped": ("low, high = decode(", "high, low = decode(", "one token"),
    "negative codes": ("negative * 129", "negative * 128", "one token"),
    "unit": ("accumulator *= 512.0", "accumulator *= 256.0", "one token"),
    "token scale": ("x_scale_ptr + token,", "x_scale_ptr + 0 * token,", "model width"),
    "share of K": ("tl.program_id(2) * share", "0 * share", "long rows"),
    "place of a share": ("tl.program_id(2).to(tl.int64) * tokens", "0 * tokens", "long rows"),
}


@needs_triton
@pytest.mark.parametrize("name", [*INTERPRETER_CASES, *MUTATIONS])
def test_kernel_in_interpreter(name):
    assert interpreter_results(__file__)[name] == ""


@pytest.mark.parametrize("name", [name for name, case in INT4_CASES.items() if 0 not in case.tokens])
def test_reference_against_fp64(name):
    inputs = INT4_CASES[name].make()
    check_reference(INT4_CASES[name], w4a8_linear(*inputs), *exact_result(*inputs), inputs[3])


@pytest.mark.parametrize("name", ["odd everything", "group 64", "no tokens", "no batch dimension"])
def test_registered_ops(name):
    x, packed, scale, bias = INT4_CASES[name].make()
    rows = x.reshape(-1, x.shape[-1])
    torch.library.opcheck(w4a8.quantize_op, (rows, scale.shape[1], None))
    quantized = w4a8.quantize_op(rows, scale.shape[1], None)
    # Not test_schema: to compare its inputs it needs FP8 arithmetic, which torch has not.
    torch.library.opcheck(
        w4a8.matmul_op,
        (*quantized, packed, scale, bias, x.shape[-1], x.dtype, True),
        test_utils=("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"),
    )
    compiled = torch.compile(w4a8_linear, fullgraph=True, backend="aot_eager")
    for exact in (False, True):
        y = compiled(x, packed, scale, bias, exact=exact)
        assert torch.equal(y, w4a8_linear(x, packed, scale, bias, exact=exact)) and y.is_contiguous()


class Layer(torch.nn.Module):
    """A W4A8 layer with weights of static shapes, which torch.compile takes parameters to be."""

    def __init__(self, packed: Tensor, scale: Tensor):
        super().__init__()
        self.packed = torch.nn.Parameter(packed, requires_grad=False)
        self.scale = torch.nn.Parameter(scale, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return w4a8_linear(x, self.packed, self.scale)


@pytest.mark.parametrize("weights", ["static", "dynamic"])
@pytest.mark.parametrize("name", ["odd everything", "group 64"])
def test_compiled_with_dynamic_shapes(name, weights):
    x, packed, scale, _ = INT4_CASES[name].make()
    layer = Layer(packed, scale) if weights == "static" else w4a8_linear
    arguments = () if weights == "static" else (packed, scale)
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    for tokens in (x, x[:2], torch.cat([x] * 3)):
        assert torch.equal(compiled(tokens, *arguments), w4a8_linear(tokens, packed, scale))


@pytest.mark.parametrize("correction", [None, 0, 128])
@pytest.mark.parametrize("tokens", [0, 3])
def test_quantized_planes_have_the_announced_shapes(tokens, correction):
    """The op's fake and its result, where the input goes into planes; the kernel's place is taken by its reference."""
    x = torch.randn(tokens, 256, dtype=BF16)
    with (
        mock.patch.object(w4a8, "in_planes", lambda *_: True),
        mock.patch.object(w4a8, "quantize_planes", quantize_planes_ref),
    ):
        real = w4a8.quantize_op(x, 2, correction)
        with FakeTensorMode() as mode:
            fake = w4a8.quantize_op(mode.from_tensor(x), 2, correction)
    for got, announced in zip(real, fake, strict=True):
        assert got.shape == announced.shape and got.dtype == announced.dtype and announced.is_contiguous()
    assert real[2].shape == {None: (0,), 0: (tokens,), 128: (tokens, 64)}[correction]


def test_two_layers_share_one_quantized_input():
    x, packed, scale, bias = INT4_CASES["group 64"].make()
    other = Case((4,), 192, 33, 64).make()[1:3]
    key = w4a8.input_key(4, packed, scale, exact=False)
    assert key == w4a8.input_key(4, *other, exact=False)
    quantized = w4a8.quantize_w4a8_input(x, packed, scale, bias)
    for weights in ((packed, scale, bias), (*other, None)):
        assert torch.equal(w4a8.w4a8_matmul(quantized, *weights, x.shape, x.dtype), w4a8_linear(x, *weights))


def test_input_key():
    def key(tokens: int, out_features: int, groups: int, *, exact: bool = False) -> tuple[int, int | None]:
        packed, scale = torch.zeros(out_features, 32, dtype=torch.int32), torch.ones(out_features, groups)
        return w4a8.input_key(tokens, packed, scale, exact=exact)

    rows, groups = EXPAND_TOKENS["row"], EXPAND_TOKENS["groups"]
    # The row's sum while packed weights are multiplied; expansion is exact with one scale per row.
    assert key(1, 64, 1) == key(rows - 1, 64, 1) == key(rows, 65, 1) == (1, 0)
    assert key(rows, 64, 1) == key(rows, 64, 1, exact=True) == (1, None)
    # Digits for few tokens and groups of 128.
    assert key(1, 64, 2) == key(DIGIT_TOKENS, 64, 2) == (2, 128)
    assert key(DIGIT_TOKENS + 1, 64, 2) == key(groups, 64, 2) == (2, None)
    assert key(1, 64, 4) == (4, None)


def test_which_weights_are_multiplied():
    def packed(tokens: int, out_features: int, groups: int, *, exact: bool = False) -> bool:
        weight, scale = torch.zeros(out_features, 32, dtype=torch.int32), torch.ones(out_features, groups)
        return w4a8.takes_packed(tokens, weight, scale, exact=exact)

    for groups, limit in ((1, EXPAND_TOKENS["row"]), (2, EXPAND_TOKENS["groups"])):
        assert packed(limit - 1, 64, groups) and not packed(limit, 64, groups)
        # Outputs that the library's product does not take stay with the kernel.
        assert packed(limit, 65, groups)
        assert packed(limit, 64, groups, exact=True) == (groups > 1)


def test_sum_size():
    sizes = {(4096, 1): 0, (4096, 32): 128, (1536, 6): 128, (1536, 4): 128, (576, 9): 64, (288, 3): 32}
    assert {key: w4a8.sum_size(*key) for key in sizes} == sizes
    assert w4a8.sum_size(96, 2) < 0


def refusal(capability: tuple[int, int], in_features: int, groups: int) -> str | None:
    """Of planes, on a pretended GPU."""
    with (
        mock.patch.object(int4, "triton_refusal", lambda *_: None if capability >= (9, 0) else "too old"),
        mock.patch.object(w4a8, "hopper_refusal", int4.hopper_refusal.__wrapped__),
        mock.patch("torch.cuda.get_device_capability", return_value=capability),
    ):
        return w4a8.planes_refusal.__wrapped__(torch.device("cuda:0"), in_features, groups)


@needs_triton
def test_refusals_of_planes_name_their_reason():
    assert refusal((9, 0), 4096, 1) is None and refusal((9, 0), 4096, 32) is None and refusal((9, 0), 96, 3) is None
    assert refusal((8, 9), 4096, 1) == "too old"
    assert "compute capability 9.0" in str(refusal((10, 0), 4096, 1))
    assert "100 input channels" in str(refusal((9, 0), 100, 1))
    assert "group size 48" in str(refusal((9, 0), 96, 2))


def test_hopper_says_once_why_it_takes_the_portable_way(caplog):
    inputs = Case((2,), 100, 8).make()
    log_fallback.cache_clear()
    with (
        mock.patch.object(w4a8, "hopper_refusal", lambda *_: None),
        mock.patch.object(w4a8, "planes_refusal", lambda *_: "pretended"),
        caplog.at_level(logging.WARNING),
    ):
        for _ in range(2):
            w4a8_linear(*inputs)
    said = [record.getMessage() for record in caplog.records if "pretended" in record.getMessage()]
    assert said == ["w4a8_linear runs through the portable Triton kernel: pretended"]


def test_other_devices_say_nothing_of_hopper(caplog):
    inputs = Case((2,), 64, 8).make()
    log_fallback.cache_clear()
    with (
        mock.patch.object(w4a8, "hopper_refusal", lambda *_: "not 9.0"),
        mock.patch.object(w4a8, "planes_refusal", lambda *_: "not 9.0"),
        caplog.at_level(logging.WARNING),
    ):
        w4a8_linear(*inputs)
    assert not [record for record in caplog.records if "9.0" in record.getMessage()]


def test_backend_of_hopper_is_its_own_kernel():
    with mock.patch.object(int4, "hopper_refusal", lambda *_: None):
        backend = int4.linear_backend("w4a8_linear", "cuda:0")
    assert backend.name == "gluon" and "expanded to FP8" in backend.reason


def test_second_step_checks_its_arguments():
    x, packed, scale, _ = Case((3,), 64, 16).make()
    quantized = w4a8.quantize_w4a8_input(x, packed, scale)
    with pytest.raises(ValueError, match=r"\(16,\) floating"):
        w4a8.w4a8_matmul(quantized, packed, scale, torch.zeros(1), x.shape, x.dtype)
    with pytest.raises(ValueError, match="one device"):
        w4a8.w4a8_matmul(quantized, packed.to("meta"), scale, None, x.shape, x.dtype)


def test_odd_group_sizes_fall_back_with_one_logged_reason(caplog):
    x, packed, scale, bias = Case((2,), 80, 8, 16).make()
    quantized = (*quantize_fp8_ref(x), torch.empty(0), torch.empty(0))
    log_fallback.cache_clear()
    with (
        mock.patch.object(int4, "linear_backend", lambda *_, **__: int4.Backend("triton", "pretended")),
        caplog.at_level(logging.WARNING),
    ):
        for _ in range(2):
            y = w4a8.run_matmul(w4a8.QuantizedInput(*quantized), packed, scale, bias, 80, x.dtype, True)
            assert torch.equal(y, w4a8.w4a8_ref(x, packed, scale, bias))
    assert len(caplog.records) == 1 and "group size 16" in caplog.records[0].getMessage()


@pytest.mark.parametrize(("change", "message"), WRONG_INT4_ARGUMENTS)
def test_wrong_arguments_are_refused(change, message):
    w4a8_linear(**GOOD_INT4_ARGUMENTS)
    for refuse in (w4a8_linear, w4a8.quantize_w4a8_input):
        with pytest.raises(ValueError, match=message):
            refuse(**{**GOOD_INT4_ARGUMENTS, **change})


@pytest.mark.gpu
@pytest.mark.parametrize("name", INT4_GPU_CASES)
def test_portable_kernel_on_gpu(name):
    skip_below(FP8_CAPABILITY)
    check(INT4_GPU_CASES[name], interpret=False, device="cuda")


@pytest.mark.gpu
def test_broken_rows_on_gpu():
    skip_below(FP8_CAPABILITY)
    check_broken_rows(interpret=False, device="cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["prefill", "decode", "odd everything"])
def test_compiled_and_captured(name):
    skip_below(FP8_CAPABILITY)
    check_compiled_and_captured(w4a8_linear, INT4_GPU_CASES[name].make("cuda"))
