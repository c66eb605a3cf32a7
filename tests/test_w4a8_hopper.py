"""The W4A8 kernel for compute capability 9.0: its arithmetic and its launch options anywhere, the kernel on such a GPU.

Tolerance of the kernel, beside that of `kernel_cases.py`: its FP8 accumulator truncates every addend at 2⁻¹³ of the
largest one. At most 256 products and six digits go into one accumulator, before it is added in FP32; products are at
most 15·|x8|, since what is multiplied is a nibble u = q + 8 ≤ 15, or |q| ≤ 8. Were all of them cut by half of 2⁻¹³ of
the final sum, that would be 2⁻⁶ of it; yet products have 8 bits, so that most lose nothing, and the sum grows slowly.
`emulate` computes with such an accumulator: of Σ 15·|x|·|σ|, rows with outliers or one sign lose 2⁻⁹·⁴ at most, hence
2⁻⁹. Weights that are expanded to FP8 are compared with the product over the folded weights.
"""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from interpreter_cases import run_mutation
from kernel_cases import (
    BF16,
    FP8_ACCUMULATOR,
    FP16,
    FP32,
    Case,
    check_compiled_and_captured,
    check_error,
    exact_product,
    poisoned,
    quantized_rows,
)
from torch import Tensor

from kompakt.kernels import w4a8_hopper as hopper
from kompakt.kernels import w4a8_linear as w4a8
from kompakt.kernels.int4_expand import fold_ref
from kompakt.kernels.int4_linear import dequantize_int4
from kompakt.kernels.planes import COUNTERS, DIGIT_SUMS, DIGIT_WEIGHTS, DIGITS, QuantizedInput, quantize_planes_ref
from kompakt.kernels.w4a8_linear import EXPAND_TOKENS, SUM_SIZES, w4a8_linear

kernel = pytest.importorskip("kompakt.kernels.w4a8_hopper_triton", reason="triton or its Gluon is not installed")

KERNEL = "kompakt.kernels.w4a8_hopper_triton"
DEVICE = "cuda"
HOPPER_ACCUMULATOR = 2.0**-9
TOKENS = (0, 1, 5, 16, 17, 64, 65, 130, 385, 600, 2050)
LAYERS = {
    "row, 96 to 1": Case((), 96, 1, 0, bias=True),
    "row, 192 to 192": Case((), 192, 192, 0, FP16, FP16),
    "row, 576 to 1000": Case((), 576, 1000, 0, FP32, FP32, bias=True),
    "row, 4096 to 65": Case((), 4096, 65, 0, layout="strided"),
    # 33 blocks for eight programs: the last one gets none.
    "row, 8448 to 33": Case((), 8448, 33, 0, BF16, FP32),
    "row, 4096 to 4096": Case((), 4096, 4096, 0, bias=True),
    "group 32, 96 to 33": Case((), 96, 33, 32, bias=True),
    "group 32, 1536 to 192": Case((), 1536, 192, 32, FP16, FP32),
    "group 32, 4096 to 4096": Case((), 4096, 4096, 32),
    "group 64, 576 to 192": Case((), 576, 192, 64, BF16, FP32, bias=True),
    "group 64, 4096 to 1000": Case((), 4096, 1000, 64, layout="strided"),
    "group 96, 192 to 65": Case((), 192, 65, 96, FP32, BF16, bias=True),
    "group 96, 1536 to 192": Case((), 1536, 192, 96),
    # Three groups: half of the last stage lies past the row's end.
    "group 128, 384 to 65": Case((), 384, 65, 128, bias=True),
    "group 128, 1536 to 33": Case((), 1536, 33, 128, FP16, layout="strided"),
    "group 128, 4096 to 1": Case((), 4096, 1, 128),
    "group 128, 4096 to 4096": Case((), 4096, 4096, 128, bias=True),
    "group 256, 1536 to 192": Case((), 1536, 192, 256, bias=True),
    "group 384, 1536 to 1000": Case((), 1536, 1000, 384, BF16, FP16),
}


