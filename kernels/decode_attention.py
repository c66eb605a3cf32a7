"""Attention of few queries over a compressed key-value cache: pages of codes, dense sink tokens, dense recent tokens.

::

    S = scaling · Q·K̂ᵀ,  capped: cap · tanh(S / cap)      O = softmax(S) · V̂      lse = log Σ exp(S)

with K̂ and V̂ the dequantized tokens where they are coded and the stored ones where they are dense. The softmax is
computed online in FP32 over blocks of at most `PAGE` tokens, so that no more of K̂ and V̂ than one block ever exists::

    m' = max(m, max S_b)    l' = l·exp(m − m') + Σ exp(S_b − m')    A' = A·exp(m − m') + exp(S_b − m')·V̂_b    O = A / l

*Storage* (`CompressedKV`). Tokens have columns 0, 1, … in the order in which they came, pads included. Columns below
`coded` are in pages, page p holding columns [p·PAGE, (p + 1)·PAGE); the columns after them are dense. The first
`sink_tokens` of every row are kept dense beside their codes, from the column on where that row begins; once they are
coded, a reader takes them from there and passes over their codes. What codes are, and
how they lie in a page, is up to `kv_codec.py`.

*Evicted tokens* (`kept`). Of the columns before `first` there may be, instead of all, those that each KV head has kept
(`kv_kept.py`), beside the sinks among them. They precede every query, which sees all of its head's.

*Mask.* Query i of Q has the column p = tokens − Q + i and sees the columns j with first ≤ j, key_starts ≤ j ≤ p, and
with a window w, j > p − w. A query that sees no token gets zeros and lse = −∞. A sink logit is one more logit per head
that has no value; it takes part in the softmax but not in lse. Inference only: no gradient.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .activations import FP8_CAPABILITY, launching_on, log_fallback, triton_refusal
from .attention import DTYPES, MAX_HEAD_DIM, check_logits
from .kv_kept import KeptTokens
from .kv_pages import PAGE, PageLayout, Pages, read_page, read_tokens

MAX_ROWS = 64
"""Queries of one KV head that a kernel holds: 16 tokens of a group of 4, say."""


@dataclass(frozen=True)
class CompressedKV:
    """What a call reads.

    pages: of the coded columns; those of which no column from `first` on is coded may be absent. coded: columns that
    are in pages. tokens: columns in all. first: columns before it are not looked at. dense: (key, value) blocks,
    (batch, num_kv_heads, columns, head_dim), of the columns from max(first, coded) on, in order. ring: keys and values,
    (batch, num_kv_heads, length, head_dim), with each of these columns at its place modulo length; None if not all are
    there. sink_key, sink_value: (batch, num_kv_heads, sink_tokens, head_dim). sink_starts: (batch,) int64, the column
    of each row's first sink token. lengths: of `kv_append.LENGTHS`; where given, a kernel takes tokens and coded from
    it, and first from its window or, with kept, from there, so that the launch is that of any later token too. kept:
    what every head has kept of the columns before first, of which sinks are looked at too; None where nothing was
    evicted.
    """

    pages: Pages
    coded: int
    tokens: int
    first: int
    dense: tuple[tuple[Tensor, Tensor], ...]
    ring: tuple[Tensor, Tensor] | None
    sink_key: Tensor
    sink_value: Tensor
    sink_starts: Tensor
    lengths: Tensor | None = None
    kept: KeptTokens | None = None

    @property
    def numbers(self) -> range:
        """Pages that hold columns from `first` on."""
        return range(self.first // PAGE, -(-self.coded // PAGE)) if self.first < self.coded else range(0)


@dataclass(frozen=True)
class Reading:
    """What a call is besides queries and cache; all of it is part of the mathematics."""

    scaling: float
    window: int | None
    softcap: float | None


@dataclass
class OnlineSoftmax:
    """Running maximum, sum and weighted values of (batch, num_kv_heads, group, queries)."""

    maximum: Tensor
    total: Tensor
    values: Tensor

    def add(self, logits: Tensor, mask: Tensor, value: Tensor) -> None:
        """One block. logits: (..., queries, columns), mask: the same, broadcastable, value: (..., columns, dim)."""
        logits = logits.masked_fill(~mask, -torch.inf)
        maximum = torch.maximum(self.maximum, logits.amax(dim=-1))
        # Before the first visible token both are −∞, and their difference would be NaN.
        base = torch.where(maximum.isneginf(), 0.0, maximum)
        old, weights = torch.exp(self.maximum - base), torch.exp(logits - base[..., None])
        self.total = self.total * old + weights.sum(dim=-1)
        self.values = self.values * old[..., None] + weights @ value
        self.maximum = maximum


def decode_attention(
    query: Tensor,
    kv: CompressedKV,
    *,
    scaling: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    key_starts: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Causal attention of the last tokens of a compressed cache.

    Args:
        query: (batch, num_heads, queries, head_dim) floating, post-RoPE; the last query is the cache's last token.
        kv: the cache, the queries' own tokens included.
        scaling: of the logits; default 1/√head_dim.
        window: a query sees only tokens fewer than so many columns before it.
        softcap: bound of the logits.
        sinks: (num_heads,) one more logit per head.
        key_starts: (batch,) integers, the first column of each row that is no padding; None for 0.

    Returns:
        out: (batch, num_heads, queries, value_head_dim) in the dtype of query, a transposed view of a contiguous
            (batch, queries, num_heads, value_head_dim).
        lse: (batch, num_heads, queries) fp32, natural logarithm, sinks not included.

    Raises:
        ValueError: shapes, dtypes, devices or options that do not belong together.
    """
    call = Reading(scaling if scaling is not None else query.shape[-1] ** -0.5, window, softcap)
    check_call(query, kv, call, sinks, key_starts)
    return run_decode(query, kv, call, sinks, key_starts)


