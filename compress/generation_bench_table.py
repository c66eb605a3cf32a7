"""What `generation_bench` measured, as Markdown."""

from __future__ import annotations

from typing import Any

from .sweep import noted


def way_name(row: dict[str, Any]) -> str:
    """How a row's model runs, in words."""
    if row["way"] == "dynamic":
        return "transformers, DynamicCache"
    if row["way"] == "static":
        return "transformers, StaticCache, compiled" if row.get("compiled", True) else "transformers, StaticCache"
    return row["way"]


def ratios(row: dict[str, Any], rows: list[dict[str, Any]]) -> list[float | None]:
    """How many times as fast per token as transformers' dynamic and static caches, at the same shape."""
    if "token_ms" not in row:
        return [None, None]
    found = []
    for way in ("dynamic", "static"):
        peer = next((item for item in rows if item["way"] == way and shape_of(item) == shape_of(row)), {})
        found.append(peer["token_ms"] / row["token_ms"] if "token_ms" in peer else None)
    return found


def shape_of(row: dict[str, Any]) -> tuple[int, int, int]:
    """What rows must share to be compared."""
    return row["context"], row["batch"], row["new_tokens"]


def shape_name(row: dict[str, Any]) -> str:
    """``8 × 32,768``."""
    return f"{row['batch']} × {row['context']:,}"


def generation_table(result: dict[str, Any]) -> str:
    """One table: rows are shapes and ways, columns times, ratios and memory."""
    head = ["sequences × prompt", "runs as", "first token, ms", "per token, ms (floor)", "× dynamic", "× static"]
    head += ["peak memory, GB", "cache, GB"]
    sparse = any("sparsity" in row for row in result["rows"])
    head += ["tiles of sparse layers", "first token × dynamic"] if sparse else []
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    for shape in dict.fromkeys(shape_of(row) for row in result["rows"]):
        for row in (row for row in result["rows"] if shape_of(row) == shape):
            found = cells(row, result["rows"]) + (first_token_cells(row, result["rows"]) if sparse else [])
            lines.append(f"| {' | '.join([shape_name(row), way_name(row), *found])} |")
    return "\n".join([*lines, "", f"{' '.join([*meaning(result), *absences(result)])}{noted(result)}"])


def cells(row: dict[str, Any], rows: list[dict[str, Any]]) -> list[str]:
    """What stands in a row behind its shape and way."""
    if "absent" in row:
        return ["–"] * 6
    floor = "" if row["floor_ms"] is None else f" ({row['floor_ms']:,.2f})"
    peak = "–" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 1e9:,.1f}"
    return [
        f"{row['first_token_ms']:,.0f}",
        f"{row['token_ms']:,.2f}{floor}",
        *("–" if ratio is None else f"{ratio:.2f}" for ratio in ratios(row, rows)),
        peak,
        f"{row['allocated_cache_bytes'] / 1e9:,.2f}",
    ]


def first_token_cells(row: dict[str, Any], rows: list[dict[str, Any]]) -> list[str]:
    """The share of tiles that sparse layers visited, and how many times as fast a prompt is taken in as by
    transformers' dynamic cache.
    """
    if "absent" in row:
        return ["–", "–"]
    peer = next((item for item in rows if item["way"] == "dynamic" and shape_of(item) == shape_of(row)), {})
    used = row.get("sparsity")
    ratio = f"{peer['first_token_ms'] / row['first_token_ms']:.2f}" if "first_token_ms" in peer else "–"
    return ["–" if used is None else f"{used['density']:.1%} of {used['layers']} layers", ratio]


def meaning(result: dict[str, Any]) -> list[str]:
    """Sentences on what was run, where, and what the floor is."""
    environment, bandwidth = result["environment"], result["bandwidth_gb_per_second"]
    weights = "random weights: this is speed and nothing else" if result["random_weights"] else "its own weights"
    new_tokens = ", ".join(f"{count:,}" for count in dict.fromkeys(row["new_tokens"] for row in result["rows"]))
    sentences = [
        f"{result['model']} with {weights}; random prompts, {new_tokens} tokens generated greedily, medians over "
        f"{result['repeats']} {'run' if result['repeats'] == 1 else 'runs'} after one to warm up."
    ]
    slots = [row["recipe"] or {} for row in result["rows"]]
    if any(recipe.get("weights", {}).get("method") == "rtn" for recipe in slots):
        sentences.append("Recipes' INT4 weights are rounded to nearest: the bytes and kernels of any method.")
    if any("attention" in recipe for recipe in slots):
        sentences.append("Arithmetics of attention are chosen on random tokens.")
    patterns = {(row["way"], row["sparsity"]["patterns"]) for row in result["rows"] if "sparsity" in row}
    sentences += [f"Patterns of {way} are {text}." for way, text in sorted(patterns) if text is not None]
    if bandwidth is not None:
        sentences.append(
            f"The floor reads the weights once and the cache at the prompt's length at {bandwidth / 1e3:.2f} TB/s, "
            "measured in the same run."
        )
    if any(row.get("peak_bytes") for row in result["rows"]):
        sentences.append("Peak memory is what torch allocates, weights included.")
    sentences.append("Cache is what its tensors take after the last token.")
    versions = (
        f"torch {environment['torch']}, transformers {environment['transformers']}, Triton {environment['triton']}"
    )
    return [*sentences, f"{environment['device']}, {versions}, {result['date']}."]


def absences(result: dict[str, Any]) -> list[str]:
    """A sentence for every way and reason for which it has no time, with the shapes."""
    places: dict[tuple[str, str], list[str]] = {}
    for row in result["rows"]:
        if "absent" in row:
            places.setdefault((way_name(row), row["absent"]), []).append(shape_name(row))
    return [f"{way} has no time ({'; '.join(where)}): {why}." for (way, why), where in places.items()]
