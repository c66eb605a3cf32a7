"""What kernel tests share: hard inputs, poisoned outputs, one INT4 or FP8 layer per `Case`, and the error bound.

Tolerance of a linear layer, for every token: the largest error is at most twice that of the reference, both against
FP64, plus eight FP32 roundings of Σ|terms|, since the two sum in different orders, plus the accumulator's share.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal
from unittest import mock

import pytest
import torch
from torch import Tensor

from kompakt.kernels.activations import quantize_fp8_ref, triton_refusal
from kompakt.kernels.packing import pack_int4

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
DTYPES = {"bf16": BF16, "fp16": FP16, "fp32": FP32}
# A Hopper FP8 accumulator truncates each of 33 addends at 2⁻¹³ of the largest: 33/8 · 2⁻¹³ of Σ|terms| where terms are
# alike, and twice that for rows with outliers.
FP8_ACCUMULATOR = 2.0**-10


def skip_below(capability: tuple[int, int]) -> None:
    """Skips a test whose Triton kernel needs another device, with the reason."""
    refusal = triton_refusal("cuda", capability)
    if refusal is not None:
        pytest.skip(refusal)


def fill_poison(*args, real_empty=torch.empty, **kwargs) -> Tensor:
    result = real_empty(*args, **kwargs)
    return result.fill_(torch.nan if result.is_floating_point() else 77)


def poisoned():
    """Context in which `torch.empty` returns NaN, and 77 in integers."""
    return mock.patch("torch.empty", fill_poison)


def same_bits(got: Tensor, expected: Tensor) -> bool:
    """Equal shapes, dtypes and bits; NaN equals NaN whatever its sign."""
    if got.shape != expected.shape or got.dtype != expected.dtype:
        return False
    integer = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[got.element_size()]
    both_nan = got.float().isnan() & expected.float().isnan()
    return bool(((got.view(integer) == expected.view(integer)) | both_nan).all())


def make_rows(shape: tuple[int, ...], dtype: torch.dtype, device: str = "cpu") -> Tensor:
    """Random rows; among them, where there is room, zeros, an outlier, large, tiny and subnormal values."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))
    rows = x.view(-1, shape[-1])
    for row, change in zip(
        rows[1:], (lambda r: r.mul_(0), lambda r: r[-1:].fill_(6e4), lambda r: r.mul_(1e4)), strict=False
    ):
        change(row)
    return x.to(dtype).to(device)


def hard_rows(dtype: torch.dtype, device: str = "cpu") -> Tensor:
    """(10, 320): every midpoint between two e4m3 values, subnormals, and from row 5 to 8 inf and NaN."""
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


def with_gap(x: Tensor, gap: int = 64) -> Tensor:
    """The same values with `gap` large ones between rows."""
    return torch.full((*x.shape[:-1], x.shape[-1] + gap), 9e3, dtype=x.dtype, device=x.device)[
        ..., : x.shape[-1]
    ].copy_(x)


def kernel_rows(shapes: list[tuple[int, ...]], device: str = "cpu") -> dict[str, Tensor]:
    """Every shape in every dtype, the hard rows, rows with a gap, and columns for rows."""
    cases = {}
    for name, dtype in DTYPES.items():
        cases |= {f"{name}-{'x'.join(map(str, shape))}": make_rows(shape, dtype, device) for shape in shapes}
        cases[f"{name}-hard"] = hard_rows(dtype, device)
        cases[f"{name}-strided"] = with_gap(make_rows((6, 100), dtype, device))
        cases[f"{name}-transposed"] = make_rows((64, 9), dtype, device).t()
    return cases


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
    layout: Literal["contiguous", "strided", "transposed"] = "contiguous"

    @property
    def groups(self) -> int:
        return self.in_features // self.group if self.group else 1

    def generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(self.in_features + 7 * self.out_features + self.group)

    def make_x(self, generator: torch.Generator, device: str) -> Tensor:
        """Random tokens; where there are enough, one is zero, one has an outlier, one is large."""
        x = torch.randn((*self.tokens, self.in_features), generator=generator)
        rows = x.view(-1, self.in_features)
        if len(rows) > 3:
            rows[1], rows[2, -1], rows[3] = 0.0, 3e3, rows[3] * 100
        x = x.to(self.dtype).to(device)
        if self.layout == "strided":
            return with_gap(x)
        return x.transpose(0, -2).contiguous().transpose(0, -2) if self.layout == "transposed" else x

    def make_bias(self, generator: torch.Generator, device: str) -> Tensor | None:
        return torch.randn(self.out_features, generator=generator).to(self.dtype).to(device) if self.bias else None

    def make(self, device: str = "cpu") -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """x, weight_packed, weight_scale, bias of an INT4 layer: half the scales negative, code -8 in every row."""
        generator = self.generator()
        x = self.make_x(generator, device)
        codes = torch.randint(-8, 8, (self.out_features, self.in_features), generator=generator, dtype=torch.int8)
        codes[:, -1] = -8
        scale = torch.randn((self.out_features, self.groups), generator=generator) * 0.1
        return (
            x,
            pack_int4(codes).to(device),
            scale.to(self.scale_dtype).to(device),
            self.make_bias(generator, device),
        )

    def make_fp8(self, device: str = "cpu") -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """x, weight, weight_scale, bias of an FP8 layer: half the scales negative, weights up to ±448."""
        generator = self.generator()
        x = self.make_x(generator, device)
        weight = (torch.randn((self.out_features, self.in_features), generator=generator) * 60).clamp(-448, 448)
        scale = torch.randn((self.out_features, 1), generator=generator) * 1e-3
        return (
            x,
            weight.to(torch.float8_e4m3fn).to(device),
            scale.to(self.scale_dtype).to(device),
            self.make_bias(generator, device),
        )