def decode_refusal(query: Tensor, kv: CompressedKV, window: int | None = None) -> str | None:
    """Why no kernel runs a call; None if one does."""
    refusal = triton_refusal(query.device, FP8_CAPABILITY)
    head_dim = max(query.shape[3], kv.pages.layout.value_dim)
    if refusal is None and not query.dtype == kv.sink_key.dtype in DTYPES:
        refusal = f"the kernel takes bf16 and fp16, not {query.dtype} with a cache of {kv.sink_key.dtype}"
    if refusal is None and head_dim > MAX_HEAD_DIM:
        refusal = f"head_dim {head_dim} exceeds the kernel's {MAX_HEAD_DIM}"
    if refusal is None and kv.kept is not None:
        refusal = kept_refusal(query, kv, window)
    return kv.pages.codec.decode_refusal(query, kv) if refusal is None else refusal


def kept_refusal(query: Tensor, kv: CompressedKV, window: int | None) -> str | None:
    """Why no kernel runs a call over heads that have kept different tokens, on a device that has it."""
    if type(kv.pages.layout) is not PageLayout:
        return f"no kernel reads pages of {kv.pages.layout.kind} of which heads have kept different numbers"
    if window is not None:
        return "what is left of evicted tokens has no columns, which the kernel's window is of"
    if not fits_one_launch(query, kv):
        return (
            f"over evicted tokens the kernel takes at most {MAX_ROWS} queries of a KV head, whose tokens are all dense"
        )
    return None


def fits_one_launch(query: Tensor, kv: CompressedKV) -> bool:
    """Whether one kernel reads the codes: few queries, whose tokens are all dense."""
    return query.shape[1] // kv.sink_key.shape[1] * query.shape[2] <= MAX_ROWS and kv.ring is not None


