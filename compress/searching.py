"""`search`: the recipe of fewest bytes, or of least time, whose measured loss stays within a limit, every part of the
model stored its own way.

    costs       of every choice for every part: bytes or seconds (`search_costs.py`)
    losses      of every choice for every part, to second order (`search_losses.py`)
    solutions   the least cost within an estimated loss b (`knapsack.py`)
    measured    each solution is compressed as `compress` would, and its perplexity measured on held-out text

Estimated losses add up only roughly, so b is no limit but a dial: it is turned until solutions on both sides of the
real limit are close, or rounds or minutes are used up. The next b is taken where a straight line through the measured
points meets the limit. Uniform recipes are measured beside it. A recipe is within the limit if its increase of
perplexity *and one standard error* are, which guards against picking the luckiest of several.

Text: windows of the calibration source that calibration does not draw, or windows of a text that is named. Measurements
are kept by a fingerprint of all that they depend on, so that the same command goes on where an earlier one stopped.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from .assess import default_device_map, measure_text, read_text
from .base_results import BaseResults, base_facts, content_digest, results_folder
from .calibration import calibration_tokens
from .coverage import cover
from .cpu_arithmetic import float32_linears
from .evaluation import text_windows
from .hf import load_base, load_tokenizer, resolve_model
from .hf_decoder import decoder_layers, refuse_experts
from .knapsack import cheapest
from .patching import patch
from .pipeline import Progress, quiet
from .planning import own_bytes
from .recipe import EvaluationOptions, Recipe
from .search_costs import Costs, check_device, check_differ, costs_of
from .search_losses import LossWalk, parts_of
from .search_options import SearchOptions
from .search_results import check_recipe_file, summary
from .search_slots import EMPTY, SlotChoice, SlotLosses, SlotSpace, slot_space
from .search_space import FLOAT, Choice, Part, offered, recipe_for

CLOSE = 0.003
"""Share of the cost by which two solutions on both sides of the limit may differ at the end."""


@dataclass(frozen=True)
class Space:
    """What there is to choose. own: of each part, the choices that fit it. slots: fillings of the target's slot."""

    parts: list[Part]
    own: list[list[Choice]]
    slots: SlotSpace

    @classmethod
    def of(cls, parts: list[Part], choices: list[Choice], slots: SlotSpace, path: Path) -> Space:
        """ValueError for a choice that fits no part."""
        own = [part.choices(choices) for part in parts]
        if unfit := [choice for choice in choices if all(choice not in found for found in own)]:
            raise ValueError(
                f"group size {unfit[0].group_size} divides the inputs of no Linear of {path}; there are, e.g., "
                f"{parts[0].shapes[0][1]}"
            )
        return cls(parts, own, slots)


