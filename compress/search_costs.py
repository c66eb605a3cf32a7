"""What a search makes least, as costs that add up: of every choice for every part, and of the rest of the model.

    size       bytes of all weights, codes, scales and shapes as packed
    decode     seconds of a step: for every Linear the longer of reading its weights and multiplying `batch` tokens,
               and for attention the longer of reading the caches and multiplying
    prefill    seconds of `batch` prompts: the same with all their tokens; attention multiplies, the head counts for one
               token of a prompt

Linears run one after the other, so their times are added, each a ceiling of its own: together no less than what `plan`
says (`ceilings.py`), whose rates, bytes and kinds of attention these are.

On a CUDA device that is here, Linears are measured instead, as `bench linear` does it: one time for each shape, choice
and number of tokens, on random numbers that are checked first. What Linears that read one input do at once counts as
one Linear, where a model does so (`shared_input.py`). Attention is measured too (`search_attention.py`), and the rest
reckoned at the ceilings of that device, measured too. Measurements are kept with the others, so that a search that goes
on has the same costs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import torch

from ..quant.fp8 import round_fp8
from ..quant.method import Activations
from .ceilings import DeviceCeilings, Work, device_ceilings, rate_of, works
from .device_speed import Ceilings, Machine, graph_time, measure_ceilings
from .kv_evict import KVEvict
from .linear import CompressedLinear
from .linear_contenders import Contender, quantize_int4, relative_error
from .linear_speed import PEER_ERROR_LIMIT, Problem, Shape
from .planning import kv_cache_bytes, own_bytes, plan_cache
from .recipe import Recipe
from .search_attention import cache_seconds, measured_seconds, prefill_seconds, slot_seconds, unmeasured
from .search_options import SearchOptions
from .search_slots import EMPTY, SlotSpace
from .search_space import FLOAT, Choice, Part, linear_bytes
from .shared_input import TOGETHER_TOKENS

Recall = Callable[[dict[str, Any], Callable[[], Any]], Any]
"""(question, how to find the answer) → the answer, kept; see `BaseResults.recall`."""
MEASURED_TOKENS = 16384
"""Tokens that a Linear is timed with at most; a larger number takes so many times as long."""


class LinearTime(Protocol):
    """How long the Linears of a part take."""

    def seconds(self, part: Part, choice: Choice, tokens: int) -> float:
        """One after the other, for so many tokens at once."""
        ...


@dataclass(frozen=True)
class Costs:
    """Costs of one target. unit: "bytes" or "seconds". basis: "counted", "ceilings" or "measured". words: what a cost
    is and where it comes from. part: of a choice for a part. slots: of each choice for the slot, by key, and of the
    empty slot, `EMPTY`, which is no choice where the recipe fills it. rest: of everything else. device: whose, None for
    bytes.
    """

    target: str
    unit: str
    basis: str
    words: str
    part: Callable[[Part, Choice], float]
    slots: Mapping[str, float]
    rest: float
    device: DeviceCeilings | None = None

    def matrix(self, parts: Sequence[Part], own: Sequence[Sequence[Choice]]) -> list[list[float]]:
        """Of every part, by its choices."""
        return [[self.part(part, choice) for choice in found] for part, found in zip(parts, own, strict=True)]

    def as_dict(self) -> dict[str, Any]:
        """JSON-able."""
        found = {"unit": self.unit, "basis": self.basis, "words": self.words}
        return found if self.device is None else {**found, "device": asdict(self.device)}


def costs_of(model: Any, space: SlotSpace, options: SearchOptions, parts: list[Part], recall: Recall) -> Costs:
    """The costs that `options` ask for, of a device that `check_device` let pass. space: what may fill the slot, from
    which choices without a time are left out. recall: keeps what is measured.
    """
    recipe = space.choices[0].recipe
    assert recipe.weights is not None
    activations = recipe.weights.activations
    if options.target == "size":
        return counted(model, space, options, parts, activations)
    if options.runs_on is not None:
        device = device_ceilings(options.runs_on)
        return timed(model, space, options, parts, AnalyticLinears(device, activations), device)
    machine = machine_here(recall)
    device = measured_ceilings(torch.cuda.get_device_name(machine.device), machine.ceilings)
    return timed(model, space, options, parts, MeasuredLinears(machine, activations, recall), device)


def counted(model: Any, space: SlotSpace, options: SearchOptions, parts: list[Part], activations: Activations) -> Costs:
    """Costs in bytes."""
    words = "bytes of all weights, codes, scales and shapes as packed"
    fillings = {EMPTY: space.without, **{choice.key: choice.recipe for choice in space.choices}}
    slots = dict.fromkeys(fillings, 0)
    if options.context is not None:
        words += f", and of the caches of {sequences_of(options)}"
        slots = {key: cache_bytes(model, recipe, options) for key, recipe in fillings.items()}
    rest = sum(own_bytes(model)) - sum(part.bytes(FLOAT, activations) for part in parts)
    return Costs("size", "bytes", "counted", words, lambda part, choice: part.bytes(choice, activations), slots, rest)


def cache_bytes(model: Any, recipe: Recipe, options: SearchOptions) -> int:
    """Of the caches of all sequences, codebooks once."""
    if recipe.kv_cache is None:
        return options.sequences * kv_cache_bytes(model.config, options.tokens, model.dtype.itemsize)
    found = plan_cache(model, recipe.kv_cache, [options.tokens])
    return options.sequences * found.bytes[options.tokens] + found.codebook_bytes


def timed(
    model: Any,
    space: SlotSpace,
    options: SearchOptions,
    parts: list[Part],
    linears: LinearTime,
    device: DeviceCeilings,
) -> Costs:
    """Costs in seconds. linears: what times those of parts."""
    decode, sequences, context = options.target == "decode", options.sequences, options.tokens
    tokens = sequences * (1 if decode else context)
    work = work_of(model, space.choices[0].recipe, context)

    def reckon(recipe: Recipe) -> float:
        bound = cache_seconds if decode else prefill_seconds
        return bound(work_of(model, recipe, context), device, sequences, context)

    measured, reckoned = None, None
    if isinstance(linears, MeasuredLinears):
        reckoned = unmeasured(work, space, context)
        if reckoned is None:
            measured = linears.attention(model, space, len(work.windows), options)
    slots, failed = slot_seconds(space, reckon, measured)
    if EMPTY not in slots:
        slots[EMPTY] = reckon(space.without)
    return Costs(
        target=options.target,
        unit="seconds",
        basis="measured" if isinstance(linears, MeasuredLinears) else "ceilings",
        words=described(options, device, isinstance(linears, MeasuredLinears), reckoned or failed)
        + uncounted(space.choices[0].recipe, options.target),
        part=lambda part, choice: linears.seconds(part, choice, tokens),
        slots=slots,
        rest=rest_seconds(work, parts, device, tokens, sequences),
        device=device,
    )


def sequences_of(options: SearchOptions) -> str:
    """``1 sequence of 8,192 tokens``."""
    return f"{options.sequences} sequence{'s' * (options.sequences != 1)} of {options.tokens:,} tokens"


def described(options: SearchOptions, device: DeviceCeilings, measured: bool, reckoned: str | None) -> str:
    """What a time is of, and where it comes from. reckoned: why attention is not measured."""
    of = f"{'a decoding step' if options.target == 'decode' else 'prefill'} of {sequences_of(options)}"
    if not measured:
        return f"least time of {of} by the ceilings of {device.name} ({device.source}), not measured"
    what = "Linears and attention measured" if reckoned is None else "Linears measured"
    why = "" if reckoned is None else f" (attention too: {reckoned})"
    return f"time of {of} on {device.name}: {what}, the rest by its ceilings, measured too{why}"


def uncounted(recipe: Recipe, target: str) -> str:
    """What a time leaves out because of the recipe's own slots."""
    if target == "prefill" and recipe.sparsity is not None:
        return "; sparse attention counts as none"
    if target == "decode" and isinstance(recipe.kv_cache, KVEvict):
        return "; products with a cache that evicts count as none, and its bytes as if nothing were evicted"
    return ""


