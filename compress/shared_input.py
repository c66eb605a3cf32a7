"""Linears of a decoder layer that read the same tensor quantize it once and multiply it together: q, k and v; gate and
up.

Modelling code calls them one by one, so the quantized input waits in an object that the Linears of a layer share. It is
valid only for the very tensor it was made from, unchanged, and only until the layer's forward ends: a hook at either
end forgets it. A CUDA graph therefore always captures the quantization it needs. Under `torch.compile`, and for tensors
made in inference mode, every Linear quantizes for itself.

*One product.* Which Linears read a tensor, and in which order, is seen in a layer's first forward. On a CUDA device the
rows of their weights are then laid one behind another, the Linears keeping views, and for up to `TOGETHER_TOKENS`
tokens the first that is called multiplies for all. On an H200 a token's q, k and v of an 8B model take 17.6 µs one by
one, where launches and half-empty grids count more than bytes. Where the next forward reads something else, they are
on their own again.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from ..kernels.w4a8_linear import QuantizedInput, input_key, quantize_w4a8_input, takes_packed, w4a8_matmul
from .hf_decoder import decoder_layers
from .linear import CompressedLinear

TOGETHER_TOKENS = 64
"""Beyond, a product fills the device by itself."""


@dataclass
class Held:
    """The tensor last seen and what was made of it. version: of the tensor. quantized: by what the product needs.
    readers: who asked, in order. products: of those that have not asked yet.
    """

    tensor: Tensor
    version: int
    quantized: dict[Any, QuantizedInput] = field(default_factory=dict)
    readers: list[CompressedLinear] = field(default_factory=list)
    products: dict[CompressedLinear, Tensor] = field(default_factory=dict)


class SharedInput:
    """Quantized inputs of the decoder layer that is running.

    together: Linears that read one tensor, by the first of them.
    """

    def __init__(self) -> None:
        self.running = False
        self.held: Held | None = None
        self.together: dict[CompressedLinear, list[CompressedLinear]] = {}
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
        self.running, self.held, self.together = False, None, {}

    def begin(self, *_: Any) -> None:
        """The layer's forward starts."""
        if not torch.compiler.is_compiling():
            self.running, self.held = True, None

    def end(self, *_: Any) -> None:
        """The layer's forward has ended."""
        if not torch.compiler.is_compiling():
            self.learn()
            self.running, self.held = False, None

    def learn(self) -> None:
        """Who read the tensor that is held; a product that nobody fetched was one too many."""
        held = self.held
        if held is None or not held.readers:
            return
        first = held.readers[0]
        if held.products:
            self.together[first] = [first]
        elif first not in self.together:
            self.together[first] = held.readers

    def hold(self, x: Tensor) -> Held | None:
        """What there is for x, nothing at first; None where nothing may be kept."""
        # Tensors made in inference mode do not count their changes.
        if not self.running or torch.compiler.is_compiling() or x.is_inference():
            return None
        held = self.held
        if held is None or held.tensor is not x or held.version != x._version:
            self.learn()
            held = self.held = Held(x, x._version)
        return held

    def multiply(self, x: Tensor, linear: CompressedLinear) -> Tensor:
        """`w4a8_linear` for one of the layer's Linears. x: (…, in)."""
        own = (linear.weight_packed, linear.weight_scale, linear.bias)
        held = self.hold(x)
        if held is None:
            quantized = quantize_w4a8_input(x, *own, exact=linear.exact)
            return w4a8_matmul(quantized, *own, x.shape, x.dtype, exact=linear.exact)
        if (found := held.products.pop(linear, None)) is not None:
            held.readers.append(linear)
            return found
        tokens = x.numel() // max(1, x.shape[-1])
        key = input_key(tokens, *own[:2], exact=linear.exact)
        if key not in held.quantized:
            held.quantized[key] = quantize_w4a8_input(x, *own, exact=linear.exact)
        group = self.together.get(linear, [linear]) if tokens <= TOGETHER_TOKENS and not held.readers else [linear]
        held.readers.append(linear)
        weights = joined(group) if len(group) > 1 else None
        if weights is None or not takes_packed(tokens, *own[:2], exact=linear.exact):
            return w4a8_matmul(held.quantized[key], *own, x.shape, x.dtype, exact=linear.exact)
        y = w4a8_matmul(held.quantized[key], *weights, x.shape, x.dtype, exact=linear.exact)
        first, *others = y.split([one.out_features for one in group], dim=-1)
        held.products = dict(zip(group[1:], others, strict=True))
        return first


def joined(group: list[CompressedLinear]) -> tuple[Tensor, Tensor, Tensor | None] | None:
    """Weights, scales and biases of several Linears as one, on a CUDA device; None where they have no common form.

    They are laid one behind another unless they are already, which a graph that is being recorded must not see.
    """
    first = group[0]
    same = all(
        (one.in_features, one.scheme, one.exact, one.bias is None, one.weight_scale.dtype)
        == (first.in_features, first.scheme, first.exact, first.bias is None, first.weight_scale.dtype)
        for one in group
    )
    devices = {parameter.device for one in group for parameter in one.parameters()}
    if not same or len(devices) > 1 or not may_join(first.weight_packed):
        return None
    names = ("weight_packed", "weight_scale", *(() if first.bias is None else ("bias",)))
    parts = [[getattr(one, name) for one in group] for name in names]
    if not all(map(adjacent, parts)):
        if first.weight_packed.is_cuda and torch.cuda.is_current_stream_capturing():
            return None
        for same_name in parts:
            lay_together(same_name)
    whole = [rows[0].detach().as_strided((sum(map(len, rows)), *rows[0].shape[1:]), rows[0].stride()) for rows in parts]
    return whole[0], whole[1], whole[2] if len(whole) > 2 else None


def may_join(weight: Tensor) -> bool:
    """Whether launches cost more than they do."""
    return weight.is_cuda


def adjacent(rows: list[nn.Parameter]) -> bool:
    """Whether tensors follow one another in one storage, row after row."""
    storages = {part.untyped_storage().data_ptr() for part in rows}
    follow = all(one.data_ptr() + one.nbytes == other.data_ptr() for one, other in pairwise(rows))
    return len(storages) == 1 and follow and all(part.is_contiguous() for part in rows)


@torch.no_grad()
def lay_together(rows: list[nn.Parameter]) -> None:
    """Gives parameters one storage, in which they follow one another."""
    whole = torch.cat([part.detach() for part in rows])
    for part, view in zip(rows, whole.split([len(part) for part in rows]), strict=True):
        part.data = view


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
