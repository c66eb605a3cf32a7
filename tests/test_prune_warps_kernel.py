"""The Gluon kernel over pruned pages, run by `lanes_cases.py` beside the Triton kernels of dense tokens and parts,
against the reference; see `test_prune_decode_kernel.py` for the bounds."""

from __future__ import annotations

import functools
import importlib
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
from decode_cases import DecodeCase
from interpreter_cases import interpreter_results, needs_triton
from kernel_cases import BF16, skip_below
from lanes_cases import Launched
from test_prune_decode_kernel import check_decode, decode_case

from kompakt.kernels.decode_attention import run_decode
from kompakt.kernels.kv_prune import PrunePage

KERNEL = "kompakt.kernels.decode_prune_warps_triton"
PARTS = ("kompakt.kernels.lanes_triton",)
HOPPER = (9, 0)
NARROW, WIDE = (64, 64), (128, 128)
CASES = {
    "plain": DecodeCase(heads=(2, 1)),
    "wide": DecodeCase(heads=(4, 1), dims=WIDE),
    # Every warp reads several tiles, in every place that it has for tokens.
    "long": DecodeCase(lengths=(1500, 1), heads=(2, 1)),
    "grouped 9/3": DecodeCase(heads=(9, 3)),
    "grouped 14/2": DecodeCase(heads=(14, 2)),
    "nothing coded": DecodeCase(lengths=(30, 1)),
    "all coded": DecodeCase(lengths=(255, 1), options={"recent_tokens": 0, "sink_tokens": 0}),
    "several queries": DecodeCase(lengths=(300, 100, 3), heads=(8, 2)),
    "padding": DecodeCase(starts=(3, 130, 300), heads=(2, 1)),
    "many sinks": DecodeCase(starts=(5, 100), heads=(2, 1), options={"recent_tokens": 40, "sink_tokens": 70}),
    "sink logits": DecodeCase(sinks=True, starts=(0, 150), lengths=(300, 150, 2), heads=(2, 1), dtype=BF16),
}


def run_on_lanes(work: Any, splits: int) -> None:
    """Whatever decodes pruned pages meanwhile does so by this kernel, in so many runs of pages."""
    module, warps = importlib.import_module("kompakt.kernels.decode_prune_triton"), importlib.import_module(KERNEL)

    def size(constants: dict[str, Any]) -> int:
        return warps.UNIT * warps.units_of(constants["KEY_KEPT"], constants["VALUE_KEPT"], constants["DIM"])

    kernel = Launched(KERNEL, PARTS, "decode_prune_warps_kernel", size)
    with (
        mock.patch.object(module, "hopper_prune_refusal", lambda *_: None),
        mock.patch.object(module, "splits_of", lambda *_: splits),
        mock.patch.object(warps, "decode_prune_warps_kernel", kernel),
    ):
        work()
    assert kernel.runs


def check_warps(case: DecodeCase, *, splits: int = 2, lengths: bool = False) -> None:
    run_on_lanes(lambda: check_decode(case, "bf16", interpret=True, lengths=lengths), splits)


def check_damaged() -> None:
    """A damaged token that is seen makes its head's output NaN; one that is not, nothing."""
    query, kv, call, _, _ = decode_case(replace(CASES["plain"], heads=(2, 2)), "bf16")
    page = kv.pages.pages[1]
    assert isinstance(page, PrunePage)
    for stored, codes in ((page.keys, page.key_codes), (page.values, page.value_codes)):
        stored.regions(codes)[1][:, 0, 17].view(BF16)[..., :] = torch.nan
    outputs = []

    def run(starts: torch.Tensor | None = None) -> torch.Tensor:
        run_on_lanes(lambda: outputs.append(run_decode(query, kv, call, None, starts, interpret=True)[0]), 1)
        return outputs[-1]

    out = run()
    assert out[:, :1].isnan().all() and not out[:, 1:].isnan().any()
    assert not run(torch.tensor([146])).isnan().any()


INTERPRETER_CASES: dict[str, Any] = {
    name: functools.partial(check_warps, case, splits=1 + (name != "long")) for name, case in CASES.items()
}
INTERPRETER_CASES |= {
    "lengths on the device": functools.partial(check_warps, CASES["sink logits"], lengths=True),
    "damaged token": check_damaged,
}
MUTATIONS = {
    "bits below": ("count(words[INDEX] & low)", "count(words[INDEX])", "plain"),
    "words before": ("before[INDEX] + count", "before[0] + count", "plain"),
    "other queries": ("lower[step][1]", "upper[step][1]", "several queries"),
    "channels of keys": ("index % 2 * 16", "index % 2 * 8", "plain"),
    "channels of values": ("index // 4 * 8 + 2 * t", "index // 4 * 4 + 2 * t", "plain"),
    "neighbouring tokens": ("0x7632 if channel", "0x5410 if channel", "plain"),
    "order of probabilities": ("other[0], rows[0][1]", "rows[0][1], other[0]", "several queries"),
    "earlier tiles": ("(d[0] * alphas[0]", "(d[0]", "long"),
    "maximum over lanes": ("x = gl.maximum(x, across_float(x, 1))", "x = x", "plain"),
    "place of tokens": ("there = places + place * PART", "there = places + (3 - place) * PART", "long"),
    "tiles behind the last": (" & (tile < tile_end)", "", "plain"),
    "values that are not read": ("words[index], 0),)", "words[index], words[index]),)", "damaged token"),
    "warps' maxima": ("factor = exp2(m[half] - top)", "factor = exp2(m[half] - m[half])", "plain"),
}


@needs_triton
@pytest.mark.parametrize("name", [*INTERPRETER_CASES, *MUTATIONS])
def test_kernel_on_lanes(name):
    assert interpreter_results(__file__)[name] == ""


@pytest.mark.gpu
@pytest.mark.parametrize("name", CASES)
def test_kernel_on_gpu(name):
    skip_below(HOPPER)
    check_decode(CASES[name], "bf16", interpret=False, device="cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("dims", [NARROW, WIDE])
@pytest.mark.parametrize("heads", [(32, 8), (14, 2), (8, 8)])
def test_long_caches_on_gpu(dims, heads):
    skip_below(HOPPER)
    case = DecodeCase(heads=heads, dims=dims, lengths=(9000, 1), starts=(0, 700, 5000), dtype=BF16)
    check_decode(case, "bf16", interpret=False, device="cuda")
    check_decode(replace(case, starts=(0,), lengths=(40000, 1)), "bf16", interpret=False, device="cuda", lengths=True)
