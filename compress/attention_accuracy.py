"""What quantized prefill attention costs: output of every layer, random inputs, perplexity, multiple choice.

Layers: queries, keys and values of a model on the first window of a text, every mode against attention in FP32 on the
same tensors, and FP8 with one scale for each tensor beside them (`attention_error.py`). Perplexity and multiple choice:
every attention layer in one mode, at any length, against the same model as it is; standard errors are of paired
differences. Random inputs have the length of a window.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ..kernels.attention import Mode
from ..quant.method import AttentionInputs, Figures
from .assess import measure_text
from .attention_calibration import observe_attention
from .attention_error import BASELINE, HEAD_DIMS, KINDS, backends, compare_all, described, synthetic_inputs
from .evaluation import input_device
from .evaluation_tasks import MultipleChoice, flips, multiple_choice
from .hf_attention import attention_in_use
from .patching import patch
from .pipeline import Progress, quiet
from .recipe import EvaluationOptions, Recipe
from .sweep import Bench, noted

VERSION = 1
QUANTIZED: tuple[Mode, ...] = ("fp8_fp8", "int8_fp8", "int8_fp16", "int4_fp8")
"""Modes that there is something to measure of."""


def attention_accuracy(
    model: str | Path,
    *,
    modes: Sequence[Mode] = QUANTIZED,
    text: str = "builtin",
    length: int = 8192,
    windows: int = 0,
    choices: str | Path | None = None,
    limit: int | None = None,
    batch_size: int = 8,
    note: str = "",
    progress: Progress = quiet,
) -> dict[str, Any]:
    """One row for each mode and one for the baseline, which has layers and random inputs only; JSON-able.

    length: tokens of a window. windows: how many, 0 for all of the text. choices: JSONL of multiple-choice questions,
    limit: the first ones, batch_size: how many of their answers are scored at once. Raises ValueError for bad input,
    and if the model's attention cannot be patched.
    """
    bench = Bench.open(model, EvaluationOptions(text=text, window=length, windows=windows))
    positions = getattr(bench.subject.config.get_text_config(), "max_position_embeddings", None)
    if positions is not None and length > positions:
        raise ValueError(f"length {length} exceeds the {positions} positions of {bench.path.name}")
    device = input_device(bench.subject)
    asked = None if choices is None else partial(answers, bench, choices, limit, batch_size, progress)
    layers, runs, refused = layer_figures(bench, modes, progress)
    synthetic = synthetic_figures(modes, length, device, progress)
    rows: list[dict[str, Any]] = []
    before = None if asked is None else asked(bench.base)
    for mode in modes:
        row = {"mode": mode, "backend": runs[mode], "layers": summary(layers[mode]), "synthetic": synthetic[mode]}
        rows.append({**row, **patched_figures(mode, bench, asked, before, progress)})
    rows.append({"mode": BASELINE, "layers": summary(layers[BASELINE]), "synthetic": synthetic[BASELINE]})
    return {
        "bench": "attention-accuracy",
        "version": VERSION,
        **bench.heading(note, None),
        "length": length,
        "not_captured": refused,
        "choices": None if before is None else {"file": Path(str(choices)).name, **choice_figures(before)},
        "rows": rows,
    }


def layer_figures(
    bench: Bench, modes: Sequence[Mode], progress: Progress
) -> tuple[dict[str, dict[str, dict[str, Any]]], dict[str, str], dict[str, str]]:
    """On the first window: mode → layer → figures; mode → what ran it in the first layer; layers that could not be
    captured with the reason.
    """
    found: dict[str, dict[str, Figures]] = {}
    runs: dict[str, str] = {}

    def visit(name: str, inputs: AttentionInputs) -> None:
        progress("attention layers", len(found), len(found) + 1, name)
        found[name] = compare_all(inputs, modes)
        if not runs:
            runs.update(backends(inputs, modes))

    refused = observe_attention(bench.subject, bench.windows[:1], visit)
    if not found:
        raise ValueError(f"no attention layer of {bench.path.name} can be measured: {next(iter(refused.values()))}")
    layers = {name: described(item) for name, item in found.items()}
    by_mode = {mode: {name: layer[mode] for name, layer in layers.items()} for mode in (*modes, BASELINE)}
    return by_mode, runs, {name: why for name, why in refused.items() if name not in found}


def synthetic_figures(
    modes: Sequence[Mode], length: int, device: torch.device, progress: Progress
) -> dict[str, list[dict[str, Any]]]:
    """Mode → figures of random inputs of every kind and head_dim."""
    rows: dict[str, list[dict[str, Any]]] = {mode: [] for mode in (*modes, BASELINE)}
    cases = [(kind, head_dim) for kind in KINDS for head_dim in HEAD_DIMS]
    for step, (kind, head_dim) in enumerate(cases):
        progress("random inputs", step, len(cases), kind)
        found = described(compare_all(synthetic_inputs(kind, head_dim, length, device), modes))
        for mode, item in found.items():
            rows[mode].append({"kind": kind, "head_dim": head_dim, **item})
    progress("random inputs", len(cases), len(cases), "done")
    return rows


def summary(layers: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Worst and mean over layers, and each of them by name. Means of SQNR leave out layers without any difference."""
    result: dict[str, Any] = {"count": len(layers)}
    worst: dict[str, Callable[..., float]] = {"cosine": min, "relative_l1": max, "sqnr_db": min, "times_below": min}
    for key, pick in worst.items():
        values = [layer[key] for layer in layers.values() if layer[key] is not None]
        result[key] = {"worst": pick(values), "mean": statistics.fmean(values)} if values else None
    return {**result, "each": layers}


