"""SignRound (AutoRound): learn where to round, and how wide each group's range is, from the layer's own output.

A weight becomes s·a·clamp(round(w/(s·a) + v), −8, 7); v ∈ [−½, ½] per weight and the range factor a per group are learned by
signed gradient descent on the squared error of the decoder layer's output against the *float model's* output (Cheng et
al., 2023). Rounding passes gradients straight through; FP8 input rounding takes part in the forward pass. The learning
rate falls linearly to zero. The result is kept only where it beats plain rounding on all calibration samples.

Differences from AutoRound: the start is the scale with the least E[x_j²]-weighted error rather than the full range, and
the last iterate is compared with the first on all samples, where AutoRound keeps the best mini-batch.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import nn
from torch.nn import functional

from .block import Block
from .folding import choose_fold, consumer_mean, normalised
from .grid import E4M3_MAX, QMAX, QMIN, Snap, grouped, search_scale, storage_snap
from .method import QuantizedWeight, WeightMethod

RANGE_MIN, RANGE_MAX = 0.5, 1.5
FOLD_RATIOS = tuple(step / 10 for step in range(10))


@dataclass(frozen=True, kw_only=True)
class SignRound(WeightMethod):
    """SignRound INT4.

    steps: updates per decoder layer. samples_per_step: sequences whose gradients are added up in one update.
    learning_rate: first step of v and a; None is 1/steps. channel_scaling: fold AWQ's channel scales first.
    """

    needs_reference: ClassVar[bool] = True
    steps: Annotated[int, Field(ge=1)] = 200
    samples_per_step: Annotated[int, Field(ge=1)] = 8
    learning_rate: Annotated[float, Field(gt=0)] | None = None
    channel_scaling: bool = False

    def quantize(self, block: Block) -> dict[str, QuantizedWeight]:
        """See `WeightMethod.quantize`."""
        snap = storage_snap(block.scale_dtype)
        if self.channel_scaling:
            for fold in block.folds:
                magnitude = consumer_mean(fold, block.statistics[fold.consumers[0]].abs_mean).clamp_min(1e-6)
                choose_fold(
                    block, fold, FOLD_RATIOS, lambda ratio, magnitude=magnitude: normalised(magnitude**ratio), snap
                )
        rounded = {name: RoundedLinear(block, name, snap) for name in block.linears}
        with block.replaced(rounded), torch.enable_grad():
            first = total_loss(block)
            self._learn(block, rounded)
            last = total_loss(block)
        if last > first:
            for linear in rounded.values():
                linear.forget()
        block.notes["signround"] = {"loss_before": first, "loss_after": min(first, last)}
        return {name: linear.quantized(block.scale_dtype) for name, linear in rounded.items()}

    def _learn(self, block: Block, rounded: dict[str, RoundedLinear]) -> None:
        generator = torch.Generator().manual_seed(block.seed)
        rate = self.learning_rate or 1 / self.steps
        parameters = [parameter for linear in rounded.values() for parameter in (linear.offset, linear.range)]
        batches = _batches(block, self.samples_per_step, generator)
        for step in range(self.steps):
            losses = [layer_loss(block, index) for index in next(batches)]
            gradients = torch.autograd.grad(losses, parameters)
            size = rate * (1 - step / self.steps)
            with torch.no_grad():
                for parameter, gradient in zip(parameters, gradients, strict=True):
                    parameter.sub_(gradient.sign_(), alpha=size)
                for linear in rounded.values():
                    linear.clamp()
            if step % 20 == 19:
                block.progress(f"step {step + 1}/{self.steps}")


def _batches(block: Block, samples: int, generator: torch.Generator) -> Iterator[list[int]]:
    """Endless random lists of batch indices that hold about `samples` sequences each; every epoch is a permutation."""
    per_step = max(1, samples // block.inputs[0].shape[0])
    queue: list[int] = []
    while True:
        while len(queue) < per_step:
            queue += torch.randperm(len(block.inputs), generator=generator).tolist()
        yield queue[:per_step]
        del queue[:per_step]


def layer_loss(block: Block, index: int) -> torch.Tensor:
    """Mean squared error of the layer's output on batch `index` against the float model's."""
    assert block.reference is not None
    return functional.mse_loss(
        block.run(block.inputs[index], index).float(), block.reference[index].to(block.device).float()
    )


@torch.no_grad()
def total_loss(block: Block) -> float:
    """`layer_loss` over all batches, mean."""
    return float(torch.stack([layer_loss(block, index) for index in range(len(block.inputs))]).mean())


class _FakeQuantize(torch.autograd.Function):
    """s·a·clamp(round(w/(s·a) + v)) with the gradient of the rounding taken as 1 inside the range."""

    @staticmethod
    def forward(ctx: Any, weight: torch.Tensor, offset: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        ratio = weight / scale
        codes = torch.round(ratio + offset)
        inside = (codes >= QMIN) & (codes <= QMAX)
        codes = codes.clamp_(QMIN, QMAX)
        ctx.save_for_backward(ratio, codes, inside, scale)
        return codes * scale

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor):
        ratio, codes, inside, scale = ctx.saved_tensors
        grad = grads[0]
        return None, grad * scale * inside, (grad * (codes - ratio * inside)).sum(-1, keepdim=True)


def fake_fp8(x: torch.Tensor) -> torch.Tensor:
    """x rounded to e4m3 with one scale per token; the gradient passes straight through. x: (…, in)."""
    with torch.no_grad():
        amax = x.float().abs().amax(-1, keepdim=True)
        scale = torch.where(amax == 0, torch.ones_like(amax), amax / E4M3_MAX)
        rounded = ((x.float() / scale).to(torch.float8_e4m3fn).float() * scale).to(x.dtype)
    return x + (rounded - x).detach() if x.requires_grad else rounded


class RoundedLinear(nn.Module):
    """A Linear whose weight is rounded with learnable offsets and ranges."""

    def __init__(self, block: Block, name: str, snap: Snap):
        super().__init__()
        self.snap, self.fp8 = snap, block.scheme.activations == "fp8"
        weight = block.weight(name)
        self.shape, self.dtype, self.bias = weight.shape, block.linears[name].weight.dtype, block.bias(name)
        self.weight = grouped(weight, block.scheme.group_size)
        importance = grouped(block.statistics[name].hessian.diagonal().unsqueeze(0), block.scheme.group_size)
        self.start = search_scale(self.weight, importance, snap).unsqueeze(-1)
        self.offset = nn.Parameter(torch.zeros_like(self.weight))
        self.range = nn.Parameter(torch.ones_like(self.start))

    def scale(self) -> torch.Tensor:
        """(out, groups, 1): start·range, rounded to what is stored; the gradient ignores that rounding."""
        scale = self.start * self.range
        return scale + (self.snap(scale) - scale).detach()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = _FakeQuantize.apply(self.weight, self.offset, self.scale())
        return functional.linear(fake_fp8(x) if self.fp8 else x, weight.view(self.shape).to(self.dtype), self.bias)

    def clamp(self) -> None:
        """Keeps offsets within half a step and ranges within their limits."""
        self.offset.data.clamp_(-0.5, 0.5)
        self.range.data.clamp_(RANGE_MIN, RANGE_MAX)

    def forget(self) -> None:
        """Back to plain rounding."""
        self.offset.data.zero_()
        self.range.data.fill_(1)

    @torch.no_grad()
    def quantized(self, scale_dtype: torch.dtype) -> QuantizedWeight:
        """The learned codes (out, in) and scales (out, groups)."""
        scale = self.snap(self.start * self.range)
        codes = torch.round(self.weight / scale + self.offset).clamp_(QMIN, QMAX)
        return QuantizedWeight(codes.view(self.shape).to(torch.int8), scale.squeeze(-1).to(scale_dtype))
