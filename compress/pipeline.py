"""`compress`: a recipe and a model go in, a verified directory comes out."""

from __future__ import annotations

import logging
import platform
import tempfile
import time
from collections.abc import Callable, Collection
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..kernels.attention import Mode
from ..kernels.int4_linear import Backend, available_backends
from ..quant.method import AttentionPolicy, CachePolicy, WeightMethod
from .artifact import (
    REPORT,
    cache_tensors,
    check_output,
    staged,
    weight_bytes,
    write_cache,
    write_policies,
    write_sidecar,
    write_tensors,
)
from .assess import read_text, save_json
from .attention_calibration import SEQUENCES, choose_policies
from .cache_calibration import choose_cache
from .cache_evaluation import check_prompt
from .calibration import CalibrationSet, calibration_tokens
from .card import write_card
from .coverage import Coverage, cover, resolve_group_size
from .cpu_arithmetic import float32_linears, slow_dtypes
from .evaluation import text_windows
from .fingerprint import take_fingerprint
from .hf import load_base, load_tokenizer, resolve_model, save_weights, transformers_version
from .hf_attention import check_attention
from .hf_cache_hooks import cacheable_modules
from .hf_decoder import decoder_layers
from .hf_experts import take_apart
from .layer_policies import combined
from .linear import storage
from .processes import ALONE, Processes, check_shared, joined, own_device
from .read_back import reload_and_compare, verify_quality
from .recipe import Recipe
from .restore import attention_beside, given_back, left_to_restore, refuse_limit, restore_worst, worst_attention
from .resume import LayerStore, model_files
from .runtime import AttentionBackend, attention_backends, cache_backends, sparse_backends
from .sparsity_calibration import choose_sparsity
from .walk import Undo, WalkResult, quantize_layers

log = logging.getLogger(__name__)
Progress = Callable[[str, int, int, str], None]
PROBE_TOKENS = 256
WITHOUT_KERNEL = {"reference": "the torch reference", "dense": "the attention that the model had before"}
"""Backends that are no kernels, and what runs instead."""
OPS = {("int4", "fp8"): "w4a8_linear", ("int4", "none"): "w4a16_linear", ("fp8", "fp8"): "fp8_linear"}


def quiet(stage: str, done: int, total: int, text: str) -> None:
    """Progress that says nothing."""


@dataclass(frozen=True)
class CompressionResult:
    """What `compress` did; `report` is the content of `kompakt.json` without checksums, `evaluation` of
    `evaluation.json`.
    """

    output: Path
    recipe: Recipe
    coverage: list[Coverage]
    report: dict[str, Any]
    evaluation: dict[str, Any] | None

    def as_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return {
            "output": str(self.output),
            "recipe": self.recipe.model_dump(mode="json", exclude_none=True),
            "coverage": [line.as_dict() for line in self.coverage],
            "report": self.report,
            "evaluation": self.evaluation,
        }

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> CompressionResult:
        """What `as_dict` was made of."""
        coverage = [Coverage(**{**line, "shape": tuple(line["shape"])}) for line in content["coverage"]]
        recipe = Recipe.load(content["recipe"])
        return cls(Path(content["output"]), recipe, coverage, content["report"], content["evaluation"])


