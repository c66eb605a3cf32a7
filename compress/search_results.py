"""What a search comes to: its result, JSON-able, and the recipe file."""

from __future__ import annotations

import datetime
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .assess import describe_text, save_json
from .pipeline import environment, package_version
from .recipe import Recipe
from .restore import LimitExceeded

if TYPE_CHECKING:
    from .searching import Search

LEAST = {"size": "the fewest bytes", "decode": "the fastest decoding", "prefill": "the fastest prefill"}
"""By target, in words."""


def summary(job: Search, choices: int) -> dict[str, Any]:
    """The result. LimitExceeded if there is none."""
    slots = job.space.slots
    base_cost = job.base_cost()
    within = [row for row in job.rows if row["within"] and row["recipe"] is not None]
    fitting = [row for row in within if (row["cost"], row["bytes"]) < (base_cost, job.base_bytes)]
    best, best_uniform = cheapest_row(fitting), cheapest_row([row for row in fitting if row["kind"] == "uniform"])
    if best is None:
        raise LimitExceeded(without_result(job, within, base_cost))
    counted = job.options.target == "size" and job.options.context is None
    return {
        "search": 2,
        "kompakt": package_version(),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "environment": environment(next(job.base.parameters()).device),
        "model": str(job.path),
        "limit": {"perplexity_increase": job.options.limit},
        "target": job.options.target,
        "conditions": None if counted else {"context": job.options.tokens, "batch": job.options.sequences},
        "slot": {"name": slots.slot, "choices": [choice.key for choice in slots.choices], "left_out": slots.left_out},
        "cost": job.costs.as_dict(),
        "recipe": job.recipe.model_dump(mode="json", exclude_none=True),
        "text": describe_text(job.evaluation, job.source, job.windows),
        "loss_windows": len(job.loss_windows),
        "choices": choices,
        "base_bytes": job.base_bytes,
        "base_cost": base_cost,
        "minutes": round((time.monotonic() - job.started) / 60, 2),
        "stopped": job.stopped,
        "rows": job.rows,
        "best": best["name"],
        "best_uniform": None if best_uniform is None else best_uniform["name"],
        "less_than_uniform": 1 - best["cost"] / (base_cost if best_uniform is None else best_uniform["cost"]),
    }


def without_result(job: Search, within: list[dict[str, Any]], base_cost: float) -> str:
    """Why there is no result, in words. within: what was measured and keeps to the limit; it costs too much."""
    more = f"; {job.stopped}, and the same command goes on from here" if job.stopped else ""
    if within:
        tried = ", ".join(f"{row['name']} {row['cost'] / base_cost:.2f}" for row in within)
        return (
            f"no recipe that was measured within {job.options.limit:.2%} costs less than the float model, "
            f"{job.costs.words}; times as much: {tried}{more}"
        )
    tried = ", ".join(f"{row['name']} {row['perplexity_increase']:+.2%}" for row in job.rows) or "nothing"
    return (
        f"no recipe that was measured keeps the increase of perplexity and its standard error within "
        f"{job.options.limit:.2%}: {tried}{more}"
    )


def cheapest_row(rows: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The one of least cost, of several such the one of fewest bytes; None without rows."""
    return min(rows, key=lambda row: (row["cost"], row["bytes"]), default=None)


def check_recipe_file(output: Path) -> None:
    """ValueError unless a recipe can be written there, and is not there yet."""
    if output.suffix not in (".yaml", ".yml"):
        raise ValueError(f"the recipe file {output} must end in .yaml")
    for file in (output, output.with_suffix(".json")):
        if file.exists():
            raise ValueError(f"{file} exists; choose another --output")
    if not output.absolute().parent.is_dir():
        raise ValueError(f"the folder of {output} does not exist")


def write_result(result: dict[str, Any], output: Path) -> None:
    """The best recipe as YAML, and beside it everything that was measured as JSON."""
    best = next(row for row in result["rows"] if row["name"] == result["best"])
    recipe = {**best["recipe"], "name": output.stem, "description": describe_best(result, best)}
    save_json(result, output.with_suffix(".json"))
    output.write_text(Recipe.load(recipe).to_yaml(), "utf-8")


def describe_best(result: dict[str, Any], best: dict[str, Any]) -> str:
    """A sentence for the recipe: the limit, and what was measured under which conditions."""
    text, limit = result["text"], result["limit"]["perplexity_increase"]
    return (
        f"searched for {LEAST[result['target']]} with perplexity up by {limit:.2%} at most; "
        f"{best['perplexity_increase']:+.2%} on {text['windows']} windows of {text['window']} tokens of "
        f"{text['source']}"
    )
