"""transformers' mixtures of experts: what their fused tensors mean, and how they are taken apart.

The classes hold `gate_up_proj` and `down_proj`, (experts, …) each, and say beside them whether these are transposed,
interleaved or have biases. Checkpoints store most of them expert by expert under older names; which these are stands
in the conversions that transformers loads them by, and the Linears here get them, so that what is saved has the names
that every other reader of such checkpoints knows. A module of another form, or one that does not compute what its
Linears do when it is tried, is refused.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import Concatenate, MergeModulelist, WeightConverter, WeightRenaming

from ..quant.method import matches
from .coverage import experts_of, is_router
from .experts import Expert, Gate, SeparateExperts
from .hf_decoder import expert_modules, refuse_experts

log = logging.getLogger(__name__)
UNFUSED_NAMES = ("gate_proj", "up_proj", "down_proj")
"""What the Linears of experts are called that checkpoints store fused."""
SAMPLE = 2
"""Experts that are tried where there are no weights."""
TOLERANCE = 0.05
"""Relative difference between fused and separate experts: rounding to bf16 gives 0.01, a wrong reading about 1."""


class NotUnderstood(ValueError):
    """A mixture of experts that cannot be taken apart. why: the end of a sentence that says it."""

    def __init__(self, why: str):
        super().__init__(f"the experts of this model cannot be taken apart: {why}")
        self.why = why


@dataclass(frozen=True)
class Layout:
    """How a module holds its experts. names: of the Linears for gate, up and down.

    transposed: weights are (in, out). interleaved: gate and up alternate, instead of one behind the other.
    """

    names: tuple[str, str, str]
    experts: int
    transposed: bool
    interleaved: bool
    biased: bool


def layout_of(model: Any, name: str) -> Layout:
    """The layout of the mixture `name` of a transformers model. Raises NotUnderstood."""
    module = model.get_submodule(name)
    own = dict(module.named_parameters())
    biased = getattr(module, "has_bias", None) is True
    wanted = {"gate_up_proj", "down_proj"} | ({"gate_up_proj_bias", "down_proj_bias"} if biased else set())
    if set(own) != wanted or getattr(module, "has_gate", None) is not True or not hasattr(module, "_apply_gate"):
        raise NotUnderstood("it is not made of gate_up_proj and down_proj as transformers makes them")
    if getattr(module, "has_post_expert_norm", False) or getattr(module, "_is_expert_parallel", False):
        raise NotUnderstood("its experts are normalised or spread over devices")
    if getattr(module, "_hf_hook", None) is not None and own["down_proj"].is_meta:
        raise NotUnderstood("its weights wait on the disk, where they are not taken apart")
    count, transposed = len(own["down_proj"]), module.is_transposed
    hidden, width = own["down_proj"].shape[1:] if not transposed else own["down_proj"].shape[:0:-1]
    fused = (hidden, 2 * width) if transposed else (2 * width, hidden)
    if own["gate_up_proj"].shape != (count, *fused):
        raise NotUnderstood(f"its gate_up_proj has shape {tuple(own['gate_up_proj'].shape)}")
    return Layout(stored_names(model, name), count, transposed, not module.is_concatenated, biased)


def stored_names(model: Any, name: str) -> tuple[str, str, str]:
    """What a checkpoint calls the Linears of the mixture `name`. Raises NotUnderstood."""
    pair = _sources(model, f"{name}.gate_up_proj", [MergeModulelist, Concatenate])
    down = _sources(model, f"{name}.down_proj", [MergeModulelist])
    if not pair and not down:
        return UNFUSED_NAMES
    if len(pair) != 2 or len(down) != 1:
        raise NotUnderstood("transformers does not make it of one gate, up and down of each expert")
    return pair[0], pair[1], down[0]


def stored_fused(model: Any, name: str) -> bool:
    """Whether checkpoints hold the experts of the mixture `name` in one tensor, which is what other readers want."""
    return not _sources(model, f"{name}.down_proj", [MergeModulelist])


def _sources(model: Any, target: str, operations: list[type]) -> list[str]:
    """Last names of the Linears that transformers fuses into `target`; none if it is stored as it is."""
    for converter in get_model_conversion_mapping(model):
        if not isinstance(converter, WeightConverter) or not any(
            f".{target}".endswith(pattern.removesuffix("$")) for pattern in converter._original_target_patterns
        ):
            continue
        sources, (pattern, *others) = converter._original_source_patterns, converter._original_target_patterns
        if not any("*" in source for source in sources):
            return []
        outer = pattern.removesuffix("$").rpartition(".")[0]
        parts = [source.removesuffix("$").removesuffix(".weight").removeprefix(f"{outer}.*.") for source in sources]
        merged = [type(operation) for operation in converter.operations] == operations
        if others or not merged or not all(part.isidentifier() for part in parts):
            raise NotUnderstood("transformers makes it of tensors that are no weights of single Linears")
        return parts
    return []


def separate_experts(model: Any, names: Iterable[str], *, sample: bool = False) -> dict[str, nn.Module]:
    """Takes the mixtures `names` of a transformers model apart, in place; weights are shared, not copied, where their
    layout allows. Returns the fused modules that were there. Raises NotUnderstood before anything is changed.

    Works on models without storage; with weights, the first mixture of every class is run both ways. sample: without
    them too, on a few experts of random weights.
    """
    layouts = {name: layout_of(model, name) for name in names}
    tried: set[type] = set()
    for name, layout in layouts.items():
        fused = model.get_submodule(name)
        if type(fused) not in tried and (sample or not fused.down_proj.is_meta):
            tried.add(type(fused))
            trial, few = (sampled(fused), replace(layout, experts=SAMPLE)) if sample else (fused, layout)
            if not computes_alike(trial, separated(trial, few)):
                raise NotUnderstood("it does not compute what its gate, up and down projections alone would")
    found = {}
    for name, layout in layouts.items():
        found[name] = model.get_submodule(name)
        model.set_submodule(name, separated(found[name], layout))
    return found


def sampled(fused: Any) -> Any:
    """The same module with a few experts of random weights, in float32 on the CPU."""
    few, generator = copy.copy(fused), torch.Generator().manual_seed(0)
    few.num_experts, few._parameters = SAMPLE, {}
    for name, parameter in fused.named_parameters():
        values = torch.randn((SAMPLE, *parameter.shape[1:]), generator=generator, device="cpu")
        few._parameters[name] = nn.Parameter(values / parameter.shape[-1] ** 0.5, requires_grad=False)
    return few


def separated(fused: Any, layout: Layout) -> SeparateExperts:
    """The experts of a fused module as Linears, on its device and in its dtype."""
    gate = gate_of(fused, layout)
    experts = []
    for index in range(layout.experts):
        both, down = fused.gate_up_proj.data[index], fused.down_proj.data[index]
        biases: list[Tensor | None] = [None, None, None]
        if layout.biased:
            biases = [*_halves(fused.gate_up_proj_bias.data[index], layout), fused.down_proj_bias.data[index]]
        if layout.transposed:
            both, down = both.T, down.T
        weights = [*_halves(both, layout), down]
        linears = [_linear(weight, bias) for weight, bias in zip(weights, biases, strict=True)]
        experts.append(Expert(layout.names, (linears[0], linears[1], linears[2]), gate))
    return SeparateExperts(experts).train(fused.training)


def _halves(both: Tensor, layout: Layout) -> list[Tensor]:
    """Gate and up, of rows that hold both."""
    return [both[::2], both[1::2]] if layout.interleaved else list(both.chunk(2))


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta", dtype=weight.dtype)
    linear.weight = nn.Parameter(weight.contiguous(), requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias.contiguous(), requires_grad=False)
    return linear


def gate_of(fused: Any, layout: Layout) -> Gate:
    """The gate of a fused module, without its weights."""
    shell = copy.copy(fused)
    shell._parameters = {}
    if getattr(type(fused)._apply_gate, "__name__", "") == "_default_apply_gate":
        return Gate(lambda gate, up: shell.act_fn(gate) * up, linear_in_up=True)

    def apply(gate: Tensor, up: Tensor) -> Tensor:
        both = torch.stack((gate, up), -1).flatten(-2) if layout.interleaved else torch.cat((gate, up), -1)
        return shell._apply_gate(both)

    return Gate(apply, linear_in_up=False)


@torch.no_grad()
def computes_alike(fused: Any, separate: SeparateExperts) -> bool:
    """Whether both give the same, but for rounding, when every expert gets two of some random tokens."""
    weight, count = fused.down_proj, len(fused.down_proj)
    hidden = weight.shape[2 if fused.is_transposed else 1]
    x = torch.randn(count, hidden, generator=torch.Generator().manual_seed(0), device="cpu").to(weight)
    first = torch.arange(count, device=weight.device)
    index = torch.stack((first, (first + 1) % count), -1) if count > 1 else first[:, None]
    share = torch.linspace(0.25, 0.75, index.numel(), device="cpu").view(index.shape).to(weight)
    expected = fused(x, index, share).float()
    return bool((separate(x, index, share).float() - expected).norm() <= TOLERANCE * expected.norm())


def take_apart_before_loading(model: Any) -> None:
    """`separate_experts` for a model without storage whose checkpoint holds its experts one by one; mixtures that are
    not understood, or stored fused, stay as they are.
    """
    try:
        separate_experts(model, [name for name in experts_of(model) if not stored_fused(model, name)], sample=True)
    except NotUnderstood as error:
        log.warning("%s", error)


def take_apart(model: Any, layers: list[tuple[str, nn.Module]], ignore: Collection[str]) -> dict[str, nn.Module]:
    """`separate_experts` for the mixtures of the decoder layers, all of them unless `ignore` keeps them all.

    ValueError, with their share of the weights, for one that is not understood.
    """
    fused = {name: module for name, module in expert_modules(layers).items() if not isinstance(module, SeparateExperts)}
    if all(matches(name, ignore) for name in fused):
        return {}
    try:
        return separate_experts(model, fused)
    except NotUnderstood as error:
        refuse_experts(layers, why=error.why, ignore=ignore)
        raise


def without_fusing(conversions: list[Any]) -> list[Any]:
    """transformers' conversions of a checkpoint without those that fuse experts."""
    return [
        item
        for item in conversions
        if not isinstance(item, WeightConverter)
        or not any(".experts." in f".{target}" for target in item._original_target_patterns)
    ]