def with_tokens(name: str, tokens: int) -> Case:
    return dataclasses.replace(LAYERS[name], tokens=(tokens,))


def add_products(total: Tensor, x: Tensor, weight: Tensor, bits: int | None) -> Tensor:
    """total + x·weightᵀ as one matrix instruction adds: every addend is truncated at 2^−bits of the largest."""
    addends = torch.cat((x[:, None, :] * weight[None, :, :], total[:, :, None]), dim=-1)
    if bits is None:
        return addends.sum(-1)
    largest = addends.abs().amax(-1, keepdim=True).clamp_min(1e-30)
    step = torch.exp2(largest.log2().floor() - bits)
    return ((addends / step).trunc() * step).sum(-1)


def emulate(
    planes: QuantizedInput, packed: Tensor, scale: Tensor, sum_size: int, *, digits: bool, bits: int | None = None
) -> Tensor:
    """What the kernel computes, in FP64 but for its accumulator; (tokens, out_features)."""
    stored = packed.view(torch.uint8)
    low, high = (stored & 0xF).double(), (stored >> 4).double()
    if sum_size and not digits:
        low, high = low - 8, high - 8
    even, odd = planes.values.double().unbind(1)
    digit_weights = torch.zeros(1, DIGITS, dtype=torch.float64)
    digit_weights[0, :6] = torch.tensor(DIGIT_WEIGHTS, dtype=torch.float64) * 512
    row_bytes = stored.shape[1]
    width = sum_size // 2 if sum_size else 128
    y = torch.zeros(len(even), len(stored), dtype=torch.float64)
    for index, start in enumerate(range(0, row_bytes, width)):
        total = torch.zeros_like(y)
        for x, weight in ((even, low), (odd, high)):
            for k in range(start, min(start + width, row_bytes), 32):
                part = slice(k, min(k + 32, start + width))
                total = add_products(total, x[:, part], weight[:, part], bits)
            if digits and x is even:
                of_sum = slice(index * DIGITS, (index + 1) * DIGITS)
                total = add_products(
                    total, planes.correction[:, of_sum].double(), digit_weights.expand(len(stored), -1), bits
                )
        group = start * 2 * scale.shape[1] // (2 * row_bytes)
        y += total * scale[:, group].double() if sum_size else total
    if sum_size == 0:
        y = (y - 512 * planes.correction.double()[:, None]) * scale[:, 0].double()
    return y * planes.scale.double()[:, None]


def rows_hard_to_sum(in_features: int) -> Tensor:
    """(6, in_features): ordinary, outliers late, early and regularly, one sign, heavy tails."""
    x = torch.randn(6, in_features, generator=torch.Generator().manual_seed(1))
    x[1, -1], x[2, 0], x[3, ::256] = 3e3, 3e3, 300.0
    x[4] = x[4].abs()
    x[5] *= torch.exp(2 * torch.randn(in_features, generator=torch.Generator().manual_seed(2)))
    return x


def largest_sum(x: Tensor, scale: Tensor) -> Tensor:
    """Σ 15·|x|·|σ|: (tokens, out_features) FP64."""
    magnitude = quantized_rows(x).abs().flatten(0, -2).unflatten(-1, (scale.shape[1], -1)).sum(-1)
    return 15 * magnitude @ scale.double().abs().t()


