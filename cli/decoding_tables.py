"""Results of `bench decode` and `bench generate` as tables for a terminal."""

from __future__ import annotations

from typing import Any

from .tables import Shown, size, table


def decode_speeds(content: dict[str, Any]) -> Shown:
    """The result of `bench decode`: one table per shape of cache."""
    from ..compress.decode_speed_table import absences, shape_name, shape_of
    from ..compress.linear_speed_table import measured_on

    shown: Shown = []
    peers = list(content["against"])
    for shape in dict.fromkeys(shape_of(row) for row in content["rows"]):
        found = [row for row in content["rows"] if shape_of(row) == shape]
        columns = ("µs", "floor µs", *(f"× {peer}" for peer in peers), "GB/s", "share", "B/token", "coding µs", "error")
        rows = table(shape_name(found[0]), "kind", *columns)
        for row in found:
            rows.add_row(row["kind"], *_decode_cells(row, peers))
        shown += [rows, ""]
    explained = "B/token: of a key and a value in one head, all that is allocated; coding µs: per token and layer"
    return [*shown, explained, measured_on(content), *absences(content)]


def _decode_cells(row: dict[str, Any], peers: list[str]) -> list[str]:
    from ..compress.decode_speed_table import why_wrong

    if not row["correct"]:
        return [*("" for _ in range(6 + len(peers))), f"wrong: {why_wrong(row)}"]
    ratios = [row["peers"].get(peer, {}).get("ratio") for peer in peers]
    return [
        f"{row['microseconds']:,.1f}",
        f"{row['floor_microseconds']:,.1f}",
        *("–" if ratio is None else f"{ratio:.2f}" for ratio in ratios),
        f"{row['gb_per_second']:,.0f}",
        f"{row['share']:.0%}",
        f"{row['bytes_per_token']:.1f}",
        f"{row['coding']['microseconds_per_token']:.3f}",
        f"{row['error']:.1e}",
    ]


def generation_speeds(content: dict[str, Any]) -> Shown:
    """The result of `bench generate`: one table per shape."""
    from ..compress.generation_bench_table import absences, meaning, ratios, shape_name, shape_of, way_name

    shown: Shown = []
    for shape in dict.fromkeys(shape_of(row) for row in content["rows"]):
        found = [row for row in content["rows"] if shape_of(row) == shape]
        columns = ("first token ms", "per token ms", "floor ms", "× dynamic", "× static", "peak memory", "cache")
        rows = table(f"{shape_name(found[0])} tokens", "runs as", *columns, "")
        for row in found:
            rows.add_row(way_name(row), *_generation_cells(row, ratios(row, content["rows"])))
        shown += [rows, ""]
    return [*shown, *meaning(content), *absences(content)]


def _generation_cells(row: dict[str, Any], ratios: list[float | None]) -> list[str]:
    if "absent" in row:
        return [*("" for _ in range(7)), "no time"]
    return [
        f"{row['first_token_ms']:,.1f}",
        f"{row['token_ms']:,.2f}",
        "–" if row["floor_ms"] is None else f"{row['floor_ms']:,.2f}",
        *("–" if ratio is None else f"{ratio:.2f}" for ratio in ratios),
        "–" if row["peak_bytes"] is None else size(row["peak_bytes"]),
        size(row["allocated_cache_bytes"]),
        "",
    ]
