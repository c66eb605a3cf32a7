"""TriangleMix: the same static pattern for all heads of the later layers; nothing is estimated.

From `first_layer` on a query sees the first `sink` keys and the `window` nearest, and the last `tail` queries see all.
"auto" takes the earliest layer from which on the output of every layer keeps, on calibration text, within
`max_error` of dense attention's:  ‖difference‖ / ‖exact‖. None: all stay dense.

Source: TriangleMix (arXiv 2507.21526), which finds the layer by a gradient; here it is the error of the output.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Literal

from pydantic import Field

from .method import SparseInputs, SparsityMethod, SparsityPolicy
from .minference import figures_of
from .patterns import Dense, TriShape
from .search import Profile, Sums, measure

SINK, WINDOW, TAIL = 8, 512, 128
MAX_ERROR = 0.25


@dataclass(frozen=True, kw_only=True)
class Triangle(SparsityMethod):
    """TriangleMix.

    first_layer: number of the first sparse layer, or "auto". max_error: what "auto" allows a layer. sink, window, tail:
    tokens.
    """

    first_layer: Annotated[int, Field(ge=0)] | Literal["auto"] = "auto"
    max_error: Annotated[float, Field(gt=0)] = MAX_ERROR
    sink: Annotated[int, Field(ge=0)] = SINK
    window: Annotated[int, Field(ge=1)] = WINDOW
    tail: Annotated[int, Field(ge=0)] = TAIL

    def __post_init__(self) -> None:
        """ValueError for a threshold that nothing would be held to."""
        if self.first_layer != "auto" and self.max_error != MAX_ERROR:
            raise ValueError(
                f"max_error {self.max_error} has no effect with first_layer {self.first_layer}; only auto looks at"
                " errors"
            )

    @property
    def needs_data(self) -> bool:
        """Only "auto" looks at the layers."""
        return self.first_layer == "auto"

    @property
    def pattern(self) -> TriShape:
        """Of every head of a sparse layer."""
        return TriShape(self.sink, self.window, self.tail)

    def profile(self, inputs: SparseInputs) -> Profile:
        """The pattern on every document; none is fitted to any of them."""
        documents, heads, tokens = inputs.query.shape[:3]
        found = Profile([[self.pattern]] * heads, [0.0], Sums.zero(heads, 1), Sums.zero(heads, 1), tokens, documents)
        for place in range(documents):
            row = slice(place, place + 1)
            single = replace(inputs, query=inputs.query[row], key=inputs.key[row], value=inputs.value[row])
            checks = place == documents - 1 and documents > 1
            measure(single, found.candidates, found.check if checks else found.fit)
        return found

    def choose(self, profiles: Mapping[str, Profile | None], heads: Mapping[str, int]) -> dict[str, SparsityPolicy]:
        """See `SparsityMethod.choose`."""
        names = list(heads)
        figures = {
            name: figures_of(profile, [0] * heads[name]) for name, profile in profiles.items() if profile is not None
        }
        if self.first_layer == "auto":
            errors = {name: fit_error(profile) for name, profile in profiles.items() if profile is not None}
            first = len(names)
            while first > 0 and errors.get(names[first - 1], float("inf")) <= self.max_error:
                first -= 1
            reason = f"from layer {first} on every layer's error is at most {self.max_error}"
            if first == len(names):
                reason = f"the last layer's error is more than {self.max_error} already"
        else:
            first, reason = self.first_layer, "named in the recipe"
            if first >= len(names):
                raise ValueError(f"first_layer is {first}; the model has {len(names)} attention layers, from 0")
        found = {}
        for place, name in enumerate(names):
            pattern = self.pattern if place >= first else Dense()
            seen = figures.get(name) if place >= first else None
            found[name] = SparsityPolicy((pattern,) * heads[name], self.min_length, 0, seen, reason)
        return found


def fit_error(profile: Profile) -> float:
    """‖difference‖ / ‖exact‖ of a layer with its only candidate."""
    return float((profile.fit.error.sum() / profile.fit.norm.sum().clamp_min(1e-30)).sqrt())
