"""Multiple-choice questions and last-word prediction, scored as lm-evaluation-harness does, zero-shot.

A continuation is scored by Σ log p(token | all before it). Tokenization follows the harness: trailing spaces of the
context move to the continuation, context + continuation is encoded as one string, and the tokens beyond the context's
own number of tokens are the continuation. The special tokens that the tokenizer puts before a text are kept, those
after it are not.

Multiple choice: ``accuracy`` takes the choice of highest log-likelihood; ``accuracy_norm`` divides it by the length of
the choice in characters. They are the harness's ``acc`` and ``acc_norm``.

Prompts: a row with ``question`` becomes ``Question: …\\nAnswer:`` (ARC); a row with ``context`` and ``activity`` gets
the harness's HellaSwag clean-up of raw text; any other ``context`` stands as it is. Continuations are " " + choice or "
" + target.
"""

from __future__ import annotations

import inspect
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .cache_evaluation import cached_logits
from .calibration import special_affixes
from .evaluation import MAX_NLL, Progress, Result, input_device, ratio_mean, scoring_mode, token_nll
from .hf_cache_hooks import cache_maker

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Rows = str | Path | Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class MultipleChoice(Result):
    """Shares between 0 and 1; ``correct`` and ``correct_norm`` tell for each item whether it was answered right."""

    items: int
    accuracy: float
    accuracy_stderr: float | None
    accuracy_norm: float
    accuracy_norm_stderr: float | None
    correct: tuple[bool, ...]
    correct_norm: tuple[bool, ...]


@dataclass(frozen=True)
class LastWord(Result):
    """``accuracy``: the share of targets that greedy decoding yields exactly.

    ``target_perplexity`` is exp of the mean negative log-likelihood per target (not per token).
    """

    items: int
    accuracy: float
    accuracy_stderr: float | None
    target_perplexity: float
    target_perplexity_stderr: float | None
    correct: tuple[bool, ...]


@dataclass(frozen=True)
class Flips(Result):
    """Items that changed between two runs over the same rows, by index.

    ``accuracy_difference`` is (gained - lost) / items, ``recovery`` the accuracy over the base's, None where that is 0;
    both have the standard error of the paired items.
    """

    items: int
    gained: tuple[int, ...]
    lost: tuple[int, ...]
    accuracy_difference: float
    accuracy_difference_stderr: float | None
    recovery: float | None
    recovery_stderr: float | None


@dataclass(frozen=True)
class Continuation:
    """Token ids of a context and of what follows it."""

    context: list[int]
    target: list[int]


@dataclass(frozen=True)
class Score:
    """``log_likelihood`` of a continuation in nats; ``greedy``: each of its tokens is the most likely one."""

    log_likelihood: float
    greedy: bool


def multiple_choice(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    rows: Rows,
    *,
    limit: int | None = None,
    batch_size: int = 8,
    max_length: int | None = None,
    dense_prompt: bool = False,
    progress: Progress | None = None,
) -> MultipleChoice:
    """Score rows with ``question`` or ``context``, ``choices`` (strings) and ``gold`` (the right one's index).

    ``rows`` is a JSONL file or the rows themselves; ``limit`` takes the first ones. Sequences longer than
    ``max_length`` tokens (default: the model's ``max_position_embeddings``) lose tokens on the left. ``dense_prompt``:
    a compressed cache is given at once what comes before the first scored token of a batch. ``progress`` counts
    choices. Raises ValueError naming the row and field for rows that do not fit.
    """
    pairs: list[Continuation] = []
    groups: list[tuple[int, list[str], int]] = []
    for where, row in read_rows(rows, limit):
        prompt, choices, gold = _choice_row(row, where)
        groups.append((len(pairs), choices, gold))
        pairs.extend(encode_pair(tokenizer, prompt, " " + choice, where=where) for choice in choices)
    scores = score_continuations(
        model,
        tokenizer,
        pairs,
        batch_size=batch_size,
        max_length=max_length,
        dense_prompt=dense_prompt,
        progress=progress,
    )
    correct, correct_norm = [], []
    for start, choices, gold in groups:
        likelihoods = [score.log_likelihood for score in scores[start : start + len(choices)]]
        lengths = [len(choice) for choice in choices]
        correct.append(_argmax(likelihoods) == gold)
        correct_norm.append(_argmax([value / size for value, size in zip(likelihoods, lengths, strict=True)]) == gold)
    accuracy, stderr = _share(correct)
    accuracy_norm, stderr_norm = _share(correct_norm)
    return MultipleChoice(
        items=len(groups),
        accuracy=accuracy,
        accuracy_stderr=stderr,
        accuracy_norm=accuracy_norm,
        accuracy_norm_stderr=stderr_norm,
        correct=tuple(correct),
        correct_norm=tuple(correct_norm),
    )


