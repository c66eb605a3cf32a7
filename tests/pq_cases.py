"""Product quantizers drawn at random, and caches of them."""

from __future__ import annotations

import torch
from torch import Tensor

from kompakt.quant.kv_pq import KVPQ, PARTS


def pq_statics(heads: int, key_dim: int, value_dim: int, *, bits: int = 4, seed: int = 0) -> dict[str, Tensor]:
    """Static tensors of a layer as `KVPQ` keeps them: maps that undo each other, centroids as far apart as tokens."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for part, dim in (("key", key_dim), ("value", value_dim)):
        blank = KVPQ(bits=bits).blank_statics(heads, dim)  # pyright: ignore[reportArgumentType]
        shapes = [blank[f"key_{name}"].shape for name in PARTS]
        basis = torch.linalg.qr(torch.randn(heads, dim, dim, generator=generator))[0]
        scale = torch.rand(heads, 1, dim, generator=generator) + 0.5
        encode, decode = torch.zeros(shapes[1]), torch.zeros(shapes[1])
        # Some channels of the sub-vectors are not used where there are more than the head has.
        used = torch.linspace(0, shapes[1][-1] - 1, dim).round().long()
        encode[..., used], decode[..., used] = basis * scale, basis / scale
        centroids = torch.randn(shapes[3], generator=generator) * (encode.any(dim=1).view(heads, -1, 1, shapes[3][-1]))
        tensors = (torch.randn(shapes[0], generator=generator), encode, decode, centroids.bfloat16())
        found |= {f"{part}_{name}": tensor for name, tensor in zip(PARTS, tensors, strict=True)}
    return found
