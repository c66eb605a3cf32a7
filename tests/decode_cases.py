"""Compressed caches and calls over them, one per `DecodeCase`, and the error bound of their kernel.

Tolerance, of ‖out − exact‖ over the queries of a head beside ‖Σ p² v²‖^½ of the exact one, the size of an output whose
values are unrelated: a logit that is off by δ moves an output by no more than δ of that, in the mean. Queries in two
e4m3 terms are off by 2⁻⁸ of each channel, so that δ = 2⁻⁸ · (Σ q² y²)^½ over a token's channels; 16-bit ones by
nothing. Probabilities add 2⁻⁸ or their dtype's rounding, the output its own. Twice that is allowed, and on a GPU 2⁻¹⁰
of Σ |q y| for Hopper's FP8 accumulator. A token of 400 left out is far
outside: it moves an output by 5 %.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from kernel_cases import FP8_ACCUMULATOR, FP16
from torch import Tensor

from kompakt.compress.cache import TokenStore
from kompakt.kernels.decode_attention import CompressedKV, Reading, blocks, decode_ref, kept_blocks, run_decode
from kompakt.kernels.kv_codes import Kind
from kompakt.quant.kv_fp8 import KVFP8
from kompakt.quant.kv_int4 import KVINT4
from kompakt.quant.method import KVCacheMethod


@dataclass(frozen=True, kw_only=True)
class KVBF16(KVCacheMethod):
    """Pages in 16 bit, which no recipe offers: what codes are measured against."""

    kind: ClassVar[Kind] = "bf16"


METHODS = {"int4": KVINT4, "fp8": KVFP8, "bf16": KVBF16}


def statics_of(heads: int, head_dim: int, *, rotated: bool = True) -> dict[str, Tensor]:
    """Static tensors of a layer as `KVINT4` keeps them, drawn from torch's generator."""
    return {
        "key_mean": torch.randn(heads, head_dim),
        "key_factors": torch.rand(heads, head_dim) * 3 + 0.1,
        "key_rotated": torch.tensor([rotated], dtype=torch.uint8),
    }


def filled(
    lengths: tuple[int, ...],
    *,
    heads: int = 2,
    key_dim: int = 16,
    value_dim: int = 16,
    method: Any = None,
    starts: tuple[int, ...] = (0, 0),
    window: int | None = None,
    statics: dict[str, Tensor] | None = None,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    hard: str = "",
) -> tuple[CompressedKV, int]:
    """A cache to which so many tokens were appended in turn, as the last of them see it, and how many those are.

    A negative number takes tokens away. Padding before `starts` is NaN. hard: "zeros" for some values and keys of
    zeros, "uneven" for tokens of very different size.
    """
    generator = torch.Generator().manual_seed(sum(lengths))
    method = KVINT4(recent_tokens=20) if method is None else method
    store = TokenStore(method, statics=statics, window=window, starts=list(starts))
    seen = None
    for count in lengths:
        if count < 0:
            store.crop(-count)
            continue
        key = torch.randn(len(starts), heads, count, key_dim, generator=generator)
        value = torch.randn(len(starts), heads, count, value_dim, generator=generator)
        if hard == "zeros":
            value[:, :, ::3], key[:, :, 1::5] = 0, 0
        if hard == "uneven":
            value *= torch.logspace(-6, 4, count)[torch.randperm(count, generator=generator)][:, None]
        for row, start in enumerate(starts):
            key[row, :, : max(0, start - store.tokens)] = torch.nan
            value[row, :, : max(0, start - store.tokens)] = torch.nan
        key, value = key.to(device, dtype), value.to(device, dtype)
        seen = store.extend(key, value)
        if seen is None:
            seen = store.read((key, value) if count > 1 else None, count)
    assert seen is not None
    return seen, lengths[-1]


@dataclass(frozen=True)
class DecodeCase:
    """heads: of queries and of the cache. lengths: tokens that are appended in turn; the last are the queries."""

    kind: Kind = "int4"
    heads: tuple[int, int] = (4, 2)
    dims: tuple[int, int] = (64, 64)
    lengths: tuple[int, ...] = (300, 100, 1)
    starts: tuple[int, ...] = (0,)
    window: int | None = None
    softcap: float | None = None
    scaling: float | None = None
    sinks: bool = False
    mapped: bool = True
    dtype: torch.dtype = FP16
    hard: str = ""
    options: dict[str, Any] = field(default_factory=lambda: {"recent_tokens": 40})

    def make(self, device: str = "cpu") -> tuple[Tensor, CompressedKV, Reading, Tensor | None, Tensor | None]:
        """query, cache, call, sinks, key_starts."""
        torch.manual_seed(1)
        heads, kv_heads = self.heads
        statics = statics_of(kv_heads, self.dims[0]) if self.kind == "int4" and self.mapped else None
        kv, queries = filled(
            self.lengths,
            heads=kv_heads,
            key_dim=self.dims[0],
            value_dim=self.dims[1],
            method=METHODS[self.kind](**self.options),
            starts=self.starts,
            window=self.window,
            statics=statics,
            dtype=self.dtype,
            device=device,
            hard=self.hard,
        )
        query = torch.randn(len(self.starts), heads, queries, self.dims[0]).to(device, self.dtype)
        call = Reading(self.scaling or self.dims[0] ** -0.5, self.window, self.softcap)
        sinks = torch.randn(heads).to(device) if self.sinks else None
        starts = torch.tensor(self.starts, device=device) if any(self.starts) else None
        return query, kv, call, sinks, starts


