"""KV cache pruned by magnitude: of every token a constant number of the largest channels, packed behind a bitmap.

Storage, ties and bytes are those of `kernels.kv_prune`; nothing of what is left out takes memory. Keys are pruned as
they are cached, after RoPE.

*Scores.* ``magnitude`` keeps the largest |k_c| and |v_c|. ``output`` keeps the largest |k_c|·E|q_c| of keys, E|q_c| the
mean over the queries that read a KV head on calibration text, since a channel left out moves a logit by q_c·k_c. Values
need no weights: all channels of a value share one probability, so that magnitude is what the output loses.

*Search.* With ``loss`` every layer has a key and a value sparsity of its own, of `LEVELS`. What leaving channels out of
keys alone, or of values alone, does to the attention output O of the last `QUERIES` queries of each calibration window
is measured at every level, sinks dense. The levels minimise, over layers, keys and values,

    Σ ‖Ô − O‖² / ‖O‖² · √(E[‖a‖² / ‖h‖²])

at no more channels in all than the uniform setting keeps; a is what the attention module makes of O, token by token,
and h the hidden states it is added to, so that layers whose attention adds little give most. From the highest sparsity
on, whatever takes most error away per channel is taken next. Errors of keys and of values are added up as if they were
unrelated, which they are not where little is left of a layer: with E[‖a‖² / ‖h‖²] itself, whose values differ
eightyfold, some layers lose nine channels in ten, and more than that sum knows. Perplexity of SmolLM2-135M at 30 % of
the channels, five windows of 8,192 tokens of WikiText-2 on an H200, every position reading codes / when a dense prompt
is continued from pruned tokens:

| the same sparsity everywhere | +7.1 ± 0.6 % / +10.4 ± 0.5 % |
|---|---|
| this sum | +4.0 ± 0.3 % / +6.4 ± 0.3 % |
| without the root | +7.0 ± 0.3 % / +10.8 ± 0.7 % |
| without the root, no sparsity above 0.8 | +4.4 ± 0.3 % / +7.0 ± 0.3 % |
| without the root, errors e as e / (1 − e) | +4.2 ± 0.4 % / +6.4 ± 0.4 % |
| without the root, √e | +6.4 ± 0.3 % / +9.8 ± 0.8 % |

Source: Mustafar (arXiv 2505.22913), section 3; its sparsities are the same for all layers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from ..kernels.attention import Call, exact_attention
from ..kernels.cache_method import AttentionInputs, KVCacheMethod
from ..kernels.kv_prune import PruneCodec, Values, kept_channels, prune_tokens, restore_tokens

LEVELS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
QUERIES = 256
Sparsity = Annotated[float, Field(ge=0, lt=1)]


@dataclass(frozen=True, kw_only=True)
class KVPrune(KVCacheMethod):
    """Pruned keys and values. key_sparsity, value_sparsity: shares of a token's channels that are left out, rounded so
    that a multiple of 4 is kept. values: what the others are stored as. key_scores: what keys are pruned by. search:
    off gives all layers these sparsities, loss shares the same number of channels out among layers, keys and values.
    """

    calibrated: ClassVar[str] = (
        "Calibration text was used for mean sizes of the queries' channels, which keys are pruned by, or for "
        "sparsities of every layer's keys and values, as far as the options ask for them."
    )

    key_sparsity: Sparsity = 0.5
    value_sparsity: Sparsity = 0.5
    values: Values = "bf16"
    key_scores: Literal["magnitude", "output"] = "output"
    search: Literal["off", "loss"] = "off"

    @property
    def needs_data(self) -> bool:
        """Whether scores or sparsities are those of calibration text."""
        return self.key_scores == "output" or self.search != "off"

    def statics(self, inputs: AttentionInputs) -> dict[str, Tensor]:
        """See `KVCacheMethod.statics`: ``query_weight``, (num_kv_heads, head_dim) fp32; with a search, for `settled`,
        ``shape`` (2, 2) int64 and ``errors`` (2, levels) fp64. ValueError for NaN or infinite inputs."""
        if not all(bool(x.isfinite().all()) for x in (inputs.query, inputs.key, inputs.value)):
            raise ValueError(
                "queries, keys or values are NaN or infinite on the calibration text; the model is damaged"
            )
        found = {}
        if self.key_scores == "output":
            found["query_weight"] = mean_sizes(inputs.query, inputs.key.shape[1])
        if self.search == "loss":
            found["shape"] = torch.tensor([[x.shape[1], x.shape[3]] for x in (inputs.key, inputs.value)])
            found["errors"] = pruning_errors(inputs, self, found.get("query_weight"))
        return found

    @property
    def levels(self) -> list[float]:
        """Sparsities that a search chooses from, rising; the uniform ones are among them."""
        return sorted({*LEVELS, self.key_sparsity, self.value_sparsity})

    def settled(
        self, layers: Mapping[str, dict[str, Tensor]], shares: Mapping[str, float]
    ) -> dict[str, dict[str, Tensor]]:
        """See `KVCacheMethod.settled`: with a search, ``key_sparsity`` and ``value_sparsity``, (1,) fp64 each, in place
        of what was measured."""
        if self.search == "off":
            return dict(layers)
        parts, uniform = [], 0
        for name, statics in layers.items():
            if name not in shares:
                raise ValueError(
                    f"{name} is given no hidden states that its share of them could be told from, and search 'loss' "
                    "shares channels out by that; use search 'off'"
                )
            shapes, errors, share = statics["shape"].tolist(), statics["errors"].tolist(), shares[name]
            for part, sparsity in enumerate((self.key_sparsity, self.value_sparsity)):
                heads, dim = shapes[part]
                known = zip(self.levels, errors[part], strict=True)
                parts.append([Level(heads * kept_channels(x, dim), math.sqrt(share) * error, x) for x, error in known])
                uniform += heads * kept_channels(sparsity, dim)
        chosen = iter(shared_out(parts, uniform))
        found = {}
        for name, statics in layers.items():
            found[name] = {key: tensor for key, tensor in statics.items() if key not in ("shape", "errors")}
            for part in ("key_sparsity", "value_sparsity"):
                found[name][part] = torch.tensor([next(chosen)], dtype=torch.float64)
        return found

    def blank_statics(self, heads: int, head_dim: int) -> dict[str, Tensor]:
        """See `KVCacheMethod.blank_statics`. A search keeps no more channels in all than the uniform sparsities, which
        stand for what it will find."""
        blank = {}
        if self.key_scores == "output":
            blank["query_weight"] = torch.empty((heads, head_dim), device="meta")
        if self.search == "loss":
            blank["key_sparsity"] = torch.tensor([self.key_sparsity], dtype=torch.float64)
            blank["value_sparsity"] = torch.tensor([self.value_sparsity], dtype=torch.float64)
        return blank

    def codec(self, statics: Mapping[str, Tensor]) -> PruneCodec:
        """See `KVCacheMethod.codec`. KeyError where calibration has not been; ValueError for sparsities outside
        [0, 1)."""
        keys, values = self.key_sparsity, self.value_sparsity
        if self.search == "loss":
            keys, values = (float(statics[part]) for part in ("key_sparsity", "value_sparsity"))
        weight = statics["query_weight"] if self.key_scores == "output" else None
        return PruneCodec(keys, values, self.values, weight)


@dataclass(frozen=True)
class Level:
    """What keys or values of a layer may be pruned to. channels: kept of a token, in all KV heads."""

    channels: int
    error: float
    sparsity: float


def mean_sizes(query: Tensor, kv_heads: int) -> Tensor:
    """E|q| of the queries that read each KV head, (num_kv_heads, head_dim) fp32."""
    return query.float().abs().unflatten(1, (kv_heads, -1)).mean(dim=(0, 2, 3))


@torch.no_grad()
def pruning_errors(inputs: AttentionInputs, method: KVPrune, weight: Tensor | None) -> Tensor:
    """‖Ô − O‖² / ‖O‖² with keys alone pruned, and values alone, at every level: (2, levels) fp64."""
    if inputs.options.get("segments") is None:
        inputs = replace(inputs, query=inputs.query[:, :, -QUERIES:])
    exact = output_of(inputs)
    size = exact.square().sum().clamp_min(torch.finfo(torch.float64).tiny)
    errors: list[list[float]] = []
    for part in ("key", "value"):
        x, scores = getattr(inputs, part), weight[:, None] if weight is not None and part == "key" else None
        found = []
        for sparsity in method.levels:
            codes = prune_tokens(x, kept_channels(sparsity, x.shape[-1]), method.values, scores)
            pruned = restore_tokens(*codes, method.values).to(x.dtype)
            pruned[:, :, : method.sink_tokens] = x[:, :, : method.sink_tokens]
            found.append(((output_of(replace(inputs, **{part: pruned})) - exact).square().sum() / size).item())
        errors.append(found)
    return torch.tensor(errors, dtype=torch.float64)


def output_of(inputs: AttentionInputs) -> Tensor:
    """Attention in FP32, as fp64, in the dtype of the query before."""
    options = dict(inputs.options)
    sinks, segments = options.pop("sinks", None), options.pop("segments", None)
    call = Call("bf16", options["causal"], options["window"], options["scaling"], options["softcap"])
    return exact_attention(inputs.query, inputs.key, inputs.value, call, sinks, segments)[0].double()


def shared_out(parts: list[list[Level]], budget: int) -> list[float]:
    """A sparsity for every part, so that errors add up to little and channels to no more than `budget`.

    parts: levels of rising sparsity. From the highest on, the step that takes most error away for a channel, over
    one level or over several, is taken as long as any fits.
    """
    chosen = [len(levels) - 1 for levels in parts]
    left = budget - sum(levels[-1].channels for levels in parts)
    while True:
        best, step = 0.0, None
        for number, levels in enumerate(parts):
            now = levels[chosen[number]]
            for index, level in enumerate(levels[: chosen[number]]):
                more, less = level.channels - now.channels, now.error - level.error
                if 0 < more <= left and less > best * more:
                    best, step = less / more, (number, index)
        if step is None:
            return [levels[index].sparsity for levels, index in zip(parts, chosen, strict=True)]
        number, index = step
        left -= parts[number][index].channels - parts[number][chosen[number]].channels
        chosen[number] = index
