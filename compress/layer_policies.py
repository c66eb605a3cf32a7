"""What one attention layer runs by: the arithmetic of the slot `attention`, and of the slot `sparsity` the keys that it
visits. Either slot may be empty.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from ..quant.method import AttentionPolicy
from ..sparsify.method import SparsityPolicy

UNCHANGED = "the recipe leaves the arithmetic alone"


@dataclass(frozen=True)
class LayerPolicy(AttentionPolicy):
    """Both. sparsity: None if the recipe leaves it alone, or the layer was given back."""

    sparsity: SparsityPolicy | None = None

    def as_dict(self) -> dict[str, Any]:
        """The arithmetic alone, JSON-able; `SparsityPolicy.as_dict` is the rest."""
        return AttentionPolicy(**{item.name: getattr(self, item.name) for item in fields(AttentionPolicy)}).as_dict()


def combined(
    attention: Mapping[str, AttentionPolicy], sparsity: Mapping[str, SparsityPolicy]
) -> dict[str, AttentionPolicy]:
    """Policies by module of all layers that either slot names."""
    found: dict[str, AttentionPolicy] = {}
    for name in dict.fromkeys((*attention, *sparsity)):
        policy = attention.get(name, AttentionPolicy("bf16", 1, reason=UNCHANGED))
        if name in sparsity:
            own = {item.name: getattr(policy, item.name) for item in fields(AttentionPolicy)}
            policy = LayerPolicy(**own, sparsity=sparsity[name])
        found[name] = policy
    return found


def arithmetic_of(policies: Mapping[str, AttentionPolicy]) -> dict[str, AttentionPolicy]:
    """Policies of layers for which the slot `attention` chose."""
    return {name: policy for name, policy in policies.items() if policy.reason != UNCHANGED}


def sparsity_of(policies: Mapping[str, AttentionPolicy]) -> dict[str, SparsityPolicy]:
    """What the slot `sparsity` chose, by module."""
    return {name: chosen for name, policy in policies.items() if (chosen := sparsity_in(policy)) is not None}


def sparsity_in(policy: AttentionPolicy) -> SparsityPolicy | None:
    """What the slot `sparsity` chose for one layer."""
    return policy.sparsity if isinstance(policy, LayerPolicy) else None


def is_sparse(policy: AttentionPolicy) -> bool:
    """Whether any head of the layer visits fewer keys."""
    chosen = sparsity_in(policy)
    return chosen is not None and chosen.sparse
