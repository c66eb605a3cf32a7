"""`report`: what is known about compressed directories, on one page and as JSON.

Everything is read from what `compress` and `evaluate` wrote; nothing is run. A number appears with the conditions it
was measured under or not at all: a perplexity needs its text, window and number of windows, a speed its device and
lengths. Directories are compared only where the conditions are the same, which is text, window, stride, windows, and a
base model of the same perplexity (to 0.5 %, since a text is known here by its name alone); where they are not, the
report says so and draws nothing. Directories are of unknown origin: all of their text is escaped, their JSON checked.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from .artifact import SIDECAR_TENSORS, read_cache, read_policies, read_sidecar, weight_bytes, write_cache
from .card import cache_sentence, coverage_rows, judged_sentence, sparsity_sentence
from .layer_policies import arithmetic_of, sparsity_of
from .recipe import SLOTS, Recipe
from .report_evaluations import read_evaluations
from .restore import REASON
from .untrusted import file_inside, header, stored_tensors

SAME_BASE = 0.005
"""Relative difference of base perplexities up to which two texts of one name are taken for the same."""


def report(directories: Sequence[str | Path]) -> dict[str, Any]:
    """What is known about directories that `compress` wrote, JSON-able; see `report_page.page` for HTML.

    Evaluations are every `evaluation*.json` in a directory. Raises ValueError for a directory or a file in it that is
    damaged.
    """
    from .. import __version__

    if not directories:
        raise ValueError("no directory was given; a report is about at least one")
    found = [describe(Path(directory)) for directory in directories]
    for item, name in zip(found, distinct_names([Path(directory) for directory in directories])):
        item["name"] = name
    return {
        "kompakt": __version__,
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "directories": found,
        "comparisons": {"quality": quality_groups(found), "speed": speed_groups(found)},
    }


def distinct_names(paths: list[Path]) -> list[str]:
    """Short names: the last part of each path, or more where that is the same; numbered if paths are the same."""
    parts = [path.absolute().parts for path in paths]
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-length:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    return [f"{path.name} ({index + 1})" for index, path in enumerate(paths)]


def describe(directory: Path) -> dict[str, Any]:
    """Everything about one directory."""
    sidecar = read_sidecar(directory, verify=False)
    recipe = Recipe.load(sidecar["recipe"])
    policies, cache = read_policies(sidecar), read_cache(sidecar, directory)
    evaluations = read_evaluations(directory)
    measured = next((item["kv_cache"] for item in evaluations if item.get("kv_cache")), None)
    described = {
        "directory": str(directory),
        "recipe": {"name": recipe.name, "description": recipe.description, "slots": slots(recipe)},
        **{key: sidecar.get(key) for key in ("kompakt", "base_model", "command", "environment", "calibration")},
        "seconds": sidecar.get("seconds"),
        "sizes": {
            **{key: (sidecar.get("sizes") or {}).get(key) for key in ("base_bytes", "bits_per_weight")},
            "compressed_bytes": weight_bytes(directory),
        },
        "parts": parts(directory, sidecar.get("coverage", [])),
        "coverage": coverage_rows(sidecar.get("coverage", [])),
        "layers": layer_rows(sidecar),
        "attention": attention_rows(arithmetic_of(policies)),
        "attention_judged": judged_sentence(arithmetic_of(policies)) if arithmetic_of(policies) else "",
        "sparsity": sparsity_sentence(sparsity_of(policies)),
        "sparse_layers": sparsity_rows(sparsity_of(policies)),
        "kv_cache": cache_sentence(write_cache(cache), measured) if cache is not None else "",
        "cache_bits": cache_bits([item["kv_cache"] for item in evaluations if item.get("kv_cache")]),
        "evaluations": evaluations,
    }
    return {**described, "warnings": warnings(described, sidecar, recipe)}


def cache_bits(measured: list[dict[str, Any]]) -> str:
    """Bits of a cached element, and of how many of a prompt's tokens, by the first evaluation that coded any; or
    nothing.
    """
    coded = next((item for item in measured if item["bits_per_element"] is not None), None)
    if coded is None:
        return ""
    kept = (coded.get("eviction") or {}).get("kept")
    return f"{coded['bits_per_element']:.3f}{'' if kept is None else f', {kept:.0%} of tokens'}"


def slots(recipe: Recipe) -> list[dict[str, str]]:
    """Slot, method and options of a recipe, in words."""
    rows = []
    content = recipe.model_dump(mode="json", exclude_none=True)
    for slot in SLOTS:
        if slot not in content:
            rows.append({"slot": slot, "method": "as it is", "options": ""})
            continue
        options = dict(content[slot])
        method = options.pop("method")
        words = ", ".join(
            f"{key} {json.dumps(value) if isinstance(value, list) else value}"
            for key, value in options.items()
            if value is not None
        )
        rows.append({"slot": slot, "method": method, "options": words})
    return rows


def parts(directory: Path, coverage: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What the bytes are spent on: modules by the last part of their name and by whether they are quantized."""
    lines = {line["name"]: line for line in coverage}
    inner = {inside_block(name): line for name, line in lines.items()}
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    sizes: dict[str, int] = {}
    for tensor in stored_tensors(directory).values():
        owner = tensor.name.rpartition(".")[0]
        sizes[owner] = sizes.get(owner, 0) + tensor.bytes
    for name, size in sizes.items():
        line = lines.get(name) or inner.get(inside_block(name))
        status = "kept" if line is None else line["status"]
        part = name.rpartition(".")[2] or "other"
        row = rows.setdefault((part, status), {"part": part, "status": status, "modules": 0, "weights": 0, "bytes": 0})
        row["modules"] += 1
        row["weights"] += 0 if line is None else line["parameters"]
        row["bytes"] += size
    factors = sum(tensor.bytes for tensor in header(file_inside(directory, SIDECAR_TENSORS, where="it")).values())
    found = sorted(rows.values(), key=lambda row: -row["bytes"])
    if factors:
        found.append({"part": "tensors of methods", "status": "sidecar", "modules": 0, "weights": 0, "bytes": factors})
    return found


