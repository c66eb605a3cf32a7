"""What `sparse_speed` measured: checked, and as Markdown."""

from __future__ import annotations

from typing import Any

from .linear_speed_table import measured_on
from .sparse_speed import CHECK_LENGTH
from .sweep import noted


def check_sparse_speeds(result: dict[str, Any]) -> None:
    """Raises RuntimeError, naming the first, if rows are wrong."""
    wrong = [row for row in result["rows"] if not row["correct"]]
    if wrong:
        row = wrong[0]
        why = row.get("reason") or f"error {row['error']} on {CHECK_LENGTH} tokens"
        raise RuntimeError(
            f"{len(wrong)} of {len(result['rows'])} results are wrong and have no time; the first is {row['pattern']} "
            f"at {level_of(row)}, {row['length']} tokens, {row['mode']} ({why})"
        )


def level_of(row: dict[str, Any]) -> str:
    """``25%`` of the tiles, or ``1000x6096`` keys and distances."""
    return row["budgets"] if "budgets" in row else f"{row['density']:.0%}"


def sparse_table(result: dict[str, Any]) -> str:
    """A row per length, mode, pattern and density: times, the share of the ideal, and ratios to dense attention."""
    peers = list(result["against"])
    head = ["tokens", "heads", "mode", "pattern", "tiles", "µs", "index µs", "share of ideal", "× dense"]
    lines = [f"| {' | '.join([*head, *(f'× {peer}' for peer in peers)])} |", "|" + "---|" * (len(head) + len(peers))]
    for row in result["rows"]:
        cells = [f"{row['length']:,}", f"{row['heads']}/{row['kv_heads']} × {row['head_dim']}", row["mode"]]
        cells.append(f"{row['pattern']} {level_of(row)}")
        if not row["correct"]:
            lines.append(f"| {' | '.join([*cells, 'wrong', *('' for _ in range(len(head) + len(peers) - 5))])} |")
            continue
        total = row["total_microseconds"]
        cells += [f"{row['executed_density']:.1%}", f"{row['microseconds']:,.0f}", f"{row['index_microseconds']:,.0f}"]
        cells.append("–" if "share" not in row else f"{row['share']:.0%}")
        for other in (row["dense"], *(row["peers"][peer] for peer in peers)):
            cells.append("–" if "absent" in other else f"{other['microseconds'] / total:.2f}")
        lines.append(f"| {' | '.join(cells)} |")
    lines += [
        "",
        "Ratios are of times with the index and the scores that lines are picked by; ideal is our dense kernel's time "
        f"for as many tiles. Lines are drawn, not picked. {drawn(result)}{measured_on(result)}{noted(result)}",
    ]
    return "\n".join(lines)


def drawn(result: dict[str, Any]) -> str:
    """How the lines of budgets stand; empty where there are none."""
    runs = {row["run"] for row in result["rows"] if "budgets" in row}
    if not runs:
        return ""
    return (
        "Budgets are keys x distances, + where heads take them in turn: half of the distances the nearest ones, the "
        f"others in runs of {runs.pop()} at random, keys at random. "
    )
