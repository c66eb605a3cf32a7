"""`plan`: what a recipe does to a model and what that takes, from `config.json` alone. No weights are read.

The model is built without storage, so sizes of weights come from its real modules; they are exact for a checkpoint
stored in the config's dtype. Memory is an estimate (`planning_memory.py`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..kernels.attention import MAX_HEAD_DIM
from ..kernels.int4_linear import Backend, available_backends
from ..quant.method import KVCacheMethod, WeightScheme
from .cache import TokenStore
from .ceilings import device_ceilings, engines, speed_ceilings, works
from .coverage import Coverage
from .evicting import EvictingStore
from .experts import separate_experts_of
from .hf import meta_model, read_config, resolve_model
from .hf_attention import attention_modules, full_attention, layer_kind
from .hf_cache import CompressedCache, layer_kinds
from .hf_cache_hooks import cacheable_modules
from .hf_decoder import decoder_layers
from .hf_experts import stored_fused
from .kv_evict import KVEvict
from .linear import CompressedLinear
from .pipeline import covered, recipe_ops
from .planning_memory import MemoryModel, Stage
from .recipe import Recipe
from .runtime import AttentionBackend, attention_backends, cache_backends, sparse_backends

CONTEXTS = (1024, 8192, 32768)


@dataclass(frozen=True)
class Plan:
    """What `plan` found.

    recipe: with `group_size` resolved. kv_cache: tokens → bytes of one sequence, as transformers keeps it.
    compressed_cache: as the recipe keeps it, None if it leaves it alone.
    scheme: how weights are stored, None if the recipe leaves them as they are. attention: what happens to each
    attention layer, empty if the recipe leaves it alone; sparsity likewise. kernels: what each op runs on and why;
    ops: those that the recipe's Linears call. engines: what else runs the result. ceilings: of speed, None if no device
    was named.
    """

    model: str
    recipe: Recipe
    scheme: str | None
    dtype: str
    device: str
    base_bytes: int
    compressed_bytes: int
    quantized_weights: int
    quantized_bytes: int
    coverage: list[Coverage]
    attention: list[AttentionCoverage]
    sparsity: list[AttentionCoverage]
    stages: list[Stage]
    kv_cache: dict[int, int]
    compressed_cache: CachePlan | None
    kernels: Mapping[str, Backend | AttentionBackend]
    ops: list[str]
    engines: list[dict[str, str]]
    ceilings: dict[str, Any] | None

    @property
    def bits_per_weight(self) -> float | None:
        """Stored bits per quantized weight, scales and shapes included; None if there are none."""
        return round(8 * self.quantized_bytes / self.quantized_weights, 4) if self.quantized_weights else None

    @property
    def modes(self) -> list[str]:
        """Ops that the recipe's attention may call."""
        return [op for op in self.kernels if op.startswith("prefill_attention")]

    @property
    def peak_device_bytes(self) -> int:
        """Largest device memory of any stage; 0 where the CPU is the device."""
        return max(sum(stage.device.values()) for stage in self.stages)

    @property
    def peak_host_bytes(self) -> int:
        """Largest host memory of any stage."""
        return max(sum(stage.host.values()) for stage in self.stages)

    def as_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return {
            "model": self.model,
            "recipe": self.recipe.model_dump(mode="json", exclude_none=True),
            "scheme": self.scheme,
            "dtype": self.dtype,
            "device": self.device,
            "sizes": {
                "base_bytes": self.base_bytes,
                "compressed_bytes": self.compressed_bytes,
                "quantized_weights": self.quantized_weights,
                "quantized_bytes": self.quantized_bytes,
                "bits_per_weight": self.bits_per_weight,
            },
            "peak_device_bytes": self.peak_device_bytes,
            "peak_host_bytes": self.peak_host_bytes,
            "stages": [stage.as_dict() for stage in self.stages],
            "kv_cache_bytes": {str(tokens): count for tokens, count in self.kv_cache.items()},
            "kernels": {
                op: {
                    "backend": backend.name,
                    "reason": backend.reason,
                    "used": op in self.ops or op in self.modes or op in ("decode_attention", "sparse_attention"),
                }
                for op, backend in self.kernels.items()
            },
            "coverage": [line.as_dict() for line in self.coverage],
            **({"attention": [asdict(line) for line in self.attention]} if self.attention else {}),
            **({"sparsity": [asdict(line) for line in self.sparsity]} if self.sparsity else {}),
            **({} if self.compressed_cache is None else {"kv_cache": self.compressed_cache.as_dict()}),
            "engines": self.engines,
            **({} if self.ceilings is None else {"ceilings": self.ceilings}),
        }


