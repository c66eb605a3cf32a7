"""One new token per row into a compressed cache whose lengths only the device knows, as a CUDA graph needs it.

::

    t, c = lengths            ring[t mod n] ← token       sink[t − start] ← token, where it is one
    page(c) ← ring, columns c … e − 1, e the end of the page of c, if t + 1 − e ≥ recent tokens, and then c ← e
    lengths ← t + 1, c

Nothing is asked of the host, which does the same sums on its own numbers. The page of the column c must have storage.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .activations import launching_on
from .kv_pages import PAGE, Pages, launched, write_tokens

LENGTHS = 4
"""Numbers of a cache's lengths, int32: columns in all, columns in pages, programs that are done, columns that
were evicted from."""
GONE = 3
"""Place of the last of them, which only what evicts changes."""


@dataclass(frozen=True)
class Appendable:
    """Storage of one layer that a token goes into.

    lengths: (LENGTHS,) int32. ring: keys and values, (batch, num_kv_heads, length, head_dim). sinks: likewise.
    sink_starts: (batch,) int64, the column of each row's first sink. recent_tokens: the least that stay dense.
    """

    lengths: Tensor
    ring: tuple[Tensor, Tensor]
    sinks: tuple[Tensor, Tensor]
    sink_starts: Tensor
    pages: Pages
    recent_tokens: int


def append_token(key: Tensor, value: Tensor, to: Appendable, *, interpret: bool = False) -> None:
    """Appends in place. key, value: (batch, num_kv_heads, 1, head_dim), post-RoPE, of one dtype with the ring."""
    if launched(to.pages.codec, key.device, "append_token", interpret=interpret):
        with launching_on(key):
            to.pages.codec.append(key, value, to, interpret=interpret)
        return
    append_ref(key, value, to)


def append_ref(key: Tensor, value: Tensor, to: Appendable) -> None:
    """Torch specification of `append_token`, any device. Waits for the device."""
    tokens, coded = to.lengths[:2].tolist()
    sink_tokens = to.sinks[0].shape[2]
    for ring, sinks, new in zip(to.ring, to.sinks, (key, value), strict=True):
        ring[:, :, tokens % ring.shape[2]] = new[:, :, 0]
        for row, start in enumerate(to.sink_starts.tolist()):
            if start <= tokens < start + sink_tokens:
                sinks[row, :, tokens - start] = new[row, :, 0]
    end = coded // PAGE * PAGE + PAGE
    if tokens + 1 - end >= to.recent_tokens:
        write_tokens(*to.ring, (coded, end), to.pages, ring=True)
        coded = end
    to.lengths[:2] = torch.tensor([tokens + 1, coded], dtype=torch.int32)
