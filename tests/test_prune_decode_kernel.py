"""The attention kernel over pruned pages against its reference; see `decode_cases.py`."""

from __future__ import annotations

import functools
import itertools
from dataclasses import replace

import pytest
import torch
from decode_cases import DecodeCase, filled, spread
from interpreter_cases import interpreter_results, needs_triton
from kernel_cases import BF16, poisoned, skip_below
from torch import Tensor

from kompakt.kernels.activations import FP8_CAPABILITY
from kompakt.kernels.decode_attention import CompressedKV, Reading, decode_ref, run_decode
from kompakt.kernels.kv_pages import read_page
from kompakt.kernels.kv_prune import PrunePage, Values
from kompakt.sparsify.kv_prune import KVPrune

KERNEL = "kompakt.kernels.decode_prune_triton"
SMALL = (16, 16)
CASES = {
    "plain": DecodeCase(heads=(2, 1)),
    "grouped 9/3": DecodeCase(heads=(9, 3), dims=SMALL),
    "one group each": DecodeCase(heads=(2, 2), dims=SMALL),
    "nothing coded": DecodeCase(lengths=(30, 1), dims=SMALL),
    "all coded": DecodeCase(lengths=(255, 1), options={"recent_tokens": 0, "sink_tokens": 0}, dims=SMALL),
    "16 queries": DecodeCase(lengths=(300, 16), heads=(8, 2), dims=SMALL),
    "padding": DecodeCase(starts=(3, 130, 300), dims=SMALL),
    "many sinks": DecodeCase(starts=(5, 100), options={"recent_tokens": 40, "sink_tokens": 70}, dims=SMALL),
    "window": DecodeCase(window=200, starts=(0, 260), dims=SMALL),
    "softcap": DecodeCase(softcap=3.0, dims=SMALL),
    "everything": DecodeCase(
        sinks=True, softcap=4.0, window=300, starts=(0, 150), lengths=(300, 150, 3), dims=SMALL, dtype=BF16
    ),
    "head_dim 96, 80": DecodeCase(dims=(96, 80)),
    "head_dim 33, 6": DecodeCase(dims=(33, 6)),
}


def decode_case(case: DecodeCase, values: Values, device: str = "cpu"):
    """query, cache, call, sinks, key_starts of a case with pruned pages."""
    torch.manual_seed(1)
    heads, kv_heads = case.heads
    kv, queries = filled(
        case.lengths, heads=kv_heads, key_dim=case.dims[0], value_dim=case.dims[1],
        method=KVPrune(values=values, value_sparsity=0.7, key_scores="magnitude", **case.options), starts=case.starts,
        window=case.window, dtype=case.dtype, device=device,
    )  # fmt: skip
    query = torch.randn(len(case.starts), heads, queries, case.dims[0]).to(device, case.dtype)
    call = Reading(case.dims[0] ** -0.5, case.window, case.softcap)
    sinks = torch.randn(heads).to(device) if case.sinks else None
    starts = torch.tensor(case.starts, device=device) if any(case.starts) else None
    return query, kv, call, sinks, starts


def check_decode(
    case: DecodeCase, values: Values, *, interpret: bool, device: str = "cpu", lengths: bool = False
) -> None:
    """Against the reference in FP64 on the same codes. Queries and probabilities are rounded to bf16, 2⁻⁹ of each: a
    logit is off by 2⁻⁹·(Σ q²k̂²)^½."""
    query, kv, call, sinks, starts = decode_case(case, values, device)
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
    """(Σ q²k̂²)^½ times scaling, root mean square over queries and the tokens of the first page that is read."""
    number = kv.first // 128
    if number not in kv.pages.pages or kv.coded <= number * 128:
        return 1.0
    key = read_page(kv.pages, number)[0][:, :, : kv.coded - number * 128]
    key = key.nan_to_num().square().mean(dim=2)
    q = query.float().view(key.shape[0], key.shape[1], -1, key.shape[-1]).square()
    return scaling * (q * key[:, :, None]).sum(-1).mean().sqrt().item()


def check_damaged(values: Values) -> None:
    """A damaged token that is seen makes its head's output NaN; one that is not, nothing."""
    query, kv, call, _, _ = decode_case(CASES["one group each"], values)
    page = kv.pages.pages[1]
    assert isinstance(page, PrunePage)
    for stored, codes, scales in (
        (page.keys, page.key_codes, page.key_parameters),
        (page.values, page.value_codes, page.value_parameters),
    ):
        if values == "bf16":
            stored.regions(codes)[1][:, 0, 17].view(torch.bfloat16)[..., :] = torch.nan
        else:
            scales[:, 0, 17] = torch.nan
    out, _ = run_decode(query, kv, call, None, None, interpret=True)
    assert out[:, :1].isnan().all() and not out[:, 1:].isnan().any()
    out, _ = run_decode(query, kv, call, None, torch.tensor([150]), interpret=True)
    assert not out.isnan().any()


