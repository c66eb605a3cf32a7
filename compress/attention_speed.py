"""Prefill attention against named peers on one CUDA device: right first, then time.

Every row is one mask, shape, length and mode of `kernels.attention.prefill_attention`, timed as a model calls it:
quantization of queries, keys and values is in the time, making `Segments` is not, since a forward pass does that once
for all of its layers. Before any length of a mask and shape is timed, a mode is held to the reference in float64 on
`CHECK_LENGTH` tokens, everywhere; and before a length is timed, to the reference at some queries of that length. Where
it disagrees the row is wrong and has no time.

    error           kernel against reference, ‖difference‖ / ‖reference‖ of the worst query    ≤ LIMITS
    length_error    the same at the length, of the queries that are compared                   ≤ LIMITS
    cosine, relative_error    kernel against exact attention on CHECK_LENGTH tokens, over everything

FLOPs are 4 · heads · head_dim for each visible pair of a query and a key. The share of the ceiling is the time that
they take at the rates measured in the same process, for each of the two products that of its own arithmetic (INT8 as
FP8), over the time.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor

from ..kernels.attention import FP8_VALUES, KEY_KINDS, MODES, Call, Mode, attention_backend, attention_ref
from .attention_cases import Case, attend_rows, blocks, reference_rows, worst_error
from .attention_contenders import PEERS, Contender, Problem, kompakt_mode
from .device_speed import Ceilings, Machine
from .linear_contenders import Absent, relative_error
from .linear_speed import heading as linear_heading
from .linear_speed import installed, reason
from .pipeline import Progress, quiet

VERSION = 1
CHECK_LENGTH = 333
"""Tokens on which everything is compared: two whole tiles of keys and a part."""
FP8_LIMIT, FLOAT_LIMIT = 2.0**-4, 2.0**-7
LIMITS: dict[str, float] = {mode: FP8_LIMIT if mode in FP8_VALUES else FLOAT_LIMIT for mode in MODES}
LIMITS["fp8_fp8"] += FP8_LIMIT
"""Probabilities, which the reference leaves as they are, are rounded to e4m3 (by at most 2⁻⁴ of each) or to 16 bit (by
at most 2⁻⁸ of each in bf16, and the output once more). FP8 sums are off by at most 2⁻¹⁰ of Σ|q·k|; between the outliers
among these inputs that is scaling · 9 · 128 · 2/π, a logit of 65, so that their probabilities are off by 2⁻⁴."""
PEER_ERROR_LIMIT = 0.25
"""Against exact attention. An attention with another mask or scale is off by about 1."""


def cases(
    masks: Sequence[str],
    lengths: Sequence[int],
    head_dims: Sequence[int],
    heads: Sequence[tuple[int, int]],
    batch: int,
) -> list[Case]:
    """Every combination, short ones first. Padding needs two rows at least."""
    return [
        Case(mask, length, head_dim, *counts, max(batch, 2) if mask == "padding" else batch)
        for length, mask, counts, head_dim in itertools.product(lengths, masks, heads, head_dims)
    ]


def check_kernels(found: Sequence[Case], modes: Sequence[Mode], device: torch.device) -> None:
    """Raises ValueError if a mode has no kernel on the device."""
    for mode, head_dim in itertools.product(modes, dict.fromkeys(case.head_dim for case in found)):
        probe = torch.empty((1, 1, 1, head_dim), dtype=torch.bfloat16, device=device)
        backend, why = attention_backend(probe, probe, Call(mode, True, None, 1.0, None))
        if backend in ("exact", "reference"):
            raise ValueError(f"mode {mode} has no kernel on this device: {why}; leave it out of --modes")


@torch.no_grad()
def attention_speed(
    machine: Machine,
    found: Sequence[Case],
    modes: Sequence[Mode],
    peers: Sequence[str],
    *,
    note: str = "",
    progress: Progress = quiet,
    keep: Callable[[dict[str, Any]], None] = lambda result: None,
) -> dict[str, Any]:
    """Rows of every case × mode, each beside every peer; JSON-able.

    note: kept and shown in the table. keep: given the result after every case, so that little is lost where a run ends
    early.
    """
    rows: list[dict[str, Any]] = []
    checks: dict[tuple[Case, Mode], dict[str, Any]] = {}
    result: dict[str, Any] = {}
    steps = len(peers) + len(modes)
    for index, case in enumerate(found):
        problem = Problem.draw(case, machine.device)
        expected = exact_blocks(problem)
        beside = {}
        for step, peer in enumerate(peers):
            progress("timing attention", index * steps + step, len(found) * steps, f"{case.name} {peer}")
            beside[peer] = time_peer(peer, problem, expected, machine)
        for step, mode in enumerate(modes, len(peers)):
            progress("timing attention", index * steps + step, len(found) * steps, f"{case.name} {mode}")
            small = replace(case, length=CHECK_LENGTH), mode
            if small not in checks:
                checks[small] = checked(*small, machine)
            rows.append(time_mode(mode, problem, checks[small], beside, machine))
        del problem, expected
        if machine.device.type == "cuda":
            torch.cuda.empty_cache()
        result = with_shares({**heading(machine, peers, note), "rows": list(rows)})
        keep(result)
    progress("timing attention", len(found) * steps, len(found) * steps, "done")
    return result


def exact_blocks(problem: Problem) -> list[tuple[slice, Tensor, Tensor]]:
    """Runs of queries; exact attention there, (batch, heads, rows, head_dim) FP32; (batch, 1, rows, 1) whether a query
    sees anything.
    """
    found = []
    for rows in blocks(problem.layout.queries):
        seen = problem.layout.visible(rows, problem.query.device).any(dim=-1)[:, None, :, None]
        query = problem.query[:, :, rows]
        found.append((rows, attend_rows(query, problem.key, problem.value, problem.layout, rows), seen))
    return found


def worst(pairs: Iterable[tuple[Tensor, Tensor]]) -> float:
    """`worst_error` over several pieces, found and expected; NaN, which `max` may drop, if one is."""
    return float(torch.tensor([worst_error(*pair) for pair in pairs], dtype=torch.float64).max())


def run_once(contender: Contender, problem: Problem) -> Tensor:
    """What a contender gives, (batch, heads, queries, head_dim)."""
    # The allocator mostly hands this memory out again: what a kernel leaves unwritten is then NaN.
    torch.full_like(problem.query, math.nan)
    return contender.calls()[0]()


def time_peer(
    name: str, problem: Problem, expected: list[tuple[slice, Tensor, Tensor]], machine: Machine
) -> dict[str, Any]:
    """`microseconds`, `error` against exact attention and whether KV heads were repeated for it, or `absent` with the
    reason.
    """
    try:
        contender = PEERS[name](problem, machine)
        out = run_once(contender, problem)
        # A query that sees no key has no attention; what a peer writes there is its own affair.
        error = worst((torch.where(seen, out[:, :, rows], 0), exact) for rows, exact, seen in expected)
        if not error <= PEER_ERROR_LIMIT:
            raise Absent(f"its result is wrong: error {error:.2g}")
        seconds = machine.timer(contender.calls())
        found = {"microseconds": round(1e6 * seconds, 3), "error": round(error, 6)}
        return {**found, "repeated_kv": contender.repeats}
    except Exception as error:  # whatever another library raises, it is absent and the row says why
        return {"absent": reason(error)}


def checked(case: Case, mode: Mode, machine: Machine) -> dict[str, Any]:
    """A mode on a few tokens, everywhere; see the module. `reason` where there is no result.

    The reference and exact attention are given FP32 copies of the same values, so that their output is not rounded.
    """
    try:
        problem = Problem.draw(case, machine.device)
        layout = problem.layout
        out = run_once(kompakt_mode(mode, problem, machine), problem).double()
        call = Call(mode, layout.causal, layout.window, case.head_dim**-0.5, None)
        query, key, value = (tensor.float() for tensor in (problem.query, problem.key, problem.value))
        reference, _ = attention_ref(query, key, value, call, None, layout.segments, dtype=torch.float64)
        reference = reference.transpose(1, 2).double()
        exact = attend_rows(query, key, value, layout, slice(0, layout.queries), torch.float64)
        error = worst_error(out, reference)
        found = {
            "error": error,
            "cosine": float((out * exact).sum() / (out.norm() * exact.norm())),
            "relative_error": relative_error(out, exact),
        }
    except Exception as error:  # one failing kernel must not cost the other rows; the command fails in the end
        return {"correct": False, "reason": reason(error)}
    return {"correct": error <= LIMITS[mode], **{key: finite(value) for key, value in found.items()}}


def finite(value: float) -> float | None:
    """None for what JSON does not have."""
    return value if math.isfinite(value) else None


def time_mode(
    mode: Mode,
    problem: Problem,
    check: dict[str, Any],
    beside: dict[str, dict[str, Any]],
    machine: Machine,
) -> dict[str, Any]:
    """One row. check: of `checked`. beside: what `time_peer` found, by peer."""
    case, layout = problem.case, problem.layout
    row: dict[str, Any] = {**asdict(case), "queries": layout.queries, "window": layout.window, "mode": mode, **check}
    row["pairs"] = layout.pairs()
    row["flops"] = 4 * case.heads * case.head_dim * row["pairs"]
    call = Call(mode, layout.causal, layout.window, case.head_dim**-0.5, None)
    row["backend"] = attention_backend(problem.query, problem.value, call)[0]
    if not row["correct"]:
        return {**row, "peers": beside}
    try:
        contender = kompakt_mode(mode, problem, machine)
        out = run_once(contender, problem)
        compared = blocks(layout.queries)
        expected = reference_rows(problem.query, problem.key, problem.value, layout, mode, compared)
        error = worst((out[:, :, rows], part) for rows, part in zip(compared, expected))
        row["length_error"] = finite(error)
        if not error <= LIMITS[mode]:
            return {**row, "correct": False, "peers": beside}
        seconds = machine.timer(contender.calls())
        row["quantization"] = quantization(mode, problem, row["backend"], machine)
    except Exception as error:  # as above
        return {**row, "correct": False, "reason": reason(error), "peers": beside}
    return {**row, **speeds(row, seconds, beside)}


def quantization(mode: Mode, problem: Problem, backend: str, machine: Machine) -> dict[str, Any]:
    """`microseconds` of quantizing keys and values, which the time of the row contains, or `absent` with the reason."""
    kind, fp8_values = KEY_KINDS[mode], mode in FP8_VALUES
    if kind is None:
        return {"absent": f"{mode} quantizes nothing"}
    if backend not in ("gluon", "triton"):
        return {"absent": f"the {backend} has no kernel for it"}
    from ..kernels.attention_quant_triton import quantize_keys_values

    segments = problem.layout.segments
    bounds = None if segments is None else segments.key_bounds(problem.layout.batch)

    def run(key: Tensor, value: Tensor) -> Any:
        return quantize_keys_values(key, value, kind, fp8_values, bounds)

    calls = Contender(machine.rotated((problem.key, problem.value)), run).calls()
    return {"microseconds": round(1e6 * machine.timer(calls), 3)}


def speeds(row: dict[str, Any], seconds: float, beside: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """What follows from a time: the rate, and how many times faster than each peer."""
    return {
        "microseconds": round(1e6 * seconds, 3),
        "tflops": round(row["flops"] / seconds / 1e12, 2),
        "peers": {
            name: peer if "absent" in peer else {**peer, "ratio": round(peer["microseconds"] / (1e6 * seconds), 4)}
            for name, peer in beside.items()
        },
    }


def floor_seconds(row: dict[str, Any], ceilings: Ceilings) -> float:
    """The time that both products take at the ceilings."""
    fast = ceilings.fp8_tflops or ceilings.bf16_tflops
    rates = [fast if low else ceilings.bf16_tflops for low in (KEY_KINDS[row["mode"]], row["mode"] in FP8_VALUES)]
    return sum(row["flops"] / 2 / (1e12 * rate) for rate in rates)


def with_shares(result: dict[str, Any]) -> dict[str, Any]:
    """`result` with the share of the ceiling in every row that has a time."""
    ceilings = Ceilings(**result["ceilings"])

    def share(row: dict[str, Any]) -> dict[str, Any]:
        if not row["correct"]:
            return row
        return {**row, "share": round(1e6 * floor_seconds(row, ceilings) / row["microseconds"], 4)}

    return {**result, "rows": [share(row) for row in result["rows"]]}


def heading(machine: Machine, peers: Sequence[str], note: str) -> dict[str, Any]:
    """Versions, date, device and its ceilings, JSON-able."""
    versions = {
        "cudnn": str(torch.backends.cudnn.version()),
        "fa2": torch.__version__,
        "transformers": installed("transformers"),
        "sageattention": installed("sageattention"),
    }
    return {
        **linear_heading(machine, (), note),
        "bench": "attention",
        "version": VERSION,
        "against": {peer: versions[peer] for peer in peers},
    }
