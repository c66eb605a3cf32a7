"""One choice for every part, of the least total cost within a total loss: the multiple-choice knapsack problem.

With x_pc ∈ {0, 1}: minimise Σ cost_pc·x_pc, subject to Σ_c x_pc = 1 for every part p and Σ loss_pc·x_pc ≤ budget.
SciPy's `milp` (HiGHS) solves it by branch and bound, to a millionth of the cost unless it runs out of time. A choice
that another one of its part beats in cost and loss can never win and is left out, which keeps the problem small.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

GAP = 1e-6
"""Relative gap at which a solution counts as the best: a millionth of the cost."""
SECONDS = 60.0


def cheapest(costs: Sequence[Sequence[float]], losses: Sequence[Sequence[float]], budget: float) -> list[int] | None:
    """The index of the choice of each part; None if even the least losses together exceed the budget.

    costs, losses: one row per part, one number per choice, finite, losses from 0. Raises ValueError for numbers that
    are not, and RuntimeError if the solver gives up.
    """
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import coo_array

    _check(costs, losses)
    if sum(min(row) for row in losses) > budget:
        return None
    kept = [frontier(cost, loss) for cost, loss in zip(costs, losses, strict=True)]
    places = [(part, choice) for part, choices in enumerate(kept) for choice in choices]
    cost = np.array([costs[part][choice] for part, choice in places], dtype=float)
    loss = np.array([losses[part][choice] for part, choice in places], dtype=float)
    unit = max(cost.max(), 1e-30)
    loss_unit = budget if budget > 0 else 1.0
    rows = [part for part, _ in places]
    one_each = coo_array((np.ones(len(places)), (rows, range(len(places)))), shape=(len(costs), len(places)))
    found = milp(
        cost / unit,
        integrality=np.ones(len(places)),
        bounds=Bounds(0, 1),
        constraints=[
            LinearConstraint(one_each, 1, 1),  # pyright: ignore[reportArgumentType]
            LinearConstraint((loss / loss_unit)[None, :], -np.inf, budget / loss_unit),
        ],
        options={"mip_rel_gap": GAP, "time_limit": SECONDS},
    )
    if found.x is None:
        raise RuntimeError(f"the solver found no solution: {found.message}")
    chosen = {part: choice for (part, choice), value in zip(places, found.x, strict=True) if value > 0.5}
    return _within([chosen[part] for part in range(len(costs))], costs, losses, budget)


def frontier(costs: Sequence[float], losses: Sequence[float]) -> list[int]:
    """Choices of one part that no other one beats, by rising cost: each further one has a smaller loss."""
    order = sorted(range(len(costs)), key=lambda choice: (costs[choice], losses[choice]))
    kept = []
    for choice in order:
        if not kept or losses[choice] < losses[kept[-1]]:
            kept.append(choice)
    return kept


def _within(
    chosen: list[int], costs: Sequence[Sequence[float]], losses: Sequence[Sequence[float]], budget: float
) -> list[int]:
    """The solution, with losses really within the budget: the solver allows itself a millionth more."""
    chosen = list(chosen)
    while sum(row[choice] for row, choice in zip(losses, chosen, strict=True)) > budget:
        steps = [
            (costs[part][other] - costs[part][chosen[part]], part, other)
            for part, choices in enumerate(costs)
            for other in range(len(choices))
            if losses[part][other] < losses[part][chosen[part]]
        ]
        _, part, other = min(steps)
        chosen[part] = other
    return chosen


def _check(costs: Sequence[Sequence[float]], losses: Sequence[Sequence[float]]) -> None:
    if not costs or len(costs) != len(losses) or any(len(c) != len(v) or not c for c, v in zip(costs, losses)):
        raise ValueError("every part needs as many losses as costs, and one choice at least")
    if not all(np.isfinite(row).all() for row in (*costs, *losses)) or any(min(row) < 0 for row in losses):
        raise ValueError("costs and losses must be finite, and losses 0 or more")
