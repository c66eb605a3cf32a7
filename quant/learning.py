"""Learning where to round, and how wide each group's range is, from the output of the whole decoder layer.

A weight becomes s·a·clamp(round(w/(s·a) + v), −8, 7); v ∈ [−½, ½] per weight and the range factor a per group follow
the sign of the gradient of

    mean over tokens of ‖layer(x) − h‖² / ‖h‖²

where x are the *quantized* model's hidden states and h the float model's output. Rounding passes gradients straight
through; FP8 input rounding takes part in the forward pass. The step falls linearly to zero. The result is kept only
where it beats the start on all calibration samples.

Dividing by ‖h‖² is what the next norm does. Without it the loss hears little but the first token of each sequence: its
hidden state is some thousand times larger than the others' in many models.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from .block import Block, token_weight
from .grid import E4M3_MAX, QMAX, QMIN, Snap, grouped
from .method import QuantizedWeight
from .solver import Rounded

RANGE_MIN, RANGE_MAX = 0.5, 1.5


def learn_rounding(
    block: Block, start: dict[str, Rounded], snap: Snap, *, steps: int, samples_per_step: int, learning_rate: float
) -> dict[str, QuantizedWeight]:
    """Codes and scales learned from `start`, for every Linear of the block. The losses are noted in `block.notes`.

    samples_per_step: sequences whose gradients are added up in one update. learning_rate: first step of v and a.
    Linears of `block.rarely_run` stay at their start.
    """
    shared = SharedInput(any(block.schemes[name].activations == "fp8" for name in start))
    linears = {name: LearnedLinear(block, name, rounded, snap, shared) for name, rounded in start.items()}
    learned = [linear for name, linear in linears.items() if name not in block.rarely_run]
    parameters = [parameter for linear in learned for parameter in (linear.offset, linear.range)]
    batches = _batches(block, samples_per_step, torch.Generator().manual_seed(block.seed))
    with block.replaced(linears), torch.enable_grad():
        first = total_loss(block)
        for step in range(steps):
            gradients = summed_gradients(block, next(batches), parameters)
            with torch.no_grad():
                size = learning_rate * (1 - step / steps)
                for parameter, gradient in zip(parameters, gradients, strict=True):
                    parameter.sub_(gradient.sign_(), alpha=size)
                for linear in linears.values():
                    linear.clamp()
            if step % 20 == 19:
                block.progress(f"step {step + 1}/{steps}")
        last = total_loss(block)
    if not last <= first:
        for linear in linears.values():
            linear.forget()
    block.notes["learning"] = {"loss_before": first, "loss_after": last if last <= first else first}
    return {name: linear.quantized(block.scale_dtype) for name, linear in linears.items()}


def summed_gradients(block: Block, indices: list[int], parameters: list[nn.Parameter]) -> list[torch.Tensor]:
    """Gradients of the summed losses of some batches, one batch's graph at a time; 0 for experts without tokens."""
    total = batch_gradients(block, indices[0], parameters)
    for index in indices[1:]:
        for kept, gradient in zip(total, batch_gradients(block, index, parameters), strict=True):
            kept.add_(gradient)
    return total


def batch_gradients(block: Block, index: int, parameters: list[nn.Parameter]) -> list[torch.Tensor]:
    """Gradients of the loss of one batch."""
    loss = layer_loss(block, index)
    return list(torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True))


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
    """Mean over the tokens of batch `index` of ‖output − float output‖² / ‖float output‖²."""
    assert block.reference is not None
    expected = block.reference[index].to(block.device)
    error = (block.run(block.inputs[index], index) - expected).float().square().mean(-1)
    return (error * token_weight(expected)).mean()


@torch.no_grad()
def total_loss(block: Block) -> float:
    """`layer_loss` over all batches, mean."""
    return float(torch.stack([layer_loss(block, index) for index in range(len(block.inputs))]).mean())


class _FakeQuantize(torch.autograd.Function):
    """s·clamp(round(w/s + v)) with the gradient of the rounding taken as 1 inside the range."""

    @staticmethod
    def forward(ctx: Any, weight: torch.Tensor, offset: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        ratio = weight / scale
        codes = torch.round(ratio + offset)
        inside = (codes >= QMIN) & (codes <= QMAX)
        codes = codes.clamp_(QMIN, QMAX)
        ctx.save_for_backward(codes - ratio * inside, inside, scale)
        return codes * scale

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor):
        slope, inside, scale = ctx.saved_tensors
        grad = grads[0]
        return None, grad * scale * inside, (grad * slope).sum(-1, keepdim=True)


class _RoundFP8(torch.autograd.Function):
    """x rounded to e4m3 with one scale per token; the gradient passes straight through. x: (…, in)."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        amax = x.abs().amax(-1, keepdim=True).float()
        scale = torch.where(amax == 0, torch.ones_like(amax), amax / E4M3_MAX)
        return ((x / scale).to(torch.float8_e4m3fn).float() * scale).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor):
        return grads[0]


class SharedInput:
    """Rounds the input of a Linear, once for neighbours that read the very same tensor."""

    def __init__(self, fp8: bool):
        self.fp8 = fp8
        self.seen: tuple[torch.Tensor, torch.Tensor] | None = None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if not self.fp8:
            return x
        if self.seen is None or self.seen[0] is not x:
            self.seen = (x, _RoundFP8.apply(x))
        return self.seen[1]


class LearnedLinear(nn.Module):
    """A Linear whose weight is rounded with learnable offsets and ranges."""

    def __init__(self, block: Block, name: str, start: Rounded, snap: Snap, shared: SharedInput):
        super().__init__()
        self.snap, self.shared = snap, shared
        self.shape, self.dtype, self.bias = start.weight.shape, block.linears[name].weight.dtype, block.bias(name)
        self.weight = grouped(start.weight, block.group_size(name))
        self.start = start.scale.unsqueeze(-1)
        self.offset = nn.Parameter(torch.zeros_like(self.weight))
        self.range = nn.Parameter(torch.ones_like(self.start))

    def scale(self) -> torch.Tensor:
        """(out, groups, 1): start·range, rounded to what is stored; the gradient ignores that rounding."""
        scale = self.start * self.range
        return scale + (self.snap(scale) - scale).detach()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = _FakeQuantize.apply(self.weight, self.offset, self.scale())
        return functional.linear(self.shared(x), weight.view(self.shape).to(self.dtype), self.bias)

    @torch.no_grad()
    def clamp(self) -> None:
        """Keeps offsets within half a step and ranges within their limits."""
        self.offset.clamp_(-0.5, 0.5)
        self.range.clamp_(RANGE_MIN, RANGE_MAX)

    @torch.no_grad()
    def forget(self) -> None:
        """Back to the start."""
        self.offset.zero_()
        self.range.fill_(1)

    @torch.no_grad()
    def quantized(self, scale_dtype: torch.dtype) -> QuantizedWeight:
        """The learned codes (out, in) and scales (out, groups)."""
        scale = self.snap(self.start * self.range)
        codes = torch.round(self.weight / scale + self.offset).clamp_(QMIN, QMAX)
        return QuantizedWeight(codes.view(self.shape).to(torch.int8), scale.squeeze(-1).to(scale_dtype))
