"""What a method of the `sparsity` slot is: a frozen dataclass of options that says, for every attention layer, which
pattern each head runs.

A method lives in a file of its own in this folder; the file's name is its key in a recipe and its fields are the
recipe's options. It sees queries, keys and values as they arrive at a layer (`profile`), layer by layer, keeps a few
numbers of each, and decides when it has seen them all (`choose`).

Methods of the slot `kv_cache` that leave something out of the cache are files of this folder too.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar

import torch
from pydantic import ConfigDict, Field

from ..kernels.cache_method import KVCacheMethod
from .patterns import Dense, Pattern, read_pattern

Base = TypeVar("Base")
MIN_LENGTH = 32768
"""Keys from which sparse prefill can pay: published kernels gain nothing below 32K to 50K tokens. Not measured here."""


@dataclass(frozen=True)
class SparseFigures:
    """What a layer's patterns did on text that they were not chosen on. recall: mean share of the dense probabilities
    that was visited. error: ‖difference‖ / ‖exact‖ of the layer's attention output, before its output projection.
    density: tiles visited over those of dense attention, 64 single columns counting as one. tokens: queries looked at.
    held_out: whether the text was another than they were chosen on.
    """

    recall: float
    error: float
    density: float
    tokens: int
    held_out: bool

    def as_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return asdict(self)


@dataclass(frozen=True)
class SparsityPolicy:
    """Which keys one attention layer visits in prefill.

    heads: a pattern for every query head. min_length: calls over fewer keys run dense. calibrated_length: budgets are
    for prompts of so many tokens, and grow in proportion beyond; 0 leaves them as they are at any length. figures: on
    calibration text, None if it was not looked at. reason: why these patterns.
    """

    heads: tuple[Pattern, ...]
    min_length: int
    calibrated_length: int = 0
    figures: SparseFigures | None = None
    reason: str = ""

    @property
    def sparse(self) -> bool:
        """Whether any head is."""
        return any(not isinstance(head, Dense) for head in self.heads)

    def patterns(self, keys: int) -> list[Pattern]:
        """The heads' patterns over so many keys."""
        if self.calibrated_length == 0:
            return list(self.heads)
        return [head.scaled(keys / self.calibrated_length) for head in self.heads]

    def as_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return {
            "heads": [head.as_dict() for head in self.heads],
            "min_length": self.min_length,
            "calibrated_length": self.calibrated_length,
            "figures": None if self.figures is None else self.figures.as_dict(),
            "reason": self.reason,
        }

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> SparsityPolicy:
        """Reads `as_dict`. ValueError if it is something else."""
        try:
            figures = content["figures"]
            heads = tuple(read_pattern(head) for head in content["heads"])
            policy = cls(
                **{
                    **content,
                    "heads": heads,
                    "figures": None if figures is None else SparseFigures(**figures),
                }
            )
        except (TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"a sparsity policy is damaged: {error}") from error
        for name in ("min_length", "calibrated_length"):
            value = getattr(policy, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 0:
                raise ValueError(f"{name} is {value!r} in a sparsity policy; it counts tokens, from 0")
        if not policy.heads or not isinstance(policy.reason, str):
            raise ValueError("a sparsity policy is damaged: it has no heads, or no text for a reason")
        return policy


@dataclass(frozen=True)
class SparseInputs:
    """What one causal attention layer works on. query: (batch, num_heads, tokens, head_dim), key and value: (batch,
    num_kv_heads, tokens, head_dim), post-RoPE, of documents without padding.
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    scaling: float
    softcap: float | None = None


@dataclass(frozen=True, kw_only=True)
class SparsityMethod:
    """Base of every method of the `sparsity` slot.

    min_length: calls over fewer keys run dense.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")  # pyright: ignore[reportUnannotatedClassAttribute]

    min_length: Annotated[int, Field(ge=1)] = MIN_LENGTH

    @property
    def needs_data(self) -> bool:
        """Whether `profile` is called with calibration text; if not, profiles are None."""
        return True

    @property
    def sequences(self) -> int:
        """Windows of calibration text that a layer is judged on."""
        return 3

    def profile(self, inputs: SparseInputs) -> Any:
        """What is kept of one layer."""
        raise NotImplementedError

    def choose(self, profiles: Mapping[str, Any], heads: Mapping[str, int]) -> dict[str, SparsityPolicy]:
        """Policies of all layers. profiles: by module, in order. heads: query heads of each."""
        raise NotImplementedError


def methods_of(base: type[Base]) -> dict[str, type[Base]]:
    """Every method that derives from `base`, by its key (the name of its file), found by looking into this folder."""
    found = {}
    for path in sorted(Path(__file__).parent.glob("[a-z]*.py")):
        module = importlib.import_module(f".{path.stem}", __package__)
        for item in vars(module).values():
            local = isinstance(item, type) and item.__module__ == module.__name__
            if local and issubclass(item, base) and item is not base:
                found[path.stem] = item
    return found


def sparsity_methods() -> dict[str, type[SparsityMethod]]:
    """Methods of the slot `sparsity`."""
    return methods_of(SparsityMethod)


def kv_cache_methods() -> dict[str, type[KVCacheMethod]]:
    """Methods of the slot `kv_cache` that leave something out."""
    return methods_of(KVCacheMethod)
