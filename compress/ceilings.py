"""How fast a model could be at most on a device, from the bytes it must read and the multiplications it must do.

    decoding   a step of a batch reads all weights once (an embedding table that is no head: a row per sequence, left
               out) and the cache of every sequence: time ≥ max(bytes / bandwidth, FLOPs / rate)
    prefill    2 FLOPs per weight and token, and 2·2·heads·head_dim per pair of tokens that causal attention looks at;
               the head counts for one token

What may be left out counts as left out: of a mixture of experts those that one token goes to are read, once for all
tokens; sliding windows end attention, layers of another kind and sparse prefill have none that is counted, and neither
has decoding from a cache that evicts.

Linears with FP8 inputs and quantized attention multiply at the FP8 rate, all else at the bf16 rate. Nothing else takes
time here: no launches, norms, sampling. A ceiling, not a forecast; `kompakt bench generate` measures.

Devices: NVIDIA's data sheets, rates of dense matrices, which are half of those with sparsity where only these are
given (H100 and H200: "H100/H200 Tensor Core GPU", SXM; A100: "A100 80GB", SXM; L40S: "L40S GPU"). Or a file of
`kompakt bench linear`, whose ceilings were measured.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

from torch import nn

from .coverage import experts_of
from .hf_cache import layer_kinds
from .kv_evict import KVEvict
from .recipe import Recipe, nearest, shown
from .sweep import read_result


@dataclass(frozen=True)
class DeviceCeilings:
    """bandwidth: bytes per second. bf16, fp8: FLOP per second of dense matrices; fp8 None where there is no FP8."""

    name: str
    bandwidth: float
    bf16: float
    fp8: float | None
    source: str


PER_TOKEN = ("num_experts_per_tok", "num_experts_per_token", "experts_per_token", "moe_topk", "moe_k", "top_k_experts")
"""What configs call the number of experts that a token goes to."""
SHEET = "data sheet"
DEVICES = {
    "h200": DeviceCeilings("h200", 4.8e12, 989e12, 1979e12, SHEET),
    "h100": DeviceCeilings("h100", 3.35e12, 989e12, 1979e12, SHEET),
    "a100": DeviceCeilings("a100", 2.039e12, 312e12, None, SHEET),
    "l40s": DeviceCeilings("l40s", 0.864e12, 362e12, 733e12, SHEET),
}


def device_ceilings(device: str) -> DeviceCeilings:
    """A name of `DEVICES`, or a file of `bench linear`. ValueError for anything else."""
    if device.lower() in DEVICES:
        return DEVICES[device.lower()]
    if not device.endswith(".json"):
        raise ValueError(
            f"unknown device {shown(device)}{nearest(device, list(DEVICES))}; a file of `bench linear` may be named too"
        )
    content = read_result(Path(device))
    found, name = content.get("ceilings"), str((content.get("environment") or {}).get("device", "the device"))
    keys = ("read_gb_per_second", "bf16_tflops", "fp8_tflops")
    if not isinstance(found, dict) or not all(isinstance(found.get(key), (int, float)) for key in keys):
        raise ValueError(f"{device} holds no ceilings ({', '.join(keys)}); `bench linear` writes them")
    bandwidth, bf16, fp8 = (float(found[key]) for key in keys)
    return DeviceCeilings(name, 1e9 * bandwidth, 1e12 * bf16, 1e12 * fp8, f"measured, {Path(device).name}")


@dataclass(frozen=True)
class Work:
    """What a model does for a token, before or after compression. weight_bytes: read in every step. flops: of Linears
    and experts with the head, by rate: 2 per weight. head_flops: of the head alone. windows: of each layer whose
    attention counts, None without one. attention_flops: per pair of tokens, in a layer. sparse: prefill may leave any
    pair out. evicts: decoding may leave any token out. cache: tokens → bytes of one sequence.
    """

    weight_bytes: int
    flops: Mapping[str, int]
    head_flops: int
    windows: tuple[int | None, ...]
    attention_flops: int
    attention_rate: str
    cache: Mapping[int, int]
    sparse: bool = False
    evicts: bool = False

    def decode_seconds(self, device: DeviceCeilings, batch: int, context: int) -> float:
        """At least this long is a step in which each of `batch` sequences of `context` tokens gets one more."""
        moved = self.weight_bytes + batch * self.cache[context]
        busy = sum(batch * flops / rate_of(device, rate) for rate, flops in self.flops.items())
        busy += batch * self.decode_pairs(context) * self.attention_flops / device.bf16
        return max(moved / device.bandwidth, busy)

    def prefill_seconds(self, device: DeviceCeilings, batch: int, context: int) -> float:
        """At least this long do prompts of `context` tokens take, `batch` of them."""
        flops = {rate: batch * context * count for rate, count in self.flops.items()}
        flops["bf16"] = flops.get("bf16", 0) - batch * (context - 1) * self.head_flops
        busy = sum(count / rate_of(device, rate) for rate, count in flops.items())
        pairs = batch * self.prefill_pairs(context)
        return max(
            self.weight_bytes / device.bandwidth,
            busy + pairs * self.attention_flops / rate_of(device, self.attention_rate),
        )

    def decode_pairs(self, context: int) -> int:
        """Tokens that attention of all layers looks at in one step of one sequence, at least."""
        return 0 if self.evicts else sum(min(context, window or context) for window in self.windows)

    def prefill_pairs(self, context: int) -> int:
        """Pairs of tokens that attention of all layers looks at in one prompt, at least."""
        return 0 if self.sparse else sum(causal_pairs(context, window) for window in self.windows)


def attention_windows(config: Any) -> list[int | None]:
    """Of each layer of full or sliding-window attention of a text model; None without one."""
    known = {"full_attention": None, "sliding_attention": getattr(config, "sliding_window", None)}
    return [known[kind] for kind in layer_kinds(config) if kind in known]


def causal_pairs(tokens: int, window: int | None) -> int:
    """Pairs of a token and one that it sees, itself or before it, at most `window` of them."""
    width = min(tokens, window or tokens)
    return width * (width + 1) // 2 + (tokens - width) * width


def rate_of(device: DeviceCeilings, rate: str) -> float:
    """FLOP per second; devices without FP8 multiply in bf16 instead."""
    return device.fp8 if rate == "fp8" and device.fp8 is not None else device.bf16


def works(
    model: Any,
    recipe: Recipe,
    quantized: Mapping[str, int],
    sizes: tuple[int, int],
    caches: tuple[Mapping[int, int], ...],
) -> dict[str, Work]:
    """The work of the base model and of the compressed one. model: without storage. quantized: bytes of its packed
    weights, by Linear. sizes, caches: of both.
    """
    config = model.config.get_text_config()
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    attention = 4 * config.num_attention_heads * head_dim
    windows = tuple(attention_windows(config))
    head, table = model.get_output_embeddings(), model.get_input_embeddings().weight
    table_bytes = 0 if head is not None and head.weight is table else table.nbytes
    shares, linears = expert_shares(model), {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            linears[name] = 2 * share_of(name, shares) * module.weight.numel()
    fused = [(share, parameter) for name, share in shares.items() for parameter in _fused(model.get_submodule(name))]
    total = int(sum(linears.values()) + sum(2 * share * parameter.numel() for share, parameter in fused))
    fp8_inputs = recipe.weights is not None and recipe.weights.activations == "fp8"
    packed = int(sum(linears[name] for name in quantized)) if fp8_inputs else 0
    idle = idle_bytes(model, shares, {})
    head_flops = 0 if head is None else 2 * head.weight.numel()
    rate = "fp8" if recipe.attention is not None and recipe.attention.modes else "bf16"
    base = Work(sizes[0] - idle - table_bytes, {"bf16": total}, head_flops, windows, attention, "bf16", caches[0])
    compressed = replace(
        base,
        weight_bytes=sizes[1] - idle_bytes(model, shares, quantized) - table_bytes,
        flops={"bf16": total - packed, "fp8": packed},
        attention_rate=rate,
        cache=caches[1],
        sparse=recipe.sparsity is not None,
        evicts=isinstance(recipe.kv_cache, KVEvict),
    )
    return {"base": base, "compressed": compressed}


def expert_shares(model: Any) -> dict[str, Fraction]:
    """How many of its experts a token goes to, of all, for each mixture."""
    return {name: expert_share(model, model.get_submodule(name)) for name in experts_of(model)}


def expert_share(model: Any, mixture: nn.Module) -> Fraction:
    """How many of the experts of one mixture a token goes to, of all."""
    # A config that does not say how many sends a token to one at least.
    config = model.config.get_text_config()
    chosen = next((count for key in PER_TOKEN if (count := getattr(config, key, None))), 1)
    count = max(map(len, _fused(mixture)), default=len(list(mixture.children())))
    return Fraction(min(chosen, count), max(count, 1))


def _fused(mixture: nn.Module) -> list[nn.Parameter]:
    """Weights of all experts in one tensor."""
    return [parameter for parameter in mixture.parameters() if parameter.ndim == 3]


def share_of(name: str, shares: Mapping[str, Fraction]) -> Fraction:
    """How much of a module one token needs. shares: of the mixtures."""
    return next((share for outer, share in shares.items() if name.startswith(f"{outer}.")), Fraction(1))


def idle_bytes(model: Any, shares: Mapping[str, Fraction], packed: Mapping[str, int]) -> int:
    """Bytes of experts that one token does not go to. packed: bytes of weights that are, by Linear."""
    idle = Fraction(0)
    for name, share in shares.items():
        held = sum(parameter.nbytes for parameter in model.get_submodule(name).parameters())
        for linear in (linear for linear in packed if linear.startswith(f"{name}.")):
            held += packed[linear] - model.get_parameter(f"{linear}.weight").nbytes
        idle += (1 - share) * held
    return int(idle)


def speed_ceilings(
    found: Mapping[str, Work], device: DeviceCeilings, batches: Sequence[int], contexts: Sequence[int]
) -> dict[str, Any]:
    """Milliseconds at least, of the base model and the compressed one, JSON-able."""
    rows = []
    for batch in batches:
        for context in contexts:
            row: dict[str, Any] = {"batch": batch, "context": context}
            for kind, work in found.items():
                row[f"{kind}_decode_ms"] = 1e3 * work.decode_seconds(device, batch, context)
                row[f"{kind}_prefill_ms"] = 1e3 * work.prefill_seconds(device, batch, context)
            rows.append(row)
    return {"device": asdict(device), "rows": rows}


def engines(recipe: Recipe, fused_experts: bool = False) -> list[dict[str, str]]:
    """What runs the directory, and how much of the recipe there. fused_experts: others want experts in one tensor, and
    these are quantized one by one.
    """
    rows = [{"engine": "kompakt.compress.load, in transformers", "runs": "all of the recipe"}]
    others = [slot for slot in ("attention", "kv_cache", "sparsity") if getattr(recipe, slot) is not None]
    without = f"; {', '.join(others)} as in the base model" if others else ""
    if recipe.weights is None:
        return [*rows, {"engine": "transformers, vLLM", "runs": f"the base model{without}"}]
    if fused_experts:
        return [*rows, {"engine": "transformers, vLLM", "runs": "not: they want the experts of this model fused"}]
    schemes = [recipe.weights.scheme(), *(item.scheme(recipe.weights.activations) for item in recipe.weights.overrides)]
    rows.append(
        {"engine": "transformers with compressed-tensors", "runs": f"weights, expanded to floats on first use{without}"}
    )
    int4 = {scheme.group_size for scheme in schemes if scheme.weights == "int4"}
    if not int4 or int4 <= ({None, 32, 64, 128} if recipe.weights.activations == "none" else {128}):
        runs = f"weights{without}"
    elif recipe.weights.activations == "none":
        runs = "not: its kernels for INT4 weights take groups of 32, 64 or 128, or one per channel"
    else:
        runs = "not: its kernel for INT4 weights and FP8 activations takes groups of 128"
    return [*rows, {"engine": "vLLM, by its sources, not tried", "runs": runs}]
