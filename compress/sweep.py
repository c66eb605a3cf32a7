"""One model, many weight recipes, one table: what each method costs in perplexity at each number of bits.

Every row patches the same model in place, measures it against the float model on the same windows, and unpatches it.
The result is JSON with device, versions and date; `markdown_table` renders the README's table from that file.
"""

from __future__ import annotations

import datetime
import itertools
import json
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from .assess import default_device_map, describe_text, measure_text, read_text
from .calibration import CalibrationOptions
from .evaluation import text_windows
from .hf import load_base, load_tokenizer, resolve_model
from .linear import storage
from .patching import patch
from .pipeline import Progress, environment, package_version, quiet
from .recipe import EvaluationOptions, Recipe

METHODS = ("rtn", "gptq", "awq", "fireq", "signround")
ACTIVATIONS = ("none", "fp8")
GROUP_SIZES = (64, 32)


def sweep(
    model: str | Path,
    *,
    methods: Iterable[str | dict[str, Any]] = METHODS,
    activations: Iterable[str] = ACTIVATIONS,
    group_sizes: Iterable[int | str] = GROUP_SIZES,
    calibration: CalibrationOptions | None = None,
    evaluation: EvaluationOptions | None = None,
    note: str = "",
    progress: Progress = quiet,
) -> dict[str, Any]:
    """Perplexity, KL, bits and calibration time of every combination; JSON-able.

    methods: keys, or dicts with `method` and its options (a `label` names the row). note: kept in the result and shown
    under the table. Raises ValueError for bad input.
    """
    calibration, evaluation = calibration or CalibrationOptions(), evaluation or EvaluationOptions()
    path = resolve_model(model)
    tokenizer = load_tokenizer(path)
    text, description = read_text(evaluation.text)
    windows = text_windows(
        tokenizer, text, window=evaluation.window, stride=evaluation.stride, limit=evaluation.windows or None
    )
    placement = default_device_map()
    base, subject = load_base(path, device_map=placement), load_base(path, device_map=placement)
    combinations = list(itertools.product(methods, activations, group_sizes))
    rows = []
    for index, (method, inputs, group_size) in enumerate(combinations):
        options = {"method": method} if isinstance(method, str) else dict(method)
        label = options.pop("label", options["method"])
        slot = {**options, "activations": inputs, "group_size": group_size}
        recipe = Recipe.load({"name": label, "weights": slot, "calibration": calibration.model_dump()})
        progress("sweep", index, len(combinations), f"{label} {inputs} g{group_size}")
        rows.append({"label": label, **_row(subject, base, recipe, tokenizer, windows, evaluation, progress)})
    progress("sweep", len(combinations), len(combinations), "done")
    return {
        "kompakt": package_version(),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "environment": environment(next(subject.parameters()).device),
        "note": note,
        "model": path.name,
        "text": describe_text(evaluation, description, windows),
        "calibration": {**calibration.model_dump(), "source": Path(calibration.source).name},
        "rows": rows,
    }


def _row(
    subject: Any,
    base: Any,
    recipe: Recipe,
    tokenizer: Any,
    windows: torch.Tensor,
    evaluation: EvaluationOptions,
    progress: Progress,
) -> dict[str, Any]:
    started = time.perf_counter()
    with patch(subject, recipe, tokenizer=tokenizer, progress=progress) as patched:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds = time.perf_counter() - started
        bits = storage(patched)["bits_per_weight"]
        comparison = measure_text(patched, base, windows, evaluation.stride, progress)["comparison"]
    assert recipe.weights is not None
    return {
        "weights": recipe.model_dump(mode="json")["weights"],
        "bits_per_weight": bits,
        "calibration_seconds": round(seconds, 1),
        **comparison,
    }


def markdown_table(result: dict[str, Any]) -> str:
    """Rows are methods, columns are activations × group size: perplexity increase and, in the last columns, seconds."""
    columns: dict[tuple[str, Any], float] = {}
    cells: dict[str, dict[tuple[str, Any], dict[str, Any]]] = {}
    for row in result["rows"]:
        key = (row["weights"]["activations"], row["weights"]["group_size"])
        columns.setdefault(key, row["bits_per_weight"])
        cells.setdefault(row["label"], {})[key] = row
    names = {"none": "W4A16", "fp8": "W4A8"}
    head = [f"{names[inputs]} g{size}, {bits:.2f} bit" for (inputs, size), bits in columns.items()]
    lines = [
        f"| method | {' | '.join(head)} | calibration |",
        f"|---|{'---|' * len(head)}---|",
    ]
    for label, found in cells.items():
        increases = [_cell(found.get(key)) for key in columns]
        slowest = max(row["calibration_seconds"] for row in found.values())
        lines.append(f"| {label} | {' | '.join(increases)} | {slowest:.0f} s |")
    base = result["rows"][0]["base"]["perplexity"]
    text, environment_ = result["text"], result["environment"]
    lines.append("")
    lines.append(
        f"Perplexity over the base model's {base:.2f}, ± standard error of the paired difference; {text['source']}, "
        f"{text['windows']} windows of {text['window']} tokens; calibrated on {result['calibration']['samples']} × "
        f"{result['calibration']['length']} tokens of {result['calibration']['source']}; {environment_['device']}, "
        f"torch {environment_['torch']}, {result['date']}. Bits count codes, scales and shapes as stored."
        f"{' ' + result['note'] if result['note'] else ''}"
    )
    return "\n".join(lines)


def _cell(row: dict[str, Any] | None) -> str:
    if row is None:
        return "–"
    return f"{100 * row['perplexity_increase']:+.1f} ± {100 * (row['perplexity_increase_stderr'] or 0):.1f} %"


def insert_table(document: Path, file: Path) -> None:
    """Puts the table of the JSON `file` between ``<!-- FILE -->`` and ``<!-- end -->`` of a Markdown document.

    The marker names the file relative to the document. Raises ValueError if the document has no such marker.
    """
    start = f"<!-- {file.resolve().relative_to(document.resolve().parent).as_posix()} -->"
    text = document.read_text("utf-8")
    head, found, rest = text.partition(start)
    _, closed, tail = rest.partition("<!-- end -->")
    if not found or not closed:
        raise ValueError(f"{document} holds no lines {start} … <!-- end --> to put the table between")
    table = markdown_table(json.loads(file.read_text("utf-8")))
    document.write_text(f"{head}{start}\n{table}\n{closed}{tail}", "utf-8")


def merged(file: Path, result: dict[str, Any]) -> dict[str, Any]:
    """`result` with the rows of an earlier file in front; a row measured again replaces the old one.

    Raises ValueError if the file was measured on another model, text, calibration, device or version.
    """
    if not file.is_file():
        return result
    earlier = json.loads(file.read_text("utf-8"))
    for key in ("kompakt", "environment", "model", "text", "calibration"):
        if earlier[key] != result[key]:
            raise ValueError(f"{file} was measured with another {key}: {earlier[key]} there, {result[key]} here")

    def identity(row: dict[str, Any]) -> tuple[Any, ...]:
        return row["label"], row["weights"]["activations"], row["weights"]["group_size"]

    replaced = {identity(row) for row in result["rows"]}
    return {**result, "rows": [row for row in earlier["rows"] if identity(row) not in replaced] + result["rows"]}
