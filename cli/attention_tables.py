"""What a recipe's attention and cache slots add to the tables of `tables.py`, and recipes without weights."""

from __future__ import annotations

from collections import Counter
from typing import Any

from . import tables
from .retrieval_tables import generated, retrieved
from .tables import Shown, size, table


def recipe_line(recipe: Any) -> str:
    """A recipe on one line: name, and every slot's method with its options."""
    content = recipe.model_dump(mode="json", exclude_none=True)
    parts = []
    if "weights" in content:
        parts.append(tables.recipe_line(recipe))
    for slot, title in (("attention", "attention"), ("kv_cache", "cache"), ("sparsity", "sparsity")):
        if slot in content:
            options = dict(content[slot])
            method = options.pop("method")
            given = [(key, value) for key, value in options.items() if value is not None]
            words = ", ".join(f"{key.replace('_', ' ')} {tables.word(value)}" for key, value in given)
            parts.append(f"{title} {method}, {words}")
    return "; ".join(parts) if "weights" in content else f"recipe {recipe.name}: {'; '.join(parts)}"


def compression(report: dict[str, Any]) -> Shown:
    """The result of `compress`."""
    if report["sizes"]["bits_per_weight"] is None:
        shown = as_stored(tables.compression(with_bits(report)), report)
    else:
        shown = tables.compression(report)
    extra = []
    if "attention" in report:
        extra += [layers(report), ""]
    if "sparsity" in report:
        extra += [sparse(report), ""]
    if "attention" in report or "sparsity" in report:
        extra += [*ran(report["evaluation"]), ""]
    if "kv_cache" in report:
        extra += [*cached(report, report["evaluation"]), ""]
    return [*shown[:-2], *extra, *shown[-2:]]


def evaluation(content: dict[str, Any]) -> Shown:
    """The result of `evaluate`."""
    return [
        *tables.evaluation(content),
        *ran(content),
        *cached({}, content),
        *tasks_cached(content),
        *retrieved(content),
        *generated(content),
    ]


def planned(content: dict[str, Any]) -> Shown:
    """The result of `plan`."""
    if content["scheme"] is None:
        shown = tables.planned({**with_bits(content), "scheme": "weights as they are"})
        shown = as_stored(shown, content)
    else:
        shown = tables.planned(content)
    shown += cache_plan(content)
    shown += ceilings(content)
    recipe = content["recipe"]
    if "attention" in content:
        below = f"calls of fewer than {recipe['attention']['min_tokens']:,} queries, and decoding, are dense"
        shown += ["", grouped("attention", content["attention"]), below]
    if "sparsity" in content:
        below = f"calls over fewer than {recipe['sparsity']['min_length']:,} keys, and decoding, visit all of them"
        shown += ["", grouped("sparse prefill", content["sparsity"]), below]
    return shown


def grouped(title: str, lines: list[dict[str, Any]]) -> Any:
    """Layers by what happens to them."""
    rows = table("", title, "layers", "")
    groups = Counter((line["status"], line["reason"]) for line in lines)
    for (status, reason), count in groups.items():
        rows.add_row(status, f"{count}", reason)
    return rows


def cached(report: dict[str, Any], evaluation: dict[str, Any] | None) -> list[str]:
    """How the cache is kept, and whether an evaluation read it."""
    from ..compress.card import cache_evaluation_sentence, cache_sentence

    measured = (evaluation or {}).get("kv_cache")
    sentences = (cache_sentence(report.get("kv_cache"), measured), cache_evaluation_sentence(measured))
    return [text.replace("`", "") for text in sentences if text]


def tasks_cached(content: dict[str, Any]) -> list[str]:
    """How attention ran and the cache was read in each task."""
    from ..compress.card import attention_sentence, cache_evaluation_sentence

    found = [(content[task]["file"], content[task]) for task in ("choices", "last_word") if task in content]
    if "harness" in content:
        found.append(("lm-eval", content["harness"]))
    lines = []
    for name, used in found:
        sentences = (attention_sentence(used.get("attention")), cache_evaluation_sentence(used.get("kv_cache")))
        lines += [f"{name}: {text}" for text in sentences if text]
    return lines


