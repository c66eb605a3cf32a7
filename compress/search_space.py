"""What a search may choose: parts of a model, ways to store them, what each costs, and the recipe that says so.

A part is the Linears of a decoder layer that read the same input: q, k and v; o; gate and up; down. vLLM multiplies
those at once and wants them stored alike. A recipe gets its most frequent choice as the rule and the others as
`overrides` and `ignore`, module names folded into patterns.

Bytes of a part add up over its Linears: codes, scales and shapes as packed. What they cost: `search_costs.py`.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import torch

from ..quant.method import Activations, WeightMethod, WeightScheme, matches
from .linear import CompressedLinear
from .recipe import Recipe

GROUP_SIZES: tuple[int | str, ...] = (32, 64, 128, "channel")


@dataclass(frozen=True)
class Choice:
    """A way to store Linears. group_size: of int4, a number or "channel"."""

    weights: Literal["float", "fp8", "int4"]
    group_size: int | str | None = None

    @property
    def key(self) -> str:
        """Name in tables and results."""
        if self.weights != "int4":
            return self.weights
        return "int4 channel" if self.group_size == "channel" else f"int4 g{self.group_size}"

    def fits(self, in_features: int) -> bool:
        """Whether its groups divide the inputs of a Linear."""
        return not isinstance(self.group_size, int) or in_features % self.group_size == 0

    def scheme(self, activations: Activations) -> WeightScheme:
        """How a Linear is stored; not for float."""
        assert self.weights != "float"
        return WeightScheme(self.weights, self.group_size if isinstance(self.group_size, int) else None, activations)


FLOAT, FP8 = Choice("float"), Choice("fp8")


@dataclass(frozen=True)
class Part:
    """Linears that take one choice. names: full. shapes: (out, in) each. dtype: of their float weights."""

    names: tuple[str, ...]
    shapes: tuple[tuple[int, int], ...]
    dtype: torch.dtype

    @property
    def key(self) -> str:
        """The names as one."""
        return "+".join(self.names)

    def choices(self, offered: Iterable[Choice]) -> list[Choice]:
        """Those whose groups divide all inputs."""
        return [choice for choice in offered if all(choice.fits(columns) for _, columns in self.shapes)]

    def bytes(self, choice: Choice, activations: Activations) -> int:
        """What the weights take, as they are counted everywhere: from the tensors of a packed Linear."""
        return sum(linear_bytes(shape, choice, activations, self.dtype) for shape in self.shapes)


@cache
def linear_bytes(shape: tuple[int, int], choice: Choice, activations: Activations, dtype: torch.dtype) -> int:
    """Of the weight of one Linear, its bias left out. shape: (out, in)."""
    rows, columns = shape
    if choice.weights == "float":
        return rows * columns * dtype.itemsize
    scheme = choice.scheme(activations)
    return CompressedLinear(columns, rows, bias=False, scheme=scheme, dtype=dtype, device="meta").stored_bytes


def offered(group_sizes: Sequence[int | str], *, keep_float: bool = True) -> list[Choice]:
    """Choices from the most bytes to the fewest. ValueError for group sizes that are none."""
    for size in group_sizes:
        if size != "channel" and (not isinstance(size, int) or size < 8):
            raise ValueError(f"group size {size!r} is neither channel nor a number of input channels from 8")
    numbers = sorted({size for size in group_sizes if isinstance(size, int)})
    last = [Choice("int4", "channel")] if "channel" in group_sizes else []
    return [*([FLOAT] if keep_float else []), FP8, *(Choice("int4", size) for size in numbers), *last]


def recipe_for(base: Recipe, assignment: Mapping[Part, Choice], name: str) -> Recipe | None:
    """`base` with Linears stored as `assignment` says; None if all of them stay float and nothing else is compressed.

    base: its weight method rounds whatever becomes INT4.
    """
    names: dict[Choice, list[str]] = {}
    counts: Counter[Choice] = Counter()
    for part, choice in assignment.items():
        names.setdefault(choice, []).extend(part.names)
        counts[choice] += sum(rows * columns for rows, columns in part.shapes)
    data: dict[str, Any] = {**base.model_dump(mode="json", exclude_none=True), "name": name}
    int4 = [choice for choice, _ in counts.most_common() if choice.weights == "int4"]
    ignored = [*data["weights"]["ignore"], *patterns(names.get(FLOAT, []))]
    if not int4 and FP8 not in names:
        del data["weights"]
        return Recipe.load(data) if any(slot in data for slot in ("attention", "kv_cache", "sparsity")) else None
    if not int4:
        data["weights"] = {"method": "fp8", "activations": data["weights"]["activations"], "ignore": ignored}
    else:
        rule, *others = int4
        overrides: list[dict[str, Any]] = [
            {"modules": patterns(names[choice]), "weights": "int4", "group_size": choice.group_size}
            for choice in others
        ]
        if FP8 in names:
            overrides.append({"modules": patterns(names[FP8]), "weights": "fp8"})
        data["weights"] |= {"group_size": rule.group_size, "ignore": ignored, "overrides": overrides}
    recipe = Recipe.load(data)
    check_assignment(recipe.weights, assignment)
    return recipe


def check_assignment(weights: WeightMethod | None, assignment: Mapping[Part, Choice]) -> None:
    """That a recipe stores every Linear as it was meant to."""
    assert weights is not None
    for part, choice in assignment.items():
        for name in part.names:
            kept = matches(name, weights.ignore)
            assert kept == (choice.weights == "float"), name
            assert kept or weights.scheme_of(name) == choice.scheme(weights.activations), name


def patterns(names: Iterable[str]) -> list[str]:
    """Patterns that match these modules of numbered layers and no other: ``re:model\\.layers\\.(0|3)(\\.mlp)$``."""
    layers: dict[tuple[str, str], list[int]] = {}
    plain = []
    for name in names:
        found = re.fullmatch(r"(.*?\.)(\d+)(\..*)", name)
        if found is None:
            plain.append(name)
        else:
            layers.setdefault((found[1], found[3]), []).append(int(found[2]))
    tails: dict[tuple[str, tuple[int, ...]], list[str]] = {}
    for (head, tail), numbers in layers.items():
        tails.setdefault((head, tuple(sorted(numbers))), []).append(tail)
    result = list(plain)
    for (head, numbers), found in tails.items():
        inside = "|".join(map(str, numbers))
        ends = "|".join(re.escape(tail) for tail in found)
        result.append(f"re:{re.escape(head)}({inside})({ends})$")
    return result
