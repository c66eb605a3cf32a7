"""What a method is: a frozen dataclass of options that decides for one layer at a time.

A method lives in a file of its own; the file's name is its key in a recipe and its fields are the recipe's options.

A *weight* method sees a `Block` (one decoder layer on the compute device, with its calibration inputs) and returns one
`QuantizedWeight` for every Linear in `block.linears`. It may also fold channel scales through `block.fold`; it never
mutates a module itself.

An *attention* method sees queries, keys and values as they arrive at one attention layer and returns an
`AttentionPolicy`: the arithmetic in which that layer's prefill runs.

A *cache* method (`kernels.cache_method`) says in which codes past keys and values are kept and which tokens stay dense,
and may look at the keys and values of one layer for static factors per channel; all of it together is a `CachePolicy`.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Collection, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, TypeVar

import torch
from pydantic import ConfigDict, Field

from ..kernels.attention import MODES, Mode
from ..kernels.cache_method import AttentionInputs, KVCacheMethod

if TYPE_CHECKING:
    from .block import Block

Base = TypeVar("Base")
Activations = Literal["fp8", "none"]
GroupSize = Annotated[int, Field(ge=8)] | Literal["channel", "auto"]


@dataclass(frozen=True)
class WeightScheme:
    """How the weights of a Linear are stored and what its inputs are rounded to.

    weights: "int4" (symmetric, codes −8…7) or "fp8" (e4m3, one scale per output channel).
    group_size: consecutive input channels that share a scale; None is one scale per output channel.
    activations: "fp8" rounds each token's input to e4m3 with its own dynamic scale; "none" leaves it as it is.
    """

    weights: Literal["int4", "fp8"]
    group_size: int | None
    activations: Activations

    def groups(self, in_features: int) -> int:
        """Scales per output channel of a Linear with `in_features` inputs."""
        return 1 if self.group_size is None else in_features // self.group_size

    def describe(self) -> str:
        """Short name as the field writes it, e.g. ``W4A8-FP8 g64``."""
        bits, inputs = {"int4": "4", "fp8": "8"}[self.weights], "8-FP8" if self.activations == "fp8" else "16"
        return f"W{bits}A{inputs} {'per channel' if self.group_size is None else f'g{self.group_size}'}"


@dataclass(frozen=True)
class QuantizedWeight:
    """codes: (out, in), int8 in [−8, 7] or float8_e4m3fn. scale: (out, groups), as stored; may be negative."""

    codes: torch.Tensor
    scale: torch.Tensor

    def dequantize(self) -> torch.Tensor:
        """Weights as (out, in) float32."""
        out, groups = self.scale.shape
        return (self.codes.float().view(out, groups, -1) * self.scale.float().unsqueeze(-1)).view(out, -1)


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Whether `name`, or its last part, is one of `patterns`, or a ``re:`` pattern matches its whole or its start."""
    for pattern in patterns:
        if pattern.startswith("re:"):
            if re.match(pattern[3:], name):
                return True
        elif pattern in (name, name.rpartition(".")[2]):
            return True
    return False