def key_size(query: Tensor, kv: CompressedKV, scaling: float, *, mapped: bool = False, absolute: bool = False) -> float:
    """(Σ q² y²)^½ over the channels of a token times scaling, root mean square over tokens; mapped: of keys and queries
    as they are multiplied. absolute: of Σ |q y| instead."""
    batch, _, _, head_dim = query.shape
    q = query.float().view(batch, kv.sink_key.shape[1], -1, head_dim) * scaling
    key_map = kv.pages.key_map if mapped else None
    if key_map is not None and key_map.factors is not None:
        q = q * key_map.factors[:, None]
    largest = 0.0
    found_in = [(block.key, block.valid[:, None]) for block in blocks(kv)]
    found_in += [(key, valid) for key, _, valid in kept_blocks(kv)]
    for key, valid in found_in:
        y = key.float() if key_map is None else key_map.encode(key)
        y = torch.where(valid[..., None], y, 0.0)
        if absolute:
            found = (q.abs() @ y.abs().mT).square().mean()
        else:
            found = (q.square().sum(-1, keepdim=True) / head_dim * y.square().sum(-1)[:, :, None]).mean()
        largest = max(largest, found.sqrt().item())
    return largest


def logit_error(query: Tensor, kv: CompressedKV, scaling: float, *, accumulator: float) -> float:
    """δ of the module; 0 where nothing is multiplied in FP8."""
    if kv.pages.layout.kind == "bf16" or (kv.coded <= kv.first and kv.kept is None):
        return 0.0
    size = 2.0**-8 * key_size(query, kv, scaling, mapped=True)
    return size + accumulator * key_size(query, kv, scaling, mapped=True, absolute=True)


def check_decode(case: DecodeCase, *, interpret: bool, device: str = "cpu") -> None:
    """The kernel against the reference in FP64, both on the same codes."""
    query, kv, call, sinks, starts = case.make(device)
    out, lse = run_decode(query, kv, call, sinks, starts, interpret=interpret)
    exact, exact_lse = decode_ref(query.double(), kv, call, sinks, starts, dtype=torch.float64)
    assert out.dtype == query.dtype and out.shape == exact.shape and out.transpose(1, 2).is_contiguous()
    unrelated = spread(query, kv, call, sinks, starts)
    eps = torch.finfo(case.dtype).eps
    delta = logit_error(query, kv, call.scaling, accumulator=0.0 if interpret else FP8_ACCUMULATOR)
    weights = eps if case.kind == "bf16" else 2.0**-8
    bound = 2 * (delta + weights) * unrelated + eps * exact.float().norm(dim=(-2, -1))
    error = (out.double() - exact).norm(dim=(-2, -1)).float()
    assert (error <= bound + 1e-30).all(), (error / bound).max()
    blind = exact_lse.isneginf()
    assert torch.equal(lse.isneginf(), blind) and (out[blind] == 0).all()
    # A mean of logits' errors; the largest logit counts most, and its error may be several times the mean one.
    allowed = 8 * delta + 2.0**-9 + 1e-6 * exact_lse[~blind].abs().max() if (~blind).any() else 0
    assert ((lse - exact_lse)[~blind].abs() <= allowed).all()


def spread(query: Tensor, kv: CompressedKV, call: Reading, sinks: Tensor | None, starts: Tensor | None) -> Tensor:
    """(batch, heads): ‖(Σ p² v²)^½‖ over queries and channels, from the reference with values of one channel each."""
    batch, heads, queries, _ = query.shape
    kv_heads = kv.sink_key.shape[1]
    logits, values = [], []
    q = query.double().view(batch, kv_heads, heads // kv_heads, queries, -1)
    position = torch.arange(kv.tokens - queries, kv.tokens, device=query.device)[None, :, None]
    lowest = torch.zeros((batch, 1), device=query.device) if starts is None else starts[:, None]
    for block in blocks(kv):
        valid = block.valid & (block.columns >= lowest.clamp_min(kv.first))
        mask = valid[:, None] & (block.columns[:, None] <= position)
        if call.window is not None:
            mask = mask & (block.columns[:, None] > position - call.window)
        key, value = (torch.where(valid[:, None, :, None], x.double(), 0.0) for x in (block.key, block.value))
        s = q @ key[:, :, None].mT * call.scaling
        if call.softcap is not None:
            s = call.softcap * torch.tanh(s / call.softcap)
        logits.append(s.masked_fill(~mask[:, None, None], -torch.inf))
        values.append(value)
    for key, value, valid in kept_blocks(kv):
        key, value = (torch.where(valid[..., None], x.double(), 0.0) for x in (key, value))
        s = q @ key[:, :, None].mT * call.scaling
        if call.softcap is not None:
            s = call.softcap * torch.tanh(s / call.softcap)
        logits.append(s.masked_fill(~valid[:, :, None, None], -torch.inf))
        values.append(value)
    p = torch.softmax(torch.cat(logits, -1), -1).nan_to_num()
    found = p.square() @ torch.cat(values, 2).square()[:, :, None]
    return found.sum((-2, -1)).sqrt().view(batch, heads).float()