@dataclass
class Search:
    """One search while it runs: what it works on, and what it has measured."""

    path: Path
    recipe: Recipe
    options: SearchOptions
    base: Any
    subject: Any
    tokenizer: Any
    batches: list[torch.Tensor]
    loss_windows: torch.Tensor
    windows: torch.Tensor
    source: str
    evaluation: EvaluationOptions
    results: BaseResults
    progress: Progress
    started: float = field(default_factory=lambda: time.monotonic())
    rows: list[dict[str, Any]] = field(default_factory=list)
    stopped: str = ""
    base_bytes: int = 0
    space: Space = field(init=False)
    costs: Costs = field(init=False)

    @classmethod
    def open(cls, model: str | Path, recipe: Recipe, options: SearchOptions, progress: Progress) -> Search:
        """Loads everything. ValueError for a model, a recipe or a text that cannot be used."""
        if recipe.weights is None or recipe.weights.storage != "int4":
            raise ValueError(f"recipe {recipe.name} has no method that rounds weights to INT4; a search needs one")
        if recipe.weights.overrides:
            raise ValueError(f"recipe {recipe.name} has overrides, which a search would replace; leave them out")
        path = resolve_model(model)
        tokenizer = load_tokenizer(path)
        calibrating, windows, source = search_texts(tokenizer, recipe, options)
        place = default_device_map()
        base, subject = (load_base(path, device_map=place) for _ in range(2))
        refuse_experts(decoder_layers(base), recipe.weights.ignore)
        facts = base_facts(path, base, path, tokenizer, place)
        return cls(
            *(path, recipe, options, base, subject, tokenizer),
            batches=list(calibrating.split(recipe.calibration.batch_size)),
            loss_windows=windows[: options.loss_windows],
            windows=windows[options.loss_windows :],
            source=source,
            evaluation=recipe.evaluation.model_copy(
                update={"window": windows.shape[1], "windows": options.windows, "stride": None}
            ),
            results=BaseResults(search_folder(), facts),
            progress=progress,
            base_bytes=sum(own_bytes(base)),
        )

    def within_time(self) -> bool:
        """Whether there is time left; remembers that there was none."""
        budget = self.options.minutes
        if budget is not None and time.monotonic() - self.started > 60 * budget:
            self.stopped = f"the budget of {budget:g} minutes was used up"
        return not self.stopped

    def parts(self) -> list[Part]:
        """Every part of the model, in order."""
        assert self.recipe.weights is not None
        layers = decoder_layers(self.base)
        lines = cover(self.base, [name for name, _ in layers], self.recipe.weights)
        covered = {line.name for line in lines if line.status == "quantized"}
        found = []
        for index, (name, layer) in enumerate(layers):
            linears = {child: module for child, module in layer.named_modules() if f"{name}.{child}" in covered}
            if linears:
                found += parts_of(self.base, index, linears, self.loss_windows[:1, :8])  # pyright: ignore
        return found

    def losses(self, parts: list[Part], choices: list[Choice]) -> list[list[float]] | None:
        """Of every part, by its `choices`; None if time ran out."""
        rounding = self.recipe.weights
        assert rounding is not None
        names = {name for part in parts for name in part.names}
        walk: list[LossWalk] = []
        found: dict[str, dict[str, float]] = {}
        layers = decoder_layers(self.base)
        method = self.recipe.model_dump(mode="json")["weights"] | {"group_size": None}
        about = {"losses": method, "choices": [choice.key for choice in choices], **self.drawn()}
        for index, (name, _) in enumerate(layers):
            if not self.within_time():
                return None

            def measure(index: int = index) -> Any:
                if not walk:
                    walk.append(
                        LossWalk(
                            *(self.base, rounding, self.batches, self.loss_windows, names),
                            seed=self.recipe.calibration.seed,
                        )
                    )
                return walk[0].losses(index, choices, lambda text: self.progress("losses", index, len(layers), text))

            found |= self.results.recall({**about, "layer": name}, measure)
            self.progress("losses", index + 1, len(layers), "")
        return [
            [sum(found[name][choice.key] for name in part.names) for choice in part.choices(choices)] for part in parts
        ]

    def drawn(self) -> dict[str, Any]:
        """The tokens that a measurement depends on, as digests."""
        tensors = {"calibration": torch.cat(self.batches), "loss_windows": self.loss_windows, "windows": self.windows}
        return {name: content_digest(tensor.tolist()) for name, tensor in tensors.items()}

    def measure(self, recipe: Recipe | None) -> dict[str, Any]:
        """Perplexity and KL beside the float model, of the model compressed by a recipe; None is the float model."""
        if recipe is None:
            return {"perplexity_increase": 0.0, "perplexity_increase_stderr": 0.0, "kl": 0.0}
        content = recipe.model_dump(mode="json", exclude={"name", "description", "limits", "evaluation"})
        evaluation = self.evaluation.model_dump(exclude={"text"})

        def find() -> Any:
            with patch(self.subject, recipe, tokenizer=self.tokenizer, progress=self.progress) as patched:
                return measure_text(patched, self.base, self.windows, self.evaluation, self.progress)["comparison"]

        return self.results.recall({"recipe": content, "evaluation": evaluation, **self.drawn()}, find)

    def slot_losses(self) -> list[float] | None:
        """Of every choice for the slot; one that says nothing is left out. None if time ran out."""
        space = self.space.slots
        found = {space.choices[0].key: 0.0}
        measures = SlotLosses(self.base, self.subject, self.tokenizer, self.loss_windows, self.progress)

        def rounding() -> float:
            return self.results.recall({"slot_rounding": space.slot, **self.drawn()}, measures.rounding)

        for choice in space.choices[1:]:
            if not self.within_time():
                return None
            self.progress("losses", 0, 0, choice.key)
            asked = choice.recipe.model_dump(mode="json", include={space.slot, "calibration"})
            measure = partial(measures.loss, choice, space.slot, rounding)
            answer = self.results.recall({"slot_loss": asked, **self.drawn()}, measure)
            if "reason" in answer:
                space.leave_out(choice.key, answer["reason"])
            else:
                found[choice.key] = answer["loss"]
        return [found[choice.key] for choice in space.choices]

    def cost(self, assignment: dict[Part, Choice], slot: str) -> float:
        """What the target counts of a whole model. slot: the key of its filling."""
        parts = sum(self.costs.part(part, choice) for part, choice in assignment.items())
        return self.costs.rest + self.costs.slots[slot] + parts

    def base_cost(self) -> float:
        """`cost` of the float model, with nothing in the slot."""
        return self.cost(dict.fromkeys(self.space.parts, FLOAT), EMPTY)

    def weight_bytes(self, assignment: dict[Part, Choice]) -> int:
        """Bytes of all weights of a whole model."""
        assert self.recipe.weights is not None
        activations = self.recipe.weights.activations
        saved = sum(part.bytes(FLOAT, "none") - part.bytes(choice, activations) for part, choice in assignment.items())
        return self.base_bytes - saved

    def row(
        self, kind: str, name: str, assignment: dict[Part, Choice], slot: SlotChoice, estimate: float | None
    ) -> dict[str, Any]:
        """Measures one assignment and keeps it in the table."""
        self.progress("search", len(self.rows), 0, name)
        recipe = recipe_for(slot.recipe, assignment, name)
        found = self.measure(recipe)
        highest = found["perplexity_increase"] + (found["perplexity_increase_stderr"] or 0.0)
        weights = sum(rows * columns for part in assignment for rows, columns in part.shapes)
        counts: dict[str, int] = {}
        for part, choice in assignment.items():
            counts[choice.key] = counts.get(choice.key, 0) + sum(rows * columns for rows, columns in part.shapes)
        row = {
            "kind": kind,
            "name": name,
            "bytes": self.weight_bytes(assignment),
            "cost": self.cost(assignment, slot.key),
            "slot": slot.key,
            "estimated_loss": estimate,
            "within": highest <= self.options.limit,
            "shares": {key: round(count / weights, 4) for key, count in counts.items()},
            **{key: found[key] for key in ("perplexity_increase", "perplexity_increase_stderr", "kl")},
            "recipe": None if recipe is None else recipe.model_dump(mode="json", exclude_none=True),
        }
        self.rows.append(row)
        return row


