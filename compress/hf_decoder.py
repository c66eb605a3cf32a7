"""Decoder layers of a transformers model: where they are, how they are called, what can be folded, how one is made
resident.

Everything is found by structure, not by model name: layers through `_no_split_modules`, the other arguments of each
layer by replacing the layers with recorders for one pass, shared norm inputs by watching which Linears read a norm's
output.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate.hooks import AlignDevicesHook, SequentialHook
from torch import nn

from ..quant.method import matches
from .coverage import experts_of

log = logging.getLogger(__name__)


def decoder_layers(model: Any) -> list[tuple[str, nn.Module]]:
    """(name, module) of every decoder layer, in order. ValueError if the model has none."""
    wanted = set(getattr(model, "_no_split_modules", None) or ())
    config = model.config.get_text_config() if hasattr(model, "config") else None
    count = getattr(config, "num_hidden_layers", None)
    for name, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or len(module) == 0:
            continue
        kinds = {type(item).__name__ for item in module}
        if kinds <= wanted or (not wanted and len(module) == count):
            return [(f"{name}.{index}", item) for index, item in enumerate(module)]
    raise ValueError(
        f"{type(model).__name__} has no decoder layers that could be walked; kompakt compresses decoder-only models"
    )


def expert_modules(layers: list[tuple[str, nn.Module]]) -> dict[str, nn.Module]:
    """Modules that hold the weights of a mixture of experts, by full name: fused into tensors of three dimensions, or
    one by one in a module `experts`.
    """
    return {f"{name}.{child}": layer.get_submodule(child) for name, layer in layers for child in experts_of(layer)}


def refuse_experts(
    layers: list[tuple[str, nn.Module]],
    ignore: Collection[str] = (),
    why: str = "experts are not supported by this command yet",
) -> None:
    """ValueError if a layer holds a mixture of experts that `ignore` does not keep. why: it cannot be quantized."""
    experts = {name: module for name, module in expert_modules(layers).items() if not matches(name, ignore)}
    if not experts:
        return
    name, module = next(iter(experts.items()))
    weights = sum(parameter.numel() for module in experts.values() for parameter in module.parameters())
    total = sum(parameter.numel() for _, layer in layers for parameter in layer.parameters())
    raise ValueError(
        f"{name} is a mixture-of-experts module ({type(module).__name__}); {len(experts)} of them hold "
        f"{weights / total:.0%} of the decoder layers' weights, and {why}: add 'experts' to weights.ignore to keep "
        "them as they are and quantize the rest"
    )


def _hook_of(module: nn.Module) -> Any:
    hook = getattr(module, "_hf_hook", None)
    hooks = hook.hooks if isinstance(hook, SequentialHook) else (hook,)
    return next((item for item in hooks if isinstance(item, AlignDevicesHook)), None)


@contextmanager
def resident(layer: nn.Module, device: torch.device) -> Iterator[nn.Module]:
    """Holds a layer on `device`, whatever accelerate does with it otherwise; puts it back where it was.

    Changed parameters are written back to where offloaded weights are kept. Of an offloaded layer, modules that were
    swapped in meanwhile go to the CPU, and those that came from there are what they were, perhaps files (`park`).
    """
    every = [(module, hook) for module in layer.modules() if (hook := _hook_of(module)) is not None]
    hooked = [(module, hook) for module, hook in every if hook.offload]
    if not hooked:
        home = next(layer.parameters()).device
        layer.to(device)
        try:
            with without_hooks(every):
                yield layer
        finally:
            layer.to(home)
        return
    offloaded = {module for module, _ in hooked}
    parked = {
        parameter: parameter.data
        for module in layer.modules()
        if module not in offloaded
        for parameter in module.parameters(recurse=False)
    }
    for module, hook in hooked:
        hook.pre_forward(module)
    layer.to(device)
    try:
        with without_hooks(every):
            yield layer
    finally:
        for module, hook in hooked:
            _write_back(module, hook)
            hook.post_forward(module, None)
        for module in set(layer.modules()) - offloaded:
            for parameter in module.parameters(recurse=False):
                if parameter.device.type != "meta":
                    found, before = parameter.data.cpu(), parked.get(parameter)
                    parameter.data = before if before is not None and torch.equal(found, before) else found


@contextmanager
def without_hooks(hooked: list[tuple[nn.Module, Any]]) -> Iterator[None]:
    """Modules as they are without accelerate, which would move what they are given to a device of its own."""
    modules: list[Any] = [module for module, _ in hooked]
    forwards = [module.forward for module in modules]
    for module in modules:
        module.forward = module._old_forward
    try:
        yield
    finally:
        for module, forward in zip(modules, forwards, strict=True):
            module.forward = forward


def park(module: nn.Module, folder: Path) -> None:
    """Moves the parameters of a module on the CPU into files that are mapped where they were, so that they take memory
    only as long as there is some to spare. The files must stay as long as the module.
    """
    for number, parameter in enumerate(module.parameters()):
        if parameter.device.type != "cpu" or not parameter.numel():
            continue
        size = parameter.numel() * parameter.element_size()
        storage: Any = torch.UntypedStorage.from_file(str(folder / f"{number}"), shared=True, nbytes=size)
        mapped: Any = torch.empty(0, dtype=parameter.dtype)
        mapped.set_(storage, 0, parameter.shape)
        parameter.data = mapped.copy_(parameter.data)


def execute_on(model: nn.Module, device: torch.device) -> nn.Module:
    """Has accelerate bring the weights of an offloaded model to `device`, one module at a time; returns the model."""
    for module in model.modules():
        hook = _hook_of(module)
        if hook is not None:
            hook.execution_device = device
    return model


def _write_back(module: nn.Module, hook: Any) -> None:
    for name, parameter in module.named_parameters(recurse=hook.place_submodules):
        stored = hook.weights_map[name]
        if not torch.equal(stored.to(parameter.device), parameter):
            hook.weights_map.dataset.state_dict[hook.weights_map.prefix + name] = parameter.detach().cpu()


class LayerCalls:
    """What each decoder layer is called with besides hidden states, for every batch of tokens.

    arguments[batch][layer]: (args, kwargs). hidden[batch]: (batch, tokens, hidden), the input of the first layer.
    positions: of the tokens of every batch, from 0 on by default.
    """

    def __init__(
        self,
        model: Any,
        layers: list[tuple[str, nn.Module]],
        batches: list[torch.Tensor],
        positions: torch.Tensor | None = None,
    ):
        self.hidden: list[torch.Tensor] = []
        self.arguments: list[list[tuple[tuple, dict]]] = []
        modules = [module for _, module in layers]
        base = model.base_model if hasattr(model, "base_model") else model
        device = model.get_input_embeddings().weight.device
        originals = [vars(module).get("forward") for module in modules]
        try:
            for tokens in batches:
                calls: list[tuple[tuple, dict]] = []
                for index, module in enumerate(modules):
                    module.forward = self._recorder(index, calls)
                with torch.no_grad():
                    place = tokens.device if device.type == "meta" else device
                    placed = {} if positions is None else {"position_ids": positions.to(place)}
                    base(tokens.to(place), use_cache=False, **placed)
                if len(calls) != len(modules):
                    raise ValueError(
                        f"{len(calls)} of {len(modules)} decoder layers ran; models that skip layers are not supported"
                    )
                self.arguments.append(calls)
        finally:
            for module, original in zip(modules, originals, strict=True):
                if original is None:
                    vars(module).pop("forward", None)
                else:
                    module.forward = original

    def _recorder(self, index: int, calls: list[tuple[tuple, dict]]):
        def forward(*args, **kwargs):
            hidden = args[0] if args else kwargs.pop("hidden_states")
            if index == 0:
                self.hidden.append(hidden.detach())
            calls.append((args[1:], kwargs))
            return hidden

        return forward

    def of_layer(self, index: int, device: torch.device) -> list[tuple[tuple, dict]]:
        """Arguments of one layer for every batch, tensors on `device`."""
        return [to_device(calls[index], device) for calls in self.arguments]


def to_device(value: Any, device: torch.device) -> Any:
    """Moves the tensors inside nested tuples, lists and dicts; anything else is left as it is."""
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if isinstance(value, (tuple, list)) and type(value) in (tuple, list):
        return type(value)(to_device(item, device) for item in value)
    if isinstance(value, dict):
        return {key: to_device(item, device) for key, item in value.items()}
    return value


@torch.no_grad()
def layerwise_logits(
    model: Any, layers: list[tuple[str, nn.Module]], tokens: torch.Tensor, device: torch.device
) -> torch.Tensor:
    """Logits (batch, tokens, vocab), on the CPU, with one decoder layer on `device` at a time."""
    calls = LayerCalls(model, layers, [tokens])
    hidden = calls.hidden[0].to(device)
    for index, (_, layer) in enumerate(layers):
        with resident(layer, device):
            hidden = run_layer(layer, hidden, calls.of_layer(index, device)[0])
    return head_logits(model, layers, tokens, hidden).cpu()


def run_layer(layer: nn.Module, hidden: torch.Tensor, arguments: tuple[tuple, dict]) -> torch.Tensor:
    """What a layer makes of `hidden`, (batch, tokens, hidden). arguments: what else it is called with."""
    args, kwargs = arguments
    output = layer(hidden, *args, **kwargs)
    return output[0] if isinstance(output, tuple) else output


def head_logits(
    model: Any, layers: list[tuple[str, nn.Module]], tokens: torch.Tensor, hidden: torch.Tensor
) -> torch.Tensor:
    """What the model makes of `hidden` as the output of its last layer."""
    embedding = model.get_input_embeddings().weight.device
    originals = [(layer, vars(layer).get("forward")) for _, layer in layers]

    def skip(*args, **kwargs):
        return hidden.to((args[0] if args else kwargs["hidden_states"]).device)

    try:
        for layer, _ in originals:
            layer.forward = skip
        return model(tokens.to(embedding) if embedding.type != "meta" else tokens, use_cache=False).logits
    finally:
        for layer, original in originals:
            if original is None:
                vars(layer).pop("forward", None)
            else:
                layer.forward = original