@pytest.mark.parametrize("group", [0, 32, 64, 96, 128, 256, 384])
def test_arithmetic(group):
    """In exact arithmetic the kernel's way gives the product; with its accumulator the error has the stated bound."""
    case = Case((6,), 768 if group != 96 else 576, 128, group)
    _, packed, scale, _ = case.make()
    x = rows_hard_to_sum(case.in_features)
    sum_size = w4a8.sum_size(case.in_features, case.groups)
    weight = dequantize_int4(packed, scale, case.in_features, FP32).double()
    exact, magnitude = exact_product(quantized_rows(x), weight, None)
    for digits in (False, True) if sum_size == DIGIT_SUMS else (False,):
        planes = quantize_planes_ref(x, case.in_features // 2, sum_size if digits or sum_size == 0 else None)
        y = emulate(planes, packed, scale, sum_size, digits=digits)
        assert ((y - exact).abs() <= 1e-12 * largest_sum(x, scale)).all()
        error = (emulate(planes, packed, scale, sum_size, digits=digits, bits=13) - exact).abs()
        assert (error <= HOPPER_ACCUMULATOR * largest_sum(x, scale)).all()
        assert (error > 8 * 2.0**-24 * magnitude).any(), "the accumulator's error is worth a bound"


@pytest.mark.parametrize("sum_size", [0, *SUM_SIZES])
def test_launch_config(sum_size):
    for processors in (78, 114, 132, 144):
        for tokens in (1, 16, 17, 64, 65, 128, 256, 257, 600, 5000):
            for out_features in (1, 64, 65, 1000, 4096, 14336, 28672, 128256):
                for row_bytes in (48, 288, 2048, 7168, 14336):
                    config = hopper.launch_config(tokens, out_features, row_bytes, sum_size, processors)
                    check_launch_config(config, tokens, out_features, row_bytes, sum_size)


def check_launch_config(config: Any, tokens: int, out_features: int, row_bytes: int, sum_size: int):
    assert config.block_m in (16, 64, 128) and config.consumers in (1, 2)
    columns = -(-tokens // config.block_m)
    counters = -(-out_features // (64 * config.consumers)) * columns * config.consumers
    assert config.split == 1 or counters <= COUNTERS, "a counter for every tile whose K is shared"
    assert config.split <= max(1, -(-row_bytes // hopper.TILE_BYTES)), "no more shares than blocks"
    # 64 K registers; a thread asks for a multiple of 8, at least 24; what consumers take the loader's warpgroup leaves.
    warps = 4 * config.consumers
    assert config.registers % 8 == 0 and 32 * (warps + 4) * config.registers <= 65536
    assert config.consumer_registers % 8 == 0 and config.registers <= config.consumer_registers <= 240
    taken = warps * config.consumer_registers + 4 * hopper.LOADER_REGISTERS
    assert taken <= (warps + 4) * config.registers
    assert config.sums == (2 * hopper.TILE_BYTES // sum_size if sum_size else 1)
    assert not config.digits or config.sums == 2
    # The input has the digits that the kernel reads: see input_key.
    assert config.digits == (sum_size == DIGIT_SUMS and tokens <= w4a8.DIGIT_TOKENS)


def test_mutations_are_up_to_date():
    source = (Path(kernel.__file__)).read_text()
    assert [text for text, *_ in MUTATIONS.values() if text not in source] == []


@pytest.fixture
def gpu() -> None:
    """Skips unless the kernel is the one that runs."""
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip(f"compute capability is {torch.cuda.get_device_capability()}, the kernel is for 9.0")
    assert w4a8.planes_refusal(torch.device(DEVICE), 4096, 1) is None


def check(case: Case, *, exact: bool = False) -> None:
    """`w4a8_linear` on poisoned outputs, held to the tolerance; the same on outputs that are not."""
    x, packed, scale, bias = inputs = case.make(DEVICE)
    with poisoned():
        y = w4a8_linear(*inputs, exact=exact)
    # Without the poison's own kernel in between, the product starts beside the quantization.
    assert y.is_contiguous() and torch.equal(y, w4a8_linear(*inputs, exact=exact))
    left = quantized_rows(x)
    if w4a8.takes_packed(len(x), packed, scale, exact=exact):
        weight = dequantize_int4(packed, scale, case.in_features, FP32).double()
        accumulator = HOPPER_ACCUMULATOR * largest_sum(x, scale)
        expected, magnitude = exact_product(left, weight, bias)
        check_error(y, w4a8.w4a8_ref(*inputs), expected, magnitude, accumulator)
    else:
        expected, magnitude = exact_product(left, folded_weight(packed, scale, case.in_features), bias)
        check_error(y, expected.to(y.dtype), expected, magnitude, FP8_ACCUMULATOR * magnitude)


def folded_weight(packed: Tensor, scale: Tensor, in_features: int) -> Tensor:
    """FP64 weights after folding, channels in order."""
    codes, row_scale = fold_ref(packed, scale, in_features)
    return codes.unflatten(1, (2, -1)).transpose(1, 2).flatten(1)[:, :in_features].double() * row_scale.double()


def check_split(case: Case) -> None:
    """Where programs share a tile's K, twenty runs give the same, and leave the counters at zero for the next layer."""
    x, packed, scale, bias = case.make(DEVICE)
    quantized = w4a8.quantize_w4a8_input(x, packed, scale, bias)
    expected = w4a8.w4a8_matmul(quantized, packed, scale, bias, x.shape, x.dtype)
    for _ in range(20):
        with poisoned():
            y = w4a8.w4a8_matmul(quantized, packed, scale, bias, x.shape, x.dtype)
        assert torch.equal(y, expected)
        assert not quantized.counters.any()
    check(case)


SPLIT = ("row, 8448 to 33", "group 32, 4096 to 4096", "group 128, 4096 to 1", "group 64, 4096 to 1000")
PROMOTED = "accumulator += total * scale0[:, None]"
PAIR = "accumulator += total1 * scale1[:, None]"
SHORT, PAIRED = "group 64, 576 to 192", "group 128, 384 to 65"
MUTATIONS: dict[str, tuple[str, str, Callable[[Case], None], str, int]] = {
    "weight of the first digit": ("k == 0, 0xC0", "k == 0, 0xB8", check, "group 128, 384 to 65", 5),
    "scale index": ("index // sums_per_group", "index", check, "group 256, 1536 to 192", 5),
    "counter's reset": ("        gl.store(counter_ptr + tile, 0)\n", "", check_split, SPLIT[0], 5),
    "share of K": ("gl.program_id(2) * share", "0 * share", check_split, SPLIT[2], 5),
    "partial sums": ("base + s * SIZE", "base + 0 * SIZE", check_split, SPLIT[2], 5),
    "missing promote": (PROMOTED, PROMOTED.replace("+= ", "= accumulator * scale0[:, None] + "), check, SHORT, 17),
    "missing promote, pairs": (PAIR, PAIR.replace("+= ", "= accumulator * scale1[:, None] + "), check, PAIRED, 64),
    "row's sum": ("accumulator - token_sum[None, :]", "accumulator", check, "row, 96 to 1", 5),
    "odd channels": ("plane + block * 128", "block * 128", check, "row, 192 to 192", 65),
    "other group's bytes": ("== SUM % 2)", "== 0)", check, "group 32, 96 to 33", 17),
    "planes swapped": ("low, high = decode(packed)", "high, low = decode(packed)", check, SHORT, 5),
    "unit": ("token_scale * 512.0", "token_scale * 256.0", check, "row, 576 to 1000", 16),
    "last output": ("(n < out_features)[", "(n < out_features - 1)[", check, "row, 96 to 1", 5),
    "last token": ("(m < tokens)[", "(m < tokens - 1)[", check, "row, 192 to 192", 17),
}


@pytest.mark.gpu
@pytest.mark.parametrize("name", MUTATIONS)
def test_broken_kernel_is_caught(gpu, name, tmp_path):
    text, replacement, run, layer, tokens = MUTATIONS[name]
    case = functools.partial(run, with_tokens(layer, tokens))
    case()
    assert run_mutation(KERNEL, text, replacement, case, tmp_path) == ""


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("name", LAYERS)
def test_linear(gpu, name, tokens):
    check(with_tokens(name, tokens))


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["group 32, 4096 to 4096", "group 96, 1536 to 192", "group 128, 4096 to 4096"])
def test_exact_with_many_tokens(gpu, name):
    check(with_tokens(name, 2050), exact=True)


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 17, 130])
@pytest.mark.parametrize("name", SPLIT)
def test_split_is_reproducible(gpu, name, tokens):
    case = with_tokens(name, tokens)
    sum_size = w4a8.sum_size(case.in_features, case.groups)
    processors = torch.cuda.get_device_properties(DEVICE).multi_processor_count
    config = hopper.launch_config(tokens, case.out_features, case.in_features // 2, sum_size, processors)
    if config.split == 1:
        pytest.skip("K is not shared here")
    check_split(case)


@pytest.mark.gpu
def test_split_is_covered(gpu):
    processors = torch.cuda.get_device_properties(DEVICE).multi_processor_count
    assert hopper.launch_config(1, 33, 4224, 0, processors).split == 8
    assert hopper.launch_config(1, 1, 2048, 128, processors).split > 1


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [5, 17, 130, 2050])
@pytest.mark.parametrize(
    "name", ["row, 192 to 192", "group 32, 96 to 33", "group 64, 576 to 192", "group 128, 384 to 65"]
)
def test_rows_with_inf_and_nan(gpu, name, tokens):
    """They come out NaN, their neighbours as without them."""
    x, packed, scale, bias = with_tokens(name, tokens).make(DEVICE)
    clean = w4a8_linear(x, packed, scale, bias)
    x[0, 5], x[3, -1] = torch.nan, torch.inf
    y = w4a8_linear(x, packed, scale, bias)
    others = [token for token in range(tokens) if token not in (0, 3)]
    assert y[[0, 3]].isnan().all() and torch.equal(y[others], clean[others])


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [3, 70, 2050])
@pytest.mark.parametrize("name", ["row, 4096 to 4096", "group 128, 4096 to 4096", "group 64, 576 to 192"])
def test_compiled_and_captured(gpu, name, tokens):
    check_compiled_and_captured(w4a8_linear, with_tokens(name, tokens).make(DEVICE))


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 65, 2050])
@pytest.mark.parametrize("name", ["row, 4096 to 4096", "group 128, 4096 to 4096"])
def test_layers_share_one_quantized_input(gpu, name, tokens):
    x, packed, scale, bias = with_tokens(name, tokens).make(DEVICE)
    other = dataclasses.replace(with_tokens(name, tokens), out_features=1024, bias=False).make(DEVICE)[1:]
    assert w4a8.input_key(tokens, packed, scale, exact=False) == w4a8.input_key(tokens, *other[:2], exact=False)
    quantized = w4a8.quantize_w4a8_input(x, packed, scale, bias)
    for weights in ((packed, scale, bias), other, (packed, scale, bias)):
        y = w4a8.w4a8_matmul(quantized, *weights, x.shape, x.dtype)
        assert torch.equal(y, w4a8_linear(x, *weights))


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [7, 2050])
def test_strided_weights_and_other_bias(gpu, tokens):
    """Slices of wider weights, a bias of another dtype, more than two dimensions."""
    x, packed, scale, _ = with_tokens("group 128, 384 to 65", tokens).make(DEVICE)
    bias = torch.randn(65, device=DEVICE)
    wide_packed, wide_scale = torch.cat((packed, packed), dim=1), torch.cat((scale, scale), dim=1)
    expected = w4a8_linear(x, packed, scale, bias)
    y = w4a8_linear(x[None, :, None], wide_packed[:, : packed.shape[1]], wide_scale[:, : scale.shape[1]], bias)
    assert y.shape == (1, tokens, 1, 65) and torch.equal(y.view(tokens, 65), expected)


@pytest.mark.gpu
@pytest.mark.parametrize("groups", [1, 32])
def test_both_sides_of_the_switch_agree(gpu, groups):
    """Few tokens multiply packed weights, many expanded ones: their results differ by what folding rounds."""
    case = Case((EXPAND_TOKENS["groups" if groups > 1 else "row"],), 4096, 1024, 128 if groups > 1 else 0)
    x, packed, scale, _ = case.make(DEVICE)
    many = w4a8_linear(x, packed, scale).double()
    few = torch.cat([w4a8_linear(part, packed, scale) for part in x.split(64)]).double()
    difference = (many - few).norm() / few.norm()
    assert difference < (0.04 if groups > 1 else 0.01)