def last_word(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    rows: Rows,
    *,
    limit: int | None = None,
    batch_size: int = 8,
    max_length: int | None = None,
    dense_prompt: bool = False,
    progress: Progress | None = None,
) -> LastWord:
    """LAMBADA: rows with ``context`` and ``target``, the word that follows it. Options as in ``multiple_choice``."""
    pairs = []
    for where, row in read_rows(rows, limit):
        context, target = _word_row(row, where)
        pairs.append(encode_pair(tokenizer, context, " " + target, where=where))
    scores = score_continuations(
        model,
        tokenizer,
        pairs,
        batch_size=batch_size,
        max_length=max_length,
        dense_prompt=dense_prompt,
        progress=progress,
    )
    correct = [score.greedy for score in scores]
    accuracy, stderr = _share(correct)
    nll, nll_stderr = ratio_mean([-score.log_likelihood for score in scores], [1] * len(scores))
    perplexity = math.exp(min(nll, MAX_NLL))
    return LastWord(
        items=len(scores),
        accuracy=accuracy,
        accuracy_stderr=stderr,
        target_perplexity=perplexity,
        target_perplexity_stderr=None if nll_stderr is None else perplexity * nll_stderr,
        correct=tuple(correct),
    )


def flips(base_items: Sequence[bool], items: Sequence[bool]) -> Flips:
    """Compare the ``correct`` of two runs over the same rows, the base model's first."""
    if len(base_items) != len(items) or not items:
        raise ValueError(f"{len(base_items)} base items and {len(items)} items; both runs must have the same rows")
    pairs = list(zip(base_items, items, strict=True))
    difference, stderr = ratio_mean([float(new) - float(old) for old, new in pairs], [1] * len(pairs))
    recovery, recovery_stderr = (
        ratio_mean([*map(float, items)], [*map(int, base_items)]) if any(base_items) else (None,) * 2
    )
    return Flips(
        items=len(pairs),
        gained=tuple(index for index, (old, new) in enumerate(pairs) if new and not old),
        lost=tuple(index for index, (old, new) in enumerate(pairs) if old and not new),
        accuracy_difference=difference,
        accuracy_difference_stderr=stderr,
        recovery=recovery,
        recovery_stderr=recovery_stderr,
    )


def encode_pair(
    tokenizer: PreTrainedTokenizerBase, context: str, continuation: str, *, where: str = "row"
) -> Continuation:
    """Token ids of ``context`` and ``continuation`` as the harness splits them; see the module docstring."""
    stripped = context.rstrip()
    if not stripped:
        raise ValueError(f"{where}: the context is empty")
    prefix, _ = special_affixes(tokenizer)
    whole = tokenizer(context + continuation, add_special_tokens=False, verbose=False)["input_ids"]
    head = tokenizer(stripped, add_special_tokens=False, verbose=False)["input_ids"]
    if len(whole) <= len(head):
        raise ValueError(f"{where}: the continuation {continuation!r} adds no token of its own to the context")
    return Continuation([*prefix, *whole[: len(head)]], list(whole[len(head) :]))


