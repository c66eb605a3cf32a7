"""The slot that a search fills for a whole model, beside storing the weights of its parts: the codes of the cache where
that is counted or read, the arithmetic of attention where prompts are.

A recipe has one filling of these slots for all layers, so a search has one choice: the slot as it is, or one of a few
methods. A slot that the recipe fills is kept. What a choice loses is measured as it is, on the windows that losses of
parts are taken on: the KL of the model with this slot filled and nothing else done to it. A text that is fed through a
cache is computed in another order, and rounds otherwise in 16 bit; the KL of the same way through a cache that codes
nothing is therefore taken off. Losses of weights are free of such rounding, which so adds up with them as KL to second
order does.

A choice that cannot be had here, or that the windows say too little about, is left out, with the reason.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from ..quant.sage import MIN_TOKENS
from .assess import measure_text
from .ceilings import device_ceilings
from .hf_decoder import decoder_layers
from .patching import patch
from .pipeline import Progress
from .planning import cover_attention, plan_cache
from .recipe import EvaluationOptions, Recipe, method_key
from .runtime import attention_backends
from .search_options import SearchOptions

CACHES: dict[str, dict[str, Any]] = {
    "kv_fp8": {"method": "kv_fp8"},
    "kv_int4": {"method": "kv_int4"},
    "kv_pq 4 bits": {"method": "kv_pq", "bits": 4},
}
ATTENTION: dict[str, dict[str, Any]] = {
    "sage int8_fp8": {"method": "sage", "mode": "int8_fp8"},
    "sage fp8_fp8": {"method": "sage", "mode": "fp8_fp8"},
}
SLOTS = {"size": "kv_cache", "decode": "kv_cache", "prefill": "attention"}
"""Target → the slot that it depends on."""
READING = 0.5
"""Share of the positions that must have read codes for a loss to count."""
EMPTY = "none"
"""Key of a slot with nothing in it."""
NO_FP8 = "its kernels need a device that multiplies in FP8"


@dataclass(frozen=True)
class SlotChoice:
    """One filling. key: its name in tables. recipe: the recipe of the search with it."""

    key: str
    recipe: Recipe


@dataclass
class SlotSpace:
    """What may fill a slot. choices: the first is the slot as the recipe has it. left_out: key → why."""

    slot: str
    choices: list[SlotChoice]
    left_out: dict[str, str] = field(default_factory=dict)

    @property
    def without(self) -> Recipe:
        """The recipe with nothing in the slot."""
        return self.choices[0].recipe.model_copy(update={self.slot: None})

    @property
    def searched(self) -> bool:
        """Whether there is anything to choose or to say."""
        return len(self.choices) > 1 or bool(self.left_out)

    def leave_out(self, key: str, reason: str) -> None:
        """Takes a choice away."""
        self.choices = [choice for choice in self.choices if choice.key != key]
        self.left_out[key] = reason


def slot_space(model: Any, recipe: Recipe, options: SearchOptions) -> SlotSpace:
    """What a target leaves to choose, before anything is measured."""
    slot = SLOTS[options.target]
    filled = getattr(recipe, slot)
    space = SlotSpace(slot, [SlotChoice(EMPTY if filled is None else method_key(filled), recipe)])
    counted = options.target != "size" or options.context is not None
    if filled is not None or not counted or (slot == "attention" and recipe.sparsity is not None):
        return space
    refusal = cache_refusal if slot == "kv_cache" else attention_refusal
    for key, content in (CACHES if slot == "kv_cache" else ATTENTION).items():
        choice = SlotChoice(key, recipe.model_copy(update={slot: getattr(Recipe.load({slot: content}), slot)}))
        space.choices.append(choice)
        if (why := refusal(model, choice.recipe, options)) is not None:
            space.leave_out(key, why)
    return space


def cache_refusal(model: Any, recipe: Recipe, options: SearchOptions) -> str | None:
    """Why a cache cannot be had; None if it can."""
    assert recipe.kv_cache is not None
    try:
        plan_cache(model, recipe.kv_cache, [options.tokens])
    except ValueError as error:
        return str(error)
    if options.target == "size":
        return None
    if options.runs_on is not None:
        return NO_FP8 if device_ceilings(options.runs_on).fp8 is None else None
    return recipe.kv_cache.kernel_refusal(torch.device("cuda"))


def attention_refusal(model: Any, recipe: Recipe, options: SearchOptions) -> str | None:
    """Why attention would not run in this arithmetic; None if it would."""
    assert recipe.attention is not None
    if options.tokens < MIN_TOKENS:
        return f"it runs from {MIN_TOKENS:,} tokens on, and the context has {options.tokens:,}"
    lines = cover_attention(model, [name for name, _ in decoder_layers(model)], recipe)
    if not any(line.status == "covered" for line in lines):
        return lines[0].reason
    if options.runs_on is not None:
        return NO_FP8 if device_ceilings(options.runs_on).fp8 is None else None
    (backend,) = attention_backends(recipe.attention.modes, torch.device("cuda")).values()
    return backend.reason if backend.name in ("dense", "reference") else None


@dataclass(frozen=True)
class SlotLosses:
    """Measures losses. subject: a copy of base, patched for a while. windows: (n, tokens)."""

    base: Any
    subject: Any
    tokenizer: Any
    windows: torch.Tensor
    progress: Progress

    def measured(self, recipe: Recipe, slot: str) -> dict[str, Any]:
        """`measure_text` of the model with one slot of a recipe filled and nothing else."""
        content = recipe.model_dump(mode="json", exclude_none=True)
        alone = Recipe.load({"name": slot, slot: content[slot], "calibration": content["calibration"]})
        options = EvaluationOptions(window=self.windows.shape[1], windows=len(self.windows))
        with patch(self.subject, alone, tokenizer=self.tokenizer, progress=self.progress) as patched:
            return measure_text(patched, self.base, self.windows, options, self.progress)

    def rounding(self) -> float:
        """KL of a way through a cache that codes nothing."""
        dense = {"method": "kv_fp8", "recent_tokens": self.windows.shape[1]}
        return self.measured(Recipe.load({"kv_cache": dense}), "kv_cache")["comparison"]["kl"]

    def loss(self, choice: SlotChoice, slot: str, rounding: Callable[[], float]) -> dict[str, Any]:
        """``{"loss": nats per token}``, or ``{"reason": why there is none}``. rounding: what is taken off a cache's."""
        found = self.measured(choice.recipe, slot)
        if slot == "attention":
            ran = found["attention"]["ran"]
            if ran != "quantized":
                return {"reason": f"on the windows that losses are taken on, attention ran {ran}"}
            return {"loss": found["comparison"]["kl"]}
        used = found["kv_cache"]
        if used["reading_codes"] < READING * used["positions"]:
            return {
                "reason": f"only {used['reading_codes']} of {used['positions']} positions read codes in windows of "
                f"{self.windows.shape[1]} tokens; give longer ones (--max-seq-length, or --evaluation-window with "
                "--text)"
            }
        return {"loss": max(0.0, found["comparison"]["kl"] - rounding())}
