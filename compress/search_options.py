"""What a search is asked for: what is to be least, within which loss, and on what it is measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .ceilings import device_ceilings
from .recipe import nearest, percent, shown
from .search_space import GROUP_SIZES, offered

TARGETS = ("size", "decode", "prefill")
MEASURES = ("perplexity",)
CONTEXT = 8192
"""Tokens of a sequence where a target of time is not told how many."""


@dataclass(frozen=True)
class SearchOptions:
    """limit: increase of perplexity, 0.02 for 2 %.
    target: what is to be least. "size": bytes of all weights, and with a context those of the caches of `batch`
    sequences. "decode": the time of a step in which each of `batch` sequences of `context` tokens gets one more.
    "prefill": the time that `batch` prompts of `context` tokens take. Default: 1 sequence of 8,192 tokens.
    runs_on: whose ceilings of speed count, a name or a file as of `plan`; None measures the CUDA device that is here.
    group_sizes: of INT4. rounds: solutions that are measured, at most. minutes: None for no budget.
    text: None for windows of the calibration source that calibration does not draw.
    windows: how many, of the calibration's length, or of a text's; loss_windows: more of them, for the losses of parts.
    """

    limit: float
    target: str = "size"
    context: int | None = None
    batch: int | None = None
    runs_on: str | None = None
    group_sizes: Sequence[int | str] = GROUP_SIZES
    rounds: int = 6
    minutes: float | None = None
    text: str | None = None
    windows: int = 16
    loss_windows: int = 4

    def __post_init__(self) -> None:
        if self.target not in TARGETS:
            raise ValueError(f"unknown target {shown(self.target)}{nearest(self.target, list(TARGETS))}")
        if not 0 < self.limit < 10:
            raise ValueError(f"the limit is {self.limit:g}; it is an increase above 0, such as 1%")
        for name in ("rounds", "windows", "loss_windows", "context", "batch"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1")
        if self.minutes is not None and not self.minutes > 0:
            raise ValueError(f"the budget is {self.minutes:g} minutes; it must be more than 0")
        if self.target == "size":
            self._check_size()
        elif self.runs_on is not None:
            device_ceilings(self.runs_on)
        offered(self.group_sizes)

    def _check_size(self) -> None:
        if self.runs_on is not None:
            raise ValueError(
                f"runs_on is {self.runs_on}, and target size counts bytes, which are the same on every device; leave "
                "it out, or search for decode or prefill"
            )
        if self.batch is not None and self.context is None:
            raise ValueError(
                f"batch is {self.batch}, and target size counts caches only of sequences whose context is given too"
            )

    @property
    def tokens(self) -> int:
        """`context`, or what stands for it."""
        return CONTEXT if self.context is None else self.context

    @property
    def sequences(self) -> int:
        """`batch`, or what stands for it."""
        return 1 if self.batch is None else self.batch


def parse_limit(text: str) -> float:
    """``perplexity=+1%`` → 0.01. ValueError for another measure or no number."""
    measure, equals, value = text.partition("=")
    if measure.strip() not in MEASURES or not equals:
        raise ValueError(f"the limit {shown(text)} is not MEASURE=+X%{nearest(measure.strip(), list(MEASURES))}")
    return percent(value)
