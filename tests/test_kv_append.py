"""Tokens that are appended with the lengths on the device leave what a store leaves that counts on the host."""

from __future__ import annotations

import copy
import functools
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from decode_cases import METHODS, statics_of
from interpreter_cases import interpreter_results, needs_triton
from kernel_cases import BF16, FP16, skip_below

from kompakt.compress.cache import TokenStore
from kompakt.kernels.activations import FP8_CAPABILITY
from kompakt.kernels.decode_attention import dequantized
from kompakt.kernels.kv_append import LENGTHS, Appendable, append_ref, append_token

KERNEL = "kompakt.kernels.kv_append_triton"


@dataclass(frozen=True)
class AppendCase:
    """start: tokens that are there; then `steps` come one by one. crop: taken away before that."""

    kind: str = "int4"
    start: int = 250
    steps: int = 14
    crop: int = 0
    dims: tuple[int, int] = (16, 16)
    starts: tuple[int, ...] = (0, 3)
    options: dict[str, Any] = field(default_factory=lambda: {"recent_tokens": 5})
    dtype: torch.dtype = FP16


CASES = {
    "a page": AppendCase(),
    "fp8": AppendCase(kind="fp8"),
    "bf16 pages": AppendCase(kind="bf16", dtype=BF16),
    "no page": AppendCase(start=140, steps=5),
    "nothing stays dense": AppendCase(start=120, options={"recent_tokens": 0}),
    "first tokens are sinks": AppendCase(start=1, steps=9, starts=(0, 4)),
    "no sinks": AppendCase(options={"recent_tokens": 5, "sink_tokens": 0}),
    "ring that turns": AppendCase(start=415, steps=20, options={"recent_tokens": 40}),
    "cut into a page": AppendCase(start=300, crop=60, steps=30, options={"recent_tokens": 0}),
    "head_dim 12, 10": AppendCase(dims=(12, 10)),
}


def check(case: AppendCase, append, device: str = "cpu") -> None:
    torch.manual_seed(0)
    statics = statics_of(3, case.dims[0]) if case.kind == "int4" else {}
    store = TokenStore(METHODS[case.kind](**case.options), statics=statics, starts=list(case.starts))
    key, value = (
        torch.randn(len(case.starts), 3, case.start + case.steps, dim).to(device, case.dtype) for dim in case.dims
    )
    begun = slice(0, case.start)
    store.append(key[:, :, begun], value[:, :, begun])
    if case.crop:
        store.crop(case.crop)
    wanted = copy.deepcopy(store)
    assert store.pool is not None
    for number in range(store.coded // 128, (store.tokens + case.steps) // 128 + 1):
        if number not in store.pages:
            store.add_page(number)
    lengths = torch.zeros(LENGTHS, dtype=torch.int32, device=device)
    lengths[:2] = torch.tensor([store.tokens, store.coded])
    to = Appendable(
        lengths,
        (store.key, store.value),
        (store.sink_key, store.sink_value),
        store.sink_starts,
        store.where(),
        store.method.recent_tokens,
    )
    for index in range(case.start, case.start + case.steps):
        new = key[:, :, index : index + 1], value[:, :, index : index + 1]
        wanted.append(*new)
        append(*new, to)
        assert lengths.tolist() == [wanted.tokens, wanted.coded, 0, 0]
    store.tokens, store.coded = wanted.tokens, wanted.coded
    for got, expected in zip(
        dequantized(store.read(None, 1), torch.float32), dequantized(wanted.read(None, 1), torch.float32), strict=True
    ):
        assert torch.equal(got, expected)
    assert torch.equal(store.sink_key, wanted.sink_key) and torch.equal(store.sink_value, wanted.sink_value)


INTERPRETER_CASES = {
    name: functools.partial(check, case, functools.partial(append_token, interpret=True))
    for name, case in CASES.items()
}
MUTATIONS = {
    "slot": ("slot = tokens % ring_length", "slot = (tokens + 1) % ring_length", "no page"),
    "first sink": ("(sink >= 0) & (sink < sink_tokens)", "(sink > 0) & (sink < sink_tokens)", "first tokens are sinks"),
    "last sink": ("(sink < sink_tokens)", "(sink < sink_tokens - 1)", "first tokens are sinks"),
    "when a page is due": (">= recent_tokens:", "> recent_tokens:", "a page"),
    "what was coded stays": ("write = column >= coded", "write = column >= 0", "cut into a page"),
    "ring of a page": ("source = column % ring_length", "source = column % (ring_length - 1)", "ring that turns"),
    "end of the codes": ("coded = end", "coded = end + 0 * coded - 1", "a page"),
    "last program": ("tl.num_programs(0) - 1", "tl.num_programs(0)", "no page"),
    "programs that are done": ("tl.store(length_ptr + 2, 0)", "tl.store(length_ptr + 3, 0)", "no page"),
}


@pytest.mark.parametrize("name", CASES)
def test_reference(name):
    check(CASES[name], append_ref)


@needs_triton
@pytest.mark.parametrize("name", [*INTERPRETER_CASES, *MUTATIONS])
def test_kernel_in_interpreter(name):
    assert interpreter_results(__file__)[name] == ""


@pytest.mark.gpu
@pytest.mark.parametrize("name", CASES)
def test_kernel_on_gpu(name):
    skip_below(FP8_CAPABILITY)
    check(CASES[name], append_token, "cuda")
