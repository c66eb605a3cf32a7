"""transformers' own attention of given tensors, for measurements beside it."""

from __future__ import annotations

from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward


class AttentionShape(nn.Module):
    """What transformers' attention functions read of an attention module."""

    def __init__(self, num_key_value_groups: int, *, is_causal: bool):
        super().__init__()
        self.num_key_value_groups, self.is_causal = num_key_value_groups, is_causal


def sdpa_attention(module: AttentionShape, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """`sdpa_attention_forward` as a model's attention layer calls it.

    query: (batch, heads, queries, head_dim); key and value: (batch, KV heads, keys, head_dim); mask: bool, broadcast to
    (batch, heads, queries, keys), or None. Returns (batch, heads, queries, head_dim), a view.
    """
    out, _ = sdpa_attention_forward(module, query, key, value, mask, scaling=query.shape[-1] ** -0.5)
    return out.transpose(1, 2)
