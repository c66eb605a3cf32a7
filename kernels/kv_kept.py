"""Tokens of which every KV head of every row has kept its own: pages per head, none of them for what was evicted.

::

    row r, head h:   lengths[r, h] tokens, in the pages table[r, h, 0], table[r, h, 1], …      a page is one record

Columns play no part: a token's position is in its key, and all kept tokens come before whatever reads them. So a query
sees every one of its head's, and lengths are all the mask there is. Pages are not written to after they are packed,
but as a whole, when other tokens take their place (`kv_repacked.py`); rows that are copies of one another share theirs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from .kv_codec import PAGE, Codec, Coded, Layout

AT_ONCE = 16
"""Pages of every head that are coded at a time, which bounds the float32 copies."""
SPARE = 8
"""Records are gathered anew once less than all but one of so many parts are in use."""


@dataclass(frozen=True)
class Runs:
    """How the pages of heads, of which each has its own number, are shared out among programs of a kernel.

    entries: (runs, 3) int32: row · num_kv_heads + head, its first page, the page after its last. ends: (batch ·
    num_kv_heads + 1,) int32: of each row and head, the number of its first run, and behind them the number of runs.
    """

    entries: Tensor
    ends: Tensor

    @classmethod
    def of(cls, pages: Sequence[int], programs: int, device: torch.device) -> Runs:
        """No more runs than `programs`, if there are as many heads at most, and the longest as short as can be.

        pages: of each head. More runs than one wave of programs would leave most of a device idle in the end.
        """
        longest = max(1, -(-sum(pages) // programs))
        while longest < max(pages) and sum(-(-count // longest) for count in pages) > programs:
            longest += 1
        found, ends = [], [0]
        for head, count in enumerate(pages):
            parts = -(-count // longest)
            found += [(head, part * count // parts, (part + 1) * count // parts) for part in range(parts)]
            ends.append(len(found))
        entries = torch.tensor(found, dtype=torch.int32, device=device).view(-1, 3)
        return cls(entries, torch.tensor(ends, dtype=torch.int32, device=device))


@dataclass(frozen=True)
class KeptTokens:
    """Kept tokens of one layer.

    records: (pages, record_bytes) uint8, each a page of one row and head. numbers: row → head → its records, in order.
    counts: row → head → tokens. codec: what wrote them. table: (batch, num_kv_heads, most pages) int64, the first
    byte of each page in records, 0 where a head has fewer. lengths: (batch, num_kv_heads) int64. shared: `runs`, by
    the programs that they were asked for.
    """

    layout: Layout
    codec: Codec
    records: Tensor
    numbers: tuple[tuple[tuple[int, ...], ...], ...]
    counts: tuple[tuple[int, ...], ...]
    table: Tensor
    lengths: Tensor
    shared: dict[int, Runs] = field(default_factory=dict, compare=False)

    @classmethod
    def pack(cls, key: Tensor, value: Tensor, columns: Tensor, counts: list[list[int]], codec: Codec) -> KeptTokens:
        """Codes the chosen tokens, `AT_ONCE` pages of every head at a time.

        key: (batch, num_kv_heads, tokens, head_dim), value likewise. columns: (batch, num_kv_heads, n) int64, which
        tokens each head keeps, the first of them as many as `counts` says.
        """
        kept = cls.blank(codec.layout(key.shape[3], value.shape[3]), codec, counts, key.device)
        if key.device.type != "meta":
            for number in range(0, kept.pages, AT_ONCE):
                kept.write(number, key, value, columns[:, :, number * PAGE : (number + AT_ONCE) * PAGE])
        return kept

    @classmethod
    def blank(cls, layout: Layout, codec: Codec, counts: list[list[int]], device: torch.device) -> KeptTokens:
        """With pages of any content for so many tokens, by row and head."""
        rows, first = [], 0
        for row in counts:
            heads = []
            for count in row:
                pages = -(-count // PAGE)
                heads.append(tuple(range(first, first + pages)))
                first += pages
            rows.append(tuple(heads))
        records = torch.empty((first, layout.record_bytes), dtype=torch.uint8, device=device)
        return cls.of(layout, codec, records, tuple(rows), tuple(map(tuple, counts)))

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
        size = layout.record_bytes
        table = [[[*(size * page for page in head), *[0] * (most - len(head))] for head in row] for row in numbers]
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
        """Fills pages of every head from that number on. columns: (batch, num_kv_heads, at most a page each)."""
        count = columns.shape[2]
        pages = -(-count // PAGE)
        columns = torch.nn.functional.pad(columns, (0, pages * PAGE - count))
        first = number * PAGE + torch.arange(pages, device=columns.device) * PAGE
        place = first[:, None] + torch.arange(PAGE, device=columns.device)
        # (batch, pages, heads, PAGE): what maps keys belongs to heads.
        valid = (place < self.lengths[..., None, None]).transpose(1, 2)
        tokens = []
        for x in (key, value):
            chosen = x.gather(2, columns[..., None].expand(*columns.shape, x.shape[3]))
            chosen = chosen.unflatten(2, (pages, PAGE)).transpose(1, 2)
            tokens.append(torch.where(valid[..., None], chosen, 0.0))
        self.put(number, self.codec.encode_keys(tokens[0]), self.codec.encode_values(tokens[1]))

    def put(self, number: int, keys: Coded, values: Coded) -> None:
        """Fills pages of every head from that number on with codes, (batch, pages, num_kv_heads, PAGE, n)."""
        batch, pages, heads = keys[0].shape[:3]
        filled = self.records.new_zeros((batch, pages, heads, self.layout.record_bytes))
        self.layout.page(filled).write(slice(0, PAGE), keys, values)
        first = (number + torch.arange(pages, device=self.lengths.device)) * PAGE
        there = (first < self.lengths[..., None]).transpose(1, 2)
        records = self.table[:, :, number : number + pages].transpose(1, 2) // self.layout.record_bytes
        self.records[records[there]] = filled[there]

    def valid(self, number: int) -> Tensor:
        """(batch, num_kv_heads, PAGE) bool: which places of every head's page of that number hold a token."""
        place = number * PAGE + torch.arange(PAGE, device=self.lengths.device)
        return place < self.lengths[..., None]

    def read(self, number: int) -> tuple[Tensor, Tensor, Tensor]:
        """Every head's page of that number: keys and values, (batch, num_kv_heads, PAGE, head_dim) fp32, and `valid`.
        Where that is False, they hold anything.
        """
        keys, values = self.layout.page(self.records[self.record(number)]).read()
        return self.codec.decode_keys(keys), self.codec.decode_values(values), self.valid(number)

    def coded(self, first: int, last: int) -> tuple[Coded, Coded]:
        """Codes of keys and values in every head's pages [first, last), (batch, num_kv_heads, tokens, …)."""
        records = self.records[self.table[:, :, first:last] // self.layout.record_bytes]
        keys, values = self.layout.page(records).read()
        found = [part.flatten(2, 3) for part in (*keys, *values)]
        return (found[0], found[1]), (found[2], found[3])

    def record(self, number: int) -> Tensor:
        """(batch, num_kv_heads) int64: the record of every head's page of that number."""
        return self.table[:, :, number] // self.layout.record_bytes

    def runs(self, programs: int) -> Runs:
        """For about so many programs; made once for each number of them."""
        if programs not in self.shared:
            heads = [len(head) for row in self.numbers for head in row]
            self.shared[programs] = Runs.of(heads, programs, self.records.device)
        return self.shared[programs]

    @cached_property
    def row_pages(self) -> tuple[int, ...]:
        """Pages of all heads of each row."""
        return tuple(sum(len(head) for head in row) for row in self.numbers)

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
        """Bytes allocated for codes, and for their parameters, the table, the lengths and lists of runs."""
        parameters = len(self.records) * self.layout.parameter_bytes
        lists = sum(runs.entries.nbytes + runs.ends.nbytes for runs in self.shared.values())
        return self.records.nbytes - parameters, parameters + self.table.nbytes + self.lengths.nbytes + lists
