"""A mixture of experts as one Linear per expert and projection, in place of tensors of three dimensions.

For token t with chosen experts e and routing weights w_te, which the router beside gives and nobody here changes:

    y_t = Σ_e w_te · down_e(gate(gate_e(x_t), up_e(x_t)))

Each expert runs once, on the tokens that go to it; products have the model's dtype, as in transformers, and their sum
is taken in float32. Every method, kernel and file sees ordinary Linears that way. What it costs is a launch per
Linear and one look of the host at how many tokens go where, for every mixture and every token generated.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

ONLY_KOMPAKT = "only_kompakt_reads"
"""A key of groups in `quantization_config` that compressed-tensors does not know, and so refuses. It stands where
experts that checkpoints of the architecture hold fused are stored one by one: others would leave them random.
"""


@dataclass(frozen=True)
class Gate:
    """What stands between the projections. function: (gate, up), each (tokens, intermediate) → the input of down.

    linear_in_up: it is act(gate) · up, so that a channel scale can be moved from up into down.
    """

    function: Callable[[Tensor, Tensor], Tensor]
    linear_in_up: bool


class Expert(nn.Module):
    """One expert. names: of its Linears for gate, up and down, as checkpoints call them."""

    def __init__(self, names: tuple[str, str, str], linears: tuple[nn.Linear, nn.Linear, nn.Linear], gate: Gate):
        super().__init__()
        self.names, self.gate = names, gate
        for name, linear in zip(names, linears, strict=True):
            self.add_module(name, linear)

    def forward(self, x: Tensor) -> Tensor:
        """x: (tokens, hidden) → (tokens, hidden)."""
        gate, up, down = (self.get_submodule(name) for name in self.names)
        return down(self.gate.function(gate(x), up(x)))


class SeparateExperts(nn.Module):
    """Experts "0", "1", …, called as transformers calls its own.

    routed: (experts,) int64, tokens that went to each, with a weight that is not 0, counted while it is set.
    unrouted: experts that, while it is set, also run on the tokens that do not go to them: that adds nothing to the
    output, and gives their Linears the inputs and gradients that an average routing weight would have given.
    """

    def __init__(self, experts: list[Expert]):
        super().__init__()
        self.routed: Tensor | None = None
        self.unrouted: frozenset[int] = frozenset()
        for index, expert in enumerate(experts):
            self.add_module(str(index), expert)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """hidden_states: (tokens, hidden). top_k_index, top_k_weights: (tokens, experts per token)."""
        chosen, experts = top_k_index.reshape(-1), list(self.children())
        counts = torch.bincount(chosen, minlength=len(experts))
        places = chosen.argsort(stable=True).split(counts.tolist())
        weights = top_k_weights.reshape(-1, 1)
        if self.routed is not None:
            self.routed += torch.bincount(chosen[weights.flatten() != 0], minlength=len(experts)).to(self.routed.device)
        output = torch.zeros_like(hidden_states, dtype=torch.float32)
        for index, (expert, mine) in enumerate(zip(experts, places, strict=True)):
            tokens = mine // top_k_index.shape[-1]
            if len(mine):
                product = expert(hidden_states[tokens]) * weights[mine]
                output.index_add_(0, tokens, product.float())
            if index in self.unrouted:
                others = torch.ones(len(hidden_states), dtype=torch.bool, device=tokens.device)
                others[tokens[weights[mine, 0] != 0]] = False
                _show(expert, hidden_states.detach(), others.nonzero().flatten(), weights.detach().mean(), output)
        return output.to(hidden_states.dtype)

    @contextmanager
    def counted(self) -> Iterator[Tensor]:
        """Counts the tokens that go to each expert: (experts,) int64, on the CPU."""
        self.routed = torch.zeros(len(list(self.children())), dtype=torch.int64)
        try:
            yield self.routed
        finally:
            self.routed = None

    @contextmanager
    def on_every_token(self, experts: frozenset[int]) -> Iterator[None]:
        """For a while, `experts` see the tokens that do not go to them as well."""
        self.unrouted = experts
        try:
            yield
        finally:
            self.unrouted = frozenset()


def _show(expert: nn.Module, hidden: Tensor, tokens: Tensor, weight: Tensor, output: Tensor) -> None:
    """Runs an expert on some tokens as if they went there with a weight, and adds nothing to the output."""
    if len(tokens):
        product = expert(hidden[tokens].requires_grad_()) * weight
        output.index_add_(0, tokens, _Silent.apply(product.float()))


class _Silent(torch.autograd.Function):
    """Zeros with the gradient of what they stand for."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        return torch.zeros_like(value)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0]


def separate_experts_of(module: nn.Module) -> dict[str, SeparateExperts]:
    """The mixtures inside a module, by name there."""
    return {name: child for name, child in module.named_modules() if isinstance(child, SeparateExperts)}
