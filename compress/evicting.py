"""Keys and values of one layer that evicts: a `TokenStore` that first waits for a prompt's scores.

The first tokens that come are a prompt. If it is long enough, it waits, dense, until it has been scored (`pending`);
then every head's own tokens are packed (`kernels.kv_kept`) and the rest is gone::

    columns       0 … E − 1: of each head what it kept, sinks dense | E … tokens − 1: all of them, as in any store
                  E = tokens of the prompt − recent_tokens

A shorter prompt is stored whole. What each row may keep depends on its own length, padding not counted. With a
`decode_budget` this happens again and again to all tokens but the recent ones (`evicting_again.py`), and E grows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..kernels.activations import log_fallback
from ..kernels.decode_attention import CompressedKV
from ..kernels.kv_append import GONE
from ..kernels.kv_codec import PAGE
from ..kernels.kv_kept import KeptTokens
from ..sparsify.kv_evict import Seen, expected, kept_columns, page_counts, reread, snapkv
from .cache import Sizes, TokenStore
from .evicting_again import QueryRing, evict_again
from .kv_evict import KVEvict


@dataclass(frozen=True)
class SecondReading:
    """Part of a prompt that is read again. parts: row → its columns; empty for a row that has been read. counts: row →
    tokens that go in for it, those before its part included.
    """

    parts: list[tuple[int, int]]
    counts: list[int]


class EvictingStore(TokenStore):
    """One layer's tokens, of which a prompt's are evicted. pending: keys and values of a prompt that waits for its
    scores. scores: (batch, num_kv_heads, columns) of a second reading so far. reading: the part that is read now.

    With a `decode_budget`, queries: the last ones. seen_from: those of columns from it on are there. observed: tokens
    there were when the last came. place: (1,) int64 on the device, where in the ring a recorded step puts its query.
    blind: why the last call showed none.
    """

    method: KVEvict

    def __init__(
        self, method: KVEvict, *, statics: Mapping[str, Tensor] | None = None, starts: list[int] | None = None
    ):
        super().__init__(method, statics=statics, starts=starts)

    def forget(self) -> None:
        """See `TokenStore.forget`."""
        super().forget()
        self.pending: tuple[Tensor, Tensor] | None = None
        self.kept: KeptTokens | None = None
        self.scores: Tensor | None = None
        self.reading: SecondReading | None = None
        self.queries: QueryRing | None = None
        self.place: Tensor | None = None
        self.seen_from = self.observed = 0
        self.blind = "its attention was never seen"

    @torch.no_grad()
    def append(self, key: Tensor, value: Tensor) -> None:
        """New tokens; a first prompt waits for its scores. ValueError as of `check`, or if those never came."""
        if self.pending is not None:
            raise ValueError(
                "a prompt is to be evicted from, and its attention was never seen; a cache that evicts needs a model "
                "that was patched with its recipe"
            )
        count = key.shape[2] if key.dim() == 4 else 0
        if self.tokens and not key.is_meta:
            self.settle()
        if self.tokens == 0 and count > 1:
            if count >= self.method.shortest_prompt:
                self.check(key, value)
                self.pending, self.tokens = (key.detach(), value.detach()), count
                self.version += 1
                if key.is_meta:
                    self.evict(self.own_pages(None))
                return
            if not key.is_meta:
                reason = f"a prompt of fewer than {self.method.shortest_prompt} tokens would free no memory"
                log_fallback("eviction", reason, "a cache of all tokens")
        super().append(key, value)

    def allocate(self, key: Tensor, value: Tensor) -> None:
        """See `TokenStore.allocate`."""
        super().allocate(key, value)
        self.limit_pages()

    def limit_pages(self) -> None:
        """No storage ahead of need for pages that are packed before they would come."""
        if self.method.decode_budget is not None:
            assert self.key is not None and self.pool is not None
            heads = self.key.shape[1]
            packed = 0 if self.kept is None else max(self.kept.row_pages)
            self.pool.most = (heads * self.method.decode_pages - packed) // heads + 1

    @property
    def remembers(self) -> bool:
        """Whether queries are wanted."""
        return self.method.decode_budget is not None

    @property
    def ring_length(self) -> int:
        """Queries that are remembered: no more than come between two evictions and after what they leave out."""
        return min(self.method.window, self.method.recent_tokens + PAGE)

    @torch.no_grad()
    def observe(self, query: Tensor, scaling: float, softcap: float | None) -> None:
        """Queries of the last tokens, (batch, num_heads, queries, head_dim), post-RoPE."""
        if not self.remembers:
            return
        if self.queries is None or self.queries.ring.shape[0] != query.shape[0]:
            shape = (*query.shape[:2], self.ring_length, query.shape[3])
            self.queries = QueryRing(query.new_zeros(shape), scaling, softcap)
            self.seen_from = self.tokens - query.shape[2]
        if self.repeatable and self.following is not None and self.place is not None:
            self.queries.ring.index_copy_(2, self.place, query)
        else:
            self.queries.put(query.detach(), self.tokens)
        if self.observed < self.tokens - query.shape[2]:
            self.seen_from = self.tokens - query.shape[2]
        self.observed = self.tokens

    def overlook(self, reason: str) -> None:
        """A call whose queries cannot be remembered."""
        self.blind = reason

    def advance(self) -> None:
        """See `TokenStore.advance`; its query is put into the ring on the device."""
        super().advance()
        self.observed = max(self.observed, self.tokens)

    def settle(self) -> None:
        """Evicts again if there is more than the budget allows. ValueError if no query tells from what."""
        if not self.is_full:
            return
        if self.observed < self.tokens:
            self.seen_from = self.tokens
        count = min(self.ring_length, self.tokens - max(self.seen_from, self.gone))
        if self.queries is None or count < 1:
            raise ValueError(
                f"more than decode_budget's {self.method.decode_budget} tokens are held, and the last queries, which "
                f"tell what goes, are not known: {self.blind}; a cache that evicts needs a model that was patched with "
                "its recipe"
            )
        evict_again(self, self.queries, count)

    @property
    def is_full(self) -> bool:
        """Whether pages, kept and of columns, are more than the budget has room for."""
        if self.method.decode_budget is None or self.coded == self.gone or self.key is None:
            return False
        heads = self.key.shape[1]
        pages = -(-self.coded // PAGE) - self.gone // PAGE
        kept = 0 if self.kept is None else max(self.kept.row_pages)
        return kept + heads * pages > heads * self.method.decode_pages

    def replace_pages(self, kept: KeptTokens) -> None:
        """What heads have kept of all coded columns, in place of these and of what they had kept before."""
        assert self.pool is not None
        following = self.following if kept is self.kept else None
        self.kept, self.gone, self.following = kept, self.coded, following
        self.remove_pages(list(self.slots))
        self.pool.release()
        self.limit_pages()
        if following is not None:
            # Launches that were recorded find the same storage.
            following[GONE] = self.gone
        self.version += 1

    def look(self, query: Tensor, key: Tensor, *, scaling: float, softcap: float | None, starts: list[int]) -> None:
        """What attention is about to compute. query: (batch, num_heads, queries, head_dim), key: (batch, num_kv_heads,
        keys, head_dim). starts: first column of each row, as the mask says. ValueError if that is not the store's.
        """
        assert self.pending is not None
        prompt_key, prompt_value = self.pending
        if self.reading is not None:
            self.read_again(query, key, scaling, softcap)
            return
        self.observe(query, scaling, softcap)
        if self.starts is not None and self.starts != starts:
            raise ValueError(
                f"the mask's rows begin at {starts}, and the cache was made for rows from {self.starts} on"
            )
        self.starts = starts
        if self.method.scores == "kvzip":
            return
        seen = Seen(query, prompt_key, prompt_value, starts, scaling, softcap)
        if self.method.scores == "snapkv":
            options = {"window": self.method.window, "kernel_size": self.method.kernel_size}
            self.scores = snapkv(seen, self.boundary, **options)
        else:
            self.scores = expected(seen, self.boundary, window=self.method.window)
        self.evict(self.own_pages(self.scores))

    @property
    def boundary(self) -> int:
        """The first column that stays whatever its score."""
        return max(self.tokens - self.method.recent_tokens, 0)

    def first_candidates(self) -> list[int]:
        """The first column of each row that may be evicted."""
        assert self.pending is not None
        starts = self.starts or [0] * self.pending[0].shape[0]
        return [min(start + self.method.sink_tokens, self.boundary) for start in starts]

    def rooms(self, layers: int = 1) -> list[int | None]:
        """Pages that each row may have, in so many layers such as this one together; None for no limit. A row that
        alone would be too short keeps everything beside longer ones too.
        """
        assert self.pending is not None
        heads, rooms = self.pending[0].shape[1], []
        for start in self.starts or [0] * self.pending[0].shape[0]:
            length = self.tokens - start
            room = self.method.room(length, heads, self.method.dense_tokens)
            if length < self.method.shortest_prompt:
                room = heads * -(-length // PAGE)
            if room is not None and self.method.decode_budget is not None:
                room = min(room, heads * self.method.decode_pages)
            rooms.append(None if room is None else layers * room)
        return rooms

    def own_pages(self, scores: Tensor | None) -> list[list[int]]:
        """Row → head → pages, for scores of this layer alone; None for as many as there can be."""
        assert self.pending is not None
        shape = (*self.pending[0].shape[:2], self.boundary)
        found = torch.full(shape, torch.inf) if scores is None else scores
        return row_pages(found, self.first_candidates(), self.rooms(), self.method)

    def read_again(self, query: Tensor, key: Tensor, scaling: float, softcap: float | None) -> None:
        """Scores of the part of each row that a second reading is at."""
        assert self.pending is not None and self.reading is not None
        prompt_key, prompt_value = self.pending
        tokens = prompt_key.shape[2]
        if self.scores is None:
            self.scores = prompt_key.new_zeros((*prompt_key.shape[:2], tokens), dtype=torch.float32)
        for row, (part, count) in enumerate(zip(self.reading.parts, self.reading.counts, strict=True)):
            if part[0] < part[1]:
                one = slice(row, row + 1)
                seen = Seen(query[one], prompt_key[one], prompt_value[one], [0], scaling, softcap)
                self.scores[row, :, part[0] : part[1]] = reread(seen, key[one, :, tokens:], part, count)

    def beside(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """The prompt's keys and values and, behind them, those of its second reading, which are not stored."""
        assert self.pending is not None
        return torch.cat((self.pending[0], key), dim=2), torch.cat((self.pending[1], value), dim=2)

    @torch.no_grad()
    def evict(self, pages: list[list[int]]) -> None:
        """Keeps the best tokens of each head in so many pages, and forgets the rest of the prompt."""
        assert self.pending is not None
        (key, value), boundary, tokens = self.pending, self.boundary, self.tokens
        scores = key.new_zeros((*key.shape[:2], boundary)) if self.scores is None else self.scores[..., :boundary]
        columns, counts = kept_columns(scores, self.first_candidates(), pages)
        self.pending = self.scores = None
        self.allocate(key, value)
        self.tokens = 0
        self.keep_sinks(key, value)
        self.kept = KeptTokens.pack(key, value, columns, counts, self.codec)
        self.limit_pages()
        self.tokens, self.coded, self.gone = tokens, boundary, boundary
        assert self.key is not None and self.value is not None
        for place, source in self.places(boundary, tokens):
            source = slice(boundary + source.start, boundary + source.stop)
            self.key[:, :, place], self.value[:, :, place] = key[:, :, source], value[:, :, source]
        self.version += 1

    def add_page(self, number: int) -> None:
        """See `TokenStore.add_page`. The first page begins with columns that nobody writes or sees, and a kernel
        multiplies what it has read by zero: it must be numbers.
        """
        super().add_page(number)
        if number * PAGE < self.gone:
            assert self.pool is not None
            self.pool.record(self.slots[number]).zero_()

    def read(
        self, new: tuple[Tensor, Tensor] | None, queries: int, before: tuple[Tensor, Tensor] | None = None
    ) -> CompressedKV:
        """See `TokenStore.read`."""
        return replace(super().read(new, queries, before), kept=self.kept)

    def crop(self, count: int) -> None:
        """See `TokenStore.crop`. ValueError as well for tokens of which some were evicted."""
        if self.kept is not None and count and self.tokens - count < self.gone:
            raise ValueError(
                f"{count} of {self.tokens} tokens cannot be taken from a cache that has evicted from its first "
                f"{self.gone}; start a new one"
            )
        if self.pending is not None and count:
            raise ValueError("tokens cannot be taken from a prompt that waits to be evicted from")
        former = self.tokens
        super().crop(count)
        if count:
            # Queries of the tokens that go have taken the places of earlier ones.
            self.seen_from = max(self.seen_from, former - self.ring_length)
            self.observed = min(self.observed, self.tokens)

    def map_rows(self, change: Callable[[Tensor], Tensor], rows: list[int]) -> None:
        """See `TokenStore.map_rows`."""
        if self.pending is not None:
            self.pending = (change(self.pending[0]), change(self.pending[1]))
        if self.kept is not None:
            self.kept = self.kept.rows(rows)
        if self.queries is not None:
            self.queries = replace(self.queries, ring=change(self.queries.ring))
        super().map_rows(change, rows)
        if self.key is not None:
            self.limit_pages()

    @property
    def batch(self) -> int | None:
        """See `TokenStore.batch`."""
        return self.pending[0].shape[0] if self.pending is not None else super().batch

    @property
    def page_elements(self) -> int:
        """See `TokenStore.page_elements`; those of kept tokens too."""
        return super().page_elements + (0 if self.kept is None else self.kept.elements)

    def nbytes(self) -> Sizes:
        """See `TokenStore.nbytes`; a prompt that waits is dense, and queries are."""
        codes, parameters = (0, 0) if self.kept is None else self.kept.nbytes()
        waiting = sum(tensor.nbytes for tensor in self.pending or ())
        queries = 0 if self.queries is None else self.queries.ring.nbytes
        return super().nbytes() + Sizes(codes, parameters, waiting + queries)

    @property
    def dense_bytes(self) -> int:
        """Bytes that as many tokens take in a dense cache, padding included."""
        if self.key is None or self.value is None:
            return 0
        batch, heads, _, head_dim = self.key.shape
        return self.tokens * batch * heads * (head_dim + self.value.shape[3]) * self.key.element_size()

    @property
    def kept_share(self) -> float | None:
        """Share of the tokens up to the last eviction that is there, mean over rows and heads; None before any."""
        if self.kept is None or self.starts is None:
            return None
        shares = []
        for start, counts in zip(self.starts, self.kept.counts, strict=True):
            dense = min(self.method.sink_tokens, max(self.gone - start, 0)) + self.method.recent_tokens
            length = self.gone + self.method.recent_tokens - start
            shares += [(count + dense) / length for count in counts]
        return sum(shares) / len(shares)


