"""Whole models that generate: time to the first token, time per token and peak memory, in one run for every way.

| way | what runs |
|---|---|
| dynamic | transformers as it comes, with its `DynamicCache` |
| static | its `StaticCache`; on a CUDA device `generate` then compiles the decoding step and replays a CUDA graph |
| a recipe | the model as `patch` leaves it, with plain `generate()`: on a CUDA device a CUDA graph is replayed |
| a recipe, launch by launch | the same without, by `disable_compile=True` |

A recipe's INT4 weights are rounded to nearest whatever its method, and its cache and attention are calibrated on random
tokens: bytes and kernels are those of the recipe, and the time is. Patterns of sparse prefill, on which the time
depends, are prescribed (`prescribed_sparsity.py`). Prompts are random tokens too. None of this says anything about what
a model writes.

The floor of a decoding step is the time in which the weights, once, and the cache at the prompt's length are read at
the measured bandwidth::

    floor = (weight bytes + batch · cache bytes) / bandwidth

Each way and shape runs once to warm up, which compiles, and then `repeats` times; the time per token is the median over
all tokens but the first of each run, the time to the first token the median over runs. Each recipe is put into a model
of its own, so that peak memory holds nothing of another way.
"""

from __future__ import annotations

import datetime
import gc
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

import torch

from ..quant.method import KVCacheMethod
from ..quant.rtn import RTN
from ..sparsify.method import SparsityMethod
from .attention_calibration import SEQUENCES, choose_policies
from .cache_calibration import choose_cache
from .device_speed import graph_time, measure_bandwidth
from .hf import meta_model
from .hf_attention import attached_layers, attention_in_use
from .hf_cache_hooks import run_by
from .hf_capture import steps_of
from .hf_decoder import decoder_layers
from .hf_generation import ModelSource, cache_facts, forget_compiled, generate_timed, is_compiled, step_weight_bytes
from .hf_quantizer import mark_quantized
from .layer_policies import combined
from .linear_contenders import Absent
from .linear_speed import installed, reason
from .patching import kept_linears
from .pipeline import Progress, covered, environment, package_version, quiet, walked
from .planning import kv_cache_bytes, plan_cache
from .prescribed_sparsity import prescribed
from .recipe import Recipe
from .sparsity_calibration import choose_sparsity

VERSION = 1
CALIBRATION_TOKENS = 256


@dataclass(frozen=True)
class Way:
    """One way to run a model. cache: transformers' `cache_implementation`; None with a recipe. launches: whether steps
    run launch by launch; the model is then that of the way before.
    """

    name: str
    recipe: Recipe | None = None
    cache: str | None = None
    launches: bool = False

    @classmethod
    def all(cls, recipes: Sequence[str], *, launches: bool = True, static: bool = True) -> list[Way]:
        """transformers' two, the one that compiles last and only with static, and one per recipe; with launches one
        more per recipe with a compressed cache. ValueError for a recipe that there is not.
        """
        found = [Recipe.load(name) for name in dict.fromkeys(recipes)]
        taken = [recipe.name for recipe in found if recipe.name in ("dynamic", "static")]
        if taken:
            raise ValueError(f"recipe {taken[0]!r} has the name of one of transformers' caches; give it another one")
        ways: list[Way] = [cls("dynamic", cache="dynamic")]
        for recipe in found:
            ways.append(cls(recipe.name, recipe))
            if launches and recipe.kv_cache is not None:
                ways.append(cls(f"{recipe.name}, launch by launch", recipe, launches=True))
        return [*ways, cls("static", cache="static")] if static else ways


@dataclass(frozen=True)
class Shape:
    """What is generated. context: tokens of each prompt. new_tokens: after it, of which the first ends the prefill."""

    context: int
    batch: int
    new_tokens: int

    @property
    def name(self) -> str:
        """``8 × 32768 tokens``."""
        return f"{self.batch} × {self.context} tokens"


def shapes_of(pairs: Sequence[tuple[int, int]], new_tokens: int, source: ModelSource) -> list[Shape]:
    """pairs: sequences and tokens of each. ValueError for sequences that the model has no positions for."""
    context = max(length for _, length in pairs)
    longest = context + new_tokens
    if source.positions is not None and longest > source.positions:
        raise ValueError(
            f"context {context} and {new_tokens} new tokens exceed the {source.positions} positions of "
            f"{source.name}; use shorter ones"
        )
    return [Shape(length, count, new_tokens) for count, length in pairs]