def compress(
    model: str | Path,
    recipe: str | Path | dict | Recipe = "w4a8-fireq",
    output: str | Path | None = None,
    *,
    overrides: dict[str, Any] | None = None,
    device: str | None = None,
    device_map: Any = None,
    overwrite: bool = False,
    strict: bool = False,
    resume: bool = False,
    max_shard_size: str = "5GB",
    trust_remote_code: bool = False,
    command: str | None = None,
    progress: Progress = quiet,
) -> CompressionResult:
    """Compresses `model` by `recipe` into the directory `output`, verified, or raises and leaves nothing there.

    model: directory or hub id of a float checkpoint in safetensors. output: default MODEL-RECIPE. overrides: dotted
    recipe keys. device: where one decoder layer at a time is worked on, default CUDA if present. device_map: where the
    model waits: None (CPU), "disk", or accelerate's. strict: refuse when this device lacks the recipe's kernels.
    resume: keep every finished layer beside the output until all is done, and go on from what an interrupted run with
    the same arguments kept (`resume.py`).

    In several processes (`processes.py`), each calibrates on its share of the text, the first one writes and measures,
    and all return what it found. device is then one of its own for each process, if there are several.

    Raises ValueError for bad input, `LimitExceeded` when the recipe's limits cannot be met.
    """
    with joined() as processes:
        found = compressed(
            *(processes, model, recipe, output),
            overrides=overrides,
            device=device,
            device_map=device_map,
            overwrite=overwrite,
            strict=strict,
            resume=resume,
            max_shard_size=max_shard_size,
            trust_remote_code=trust_remote_code,
            command=command,
            progress=progress,
        )
        if processes.size == 1:
            return found
        return CompressionResult.from_dict(processes.first_of(found.as_dict()))


@float32_linears()
def compressed(
    processes: Processes,
    model: str | Path,
    recipe: str | Path | dict | Recipe,
    output: str | Path | None,
    *,
    overrides: dict[str, Any] | None,
    device: str | None,
    device_map: Any,
    overwrite: bool,
    strict: bool,
    resume: bool,
    max_shard_size: str,
    trust_remote_code: bool,
    command: str | None,
    progress: Progress,
) -> CompressionResult:
    """`compress` in one of its processes; those that are not the first return when the layers are done."""
    started = time.perf_counter()
    loaded = Recipe.load(recipe, overrides)
    check_prompt(loaded)
    source = resolve_model(model)
    output = Path(output) if output is not None else Path(f"{source.resolve().name}-{loaded.name}")
    place = own_device(device)
    check_output(output, overwrite=overwrite, expected_bytes=expected_bytes(source, loaded))
    check_kernels(loaded, place, strict)
    if resume and loaded.weights is None:
        raise ValueError("--resume keeps quantized layers, and this recipe quantizes no weights; run without it")
    with ExitStack() as stack:
        offload = (
            Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="kompakt-"))) if device_map == "disk" else None
        )
        kept = None if loaded.weights is None or device_map is None else loaded.weights.ignore
        where: dict[str, Any] = {"device_map": device_map, "offload": offload}
        base = load_base(source, **where, trust_remote_code=trust_remote_code, separate_but=kept)
        layers = decoder_layers(base)
        check_outer(base, [name for name, _ in layers])
        loaded, coverage = covered(base, layers, loaded)
        needs_text = loaded.needs_data or loaded.evaluation.windows > 0
        tokenizer = load_tokenizer(source, trust_remote_code=trust_remote_code) if needs_text else None
        calibration, batches = calibration_batches(loaded, tokenizer, base)
        check_shared(processes, len(batches), loaded.weights)
        windows = evaluation_windows(loaded, tokenizer)
        store = None
        if resume:
            facts = {**layer_facts(loaded, source, calibration, place), "processes": processes.size}
            processes.check()
            store = stack.enter_context(LayerStore.open(output, facts, writes=processes.first))
        staging = stack.enter_context(staged(output, overwrite=overwrite)) if processes.first else None
        undo = Undo() if loaded.limits.perplexity_increase else None
        run = {"undo": undo, "store": store, "processes": processes, "offload": offload, "progress": progress}
        walk = walked(base, loaded, batches, coverage, device=place, **run)
        if staging is None:
            return CompressionResult(output, loaded, coverage, {}, None)
        probe = batches[0][:1, :PROBE_TOKENS]
        dense: tuple[str, ...] = ()
        while True:
            policies = attention_policies(base, loaded, calibration, place, dense, progress)
            cache = cache_policy(base, loaded, calibration, place, progress)
            write_model(base, source, staging, loaded, coverage, max_shard_size)
            write_tensors(staging, {**walk.tensors, **({} if cache is None else cache_tensors(cache))})
            reload_and_compare(base, staging, probe, place, trust_remote_code, policies, cache, offload)
            evaluation = verify_quality(
                *(staging, source, windows, loaded, place, trust_remote_code, progress, policies, cache, offload)
            )
            if not exceeds(evaluation, loaded):
                break
            assert undo is not None and evaluation is not None
            if not left_to_restore(coverage, policies):
                refuse_limit(evaluation, loaded.limits)
            if loaded.weights is None:
                dense = (*dense, *worst_attention(policies, evaluation, loaded.limits))
            else:
                coverage = restore_worst(layers, walk.reports, undo, coverage, evaluation, loaded.limits)
                dense = attention_beside(coverage, policies)
        report = {
            "kompakt": package_version(),
            "base_model": str(model),
            "command": command,
            "recipe": loaded.model_dump(mode="json", exclude_none=True),
            "environment": environment(place),
            "calibration": None if calibration is None else describe_calibration(calibration),
            "sizes": sizes(source, staging, base),
            "peak_device_bytes": walk.peak_bytes,
            "seconds": round(time.perf_counter() - started, 1),
            "layers": [layer.as_dict() for layer in walk.reports],
            "coverage": [line.as_dict() for line in coverage],
            "fingerprint": take_fingerprint(base, probe, place, policies, cache),
            **write_policies(policies),
            **({} if cache is None else {"kv_cache": write_cache(cache)}),
        }
        write_companions(staging, loaded, report, evaluation, source)
        write_report(staging, output)
    return CompressionResult(output, loaded, coverage, report, evaluation)