def work_of(model: Any, recipe: Recipe, context: int) -> Work:
    """The work of a model whose weights are floats, with the cache and the attention of a recipe."""
    size = sum(own_bytes(model))
    cache: Mapping[int, int]
    if recipe.kv_cache is None:
        cache = {context: kv_cache_bytes(model.config, context, model.dtype.itemsize)}
    else:
        cache = plan_cache(model, recipe.kv_cache, [context]).bytes
    return works(model, recipe, {}, (size, size), (cache, cache))["compressed"]


def rest_seconds(work: Work, parts: list[Part], device: DeviceCeilings, tokens: int, sequences: int) -> float:
    """Of whatever no part holds, attention aside. tokens: of all sequences together, the head counting one of each."""
    weights = sum(rows * columns for part in parts for rows, columns in part.shapes)
    moved = work.weight_bytes - sum(part.bytes(FLOAT, "none") for part in parts)
    flops = tokens * (sum(work.flops.values()) - work.head_flops - 2 * weights) + sequences * work.head_flops
    return max(moved / device.bandwidth, flops / device.bf16)


@dataclass(frozen=True)
class AnalyticLinears:
    """By bytes and multiplications alone: FP8 inputs multiply at the FP8 rate, all else at the bf16 rate."""

    device: DeviceCeilings
    activations: Activations

    def seconds(self, part: Part, choice: Choice, tokens: int) -> float:
        """See `LinearTime`."""
        rate = "fp8" if choice.weights != "float" and self.activations == "fp8" else "bf16"
        speed = rate_of(self.device, rate)
        return sum(
            max(
                linear_bytes(shape, choice, self.activations, part.dtype) / self.device.bandwidth,
                2 * tokens * shape[0] * shape[1] / speed,
            )
            for shape in part.shapes
        )


