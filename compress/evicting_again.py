"""What a layer does to stay within `decode_budget`: it remembers its last queries, and now and then keeps the best of
all that it holds.

Tokens that come are coded a page at a time, as in any store. Where those pages and what heads have kept are more than
the budget leaves room for, both are scored anew before the next tokens come (`sparsify.kv_evict_again`) and packed as
what each head keeps; the pages are free again. So a layer has storage for::

    sinks | recent tokens and the page they fill, dense | room pages for each head in the mean, and one that comes

and a further turn for its own tokens, until the next token. Tokens are scored once in `PAGE` steps: a step does no more
than to put its query into a ring.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..kernels.kv_repacked import HeldTokens
from ..sparsify.kv_evict import kept_columns
from ..sparsify.kv_evict_again import Beside, LastQueries, again_pages, again_scores

if TYPE_CHECKING:
    from .evicting import EvictingStore


@dataclass
class QueryRing:
    """The last queries of a layer, (batch, num_heads, length, head_dim): that of column c at place c modulo length.
    scaling, softcap: of their attention.
    """

    ring: Tensor
    scaling: float
    softcap: float | None

    @property
    def length(self) -> int:
        """Queries that there is room for."""
        return self.ring.shape[2]

    def put(self, query: Tensor, tokens: int) -> None:
        """Queries of the last of so many tokens."""
        count = min(query.shape[2], self.length)
        columns = torch.arange(tokens - count, tokens, device=query.device)
        self.ring[:, :, columns % self.length] = query[:, :, query.shape[2] - count :]

    def last(self, count: int, tokens: int) -> tuple[Tensor, Tensor]:
        """Those of the last `count` of so many tokens, in order, and their columns."""
        columns = torch.arange(tokens - count, tokens, device=self.ring.device)
        return self.ring[:, :, columns % self.length], columns


def evict_again(store: EvictingStore, queries: QueryRing, count: int) -> None:
    """Keeps, of all that is kept and all that is coded, what there is room for. count: of the last queries, whose
    columns are not below `store.gone`: what was kept before precedes them.
    """
    assert store.key is not None and store.starts is not None and store.pool is not None
    method, heads, device = store.method, store.key.shape[1], store.key.device
    starts = torch.tensor(store.starts, device=device)
    span = (store.gone, store.coded)
    held = HeldTokens.of(store.kept, store.where(), span, starts + method.sink_tokens, heads)
    places, counts = held.in_order()
    query, columns = queries.last(count, store.tokens)
    last = LastQueries(query, columns, starts, queries.scaling, queries.softcap)
    scores = again_scores(last, held, tokens_beside(store), places, method)
    before = None if store.kept is None else [[len(head) for head in row] for row in store.kept.numbers]
    pages = again_pages(scores, counts, before, heads * method.decode_pages, method)
    chosen, kept_counts = kept_columns(scores, [0] * len(counts), pages, counts)
    store.replace_pages(held.pack(places.gather(2, chosen), kept_counts))


def tokens_beside(store: EvictingStore) -> Beside:
    """Sinks that are no candidates, and the dense tokens behind the coded ones."""
    assert store.sink_key is not None and store.sink_starts is not None
    device = store.sink_key.device
    keys = [store.sink_key, *(key for key, _ in store.ring(store.coded, store.tokens))]
    batch, _, sink_tokens = keys[0].shape[:3]
    sinks = store.sink_starts[:, None] + torch.arange(sink_tokens, device=device)
    recent = torch.arange(store.coded, store.tokens, device=device)[None].expand(batch, -1)
    there = torch.cat((sinks < store.coded, torch.ones_like(recent, dtype=torch.bool)), dim=1)
    return Beside(torch.cat(keys, dim=2), torch.cat((sinks, recent), dim=1), there)
