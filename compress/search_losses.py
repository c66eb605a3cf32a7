"""What each choice for each part of a model loses, to second order: KL from the float model in nats per token.

With δ_t the change of a Linear's output at token t, and g_t the gradient there of Σ_s log p(y_s), where every y_s is
drawn from the float model's own prediction at position s, the Fisher information gives

    KL per token ≈ 1/(2T) Σ_t E (g_t · δ_t)²

summed over the T tokens of a few windows of text and over the Linears of a part. What this leaves out are products of
errors at different tokens and in different Linears, and whatever is not quadratic; a search corrects the sum by what
it measures (`searching.py`). A direct measure is no better where it matters: after any change, a bf16 model is some
0.001 nats from itself by rounding alone, as much as FP8 in one part of it costs.

Three passes over decoder layers, all in float: forward over the windows, keeping the input of every layer; backward,
keeping the gradient at every layer's output, one layer's graph at a time; and forward over the calibration samples, in
which the Linears of a layer are rounded in every way on offer, from the second moments that a weight method wants, and
δ and g are taken. The float model is on one device as a whole. Channel scales are not folded, since a fold belongs to
several parts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ..quant.block import Block
from ..quant.fp8 import round_fp8
from ..quant.method import WeightMethod
from .hf_decoder import LayerCalls, decoder_layers, head_logits, run_layer
from .linear import CompressedLinear
from .search_space import Choice, Part
from .walk import check_finite

Losses = dict[str, dict[str, float]]
"""Linear, by its full name → choice → KL in nats per token."""


class LossWalk:
    """The passes. batches: calibration tokens for second moments, (batch, tokens) each. windows: (n, tokens) to measure
    on. covered: full names of the Linears that may be quantized.
    """

    def __init__(
        self,
        model: Any,
        method: WeightMethod,
        batches: list[torch.Tensor],
        windows: torch.Tensor,
        covered: set[str],
        seed: int = 0,
    ):
        self.model, self.method, self.covered, self.seed = model, method, covered, seed
        self.layers = decoder_layers(model)
        self.device = model.get_input_embeddings().weight.device
        self.measured = WindowGradients(model, windows, seed)
        self.calls = LayerCalls(model, self.layers, batches)
        self.hidden = list(self.calls.hidden)
        self.position = 0

    @torch.no_grad()
    def losses(self, index: int, choices: list[Choice], progress: Callable[[str], None]) -> Losses:
        """What every Linear of a layer loses by every choice that fits it. Layers must be asked for in order."""
        assert index >= self.position, "layers are measured in order"
        while self.position < index:
            self.hidden = [self._run(self.position, batch) for batch in range(len(self.hidden))]
            self.position += 1
        check_finite(*self.layers[index])
        block = self._block(index)
        found: Losses = {f"{block.name}.{child}": {} for child in block.linears}
        packed = {}
        for choice in choices:
            progress(choice.key)
            if choice.weights == "float":
                for row in found.values():
                    row[choice.key] = 0.0
            else:
                packed[choice.key] = self._rounded(block, choice)
        for child, x, gradient in self.measured.calls(index, block.linears):
            row = found[f"{block.name}.{child}"]
            expected = _float_output(block.linears[child], x)
            for key, linears in packed.items():
                if child in linears:
                    change = linears[child](x.float()) - expected
                    row[key] = row.get(key, 0.0) + float((change * gradient).sum(-1).double().square().sum())
        scale = 1 / (2 * self.measured.tokens)
        return {name: {key: value * scale for key, value in row.items()} for name, row in found.items()}

    def _run(self, index: int, batch: int) -> torch.Tensor:
        return run_layer(self.layers[index][1], self.hidden[batch], self.calls.of_layer(index, self.device)[batch])

    def _block(self, index: int) -> Block:
        """The layer as weight methods see it, with its moments if the method wants any."""
        name, layer = self.layers[index]
        linears = {
            child: module
            for child, module in layer.named_modules()
            if isinstance(module, nn.Linear) and f"{name}.{child}" in self.covered
        }
        outputs = None
        if self.method.needs_reference:
            outputs = [self._run(index, batch) for batch in range(len(self.hidden))]
        block = Block(
            name=name,
            module=layer,
            linears=linears,
            schemes={},
            folds=[],
            inputs=self.hidden,
            arguments=self.calls.of_layer(index, self.device),
            scale_dtype=next(iter(linears.values())).weight.dtype if linears else torch.bfloat16,
            device=self.device,
            reference=outputs,
            seed=self.seed + index,
        )
        if self.method.needs_data and linears:
            _ = block.statistics
        return block

    def _rounded(self, block: Block, choice: Choice) -> dict[str, CompressedLinear]:
        """Every Linear of a layer that the choice fits, packed, without its bias."""
        linears = {child: item for child, item in block.linears.items() if choice.fits(item.in_features)}
        scheme = choice.scheme(self.method.activations)
        if choice.weights == "fp8":
            quantized = {
                child: round_fp8(item.weight.detach().float(), block.scale_dtype) for child, item in linears.items()
            }
        else:
            quantized = self.method.quantize(block.anew(linears, dict.fromkeys(linears, scheme))) if linears else {}
        return {child: CompressedLinear.from_quantized(found, None, scheme) for child, found in quantized.items()}


class WindowGradients:
    """Windows of text in the float model: the input of every decoder layer, and the gradient at its output.

    inputs, gradients: by layer, then window: (1, tokens, hidden).
    """

    def __init__(self, model: Any, windows: torch.Tensor, seed: int):
        self.layers, self.tokens = decoder_layers(model), windows.numel()
        self.device = model.get_input_embeddings().weight.device
        rows = list(windows.split(1))
        self.arguments = LayerCalls(model, self.layers, rows)
        self.inputs = [list(self.arguments.hidden)]
        with torch.no_grad():
            for index, (_, layer) in enumerate(self.layers):
                arguments = self.arguments.of_layer(index, self.device)
                self.inputs.append([run_layer(layer, hidden, how) for hidden, how in zip(self.inputs[-1], arguments)])
        generator = torch.Generator(self.device).manual_seed(seed)
        last = [self._at_output(model, row, hidden, generator) for row, hidden in zip(rows, self.inputs[-1])]
        self.gradients = [last]
        for index in reversed(range(1, len(self.layers))):
            self.gradients.insert(0, [self._backward(index, row)[0] for row in range(len(rows))])

    def _at_output(
        self, model: Any, tokens: torch.Tensor, hidden: torch.Tensor, generator: torch.Generator
    ) -> torch.Tensor:
        """Gradient of the log-likelihood of drawn tokens at the output of the last layer."""
        with torch.enable_grad():
            hidden = hidden.detach().requires_grad_()
            log_p = head_logits(model, self.layers, tokens, hidden)[0].float().log_softmax(-1)
            drawn = torch.multinomial(log_p.detach().exp(), 1, generator=generator)
            return torch.autograd.grad(log_p.gather(-1, drawn).sum(), hidden)[0]

    def _backward(self, index: int, row: int, outputs: list[torch.Tensor] | None = None) -> tuple[torch.Tensor, ...]:
        """Gradients at the input of a layer, from `self.gradients` at its output, and at `outputs`, which a forward
        pass fills.
        """
        with torch.enable_grad():
            hidden = self.inputs[index][row].detach().requires_grad_()
            arguments = self.arguments.of_layer(index, self.device)[row]
            output = run_layer(self.layers[index][1], hidden, arguments)
        wanted = [hidden, *(outputs or [])]
        # While gradients are made from the last layer on, those of this layer's output stand first.
        place = index - (len(self.layers) - len(self.gradients))
        return torch.autograd.grad(output, wanted, self.gradients[place][row].to(output.dtype), allow_unused=True)

    def calls(self, index: int, linears: dict[str, nn.Linear]):
        """(name, input (tokens, in), gradient at its output (tokens, out) float32) of every call of its Linears."""
        for row in range(len(self.gradients[index])):
            seen: list[tuple[str, torch.Tensor]] = []
            outputs: list[torch.Tensor] = []

            def observe(child: str, seen: list = seen, outputs: list = outputs) -> Callable:
                def hook(module: nn.Module, args: tuple, output: torch.Tensor) -> None:
                    seen.append((child, args[0].detach()))
                    outputs.append(output)

                return hook

            handles = [linear.register_forward_hook(observe(child)) for child, linear in linears.items()]
            try:
                _, *gradients = self._backward(index, row, outputs)
            finally:
                for handle in handles:
                    handle.remove()
            for (child, x), gradient in zip(seen, gradients, strict=True):
                if gradient is not None:
                    yield child, x.reshape(-1, x.shape[-1]), gradient.reshape(-1, gradient.shape[-1]).float()


def parts_of(model: Any, index: int, linears: dict[str, nn.Linear], tokens: torch.Tensor) -> list[Part]:
    """Parts of a layer: those of its Linears that read the same tensor, in the order it calls them. tokens: (1, n)."""
    layers = decoder_layers(model)
    name, layer = layers[index]
    calls = LayerCalls(model, layers, [tokens])
    found: list[tuple[torch.Tensor, list[str]]] = []

    def observe(child: str) -> Callable:
        def hook(module: nn.Module, args: tuple) -> None:
            group = next((names for tensor, names in found if tensor is args[0]), None)
            if group is None:
                found.append((args[0], [child]))
            elif child not in group:
                group.append(child)

        return hook

    handles = [linear.register_forward_pre_hook(observe(child)) for child, linear in linears.items()]
    try:
        with torch.no_grad():
            run_layer(layer, calls.hidden[0], calls.of_layer(index, calls.hidden[0].device)[0])
    finally:
        for handle in handles:
            handle.remove()
    called = {child for _, children in found for child in children}
    groups = [children for _, children in found] + [[child] for child in linears if child not in called]
    return [
        Part(
            tuple(f"{name}.{child}" for child in children),
            tuple((linears[child].out_features, linears[child].in_features) for child in children),
            linears[children[0]].weight.dtype,
        )
        for children in groups
    ]


def _float_output(linear: nn.Linear, x: torch.Tensor) -> torch.Tensor:
    """x Wᵀ in float32, without the bias."""
    return x.float() @ linear.weight.float().T
