"""Attention over a sparse index: the reference against FP64 over the mask that the index means, the Triton kernel
against the reference, with every list, static pattern and mode.

The tolerance of kernels is that of `attention_cases.py`.
"""

from __future__ import annotations

import functools
from dataclasses import replace
from unittest import mock

import pytest
import torch
from attention_cases import P_ROUNDING, AttentionCase, operands_of
from interpreter_cases import interpreter_results, needs_triton
from kernel_cases import FP8_ACCUMULATOR, poisoned, skip_below
from sparse_cases import SparseCase, masked_attention, oracle_mask
from torch import Tensor

from kompakt.kernels import sparse_attention as module
from kompakt.kernels.attention import FP8_VALUES, KEY_KINDS, MODES, attention_ref, prefill_attention, query_means
from kompakt.kernels.attention_quant import LEVELS, rotate, round_codes, scale_of
from kompakt.kernels.segments import visible, whole
from kompakt.kernels.sparse_attention import (
    EVERYTHING,
    StaticPattern,
    sparse_attention,
    sparse_attention_ref,
)
from kompakt.kernels.sparse_index import Extent, index_from_tiles

KERNEL = "kompakt.kernels.sparse_attention_triton"
CASES = {
    "causal": SparseCase(AttentionCase(lengths=(140, 140), dims=(32, 32)), 1),
    "one token": SparseCase(AttentionCase(lengths=(1, 1)), 1),
    "one query": SparseCase(AttentionCase(lengths=(1, 133)), 1),
    "grouped 9/3": SparseCase(AttentionCase(heads=(9, 3), lengths=(65, 233), dims=(16, 16)), 3),
    "grouped 14/2": SparseCase(AttentionCase(heads=(14, 2), lengths=(33, 166), dims=(16, 16)), 14),
    "full": SparseCase(AttentionCase(lengths=(100, 140), dims=(32, 32), causal=False), 1),
    "padding": SparseCase(
        AttentionCase(batch=2, lengths=(150, 230), dims=(32, 32), segments="padding", hard="poisoned padding"),
        1,
        tail=3,
    ),
    "map": SparseCase(AttentionCase(heads=(4, 2), lengths=(130, 333), dims=(16, 16)), 4, kind="map"),
    "sinks, softcap": SparseCase(
        AttentionCase(heads=(4, 2), lengths=(80, 130), dims=(16, 16), sinks=True, softcap=3.0), 2
    ),
    "head_dim 80, 96": SparseCase(AttentionCase(lengths=(70, 130), dims=(80, 96)), 2),
    "skip": SparseCase(AttentionCase(lengths=(70, 130), sinks=True), 2, kind="skip"),
    "dense": SparseCase(AttentionCase(lengths=(130, 200), dims=(16, 16)), 2, kind="dense"),
    "columns alone": SparseCase(
        AttentionCase(lengths=(70, 300), dims=(32, 32)), 1, slashes=0, columns=150, diagonal=False
    ),
}
STATIC = {
    "a-shape": ((9, 3), (150, 333), 2, ((5, 70, 0), (70, 40, 0), (0, 1, 0))),
    "tri-shape": ((2, 1), (200, 333), 1, ((8, 64, 70),)),
    "dense, skip, window": ((4, 2), (130, 260), 1, ((0, EVERYTHING, 0), (0, 0, 0), (0, 33, 0), (64, 128, 128))),
    "sinks alone, tail alone": ((2, 2), (100, 300), 1, ((130, 0, 0), (0, 0, 33))),
    "padding": ((2, 1), (200, 290), 2, ((5, 30, 9),)),
    "full": ((2, 1), (300, 300), 1, ((200, 20, 30),)),
}
# Every list in one mode, and every mode on the lists that meet its own code.
INTERPRETED = [("bf16", name) for name in CASES] + [(mode, "columns alone") for mode in MODES if mode != "bf16"]
INTERPRETED += [("int8_fp8", name) for name in ("grouped 9/3", "padding", "sinks, softcap")]


def static_call(name: str) -> tuple[AttentionCase, StaticPattern]:
    heads, lengths, batch, rows = STATIC[name]
    segments = "padding" if name == "padding" else None
    case = AttentionCase(heads=heads, lengths=lengths, batch=batch, segments=segments, causal=name != "full")
    return case, StaticPattern(torch.tensor(rows, dtype=torch.int32))


