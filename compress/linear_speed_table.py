"""What `linear_speed` measured: merged from several runs, checked, and as Markdown."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .linear_speed import with_shares
from .sweep import checked_earlier, joined, noted

TABLE_PEERS = ("bf16", "fp8")
"""Peers whose ratios the Markdown table shows, as far as they were measured."""
NAMES = {
    "bf16": "cuBLAS in bf16",
    "fp8": "FP8 weights (`torch._scaled_mm`, row-wise scales)",
    "fp8-mm": "the FP8 product alone",
    "torch-int4": "torch's INT4 product",
    "gemlite": "GemLite A16W4",
}
CONDITIONS = ("bench", "version", "kompakt", "environment", "cache_bytes")


def identity(row: dict[str, Any]) -> tuple[Any, ...]:
    """What tells rows apart."""
    return row["out_features"], row["in_features"], row["tokens"], row["label"]


def quantization_identity(row: dict[str, Any]) -> tuple[Any, ...]:
    """What tells the rows of the section `quantization` apart."""
    return row["in_features"], row["tokens"], row["layout"]


def merged_speeds(file: Path, result: dict[str, Any]) -> dict[str, Any]:
    """`result` with the rows of an earlier file in front; a row measured again replaces the old one.

    The larger of both runs' ceilings holds for all layers. Raises ValueError if the file was measured on another device
    or with other versions.
    """
    merged = merged_rows(file, result, {"rows": identity, "quantization": quantization_identity})
    return result if merged is result else with_shares(merged)


def merged_rows(
    file: Path, result: dict[str, Any], sections: dict[str, Callable[[dict[str, Any]], Any]]
) -> dict[str, Any]:
    """`merged_speeds` before shares are taken; `result` itself if there is no earlier file.

    sections: lists of rows → what tells their rows apart.
    """
    earlier = checked_earlier(file, result, CONDITIONS)
    if earlier is None:
        return result
    changed: dict[str, Any] = {name: joined(earlier[name], result[name], apart) for name, apart in sections.items()}
    changed["ceilings"] = larger_ceilings(earlier, result)
    return {**result, **changed, "against": {**earlier["against"], **result["against"]}}


def larger_ceilings(earlier: dict[str, Any], result: dict[str, Any]) -> dict[str, float | None]:
    """The larger of two runs' ceilings, one by one."""
    return {
        name: value if value is None else max(value, earlier["ceilings"][name])
        for name, value in result["ceilings"].items()
    }


def check_speeds(result: dict[str, Any]) -> None:
    """Raises RuntimeError, naming the first, if rows disagree with their reference."""
    wrong = [
        f"{row['out_features']}×{row['in_features']} {row['label']} with {row['tokens']} tokens "
        f"({row.get('reason') or 'error ' + str(row['error'])})"
        for row in result["rows"]
        if not row["correct"]
    ]
    wrong += [
        f"quantization {row['layout']}, {row['tokens']}×{row['in_features']}"
        for row in result["quantization"]
        if not row["correct"]
    ]
    if wrong:
        count = len(result["rows"]) + len(result["quantization"])
        raise RuntimeError(f"{len(wrong)} of {count} results are wrong and have no time; the first is {wrong[0]}")


def speed_table(result: dict[str, Any]) -> str:
    """One table per model: rows are shape × layer, columns numbers of tokens, cells how many times as fast as peers."""
    peers = [peer for peer in TABLE_PEERS if peer in result["against"]] or list(result["against"])[:1]
    models: dict[str, dict[tuple[str, str], dict[int, str]]] = defaultdict(lambda: defaultdict(dict))
    for row in result["rows"]:
        layer = f"{row['out_features']}×{row['in_features']}", row["label"]
        models[row["model"]][layer][row["tokens"]] = ratios(row, peers)
    lines = []
    for model, layers in models.items():
        head = "tokens" if model == "other" else f"{model}: tokens"
        columns = sorted({tokens for cells in layers.values() for tokens in cells})
        lines += [f"| {head} | {' | '.join(f'{tokens:,}' for tokens in columns)} |"]
        lines += [f"|---|{'---|' * len(columns)}"]
        for layer, cells in layers.items():
            lines.append(f"| {' '.join(layer)} | {' | '.join(cells.get(tokens, '–') for tokens in columns)} |")
        lines.append("")
    others = "".join(f" {extremes(result, peer)}" for peer in result["against"] if peer not in peers)
    return "\n".join([*lines, f"{meaning(peers)}{others} {measured(result)}{noted(result)}"])


def extremes(result: dict[str, Any], peer: str) -> str:
    """The least and the greatest ratio to a peer that has no cells, by method; "" without any."""
    found: dict[str, list[float]] = defaultdict(list)
    for row in result["rows"]:
        if (ratio := row["peers"].get(peer, {}).get("ratio")) is not None:
            found[row["method"]].append(ratio)
    parts = [f"{method} {min(ratios):.2f} to {max(ratios):.2f} times" for method, ratios in found.items()]
    return f"As fast as {NAMES[peer]}: {', '.join(parts)}." if parts else ""


def ratios(row: dict[str, Any], peers: list[str]) -> str:
    """``3.41 / 2.20``; – for a peer that is absent, and in place of the ratios if there is none: microseconds."""
    if not row["correct"]:
        return "wrong"
    if not peers:
        return f"{row['microseconds']:.1f} µs"
    found = [row["peers"].get(peer, {}).get("ratio") for peer in peers]
    return " / ".join("–" if ratio is None else f"{ratio:.2f}" for ratio in found)


def meaning(peers: list[str]) -> str:
    """What the cells of the table are."""
    what = f"Times as fast as {' / as '.join(NAMES[peer] for peer in peers)}" if peers else "Time of a layer"
    return (
        f"{what}; quantization of activations included, weights read from memory. "
        "Four bits save bytes, never multiplications."
    )


def measured(result: dict[str, Any]) -> str:
    """A sentence on device, versions, date and ceilings, and one on every peer that never ran."""
    return " ".join([measured_on(result), *(f"{peer} is absent: {why}." for peer, why in absent(result).items())])


def measured_on(result: dict[str, Any]) -> str:
    """A sentence on device, versions, date and ceilings."""
    environment, ceilings = result["environment"], result["ceilings"]
    fp8 = "" if ceilings["fp8_tflops"] is None else f", FP8 {ceilings['fp8_tflops']:,.0f}"
    bandwidth = max(ceilings["read_gb_per_second"], ceilings["copy_gb_per_second"]) / 1e3
    return (
        f"{environment['device']}, torch {environment['torch']}, Triton {environment['triton']}, {result['date']}; "
        f"ceilings in the same run: {bandwidth:.2f} TB/s, bf16 {ceilings['bf16_tflops']:,.0f}{fp8} TFLOP/s."
    )


def absent(result: dict[str, Any]) -> dict[str, str]:
    """Peers without a single time, and the first reason."""
    found = {}
    for peer in result["against"]:
        entries = [row["peers"][peer] for row in result["rows"] if peer in row["peers"]]
        if entries and all("absent" in entry for entry in entries):
            found[peer] = entries[0]["absent"]
    return found
