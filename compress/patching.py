"""`load` a directory that kompakt wrote, and `patch` a model that is already in memory; `unpatch` puts it back bit for
bit.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..quant.method import AttentionPolicy, CachePolicy, matches
from .artifact import SIDECAR, read_cache, read_policies, read_sidecar
from .coverage import Coverage, experts_of
from .cpu_arithmetic import float32_linears
from .hf import load_tokenizer, load_written, read_written_config, resolve_model
from .hf_attention import is_attached
from .hf_cache_hooks import run_as_before, run_by
from .hf_decoder import decoder_layers
from .hf_experts import names_in_memory, separate_experts, take_apart
from .hf_quantizer import KompaktConfig, mark_quantized, unmark_quantized
from .hf_stored import check_cache, check_statics
from .linear import CompressedLinear, keep_group_scales_exact
from .pipeline import (
    Progress,
    attention_policies,
    cache_policy,
    calibration_batches,
    check_kernels,
    covered,
    quiet,
    walked,
)
from .recipe import Recipe
from .untrusted import stored_tensors
from .walk import Undo


def load(
    directory: str | Path,
    *,
    device_map: Any = None,
    verify: bool = True,
    strict: bool = False,
    exact: bool = False,
    trust_remote_code: bool = False,
) -> Any:
    """The model in a directory that `compress` wrote, with packed weights, its attention as chosen and its cache
    compressed, ready for `generate()`.

    device_map: as in transformers; None is the CPU. verify: compare checksums first. strict: refuse when this device
    lacks the kernels. exact: with FP8 activations, never fold group scales into FP8 weights, as is done for many tokens
    on Hopper. Raises ValueError for a directory that is damaged, newer than this kompakt, or not one of ours.
    """
    path = resolve_model(directory)
    sidecar = read_sidecar(path, verify=verify)
    policies, cache = read_policies(sidecar), read_cache(sidecar, path)
    model: Any = load_written(path, device_map=device_map, trust_remote_code=trust_remote_code)
    check_kernels(Recipe.load(sidecar["recipe"]), model.get_input_embeddings().weight.device, strict, policies)
    keep_group_scales_exact(model, exact)
    check_statics(model, {} if cache is None else cache.layers)
    run_by(model, policies, cache)
    check_cache(model)
    return model


class Patch:
    """What `patch` did to a model. `unpatch()` undoes it, as does leaving a ``with`` block; coverage says what
    changed, attention what each attention layer runs in, kv_cache how the cache is kept, undo holds what was there
    before.
    """

    def __init__(
        self,
        model: Any,
        undo: Undo,
        coverage: list[Coverage] | None,
        attention: dict[str, AttentionPolicy] | None = None,
        kv_cache: CachePolicy | None = None,
    ):
        self.model, self.undo, self.coverage = model, undo, coverage
        self.attention, self.kv_cache = attention or {}, kv_cache

    def unpatch(self) -> None:
        """Restores the original modules, values, attention and cache, bit for bit. A second call does nothing."""
        if self.attention or self.kv_cache is not None:
            run_as_before(self.model)
        self.undo.restore()
        unmark_quantized(self.model)

    def __enter__(self) -> Any:
        return self.model

    def __exit__(self, *exception: object) -> None:
        self.unpatch()


def patch(
    model: Any,
    source: str | Path | dict | Recipe,
    *,
    tokenizer: Any = None,
    overrides: dict[str, Any] | None = None,
    device: str | None = None,
    progress: Progress = quiet,
) -> Patch:
    """Compresses a loaded transformers model in place, by a directory that `compress` wrote or by a recipe.

    source: a directory (its weights are put into `model`, which must be its base model) or a recipe (calibrated here).
    A recipe of attention alone also patches encoders. tokenizer: needed for recipes that calibrate; default is the one
    beside the model. device: where layers are worked on, default where the model is. Raises ValueError if the model is
    patched already or does not fit.
    """
    if any(isinstance(module, CompressedLinear) for module in model.modules()):
        raise ValueError("the model is compressed already; unpatch it first")
    if is_attached(model):
        raise ValueError("the model's attention is patched already; unpatch it first")
    undo = Undo()
    try:
        if isinstance(source, (str, Path)) and (Path(source) / SIDECAR).is_file():
            return _patch_from_directory(model, Path(source), undo)
        return _patch_from_recipe(model, Recipe.load(source, overrides), tokenizer, device, undo, progress)
    except BaseException:
        run_as_before(model)
        undo.restore()
        unmark_quantized(model)
        raise


@float32_linears()
def _patch_from_recipe(
    model: Any, recipe: Recipe, tokenizer: Any, device: str | None, undo: Undo, progress: Progress
) -> Patch:
    layers = [] if recipe.weights is None else decoder_layers(model)
    if recipe.weights is not None:
        for child, fused in take_apart(model, layers, recipe.weights.ignore).items():
            name, layer = next(item for item in layers if child.startswith(f"{item[0]}."))
            undo.modules.append((layer, child.removeprefix(f"{name}."), fused))
    recipe, coverage = covered(model, layers, recipe)
    place = torch.device(device) if device else next((layers[0][1] if layers else model).parameters()).device
    if tokenizer is None and recipe.needs_data:
        tokenizer = load_tokenizer(Path(model.config._name_or_path))
    calibration, batches = calibration_batches(recipe, tokenizer, model)
    walked(model, recipe, batches, coverage, device=place, undo=undo, progress=progress)
    if recipe.weights is not None:
        mark_quantized(model, recipe.weights.scheme(), kept_linears(model))
    policies = attention_policies(model, recipe, calibration, place, progress=progress)
    cache = cache_policy(model, recipe, calibration, place, progress)
    run_by(model, policies, cache)
    return Patch(model, undo, coverage, policies, cache)


def _patch_from_directory(model: Any, directory: Path, undo: Undo) -> Patch:
    sidecar = read_sidecar(directory)
    policies, cache = read_policies(sidecar), read_cache(sidecar, directory)
    check_statics(model, {} if cache is None else cache.layers)
    stored_config = read_written_config(directory)
    if getattr(stored_config, "quantization_config", None) is None:
        _check_weights(model, directory)
        run_by(model, policies, cache)
        check_cache(model)
        return Patch(model, undo, None, policies, cache)
    config = KompaktConfig.from_compressed_tensors(stored_config.quantization_config)
    mixtures = [name for name in experts_of(model) if not matches(name, config.ignore)]
    undo.modules += [(model, name, fused) for name, fused in separate_experts(model, mixtures).items()]
    stored_names = stored_tensors(directory)
    renamed = names_in_memory(model, stored_names)
    tensors = {renamed[name]: tensor for name, tensor in stored_names.items()}
    known = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    packed = {name.rpartition(".")[0] for name in tensors if name.endswith((".weight_packed", ".weight_scale"))}
    for name in packed:
        linear = _linear(model, name, directory)
        swapped = CompressedLinear.instead_of(linear, config.scheme_of(name), linear.weight.device)
        for key, parameter in swapped.named_parameters():
            if f"{name}.{key}" not in tensors:
                raise ValueError(f"{directory} lacks {name}.{key}")
            stored = tensors[f"{name}.{key}"].read()
            if stored.shape != parameter.shape:
                raise ValueError(
                    f"{name}.{key} has shape {tuple(stored.shape)} in {directory}, "
                    f"the model needs {tuple(parameter.shape)}"
                )
            parameter.data = stored.to(parameter.device)
        undo.modules.append((model, name, linear))
        model.set_submodule(name, swapped)
    for name, entry in tensors.items():
        if name.rpartition(".")[0] in packed:
            continue
        if name not in known:
            raise ValueError(f"{directory} holds {name}, which the model does not have; it was made from another model")
        parameter = model.get_parameter(name)
        stored = entry.read().to(parameter.device)
        if stored.shape != parameter.shape:
            raise ValueError(
                f"{name} has shape {tuple(stored.shape)} in {directory} and {tuple(parameter.shape)} in the model"
            )
        if not torch.equal(stored.to(parameter.dtype), parameter.data):
            undo.parameters.append((model, name, parameter.data))
            parameter.data = stored.to(parameter.dtype)
    undo.folded = bool(undo.parameters)
    mark_quantized(model, config.groups[0].scheme, config.ignore)
    run_by(model, policies, cache)
    check_cache(model)
    return Patch(model, undo, None, policies, cache)


def _check_weights(model: Any, directory: Path) -> None:
    """ValueError unless the model has the float weights that a directory's attention and cache were chosen for."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name, entry in stored_tensors(directory).items():
        parameter = parameters.get(name)
        if parameter is None:
            raise ValueError(f"{directory} holds {name}, which the model does not have; it was made from another model")
        stored = entry.read()
        if stored.shape != parameter.shape or not torch.equal(stored.to(parameter), parameter.data):
            raise ValueError(f"{name} differs from that in {directory}; it was made from another model")


def _linear(model: Any, name: str, directory: Path) -> nn.Linear:
    try:
        module = model.get_submodule(name)
    except AttributeError as error:
        raise ValueError(
            f"{directory} holds {name}, which the model does not have; it was made from another model"
        ) from error
    if not isinstance(module, nn.Linear):
        raise ValueError(f"{name} is a {type(module).__name__} in the model, not a Linear")
    return module


def kept_linears(model: nn.Module) -> list[str]:
    """Names of the Linears that were left as they are."""
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
