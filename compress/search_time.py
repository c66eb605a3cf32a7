"""How long a search for sparse patterns takes: the pass over the model, and what the method does with each layer.

Calibration tokens are random, and so may be the weights: the time hardly depends on either, and the patterns that come
out mean nothing and are dropped. A method that searches nothing, as one with published patterns, is refused.
"""

from __future__ import annotations

import datetime
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ..sparsify.method import SparseInputs, SparsityMethod, SparsityPolicy
from .generation_bench import random_tokens, release
from .hf_generation import ModelSource
from .linear_speed import installed, reason
from .pipeline import Progress, environment, package_version, quiet
from .recipe import Recipe
from .sparsity_calibration import choose_sparsity
from .sweep import noted
from .video_speed import clock

VERSION = 1


@dataclass(frozen=True, kw_only=True)
class Clocked(SparsityMethod):
    """A method whose `profile` is timed, seconds by layer."""

    inner: SparsityMethod
    spent: list[float] = field(default_factory=list)

    @property
    def needs_data(self) -> bool:
        """As the method."""
        return self.inner.needs_data

    @property
    def sequences(self) -> int:
        """As the method."""
        return self.inner.sequences

    def profile(self, inputs: SparseInputs) -> Any:
        """See `SparsityMethod.profile`."""
        begin = clock(inputs.query.device)
        found = self.inner.profile(inputs)
        self.spent.append(clock(inputs.query.device) - begin)
        return found

    def choose(self, profiles: Mapping[str, Any], heads: Mapping[str, int]) -> dict[str, SparsityPolicy]:
        """See `SparsityMethod.choose`."""
        return self.inner.choose(profiles, heads)


def searches(names: Sequence[str]) -> list[tuple[str, SparsityMethod]]:
    """Names and methods of recipes. ValueError for one without a search."""
    found = []
    for name in names:
        recipe = Recipe.load(name)
        if recipe.sparsity is None or not recipe.sparsity.needs_data:
            raise ValueError(f"recipe {recipe.name!r} searches no sparse patterns; use e.g. sparse-minference")
        found.append((recipe.name, recipe.sparsity))
    if not found:
        raise ValueError("no recipe was named; use e.g. sparse-minference,sparse-triangle")
    return found


def search_time(
    source: ModelSource,
    device: torch.device,
    recipes: Sequence[tuple[str, SparsityMethod]],
    *,
    samples: int,
    length: int,
    note: str = "",
    progress: Progress = quiet,
    keep: Callable[[dict[str, Any]], None] = lambda result: None,
) -> dict[str, Any]:
    """A row per recipe: seconds of the search and those of them in the method, on the clock and of the CPU; JSON-able.
    keep: given the result after every row. ValueError for more tokens than the model has positions for.
    """
    if source.positions is not None and length > source.positions:
        raise ValueError(f"length {length} exceeds the {source.positions} positions of {source.name}")
    result = heading(source, device, samples, length, note)
    model = source.open(device)
    tokens = random_tokens(model, samples, length)
    for name, method in recipes:

        def tell(stage: str, done: int, total: int, text: str, name: str = name) -> None:
            progress(f"searching for {name}", done, total, text)

        row = {"recipe": name, **timed_search(model, method, tokens, device, tell)}
        result = {**result, "rows": [*result["rows"], row]}
        keep(result)
        release(device)
    return result


def timed_search(
    model: Any, method: SparsityMethod, tokens: torch.Tensor, device: torch.device, progress: Progress
) -> dict[str, Any]:
    """Times of one search, or `absent` with the reason."""
    clocked = Clocked(inner=method, min_length=method.min_length)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    begin, cpu = clock(device), time.process_time()
    try:
        choose_sparsity(model, clocked, tokens, device=device, progress=progress)
    except Exception as error:  # too little memory for one method must not cost the others
        return {"absent": reason(error)}
    return {
        "seconds": round(clock(device) - begin, 3),
        "method_seconds": round(sum(clocked.spent), 3),
        "cpu_seconds": round(time.process_time() - cpu, 3),
        "layers": len(clocked.spent),
        "documents": min(method.sequences, len(tokens)),
        "peak_bytes": torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None,
    }


def heading(source: ModelSource, device: torch.device, samples: int, length: int, note: str) -> dict[str, Any]:
    """Versions, date, device and model, JSON-able."""
    return {
        "bench": "search-time",
        "version": VERSION,
        "kompakt": package_version(),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "environment": {**environment(device), "cuda": torch.version.cuda, "triton": installed("triton")},
        "note": note,
        "model": source.name,
        "random_weights": source.path is None,
        "samples": samples,
        "length": length,
        "threads": torch.get_num_threads(),
        "rows": [],
    }


def search_time_table(result: dict[str, Any]) -> str:
    """A row per recipe."""
    lines = ["| recipe | layers | documents × tokens | search, s | of it the method, s | CPU, s | peak memory, GB |"]
    lines.append("|" + "---|" * 7)
    for row in result["rows"]:
        if "absent" in row:
            lines.append(f"| {row['recipe']} | – | – | – | – | – | – |")
            continue
        peak = "–" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 1e9:,.1f}"
        cells = [row["recipe"], f"{row['layers']}", f"{row['documents']} × {result['length']:,}"]
        cells += [f"{row[name]:,.1f}" for name in ("seconds", "method_seconds", "cpu_seconds")]
        lines.append(f"| {' | '.join([*cells, peak])} |")
    weights = "random weights" if result["random_weights"] else "its own weights"
    absent = "".join(f"{row['recipe']} has no time: {row['absent']}. " for row in result["rows"] if "absent" in row)
    environment_ = result["environment"]
    lines += [
        "",
        f"{result['model']} with {weights}, random tokens: time alone. {absent}{environment_['device']}, torch "
        f"{environment_['torch']}, Triton {environment_['triton']}, {result['threads']} CPU threads, "
        f"{result['date']}.{noted(result)}",
    ]
    return "\n".join(lines)
