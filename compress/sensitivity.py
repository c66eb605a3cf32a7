"""Where the loss of a weight recipe sits: which projections, and which ranges of decoder layers.

The model is quantized once. Each part in turn gets its float Linears back, is measured beside the float model, and is
quantized again. The recovered share is 1 − loss/loss of everything quantized, loss being the increase of the mean NLL;
shares of parts need not add up to one. Where a method has folded channel scales, Linears of one layer can only be given
back together, so that only ranges of layers are measured.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from .calibration import CalibrationOptions
from .cpu_arithmetic import float32_linears
from .hf_decoder import decoder_layers
from .patching import patch
from .pipeline import Progress, quiet
from .recipe import EvaluationOptions, Recipe
from .sweep import Bench, conditions, increase, noted
from .walk import Undo

RANGES = 5


@dataclass(frozen=True)
class Part:
    """Linears that are given back together. kind: "nothing", "projection" or "layers". chosen: (layer, name) → bool."""

    name: str
    kind: str
    chosen: Callable[[nn.Module, str], bool]


@float32_linears()
def sensitivity(
    model: str | Path,
    weights: dict[str, Any],
    *,
    ranges: int = RANGES,
    calibration: CalibrationOptions | None = None,
    evaluation: EvaluationOptions | None = None,
    note: str = "",
    progress: Progress = quiet,
) -> dict[str, Any]:
    """Perplexity with each projection, and each of `ranges` ranges of layers, in float again; JSON-able.

    weights: the recipe's slot, `method` and its options. note: kept in the result and shown under the table. Raises
    ValueError for bad input.
    """
    if ranges < 1:
        raise ValueError(f"ranges is {ranges}; layers are divided into 1 or more")
    calibration = calibration or CalibrationOptions()
    recipe = Recipe.load({"name": "sensitivity", "weights": weights, "calibration": calibration.model_dump()})
    assert recipe.weights is not None
    bench = Bench.open(model, evaluation or EvaluationOptions())
    patched = patch(bench.subject, recipe, tokenizer=bench.tokenizer, progress=progress)
    found = parts(patched.undo, [layer for _, layer in decoder_layers(bench.subject)], ranges)
    rows = []
    for index, part in enumerate(found):
        progress("sensitivity", index, len(found), part.name)
        with patched.undo.given_back(part.chosen):
            rows.append({**describe(part, patched.undo), **bench.compare(progress)})
        rows[-1]["recovered"] = recovered(rows[-1], rows[0])
    progress("sensitivity", len(found), len(found), "done")
    heading = bench.heading(note, calibration if recipe.weights.needs_data else None)
    return {**heading, "weights": recipe.model_dump(mode="json")["weights"], "rows": rows}


def parts(undo: Undo, layers: list[nn.Module], ranges: int) -> list[Part]:
    """Nothing, then every projection unless scales were folded, then the ranges of layers."""
    found = [Part("nothing", "nothing", lambda layer, name: False)]
    names = list(dict.fromkeys(name for _, name, _ in undo.modules))
    tails = Counter(name.rpartition(".")[2] for name in names)
    for name in names if not undo.folded else ():
        tail = name.rpartition(".")[2]
        label = tail if tails[tail] == 1 else name
        found.append(Part(label, "projection", lambda layer, other, name=name: other == name))
    ranges = min(ranges, len(layers))
    for index in range(ranges):
        start, stop = (len(layers) * edge // ranges for edge in (index, index + 1))
        inside = {id(layer) for layer in layers[start:stop]}
        label = f"layer {start}" if stop == start + 1 else f"layers {start}–{stop - 1}"
        found.append(Part(label, "layers", lambda layer, name, inside=inside: id(layer) in inside))
    return found


def describe(part: Part, undo: Undo) -> dict[str, Any]:
    """Name, kind, number of Linears and share of the quantized weights of a part."""
    sizes = [(layer, name, sum(p.numel() for p in module.parameters())) for layer, name, module in undo.modules]
    chosen = [size for layer, name, size in sizes if part.chosen(layer, name)]
    share = sum(chosen) / sum(size for _, _, size in sizes)
    return {"part": part.name, "kind": part.kind, "modules": len(chosen), "weights_share": round(share, 4)}


def recovered(row: dict[str, Any], everything: dict[str, Any]) -> float | None:
    """Share of the loss that is gone, losses as differences of mean NLL; None if there is no loss."""
    lost, left = (math.log1p(item["perplexity_increase"]) for item in (everything, row))
    return None if lost <= 0 else 1 - left / lost


def part_table(result: dict[str, Any]) -> str:
    """Markdown: one row per part, in the order of the result."""
    lines = [
        "| in float again | Linears | share of weights | perplexity | loss recovered |",
        "|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        share = "–" if row["recovered"] is None else f"{row['recovered']:.0%}"
        lines.append(f"| {row['part']} | {row['modules']} | {row['weights_share']:.0%} | {increase(row)} | {share} |")
    weights = result["weights"]
    named = ("method", "group_size", "activations", "ignore")
    rest = "".join(f", {key} {value}" for key, value in weights.items() if key not in named)
    scheme = f"{weights['method']}, group size {weights['group_size']}, activations {weights['activations']}{rest}"
    return "\n".join([*lines, "", f"Everything else quantized with {scheme}. {conditions(result)}{noted(result)}"])
