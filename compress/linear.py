"""`CompressedLinear`: a Linear that holds packed weights and calls one op of kernels/."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import nn

from ..kernels.fp8_linear import fp8_linear, fp8_w8a16_linear
from ..kernels.int4_linear import w4a16_linear
from ..kernels.packing import pack_int4
from ..kernels.w4a8_linear import w4a8_linear
from ..quant.method import QuantizedWeight, WeightScheme


class SharedProduct(Protocol):
    """Who multiplies for a W4A8 Linear that is not the only one to read its input (`shared_input.py`)."""

    def multiply(self, x: torch.Tensor, linear: CompressedLinear) -> torch.Tensor:
        """x: (…, in) → (…, out)."""
        ...


OPS = {
    ("int4", "none"): w4a16_linear,
    ("fp8", "fp8"): fp8_linear,
    ("fp8", "none"): fp8_w8a16_linear,
}
"""(weights, activations) → op(x, weight, scale, bias), where the op is one step."""


class CompressedLinear(nn.Module):
    """y = x Wᵀ + b with W stored as INT4 or FP8; tensors and names are those of the checkpoint (compressed-tensors).

    INT4: `weight_packed` int32 (out, ⌈in/8⌉), `weight_scale` (out, groups), `weight_shape` int64 (2,).
    FP8: `weight` float8_e4m3fn (out, in), `weight_scale` (out, 1).
    They are Parameters without gradient, not buffers, so that accelerate offloads them.

    exact: with FP8 activations, never fold group scales into rounded FP8 weights, however many tokens there are.
    shared: who multiplies, if the input is read by other Linears as well.
    """

    exact: bool = False
    shared: SharedProduct | None = None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: bool,
        scheme: WeightScheme,
        dtype: torch.dtype,
        device: torch.device | str | None = None,
    ):
        super().__init__()
        self.in_features, self.out_features, self.scheme = in_features, out_features, scheme

        def empty(*shape: int, dtype: torch.dtype = dtype) -> nn.Parameter:
            return nn.Parameter(torch.empty(*shape, dtype=dtype, device=device), requires_grad=False)

        if scheme.weights == "int4":
            self.weight_packed = empty(out_features, -(-in_features // 8), dtype=torch.int32)
            self.weight_shape = empty(2, dtype=torch.int64)
        else:
            self.weight = empty(out_features, in_features, dtype=torch.float8_e4m3fn)
        self.weight_scale = empty(out_features, scheme.groups(in_features))
        self.bias = empty(out_features) if bias else None

    @classmethod
    def instead_of(cls, linear: nn.Linear, scheme: WeightScheme, device: torch.device) -> CompressedLinear:
        """For the weight and bias of `linear`, in its dtype; nothing is filled in yet."""
        return cls(
            linear.in_features,
            linear.out_features,
            bias=linear.bias is not None,
            scheme=scheme,
            dtype=linear.weight.dtype,
            device=device,
        )

    @classmethod
    def from_quantized(
        cls, quantized: QuantizedWeight, bias: torch.Tensor | None, scheme: WeightScheme
    ) -> CompressedLinear:
        """Packs codes and scales; everything stays on the device of the codes."""
        out_features, in_features = quantized.codes.shape
        linear = cls(
            in_features,
            out_features,
            bias=bias is not None,
            scheme=scheme,
            dtype=quantized.scale.dtype,
            device=quantized.codes.device,
        )
        if scheme.weights == "int4":
            linear.weight_packed.data = pack_int4(quantized.codes)
            linear.weight_shape.data = torch.tensor([out_features, in_features], device=quantized.codes.device)
        else:
            linear.weight.data = quantized.codes.contiguous()
        linear.weight_scale.data = quantized.scale.contiguous()
        if bias is not None:
            linear.bias = nn.Parameter(bias.detach().clone(), requires_grad=False)
        return linear

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: (…, in) → (…, out), same dtype."""
        if self.shares:
            packed, scale, bias = self.weight_packed, self.weight_scale, self.bias
            if self.shared is None:
                return w4a8_linear(x, packed, scale, bias, exact=self.exact)
            return self.shared.multiply(x, self)
        stored = self.weight_packed if self.scheme.weights == "int4" else self.weight
        return OPS[self.scheme.weights, self.scheme.activations](x, stored, self.weight_scale, self.bias)

    def extra_repr(self) -> str:
        """Shape and scheme, for `print(model)`."""
        return f"in_features={self.in_features}, out_features={self.out_features}, {self.scheme.describe()}"

    @property
    def shares(self) -> bool:
        """Whether the input is quantized in a step of its own."""
        return self.scheme.weights == "int4" and self.scheme.activations == "fp8"

    @property
    def stored_bytes(self) -> int:
        """Bytes of all tensors, metadata included."""
        return sum(parameter.numel() * parameter.element_size() for parameter in self.parameters())

    @property
    def weight_bytes(self) -> int:
        """Bytes of what stands for the weight: codes, scales and shape, without the bias."""
        return self.stored_bytes - (0 if self.bias is None else self.bias.numel() * self.bias.element_size())


def storage(model: nn.Module) -> dict[str, Any]:
    """Quantized weights of a model, their bytes as allocated, and bits per weight (None if there are none)."""
    linears = [module for module in model.modules() if isinstance(module, CompressedLinear)]
    weights = sum(linear.in_features * linear.out_features for linear in linears)
    stored = sum(linear.weight_bytes for linear in linears)
    return {
        "quantized_weights": weights,
        "quantized_bytes": stored,
        "bits_per_weight": round(8 * stored / weights, 4) if weights else None,
    }


def keep_group_scales_exact(model: nn.Module, exact: bool = True) -> None:
    """Sets `exact` on every Linear: group scales are applied in FP32 at any number of tokens, slower with many."""
    for module in model.modules():
        if isinstance(module, CompressedLinear):
            module.exact = exact
