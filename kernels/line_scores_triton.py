"""Triton kernels for `line_scores.py`.

Keys are taken `KEYS` at a time with the last 64 queries of a head. A program of the second pass holds the 64 keys and
64 distances that begin at one place: with P of 128 keys from there on, number i's probability at distance
position − place − c stands in column c + i, so that a diagonal becomes a column by one gather along rows.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import line_scores
from .attention_quant import padded_width
from .attention_triton import LOG2E, load_16bit, product

LAST = tl.constexpr(line_scores.LAST)
PIECE = 1024
"""Keys of one program of the first pass."""
LENGTHS = ["keys", "heads", "group", "pieces"]


@triton.jit
def logits(
    q, key_base, kt, token, first, position, k_start, k_stop, head_dim, factor, WIDTH: tl.constexpr,
    INTERPRET: tl.constexpr,
):  # fmt: skip
    """In units of log₂, −∞ where nothing is seen."""
    number = tl.arange(0, LAST)
    valid = (token >= k_start) & (token < k_stop)
    k = load_16bit(key_base, kt, token, tl.arange(0, WIDTH), valid, head_dim)
    s = product(q, k.T, True, False, INTERPRET) * factor
    seen = valid[None, :] & (number >= first)[:, None] & (token[None, :] <= (position + number)[:, None])
    return tl.where(seen, s, float("-inf"))


@triton.jit(do_not_specialize=LENGTHS)
def sums_kernel(
    q_ptr, key_ptr, numbers_ptr, max_ptr, sum_ptr, kb, kh, kt, keys, heads, group, pieces, head_dim, scaling,
    WIDTH: tl.constexpr, PIECE: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """Grid (pieces, batch · heads): maximum and sum of one piece of the keys, for every query."""
    plane = tl.program_id(1)
    batch, head = plane // heads, plane % heads
    first = tl.load(numbers_ptr + batch * 4)
    position = tl.load(numbers_ptr + batch * 4 + 1)
    k_start = tl.load(numbers_ptr + batch * 4 + 2)
    k_stop = tl.load(numbers_ptr + batch * 4 + 3)
    number = tl.arange(0, LAST)
    channel = tl.arange(0, WIDTH)
    q = load_16bit(q_ptr + plane.to(tl.int64) * LAST * head_dim, head_dim, number, channel, number >= 0, head_dim)
    key_base = key_ptr + batch.to(tl.int64) * kb + (head // group).to(tl.int64) * kh
    m = tl.full((LAST,), -1.0e38, tl.float32)
    total = tl.zeros((LAST,), tl.float32)
    begin = tl.program_id(0) * PIECE
    for start in range(begin, tl.minimum(begin + PIECE, k_stop), 64):
        token = start + tl.arange(0, 64)
        s = logits(
            q, key_base, kt, token, first, position, k_start, k_stop, head_dim, scaling * LOG2E, WIDTH, INTERPRET
        )  # fmt: skip
        new_m = tl.maximum(m, tl.max(s, axis=1))
        total = total * tl.math.exp2(m - new_m) + tl.sum(tl.math.exp2(s - new_m[:, None]), axis=1)
        m = new_m
    place = (plane.to(tl.int64) * pieces + tl.program_id(0)) * LAST + number
    tl.store(max_ptr + place, m)
    tl.store(sum_ptr + place, total)


@triton.jit(do_not_specialize=LENGTHS)
def scores_kernel(
    q_ptr, key_ptr, numbers_ptr, lse_ptr, vertical_ptr, slash_ptr, kb, kh, kt, keys, heads, group, pieces, head_dim,
    scaling, WIDTH: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """Grid (tiles of keys + 1, batch · heads). lse_ptr: (batch · heads, LAST), in units of log₂."""
    plane = tl.program_id(1)
    batch, head = plane // heads, plane % heads
    first = tl.load(numbers_ptr + batch * 4)
    position = tl.load(numbers_ptr + batch * 4 + 1)
    k_start = tl.load(numbers_ptr + batch * 4 + 2)
    k_stop = tl.load(numbers_ptr + batch * 4 + 3)
    number = tl.arange(0, LAST)
    channel = tl.arange(0, WIDTH)
    q = load_16bit(q_ptr + plane.to(tl.int64) * LAST * head_dim, head_dim, number, channel, number >= 0, head_dim)
    key_base = key_ptr + batch.to(tl.int64) * kb + (head // group).to(tl.int64) * kh
    # One tile before the first key, where the longest distances begin.
    begin = k_start + (tl.program_id(0) - 1) * LAST
    lse = tl.load(lse_ptr + plane * LAST + number)
    token = begin + tl.arange(0, 2 * LAST)
    s = logits(
        q, key_base, kt, token, first, position, k_start, k_stop, head_dim, scaling * LOG2E, WIDTH, INTERPRET
    )  # fmt: skip
    count = tl.maximum(LAST - first, 1).to(tl.float32)
    p = tl.math.exp2(s - lse[:, None]) / count
    vertical = tl.sum(p, axis=0)
    column = begin - k_start + tl.arange(0, 2 * LAST)
    base = plane.to(tl.int64) * keys
    mine = (tl.arange(0, 2 * LAST) < LAST) & (column >= 0) & (column < k_stop - k_start)
    tl.store(vertical_ptr + base + column, vertical, mask=mine)
    c = tl.arange(0, LAST)
    slash = tl.sum(tl.gather(p, c[None, :] + number[:, None], 1), axis=0)
    distance = position - begin - c
    tl.store(slash_ptr + base + distance, slash, mask=(distance >= 0) & (distance < keys))


def launch_sums(
    last: Tensor, key: Tensor, numbers: Tensor, scaling: float = 1.0, *, interpret: bool = False
) -> tuple[Tensor, Tensor]:
    """Maxima and sums of pieces, (batch, heads, pieces, LAST)."""
    batch, heads, _, head_dim = last.shape
    kv_heads, keys = key.shape[1], key.shape[2]
    pieces = -(-keys // PIECE)
    shape = (batch, heads, pieces, line_scores.LAST)
    top, total = (torch.empty(shape, dtype=torch.float32, device=last.device) for _ in range(2))
    sums_kernel[(pieces, batch * heads)](
        last, key, numbers, top, total, *key.stride()[:3], keys, heads, heads // kv_heads, pieces, head_dim, scaling,
        WIDTH=padded_width(head_dim), PIECE=PIECE, INTERPRET=interpret, enable_fp_fusion=True, num_warps=4,
    )  # fmt: skip
    return top, total


def launch_scores(
    last: Tensor, key: Tensor, numbers: Tensor, lse: Tensor | None = None, scaling: float = 1.0, *,
    interpret: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """vertical and slash; lse: (batch, heads, LAST) in units of log₂, default zeros."""
    batch, heads, _, head_dim = last.shape
    kv_heads, keys = key.shape[1], key.shape[2]
    vertical, slash = (torch.zeros((batch, heads, keys), device=last.device) for _ in range(2))
    if lse is None:
        lse = torch.zeros((batch, heads, line_scores.LAST), device=last.device)
    scores_kernel[(-(-keys // line_scores.LAST) + 1, batch * heads)](
        last, key, numbers, lse, vertical, slash, *key.stride()[:3], keys, heads, heads // kv_heads, 0, head_dim,
        scaling, WIDTH=padded_width(head_dim), INTERPRET=interpret, enable_fp_fusion=True, num_warps=4,
    )  # fmt: skip
    return vertical, slash


LAUNCHES = {"sums_kernel": launch_sums, "scores_kernel": launch_scores}


def line_scores_triton(
    last: Tensor, key: Tensor, numbers: Tensor, scaling: float, *, interpret: bool = False
) -> tuple[Tensor, Tensor]:
    """Launch without checks; arguments of `line_scores_ref`."""
    key = key if key.stride(-1) == 1 else key.contiguous()
    top, total = launch_sums(last, key, numbers, scaling, interpret=interpret)
    most = top.amax(dim=2)
    total = (total * torch.exp2(top - most[:, :, None])).sum(dim=2)
    # Rows of no query have no key either; their probabilities are to be zero.
    lse = torch.where(total > 0, most + total.log2(), 0.0)
    return launch_scores(last, key, numbers, lse, scaling, interpret=interpret)
