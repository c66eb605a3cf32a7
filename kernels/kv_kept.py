"""Tokens of which every KV head of every row has kept its own: pages per head, none of them for what was evicted.

::

    row r, head h:   lengths[r, h] tokens, in the pages table[r, h, 0], table[r, h, 1], …      a page is one record

Columns play no part: a token's position is in its key, and all kept tokens come before whatever reads them. So a query
sees every one of its head's, and lengths are all the mask there is. Pages are never written to after they are packed;
rows that are copies of one another share theirs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .kv_codec import PAGE, Codec, Layout

SPARE = 8
"""Records are gathered anew once less than all but one of so many parts are in use."""


@dataclass(frozen=True)
class KeptTokens:
    """Kept tokens of one layer.

    records: (pages, record_bytes) uint8, each a page of one row and head. numbers: row → head → its records, in order.
    counts: row → head → tokens. codec: what wrote them. table: (batch, num_kv_heads, most pages) int64, `numbers` on
    the device, 0 where a head has fewer. lengths: (batch, num_kv_heads) int64.
    """

    layout: Layout
    codec: Codec
    records: Tensor
    numbers: tuple[tuple[tuple[int, ...], ...], ...]
    counts: tuple[tuple[int, ...], ...]
    table: Tensor
    lengths: Tensor

    @classmethod
    def pack(cls, key: Tensor, value: Tensor, columns: Tensor, counts: list[list[int]], codec: Codec) -> KeptTokens:
        """Codes the chosen tokens, a page of every head at a time.

        key: (batch, num_kv_heads, tokens, head_dim), value likewise. columns: (batch, num_kv_heads, n) int64, which
        tokens each head keeps, the first of them as many as `counts` says.
        """
        layout, rows, first = codec.layout(key.shape[3], value.shape[3]), [], 0
        for row in counts:
            heads = []
            for count in row:
                pages = -(-count // PAGE)
                heads.append(tuple(range(first, first + pages)))
                first += pages
            rows.append(tuple(heads))
        records = torch.empty((first, layout.record_bytes), dtype=torch.uint8, device=key.device)
        kept = cls.of(layout, codec, records, tuple(rows), tuple(map(tuple, counts)))
        if key.device.type != "meta":
            for number in range(kept.table.shape[2]):
                kept.write(number, key, value, columns[:, :, number * PAGE : (number + 1) * PAGE])
        return kept

    @classmethod
    def of(
        cls,
        layout: Layout,
        codec: Codec,
        records: Tensor,
        numbers: tuple[tuple[tuple[int, ...], ...], ...],
        counts: tuple[tuple[int, ...], ...],
    ) -> KeptTokens:
        """With `table` and `lengths` made from the numbers."""
        most = max((len(head) for row in numbers for head in row), default=0)
        table = [[[*head, *[0] * (most - len(head))] for head in row] for row in numbers]
        shape = (len(numbers), len(numbers[0]), most)
        device = records.device
        return cls(
            layout,
            codec,
            records,
            numbers,
            counts,
            torch.tensor(table, dtype=torch.int64, device=device).view(shape),
            torch.tensor(counts, dtype=torch.int64, device=device),
        )

    def write(self, number: int, key: Tensor, value: Tensor, columns: Tensor) -> None:
        """Fills every head's page of that number. columns: (batch, num_kv_heads, at most PAGE)."""
        valid = self.valid(number)[..., : columns.shape[2]]
        tokens = []
        for x in (key, value):
            chosen = x.gather(2, columns[..., None].expand(*columns.shape, x.shape[3]))
            tokens.append(torch.where(valid[..., None], chosen, 0.0))
        filled = torch.empty((*columns.shape[:2], self.layout.record_bytes), dtype=torch.uint8, device=key.device)
        keys, values = self.codec.encode_keys(tokens[0]), self.codec.encode_values(tokens[1])
        filled.zero_()
        self.layout.page(filled).write(slice(0, columns.shape[2]), keys, values)
        there = self.lengths > number * PAGE
        self.records[self.table[:, :, number][there]] = filled[there]

    def valid(self, number: int) -> Tensor:
        """(batch, num_kv_heads, PAGE) bool: which places of every head's page of that number hold a token."""
        place = number * PAGE + torch.arange(PAGE, device=self.lengths.device)
        return place < self.lengths[..., None]

    def read(self, number: int) -> tuple[Tensor, Tensor, Tensor]:
        """Every head's page of that number: keys and values, (batch, num_kv_heads, PAGE, head_dim) fp32, and `valid`.
        Where that is False, they hold anything.
        """
        keys, values = self.layout.page(self.records[self.table[:, :, number]]).read()
        return self.codec.decode_keys(keys), self.codec.decode_values(values), self.valid(number)

    @property
    def pages(self) -> int:
        """Of the head that has most."""
        return self.table.shape[2]

    def rows(self, chosen: list[int]) -> KeptTokens:
        """Of these rows, in this order. A row that is named twice shares its pages; those of none are given up."""
        numbers = tuple(self.numbers[row] for row in chosen)
        counts = tuple(self.counts[row] for row in chosen)
        used = sorted({number for row in numbers for head in row for number in head})
        records = self.records
        if len(used) * SPARE < len(records) * (SPARE - 1):
            place = {number: index for index, number in enumerate(used)}
            numbers = tuple(tuple(tuple(place[number] for number in head) for head in row) for row in numbers)
            records = records[torch.tensor(used, dtype=torch.int64, device=records.device)]
        return KeptTokens.of(self.layout, self.codec, records, numbers, counts)

    @property
    def elements(self) -> int:
        """Channels of keys and values that the pages have room for."""
        return len(self.records) * PAGE * (self.layout.key_dim + self.layout.value_dim)

    def nbytes(self) -> tuple[int, int]:
        """Bytes allocated for codes, and for their parameters, the table and the lengths."""
        parameters = len(self.records) * self.layout.parameter_bytes
        return self.records.nbytes - parameters, parameters + self.table.nbytes + self.lengths.nbytes
