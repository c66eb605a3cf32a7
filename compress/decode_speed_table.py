"""What `decode_speed` measured: merged from several runs, checked, and as Markdown."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from . import attention_speed_table
from .decode_speed import CHECK_LENGTH, with_shares
from .linear_speed_table import absent, measured_on, merged_rows
from .sweep import noted

NAMES = {
    "cudnn": "cuDNN",
    "fa2": "FlashAttention 2",
    "transformers": "transformers",
    "repeated": "repeated heads",
}
SHAPE = ("batch", "length", "heads", "kv_heads", "head_dim", "queries")


def shape_of(row: dict[str, Any]) -> tuple[Any, ...]:
    """What a row shares with those of other kinds."""
    return tuple(row[key] for key in SHAPE)


def identity(row: dict[str, Any]) -> tuple[Any, ...]:
    """What tells rows apart."""
    return (*shape_of(row), row["kind"])


def merged_decode(file: Path, result: dict[str, Any]) -> dict[str, Any]:
    """`result` with the rows of an earlier file in front; a row measured again replaces the old one.

    The larger of both runs' ceilings holds for all rows. Raises ValueError if the file was measured on another device
    or with other versions.
    """
    merged = merged_rows(file, result, {"rows": identity})
    return result if merged is result else with_shares(merged)


def why_wrong(row: dict[str, Any]) -> str:
    """In a few words, what a wrong row disagreed with."""
    return attention_speed_table.why_wrong(row, row.get("checked_tokens", CHECK_LENGTH))


def shape_name(row: dict[str, Any]) -> str:
    """``8 × 32,768, 32/8 heads of 128``, and the queries if they are several."""
    queries = "" if row["queries"] == 1 else f", {row['queries']} queries"
    return f"{row['batch']} × {row['length']:,}, {row['heads']}/{row['kv_heads']} heads of {row['head_dim']}{queries}"


def check_decode_speeds(result: dict[str, Any]) -> None:
    """Raises RuntimeError, naming the first, if rows are wrong."""
    wrong = [row for row in result["rows"] if not row["correct"]]
    if wrong:
        first = f"{shape_name(wrong[0])}, {wrong[0]['kind']} ({why_wrong(wrong[0])})"
        raise RuntimeError(
            f"{len(wrong)} of {len(result['rows'])} results are wrong and have no time; the first is {first}"
        )


def decode_table(result: dict[str, Any]) -> str:
    """One table; rows are shapes and kinds, columns times, ratios, bandwidth and bytes."""
    peers = list(result["against"])
    head = ["sequences × tokens", "kind", "µs (floor)", *(f"× {NAMES[peer]}" for peer in peers)]
    head += ["of bandwidth", "bytes per token and head", "coding, µs per token"]
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    for row in result["rows"]:
        lines.append(f"| {' | '.join([shape_name(row), row['kind'], *cells(row, peers)])} |")
    sentences = [meaning(peers), *left_out(result), measured_on(result), *absences(result)]
    return "\n".join([*lines, "", f"{' '.join(sentences)}{noted(result)}"])


def cells(row: dict[str, Any], peers: list[str]) -> list[str]:
    """What stands in a row behind its shape and kind."""
    if not row["correct"]:
        return ["wrong", *("–" for _ in peers), "–", "–", "–"]
    found = [row["peers"].get(peer, {}).get("ratio") for peer in peers]
    return [
        f"{row['microseconds']:,.1f} ({row['floor_microseconds']:,.1f})",
        *("–" if ratio is None else f"{ratio:.2f}" for ratio in found),
        f"{row['share']:.0%}",
        f"{row['bytes_per_token']:.1f}",
        f"{row['coding']['microseconds_per_token']:.3f}",
    ]


def meaning(peers: list[str]) -> str:
    """What the cells of the table are."""
    times = " × are times as fast as peers on dense bf16 keys and values of the same tokens"
    repeated = ", of which repeated heads copies every KV head for each of its query heads inside the time"
    beside = f"{times}{repeated if 'repeated' in peers else ''}." if peers else ""
    return (
        "Attention of the newest tokens in one layer, preparing queries and merging parts included, and the floor of "
        f"its bytes at the measured bandwidth.{beside} Bytes are of a key and a value together, all that is allocated. "
        "Coding is what a layer adds for each generated token of every sequence, a page at a time."
    )


def left_out(result: dict[str, Any]) -> list[str]:
    """A sentence where some kinds do not read all of what peers read."""
    found = [row["kept_tokens"] for row in result["rows"] if "kept_tokens" in row]
    if not found:
        return []
    least, most = min(counts[0] for counts in found), max(counts[1] for counts in found)
    return [
        f"What evict… leaves out is not read, beside peers that read all tokens: KV heads have kept {least:,} to "
        f"{most:,} of them, dense ones not counted."
    ]


def absences(result: dict[str, Any]) -> list[str]:
    """A sentence for every peer that has no time at all, and one for every other reason where it has none."""
    never = absent(result)
    found = [f"{peer} is absent: {why}." for peer, why in never.items()]
    places: dict[tuple[str, str], dict[str, None]] = {}
    for row in result["rows"]:
        for peer, entry in row["peers"].items():
            if "absent" in entry and peer not in never:
                places.setdefault((peer, entry["absent"]), {})[shape_name(row)] = None
    return found + [f"{peer} is absent ({'; '.join(where)}): {why}." for (peer, why), where in places.items()]