def score_continuations(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[Continuation],
    *,
    batch_size: int = 8,
    max_length: int | None = None,
    dense_prompt: bool = False,
    progress: Progress | None = None,
) -> list[Score]:
    """Score every pair, in the order given; run longest first, in right-padded batches with an attention mask."""
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; it must be at least 1")
    if max_length is not None and max_length < 1:
        raise ValueError(f"max_length is {max_length}; it must be at least 1, or None for the model's own")
    max_length = model_length(model) if max_length is None else max_length
    pad = tokenizer.pad_token_id
    pad = pad if isinstance(pad, int) else 0
    order = sorted(range(len(pairs)), key=lambda index: -len(pairs[index].context) - len(pairs[index].target))
    scores: dict[int, Score] = {}
    with scoring_mode(model):
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            batch = [pairs[index] for index in chosen]
            scores.update(zip(chosen, _score_batch(model, batch, pad, max_length, dense_prompt), strict=True))
            if progress:
                progress(len(scores), len(pairs))
    return [scores[index] for index in range(len(pairs))]


def _score_batch(
    model: Any, batch: Sequence[Continuation], pad: int, max_length: int | None, dense_prompt: bool
) -> list[Score]:
    inputs: list[list[int]] = []
    for pair in batch:
        ids = [*pair.context, *pair.target]
        if max_length is not None:
            if len(pair.target) > max_length:
                raise ValueError(f"a continuation has {len(pair.target)} tokens; at most {max_length} fit the model")
            # The last token is only predicted, never fed: one more fits.
            ids = ids[-(max_length + 1) :]
        inputs.append(ids[:-1])
    width = max(len(ids) for ids in inputs)
    tokens = torch.tensor([ids + [pad] * (width - len(ids)) for ids in inputs])
    mask = torch.tensor([[1] * len(ids) + [0] * (width - len(ids)) for ids in inputs])
    # Only logits from the first position that predicts a target token: prompts are longer than targets.
    keep = width - min(len(ids) - len(pair.target) for ids, pair in zip(inputs, batch, strict=True))
    device = input_device(model)
    optional = {"logits_to_keep": keep} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
    tokens, mask = tokens.to(device), mask.to(device)
    if cache_maker(model) is None:
        logits = model(input_ids=tokens, attention_mask=mask, use_cache=False, **optional).logits[:, -keep:]
    else:
        logits = cached_logits(model, tokens, mask=mask, keep=keep, prompt=width - keep if dense_prompt else 0)
    scores = []
    for row, (ids, pair) in enumerate(zip(inputs, batch, strict=True)):
        end = len(ids) - (width - keep)
        found = logits[row, end - len(pair.target) : end]
        target = torch.tensor(pair.target, device=found.device)
        log_likelihood = -token_nll(found, target).double().sum().item()
        if not math.isfinite(log_likelihood):
            raise ValueError(
                f"the log-likelihood of a continuation is {log_likelihood}; the model's logits are not usable"
            )
        scores.append(Score(log_likelihood, bool((found.argmax(-1) == target).all())))
    return scores


def choice_rows(rows: Iterable[tuple[str, Mapping[str, Any]]]) -> Iterator[tuple[str, list[str], int]]:
    """Prompt, choices and the right choice's index of rows of `multiple_choice`, as `read_rows` gives them."""
    return (_choice_row(row, where) for where, row in rows)


def last_word_rows(rows: Iterable[tuple[str, Mapping[str, Any]]]) -> Iterator[tuple[str, str]]:
    """Context and word of rows of `last_word`, as `read_rows` gives them."""
    return (_word_row(row, where) for where, row in rows)


