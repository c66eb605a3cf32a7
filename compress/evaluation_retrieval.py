"""What a model finds again in a long context: the cases of `retrieval_cases.py` scored, alone and beside a base model.

The context of a case goes in as one prompt, which is attended to as any prompt is and only then coded where the cache
is compressed; the question follows in a call of its own, and the answer behind it in chunks, as it should be
(teacher-forced). So the context is stored before anything is known of the question. Query-aware, context and question
are one prompt: what a cache keeps of the context may then depend on the question. Every answer token is scored by
-log p, and by whether it is the most likely one; where all of an answer's are, greedy decoding would have written it.

Quantized or sparse attention takes prompts and questions however short they are, and text that is copied; an answer
that the model would write runs as decoding does. A model with recurrent layers and no compressed cache reads a case in
one pass, which for it is the same function.

Standard errors are over cases, of means per token (`evaluation.ratio_mean`); differences are paired case by case.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import torch

from .base_results import content_digest
from .cache_evaluation import CHUNK, Reader, cache_in_use, count_anew, fits_in_pieces
from .evaluation import Progress, Result, input_device, ratio_mean, scoring_mode, token_nll
from .evaluation_tasks import Flips, flips, model_length
from .hf_attention import at_least, attention_in_use
from .retrieval_cases import Case, RetrievalOptions


@dataclass(frozen=True)
class Answer:
    """One case as a model answered it. nll: sum over its tokens, in nats. right: tokens that were the most likely ones.
    in_codes: whether everything asked for was in codes when the question came, dense sinks and recent tokens excluded.
    """

    length: int
    depth: float
    tokens: int
    nll: float
    right: int
    in_codes: bool

    @property
    def exact(self) -> bool:
        """Whether greedy decoding would have written the whole answer."""
        return self.right == self.tokens


@dataclass(frozen=True)
class Retrieval(Result):
    """Means over cases. ``nll``: nats per answer token; ``token_accuracy``: share of answer tokens that were the most
    likely ones; ``exact_match``: share of cases all of whose tokens were. ``items_in_codes``: see `Answer`.
    """

    items: int
    items_in_codes: int
    tokens: int
    nll: float
    nll_stderr: float | None
    token_accuracy: float
    token_accuracy_stderr: float | None
    exact_match: float
    exact_match_stderr: float | None


@dataclass(frozen=True)
class RetrievalDifference(Result):
    """Model minus base over the same cases. ``flips``: cases by exact match, counted within the length."""

    nll_difference: float
    nll_difference_stderr: float | None
    token_accuracy_difference: float
    token_accuracy_difference_stderr: float | None
    flips: Flips


def answer_cases(
    model: Any, cases: Sequence[Case], *, query_aware: bool = False, progress: Progress | None = None
) -> list[Answer]:
    """Every case, answered by the model. query_aware: the question is part of the prompt. ValueError if one is longer
    than the model's positions, or a loss is not finite.
    """
    check_lengths(model, cases)
    found = []
    with scoring_mode(model):
        for number, case in enumerate(cases):
            logits, in_codes = _answer_logits(model, case, query_aware)
            target = torch.tensor(case.answer, device=logits.device)
            nll = token_nll(logits, target).double().sum().item()
            if not math.isfinite(nll):
                raise ValueError(f"the loss of a retrieval case is {nll}; the model's logits are not usable")
            right = int((logits.argmax(-1) == target).sum())
            found.append(Answer(case.length, case.depth, len(target), nll, right, in_codes))
            if progress:
                progress(number + 1, len(cases))
    return found


def check_lengths(model: Any, cases: Sequence[Case]) -> None:
    """ValueError if a case does not fit into the positions that a model was made for."""
    limit, longest = model_length(model), max(case.length for case in cases)
    if limit is not None and longest > limit:
        raise ValueError(f"retrieval length {longest} exceeds the {limit} positions of {type(model).__name__}")


def _answer_logits(model: Any, case: Case, query_aware: bool) -> tuple[torch.Tensor, bool]:
    """Logits that predict the answer, (tokens, vocabulary), and whether what it asks for was in codes."""
    device = input_device(model)
    context, question, answer = (
        torch.tensor([ids], device=device, dtype=torch.int64) for ids in (case.context, case.question, case.answer)
    )
    if not fits_in_pieces(model):
        whole = torch.cat([context, question, answer[:, :-1]], dim=1)
        with at_least(model, 2):
            logits = model(input_ids=whole, use_cache=False).logits
        return logits[0, -answer.shape[1] :], False
    reader = Reader(model)
    with at_least(model, 2):
        if query_aware:
            parts = [reader.feed(torch.cat([context, question], dim=1), keep=1)]
            in_codes = reader.holds_codes(*case.evidence)
        else:
            reader.feed(context, keep=0)
            in_codes = reader.holds_codes(*case.evidence)
            parts = [reader.feed(question, keep=1)]
    with nullcontext() if case.written else at_least(model, 2):
        parts += [reader.feed(piece) for piece in answer[:, :-1].split(CHUNK, dim=1) if piece.shape[1]]
    return torch.cat(parts, dim=1)[0], in_codes


def summary(answers: Sequence[Answer]) -> Retrieval:
    """Means of the answers of one test and length."""
    counts = [answer.tokens for answer in answers]
    nll, nll_stderr = ratio_mean([answer.nll for answer in answers], counts)
    right, right_stderr = ratio_mean([answer.right for answer in answers], counts)
    exact, exact_stderr = ratio_mean([float(answer.exact) for answer in answers], [1] * len(answers))
    return Retrieval(
        items=len(answers),
        items_in_codes=sum(answer.in_codes for answer in answers),
        tokens=sum(counts),
        nll=nll,
        nll_stderr=nll_stderr,
        token_accuracy=right,
        token_accuracy_stderr=right_stderr,
        exact_match=exact,
        exact_match_stderr=exact_stderr,
    )


def difference(base: Sequence[Answer], answers: Sequence[Answer]) -> RetrievalDifference:
    """Two models' answers to the same cases."""
    counts = [answer.tokens for answer in answers]
    pairs = list(zip(base, answers, strict=True))
    nll, nll_stderr = ratio_mean([new.nll - old.nll for old, new in pairs], counts)
    right, right_stderr = ratio_mean([float(new.right - old.right) for old, new in pairs], counts)
    return RetrievalDifference(
        nll_difference=nll,
        nll_difference_stderr=nll_stderr,
        token_accuracy_difference=right,
        token_accuracy_difference_stderr=right_stderr,
        flips=flips([answer.exact for answer in base], [answer.exact for answer in answers]),
    )


