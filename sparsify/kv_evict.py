"""Which tokens of a prompt every KV head keeps: scores of past keys, and budgets that turn them into columns.

*Scores*, one number for every key of a KV head, of queries q post-RoPE, with p = softmax(scaling · q·Kᵀ) over the keys
that a query sees; G are the query heads of the KV head:

    snapkv      mean over G and the last `window` queries of p, then the mean of `kernel_size` neighbours
                (SnapKV, arXiv 2404.14469)
    expected    exp(scaling · μ·k + scaling² · kᵀΣk / 2) ‖v‖, normalized over the keys, mean over G: what a query from
                N(μ, Σ) gives to a key in the mean (Expected Attention, arXiv 2510.00636)
    kvzip       max over G and over all queries of p while the model reads its prompt a second time behind itself
                (KVzip, arXiv 2505.23416); p is over the keys of the part that is read and those of the second reading

The first two depend on what the prompt ends with: where it holds the question, they are query-aware. `kvzip` asks which
keys the context itself is told again from, whatever will be asked.

Departures. SnapKV's mean is over query heads too, since a KV head is stored once. Expected attention takes μ and Σ of
the last `window` queries as they are, rotated, instead of rotating those of all queries to later positions: queries to
come are held to be like the last. KVzip's second reading has no instruction before it, which would need a tokenizer;
every part begins with the `OVERLAP` tokens before it, so that the model finds the place.

*Budgets.* Storage comes in pages of `PAGE` tokens per head, so budgets are shared out in whole pages and a page that is
there is filled:

    uniform     every head the same
    adakv       pages of a layer go where its best tokens are, whatever the head; `floor` of a uniform share is every
                head's (AdaKV, arXiv 2407.11550, whose floor and counts are in tokens)
    global      the same over all layers, which needs the scores of all of them: kvzip alone
    threshold   every token whose score is at least `threshold`, filled up to whole pages

Scores come from the queries of a window or of a part, a block at a time: no full map exists. Ties go to the earlier
column. What a cache holds while it generates is scored and shared out likewise (`kv_evict_again.py`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional

from ..kernels.kv_codec import PAGE

Scores = Literal["snapkv", "expected", "kvzip"]
Budget = Literal["uniform", "adakv", "global", "threshold"]
OVERLAP = 8
"""Tokens before a part that are read again with it."""
LOGITS = 1 << 25
"""Logits that exist at a time in a second reading, of all heads of a row: little beside a long prompt, and enough for a
device to be busy with each launch."""
USED_BY = {"window": ("snapkv", "expected"), "kernel_size": ("snapkv",), "chunk": ("kvzip",)}
WHILE_GENERATING = ("window", "kernel_size")
"""Options of scores that `kvzip` has for what is evicted while generating, which it evicts as `snapkv` does."""
DEFAULTS = {"window": 64, "kernel_size": 5, "chunk": 2048}


@dataclass(frozen=True, kw_only=True)
class Eviction:
    """What is kept of a prompt. scores, budget: see the module. ratio: storage is allocated for so many times fewer
    tokens than the prompt has. tokens: or for so many per head, in the mean. threshold: of the budget of that name,
    which has neither. window: the last queries that are looked at. kernel_size: of the pooling, odd. floor: of adakv
    and global. chunk: tokens of a second reading at a time. decode_budget: tokens per KV head that there is ever
    storage for, in the mean over the heads of a layer, generated ones and the dense ones included: more make it evict
    again. None for no limit.

    ValueError for what does not go together.
    """

    scores: Scores = "snapkv"
    budget: Budget = "adakv"
    ratio: Annotated[float, Field(gt=1)] | None = None
    tokens: Annotated[int, Field(ge=1)] | None = None
    threshold: Annotated[float, Field(gt=0)] | None = None
    window: Annotated[int, Field(ge=1)] = DEFAULTS["window"]
    kernel_size: Annotated[int, Field(ge=1)] = DEFAULTS["kernel_size"]
    chunk: Annotated[int, Field(ge=PAGE)] = DEFAULTS["chunk"]
    floor: Annotated[float, Field(ge=0, le=1)] = 0.2
    decode_budget: Annotated[int, Field(ge=1)] | None = None

    def __post_init__(self) -> None:
        sizes = {name: getattr(self, name) for name in ("ratio", "tokens", "threshold")}
        given = [name for name, value in sizes.items() if value is not None]
        wanted = ["threshold"] if self.budget == "threshold" else ["ratio", "tokens"]
        if len(given) != 1 or given[0] not in wanted:
            raise ValueError(
                f"budget {self.budget} needs {' or '.join(wanted)}, and nothing beside it; given: "
                f"{' and '.join(given) or 'none'}"
            )
        if self.budget == "global" and self.scores != "kvzip":
            raise ValueError(
                f"budget global needs the scores of all layers at once, which scores kvzip has; {self.scores} evicts "
                "layer by layer: take budget adakv"
            )
        if self.kernel_size % 2 == 0:
            raise ValueError(f"kernel_size is {self.kernel_size}; it must be odd, so that a token is in the middle")
        if self.decode_budget is not None and self.budget not in ("uniform", "adakv"):
            raise ValueError(
                f"decode_budget evicts layer by layer, in a number of tokens, and budget {self.budget} has none for a "
                "layer: take budget adakv or uniform"
            )
        if self.decode_budget is not None and (self.tokens or 0) > self.decode_budget:
            raise ValueError(
                f"tokens is {self.tokens} and decode_budget {self.decode_budget}; what a prompt keeps must not be more "
                "than what is kept while generating"
            )
        again = WHILE_GENERATING if self.decode_budget is not None and self.scores == "kvzip" else ()
        for name, users in USED_BY.items():
            if getattr(self, name) != DEFAULTS[name] and self.scores not in users and name not in again:
                raise ValueError(f"{name} is for scores {' or '.join(users)}; scores is {self.scores}")

    @property
    def query_agnostic(self) -> bool:
        """Whether what is kept is the same whatever the prompt ends with asks for."""
        return self.scores == "kvzip"

    def room(self, length: int, heads: int, dense: int) -> int | None:
        """Pages that a row of `length` tokens may have in all heads together, beside `dense` tokens of each that are
        stored as they are; below 1 where the prompt is too short. None for a threshold, which has no limit.
        """
        if self.budget == "threshold":
            return None
        size = length / self.ratio if self.ratio is not None else self.tokens
        assert size is not None
        return int(heads * (size - dense) // PAGE)

    def shortest(self, dense: int) -> int:
        """Tokens of the shortest prompt that is worth evicting from: a page for every head in the mean."""
        if self.budget == "threshold":
            return dense + 2 * PAGE
        if self.ratio is not None:
            return math.ceil(self.ratio * (dense + PAGE))
        assert self.tokens is not None
        return max(self.tokens, dense + PAGE) + 1


@dataclass(frozen=True)
class Seen:
    """What a layer's scores are made of. query: (batch, num_heads, queries, head_dim), of the prompt's last tokens.
    key: (batch, num_kv_heads, tokens, head_dim), value likewise; all post-RoPE. starts: first column of each row.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    starts: list[int]
    scaling: float
    softcap: float | None = None

    def grouped(self, count: int) -> tuple[Tensor, Tensor]:
        """The last `count` queries, (batch, num_kv_heads, group, queries, head_dim) fp32, and which of them are tokens,
        (batch, queries).
        """
        tokens, heads = self.key.shape[2], self.key.shape[1]
        query = self.query[:, :, -count:].float().unflatten(1, (heads, -1))
        columns = torch.arange(tokens - query.shape[3], tokens, device=query.device)
        return query, columns >= torch.tensor(self.starts, device=query.device)[:, None]

    def logits(self, query: Tensor, key: Tensor) -> Tensor:
        """Of queries (…, queries, head_dim) and keys (…, keys, head_dim), fp32."""
        return capped(query @ key.float().mT * self.scaling, self.softcap)


