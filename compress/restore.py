"""Backing off: giving whole decoder layers back their float weights when a quality limit is exceeded.

Folds stay inside a layer, so a layer whose Linears and norms are restored, and whose attention is dense again, computes
what the float model's layer does. A recipe without weights gives back attention alone.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import replace
from typing import Any, NoReturn

from torch import nn

from ..quant.method import AttentionPolicy
from ..sparsify.patterns import Dense
from .coverage import Coverage
from .layer_policies import UNCHANGED, LayerPolicy, is_sparse, sparsity_in
from .recipe import Limits
from .walk import LayerReport, Undo

log = logging.getLogger(__name__)
REASON = "restored: the perplexity limit was exceeded"


class LimitExceeded(Exception):
    """The recipe's quality limit cannot be met. The message holds the numbers."""


def restore_worst(
    layers: list[tuple[str, nn.Module]],
    reports: list[LayerReport],
    undo: Undo,
    coverage: list[Coverage],
    evaluation: dict[str, Any],
    limits: Limits,
) -> list[Coverage]:
    """Restores as many of the layers with the largest error as are restored already, at least one; returns the new
    coverage.

    Raises LimitExceeded when more than `limits.max_restored` of the layers would have to be given back.
    """
    increase = evaluation["comparison"]["perplexity_increase"]
    ranked = [report.name for report in sorted(reports, key=lambda report: -report.error)]
    quantized = [
        name for name in ranked if any(_inside(line, name) and line.status == "quantized" for line in coverage)
    ]
    done = len(ranked) - len(quantized)
    take = quantized[: max(1, done)]
    if done + len(take) > limits.max_restored * len(ranked):
        raise LimitExceeded(
            f"perplexity grew by {increase:.2%}, the limit is {limits.perplexity_increase:.2%}; {done} of "
            f"{len(ranked)} layers were given back their float weights and limits.max_restored = "
            f"{limits.max_restored:.0%} allows no further try"
        )
    modules = dict(layers)
    for name in take:
        undo.restore_layer(modules[name])
    log.warning("perplexity grew by %.2f%%, restored: %s", 100 * increase, ", ".join(take))
    return [
        replace(line, status="kept", reason=REASON)
        if line.status == "quantized" and any(_inside(line, name) for name in take)
        else line
        for line in coverage
    ]


def attention_beside(coverage: list[Coverage], policies: Iterable[str]) -> tuple[str, ...]:
    """Attention modules, of those that have policies, in decoder layers whose weights were restored."""
    restored = [line.name for line in coverage if line.reason == REASON]
    return tuple(name for name in policies if any(line.startswith(f"{name.rpartition('.')[0]}.") for line in restored))


def worst_attention(
    policies: dict[str, AttentionPolicy], evaluation: dict[str, Any], limits: Limits
) -> tuple[str, ...]:
    """As many attention layers with the lowest cosine as were given back already, at least one.

    Raises LimitExceeded when more than `limits.max_restored` of the layers would have to be given back.
    """
    increase = evaluation["comparison"]["perplexity_increase"]
    quantized = [name for name, policy in policies.items() if policy.mode != "bf16" or is_sparse(policy)]
    done = sum(map(was_given_back, policies.values()))
    take = sorted(quantized, key=lambda name: cosine(policies[name]))[: max(1, done)]
    if not take or done + len(take) > limits.max_restored * len(policies):
        raise LimitExceeded(
            f"perplexity grew by {increase:.2%}, the limit is {limits.perplexity_increase:.2%}; {done} of "
            f"{len(policies)} attention layers were given back to dense attention and limits.max_restored = "
            f"{limits.max_restored:.0%} allows no further try"
        )
    log.warning("perplexity grew by %.2f%%, attention is dense again: %s", 100 * increase, ", ".join(take))
    return tuple(take)


def left_to_restore(coverage: list[Coverage], policies: dict[str, AttentionPolicy]) -> bool:
    """Whether any layer has quantized weights or attention that could be given back."""
    return any(line.status == "quantized" for line in coverage) or any(
        policy.mode != "bf16" or is_sparse(policy) for policy in policies.values()
    )


def refuse_limit(evaluation: dict[str, Any], limits: Limits) -> NoReturn:
    """Raises LimitExceeded, where nothing is left that can be given back layer by layer."""
    increase = evaluation["comparison"]["perplexity_increase"]
    raise LimitExceeded(
        f"perplexity grew by {increase:.2%}, the limit is {limits.perplexity_increase:.2%}; a compressed cache is not "
        "given back layer by layer: use kv_fp8, or more recent_tokens"
    )


def given_back(policy: AttentionPolicy) -> AttentionPolicy:
    """The policy of an attention layer that is dense again."""
    chosen = sparsity_in(policy)
    if chosen is None or not isinstance(policy, LayerPolicy):
        return replace(policy, mode="bf16", reason=REASON)
    dense = replace(chosen, heads=(Dense(),) * len(chosen.heads), figures=None, reason=REASON)
    return replace(policy, mode="bf16", reason=UNCHANGED if policy.reason == UNCHANGED else REASON, sparsity=dense)


def cosine(policy: AttentionPolicy) -> float:
    """Of the chosen mode, less where the layer is sparse; 0 for a layer that was not judged."""
    found = policy.tried[policy.mode].cosine if policy.mode in policy.tried else float(policy.mode == "bf16")
    chosen = sparsity_in(policy)
    if chosen is None or not chosen.sparse:
        return found
    return 0.0 if chosen.figures is None else found * (1 - min(chosen.figures.error, 1.0) ** 2) ** 0.5


def was_given_back(policy: AttentionPolicy) -> bool:
    """Whether a layer was given back its dense attention."""
    chosen = sparsity_in(policy)
    return REASON in (policy.reason, "" if chosen is None else chosen.reason)


def _inside(line: Coverage, layer: str) -> bool:
    return line.name.startswith(f"{layer}.")
