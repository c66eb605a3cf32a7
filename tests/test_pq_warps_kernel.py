"""The Gluon kernel over product-quantized pages whose warps do not wait for each other, run by `lanes_cases.py` between
the Triton kernels before and behind it, against the reference; see `test_pq_decode_kernel.py` for the bounds."""

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
from test_pq_decode_kernel import check_decode, decode_case

from kompakt.kernels.decode_attention import run_decode
from kompakt.kernels.decode_pq_hopper import WARP_ROWS
from kompakt.kernels.kv_pq import DAMAGED

KERNEL = "kompakt.kernels.decode_pq_warps_triton"
PARTS = ("kompakt.kernels.lanes_triton", "kompakt.kernels.decode_pq_lookup_triton")
HOPPER = (9, 0)
NARROW, WIDE = (64, 64), (128, 128)
CASES = {
    "plain": DecodeCase(heads=(2, 1), dims=NARROW),
    "wide": DecodeCase(heads=(4, 1), dims=WIDE),
    # Every warp reads several tiles, in every place that it has for codes.
    "long": DecodeCase(lengths=(2700, 1), heads=(2, 1), starts=(0,), dims=NARROW),
    "grouped 9/3": DecodeCase(heads=(9, 3), dims=NARROW),
    "grouped 14/2": DecodeCase(heads=(14, 2), dims=WIDE),
    "one group each": DecodeCase(heads=(2, 2), dims=NARROW),
    "nothing coded": DecodeCase(lengths=(30, 1), dims=NARROW),
    "all coded": DecodeCase(lengths=(255, 1), options={"recent_tokens": 0, "sink_tokens": 0}, dims=NARROW),
    "several queries": DecodeCase(lengths=(300, 100, 2), heads=(9, 3), dims=NARROW),
    "padding": DecodeCase(starts=(3, 130, 300), heads=(2, 1), dims=NARROW),
    "many sinks": DecodeCase(
        starts=(5, 100), heads=(2, 1), options={"recent_tokens": 40, "sink_tokens": 70}, dims=NARROW
    ),
    "sink logits": DecodeCase(
        sinks=True, starts=(0, 150), lengths=(300, 150, 2), heads=(2, 1), dims=NARROW, dtype=BF16
    ),
}
BITS = (4, 2)


