"""Evaluations as a report reads them: every `evaluation*.json` in a directory, checked, and how it ran in words."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from .card import attention_sentence, cache_evaluation_sentence
from .sidecar import Count, Finite, first_error
from .untrusted import file_inside, read_json

EVALUATIONS = "evaluation*.json"


class _Part(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow")


class Text(_Part):
    """Conditions of a perplexity."""

    source: str
    window: Count
    stride: Count
    windows: Count


class Measured(_Part):
    """See `evaluation.Perplexity`."""

    perplexity: Finite
    perplexity_stderr: Finite | None


class Compared(_Part):
    """See `evaluation.Comparison`."""

    model: Measured
    base: Measured
    kl: Finite
    kl_stderr: Finite | None
    top1_agreement: Finite
    top1_agreement_stderr: Finite | None
    perplexity_increase: Finite
    perplexity_increase_stderr: Finite | None


class Speed(_Part):
    """See `evaluation.GenerationSpeed`."""

    device: str
    prompt_tokens: Count
    new_tokens: Count
    repeats: Count
    prefill_tokens_per_second: Annotated[Finite, Field(gt=0)]
    decode_tokens_per_second: Annotated[Finite, Field(gt=0)]


class AttentionUse(_Part):
    """See `hf_attention.attention_in_use`."""

    ran: str
    layers: Count
    calls: dict[str, Count]
    min_tokens: Count
    window: Count


class EvictionUse(_Part):
    """See `cache_evaluation.eviction_in_use`."""

    kept: Finite | None = None
    allocated: Finite | None = None


class CacheUse(_Part):
    """See `cache_evaluation.cache_in_use`."""

    chunk: Count
    positions: Count
    reading_codes: Count
    bits_per_element: Finite | None
    eviction: EvictionUse | None = None


class Evaluation(_Part):
    """A file that `compress` or `evaluate` wrote."""

    text: Text | None = None
    against: str | None = None
    perplexity: Measured | None = None
    comparison: Compared | None = None
    speed: dict[str, Speed] | None = None
    choices: dict[str, Any] | None = None
    last_word: dict[str, Any] | None = None
    harness: dict[str, Any] | None = None
    attention: AttentionUse | None = None
    kv_cache: CacheUse | None = None


def read_evaluations(directory: Path) -> list[dict[str, Any]]:
    """Evaluations in a directory, that of `compress` first; every one with its file, and in words how it ran."""
    found = []
    for path in sorted(directory.glob(EVALUATIONS), key=lambda path: (path.name != "evaluation.json", path.name)):
        content = read_json(file_inside(directory, path.name, where="the directory"))
        try:
            content = Evaluation.model_validate(content).model_dump()
        except ValidationError as error:
            raise ValueError(f"{path} is damaged: {first_error(error)}") from error
        try:
            ran = [attention_sentence(content.get("attention")), cache_evaluation_sentence(content.get("kv_cache"))]
            found.append({"file": path.name, **content, "ran": " ".join(filter(None, ran)), "tasks": tasks(content)})
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"{path} is damaged: it lacks or misstates {error}") from error
    return found


def tasks(content: dict[str, Any]) -> list[dict[str, Any]]:
    """Accuracies on task files: file, items, model and base as (value, standard error), paired difference."""
    rows = []
    for name, key in (("choices", "accuracy_norm"), ("last_word", "accuracy")):
        task = content.get(name)
        if not task:
            continue
        model, base, flips = task["model"], task.get("base"), task.get("flips")
        difference = None if flips is None else (flips["accuracy_difference"], flips["accuracy_difference_stderr"])
        rows.append(
            {
                "task": "multiple choice, by length" if name == "choices" else "last word",
                "file": str(task["file"]),
                "items": int(model["items"]),
                "model": _pair((model[key], model[f"{key}_stderr"])),
                "base": None if base is None else _pair((base[key], base[f"{key}_stderr"])),
                "difference": None if difference is None else _pair(difference),
            }
        )
    return rows + harness_tasks(content.get("harness") or {"results": []})


def harness_tasks(content: dict[str, Any]) -> list[dict[str, Any]]:
    """The same of tasks that lm-eval ran, as far as their metrics are shares of right items."""
    rows = []
    for row in content["results"]:
        if not str(row["metric"]).startswith(("acc", "exact_match")):
            continue
        task = f"{row['metric']}, {content['harness']}" + (f", {row['num_fewshot']}-shot" if row["num_fewshot"] else "")
        pairs = {side: _pair(row[side]) if row.get(side) else None for side in ("model", "base", "difference")}
        rows.append({"task": task, "file": str(row["task"]), "items": int(row["items"]), **pairs})
    return rows


def _pair(values: tuple[Any, Any]) -> tuple[float, float | None]:
    return float(values[0]), None if values[1] is None else float(values[1])