def plan(
    model: str | Path,
    recipe: str | Path | dict | Recipe = "w4a8-fireq",
    *,
    overrides: dict[str, Any] | None = None,
    contexts: Sequence[int] = CONTEXTS,
    batches: Sequence[int] = (1,),
    runs_on: str | None = None,
    device: str | None = None,
    trust_remote_code: bool = False,
) -> Plan:
    """Sizes, coverage, memory and kernels of a `compress` run with the same arguments; refuses what that would refuse.

    model: directory or hub id; only its config.json is read. contexts: lengths in tokens for the size of the key-value
    cache, and, with batches, of sequences at once, for ceilings of speed on the device `runs_on` (`ceilings.py`).
    Raises ValueError for bad input.
    """
    for name, numbers in (("contexts", contexts), ("batches", batches)):
        if not numbers or min(numbers) < 1:
            raise ValueError(f"{name} are {list(numbers)}; they are numbers from 1, one at least")
    ceilings = None if runs_on is None else device_ceilings(runs_on)
    loaded = Recipe.load(recipe, overrides)
    path = resolve_model(model, weights=False)
    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    config = read_config(path, trust_remote_code=trust_remote_code)
    if getattr(config, "quantization_config", None) is not None:
        raise ValueError(f"{path} is already quantized; kompakt starts from a float checkpoint")
    skeleton = meta_model(config, trust_remote_code=trust_remote_code)
    layers = decoder_layers(skeleton)
    loaded, coverage = covered(skeleton, layers, loaded)
    method = loaded.weights
    names = {line.name for line in coverage if line.status == "quantized"}
    linears = {name: module for name, module in skeleton.named_modules() if isinstance(module, nn.Linear)}
    linears = {name: linear for name, linear in linears.items() if name in names}
    packed = {} if method is None else {n: packed_bytes(linear, method.scheme_of(n)) for n, linear in linears.items()}
    quantized = sum(packed.values())
    base = sum(own_bytes(skeleton))
    compressed = base - sum(linear.weight.nbytes for linear in linears.values()) + quantized
    ops = [] if method is None else recipe_ops(method)
    kernels: dict[str, Backend | AttentionBackend] = {**available_backends(place)}
    if loaded.attention is not None:
        kernels |= attention_backends(loaded.attention.modes, place)
    if loaded.sparsity is not None:
        kernels |= sparse_backends(place)
    if loaded.kv_cache is not None:
        kernels |= cache_backends(place, loaded.kv_cache)
    memory = MemoryModel(
        model=skeleton,
        recipe=loaded,
        base_bytes=base,
        compressed_bytes=compressed,
        device=place,
        reference=method is not None and (not ops or any(kernels[op].name == "reference" for op in ops)),
    )
    kept = {tokens: kv_cache_bytes(config, tokens, skeleton.dtype.itemsize) for tokens in contexts}
    cache = None if loaded.kv_cache is None else plan_cache(skeleton, loaded.kv_cache, contexts)
    work = works(skeleton, loaded, packed, (base, compressed), (kept, kept if cache is None else cache.bytes))
    return Plan(
        model=str(model),
        recipe=memory.recipe,
        scheme=None if method is None else method.describe(),
        dtype=str(skeleton.dtype).removeprefix("torch."),
        device=str(place),
        base_bytes=base,
        compressed_bytes=compressed,
        quantized_weights=sum(linear.weight.numel() for linear in linears.values()),
        quantized_bytes=quantized,
        coverage=coverage,
        attention=[] if loaded.attention is None else cover_attention(skeleton, [name for name, _ in layers], loaded),
        sparsity=[] if loaded.sparsity is None else cover_sparsity(skeleton, [name for name, _ in layers], loaded),
        stages=memory.stages([(layer, _inside(name, linears)) for name, layer in layers]),
        kv_cache=kept,
        compressed_cache=cache,
        kernels=kernels,
        ops=ops,
        engines=engines(loaded, any(stored_fused(skeleton, name) for name in separate_experts_of(skeleton))),
        ceilings=None if ceilings is None else speed_ceilings(work, ceilings, batches, contexts),
    )


@dataclass(frozen=True)
class AttentionCoverage:
    """One attention layer. status: "covered" or "dense"; reason: why, or what decides."""

    name: str
    kind: str
    status: str
    reason: str


def cover_attention(model: Any, layer_names: list[str], recipe: Recipe) -> list[AttentionCoverage]:
    """One line for every attention module, and for every decoder layer without one."""
    method, modules = recipe.attention, attention_modules(model)
    assert method is not None
    if method.needs_data:
        reason = f"the first of {', '.join(method.modes)} that calibration allows"
    else:
        reason = f"runs in {method.modes[0]}" if method.modes else "the recipe says bf16"
    lines = []
    for layer in layer_names:
        inside = {name: module for name, module in modules.items() if name.startswith(f"{layer}.")}
        if not inside:
            kind = type(model.get_submodule(layer)).__name__
            lines.append(AttentionCoverage(layer, kind, "dense", "no attention of transformers' interface in it"))
        for name, module in inside.items():
            head_dim = getattr(module, "head_dim", 0)
            status, why = ("covered", reason) if method.modes else ("dense", reason)
            if layer_kind(module) == "chunked_attention":
                status, why = "dense", "its mask is made of chunks"
            if head_dim > MAX_HEAD_DIM:
                status, why = "dense", f"head_dim {head_dim} exceeds the kernel's {MAX_HEAD_DIM}"
            lines.append(AttentionCoverage(name, type(module).__name__, status, why))
    return lines


