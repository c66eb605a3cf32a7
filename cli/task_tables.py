"""Tasks that lm-eval ran, and results of the base that were kept, added to what `evaluate` shows."""

from __future__ import annotations

from typing import Any

from rich.text import Text

from . import attention_tables
from .tables import Shown, percent, spread, table


def evaluation(content: dict[str, Any]) -> Shown:
    """The result of `evaluate`."""
    return [*attention_tables.evaluation(content), *harness(content), *kept(content)]


def harness(content: dict[str, Any]) -> Shown:
    """A row for each task and metric."""
    if "harness" not in content:
        return []
    found = content["harness"]
    against = content["against"] is not None
    rows = table(found["harness"], "", "base" if against else "", "model", "difference" if against else "", "")
    for row in found["results"]:
        shots = "" if not row["num_fewshot"] else f", {row['num_fewshot']}-shot"
        way = "" if row["filter"] == "none" else f" ({row['filter']})"
        share = row["metric"].startswith(("acc", "exact_match"))
        show = percent if share else spread
        difference = row.get("difference")
        rows.add_row(
            Text(f"{row['task']}{shots} {row['metric']}{way}"),
            show(row["base"][0], row["base"][1]) if "base" in row else "",
            show(row["model"][0], row["model"][1]),
            "" if difference is None else show(difference[0], difference[1], "+.2f" if share else "+.4g"),
            f"{row['items']} items{recovered(row)}",
        )
    return ["", rows]


def recovered(row: dict[str, Any]) -> str:
    """What is left of the base's value, in words."""
    if "recovery" not in row:
        return ""
    value, stderr = row["recovery"]
    return f"; {percent(value, stderr, '.1f')} of the base"


def kept(content: dict[str, Any]) -> Shown:
    """Which results of the base were not measured now."""
    if "kept_base" not in content:
        return []
    found = content["kept_base"]
    count = found["results"]
    return [
        f"{count} {'result' if count == 1 else 'results'} of the base (tasks, retrieval) kept since {found['oldest']}, "
        "of the same model, items, versions and device; --no-kept-base measures again."
    ]
