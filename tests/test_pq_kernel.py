"""The kernels over product-quantized pages against their references.

Coding is not compared code by code: sums in another order may take another centroid that is about as near. What is
asked is that a code's distance exceeds the least one by rounding alone.
"""

from __future__ import annotations

import copy
import functools
from dataclasses import dataclass, replace

import pytest
import torch
from decode_cases import DecodeCase, filled, spread
from interpreter_cases import interpreter_results, needs_triton
from kernel_cases import BF16, FP16, FP32, poisoned
from pq_cases import pq_statics
from torch import Tensor

from kompakt.compress.cache import TokenStore
from kompakt.kernels.decode_attention import CompressedKV, Reading, decode_ref, run_decode
from kompakt.kernels.kv_append import LENGTHS, append_token
from kompakt.kernels.kv_pages import PAGE, Pages, read_ref, read_tokens, write_tokens
from kompakt.kernels.kv_pq import DAMAGED, PQCodec, ProductQuantizer
from kompakt.quant.kv_pq import KVPQ

KERNEL = "kompakt.kernels.kv_pq_triton"
DECODE = "kompakt.kernels.decode_pq_triton"


@dataclass(frozen=True)
class WriteCase:
    """columns: to be written. ring: tokens of a ring of so many, 0 for tokens in order."""

    bits: int = 4
    dims: tuple[int, int] = (64, 64)
    columns: tuple[int, int] = (0, 256)
    ring: int = 0
    dtype: torch.dtype = BF16

    def make(self, device: str) -> tuple[Tensor, Tensor, Pages, Tensor]:
        """key, value, pages full of noise, and the records they are views of."""
        torch.manual_seed(3)
        start, stop = self.columns
        count = self.ring or stop - start
        codec = codec_of(self.bits, 2, self.dims, device)
        layout = codec.layout(*self.dims)
        key, value = (torch.randn(2, 2, count, dim) * 2 for dim in self.dims)
        key[0, 1, count // 2, 3], value[1, 0, count // 3, 1] = torch.nan, torch.inf
        records = torch.randint(0, 256, (-(-stop // PAGE), 2, 2, layout.record_bytes), dtype=torch.uint8).to(device)
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
    "2 bits": WriteCase(bits=2, columns=(0, 128)),
    "3 bits": WriteCase(bits=3, columns=(0, 128)),
    "one token": WriteCase(columns=(130, 131)),
    "over pages": WriteCase(columns=(40, 260)),
    "ring": WriteCase(columns=(190, 256), ring=129, dtype=FP16),
    "head_dim 96, 80": WriteCase(dims=(96, 80), columns=(10, 140), dtype=FP32),
    "head_dim 6, 10": WriteCase(dims=(6, 10), columns=(1, 128)),
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
    over the channels of a head, and the score's own terms, are off by 2⁻²⁴ of their terms for each addition."""
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
    bound = tokens.shape[-1] * 2.0**-23 * (terms * largest + largest.square())
    excess = torch.where(damaged[..., None], 0.0, taken - scores.amin(dim=-1))
    assert (excess <= bound).all(), (excess / bound).max()


def check_read(case: WriteCase, *, interpret: bool, device: str = "cpu") -> None:
    _, _, pages, _ = case.make(device)
    found, wanted = (
        [torch.full((2, 2, case.columns[1] - case.columns[0], dim), 7.0, device=device) for dim in case.dims]
        for _ in "ab"
    )
    read_tokens(*found, case.columns, pages, interpret=interpret)
    read_ref(*wanted, case.columns, pages)
    for got, expected in zip(found, wanted, strict=True):
        assert torch.allclose(got, expected, rtol=1e-5, atol=1e-5, equal_nan=True) and got.isfinite().any()


def check_append(bits: int, recent: int, crop: int, *, interpret: bool, device: str = "cpu") -> None:
    """Token by token with the lengths on the device: what is dense is equal, what is coded is as near as can be."""
    torch.manual_seed(1)
    method = KVPQ(bits=bits, recent_tokens=recent)  # pyright: ignore[reportArgumentType]
    store = TokenStore(method, statics=pq_statics(2, 16, 8, bits=bits), starts=[0, 3])
    key, value = (torch.randn(2, 2, 400, dim).to(device, FP16) for dim in (16, 8))
    store.append(key[:, :, :250], value[:, :, :250])
    if crop:
        store.crop(crop)
    start = store.tokens
    wanted = copy.deepcopy(store)
    lengths = torch.zeros(LENGTHS, dtype=torch.int32, device=device)
    store.follow(lengths)
    for index in range(250, 250 + 140):
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
    for got, expected in zip(
        (store.key, store.value, store.sink_key, store.sink_value),
        (wanted.key, wanted.value, wanted.sink_key, wanted.sink_value),
        strict=True,
    ):
        assert got is not None and expected is not None and torch.equal(got, expected)


DECODE_CASES = {
    "plain": DecodeCase(),
    "grouped 9/3": DecodeCase(heads=(9, 3), starts=(0, 0)),
    "one group each": DecodeCase(heads=(2, 2)),
    "nothing coded": DecodeCase(lengths=(30, 1)),
    "all coded": DecodeCase(lengths=(255, 1), options={"recent_tokens": 0, "sink_tokens": 0}),
    "several queries": DecodeCase(lengths=(300, 100, 5), heads=(9, 3), starts=(0, 0)),
    "16 queries": DecodeCase(lengths=(300, 16), heads=(8, 2)),
    "padding": DecodeCase(starts=(0, 3, 130, 300)),
    "many sinks": DecodeCase(starts=(5, 100), options={"recent_tokens": 40, "sink_tokens": 70}),
    "window": DecodeCase(window=200, starts=(0, 260)),
    "softcap": DecodeCase(softcap=3.0),
    "everything": DecodeCase(sinks=True, softcap=4.0, window=300, starts=(0, 150), lengths=(300, 150, 3)),
    "head_dim 96, 80": DecodeCase(dims=(96, 80)),
    "head_dim 8": DecodeCase(dims=(8, 6)),
    "fp16": DecodeCase(dtype=FP16),
}


def decode_case(case: DecodeCase, bits: int, device: str = "cpu"):
    """query, cache, call, sinks, key_starts of a case with product-quantized pages."""
    torch.manual_seed(1)
    heads, kv_heads = case.heads
    kv, queries = filled(
        case.lengths, heads=kv_heads, key_dim=case.dims[0], value_dim=case.dims[1],
        method=KVPQ(bits=bits, **case.options), starts=case.starts, window=case.window,  # pyright: ignore
        statics=pq_statics(kv_heads, *case.dims, bits=bits), dtype=case.dtype, device=device,
    )  # fmt: skip
    query = torch.randn(len(case.starts), heads, queries, case.dims[0]).to(device, case.dtype)
    call = Reading(case.dims[0] ** -0.5, case.window, case.softcap)
    sinks = torch.randn(heads).to(device) if case.sinks else None
    starts = torch.tensor(case.starts, device=device) if any(case.starts) else None
    return query, kv, call, sinks, starts


def check_decode(case: DecodeCase, bits: int, *, interpret: bool, device: str = "cpu", lengths: bool = False) -> None:
    """Against the reference in FP64 on the same codes. Queries and probabilities are rounded to bf16, 2⁻⁹ of each: a
    logit is off by 2⁻⁹·(Σ q'²ŷ²)^½; see `decode_cases.py`."""
    query, kv, call, sinks, starts = decode_case(case, bits, device)
    read = kv
    if lengths:
        on_device = torch.tensor([kv.tokens, kv.coded, 0, 0], dtype=torch.int32, device=device)
        read = replace(kv, tokens=query.shape[2], coded=0, first=0, lengths=on_device)
    with poisoned():
        out, lse = run_decode(query, read, call, sinks, starts, interpret=interpret)
    exact, exact_lse = decode_ref(query.double(), kv, call, sinks, starts, dtype=torch.float64)
    assert out.shape == exact.shape and out.transpose(1, 2).is_contiguous()
    size = spread(query, kv, call, sinks, starts)
    delta = 2.0**-9 * logit_size(query, kv, call.scaling)
    eps = torch.finfo(case.dtype).eps
    bound = 2 * (delta + 2.0**-8) * size + eps * exact.float().norm(dim=(-2, -1))
    error = (out.double() - exact).norm(dim=(-2, -1)).float()
    assert (error <= bound + 1e-30).all(), (error / bound).max()
    blind = exact_lse.isneginf()
    assert torch.equal(lse.isneginf(), blind) and (out[blind] == 0).all()
    assert ((lse - exact_lse)[~blind].abs() <= 8 * delta + 2.0**-9).all()


def logit_size(query: Tensor, kv: CompressedKV, scaling: float) -> float:
    """(Σ q'²ŷ²)^½ of mapped queries and centroids times scaling, root mean square over codes."""
    codec = kv.pages.codec
    assert isinstance(codec, PQCodec)
    batch, _, _, head_dim = query.shape
    kv_heads = kv.sink_key.shape[1]
    mapped = query.float().view(batch, kv_heads, -1, head_dim) @ codec.keys.decode
    centroids = codec.keys.centroids.float().square().mean(dim=2).flatten(1)
    return scaling * (mapped.square() * centroids[:, None]).sum(-1).mean().sqrt().item()


def check_damaged(bits: int) -> None:
    """A damaged token that is seen makes its head's output NaN; one that is not, nothing."""
    query, kv, call, _, _ = decode_case(DECODE_CASES["plain"], bits)
    kv.pages.pages[1].key_codes[:, 0, 17, 0] = DAMAGED
    kv.pages.pages[1].value_codes[:, 1, 0, 99] = DAMAGED
    out, _ = run_decode(query, kv, call, None, None, interpret=True)
    assert out.isnan().all()
    kv.pages.pages[1].value_codes[:, 1, 0, 99] = 0
    out, _ = run_decode(query, kv, call, None, None, interpret=True)
    assert out[:, :2].isnan().all() and not out[:, 2:].isnan().any()
    out, _ = run_decode(query, kv, call, None, torch.tensor([150]), interpret=True)
    assert not out.isnan().any()


INTERPRETER_CASES = {
    f"write, {name}": functools.partial(check_write, case, interpret=True) for name, case in CASES.items()
}
INTERPRETER_CASES |= {
    f"read, {name}": functools.partial(check_read, CASES[name], interpret=True)
    for name in ("plain", "2 bits", "3 bits", "over pages", "head_dim 96, 80", "head_dim 6, 10")
}
INTERPRETER_CASES |= {
    "append": functools.partial(check_append, 4, 5, 0, interpret=True),
    "append, nothing stays dense": functools.partial(check_append, 2, 0, 0, interpret=True),
    "append, cut into a page": functools.partial(check_append, 4, 0, 60, interpret=True),
    "decode, lengths on the device": functools.partial(
        check_decode, DECODE_CASES["everything"], 4, interpret=True, lengths=True
    ),
    "decode, damaged token": functools.partial(check_damaged, 4),
}
INTERPRETER_CASES |= {
    f"decode, {name}": functools.partial(check_decode, case, 4, interpret=True) for name, case in DECODE_CASES.items()
}
INTERPRETER_CASES |= {
    f"decode, {bits} bits, {name}": functools.partial(check_decode, DECODE_CASES[name], bits, interpret=True)
    for bits, name in ((2, "plain"), (2, "everything"), (3, "plain"))
}
MUTATIONS: dict[str, tuple[str, str, str]] = {}


@needs_triton
@pytest.mark.parametrize("name", [*INTERPRETER_CASES, *MUTATIONS])
def test_kernel_in_interpreter(name):
    assert interpreter_results(__file__)[name] == ""
