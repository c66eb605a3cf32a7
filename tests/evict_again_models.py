"""What a cache with a `decode_budget` should hold and give: lists of tokens, and scores of them in FP64."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch.nn import functional

from kompakt.compress.kv_evict import KVEvict
from kompakt.kernels.kv_codec import PAGE

HEADS, KEY_DIM, VALUE_DIM, SCALING = 2, 8, 6, 0.5


class Plain:
    """An evicting cache as lists: all tokens and queries, and which columns each head holds."""

    def __init__(self, method: KVEvict, codec: Any, starts: list[int], group: int):
        self.method, self.codec, self.starts, self.group = method, codec, starts, group
        rows = len(starts)
        self.key, self.value = torch.empty(rows, HEADS, 0, KEY_DIM), torch.empty(rows, HEADS, 0, VALUE_DIM)
        self.query = torch.empty(rows, HEADS * group, 0, KEY_DIM)
        self.kept: list[list[list[int]]] = [[[] for _ in range(HEADS)] for _ in starts]
        self.coded = self.gone = self.seen_from = 0

    @property
    def tokens(self) -> int:
        return self.key.shape[2]

    def append(self, key: torch.Tensor, value: torch.Tensor, query: torch.Tensor) -> None:
        self.key, self.value = torch.cat((self.key, key), 2), torch.cat((self.value, value), 2)
        self.query = torch.cat((self.query, query), 2)
        while self.tokens - (self.coded // PAGE + 1) * PAGE >= self.method.recent_tokens:
            self.coded = (self.coded // PAGE + 1) * PAGE

    def crop(self, count: int) -> None:
        length = min(self.method.window, self.method.recent_tokens + PAGE)
        self.seen_from = max(self.seen_from, self.tokens - length) if count else self.seen_from
        self.key, self.value, self.query = (x[:, :, : x.shape[2] - count] for x in (self.key, self.value, self.query))
        self.coded = min(self.coded, self.tokens)

    def rows(self, chosen: list[int]) -> None:
        self.key, self.value, self.query = self.key[chosen], self.value[chosen], self.query[chosen]
        self.starts = [self.starts[row] for row in chosen]
        self.kept = [copy.deepcopy(self.kept[row]) for row in chosen]

    def rounded(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.codec.rounded(self.key, self.value)

    def held_pages(self) -> int:
        """Of all heads, in the row that has most."""
        later = -(-self.coded // PAGE) - self.gone // PAGE if self.coded > self.gone else 0
        return max(sum(-(-len(head) // PAGE) for head in row) for row in self.kept) + HEADS * later

    def candidates(self, row: int, head: int) -> list[int]:
        first = max(self.gone, self.starts[row] + self.method.sink_tokens)
        return self.kept[row][head] + list(range(first, self.coded))

    def scores(self, row: int, head: int) -> torch.Tensor:
        """Of the candidates, by the last queries that are known, FP64."""
        columns = torch.tensor(self.candidates(row, head), dtype=torch.long)
        length = min(self.method.window, self.method.recent_tokens + PAGE)
        low = max(self.tokens - length, self.seen_from, self.gone, self.starts[row])
        query = self.query[row].unflatten(0, (HEADS, self.group))[head, :, low:].double()
        key = self.rounded()[0][row, head].double()
        dense = self.key[row, head].double()
        sinks = range(self.starts[row], min(self.starts[row] + self.method.sink_tokens, self.coded))
        beside = torch.tensor([*sinks, *range(max(self.coded, self.starts[row]), self.tokens)], dtype=torch.long)
        logits = query @ torch.cat((key[columns], dense[beside])).mT * SCALING
        places = torch.arange(low, self.tokens)[:, None]
        weights = logits.masked_fill(torch.cat((columns, beside)) > places, -torch.inf).softmax(dim=-1)
        found = weights.nan_to_num(0.0).mean(dim=(0, 1))[: len(columns)]
        side = self.method.kernel_size // 2
        return functional.pad(found, (side, side)).unfold(0, self.method.kernel_size, 1).mean(dim=1)

    def evict(self, chosen: list[list[list[int]]]) -> None:
        """Takes what was chosen, which must be the best there is in as many pages as a row may have."""
        room = HEADS * self.method.decode_pages
        for row, heads in enumerate(chosen):
            there = [self.candidates(row, head) for head in range(HEADS)]
            pages = [-(-len(head) // PAGE) for head in heads]
            assert sum(pages) == min(room, sum(-(-len(head) // PAGE) for head in there))
            if self.method.budget == "uniform":
                assert all(count <= self.method.decode_pages or sum(pages) < room for count in pages)
            for head, places in enumerate(heads):
                assert len(places) == min(pages[head] * PAGE, len(there[head])) and places == sorted(set(places))
                scores = self.scores(row, head)
                rest = torch.ones(len(there[head]), dtype=torch.bool)
                rest[places] = False
                if len(places) and bool(rest.any()):
                    assert scores[places].min() >= scores[rest].max() * (1 - 1e-4) - 1e-9
            self.kept[row] = [[there[head][place] for place in heads[head]] for head in range(HEADS)]
        self.gone = self.coded

    def attend(self, query: torch.Tensor, past: int) -> torch.Tensor:
        """Of queries of the last columns; those from `past` on are read as they came."""
        place = torch.arange(self.tokens)
        seen = torch.zeros(len(self.starts), HEADS, self.tokens, dtype=torch.bool)
        coded = (place < min(self.coded, past))[None, None].expand(seen.shape).clone()
        for row, start in enumerate(self.starts):
            for head in range(HEADS):
                seen[row, head, self.kept[row][head]] = True
            seen[row, :, self.gone :] = True
            sinks = slice(start, start + self.method.sink_tokens)
            seen[row, :, sinks], coded[row, :, sinks] = True, False
            seen[row, :, :start] = False
        key, value = (
            torch.where(coded[..., None], rounded, x)
            for rounded, x in zip(self.rounded(), (self.key, self.value), strict=True)
        )
        causal = place <= torch.arange(self.tokens - query.shape[2], self.tokens)[:, None]
        logits = query.unflatten(1, (HEADS, -1)) @ key[:, :, None].mT * SCALING
        hidden = ~(causal & seen[:, :, None])[:, :, None]
        weights = logits.double().masked_fill(hidden, -torch.inf).softmax(dim=-1).nan_to_num(0.0)
        return (weights @ value[:, :, None].double()).flatten(1, 2)
