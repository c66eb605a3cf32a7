"""Tokens that are hard to prune."""

from __future__ import annotations

import torch
from torch import Tensor


def hard_pair(shape: tuple[int, ...], dims: tuple[int, int], seed: int = 3) -> list[Tensor]:
    """Keys and values, (*shape, tokens last): ties, zeros, large, small and damaged tokens among random ones."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for dim in dims:
        x = torch.randn(*shape, dim, generator=generator) * 2
        tokens = shape[-1]
        x[..., tokens // 2, :] = x[..., tokens // 2, :].sign()
        x[..., tokens // 3, :] = 0
        x[..., tokens // 4, :] *= 2**12
        x[..., tokens // 5, :] *= 2**-12
        x[:, 1, tokens // 6, dim // 2], x[:, 0, tokens // 7, 0] = torch.nan, -torch.inf
        found.append(x)
    return found
