"""KV cache in product-quantized codes: exactly `bits` bits per channel, codebooks for every layer and KV head.

A head's channels are mapped, cut into sub-vectors, and each of these is the number of its nearest of 256 centroids, one
byte (`kernels.kv_pq`). Keys are coded as they are cached, after RoPE.

*Maps.* With S_k the covariance of a KV head's keys and S_q = E[q·qᵀ] of the queries that read them, an error e of a key
moves logits by e·S_q·eᵀ in the mean. In the coordinates y = (k − m)·S_q^½·U that is |e|², and U, the eigenvectors of
S_q^½·S_k·S_q^½, takes correlation out of them. At the rate of b bits a sub-vector of n channels with variances λ loses
n·2^(−2b)·(Π λ)^(1/n), whose sum is least where all products are alike: channels go to sub-vectors so that the products
of their variances are balanced, and k-means shares the byte out among the channels inside. Values are mapped alike with
S_q = 1, since every channel of a value counts the same here. (Parametric optimized product quantization of Ge et al.,
CVPR 2013, in the norm of the logits.)

| bits | channels of a sub-vector |
|---|---|
| 4 | 2 |
| 3 | 2 or 3 |
| 2 | 4 |

What others left of an attention output on SmolLM2-135M, four layers, on text apart from the calibration's: relative
squared error with keys alone in codes / values alone, in percent; k-means from plain seeds:

| INT4 of `kv_int4` (4.5 bits) | 0.59 / 0.52 |
|---|---|
| 4 bits: these maps | 0.32 / 0.29 |
| channels as they are, divided by factors | 0.69 / 0.31 |
| the same, rotated by Hadamard's matrix | 0.80 / 0.31 |
| eigenvectors of S_k alone | 0.64 / 0.29 |
| these maps, 4 channels, two residual stages | 0.41 / 0.38 |
| these maps, single channels of 4 bits | 2.1 / 1.5 |
| 2 bits: these maps | 4.1 / 3.2 |
| eigenvectors of S_k alone | 6.0 / 3.2 |
| divided by factors and rotated | 10.4 / 3.6 |

Departures from MILLION (arXiv 2504.03661): codebooks per KV head, the maps, calibration on text apart from the
evaluation's, sink tokens dense and out of the training.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from ..kernels.kv_pq import CENTROIDS, DAMAGED, PQCodec, ProductQuantizer, sub_vectors
from .kmeans import kmeans
from .method import AttentionInputs, KVCacheMethod

RIDGE = 0.01
"""Of the mean second moment, added to every channel of the queries: what calibration never looked at is not free."""
FLOOR = 1e-8
"""Of the largest variance: no channel counts as less."""
MAX_TOKENS = 2**17
"""Tokens of a layer that codebooks are trained on at most."""


@dataclass(frozen=True, kw_only=True)
class KVPQ(KVCacheMethod):
    """Product-quantized codes of past keys and values. bits: per channel, codebooks not counted. seed: of k-means.

    positions: of the longest cache that codebooks are made for; calibration text is spread over so many, or over those
    that the model has.
    """

    calibrated: ClassVar[str] = (
        "Codes are numbers of centroids, 256 for each sub-vector of every layer's and KV head's keys and values, which "
        "were found on calibration text, with the maps that cut heads into sub-vectors."
    )
    sequences: ClassVar[int] = 8

    bits: Literal[4, 3, 2] = 4
    seed: int = 0
    positions: Annotated[int, Field(ge=1)] = 32768

    @property
    def spread_over(self) -> int:
        """See `KVCacheMethod.spread_over`: a centroid is of keys after RoPE, which turns them."""
        return self.positions

    @property
    def needs_data(self) -> bool:
        """Codebooks are those of calibration text."""
        return True

    def statics(self, inputs: AttentionInputs) -> dict[str, Tensor]:
        """See `KVCacheMethod.statics`: the fields of `ProductQuantizer` with the prefixes ``key_`` and ``value_``.
        ValueError for NaN or infinite inputs."""
        query, key, value = (tokens_of(x, self.sink_tokens) for x in (inputs.query, inputs.key, inputs.value))
        if not all(bool(x.isfinite().all()) for x in (query, key, value)):
            raise ValueError(
                "queries, keys or values are NaN or infinite on the calibration text; the model is damaged"
            )
        groups = query.shape[0] // key.shape[0]
        looks = second_moments(query.unflatten(0, (-1, groups)).flatten(1, 2))
        found = {"key": trained(key, looks, self.bits, self.seed), "value": trained(value, None, self.bits, self.seed)}
        return {
            f"{part}_{name}": tensor.cpu()
            for part, quantizer in found.items()
            for name, tensor in zip(PARTS, quantizer.tensors(), strict=True)
        }

    def blank_statics(self, heads: int, head_dim: int) -> dict[str, Tensor]:
        """See `KVCacheMethod.blank_statics`."""
        vectors, width = sub_vectors(self.bits, head_dim), widest(self.bits)
        maps = (heads, head_dim, vectors * width)
        shapes = {"mean": (heads, head_dim), "encode": maps, "decode": maps}
        blank = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
        blank["centroids"] = torch.empty((heads, vectors, CENTROIDS, width), dtype=torch.bfloat16, device="meta")
        return {f"{part}_{name}": tensor for part in ("key", "value") for name, tensor in blank.items()}

    def codec(self, statics: Mapping[str, Tensor]) -> PQCodec:
        """See `KVCacheMethod.codec`. KeyError where calibration has not been."""
        keys, values = (ProductQuantizer(*(statics[f"{part}_{name}"] for name in PARTS)) for part in ("key", "value"))
        return PQCodec(self.bits, keys, values)


PARTS = ("mean", "encode", "decode", "centroids")


def widest(bits: int) -> int:
    """Channels that centroids have room for; a power of two, as kernels want it."""
    return 2 if bits == 4 else 4


def tokens_of(x: Tensor, sink_tokens: int) -> Tensor:
    """(batch, heads, tokens, head_dim) → (heads, tokens of all sequences, head_dim) fp32, without sink tokens, which
    are read dense and are like no other; with them where nothing else is there."""
    kept = x[:, :, sink_tokens:] if x.shape[2] > sink_tokens else x
    return kept.transpose(0, 1).flatten(1, 2).float()


def second_moments(x: Tensor) -> Tensor:
    """E[x·xᵀ], (heads, head_dim, head_dim) fp64. x: (heads, tokens, head_dim)."""
    return (x.mT @ x).double() / x.shape[1]


def trained(x: Tensor, looks: Tensor | None, bits: int, seed: int) -> ProductQuantizer:
    """Codebooks of tokens x, (heads, tokens, head_dim) fp32. looks: second moments of what is multiplied with them,
    (heads, head_dim, head_dim); None for 1."""
    heads, tokens, head_dim = x.shape
    if tokens > MAX_TOKENS:
        generator = torch.Generator(x.device).manual_seed(seed)
        x = x[:, torch.randperm(tokens, generator=generator, device=x.device)[:MAX_TOKENS]]
    mean = x.mean(dim=1)
    centred = x - mean[:, None]
    vectors, width = sub_vectors(bits, head_dim), widest(bits)
    encode, decode = maps(second_moments(centred), looks, vectors, width)
    y = (centred @ encode).view(heads, -1, vectors, width).transpose(1, 2).reshape(heads * vectors, -1, width)
    centroids = kmeans(y, CENTROIDS, seed=seed).view(heads, vectors, CENTROIDS, width)
    # The last number of a first sub-vector is no centroid's.
    first = kmeans(y.view(heads, vectors, -1, width)[:, 0].contiguous(), DAMAGED, seed=seed)
    centroids[:, 0] = torch.nn.functional.pad(first, (0, 0, 0, 1))
    return ProductQuantizer(mean, encode, decode, centroids.to(torch.bfloat16))


def maps(covariance: Tensor, looks: Tensor | None, vectors: int, width: int) -> tuple[Tensor, Tensor]:
    """E and D of `kernels.kv_pq`, (heads, head_dim, vectors · width) fp32 each. covariance: (heads, head_dim, head_dim)
    fp64."""
    root, inverse = roots(covariance, looks)
    variances, directions = torch.linalg.eigh(root @ covariance @ root)
    least = FLOOR * variances.amax(dim=-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    chosen = torch.stack(
        [
            spread_out(columns, balanced(known, vectors), width)
            for columns, known in zip(directions, variances.clamp_min(least), strict=True)
        ]
    )
    return (root @ chosen).float(), (inverse @ chosen).float()


def roots(covariance: Tensor, looks: Tensor | None) -> tuple[Tensor, Tensor]:
    """S_q^½ and its inverse, (heads, head_dim, head_dim) fp64; 1 where nobody looks."""
    one = torch.eye(covariance.shape[-1], dtype=torch.float64, device=covariance.device).expand_as(covariance)
    if looks is None:
        return one, one
    size = looks.diagonal(dim1=-2, dim2=-1).mean(dim=-1)[:, None, None]
    looks = torch.where(size > 0, looks / size.clamp_min(torch.finfo(torch.float64).tiny), one) + RIDGE * one
    values, directions = torch.linalg.eigh(looks)
    values = values.clamp_min(RIDGE / 2).sqrt()[:, None]
    return (directions * values) @ directions.mT, (directions / values) @ directions.mT


def balanced(variances: Tensor, groups: int) -> list[list[int]]:
    """Channels shared out among groups of equal size, as far as that goes, so that the products of their variances are
    alike: from the largest on, each goes to the group with the smallest product that has room."""
    logs = (variances / variances.min()).log().tolist()
    sizes = [len(logs) // groups + (group < len(logs) % groups) for group in range(groups)]
    found: list[list[int]] = [[] for _ in range(groups)]
    products = [0.0] * groups
    for channel in sorted(range(len(logs)), key=lambda channel: -logs[channel]):
        room = [group for group in range(groups) if len(found[group]) < sizes[group]]
        group = min(room, key=lambda group: products[group])
        found[group].append(channel)
        products[group] += logs[channel]
    return found


def spread_out(directions: Tensor, groups: list[list[int]], width: int) -> Tensor:
    """(head_dim, groups · width): columns of `directions`, group by group, zeros where one has fewer than `width`."""
    result = directions.new_zeros((directions.shape[0], len(groups) * width))
    for number, group in enumerate(groups):
        result[:, number * width : number * width + len(group)] = directions[:, group]
    return result
