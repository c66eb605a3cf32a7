"""What `linear_speed` times on one layer: kompakt's INT4 methods with their references, and peers of other kinds.

| peer | what runs |
|---|---|
| bf16 | ``torch.nn.functional.linear`` |
| fp8 | FP8 weights; activations quantized per token, then ``torch._scaled_mm`` with row-wise scales |
| fp8-mm | that ``torch._scaled_mm`` alone, on activations that are already quantized |
| torch-int4 | ``torch.ops.aten._weight_int4pack_mm``, bf16 activations, groups of 128, up to 256 tokens |
| gemlite | the package's A16W4 layer, bf16 activations, groups of 128 |
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..kernels.activations import quantize_fp8_per_token, quantize_fp8_ref
from ..kernels.fp8_linear import SCALED_MM_MULTIPLE, fp8_linear, scaled_matmul
from ..kernels.int4_expand import fold_ref
from ..kernels.int4_linear import dequantize_int4, linear_backend, w4a16_linear
from ..kernels.packing import pack_int4, unpack_int4
from ..kernels.w4a8_linear import planes_refusal, takes_packed, w4a8_linear, w4a8_ref
from ..quant.grid import grouped, round_codes, signed_scale
from .device_speed import Machine

PEER_GROUP_SIZE = 128
TORCH_INT4_TOKENS = 256
TORCH_INT4_TILES = 8


class Absent(Exception):
    """A peer cannot take part; the message says why."""


@dataclass(frozen=True)
class Contender:
    """weights: equal copies of what ``run(input, *weights)`` multiplies. prepare: x → input, outside of the time."""

    weights: list[tuple[Any, ...]]
    run: Callable[..., Any]
    prepare: Callable[[Tensor], Any] = lambda x: x
    max_tokens: int | None = None

    def calls(self, x: Tensor) -> list[Callable[[], Any]]:
        """One call per copy. x: (tokens, in_features) bf16."""
        given = self.prepare(x)
        return [partial(self.run, given, *weights) for weights in self.weights]


@dataclass(frozen=True)
class Variant:
    """One of kompakt's layers. method: w4a8 or w4a16. exact: see `w4a8_linear`."""

    method: str
    group_size: int | str
    exact: bool = False

    @property
    def label(self) -> str:
        """``channel``, ``g128``, ``g128 exact``, ``w4a16 g128``."""
        size = f"g{self.group_size}" if isinstance(self.group_size, int) else self.group_size
        return " ".join([*([] if self.method == "w4a8" else [self.method]), size, *(["exact"] if self.exact else [])])

    def groups(self, in_features: int) -> int:
        """Scales of a row."""
        return in_features // self.group_size if isinstance(self.group_size, int) else 1

    def build(self, weight: Tensor, machine: Machine) -> Contender:
        """weight: (out_features, in_features) float."""
        run = partial(w4a8_linear, exact=self.exact) if self.method == "w4a8" else w4a16_linear
        return Contender(machine.rotated(quantize_int4(weight, self.groups(weight.shape[1]))), run)

    def folds(self, x: Tensor, weight_packed: Tensor, weight_scale: Tensor) -> bool:
        """Whether `w4a8_linear` rounds scaled weights to FP8 for this call. x: (tokens, in_features)."""
        groups = weight_scale.shape[1]
        if self.method != "w4a8" or groups == 1 or planes_refusal(x.device, x.shape[1], groups) is not None:
            return False
        return not takes_packed(x.shape[0], weight_packed, weight_scale, exact=self.exact)

    def expected(
        self, x: Tensor, weight_packed: Tensor, weight_scale: Tensor, *, folded: bool
    ) -> tuple[Tensor, float | None]:
        """The reference in FP32, and how far the product over folded weights is from it; None where nothing is folded.

        Where scales are folded that product is the reference: rounding the weights is no error of the kernel.
        """
        if self.method == "w4a16":
            weight = dequantize_int4(weight_packed, weight_scale, x.shape[1], x.dtype)
            return x.float() @ weight.float().t(), None
        exact = w4a8_ref(x.float(), weight_packed, weight_scale)
        if not folded:
            return exact, None
        product = folded_ref(x, weight_packed, weight_scale)
        return product, relative_error(product, exact)