def capped(logits: Tensor, softcap: float | None) -> Tensor:
    """Logits within a bound, if there is one."""
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def snapkv(seen: Seen, candidates: int, *, window: int, kernel_size: int) -> Tensor:
    """Scores of the first `candidates` columns, (batch, num_kv_heads, candidates) fp32; 0 for padding."""
    query, valid = seen.grouped(window)
    tokens, device = seen.key.shape[2], seen.key.device
    columns = torch.arange(tokens, device=device)
    starts = torch.tensor(seen.starts, device=device)
    causal = columns <= columns[tokens - query.shape[3] :, None]
    visible = (causal & (columns >= starts[:, None, None]))[:, None]
    counts = valid.sum(dim=1).clamp_min(1)[:, None]
    found = []
    for head in range(seen.key.shape[1]):
        logits = seen.logits(query[:, head], seen.key[:, head, None]).masked_fill(~visible, -torch.inf)
        # A query that is padding sees nothing, and its softmax is NaN.
        weights = torch.where(valid[:, None, :, None], logits.softmax(dim=-1), 0.0)
        found.append(weights[..., :candidates].mean(dim=1).sum(dim=1) / counts)
    scores = torch.stack(found, dim=1)
    return functional.avg_pool1d(scores, kernel_size, stride=1, padding=kernel_size // 2)


def expected(seen: Seen, candidates: int, *, window: int) -> Tensor:
    """Scores as of `snapkv`. ValueError with a softcap, which has no mean over a Gaussian in closed form."""
    if seen.softcap is not None:
        raise ValueError("scores expected is for attention without a softcap; take scores snapkv or kvzip")
    query, valid = seen.grouped(window)
    weight = (valid / valid.sum(dim=1, keepdim=True).clamp_min(1))[:, None, None, :, None]
    mean = (query * weight).sum(dim=3)
    centred = (query - mean[..., None, :]) * weight.sqrt()
    covariance = centred.mT @ centred
    key, length = seen.key[:, :, :candidates].float(), seen.value[:, :, :candidates].float().norm(dim=-1)
    columns = torch.arange(candidates, device=key.device)
    padding = (columns < torch.tensor(seen.starts, device=key.device)[:, None])[:, None, None]
    found = torch.einsum("bhgd,bhtd->bhgt", mean, key) * seen.scaling
    for group in range(query.shape[2]):
        found[:, :, group] += ((key @ covariance[:, :, group]) * key).sum(dim=-1) * (seen.scaling**2 / 2)
    weights = found.masked_fill(padding, -torch.inf).softmax(dim=-1).nan_to_num(0.0)
    return weights.mean(dim=2) * length


def reread(seen: Seen, own: Tensor, part: tuple[int, int], count: int) -> Tensor:
    """Scores of the columns of one row's part, (num_kv_heads, stop − start) fp32, from its second reading.

    seen: of one row; its query is that of the second reading. own: keys of that, (1, num_kv_heads, queries, head_dim).
    part: columns that are read again. count: queries that are no padding; they come first.
    """
    start, stop = part
    found = seen.key.new_zeros((seen.key.shape[1], stop - start), dtype=torch.float32)
    query = seen.query[0, :, :count].float().unflatten(0, (found.shape[0], -1))
    keys = torch.cat((seen.key[0, :, start:stop], own[0, :, :count]), dim=1).float()
    place = torch.arange(count, device=keys.device)
    step = max(1, LOGITS // (seen.query.shape[1] * keys.shape[1]))
    for low in range(0, count, step):
        block = query[:, :, low : low + step]
        logits = seen.logits(block.flatten(1, 2), keys).unflatten(1, block.shape[1:3])
        hidden = place > place[low : low + step, None]
        logits[..., stop - start :].masked_fill_(hidden, -torch.inf)
        weights = logits.softmax(dim=-1)[..., : stop - start]
        found = torch.maximum(found, weights.amax(dim=(1, 2)))
    return found


def page_counts(scores: Tensor, room: int | None, eviction: Eviction, there: list[int] | None = None) -> list[int]:
    """Pages of every head of one row. scores: (heads, candidates), of one layer or of all. room: as `Eviction.room`.
    there: candidates of each head, which come first; −inf behind them. None for all.
    """
    heads, candidates = scores.shape
    there = [candidates] * heads if there is None else there
    most = [-(-count // PAGE) for count in there]
    if room is None:
        assert eviction.threshold is not None
        return [-(-count // PAGE) for count in (scores >= eviction.threshold).sum(dim=1).tolist()]
    if room >= sum(most):
        return most
    shares = [room / heads] * heads
    if eviction.budget != "uniform":
        least = min(int(eviction.floor * room / heads * PAGE), candidates)
        order = scores.sort(dim=1, descending=True, stable=True).values
        rest = order[:, least:].flatten()
        left = min(room * PAGE - heads * least, rest.numel())
        taken = torch.zeros_like(rest, dtype=torch.bool)
        taken[rest.argsort(descending=True, stable=True)[:left]] = True
        shares = [(least + count) / PAGE for count in taken.view(heads, -1).sum(dim=1).tolist()]
    return whole_pages(shares, room, most)


def whole_pages(shares: list[float], room: int, most: list[int]) -> list[int]:
    """Shares in whole numbers that come to `room`: rounded down, then one more each for the largest remainders. most:
    of each head; they come to `room` or more.
    """
    counts = [min(int(share), limit) for share, limit in zip(shares, most, strict=True)]
    order = sorted(range(len(shares)), key=lambda head: (counts[head] - shares[head], head))
    while (left := room - sum(counts)) > 0:
        for head in [head for head in order if counts[head] < most[head]][:left]:
            counts[head] += 1
    return counts


def kept_columns(
    scores: Tensor, first: list[int], pages: list[list[int]], ends: list[list[int]] | None = None
) -> tuple[Tensor, list[list[int]]]:
    """Columns that every head keeps, in order, (batch, heads, most) int64, and how many they are.

    scores: (batch, heads, candidates). first: the first column of each row that may be evicted; those before it are
    not among the columns. pages: row → head → pages. ends: row → head → candidates; None for all.
    """
    candidates = scores.shape[2]
    ends = [[candidates] * len(row) for row in pages] if ends is None else ends
    counts = [
        [min(count * PAGE, max(end - start, 0)) for count, end in zip(row, row_ends, strict=True)]
        for row, row_ends, start in zip(pages, ends, first, strict=True)
    ]
    columns = torch.arange(candidates, device=scores.device)
    outside = columns < torch.tensor(first, device=scores.device)[:, None, None]
    outside = outside | (columns >= torch.tensor(ends, device=scores.device)[..., None])
    order = scores.masked_fill(outside, -torch.inf).argsort(dim=2, descending=True, stable=True)
    most = max((count for row in counts for count in row), default=0)
    order = order[..., :most]
    beyond = torch.arange(most, device=scores.device) >= torch.tensor(counts, device=scores.device)[..., None]
    # Columns beyond a head's own sort to its end, and are not read.
    chosen = order.masked_fill(beyond, candidates).sort(dim=2).values
    return chosen.clamp_max(max(candidates - 1, 0)), counts
