"""INT4 linear layers against named peers on one CUDA device: right first, then time.

Every row is one shape, one number of tokens and one of kompakt's layers. Its result is compared with the reference in
FP32 before it is timed; where they disagree the row is marked and has no time. Times include the quantization of
activations. The floor of a row is the longer of moving its bytes (packed weights, scales, x and y, once each) and
doing its multiplications, both at the ceilings measured in the same process; its share of the ceiling is floor / time.
Four bits save bytes, never multiplications, so that the ceiling of many tokens is that of FP8.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import math
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from .device_speed import Ceilings, Machine, byte_count
from .linear_contenders import PEERS, Absent, Contender, Variant, relative_error
from .pipeline import Progress, environment, package_version, quiet

VERSION = 1
METHODS = ("w4a8", "w4a16")
ERROR_LIMIT = 4e-3
"""Rounding y to bf16 makes 1.7e-3."""
PEER_ERROR_LIMIT = 0.25
"""Against the product in float; INT4 in groups of 128, rounded to nearest, makes 0.10."""
CHECKED_TOKENS, CHECKED_OUTPUTS = 1024, 2048


@dataclass(frozen=True)
class Shape:
    """One weight. model: a key of `SHAPES`, or "other"; layer: which projections have it."""

    model: str
    layer: str
    out_features: int
    in_features: int


def _shapes(model: str, **layers: tuple[int, int]) -> tuple[Shape, ...]:
    return tuple(Shape(model, layer.replace("_", ", "), *size) for layer, size in layers.items())


SHAPES = {
    "llama-8b": _shapes("llama-8b", gate_up=(14336, 4096), down=(4096, 14336), q_o=(4096, 4096), qkv=(6144, 4096)),
    "llama-70b": _shapes("llama-70b", gate_up=(28672, 8192), down=(8192, 28672), q_o=(8192, 8192)),
    "qwen-0.6b": _shapes("qwen-0.6b", gate_up=(3072, 1024), down=(1024, 3072), q=(2048, 1024), o=(1024, 2048)),
}


def parse_pair(item: str) -> tuple[int, int] | None:
    """Two whole numbers from 1 with an x or × between them; None for anything else."""
    pair = re.fullmatch(r"\s*([1-9]\d*)[x×]([1-9]\d*)\s*", item)
    return None if pair is None else (int(pair[1]), int(pair[2]))


def parse_shapes(text: str) -> list[Shape]:
    """Model names and OUTxIN, comma-separated; each size once. Raises ValueError for anything else."""
    found: dict[tuple[int, int], Shape] = {}
    for item in text.split(","):
        size = parse_pair(item)
        if size is None and item.strip() not in SHAPES:
            raise ValueError(f"unknown shape {item!r}; use {', '.join(SHAPES)} or OUTxIN such as 14336x4096")
        shapes = SHAPES[item.strip()] if size is None else [Shape("other", "", *size)]
        for shape in shapes:
            found.setdefault((shape.out_features, shape.in_features), shape)
    return list(found.values())


def parse_tokens(text: str) -> list[int]:
    """Positive numbers, comma-separated, ascending and each once. Raises ValueError for anything else."""
    bad = [item for item in text.split(",") if not re.fullmatch(r"\s*[1-9]\d*\s*", item)]
    if bad:
        raise ValueError(f"number of tokens {bad[0]!r} is no positive whole number; use e.g. 1,16,64,4096")
    return sorted({int(item) for item in text.split(",")})


def parse_names(text: str, known: Sequence[str], what: str) -> list[str]:
    """Some of `known`, comma-separated, each once. Raises ValueError for another name."""
    names = list(dict.fromkeys(item.strip() for item in text.split(",") if item.strip()))
    for name in names:
        if name not in known:
            raise ValueError(f"unknown {what} {name!r}; known: {', '.join(known)}")
    return names


def parse_variants(methods: str, group_sizes: str, exact: bool, shapes: Sequence[Shape]) -> list[Variant]:
    """Every method × group size, and with `exact` the w4a8 layers that never fold their scales as well.

    Raises ValueError for an unknown method, and for a group size that does not divide the inputs of every shape.
    """
    variants = []
    for method in parse_names(methods, METHODS, "method"):
        for item in dict.fromkeys(item.strip() for item in group_sizes.split(",")):
            if item != "channel" and not re.fullmatch(r"[1-9]\d*", item):
                raise ValueError(f"group size {item!r} is neither a positive whole number nor channel")
            size = item if item == "channel" else int(item)
            for shape in shapes:
                if isinstance(size, int) and shape.in_features % size:
                    raise ValueError(f"group size {size} does not divide the {shape.in_features} inputs of a shape")
            variants.append(Variant(method, size))
            if exact and method == "w4a8" and size != "channel":
                variants.append(Variant(method, size, exact=True))
    if not variants:
        raise ValueError(f"no method was named; known: {', '.join(METHODS)}")
    return variants


@torch.no_grad()
def linear_speed(
    machine: Machine,
    shapes: Sequence[Shape],
    tokens: Sequence[int],
    variants: Sequence[Variant],
    peers: Sequence[str],
    *,
    note: str = "",
    progress: Progress = quiet,
) -> dict[str, Any]:
    """Rows of every shape × tokens × variant, each beside every peer; JSON-able. note: kept and shown in the table."""
    rows, steps = [], len(peers) + len(variants)
    for index, shape in enumerate(shapes):
        problem = Problem.draw(shape, tokens, machine)
        beside: dict[str, dict[int, dict[str, Any]]] = {}
        name = f"{shape.out_features}×{shape.in_features}"
        for step, peer in enumerate(peers):
            progress("linear", index * steps + step, len(shapes) * steps, f"{name} {peer}")
            beside[peer] = time_peer(peer, problem, machine)
        for step, variant in enumerate(variants, len(peers)):
            progress("linear", index * steps + step, len(shapes) * steps, f"{name} {variant.label}")
            rows += time_variant(variant, problem, beside, machine)
        del problem
        if machine.device.type == "cuda":
            torch.cuda.empty_cache()
    progress("linear", len(shapes) * steps, len(shapes) * steps, "done")
    return with_shares({**heading(machine, peers, note), "rows": rows})


@dataclass(frozen=True)
class Problem:
    """Random data of one shape. weight: (out_features, in_features) bf16. x: (most tokens, in_features) bf16 with
    outlier channels. tokens → places: rows and columns of y that are checked, and there the product in float.
    """

    shape: Shape
    weight: Tensor
    x: Tensor
    places: dict[int, tuple[Tensor, Tensor, Tensor]]

    @classmethod
    def draw(cls, shape: Shape, tokens: Sequence[int], machine: Machine) -> Problem:
        """The same data every time."""
        device = machine.device
        generator = torch.Generator(device).manual_seed(0)
        size = (shape.out_features, shape.in_features)
        weight = torch.randn(size, generator=generator, device=device).mul_(shape.in_features**-0.5).bfloat16()
        x = torch.randn((max(tokens), shape.in_features), generator=generator, device=device).bfloat16()
        x[:, 5::61] *= 10
        places = {}
        for count in tokens:
            rows = sample(count, CHECKED_TOKENS, generator)
            columns = sample(shape.out_features, CHECKED_OUTPUTS, generator)
            places[count] = rows, columns, x[rows].float() @ weight[columns].float().t()
        return cls(shape, weight, x, places)

    def result(self, contender: Contender, tokens: int) -> Tensor:
        """What a contender gives at the places that are checked, FP32."""
        x = self.x[:tokens]
        # The allocator mostly hands this memory out again: what a kernel leaves unwritten is then NaN.
        torch.full((tokens, self.shape.out_features), math.nan, dtype=x.dtype, device=x.device)
        rows, columns, _ = self.places[tokens]
        return contender.calls(x)[0]()[rows][:, columns].float()


def sample(count: int, limit: int, generator: torch.Generator) -> Tensor:
    """At most `limit` of the indices below `count`, ascending, with both ends."""
    if count <= limit:
        return torch.arange(count, device=generator.device)
    inner = torch.randperm(count - 2, generator=generator, device=generator.device)[: limit - 2] + 1
    ends = torch.tensor([0, count - 1], device=generator.device)
    return torch.cat((inner, ends)).sort().values


def time_peer(name: str, problem: Problem, machine: Machine) -> dict[int, dict[str, Any]]:
    """tokens → `microseconds` and `error` against the product in float, or `absent` with the reason."""
    try:
        contender = PEERS[name](problem.weight, machine)
    except Exception as error:  # whatever another library raises, it is absent and the row says why
        return {tokens: {"absent": reason(error)} for tokens in problem.places}
    found: dict[int, dict[str, Any]] = {}
    for tokens, (_, _, product) in problem.places.items():
        if contender.max_tokens is not None and tokens > contender.max_tokens:
            found[tokens] = {"absent": f"more than {contender.max_tokens} tokens"}
            continue
        try:
            error = relative_error(problem.result(contender, tokens), product)
            if not error <= PEER_ERROR_LIMIT:
                raise Absent(f"its result is wrong: error {error:.2g}")
            seconds = machine.timer(contender.calls(problem.x[:tokens]))
            found[tokens] = {"microseconds": round(1e6 * seconds, 3), "error": round(error, 6)}
        except Exception as error:  # as above
            found[tokens] = {"absent": reason(error)}
    return found


def reason(error: Exception) -> str:
    """An error in a few words."""
    text = (str(error).strip().splitlines() or [""])[0].split(". ")[0][:160]
    return text if isinstance(error, Absent) else f"{type(error).__name__}: {text}"


def time_variant(
    variant: Variant, problem: Problem, beside: dict[str, dict[int, dict[str, Any]]], machine: Machine
) -> list[dict[str, Any]]:
    """One row per number of tokens. beside: what `time_peer` found, by peer."""
    contender = variant.build(problem.weight, machine)
    packed, scale = contender.weights[0]
    rows = []
    for tokens, (sampled, columns, _) in problem.places.items():
        x = problem.x[:tokens]
        out_features = problem.shape.out_features
        row: dict[str, Any] = {**asdict(problem.shape), "tokens": tokens, **asdict(variant), "label": variant.label}
        row["weight_bytes"] = byte_count((packed, scale))
        row["bytes"] = row["weight_bytes"] + x.nbytes + tokens * out_features * x.element_size()
        row["flops"] = 2 * tokens * problem.weight.numel()
        try:
            folded = variant.folds(x, packed, scale)
            expected, fold_error = variant.expected(x[sampled], packed[columns], scale[columns], folded=folded)
            error = relative_error(problem.result(contender, tokens), expected)
            row |= {"error": error if math.isfinite(error) else None, "fold_error": fold_error}
            seconds = machine.timer(contender.calls(x)) if error <= ERROR_LIMIT else None
        except Exception as error:  # one failing kernel must not cost the other rows; the command fails in the end
            row |= {"error": None, "fold_error": None, "reason": reason(error)}
            seconds = None
        rows.append(row | speeds(row, seconds, {name: found[tokens] for name, found in beside.items()}))
    return rows


def speeds(row: dict[str, Any], seconds: float | None, peers: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """What follows from a time, None for a wrong result: rates, and how many times faster than each peer."""
    if seconds is None:
        return {"correct": False, "peers": peers}
    ratios = {
        name: peer if "absent" in peer else {**peer, "ratio": round(peer["microseconds"] / (1e6 * seconds), 4)}
        for name, peer in peers.items()
    }
    return {
        "correct": True,
        "microseconds": round(1e6 * seconds, 3),
        "weight_gb_per_second": round(row["weight_bytes"] / seconds / 1e9, 1),
        "tflops": round(row["flops"] / seconds / 1e12, 2),
        "peers": ratios,
    }


def floor_seconds(row: dict[str, Any], ceilings: Ceilings) -> float:
    """The least time that a row's bytes and multiplications take."""
    return max(row["bytes"] / ceilings.bytes_per_second, row["flops"] / ceilings.peak(row["method"]))


