"""What a method of the `kv_cache` slot is: a frozen dataclass of options that says in which codes past keys and values
are kept and which tokens stay dense, and may look at the queries, keys and values of layers for static tensors.

Methods that quantize are in `quant/`, those that leave something out in `sparsify/`; neither room knows the other, and
what they have in common is here, beside the codecs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from pydantic import ConfigDict, Field

from .activations import FP8_CAPABILITY, triton_refusal
from .kv_codec import Codec
from .kv_codes import KeyMap, Kind
from .kv_pages import TokenCodec


@dataclass(frozen=True)
class AttentionInputs:
    """What one call of an attention layer works on.

    query: (batch, num_heads, queries, head_dim), key and value: (batch, num_kv_heads, keys, head_dim), post-RoPE.
    options: the other arguments of `kernels.attention.prefill_attention`, without its mode.
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    options: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class KVCacheMethod:
    """Base of every method of the `kv_cache` slot.

    sink_tokens: tokens at the start of every sequence that stay dense. recent_tokens: the last tokens that stay dense;
    older ones are coded a page at a time. max_tokens: a longer sequence is refused, None for no limit.

    A subclass says in which codes it stores tokens: by `kind`, of `kernels.kv_codes`, or by a `codec` of its own.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")  # pyright: ignore[reportUnannotatedClassAttribute]
    kind: ClassVar[Kind] = "fp8"
    calibrated: ClassVar[str] = ""
    """A sentence on what calibration text was used for."""
    sequences: ClassVar[int] = 2
    """Windows of calibration text that it looks at, at most."""

    sink_tokens: Annotated[int, Field(ge=0)] = 4
    recent_tokens: Annotated[int, Field(ge=0)] = 128
    max_tokens: Annotated[int, Field(ge=1)] | None = None

    @property
    def spread_over(self) -> int | None:
        """Positions that calibration text is spread over, where codes are made for keys as they stand; None leaves it
        at the beginning."""
        return None

    @property
    def needs_data(self) -> bool:
        """Whether `statics` looks at calibration text; if not, it is not called."""
        return False

    def kernel_refusal(self, device: torch.device) -> str | None:
        """Why no kernel reads such a cache on a device; None if one does."""
        return triton_refusal(device, FP8_CAPABILITY)

    def statics(self, inputs: AttentionInputs) -> dict[str, torch.Tensor]:
        """Named tensors of one layer that its tokens are coded with, found on calibration text."""
        raise NotImplementedError

    def settled(
        self, layers: Mapping[str, dict[str, torch.Tensor]], shares: Mapping[str, float]
    ) -> dict[str, dict[str, torch.Tensor]]:
        """Static tensors of all layers, by module, once `statics` has seen every one of them.

        shares: the mean of ‖a‖² / ‖h‖² over tokens of calibration text, a what the attention module adds to a token's
        hidden states, h these as its decoder layer is given them.
        """
        return dict(layers)

    def blank_statics(self, heads: int, head_dim: int) -> dict[str, torch.Tensor]:
        """Tensors without content, on the meta device, for counting bytes: of the shapes that `statics` gives where
        codes need them, and none where these can do without."""
        return {}

    def key_map(self, statics: Mapping[str, torch.Tensor]) -> KeyMap | None:
        """What is done to a layer's keys before they are coded. statics: of the layer; empty without calibration."""
        return None

    def codec(self, statics: Mapping[str, torch.Tensor]) -> Codec:
        """What codes a layer's tokens. statics: of the layer; empty without calibration."""
        return TokenCodec(self.kind, self.key_map(statics))