def generation_bench(
    source: ModelSource,
    device: torch.device,
    shapes: Sequence[Shape],
    ways: Sequence[Way],
    *,
    bandwidth: float | None,
    repeats: int = 2,
    note: str = "",
    progress: Progress = quiet,
    keep: Callable[[dict[str, Any]], None] = lambda result: None,
) -> dict[str, Any]:
    """Rows of every way × shape; JSON-able.

    bandwidth: bytes per second that the device reads; None leaves out the floors. note: kept and shown in the table.
    keep: given the result after every row.
    """
    rows: list[dict[str, Any]] = []
    result = heading(source, device, bandwidth, repeats, note)
    model: Any = None
    for index, way in enumerate(ways):
        if model is None or not way.launches:
            progress("timing generation", index * len(shapes), len(ways) * len(shapes), f"{way.name}: making the model")
            if model is not None:
                forget_compiled(model)  # graphs hold on to the model
            model = None
            release(device)
            model = source.open(device)
            if way.recipe is not None:
                put_in(model, way.recipe, device)
        for step, shape in enumerate(shapes):
            progress(
                "timing generation", index * len(shapes) + step, len(ways) * len(shapes), f"{way.name} {shape.name}"
            )
            rows.append(with_floor(row_of(model, way, shape, repeats, device), bandwidth))
            result = {**result, "rows": list(rows)}
            keep(result)
    progress("timing generation", len(ways) * len(shapes), len(ways) * len(shapes), "done")
    return result


def place() -> torch.device:
    """The CUDA device, else the CPU."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def place_and_bandwidth() -> tuple[torch.device, float | None]:
    """`place`, and the bytes per second that a CUDA device moves, measured."""
    device = place()
    return device, None if device.type == "cpu" else 1e9 * max(measure_bandwidth(graph_time, device))


def check_recipes(source: ModelSource, ways: Sequence[Way]) -> None:
    """ValueError, before anything is measured, for a recipe that cannot be put into the model."""
    skeleton = meta_model(source.config)
    for way in ways:
        if way.recipe is not None:
            covered(skeleton, decoder_layers(skeleton), uncalibrated(way.recipe))


def uncalibrated(recipe: Recipe) -> Recipe:
    """The recipe with INT4 weights rounded to nearest: packed alike, without calibration."""
    weights = recipe.weights
    if weights is None or weights.storage != "int4":
        return recipe
    shared = {key: getattr(weights, key) for key in ("group_size", "activations", "ignore", "overrides")}
    nearest = RTN(**shared, scale="amax")
    return recipe.model_copy(update={"weights": nearest})


def put_in(model: Any, recipe: Recipe, device: torch.device) -> None:
    """Runs the model by a recipe, for good: what was there before is not kept. See the module."""
    layers = [] if recipe.weights is None else decoder_layers(model)
    recipe, coverage = covered(model, layers, uncalibrated(recipe))
    length = min(
        CALIBRATION_TOKENS, getattr(model.config.get_text_config(), "max_position_embeddings", CALIBRATION_TOKENS)
    )
    tokens = random_tokens(model, SEQUENCES, length)
    walked(model, recipe, [tokens[:1]], coverage, device=device, undo=None)
    if recipe.weights is not None:
        mark_quantized(model, recipe.weights.scheme(), kept_linears(model))
    attention, sparsity, cache = {}, {}, None
    if recipe.attention is not None:
        attention = choose_policies(model, recipe.attention, tokens, device=device)
    if recipe.sparsity is not None:
        sparsity = choose_sparsity(model, prescribed(recipe.sparsity)[0], None, device=device)
    policies = combined(attention, sparsity)
    if recipe.kv_cache is not None:
        cache = choose_cache(model, recipe.kv_cache, tokens, device=device)
    run_by(model, policies, cache)


def random_tokens(model: Any, batch: int, length: int) -> torch.Tensor:
    """(batch, length) ids, the same every time."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, model.config.get_text_config().vocab_size, (batch, length), generator=generator)


