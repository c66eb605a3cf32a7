"""Results as tables for a terminal. Every function takes what `--json` would print and returns what rich draws."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.table import Table

Shown = list[Any]


def table(title: str, *columns: str) -> Table:
    """A table without lines; the first column is left-aligned, the last may wrap."""
    result = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False, header_style="dim")
    for index, column in enumerate(columns):
        numeric = 0 < index < len(columns) - 1
        result.add_column(
            column, justify="right" if numeric else "left", no_wrap=index < len(columns) - 1, overflow="fold"
        )
    return result


def size(count: float | None) -> str:
    """Bytes in decimal units."""
    if count is None:
        return "unknown"
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= scale:
            return f"{count / scale:.4g} {unit}" if count < 1000 * scale else f"{count / scale:,.0f} {unit}"
    return f"{count:.0f} B"


def spread(value: float, stderr: float | None, form: str = ".3f") -> str:
    """``value ± standard error``."""
    return f"{value:{form}}" if stderr is None else f"{value:{form}} ± {stderr:{form.removeprefix('+')}}"


def percent(value: float, stderr: float | None, form: str = ".2f") -> str:
    """A share as ``x ± y %``."""
    return f"{spread(100 * value, None if stderr is None else 100 * stderr, form)} %"


def recipe_line(recipe: Any) -> str:
    """A recipe on one line: name, method with its options, what it is calibrated and evaluated on."""
    content = recipe.model_dump(mode="json", exclude_none=True)
    weights = dict(content["weights"])
    method, ignore = weights.pop("method"), weights.pop("ignore", [])
    overrides = weights.pop("overrides", [])
    options = [f"{key.replace('_', ' ')} {word(value)}" for key, value in weights.items()]
    if overrides:
        options.append(f"{len(overrides)} override{'s' * (len(overrides) > 1)}")
    if ignore != ["lm_head"]:
        options.append(f"ignore {' '.join(ignore)}")
    return f"recipe {recipe.name}: {method}, {', '.join(options)}"


def word(value: Any) -> str:
    return {True: "on", False: "off"}[value] if isinstance(value, bool) else str(value)


def compression(report: dict[str, Any]) -> Shown:
    """The result of `compress`."""
    from ..compress.expert_calibration import expert_sentence

    sizes, evaluation = report["sizes"], report["evaluation"]
    result = table("", "", "base", "compressed", "")
    smaller = f"{sizes['base_bytes'] / sizes['compressed_bytes']:.2f} × smaller"
    result.add_row("weights on disk", size(sizes["base_bytes"]), size(sizes["compressed_bytes"]), smaller)
    result.add_row("bits per quantized weight", "", f"{sizes['bits_per_weight']:.3f}", "scales and shapes included")
    if evaluation is not None:
        compare_rows(result, evaluation["comparison"])
    shown: Shown = []
    if report["calibration"] is not None:
        shown.append(calibration_line(report["calibration"]))
        shown += filter(None, [expert_sentence(report["layers"])])
    if evaluation is not None:
        shown.append(text_line(evaluation["text"]))
    shown += [result, "", coverage_table(report["coverage"]), ""]
    device = "" if report["peak_device_bytes"] is None else f"{size(report['peak_device_bytes'])} on the device, "
    shown.append(f"{report['seconds']:.0f} s, peak memory {device}{size(report['peak_host_bytes'])} on the host")
    return [*shown, f"written to {report['output']}"]


def calibration_line(facts: dict[str, Any]) -> str:
    """What the calibration text was."""
    return (
        f"calibrated on {facts['samples']} × {facts['length']} = {facts['tokens']:,} tokens of {facts['source']}; "
        f"longest document {facts['longest_document']:,} tokens"
    )


def text_line(text: dict[str, Any]) -> str:
    """What the evaluation text was."""
    scored = f", scored behind the first {text['prompt_tokens']} of each" if "prompt_tokens" in text else ""
    windows = f"{text['windows']} × {text['window']} tokens"
    return f"evaluated on {windows}, stride {text['stride']}, of {text['source']}{scored}"


def compare_rows(rows: Table, comparison: dict[str, Any]) -> None:
    """Perplexities side by side, and the distances."""
    base, model = comparison["base"], comparison["model"]
    rows.add_row(
        "perplexity",
        spread(base["perplexity"], base["perplexity_stderr"]),
        spread(model["perplexity"], model["perplexity_stderr"]),
        percent(comparison["perplexity_increase"], comparison["perplexity_increase_stderr"], "+.2f"),
    )
    rows.add_row("KL to the base", "", spread(comparison["kl"], comparison["kl_stderr"], ".4f"), "nats per token")
    agreement = percent(comparison["top1_agreement"], comparison["top1_agreement_stderr"])
    rows.add_row("same top token", "", agreement, "of positions")


def cache_rows(rows: Table, content: dict[str, Any]) -> None:
    """Sizes of the key-value cache in a plan, as transformers keeps it and as the recipe does."""
    before = content.get("kv_cache_bytes", {})
    after = content["kv_cache"]["bytes"] if before and "kv_cache" in content else before
    for tokens, count in before.items():
        ratio = f", {count / after[tokens]:.2f} × smaller" if after is not before else ""
        rows.add_row(f"cache of {int(tokens):,} tokens", size(count), size(after[tokens]), f"one sequence{ratio}")


def coverage_table(lines: list[dict[str, Any]]) -> Table:
    """Modules grouped by what happens to them."""
    from ..compress.card import coverage_rows

    result = table("", "modules", "count", "weights", "")
    for row in coverage_rows(lines):
        result.add_row(row["label"], f"{row['count']:,}", f"{row['weights']:,}", "")
    return result


def evaluation(content: dict[str, Any]) -> Shown:
    """The result of `evaluate`."""
    shown: Shown = []
    against = content["against"]
    name = Path(content["model"]).name
    if "text" in content:
        shown.append(text_line(content["text"]))
    rows = table("", "", "base" if against else "", name, "")
    sizes = content["bytes"]
    rows.add_row("weights on disk", size(sizes["base"]) if against else "", size(sizes["model"]), "")
    if "comparison" in content:
        compare_rows(rows, content["comparison"])
    elif "perplexity" in content:
        found = content["perplexity"]
        rows.add_row("perplexity", "", spread(found["perplexity"], found["perplexity_stderr"]), "")
    for task in ("choices", "last_word"):
        if task in content:
            task_rows(rows, task, content[task])
    speed = content.get("speed", {})
    for key, label in (("prefill", "prefill"), ("decode", "decode")):
        if speed:
            values = {side: f"{found[f'{key}_tokens_per_second']:,.1f}" for side, found in speed.items()}
            rows.add_row(
                label, values.get("base", ""), values["model"], f"tokens per second, {speed['model']['device']}"
            )
    return [*shown, rows]


def task_rows(rows: Table, task: str, content: dict[str, Any]) -> None:
    """Accuracies of one task file; the difference is of paired items."""
    sides = [content.get("base"), content["model"]]
    measures = {
        "choices": (("accuracy", "accuracy"), ("accuracy, by length", "accuracy_norm")),
        "last_word": (("accuracy", "accuracy"),),
    }
    for label, key in measures[task]:
        cells = ["" if side is None else percent(side[key], side[f"{key}_stderr"]) for side in sides]
        note = f"{content['model']['items']} items"
        if "flips" in content and key == measures[task][-1][1]:
            flips = content["flips"]
            difference = percent(flips["accuracy_difference"], flips["accuracy_difference_stderr"], "+.2f")
            note = f"{difference}, {len(flips['gained'])} gained and {len(flips['lost'])} lost of {flips['items']}"
            if flips["recovery"] is not None:
                note += f"; {percent(flips['recovery'], flips['recovery_stderr'], '.1f')} of the base"
        rows.add_row(f"{content['file']} {label}", *cells, note)


def planned(content: dict[str, Any]) -> Shown:
    """The result of `plan`."""
    sizes = content["sizes"]
    rows = table("", "", "base", "compressed", "")
    smaller = f"{sizes['base_bytes'] / sizes['compressed_bytes']:.2f} × smaller"
    rows.add_row("weights", size(sizes["base_bytes"]), size(sizes["compressed_bytes"]), smaller)
    rows.add_row("bits per quantized weight", "", f"{sizes['bits_per_weight']:.3f}", "scales and shapes included")
    cache_rows(rows, content)
    memory = table("", "memory at the peak of", "device", "host", "of which")
    for stage in content["stages"]:
        both = [sorted(stage[side].items(), key=lambda part: -part[1]) for side in ("device", "host")]
        parts = [", ".join(f"{name} {size(count)}" for name, count in side if count) for side in both if side]
        memory.add_row(
            stage["name"],
            size(stage["device_bytes"]) if stage["device"] else "",
            size(stage["host_bytes"]) if stage["host"] else "",
            "; host: ".join(parts),
        )
    kernels = table("", "op", "runs on", "", "why")
    for op, found in content["kernels"].items():
        kernels.add_row(op, found["backend"], "used" if found["used"] else "", found["reason"])
    scheme = f"{content['recipe']['name']} ({content['scheme']})"
    heading = f"plan for {content['model']} ({content['dtype']}) with {scheme} on {content['device']}"
    return [heading, "", rows, "", coverage_table(content["coverage"]), "", memory, "", kernels]


def listed(content: dict[str, Any]) -> Shown:
    """The result of `list`."""
    recipes = table("", "recipe", "description")
    for recipe in content["recipes"]:
        recipes.add_row(recipe["name"], recipe["description"])
    shown: Shown = [recipes]
    for slot, methods in content["methods"].items():
        if not methods:
            continue
        rows = table("", f"{slot} method", "description and options with their defaults")
        for method in methods:
            options = ", ".join(f"{name}={_option(value)}" for name, value in method["options"].items())
            rows.add_row(method["method"], f"{method['description']}\n[{options}]")
        shown += ["", rows]
    return shown


def _option(value: Any) -> str:
    return " ".join(value) if isinstance(value, list) else word(value)


def speeds(content: dict[str, Any]) -> Shown:
    """The result of `bench linear`: one table per shape, then one of the quantization of activations."""
    from ..compress.linear_speed_table import measured

    shown: Shown = []
    shapes = dict.fromkeys(
        (row["model"], row["layer"], row["out_features"], row["in_features"]) for row in content["rows"]
    )
    for shape in shapes:
        model, layer, out_features, in_features = shape
        title = f"{out_features}×{in_features} ({', '.join(filter(None, (model, layer)))})"
        peers = [f"× {peer}" for peer in content["against"]]
        rows = table(title, "layer", "tokens", "µs", *peers, "weights GB/s", "TFLOP/s", "share", "error")
        for row in content["rows"]:
            if (row["model"], row["layer"], row["out_features"], row["in_features"]) == shape:
                rows.add_row(row["label"], f"{row['tokens']:,}", *_speed_cells(row, list(content["against"])))
        shown += [rows, ""]
    rows = table("quantization of activations", "layout", "tokens × inputs", "µs", "GB/s", "share of bandwidth", "")
    for row in content["quantization"]:
        numbers = ("microseconds", ".1f"), ("gb_per_second", ",.0f"), ("share", ".0%")
        cells = [f"{row[key]:{form}}" if row["correct"] else "" for key, form in numbers]
        rows.add_row(
            row["layout"], f"{row['tokens']:,} × {row['in_features']}", *cells, "" if row["correct"] else "wrong"
        )
    return [*shown, rows, "", measured(content)]


def _speed_cells(row: dict[str, Any], peers: list[str]) -> list[str]:
    error = "none" if row["error"] is None else f"{row['error']:.1e}"
    if not row["correct"]:
        return ["", *("" for _ in peers), "", "", "", f"wrong: {row.get('reason') or error}"]
    ratios = [row["peers"].get(peer, {}).get("ratio") for peer in peers]
    folded = "" if row["fold_error"] is None else f", folded weights {row['fold_error']:.1e}"
    return [
        f"{row['microseconds']:.1f}",
        *("–" if ratio is None else f"{ratio:.2f}" for ratio in ratios),
        f"{row['weight_gb_per_second']:,.0f}",
        f"{row['tflops']:,.0f}",
        f"{row['share']:.0%}",
        f"{error}{folded}",
    ]


def attention_speeds(content: dict[str, Any]) -> Shown:
    """The result of `bench attention`: one table per mask, batch, heads and head_dim."""
    from ..compress.attention_speed_table import absences
    from ..compress.linear_speed_table import measured_on

    shown: Shown = []
    peers = list(content["against"])
    keys = ("mask", "batch", "heads", "kv_heads", "head_dim")
    for shape in dict.fromkeys(tuple(row[key] for key in keys) for row in content["rows"]):
        mask, batch, heads, kv_heads, head_dim = shape
        title = f"{mask}, batch {batch}, {heads}/{kv_heads} heads of {head_dim}"
        rows = table(title, "mode", "tokens", "µs", *(f"× {peer}" for peer in peers), "TFLOP/s", "share", "error")
        for row in content["rows"]:
            if tuple(row[key] for key in keys) == shape:
                rows.add_row(row["mode"], f"{row['length']:,}", *_attention_cells(row, peers))
        shown += [rows, ""]
    return [*shown, measured_on(content), *absences(content)]


def _attention_cells(row: dict[str, Any], peers: list[str]) -> list[str]:
    from ..compress.attention_speed_table import why_wrong

    if not row["correct"]:
        return ["", *("" for _ in peers), "", "", f"wrong: {why_wrong(row)}"]
    ratios = [row["peers"].get(peer, {}).get("ratio") for peer in peers]
    return [
        f"{row['microseconds']:,.1f}",
        *("–" if ratio is None else f"{ratio:.2f}" for ratio in ratios),
        f"{row['tflops']:,.0f}",
        f"{row['share']:.0%}",
        f"{row['relative_error']:.1e}, cosine {row['cosine']:.5f}",
    ]
