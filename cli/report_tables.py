"""Results of `verify` and `report` for a terminal."""

from __future__ import annotations

from typing import Any

from rich.text import Text

from .tables import Shown, table

STYLES = {"passed": "green", "failed": "bold red", "skipped": "yellow"}
MOST = 20
"""Problems of one check that are listed; `--json` has all."""


def verified(content: dict[str, Any]) -> Shown:
    """The result of `verify`."""
    rows = table("", "check", "", "what was found")
    for check in content["checks"]:
        rows.add_row(check["name"], Text(check["status"], style=STYLES[check["status"]]), Text(check["detail"]))
    shown: Shown = [rows]
    for check in content["checks"]:
        if len(check["problems"]) > 1:
            listed = [f"  {problem}" for problem in check["problems"][:MOST]]
            more = len(check["problems"]) - MOST
            shown += ["", f"{check['name']}:", *listed, *([f"  and {more} more; --json has all"] if more > 0 else [])]
    failed = [check["name"] for check in content["checks"] if check["status"] == "failed"]
    verdict = f"{content['directory']} FAILED: {', '.join(failed)}" if failed else f"{content['directory']} is in order"
    return [*shown, "", verdict]
