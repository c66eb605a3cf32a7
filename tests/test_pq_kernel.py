"""The kernels that write, append to and read product-quantized pages against their references.

Coding is not compared code by code: sums in another order may take another centroid that is about as near. What is
asked is that a code's distance exceeds the least one by rounding alone.
"""

from __future__ import annotations

import copy
import functools
from dataclasses import dataclass

import pytest
import torch
from interpreter_cases import interpreter_results, needs_triton
from kernel_cases import BF16, FP16, FP32, skip_below
from pq_cases import pq_statics
from torch import Tensor

from kompakt.compress.cache import TokenStore
from kompakt.kernels.activations import FP8_CAPABILITY
from kompakt.kernels.kv_append import LENGTHS, append_token
from kompakt.kernels.kv_pages import PAGE, Pages, read_ref, read_tokens, write_tokens
from kompakt.kernels.kv_pq import DAMAGED, PQCodec, ProductQuantizer
from kompakt.quant.kv_pq import KVPQ

KERNEL = "kompakt.kernels.kv_pq_triton"


@dataclass(frozen=True)
class WriteCase:
    """columns: to be written. ring: tokens of a ring of so many, 0 for tokens in order."""

    bits: int = 4
    dims: tuple[int, int] = (24, 8)
    columns: tuple[int, int] = (0, 128)
    ring: int = 0
    dtype: torch.dtype = BF16
    batch: int = 1

    def make(self, device: str) -> tuple[Tensor, Tensor, Pages, Tensor]:
        """key, value, pages full of noise, and the records they are views of."""
        torch.manual_seed(3)
        start, stop = self.columns
        count = self.ring or stop - start
        codec = codec_of(self.bits, 2, self.dims, device)
        layout = codec.layout(*self.dims)
        key, value = (torch.randn(self.batch, 2, count, dim) * 2 for dim in self.dims)
        key[0, 1, count // 2, 3], value[-1, 0, count // 3, 1] = torch.nan, torch.inf
        records = torch.randint(0, 256, (-(-stop // PAGE), self.batch, 2, layout.record_bytes), dtype=torch.uint8).to(
            device
        )
        addresses = [record.data_ptr() for record in records]
        pages = {number: layout.page(record) for number, record in enumerate(records)}
        table = torch.tensor(addresses, device=device)
        return (
            key.to(device, self.dtype),
            value.to(device, self.dtype),
            Pages(layout, pages, lambda: table, codec),
            records,
        )


def codec_of(bits: int, heads: int, dims: tuple[int, int], device: str) -> PQCodec:
    codec = KVPQ(bits=bits).codec(pq_statics(heads, *dims, bits=bits))  # pyright: ignore[reportArgumentType]
    return codec.to(torch.device(device))


CASES = {
    "plain": WriteCase(),
    "2 bits": WriteCase(bits=2),
    "3 bits": WriteCase(bits=3, columns=(0, 70)),
    "one token": WriteCase(columns=(130, 131)),
    "over pages": WriteCase(columns=(40, 160), dims=(4, 4), batch=2),
    "ring": WriteCase(columns=(190, 256), ring=129, dtype=FP16, dims=(8, 8)),
    "head_dim 20, 18": WriteCase(dims=(20, 18), columns=(10, 128), dtype=FP32),
    "head_dim 6, 10": WriteCase(dims=(6, 10), columns=(1, 128)),
    "head_dim 40, 34": WriteCase(dims=(40, 34), columns=(0, 60)),
}


def check_write(case: WriteCase, *, interpret: bool, device: str = "cpu") -> None:
    key, value, pages, records = case.make(device)
    before = records.clone()
    write_tokens(key, value, case.columns, pages, ring=case.ring > 0, interpret=interpret)
    codec, layout = pages.codec, pages.layout
    assert isinstance(codec, PQCodec)
    start, stop = case.columns
    source = torch.arange(start, stop, device=device) % case.ring if case.ring else torch.arange(stop - start)
    (keys, values), (old_keys, old_values) = (
        [torch.cat(parts, dim=-2) for parts in zip(*((k, v) for (k, _), (v, _) in read))]
        for read in ([layout.page(record).read() for record in some] for some in (records, before))
    )
    for codes, old, tokens, quantizer in (
        (keys, old_keys, key, codec.keys),
        (values, old_values, value, codec.values),
    ):
        check_nearest(codes[:, :, start:stop], tokens[:, :, source.to(device)], quantizer)
        assert torch.equal(codes[:, :, :start], old[:, :, :start]) and torch.equal(codes[:, :, stop:], old[:, :, stop:])


def check_nearest(codes: Tensor, tokens: Tensor, quantizer: ProductQuantizer) -> None:
    """codes: (batch, heads, tokens, sub-vectors). Every code's centroid is as near as any but for rounding: FP32 sums
    over the channels of a head, and the score's own terms, are off by 2⁻²⁴ of their terms for each addition, products
    of numbers in two parts of TF32 by 2⁻²¹."""
    damaged = ~tokens.isfinite().all(dim=-1)
    assert (codes[damaged][:, 0] == DAMAGED).all() and (codes[~damaged][:, 0] != DAMAGED).all()
    _, vectors, _, width = quantizer.centroids.shape
    x = torch.where(damaged[..., None], 0.0, tokens.double())
    centred, encode = x - quantizer.mean.double()[:, None], quantizer.encode.double()
    y = (centred @ encode).unflatten(-1, (vectors, width))
    centroids = quantizer.centroids.double()
    scores = centroids.square().sum(-1)[:, None] / 2 - torch.einsum("bhtsw,hsjw->bhtsj", y, centroids)
    scores[..., 0, DAMAGED] = torch.inf
    taken = scores.gather(-1, codes.long()[..., None])[..., 0]
    terms = (centred.abs() @ encode.abs()).unflatten(-1, (vectors, width)).norm(dim=-1)
    largest = centroids.norm(dim=-1).amax(dim=-1)[:, None]
    bound = (tokens.shape[-1] + 4) * 2.0**-23 * (terms * largest + largest.square())
    excess = torch.where(damaged[..., None], 0.0, taken - scores.amin(dim=-1))
    assert (excess <= bound).all(), (excess / bound).max()


def check_read(case: WriteCase, *, interpret: bool, device: str = "cpu") -> None:
    _, _, pages, _ = case.make(device)
    shape = (case.batch, 2, case.columns[1] - case.columns[0] + 5)
    found, wanted = ([torch.full((*shape, dim), 7.0, device=device) for dim in case.dims] for _ in "ab")
    read_tokens(*found, case.columns, pages, interpret=interpret)
    read_ref(*wanted, case.columns, pages)
    for got, expected in zip(found, wanted, strict=True):
        assert torch.allclose(got, expected, rtol=1e-5, atol=1e-5, equal_nan=True) and got.isfinite().any()


def check_append(bits: int, recent: int, crop: int, *, interpret: bool, device: str = "cpu") -> None:
    """Some tokens behind 300, less `crop`, with the lengths on the device: what is dense is equal, what is coded is as
    near as can be.
    """
    torch.manual_seed(1)
    method = KVPQ(bits=bits, recent_tokens=recent)  # pyright: ignore[reportArgumentType]
    store = TokenStore(method, statics=pq_statics(2, 16, 8, bits=bits), starts=[0, 3])
    key, value = (torch.randn(2, 2, 400, dim).to(device, FP16) for dim in (16, 8))
    store.append(key[:, :, :300], value[:, :, :300])
    if crop:
        store.crop(crop)
    start = store.tokens
    wanted = copy.deepcopy(store)
    lengths = torch.zeros(LENGTHS, dtype=torch.int32, device=device)
    store.follow(lengths)
    for index in range(300, 300 + 20):
        new = key[:, :, index : index + 1], value[:, :, index : index + 1]
        wanted.append(*new)
        store.make_room()
        append_token(*new, store.appendable(), interpret=interpret)
        store.advance()
        assert lengths.tolist() == [wanted.tokens, wanted.coded, 0, 0] and store.coded == wanted.coded
    assert start // PAGE < store.coded // PAGE
    for number, page in wanted.pages.items():
        for mine, theirs in zip(store.pages[number].read(), page.read(), strict=True):
            count = min(PAGE, store.coded - number * PAGE)
            # Of another order of sums; random tokens are seldom as near to two centroids.
            assert (mine[0][:, :, :count] != theirs[0][:, :, :count]).float().mean() < 1e-3
    mine, theirs = ([*one.ring(one.coded, one.tokens), (one.sink_key, one.sink_value)] for one in (store, wanted))
    assert len(mine) == len(theirs)
    assert all(torch.equal(got, expected) for pair in zip(mine, theirs, strict=True) for got, expected in zip(*pair))


INTERPRETER_CASES = {
    f"write, {name}": functools.partial(check_write, case, interpret=True) for name, case in CASES.items()
}
INTERPRETER_CASES |= {
    f"read, {name}": functools.partial(check_read, CASES[name], interpret=True)
    for name in ("plain", "2 bits", "3 bits", "over pages", "head_dim 20, 18", "head_dim 6, 10")
}
INTERPRETER_CASES |= {
    "append": functools.partial(check_append, 4, 5, 45, interpret=True),
    "append, nothing stays dense": functools.partial(check_append, 2, 0, 50, interpret=True),
    "append, cut into a page": functools.partial(check_append, 4, 0, 60, interpret=True),
}
MUTATIONS = {
    "least distance": ("- y0[None, :, :]", "- 0.9 * y0[None, :, :]", "write, plain"),
    "last two channels": ("score -= y2[None", "score -= 0.0 * y2[None", "write, 2 bits"),
    "size of centroids": ("half = 0.5 * (c0", "half = 0.25 * (c0", "write, plain"),
    "later centroids": ("tl.where(least < best, start + index", "tl.where(least < best, index", "write, plain"),
    "code of damaged tokens": ("tl.where(vector == 0, DAMAGED_, 0)[None, :], code)", "0, code)", "write, plain"),
    "its centroid": ("half = tl.where((vector == 0)", "half = tl.where((vector == 1)", "write, head_dim 6, 10"),
    "mean": ("x -= tl.load(mean_ptr + head", "x -= tl.load(mean_ptr + 0 * head", "write, plain"),
    "halves of a pair": ("both & -65536", "both & 65535", "write, plain"),
    "channels of later tiles": ("channel = start_channel + tl.arange", "channel = tl.arange", "write, head_dim 40, 34"),
    "tokens that stay": ("write = (column >= start) & (column < stop)", "write = column < stop", "write, one token"),
    "runs of values": ("first = (tl.program_id(2) - KEY_RUNS)", "first = (tl.program_id(2) - 1)", "write, plain"),
    "by sub-vector": ("vector[None, :] * PAGE_ + token[:, None]", "token[:, None] * VECTORS + vector[None, :]",
                      "write, plain"),
    "ring": ("source = column % length", "source = column - start", "write, ring"),
    "mean read": ("x += tl.load(mean_ptr + head", "x += tl.load(mean_ptr + 0 * head", "read, plain"),
    "channels read": ("for index in tl.static_range(SUB):", "for index in tl.static_range(SUB - 1):", "read, 2 bits"),
    "damaged read": ('tl.where(damaged[:, None], float("nan"), x)', "x", "read, plain"),
    "second half of a page": ("tl.program_id(0) % 2 * HALF", "tl.program_id(0) % 1 * HALF", "read, plain"),
    "newest token": ("tl.where((column == tokens)[:, None], token", "tl.where((column < 0)[:, None], token",
                     "append, nothing stays dense"),
    "when a page is due": (">= recent_tokens:", "> recent_tokens:", "append"),
    "what was coded stays": ("write = column >= coded", "write = column >= 0", "append, cut into a page"),
    "last program": ("tl.num_programs(0) * tl.num_programs(1) - 1", "tl.num_programs(0) - 1", "append"),
}  # fmt: skip


@needs_triton
@pytest.mark.parametrize("name", [*INTERPRETER_CASES, *MUTATIONS])
def test_kernel_in_interpreter(name):
    assert interpreter_results(__file__)[name] == ""


@pytest.mark.gpu
@pytest.mark.parametrize("name", CASES)
def test_kernel_on_gpu(name):
    skip_below(FP8_CAPABILITY)
    check_write(CASES[name], interpret=False, device="cuda")
    check_read(CASES[name], interpret=False, device="cuda")


@pytest.mark.gpu
@pytest.mark.parametrize(("bits", "recent", "crop"), [(4, 5, 45), (2, 0, 50), (4, 0, 60)])
def test_append_on_gpu(bits, recent, crop):
    skip_below(FP8_CAPABILITY)
    check_append(bits, recent, crop, interpret=False, device="cuda")