def answers(
    bench: Bench, choices: str | Path, limit: int | None, batch_size: int, progress: Progress, model: Any
) -> MultipleChoice:
    """Multiple choice of a model as it is at the moment."""

    def report(done: int, total: int) -> None:
        progress("choices", done, total, Path(choices).name)

    return multiple_choice(model, bench.tokenizer, choices, limit=limit, batch_size=batch_size, progress=report)


def choice_figures(found: MultipleChoice) -> dict[str, Any]:
    """Accuracy by length of the choices, JSON-able."""
    return {
        "items": found.items,
        "accuracy": found.accuracy_norm,
        "accuracy_stderr": found.accuracy_norm_stderr,
    }


def patched_figures(
    mode: Mode,
    bench: Bench,
    asked: Callable[[Any], MultipleChoice] | None,
    before: MultipleChoice | None,
    progress: Progress,
) -> dict[str, Any]:
    """Perplexity, and multiple choice if asked for, with every attention layer in one mode, and how the layers ran.

    asked: model → its answers. before: the dense model's. Raises ValueError if no layer ran in the mode.
    """
    slot = {"method": "sage", "mode": mode, "min_tokens": 1}
    recipe = Recipe.load({"name": f"attention {mode}", "attention": slot})
    row: dict[str, Any] = {}
    with patch(bench.subject, recipe, tokenizer=bench.tokenizer) as patched:
        row["perplexity"] = measure_text(patched, bench.base, bench.windows, bench.evaluation, progress)["comparison"]
        if asked is not None and before is not None:
            after = asked(patched)
            changed = flips(before.correct_norm, after.correct_norm).as_dict()
            row["choices"] = {**choice_figures(after), "flips": changed}
        row["attention"] = used = attention_in_use(patched)
    if used is None or used["ran"] == "dense":
        raise ValueError(f"no attention layer of {bench.path.name} ran in {mode}: {used and used['calls']}")
    return row


