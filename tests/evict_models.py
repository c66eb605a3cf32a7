"""What a model with an evicting cache should compute: one pass over everything, its attention dense, with the keys that
a KV head has not kept hidden from every query behind the prompt.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from transformers import AttentionInterface

from kompakt.compress import evicting
from kompakt.compress.kv_evict import KVEvict

NAME = "evicted_reference"


@dataclass
class Expected:
    """What later queries see. prompt: its columns. kept: of each layer, (batch, num_kv_heads, candidates) bool, sinks
    not among them. starts: of the rows.
    """

    method: KVEvict
    prompt: int
    starts: list[int]
    kept: list[torch.Tensor] = field(default_factory=list)

    def visible(self, layer: int, keys: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Of all columns (batch, num_kv_heads, keys): which are seen behind the prompt, and which of them are coded."""
        coded = torch.nn.functional.pad(self.kept[layer], (0, keys - self.kept[layer].shape[2]))
        seen = coded.clone()
        boundary = self.prompt - self.method.recent_tokens
        for row, start in enumerate(self.starts):
            seen[row, :, start : start + self.method.sink_tokens] = True
            seen[row, :, max(boundary, start) :] = True
        return seen, coded

    def attention(self, module: Any, query: Any, key: Any, value: Any, mask: Any, scaling: float = 1.0, **kwargs: Any):
        """An attention function of transformers."""
        keys, group = key.shape[2], query.shape[1] // key.shape[1]
        seen, coded = self.visible(module.layer_idx, keys)
        codec = self.method.codec({})
        rounded = [
            torch.where(coded[..., None], coded_x.to(x.dtype), x)
            for coded_x, x in zip(codec.rounded(key, value), (key, value), strict=True)
        ]
        place = torch.arange(keys)
        causal = (place <= place[:, None]) & (place >= torch.tensor(self.starts)[:, None, None])
        outs = []
        for k, v, allowed in ((key, value, causal[:, None]), (*rounded, causal[:, None] & seen[:, :, None])):
            logits = query @ k.repeat_interleave(group, 1).mT * scaling
            if kwargs.get("softcap") is not None:
                logits = kwargs["softcap"] * torch.tanh(logits / kwargs["softcap"])
            hidden = ~allowed.repeat_interleave(group if allowed.shape[1] > 1 else 1, 1)
            logits = logits.masked_fill(hidden, torch.finfo(logits.dtype).min)
            if kwargs.get("s_aux") is not None:
                logits = torch.cat((logits, kwargs["s_aux"].view(1, -1, 1, 1).expand(*logits.shape[:3], 1)), dim=-1)
            outs.append(logits.softmax(dim=-1)[..., :keys] @ v.repeat_interleave(group, 1))
        late = (place >= self.prompt)[:, None]
        return torch.where(late, outs[1], outs[0]).transpose(1, 2).contiguous(), None


@contextmanager
def recording(method: KVEvict, prompt: int, starts: list[int], monkeypatch: pytest.MonkeyPatch) -> Iterator[Expected]:
    """While this lasts, what the layers of a cache keep is noted, in their order."""
    noted = Expected(method, prompt, list(starts))
    original = evicting.kept_columns

    def kept_columns(scores: Any, first: Any, pages: Any) -> Any:
        columns, counts = original(scores, first, pages)
        kept = torch.zeros(scores.shape, dtype=torch.bool)
        for row, heads in enumerate(counts):
            for head, count in enumerate(heads):
                kept[row, head, columns[row, head, :count]] = True
        noted.kept.append(kept)
        return columns, counts

    with monkeypatch.context() as patched:
        patched.setattr(evicting, "kept_columns", kept_columns)
        yield noted


def reference_logits(model: Any, expected: Expected, tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Of an unpatched model."""
    AttentionInterface.register(NAME, expected.attention)
    former = model.config._attn_implementation
    model.set_attn_implementation(NAME)
    try:
        return model(tokens, attention_mask=mask, use_cache=False).logits
    finally:
        model.set_attn_implementation(former)