def row_pages(scores: Tensor, first: list[int], rooms: list[int | None], method: KVEvict) -> list[list[int]]:
    """Row → head → pages. scores: (batch, heads, columns), of one layer or of all. first: columns that are candidates.
    rooms: of `EvictingStore.rooms`.
    """
    rows = zip(scores, first, rooms, strict=True)
    return [page_counts(row[:, low:], room, method) for row, low, room in rows]


def evict_together(stores: list[EvictingStore]) -> None:
    """Ends a second reading: every layer evicts by its scores, sharing pages with others if the budget is global."""
    first = stores[0]
    if first.method.budget != "global":
        for store in stores:
            assert store.scores is not None
            store.evict(store.own_pages(store.scores[..., : store.boundary]))
        return
    # Many millions of scores of a long prompt, which a CPU would sort for seconds.
    device = first.scores.device  # pyright: ignore[reportOptionalMemberAccess]
    found = [store.scores[..., : store.boundary].to(device) for store in stores]  # pyright: ignore
    scores = torch.cat(found, dim=1)
    heads = scores.shape[1] // len(stores)
    pages = row_pages(scores, first.first_candidates(), first.rooms(len(stores)), first.method)
    for index, store in enumerate(stores):
        store.evict([row[index * heads : (index + 1) * heads] for row in pages])