def names_in_memory(model: Any, stored: Iterable[str]) -> dict[str, str]:
    """What the tensors of a checkpoint are called in the model, where transformers renames them: stored → in memory.

    A name that no renaming leads to a module of the model stands for itself.
    """
    modules = {name for name, _ in model.named_modules()}
    renamings = [item for item in get_model_conversion_mapping(model) if isinstance(item, WeightRenaming)]
    found = {}
    for name in stored:
        renamed = name
        for renaming in () if name.rpartition(".")[0] in modules else renamings:
            renamed, _ = renaming.rename_source_key(renamed)
        found[name] = renamed if renamed.rpartition(".")[0] in modules else name
    return found


def unpacked_beside_experts(model: Any) -> list[str]:
    """Names of what readers of a quantized checkpoint must not take for packed, beside Linears: routers, and mixtures
    that were kept, as they are called in memory and in files.
    """
    experts = experts_of(model)
    fused = [name for name in experts if not isinstance(model.get_submodule(name), SeparateExperts)]
    routers = [name for name, module in model.named_modules() if is_router(name, experts)]
    kept = [name for name in [*fused, *routers] if not isinstance(model.get_submodule(name), nn.Linear)]
    return list(dict.fromkeys([*kept, *(as_stored(model, name) for name in kept)]))


def as_stored(model: Any, name: str) -> str:
    """What a module of the model is called in files."""
    name = f"{name}."
    for item in reversed(get_model_conversion_mapping(model)):
        if isinstance(item, WeightRenaming):
            name, _ = item.reverse_transform().rename_source_key(name)
    return name.removesuffix(".")