@dataclass(frozen=True)
class MeasuredLinears:
    """On a machine, each shape, choice and number of tokens once. recall: keeps the times."""

    machine: Machine
    activations: Activations
    recall: Recall

    def seconds(self, part: Part, choice: Choice, tokens: int) -> float:
        """See `LinearTime`. RuntimeError for a result that is wrong."""
        timed_tokens = min(tokens, MEASURED_TOKENS)
        found = 0.0
        for shape in self.at_once(part, choice, tokens):
            question = {"linear": list(shape), "choice": choice.key, "activations": self.activations}
            question |= {"dtype": str(part.dtype), "tokens": timed_tokens}

            def measure(shape: tuple[int, int] = shape) -> float:
                return time_linear(shape, choice, self.activations, part.dtype, timed_tokens, self.machine)

            found += self.recall(question, measure)
        return found * tokens / timed_tokens

    def attention(self, model: Any, space: SlotSpace, layers: int, options: SearchOptions) -> dict[str, Any]:
        """Seconds of attention by choice, or why there are none; see `search_attention.py`."""
        keys = [choice.key for choice in space.choices]
        question = {"attention": options.target, "choices": keys, "shape": [options.sequences, options.tokens]}

        def measure() -> dict[str, Any]:
            return measured_seconds(model, space, layers, options.sequences, options.tokens, self.machine)

        return self.recall(question, measure)

    def at_once(self, part: Part, choice: Choice, tokens: int) -> list[tuple[int, int]]:
        """Shapes of the products of a part: W4A8 multiplies few tokens with all of its Linears at once."""
        one = choice.weights == "int4" and self.activations == "fp8" and tokens <= TOGETHER_TOKENS
        return [(sum(rows for rows, _ in part.shapes), part.shapes[0][1])] if one else list(part.shapes)


