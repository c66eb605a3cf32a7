"""Sparse prefill attention against dense on one CUDA device: right first, then time.

Causal, every head the same pattern at a density, the share of the tiles of dense attention; lines are drawn, not
picked: speed depends on how many tiles and columns a row lists, not on which. The time of attention over a ready index,
the time of making that index as a model does (for `vertical_slash` with the scores of the last queries), and both.

    ideal           time of our dense kernel in the same mode · tiles visited / tiles of dense attention
    share           ideal / time over a ready index: 1 where a tile costs what it costs in dense attention
    error           kernel against the reference over the same index, on CHECK_LENGTH tokens                ≤ LIMITS

Density 1 is our sparse kernel over all tiles.

*Budgets* are numbers of keys and distances of vertical-slash heads, as published, in place of a density. How many tiles
so many distances open depends on how they stand, so their drawing is fixed: the nearer half are the nearest ones, the
others stand in runs of `RUN` at random, unaligned to tiles; keys stand at random. The patterns that MInference (arXiv
2407.02490) publishes for Llama 3.1 8B are made of (1000, 6096), (30, 800), (100, 800), (500, 700) and (3500, 100),
whatever the length of a prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..kernels.attention import Call, Mode
from ..kernels.line_scores import line_scores
from ..kernels.sparse_attention import StaticPattern, sparse_attention, sparse_attention_ref
from ..kernels.sparse_index import TILE, Extent, SparseIndex, index_from_tiles
from ..sparsify.online import visited
from ..sparsify.patterns import AShape, Dense, Pattern, VerticalSlash, layer_index, static_pattern
from ..sparsify.search import SINK, causal_tiles, slash_budgets, window_of
from .attention_cases import Case, worst_error
from .attention_contenders import PEERS, Contender, Problem, kompakt_mode
from .attention_speed import LIMITS, finite, heading, run_once
from .device_speed import Machine
from .linear_speed import parse_pair, reason
from .pipeline import Progress, quiet

CHECK_LENGTH = 1000
PATTERNS = ("a_shape", "vertical_slash", "block")
COLUMN_SHARE = 0.1
"""Of the tiles of a vertical-slash pattern, what goes to columns."""
RUN = 64
"""Neighbouring distances that stand together, of those that are not the nearest."""


@dataclass(frozen=True)
class Budgets:
    """Keys and distances of vertical-slash heads; the heads take the pairs in turn."""

    pairs: tuple[tuple[int, int], ...]

    @classmethod
    def parse(cls, text: str) -> Budgets:
        """``1000x6096``, or ``30x800+1000x6096`` where heads differ. ValueError for anything else."""
        found = [parse_pair(item) for item in text.split("+")]
        pairs = tuple(pair for pair in found if pair is not None)
        if len(pairs) < len(found):
            raise ValueError(f"budgets {text!r} are no keys x distances; use e.g. 1000x6096, or 30x800+1000x6096")
        return cls(pairs)

    @property
    def name(self) -> str:
        """As it is read."""
        return "+".join(f"{vertical}x{slash}" for vertical, slash in self.pairs)

    def of_heads(self, heads: int, factor: float) -> list[Pattern]:
        """A pattern for every head. factor: less than 1 for a shorter prompt that is to have the same density."""
        chosen = (self.pairs[head % len(self.pairs)] for head in range(heads))
        return [VerticalSlash(max(round(v * factor), 1), max(round(s * factor), 1)) for v, s in chosen]


Level = float | Budgets
"""What a pattern visits: a density, or budgets."""


def sparse_speed(
    machine: Machine,
    found: Sequence[Case],
    modes: Sequence[Mode],
    patterns: Sequence[str],
    levels: Sequence[Level],
    peers: Sequence[str],
    *,
    note: str = "",
    progress: Progress = quiet,
    keep: Callable[[dict[str, Any]], None] = lambda result: None,
) -> dict[str, Any]:
    """Rows of every case × mode × pattern × level; JSON-able. keep: given the result after every case. ValueError for
    anything but causal cases.
    """
    other = [case.mask for case in found if case.mask != "causal"]
    if other:
        raise ValueError(
            f"mask {other[0]} with --pattern: sparse attention is timed on causal calls; leave --masks out"
        )
    rows: list[dict[str, Any]] = []
    result: dict[str, Any] = {}
    steps = len(modes) * len(patterns) * len(levels)
    for place, case in enumerate(found):
        problem = Problem.draw(case, machine.device)
        beside = {peer: timed(PEERS[peer], problem, machine) for peer in peers}
        for mode in modes:
            dense = timed(partial(kompakt_mode, mode), problem, machine)
            for pattern in patterns:
                for level in levels:
                    progress(
                        "timing sparse attention", place * steps + len(rows) % steps, len(found) * steps, case.name
                    )
                    small = Problem.draw(replace(case, length=CHECK_LENGTH), machine.device)
                    row = {**asdict(case), "mode": mode, "pattern": pattern, **named(level)}
                    row |= checked(small, mode, pattern, level, CHECK_LENGTH / case.length)
                    if row["correct"]:
                        row |= time_row(problem, mode, pattern, level, dense, machine)
                    rows.append({**row, "dense": dense, "peers": beside})
        result = {**heading(machine, peers, note), "bench": "sparse-attention", "rows": list(rows)}
        keep(result)
    return result


def timed(make: Callable[[Problem, Machine], Contender], problem: Problem, machine: Machine) -> dict[str, Any]:
    """`microseconds` of a dense contender, or `absent` with the reason."""
    try:
        contender = make(problem, machine)
        run_once(contender, problem)
        return {"microseconds": round(1e6 * machine.timer(contender.calls()), 3)}
    except Exception as error:  # whatever another library raises, it is absent and the row says why
        return {"absent": reason(error)}


def named(level: Level) -> dict[str, Any]:
    """How a row says its level."""
    return {"budgets": level.name, "run": RUN} if isinstance(level, Budgets) else {"density": level}


def drawn_lines(problem: Problem, heads: Sequence[Pattern]) -> tuple[Tensor, Tensor]:
    """Scores of keys and distances, (batch, heads, keys), whose best are the lines of the module's budgets."""
    tokens, device = problem.key.shape[2], problem.key.device
    generator = torch.Generator(device).manual_seed(3)
    vertical = torch.rand((len(heads), tokens), generator=generator, device=device)
    slash = torch.zeros((len(heads), tokens), device=device)
    for head, pattern in enumerate(heads):
        assert isinstance(pattern, VerticalSlash)
        near = min(pattern.slash // 2, tokens)
        slots = torch.randperm((tokens - near) // RUN, generator=generator, device=device)
        starts = near + slots[: -(-(pattern.slash - near) // RUN)] * RUN
        slash[head, :near] = 1.0
        slash[head, (starts[:, None] + torch.arange(RUN, device=device)).flatten()] = 0.5
    shape = (problem.query.shape[0], -1, -1)
    return vertical.expand(shape), slash.expand(shape)


def drawn_scores(problem: Problem) -> tuple[Tensor, Tensor]:
    """Scores of keys and distances, (batch, heads, keys): random, the same every time."""
    generator = torch.Generator(problem.query.device).manual_seed(1)
    shape = (problem.query.shape[0], problem.query.shape[1], problem.key.shape[2])
    vertical, slash = (torch.rand(shape, generator=generator, device=problem.query.device) for _ in range(2))
    # Slashes of models stand in groups: neighbours have nearly the same score.
    groups = slash[..., :: 4 * TILE].repeat_interleave(4 * TILE, dim=-1)[..., : shape[2]]
    return vertical, 0.5 * groups + 0.001 * slash


def patterns_at(name: str, density: float, problem: Problem, slash: Tensor) -> list[Pattern]:
    """A pattern for every head, each visiting so many tiles. ValueError if it does not know the name."""
    tokens, heads = problem.key.shape[2], problem.query.shape[1]
    budget = density * causal_tiles(tokens)
    if density == 1:
        return [Dense()] * heads
    if name == "a_shape":
        return [AShape(SINK, window_of(tokens, budget - tokens / TILE))] * heads
    if name == "vertical_slash":
        counts = slash_budgets(slash[0], [(1 - COLUMN_SHARE) * budget])
        return [VerticalSlash(round(COLUMN_SHARE * density * tokens), count) for (count,) in counts]
    raise ValueError(f"pattern {name!r} is not timed; known: {', '.join(PATTERNS)}")


def drawn_tiles(problem: Problem, density: float, extent: Extent) -> Tensor:
    """A random tile map with the diagonal and so many tiles."""
    generator = torch.Generator(problem.query.device).manual_seed(2)
    shape = (problem.query.shape[0], problem.query.shape[1], extent.query_tiles, extent.key_tiles)
    chosen = torch.zeros(shape, dtype=torch.bool, device=problem.query.device)
    for head in range(shape[1]):
        chosen[:, head] = torch.rand(shape[2:], generator=generator, device=chosen.device) < density
    diagonal = torch.arange(extent.query_tiles, device=chosen.device)
    chosen[..., diagonal, diagonal + extent.key_tiles - extent.query_tiles] = True
    return chosen


def makers(
    problem: Problem, name: str, level: Level, factor: float = 1.0
) -> tuple[Callable[[], SparseIndex | StaticPattern], Callable[[], SparseIndex | StaticPattern]]:
    """What makes the index, and what a model does for it, which estimates scores as well. factor: of budgets."""
    layout, query, key = problem.layout, problem.query, problem.key
    extent = Extent.of(layout.batch, layout.queries, layout.keys, None, query.device)
    if name == "block" and not isinstance(level, Budgets) and level < 1:
        chosen = drawn_tiles(problem, level, extent)

        def from_tiles() -> SparseIndex:
            return index_from_tiles(chosen, extent, causal=True)

        return from_tiles, from_tiles
    if isinstance(level, Budgets):
        heads = level.of_heads(query.shape[1], factor)
        vertical, slash = drawn_lines(problem, heads)
    else:
        vertical, slash = drawn_scores(problem)
        heads = patterns_at(name, level, problem, slash)

    def from_lines() -> SparseIndex | StaticPattern:
        found = None if isinstance(heads[0], Dense) else static_pattern(heads, query.device)
        return found or layer_index(heads, extent, causal=True, vertical=vertical, slash=slash)

    def estimated() -> SparseIndex | StaticPattern:
        if heads[0].scores:
            line_scores(query, key, extent, scaling=query.shape[-1] ** -0.5)
        return from_lines()

    return from_lines, estimated


def checked(problem: Problem, mode: Mode, name: str, level: Level, factor: float = 1.0) -> dict[str, Any]:
    """The kernel against the reference over the same index, everywhere; `reason` where there is no result. factor: of
    budgets.
    """
    try:
        index = makers(problem, name, level, factor)[0]()
        query, key, value = problem.query, problem.key, problem.value
        out, _ = sparse_attention(query, key, value, index, mode=mode, check=True)
        call = Call(mode, True, None, query.shape[-1] ** -0.5, None)
        expected, _ = sparse_attention_ref(query.float(), key.float(), value.float(), index, call, dtype=torch.float64)
        error = worst_error(out.double(), expected.transpose(1, 2).double())
    except Exception as error:  # one failing kernel must not cost the other rows; the command fails in the end
        return {"correct": False, "reason": reason(error)}
    return {"correct": error <= LIMITS[mode], "error": finite(error)}


def time_row(
    problem: Problem, mode: Mode, name: str, level: Level, dense: dict[str, Any], machine: Machine
) -> dict[str, Any]:
    """Times in microseconds, and what was visited."""
    layout = problem.layout
    try:
        make, estimate = makers(problem, name, level)
        index = make()
        extent = Extent.of(layout.batch, layout.queries, layout.keys, None, problem.query.device)
        tiles, of = (float(number) for number in visited(index, extent))

        def run(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            return sparse_attention(query, key, value, index, mode=mode)[0]

        inputs = machine.rotated((problem.query, problem.key, problem.value))
        seconds = machine.timer(Contender(inputs, run).calls())
        making = eager_seconds(estimate)
    except Exception as error:  # as above
        return {"correct": False, "reason": reason(error)}
    found = {
        "tiles": tiles,
        "executed_density": round(tiles / of, 5),
        "index_bytes": index.nbytes() if isinstance(index, SparseIndex) else index.table.nbytes,
        "microseconds": round(1e6 * seconds, 3),
        "index_microseconds": round(1e6 * making, 3),
        "total_microseconds": round(1e6 * (seconds + making), 3),
    }
    if "microseconds" in dense:
        ideal = dense["microseconds"] * tiles / of
        found |= {"ideal_microseconds": round(ideal, 3), "share": round(ideal / found["microseconds"], 4)}
    return found


def eager_seconds(make: Callable[[], object], repeats: int = 5) -> float:
    """Median seconds of making an index, which waits for the device and cannot be captured in a graph."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    make()
    times = []
    for _ in range(repeats):
        start.record()
        make()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return sorted(times)[repeats // 2]
