"""The walk: decoder layer by decoder layer, collect, quantize, swap, and feed the quantized outputs to the next layer.

One layer is on the compute device at a time. Two streams of hidden states may run: the quantized one, which every
method sees as its inputs, and the float one, kept only for methods that compare with the float model
(`needs_reference`).
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..quant.block import Block
from ..quant.fp8 import round_fp8
from ..quant.method import QuantizedWeight, WeightMethod, WeightScheme
from .coverage import Coverage
from .expert_calibration import prepare_experts
from .hf_decoder import LayerCalls, decoder_layers, park, resident
from .hf_folds import find_folds
from .linear import CompressedLinear, keep_group_scales_exact
from .processes import ALONE, Processes
from .resume import KeptLayer, LayerStore

log = logging.getLogger(__name__)
Progress = Callable[[str, int, int, str], None]


@dataclass(frozen=True)
class LayerReport:
    """What happened to one decoder layer.

    error: ‖quantized − float‖² / ‖float − input‖² of the layer's output on the first calibration batch, same inputs.
    """

    name: str
    error: float
    seconds: float
    notes: dict[str, Any]

    def as_dict(self) -> dict:
        """JSON-able."""
        return asdict(self)


@dataclass
class Undo:
    """What a walk changed, so that it can be put back bit for bit: (layer, name, original module or parameter
    values).

    folded: channel scales were moved between modules of a layer, which can then only be put back together.
    """

    modules: list[tuple[nn.Module, str, nn.Module]] = field(default_factory=list)
    parameters: list[tuple[nn.Module, str, torch.Tensor]] = field(default_factory=list)
    folded: bool = False

    @contextmanager
    def given_back(self, chosen: Callable[[nn.Module, str], bool]) -> Iterator[None]:
        """For a while, the chosen modules as they were, and the parameters of layers whose modules are all chosen.

        chosen: (layer, name) → bool.
        """
        modules = [item for item in self.modules if chosen(item[0], item[1])]
        partly = {id(layer) for layer, name, _ in self.modules if not chosen(layer, name)}
        parameters = [item for item in self.parameters if id(item[0]) not in partly]
        replaced = [(layer, name, layer.get_submodule(name)) for layer, name, _ in modules]
        values = [(layer, name, layer.get_parameter(name).data) for layer, name, _ in parameters]
        try:
            self._put(modules, parameters)
            yield
        finally:
            self._put(replaced, values)

    @staticmethod
    def _put(
        modules: list[tuple[nn.Module, str, nn.Module]], parameters: list[tuple[nn.Module, str, torch.Tensor]]
    ) -> None:
        for layer, name, module in modules:
            layer.set_submodule(name, module)
        for layer, name, value in parameters:
            layer.get_parameter(name).data = value

    def restore(self) -> None:
        """Puts everything back."""
        for layer in {id(layer): layer for layer, _, _ in self.modules}.values():
            self.restore_layer(layer)

    def restore_layer(self, layer: nn.Module) -> None:
        """Puts one decoder layer back."""
        # What was taken apart is put back after its parts.
        modules = [item for item in reversed(self.modules) if item[0] is layer]
        self._put(modules, [item for item in self.parameters if item[0] is layer])
        self.modules = [item for item in self.modules if item[0] is not layer]
        self.parameters = [item for item in self.parameters if item[0] is not layer]


@dataclass(frozen=True)
class WalkResult:
    """reports: one per layer. tensors: what the method wants kept in the sidecar, by ``layer.name``. peak_bytes: on the
    device.
    """

    reports: list[LayerReport]
    tensors: dict[str, torch.Tensor]
    peak_bytes: int | None


def quantize_layers(
    model: nn.Module,
    method: WeightMethod,
    batches: list[torch.Tensor],
    coverage: list[Coverage],
    *,
    device: torch.device,
    seed: int = 0,
    undo: Undo | None = None,
    store: LayerStore | None = None,
    processes: Processes = ALONE,
    offload: Path | None = None,
    progress: Progress = lambda stage, done, total, text: None,
) -> WalkResult:
    """Quantizes the covered Linears of `model` in place. `method.group_size` must be resolved.

    batches: token ids, (batch, tokens) each. The model may be on any mix of devices, or offloaded by accelerate.
    store: layers it holds are put in place instead of being quantized, and the others are kept there. processes: those
    that do the same with the same batches, and share them. offload: a folder that finished layers wait in instead of in
    memory.
    """
    layers = decoder_layers(model)
    covered = {line.name for line in coverage if line.status == "quantized"}
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    calls = LayerCalls(model, layers, processes.share(batches))
    order = processes.order([tokens.shape for tokens in batches])
    inputs = [hidden.to(_home(device, calls.hidden)) for hidden in calls.hidden]
    calls.hidden.clear()
    reference = list(inputs) if method.needs_reference else None
    reports, tensors = [], {}
    for index, (name, layer) in enumerate(layers):
        linears = {
            child: module
            for child, module in layer.named_modules()
            if isinstance(module, nn.Linear) and f"{name}.{child}" in covered
        }
        schemes = {child: method.scheme_of(f"{name}.{child}") for child in linears}
        block = Block(
            name=name,
            module=layer,
            linears={child: linear for child, linear in linears.items() if schemes[child].weights == method.storage},
            nearest={child: linear for child, linear in linears.items() if schemes[child].weights != method.storage},
            folds=[],
            inputs=inputs,
            arguments=calls.of_layer(index, device),
            schemes=schemes,
            scale_dtype=next(iter(linears.values())).weight.dtype if linears else torch.bfloat16,
            device=device,
            reference=reference,
            seed=seed + index,
            progress=lambda text, index=index: progress("layers", index, len(layers), text),
            order=None if order is None else [((*shape, inputs[0].shape[-1]), place) for shape, place in order],
            combine=processes.sum_statistics,
        )
        kept = store.load(index) if store is not None else None
        processes.check_same(kept is not None, f"whether {name} is kept from an earlier run")
        report = quantize_layer(block, method, undo, kept, processes)
        if store is not None and kept is None and processes.first:
            store.save(index, to_keep(block, report))
        if offload is not None:
            for child, module in layer.named_modules():
                if isinstance(module, CompressedLinear):
                    place = offload / f"{name}.{child}"
                    place.mkdir()
                    park(module, place)
        tensors.update({f"{name}.{key}": tensor.cpu() for key, tensor in block.tensors.items()})
        del block, linears  # or the float weights would stay until the next layer is done
        reports.append(report)
        progress("layers", index + 1, len(layers), f"error {report.error:.2e}")
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    return WalkResult(reports, tensors, peak)


@torch.no_grad()
def quantize_layer(
    block: Block,
    method: WeightMethod,
    undo: Undo | None,
    kept: KeptLayer | None = None,
    processes: Processes = ALONE,
) -> LayerReport:
    """Quantizes one layer in place. Its outputs take the places of `block.inputs`, the float ones of `block.reference`.

    A layer without Linears to quantize is only run. kept: what an earlier run made of this layer.
    """
    started = time.perf_counter()
    home = next(block.module.parameters()).device
    home = torch.device("cpu") if home.type == "meta" else home
    with resident(block.module, block.device):
        check_finite(block.name, block.module)
        hidden = block.inputs[0]
        expected = block.run(hidden, 0)
        if block.reference is not None:
            advance(block, block.reference)
        if kept is not None:
            put_in_place(block, kept, undo, home)
        elif block.linears or block.nearest:
            if method.needs_data:
                prepare_experts(block, processes)
            commit(block, rounded(block, method), undo, home)
        processes.agree(block.module)
        # What is calibrated must not depend on how this device multiplies many tokens.
        keep_group_scales_exact(block.module)
        advance(block, block.inputs)
        keep_group_scales_exact(block.module, False)
        error = relative_error(block.inputs[0].to(block.device), expected, hidden.to(block.device))
    error = processes.first_of(error)  # which has the first batch
    if kept is not None:
        return still_as_reported(LayerReport(**kept.report), error)
    return LayerReport(block.name, error, time.perf_counter() - started, block.notes)


def advance(block: Block, states: list[torch.Tensor]) -> None:
    """Replaces the hidden states of every batch, (batch, tokens, hidden), by what the layer makes of them."""
    for index, hidden in enumerate(states):
        states[index] = block.run(hidden, index).to(hidden.device)


def rounded(block: Block, method: WeightMethod) -> dict[str, QuantizedWeight]:
    """Every Linear of the layer as the recipe stores it. Folds reach only what the method rounds."""
    found = {}
    if block.linears:
        block.folds = find_folds(block) if method.needs_data else []
        found = method.quantize(block)
    for name, linear in block.nearest.items():
        found[name] = round_fp8(linear.weight.detach().float(), block.scale_dtype)
    return found


def every_linear(block: Block) -> dict[str, nn.Linear]:
    """Linears that become packed, by name inside the layer and in its order."""
    mine = {**block.linears, **block.nearest}
    return {name: mine[name] for name in block.schemes}


def commit(block: Block, quantized: dict[str, QuantizedWeight], undo: Undo | None, home: torch.device) -> None:
    """Swaps the quantized Linears into the layer and stores the folded norm parameters.

    home: where what `undo` keeps waits.
    """
    replacements = {}
    for name, linear in every_linear(block).items():
        check_quantized(f"{block.name}.{name}", quantized[name], linear, block.schemes[name])
        bias = block.bias(name) if name in block.linears else linear.bias
        replacements[name] = CompressedLinear.from_quantized(quantized[name], bias, block.schemes[name])
    swap(block, replacements, block.norm_parameters(), block.folded, undo, home)


def put_in_place(block: Block, kept: KeptLayer, undo: Undo | None, home: torch.device) -> None:
    """`commit` for a layer that an earlier run quantized."""
    replacements = {}
    for name, linear in every_linear(block).items():
        replacements[name] = CompressedLinear.instead_of(linear, block.schemes[name], torch.device("meta"))
        replacements[name].load_state_dict(kept.linears[name], assign=True)
        replacements[name].to(block.device)
    block.tensors.update(kept.tensors)
    swap(block, replacements, kept.norms, kept.folded, undo, home)


def still_as_reported(report: LayerReport, error: float) -> LayerReport:
    """The report of a kept layer. ValueError if the layer does not have the error that it had when it was made."""
    if not math.isclose(report.error, error, rel_tol=0.05, abs_tol=1e-6):
        raise ValueError(
            f"the kept {report.name} changes its output by {error:.4g} and did so by {report.error:.4g} when it was "
            "quantized; its file is damaged: run without --resume"
        )
    return report


def to_keep(block: Block, report: LayerReport) -> KeptLayer:
    """What `put_in_place` needs of a layer that was just quantized."""
    linears = {name: dict(block.module.get_submodule(name).state_dict()) for name in block.schemes}
    return KeptLayer(linears, block.norm_parameters(), dict(block.tensors), block.folded, report.as_dict())


def swap(
    block: Block,
    replacements: dict[str, CompressedLinear],
    norms: dict[str, torch.Tensor],
    folded: bool,
    undo: Undo | None,
    home: torch.device,
) -> None:
    """Puts Linears and norm parameters into the layer."""
    for name, linear in every_linear(block).items():
        block.module.set_submodule(name, replacements[name])
        if undo is not None:
            undo.modules.append((block.module, name, linear))
            undo.folded |= folded
            linear.to(home)
    for name, value in norms.items():
        parameter = block.module.get_parameter(name)
        if undo is not None:
            undo.parameters.append((block.module, name, parameter.data.to(home, copy=True)))
        parameter.data = value.to(parameter.device, copy=True)


def relative_error(output: torch.Tensor, expected: torch.Tensor, hidden: torch.Tensor) -> float:
    """Energy of the difference over the energy of what the layer adds to its input."""
    added = (expected.float() - hidden.float()).square().sum().clamp_min(1e-30)
    return float((output.float() - expected.float()).square().sum() / added)


def check_finite(name: str, layer: nn.Module) -> None:
    """ValueError naming the tensor if a weight of the layer is NaN or infinite."""
    found = {
        child: torch.stack(parameter.aminmax()).isfinite().all()
        for child, parameter in layer.named_parameters()
        if parameter.is_floating_point() and parameter.device.type != "meta" and parameter.numel()
    }
    for child, finite in found.items():
        if not bool(finite):
            raise ValueError(f"{name}.{child} holds NaN or infinite values; the checkpoint is damaged")


def check_quantized(name: str, quantized: QuantizedWeight, linear: nn.Linear, scheme: WeightScheme) -> None:
    """ValueError if scales or codes are not what can be stored and multiplied; RuntimeError if a method gave others
    than it was asked for.
    """
    scale, codes = quantized.scale, quantized.codes
    wanted = (linear.out_features, scheme.groups(linear.in_features))
    if scale.shape != wanted or codes.shape != linear.weight.shape:
        raise RuntimeError(
            f"{name}: the method gave codes {tuple(codes.shape)} and scales {tuple(scale.shape)} for a weight "
            f"{tuple(linear.weight.shape)} in {scheme.describe()}, whose scales are {wanted}"
        )
    if not bool((scale.isfinite() & (scale != 0)).all()):
        raise ValueError(f"{name}: a scale is zero, NaN or infinite after quantization")
    if codes.is_floating_point() and not bool(codes.float().isfinite().all()):
        raise ValueError(f"{name}: a quantized weight is NaN or infinite")


def _home(device: torch.device, hidden: list[torch.Tensor]) -> torch.device:
    """Where hidden states wait between layers: on the device if two copies of them take under a quarter of what is free
    there.
    """
    if device.type != "cuda":
        return device
    needed = 2 * sum(tensor.numel() * tensor.element_size() for tensor in hidden)
    free, _ = torch.cuda.mem_get_info(device)
    return device if needed < free / 4 else torch.device("cpu")
