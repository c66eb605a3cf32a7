"""What `decode_speed` times: attention of the newest tokens over a cache, in each kind of codes, and peers.

| kind | what runs |
|---|---|
| int4, fp8, pq4, pq2, prune50, prune70 | `decode_attention.decode_attention` over a cache as the recipes kv-… keep it |
| prune70-int4 | prune70 with what is kept of a token in INT4, which no recipe has |
| evict4x, evict2x-int4 | the same over what KV heads have kept of a prompt; see below |
| bf16 | the same over pages of 16-bit numbers, which no recipe offers: what codes are measured against |

Keys of int4 are mapped by mean, factors and rotation, as calibration chooses for most layers; codebooks of pq4 and pq2
are made of the first tokens, for speed does not ask how near centroids are; prune70 leaves out as much of keys as of
values, as a search does in the mean. What evict… keeps is chosen by scores drawn
from a fixed seed, so that heads have very different numbers of tokens, `SPREAD` in the logarithm of a head's scores;
the tokens that `needles` look for have the highest. All of a cache's tokens are its prompt. Preparing the queries and
merging the parts is in every time, since it is in the op.

| peer | what runs, on dense bf16 keys and values |
|---|---|
| cudnn | ``scaled_dot_product_attention`` with cuDNN's kernel, on grouped KV heads |
| fa2 | the same with FlashAttention 2 |
| transformers | transformers' ``sdpa_attention_forward``; one query has no mask, as in a batch without padding |
| repeated | KV heads repeated inside the time, then what torch chooses: transformers' way with a mask, compiled |

Several queries need a causal mask from the end: dense and made before the clock starts, except for fa2, whose op means
that by causal but takes only KV heads that were repeated, also before.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend
from torch.nn.functional import scaled_dot_product_attention

from ..kernels.decode_attention import MAX_ROWS, CompressedKV, decode_attention
from ..kernels.kv_codes import Kind
from ..kernels.kv_pages import PAGE
from ..quant.method import AttentionInputs, KVCacheMethod
from .attention_cases import OUTLIER_STEP, Case, Layout, draw
from .attention_contenders import Contender, Problem, check_cuda, flash_from_the_end, grouped_or_repeated, sdpa
from .cache import TokenStore
from .device_speed import Machine, copies
from .evicting import EvictingStore
from .kv_evict import KVEvict
from .linear_speed import parse_pair
from .recipe import Recipe

RECIPES = {
    "int4": "kv-int4",
    "fp8": "kv-fp8",
    "pq4": "kv-pq4",
    "pq2": "kv-pq2",
    "prune50": "kv-prune50",
    "prune70": "kv-prune70",
    "prune70-int4": "kv-prune70",
    "evict4x": "kv-evict4x",
    "evict2x-int4": "kv-evict2x-int4",
}
CHANGES = {
    "int4": {"kv_cache.key_transform": "scale_rotate"},
    "prune70": {"kv_cache.search": "off"},
    "prune70-int4": {"kv_cache.search": "off", "kv_cache.values": "int4"},
}
KINDS = (*RECIPES, "bf16")
MIN_LENGTH = 512
"""Of shorter caches most is dense."""
STATIC_TOKENS = 2048
"""Tokens of the first sequence from which means and factors of keys, or codebooks, are taken."""
NEEDLE = 0.5
SPREAD = 0.5


@dataclass(frozen=True, kw_only=True)
class KVBF16(KVCacheMethod):
    """Pages in 16 bit."""

    kind: ClassVar[Kind] = "bf16"


@dataclass(frozen=True)
class DecodeCase:
    """One shape. length: tokens of the cache, the queries' own included. queries: newest tokens, attended at once."""

    batch: int
    length: int
    heads: int
    kv_heads: int
    head_dim: int
    queries: int

    @property
    def name(self) -> str:
        """``8 × 32768 tokens, 32/8 heads of 128``."""
        return f"{self.batch} × {self.length} tokens, {self.heads}/{self.kv_heads} heads of {self.head_dim}"

    def draw(self, device: torch.device) -> Problem:
        """The same random data every time; keys and values as a dense cache keeps them, contiguous."""
        case = Case("causal", self.length, self.head_dim, self.heads, self.kv_heads, self.batch)
        layout = Layout(self.batch, self.queries, self.length, True, None, None)
        query, key, value = draw(case, layout, device)
        return Problem(case, layout, query, key.contiguous(), value.contiguous())


def decode_cases(
    batch_lengths: Sequence[tuple[int, int]],
    heads: Sequence[tuple[int, int]],
    head_dims: Sequence[int],
    kinds: Sequence[str],
    queries: int,
) -> list[DecodeCase]:
    """Every combination. ValueError for heads that a kind cannot store, more queries than the kernel holds, or caches
    that nothing is evicted from.
    """
    for (count, kv_heads), head_dim, kind in itertools.product(heads, head_dims, kinds):
        method = method_of(kind)
        method.codec(method.blank_statics(kv_heads, head_dim)).layout(head_dim, head_dim)
        rows = queries * count // kv_heads
        if rows > MAX_ROWS:
            raise ValueError(
                f"{queries} queries of heads {count}/{kv_heads} are {rows} rows for each KV head, and the kernel holds "
                f"{MAX_ROWS}; use at most {MAX_ROWS * kv_heads // count}"
            )
    for (_, length), kind in itertools.product(batch_lengths, kinds):
        if length < (shortest := shortest_length(kind)):
            raise ValueError(f"kind {kind} evicts from no fewer than {shortest} tokens, and a cache has {length}")
    combinations = itertools.product(batch_lengths, heads, head_dims)
    return [DecodeCase(*shape, *counts, head_dim, queries) for shape, counts, head_dim in combinations]