def static_oracle(case: AttentionCase, pattern: StaticPattern, segments) -> Tensor:
    """(batch, heads of the pattern, queries, keys) bool, key by key."""
    queries, keys = case.lengths
    places = whole(case.batch, queries, keys, "cpu") if segments is None else segments
    mask = visible(places, case.batch, slice(0, queries), keys, causal=case.causal, window=None)
    found = torch.zeros((case.batch, len(pattern.table), queries, keys), dtype=torch.bool)
    j = torch.arange(keys)
    for row, q_start, q_stop, k_start, k_stop in places.table.tolist():
        for i in range(q_start, q_stop):
            p = i - q_stop + k_stop
            for head, (sink, window, tail) in enumerate(pattern.table.tolist()):
                found[row, head, i] = (j - k_start < sink) | ((p - j).abs() < window) | (k_stop - p <= tail)
    return found & mask[:, None]


def make(name: str, static: bool):
    """query, key, value, sinks, segments, index, the case, and the mask that the index means."""
    if static:
        case, index = static_call(name)
        tensors = case.make()
        return *tensors, index, case, static_oracle(case, index, tensors[-1])
    sparse = CASES[name]
    tensors = sparse.attention.make()
    index = sparse.index(tensors[-1])
    return *tensors, index, sparse.attention, oracle_mask(sparse, tensors[-1])


ALL = [(name, False) for name in CASES] + [(name, True) for name in STATIC]


@pytest.mark.parametrize(("name", "static"), ALL)
def test_reference(name, static):
    query, key, value, sinks, segments, index, case, mask = make(name, static)
    query, key, value = (t.float() for t in (query, key, value))
    call = case.call("bf16")
    out, lse = sparse_attention_ref(query, key, value, index, call, sinks, segments, dtype=torch.float64)
    expected, expected_lse = masked_attention(query, key, value, mask, call.scaling, call.softcap, sinks)
    # The result and lse are stored in FP32.
    assert ((out.transpose(1, 2) - expected).abs() <= 2.0**-22 * expected.abs() + 1e-9).all()
    seen = expected_lse.isfinite()
    assert torch.equal(seen, lse.isfinite()) and (out.transpose(1, 2)[~seen] == 0).all()
    off = (lse - expected_lse)[seen].abs()
    assert (off <= 2.0**-22 * (1 + expected_lse[seen].abs())).all()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("batch", [1, 2])
def test_dense_index_is_dense_attention(mode, batch):
    """In every mode: all tiles listed, or a window that hides nothing, is what attention without an index gives."""
    case = AttentionCase(heads=(9, 3), lengths=(130, 200), batch=batch, segments="padding" if batch == 2 else None)
    query, key, value, _, segments = case.make()
    query, key, value = (t.float() for t in (query, key, value))
    call = case.call(mode)
    expected, expected_lse = attention_ref(query, key, value, call, None, segments, dtype=torch.float64)
    extent = Extent.of(batch, 130, 200, segments, torch.device("cpu"))
    every = torch.ones((batch, 3, extent.query_tiles, extent.key_tiles), dtype=torch.bool)
    static = StaticPattern(torch.tensor([[0, EVERYTHING, 0]] * 3, dtype=torch.int32))
    for index in (index_from_tiles(every, extent, causal=True), static):
        out, lse = sparse_attention_ref(query, key, value, index, call, None, segments, dtype=torch.float64)
        # The rotation of queries is added up in another order; a code at the border between two may go the other way.
        assert (out - expected).abs().max() <= 2.0**-20 * expected.abs().max()
        seen = expected_lse.isfinite()
        assert (lse - expected_lse)[seen].abs().max() <= 2.0**-20 * expected_lse[seen].abs().max()


def test_recall_from_lse():
    """exp(lse − lse of dense attention) is the share of probabilities that was visited."""
    query, key, value, _, _, index, case, mask = make("map", False)
    out, lse = sparse_attention(query.float(), key.float(), value.float(), index, check=True)
    _, dense = prefill_attention(query.float(), key.float(), value.float(), mode="bf16")
    logits = query.float() @ key.float().repeat_interleave(2, 1).mT * case.dims[0] ** -0.5
    logits = logits.masked_fill(
        ~torch.ones(logits.shape[2:]).tril(logits.shape[3] - logits.shape[2]).bool(), -torch.inf
    )
    share = torch.softmax(logits, dim=-1).masked_fill(~mask, 0).sum(-1)
    assert torch.allclose(torch.exp(lse - dense), share, atol=1e-5) and share.min() < 0.99
    assert out.shape == query.shape