@float32_linears()
def search(
    model: str | Path,
    *,
    options: SearchOptions,
    recipe: str | Path | dict | Recipe = "w4a16-gptq",
    overrides: dict[str, Any] | None = None,
    output: Path | None = None,
    progress: Progress = quiet,
) -> dict[str, Any]:
    """Searches, JSON-able: `rows` of what was measured, the `best` one within the limit, the `best_uniform` one.

    recipe: whose weight method, activations, calibration and other slots are kept. output: where `write_result` is
    going to write, asked for first. Raises ValueError for bad input, and
    `LimitExceeded` if nothing that was measured is within the limit and costs less than the float model.
    """
    loaded = Recipe.load(recipe, overrides)
    if output is not None:
        check_recipe_file(output)
    check_device(options)
    job = Search.open(model, loaded, options, progress)
    choices = offered(options.group_sizes)
    job.space = Space.of(job.parts(), choices, slot_space(job.base, loaded, options), job.path)
    job.costs = costs_of(job.base, job.space.slots, options, job.space.parts, job.results.recall)
    matrix = job.costs.matrix(job.space.parts, job.space.own)
    check_differ(job.costs, matrix, job.space.slots)
    slot_losses = job.slot_losses()
    uniform(job, choices)
    losses = job.losses(job.space.parts, choices) if job.within_time() else None
    if losses is not None and slot_losses is not None:
        slot_costs = [job.costs.slots[choice.key] for choice in job.space.slots.choices]
        turn_dial(job, [*matrix, slot_costs], [*losses, slot_losses])
    return summary(job, sum(map(len, job.space.own)) + len(job.space.slots.choices) - 1)


