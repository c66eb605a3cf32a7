"""MInference: a sparse pattern and a budget for every head, searched offline, its lines picked online.

*Search.* Every head is shown candidates of several families at equal cost (`search.py`), level by level. With `recall`
it takes the first level at which the candidate with the smallest error of the attention output also visits so much of
the dense probabilities, and stays dense where none does. With `density` all heads of the model share one budget of
tiles, and it goes where it takes most error away: the candidates minimise Σ error²/‖layer‖² + λ · tiles, λ such that
the budget is met. What was chosen is checked on a document that took no part.

*In use.* Vertical-slash heads pick keys and distances from the last 64 queries of each call, block heads tiles from
means. Budgets grow with the length of the prompt beyond that of calibration, so that the density stays.

Departures: the objective of the paper, not of its published code (mass of attention in rows from 2,500 on); budgets of
A-shape heads are kept as such; no attention map exists at any time; all batch rows, chunked prefill, grouped KV heads.

Source: MInference (arXiv 2407.02490), section 3.2; budgets by recall as in Qwen2.5-1M (2501.15383), section 4.2.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Literal

import torch
from pydantic import Field

from ..kernels.line_scores import line_scores
from .formats import read_published
from .method import SparseFigures, SparseInputs, SparsityMethod, SparsityPolicy
from .patterns import Dense
from .search import LEVELS, Profile, Sums, candidates, measure, whole_extent

RECALL = 0.95


@dataclass(frozen=True, kw_only=True)
class MInference(SparsityMethod):
    """MInference.

    recall: share of the dense probabilities that a head is to visit; density: instead, share of the causal tiles that
    all heads together visit. families: of patterns to choose from. file: published patterns (MInference's JSON, or a
    Qwen config) instead of a search.
    """

    recall: Annotated[float, Field(gt=0, lt=1)] = RECALL
    density: Annotated[float, Field(gt=0, lt=1)] | None = None
    families: tuple[Literal["a_shape", "vertical_slash", "block"], ...] = ("a_shape", "vertical_slash")
    file: str | None = None

    def __post_init__(self) -> None:
        """ValueError for options that contradict each other."""
        if not self.families:
            raise ValueError("families is empty; name some of a_shape, vertical_slash, block")
        if self.density is not None and self.recall != RECALL:
            raise ValueError(f"recall {self.recall} has no effect with density {self.density}; leave one of them out")
        if self.file is not None and (self.density is not None or self.recall != RECALL):
            raise ValueError(f"patterns of {self.file} are not searched; leave recall and density out")

    @property
    def needs_data(self) -> bool:
        """Published patterns need none."""
        return self.file is None

    def profile(self, inputs: SparseInputs) -> Profile:
        """Candidates of a layer on every document; the last one checks, if there are several."""
        documents = inputs.query.shape[0]
        tokens = inputs.query.shape[2]
        found: Profile | None = None
        for place in range(documents):
            row = slice(place, place + 1)
            single = replace(inputs, query=inputs.query[row], key=inputs.key[row], value=inputs.value[row])
            if found is None:
                extent = whole_extent(tokens, inputs.query.device)
                _, slash = line_scores(single.query, single.key, extent, scaling=inputs.scaling)
                patterns, levels = candidates(slash[0], self.families)
                shape = (len(patterns), len(levels))
                found = Profile(patterns, levels, Sums.zero(*shape), Sums.zero(*shape), tokens, documents)
            checks = place == documents - 1 and documents > 1
            measure(single, found.candidates, found.check if checks else found.fit)
        assert found is not None
        return found

    def choose(self, profiles: Mapping[str, Profile | None], heads: Mapping[str, int]) -> dict[str, SparsityPolicy]:
        """See `SparsityMethod.choose`."""
        if self.file is not None:
            return self.published(heads)
        known = {name: profile for name, profile in profiles.items() if profile is not None}
        if self.density is None:
            picked = {name: by_recall(profile, self.recall) for name, profile in known.items()}
            reason = f"the cheapest level with a recall of {self.recall}"
        else:
            picked = by_density(known, self.density)
            reason = f"least error at {self.density:.0%} of the model's tiles"
        return {
            name: SparsityPolicy(
                tuple(profile.candidates[head][place] for head, place in enumerate(picked[name])),
                self.min_length,
                profile.tokens,
                figures_of(profile, picked[name]),
                reason,
            )
            for name, profile in known.items()
        }

    def published(self, heads: Mapping[str, int]) -> dict[str, SparsityPolicy]:
        """Policies from `file`. ValueError if it does not fit the model."""
        assert self.file is not None
        layers = read_published(self.file)
        if len(layers) != len(heads):
            raise ValueError(f"{self.file} has patterns for {len(layers)} layers, the model has {len(heads)}")
        found = {}
        for (name, count), patterns in zip(heads.items(), layers, strict=True):
            if patterns and max(patterns) >= count:
                raise ValueError(f"{self.file} names head {max(patterns)} of {name}, which has {count}")
            every = tuple(patterns.get(head, Dense()) for head in range(count))
            found[name] = SparsityPolicy(every, self.min_length, 0, None, "published patterns")
        return found


def by_recall(profile: Profile, target: float) -> list[int]:
    """The candidate of each head: least error of the first level that reaches the target."""
    recall = profile.fit.recall / profile.fit.queries
    picked = []
    for head in range(len(profile.candidates)):
        place = len(profile.levels) - 1
        for level in LEVELS:
            same = [number for number, item in enumerate(profile.levels) if item == level]
            best = min(same, key=lambda number: float(profile.fit.error[head, number]))
            cheaper = float(profile.fit.cost[head, best]) < profile.fit.tiles
            if cheaper and float(recall[head, best]) >= target:
                place = best
                break
        picked.append(place)
    return picked


def by_density(profiles: Mapping[str, Profile], density: float) -> dict[str, list[int]]:
    """The candidates of all heads that minimise the error within a share of all tiles."""
    errors = [profile.fit.error / profile.fit.norm.sum().clamp_min(1e-30) for profile in profiles.values()]
    errors = torch.cat(errors)
    costs = torch.cat([profile.fit.cost / profile.fit.tiles for profile in profiles.values()])
    least = float(costs.amin(dim=1).mean())
    if least > density:
        tokens = max(profile.tokens for profile in profiles.values())
        raise ValueError(
            f"density {density} cannot be met: on {tokens:,} tokens the cheapest patterns visit {least:.1%} of the "
            "tiles; calibrate on longer text, or allow more"
        )
    low, high = 1e-18, 1e6
    while high > low * 1.0001:
        middle = (low * high) ** 0.5
        place = (errors + middle * costs).argmin(dim=1)
        spent = float(costs.gather(1, place[:, None]).mean())
        low, high = (middle, high) if spent > density else (low, middle)
    place = (errors + high * costs).argmin(dim=1)
    parts = place.split([len(profile.candidates) for profile in profiles.values()])
    return {name: part.tolist() for name, part in zip(profiles, parts, strict=True)}


def figures_of(profile: Profile, picked: list[int]) -> SparseFigures:
    """Of the chosen candidates, on the document that took no part, or where there is none on those that did."""
    held_out = profile.check.queries > 0
    sums = profile.check if held_out else profile.fit
    place = torch.tensor(picked)[:, None]
    recall, error, cost = (item.gather(1, place) for item in (sums.recall, sums.error, sums.cost))
    return SparseFigures(
        recall=float(recall.mean() / sums.queries),
        error=float((error.sum() / sums.norm.sum().clamp_min(1e-30)).sqrt()),
        density=float(cost.mean() / sums.tiles),
        tokens=sums.queries,
        held_out=held_out,
    )