def run_decode(
    query: Tensor,
    kv: CompressedKV,
    call: Reading,
    sinks: Tensor | None,
    key_starts: Tensor | None,
    *,
    interpret: bool = False,
) -> tuple[Tensor, Tensor]:
    """Dispatch without checks, as :func:`decode_attention`."""
    refusal = None if interpret else decode_refusal(query, kv, call.window)
    if kv.lengths is not None and (refusal is not None or not fits_one_launch(query, kv)) and is_recorded(query):
        # The graph would hold the lengths that the host knows.
        why = refusal or f"more than {MAX_ROWS} queries of a KV head"
        raise RuntimeError(f"attention over the cache does not take its lengths from the device ({why})")
    if refusal is not None:
        log_fallback("decode_attention", refusal)
        return decode_ref(query, kv, call, sinks, key_starts)
    if not fits_one_launch(query, kv):
        from .decode_chunks import decode_chunks

        return decode_chunks(query, kv, call, sinks, key_starts)
    sinks = None if sinks is None else sinks.contiguous()
    with launching_on(query):
        out, lse = kv.pages.codec.attend(query, kv, call, sinks, key_starts, interpret=interpret)
    return out.transpose(1, 2), lse


def is_recorded(x: Tensor) -> bool:
    """Whether what is launched goes into a CUDA graph."""
    return x.is_cuda and torch.cuda.is_current_stream_capturing()