def run_on_lanes(work: Any, splits: int) -> None:
    """Whatever decodes product-quantized pages meanwhile does so by this kernel, in so many runs of pages."""
    module = importlib.import_module("kompakt.kernels.decode_pq_triton")
    warps = importlib.import_module(KERNEL)

    def size(constants: dict[str, Any]) -> int:
        return warps.UNIT * warps.units_of(constants["VECTORS"], constants["VECTORS"] * constants["SUB"] // 2)

    kernel = Launched(KERNEL, PARTS, "decode_pq_warps_kernel", size)
    with (
        mock.patch.object(module, "hopper_pq_refusal", lambda *_: None),
        mock.patch.object(module, "splits_of", lambda *_: splits),
        mock.patch.object(warps, "decode_pq_warps_kernel", kernel),
    ):
        work()
    assert kernel.runs


def check_warps(case: DecodeCase, bits: int, *, splits: int = 2, lengths: bool = False) -> None:
    run_on_lanes(lambda: check_decode(case, bits, interpret=True, lengths=lengths), splits)


def check_damaged(bits: int) -> None:
    """A damaged token that is seen makes its head's output NaN; one that is not, nothing; nor does one nearly so."""
    query, kv, call, _, _ = decode_case(replace(CASES["plain"], heads=(4, 2)), bits)
    outputs = []

    def run(starts: torch.Tensor | None = None) -> torch.Tensor:
        run_on_lanes(lambda: outputs.append(run_decode(query, kv, call, None, starts, interpret=True)[0]), 1)
        return outputs[-1]

    kv.pages.pages[1].key_codes[:, 0, 0, 16:19] = torch.tensor([0, DAMAGED, DAMAGED - 1], dtype=torch.uint8)
    kv.pages.pages[1].value_codes[:, 1, 0, 99] = DAMAGED
    assert run().isnan().all()
    kv.pages.pages[1].value_codes[:, 1, 0, 99] = 0
    out = run()
    assert out[:, :2].isnan().all() and not out[:, 2:].isnan().any()
    # The token behind the damaged one is the first that is seen.
    assert not run(torch.tensor([146])).isnan().any()


INTERPRETER_CASES: dict[str, Any] = {
    name: functools.partial(check_warps, case, 4, splits=1 + (name != "long")) for name, case in CASES.items()
}
INTERPRETER_CASES |= {
    f"2 bits, {name}": functools.partial(check_warps, CASES[name], 2, splits=1 + (name != "long"))
    for name in ("plain", "wide", "long", "grouped 14/2")
}
INTERPRETER_CASES |= {
    "lengths on the device": functools.partial(check_warps, CASES["sink logits"], 4, lengths=True),
    "damaged token": functools.partial(check_damaged, 4),
}
MUTATIONS = {
    "rotation of keys": ("near ^ 0x30201000", "near ^ 0x30200010", "plain"),
    "rotation of values": ("0x01010101 ^ 0x60402000", "0x01010101 ^ 0x60200040", "plain"),
    "rotation of values, 2 bits": ("^ 0x40004000", "^ 0x00000000", "2 bits, plain"),
    "other half of a row": ("BOOK + 128 * (slot // CONSTANTS)", "BOOK", "wide"),
    "order of queries": ("w[R], w[R ^ 2], w[R ^ 1]", "w[R], w[R ^ 1], w[R ^ 2]", "plain"),
    "order of queries, 2 bits": ("w[2 * (STEP ^ 2)]", "w[2 * STEP]", "2 bits, plain"),
    "second block of queries": ("operands[index // SUB]", "operands[0]", "grouped 14/2"),
    "mean of keys": ("+ shift[block]", "+ 0.0 * shift[block]", "plain"),
    "earlier tiles": ("(d[0] * alpha, d[1]", "(d[0], d[1]", "long"),
    "maximum over lanes": ("gl.maximum(x, across_float(x, 16))", "x", "plain"),
    "neighbouring tokens": ("0x1054, 0x5410", "0x5410, 0x5410", "plain"),
    "tokens of other rotations": ("mine = t % 2 == g // 4", "mine = t % 2 == t % 2", "plain"),
    "place of codes": ("there = codes + place * CODES", "there = codes + (3 - place) * CODES", "long"),
    "tiles behind the last": (" & (tile < tile_end)", "", "plain"),
    "damaged tokens": ("| flag).to", "| flag * 0).to", "damaged token"),
    "carry into the next code": ("(k & 0x7F7F7F7F) + 0x7F7F7F7F", "k + 0x7F7F7F7F", "damaged token"),
    "sums of rotations": ("2 * (index // 2) + g // 4, 2", "2 * (index // 2), 2", "plain"),
    "warps' maxima": ("factor = exp2(m[block] - top)", "factor = exp2(m[block] - m[block])", "plain"),
}  # fmt: skip


@needs_triton
@pytest.mark.parametrize("name", [*INTERPRETER_CASES, *MUTATIONS])
def test_kernel_on_lanes(name):
    assert interpreter_results(__file__)[name] == ""


def test_more_rows_are_left_to_the_other_kernel():
    from kompakt.kernels import decode_pq_hopper

    with (
        mock.patch.object(decode_pq_hopper, "launch_warps") as launch,
        mock.patch.object(decode_pq_hopper, "launch_blocks") as blocks,
        mock.patch.object(decode_pq_hopper, "dims", lambda _: WIDE),
    ):
        codec = mock.MagicMock()
        for group in (WARP_ROWS, WARP_ROWS + 1):
            decode_pq_hopper.decode_pq_hopper((1, 1), (torch.empty(0),), 1, 0, codec, QUERIES=1, GROUP=group, SUB=2)
    assert launch.call_count == blocks.call_count == 1


@pytest.mark.gpu
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("name", CASES)
def test_kernel_on_gpu(name, bits):
    skip_below(HOPPER)
    check_decode(CASES[name], bits, interpret=False, device="cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dims", [NARROW, WIDE])
@pytest.mark.parametrize("heads", [(32, 8), (14, 2), (8, 8)])
def test_long_caches_on_gpu(bits, dims, heads):
    skip_below(HOPPER)
    case = DecodeCase(heads=heads, dims=dims, lengths=(9000, 1), starts=(0, 700, 5000), dtype=BF16)
    check_decode(case, bits, interpret=False, device="cuda")
    check_decode(replace(case, starts=(0,), lengths=(40000, 1)), bits, interpret=False, device="cuda", lengths=True)
