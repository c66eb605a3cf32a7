"""What `video_speed` measured: checked, and as Markdown."""

from __future__ import annotations

from typing import Any

from .linear_speed_table import measured_on
from .sweep import noted


def check_video_speeds(result: dict[str, Any]) -> None:
    """Raises RuntimeError, naming the first, if rows are wrong."""
    wrong = [row for row in result["rows"] if not row["correct"]]
    if wrong:
        row = wrong[0]
        why = row.get("reason") or f"error {row['check_error']} on a short video"
        raise RuntimeError(
            f"{len(wrong)} of {len(result['rows'])} results are wrong and have no time; the first is "
            f"{row['frames']} frames of {row['frame']} tokens ({why})"
        )


def video_table(result: dict[str, Any]) -> str:
    """A row per video: what was chosen, its share of tiles and error, times, and ratios to dense attention."""
    peers = list(result["against"])
    head = ["frames × tokens", "heads", "chosen", "tiles", "error", "search, s", "index, s", "µs", "share of ideal"]
    head += ["× dense", *(f"× {peer}" for peer in peers)]
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for row in result["rows"]:
        cells = [f"{row['frames']} × {row['frame']:,}", f"{row['heads']} × {row['head_dim']}"]
        if not row["correct"]:
            lines.append(f"| {' | '.join([*cells, 'wrong', *('' for _ in range(len(head) - 3))])} |")
            continue
        cells.append(", ".join(f"{count} {name}" for name, count in sorted(row["patterns"].items())))
        cells += [f"{row['density']:.1%}", f"{row['error']:.1%}", f"{row['search_seconds']:,.1f}"]
        cells += [f"{row['index_seconds']:.2f}", f"{row['microseconds']:,.0f}"]
        cells.append(f"{row['share']:.0%}" if "share" in row else "–")
        for other in (row["dense"], *(row["peers"][peer] for peer in peers)):
            cells.append(f"{other['microseconds'] / row['microseconds']:.2f}" if "microseconds" in other else "–")
        lines.append(f"| {' | '.join(cells)} |")
    kinds = ", ".join(f"{count} {kind}" for kind, count in result["kinds"].items())
    lines += [
        "",
        f"Queries and keys are made up, heads of {sum(result['kinds'].values())} kinds in turn: {kinds}. An index is "
        "built once for a length and kept, so that it is not in the ratios; ideal is our dense kernel's time for as "
        f"many tiles; the error is on inputs that the search did not see. {measured_on(result)}{noted(result)}",
    ]
    return "\n".join(lines)