def inside_block(name: str) -> str:
    """A name without the block of a decoder layer that it is in, which files and memory may call differently: of
    ``layers.0.mlp.experts.3.w1`` it is ``layers.0.experts.3.w1``.
    """
    return re.sub(r"^(\D*\.\d+)\.[^.]+(?=\.)", r"\1", name)


def layer_rows(sidecar: dict[str, Any]) -> list[dict[str, Any]]:
    """Error of every decoder layer, and whether it was given back its float weights."""
    restored = [line["name"] for line in sidecar.get("coverage", []) if line["reason"] == REASON]
    return [
        {
            "name": layer["name"],
            "error": layer["error"],
            "restored": any(name.startswith(f"{layer['name']}.") for name in restored),
        }
        for layer in sidecar.get("layers", [])
    ]


def attention_rows(policies: dict[str, Any]) -> list[dict[str, Any]]:
    """What each attention layer runs in, and how near that is to exact attention."""
    rows = []
    for name, policy in policies.items():
        figures = policy.tried.get(policy.mode)
        rows.append(
            {
                "name": name,
                "mode": "dense" if policy.mode == "bf16" else policy.mode,
                "cosine": None if figures is None else figures.cosine,
                "relative_l1": None if figures is None else figures.relative_l1,
                "sqnr_db": None if figures is None else figures.sqnr_db,
                "tried": {mode: figure.cosine for mode, figure in policy.tried.items()},
                "tokens": policy.tokens,
                "min_tokens": policy.min_tokens,
                "reason": policy.reason,
            }
        )
    return rows


def sparsity_rows(policies: dict[str, Any]) -> list[dict[str, Any]]:
    """Which patterns the heads of each layer run, counted and one by one, and what they visit."""
    return [
        {
            "name": name,
            "patterns": ", ".join(
                f"{count} {key}" for key, count in Counter(head.key for head in policy.heads).items()
            ),
            "heads": [head.as_dict() for head in policy.heads],
            "density": None if policy.figures is None else policy.figures.density,
            "recall": None if policy.figures is None else policy.figures.recall,
            "error": None if policy.figures is None else policy.figures.error,
            "reason": policy.reason,
        }
        for name, policy in policies.items()
    ]