@torch.no_grad()
def time_linear(
    shape: tuple[int, int],
    choice: Choice,
    activations: Activations,
    dtype: torch.dtype,
    tokens: int,
    machine: Machine,
) -> float:
    """Seconds of one Linear, its inputs quantized in them. shape: (out, in). RuntimeError if its result is far from the
    product in float, as only a broken kernel's is.
    """
    problem = Problem.draw(Shape("search", "", *shape), [tokens], machine)
    linear = linear_of(problem.weight.to(dtype), choice, activations)
    contender = Contender(machine.rotated((linear,)), lambda x, linear: linear(x), prepare=lambda x: x.to(dtype))
    error = relative_error(problem.result(contender, tokens), problem.places[tokens][2])
    if not error <= PEER_ERROR_LIMIT:
        raise RuntimeError(
            f"a Linear of {shape[0]}×{shape[1]} stored as {choice.key} gives wrong results on this device: its error "
            f"is {error:.2g}"
        )
    return machine.timer(contender.calls(problem.x))


def linear_of(weight: torch.Tensor, choice: Choice, activations: Activations) -> torch.nn.Module:
    """A Linear without bias, rounded to nearest. weight: (out, in) float."""
    rows, columns = weight.shape
    if choice.weights == "float":
        linear = torch.nn.Linear(columns, rows, bias=False, device="meta")
        linear.weight = torch.nn.Parameter(weight, requires_grad=False)
        return linear
    scheme = choice.scheme(activations)
    if choice.weights == "fp8":
        return CompressedLinear.from_quantized(round_fp8(weight.float(), weight.dtype), None, scheme)
    linear = CompressedLinear(columns, rows, bias=False, scheme=scheme, dtype=weight.dtype, device=weight.device)
    packed, scale = quantize_int4(weight, scheme.groups(columns))
    linear.weight_packed.data, linear.weight_scale.data = packed, scale.to(weight.dtype)
    linear.weight_shape.data = torch.tensor([rows, columns], device=weight.device)
    return linear


def check_device(options: SearchOptions) -> None:
    """ValueError where a time is wanted, no device is named, and there is none to measure."""
    if options.target != "size" and options.runs_on is None and not torch.cuda.is_available():
        raise ValueError(
            f"target {options.target} needs a device whose speed counts, and there is no CUDA device here to measure; "
            "name one by --runs-on, e.g. h200"
        )


def machine_here(recall: Recall) -> Machine:
    """The CUDA device that is here, its ceilings measured."""
    device = torch.device("cuda", torch.cuda.current_device())
    kept = recall({"ceilings": "device"}, lambda: asdict(measure_ceilings(graph_time, device)))
    return Machine(device, graph_time, torch.cuda.get_device_properties(device).L2_cache_size, Ceilings(**kept))


def measured_ceilings(name: str, found: Ceilings) -> DeviceCeilings:
    """Measured ceilings as those of a device."""
    fp8 = None if found.fp8_tflops is None else 1e12 * found.fp8_tflops
    return DeviceCeilings(name, found.bytes_per_second, 1e12 * found.bf16_tflops, fp8, "measured here")


def check_differ(costs: Costs, matrix: Sequence[Sequence[float]], space: SlotSpace) -> None:
    """ValueError if no choice costs less than floats, which come first, and an empty slot, so that there is nothing to
    search for.
    """
    if all(row[0] <= min(row) * (1 + 1e-9) for row in (*matrix, [costs.slots[EMPTY], *costs.slots.values()])):
        weights, out = space.choices[0].recipe.weights, sorted(set(space.left_out.values()))
        assert weights is not None
        raise ValueError(
            f"nothing makes {costs.target} faster: no choice costs less than floats, {costs.words}, with activations "
            f"{weights.activations}; FP8 activations multiply faster on devices that have FP8 (--set "
            f"weights.activations=fp8){f'; {space.slot} is left out, since {out[0]}' if out else ''}"
        )
