"""Experts that calibration text rarely reaches: how many tokens went where, and second moments for those with few.

The moments of an input that was seen less often than it is wide are singular, and those of an expert that no token
went to do not exist. Such an expert is shown every token of its layer: its output there is thrown away, and each token
counts as much as an error in it would if it were routed there with the average weight of the layer. Learned rounding
leaves these experts where their moments put them.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from ..quant.block import Block
from .experts import SeparateExperts, separate_experts_of
from .processes import Processes

NOTE = "experts"
"""Key of the counts in what is noted of a decoder layer."""


def prepare_experts(block: Block, processes: Processes) -> None:
    """Counts the tokens of every expert of a layer, in `block.notes`, and has the moments of those with few taken on
    all tokens. Nothing happens in a layer without experts.

    A mixture is noted as tokens: of each expert; needed: fewer than that are few, the widest input of its Linears.
    """
    mixtures = separate_experts_of(block.module)
    if not mixtures:
        return
    few: dict[str, frozenset[int]] = {}
    for name, tokens in count_tokens(block, mixtures, processes).items():
        needed = max(linear.in_features for linear in mixtures[name].modules() if isinstance(linear, nn.Linear))
        few[name] = frozenset(index for index, count in enumerate(tokens) if count < needed)
        block.notes.setdefault(NOTE, {})[name] = {"tokens": tokens, "needed": needed}
    rare = tuple(f"{name}.{index}." for name in few for index in few[name])
    block.rarely_run = frozenset(linear for linear in block.linears if linear.startswith(rare))

    @contextmanager
    def on_every_token() -> Iterator[None]:
        with ExitStack() as stack:
            for name, mixture in mixtures.items():
                stack.enter_context(mixture.on_every_token(few[name]))
            yield

    block.observing = on_every_token


@torch.no_grad()
def count_tokens(block: Block, mixtures: Mapping[str, SeparateExperts], processes: Processes) -> dict[str, list[int]]:
    """Calibration tokens, of all processes, that go to each expert of each mixture."""
    with ExitStack() as stack:
        counts = {name: stack.enter_context(mixture.counted()) for name, mixture in mixtures.items()}
        for index, hidden in enumerate(block.inputs):
            block.run(hidden, index)
    return {name: processes.sum_counts(count).tolist() for name, count in counts.items()}


def expert_sentence(layers: list[dict[str, Any]]) -> str:
    """How calibration reached the experts, empty if there were none. layers: what is reported of the decoder layers."""
    found = [mixture for layer in layers for mixture in layer["notes"].get(NOTE, {}).values()]
    if not found:
        return ""
    counts = [count for mixture in found for count in mixture["tokens"]]
    few = sum(count < mixture["needed"] for mixture in found for count in mixture["tokens"])
    never = counts.count(0)
    reached = f"tokens per expert: {min(counts):,} at least, median {statistics.median(counts):,.0f}"
    if not few:
        return f"{len(counts):,} experts, {reached}"
    needed = max(mixture["needed"] for mixture in found)
    unreached = f", {never:,} of them with none," if never else ""
    shown = f"{few:,} with fewer than {needed:,}{unreached} were calibrated on every token of their layer"
    return f"{len(counts):,} experts, {reached}; {shown}"
