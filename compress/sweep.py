"""One model, many weight recipes, one table: what each method costs in perplexity at each number of bits.

Every row patches the same model in place, measures it against the float model on the same windows, and unpatches it.
The result is JSON with device, versions and date; `markdown_table` renders the README's table from that file.
"""

from __future__ import annotations

import datetime
import itertools
import json
import os
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .assess import default_device_map, describe_text, measure_text, read_text
from .calibration import CalibrationOptions
from .cpu_arithmetic import float32_linears
from .evaluation import text_windows
from .hf import load_base, load_tokenizer, resolve_model
from .linear import keep_group_scales_exact, storage
from .patching import patch
from .pipeline import Progress, environment, package_version, quiet
from .recipe import EvaluationOptions, Recipe

METHODS = ("rtn", "gptq", "awq", "fireq", "signround")
ACTIVATIONS = ("none", "fp8")
GROUP_SIZES = (64, 32)
CONDITIONS = ("kompakt", "environment", "model", "text", "calibration")
"""What must be equal for the rows of two runs to stand in one table."""


@float32_linears()
def sweep(
    model: str | Path,
    *,
    methods: Iterable[str | dict[str, Any]] = METHODS,
    activations: Iterable[str] = ACTIVATIONS,
    group_sizes: Iterable[int | str] = GROUP_SIZES,
    calibration: CalibrationOptions | None = None,
    evaluation: EvaluationOptions | None = None,
    note: str = "",
    onto: Path | None = None,
    progress: Progress = quiet,
) -> dict[str, Any]:
    """Perplexity, KL, bits and calibration time of every combination; JSON-able.

    methods: keys, or dicts with `method` and its options (a `label` names the row). note: kept in the result and shown
    under the table. onto: file of an earlier result that the rows will be `merged` into. Raises ValueError for bad
    input, and if `onto` was measured under other conditions.
    """
    calibration = calibration or CalibrationOptions()
    bench = Bench.open(model, evaluation or EvaluationOptions())
    if onto is not None:
        checked_earlier(onto, bench.heading(note, calibration), CONDITIONS)
    combinations = list(itertools.product(methods, activations, group_sizes))
    rows = []
    for index, (method, inputs, group_size) in enumerate(combinations):
        options = {"method": method} if isinstance(method, str) else dict(method)
        label = options.pop("label", options["method"])
        slot = {**options, "activations": inputs, "group_size": group_size}
        recipe = Recipe.load({"name": label, "weights": slot, "calibration": calibration.model_dump()})
        progress("sweep", index, len(combinations), f"{label} {inputs} g{group_size}")
        rows.append({"label": label, **_row(bench, recipe, progress)})
    progress("sweep", len(combinations), len(combinations), "done")
    return {**bench.heading(note, calibration), "rows": rows}


@dataclass(frozen=True)
class Bench:
    """What measurements of one model share: two copies of it, one to be patched, and windows (n, window) of a text."""

    path: Path
    tokenizer: Any
    base: Any
    subject: Any
    windows: torch.Tensor
    evaluation: EvaluationOptions
    source: str

    @classmethod
    def open(cls, model: str | Path, evaluation: EvaluationOptions) -> Bench:
        """Loads everything. Raises ValueError for a model or a text that cannot be used."""
        path = resolve_model(model)
        tokenizer = load_tokenizer(path)
        text, source = read_text(evaluation.text)
        windows = text_windows(
            tokenizer, text, window=evaluation.window, stride=evaluation.stride, limit=evaluation.windows or None
        )
        base, subject = (load_base(path, device_map=default_device_map()) for _ in range(2))
        return cls(path, tokenizer, base, subject, windows, evaluation, source)

    def compare(self, progress: Progress) -> dict[str, Any]:
        """The subject beside the base, as it is at the moment (`evaluation.Comparison`).

        Group scales are applied in FP32 for every number of tokens, so that the figures are those of the method.
        """
        keep_group_scales_exact(self.subject)
        return measure_text(self.subject, self.base, self.windows, self.evaluation, progress)["comparison"]

    def heading(self, note: str, calibration: CalibrationOptions | None) -> dict[str, Any]:
        """Versions, date, device, model, text and calibration, JSON-able."""
        return {
            "kompakt": package_version(),
            "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
            "environment": environment(next(self.subject.parameters()).device),
            "note": note,
            "model": self.path.name,
            "text": describe_text(self.evaluation, self.source, self.windows),
            "calibration": None
            if calibration is None
            else {**calibration.model_dump(), "source": Path(calibration.source).name},
        }


def _row(bench: Bench, recipe: Recipe, progress: Progress) -> dict[str, Any]:
    started = time.perf_counter()
    with patch(bench.subject, recipe, tokenizer=bench.tokenizer, progress=progress) as patched:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds = time.perf_counter() - started
        bits = storage(patched)["bits_per_weight"]
        comparison = bench.compare(progress)
    assert recipe.weights is not None
    return {
        "weights": recipe.model_dump(mode="json")["weights"],
        "bits_per_weight": bits,
        "calibration_seconds": round(seconds, 1),
        **comparison,
    }


