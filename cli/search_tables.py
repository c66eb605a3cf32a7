"""Results of `search` for a terminal."""

from __future__ import annotations

from typing import Any

from .tables import Shown, percent, size, table


def searched(content: dict[str, Any]) -> Shown:
    """The result of `search`."""
    timed = content["cost"]["unit"] == "seconds"
    head = ["recipe", "weights", *([f"{content['target']} ms"] if timed else []), "perplexity", "KL", "estimated"]
    rows = table("", *head, "within", "stored as, share of the weights")
    base = [size(content["base_bytes"]), *([milliseconds(content["base_cost"])] if timed else [])]
    rows.add_row("float", *base, *[""] * 5)
    for row in content["rows"]:
        estimate = "" if row["estimated_loss"] is None else f"{row['estimated_loss']:.4f}"
        stored = ", ".join(f"{key} {share:.0%}" for key, share in sorted(row["shares"].items(), key=lambda i: -i[1]))
        rows.add_row(
            row["name"],
            size(row["bytes"]),
            *([milliseconds(row["cost"])] if timed else []),
            percent(row["perplexity_increase"], row["perplexity_increase_stderr"], "+.2f"),
            f"{row['kl']:.4f}",
            estimate,
            "yes" if row["within"] else "no",
            stored,
        )
    text, limit = content["text"], content["limit"]["perplexity_increase"]
    return [
        rows,
        "",
        f"within: perplexity up by {limit:.2%} at most, its standard error included; measured on {text['windows']} "
        f"windows of {text['window']} tokens of {text['source']}",
        "estimated: sum of the losses of all parts alone, in nats per token, which the solver kept to; KL is what was "
        "measured",
        *([f"{content['target']} ms: {content['cost']['words']}"] if timed else []),
        *_verdict(content),
    ]


def _verdict(content: dict[str, Any]) -> list[str]:
    """What was found, and why the search ended if it did not end by itself."""
    best = next(row for row in content["rows"] if row["name"] == content["best"])
    uniform = content["best_uniform"]
    beside = "the float model: no uniform recipe is within the limit" if uniform is None else f"uniform {uniform}"
    saved, timed = content["less_than_uniform"], content["cost"]["unit"] == "seconds"
    least = f"{milliseconds(best['cost'])} ms, {saved:.1%} less" if timed else f"{saved:.1%} fewer bytes"
    lines = [f"best: {best['name']}, {size(best['bytes'])}, {least} than {beside}"]
    if content["stopped"]:
        lines.append(f"STOPPED EARLY: {content['stopped']}; the same command goes on from here")
    return lines


def milliseconds(seconds: float) -> str:
    """A time in ms, to four digits."""
    return f"{1e3 * seconds:.4g}"
