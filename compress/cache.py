"""Keys and values of one layer, compressed: sink tokens dense, recent tokens dense, everything between in pages of
codes.

Columns are tokens in the order in which they came. `append` writes new tokens behind the recent ones and codes, a page
at a time, those that more than `recent_tokens` others follow; nothing that is kept is ever copied to grow, and what was
coded is never coded again: after a `crop` into the pages, the last one is filled up from where it was cut. The recent
tokens sit in a ring of `recent_tokens` and a page: column c at place c modulo its length. Every query sees at least
`recent_tokens` dense columns, its own included, also where several tokens come at a time, whose call sees the past
as it was coded before them.

The first `sink_tokens` of a row, from its own first token on in a left-padded batch, are kept dense beside their codes.
A layer with a window drops pages that no later query can see. A store is one object of Python integers and tensors:
lengths are known without asking the device.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from ..kernels.decode_attention import MAX_ROWS, CompressedKV
from ..kernels.kv_append import GONE, Appendable, append_token
from ..kernels.kv_pages import PAGE, Page, Pages, write_tokens
from ..quant.method import KVCacheMethod
from .page_pool import PagePool, PageViews, Slot

MAX_RUNS = 8
"""Launches that numbers for the device are worth at most."""
CODED_AT_ONCE = 32
"""Pages that a long prompt codes at a time, which bounds the float32 copies."""
ROOM = 4096
"""Tokens that a table of pages has room for, beyond those that are there, before it has to move."""


@dataclass(frozen=True)
class Sizes:
    """Bytes of allocated storage."""

    codes: int
    scales: int
    dense: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.codes + self.scales + self.dense

    def __add__(self, other: Sizes) -> Sizes:
        return Sizes(self.codes + other.codes, self.scales + other.scales, self.dense + other.dense)


class TokenStore:
    """One layer's tokens. method: codes, sinks, recent tokens and the limit. statics: of `KVCacheMethod.statics`.
    window: columns that a query sees, its own included; None for all. starts: column of the first token of each row,
    None for 0 everywhere.

    version counts changes: what was read before one is not to be used after it. kept_from: columns from it on are all
    there. pages_from: pages that end before it are gone. skipped: columns of the last append that nobody will see.
    gone: columns before it were evicted, and what is left of them is kept elsewhere (`evicting.py`). looked_at: coded
    columns that the last `read` showed.
    """

    def __init__(
        self,
        method: KVCacheMethod,
        *,
        statics: Mapping[str, Tensor] | None = None,
        window: int | None = None,
        starts: list[int] | None = None,
    ):
        self.method, self.window = method, window
        self.codec = method.codec(statics or {})
        self.starts = None if starts is None else list(starts)
        self.recording = False
        self.version = 0
        self.following: Tensor | None = None
        self.repeatable = False
        self.key: Tensor | None = None
        self.forget()

    def forget(self) -> None:
        """Drops all tokens and all storage. Starts belong to the tokens and go with them."""
        self.following = None
        if self.key is not None:
            self.starts = None
        self.pool: PagePool | None = None
        self.slots: dict[int, Slot] = {}
        self.found_at: dict[int, int] = {}
        self.addresses: Tensor | None = None
        self.located: Pages | None = None
        self.tokens = self.coded = self.looked_at = 0
        self.kept_from = self.pages_from = self.gone = 0
        self.skipped = (0, 0)
        self.key = self.value = self.sink_key = self.sink_value = self.sink_starts = None
        self.version += 1

    def __getstate__(self) -> dict[str, object]:
        """For a copy, whose pages lie elsewhere."""
        elsewhere = {"found_at": {}, "addresses": None, "located": None}
        return {**vars(self), **elsewhere, "following": None, "repeatable": False}

    def __setstate__(self, state: dict[str, object]) -> None:
        vars(self).update(state)
        if self.pool is not None:
            self.found_at = {number: self.pool.address(slot) for number, slot in self.slots.items()}

    @property
    def pages(self) -> Mapping[int, Page]:
        """Those that there are, by number."""
        return {} if self.pool is None else PageViews(self.pool, self.slots)

    @property
    def recent(self) -> int:
        """Dense tokens behind the coded ones."""
        return self.tokens - self.coded

    @property
    def first(self) -> int:
        """First column that the next token can see."""
        return self.gone if self.window is None else max(0, self.tokens - self.window + 1)

    def check(self, key: Tensor, value: Tensor) -> None:
        """ValueError, with the store as it was, if new tokens do not fit to those that are there, or are too many."""
        if key.dim() != 4 or key.shape[:3] != value.shape[:3]:
            raise ValueError(f"keys {tuple(key.shape)} and values {tuple(value.shape)} are not of the same tokens")
        self.check_room(key.shape[2])
        batch, heads, _, head_dim = key.shape
        if self.starts is not None and len(self.starts) != batch:
            raise ValueError(f"the cache was made for a batch of {len(self.starts)}, and {batch} rows come")
        self.codec.check(heads, head_dim, value.shape[3])
        if self.key is None:
            return
        assert self.value is not None
        held = (*self.key.shape[:2], self.key.shape[3], self.value.shape[3], self.key.dtype, self.key.device)
        if held != (batch, heads, head_dim, value.shape[3], key.dtype, key.device):
            raise ValueError(
                f"the cache holds {held[0]} rows of {held[1]} KV heads with {held[2]} and {held[3]} channels in "
                f"{held[4]} on {held[5]}; keys {tuple(key.shape)} {key.dtype} on {key.device} do not go with them"
            )

    def check_room(self, count: int = 1) -> None:
        """ValueError if so many tokens are too many."""
        limit, length = self.method.max_tokens, self.tokens + count
        if limit is not None and length > limit:
            raise ValueError(
                f"{length} tokens exceed the cache's max_tokens of {limit}; raise kv_cache.max_tokens or generate fewer"
            )

    def allocate(self, key: Tensor, value: Tensor) -> None:
        """Buffers for tokens such as these."""
        capacity, sink_tokens = self.method.recent_tokens + PAGE, self.method.sink_tokens
        batch, heads = key.shape[:2]
        starts = [0] * batch if self.starts is None else self.starts
        self.starts = starts
        self.sink_starts = sent(starts, key.device)
        self.key, self.value = (x.new_empty((batch, heads, capacity, x.shape[3])) for x in (key, value))
        self.sink_key, self.sink_value = (x.new_zeros((batch, heads, sink_tokens, x.shape[3])) for x in (key, value))
        self.pool = PagePool(self.codec.layout(key.shape[3], value.shape[3]), batch, heads, key.device)
        self.codec = self.codec.to(key.device)

    @torch.no_grad()
    def append(self, key: Tensor, value: Tensor) -> None:
        """New tokens, (batch, num_kv_heads, tokens, head_dim) post-RoPE. ValueError as of `check`."""
        self.check(key, value)
        key, value = key.detach(), value.detach()
        if self.key is None:
            self.allocate(key, value)
        if self.repeatable and self.following is not None and key.shape[2] == 1:
            self.make_room()
            append_token(key, value, self.appendable())
            self.advance()
            return
        self.following = None
        self.version += 1
        self.keep_sinks(key, value)
        count, taken = key.shape[2], 0
        # Queries of this call still see what a window leaves of the past; its own tokens they see uncoded.
        self.drop_pages(self.unseen(self.tokens))
        self.skipped = (self.tokens, self.unseen(self.tokens + count))
        self.kept_from = max(self.kept_from, self.skipped[1])
        while taken < count:
            while straight := self.code_straight(key[:, :, taken:], value[:, :, taken:]):
                taken += straight
            assert self.key is not None and self.value is not None
            step = min(count - taken, self.key.shape[2] - self.recent)
            for place, source in self.places(self.tokens, self.tokens + step):
                source = slice(taken + source.start, taken + source.stop)
                self.key[:, :, place] = key[:, :, source]
                self.value[:, :, place] = value[:, :, source]
            self.tokens, taken = self.tokens + step, taken + step
            self.code_recent()

    def places(self, start: int, stop: int) -> list[tuple[slice, slice]]:
        """Where columns [start, stop) sit in the ring: (place, which of them), in order, in at most two pieces."""
        assert self.key is not None
        length = self.key.shape[2]
        turn = min(stop, start - start % length + length)
        pieces = [(start, turn), (turn, stop)]
        return [
            (slice(low % length, low % length + high - low), slice(low - start, high - start))
            for low, high in pieces
            if low < high
        ]

    def ring(self, start: int, stop: int) -> list[tuple[Tensor, Tensor]]:
        """Dense keys and values of columns [start, stop), views, in order."""
        assert self.key is not None and self.value is not None
        return [(self.key[:, :, place], self.value[:, :, place]) for place, _ in self.places(start, stop)]

    def follow(self, lengths: Tensor) -> None:
        """From now on single tokens are appended with the lengths on the device, (kv_append.LENGTHS,) int32 with zeros
        but for what is set here, while `repeatable` is set, so that a captured launch can do it again; `advance` is
        then the host's part. Ends with whatever else changes the tokens. The table of pages gets room to stay where it
        is.
        """
        lengths[:2] = sent([self.tokens, self.coded], lengths.device)
        lengths[GONE] = self.gone
        self.following = lengths
        self.make_room()
        if self.addresses is None or len(self.addresses) * PAGE < self.tokens + ROOM:
            self.addresses = None
            self.table()

    def settle(self) -> None:
        """What is left to do before the next tokens come; outside of what is recorded."""

    def make_room(self) -> None:
        """Storage for the page that is coded next."""
        if self.coded // PAGE not in self.pages:
            self.add_page(self.coded // PAGE)

    def advance(self) -> None:
        """One token has been appended on the device."""
        assert self.key is not None
        self.version += 1
        self.drop_pages(self.unseen(self.tokens))
        self.tokens += 1
        self.kept_from = max(self.kept_from, self.unseen(self.tokens))
        end = self.coded // PAGE * PAGE + PAGE
        if self.tokens - end >= self.method.recent_tokens:
            self.coded = end

    def appendable(self) -> Appendable:
        """What a token is appended to on the device."""
        assert self.key is not None and self.value is not None and self.following is not None
        assert self.sink_key is not None and self.sink_value is not None and self.sink_starts is not None
        ring, sinks = (self.key, self.value), (self.sink_key, self.sink_value)
        return Appendable(
            self.following, ring, sinks, self.sink_starts, self.where(), recent_tokens=self.method.recent_tokens
        )

    def keep_sinks(self, key: Tensor, value: Tensor) -> None:
        """Copies those of the new tokens that are sinks of their row."""
        assert self.starts is not None and self.sink_key is not None and self.sink_value is not None
        for row, start in enumerate(self.starts):
            low = max(start, self.tokens)
            high = min(start + self.method.sink_tokens, self.tokens + key.shape[2])
            if low < high:
                place, source = slice(low - start, high - start), slice(low - self.tokens, high - self.tokens)
                self.sink_key[row, :, place] = key[row, :, source]
                self.sink_value[row, :, place] = value[row, :, source]

    def code_straight(self, key: Tensor, value: Tensor) -> int:
        """Codes whole pages of new tokens that need not pass through the buffer; how many tokens that were."""
        spare = key.shape[2] - self.method.recent_tokens
        if self.recent or self.coded % PAGE or spare < PAGE:
            return 0
        count = min(spare // PAGE, CODED_AT_ONCE) * PAGE
        self.code(key[:, :, :count], value[:, :, :count])
        self.tokens += count
        return count

    def code_recent(self) -> None:
        """Codes the oldest of the recent tokens up to the end of their page, while enough others follow."""
        while self.recent - (count := PAGE - self.coded % PAGE) >= self.method.recent_tokens:
            key, value = (torch.cat(parts, dim=2) for parts in zip(*self.ring(self.coded, self.coded + count)))
            self.code(key, value)

    def code(self, key: Tensor, value: Tensor) -> None:
        """Codes tokens that follow the coded ones; pages that nobody will see are left out."""
        start, stop = self.coded, self.coded + key.shape[2]
        edges = [start, *range(start - start % PAGE + PAGE, stop, PAGE), stop]
        pieces = [piece for piece in pairwise(edges) if not self.is_unseen(*piece)]
        if pieces:
            low, high = pieces[0][0], pieces[-1][1]
            key, value = (x[:, :, low - start : high - start] for x in (key, value))
            missing = [column // PAGE for column, _ in pieces if column // PAGE not in self.pages]
            assert self.pool is not None
            self.pool.reserve(len(missing))
            for number in missing:
                self.add_page(number)
            pages = self.where()
            for column, end in joined(pieces):
                source = slice(column - low, end - low)
                write_tokens(key[:, :, source], value[:, :, source], (column, end), pages)
        self.coded = stop

    def is_unseen(self, start: int, stop: int) -> bool:
        """Whether these columns of one page are seen by no query, of this call or later."""
        return stop <= self.pages_from or (start >= self.skipped[0] and stop <= self.skipped[1])

    def add_page(self, number: int) -> None:
        """Takes storage for the page of that number."""
        assert self.pool is not None
        self.slots[number] = self.pool.take()
        self.found_at[number] = self.pool.address(self.slots[number])
        self.located = None
        if self.following is not None and self.addresses is not None and number < len(self.addresses):
            self.addresses[number] = self.found_at[number]
        else:
            self.addresses = None

    def remove_pages(self, numbers: list[int]) -> None:
        """Gives storage of pages back."""
        assert self.pool is not None or not numbers
        for number in numbers:
            self.pool.give_back(self.slots.pop(number))  # pyright: ignore[reportOptionalMemberAccess]
            del self.found_at[number]
        if numbers:
            self.located = None
        if numbers and self.following is None:
            # Else nobody reads the addresses that are left behind.
            self.addresses = None

    def where(self) -> Pages:
        """All pages; one object until a page comes or goes."""
        if self.located is None:
            assert self.pool is not None
            self.located = Pages(self.pool.layout, self.pages, self.table, self.codec)
        return self.located

    def table(self) -> Tensor:
        """Addresses of pages by their number, int64 on the device, 0 for those that are not there."""
        if self.addresses is None:
            assert self.pool is not None
            count = max(self.slots, default=-1) + 1
            room = 0 if self.following is None else -(-ROOM // PAGE)
            addresses = [self.found_at.get(number, 0) for number in range(count + room)]
            self.addresses = sent(addresses, self.pool.device)
        return self.addresses

    def unseen(self, tokens: int) -> int:
        """Columns at the start that no query after so many tokens sees; 0 while they may be asked for again."""
        return 0 if self.window is None or self.recording else max(0, tokens - self.window + 1)

    def drop_pages(self, unseen: int) -> None:
        """Gives up pages that end at or before column `unseen`."""
        if unseen <= self.pages_from:
            return
        self.pages_from = unseen
        self.remove_pages([number for number in self.pages if (number + 1) * PAGE <= self.pages_from])

    def extend(self, key: Tensor, value: Tensor) -> CompressedKV | None:
        """Appends, and what the queries of the new tokens see: several at once see the past as it was coded before
        them. None for the first tokens, which see each other alone. ValueError as of `check`.
        """
        past, queries, before = self.tokens, key.shape[2], None
        if past and queries > 1 and self.key is not None:
            self.check(key, value)
            if blocks := self.ring(self.coded, past):
                before_key, before_value = (torch.cat(parts, dim=2) for parts in zip(*blocks, strict=True))
                before = (before_key, before_value)
        self.append(key, value)
        return None if past == 0 else self.read((key, value) if queries > 1 else None, queries, before)

    def read(
        self, new: tuple[Tensor, Tensor] | None, queries: int, before: tuple[Tensor, Tensor] | None = None
    ) -> CompressedKV:
        """What the last `queries` tokens attend to. new: their own keys and values, and before: those in front of them,
        which they see uncoded whatever the store has coded since; None for one token, which sees what is there.
        """
        assert self.key is not None and self.value is not None and self.pool is not None
        assert self.sink_key is not None and self.sink_value is not None and self.sink_starts is not None
        own = [block for block in (before, new) if block is not None]
        past = self.tokens - sum(block[0].shape[2] for block in own)
        first = self.gone if self.window is None else max(0, self.tokens - queries - self.window + 1)
        coded = self.looked_at = min(self.coded, past)
        start = max(first, coded)
        if start > past:
            own[0] = (own[0][0][:, :, start - past :], own[0][1][:, :, start - past :])
        ring: tuple[Tensor, Tensor] | None = (self.key, self.value)
        if self.coded > coded:
            # Places of what was coded since belong to later tokens.
            ring = None
            if queries <= MAX_ROWS:
                ring_key, ring_value = (in_ring(torch.cat(parts, dim=2), start) for parts in zip(*own, strict=True))
                ring = (ring_key, ring_value)
        return CompressedKV(
            pages=self.where(),
            coded=coded,
            tokens=self.tokens,
            first=first,
            dense=(*self.ring(start, past), *own),
            ring=ring,
            sink_key=self.sink_key,
            sink_value=self.sink_value,
            sink_starts=self.sink_starts,
            lengths=self.following if new is None else None,
        )

    def crop(self, count: int) -> None:
        """Takes the last `count` tokens away; those that were coded stay so. ValueError if they cannot be taken."""
        length = self.tokens - count
        if not 0 <= count <= self.tokens:
            raise ValueError(f"{count} tokens cannot be taken from a cache of {self.tokens}")
        if count and self.window is not None and max(0, length - self.window + 1) < self.kept_from:
            raise ValueError(
                f"a layer with a window of {self.window} tokens has dropped what it would see after {count} of its "
                f"{self.tokens} tokens are taken away; call activate_past_recording before"
            )
        self.version += 1
        self.following = None
        self.tokens = length
        self.coded = min(self.coded, length)
        self.remove_pages([number for number in self.pages if number * PAGE >= self.coded])
        if self.window is not None and self.key is not None:
            unseen = max(0, self.tokens - self.window + 1)
            self.kept_from = max(self.kept_from, unseen)
            self.drop_pages(unseen)

    def map_rows(self, change: Callable[[Tensor], Tensor], rows: list[int]) -> None:
        """Changes the rows of the batch in every tensor. rows: which former row each new one is."""
        if self.starts is not None:
            self.starts = [self.starts[row] for row in rows]
        self.version += 1
        self.following = None
        if self.key is None:
            return
        assert self.pool is not None
        self.pool.map_rows(change, len(rows))
        self.found_at = {number: self.pool.address(slot) for number, slot in self.slots.items()}
        self.addresses = self.located = None
        for name in ("key", "value", "sink_key", "sink_value", "sink_starts"):
            setattr(self, name, change(getattr(self, name)))

    @property
    def batch(self) -> int | None:
        """Rows; None before the first tokens."""
        return None if self.key is None else self.key.shape[0]

    @property
    def page_elements(self) -> int:
        """Channels of keys and values that all pages together have room for."""
        if self.key is None or self.value is None or self.pool is None:
            return 0
        batch, heads, _, head_dim = self.key.shape
        return self.pool.capacity * PAGE * batch * heads * (head_dim + self.value.shape[3])

    def nbytes(self) -> Sizes:
        """Bytes of all storage, what is allocated and empty included."""
        codes, parameters = (0, 0) if self.pool is None else self.pool.nbytes()
        dense = (self.key, self.value, self.sink_key, self.sink_value)
        return Sizes(codes, parameters, sum(tensor.nbytes for tensor in dense if tensor is not None))


def in_ring(x: Tensor, first: int) -> Tensor:
    """x: (batch, num_kv_heads, columns, head_dim) from column `first` on → each at its place modulo their number."""
    return x.roll(first % x.shape[2], dims=2)


def sent(numbers: list[int], device: torch.device) -> Tensor:
    """Whole numbers on a device, int64. A CUDA device makes them in a launch or two for each run of equal steps, if
    there are not too many, since a copy from the host waits for all that it is doing.
    """
    runs = steady_runs(numbers)
    if device.type != "cuda" or len(runs) > MAX_RUNS:
        return torch.tensor(numbers, dtype=torch.int64, device=device)
    made = [torch.arange(count, dtype=torch.int64, device=device) * step + first for first, step, count in runs]
    return torch.cat(made) if made else torch.empty(0, dtype=torch.int64, device=device)


def steady_runs(numbers: list[int]) -> list[tuple[int, int, int]]:
    """(first, step, count) of runs of equal steps that are the numbers, one after another."""
    runs: list[tuple[int, int, int]] = []
    for number in numbers:
        first, step, count = runs[-1] if runs else (0, 0, 0)
        if count == 1:
            runs[-1] = (first, number - first, 2)
        elif count and number == first + step * count:
            runs[-1] = (first, step, count + 1)
        else:
            runs.append((number, 0, 1))
    return runs


def joined(pieces: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Runs of columns that follow one another, as one each."""
    runs = pieces[:1]
    for start, stop in pieces[1:]:
        runs[-1:] = [(runs[-1][0], stop)] if start == runs[-1][1] else [runs[-1], (start, stop)]
    return runs
