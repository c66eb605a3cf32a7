"""The attention kernel over product-quantized pages against its reference; see `decode_cases.py`."""

from __future__ import annotations

import functools
from dataclasses import replace

import pytest
import torch
from decode_cases import DecodeCase, filled, spread
from interpreter_cases import interpreter_results, needs_triton
from kernel_cases import BF16, poisoned, skip_below
from pq_cases import pq_statics
from torch import Tensor

from kompakt.kernels.activations import FP8_CAPABILITY
from kompakt.kernels.decode_attention import CompressedKV, Reading, decode_ref, run_decode
from kompakt.kernels.kv_pq import DAMAGED, PQCodec
from kompakt.quant.kv_pq import KVPQ

KERNEL = "kompakt.kernels.decode_pq_triton"
SMALL = (16, 16)
CASES = {
    "plain": DecodeCase(),
    "grouped 9/3": DecodeCase(heads=(9, 3), starts=(0, 0), dims=SMALL),
    "one group each": DecodeCase(heads=(2, 2), dims=SMALL),
    "nothing coded": DecodeCase(lengths=(30, 1), dims=SMALL),
    "all coded": DecodeCase(lengths=(255, 1), options={"recent_tokens": 0, "sink_tokens": 0}, dims=SMALL),
    "several queries": DecodeCase(lengths=(300, 100, 5), heads=(9, 3), starts=(0, 0), dims=SMALL),
    "16 queries": DecodeCase(lengths=(300, 16), heads=(8, 2), dims=SMALL),
    "padding": DecodeCase(starts=(0, 3, 130, 300), dims=SMALL),
    "many sinks": DecodeCase(starts=(5, 100), options={"recent_tokens": 40, "sink_tokens": 70}, dims=SMALL),
    "window": DecodeCase(window=200, starts=(0, 260), dims=SMALL),
    "softcap": DecodeCase(softcap=3.0, dims=SMALL),
    "everything": DecodeCase(
        sinks=True, softcap=4.0, window=300, starts=(0, 150), lengths=(300, 150, 3), dims=SMALL, dtype=BF16
    ),
    "head_dim 96, 80": DecodeCase(dims=(96, 80)),
    "head_dim 8": DecodeCase(dims=(8, 6)),
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
    query, kv, call, _, _ = decode_case(CASES["plain"], bits)
    kv.pages.pages[1].key_codes[:, 0, 0, 17] = DAMAGED
    kv.pages.pages[1].value_codes[:, 1, 0, 99] = DAMAGED
    out, _ = run_decode(query, kv, call, None, None, interpret=True)
    assert out.isnan().all()
    kv.pages.pages[1].value_codes[:, 1, 0, 99] = 0
    out, _ = run_decode(query, kv, call, None, None, interpret=True)
    assert out[:, :2].isnan().all() and not out[:, 2:].isnan().any()
    out, _ = run_decode(query, kv, call, None, torch.tensor([150]), interpret=True)
    assert not out.isnan().any()


INTERPRETER_CASES = {name: functools.partial(check_decode, case, 4, interpret=True) for name, case in CASES.items()}
INTERPRETER_CASES |= {
    f"{bits} bits, {name}": functools.partial(check_decode, CASES[name], bits, interpret=True)
    for bits, name in ((2, "plain"), (2, "everything"), (3, "head_dim 96, 80"))
}
INTERPRETER_CASES |= {
    "lengths on the device": functools.partial(check_decode, CASES["everything"], 4, interpret=True, lengths=True),
    "damaged token": functools.partial(check_damaged, 4),
}
MUTATIONS = {
    "map of queries": ("tl.load(maps + index, mask=there", "tl.load(maps, mask=there", "plain"),
    "mean of keys": ("s += shift[:, None]", "s += 0.0 * shift[:, None]", "one group each"),
    "second channel": ("multiply(q1, k1.T", "multiply(q1, k0.T", "plain"),
    "other channels of keys": ("multiply(q3, k3.T", "multiply(q3, k2.T", "2 bits, plain"),
    "other channels of values": ("place + 3, high[1]", "place + 3, high[0]", "2 bits, plain"),
    "mean of values": ("out = total[:, None] * mean", "out = 0.0 * total[:, None] * mean", "one group each"),
    "earlier tiles": ("(low[0] * alpha[:, None], low[1] * alpha[:, None])", "(low[0], low[1])", "plain"),
    "soft cap": ("s = capped(s, softcap)", "s = s", "softcap"),
    "damaged tokens": ('tl.where(damaged[None, :], float("nan"), s)', "s", "damaged token"),
    "head of the codebook": ("(head * VECTORS + vector) * CENTROIDS_", "vector * CENTROIDS_", "one group each"),
    "tiles of a page": ("page_end * TILES", "page_end * TILES - 1", "plain"),
    "window on the device": ("tokens - QUERIES - window + 1, 0)", "tokens - 150, 0)", "lengths on the device"),
}


@needs_triton
@pytest.mark.parametrize("name", [*INTERPRETER_CASES, *MUTATIONS])
def test_kernel_in_interpreter(name):
    assert interpreter_results(__file__)[name] == ""


@pytest.mark.gpu
@pytest.mark.parametrize("bits", [4, 3, 2])
@pytest.mark.parametrize("name", CASES)
def test_kernel_on_gpu(name, bits):
    if all(dim * bits % 8 == 0 for dim in CASES[name].dims):
        skip_below(FP8_CAPABILITY)
        check_decode(CASES[name], bits, interpret=False, device="cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("bits", [4, 2])
def test_long_caches_on_gpu(bits):
    skip_below(FP8_CAPABILITY)
    case = DecodeCase(heads=(32, 8), dims=(128, 128), lengths=(9000, 1), starts=(0, 700, 5000), dtype=BF16)
    check_decode(case, bits, interpret=False, device="cuda")
    check_decode(replace(case, lengths=(9000, 7), window=4000), bits, interpret=False, device="cuda")