def accuracy_table(result: dict[str, Any]) -> str:
    """Markdown: layers, perplexity and accuracy of every mode and of the baseline's layers; then the random inputs."""
    asked = result["choices"] is not None
    head = ["mode", "cosine, worst layer (mean)", "relative L1", "SQNR in dB", "× below the baseline", "perplexity"]
    lines = [f"| {' | '.join([*head, *(['accuracy'] if asked else [])])} |", "|---" * (len(head) + asked) + "|"]
    for row in result["rows"]:
        layers = row["layers"]
        cells = [pair(layers["cosine"], ".5f"), pair(layers["relative_l1"], ".4f"), pair(layers["sqnr_db"], ".1f")]
        cells.append("" if row["mode"] == BASELINE else pair(layers["times_below"], ".1f"))
        cells += [increase(row.get("perplexity"))] + ([accuracy(row.get("choices"))] if asked else [])
        lines.append(f"| {row['mode']} | {' | '.join(cells)} |")
    lines += ["", f"| random inputs, head_dim | {' | '.join(row['mode'] for row in result['rows'])} |"]
    lines += ["|---" * (len(result["rows"]) + 1) + "|"]
    for items in zip(*(row["synthetic"] for row in result["rows"]), strict=True):
        cells = [f"{item['error']:.4f}{below(row, item)}" for row, item in zip(result["rows"], items)]
        lines.append(f"| {items[0]['kind']}, {items[0]['head_dim']} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", f"{conditions(result)}{noted(result)}"])


def pair(figure: dict[str, float] | None, form: str) -> str:
    """``worst (mean)``; – where there is no difference at all."""
    return "–" if figure is None else f"{figure['worst']:{form}} ({figure['mean']:{form}})"


def increase(found: dict[str, Any] | None) -> str:
    """Perplexity increase with its paired standard error, in percent."""
    if found is None:
        return "–"
    stderr = found["perplexity_increase_stderr"]
    spread = "" if stderr is None else f" ± {100 * stderr:.3f}"
    return f"{100 * found['perplexity_increase']:+.3f}{spread} %"


def accuracy(found: dict[str, Any] | None) -> str:
    """Accuracy with its standard error, and how many items changed."""
    if found is None:
        return "–"
    changed = found["flips"]
    return f"{percent(found)}, {len(changed['gained'])} gained, {len(changed['lost'])} lost"


def percent(found: dict[str, Any]) -> str:
    """``71.2 ± 1.4 %``."""
    stderr = found["accuracy_stderr"]
    spread = "" if stderr is None else f" ± {100 * stderr:.1f}"
    return f"{100 * found['accuracy']:.1f}{spread} %"


def below(row: dict[str, Any], item: dict[str, Any]) -> str:
    """How many times as large the baseline's error is."""
    return "" if row["mode"] == BASELINE or item["times_below"] is None else f" ({item['times_below']:.1f} ×)"


def conditions(result: dict[str, Any]) -> str:
    """Sentences on what was measured, on what, and when."""
    text, where, rows = result["text"], result["environment"], result["rows"]
    base = rows[0]["perplexity"]["base"]["perplexity"]
    sentences = [
        f"{rows[0]['layers']['count']} attention layers of {result['model']} on {result['length']:,} tokens, against "
        f"attention in FP32 on the same tensors, the worst layer and the mean; {BASELINE} is the baseline, whose "
        "‖difference‖ / ‖exact‖ is so many times as large.",
        f"Perplexity over {base:.3f} of the model as it is, ± standard error of the paired difference, "
        f"{text['source']}, {text['windows']} windows.",
        "Random inputs: ‖difference‖ / ‖exact‖, and the same ratio.",
    ]
    if result["choices"] is not None:
        found = result["choices"]
        sentences.append(f"Accuracy on {found['items']} items of {found['file']}; {percent(found)} as it is.")
    dense = [row["mode"] for row in rows if row.get("attention", {}).get("ran") == "partly quantized"]
    if dense:
        sentences.append(f"Some calls ran dense with {', '.join(dense)}.")
    if any(row.get("backend") == "reference" for row in rows):
        sentences.append("Modes ran as their reference, which rounds everything but probabilities.")
    if result["not_captured"]:
        sentences.append(f"{len(result['not_captured'])} layers could not be captured.")
    return " ".join([*sentences, f"{where['device']}, torch {where['torch']}, {result['date']}."])
