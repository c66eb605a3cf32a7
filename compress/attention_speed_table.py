"""What `attention_speed` measured: merged from several runs, checked, and as Markdown."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

from .attention_speed import CHECK_LENGTH, with_shares
from .linear_speed_table import measured_on, merged_rows
from .sweep import noted

TABLE_PEERS = ("cudnn", "fa2")
"""Peers whose ratios the Markdown table shows, as far as they were measured."""
NAMES = {
    "cudnn": "cuDNN's bf16 attention",
    "fa2": "FlashAttention 2",
    "transformers": "what transformers runs",
    "sageattention": "the sageattention package",
}


def identity(row: dict[str, Any]) -> tuple[Any, ...]:
    """What tells rows apart."""
    return tuple(row[key] for key in ("mask", "batch", "heads", "kv_heads", "head_dim", "length", "mode"))


def merged_attention(file: Path, result: dict[str, Any]) -> dict[str, Any]:
    """`result` with the rows of an earlier file in front; a row measured again replaces the old one.

    The larger of both runs' ceilings holds for all rows. Raises ValueError if the file was measured on another device
    or with other versions.
    """
    merged = merged_rows(file, result, {"rows": identity})
    return result if merged is result else with_shares(merged)


def why_wrong(row: dict[str, Any], check_length: int = CHECK_LENGTH) -> str:
    """In a few words, what a wrong row disagreed with. check_length: tokens that kernels are checked on."""
    if row.get("reason"):
        return row["reason"]
    if "length_error" in row:
        return f"error {row['length_error']} at this length"
    return f"error {row['error']} on {check_length} tokens"


def check_attention_speeds(result: dict[str, Any]) -> None:
    """Raises RuntimeError, naming the first, if rows are wrong."""
    wrong = [row for row in result["rows"] if not row["correct"]]
    if wrong:
        row = wrong[0]
        first = f"{row['mask']} {row['heads']}/{row['kv_heads']} heads of {row['head_dim']}, {row['length']} tokens"
        raise RuntimeError(
            f"{len(wrong)} of {len(result['rows'])} results are wrong and have no time; "
            f"the first is {first}, {row['mode']} ({why_wrong(row)})"
        )


def attention_table(result: dict[str, Any]) -> str:
    """One table per mask, batch and heads: rows are lengths, columns head_dim × mode, cells TFLOP/s · ratios."""
    peers = [peer for peer in TABLE_PEERS if peer in result["against"]] or list(result["against"])[:1]
    tables: dict[tuple[Any, ...], dict[tuple[int, str], dict[int, str]]] = defaultdict(lambda: defaultdict(dict))
    for row in result["rows"]:
        table = row["mask"], row["batch"], row["heads"], row["kv_heads"]
        tables[table][row["head_dim"], row["mode"]][row["length"]] = cell(row, peers)
    lines = []
    for (mask, batch, heads, kv_heads), columns in tables.items():
        rows = f", batch {batch}" if batch > 1 else ""
        names = sorted(columns, key=lambda column: column[0])
        lines += [f"| {mask}, {heads}/{kv_heads} heads{rows}: tokens | {' | '.join(f'{d} {m}' for d, m in names)} |"]
        lines += [f"|---|{'---|' * len(names)}"]
        for length in sorted({length for cells in columns.values() for length in cells}):
            cells = [columns[name].get(length, "–") for name in names]
            lines.append(f"| {length:,} | {' | '.join(cells)} |")
        lines.append("")
    sentences = [meaning(peers), measured_on(result), *absences(result)]
    return "\n".join([*lines, f"{' '.join(sentences)}{noted(result)}"])


def cell(row: dict[str, Any], peers: list[str]) -> str:
    """``612 · 1.62 / 1.71``, with – for a peer that is absent."""
    if not row["correct"]:
        return "wrong"
    found = [row["peers"].get(peer, {}).get("ratio") for peer in peers]
    ratios = " / ".join("–" if ratio is None else f"{ratio:.2f}" for ratio in found)
    return f"{row['tflops']:,.0f} · {ratios}" if peers else f"{row['tflops']:,.0f}"


def meaning(peers: list[str]) -> str:
    """What the cells of the table are."""
    times = f" · times as fast as {' / as '.join(NAMES[peer] for peer in peers)}" if peers else ""
    return (
        f"Columns are head_dim and mode, cells TFLOP/s{times}; quantization is in every time of ours, "
        "peers' masks are made and their KV heads repeated, where they must be, before it."
    )


def absences(result: dict[str, Any]) -> list[str]:
    """A sentence for every peer and reason for which it is absent, with the masks and lengths where it is."""
    places: dict[tuple[str, str], dict[tuple[str, int], None]] = defaultdict(dict)
    for row in result["rows"]:
        for peer, entry in row["peers"].items():
            if "absent" in entry:
                places[peer, entry["absent"]][row["mask"], row["length"]] = None
    every = {(row["mask"], row["length"]) for row in result["rows"]}
    found = []
    for (peer, why), where in places.items():
        masks = dict.fromkeys(mask for mask, _ in where)
        lengths = sorted({length for _, length in where})
        parts = [] if len(masks) == len({mask for mask, _ in every}) else [", ".join(masks)]
        if {place for place in every if place[0] in masks} != set(where):
            parts.append(f"{', '.join(f'{length:,}' for length in lengths)} tokens")
        place = f" ({'; '.join(parts)})" if parts else ""
        found.append(f"{peer} is absent{place}: {why}.")
    return found