def check(run, quantizer, name: str, mode: str, *, static: bool, fp8_sums: bool) -> None:
    """`run` on poisoned memory, held to the bound of `attention_cases.check_kernel` over the listed keys."""
    query, key, value, sinks, segments, index, case, _ = make(name, static)
    call, heads, kv_heads = case.call(mode), query.shape[1], key.shape[1]
    with poisoned():
        out, lse = run(query, key, value, index, call, sinks, segments)
    operands = operands_of(quantizer)
    bounds = None if segments is None else segments.key_bounds(query.shape[0])
    with mock.patch.object(module, "operands_ref", operands):
        expected, expected_lse = sparse_attention_ref(
            query.float(), key, value, index, call, sinks, segments, dtype=torch.float64
        )
    k, v, key_mean, value_mean = operands(key, value, mode, bounds)

    def sizes(*_: object) -> tuple[Tensor, ...]:
        return k, v.abs(), key_mean, value_mean.abs()

    with mock.patch.object(module, "operands_ref", sizes):
        size, _ = sparse_attention_ref(
            query.float(), key, value.abs(), index, call, sinks, segments, dtype=torch.float64
        )
    kind, wanted = KEY_KINDS[mode], query.float()
    if mode == "int4_fp8":
        wanted = wanted - query_means(query, segments or whole(query.shape[0], *case.lengths, "cpu"))
    turned = wanted if kind is None else rotate(wanted)
    k_heads = k.abs().repeat_interleave(heads // kv_heads, 1)
    reach = (turned.abs() @ k_heads.mT).amax(-1)
    delta = reach * call.scaling * (FP8_ACCUMULATOR if fp8_sums and mode == "fp8_fp8" else 2.0**-20) + 1e-6
    if kind is not None:
        scale = scale_of(turned.abs().amax(-1, keepdim=True), LEVELS[kind])
        slack = 2.0**-20 * (turned.abs() + turned.abs().amax(-1, keepdim=True))
        codes = [round_codes(turned + sign * slack, scale, kind).float() for sign in (1, -1)]
        flips = (codes[0] - codes[1]).abs() * scale
        delta = delta + (flips * k_heads.amax(2, keepdim=True)).sum(-1) * call.scaling
    fp8_values = mode in FP8_VALUES
    relative = 2.0**-4 if fp8_values else P_ROUNDING[case.dtype]
    relative += FP8_ACCUMULATOR if fp8_values and fp8_sums else 2.0**-20
    by_row = relative + torch.expm1(2 * delta.double()).transpose(1, 2)[..., None]
    subnormal = case.lengths[1] * 2.0**-10 / 448 * v.abs().amax().item() if fp8_values else 0.0
    allowed = by_row * size + subnormal + torch.finfo(case.dtype).eps * expected.abs() + torch.finfo(case.dtype).tiny
    excess = (out.double() - expected).abs() - allowed
    assert (excess <= 0).all(), f"exceeds the allowed error by {excess.nan_to_num(torch.inf).max():.3e}"
    seen = expected_lse.isfinite()
    assert torch.equal(seen, lse.isfinite()) and not lse.isnan().any()
    off = (lse - expected_lse)[seen].abs()
    assert (off <= 2 * delta[seen] + 2.0**-20 * (1 + expected_lse[seen].abs())).all(), f"lse is off by {off.max():.3e}"


def quantize(*arguments, interpret: bool = False):
    from kompakt.kernels.attention_quant_triton import quantize_keys_values

    return quantize_keys_values(*arguments, interpret=interpret)


def run_interpreted(*arguments) -> tuple[Tensor, Tensor]:
    from kompakt.kernels.sparse_attention_triton import sparse_attention_triton

    return sparse_attention_triton(*arguments, interpret=True)


def interpreted(name: str, mode: str, static: bool) -> None:
    check(run_interpreted, functools.partial(quantize, interpret=True), name, mode, static=static, fp8_sums=False)


INTERPRETER_CASES = {
    **{f"{mode}, {name}": functools.partial(interpreted, name, mode, False) for mode, name in INTERPRETED},
    **{f"static, {name}": functools.partial(interpreted, name, "bf16", True) for name in STATIC},
    "static, int8_fp8": functools.partial(interpreted, "tri-shape", "int8_fp8", True),
}
MUTATIONS = {
    "aligned to the start": ("position = i - q_stop + k_stop", "position = i", "bf16, grouped 9/3"),
    "group ignored": ("kv_head = head // group", "kv_head = head * 0", "bf16, grouped 9/3"),
    "head of the index": ("head = listed_head * share +", "head = listed_head * 0 +", "bf16, grouped 9/3"),
    "first key of a segment": ("(token >= k_start)[None, :] &", "(token >= 0)[None, :] &", "bf16, padding"),
    "tile read ahead": ("tl.minimum(entry + 1, hi - 1)", "entry", "bf16, one query"),
    "edges unmasked": ("run != (2 if STATIC else 0)", "run < 0", "bf16, grouped 9/3"),
    "causality of columns": (
        "if CAUSAL:\n                    seen = seen & (token[None, :] <= position[:, None])\n                s =",
        "if False:\n                    seen = seen\n                s =",
        "bf16, columns alone",
    ),
    "fill of the last columns": ("(valid & (token >= k_start)", "((token >= k_start)", "bf16, columns alone"),
    "scale of a column": (
        "tl.load(key_scale_base + token // SCALED)",
        "tl.load(key_scale_base + token * 0)",
        "int8_fp8, columns alone",
    ),
    "unit of a column": ("acc = acc * unit +", "acc = acc +", "int8_fp8, grouped 9/3"),
    "mean of a column": ("mean[None, :] * total[:, None]", "mean[None, :] * 0.0", "int8_fp8, grouped 9/3"),
    "value scale": ("alpha *= unit / next_unit", "alpha *= 1.0", "int8_fp8, grouped 9/3"),
    "static sink": ("(token < k_start + sink)", "(token < sink)", "static, padding"),
    "static window": ("position[:, None] - window)", "position[:, None] - window + 1)", "static, a-shape"),
    "static tail": ("k_stop - tail)[:, None]", "k_stop - tail - 1)[:, None]", "static, tri-shape"),
    "static sinks behind the window": ("tl.maximum(stop, s1))", "stop)", "static, full"),
    "lse without shift": ("true_m = m + shift", "true_m = m", "int8_fp8, columns alone"),
    "sink": ("denominator += tl.math", "denominator += 0.0 * tl.math", "int8_fp8, sinks, softcap"),
}


@needs_triton
@pytest.mark.parametrize("name", [*INTERPRETER_CASES, *MUTATIONS])
def test_kernel(name):
    assert interpreter_results(__file__)[name] == ""


def quantize_on_gpu(*arguments):
    return tuple(to_device(item, "cpu") for item in quantize(*(to_device(item, "cuda") for item in arguments)))


def run_on_gpu(*arguments) -> tuple[Tensor, Tensor]:
    from kompakt.kernels.sparse_attention_triton import sparse_attention_triton

    out, lse = sparse_attention_triton(*(to_device(item, "cuda") for item in arguments))  # pyright: ignore
    return out.cpu(), lse.cpu()


@pytest.mark.gpu
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("name", "static"), ALL)
def test_kernel_on_gpu(name, static, mode):
    skip_below((8, 9))
    check(run_on_gpu, quantize_on_gpu, name, mode, static=static, fp8_sums=True)


def to_device(item, device: str):
    """A tensor, or what holds tensors, on a device."""
    if isinstance(item, Tensor):
        return item.to(device)
    if hasattr(item, "__dataclass_fields__"):
        moved = {key: value.to(device) for key, value in vars(item).items() if isinstance(value, Tensor)}
        return replace(item, **moved)
    return item


def test_refusals():
    query, key, value, _, _, index, _, _ = make("grouped 9/3", False)
    for change, message in (
        ({"index": replace(index, extent=(2, 3, 9))}, r"the index is for .* the call has"),
        ({"index": StaticPattern(torch.zeros((3, 4), dtype=torch.int32))}, "expected .heads, 3. int32"),
        ({"index": StaticPattern(torch.zeros((1, 3), dtype=torch.int32))}, "does not fit 9 heads over 3 KV heads"),
        ({"mode": "int3"}, "unknown mode"),
        ({"scaling": -1.0}, "scaling is -1.0"),
    ):
        with pytest.raises(ValueError, match=message):
            sparse_attention(query, key, value, **{"index": index, **change})
