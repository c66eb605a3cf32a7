"""One model, many sparse patterns, one table: what visiting fewer keys costs, at equal numbers of tiles.

The layers are looked at once. At every level, a share of the causal tiles, stand three rows that visit as many:

    searched   heads share the tiles, patterns and budgets where they take most error away (`sparsify/minference.py`)
    uniform    every head a vertical-slash pattern of the same number of tiles, its lines picked online as well
    a_shape    every head the same sinks and window

and beside them `triangle` as its recipe finds it. Perplexity is compared window by window with the float model, over
all positions and over each quarter of them, since what a window hides shows late in a text; copies and needles
(`evaluation_retrieval.py`) show what perplexity does not. Windows count as long enough, however short they are.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..sparsify.method import SparsityPolicy
from ..sparsify.minference import MInference, figures_of
from ..sparsify.patterns import AShape, VerticalSlash
from ..sparsify.search import LEVELS, Profile
from ..sparsify.triangle import Triangle
from .assess import Asked
from .calibration import CalibrationOptions, calibration_tokens
from .cpu_arithmetic import float32_linears
from .evaluation import ratio_mean, scoring_mode, token_nll
from .evaluation_retrieval import Answer, answer_cases, difference, summary
from .hf_attention import at_least, attention_in_use
from .hf_cache_hooks import running
from .layer_policies import combined
from .pipeline import Progress, quiet
from .recipe import EvaluationOptions
from .retrieval_cases import Case, RetrievalOptions
from .sparsity_calibration import Observed, chosen_from, observed
from .sweep import Bench, noted

QUARTERS = 4


@float32_linears()
def sparsity_sweep(
    model: str | Path,
    *,
    levels: Sequence[float],
    calibration: CalibrationOptions,
    evaluation: EvaluationOptions,
    retrieval: RetrievalOptions | None = None,
    note: str = "",
    progress: Progress = quiet,
) -> dict[str, Any]:
    """Densities, perplexities by position and retrieval of every row; JSON-able. levels: of `search.LEVELS`. Raises
    ValueError for bad input.
    """
    unknown = [level for level in levels if level not in LEVELS]
    if unknown or not levels:
        raise ValueError(f"level {unknown[0] if unknown else 'none'} is unknown; known: {', '.join(map(str, LEVELS))}")
    bench = Bench.open(model, evaluation)
    asked = Asked.read(bench.tokenizer, retrieval, None)
    asked.check(bench.base)
    tokens = calibration_tokens(bench.tokenizer, calibration).tokens
    device = next(bench.subject.parameters()).device
    started = time.perf_counter()
    seen = observed(bench.subject, MInference(), tokens, device=device, progress=progress)
    seconds = time.perf_counter() - started
    rows = candidates_of(seen, levels)
    static = Triangle()
    rows["triangle"] = chosen_from(observed(bench.subject, static, tokens, device=device, progress=progress), static)
    base = nll_by_position(bench.base, bench.windows)
    answers = {test: answer_cases(bench.base, cases) for test, cases in asked.cases.items()}
    found = []
    for place, (label, policies) in enumerate(rows.items()):
        progress("sweep", place, len(rows), label)
        found.append({"label": label, **_row(bench, policies, base, asked.cases, answers)})
    described = None
    if retrieval is not None:
        described = {"source": asked.sources["retrieval"], "lengths": list(retrieval.lengths), "seed": retrieval.seed}
        described |= {"tests": list(retrieval.tests), "samples": retrieval.samples, "depths": retrieval.depths}
    return {
        "bench": "sparsity",
        **bench.heading(note, calibration),
        "retrieval": described,
        "search_seconds": round(seconds, 1),
        "threads": torch.get_num_threads(),
        "base_perplexity": float(torch.exp(base.double().mean())),
        "rows": found,
    }


def candidates_of(seen: Observed, levels: Sequence[float]) -> dict[str, dict[str, SparsityPolicy]]:
    """Policies of every row but the last, by label."""
    found: dict[str, dict[str, SparsityPolicy]] = {}
    for level in levels:
        alike = {
            "uniform": {name: _same(profile, level, VerticalSlash) for name, profile in seen.profiles.items()},
            "a_shape": {name: _same(profile, level, AShape) for name, profile in seen.profiles.items()},
        }
        density = mean_cost(seen.profiles, alike["uniform"])
        method = MInference(density=density + 1e-9)
        found[f"searched {level:.3g}"] = chosen_from(seen, method)
        for label, places in alike.items():
            found[f"{label} {level:.3g}"] = {
                name: SparsityPolicy(
                    tuple(head[places[name]] for head in profile.candidates),
                    method.min_length,
                    profile.tokens,
                    figures_of(profile, [places[name]] * len(profile.candidates)),
                    f"the same {label} for all heads",
                )
                for name, profile in seen.profiles.items()
            }
    return found


def _same(profile: Profile, level: float, kind: type) -> int:
    """The first candidate of a level and kind."""
    places = [place for place, item in enumerate(profile.levels) if item == level]
    return next(place for place in places if isinstance(profile.candidates[0][place], kind))


def mean_cost(profiles: dict[str, Profile], places: dict[str, int]) -> float:
    """Tiles over those of dense attention, of one candidate per layer, on the documents that are chosen on."""
    costs = [profile.fit.cost[:, places[name]] / profile.fit.tiles for name, profile in profiles.items()]
    return float(torch.cat(costs).mean())


@torch.no_grad()
def nll_by_position(model: Any, windows: Tensor) -> Tensor:
    """(windows, window − 1) negative log-likelihood in nats of every token but the first, a window at a time."""
    rows = []
    with scoring_mode(model):
        for window in windows:
            ids = window[None].to(next(model.parameters()).device)
            logits = model(ids, use_cache=False).logits[0, :-1]
            parts = zip(logits.split(512), ids[0, 1:].split(512), strict=True)
            rows.append(torch.cat([token_nll(part, labels).float().cpu() for part, labels in parts]))
    return torch.stack(rows)


def _row(
    bench: Bench,
    policies: dict[str, SparsityPolicy],
    base: Tensor,
    cases: dict[str, list[Case]],
    answers: dict[str, list[Answer]],
) -> dict[str, Any]:
    with running(bench.subject, combined({}, policies)):
        with at_least(bench.subject, bench.windows.shape[1]):
            change = nll_by_position(bench.subject, bench.windows) - base
        used = attention_in_use(bench.subject)
        given = {test: answer_cases(bench.subject, cases[test]) for test in answers}
    assert used is not None
    figures = [policy.figures for policy in policies.values() if policy.figures is not None]
    found: dict[str, Any] = {
        "density": used.get("sparsity", {}).get("density"),
        "attention": used,
        "recall": sum(item.recall for item in figures) / len(figures) if figures else None,
        "error": sum(item.error for item in figures) / len(figures) if figures else None,
        **_increase(change),
        "quarters": [_increase(part) for part in change.tensor_split(QUARTERS, dim=1)],
        "patterns": _counted(policies),
    }
    if answers:
        found["retrieval"] = {test: _by_length(answers[test], given[test]) for test in answers}
    return found


def _by_length(base: list[Answer], given: list[Answer]) -> list[dict[str, Any]]:
    """One row per length: what was found again, by the base model as well, and the difference."""
    rows = []
    for length in dict.fromkeys(answer.length for answer in base):
        sides = [[answer for answer in side if answer.length == length] for side in (base, given)]
        compared = difference(*sides).as_dict()
        both = (summary(side).as_dict() for side in sides)
        rows.append({"length": length, **dict(zip(("base", "model"), both, strict=True)), "difference": compared})
    return rows


def _increase(change: Tensor) -> dict[str, Any]:
    """Relative increase of the perplexity and its standard error over windows, paired; None for a single one."""
    mean, stderr = ratio_mean([float(row.sum()) for row in change.double()], [change.shape[1]] * len(change))
    increase = float(torch.tensor(mean, dtype=torch.float64).expm1())
    return {
        "perplexity_increase": increase,
        "perplexity_increase_stderr": None if stderr is None else stderr * (1 + increase),
    }


def _counted(policies: dict[str, SparsityPolicy]) -> dict[str, int]:
    """Heads by pattern."""
    found: dict[str, int] = {}
    for policy in policies.values():
        for head in policy.heads:
            found[head.key] = found.get(head.key, 0) + 1
    return dict(sorted(found.items()))


def sparsity_table(result: dict[str, Any]) -> str:
    """Rows are patterns: tiles visited, recall, perplexity over all positions and the last quarter, and each test."""
    tests = [(test, row["length"]) for test, found in result["rows"][0].get("retrieval", {}).items() for row in found]
    head = ["patterns", "tiles", "recall", "perplexity", *(f"quarter {place + 1}" for place in range(QUARTERS))]
    head += [f"{test} at {length:,}" for test, length in tests]
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for row in result["rows"]:
        cells = [
            row["label"],
            "100 %" if row["density"] is None else f"{100 * row['density']:.1f} %",
            "" if row["recall"] is None else f"{100 * row['recall']:.1f} %",
        ]
        for part in (row, *row["quarters"]):
            stderr = part["perplexity_increase_stderr"]
            spread = "" if stderr is None else f" ± {100 * stderr:.2f}"
            cells.append(f"{100 * part['perplexity_increase']:+.2f}{spread} %")
        for test, length in tests:
            (found,) = [item for item in row["retrieval"][test] if item["length"] == length]
            both = (found[side]["token_accuracy"] for side in ("model", "base"))
            cells.append(" of ".join(f"{share:.0%}" for share in both))
        lines.append(f"| {' | '.join(cells)} |")
    text, calibration = result["text"], result["calibration"]
    lines += [
        "",
        f"Perplexity over the base model's {result['base_perplexity']:.2f}, ± standard error of the paired difference; "
        f"{text['source']}, {text['windows']} windows of {text['window']:,} tokens; searched on "
        f"{calibration['samples']} × {calibration['length']:,} tokens of {calibration['source']} in "
        f"{result['search_seconds']:.0f} s on {result['threads']} threads; {result['environment']['device']}, torch "
        f"{result['environment']['torch']}, {result['date']}. Tiles are those of the sparse layers, over dense "
        "attention's, on these windows and tests; recall is on calibration text; of tests, shares of right tokens "
        f"beside the base model's.{noted(result)}",
    ]
    return "\n".join(lines)