def expected_bytes(source: Path, recipe: Recipe) -> int:
    """Room that the output needs, roughly."""
    return int(weight_bytes(source) * (1.0 if recipe.weights is None else 0.6))


def covered(model: Any, layers: list[tuple[str, nn.Module]], recipe: Recipe) -> tuple[Recipe, list[Coverage]]:
    """The recipe with its group size resolved, and what happens to every module, of which mixtures of experts are taken
    apart. ValueError for what cannot work.
    """
    if recipe.attention is not None or recipe.sparsity is not None:
        check_attention(model)
    if recipe.kv_cache is not None:
        cacheable_modules(model, recipe.kv_cache)
    names = [name for name, _ in layers]
    if recipe.weights is None:
        return recipe, cover(model, names, None)
    take_apart(model, layers, recipe.weights.ignore)
    coverage = cover(model, names, recipe.weights)
    return recipe.model_copy(update={"weights": resolve_group_size(recipe.weights, coverage)}), coverage


def walked(
    model: Any,
    recipe: Recipe,
    batches: list[torch.Tensor],
    coverage: list[Coverage],
    *,
    device: torch.device,
    undo: Undo | None,
    store: LayerStore | None = None,
    processes: Processes = ALONE,
    offload: Path | None = None,
    progress: Progress = quiet,
) -> WalkResult:
    """The walk that quantizes weights; nothing happens in a recipe without them."""
    if recipe.weights is None:
        return WalkResult([], {}, None)
    seed = recipe.calibration.seed
    return quantize_layers(
        *(model, recipe.weights, batches, coverage),
        device=device,
        seed=seed,
        undo=undo,
        store=store,
        processes=processes,
        offload=offload,
        progress=progress,
    )


def attention_policies(
    model: Any,
    recipe: Recipe,
    calibration: CalibrationSet | None,
    device: torch.device,
    dense: Collection[str] = (),
    progress: Progress = quiet,
) -> dict[str, AttentionPolicy]:
    """What each attention layer runs by, by module; empty if the recipe leaves attention alone.

    dense: layers that were given back their dense attention.
    """
    attention, sparsity, tokens = {}, {}, None if calibration is None else calibration.tokens
    if recipe.attention is not None:
        used = tokens if recipe.attention.needs_data else None
        attention = choose_policies(model, recipe.attention, used, device=device, progress=progress)
    if recipe.sparsity is not None:
        used = tokens if recipe.sparsity.needs_data else None
        sparsity = choose_sparsity(model, recipe.sparsity, used, device=device, progress=progress)
    found = combined(attention, sparsity)
    return {name: given_back(policy) if name in dense else policy for name, policy in found.items()}


