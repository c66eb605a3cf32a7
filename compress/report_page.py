"""The report as one HTML page: the template `report.html.jinja`, the charts, and how numbers are written.

The page holds everything it needs, loads nothing and runs no script.
"""

from __future__ import annotations

from collections import Counter
from importlib import resources
from itertools import pairwise
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from .card import percent, spread
from .report_charts import Axis, Point, bars_chart, map_chart, padded, pareto, points_chart, stack_chart

TEMPLATE = "report.html.jinja"
GENERATOR = "kompakt report"
UNITS = (("GB", 1e9), ("MB", 1e6), ("kB", 1e3), ("B", 1.0))
PARTS = 4
"""Kinds of modules that a chart of sizes tells apart; the rest is summed."""
SMALL = 0.01
"""Share of the bytes below which a kind of modules is not drawn on its own."""
KINDS = 4
"""Patterns that a map of heads tells apart."""
EQUAL = 0.001
"""Relative difference of sizes that no comparison counts."""


def page(content: dict[str, Any]) -> str:
    """HTML of what `reporting.report` found."""
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"size": size, "spread": spread, "percent": percent}
    template = environment.from_string((resources.files("kompakt.compress") / TEMPLATE).read_text("utf-8"))
    return template.render(
        content=content,
        generator=GENERATOR,
        several=len(content["directories"]) > 1,
        groups=[{**group, "chart": quality_chart(group)} for group in content["comparisons"]["quality"]],
        speeds=[{**group, "chart": speed_chart(group)} for group in content["comparisons"]["speed"]],
        alone=not_compared(content),
        charts=[charts(item) for item in content["directories"]],
    )


def write_page(content: dict[str, Any], file: Path) -> None:
    """Writes the page, whole or not at all. ValueError if something else is in its place, or it cannot be written."""
    if file.exists():
        known = file.is_file() and f'content="{GENERATOR}"' in file.read_text("utf-8", errors="replace")[:2000]
        if not known:
            raise ValueError(f"{file} exists and is not a report of kompakt; it is not overwritten")
    text, partial = page(content), file.with_name(f".{file.name}.partial")
    try:
        partial.write_text(text, "utf-8")
        partial.replace(file)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise ValueError(f"{file} cannot be written: {error.strerror}") from error


def not_compared(content: dict[str, Any]) -> list[str]:
    """Sentences about directories that cannot be set beside the others, and why."""
    groups = content["comparisons"]["quality"]
    names = [item["name"] for item in content["directories"]]
    measured = {member["name"] for group in groups for member in group["members"]}
    found = [
        f"{name} has no comparison with a base model under stated conditions." for name in names if name not in measured
    ]
    if len(groups) > 1 and not any(len(group["members"]) == len(names) for group in groups):
        found.append(
            "No evaluation was made of all of them under the same conditions; those that differ are not drawn together."
        )
    for index, group in enumerate(groups):
        for other in groups[:index]:
            if group["conditions"] == other["conditions"]:
                one, two = group["members"][0]["name"], other["members"][0]["name"]
                found.append(
                    f"{one} and {two} name the same text and windows, but their base models have perplexities of "
                    f"{group['base_perplexity']:.3f} and {other['base_perplexity']:.3f}: not the same measurement."
                )
    return found


def unit_of(largest: float) -> tuple[str, float]:
    """(unit, bytes in it) in which numbers up to `largest` are readable."""
    return next(((unit, scale) for unit, scale in UNITS if largest >= scale), UNITS[-1])


def size(count: float) -> str:
    """Bytes in decimal units."""
    unit, scale = unit_of(count)
    return f"{count / scale:,.4g} {unit}" if count < 1000 * scale else f"{count / scale:,.0f} {unit}"


def conditions_text(conditions: dict[str, Any]) -> str:
    """What a perplexity was measured on."""
    tokens = f"{conditions['windows']} × {conditions['window']} tokens"
    return f"{tokens} of {conditions['source']}, stride {conditions['stride']}"


def quality_chart(group: dict[str, Any]) -> Markup | None:
    """Size and loss of directories measured alike; None for a single one."""
    members = group["members"]
    if len(members) < 2:
        return None
    bases = {member["base_bytes"] for member in members}
    largest = max(member["bytes"] for member in members)
    unit, scale = unit_of(max([largest, *(value for value in bases if value)]))
    points = [Point(member["bytes"] / scale, *_loss(member), member["name"]) for member in members]
    if len(bases) == 1 and None not in bases:
        points.append(Point(bases.pop() / scale, 0.0, None, "base model", series=1))
    return _pareto_chart(
        "Size and loss",
        f"Weights on disk and perplexity increase of {len(members)} directories, "
        f"{conditions_text(group['conditions'])}.",
        points,
        Axis(f"weights on disk, {unit}", 0.0, 1.12 * max(point.x for point in points)),
        larger_x=False,
    )


def _loss(comparison: dict[str, Any]) -> tuple[float, float | None]:
    error = comparison["perplexity_increase_stderr"]
    return 100 * comparison["perplexity_increase"], None if error is None else 100 * error


def speed_chart(group: dict[str, Any]) -> Markup | None:
    """Speed and loss; None unless at least two were measured alike in both."""
    members = [member for member in group["members"] if member["quality"] is not None]
    conditions = [member["quality"]["conditions"] for member in members]
    if len(members) < 2 or any(other != conditions[0] for other in conditions):
        return None
    points = [
        Point(member["decode_tokens_per_second"], *_loss(member["quality"]["comparison"]), member["name"])
        for member in members
    ]
    return _pareto_chart(
        "Speed and loss",
        f"Tokens decoded per second on {group['conditions']['device']} and perplexity increase of {len(points)} "
        "directories.",
        points,
        Axis("tokens decoded per second", 0.0, 1.12 * max(point.x for point in points)),
        larger_x=True,
    )