def warnings(described: dict[str, Any], sidecar: dict[str, Any], recipe: Recipe) -> list[str]:
    """What a reader should know before believing the numbers."""
    found = []
    evaluations = described["evaluations"]
    if not any(item.get("comparison") for item in evaluations):
        found.append("Quality against the base model was not measured.")
    for item in evaluations:
        if item.get("perplexity") and not item.get("text"):
            found.append(f"{item['file']} does not say on what text it was measured; its perplexity is left out.")
        elif item.get("comparison") and item["comparison"]["perplexity_increase_stderr"] is None:
            found.append(f"{item['file']} has one window, so that no standard error is known.")
        attention, cache = item.get("attention") or {}, item.get("kv_cache") or {}
        if str(attention.get("ran")).startswith(("dense", "partly")):
            found.append(f"Attention ran {attention['ran']} in {item['file']}.")
        if cache and not cache.get("reading_codes"):
            found.append(f"The compressed cache was not read in {item['file']}: this measured a dense cache.")
    restored = sum(layer["restored"] for layer in described["layers"])
    if restored:
        found.append(f"{restored} of {len(described['layers'])} layers were given back their float weights.")
    dense = sum(layer["mode"] == "dense" for layer in described["attention"])
    if dense:
        found.append(f"{dense} of {len(described['attention'])} attention layers stay dense.")
    if described["calibration"] and str(described["calibration"]["source"]).startswith("builtin"):
        found.append("Calibrated on the text that comes with kompakt, not on text of the model's use.")
    if recipe.needs_data and described["calibration"] is None:
        found.append("The calibration text was not recorded.")
    if "fingerprint" not in sidecar:
        found.append("No logits were recorded at compression; `kompakt verify` has none to compare with.")
    return found


def quality(item: dict[str, Any]) -> list[dict[str, Any]]:
    """Every comparison with a base model that states its conditions: evaluation file, conditions, numbers."""
    rows = []
    for evaluation in item["evaluations"]:
        text, comparison = evaluation.get("text"), evaluation.get("comparison")
        if text is None or comparison is None:
            continue
        conditions = {key: text[key] for key in ("source", "window", "stride", "windows")}
        rows.append({"file": evaluation["file"], "conditions": conditions, "comparison": comparison})
    return rows


def quality_groups(items: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Directories measured under the same conditions: conditions, members (one row each), differing (why some that
    look the same are not among them).
    """
    groups: list[dict[str, Any]] = []
    for item in items:
        for row in quality(item):
            base = row["comparison"]["base"]["perplexity"]
            group = next(
                (
                    group
                    for group in groups
                    if group["conditions"] == row["conditions"]
                    and math.isclose(group["base_perplexity"], base, rel_tol=SAME_BASE)
                ),
                None,
            )
            if group is None:
                group = {"conditions": row["conditions"], "base_perplexity": base, "members": []}
                groups.append(group)
            if all(member["name"] != item["name"] for member in group["members"]):
                group["members"].append(
                    {
                        "name": item["name"],
                        "bytes": item["sizes"]["compressed_bytes"],
                        "base_bytes": item["sizes"]["base_bytes"],
                        **{
                            key: row["comparison"][key]
                            for key in (
                                *("perplexity_increase", "perplexity_increase_stderr", "kl", "kl_stderr"),
                                *("top1_agreement", "top1_agreement_stderr"),
                            )
                        },
                    }
                )
    return groups


def speed_groups(items: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Directories whose speed was measured on one kind of device with the same lengths, each with its quality."""
    groups: list[dict[str, Any]] = []
    for item in items:
        rows = quality(item)
        for evaluation in item["evaluations"]:
            found = (evaluation.get("speed") or {}).get("model")
            if not found:
                continue
            conditions = {key: found[key] for key in ("device", "prompt_tokens", "new_tokens", "repeats")}
            own = next((row for row in rows if row["file"] == evaluation["file"]), rows[0] if rows else None)
            member = {
                "name": item["name"],
                "prefill_tokens_per_second": found["prefill_tokens_per_second"],
                "decode_tokens_per_second": found["decode_tokens_per_second"],
                "base": (evaluation.get("speed") or {}).get("base"),
                "quality": own,
            }
            group = next((group for group in groups if group["conditions"] == conditions), None)
            if group is None:
                group = {"conditions": conditions, "members": []}
                groups.append(group)
            if all(other["name"] != item["name"] for other in group["members"]):
                group["members"].append(member)
    return groups