def cache_policy(
    model: Any, recipe: Recipe, calibration: CalibrationSet | None, device: torch.device, progress: Progress = quiet
) -> CachePolicy | None:
    """How the key-value cache is kept; None if the recipe leaves it alone."""
    if recipe.kv_cache is None:
        return None
    tokens = calibration.tokens if calibration is not None and recipe.kv_cache.needs_data else None
    return choose_cache(model, recipe.kv_cache, tokens, device=device, progress=progress)


def layer_facts(
    recipe: Recipe, source: Path, calibration: CalibrationSet | None, device: torch.device
) -> dict[str, Any]:
    """What quantized layers depend on, JSON-able."""
    chosen = recipe.model_dump(mode="json", include={"weights", "calibration"})
    return {
        "kompakt": package_version(),
        "recipe": chosen,
        "model": model_files(source),
        "calibration": None if calibration is None else calibration.fingerprint,
        "environment": environment(device),
    }


def check_kernels(
    recipe: Recipe, device: torch.device, strict: bool, policies: dict[str, AttentionPolicy] | None = None
) -> None:
    """Logs, or with `strict` raises ValueError, when what the recipe multiplies has no kernel on `device`.

    policies: arithmetics that were chosen; where they are to be chosen yet, one with a kernel is enough.
    """
    found: dict[str, Backend | AttentionBackend] = {}
    if recipe.attention is not None:
        modes: list[Mode] = list(recipe.attention.modes)
        if policies is not None:
            modes = list(dict.fromkeys(policy.mode for policy in policies.values() if policy.mode != "bf16"))
        found |= attention_backends(modes, device)
        if policies is None and any(backend.name not in WITHOUT_KERNEL for backend in found.values()):
            found = {}
    if recipe.sparsity is not None:
        found |= sparse_backends(device)
    if recipe.kv_cache is not None:
        found |= cache_backends(device, recipe.kv_cache)
    if recipe.weights is not None:
        found |= {op: available_backends(device)[op] for op in recipe_ops(recipe.weights)}
    for op, backend in found.items():
        if backend.name not in WITHOUT_KERNEL:
            continue
        way = WITHOUT_KERNEL[backend.name]
        if strict:
            raise ValueError(f"{op} has no kernel on this device ({backend.reason}), and --strict forbids {way}")
        log.warning("%s runs through %s: %s", op, way, backend.reason)


def recipe_ops(weights: WeightMethod) -> list[str]:
    """Ops of `available_backends` that the Linears of a recipe call."""
    storages = [weights.storage, *(override.weights for override in weights.overrides)]
    found = (OPS.get((storage, weights.activations)) for storage in dict.fromkeys(storages))
    return [op for op in found if op is not None]


def check_outer(model: Any, layer_names: list[str]) -> None:
    """ValueError if a weight outside the decoder layers is NaN or infinite; the walk checks those inside."""
    inside = tuple(f"{name}." for name in layer_names)
    for name, parameter in model.named_parameters():
        if not name.startswith(inside) and parameter.device.type != "meta" and not bool(parameter.isfinite().all()):
            raise ValueError(f"{name} holds NaN or infinite values; the checkpoint is damaged")


def calibration_batches(recipe: Recipe, tokenizer: Any, model: Any) -> tuple[CalibrationSet | None, list[torch.Tensor]]:
    """Calibration text, if a slot needs it, and token batches for the walk over weights.

    Weight methods that use no data get random tokens, only to measure each layer's error. Attention and caches look at
    a few sequences, and no more are drawn where there is nothing else.
    """
    options = recipe.calibration
    for_weights = recipe.weights is not None and recipe.weights.needs_data
    if recipe.needs_data and not for_weights:
        cache = recipe.kv_cache.sequences if recipe.kv_cache is not None and recipe.kv_cache.needs_data else 0
        sparsity = 0 if recipe.sparsity is None else recipe.sparsity.sequences
        options = options.model_copy(update={"samples": min(options.samples, max(SEQUENCES, cache, sparsity))})
    found = calibration_tokens(tokenizer, options) if recipe.needs_data else None
    if found is not None and (for_weights or recipe.weights is None):
        return found, list(found.tokens.split(options.batch_size))
    vocabulary = model.config.get_text_config().vocab_size
    generator = torch.Generator().manual_seed(options.seed)
    return found, [torch.randint(0, vocabulary, (1, PROBE_TOKENS), generator=generator)]