INT4_CASES = {
    "1 of everything": Case((1,), 1, 1, bias=True),
    "no tokens": Case((2, 0), 64, 32, 32),
    "one token": Case((1,), 256, 64, 128, bias=True),
    "no batch dimension": Case((), 64, 33, 32),
    "odd everything": Case((3, 5), 65, 65, bias=True, layout="strided"),
    "in no multiple of 8": Case((5,), 100, 66, layout="strided"),
    "group 32": Case((17,), 160, 65, 32, FP16, FP16, bias=True),
    "group 64": Case((4,), 192, 70, 64, FP32, FP32, bias=True),
    "group 128": Case((5,), 384, 129, 128, BF16, FP32),
    "group 96": Case((5,), 288, 40, 96, FP16),
    "group 256": Case((5,), 768, 65, 256, FP32),
    "model width": Case((33,), 576, 192, 64, bias=True),
    "long rows": Case((9,), 1536, 65, 0, FP32, FP16, layout="strided"),
    "many tokens": Case((130,), 64, 72, 32, FP16),
    # Where eight programs share the 17 or 34 blocks of K, the last of them gets none.
    "empty share": Case((3,), 4352, 9, bias=True),
}
INT4_GPU_CASES = {
    **INT4_CASES,
    "prefill": Case((2, 1025), 1536, 576, 128, bias=True),
    "decode": Case((16,), 4096, 14336, 128),
    "wide": Case((300,), 8192, 1000, 0, FP16, layout="strided"),
}

GOOD_INT4_ARGUMENTS = {
    "x": torch.zeros(2, 64),
    "weight_packed": torch.zeros(4, 8, dtype=torch.int32),
    "weight_scale": torch.ones(4, 2),
}
# (what replaces good arguments, what the error says)
WRONG_INT4_ARGUMENTS = [
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
]


def quantized_rows(x: Tensor) -> Tensor:
    """What a kernel with FP8 activations multiplies, in FP64."""
    x8, scale = quantize_fp8_ref(x)
    return x8.double() * scale.double()


def exact_product(left: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """FP64 result of a layer over operands given in FP64, and Σ|terms|."""
    offset = torch.zeros((), dtype=torch.float64, device=left.device) if bias is None else bias.double()
    return left @ weight.t() + offset, left.abs() @ weight.abs().t() + offset.abs()


def check_error(
    y: Tensor, reference: Tensor, exact: Tensor, magnitude: Tensor, accumulator: Tensor | float = 0
) -> None:
    """The tolerance in the module docstring; a NaN left in y fails as well."""
    assert y.shape == reference.shape == exact.shape and y.dtype == reference.dtype
    if y.numel() == 0:
        return
    allowed = 2 * (reference.double() - exact).abs().amax(dim=-1, keepdim=True)
    allowed = allowed + 8 * 2.0**-24 * magnitude + accumulator
    excess = (y.double() - exact).abs() - allowed
    assert (excess <= 0).all(), f"exceeds the allowed error by {excess.nan_to_num(torch.inf).max():.3e}"


def check_reference(case: Case, y: Tensor, exact: Tensor, magnitude: Tensor, bias: Tensor | None) -> None:
    """One rounding of the result, bias and result roundings of a 16 bit F.linear, an FP32 sum of in_features terms."""
    assert y.shape == (*case.tokens, case.out_features) and y.dtype == case.dtype
    eps, tiny = torch.finfo(case.dtype).eps, torch.finfo(case.dtype).tiny
    roundings = 3 * eps * exact.abs().clamp_min(tiny) + (0.0 if bias is None else bias.double().abs() * eps)
    assert ((y.double() - exact).abs() <= roundings + (case.in_features + 4) * 2.0**-24 * magnitude).all()


def check_compiled_and_captured(linear: Callable[..., Tensor], inputs: tuple) -> None:
    """On a GPU, torch.compile and a replayed CUDA graph give what an ordinary call gives."""
    expected = linear(*inputs)
    assert torch.equal(torch.compile(linear, fullgraph=True)(*inputs), expected)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = linear(*inputs)
    for _ in range(2):
        y.fill_(torch.nan)
        graph.replay()
        assert torch.equal(y, expected)