def markdown_table(result: dict[str, Any]) -> str:
    """Rows are methods, columns activations × group size, fewest bits first: perplexity increase; last, seconds."""
    columns: dict[tuple[str, Any], float] = {}
    cells: dict[str, dict[tuple[str, Any], dict[str, Any]]] = {}
    for row in result["rows"]:
        key = (row["weights"]["activations"], row["weights"]["group_size"])
        columns.setdefault(key, row["bits_per_weight"])
        cells.setdefault(row["label"], {})[key] = row
    columns = dict(sorted(columns.items(), key=lambda item: (item[1], item[0])))
    labels = sorted(cells, key=lambda label: METHODS.index(label) if label in METHODS else len(METHODS))
    names = {"none": "W4A16", "fp8": "W4A8"}
    head = [f"{names[inputs]} g{size}, {bits:.2f} bit" for (inputs, size), bits in columns.items()]
    lines = [
        f"| method | {' | '.join(head)} | calibration |",
        f"|---|{'---|' * len(head)}---|",
    ]
    for label in labels:
        found = cells[label]
        increases = [increase(found.get(key)) for key in columns]
        slowest = max(row["calibration_seconds"] for row in found.values())
        lines.append(f"| {label} | {' | '.join(increases)} | {slowest:.0f} s |")
    lines += ["", f"{conditions(result)} Bits count codes, scales and shapes as stored.{noted(result)}"]
    return "\n".join(lines)


def conditions(result: dict[str, Any]) -> str:
    """A sentence on how the perplexities of a result were measured."""
    text, environment_, calibration = result["text"], result["environment"], result["calibration"]
    calibrated = (
        f"calibrated on {calibration['samples']} × {calibration['length']} tokens of {calibration['source']}; "
        if calibration
        else ""
    )
    base = result["rows"][0]["base"]["perplexity"]
    return (
        f"Perplexity over the base model's {base:.2f}, ± standard error of the paired difference; "
        f"{text['source']}, {text['windows']} windows of {text['window']} tokens; {calibrated}"
        f"{environment_['device']}, torch {environment_['torch']}, {result['date']}."
    )


def noted(result: dict[str, Any]) -> str:
    """The note of a result, with a space before it."""
    return f" {result['note']}" if result["note"] else ""


def increase(row: dict[str, Any] | None) -> str:
    """Perplexity increase with its standard error, in percent."""
    if row is None:
        return "–"
    return f"{100 * row['perplexity_increase']:+.1f} ± {100 * (row['perplexity_increase_stderr'] or 0):.1f} %"


def read_result(file: Path) -> dict[str, Any]:
    """What a `bench` command wrote. Raises ValueError for anything else."""
    try:
        result = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{file} is not what a bench command wrote: {error}") from error
    if not isinstance(result, dict) or not result.get("rows"):
        raise ValueError(f"{file} is not what a bench command wrote: it has no rows")
    return result


def insert_table(document: Path, file: Path, render: Callable[[dict[str, Any]], str] = markdown_table) -> None:
    """Puts the table of the JSON `file` between ``<!-- FILE -->`` and ``<!-- end -->`` of a Markdown document.

    The marker names the file relative to the document. Raises ValueError if the document has no such marker.
    """
    name = os.path.relpath(file.resolve(), document.resolve().parent)
    start = f"<!-- {Path(name).as_posix()} -->"
    text = document.read_text("utf-8")
    head, found, rest = text.partition(start)
    _, closed, tail = rest.partition("<!-- end -->")
    if not found or not closed:
        raise ValueError(f"{document} holds no lines {start} … <!-- end --> to put the table between")
    table = render(read_result(file))
    document.write_text(f"{head}{start}\n{table}\n{closed}{tail}", "utf-8")


def row_identity(row: dict[str, Any]) -> tuple[Any, ...]:
    """What tells the rows of a sweep apart."""
    return row["label"], row["weights"]["activations"], row["weights"]["group_size"]


def merged(file: Path, result: dict[str, Any]) -> dict[str, Any]:
    """`result` with the rows of an earlier file in front; a row measured again replaces the old one.

    Raises ValueError if the file was measured under other `CONDITIONS`.
    """
    earlier = checked_earlier(file, result, CONDITIONS)
    return result if earlier is None else {**result, "rows": joined(earlier["rows"], result["rows"], row_identity)}


def checked_earlier(file: Path, heading: dict[str, Any], same: Iterable[str]) -> dict[str, Any] | None:
    """An earlier result to append to, None if there is no file.

    Raises ValueError if it was measured under other conditions than `heading` states. Worth asking before measuring.
    """
    if not file.is_file():
        return None
    earlier = read_result(file)
    for key in same:
        if earlier.get(key) != heading[key]:
            raise ValueError(f"{file} was measured with another {key}: {earlier.get(key)} there, {heading[key]} here")
    return earlier


def joined(
    earlier: list[dict[str, Any]], rows: list[dict[str, Any]], identity: Callable[[dict[str, Any]], tuple[Any, ...]]
) -> list[dict[str, Any]]:
    """Earlier rows that were not measured again, then `rows`."""
    replaced = {identity(row) for row in rows}
    return [row for row in earlier if identity(row) not in replaced] + rows