def release(device: torch.device) -> None:
    """Gives back what is no longer used."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def row_of(model: Any, way: Way, shape: Shape, repeats: int, device: torch.device) -> dict[str, Any]:
    """One row: `measured`, or `absent` with the reason; `recipe`: the slots that ran; what a step has to read."""
    slots = {"weights", "attention", "kv_cache", "sparsity"}
    ran, method = None, None
    if way.recipe is not None:
        ran = uncalibrated(way.recipe).model_dump(mode="json", exclude_none=True, include=slots)
        method = way.recipe.kv_cache
    row: dict[str, Any] = {"way": way.name, **asdict(shape), "recipe": ran}
    row["weight_bytes"] = step_weight_bytes(model)
    row["cache_bytes"] = shape.batch * sequence_bytes(model, method, shape.context)
    forget_compiled(model)
    try:
        return {**row, **measured(model, way, shape, repeats, device)}
    except Exception as error:  # too little memory for one way must not cost the others
        return {**row, "absent": reason(error)}
    finally:
        release(device)


def sequence_bytes(model: Any, method: KVCacheMethod | None, context: int) -> int:
    """Bytes of the cache of one sequence; method: None for a dense one."""
    if method is None:
        return kv_cache_bytes(model.config, context, model.dtype.itemsize)
    return plan_cache(model, method, [context]).bytes[context]


def measured(model: Any, way: Way, shape: Shape, repeats: int, device: torch.device) -> dict[str, Any]:
    """Times in milliseconds, and memory. Raises Absent if a compressed cache was asked for and not read, or a CUDA
    graph was not replayed.
    """
    cached = way.recipe is not None and way.recipe.kv_cache is not None
    recorded = device.type == "cuda" and cached and not way.launches
    before = steps_of(model).replayed if recorded else 0
    forget_visits(model)
    found = timed(model, way, shape, repeats, device)
    if way.recipe is not None and way.recipe.sparsity is not None:
        found["sparsity"] = visits(model, way.recipe.sparsity)
    if recorded:
        found["replayed_steps"] = steps_of(model).replayed - before
        if not found["replayed_steps"]:
            failure = steps_of(model).failure
            raise Absent("no step was replayed" if failure is None else f"no step was replayed: {failure}")
    return found


def timed(model: Any, way: Way, shape: Shape, repeats: int, device: torch.device) -> dict[str, Any]:
    """As `measured`, of the model as it is."""
    prompt = random_tokens(model, shape.batch, shape.context).to(device)
    facts = cache_facts(generate_timed(model, prompt, shape.new_tokens, way.cache, launches=way.launches)[1])
    if way.recipe is not None and way.recipe.kv_cache is not None and not facts["coded_tokens"]:
        raise Absent(f"a cache of {shape.context + shape.new_tokens} tokens is dense yet; use a longer context")
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    firsts, steps = [], []
    for _ in range(repeats):
        # The cache must be gone before the next run makes another.
        times = generate_timed(model, prompt, shape.new_tokens, way.cache, launches=way.launches)[0]
        firsts.append(times[1] - times[0])
        steps += [end - start for start, end in pairwise(times[1:])]
    on_device = device.type == "cuda"
    return {
        "first_token_ms": round(1e3 * statistics.median(firsts), 3),
        "token_ms": round(1e3 * statistics.median(steps), 3),
        "tokens_per_second": round(shape.batch / statistics.median(steps), 2),
        "peak_bytes": torch.cuda.max_memory_allocated(device) if on_device else None,
        "peak_reserved_bytes": torch.cuda.max_memory_reserved(device) if on_device else None,
        "compiled": is_compiled(model),
        **facts,
    }


def forget_visits(model: Any) -> None:
    """What sparse calls of another shape visited is counted no more."""
    for layer in attached_layers(model).values():
        layer.visited = layer.dense = 0.0


def visits(model: Any, method: SparsityMethod) -> dict[str, Any]:
    """How prompts were visited: patterns in words, None for those of the recipe; layers that have any, and the share of
    tiles of those. Raises Absent if no call was sparse.
    """
    used = (attention_in_use(model) or {}).get("sparsity")
    if used is None or used["density"] is None:
        raise Absent(f"no prompt is as long as the {method.min_length:,} keys from which prefill is sparse")
    return {"patterns": prescribed(method)[1], "layers": used["layers"], "density": round(used["density"], 5)}


def with_floor(row: dict[str, Any], bandwidth: float | None) -> dict[str, Any]:
    """The row with the floor of a step, and its share of the time per token; None without a bandwidth."""
    if bandwidth is None:
        return {**row, "floor_ms": None, "share": None}
    floor = 1e3 * (row["weight_bytes"] + row["cache_bytes"]) / bandwidth
    return {
        **row,
        "floor_ms": round(floor, 6),
        "share": round(floor / row["token_ms"], 6) if "token_ms" in row else None,
    }


def heading(
    source: ModelSource, device: torch.device, bandwidth: float | None, repeats: int, note: str
) -> dict[str, Any]:
    """Versions, date, device and model, JSON-able."""
    versions = {"cuda": torch.version.cuda, "triton": installed("triton")}
    return {
        "bench": "generate",
        "version": VERSION,
        "kompakt": package_version(),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "environment": {**environment(device), **versions},
        "note": note,
        "model": source.name,
        "random_weights": source.path is None,
        "repeats": repeats,
        "bandwidth_gb_per_second": None if bandwidth is None else round(bandwidth / 1e9, 1),
    }
