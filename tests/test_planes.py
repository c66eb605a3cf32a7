"""Activations in planes: the reference against `quantize_fp8_ref` and FP64 sums, the kernel against the reference.

The kernel must equal the reference in every bit, with one exception: sums of e4m3 values are exact in FP32 while their
magnitudes add up to less than 2¹⁵, since the values are multiples of 2⁻⁹. Above that the order of summation counts, and
every addition may round once, by 2⁻²⁴ of Σ|x8|.
"""

import functools
import importlib
from unittest import mock

import pytest
import torch
from interpreter_cases import interpreter_results, needs_triton
from kernel_cases import BF16, DTYPES, FP32, hard_rows, make_rows, poisoned, same_bits, skip_below, with_gap
from torch import Tensor

from kompakt.kernels.activations import quantize_fp8_ref
from kompakt.kernels.int4_linear import HOPPER
from kompakt.kernels.packing import packed_width
from kompakt.kernels.planes import (
    COUNTERS,
    DIGIT_WEIGHTS,
    DIGITS,
    SUM_UNIT,
    digits_ref,
    quantize_planes,
    quantize_planes_ref,
)

KERNEL = "kompakt.kernels.planes_triton"
EXACT_SUM = 2.0**15


def packed_bytes(in_features: int) -> int:
    return 4 * packed_width(in_features)


def hard_groups() -> Tensor:
    """(9, 256) fp32: ordinary, outliers, one value everywhere, alternating signs, tiny beside one large, one sign,
    zeros, and a sum whose every other bit is set, down to 2⁻⁸: it takes all six digits.
    """
    generator = torch.Generator().manual_seed(3)
    x = torch.randn((9, 256), generator=generator)
    sign = torch.where(torch.arange(256) % 2 == 0, 1.0, -1.0)
    x[1, ::37] *= 1e3
    x[2], x[3], x[4] = 448.0, -448.0, 448.0 * sign
    x[5] = torch.rand(256, generator=generator) * 2**-8
    x[5, 200] = 448.0
    x[6] = x[6].abs() + 1
    x[7:] = 0.0
    x[8, :53] = torch.tensor([448.0] * 48 + [320, 20, 1.25, 0.078125, 2**-8])
    return x


