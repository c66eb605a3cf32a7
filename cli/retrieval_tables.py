"""Retrieval and generation of an evaluation as tables for a terminal."""

from __future__ import annotations

from typing import Any

from .tables import Shown, percent, spread, table

MEASURES = {"needle": "exact_match"}
"""Test → the measure that it is shown by; else right tokens, which a small model gets where it gets no whole answer."""
LABELS = {"token_accuracy": "right tokens", "exact_match": "exact"}


def retrieved(content: dict[str, Any]) -> Shown:
    """What was found again in long contexts: a test and length in two rows, then the conditions."""
    if "retrieval" not in content:
        return []
    asked = content["retrieval"]
    rows = table("retrieval", "", "base" if content["against"] else "", "model", "")
    for test, result in asked["results"].items():
        for row in result["rows"]:
            retrieval_rows(rows, test, row)
    return ["", rows, "", depth_table(asked, content["against"] is not None), *retrieval_conditions(asked)]


def retrieval_rows(rows: Any, test: str, row: dict[str, Any]) -> None:
    """The main measure and the answer's NLL of one test and length; differences are paired."""
    sides, difference = [row.get("base"), row["model"]], row.get("difference")
    key = MEASURES.get(test, "token_accuracy")
    shares = ["" if side is None else percent(side[key], side[f"{key}_stderr"], ".1f") for side in sides]
    losses = ["" if side is None else spread(side["nll"], side["nll_stderr"]) for side in sides]
    note, loss_note = f"{row['model']['items']} cases", "nats per token"
    if difference is not None:
        flips = difference["flips"]
        own = (difference, "token_accuracy_") if key == "token_accuracy" else (flips, "accuracy_")
        change = percent(own[0][f"{own[1]}difference"], own[0][f"{own[1]}difference_stderr"], "+.1f")
        gained, lost = len(flips["gained"]), len(flips["lost"])
        note = f"{change}; exact: {gained} gained and {lost} lost of {flips['items']} cases"
        change = spread(difference["nll_difference"], difference["nll_difference_stderr"], "+.3f")
        loss_note = f"{change} nats per token"
    rows.add_row(f"{test} {row['length']:,}: {LABELS[key]}", *shares, note)
    rows.add_row(f"{test} {row['length']:,}: NLL", *losses, loss_note)


def depth_table(asked: dict[str, Any], compared: bool) -> Any:
    """The main measure of every test and length, depth by depth."""
    first = next(iter(asked["results"].values()))["rows"][0]["depths"]
    title = f"by depth in the context{', base → model' if compared else ''}"
    rows = table(title, "", *(f"{cell['depth']:.0%}" for cell in first), "")
    for test, result in asked["results"].items():
        key = MEASURES.get(test, "token_accuracy")
        for row in result["rows"]:
            cells = [[cell[side][key] for side in ("base", "model") if side in cell] for cell in row["depths"]]
            shares = [" → ".join(f"{100 * share:.0f}" for share in cell) for cell in cells]
            rows.add_row(f"{test} {row['length']:,}", *shares, f"% {LABELS[key]}")
    return rows


def retrieval_conditions(asked: dict[str, Any]) -> list[str]:
    """On what, how it went in, and what had codes to read."""
    from ..compress.card import attention_sentence, eviction_sentence

    copied = any(test.startswith("copy") for test in asked["tests"])
    cases = "1 case" if asked["samples"] == 1 else f"{asked['samples']} cases"
    grid = f"{cases} at each of {asked['depths']} depths of {asked['source']}, seed {asked['seed']}"
    lines = [f"{grid}, passages of {asked['passage']} tokens" if copied else grid]
    if asked["query_aware"]:
        lines.append("Query-aware: context and question of a case went in as one prompt, then its answer")
    elif asked["fed"]["model"] == "pieces":
        lines.append("The context of a case went in as one prompt, then its question, then its answer")
    else:
        lines.append("Cases went in in one pass: the model has recurrent layers")
    for test, result in asked["results"].items():
        if (cache := result.get("kv_cache")) is not None:
            lines.append(f"{test}: {codes_read(cache)}; {in_codes(result['rows'])}")
            if text := eviction_sentence(cache.get("eviction")):
                lines.append(f"{test}: {text}")
        if text := attention_sentence(result.get("attention")):
            lines.append(f"{test}: {text}")
    return lines


def codes_read(cache: dict[str, Any]) -> str:
    """How many scored positions had codes to read."""
    if not cache["reading_codes"]:
        return "NO scored position had coded tokens to read: this measured a dense cache"
    return f"{cache['reading_codes']:,} of {cache['positions']:,} scored positions had coded tokens to read"


def in_codes(rows: list[dict[str, Any]]) -> str:
    """In how many cases what was asked for was in codes."""
    coded, items = (sum(row["model"][key] for row in rows) for key in ("items_in_codes", "items"))
    return f"what was asked for was in codes in {coded} of {items} cases, else dense at least in part"


def generated(content: dict[str, Any]) -> Shown:
    """How long the model wrote what its base writes."""
    if "generation" not in content:
        return []
    from ..compress.card import attention_sentence

    found = content["generation"]
    rows = table("greedy generation", "", "model", "")
    agreement = percent(found["agreement"], found["agreement_stderr"])
    rows.add_row("same token as the base", agreement, f"of {found['positions']:,} along the base's continuations")
    identical = percent(found["identical"], found["identical_stderr"], ".1f")
    rows.add_row("same continuation", identical, f"of {found['prompts']} prompts, up to {found['new_tokens']} tokens")
    median = f"{found['median_equal_tokens']:g}"
    rows.add_row("tokens until a free run differs", median, "the median; all of them where it never does")
    lines = [f"prompts of {found['prompt_tokens']:,} tokens of {found['source']}, attended to exactly"]
    if "kv_cache" in found:
        lines.append(codes_read(found["kv_cache"]))
    if text := attention_sentence(found.get("attention")):
        lines = [lines[0].removesuffix(", attended to exactly"), *lines[1:], text]
    return ["", rows, *lines]