def measure_test(
    subject: Any,
    base: Any,
    cases: Sequence[Case],
    *,
    query_aware: bool = False,
    recall: Callable[[dict[str, Any], Callable[[], Any]], Any] = lambda question, find: find(),
    progress: Progress | None = None,
) -> dict[str, Any]:
    """One test of a model, and of its base where that is not None, JSON-able: a row per length with its depths,
    every answer, and how cache and attention of the model were read. recall: see `BaseResults.recall`.
    """
    sides = {"model": subject, **({} if base is None else {"base": base})}
    found: dict[str, list[Answer]] = {}
    used: dict[str, Any] = {}

    def report(count: int, _: int) -> None:
        if progress is not None:
            progress(count + sum(map(len, found.values())), len(sides) * len(cases))

    for side, model in sides.items():
        count_anew(model)
        if side == "model":
            found[side] = answer_cases(model, cases, query_aware=query_aware, progress=report)
            used = in_use(model, max(case.length for case in cases))
        else:
            question: dict[str, Any] = {"retrieval": content_digest([asdict(case) for case in cases])}
            # The base's logits differ by rounding alone, and answers of former versions are named without it.
            question |= {"query_aware": True} if query_aware else {}
            answers = recall(
                question,
                lambda: [
                    asdict(answer) for answer in answer_cases(base, cases, query_aware=query_aware, progress=report)
                ],
            )
            found[side] = [Answer(**answer) for answer in answers]
    rows = []
    for length in dict.fromkeys(case.length for case in cases):
        chosen = {side: [item for item in answers if item.length == length] for side, answers in found.items()}
        row: dict[str, Any] = {"length": length, **{side: summary(items).as_dict() for side, items in chosen.items()}}
        if base is not None:
            row["difference"] = difference(chosen["base"], chosen["model"]).as_dict()
        row["depths"] = [
            {"depth": depth, **{side: at_depth(items, depth) for side, items in chosen.items()}}
            for depth in dict.fromkeys(item.depth for item in chosen["model"])
        ]
        rows.append(row)
    answers = {side: [asdict(answer) for answer in items] for side, items in found.items()}
    return {"rows": rows, "answers": answers, **used}


def at_depth(answers: Sequence[Answer], depth: float) -> dict[str, float]:
    """Shares of right tokens and of right answers among those whose evidence is that deep."""
    found = [answer for answer in answers if answer.depth == depth]
    right, tokens = sum(answer.right for answer in found), sum(answer.tokens for answer in found)
    return {"token_accuracy": right / tokens, "exact_match": sum(answer.exact for answer in found) / len(found)}


def in_use(model: Any, longest: int) -> dict[str, Any]:
    """How a model with a compressed cache or patched attention was read since `count_anew`."""
    used: dict[str, Any] = {}
    if (attention := attention_in_use(model)) is not None:
        used["attention"] = {**attention, "window": longest}
    if (cache := cache_in_use(model, prompt=None)) is not None:
        used["kv_cache"] = cache
    return used


def describe_retrieval(options: RetrievalOptions, source: str, sides: dict[str, Any]) -> dict[str, Any]:
    """What was asked and how it went in, JSON-able. sides: models by "model" and "base"."""
    asked = {key: value for key, value in asdict(options).items() if key != "text"}
    fed = {
        side: "pieces" if fits_in_pieces(model) else "one pass" for side, model in sides.items() if model is not None
    }
    return {"source": source, **asked, "lengths": list(options.lengths), "tests": list(options.tests), "fed": fed}
