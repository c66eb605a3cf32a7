"""Scores of keys and distances against probabilities in FP64 summed one by one, and the kernels against the
reference.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from attention_cases import AttentionCase
from interpreter_cases import interpreter_results, needs_triton
from kernel_cases import poisoned, skip_below
from torch import Tensor

from kompakt.kernels.line_scores import LAST, last_queries, line_scores, line_scores_ref
from kompakt.kernels.segments import visible, whole
from kompakt.kernels.sparse_index import Extent

KERNEL = "kompakt.kernels.line_scores_triton"
CASES = {
    "causal": AttentionCase(lengths=(150, 150), dims=(32, 32)),
    "one token": AttentionCase(lengths=(1, 1), dims=(16, 16)),
    "few queries": AttentionCase(heads=(9, 3), lengths=(17, 133), dims=(32, 32), batch=2),
    "pieces": AttentionCase(heads=(2, 2), lengths=(65, 2100), dims=(16, 16)),
    "padding": AttentionCase(
        heads=(14, 2), lengths=(150, 290), dims=(16, 16), batch=2, segments="padding", hard="poisoned padding"
    ),
}


def prepared(case: AttentionCase) -> tuple[Tensor, Tensor, Extent]:
    query, key, _, _, segments = case.make()
    return query, key, Extent.of(case.batch, *case.lengths, segments, torch.device("cpu"))


def brute(case: AttentionCase) -> tuple[Tensor, Tensor]:
    query, key, _, _, segments = case.make()
    queries, keys = case.lengths
    places = whole(case.batch, queries, keys, "cpu") if segments is None else segments
    mask = visible(places, case.batch, slice(0, queries), keys, causal=True, window=None)
    vertical, slash = (torch.zeros((case.batch, case.heads[0], keys), dtype=torch.float64) for _ in range(2))
    for row, q_start, q_stop, k_start, k_stop in places.table.tolist():
        run = range(max(q_stop - LAST, q_start), q_stop)
        for head in range(case.heads[0]):
            for i in run:
                seen = mask[row, i].nonzero().flatten()
                k = key[row, head * case.heads[1] // case.heads[0], seen].double()
                p = torch.softmax(k @ query[row, head, i].double() * case.call("bf16").scaling, dim=0) / len(run)
                vertical[row, head, seen - k_start] += p
                slash[row, head, i - q_stop + k_stop - seen] += p
    return vertical, slash


def close(found: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor], case: AttentionCase) -> None:
    """Logits are FP32 sums, off by 2⁻²⁰ of Σ|q·k| at most; probabilities by as much relatively, twice."""
    query, key, _ = prepared(case)
    reach = query.float().norm(dim=-1).max() * key.float().nan_to_num().norm(dim=-1).max()
    relative = 4 * 2.0**-20 * (1 + float(reach) * case.call("bf16").scaling)
    for one, other in zip(found, expected, strict=True):
        assert ((one - other).abs() <= relative * other.abs() + 1e-12).all()


@pytest.mark.parametrize("name", CASES)
def test_reference(name):
    case = CASES[name]
    query, key, extent = prepared(case)
    found = line_scores(query, key, extent, scaling=case.call("bf16").scaling)
    expected = brute(case)
    close(found, expected, case)
    for item in found:
        assert torch.allclose(item.sum(-1), torch.ones(()), atol=1e-4)


def interpreted(case: AttentionCase) -> None:
    from kompakt.kernels.line_scores_triton import line_scores_triton

    query, key, extent = prepared(case)
    last, numbers = last_queries(query, extent)
    scaling = case.call("bf16").scaling
    expected = line_scores_ref(last.double().float(), key, numbers, scaling)
    with poisoned():
        found = line_scores_triton(last, key, numbers, scaling, interpret=True)
    close(found, expected, case)  # pyright: ignore


INTERPRETER_CASES = {name: lambda case=case: interpreted(case) for name, case in CASES.items()}
MUTATIONS = {
    "diagonal": ("c[None, :] + number[:, None]", "c[None, :] + 0 * number[:, None]", "causal"),
    "first tile of distances": ("(tl.program_id(0) - 1) * LAST", "tl.program_id(0) * LAST", "causal"),
    "causality": ("token[None, :] <= (position + number)[:, None]", "token[None, :] < k_stop", "causal"),
    "count of queries": ("tl.maximum(LAST - first, 1)", "tl.maximum(LAST, 1)", "few queries"),
    "start of the keys": ("column = begin - k_start +", "column = begin +", "padding"),
    "piece": ("tl.minimum(begin + PIECE, k_stop)", "tl.minimum(begin + PIECE - 64, k_stop)", "pieces"),
}


@needs_triton
@pytest.mark.parametrize("name", [*INTERPRETER_CASES, *MUTATIONS])
def test_kernel(name):
    assert interpreter_results(__file__)[name] == ""


@pytest.mark.gpu
@pytest.mark.parametrize("name", CASES)
def test_kernel_on_gpu(name):
    skip_below((8, 0))
    case = CASES[name]
    query, key, extent = prepared(case)
    moved = replace(extent, table=extent.table.cuda())
    vertical, slash = line_scores(query.cuda(), key.cuda(), moved, scaling=case.call("bf16").scaling)
    close((vertical.cpu(), slash.cpu()), brute(case), case)