def parse_batch_lengths(text: str) -> list[tuple[int, int]]:
    """Sequences x tokens, comma-separated, each once. Raises ValueError for anything else."""
    found = []
    for item in text.split(","):
        pair = parse_pair(item)
        if pair is None or pair[1] < MIN_LENGTH:
            raise ValueError(
                f"cache {item!r} is no number of sequences x at least {MIN_LENGTH} tokens; use e.g. 8x32768,1x131072"
            )
        found.append(pair)
    return list(dict.fromkeys(found))


def method_of(kind: str) -> KVCacheMethod:
    """The recipes' method of a kind; for bf16 the same sink and recent tokens. ValueError for an unknown kind."""
    if kind not in KINDS:
        raise ValueError(f"unknown kind {kind!r}; known: {', '.join(KINDS)}")
    if kind == "bf16":
        fp8 = method_of("fp8")
        return KVBF16(sink_tokens=fp8.sink_tokens, recent_tokens=fp8.recent_tokens)
    found = Recipe.load(RECIPES[kind], CHANGES.get(kind)).kv_cache
    assert found is not None
    return found


def shortest_length(kind: str) -> int:
    """Tokens of the shortest cache of a kind."""
    method = method_of(kind)
    return max(MIN_LENGTH, method.shortest_prompt) if isinstance(method, KVEvict) else MIN_LENGTH


def fill(kind: str, problem: Problem, statics: Mapping[str, Tensor] | None = None) -> TokenStore:
    """One cache of all tokens, the queries' own among the recent ones. statics: of `statics_of`."""
    method, statics = method_of(kind), statics_of(kind, problem) if statics is None else statics
    if not isinstance(method, KVEvict):
        store = TokenStore(method, statics=statics)
        store.append(problem.key, problem.value)
        return store
    return evicted(method, problem, statics)


def evicted(method: KVEvict, problem: Problem, statics: Mapping[str, Tensor]) -> EvictingStore:
    """A cache of all tokens as one prompt that was evicted from, by `drawn_scores`."""
    store = EvictingStore(method, statics=statics)
    store.append(problem.key, problem.value)
    store.scores = drawn_scores(problem)
    store.evict(store.own_pages(store.scores[..., : store.boundary]))
    return store