def evaluation_windows(recipe: Recipe, tokenizer: Any) -> torch.Tensor | None:
    """Windows of the evaluation text, cut before the long work starts so that a bad text fails early."""
    options = recipe.evaluation
    if options.windows == 0:
        if recipe.limits.perplexity_increase is not None:
            raise ValueError("limits.perplexity_increase needs an evaluation, and evaluation.windows is 0")
        return None
    text, _ = read_text(options.text)
    return text_windows(tokenizer, text, window=options.window, stride=options.stride, limit=options.windows)


def write_model(
    model: Any, source: Path, staging: Path, recipe: Recipe, coverage: list[Coverage], max_shard_size: str
) -> None:
    """Weights, config and companions into `staging`, replacing an earlier attempt."""
    for file in staging.glob("model*"):
        file.unlink()
    kept = [line.name for line in coverage if line.kind == "Linear" and line.status == "kept"]
    scheme = None if recipe.weights is None else recipe.weights.scheme()
    save_weights(model, source, staging, scheme, kept, max_shard_size)


def exceeds(evaluation: dict[str, Any] | None, recipe: Recipe) -> bool:
    """Whether the perplexity grew beyond the recipe's limit."""
    limit = recipe.limits.perplexity_increase
    return limit is not None and evaluation is not None and evaluation["comparison"]["perplexity_increase"] > limit


def sizes(source: Path, staging: Path, model: Any) -> dict[str, Any]:
    """Bytes on disk before and after, and what the quantized weights take."""
    return {"base_bytes": weight_bytes(source), "compressed_bytes": weight_bytes(staging), **storage(model)}


def write_companions(
    staging: Path,
    recipe: Recipe,
    report: dict[str, Any],
    evaluation: dict[str, Any] | None,
    source: Path,
) -> None:
    """Recipe, evaluation, model card, and last the sidecar with its checksums."""
    (staging / "recipe.yaml").write_text(recipe.to_yaml(), "utf-8")
    if evaluation is not None:
        save_json(evaluation, staging / "evaluation.json")
    write_card(staging, recipe, report, evaluation, source)
    write_sidecar(staging, report)


def write_report(staging: Path, output: Path) -> None:
    """What is known about the directory as a page in it, under the name that it is about to have."""
    from .report_page import write_page
    from .reporting import report

    content = report([staging])
    content["directories"][0] |= {"directory": str(output), "name": output.name}
    for group in [*content["comparisons"]["quality"], *content["comparisons"]["speed"]]:
        group["members"][0]["name"] = output.name
    write_page(content, staging / REPORT)


def describe_calibration(calibration: CalibrationSet) -> dict[str, Any]:
    """JSON-able facts about the calibration text."""
    samples, length = calibration.tokens.shape
    return {
        "source": calibration.source,
        "samples": samples,
        "length": length,
        "tokens": samples * length,
        "documents": calibration.documents,
        "longest_document": calibration.longest_document,
        "fingerprint": calibration.fingerprint,
    }


def environment(device: torch.device) -> dict[str, str]:
    """Versions and device, for the record."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    slow = slow_dtypes() if device.type == "cpu" else []
    return {
        "torch": torch.__version__,
        "transformers": transformers_version(),
        "python": platform.python_version(),
        "device": name,
        **({"multiplied_in_float32": ", ".join(slow)} if slow else {}),
    }


def package_version() -> str:
    """Version of kompakt."""
    from .. import __version__

    return __version__
