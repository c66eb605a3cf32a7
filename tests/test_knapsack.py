"""The solver against brute force, and what it refuses."""

from __future__ import annotations

import itertools
import random

import pytest

from kompakt.compress.knapsack import cheapest, frontier


def brute_force(costs, losses, budget):
    """The least cost of any combination within the budget; None if there is none."""
    found = [
        sum(row[choice] for row, choice in zip(costs, chosen))
        for chosen in itertools.product(*(range(len(row)) for row in costs))
        if sum(row[choice] for row, choice in zip(losses, chosen)) <= budget
    ]
    return min(found, default=None)


@pytest.mark.parametrize("seed", range(40))
def test_it_is_as_good_as_brute_force(seed):
    draw = random.Random(seed)
    parts = draw.randint(1, 6)
    sizes = [draw.randint(1, 4) for _ in range(parts)]
    costs = [[draw.randint(1, 10**6) for _ in range(size)] for size in sizes]
    losses = [[draw.choice((0.0, draw.random() * 1e-3, draw.random())) for _ in range(size)] for size in sizes]
    budget = draw.random() * sum(max(row) for row in losses)
    best = brute_force(costs, losses, budget)
    chosen = cheapest(costs, losses, budget)
    if best is None:
        assert chosen is None
        return
    assert chosen is not None
    assert sum(row[choice] for row, choice in zip(losses, chosen)) <= budget
    assert sum(row[choice] for row, choice in zip(costs, chosen)) <= best * (1 + 1e-6)


def test_a_budget_of_nothing_leaves_what_loses_nothing():
    assert cheapest([[9, 5, 1], [7, 3, 2]], [[0.0, 0.1, 0.2], [0.0, 0.0, 0.1]], 0.0) == [0, 1]
    assert cheapest([[9, 5]], [[0.2, 0.1]], 0.05) is None


def test_large_problems_are_solved_within_the_budget():
    draw = random.Random(7)
    costs = [[draw.randint(1000, 9000) * bits for bits in (16, 8, 5, 4)] for _ in range(300)]
    losses = [[0.0, *sorted(draw.random() ** 3 * scale for scale in (0.01, 0.2, 0.4))] for _ in range(300)]
    budget = 0.25 * sum(row[-1] for row in losses)
    chosen = cheapest(costs, losses, budget)
    assert chosen is not None
    spent = sum(row[choice] for row, choice in zip(losses, chosen))
    assert 0.99 * budget < spent <= budget  # what is left buys no further step


def test_dominated_choices_are_left_out():
    assert frontier([5, 4, 4, 9, 1], [0.2, 0.2, 0.1, 0.0, 0.3]) == [4, 2, 3]


@pytest.mark.parametrize(
    "costs, losses",
    [([[1.0]], [[1.0, 2.0]]), ([], []), ([[]], [[]]), ([[float("nan")]], [[0.0]]), ([[1.0]], [[-1.0]])],
)
def test_numbers_that_are_none_are_refused(costs, losses):
    with pytest.raises(ValueError, match="losses"):
        cheapest(costs, losses, 1.0)