def decode_ref(
    query: Tensor,
    kv: CompressedKV,
    call: Reading,
    sinks: Tensor | None = None,
    key_starts: Tensor | None = None,
    *,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """Torch specification, any device; products and softmax in `dtype`."""
    batch, heads, queries, _ = query.shape
    kv_heads, value_dim, device = kv.sink_key.shape[1], kv.sink_value.shape[3], query.device
    q = query.to(dtype).view(batch, kv_heads, heads // kv_heads, queries, -1)
    position = torch.arange(kv.tokens - queries, kv.tokens, device=device)[None, :, None]
    starts = torch.zeros((batch, 1), dtype=torch.long, device=device) if key_starts is None else key_starts[:, None]
    lowest = starts.to(torch.long).clamp_min(kv.first)
    state = OnlineSoftmax(
        torch.full(q.shape[:-1], -torch.inf, dtype=dtype, device=device),
        torch.zeros(q.shape[:-1], dtype=dtype, device=device),
        torch.zeros((*q.shape[:-1], value_dim), dtype=dtype, device=device),
    )
    for block in blocks(kv):
        valid = block.valid & (block.columns >= lowest)
        mask = valid[:, None, :] & (block.columns[:, None, :] <= position)
        if call.window is not None:
            mask = mask & (block.columns[:, None, :] > position - call.window)
        # Padding holds anything, and its probability of zero would not take a NaN away.
        key, value = (torch.where(valid[:, None, :, None], part.to(dtype), 0.0) for part in (block.key, block.value))
        logits = q @ key[:, :, None].transpose(-1, -2) * call.scaling
        if call.softcap is not None:
            logits = call.softcap * torch.tanh(logits / call.softcap)
        state.add(logits, mask[:, None, None], value[:, :, None])
    for key, value, valid in kept_blocks(kv):
        key, value = (torch.where(valid[..., None], part.to(dtype), 0.0) for part in (key, value))
        logits = q @ key[:, :, None].transpose(-1, -2) * call.scaling
        if call.softcap is not None:
            logits = call.softcap * torch.tanh(logits / call.softcap)
        state.add(logits, valid[:, :, None, None], value[:, :, None])
    lse = state.maximum + torch.log(state.total)
    whole = lse
    if sinks is not None:
        sink = sinks.to(dtype).view(1, kv_heads, -1, 1)
        # A query that sees no token gives nothing to its sink either.
        whole = torch.where(lse.isneginf(), lse, torch.logaddexp(lse, sink))
    shift = torch.where(whole.isneginf(), 0.0, torch.exp(state.maximum - whole))
    out = (state.values * shift[..., None]).view(batch, heads, queries, value_dim)
    return out.to(query.dtype).transpose(1, 2).contiguous().transpose(1, 2), lse.view(batch, heads, queries).float()


@dataclass(frozen=True)
class Block:
    """Tokens as numbers. columns: (batch or 1, n). key, value: (batch, num_kv_heads, n, head_dim). valid: as columns,
    False where the token is read elsewhere.
    """

    columns: Tensor
    key: Tensor
    value: Tensor
    valid: Tensor


def blocks(kv: CompressedKV) -> Iterator[Block]:
    """Every token from `first` on once, in blocks of at most `PAGE`: sinks, pages, dense tokens."""
    device, sink_tokens = kv.sink_key.device, kv.sink_key.shape[2]
    starts = kv.sink_starts.to(torch.long)[:, None]
    if sink_tokens:
        columns = starts + torch.arange(sink_tokens, device=device)
        yield Block(columns, kv.sink_key, kv.sink_value, columns < kv.coded)
    for number in kv.numbers:
        count = min(PAGE, kv.coded - number * PAGE)
        columns = number * PAGE + torch.arange(count, device=device)[None]
        is_sink = (columns >= starts) & (columns < starts + sink_tokens)
        key, value = (part[:, :, :count] for part in read_page(kv.pages, number))
        yield Block(columns, key, value, ~is_sink)
    column = max(kv.first, kv.coded)
    for key, value in kv.dense:
        for k, v in zip(key.split(PAGE, dim=2), value.split(PAGE, dim=2), strict=True):
            columns = column + torch.arange(k.shape[2], device=device)[None]
            column += k.shape[2]
            if k.shape[2]:
                yield Block(columns, k, v, torch.ones_like(columns, dtype=torch.bool))


def kept_blocks(kv: CompressedKV) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """What is there of the columns before `first` where tokens were evicted: keys and values, (batch, num_kv_heads, n,
    head_dim), and which of them are tokens, (batch, num_kv_heads, n).
    """
    if kv.kept is None:
        return
    batch, heads, sink_tokens = kv.sink_key.shape[:3]
    if sink_tokens:
        columns = kv.sink_starts.to(torch.long)[:, None] + torch.arange(sink_tokens, device=kv.sink_key.device)
        valid = (columns < kv.first)[:, None].expand(batch, heads, sink_tokens)
        yield kv.sink_key, kv.sink_value, valid
    for number in range(kv.kept.pages):
        yield kv.kept.read(number)


def dequantized(
    kv: CompressedKV, dtype: torch.dtype, start: int | None = None, stop: int | None = None
) -> tuple[Tensor, Tensor]:
    """Keys and values of columns [start, stop), default all that a call reads, (batch, num_kv_heads, stop − start,
    head_dim), one dense tensor each. ValueError where tokens were evicted, since heads then have different ones.
    """
    if kv.kept is not None:
        raise ValueError(
            "heads have kept different tokens, which no dense keys and values can hold; they are read by "
            "decode_attention alone"
        )
    start, stop = max(start or 0, kv.first), kv.tokens if stop is None else stop
    batch, heads, _, head_dim = kv.sink_key.shape
    shape = (batch, heads, stop - start)
    key = torch.empty((*shape, head_dim), dtype=dtype, device=kv.sink_key.device)
    value = torch.empty((*shape, kv.sink_value.shape[3]), dtype=dtype, device=kv.sink_key.device)
    read_tokens(key, value, (start, min(stop, kv.coded)), kv.pages)
    for row, column in enumerate(kv.sink_starts.tolist()):
        place = range(max(start, column), min(stop, kv.coded, column + kv.sink_key.shape[2]))
        if place:
            source = slice(place.start - column, place.stop - column)
            key[row, :, place.start - start : place.stop - start] = kv.sink_key[row, :, source]
            value[row, :, place.start - start : place.stop - start] = kv.sink_value[row, :, source]
    column = max(kv.first, kv.coded)
    for k, v in kv.dense:
        place = range(max(start, column), min(stop, column + k.shape[2]))
        if place:
            source = slice(place.start - column, place.stop - column)
            key[:, :, place.start - start : place.stop - start] = k[:, :, source]
            value[:, :, place.start - start : place.stop - start] = v[:, :, source]
        column += k.shape[2]
    return key, value


def check_call(query: Tensor, kv: CompressedKV, call: Reading, sinks: Tensor | None, key_starts: Tensor | None) -> None:
    """Raise ValueError unless the arguments of :func:`decode_attention` describe one call."""
    if query.dim() != 4 or not query.dtype.is_floating_point:
        raise ValueError(
            f"query has shape {tuple(query.shape)} and dtype {query.dtype}; "
            "expected (batch, heads, queries, head_dim) floating"
        )
    batch, heads, queries, head_dim = query.shape
    kv_batch, kv_heads, _, key_dim = kv.sink_key.shape
    if batch != kv_batch or head_dim != key_dim:
        raise ValueError(f"query {tuple(query.shape)} does not fit a cache of {kv_batch} rows and head_dim {key_dim}")
    if kv_heads == 0 or heads % kv_heads:
        raise ValueError(f"{kv_heads} KV heads do not divide {heads} heads")
    if queries > kv.tokens - kv.first:
        raise ValueError(f"{queries} queries for {kv.tokens - kv.first} tokens: queries are the last of the tokens")
    check_logits(heads, call.scaling, call.window, call.softcap, sinks)
    if key_starts is not None and (tuple(key_starts.shape) != (batch,) or key_starts.dtype.is_floating_point):
        raise ValueError(
            f"key_starts have shape {tuple(key_starts.shape)} and dtype {key_starts.dtype}; expected ({batch},) int"
        )
    for name, tensor in {"the cache": kv.sink_key, "sinks": sinks, "key_starts": key_starts}.items():
        if tensor is not None and tensor.device != query.device:
            raise ValueError(f"{name} is on {tensor.device}, query on {query.device}")
    check_storage(kv)


def check_storage(kv: CompressedKV) -> None:
    """Raise ValueError unless a cache holds every column that it says, in one layout."""
    batch, kv_heads, _, head_dim = kv.sink_key.shape
    value_dim = kv.sink_value.shape[3]
    if kv.sink_value.shape[:3] != kv.sink_key.shape[:3] or tuple(kv.sink_starts.shape) != (batch,):
        raise ValueError("sink keys, sink values and their starts have shapes that do not belong together")
    dense = sum(key.shape[2] for key, _ in kv.dense)
    if dense != kv.tokens - max(kv.first, kv.coded) or not 0 <= kv.first <= kv.tokens or kv.coded > kv.tokens:
        raise ValueError(
            f"the cache has {kv.tokens} tokens, of which {kv.coded} are coded, {dense} dense and the first {kv.first} "
            "left out: these do not add up"
        )
    for key, value in kv.dense:
        shapes = (batch, kv_heads, key.shape[2])
        if tuple(key.shape) != (*shapes, head_dim) or tuple(value.shape) != (*shapes, value_dim):
            raise ValueError(f"dense keys {tuple(key.shape)} and values {tuple(value.shape)} do not fit the cache")
    layout = kv.pages.layout
    if (layout.key_dim, layout.value_dim) != (head_dim, value_dim):
        raise ValueError(f"pages hold heads of {layout.key_dim} and {layout.value_dim} channels, not {head_dim}")
    kv.pages.codec.check(kv_heads, head_dim, value_dim)
    kv.pages.check(kv.numbers.start, kv.numbers.stop, batch, kv_heads)
    if kv.kept is not None and tuple(kv.kept.lengths.shape) != (batch, kv_heads):
        raise ValueError(
            f"kept tokens are of {tuple(kv.kept.lengths.shape)} rows and heads, the cache of {(batch, kv_heads)}"
        )
