"""How long a model writes what its base model would have written: greedy continuations of prompts from a text.

The base continues every prompt greedily, up to its first end-of-text token, that included. The model is given the same
prompt and the base's continuation, one token after the other as `generate()` does it, and its most likely token is
compared at every position. Up to the first position where they differ it has seen nothing but its own choices: there,
and only there, a free run of it leaves the base's. Logits are taken as they are; the model's generation config, with
its penalties, plays no part.

`agreement` is the share of positions with the same token. After a free run has once diverged its text is another one,
so agreement along the base's says how often a step goes another way, and the first divergence what that does to a text.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from .cache_evaluation import Reader, count_anew
from .calibration import special_affixes
from .evaluation import Progress, Result, input_device, ratio_mean, scoring_mode
from .evaluation_tasks import model_length
from .hf_attention import at_least

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PROMPTS_AT_ONCE = 8


@dataclass(frozen=True, kw_only=True)
class GenerationOptions:
    """What is continued. text: "builtin" or a .txt file. prompts: how many, at most; of prompt_tokens each. new_tokens:
    of a continuation. ValueError for what cannot be.
    """

    text: str = "builtin"
    prompts: int = 16
    prompt_tokens: int = 1984
    new_tokens: int = 64

    def __post_init__(self) -> None:
        for name in ("prompts", "prompt_tokens", "new_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"generation {name} is {getattr(self, name)}; it must be at least 1")

    @classmethod
    def in_window(cls, window: int, *, new_tokens: int = 64, **options: Any) -> GenerationOptions:
        """Prompts that fill a window together with their continuations."""
        if new_tokens >= window:
            raise ValueError(f"{new_tokens} generated tokens leave nothing of a window of {window} for a prompt")
        return cls(prompt_tokens=window - new_tokens, new_tokens=new_tokens, **options)


@dataclass(frozen=True)
class GenerationAgreement(Result):
    """Greedy tokens of a model along its base's; standard errors are over prompts.

    ``positions``: compared, in all. ``first_divergence``: for each prompt, how many tokens of a free run equal the
    base's before the first that does not; None where all do. ``median_equal_tokens``: of these, a prompt without
    divergence counted with all its tokens. ``identical``: share of prompts without divergence. ``lengths``: positions
    of each prompt.
    """

    prompts: int
    prompt_tokens: int
    new_tokens: int
    positions: int
    agreement: float
    agreement_stderr: float | None
    identical: float
    identical_stderr: float | None
    median_equal_tokens: float
    first_divergence: tuple[int | None, ...]
    lengths: tuple[int, ...]


def generation_prompts(tokenizer: PreTrainedTokenizerBase, text: str, options: GenerationOptions) -> torch.Tensor:
    """Prompts cut from a text one behind the other: (n, prompt_tokens), each with the tokenizer's first special tokens.

    ValueError for a text that is shorter than one.
    """
    prefix = special_affixes(tokenizer)[0]
    size = options.prompt_tokens - len(prefix)
    if size < 1:
        raise ValueError(f"generation prompt_tokens is {options.prompt_tokens}; the special tokens take {len(prefix)}")
    ids = torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], dtype=torch.int64)
    if len(ids) < size:
        raise ValueError(f"the text has {len(ids)} tokens, fewer than one prompt of {size}")
    prompts = ids[: len(ids) // size * size].view(-1, size)[: options.prompts]
    return torch.cat([torch.tensor(prefix, dtype=torch.int64).expand(len(prompts), -1), prompts], dim=1)


def generation_agreement(
    model: Any,
    base: Any,
    prompts: torch.Tensor,
    *,
    new_tokens: int = 64,
    end: Sequence[int] = (),
    progress: Progress | None = None,
) -> GenerationAgreement:
    """``model`` along the greedy continuations of ``base``. prompts: (n, tokens). end: end-of-text tokens.

    ValueError if prompt and continuation exceed the positions of either model.
    """
    for side in (model, base):
        check_prompts(side, prompts, new_tokens)
    same: list[list[bool]] = []
    count_anew(model)
    with scoring_mode(model), scoring_mode(base):
        for ids in prompts.split(PROMPTS_AT_ONCE):
            same += _along(model, base, ids, new_tokens, end)
            if progress:
                progress(len(same), len(prompts))
    lengths = tuple(len(row) for row in same)
    first = tuple(row.index(False) if False in row else None for row in same)
    agreement, agreement_stderr = ratio_mean([float(sum(row)) for row in same], lengths)
    identical, identical_stderr = ratio_mean([float(place is None) for place in first], [1] * len(same))
    equal = [size if place is None else place for place, size in zip(first, lengths, strict=True)]
    return GenerationAgreement(
        prompts=len(same),
        prompt_tokens=prompts.shape[1],
        new_tokens=new_tokens,
        positions=sum(lengths),
        agreement=agreement,
        agreement_stderr=agreement_stderr,
        identical=identical,
        identical_stderr=identical_stderr,
        median_equal_tokens=float(statistics.median(equal)),
        first_divergence=first,
        lengths=lengths,
    )


def check_prompts(model: Any, prompts: torch.Tensor, new_tokens: int) -> None:
    """ValueError if prompt and continuation do not fit into the positions that a model was made for."""
    limit = model_length(model)
    if limit is not None and prompts.shape[1] + new_tokens > limit:
        raise ValueError(
            f"prompts of {prompts.shape[1]} tokens and {new_tokens} new ones exceed the {limit} positions of "
            f"{type(model).__name__}"
        )


def _along(model: Any, base: Any, ids: torch.Tensor, new_tokens: int, end: Sequence[int]) -> list[list[bool]]:
    """For each prompt, whether both chose the same token, position by position. ids: (batch, tokens)."""
    reader, leader = Reader(model), Reader(base)
    same: list[list[bool]] = [[] for _ in ids]
    ended = [False] * len(ids)
    tokens = ids
    for _ in range(new_tokens):
        chosen = leader.feed(tokens.to(input_device(base)), keep=1)[:, -1].argmax(-1)
        with at_least(model, 2):
            found = reader.feed(tokens.to(input_device(model)), keep=1)[:, -1].argmax(-1)
        tokens = chosen[:, None]
        for row, (token, other) in enumerate(zip(chosen.tolist(), found.tolist(), strict=True)):
            if not ended[row]:
                same[row].append(token == other)
                ended[row] = token in end
        if all(ended):
            break
    return same


def end_tokens(model: Any, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokens that end a text, of the model's generation config, else the tokenizer's."""
    found = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    found: Any = tokenizer.eos_token_id if found is None else found
    return [] if found is None else [found] if isinstance(found, int) else list(found)
