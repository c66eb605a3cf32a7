"""Keys and values of one layer, compressed: sink tokens dense, recent tokens dense, everything between in pages of
codes.

Columns are tokens in the order in which they came. `append` writes new tokens behind the recent ones and codes, a page
at a time, those that more than `recent_tokens` others follow; nothing that is kept is ever copied to grow, and what was
coded is never coded again: after a `crop` into the pages, the last one is filled up from where it was cut. The recent
tokens sit in a buffer of `recent_tokens` and a page, which moves down by a page whenever one is coded.

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

from ..kernels.decode_attention import PAGE, CompressedKV, Page, blocks
from ..kernels.kv_codes import CODE_DTYPES, code_width, quantize_tokens
from ..quant.method import KVCacheMethod

CODED_AT_ONCE = 32
"""Pages that a long prompt codes at a time, which bounds the float32 copies."""


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
    """One layer's tokens. method: codes, sinks, recent tokens and the limit. factors: of `KVCacheMethod.factors`.
    window: columns that a query sees, its own included; None for all. starts: column of the first token of each row,
    None for 0 everywhere.

    version counts changes: what was read before one is not to be used after it. kept_from: columns from it on are all
    there. pages_from: pages that end before it are gone. skipped: columns of the last append that nobody will see.
    """

    def __init__(
        self,
        method: KVCacheMethod,
        *,
        factors: Mapping[str, Tensor] | None = None,
        window: int | None = None,
        starts: list[int] | None = None,
    ):
        self.method, self.window = method, window
        self.factors = dict(factors or {})
        self.starts = None if starts is None else list(starts)
        self.recording = False
        self.version = 0
        self.key: Tensor | None = None
        self.forget()

    def forget(self) -> None:
        """Drops all tokens and all storage. Starts belong to the tokens and go with them."""
        if self.key is not None:
            self.starts = None
        self.pages: dict[int, Page] = {}
        self.tokens = self.coded = 0
        self.kept_from = self.pages_from = 0
        self.skipped = (0, 0)
        self.key = self.value = self.sink_key = self.sink_value = self.sink_starts = None
        self.version += 1

    @property
    def recent(self) -> int:
        """Dense tokens behind the coded ones."""
        return self.tokens - self.coded

    @property
    def first(self) -> int:
        """First column that the next token can see."""
        return 0 if self.window is None else max(0, self.tokens - self.window + 1)

    def check(self, key: Tensor, value: Tensor) -> None:
        """ValueError, with the store as it was, if new tokens do not fit to those that are there, or are too many."""
        limit, length = self.method.max_tokens, self.tokens + key.shape[2]
        if key.dim() != 4 or key.shape[:3] != value.shape[:3]:
            raise ValueError(f"keys {tuple(key.shape)} and values {tuple(value.shape)} are not of the same tokens")
        if limit is not None and length > limit:
            raise ValueError(
                f"{length} tokens exceed the cache's max_tokens of {limit}; raise kv_cache.max_tokens or generate fewer"
            )
        batch, heads, _, head_dim = key.shape
        if self.starts is not None and len(self.starts) != batch:
            raise ValueError(f"the cache was made for a batch of {len(self.starts)}, and {batch} rows come")
        for name, dim in (("key_factors", head_dim), ("value_factors", value.shape[3])):
            factors = self.factors.get(name)
            if factors is not None and tuple(factors.shape) != (heads, dim):
                raise ValueError(
                    f"the cache was calibrated for {factors.shape[0]} KV heads of {factors.shape[1]} channels, and "
                    f"{heads} of {dim} come; it belongs to another model"
                )
        for dim in (head_dim, value.shape[3]):
            code_width(dim, self.method.kind)
        if self.key is None:
            return
        assert self.value is not None
        held = (*self.key.shape[:2], self.key.shape[3], self.value.shape[3], self.key.dtype, self.key.device)
        if held != (batch, heads, head_dim, value.shape[3], key.dtype, key.device):
            raise ValueError(
                f"the cache holds {held[0]} rows of {held[1]} KV heads with {held[2]} and {held[3]} channels in "
                f"{held[4]} on {held[5]}; keys {tuple(key.shape)} {key.dtype} on {key.device} do not go with them"
            )

    def allocate(self, key: Tensor, value: Tensor) -> None:
        """Buffers for tokens such as these."""
        capacity, sink_tokens = self.method.recent_tokens + PAGE, self.method.sink_tokens
        batch, heads = key.shape[:2]
        starts = [0] * batch if self.starts is None else self.starts
        self.starts = starts
        self.sink_starts = torch.tensor(starts, device=key.device)
        self.key, self.value = (x.new_empty((batch, heads, capacity, x.shape[3])) for x in (key, value))
        self.sink_key, self.sink_value = (x.new_zeros((batch, heads, sink_tokens, x.shape[3])) for x in (key, value))
        self.factors = {name: factors.to(key.device) for name, factors in self.factors.items()}

    @torch.no_grad()
    def append(self, key: Tensor, value: Tensor) -> None:
        """New tokens, (batch, num_kv_heads, tokens, head_dim) post-RoPE. ValueError as of `check`."""
        self.check(key, value)
        key, value = key.detach(), value.detach()
        if self.key is None:
            self.allocate(key, value)
        self.version += 1
        self.keep_sinks(key, value)
        count, taken = key.shape[2], 0
        # Queries of this call still see what a window leaves of the past; its own tokens they see uncoded.
        self.drop_pages(self.unseen(self.tokens))
        self.skipped = (self.tokens, self.unseen(self.tokens + count))
        self.kept_from = max(self.kept_from, self.skipped[1])
        while taken < count:
            taken += self.code_straight(key[:, :, taken:], value[:, :, taken:])
            assert self.key is not None and self.value is not None
            step = min(count - taken, self.key.shape[2] - self.recent)
            place = slice(self.recent, self.recent + step)
            self.key[:, :, place] = key[:, :, taken : taken + step]
            self.value[:, :, place] = value[:, :, taken : taken + step]
            self.tokens, taken = self.tokens + step, taken + step
            self.code_recent()

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
        assert self.key is not None and self.value is not None
        while self.recent - (count := PAGE - self.coded % PAGE) >= self.method.recent_tokens:
            self.code(self.key[:, :, :count], self.value[:, :, :count])
            left = self.recent
            for buffer in (self.key, self.value):
                buffer[:, :, :left] = buffer[:, :, count : count + left].clone()

    def code(self, key: Tensor, value: Tensor) -> None:
        """Codes tokens that follow the coded ones; pages that nobody will see are left out."""
        start, stop = self.coded, self.coded + key.shape[2]
        edges = [start, *range(start - start % PAGE + PAGE, stop, PAGE), stop]
        pieces = [piece for piece in pairwise(edges) if not self.is_unseen(*piece)]
        if pieces:
            low, high = pieces[0][0], pieces[-1][1]
            coded = []
            for name, x in (("key_factors", key), ("value_factors", value)):
                x = x[:, :, low - start : high - start].float()
                if (factors := self.factors.get(name)) is not None:
                    x = x / factors[:, None]
                coded.append(quantize_tokens(x, self.method.kind))
            for column, end in pieces:
                place = slice(column % PAGE, column % PAGE + end - column)
                self.write(self.page(column // PAGE, key, value), place, coded, slice(column - low, end - low))
        self.coded = stop

    def is_unseen(self, start: int, stop: int) -> bool:
        """Whether these columns of one page are seen by no query, of this call or later."""
        return stop <= self.pages_from or (start >= self.skipped[0] and stop <= self.skipped[1])

    @staticmethod
    def write(page: Page, place: slice, coded: list[tuple[Tensor, ...]], source: slice) -> None:
        """Puts codes and scales into a page."""
        (key_codes, key_scale), (value_codes, value_scale) = coded
        page.key_codes[:, :, place] = key_codes[:, :, source]
        page.key_scale[:, :, place] = key_scale[:, :, source]
        page.value_codes[:, :, place] = value_codes[:, :, source]
        page.value_scale[:, :, place] = value_scale[:, :, source]

    def page(self, number: int, key: Tensor, value: Tensor) -> Page:
        """The page of that number, made if it is not there. key, value: tokens such as it will hold."""
        if number not in self.pages:
            kind, shape = self.method.kind, (*key.shape[:2], PAGE)
            parts = []
            for x in (key, value):
                codes = (*shape, code_width(x.shape[3], kind))
                parts.append(torch.empty(codes, dtype=CODE_DTYPES[kind], device=x.device))
                parts.append(torch.empty(shape, dtype=torch.float32, device=x.device))
            self.pages[number] = Page(*parts)
        return self.pages[number]

    def unseen(self, tokens: int) -> int:
        """Columns at the start that no query after so many tokens sees; 0 while they may be asked for again."""
        return 0 if self.window is None or self.recording else max(0, tokens - self.window + 1)

    def drop_pages(self, unseen: int) -> None:
        """Gives up pages that end at or before column `unseen`."""
        self.pages_from = max(self.pages_from, unseen)
        for number in [number for number in self.pages if (number + 1) * PAGE <= self.pages_from]:
            del self.pages[number]

    def read(self, new: tuple[Tensor, Tensor] | None, queries: int) -> CompressedKV:
        """What the last `queries` tokens attend to. new: their own keys and values, which they then see uncoded."""
        assert self.key is not None and self.value is not None
        assert self.sink_key is not None and self.sink_value is not None and self.sink_starts is not None
        past = self.tokens if new is None else self.tokens - queries
        first = 0 if self.window is None else max(0, self.tokens - queries - self.window + 1)
        coded = min(self.coded, past)
        place = slice(max(first, coded) - self.coded, past - self.coded)
        dense = ((self.key[:, :, place], self.value[:, :, place]),) if place.start < place.stop else ()
        return CompressedKV(
            kind=self.method.kind,
            pages=self.pages,
            coded=coded,
            tokens=self.tokens,
            first=first,
            dense=dense if new is None else (*dense, new),
            sink_key=self.sink_key,
            sink_value=self.sink_value,
            sink_starts=self.sink_starts,
            key_factors=self.factors.get("key_factors"),
            value_factors=self.factors.get("value_factors"),
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
        self.tokens = length
        self.coded = min(self.coded, length)
        for number in [number for number in self.pages if number * PAGE >= self.coded]:
            del self.pages[number]
        if self.window is not None and self.key is not None:
            unseen = max(0, self.tokens - self.window + 1)
            self.kept_from = max(self.kept_from, unseen)
            self.drop_pages(unseen)

    def map_rows(self, change: Callable[[Tensor], Tensor], rows: list[int]) -> None:
        """Changes the rows of the batch in every tensor. rows: which former row each new one is."""
        if self.starts is not None:
            self.starts = [self.starts[row] for row in rows]
        self.version += 1
        if self.key is None:
            return
        for page in self.pages.values():
            for name in ("key_codes", "key_scale", "value_codes", "value_scale"):
                setattr(page, name, change(getattr(page, name)))
        for name in ("key", "value", "sink_key", "sink_value", "sink_starts"):
            setattr(self, name, change(getattr(self, name)))

    @property
    def batch(self) -> int | None:
        """Rows; None before the first tokens."""
        return None if self.key is None else self.key.shape[0]

    @property
    def page_elements(self) -> int:
        """Channels of keys and values that all pages together have room for."""
        if self.key is None or self.value is None:
            return 0
        batch, heads, _, head_dim = self.key.shape
        return len(self.pages) * PAGE * batch * heads * (head_dim + self.value.shape[3])

    def nbytes(self) -> Sizes:
        """Bytes of all storage, what is allocated and empty included."""
        pages = list(self.pages.values())
        dense = (self.key, self.value, self.sink_key, self.sink_value)
        return Sizes(
            codes=sum(page.key_codes.nbytes + page.value_codes.nbytes for page in pages),
            scales=sum(page.key_scale.nbytes + page.value_scale.nbytes for page in pages),
            dense=sum(tensor.nbytes for tensor in dense if tensor is not None),
        )


def dequantized(kv: CompressedKV, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Keys and values that a call reads, (batch, num_kv_heads, tokens − first, head_dim), one dense tensor each."""
    batch, heads, _, head_dim = kv.sink_key.shape
    count = kv.tokens - kv.first
    key = kv.sink_key.new_zeros((batch, heads, count, head_dim), dtype=torch.float32)
    value = kv.sink_key.new_zeros((batch, heads, count, kv.sink_value.shape[3]), dtype=torch.float32)
    for block in blocks(kv):
        columns = block.columns - kv.first
        valid = block.valid & (columns >= 0)
        for whole, part in ((key, block.key.float()), (value, block.value.float())):
            if columns.shape[0] == 1:
                low = int(columns[0, 0])
                place = slice(max(0, low), min(count, low + columns.shape[1]))
                if place.stop <= place.start:
                    continue
                source = slice(place.start - low, place.stop - low)
                chosen = valid[:, None, source, None]
                whole[:, :, place] = torch.where(chosen, part[:, :, source], whole[:, :, place])
                continue
            for row in range(batch):
                whole[row, :, columns[row][valid[row]]] = part[row][:, valid[row]]
    return key.to(dtype), value.to(dtype)
