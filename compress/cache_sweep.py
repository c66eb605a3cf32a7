"""One model, many key-value caches, one table: what each costs where a model reads what it remembered.

Every row patches the same model in place and measures it against the float model: perplexity when every position reads
codes ("chunks") and when a dense prompt is continued from codes ("decode"), both on the same windows, and what has to
be found again in long contexts (`evaluation_retrieval.py`), which perplexity hides. A cache whose recent tokens are
never coded measures the dense one by the same way: its row says what of the others is rounding.

A cache that evicts does so from a prompt. Text that goes in some tokens at a time has none: such a row has no "chunks",
and says why.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from .assess import Asked, measure_text
from .cache_evaluation import NO_PROMPT
from .calibration import CalibrationOptions
from .cpu_arithmetic import float32_linears
from .kv_evict import KVEvict
from .patching import patch
from .pipeline import Progress, quiet
from .recipe import EvaluationOptions, Recipe
from .retrieval_cases import RetrievalOptions
from .sweep import Bench, checked_earlier, conditions, joined, noted

METHODS = ("kv_fp8", "kv_int4")
TESTS = ("copy_words", "needle")
CONDITIONS = ("kompakt", "environment", "model", "text", "calibration", "retrieval")
"""What must be equal for the rows of two runs to stand in one table."""


@float32_linears()
def cache_sweep(
    model: str | Path,
    *,
    methods: Iterable[str | dict[str, Any]] = METHODS,
    calibration: CalibrationOptions | None = None,
    evaluation: EvaluationOptions | None = None,
    retrieval: RetrievalOptions | None = None,
    note: str = "",
    onto: Path | None = None,
    progress: Progress = quiet,
) -> dict[str, Any]:
    """Perplexities, retrieval and bits of every method; JSON-able.

    methods: keys, or dicts with `method` and its options (a `label` names the row). evaluation: text and windows; both
    protocols are measured. retrieval: None leaves it out. onto: file of an earlier result that the rows go with.
    Raises ValueError for bad input, and if `onto` was measured under other conditions.
    """
    calibration, evaluation = calibration or CalibrationOptions(), evaluation or EvaluationOptions()
    bench = Bench.open(model, evaluation)
    asked = Asked.read(bench.tokenizer, retrieval, None)
    asked.check(bench.base)
    described = None
    if retrieval is not None:
        described = {"source": asked.sources["retrieval"], "lengths": list(retrieval.lengths), "seed": retrieval.seed}
        described |= {"tests": list(retrieval.tests), "samples": retrieval.samples, "depths": retrieval.depths}
        described |= {"query_aware": True} if retrieval.query_aware else {}
    heading = {"bench": "cache", **bench.heading(note, calibration), "retrieval": described}
    earlier = None if onto is None else checked_earlier(onto, heading, CONDITIONS)
    chosen = [{"method": method} if isinstance(method, str) else dict(method) for method in methods]
    rows = []
    for index, options in enumerate(chosen):
        label = options.pop("label", options["method"])
        slot = {"name": label, "kv_cache": options, "calibration": calibration.model_dump()}
        progress("sweep", index, len(chosen), label)
        rows.append({"label": label, **_row(bench, Recipe.load(slot), asked, progress)})
    progress("sweep", len(chosen), len(chosen), "done")
    return {**heading, "rows": rows if earlier is None else joined(earlier["rows"], rows, lambda row: (row["label"],))}


def _row(bench: Bench, recipe: Recipe, asked: Asked, progress: Progress) -> dict[str, Any]:
    given = bench.evaluation.model_dump(exclude={"cache_protocol", "prompt_tokens"})
    found: dict[str, Any] = {"kv_cache": recipe.model_dump(mode="json")["kv_cache"]}
    with patch(bench.subject, recipe, tokenizer=bench.tokenizer, progress=progress):
        evicts = isinstance(recipe.kv_cache, KVEvict)
        if evicts:
            found |= {"chunks": None, "absent": {"chunks": NO_PROMPT}}
        for protocol in ("decode",) if evicts else ("chunks", "decode"):
            options = EvaluationOptions(**given, cache_protocol=protocol)
            result = measure_text(bench.subject, bench.base, bench.windows, options, progress)
            found[protocol] = {**result["comparison"], "kv_cache": result["kv_cache"]}
        measured = asked.measure(bench.subject, bench.base, bench.tokenizer, progress)
    if measured:
        found["retrieval"] = {
            test: {key: result[key] for key in ("rows", "kv_cache")}
            for test, result in measured["retrieval"]["results"].items()
        }
    return found


def cache_table(result: dict[str, Any]) -> str:
    """Rows are methods: bits, perplexity by both protocols, and for every test and length what changed."""
    tests = [
        (test, row["length"]) for test, found in result["rows"][0].get("retrieval", {}).items() for row in found["rows"]
    ]
    head = ["cache", "bits", "every position reads codes", "dense prompt, then codes"]
    head += [f"{test} at {length:,}" for test, length in tests]
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for row in result["rows"]:
        cells = [row["label"], _bits(row["decode"]["kv_cache"] if row["chunks"] is None else row["chunks"]["kv_cache"])]
        cells += [_increase(row[protocol]) for protocol in ("chunks", "decode")]
        for test, length in tests:
            (found,) = [item for item in row["retrieval"][test]["rows"] if item["length"] == length]
            cells.append(_found(found, row["retrieval"][test]["kv_cache"].get("eviction")))
        lines.append(f"| {' | '.join(cells)} |")
    # Perplexities of the base differ, since "decode" scores the second halves alone.
    rows = [row["chunks"] for row in result["rows"] if row["chunks"] is not None]
    sentence = conditions({**result, "rows": rows or [row["decode"] for row in result["rows"]]})
    sentence += " Bits count codes and scales of an element in a page."
    reasons = {reason for row in result["rows"] for reason in row.get("absent", {}).values()}
    sentence += "".join(f" –: {reason}." for reason in sorted(reasons))
    if reasons:
        sentence += (
            " Where tokens are evicted: the share that is kept, and of a dense cache's bytes, beside the bits of the "
            "text's prompts, beside what was found of its contexts."
        )
    lines += ["", f"{sentence}{_asked(result)}{noted(result)}"]
    return "\n".join(lines)


def _bits(used: dict[str, Any]) -> str:
    bits, eviction = used["bits_per_element"], used.get("eviction")
    text = "–" if bits is None else f"{bits:.2f}"
    return text if eviction is None else f"{text}; {_kept(eviction)}"


def _kept(eviction: dict[str, Any]) -> str:
    if not eviction["evicted_prompts"]:
        return "NO prompt was evicted from"
    return f"{eviction['kept']:.0%} kept, {eviction['allocated']:.0%} of bytes"


def _increase(comparison: dict[str, Any] | None) -> str:
    if comparison is None:
        return "–"
    change, stderr = comparison["perplexity_increase"], comparison["perplexity_increase_stderr"] or 0
    return f"{100 * change:+.2f} ± {100 * stderr:.2f} %"


def _found(row: dict[str, Any], eviction: dict[str, Any] | None) -> str:
    """Share of right answers and of the base's, what an answer's tokens lost in nats, and what was kept of contexts."""
    change = row["difference"]
    loss = f"{change['nll_difference']:+.3f} ± {change['nll_difference_stderr'] or 0:.3f}"
    text = f"{row['model']['token_accuracy']:.1%} of {row['base']['token_accuracy']:.1%}; {loss}"
    return text if eviction is None else f"{text}; {_kept(eviction)}"


def _asked(result: dict[str, Any]) -> str:
    asked = result["retrieval"]
    if asked is None:
        return ""
    cases = asked["samples"] * asked["depths"]
    kind = ""
    if asked.get("query_aware"):
        kind = " Context and question went in as one prompt (query-aware)."
    elif any(row["chunks"] is None for row in result["rows"]):
        kind = " Contexts went in before their questions (query-agnostic)."
    return (
        f" Retrieval from {asked['source']}: {cases} cases each, tokens of the answer that are the most likely ones, "
        f"beside the base model's, and the change in nats per token.{kind}"
    )