def _pareto_chart(title: str, description: str, points: list[Point], x: Axis, *, larger_x: bool) -> Markup:
    ends = [point.y + sign * (point.error or 0.0) for point in points for sign in (-1, 1)]
    step = EQUAL * x.high
    found = pareto([(round(point.x / step) * step, point.y) for point in points], larger_x=larger_x)
    front = []
    for first, second in pairwise(found):
        corner = (points[second].x, points[first].y) if not larger_x else (points[first].x, points[second].y)
        front += [(points[first].x, points[first].y), corner, (points[second].x, points[second].y)]
    best = ", ".join(points[index].label for index in found)
    return points_chart(
        title,
        f"{description} Not beaten in both: {best}.",
        points,
        x,
        Axis("perplexity increase, %", *padded([*ends, 0.0])),
        front=front,
    )


def charts(item: dict[str, Any]) -> dict[str, Markup | None]:
    """Charts of one directory: sizes, layers, attention, patterns; None where there is nothing to draw."""
    return {
        "sizes": sizes_chart(item),
        "layers": layers_chart(item),
        "attention": attention_chart(item),
        "patterns": patterns_chart(item),
    }


def sizes_chart(item: dict[str, Any]) -> Markup | None:
    """Bytes of the base model and of what was made of it, by kinds of modules."""
    rows = sorted(item["parts"], key=lambda row: (row["status"] != "quantized", -row["bytes"]))
    quantized = sum(row["bytes"] for row in rows if row["status"] == "quantized")
    kept = sorted((row for row in rows if row["status"] != "quantized"), key=lambda row: -row["bytes"])
    total = sum(row["bytes"] for row in rows)
    named = [row for row in kept[: PARTS - 2] if row["bytes"] > SMALL * total]
    rest = sum(row["bytes"] for row in kept) - sum(row["bytes"] for row in named)
    values = [("quantized", quantized), *((row["part"], row["bytes"]) for row in named), ("other", rest)]
    base = item["sizes"]["base_bytes"]
    unit, scale = unit_of(max(base or 0, sum(value for _, value in values)))
    compressed = [value / scale for _, value in values if value]
    series = [name for name, value in values if value]
    shown: list[tuple[str, list[float]]] = [("compressed", compressed)]
    if base:
        shown = [("base", [0.0] * len(series) + [base / scale]), ("compressed", [*compressed, 0.0])]
        series = [*series, "base model"]
    colours = [*(f"s{index}" for index in range(len(compressed))), "base"]
    return stack_chart("Weights on disk", f"Bytes by kinds of modules, in {unit}.", shown, series, colours, unit)


def layers_chart(item: dict[str, Any]) -> Markup | None:
    """Error of every decoder layer."""
    rows = item["layers"]
    if len(rows) < 2:
        return None
    values = [row["error"] for row in rows]
    worst = max(range(len(rows)), key=lambda index: values[index])
    return bars_chart(
        "Error by layer",
        f"Relative error that quantization makes in the output of each of {len(rows)} decoder layers; the largest is "
        f"{values[worst]:.3g} in {rows[worst]['name']}.",
        values,
        [row["restored"] for row in rows],
        Axis("decoder layer", -0.6, len(rows) - 0.4, whole=True),
        Axis("relative error", 0.0, (max(values) or 1.0) * 1.08),
    )


def attention_chart(item: dict[str, Any]) -> Markup | None:
    """Cosine of every attention layer that was judged, by arithmetic."""
    rows = [row for row in item["attention"] if row["cosine"] is not None]
    if len(rows) < 2:
        return None
    modes = list(dict.fromkeys(row["mode"] for row in rows))
    places = {row["name"]: index for index, row in enumerate(item["attention"])}
    points = [Point(places[row["name"]], row["cosine"], series=modes.index(row["mode"])) for row in rows]
    low = min(point.y for point in points)
    return points_chart(
        "Attention by layer",
        f"Cosine of the output of {len(rows)} attention layers with exact attention; the least is {low:.5f}.",
        points,
        Axis("attention layer", -0.6, len(item["attention"]) - 0.4, whole=True),
        Axis("cosine with exact attention", *_below_one(low)),
        series=modes,
    )


def patterns_chart(item: dict[str, Any]) -> Markup | None:
    """The pattern of every head that is not dense, by layer."""
    rows = item["sparse_layers"]
    kinds = Counter(head["pattern"] for row in rows for head in row["heads"] if head["pattern"] != "dense")
    if not kinds:
        return None
    named = [kind for kind, _ in kinds.most_common(KINDS if len(kinds) <= KINDS else KINDS - 1)]
    cells = []
    for layer, row in enumerate(rows):
        for place, head in enumerate(row["heads"]):
            if (kind := head["pattern"]) != "dense":
                values = ", ".join(f"{key} {value:,}" for key, value in head.items() if key != "pattern")
                hint = f"{row['name']}, head {place}: {kind}{f' ({values})' if values else ''}"
                cells.append(Point(place, layer, label=hint, series=named.index(kind) if kind in named else KINDS - 1))
    heads = max(len(row["heads"]) for row in rows)
    return map_chart(
        "Patterns by head",
        f"Patterns of {len(cells)} heads in {len(rows)} layers: "
        f"{', '.join(f'{count} {kind}' for kind, count in kinds.most_common())}; the others are dense.",
        cells,
        *(heads, len(rows), "query head", "attention layer"),
        [*named, "others"] if len(kinds) > KINDS else named,
    )


def _below_one(low: float) -> tuple[float, float]:
    room = max(1.0 - low, 1e-5) * 0.15
    return low - room, max(1.0, low) + room / 4