@dataclass(frozen=True, kw_only=True)
class WeightOverride:
    """Linears that are stored in another way than the others of a recipe.

    modules: their names, or ``re:`` patterns, as in `WeightMethod.ignore`. weights: "int4", rounded by the recipe's
    method, or "fp8", rounded to nearest as the method `fp8` does. group_size: of "int4", needed there.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")  # pyright: ignore[reportUnannotatedClassAttribute]
    modules: Annotated[tuple[str, ...], Field(min_length=1)]
    weights: Literal["int4", "fp8"] = "int4"
    group_size: Annotated[int, Field(ge=8)] | Literal["channel"] | None = None

    def __post_init__(self) -> None:
        if (self.group_size is None) == (self.weights == "int4"):
            raise ValueError(
                "an override of weights int4 needs a group_size, a number or channel, and one of fp8 has none; weights "
                f"is {self.weights} and group_size {self.group_size}"
            )

    def scheme(self, activations: Activations) -> WeightScheme:
        """How these Linears are stored."""
        size = None if self.group_size in (None, "channel") else self.group_size
        return WeightScheme(self.weights, size, activations)


@dataclass(frozen=True, kw_only=True)
class WeightMethod:
    """Base of every method of the `weights` slot.

    group_size: a number of input channels, "channel", or "auto" (the largest of 128, 64, 32 that divides every Linear
    without an override).
    activations: "fp8" (e4m3 per token, dynamic) or "none".
    ignore: names of Linears to leave alone, or ``re:`` patterns matched against the full name.
    overrides: Linears that are stored in another way, see `WeightOverride`; the first that matches counts.

    A subclass says what it stores (`storage`), whether it looks at calibration data at all (`needs_data`), and whether
    it wants the float model's own outputs to compare with (`needs_reference`).
    """

    __pydantic_config__ = ConfigDict(extra="forbid")  # pyright: ignore[reportUnannotatedClassAttribute]
    storage: ClassVar[Literal["int4", "fp8"]] = "int4"
    needs_data: ClassVar[bool] = True
    needs_reference: ClassVar[bool] = False

    group_size: GroupSize = "auto"
    activations: Activations = "fp8"
    ignore: tuple[str, ...] = field(default=("lm_head",))
    overrides: tuple[WeightOverride, ...] = ()

    def override(self, name: str) -> WeightOverride | None:
        """The first override that matches a Linear, by its full name."""
        return next((item for item in self.overrides if matches(name, item.modules)), None)

    def scheme_of(self, name: str) -> WeightScheme:
        """How a Linear is stored, by its full name; `group_size` must have been resolved."""
        found = self.override(name)
        return self.scheme() if found is None else found.scheme(self.activations)

    def describe(self) -> str:
        """Short names of all that the recipe stores, as `WeightScheme.describe` writes them, e.g. ``W4A16 g64``."""
        schemes = [self.scheme(), *(item.scheme(self.activations) for item in self.overrides)]
        return " + ".join(dict.fromkeys(scheme.describe() for scheme in schemes))

    def scheme(self) -> WeightScheme:
        """The storage scheme of Linears without an override; `group_size` must have been resolved to a number or
        "channel".
        """
        if self.group_size == "auto":
            raise ValueError("group_size 'auto' must be resolved against a model first")
        group_size = None if self.group_size == "channel" or self.storage == "fp8" else self.group_size
        return WeightScheme(self.storage, group_size, self.activations)

    def quantize(self, block: Block) -> dict[str, QuantizedWeight]:
        """Quantized weights by Linear name, one for each of `block.linears`."""
        raise NotImplementedError


@dataclass(frozen=True)
class Figures:
    """One arithmetic beside exact attention on the same inputs: cosine of the outputs, Σ|difference| / Σ|exact|, and
    the signal-to-quantization-noise ratio in dB, None where there is no difference.
    """

    cosine: float
    relative_l1: float
    sqnr_db: float | None


@dataclass(frozen=True)
class AttentionPolicy:
    """How one attention layer runs its prefill.

    mode: of `kernels.attention`; "bf16" is what transformers would have run. min_tokens: calls of fewer queries run
    dense. tokens: queries it was judged on, 0 if it was not. tried: mode → figures. reason: why this mode.
    """

    mode: Mode
    min_tokens: int
    tokens: int = 0
    tried: dict[str, Figures] = field(default_factory=dict)
    reason: str = ""

    def as_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return asdict(self)

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> AttentionPolicy:
        """Reads `as_dict`. ValueError if it is something else."""
        try:
            tried = {mode: Figures(**figures) for mode, figures in content["tried"].items()}
            policy = cls(**{**content, "tried": tried})
        except (TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"an attention policy is damaged: {error}") from error
        if policy.mode not in MODES:
            raise ValueError(f"attention mode {policy.mode!r} is unknown to this kompakt; known: {', '.join(MODES)}")
        if not isinstance(policy.min_tokens, int) or policy.min_tokens < 1:
            raise ValueError(f"min_tokens is {policy.min_tokens!r} in an attention policy; it counts queries, from 1")
        return policy


@dataclass(frozen=True, kw_only=True)
class AttentionMethod:
    """Base of every method of the `attention` slot."""

    __pydantic_config__ = ConfigDict(extra="forbid")  # pyright: ignore[reportUnannotatedClassAttribute]

    @property
    def needs_data(self) -> bool:
        """Whether layers are judged on calibration text; if not, `choose` gets None."""
        raise NotImplementedError

    @property
    def modes(self) -> tuple[Mode, ...]:
        """Quantized arithmetics that it may choose."""
        raise NotImplementedError

    def choose(self, inputs: AttentionInputs | None, usable: Collection[Mode]) -> AttentionPolicy:
        """The policy of one attention layer. usable: modes that the device can run on such inputs."""
        raise NotImplementedError


@dataclass(frozen=True)
class CachePolicy:
    """How a model's key-value cache is kept.

    layers: attention module → its static tensors, see `KVCacheMethod.statics`; modules that are absent stay dense.
    """

    method: KVCacheMethod
    layers: dict[str, dict[str, torch.Tensor]]


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


def weight_methods() -> dict[str, type[WeightMethod]]:
    """Methods of the slot `weights`."""
    return methods_of(WeightMethod)


def attention_methods() -> dict[str, type[AttentionMethod]]:
    """Methods of the slot `attention`."""
    return methods_of(AttentionMethod)


def kv_cache_methods() -> dict[str, type[KVCacheMethod]]:
    """Methods of the slot `kv_cache` that quantize."""
    return methods_of(KVCacheMethod)
