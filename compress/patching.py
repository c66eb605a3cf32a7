"""`load` a directory that kompakt wrote, and `patch` a model that is already in memory; `unpatch` puts it back bit for
bit.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn

from .artifact import SIDECAR, SIDECAR_TENSORS, read_sidecar
from .coverage import Coverage, cover, resolve_group_size
from .hf import load_compressed, load_tokenizer, read_config, resolve_model
from .hf_decoder import decoder_layers, refuse_experts
from .hf_quantizer import KompaktConfig, mark_quantized, unmark_quantized
from .linear import CompressedLinear, keep_group_scales_exact
from .pipeline import Progress, calibration_batches, check_kernels, quiet
from .recipe import Recipe
from .walk import Undo, quantize_layers


def load(
    directory: str | Path,
    *,
    device_map: Any = None,
    verify: bool = True,
    strict: bool = False,
    exact: bool = False,
    trust_remote_code: bool = False,
) -> Any:
    """The model in a directory that `compress` wrote, with packed weights, ready for `generate()`.

    device_map: as in transformers; None is the CPU. verify: compare checksums first. strict: refuse when this device
    lacks the kernels. exact: with FP8 activations, never fold group scales into FP8 weights, as is done for many tokens
    on Hopper. Raises ValueError for a directory that is damaged, newer than this kompakt, or not one of ours.
    """
    path = resolve_model(directory)
    sidecar = read_sidecar(path, verify=verify)
    method = Recipe.load(sidecar["recipe"]).weights
    assert method is not None
    model: Any = load_compressed(path, device_map=device_map, trust_remote_code=trust_remote_code)
    check_kernels(method, model.get_input_embeddings().weight.device, strict)
    keep_group_scales_exact(model, exact)
    return model


class Patch:
    """What `patch` did to a model. `unpatch()` undoes it, as does leaving a ``with`` block; coverage says what
    changed, undo holds what was there before.
    """

    def __init__(self, model: Any, undo: Undo, coverage: list[Coverage] | None):
        self.model, self.undo, self.coverage = model, undo, coverage

    def unpatch(self) -> None:
        """Restores the original modules and values, bit for bit. A second call does nothing."""
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
    tokenizer: needed for recipes that calibrate; default is the one beside the model. device: where layers are worked
    on, default where the model is. Raises ValueError if the model is patched already or does not fit.
    """
    if any(isinstance(module, CompressedLinear) for module in model.modules()):
        raise ValueError("the model is compressed already; unpatch it first")
    undo = Undo()
    try:
        if isinstance(source, (str, Path)) and (Path(source) / SIDECAR).is_file():
            return _patch_from_directory(model, Path(source), undo)
        return _patch_from_recipe(model, Recipe.load(source, overrides), tokenizer, device, undo, progress)
    except BaseException:
        undo.restore()
        unmark_quantized(model)
        raise


def _patch_from_recipe(
    model: Any, recipe: Recipe, tokenizer: Any, device: str | None, undo: Undo, progress: Progress
) -> Patch:
    layers = decoder_layers(model)
    refuse_experts(layers)
    assert recipe.weights is not None
    coverage = cover(model, [name for name, _ in layers], recipe.weights)
    method = resolve_group_size(recipe.weights, coverage)
    place = torch.device(device) if device else next(layers[0][1].parameters()).device
    if tokenizer is None and method.needs_data:
        tokenizer = load_tokenizer(Path(model.config._name_or_path))
    _, batches = calibration_batches(recipe, tokenizer, model)
    quantize_layers(
        model, method, batches, coverage, device=place, seed=recipe.calibration.seed, undo=undo, progress=progress
    )
    mark_quantized(model, method.scheme(), kept_linears(model))
    return Patch(model, undo, coverage)


def _patch_from_directory(model: Any, directory: Path, undo: Undo) -> Patch:
    read_sidecar(directory)
    config = KompaktConfig.from_compressed_tensors(read_config(directory).quantization_config)
    tensors = _open_tensors(directory)
    known = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    packed = {name.rpartition(".")[0] for name in tensors if name.endswith((".weight_packed", ".weight_scale"))}
    for name in packed:
        linear = _linear(model, name, directory)
        swapped = CompressedLinear.instead_of(linear, config.scheme, linear.weight.device)
        for key, parameter in swapped.named_parameters():
            stored = tensors[f"{name}.{key}"].get()
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
        stored = entry.get().to(parameter.device)
        if stored.shape != parameter.shape:
            raise ValueError(
                f"{name} has shape {tuple(stored.shape)} in {directory} and {tuple(parameter.shape)} in the model"
            )
        if not torch.equal(stored.to(parameter.dtype), parameter.data):
            undo.parameters.append((model, name, parameter.data))
            parameter.data = stored.to(parameter.dtype)
    undo.folded = bool(undo.parameters)
    mark_quantized(model, config.scheme, config.ignore)
    return Patch(model, undo, None)


class _Entry:
    """One tensor of a checkpoint, read when asked for."""

    def __init__(self, file: Path, name: str):
        self.file, self.name = file, name

    def get(self) -> torch.Tensor:
        with safe_open(self.file, framework="pt") as handle:
            return handle.get_tensor(self.name)


def _open_tensors(directory: Path) -> dict[str, _Entry]:
    entries = {}
    for file in sorted(directory.glob("*.safetensors")):
        if file.name != SIDECAR_TENSORS:
            with safe_open(file, framework="pt") as handle:
                entries |= {name: _Entry(file, name) for name in handle.keys()}  # noqa: SIM118
    return entries


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
