"""Which keys a query may see: rectangles of queries × keys in a batch, each causal or full on its own.

Padding, packed sequences and chunks of a prefill are all the same thing: *segments*. Segment s holds queries
[q_start, q_stop) and keys [k_start, k_stop) of one row of the batch. Inside a segment the **last query sits on the last
key**, so a query at index i has position p = i − q_stop + k_stop, and it sees the keys j of its segment with

    causal            j ≤ p
    window w          j > p − w            (both directions without causality: |j − p| < w)

Queries in no segment see nothing. No query belongs to two segments.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

COLUMNS = ("batch row", "q_start", "q_stop", "k_start", "k_stop")


@dataclass(frozen=True)
class Segments:
    """Segments of one batch of attention.

    table: (segments, 5) int32, `COLUMNS`. max_queries: queries of the longest segment. extent: rows of the batch,
    queries and keys that the table speaks of. The last two are known without asking the device.
    """

    table: Tensor
    max_queries: int
    extent: tuple[int, int, int]

    @classmethod
    def from_padding(cls, mask: Tensor, queries: int) -> Segments | None:
        """Segments of a padded batch, left or right; None if a row's tokens are not one unbroken run.

        mask: (batch, keys) bool, True for a token. queries: how many of the last positions are queries; those that are
        padding are in no segment. Waits for the device.
        """
        batch, keys = mask.shape
        positions = torch.arange(keys, device=mask.device)
        count = mask.sum(dim=1)
        start = torch.where(count == 0, 0, mask.int().argmax(dim=1))
        stop = start + count
        inside = (positions >= start[:, None]) & (positions < stop[:, None])
        if not bool((inside == mask).all()):
            return None
        offset = keys - queries
        q_start, q_stop = ((edge - offset).clamp(0, queries) for edge in (start, stop))
        # Where a row ends in padding, its last query sits on its last token; before the first query there is none.
        stop = torch.where(q_stop > q_start, stop, start)
        rows = torch.arange(batch, device=mask.device)
        table = torch.stack((rows, q_start, q_stop, start, stop), dim=1).to(torch.int32)
        return cls(table, queries, (batch, queries, keys))

    @classmethod
    def from_cu_seqlens(cls, queries: Tensor, keys: Tensor | None = None) -> Segments:
        """Segments of packed sequences in a batch of one.

        queries, keys: (sequences + 1,) increasing integers from 0, where each sequence begins and the last one ends, as
        in FlashAttention's ``cu_seqlens``; keys default to queries. Waits for the device.
        """
        keys = queries if keys is None else keys
        if queries.dim() != 1 or queries.shape != keys.shape or len(queries) < 2:
            raise ValueError(
                f"cu_seqlens have shapes {tuple(queries.shape)} and {tuple(keys.shape)}; expected two (sequences + 1,)"
            )
        lengths = queries.diff()
        keys = keys.to(queries.device)
        if bool((lengths < 0).any() | (keys.diff() < 0).any() | (queries[0] != 0) | (keys[0] != 0)):
            raise ValueError("cu_seqlens must begin with 0 and never fall")
        zeros = torch.zeros_like(lengths)
        table = torch.stack((zeros, queries[:-1], queries[1:], keys[:-1], keys[1:]), dim=1).to(torch.int32)
        return cls(table, int(lengths.max()), (1, int(queries[-1]), int(keys[-1])))

    @classmethod
    def from_documents(cls, documents: Tensor) -> Segments | None:
        """Segments of packed documents; None if a document's tokens are not one unbroken run.

        documents: (batch, tokens) integers, equal for tokens of one document. Waits for the device.
        """
        batch, tokens = documents.shape
        change = torch.ones_like(documents, dtype=torch.bool)
        change[:, 1:] = documents[:, 1:] != documents[:, :-1]
        rows, starts = change.nonzero(as_tuple=True)
        names = documents[rows, starts]
        if len(torch.unique(torch.stack((rows, names)), dim=1).T) != len(rows):
            return None
        flat = rows * tokens + starts
        stops = torch.cat((flat[1:], flat.new_tensor([batch * tokens]))) - rows * tokens
        table = torch.stack((rows, starts, stops, starts, stops), dim=1).to(torch.int32)
        return cls(table, int((stops - starts).max()), (batch, tokens, tokens))

    def key_bounds(self, batch: int) -> Tensor:
        """(batch, 2) int32: the keys of each row that any of its segments may see."""
        table = self.table.long()
        start = torch.full((batch,), torch.iinfo(torch.int32).max, device=table.device)
        stop = torch.zeros((batch,), dtype=torch.long, device=table.device)
        start = start.scatter_reduce(0, table[:, 0], table[:, 3], "amin")
        stop = stop.scatter_reduce(0, table[:, 0], table[:, 4], "amax")
        return torch.stack((torch.minimum(start, stop), stop), dim=1).to(torch.int32)


def whole(batch: int, queries: int, keys: int, device: torch.device | str) -> Segments:
    """One segment per row of the batch, with everything in it."""
    # Filled on the device: a copy from the host could not be recorded in a graph.
    table = torch.zeros((batch, 5), dtype=torch.int32, device=device)
    table[:, 0] = torch.arange(batch, device=device)
    table[:, 2] = queries
    table[:, 4] = keys
    return Segments(table, queries, (batch, queries, keys))


def visible(segments: Segments, batch: int, queries: slice, keys: int, *, causal: bool, window: int | None) -> Tensor:
    """(batch, queries of the slice, keys) bool: which keys each query sees. The specification of every mask."""
    device = segments.table.device
    i = torch.arange(queries.start, queries.stop, device=device)[:, None]
    j = torch.arange(keys, device=device)[None, :]
    mask = torch.zeros((batch, len(i), keys), dtype=torch.bool, device=device)
    for row, q_start, q_stop, k_start, k_stop in segments.table.tolist():
        position = i - q_stop + k_stop
        seen = (i >= q_start) & (i < q_stop) & (j >= k_start) & (j < k_stop)
        if causal:
            seen &= j <= position
        if window is not None:
            seen &= (j > position - window) & (j < position + window)
        mask[row] |= seen
    return mask
