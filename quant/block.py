"""One decoder layer as a weight method sees it: float weights, calibration inputs, second moments, folds.

Folding a positive scale s into the input channels of a Linear (W·s) and 1/s into whatever produces those channels
leaves the layer's function as it is. A block keeps the folded scales beside the weights and applies them on demand, so
the float layer stays intact until the pipeline commits the result; statistics are transformed along (x' = x/s, so
H' = H/(s sᵀ)).

Second moments are weighted per token by how much an error of that Linear at that token changes the layer's output. The
output's error counts relative to the token's own size, Σ_t ‖δ_t‖²/‖h_t‖², because the next norm divides by it. With r_t
random signs over ‖h_t‖, the gradient g of Σ_t r_t·h_t at a Linear's output y has E g² equal to the Gauss–Newton
diagonal. Output channels share one H, each counted by its own energy, which no folding changes: H = Σ_t w_t x_t x_tᵀ
with w_t = mean_c(g_tc² · mean_t y_tc²). Plain GPTQ weighs tokens equally and misses the first token of a sequence: its
value vector is close to zero, every later token attends to it, and an error there spreads over the whole sequence.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn
from torch.linalg import vector_norm

from .method import WeightScheme


@dataclass(frozen=True)
class Fold:
    """A place where a channel scale can be moved without changing the function.

    source: name of the module that produces the channels: a norm (its gain is divided by s) or a Linear (its output
    rows are).
    consumers: names of the Linears that read the channels (their input columns are multiplied by s).
    size: number of free scales. expand: (in_features of the consumers,) long, the scale each input channel uses.
    rows: for a Linear source, its output rows that carry the scales, in scale order; None for a norm.
    offset: value added to a norm's stored weight before use (1 where the gain is 1 + weight).
    """

    name: str
    source: str
    consumers: tuple[str, ...]
    size: int
    expand: torch.Tensor
    rows: torch.Tensor | None = None
    offset: float = 0.0


@dataclass
class InputStatistics:
    """Second moments of the input of one Linear.

    hessian: (in, in) float32, mean over tokens of weight · x xᵀ. abs_mean: (in,) float32, mean of |x|. energy: ()
    float32, mean square of the output; tr(D H Dᵀ) over it compares between the Linears of a layer.
    """

    hessian: torch.Tensor
    abs_mean: torch.Tensor
    energy: torch.Tensor
    tokens: int = 0

    @classmethod
    def zeros(cls, size: int, device: torch.device) -> InputStatistics:
        """Nothing seen yet. size: in_features."""
        hessian, abs_mean, energy = (torch.zeros(shape, device=device) for shape in ((size, size), (size,), ()))
        return cls(hessian, abs_mean, energy)

    def update(self, x: torch.Tensor, output: torch.Tensor, gradient: torch.Tensor | None) -> None:
        """Adds a batch. x: (…, in). output, gradient: (…, out); without a gradient all tokens count alike."""
        x, output = x.reshape(-1, x.shape[-1]), output.reshape(-1, output.shape[-1])
        total = self.tokens + x.shape[0]
        keep, share = self.tokens / total, 1 / total
        # Norms and products with float32 vectors make no float32 copy of what they read.
        channel_size = vector_norm(output, dim=0, dtype=torch.float32) / x.shape[0] ** 0.5
        scaled = x.float()
        if gradient is not None:
            felt = vector_norm(gradient.reshape(output.shape) * channel_size, dim=-1, keepdim=True)
            scaled = x * (felt / output.shape[1] ** 0.5)
        self.hessian.addmm_(scaled.T, scaled, beta=keep, alpha=share)
        self.abs_mean.mul_(keep).add_(vector_norm(x, 1, dim=0, dtype=torch.float32), alpha=share)
        self.energy.mul_(keep).add_(channel_size.square().mean(), alpha=1 - keep)
        self.tokens = total

    def divide(self, scale: torch.Tensor) -> None:
        """Turns the moments of x into those of x / scale. scale: (in,)."""
        self.hessian.div_(scale.unsqueeze(0)).div_(scale.unsqueeze(1))
        self.abs_mean.div_(scale)


@dataclass
class Block:
    """One decoder layer on the compute device.

    linears: the Linears that the method rounds, by name inside the layer; schemes: how each is stored. nearest: those
    that the recipe stores in FP8 beside them, with their schemes; the method does not see them. inputs: hidden states
    per batch, (batch, tokens, hidden). arguments: what else the layer is called with, per batch. reference: the float
    model's output of this layer per batch, present when the method's `needs_reference` is set. scale_dtype: the dtype
    group scales are stored in.

    Where several processes share the calibration text, `inputs` is the part of this one. order: for every batch of all
    processes, the shape of its hidden states and its place in `inputs`, None if it is elsewhere. combine: makes the
    moments of this process's tokens those of all.

    rarely_run: Linears that run on few tokens, by which nothing should be learned. observing: entered while inputs are
    observed, so that these Linears may be shown others.
    """

    name: str
    module: nn.Module
    linears: dict[str, nn.Linear]
    folds: list[Fold]
    inputs: list[torch.Tensor]
    arguments: list[tuple[tuple, dict]]
    schemes: Mapping[str, WeightScheme]
    scale_dtype: torch.dtype
    device: torch.device
    reference: list[torch.Tensor] | None = None
    seed: int = 0
    progress: Callable[[str], None] = lambda text: None
    nearest: Mapping[str, nn.Linear] = field(default_factory=dict)
    order: Sequence[tuple[Sequence[int], int | None]] | None = None
    combine: Callable[[dict[str, InputStatistics]], None] = lambda found: None
    rarely_run: frozenset[str] = frozenset()
    observing: Callable[[], AbstractContextManager[None]] = nullcontext
    notes: dict[str, Any] = field(default_factory=dict)
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    _columns: dict[str, torch.Tensor] = field(default_factory=dict)
    _rows: dict[str, torch.Tensor] = field(default_factory=dict)
    _gains: dict[str, tuple[torch.Tensor, torch.Tensor | None]] = field(default_factory=dict)
    _statistics: dict[str, InputStatistics] | None = None

    def group_size(self, name: str) -> int | None:
        """Consecutive inputs of a Linear that share a scale; None is one scale per output channel."""
        return self.schemes[name].group_size

    def weight(self, name: str) -> torch.Tensor:
        """Weight of a Linear with every fold applied: (out, in) float32, a copy."""
        weight = self.linears[name].weight.detach().to(torch.float32, copy=True)
        if name in self._columns:
            weight *= self._columns[name]
        if name in self._rows:
            weight /= self._rows[name].unsqueeze(1)
        return weight

    def bias(self, name: str) -> torch.Tensor | None:
        """Bias of a Linear with every fold applied, in its own dtype."""
        bias = self.linears[name].bias
        if bias is None or name not in self._rows:
            return bias
        return (bias.float() / self._rows[name]).to(bias.dtype)

    @property
    def folded(self) -> bool:
        """Whether any channel scale has been moved."""
        return bool(self._columns)

    def norm_parameters(self) -> dict[str, torch.Tensor]:
        """New values of the norm parameters that folds have changed, by name inside the layer."""
        changed = {}
        for source, (weight, bias) in self._gains.items():
            changed[f"{source}.weight"] = weight
            if bias is not None:
                changed[f"{source}.bias"] = bias
        return changed

    def fold(self, fold: Fold, scale: torch.Tensor) -> None:
        """Moves `scale` (size,), positive, from the source of `fold` into its consumers.

        A norm's gain is stored rounded to its own dtype; the scale its consumers get is the one that the rounded gain
        implies, so that the fold is exact.
        """
        scale = scale.float().to(self.device)
        if not bool(((scale > 0) & scale.isfinite()).all()):
            raise ValueError(f"{self.name}: the scale of fold {fold.name!r} must be positive and finite")
        if fold.rows is None:
            scale = self._fold_norm(fold, scale)
        else:
            rows = self._rows.setdefault(
                fold.source, torch.ones(self.linears[fold.source].out_features, device=self.device)
            )
            rows[fold.rows.to(self.device)] *= scale
        expanded = scale[fold.expand.to(self.device)]
        for name in fold.consumers:
            columns = self._columns.setdefault(name, torch.ones(self.linears[name].in_features, device=self.device))
            columns *= expanded
            if self._statistics is not None:
                self._statistics[name].divide(expanded)

    def _fold_norm(self, fold: Fold, scale: torch.Tensor) -> torch.Tensor:
        norm: Any = self.module.get_submodule(fold.source)
        stored, bias = self._gains.get(fold.source, (norm.weight.detach(), getattr(norm, "bias", None)))
        gain = stored.float() + fold.offset
        rounded = (gain / scale - fold.offset).to(stored.dtype)
        new_gain = rounded.float() + fold.offset
        usable = (new_gain != 0) & (gain != 0)
        rounded = torch.where(usable, rounded, stored)
        implied = torch.where(
            usable, gain / torch.where(usable, new_gain, torch.ones_like(gain)), torch.ones_like(gain)
        )
        new_bias = None if bias is None else (bias.detach().float() / implied).to(bias.dtype)
        self._gains[fold.source] = (rounded, new_bias)
        return implied

    def anew(self, linears: Mapping[str, nn.Linear], schemes: Mapping[str, WeightScheme]) -> Block:
        """The same layer for another rounding of some of its Linears: nothing folded, with a copy of the moments if
        they were collected.
        """
        moments = copy.deepcopy(self._statistics)
        fresh: dict[str, Any] = {key: {} for key in ("notes", "tensors", "nearest", "_columns", "_rows", "_gains")}
        return replace(self, linears=dict(linears), schemes=dict(schemes), folds=[], _statistics=moments, **fresh)

    @contextmanager
    def replaced(self, modules: Mapping[str, nn.Module]) -> Iterator[None]:
        """Runs the layer with `modules` in place of its Linears and with folded norms, then puts everything back."""
        changed = self.norm_parameters()
        originals = {name: self.module.get_parameter(name).detach().clone() for name in changed}
        try:
            for name, module in modules.items():
                self.module.set_submodule(name, module)
            for name, value in changed.items():
                self.module.get_parameter(name).data.copy_(value)
            yield
        finally:
            for name in modules:
                self.module.set_submodule(name, self.linears[name])
            for name, value in originals.items():
                self.module.get_parameter(name).data.copy_(value)

    def run(self, hidden: torch.Tensor, index: int) -> torch.Tensor:
        """Output hidden states of the layer for `hidden` with the other arguments of batch `index`."""
        args, kwargs = self.arguments[index]
        output = self.module(hidden.to(self.device), *args, **kwargs)
        return output[0] if isinstance(output, tuple) else output

    @property
    def statistics(self) -> dict[str, InputStatistics]:
        """Second moments of the input of each Linear, from one pass over the calibration inputs (the first time)."""
        if self._statistics is None:
            self._statistics = self._collect()
        return self._statistics

    def take_statistics(self, name: str) -> InputStatistics:
        """Statistics of a Linear for the last time: the block forgets them, so that their memory can be used again."""
        return self.statistics.pop(name)

    def _collect(self) -> dict[str, InputStatistics]:
        """One forward and one backward pass per batch; see the module docstring for the weights of the tokens."""
        assert not self._columns, "statistics are collected before anything is folded"
        found: dict[str, InputStatistics] = {}
        generator = torch.Generator(self.device).manual_seed(self.seed)
        order = (
            [(hidden.shape, index) for index, hidden in enumerate(self.inputs)] if self.order is None else self.order
        )
        for shape, index in order:
            # Drawn for every batch, so that a batch has the same signs whichever process has it.
            signs = torch.randint(0, 2, tuple(shape), generator=generator, device=self.device) * 2.0 - 1
            if index is None:
                continue
            calls = self._probe(index, signs)
            while calls:
                name, x, y, gradient = calls.pop()
                if name not in found:
                    found[name] = InputStatistics.zeros(x.shape[-1], x.device)
                found[name].update(x, y, gradient)
        if self.order is not None:
            for name, linear in self.linears.items():
                found.setdefault(name, InputStatistics.zeros(linear.in_features, self.device))
            found = {name: found[name] for name in self.linears}
        self.combine(found)
        missing = [name for name in self.linears if name not in found or found[name].tokens == 0]
        if missing:
            raise ValueError(f"{self.name}: {', '.join(missing)} never ran on the calibration text; add it to `ignore`")
        return found

    def _probe(
        self, index: int, signs: torch.Tensor
    ) -> list[tuple[str, torch.Tensor, torch.Tensor, torch.Tensor | None]]:
        """Every call of a Linear in batch `index`: its name, input (…, in), output (…, out), and the gradient of
        Σ_t r_t·h_t at that output. signs: those of r, in the shape of the hidden states.
        """
        calls: list[tuple[str, torch.Tensor, torch.Tensor]] = []

        def observe(name: str) -> Callable:
            def hook(module: nn.Module, args: tuple, output: torch.Tensor) -> None:
                calls.append((name, args[0].detach(), output))

            return hook

        handles = [linear.register_forward_hook(observe(name)) for name, linear in self.linears.items()]
        try:
            with torch.enable_grad(), self.observing():
                output = self.run(self.inputs[index].detach().to(self.device).requires_grad_(), index)
        finally:
            for handle in handles:
                handle.remove()
        weight = token_weight(output.detach())
        # Mean 1, so that gradients stay in the range of half precision.
        probe = (signs * (weight / weight.mean()).sqrt().unsqueeze(-1)).to(output.dtype)
        gradients = torch.autograd.grad(output, [call[2] for call in calls], probe, allow_unused=True)
        return [(name, x, y.detach(), gradient) for (name, x, y), gradient in zip(calls, gradients, strict=True)]


def token_weight(hidden: torch.Tensor) -> torch.Tensor:
    """1 / mean square of each token: what an error in `hidden` counts for whoever normalises it. (…, hidden) → (…,)."""
    return hidden.float().square().mean(-1).clamp_min(1e-12).reciprocal()