def cover_sparsity(model: Any, layer_names: list[str], recipe: Recipe) -> list[AttentionCoverage]:
    """One line for every attention module, and for every decoder layer without one: whether prefill may be sparse.
    ValueError if it may nowhere.
    """
    method, modules = recipe.sparsity, attention_modules(model)
    assert method is not None
    chosen = "calibration chooses the patterns" if method.needs_data else "the recipe names the patterns"
    lines = []
    for layer in layer_names:
        inside = {name: module for name, module in modules.items() if name.startswith(f"{layer}.")}
        if not inside:
            kind = type(model.get_submodule(layer)).__name__
            lines.append(AttentionCoverage(layer, kind, "dense", "no attention of transformers' interface in it"))
        for name, module in inside.items():
            why = full_attention(module)
            status = "covered" if why is None else "dense"
            lines.append(AttentionCoverage(name, type(module).__name__, status, why or chosen))
    if not any(line.status == "covered" for line in lines):
        raise ValueError(f"no attention layer of {type(model).__name__} can be sparse: {lines[0].reason}")
    return lines


@dataclass(frozen=True)
class CachePlan:
    """A compressed cache. bytes: tokens → bytes of one sequence, as allocated. layers: compressed, and left dense.
    codebook_bytes: what codes need of all layers, once for all sequences.
    """

    bytes: dict[int, int]
    compressed_layers: int
    dense_layers: int
    codebook_bytes: int

    def as_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return {**asdict(self), "bytes": {str(tokens): count for tokens, count in self.bytes.items()}}


def plan_cache(model: Any, method: KVCacheMethod, contexts: Sequence[int]) -> CachePlan:
    """What `method` allocates for one sequence: a cache is filled with tokens that have no storage, as one prompt. Of
    eviction by a threshold nobody knows before the prompt is there: then nothing is counted as evicted.
    """
    modules, config = cacheable_modules(model), model.config.get_text_config()
    heads, head_dim = kv_shape(config)
    statics = method.blank_statics(heads, head_dim)
    numbers: set[Any] = {module.layer_idx for module in modules.values()}
    kinds = Counter(store.window for store in CompressedCache(config, KVCacheMethod()).compressed_layers)
    windows = [
        store.window
        for store in CompressedCache(config, method, statics=dict.fromkeys(numbers, statics)).compressed_layers
    ]
    others = sum(kinds.values()) - len(windows)
    sizes = {}
    for tokens in contexts:
        total = 0
        for window, count in Counter(windows).items():
            free = replace(method, max_tokens=None)
            if isinstance(free, KVEvict):
                store = EvictingStore(free, statics=statics)
            else:
                store = TokenStore(free, statics=statics, window=window)
            empty = torch.empty((1, heads, tokens, head_dim), dtype=model.dtype, device="meta")
            store.append(empty, empty)
            if isinstance(store, EvictingStore):
                store.observe(empty[:, :1].expand(-1, config.num_attention_heads, -1, -1), 1.0, None)
            total += count * store.nbytes().total
        sizes[tokens] = total + others * 2 * heads * head_dim * tokens * model.dtype.itemsize
    codebooks = sum(tensor.nbytes for tensor in statics.values())
    return CachePlan(sizes, len(windows), others, len(windows) * codebooks)


def _inside(layer: str, linears: dict[str, nn.Linear]) -> list[nn.Linear]:
    return [linear for name, linear in linears.items() if name.startswith(f"{layer}.")]


def packed_bytes(linear: nn.Linear, scheme: WeightScheme) -> int:
    """Bytes that a Linear's weight takes once packed: codes, scales and shape, without bias."""
    return CompressedLinear(
        linear.in_features, linear.out_features, bias=False, scheme=scheme, dtype=linear.weight.dtype, device="meta"
    ).stored_bytes


def own_bytes(model: nn.Module) -> Iterator[int]:
    """Bytes of every tensor that a checkpoint of `model` holds: parameters once if tied, buffers that are saved."""
    yield from (parameter.nbytes for parameter in model.parameters())
    for module in model.modules():
        unsaved = module._non_persistent_buffers_set
        yield from (buffer.nbytes for name, buffer in module.named_buffers(recurse=False) if name not in unsaved)


def kv_shape(config: Any) -> tuple[int, int]:
    """(KV heads, head_dim) of a text model's config."""
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    return heads, getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def kv_cache_bytes(config: Any, tokens: int, itemsize: int) -> int:
    """Bytes of keys and values of one sequence: per layer no more than its window, none in linear attention."""
    config = config.get_text_config()
    heads, head_dim = kv_shape(config)
    window = getattr(config, "sliding_window", None) or tokens
    kept = {"full_attention": tokens, "sliding_attention": min(tokens, window), "chunked_attention": tokens}
    return sum(kept.get(kind, 0) for kind in layer_kinds(config)) * 2 * heads * head_dim * itemsize