def read_rows(rows: Rows, limit: int | None) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Each row with what to call it in a message; ValueError if there is none."""
    if limit is not None and limit < 1:
        raise ValueError(f"limit is {limit}; it must be at least 1, or None for all rows")
    named = (
        _file_rows(Path(rows)) if isinstance(rows, str | Path) else ((f"row {i}", row) for i, row in enumerate(rows))
    )
    count = 0
    for where, row in named:
        if not isinstance(row, Mapping):
            raise ValueError(f"{where}: expected an object, found a {type(row).__name__}")
        yield where, row
        count += 1
        if count == limit:
            return
    if count == 0:
        raise ValueError(f"{rows if isinstance(rows, str | Path) else 'the list of rows'} holds no rows")


def _file_rows(path: Path) -> Iterator[tuple[str, Any]]:
    if not path.is_file():
        raise ValueError(f"{str(path)!r} is not a file; name a JSONL file with one row per line")
    try:
        with path.open(encoding="utf-8-sig") as handle:
            for number, line in enumerate(handle, start=1):
                if line.strip():
                    yield f"{path} line {number}", json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} line {number} is not JSON: {error.msg}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{str(path)!r} is not UTF-8 text: {error.reason}") from error


def _choice_row(row: Mapping[str, Any], where: str) -> tuple[str, list[str], int]:
    """Prompt, choices and the right choice's index of one row."""
    choices, gold = row.get("choices"), row.get("gold")
    if not isinstance(choices, list | tuple) or len(choices) < 2:
        raise ValueError(f"{where}: the field 'choices' must be a list of at least two strings")
    if not all(isinstance(choice, str) and choice.strip() for choice in choices):
        raise ValueError(f"{where}: the field 'choices' holds something that is no string, or a blank one")
    if not isinstance(gold, int) or isinstance(gold, bool) or not 0 <= gold < len(choices):
        raise ValueError(f"{where}: the field 'gold' is {gold!r}; it must be an index from 0 to {len(choices) - 1}")
    if "question" in row:
        return f"Question: {_text_field(row, 'question', where)}\nAnswer:", list(choices), gold
    context = _text_field(row, "context", where)
    if "activity" not in row:
        return context, list(choices), gold
    prompt = hellaswag_text(f"{_text_field(row, 'activity', where)}: {_capitalized_ending(context)}")
    cleaned = [hellaswag_text(choice) for choice in choices]
    if not all(choice.strip() for choice in cleaned):
        raise ValueError(f"{where}: the field 'choices' holds one that is blank without its bracketed marks")
    return prompt, cleaned, gold


def _word_row(row: Mapping[str, Any], where: str) -> tuple[str, str]:
    return _text_field(row, "context", where), _text_field(row, "target", where).strip()


def _text_field(row: Mapping[str, Any], field: str, where: str) -> str:
    value = row.get(field)
    if not isinstance(value, str) or not value.strip():
        found = "is missing" if field not in row else f"is {value!r}"
        raise ValueError(f"{where}: the field {field!r} {found}; it must be a string with text in it")
    return value


def hellaswag_text(text: str) -> str:
    """Raw HellaSwag text without the bracketed marks of its WikiHow part, as the harness cleans it."""
    text = re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". "))
    return text.replace("  ", " ")


def _capitalized_ending(context: str) -> str:
    """The harness begins the unfinished last sentence of a video caption with a capital letter, and writes the rest of
    it in small ones; so does this.
    """
    if "[" in context:
        return context
    return re.sub(r"(?<=[.!?] )[a-z][^.!?]*$", lambda match: match[0].capitalize(), context)


def model_length(model: Any) -> int | None:
    """Positions that a model was made for, where its config says it."""
    config = getattr(model, "config", None)
    text_config = getattr(config, "get_text_config", lambda: config)()
    length = getattr(text_config, "max_position_embeddings", None)
    return length if isinstance(length, int) and length > 0 else None


def _argmax(values: Sequence[float]) -> int:
    return max(range(len(values)), key=values.__getitem__)


def _share(correct: Sequence[bool]) -> tuple[float, float | None]:
    """Share of true values and the standard error of that mean, as the harness gives it."""
    return ratio_mean([float(value) for value in correct], [1] * len(correct))
