"""What a cache holds of every KV head, as one row of places, to be scored and packed anew: the tokens that were kept
before (`kv_kept.py`), and those of pages of columns that came since.

::

    place    0 … P·PAGE − 1: in the pages of the head that has kept most    behind them: in the pages of the columns
    valid    place < lengths[r, h]                                          first[r] ≤ column, start ≤ column < stop

Codes are moved, never decoded and coded again: a token that survives a hundred evictions is what it was after the
first.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .kv_codec import PAGE, Coded
from .kv_kept import AT_ONCE, KeptTokens
from .kv_pages import Pages


@dataclass(frozen=True)
class HeldTokens:
    """valid: (batch, num_kv_heads, places) bool. columns: (places,) int64 of those that have one, −1 of the others.
    kept: None where nothing was evicted before. numbers: pages of columns that are held.
    """

    kept: KeptTokens | None
    pages: Pages
    numbers: range
    valid: Tensor
    columns: Tensor

    @classmethod
    def of(cls, kept: KeptTokens | None, pages: Pages, span: tuple[int, int], first: Tensor, heads: int) -> HeldTokens:
        """span: columns [start, stop) that are in pages. first: (batch,) int64, the first column that is a candidate
        in each row.
        """
        start, stop = span
        numbers = range(start // PAGE, -(-stop // PAGE)) if start < stop else range(0)
        columns = torch.arange(numbers.start * PAGE, numbers.stop * PAGE, device=first.device)
        valid = (columns >= start) & (columns < stop) & (columns >= first[:, None])
        valid = valid[:, None].expand(-1, heads, -1)
        if kept is not None:
            place = torch.arange(kept.pages * PAGE, device=first.device)
            valid = torch.cat((place < kept.lengths[..., None], valid), dim=2)
            columns = torch.cat((torch.full_like(place, -1), columns))
        return cls(kept, pages, numbers, valid, columns)

    def coded(self) -> Iterator[tuple[slice, Coded, Coded]]:
        """Places, and codes of their keys and values, (batch, num_kv_heads, n, …); of invalid ones anything."""
        begin = 0
        if self.kept is not None:
            for number in range(0, self.kept.pages, AT_ONCE):
                found = self.kept.coded(number, min(number + AT_ONCE, self.kept.pages))
                stop = begin + found[0][0].shape[2]
                yield slice(begin, stop), *found
                begin = stop
        for number in self.numbers:
            yield slice(begin, begin + PAGE), *self.pages.pages[number].read()
            begin += PAGE

    def decoded(self) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Places, keys and values, (batch, num_kv_heads, n, head_dim) fp32; zeros where they are not valid."""
        codec = self.pages.codec
        for places, keys, values in self.coded():
            valid = self.valid[:, :, places, None]
            yield (
                places,
                torch.where(valid, codec.decode_keys(keys), 0.0),
                torch.where(valid, codec.decode_values(values), 0.0),
            )

    def in_order(self) -> tuple[Tensor, list[list[int]]]:
        """The valid places of every head, (batch, num_kv_heads, most) int64, and how many they are; behind them
        others.
        """
        counts = self.valid.sum(dim=2)
        order = (~self.valid).byte().argsort(dim=2, stable=True)
        return order[..., : int(counts.max())], counts.tolist()

    def pack(self, places: Tensor, counts: list[list[int]]) -> KeptTokens:
        """The chosen tokens alone, in pages of their own. If those of every head are as many as it has kept before,
        they take their place, and it is the same object.

        places: (batch, num_kv_heads, n) int64, the first of each head as many as `counts` says.
        """
        layout, codec, device = self.pages.layout, self.pages.codec, places.device
        kept = KeptTokens.blank(layout, codec, counts, device)
        parts = [(*keys, *values) for _, keys, values in self.coded()]
        if kept.pages and parts:
            places = torch.nn.functional.pad(places[..., : kept.pages * PAGE], (0, kept.pages * PAGE))
            places = places[..., : kept.pages * PAGE]
            # What fills a page up is read and multiplied by zero: it must be numbers.
            inside = torch.arange(places.shape[2], device=device) < kept.lengths[..., None]
            places = torch.where(inside, places, places[..., :1])
            tensors = [taken(list(some), places, kept.pages) for some in zip(*parts, strict=True)]
            for number in range(0, kept.pages, AT_ONCE):
                some = [tensor[:, number : number + AT_ONCE] for tensor in tensors]
                kept.put(number, (some[0], some[1]), (some[2], some[3]))
        former = self.kept
        if former is not None and former.numbers == kept.numbers and former.counts == kept.counts:
            former.records.copy_(kept.records)
            return former
        return kept


def taken(parts: list[Tensor], places: Tensor, pages: int) -> Tensor:
    """(batch, pages, heads, PAGE, n) of parts, (batch, heads, …, n) each, by places in all of them together."""
    dtype = parts[0].dtype
    # FP8 has no operations of its own.
    whole = torch.cat([part.view(torch.uint8) if dtype.itemsize == 1 else part for part in parts], dim=2)
    found = whole.gather(2, places[..., None].expand(*places.shape, whole.shape[3]))
    return found.view(dtype).unflatten(2, (pages, PAGE)).transpose(1, 2)