def quantize_int4(weight: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """Round to nearest: (out_features, in_features) float → packed codes and bf16 scales (out_features, groups)."""
    values = grouped(weight.float(), weight.shape[1] // groups)
    scale = signed_scale(values).bfloat16()
    return pack_int4(round_codes(values, scale.float()).flatten(1).to(torch.int8)), scale


def folded_ref(x: Tensor, weight_packed: Tensor, weight_scale: Tensor) -> Tensor:
    """FP32 product of activations in FP8 and the weights of `fold_ref`. x: (rows, in_features)."""
    x8, scale = quantize_fp8_ref(x)
    codes, row_scale = fold_ref(weight_packed, weight_scale, x.shape[1])
    halves = codes.float().view(codes.shape[0], 2, -1)
    weight = halves.transpose(1, 2).flatten(1)[:, : x.shape[1]] * row_scale
    return (x8.float() @ weight.t()) * scale


def relative_error(found: Tensor, expected: Tensor) -> float:
    """‖found − expected‖ / ‖expected‖ in the Frobenius norm."""
    return float((found.float() - expected).norm() / expected.norm())


def bf16_peer(weight: Tensor, machine: Machine) -> Contender:
    """weight: (out_features, in_features) bf16, here and in every peer."""
    return Contender(machine.rotated((weight,)), torch.nn.functional.linear)


def fp8_weights(weight: Tensor, machine: Machine) -> list[tuple[Tensor, Tensor]]:
    """FP8 weights with one scale per output."""
    backend = linear_backend("fp8_linear", weight.device)
    if backend.name == "reference":
        raise Absent(backend.reason)
    if weight.shape[0] % SCALED_MM_MULTIPLE or weight.shape[1] % SCALED_MM_MULTIPLE:
        raise Absent(f"needs multiples of {SCALED_MM_MULTIPLE}")
    return machine.rotated(quantize_fp8_per_token(weight))


def fp8_peer(weight: Tensor, machine: Machine) -> Contender:
    """Quantization and product."""
    return Contender(fp8_weights(weight, machine), fp8_linear)


def fp8_matmul_peer(weight: Tensor, machine: Machine) -> Contender:
    """The product alone."""

    def run(x: tuple[Tensor, Tensor], codes: Tensor, scale: Tensor) -> Tensor:
        return scaled_matmul(*x, codes, scale, None, torch.bfloat16)

    return Contender(fp8_weights(weight, machine), run, prepare=quantize_fp8_per_token)


def peer_groups(weight: Tensor) -> int:
    """Groups of the INT4 peers."""
    if weight.shape[1] % PEER_GROUP_SIZE:
        raise Absent(f"{weight.shape[1]} input channels are no multiple of {PEER_GROUP_SIZE}")
    return weight.shape[1] // PEER_GROUP_SIZE


def torch_int4_peer(weight: Tensor, machine: Machine) -> Contender:
    """Torch's own INT4 product. Its zero points are offsets of what is already centred, so they are 0."""
    packed, scale = quantize_int4(weight, peer_groups(weight))
    pairs = packed.view(torch.uint8)
    swapped = (pairs >> 4) | (pairs << 4)  # it wants the even channel in the high nibble
    tiles = torch.ops.aten._convert_weight_to_int4pack(swapped, TORCH_INT4_TILES)
    scale_and_zero = torch.stack((scale.t(), torch.zeros_like(scale).t()), dim=2).contiguous()

    def run(x: Tensor, tiles: Tensor, scale_and_zero: Tensor) -> Tensor:
        return torch.ops.aten._weight_int4pack_mm(x, tiles, PEER_GROUP_SIZE, scale_and_zero)

    return Contender(machine.rotated((tiles, scale_and_zero)), run, max_tokens=TORCH_INT4_TOKENS)


def gemlite_peer(weight: Tensor, machine: Machine) -> Contender:
    """GemLite's layer. It chooses its kernels, by trial where it ships no choice for the device and the shape; the
    choices it ships for the H100 hold on every card of that architecture.
    """
    groups = peer_groups(weight)
    found = importlib.util.find_spec("gemlite")
    if found is None or found.origin is None:
        raise Absent("not installed")
    import gemlite.core  # pyright: ignore[reportMissingImports]
    from gemlite.helper import A16W4_HQQ_INT  # pyright: ignore[reportMissingImports]

    if gemlite.core.get_default_cache_config() is None and torch.cuda.get_device_capability(weight.device) == (9, 0):
        gemlite.core.GemLiteLinear.load_config(str(Path(found.origin).parent / "configs" / "h100.json"))
    packed, scale = quantize_int4(weight, groups)
    codes = (unpack_int4(packed, weight.shape[1]) + 8).to(torch.uint8)
    layer = A16W4_HQQ_INT(device=str(weight.device)).from_weights(codes, scale, torch.full_like(scale, 8))
    return Contender(machine.rotated((layer,)), lambda x, layer: layer(x))


PEERS: dict[str, Callable[[Tensor, Machine], Contender]] = {
    "bf16": bf16_peer,
    "fp8": fp8_peer,
    "fp8-mm": fp8_matmul_peer,
    "torch-int4": torch_int4_peer,
    "gemlite": gemlite_peer,
}