INTERPRETER_CASES = {
    name: functools.partial(check_decode, case, "bf16", interpret=True) for name, case in CASES.items()
}
INTERPRETER_CASES |= {
    f"{values}, {name}": functools.partial(check_decode, CASES[name], values, interpret=True)
    for values, name in (("fp8", "plain"), ("int4", "plain"), ("fp8", "window"), ("int4", "head_dim 33, 6"))
}
INTERPRETER_CASES |= {
    "lengths on the device": functools.partial(check_decode, CASES["everything"], "bf16", interpret=True, lengths=True),
    "damaged token": functools.partial(check_damaged, "bf16"),
    "damaged int4 token": functools.partial(check_damaged, "int4"),
}
MUTATIONS = {
    "bits below a lane": ("before[:, :, None] + ones_of(", "before[:, :, None] + 0 * ones_of(", "plain"),
    "words before": ("- ones\n", "\n", "plain"),
    "places within a lane": ("return x, place + bit", "return x, place", "fp8, plain"),
    "channels of a lane": ("bit = (bits >> index) & 1", "bit = bits & 1", "fp8, plain"),
    "order of channels": ("tl.join(tl.join(x0, x2)", "tl.join(tl.join(x0, x1)", "fp8, plain"),
    "first of two numbers": ("(number & 1)", "(number & 0)", "plain"),
    "third word": ("tl.load(source + 2)", "tl.load(source)", "plain"),
    "words of a lane": ("tl.join(first, second)", "tl.join(second, first)", "plain"),
    "rows of fp8": ("float8e4nv)) + token[:, None] * KEPT", "float8e4nv)) + token[:, None] * (KEPT - 4)", "fp8, plain"),
    "scale of keys": ("scale_of(record + KEY_SCALES", "scale_of(record + VALUE_SCALES", "fp8, plain"),
    "scale of values": ("p = p * scale_of", "p = p + 0 * scale_of", "int4, plain"),
    "halves of a byte": ("both >> (place & 1) * 4", "both >> (place & 1) * 3", "int4, plain"),
    "earlier tiles": ("acc * alpha[:, None]", "acc", "plain"),
    "soft cap": ("s = capped(s, softcap)", "s = s", "softcap"),
    "tokens that are not read": ("mask=valid[:, None] & (word", "mask=(word >= 0)[None, :] & (word", "damaged token"),
    "tiles of a page": ("page_end * TILES", "page_end * TILES - 1", "plain"),
    "window on the device": ("tokens - QUERIES - window + 1, 0)", "tokens - 150, 0)", "lengths on the device"),
}  # fmt: skip


@needs_triton
@pytest.mark.parametrize("name", [*INTERPRETER_CASES, *MUTATIONS])
def test_kernel_in_interpreter(name):
    assert interpreter_results(__file__)[name] == ""


@needs_triton
def test_permutes_put_numbers_at_their_channels():
    """What the assembly does, which the interpreter does not run, in Python."""
    from kompakt.kernels.decode_prune_triton import HALVES, RESTS

    def permuted(low: int, high: int, selector: int) -> int:
        every = low.to_bytes(4, "little") + high.to_bytes(4, "little")
        return int.from_bytes(bytes(every[selector >> 4 * index & 7] for index in range(4)), "little")

    for bits, odd in itertools.product(range(16), range(2)):
        numbers = [0x1111 * (index + 1) for index in range(6)]
        words = [numbers[index] | numbers[index + 1] << 16 for index in (0, 2, 4)]
        run = words[0] | words[1] << 32 | words[2] << 64
        low, high = (run >> 16 * odd) & 0xFFFFFFFF, (run >> 16 * odd + 32) & 0xFFFFFFFF
        first, second = permuted(low, 0, HALVES[bits & 3]), permuted(low, high, RESTS[bits & 3])
        second = permuted(second, 0, HALVES[bits >> 2])
        kept = iter(numbers[odd:])
        wanted = [next(kept) if bits >> channel & 1 else 0 for channel in range(4)]
        assert [first & 0xFFFF, first >> 16, second & 0xFFFF, second >> 16] == wanted


@pytest.mark.gpu
@pytest.mark.parametrize("values", ["bf16", "fp8", "int4"])
@pytest.mark.parametrize("name", CASES)
def test_kernel_on_gpu(name, values):
    skip_below(FP8_CAPABILITY)
    check_decode(CASES[name], values, interpret=False, device="cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("values", ["bf16", "fp8", "int4"])
def test_long_caches_on_gpu(values):
    skip_below(FP8_CAPABILITY)
    case = DecodeCase(heads=(32, 8), dims=(128, 128), lengths=(9000, 1), starts=(0, 700, 5000), dtype=BF16)
    check_decode(case, values, interpret=False, device="cuda")
    check_decode(replace(case, lengths=(9000, 7), window=4000), values, interpret=False, device="cuda")
