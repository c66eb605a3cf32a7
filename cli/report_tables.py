"""Results of `verify` and `report` for a terminal."""

from __future__ import annotations

from typing import Any

from rich.text import Text

from .tables import Shown, percent, size, spread, table, text_line

STYLES = {"passed": "green", "failed": "bold red", "skipped": "yellow"}
MOST = 20
"""Problems of one check that are listed; `--json` has all."""


def verified(content: dict[str, Any]) -> Shown:
    """The result of `verify`."""
    rows = table("", "check", "", "what was found")
    for check in content["checks"]:
        rows.add_row(check["name"], Text(check["status"], style=STYLES[check["status"]]), Text(check["detail"]))
    shown: Shown = [rows, *kernels(content.get("kernels", []))]
    for check in content["checks"]:
        if len(check["problems"]) > 1:
            listed = [f"  {problem}" for problem in check["problems"][:MOST]]
            more = len(check["problems"]) - MOST
            shown += ["", f"{check['name']}:", *listed, *([f"  and {more} more; --json has all"] if more > 0 else [])]
    failed = [check["name"] for check in content["checks"] if check["status"] == "failed"]
    verdict = f"{content['directory']} FAILED: {', '.join(failed)}" if failed else f"{content['directory']} is in order"
    return [*shown, "", verdict]


def kernels(checks: list[dict[str, Any]]) -> Shown:
    """One line for every kernel that was compared, or why it was not."""
    if not checks:
        return []
    rows = table("", "kernel", "of", "error", "tolerance", "")
    styles = {"equal": "green", "differs": "bold red", "reference": "yellow"}
    for check in checks:
        error, tolerance = ("" if check[key] is None else f"{check[key]:.2g}" for key in ("error", "tolerance"))
        words = f"reference: {check['reason']}" if check["status"] == "reference" else check["status"]
        rows.add_row(check["op"], check["case"], error, tolerance, Text(words, style=styles[check["status"]]))
    return ["", rows]


def reported(content: dict[str, Any]) -> Shown:
    """The result of `report`: sizes, and quality by the conditions it was measured under."""
    rows = table("", "directory", "recipe", "on disk", "times smaller", "bits per weight", "")
    for item in content["directories"]:
        sizes = item["sizes"]
        smaller = f"{sizes['base_bytes'] / sizes['compressed_bytes']:.2f}" if sizes["base_bytes"] else ""
        bits = f"{sizes['bits_per_weight']:.3f}" if sizes["bits_per_weight"] else ""
        rows.add_row(
            Text(item["name"]), Text(item["recipe"]["name"]), size(sizes["compressed_bytes"]), smaller, bits, ""
        )
    shown: Shown = [rows]
    for group in content["comparisons"]["quality"]:
        found = table("", "directory", "perplexity increase", "KL to the base", "same top token", "")
        for row in group["members"]:
            found.add_row(
                Text(row["name"]),
                percent(row["perplexity_increase"], row["perplexity_increase_stderr"], "+.2f"),
                spread(row["kl"], row["kl_stderr"], ".4f"),
                percent(row["top1_agreement"], row["top1_agreement_stderr"]),
                "",
            )
        shown += ["", text_line(group["conditions"]), found]
    for item in content["directories"]:
        if item["warnings"]:
            shown += ["", Text(f"{item['name']}:"), *(Text(f"  {sentence}") for sentence in item["warnings"])]
    return [*shown, ""]