def with_shares(result: dict[str, Any]) -> dict[str, Any]:
    """`result` with the share of the ceiling in every row that has a time, and of the bandwidth in those of the section
    `quantization`.
    """
    ceilings = Ceilings(**result["ceilings"])

    def share(row: dict[str, Any], floor: float) -> dict[str, Any]:
        return {**row, "share": round(1e6 * floor / row["microseconds"], 4)} if row["correct"] else row

    found = {**result, "rows": [share(row, floor_seconds(row, ceilings)) for row in result["rows"]]}
    if "quantization" in result:
        moved = [share(row, row["bytes"] / ceilings.bytes_per_second) for row in result["quantization"]]
        found["quantization"] = moved
    return found


def heading(machine: Machine, peers: Sequence[str], note: str) -> dict[str, Any]:
    """Versions, date, device and its ceilings, JSON-able."""
    versions = {"cuda": torch.version.cuda, "triton": installed("triton")}
    return {
        "bench": "linear",
        "version": VERSION,
        "kompakt": package_version(),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "environment": {**environment(machine.device), **versions},
        "note": note,
        "cache_bytes": machine.cache_bytes,
        "ceilings": {
            name: None if value is None else round(value, 1) for name, value in asdict(machine.ceilings).items()
        },
        "against": {peer: installed(peer) if peer == "gemlite" else torch.__version__ for peer in peers},
    }


def installed(package: str) -> str | None:
    """Version of a package, None if it is not there."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
