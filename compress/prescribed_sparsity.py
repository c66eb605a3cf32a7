"""Patterns that stand in for a search where there is nothing to search on: in a model that is timed on random tokens.

A search says nothing there, whether weights are random or not, so that the patterns are prescribed:

| method | what stands in |
|---|---|
| `triangle` | first half of the layers dense, the recipe's triangle in the others, as published for Llama 3.1 8B |
| `minference` | every head (1000, 200) keys and distances, estimated and indexed for every call as ever |

Published patterns have up to 6,096 distances, which stand together in a trained model. Those that a random one picks
stand alone and open two diagonals of tiles each; a hundred beyond the nearest hundred come to about a tenth of the
tiles of 131,072 tokens. What was visited is measured.

Source: TriangleMix (arXiv 2507.21526), MInference (arXiv 2407.02490).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..sparsify.method import SparsityMethod, SparsityPolicy
from ..sparsify.minference import MInference
from ..sparsify.patterns import FORCED_DISTANCES, Dense, Pattern, VerticalSlash
from ..sparsify.triangle import Triangle

KEYS, DISTANCES = 1000, 2 * FORCED_DISTANCES


@dataclass(frozen=True, kw_only=True)
class Prescribed(SparsityMethod):
    """The same pattern for all heads of the later layers. share: of the layers, those before, which are dense."""

    pattern: Pattern
    share: float

    @property
    def needs_data(self) -> bool:
        """Nothing is looked at."""
        return False

    def choose(self, profiles: Mapping[str, Any], heads: Mapping[str, int]) -> dict[str, SparsityPolicy]:
        """See `SparsityMethod.choose`."""
        first = round(self.share * len(heads))
        return {
            name: SparsityPolicy(
                ((self.pattern if place >= first else Dense()),) * count, self.min_length, reason="prescribed"
            )
            for place, (name, count) in enumerate(heads.items())
        }


def prescribed(method: SparsityMethod) -> tuple[SparsityMethod, str | None]:
    """What stands in for a method that searches, and a sentence that says so; a method that does not search, and None.

    ValueError for a search that nothing stands in for.
    """
    if not method.needs_data:
        return method, None
    if isinstance(method, Triangle):
        found = Prescribed(min_length=method.min_length, pattern=method.pattern, share=0.5)
        return found, (
            f"prescribed, not searched: the later half of the layers visits {method.sink} sinks, a window of "
            f"{method.window} and everything for the last {method.tail} queries, the others are dense"
        )
    if isinstance(method, MInference):
        found = Prescribed(min_length=method.min_length, pattern=VerticalSlash(KEYS, DISTANCES), share=0.0)
        return found, (
            f"prescribed, not searched: every head visits {KEYS} keys and {DISTANCES} distances, picked by the last "
            "queries of every prompt"
        )
    raise ValueError(f"nothing stands in for a search by {type(method).__name__} on random tokens")
