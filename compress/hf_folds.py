"""Where channel scales can be folded in a decoder layer, found by structure and proved by running the layer.

Three kinds: a norm into the Linears that read its output, v into o (per value channel and KV head), up into down. A
norm's readers are found by watching tensors, the other two by the names that every family of transformers uses. Each
fold is then tried with random powers of two; one that changes the layer's output is dropped and logged.
"""

from __future__ import annotations

import logging

import torch
from torch import nn

from ..quant.block import Block, Fold
from .coverage import experts_of
from .experts import Expert

log = logging.getLogger(__name__)

VALUE_PAIRS = (("v_proj", "o_proj"), ("v_proj", "dense"), ("v_proj", "out_proj"))
FUSED_VALUE_PAIRS = (("qkv_proj", "o_proj"),)
UP_PAIRS = (("up_proj", "down_proj"),)
FUSED_UP_PAIRS = (("gate_up_proj", "down_proj"),)
TOLERANCE = 0.05
"""Relative change of the output below which a fold counts as exact: bf16 rounding gives 0.01, a wrong fold about 1."""


def find_folds(block: Block) -> list[Fold]:
    """Folds of the block that leave its output as it is, in the order the layer runs."""
    return _that_hold(block, [*_norm_folds(block), *_row_folds(block)])


def _that_hold(block: Block, folds: list[Fold]) -> list[Fold]:
    """Those that leave the output as it is, found by halves: a layer of experts has hundreds."""
    if not folds or _holds(block, folds):
        return folds
    if len(folds) > 1:
        middle = len(folds) // 2
        return [*_that_hold(block, folds[:middle]), *_that_hold(block, folds[middle:])]
    log.warning("%s: folding %s changes the layer's output; it is left out", block.name, folds[0].name)
    return []


def _norm_folds(block: Block) -> list[Fold]:
    """One fold for each norm whose output is read by covered Linears only, and not by the router of a mixture."""
    outputs: list[tuple[str, torch.Tensor]] = []
    readers: dict[str, list[str]] = {}
    probes: dict[str, torch.Tensor] = {}

    def after_norm(name: str):
        def hook(module: nn.Module, args: tuple, output: torch.Tensor) -> None:
            outputs.append((name, output))
            probes[name] = args[0][..., :1, :]

        return hook

    def before_leaf(name: str):
        def hook(module: nn.Module, args: tuple) -> None:
            for source, tensor in outputs:
                if any(argument is tensor for argument in args):
                    readers.setdefault(source, []).append(name)

        return hook

    handles = []
    for name, module in block.module.named_modules():
        weight = getattr(module, "weight", None)
        if "norm" in type(module).__name__.lower() and isinstance(weight, torch.Tensor) and weight.ndim == 1:
            handles.append(module.register_forward_hook(after_norm(name)))
        if not any(module.children()):
            handles.append(module.register_forward_pre_hook(before_leaf(name)))
    try:
        with torch.no_grad():
            block.run(block.inputs[0], 0)
    finally:
        for handle in handles:
            handle.remove()
    folds = []
    # A router may read a view of what the Linears beside it read.
    routed = tuple(f"{name.rpartition('.')[0]}." for name in experts_of(block.module))
    for norm, consumers in readers.items():
        if all(name in block.linears and not name.startswith(routed) for name in consumers):
            size = block.module.get_submodule(norm).weight.numel()  # pyright: ignore[reportCallIssue]
            offset = _gain_offset(block.module.get_submodule(norm), probes[norm])
            folds.append(Fold(norm, norm, tuple(consumers), size, torch.arange(size), offset=offset))
    return folds


@torch.no_grad()
def _gain_offset(norm: nn.Module, probe: torch.Tensor) -> float:
    """1 if the norm multiplies by 1 + weight (as Gemma's does), else 0. probe: one token of its real input."""
    zeroed = {name: torch.zeros_like(parameter) for name, parameter in norm.named_parameters()}
    output = torch.func.functional_call(norm, zeroed, (torch.ones_like(probe),))
    return 1.0 if bool(output.abs().max() > 0) else 0.0


def _row_folds(block: Block) -> list[Fold]:
    """Folds of value rows into the output projection and of up rows into the down projection."""
    folds = []
    for parent, module in block.module.named_modules():
        prefix = f"{parent}." if parent else ""
        head_dim = getattr(module, "head_dim", None)

        def pair(source: str, target: str, prefix: str = prefix) -> tuple[nn.Linear, nn.Linear] | None:
            found = block.linears.get(prefix + source), block.linears.get(prefix + target)
            return None if found[0] is None or found[1] is None else (found[0], found[1])

        for source, target in VALUE_PAIRS + FUSED_VALUE_PAIRS:
            if (linears := pair(source, target)) and isinstance(head_dim, int):
                kv_size = linears[0].out_features
                if (source, target) in FUSED_VALUE_PAIRS:
                    kv_size = (kv_size - linears[1].in_features) // 2
                expand = _value_channels(linears[1].in_features, kv_size, head_dim)
                rows = torch.arange(linears[0].out_features - kv_size, linears[0].out_features)
                folds.append(Fold(prefix + source, prefix + source, (prefix + target,), kv_size, expand, rows))
        for source, target in up_pairs(module):
            if linears := pair(source, target):
                size = linears[1].in_features
                rows = torch.arange(linears[0].out_features - size, linears[0].out_features)
                folds.append(Fold(prefix + source, prefix + source, (prefix + target,), size, torch.arange(size), rows))
    return folds


def up_pairs(module: nn.Module) -> tuple[tuple[str, str], ...]:
    """Names of Linears of a module that may be its up and down projection. Of an expert they are known, and whether a
    scale can be moved between them is too: trying the layer says nothing where the expert gets no token.
    """
    if not isinstance(module, Expert):
        return UP_PAIRS + FUSED_UP_PAIRS
    _, up, down = module.names
    return ((up, down),) if module.gate.linear_in_up else ()


def _value_channels(in_features: int, kv_size: int, head_dim: int) -> torch.Tensor:
    """For each input channel of the output projection, the value channel it reads: (in_features,) long."""
    group = in_features // kv_size
    channel = torch.arange(in_features)
    return (channel // head_dim // group) * head_dim + channel % head_dim


@torch.no_grad()
def _holds(block: Block, folds: list[Fold]) -> bool:
    """Whether folding random powers of two leaves the output of the first batch as it is."""
    generator = torch.Generator().manual_seed(0)
    trial = Block(
        name=block.name,
        module=block.module,
        linears=block.linears,
        folds=[],
        inputs=block.inputs[:1],
        arguments=block.arguments[:1],
        schemes=block.schemes,
        scale_dtype=block.scale_dtype,
        device=block.device,
    )
    expected = trial.run(trial.inputs[0], 0).float()
    for fold in folds:
        trial.fold(fold, torch.exp2(torch.randint(-2, 3, (fold.size,), generator=generator).float()))
    replacements = {}
    for name in dict.fromkeys(name for fold in folds for name in (fold.source, *fold.consumers)):
        if (linear := block.linears.get(name)) is None:
            continue
        replacement = nn.Linear(linear.in_features, linear.out_features, bias=False, device="meta")
        replacement.weight = nn.Parameter(trial.weight(name).to(linear.weight.dtype), requires_grad=False)
        bias = trial.bias(name)
        replacement.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)  # pyright: ignore
        replacements[name] = replacement
    with trial.replaced(replacements):
        got = trial.run(trial.inputs[0], 0).float()
    change = (got - expected).norm() / (expected - trial.inputs[0].to(block.device).float()).norm().clamp_min(1e-12)
    return bool(change < TOLERANCE)