def drawn_scores(problem: Problem) -> Tensor:
    """Scores of tokens, (batch, num_kv_heads, tokens) fp32, the same every time; see the module."""
    generator = torch.Generator().manual_seed(0)
    batch, heads, tokens, _ = problem.key.shape
    scores = torch.rand((batch, heads, tokens), generator=generator)
    scores *= torch.randn((batch, heads, 1), generator=generator).mul_(SPREAD).exp_()
    scores[..., OUTLIER_STEP // 2 :: OUTLIER_STEP] += scores.max()
    return scores.to(problem.key.device)


def statics_of(kind: str, problem: Problem) -> dict[str, Tensor]:
    """What a kind needs to know of keys and values, on their device."""
    method = method_of(kind)
    if isinstance(method, KVEvict) and method.codes == "int4":
        method = method_of("int4")
    if not method.needs_data:
        return {}
    key, value = (tensor[:1, :, :STATIC_TOKENS] for tensor in (problem.key, problem.value))
    found = method.statics(AttentionInputs(problem.query[:1], key, value, {}))
    return {name: tensor.to(key.device) for name, tensor in found.items()}


def rotated_stores(kind: str, problem: Problem, machine: Machine) -> list[TokenStore]:
    """Equal caches, as many as `Machine.rotated` would make; each holds addresses of its own pages."""
    statics = statics_of(kind, problem)
    first = fill(kind, problem, statics)
    count = copies(first.nbytes().total, machine.cache_bytes)
    return [first, *(fill(kind, problem, statics) for _ in range(count - 1))]


def visible(store: TokenStore, problem: Problem) -> CompressedKV:
    """What the queries read, as a model's attention layer is given it."""
    queries = problem.layout.queries
    new = None if queries == 1 else (problem.key[:, :, -queries:], problem.value[:, :, -queries:])
    return store.read(new, queries)


def attend(query: Tensor, kv: CompressedKV) -> Tensor:
    """(batch, heads, queries, head_dim)."""
    return decode_attention(query, kv)[0]


def decode_calls(query: Tensor, stores: Sequence[TokenStore], problem: Problem) -> list[Callable[[], Tensor]]:
    """One call per cache."""
    return [partial(attend, query, visible(store, problem)) for store in stores]


def needles(problem: Problem) -> Tensor:
    """Queries that each look for one token: they are `NEEDLE` times its key without the mean.

    The tokens are some of the larger ones, which no other token's key comes near, spread evenly over the cache: another
    one for each sequence, head and query. A page that is skipped or taken for another one so shows in the result, which
    it does not where attention is flat.
    """
    batch, heads, queries, _ = problem.query.shape
    large = torch.arange(OUTLIER_STEP // 2, problem.layout.keys - queries, OUTLIER_STEP, device=problem.key.device)
    count = batch * heads * queries
    token = large[torch.arange(count, device=large.device) * len(large) // count].view(batch, heads, queries)
    mean = problem.key.mean(dim=2, dtype=torch.float32).repeat_interleave(problem.groups, dim=1)
    head = torch.arange(heads, device=large.device)[:, None] // problem.groups
    row = torch.arange(batch, device=large.device)[:, None, None]
    return (NEEDLE * (problem.key[row, head, token].float() - mean[:, :, None])).to(problem.query.dtype)


def causal_mask(problem: Problem) -> Tensor | None:
    """(1, 1, queries, keys) bool; None for one query, which sees everything."""
    return None if problem.layout.queries == 1 else problem.dense_mask()


def cudnn_peer(problem: Problem, machine: Machine) -> Contender:
    """cuDNN through torch."""
    check_cuda(problem)
    mask, bias = causal_mask(problem), None
    if mask is not None:
        bias = torch.zeros(mask.shape, dtype=problem.query.dtype, device=mask.device).masked_fill_(~mask, -torch.inf)
    run = partial(sdpa, SDPBackend.CUDNN_ATTENTION, bias, False)
    return grouped_or_repeated(problem, machine, partial(run, False), partial(run, True))


def fa2_peer(problem: Problem, machine: Machine) -> Contender:
    """FlashAttention 2 through torch."""
    check_cuda(problem)
    if problem.layout.queries > 1:
        return grouped_or_repeated(problem, machine, flash_from_the_end, None)
    run = partial(sdpa, SDPBackend.FLASH_ATTENTION, None, False)
    return grouped_or_repeated(problem, machine, partial(run, False), partial(run, True))


def transformers_peer(problem: Problem, machine: Machine) -> Contender:
    """What an unpatched model would run."""
    from .hf_peers import AttentionShape, sdpa_attention

    module, mask = AttentionShape(problem.groups, is_causal=True), causal_mask(problem)

    def run(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return sdpa_attention(module, query, key, value, mask)

    return Contender(machine.rotated((problem.query, problem.key, problem.value)), run)


def repeated_peer(problem: Problem, machine: Machine) -> Contender:
    """KV heads repeated in every call."""
    groups, mask = problem.groups, causal_mask(problem)

    def run(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        key, value = (tensor.repeat_interleave(groups, dim=1) for tensor in (key, value))
        return scaled_dot_product_attention(query, key, value, attn_mask=mask)

    return Contender(machine.rotated((problem.query, problem.key, problem.value)), run)


PEERS: dict[str, Callable[[Problem, Machine], Contender]] = {
    "cudnn": cudnn_peer,
    "fa2": fa2_peer,
    "transformers": transformers_peer,
    "repeated": repeated_peer,
}


def read_bytes(store: TokenStore, problem: Problem) -> int:
    """What a call has to read and write: pages with their parameters and addresses, dense tokens, queries, outputs."""
    batch, kv_heads, length, head_dim = problem.key.shape
    assert store.pool is not None
    pages = -(-store.coded // PAGE)
    kept = store.kept if isinstance(store, EvictingStore) else None
    if kept is not None:
        dense = batch * kv_heads * (length - store.coded + store.method.sink_tokens) * 2 * head_dim
        return (
            kept.records.nbytes + 8 * len(kept.records) + dense * problem.key.element_size() + 2 * problem.query.nbytes
        )
    dense = (length - store.coded + store.method.sink_tokens) * 2 * head_dim * problem.key.element_size()
    planes = batch * kv_heads * (pages * store.pool.layout.record_bytes + dense)
    return planes + 8 * pages + 2 * problem.query.nbytes


def storage(store: TokenStore, problem: Problem) -> dict[str, Any]:
    """Bytes that a token takes in one KV head, its key and its value together.

    bytes_per_token: all that is allocated, dense tokens and room for more included, over all tokens that came.
    page_bytes_per_token: in a page. kept_tokens, where tokens were evicted: in pages of the head that has least, and of
    the one that has most.
    """
    batch, kv_heads, length, _ = problem.key.shape
    assert store.pool is not None
    kept = store.kept if isinstance(store, EvictingStore) else None
    counts = [] if kept is None else [count for row in kept.counts for count in row]
    return {
        **({"kept_tokens": [min(counts), max(counts)]} if counts else {}),
        "bytes_per_token": round(store.nbytes().total / (batch * kv_heads * length), 2),
        "page_bytes_per_token": round(store.pool.layout.record_bytes / PAGE, 2),
    }