def ceilings(content: dict[str, Any]) -> Shown:
    """What else runs the result, and how fast it could be at most."""
    engines = table("", "engine", "runs")
    for row in content["engines"]:
        engines.add_row(row["engine"], row["runs"])
    if "ceilings" not in content:
        return ["", engines]
    found = content["ceilings"]
    device = found["device"]
    rows = table("", "sequences × tokens", "ms per token ≥", "compressed ≥", "ms per prompt ≥", "compressed ≥", "")
    for row in found["rows"]:
        cells = [row[f"{kind}_{what}_ms"] for what in ("decode", "prefill") for kind in ("base", "compressed")]
        rows.add_row(f"{row['batch']:,} × {row['context']:,}", *(f"{cell:,.4g}" for cell in cells), "")
    fp8 = "none" if device["fp8"] is None else f"{device['fp8'] / 1e12:,.0f} TFLOP/s"
    words = (
        f"ceilings, not forecasts: {device['name']}, {device['bandwidth'] / 1e12:.2f} TB/s, bf16 "
        f"{device['bf16'] / 1e12:,.0f} TFLOP/s, FP8 {fp8} ({device['source']}); nothing but reading weights and cache, "
        "and multiplying, takes time"
    )
    return ["", engines, "", rows, words]


def cache_plan(content: dict[str, Any]) -> list[str]:
    """Layers whose cache is compressed, and those whose cache stays as it is."""
    if "kv_cache" not in content:
        return []
    dense = content["kv_cache"]["dense_layers"]
    covered = f"the cache of {content['kv_cache']['compressed_layers']} layers is compressed"
    if dense:
        covered += f", that of {dense} stays dense"
    if codebooks := content["kv_cache"]["codebook_bytes"]:
        covered += f"; codebooks and other static tensors take {codebooks / 1e6:,.1f} MB, once for all sequences"
    return ["", covered]


def layers(report: dict[str, Any]) -> Any:
    """Attention layers by what they run in, with the worst figures."""
    from ..compress.artifact import read_policies
    from ..compress.card import attention_rows
    from ..compress.layer_policies import arithmetic_of

    rows = table("", "attention runs in", "layers", "cosine ≥", "relative L1 ≤", "SQNR ≥ dB", "")
    for row in attention_rows(arithmetic_of(read_policies(report))):
        cells = (row["cosine"], row["relative_l1"], row["sqnr_db"])
        rows.add_row(row["mode"], f"{row['count']}", *cells, f"calls of {row['min_tokens']:,} queries and more")
    return rows


def sparse(report: dict[str, Any]) -> str:
    """Which keys prefill visits."""
    from ..compress.artifact import read_policies
    from ..compress.card import sparsity_sentence
    from ..compress.layer_policies import sparsity_of

    return sparsity_sentence(sparsity_of(read_policies(report)))


def ran(content: dict[str, Any] | None) -> list[str]:
    """Whether attention ran quantized in an evaluation."""
    from ..compress.card import attention_sentence

    text = attention_sentence((content or {}).get("attention"))
    return [text] if text else []


def with_bits(content: dict[str, Any]) -> dict[str, Any]:
    """The content with a number where `tables.py` formats one; `as_stored` replaces the row."""
    return {**content, "sizes": {**content["sizes"], "bits_per_weight": 0.0}}


def as_stored(shown: Shown, content: dict[str, Any]) -> Shown:
    """The result with its first table replaced by one without bits per quantized weight."""
    sizes = content["sizes"]
    rows = table("", "", "base", "compressed", "")
    rows.add_row("weights", size(sizes["base_bytes"]), size(sizes["compressed_bytes"]), "as they are")
    tables.cache_rows(rows, content)
    if content.get("evaluation") is not None:
        tables.compare_rows(rows, content["evaluation"]["comparison"])
    place = next(index for index, item in enumerate(shown) if not isinstance(item, str))
    return [*shown[:place], rows, *shown[place + 1 :]]
