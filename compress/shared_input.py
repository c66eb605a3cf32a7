"""Linears of a decoder layer that read the same tensor quantize it once: q, k and v; gate and up.

Modelling code calls them one by one, so the quantized input waits in an object that the Linears of a layer share. It is
valid only for the very tensor it was made from, unchanged, and only until the layer's forward ends: a hook at either
end forgets it. A CUDA graph therefore always captures the quantization it needs. Under `torch.compile`, and for tensors
made in inference mode, every Linear quantizes for itself.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..kernels.w4a8_linear import QuantizedInput, input_key, quantize_w4a8_input
from .hf_decoder import decoder_layers
from .linear import CompressedLinear


class SharedInput:
    """Quantized inputs of the decoder layer that is running.

    held: (tensor, its version, {what the product needs: result}) of the tensor last seen.
    """

    def __init__(self) -> None:
        self.running = False
        self.held: tuple[torch.Tensor, int, dict[Any, QuantizedInput]] | None = None
        self.handles: list[Any] = []

    def attach(self, layer: nn.Module) -> None:
        """Follows the forward of `layer` and serves its Linears."""
        self.handles = [
            layer.register_forward_pre_hook(self.begin),
            layer.register_forward_hook(self.end, always_call=True),
        ]
        for module in layer.modules():
            if isinstance(module, CompressedLinear):
                module.shared = self

    def detach(self, layer: nn.Module) -> None:
        """Undoes `attach`."""
        for handle in self.handles:
            handle.remove()
        for module in layer.modules():
            if isinstance(module, CompressedLinear):
                module.shared = None
        self.running, self.held = False, None

    def begin(self, *_: Any) -> None:
        """The layer's forward starts."""
        if not torch.compiler.is_compiling():
            self.running, self.held = True, None

    def end(self, *_: Any) -> None:
        """The layer's forward has ended."""
        if not torch.compiler.is_compiling():
            self.running, self.held = False, None

    def quantize(self, x: torch.Tensor, linear: CompressedLinear) -> QuantizedInput:
        """`quantize_w4a8_input` for one of the layer's Linears."""
        arguments = (linear.weight_packed, linear.weight_scale, linear.bias)
        # Tensors made in inference mode do not count their changes.
        if not self.running or torch.compiler.is_compiling() or x.is_inference():
            return quantize_w4a8_input(x, *arguments, exact=linear.exact)
        held = self.held
        if held is None or held[0] is not x or held[1] != x._version:
            held = self.held = (x, x._version, {})
        tokens = x.numel() // max(1, x.shape[-1])
        key = input_key(tokens, linear.weight_packed, linear.weight_scale, exact=linear.exact)
        if key not in held[2]:
            held[2][key] = quantize_w4a8_input(x, *arguments, exact=linear.exact)
        return held[2][key]


def share_inputs(model: nn.Module) -> None:
    """Lets the W4A8 Linears of each decoder layer share their quantized inputs, until `unshare_inputs`."""
    unshare_inputs(model)
    for _, layer in decoder_layers(model):
        if any(isinstance(module, CompressedLinear) and module.shares for module in layer.modules()):
            shared = SharedInput()
            shared.attach(layer)
            layer.shared_input = shared  # pyright: ignore


def unshare_inputs(model: nn.Module) -> None:
    """Undoes `share_inputs`."""
    for module in model.modules():
        shared = vars(module).pop("shared_input", None)
        if shared is not None:
            shared.detach(module)
