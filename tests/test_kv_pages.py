"""The kernel that writes tokens into pages equals its reference, byte for byte, in every token it is to write."""

import functools
from dataclasses import dataclass, replace

import pytest
import torch
from decode_cases import statics_of
from interpreter_cases import interpreter_results, needs_triton
from kernel_cases import BF16, FP16, FP32, skip_below
from torch import Tensor

from kompakt.kernels.activations import FP8_CAPABILITY
from kompakt.kernels.kv_codes import KINDS, Kind
from kompakt.kernels.kv_pages import (
    PAGE,
    PageLayout,
    Pages,
    TokenCodec,
    read_ref,
    read_tokens,
    write_ref,
    write_tokens,
)
from kompakt.quant.kv_int4 import KVINT4

KERNEL = "kompakt.kernels.kv_pages_triton"


@dataclass(frozen=True)
class WriteCase:
    """columns: to be written. ring: tokens of a ring of so many, 0 for tokens in order."""

    kind: Kind = "int4"
    dims: tuple[int, int] = (64, 64)
    columns: tuple[int, int] = (0, 256)
    ring: int = 0
    mapped: bool = True
    dtype: torch.dtype = BF16
    strided: bool = False

    def make(self, device: str) -> tuple[Tensor, Tensor, Pages, Tensor]:
        """key, value, pages full of noise, and the records they are views of."""
        torch.manual_seed(3)
        start, stop = self.columns
        count, last = self.ring or stop - start, -(-stop // PAGE)
        layout = PageLayout(self.kind, *self.dims)
        key, value = (hard_tokens(2, 3, count, dim) for dim in self.dims)
        statics = statics_of(3, self.dims[0]) if self.mapped and self.kind == "int4" else {}
        if self.strided:
            key, value = (torch.cat((x, x + 1), dim=2)[:, :, ::2] for x in (key, value))
            key = key.transpose(1, 2).contiguous().transpose(1, 2)
        key, value = key.to(device, self.dtype), value.to(device, self.dtype)
        records = torch.randint(0, 256, (last, 2, 3, layout.record_bytes), dtype=torch.uint8).to(device)
        codec = TokenCodec(self.kind, KVINT4().key_map(statics))
        addresses = [record.data_ptr() for record in records]
        pages = Pages(
            layout,
            {number: layout.page(record) for number, record in enumerate(records)},
            lambda: torch.tensor(addresses, device=device),
            codec.to(torch.device(device)),
        )
        return key, value, pages, records


def hard_tokens(batch: int, heads: int, count: int, dim: int) -> Tensor:
    """Tokens of very different size; zeros, constants, outliers, and two that are damaged."""
    x = torch.randn(batch, heads, count, dim) * torch.logspace(-9, 3, count)[torch.randperm(count)][:, None]
    x[:, :, 1::7, 0] *= 1000
    x[:, 0, 2::11] = 0
    x[:, 1, 3::11] = -2.7
    if count > 20:
        x[0, 1, 5, dim // 2] = torch.nan
        x[1, 2, 9, dim - 1] = -torch.inf
    return x


CASES = {
    "plain": WriteCase(),
    "as they are": WriteCase(mapped=False, dtype=FP32),
    "fp16": WriteCase(mapped=False, dtype=FP16),
    "one token": WriteCase(columns=(130, 131)),
    "part of a page": WriteCase(columns=(70, 128)),
    "over pages": WriteCase(columns=(40, 300)),
    "ring": WriteCase(columns=(128, 256), ring=150),
    "ring, part": WriteCase(columns=(190, 256), ring=129),
    "strided": WriteCase(strided=True, columns=(3, 200)),
    "head_dim 96, 80": WriteCase(dims=(96, 80), columns=(10, 140)),
    "head_dim 192, 128": WriteCase(dims=(192, 128), columns=(0, 128)),
    "head_dim 6, 10": WriteCase(dims=(6, 10), columns=(1, 128)),
}
CASES |= {
    f"fp8, {name}": replace(CASES[name], kind="fp8")
    for name in ("plain", "one token", "over pages", "ring, part", "head_dim 96, 80")
}
CASES |= {f"bf16, {name}": replace(CASES[name], kind="bf16") for name in ("over pages", "head_dim 96, 80")}


def check(case: WriteCase, *, interpret: bool, device: str = "cpu") -> None:
    key, value, pages, records = case.make(device)
    before = records.clone()
    write_tokens(key, value, case.columns, pages, ring=case.ring > 0, interpret=interpret)
    expected = before.clone()
    layout = pages.layout
    wanted = Pages(layout, {n: layout.page(record) for n, record in enumerate(expected)}, pages.table, pages.codec)
    write_ref(key, value, case.columns, wanted, ring=case.ring > 0)
    assert not torch.equal(before, expected)
    wrong = (records != expected).nonzero()
    if len(wrong):
        # NaN may have any bits.
        for number in wrong[:, 0].unique().tolist():
            for (codes, parameters), (codes_, parameters_) in zip(
                layout.page(records[number]).read(), layout.page(expected[number]).read(), strict=True
            ):
                assert same(codes, codes_) and same(parameters, parameters_)


def same(got: Tensor, expected: Tensor) -> bool:
    got, expected = got.float(), expected.float()
    return bool(((got == expected) | (got.isnan() & expected.isnan())).all())


def check_read(case: WriteCase, *, interpret: bool, device: str = "cpu") -> None:
    """What the kernel reads is what its reference reads; what it is not asked for stays."""
    key, value, pages, _ = case.make(device)
    write_ref(key, value, case.columns, pages, ring=case.ring > 0)
    start, stop = case.columns
    shape = (2, 3, stop - start + 5)
    found, wanted = ([x.new_full((*shape, x.shape[3]), torch.nan) for x in (key, value)] for _ in range(2))
    read_tokens(*found, case.columns, pages, interpret=interpret)
    read_ref(*wanted, case.columns, pages)
    for got, expected in zip(found, wanted, strict=True):
        # The sums of the rotation and what follows are rounded once more or less.
        close = torch.isclose(got.float(), expected.float(), rtol=2 * torch.finfo(got.dtype).eps, atol=1e-6)
        assert (close | (got.isnan() & expected.isnan())).all()
        assert got.isfinite().any()


INTERPRETER_CASES = {name: functools.partial(check, case, interpret=True) for name, case in CASES.items()}
INTERPRETER_CASES |= {
    f"read, {name}": functools.partial(check_read, CASES[name], interpret=True)
    for name in ("plain", "over pages", "head_dim 96, 80", "as they are", "fp8, over pages", "bf16, over pages")
}
MUTATIONS = {
    "room for more tokens": ("plane * length + column", "plane * (stop - start) + column", "read, plain"),
    "halves of keys read": ("(upper[None, :], byte >> 4", "(upper[None, :], byte >> 3", "read, plain"),
    "halves of values read": ("(token >= LATER)[None, :], byte", "(token >= 0)[None, :], byte", "read, plain"),
    "factors read": ("x *= tl.load(factor_ptr", "x += 0.0 * tl.load(factor_ptr", "read, plain"),
    "mean read": ("x += tl.load(mean_ptr + kv_head", "x += tl.load(mean_ptr + 0 * kv_head", "read, plain"),
    "columns read": ("+ column - start)[:, None]", "+ tl.maximum(column - start - 1, 0))[:, None]", "read, over pages"),
    "scale read": ("x = codes * tl.load(record", "x = codes + tl.load(record", "read, fp8, over pages"),
    "rounding of the least value": ("infinite), axis=1), True)", "infinite), axis=1), False)", "as they are"),
    "rounding of the step": ("scale = outwards(scale, False)", "scale = outwards(scale, True)", "as they are"),
    "ties": ("((codes + ROUND) - ROUND, 0.0)", "((codes + 0.5 + ROUND) - ROUND, 0.0)", "as they are"),
    "mean": ("x -= tl.load(mean_ptr + kv_head", "x -= tl.load(mean_ptr + 0 * kv_head", "plain"),
    "factors": ("x = tl.div_rn(x, tl.broadcast_to(factor, x.shape))", "x = x * 1.0", "plain"),
    "rotation": ("turned(x, PAGE_, WIDTH, ROTATE)", "turned(x, PAGE_, WIDTH, ROTATE // 2)", "plain"),
    "damaged tokens": ("tl.where(finite & inside, codes", "tl.where(inside, codes", "fp8, plain"),
    "channels without storage": ("tl.where(inside, x, -infinite)", "x", "head_dim 96, 80"),
    "halves of keys": ("channel + HALF, WIDTH - 1", "channel, WIDTH - 1", "plain"),
    "halves of values": ("low, high = tl.split(tl.trans", "high, low = tl.split(tl.trans", "plain"),
    "neighbours of values": ("low, old & 15)", "low, 0)", "part of a page"),
    "later neighbours of values": ("high, old >> 4)", "high, 0)", "one token"),
    "tokens that stay": ("write = (column >= start) & (column < stop)", "write = column < stop", "part of a page"),
    "ring": ("source = column % length", "source = column - start", "ring"),
    "page": ("page = start // PAGE_ + tl.program_id(0)", "page = tl.program_id(0)", "ring"),
    "least value as a parameter": ("low | high", "low", "as they are"),
}  # fmt: skip


@needs_triton
@pytest.mark.parametrize("name", [*INTERPRETER_CASES, *(f"broken: {name}" for name in MUTATIONS)])
def test_kernel_in_interpreter(name):
    assert interpreter_results(__file__)[name] == ""


MUTATIONS = {f"broken: {name}": found for name, found in MUTATIONS.items()}


@pytest.mark.gpu
@pytest.mark.parametrize("name", CASES)
def test_kernel_on_gpu(name):
    skip_below(FP8_CAPABILITY)
    check(CASES[name], interpret=False, device="cuda")
    check_read(CASES[name], interpret=False, device="cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
def test_long_prompt_on_gpu(kind):
    skip_below(FP8_CAPABILITY)
    check(WriteCase(kind=kind, dims=(128, 128), columns=(128, 8000)), interpret=False, device="cuda")