def sums_of(x: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """FP64 Σx8 and Σ|x8| of every `size` channels."""
    parts = quantize_fp8_ref(x)[0].double().unflatten(-1, (-1, size))
    return parts.sum(-1), parts.abs().sum(-1)


def value_of_digits(correction: Tensor) -> Tensor:
    """(tokens, sums·32) digits → (tokens, sums) FP64, what the digits' products with their weights add up to."""
    weights = torch.tensor(DIGIT_WEIGHTS, dtype=torch.float64, device=correction.device)
    return correction.unflatten(-1, (-1, DIGITS)).double()[..., :6] @ weights


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize(
    ("shape", "row_bytes"), [((1, 1), 4), ((5, 7), 4), ((3, 63), 32), ((0, 16), 8), ((4, 96), 48), ((4, 96), 64)]
)
def test_values_are_the_quantized_rows_by_plane(shape, row_bytes, dtype):
    x = make_rows(shape, dtype)
    planes = quantize_planes_ref(x, row_bytes, None)
    x8, scale = quantize_fp8_ref(x)
    expected = torch.zeros((shape[0], 2, row_bytes), dtype=torch.float8_e4m3fn)
    for channel in range(shape[1]):
        expected[:, channel % 2, channel // 2] = x8[:, channel]
    assert same_bits(planes.values, expected) and same_bits(planes.scale, scale.squeeze(1))
    assert planes.correction.shape == (0,) and torch.equal(planes.counters, torch.zeros(COUNTERS, dtype=torch.int32))


@pytest.mark.parametrize("size", [32, 64, 128])
@pytest.mark.parametrize("x", [hard_groups(), make_rows((5, 384), BF16), hard_rows(FP32)[:5, :256]])
def test_digits_are_exact(x, size):
    correction = quantize_planes_ref(x, x.shape[1] // 2, size).correction
    assert correction.shape == (len(x), x.shape[1] // size * DIGITS) and correction.dtype == torch.float8_e4m3fn
    assert (correction.unflatten(-1, (-1, DIGITS)).view(torch.uint8)[..., 6:] == 0).all()
    assert torch.equal(value_of_digits(correction), -SUM_UNIT * sums_of(x, size)[0])


def test_digits_hold_every_sum():
    """All orders of magnitude, the largest sum, and the numbers with the longest carries: all bits, alternate bits."""
    powers = 2.0 ** torch.arange(-9, 16)
    sums = torch.cat((powers, powers - 2**-9, powers * 1.0625, powers * 1.5 + 2**-9, torch.tensor([128 * 448.0, 0.0])))
    sums = torch.cat((sums, torch.tensor([int("10" * 12, 2) * 2**-9, int("01" * 12, 2) * 2**-9])))
    generator = torch.Generator().manual_seed(0)
    sums = torch.cat((sums, torch.randint(0, 2**24, (5000,), generator=generator) * 2.0**-9))
    sums = torch.stack((sums, -sums))
    # What a float holds is a multiple of the step only where the step is no smaller than its last bit.
    sums = (sums.double() * 2**9).round() / 2**9
    assert torch.equal(value_of_digits(digits_ref(sums.float())), -SUM_UNIT * sums.float().double())


def test_row_sums():
    x = hard_groups()
    exact, magnitude = sums_of(x, 256)
    got = quantize_planes_ref(x, 128, 0).correction
    assert got.shape == (9,) and got.dtype == torch.float32
    assert ((got.double() / SUM_UNIT - exact.squeeze(1)).abs() <= 256 * 2**-24 * magnitude.squeeze(1)).all()


def check(x: Tensor, sum_size: int | None, *, interpret: bool, spare_bytes: int = 0) -> None:
    """Kernel against reference, on poisoned outputs. Of rows with inf or NaN, the scale and the channels are NaN."""
    row_bytes = packed_bytes(x.shape[1]) + spare_bytes
    with poisoned():
        got = quantize_planes(x, row_bytes, sum_size, interpret=interpret)
    expected = quantize_planes_ref(x, row_bytes, sum_size)
    for name, left, right in zip(got._fields, got, expected, strict=True):
        assert left.shape == right.shape and left.dtype == right.dtype, name
    assert same_bits(got.scale, expected.scale), "scale"
    assert torch.equal(got.counters, expected.counters), "counters"
    broken = expected.scale.isnan()
    channels = got.values.transpose(1, 2).flatten(1)[:, : x.shape[1]]
    assert channels[broken].float().isnan().all(), "NaN values"
    assert same_bits(got.values[~broken], expected.values[~broken]), "values"
    if sum_size is None or len(x) == 0:
        return
    sums, magnitude = sums_of(x[~broken], sum_size or x.shape[1])
    exact = magnitude < EXACT_SUM
    if sum_size:
        digits, wanted = (c[~broken].unflatten(-1, (-1, DIGITS)) for c in (got.correction, expected.correction))
        # By value: a sum of nothing but −0 has the sign that the order of adding gives it.
        assert torch.equal(digits[exact].float(), wanted[exact].float()), "digits"
        value = value_of_digits(got.correction[~broken])
    else:
        value = -got.correction[~broken].double().unsqueeze(1)
    rounded = (sum_size or x.shape[1]) * 2**-24 * magnitude
    allowed = torch.where(exact, 0.0, SUM_UNIT * rounded)
    assert ((value + SUM_UNIT * sums).abs() <= allowed).all(), "sums"


def check_chunks(x: Tensor) -> None:
    """The kernel that reads rows twice, made to take short ones in chunks of 32."""
    # Looked up by name, so that a broken copy is the one that is patched.
    kernel = importlib.import_module(KERNEL)
    with mock.patch.multiple(kernel, FEW_TOKENS=1, LONG_ROW=16, CHUNK=32):
        check(x, None, interpret=True)


def kernel_inputs(device: str = "cpu") -> dict[str, tuple[Tensor, int | None]]:
    """Name → (x, sum_size)."""
    cases: dict[str, tuple[Tensor, int | None]] = {}
    shapes = {None: (5, 7), 0: (3, 63), 32: (5, 96), 64: (4, 192), 128: (6, 384)}
    for name, dtype in DTYPES.items():
        for size, shape in shapes.items():
            cases[f"{name}, {size}"] = make_rows(shape, dtype, device), size
        cases[f"{name}, strided"] = with_gap(make_rows((6, 160), dtype, device)), 32
        cases[f"{name}, transposed"] = make_rows((64, 9), dtype, device).t(), 64
        cases[f"{name}, hard"] = hard_rows(dtype, device), 64
    for size in (None, 0, 32):
        cases[f"no tokens, {size}"] = make_rows((0, 32), BF16, device), size
    cases["one value"] = make_rows((1, 1), BF16, device), 0
    cases["in no multiple of 8"] = make_rows((4, 100), BF16, device), 0
    cases["one sum"] = make_rows((2, 128), BF16, device), 128
    cases |= {f"groups, {size}": (hard_groups().to(device), size) for size in (0, 32, 64, 128)}
    return cases


INTERPRETER_CASES = {
    **{name: functools.partial(check, x, size, interpret=True) for name, (x, size) in kernel_inputs().items()},
    "spare bytes": functools.partial(check, make_rows((4, 96), BF16), 32, interpret=True, spare_bytes=16),
    **{
        f"chunks, {name}": functools.partial(check_chunks, make_rows((5, 100), dtype)) for name, dtype in DTYPES.items()
    },
    "chunks, one and a tail": functools.partial(check_chunks, with_gap(make_rows((4, 33), FP32))),
    "chunks, whole": functools.partial(check_chunks, make_rows((4, 128), BF16)),
    "chunks, hard": functools.partial(check_chunks, hard_rows(FP32)),
}
WHOLE_LOAD = "x = tl.load(x_row + column, mask=column < in_features, other=0.0)"
CHUNK_TAIL = "mask=start + column < in_features, other=0.0)\n            x8"
CHUNK_MAXIMUM = "top = tl.maximum(top, magnitude_bits(x))"
CHUNK_INSIDE = "inside = start // 2 + half < row_bytes"
MUTATIONS = {
    "planes swapped": ("even, odd = tl.split", "odd, even = tl.split", "bf16, None"),
    "second plane's place": ("out + row_bytes, odd", "out + row_bytes // 2, odd", "bf16, None"),
    "tail of the row": (WHOLE_LOAD, WHOLE_LOAD.replace("column < in_features", "column < BLOCK"), "bf16, strided"),
    "row stride": ("row * stride_row", "row * in_features", "fp32, strided"),
    "padding": ("even, mask=half < row_bytes", "even, mask=half < in_features // 2", "in no multiple of 8"),
    "digit's factor": ("digit(rest, 0.125, 8.0", "digit(rest, 0.25, 8.0", "fp32, 128"),
    "digit's unit": ("digit(rest, 1.0, 1.0", "digit(rest, 1.0, 2.0", "groups, 128"),
    "last digit": ("place == 5, d5", "place == 5, d4", "groups, 128"),
    "row of digits": ("row * (count * 32)", "row * 32", "fp16, 32"),
    "unit of the row's sum": ("* 0.015625", "* 0.03125", "fp32, 0"),
    "counters not zeroed": ("if row == 0:", "if row < 0:", "bf16, 0"),
    "zero rows": ("tl.where(bits == 0, 1.0, scale)", "scale", "fp32, None"),
    "smallest scale": ("E4M3_MAX), MIN_SCALE)", "E4M3_MAX), 0.0)", "fp32, hard"),
    "NaN rows": ("bits >= 0x7F800000", "bits > 0x7F800000", "fp16, hard"),
    "chunks, first of them only": ("tl.load(x_row + start + column", "tl.load(x_row + column", "chunks, fp16"),
    "chunks, maximum of the last": (CHUNK_MAXIMUM, "top = magnitude_bits(x)", "chunks, hard"),
    "chunks, second read's tail": (CHUNK_TAIL, CHUNK_TAIL.replace("< in", "<= in"), "chunks, one and a tail"),
    "chunks, where they go": ("out + start // 2 + row_bytes, odd", "out + row_bytes, odd", "chunks, bf16"),
    "chunks, last bytes": (CHUNK_INSIDE, CHUNK_INSIDE + " - 1", "chunks, whole"),
}


@needs_triton
@pytest.mark.parametrize("name", [*INTERPRETER_CASES, *MUTATIONS])
def test_kernel_in_interpreter(name):
    assert interpreter_results(__file__)[name] == ""


@pytest.mark.gpu
@pytest.mark.parametrize("name", kernel_inputs())
def test_kernel_on_gpu(name):
    skip_below(HOPPER)
    check(*kernel_inputs("cuda")[name], interpret=False)


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 17, 600, 2048])
@pytest.mark.parametrize(
    ("in_features", "sum_size"),
    [(width, size) for width in (576, 4096, 14336) for size in (None, 0, 32, 64, 128) if not size or width % size == 0],
)
def test_real_shapes_on_gpu(in_features, tokens, sum_size):
    skip_below(HOPPER)
    check(make_rows((tokens, in_features), BF16, "cuda"), sum_size, interpret=False)
    check(with_gap(make_rows((tokens, in_features), FP32, "cuda")), sum_size, interpret=False)
