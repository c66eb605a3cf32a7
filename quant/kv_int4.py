"""KV cache in INT4: a step and a least value per token and KV head, keys mapped first so that their channels are alike.

A few channels of keys are large in every token, above all where keys have a bias, and a step that spans them leaves the
others no levels. Keys therefore lose their mean m over calibration text, channels are divided by factors f, and the
result is rotated by Hadamard's matrix H in blocks (`kernels.kv_codes.KeyMap`). None of it costs a reader anything per
token, since the queries take it over.

*Factors.* After the rotation the error of a code is spread evenly over the channels and grows with the size of the
mapped key, so that the error of a logit, Σ q_c² f_c² · Σ (k_c − m_c)² / f_c² over the channels of a block in the mean,
is least by Cauchy's inequality for

    f_c = √( rms(k_c − m_c) / rms(q_c) )

Without the rotation a step spans the largest channel alone; there the same factors are only a good compromise. What a
layer takes, nothing, mean and factors, or the rotation too, is what leaves the least error in its attention output on
calibration text. Keys are cached after RoPE, so that the two channels of a rotated pair need not share a factor as they
must where factors are folded into weights. Values are coded as they are: neither a mean nor factors nor a rotation made
them better on the models tried.

For head_dim 128 a token takes 68 bytes per KV head and for keys or values each: 4.25 bits per element. Sources:
SmoothAttention of QServe (arXiv 2405.04532), FireQ's scaling of keys (2505.20839), QuaRot (2404.00456).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor

from ..kernels.kv_codes import KeyMap, Kind, rounded
from .method import AttentionInputs, KVCacheMethod
from .output_error import difference_sums, exact_output, figures, rows

Transform = Literal["auto", "none", "scale", "scale_rotate"]
QUERIES = 256
"""The last queries of each sequence of calibration text that a layer's error is measured on."""


@dataclass(frozen=True, kw_only=True)
class KVINT4(KVCacheMethod):
    """INT4 codes of past keys and values. key_transform: what is done to keys first: auto picks, for each layer, the
    best of none, scale (mean and channel factors) and scale_rotate on calibration text.
    """

    kind: ClassVar[Kind] = "int4"
    calibrated: ClassVar[str] = (
        "Keys lose a mean, are divided by factors and rotated, as far as calibration text showed a need."
    )

    key_transform: Transform = "auto"

    @property
    def needs_data(self) -> bool:
        """Means and factors are those of calibration text."""
        return self.key_transform != "none"

    def statics(self, inputs: AttentionInputs) -> dict[str, Tensor]:
        """See `KVCacheMethod.statics`: ``key_mean`` and ``key_factors``, (num_kv_heads, head_dim) fp32, and
        ``key_rotated``, (1,) uint8; nothing where keys stay as they are. ValueError for NaN or infinite inputs."""
        candidates = get_args(Transform)[1:] if self.key_transform == "auto" else (self.key_transform,)
        found = {candidate: tensors_for(inputs, candidate) for candidate in candidates}
        if len(found) == 1:
            return found[self.key_transform]
        errors = {candidate: output_error(inputs, self.key_map(tensors)) for candidate, tensors in found.items()}
        return found[min(errors, key=lambda candidate: errors[candidate])]

    def key_map(self, statics: Mapping[str, Tensor]) -> KeyMap | None:
        """See `KVCacheMethod.key_map`."""
        if not statics:
            return None
        return KeyMap(statics["key_mean"], statics["key_factors"], rotated=bool(statics["key_rotated"]))


def tensors_for(inputs: AttentionInputs, transform: Transform) -> dict[str, Tensor]:
    """Static tensors of a layer for one transform."""
    if transform == "none":
        return {}
    mean, factors = mean_and_factors(inputs.query, inputs.key)
    rotated = torch.tensor([transform == "scale_rotate"], dtype=torch.uint8)
    return {"key_mean": mean, "key_factors": factors, "key_rotated": rotated}


def mean_and_factors(query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
    """m and f of the module, (num_kv_heads, head_dim) fp32 each; f has geometric mean 1 in every head.

    query: (batch, num_heads, queries, head_dim), key: (batch, num_kv_heads, keys, head_dim). A channel that is
    constant, or that no query looks at, counts as a thousandth of the mean one. ValueError for NaN or infinite values.
    """
    batch, kv_heads, _, head_dim = key.shape
    mean = key.float().mean(dim=(0, 2))
    spread = (key.float() - mean[:, None]).square().mean(dim=(0, 2)).sqrt()
    looks = query.float().view(batch, kv_heads, -1, query.shape[2], head_dim).square().mean(dim=(0, 2, 3)).sqrt()
    if not bool((spread.isfinite() & looks.isfinite()).all()):
        raise ValueError("queries or keys are NaN or infinite on the calibration text; the model is damaged")
    logs = 0.5 * (above_zero(spread).log() - above_zero(looks).log())
    return mean, (logs - logs.mean(dim=-1, keepdim=True)).exp()


def above_zero(x: Tensor) -> Tensor:
    """x, (heads, channels), no less than a thousandth of its head's mean; ones for a head of zeros."""
    mean = x.mean(dim=-1, keepdim=True)
    return torch.where(mean == 0, 1.0, torch.maximum(x, mean / 1000))


@torch.no_grad()
def output_error(inputs: AttentionInputs, key_map: KeyMap | None) -> float:
    """1 − cosine of a layer's output when all keys and values are coded. Segments: all queries count, else the last
    `QUERIES` of each sequence.
    """
    sums = torch.zeros(6, dtype=torch.float64)
    for part in rows(inputs):
        if part.options.get("segments") is None:
            part = replace(part, query=part.query[:, :, -QUERIES:])
        key, value = (rounded(x, "int4", how).to(x.dtype) for x, how in ((part.key, key_map), (part.value, None)))
        coded = exact_output(replace(part, key=key, value=value))
        sums += difference_sums(coded, exact_output(part)).cpu()
    return 1 - figures(sums).cosine