def uniform(job: Search, choices: list[Choice]) -> None:
    """Measures the recipes with one choice for all, from the most bytes on, until one is outside the limit; then the
    cheapest within it, which may be the float model, with the slot filled in every other way.
    """
    parts, slots = job.space.parts, job.space.slots.choices
    best, best_name = dict.fromkeys(parts, FLOAT), FLOAT.key
    least = (job.cost(best, slots[0].key), job.base_bytes)
    for choice in choices[1:]:
        if not job.within_time():
            return
        if any(choice not in own for own in job.space.own):
            continue
        assignment = dict.fromkeys(parts, choice)
        row = job.row("uniform", choice.key, assignment, slots[0], None)
        if row["within"] and (row["cost"], row["bytes"]) < least:
            best, best_name, least = assignment, choice.key, (row["cost"], row["bytes"])
        # Fewer bits lose more; FP8 and INT4 are not the same kind of bits, so that INT4 is tried whatever FP8 gave.
        if not row["within"] and choice.weights == "int4":
            break
    for slot in slots[1:]:
        if not job.within_time():
            return
        job.row("uniform", f"{best_name}, {slot.key}", best, slot, None)


def turn_dial(job: Search, costs: list[list[float]], losses: list[list[float]]) -> None:
    """Solves for one estimated loss after another, and measures what comes out. costs, losses: of parts, then the
    slot.
    """
    # Points are (estimated loss, log perplexity over the limit); the float model is one.
    target = math.log1p(job.options.limit)
    inside, outside = (0.0, -target), None
    found: dict[bool, float] = {}
    seen: set[tuple[int, ...]] = set()
    budget = target
    for number in range(1, job.options.rounds + 1):
        if not job.within_time():
            return
        chosen = cheapest(costs, losses, budget)
        assert chosen is not None, "floats lose nothing, so that there is a solution"
        if tuple(chosen) in seen:
            return
        seen.add(tuple(chosen))
        estimate = sum(row[choice] for row, choice in zip(losses, chosen, strict=True))
        assignment = {
            part: own[choice] for part, own, choice in zip(job.space.parts, job.space.own, chosen[:-1], strict=True)
        }
        row = job.row("searched", f"searched {number}", assignment, job.space.slots.choices[chosen[-1]], estimate)
        excess = math.log1p(row["perplexity_increase"] + (row["perplexity_increase_stderr"] or 0.0)) - target
        found[row["within"]] = row["cost"]
        if row["within"]:
            inside = (estimate, excess)
        else:
            outside = (estimate, excess)
        if len(found) == 2 and abs(found[True] - found[False]) < CLOSE * row["cost"]:
            return
        budget = next_budget(inside, outside)


def next_budget(inside: tuple[float, float], outside: tuple[float, float] | None) -> float:
    """Where the straight line through (estimated loss, excess over the limit) of two solutions meets 0, kept off the
    ends of the interval. outside: None until a solution was outside; then the last one inside is scaled up.
    """
    if outside is None:
        return 2 * inside[0]
    (low, below), (high, above) = inside, outside
    share = -below / (above - below) if above > below else 0.5
    return low + (high - low) * min(max(share, 0.1), 0.9)


def search_texts(tokenizer: Any, recipe: Recipe, options: SearchOptions) -> tuple[torch.Tensor, torch.Tensor, str]:
    """Calibration tokens as `compress` would draw them, windows that are not among them, and where those come from.

    ValueError for a text that is too short.
    """
    count, wanted = recipe.calibration.samples, options.loss_windows + options.windows
    if options.text is not None:
        text, source = read_text(options.text)
        windows = text_windows(tokenizer, text, window=recipe.evaluation.window, limit=wanted)
        calibrating = calibration_tokens(tokenizer, recipe.calibration).tokens
    else:
        # Windows are drawn without replacement, one after the other: those of a larger draw go on behind the others.
        more = recipe.calibration.model_copy(update={"samples": count + wanted})
        drawn = calibration_tokens(tokenizer, more)
        calibrating, windows = drawn.tokens[:count], drawn.tokens[count:]
        source = f"{drawn.source}, windows that calibration does not draw"
    if len(windows) < wanted:
        raise ValueError(
            f"a search needs {wanted} windows of text beside the {len(calibrating)} of calibration, and {source} has "
            f"{len(windows)}; give a longer text, or fewer or shorter windows"
        )
    return calibrating, windows, source


def search_folder() -> Path:
    """Where measurements are kept, beside the results of base models."""
    return results_folder().with_name("search")
