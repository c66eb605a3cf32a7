"""Results of `search` for a terminal."""

from __future__ import annotations

from typing import Any

from .tables import Shown, percent, size, table


def searched(content: dict[str, Any]) -> Shown:
    """The result of `search`."""
    costs = _cost_name(content)
    slot = content["slot"] if len(content["slot"]["choices"]) > 1 else None
    head = ["recipe", "weights", *([costs] if costs else []), "perplexity", "KL", "estimated", "within"]
    rows = table("", *head, *([slot["name"]] if slot else []), "stored as, share of the weights")
    base = [size(content["base_bytes"]), *([_cost(content, content["base_cost"])] if costs else [])]
    rows.add_row("float", *base, *[""] * (5 + bool(slot)))
    for row in content["rows"]:
        estimate = "" if row["estimated_loss"] is None else f"{row['estimated_loss']:.4f}"
        stored = ", ".join(f"{key} {share:.0%}" for key, share in sorted(row["shares"].items(), key=lambda i: -i[1]))
        rows.add_row(
            row["name"],
            size(row["bytes"]),
            *([_cost(content, row["cost"])] if costs else []),
            percent(row["perplexity_increase"], row["perplexity_increase_stderr"], "+.2f"),
            f"{row['kl']:.4f}",
            estimate,
            "yes" if row["within"] else "no",
            *([row["slot"]] if slot else []),
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
        *([f"{costs}: {content['cost']['words']}"] if costs else []),
        *(f"left out: {key}, since {reason}" for key, reason in content["slot"]["left_out"].items()),
        *_verdict(content),
    ]


def _verdict(content: dict[str, Any]) -> list[str]:
    """What was found, and why the search ended if it did not end by itself."""
    best = next(row for row in content["rows"] if row["name"] == content["best"])
    uniform = content["best_uniform"]
    beside = (
        "the float model: no uniform recipe within the limit costs less" if uniform is None else f"uniform {uniform}"
    )
    saved, costs = content["less_than_uniform"], _cost_name(content)
    least = f"{_cost(content, best['cost'])} ({costs}), {saved:.1%} less" if costs else f"{saved:.1%} fewer bytes"
    lines = [f"best: {best['name']}, {size(best['bytes'])}, {least} than {beside}"]
    if content["stopped"]:
        lines.append(f"STOPPED EARLY: {content['stopped']}; the same command goes on from here")
    return lines


def _cost_name(content: dict[str, Any]) -> str | None:
    """What the column of costs is called; None where they are the bytes of the weights."""
    if content["cost"]["unit"] == "seconds":
        return f"{content['target']} ms"
    return None if content["conditions"] is None else "with caches"


def _cost(content: dict[str, Any], cost: float) -> str:
    """A cost: a time in ms to four digits, or bytes."""
    return f"{1e3 * cost:.4g}" if content["cost"]["unit"] == "seconds" else size(cost)
